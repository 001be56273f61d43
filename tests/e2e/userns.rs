//! Pods in a user namespace, as with `hostUsers: false`: who is who inside, in the guest and on the node.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::artifacts::Containerd;
use kubeception_tests::cri::{Cri, message, wait_for_log};
use kubeception_tests::image::{BUSYBOX, WEB, WEB_PAGE};
use kubeception_tests::leftovers::expect_nothing_left;
use kubeception_tests::node::Handler;
use kubeception_tests::pod::{Container, Pod, Users};
use kubeception_tests::stream::Session;
use libtest_mimic::Trial;

use crate::lab::{Alone, Lab, OwnPod, Start, eventually, in_guest};

const BOUND: Duration = Duration::from_secs(30);
/// As a kubelet gives them to the first pod of a node.
const USERS: Users = Users {
    first: 65536,
    length: 65536,
};

/// Handler of such pods.
const HANDLER: &str = "users";

/// Without options, with which containerd 2.x starts no container in a user namespace.
pub(crate) fn handler(start: Start) -> Handler {
    start.applied(Handler::variant(HANDLER)).without_options()
}

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    // Mounts that show other owners came with containerd 2.0.
    let maps_mounts = lab.version == Containerd::V2_1;
    match lab.version {
        Containerd::V1_6 => vec![lab.trial_alone(
            "this containerd does not know of user namespaces: a pod that is to be in one is not",
            unknown,
        )],
        Containerd::V1_7 | Containerd::V2_1 => vec![
            lab.trial_alone(
                "the containers of a pod in a user namespace are, and nothing of them is left",
                move |lab| members(lab, maps_mounts),
            ),
            lab.trial_alone(
                "files of a volume belong in a user namespace to whom they belong on the node, where that is asked for",
                move |lab| volumes(lab, maps_mounts),
            ),
            lab.trial_alone("what cannot be in a pod's user namespace is refused", refused),
        ],
    }
}

/// Runs a script in a container.
fn run(cri: &Cri, container: &str, script: &str) -> Result<String> {
    let said = cri.exec(container, &["sh", "-c", script])?;
    ensure!(said.exit_code == 0, "{script}: {said:?}");
    Ok(said.stdout.trim().to_owned())
}

fn sleeper(name: &str, seconds: &str) -> Container {
    Container::script(name, &format!("sleep {seconds}; :"))
}

fn map(cri: &Cri, container: &str) -> Result<String> {
    run(cri, container, "cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '")
}

fn unknown(lab: &mut Alone<'_>) -> Result<()> {
    let before = lab.snapshot()?;
    let pod = OwnPod::run(lab.cri, Pod::new(lab.node.place(), "users").users(USERS), HANDLER)?;
    let container = lab
        .cri
        .run(&pod.id, &sleeper("one", "8111111").users(USERS), &pod.pod)?;
    let map = map(lab.cri, &container)?;
    ensure!(map.lines().all(|line| line.trim() == "0 0 4294967295"), "{map}");
    pod.remove()?;
    expect_nothing_left(&lab.node, &before, BOUND)
}

fn members(lab: &mut Alone<'_>, maps_mounts: bool) -> Result<()> {
    let before = lab.snapshot()?;
    let pod = Pod::new(lab.node.place(), "users").users(USERS).privileged();
    let pod = OwnPod::run(lab.cri, pod, HANDLER)?;
    let cri = lab.cri;
    let start = |container: Container| cri.run(&pod.id, &container.users(USERS), &pod.pod);
    let one = start(sleeper("one", "8222222").shared_processes())?;
    let two = start(sleeper("two", "8333333").shared_processes().user(1000))?;
    let apart = start(sleeper("apart", "8444444").privileged())?;

    let address = cri.pod_address(&pod.id)?;
    let own = run(cri, &one, "ip -o address show dev eth0")?;
    ensure!(
        own.contains(&format!(" {address}/")),
        "the pod has {address}, and the guest {own}"
    );
    // Who they are: inside, and in the guest.
    for container in [&one, &two, &apart] {
        let map = map(cri, container)?;
        ensure!(map.lines().all(|line| line.trim() == "0 65536 65536"), "{map}");
    }
    let namespace = |container: &str| run(cri, container, "readlink /proc/self/ns/user");
    let of_guest = in_guest(&lab.node, &pod.id, &["readlink", "/proc/self/ns/user"])?;
    ensure!(namespace(&one)? == namespace(&two)? && namespace(&one)? == namespace(&apart)?);
    ensure!(namespace(&one)? != of_guest.trim());
    // By the shell alone, which leaves out what is between the words.
    let owner_in_guest = |process: &str| {
        let script = format!(
            "for p in /proc/[0-9]*; do read -r words 2>/dev/null <$p/cmdline; test \"$words\" = {process} && stat -c %u:%g $p; done; :"
        );
        in_guest(&lab.node, &pod.id, &["sh", "-c", &script])
    };
    for (process, owner) in [("sleep8222222", "65536:65536"), ("sleep8333333", "66536:66536")] {
        let found = owner_in_guest(process)?;
        ensure!(found.trim() == owner, "{process} is {found:?} in the guest");
    }
    ensure!(run(cri, &one, "id -u")? == "0" && run(cri, &two, "id -u; id -g")? == "1000\n1000");

    // Processes that they share, and such as they do not.
    let sees = |container: &str, process: &str| Ok::<_, anyhow::Error>(run(cri, container, "ps")?.contains(process));
    ensure!(sees(&one, "sleep 8333333")? && sees(&two, "sleep 8222222")? && !sees(&one, "sleep 8444444")?);
    ensure!(run(cri, &one, "cat /proc/1/comm")? == "pod");
    ensure!(run(cri, &one, "cat /proc/1/environ /proc/1/maps").is_err());
    let debugger = start(sleeper("debugger", "8555555").processes_of(&apart))?;
    ensure!(sees(&debugger, "sleep 8444444")? && !sees(&debugger, "sleep 8333333")?);

    // Files of the image, and what else containers have.
    let owners = run(cri, &one, "stat -c '%n %u:%g' / /bin/busybox /dev /dev/shm")?;
    ensure!(owners.lines().all(|line| line.ends_with(" 0:0")), "{owners}");
    let owner = run(cri, &one, "stat -c %u:%g /etc/hostname")?;
    let expected = if maps_mounts { "0:0" } else { "65534:65534" };
    ensure!(owner == expected, "/etc/hostname is {owner}");
    // All in one, which says what it does until something fails.
    let script = r#"set -ex
        echo of root >/file; chown 33:44 /file; test "$(stat -c %u:%g /file)" = 33:44
        echo one >/dev/shm/file; chmod 666 /dev/shm/file
        touch /dev/mqueue/queue
        ls /sys/class/net/lo; if touch /sys/file; then exit 1; fi
        cat /sys/fs/cgroup/cgroup.procs
        echo >/dev/null; head -c 1 /dev/urandom >/dev/null
        ulimit -n 100
        test "$(hostname)" = users; grep users /etc/hostname; cat /etc/hosts; grep nameserver /etc/resolv.conf"#;
    run(cri, &one, script)?;
    ensure!(run(cri, &two, "cat /dev/shm/file")? == "one");
    // Echo requests by sockets of datagrams, which is how most programs make them today; raw ones are the guest's root's.
    let range = in_guest(&lab.node, &pod.id, &["cat", "/proc/sys/net/ipv4/ping_group_range"])?;
    ensure!(range.split_whitespace().eq(["0", "2147483647"]), "{range}");
    // What is the guest's, is not theirs, also for the root of a privileged one.
    let mine = run(
        cri,
        &apart,
        "echo 1 >/proc/sys/kernel/panic || mount -t sysfs none /mnt || dmesg -c",
    );
    ensure!(
        mine.is_err(),
        "the container did what only the guest's root may: {mine:?}"
    );

    // The first ports, and streams by their names.
    let web = start(
        Container::new("web", WEB)
            .command(&["httpd", "-f", "-p", "80", "-h", "/www"])
            .user(1000),
    )?;
    eventually(BOUND, || {
        let page = run(cri, &one, "wget -q -O - http://127.0.0.1:80/")?;
        ensure!(page == WEB_PAGE.trim(), "{page:?}");
        Ok(())
    })?;
    cri.stop(&web, Duration::ZERO)?;
    for (name, id) in [("says", 0), ("says-as-user", 1000)] {
        let script = "echo out >/dev/stdout; echo err >/dev/stderr; stat -c %n:%u:%g $PWD";
        let mut says = Container::script(name, script).user(id);
        says.config.working_dir = "/made/for/it".to_owned();
        let log = says.log(&pod.pod);
        start(says)?;
        for text in ["out", "err", "/made/for/it:0:0"] {
            wait_for_log(&log, BOUND, |line| line.text == text)?;
        }
    }
    ensure!(run(cri, &two, "echo out >/dev/stdout")? == "out");
    let terminal = start(Container::script("terminal", "tty; stat -c %u /dev/pts/0").terminal())?;
    cri.wait_exited(&terminal, BOUND)?;
    own_terminal(lab, &one, 0)?;
    own_terminal(lab, &two, 1000)?;

    pod.remove()?;
    expect_nothing_left(&lab.node, &before, BOUND)
}

/// The terminal of an exec belongs to who is at it, who can open it by its name.
fn own_terminal(lab: &Alone<'_>, container: &str, owner: u32) -> Result<()> {
    let mut session = Session::open(&lab.node, &lab.cri.exec_url(container, &["sh"], true)?)?;
    session.send("stat -c own''er=%u $(tty) >/dev/stdout\n")?;
    session.read_until(&format!("owner={owner}"), BOUND)?;
    session.send("exit 0\n")?;
    ensure!(session.wait(BOUND)? == 0, "the terminal's shell failed");
    Ok(())
}

fn volumes(lab: &mut Alone<'_>, maps_mounts: bool) -> Result<()> {
    let before = lab.snapshot()?;
    let folder = lab.node.place().base().join("users");
    fs::create_dir_all(&folder)?;
    let tried = owners(lab, &folder, maps_mounts);
    fs::remove_dir_all(&folder)?;
    tried?;
    expect_nothing_left(&lab.node, &before, BOUND)
}

fn owners(lab: &Alone<'_>, folder: &Path, maps_mounts: bool) -> Result<()> {
    let (mapped, plain, log) = (folder.join("mapped"), folder.join("plain"), folder.join("log"));
    for path in [&mapped, &plain] {
        fs::create_dir(path)?;
        fs::write(path.join("of-33"), "of the node")?;
        chown(path.join("of-33"), Some(33), Some(44))?;
    }
    chown(&plain, Some(USERS.first), Some(USERS.first))?;
    // As the kubelet makes what a container is to leave its last words in.
    fs::write(&log, "")?;
    fs::set_permissions(&log, fs::Permissions::from_mode(0o666))?;

    let pod = OwnPod::run(lab.cri, Pod::new(lab.node.place(), "owners").users(USERS), HANDLER)?;
    let cri = lab.cri;
    let container = sleeper("plain", "8666666")
        .users(USERS)
        .host_path(&plain, "/plain", false)
        .host_path(&log, "/dev/termination-log", false);
    let id = cri.run(&pod.id, &container, &pod.pod)?;
    ensure!(run(cri, &id, "stat -c %u:%g /plain /plain/of-33")? == "0:0\n65534:65534");
    run(cri, &id, "echo of the container >/plain/made && ! echo >>/plain/of-33")?;
    ensure!(owner(&plain.join("made"))? == (USERS.first, USERS.first));
    run(cri, &id, "echo last words >/dev/termination-log")?;
    ensure!(fs::read_to_string(&log)? == "last words\n");

    let container = sleeper("mapped", "8666667")
        .users(USERS)
        .host_path(&mapped, "/mapped", false)
        .owners_of(USERS);
    let started = cri.run(&pod.id, &container, &pod.pod);
    if maps_mounts {
        mapped_owners(lab, &pod.id, &started?, &mapped)?;
    } else {
        let error = message(&started.err().context("it runs")?);
        ensure!(error.contains("idmap mounts not yet supported"), "{error}");
    }
    pod.remove()
}

fn mapped_owners(lab: &Alone<'_>, pod: &str, container: &str, folder: &Path) -> Result<()> {
    let cri = lab.cri;
    ensure!(run(cri, container, "stat -c %u:%g /mapped /mapped/of-33")? == "0:0\n33:44");
    run(
        cri,
        container,
        "cd /mapped && echo of the container >made && chown 7:8 made && mkdir below && ln of-33 again && mv made renamed",
    )?;
    ensure!(owner(&folder.join("renamed"))? == (7, 8) && owner(&folder.join("below"))? == (0, 0));
    ensure!(fs::read_to_string(folder.join("renamed"))? == "of the container\n");
    // Also what the guest's own root makes is not the node's root's.
    let script = "for volume in /run/coreos-kvm/shared/.volumes/*; do \
        test ! -e $volume/renamed || touch $volume/of-guest; done";
    in_guest(&lab.node, pod, &["sh", "-c", script])?;
    ensure!(owner(&folder.join("of-guest"))? == (USERS.first, USERS.first));
    Ok(())
}

fn owner(path: &Path) -> Result<(u32, u32)> {
    let file = fs::metadata(path)?;
    Ok((file.uid(), file.gid()))
}

fn refused(lab: &mut Alone<'_>) -> Result<()> {
    let before = lab.snapshot()?;
    let place = lab.node.place();
    let short = Users {
        first: 200_000,
        length: 1000,
    };
    let pod = OwnPod::run(lab.cri, Pod::new(place, "refuses").users(USERS), HANDLER)?;
    let says = |outcome: Result<String>, words: &[&str]| {
        let error = message(&outcome.err().context("it runs")?);
        ensure!(words.iter().any(|words| error.contains(words)), "{error}");
        Ok(())
    };
    let run = |container: Container| lab.cri.run(&pod.id, &container, &pod.pod);
    says(
        run(sleeper("outside", "8777777")),
        &["in its user namespace", "is different from container"],
    )?;
    says(
        run(sleeper("other", "8777777").users(short)),
        &["in its user namespace", "is different from container"],
    )?;
    pod.remove()?;

    let large = Pod::new(place, "large")
        .users(USERS)
        .annotation("coreos-kvm.io/vcpus", "many");
    says(lab.cri.run_pod(&large, HANDLER), &["coreos-kvm.io/vcpus"])?;
    let among = Pod::new(place, "among").users(USERS).node_processes();
    says(lab.cri.run_pod(&among, HANDLER), &["remove hostPID"])?;

    // Few are enough, also for processes that are shared.
    let pod = OwnPod::run(lab.cri, Pod::new(place, "few").users(short), HANDLER)?;
    let container = Container::new("few", BUSYBOX)
        .command(&["sleep", "8888888"])
        .users(short)
        .shared_processes();
    let id = lab.cri.run(&pod.id, &container, &pod.pod)?;
    let map = map(lab.cri, &id)?;
    ensure!(map.lines().all(|line| line.trim() == "0 200000 1000"), "{map}");
    pod.remove()?;
    expect_nothing_left(&lab.node, &before, BOUND)
}
