//! In which way a clone comes to its memory: what the configuration says, and what the node can do.

use crate::{
    config::{CloneModeChoice, Config},
    sentence, share_server,
    state::CloneMode,
};

/// Largest memory that is shared where nobody says otherwise, in MiB. All of it is in the node's memory as long as one clone is there,
/// also what nobody uses, so that what machines save by it has to be more than that.
pub const SHARED_MIB_MAX: u64 = 512;

/// Who may look into other processes; 3 is nobody: Documentation/admin-guide/LSM/Yama.rst of the kernel.
const PTRACE_SCOPE: &str = "/proc/sys/kernel/yama/ptrace_scope";

/// The mode of machines with so much memory, and why it is no other, as half a sentence.
pub fn choose(config: &Config, memory_mib: u64) -> (CloneMode, String) {
    let of_the_node = able(config);
    match (config.clone_mode, of_the_node) {
        (CloneModeChoice::Copy, _) => (CloneMode::Copy, "as the configuration says".to_owned()),
        (CloneModeChoice::CopyOnWrite, _) => (CloneMode::CopyOnWrite, "as the configuration says".to_owned()),
        (CloneModeChoice::Auto, Err(why)) => (CloneMode::Copy, format!("for {why}")),
        (CloneModeChoice::Auto, Ok(())) if memory_mib > SHARED_MIB_MAX => {
            let why = format!(
                "for machines of more than {SHARED_MIB_MAX} MiB would have the node hold much that nobody uses"
            );
            (CloneMode::Copy, why)
        }
        (CloneModeChoice::Auto, Ok(())) => {
            let why = format!("and by copy those with more than {SHARED_MIB_MAX} MiB");
            (CloneMode::CopyOnWrite, why)
        }
    }
}

/// Whether the node has what copy-on-write needs.
fn able(config: &Config) -> Result<(), String> {
    share_server::find(&config.share_server).map_err(|error| sentence(&error))?;
    match std::fs::read_to_string(PTRACE_SCOPE) {
        Ok(scope) if scope.trim() == "3" => Err(format!("{PTRACE_SCOPE} is 3, and a clone's ids cannot be written")),
        // Without Yama nothing is in the way of root.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_machines_share_memory_where_the_node_can_and_nobody_says_otherwise() {
        let able = Config {
            share_server: "/bin/true".into(),
            ..Config::default()
        };
        let unable = Config {
            share_server: "/nowhere/server".into(),
            ..Config::default()
        };
        let told = |clone_mode| Config {
            clone_mode,
            ..unable.clone()
        };
        assert_eq!(choose(&able, SHARED_MIB_MAX).0, CloneMode::CopyOnWrite);
        assert_eq!(choose(&able, SHARED_MIB_MAX + 1).0, CloneMode::Copy);
        let (mode, why) = choose(&unable, 256);
        assert!(mode == CloneMode::Copy && why.contains("/nowhere/server"), "{why}");
        assert_eq!(
            choose(&told(CloneModeChoice::CopyOnWrite), 4096).0,
            CloneMode::CopyOnWrite
        );
        assert_eq!(choose(&told(CloneModeChoice::Copy), 256).0, CloneMode::Copy);
    }
}
