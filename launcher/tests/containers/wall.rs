//! What stands around a container: what its processes may do, and what the guest may do to the host's files.

use super::*;

/// Else it could put a link where the host is about to mount something.
pub(crate) async fn the_guest_writes_only_to_what_is_mounted_for_it(bed: Bed<'_>) {
    let root = bed.root("reached");
    let shared = Path::new(&root).ancestors().nth(2).unwrap().display();
    for attempt in [
        format!("ln -s /etc {shared}/later"),
        format!("mkdir {shared}/reached/volumes"),
        format!("mv {shared}/reached {shared}/moved"),
        format!("mount -o remount,rw {shared} && touch {shared}/file"),
    ] {
        let (_, status) = run(bed.agent(), &["sh", "-c", &format!("{attempt} 2>&1")]).await;
        assert_ne!(status, 0, "{attempt} works");
    }
    assert_eq!(run(bed.agent(), &["touch", &format!("{root}/file")]).await.1, 0);
    // There is no container, with which the guest would let go of it. A clone has no mount of its own.
    run(bed.agent(), &["umount", &root]).await;
    bed.remove_root("reached");
}

/// What a process in a container says of its own wall.
const WALL: &str = "grep -E '^(SigIgn|Seccomp|NoNewPrivs|CapEff|CapBnd|CapInh|CapAmb):' /proc/self/status; \
    cat /proc/timer_list | wc -c; ls /sys/firmware | wc -l; echo 0 2>/dev/null >/proc/sys/kernel/panic || echo read-only; \
    cat /proc/1/root/proc/self/cgroup; mount -t tmpfs none /tmp 2>/dev/null || echo no mount; ulimit -n";

fn assert_wall(outcome: Outcome) {
    let told = outcome.good();
    let lines: Vec<&str> = told.lines().collect();
    let expected = [
        "SigIgn:\t0000000000000000",
        "CapInh:\t0000000000000000",
        "CapEff:\t00000000a80425fb",
        "CapBnd:\t00000000a80425fb",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t0",
        "Seccomp:\t2",
        "0",
        "0",
        "read-only",
        "0::/",
        "no mount",
        "4096",
    ];
    assert_eq!(lines, expected);
}

pub(crate) async fn the_wall_around_a_container_stands(bed: Bed<'_>) {
    assert_wall(bed.run("wall", &["sh", "-c", WALL], |_| ()).await.0);
    let (outcome, _) = bed
        .run("nnp", &["grep", "NoNewPrivs", "/proc/self/status"], |spec| {
            spec["process"]["noNewPrivileges"] = json!(true);
        })
        .await;
    assert_eq!(outcome.good(), "NoNewPrivs:\t1\n");
    // The filter itself, not its mode alone; and a container that has none.
    let forbid = |spec: &mut serde_json::Value| {
        let rule = json!({ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 });
        spec["linux"]["seccomp"]["syscalls"][0]["names"]
            .as_array_mut()
            .unwrap()
            .retain(|name| name != "mkdir");
        spec["linux"]["seccomp"]["syscalls"].as_array_mut().unwrap().push(rule);
    };
    let (outcome, _) = bed.run("filter", &["mkdir", "/new"], forbid).await;
    assert!(outcome.stderr.contains("Operation not supported"), "{outcome:?}");
    let (outcome, _) = bed
        .run("unconfined", &["grep", "Seccomp:", "/proc/self/status"], |spec| {
            spec["linux"].as_object_mut().unwrap().remove("seccomp");
        })
        .await;
    assert_eq!(outcome.good(), "Seccomp:\t0\n");
    let (outcome, _) = bed
        .run("read-only", &["touch", "/new"], |spec| {
            spec["root"]["readonly"] = json!(true);
        })
        .await;
    assert!(outcome.stderr.contains("Read-only file system"), "{outcome:?}");
}

pub(crate) async fn a_further_process_stands_behind_the_same_wall(bed: Bed<'_>) {
    bed.start_idle("inner").await;
    assert_wall(bed.exec("inner", &["sh", "-c", WALL]).await);
    let mut process = spec::process(&["grep", "NoNewPrivs", "/proc/self/status"]);
    process["noNewPrivileges"] = json!(true);
    assert_eq!(
        bed.exec_with("inner", process).await.unwrap().good(),
        "NoNewPrivs:\t1\n"
    );
    let same = "for kind in pid mnt cgroup net ipc uts; do readlink /proc/self/ns/$kind; readlink /proc/1/ns/$kind; done | \
        uniq -c | grep -cv '^ *2 '; cat /proc/self/oom_score_adj; id -u; id -G";
    let (told, _) = {
        let outcome = bed
            .exec("inner", &["sh", "-c", &same.replace("readlink", "ls -l")])
            .await;
        (outcome.stdout, outcome.status)
    };
    assert!(told.ends_with("950\n0\n0\n"), "{told}");
    bed.remove("inner").await;
}

pub(crate) async fn another_user_has_no_capabilities(bed: Bed<'_>) {
    let user = json!({ "uid": 1000, "gid": 1001, "additionalGids": [1002, 1003], "umask": 0o27 });
    let script = "id -u; id -g; id -G; umask; grep CapEff /proc/self/status; pwd; echo $HOME";
    let expected = "1000\n1001\n1001 1002 1003\n0027\nCapEff:\t0000000000000000\n/tmp\n/\n";
    let (outcome, _) = bed
        .run("user", &["sh", "-c", script], |spec| {
            spec["process"]["user"] = user.clone();
            spec["process"]["cwd"] = json!("/tmp");
        })
        .await;
    assert_eq!(outcome.good(), expected);
    bed.start_idle("any-user").await;
    let mut process = spec::process(&["sh", "-c", script]);
    process["user"] = user;
    process["cwd"] = json!("/tmp");
    assert_eq!(bed.exec_with("any-user", process).await.unwrap().good(), expected);
    bed.remove("any-user").await;
}
