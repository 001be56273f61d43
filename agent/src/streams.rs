//! The connections that carry stdin, stdout and stderr: one each, so that a slow reader holds back its own writer alone. Nothing is
//! read from a process that the host does not take, which is all the back-pressure there is. A stream that flows may have another way:
//! [`output_window`](crate::output_window).

use std::{io, sync::Arc, time::Duration};

use coreos_kvm_proto::frame::{self, Frames};
use futures::FutureExt as _;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use crate::{
    containers::Containers,
    output_pipe::CAPACITY,
    output_window::{Held, OutputWindow},
    process::Endpoint,
};

/// The host says at once which stream it means.
const HELLO: Duration = Duration::from_secs(10);
/// Bytes of a frame with its header: what vsock sends at once (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE` in the kernel's virtio_vsock.h).
const PACKET: usize = 64 * 1024;
/// The same of a program that writes much: all that waits in its pipe, so that it is woken up once for that.
const BATCH: usize = frame::HEADER + CAPACITY;
/// The host closes the connection as soon as it has read the end.
const FAREWELL: Duration = Duration::from_secs(30);

/// Serves one of them.
pub(crate) async fn serve(
    containers: Arc<Containers>,
    window: Arc<OutputWindow>,
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
) {
    let hello = match tokio::time::timeout(HELLO, frame::read_hello(&mut stream)).await {
        Ok(Ok(hello)) => hello,
        // Of a process that could not be prepared.
        Ok(Err(error)) => return tracing::debug!(%error, "a stream connection is for no stream"),
        Err(_) => return tracing::warn!("a stream connection did not say which stream it is for"),
    };
    let (container_id, exec_id) = (hello.container_id.as_str(), hello.exec_id.as_str());
    let Ok(process) = containers.process(container_id, exec_id) else {
        return tracing::warn!(container_id, exec_id, "a stream connection is for an unknown process");
    };
    let endpoint = match hello.kind.enum_value() {
        Ok(kind) => process.endpoint(kind).await,
        Err(_) => None,
    };
    let result = match endpoint {
        Some(Endpoint::Output(output)) => {
            let window = hello.output_window.then_some(&window);
            copy_out(output, &mut stream, window, process.forgotten()).await
        }
        Some(Endpoint::Input(input)) => copy_in(&mut stream, input, process.forgotten()).await,
        // Not wanted, or taken: the stream is at its end.
        None => frame::write_end(&mut stream).await,
    };
    if let Err(error) = result {
        tracing::debug!(container_id, exec_id, %error, "a stream ended early");
    }
}

/// What the process writes, and its end. When the process is forgotten, what it has written is still sent.
async fn copy_out(
    output: impl AsyncRead + Unpin,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    window: Option<&Arc<OutputWindow>>,
    forgotten: &CancellationToken,
) -> io::Result<()> {
    let mut held = None;
    let copied = copy_all(output, stream, (window, &mut held), forgotten).await;
    if let Some(held) = held {
        held.turn_back(stream).await?;
    }
    copied?;
    frame::write_end(stream).await?;
    // A connection that is closed at once may lose what is still on its way: the host is the one who closes.
    let _ = tokio::time::timeout(FAREWELL, stream.read(&mut [0])).await;
    Ok(())
}

/// The same to the end of the output, which turns to the window when it flows.
async fn copy_all(
    mut output: impl AsyncRead + Unpin,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    (window, held): (Option<&Arc<OutputWindow>>, &mut Option<Held>),
    forgotten: &CancellationToken,
) -> io::Result<()> {
    let mut buffer = vec![0; PACKET];
    loop {
        let has_window = held.is_some();
        let space = match held {
            Some(held) => held.room(stream).await?,
            None => &mut buffer[frame::HEADER..],
        };
        let call_back = async {
            match window {
                Some(window) if has_window => window.call_back(stream).await,
                _ => std::future::pending().await,
            }
        };
        let count = tokio::select! {
            biased;
            count = output.read(space) => count?,
            () = forgotten.cancelled() => match output.read(space).now_or_never() {
                Some(count) => count?,
                None => 0,
            },
            called = call_back => {
                called?;
                if let Some(held) = held.take() {
                    held.turn_back(stream).await?;
                }
                continue;
            }
        };
        if count == 0 {
            return Ok(());
        }
        if let Some(held) = held {
            held.wrote(count, stream).await?;
            continue;
        }
        let frame = &mut buffer[..frame::HEADER + count];
        frame::write(stream, frame).await?;
        if frame.len() >= PACKET {
            buffer.resize(BATCH, 0);
            if let Some(window) = window {
                *held = window.turn(stream).await?;
            }
        }
    }
}

/// What the process reads. Its stdin ends with the stream, in whatever way that ends.
async fn copy_in(
    stream: &mut (impl AsyncRead + Unpin),
    mut input: impl AsyncWrite + Unpin,
    forgotten: &CancellationToken,
) -> io::Result<()> {
    let copy = async {
        let mut frames = Frames::new(stream);
        while let Some(bytes) = frames.next().await? {
            input.write_all(bytes).await?;
        }
        Ok(())
    };
    tokio::select! {
        result = copy => result,
        () = forgotten.cancelled() => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use coreos_kvm_proto::{
        frame::Step,
        output_window::{Reader, SIZE, Word},
    };
    use tokio::net::UnixStream;

    use super::*;

    async fn received(host: impl AsyncRead + Unpin) -> Vec<u8> {
        let (mut frames, mut all) = (Frames::new(host), Vec::new());
        while let Some(bytes) = frames.next().await.unwrap() {
            all.extend_from_slice(bytes);
        }
        all
    }

    #[tokio::test]
    async fn output_arrives_whole_and_ends() {
        let (mut guest, host) = tokio::io::duplex(1000);
        let sent: Vec<u8> = (0..=255).cycle().take(300_000).collect();
        let forgotten = CancellationToken::new();
        let (result, all) = tokio::join!(copy_out(sent.as_slice(), &mut guest, None, &forgotten), received(host));
        result.unwrap();
        assert!(all == sent);
    }

    /// The host's side of a window.
    struct Host {
        reader: Reader,
        bell: UnixStream,
    }

    impl Host {
        /// What comes in the window until the stream turns back.
        async fn read(&mut self) -> Vec<u8> {
            let mut all = Vec::new();
            loop {
                match self.reader.step().unwrap() {
                    Some(Step::Bytes) => all.extend_from_slice(self.reader.bytes()),
                    Some(_) => return all,
                    None if self.reader.waits() => {
                        self.bell.read_u8().await.unwrap();
                    }
                    None => {}
                }
                if self.reader.frees() {
                    self.bell.write_u8(0).await.unwrap();
                }
            }
        }
    }

    fn window() -> (Arc<OutputWindow>, Host) {
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(SIZE as u64).unwrap();
        let (bell, ours) = UnixStream::pair().unwrap();
        let window = OutputWindow::of(&memory, bell.into_std().unwrap());
        let reader = Reader::open(memory).unwrap();
        (window, Host { reader, bell: ours })
    }

    #[tokio::test]
    async fn much_output_comes_in_the_window_and_its_end_on_the_connection() {
        let (window, mut host_window) = window();
        // One after the other, as the window is free again.
        for _ in 0..2 {
            let (mut guest, host) = tokio::io::duplex(1000);
            let sent: Vec<u8> = (0..=250).cycle().take(3_000_000).collect();
            let forgotten = CancellationToken::new();
            let host = async {
                let (mut host, mut all) = (Frames::new(host), Vec::new());
                loop {
                    match host.step().await.unwrap() {
                        Step::Bytes => all.extend_from_slice(host.bytes()),
                        Step::End => break,
                        Step::Turn => {
                            assert_eq!(all.len(), PACKET - frame::HEADER);
                            Word::Go.say(host.get_mut()).await.unwrap();
                            all.extend(host_window.read().await);
                            Word::Done.say(host.get_mut()).await.unwrap();
                        }
                    }
                }
                all
            };
            let (result, all) = tokio::join!(copy_out(sent.as_slice(), &mut guest, Some(&window), &forgotten), host);
            result.unwrap();
            assert!(all == sent);
        }
    }

    #[tokio::test]
    async fn the_window_is_handed_on_when_who_has_it_is_silent() {
        let (window, mut host_window) = window();
        let start = || {
            let (mut program, output) = tokio::io::duplex(1 << 20);
            let (mut guest, host) = tokio::io::duplex(1 << 20);
            let window = window.clone();
            tokio::spawn(async move { copy_out(output, &mut guest, Some(&window), &CancellationToken::new()).await });
            let write = async move |count: usize| {
                program.write_all(&vec![7; count]).await.unwrap();
                program
            };
            (write, Frames::new(host))
        };
        let (write, mut first) = start();
        let _silent = write(PACKET).await;
        assert_eq!(first.step().await.unwrap(), Step::Bytes);
        assert_eq!(first.step().await.unwrap(), Step::Turn);
        Word::Go.say(first.get_mut()).await.unwrap();

        let (write, mut second) = start();
        let mut program = write(PACKET).await;
        assert_eq!(second.step().await.unwrap(), Step::Bytes, "the window is taken");
        // What the first had left to say, and then nothing.
        assert_eq!(host_window.read().await.len(), frame::HEADER);
        Word::Done.say(first.get_mut()).await.unwrap();
        let flood = vec![7; 1 << 20];
        let (written, turned) = tokio::join!(program.write_all(&flood), async {
            while second.step().await.unwrap() == Step::Bytes {}
        });
        written.unwrap();
        let () = turned;
        Word::Go.say(second.get_mut()).await.unwrap();
        drop(program);
        host_window.read().await;
    }

    #[tokio::test]
    async fn output_that_the_host_does_not_want_leaves_the_window_for_others() {
        for stop_first in [false, true] {
            let (window, mut host_window) = window();
            let (mut guest, host) = tokio::io::duplex(1 << 20);
            let forgotten = CancellationToken::new();
            // It never ends, and fills the window before anybody reads there.
            let output = tokio::io::repeat(7);
            let host = async {
                let mut host = Frames::new(host);
                while host.step().await.unwrap() == Step::Bytes {}
                let words: &[Word] = if stop_first {
                    &[Word::Stop]
                } else {
                    &[Word::Go, Word::Stop]
                };
                for word in words {
                    word.say(host.get_mut()).await.unwrap();
                }
                host_window.read().await;
            };
            let (result, ()) = tokio::join!(copy_out(output, &mut guest, Some(&window), &forgotten), host);
            assert_eq!(
                result.unwrap_err().kind(),
                io::ErrorKind::UnexpectedEof,
                "the connection has ended"
            );
            let (mut guest, mut host) = tokio::io::duplex(1 << 20);
            Word::Go.say(&mut host).await.unwrap();
            assert!(window.turn(&mut guest).await.unwrap().is_some(), "the window is free");
        }
    }

    #[tokio::test]
    async fn a_window_that_has_failed_is_nobodys() {
        let (window, host_window) = window();
        let (mut guest, host) = tokio::io::duplex(1 << 20);
        let forgotten = CancellationToken::new();
        let host = async {
            let mut host = Frames::new(host);
            while host.step().await.unwrap() == Step::Bytes {}
            // It waits, and is gone.
            assert!(host_window.reader.waits());
            drop(host_window);
            Word::Go.say(host.get_mut()).await.unwrap();
        };
        let (result, ()) = tokio::join!(
            copy_out(tokio::io::repeat(7), &mut guest, Some(&window), &forgotten),
            host
        );
        result.unwrap_err();
        let (mut guest, _host) = tokio::io::duplex(1 << 20);
        assert!(window.turn(&mut guest).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_forgotten_process_leaves_what_it_has_written_and_no_more() {
        let (mut guest, host) = tokio::io::duplex(1000);
        // A pipe that somebody else still holds open.
        let (mut held, output) = tokio::io::duplex(1000);
        held.write_all(b"last words").await.unwrap();
        let forgotten = CancellationToken::new();
        forgotten.cancel();
        let (result, all) = tokio::join!(copy_out(output, &mut guest, None, &forgotten), received(host));
        result.unwrap();
        assert_eq!(all, b"last words");
    }

    #[tokio::test]
    async fn input_ends_with_the_stream() {
        let mut wire = Vec::new();
        frame::write(&mut wire, &mut b"\0\0\0\0typed".to_vec()).await.unwrap();
        frame::write_end(&mut wire).await.unwrap();
        let (input, mut process) = tokio::io::duplex(1000);
        copy_in(&mut wire.as_slice(), input, &CancellationToken::new())
            .await
            .unwrap();
        let mut read = String::new();
        process.read_to_string(&mut read).await.unwrap();
        assert_eq!(read, "typed");
    }
}
