//! Standard streams and terminals.

use super::*;

pub(crate) async fn stdin_ends_when_the_host_says_so(bed: Bed<'_>) {
    bed.create("reads", &["sh", "-c", "cat; echo over"], PIPES, |_| ())
        .await
        .unwrap();
    let mut stdin = bed.agent().input(init("reads")).await.unwrap();
    let mut stdout = bed.agent().output(init("reads"), false).await.unwrap();
    // Before the start, too.
    stdin.write(b"one\n").await.unwrap();
    bed.agent().start_process(init("reads")).await.unwrap();
    assert_eq!(read_until(&mut stdout, "one\n").await, "one\n");
    stdin.write(b"two\n").await.unwrap();
    assert_eq!(read_until(&mut stdout, "two\n").await, "two\n");
    stdin.finish().await.unwrap();
    assert_eq!(text(stdout).await, "over\n");
    assert_eq!(bound(bed.agent().wait_process(init("reads"))).await.unwrap().status, 0);
    bed.remove("reads").await;
}

pub(crate) async fn a_further_process_reads_and_prints(bed: Bed<'_>) {
    bed.start_idle("host").await;
    let outcome = bed.exec("host", &["sh", "-c", "echo out; echo err >&2; exit 9"]).await;
    assert_eq!(
        (outcome.stdout.as_str(), outcome.stderr.as_str(), outcome.status),
        ("out\n", "err\n", 9)
    );
    assert_eq!(bed.exec("host", &["sh", "-c", "kill -11 $$"]).await.status, 139);

    let name = exec("host", "cat");
    let process = spec::process(&["tr", "a-z", "A-Z"]).to_string().into_bytes();
    bed.agent().create_exec(name, process, PIPES).await.unwrap();
    let mut stdin = bed.agent().input(name).await.unwrap();
    let stdout = bed.agent().output(name, false).await.unwrap();
    bed.agent().start_process(name).await.unwrap();
    let typed = "typed\n".repeat(50_000);
    let ((), read) = tokio::join!(
        async {
            stdin.write(typed.as_bytes()).await.unwrap();
            stdin.finish().await.unwrap();
        },
        text(stdout)
    );
    assert!(read == typed.to_uppercase(), "{} of {} bytes", read.len(), typed.len());
    bound(bed.agent().wait_process(name)).await.unwrap();
    bed.agent().delete_process(name).await.unwrap();
    bed.remove("host").await;
}

/// A shell at a terminal, which says of itself what only a terminal can.
async fn try_terminal(bed: Bed<'_>, name: ProcessName<'_>) {
    let mut stdin = bed.agent().input(name).await.unwrap();
    let mut stdout = bed.agent().output(name, false).await.unwrap();
    bed.agent().start_process(name).await.unwrap();
    bed.agent().resize_pty(name, 132, 43).await.unwrap();
    stdin.write(b"stty size; tty; echo err >&2\n").await.unwrap();
    let told = read_until(&mut stdout, "\nerr\r\n").await;
    assert!(told.contains("43 132\r\n") && told.contains("/dev/"), "{told:?}");
    // Control-C ends what runs in the foreground, which that says itself, and the shell tells how.
    let in_front = b"sh -c 'echo in-$((1 + 1)); exec sleep 2147483647'\n";
    stdin.write(in_front).await.unwrap();
    read_until(&mut stdout, "in-2\r\n").await;
    stdin.write(b"\x03").await.unwrap();
    stdin.write(b"echo code-$?\n").await.unwrap();
    read_until(&mut stdout, "code-130\r\n").await;
    stdin.write(b"exit 4\n").await.unwrap();
    assert_eq!(bound(bed.agent().wait_process(name)).await.unwrap().status, 4);
    text(stdout).await;
}

pub(crate) async fn a_terminal_is_one(bed: Bed<'_>) {
    bed.create("terminal", &["sh"], TERMINAL, |spec| {
        spec["process"]["terminal"] = json!(true)
    })
    .await
    .unwrap();
    try_terminal(bed, init("terminal")).await;
    bed.remove("terminal").await;
}

pub(crate) async fn a_terminal_belongs_to_who_is_at_it(bed: Bed<'_>) {
    // Who it does not belong to may not open it by its name.
    let script = "ls -ln $(tty) >/dev/stdout";
    let user = |spec: &mut serde_json::Value| {
        spec["process"]["terminal"] = json!(true);
        spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    };
    bed.create("somebody", &["sh", "-c", script], TERMINAL, user)
        .await
        .unwrap();
    let stdout = bed.agent().output(init("somebody"), false).await.unwrap();
    bed.agent().start_process(init("somebody")).await.unwrap();
    let listed = text(stdout).await;
    assert_eq!(listed.split_whitespace().nth(2), Some("1000"), "{listed}");
    bed.remove("somebody").await;
}

pub(crate) async fn a_terminal_of_a_further_process_is_one(bed: Bed<'_>) {
    bed.start_idle("desk").await;
    let name = exec("desk", "terminal");
    let mut process = spec::process(&["sh"]);
    process["terminal"] = json!(true);
    bed.agent()
        .create_exec(name, process.to_string().into_bytes(), TERMINAL)
        .await
        .unwrap();
    try_terminal(bed, name).await;
    bed.agent().delete_process(name).await.unwrap();
    bed.remove("desk").await;
}

pub(crate) async fn a_slow_reader_holds_back_its_writer_and_nothing_is_lost(bed: Bed<'_>) {
    let script = "seq 1 320000; touch /done";
    bed.create("writes", &["sh", "-c", script], OUTPUT, |_| ())
        .await
        .unwrap();
    let mut stdout = bed.agent().output(init("writes"), false).await.unwrap();
    bed.agent().start_process(init("writes")).await.unwrap();
    let mut all = bound(stdout.next()).await.unwrap().unwrap().to_vec();
    // As long as nobody reads, nothing but what buffers hold is written, and other calls are answered.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(2) {
        bed.agent().list_pids("writes").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(
        !bed.host_path("writes", "done").exists(),
        "the writer was not held back"
    );
    while let Some(bytes) = bound(stdout.next()).await.unwrap() {
        all.extend_from_slice(bytes);
    }
    let expected: String = (1..=320_000).map(|number| format!("{number}\n")).collect();
    assert!(
        all.len() > 2_000_000 && all == expected.as_bytes(),
        "{} bytes",
        all.len()
    );
    assert_eq!(bound(bed.agent().wait_process(init("writes"))).await.unwrap().status, 0);
    bed.remove("writes").await;
}
