//! The connections that carry stdin, stdout and stderr: one each, so that a slow reader holds back its own writer alone. Nothing is
//! read from a process that the host does not take, which is all the back-pressure there is. A stream that flows may have another way:
//! [`output_port`](crate::output_port).

use std::{io, sync::Arc, time::Duration};

use coreos_kvm_proto::frame::{self, Frames};
use futures::FutureExt as _;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use crate::{
    containers::Containers,
    output_port::{Held, OutputPort},
    process::{Endpoint, OUTPUT},
};

/// The host says at once which stream it means.
const HELLO: Duration = Duration::from_secs(10);
/// Bytes of a frame with its header: what vsock sends at once (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE` in the kernel's virtio_vsock.h).
const PACKET: usize = 64 * 1024;
/// The same of a program that writes much: all that waits in its pipe, so that it is woken up once for that.
const BATCH: usize = OUTPUT;
/// The host closes the connection as soon as it has read the end.
const FAREWELL: Duration = Duration::from_secs(30);

/// Serves one of them.
pub(crate) async fn serve(
    containers: Arc<Containers>,
    port: Arc<OutputPort>,
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
            let port = hello.output_port.then_some(&port);
            copy_out(output, &mut stream, port, process.forgotten()).await
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
    port: Option<&Arc<OutputPort>>,
    forgotten: &CancellationToken,
) -> io::Result<()> {
    let mut held = None;
    let copied = copy_all(output, stream, (port, &mut held), forgotten).await;
    if let Some(held) = held {
        held.turn_back(stream).await?;
    }
    copied?;
    frame::write_end(stream).await?;
    // A connection that is closed at once may lose what is still on its way: the host is the one who closes.
    let _ = tokio::time::timeout(FAREWELL, stream.read(&mut [0])).await;
    Ok(())
}

/// The same to the end of the output, which turns to the port when it flows.
async fn copy_all(
    mut output: impl AsyncRead + Unpin,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    (port, held): (Option<&Arc<OutputPort>>, &mut Option<Held>),
    forgotten: &CancellationToken,
) -> io::Result<()> {
    let mut buffer = vec![0; PACKET];
    loop {
        let call_back = async {
            match held {
                Some(held) => held.call_back(stream).await,
                None => std::future::pending().await,
            }
        };
        let count = tokio::select! {
            biased;
            count = output.read(&mut buffer[frame::HEADER..]) => count?,
            () = forgotten.cancelled() => match output.read(&mut buffer[frame::HEADER..]).now_or_never() {
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
        let frame = &mut buffer[..frame::HEADER + count];
        match held {
            Some(held) => held.send(frame, stream).await?,
            None => frame::write(stream, frame).await?,
        }
        if frame.len() == buffer.len() {
            buffer.resize(BATCH, 0);
            if let (Some(port), None) = (port, &held) {
                *held = port.turn(stream).await?;
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
    use coreos_kvm_proto::{frame::Step, output_port::Word};
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

    /// Reads what came on the port until the stream turns back.
    async fn on_port(port: &mut Frames<UnixStream>) -> Vec<u8> {
        let mut all = Vec::new();
        while port.step().await.unwrap() == Step::Bytes {
            all.extend_from_slice(port.bytes());
        }
        all
    }

    #[tokio::test]
    async fn much_output_comes_on_the_port_and_its_end_on_the_connection() {
        let (port, host_port) = UnixStream::pair().unwrap();
        let port = OutputPort::of(port.into_std().unwrap());
        let mut host_port = Frames::new(host_port);
        // One after the other, as the port is free again.
        for _ in 0..2 {
            let (mut guest, host) = tokio::io::duplex(1000);
            let sent: Vec<u8> = (0..=255).cycle().take(3_000_000).collect();
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
                            all.extend(on_port(&mut host_port).await);
                            Word::Done.say(host.get_mut()).await.unwrap();
                        }
                    }
                }
                all
            };
            let (result, all) = tokio::join!(copy_out(sent.as_slice(), &mut guest, Some(&port), &forgotten), host);
            result.unwrap();
            assert!(all == sent);
        }
    }

    #[tokio::test]
    async fn the_port_is_handed_on_when_who_has_it_is_silent() {
        let (port, host_port) = UnixStream::pair().unwrap();
        let port = OutputPort::of(port.into_std().unwrap());
        let mut host_port = Frames::new(host_port);
        let start = || {
            let (mut program, output) = tokio::io::duplex(1 << 20);
            let (mut guest, host) = tokio::io::duplex(1 << 20);
            let port = port.clone();
            tokio::spawn(async move { copy_out(output, &mut guest, Some(&port), &CancellationToken::new()).await });
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
        assert_eq!(second.step().await.unwrap(), Step::Bytes, "the port is taken");
        // What the first had left to say, and then nothing.
        assert_eq!(on_port(&mut host_port).await.len(), frame::HEADER);
        Word::Done.say(first.get_mut()).await.unwrap();
        let flood = vec![7; 1 << 20];
        let (written, turned) = tokio::join!(program.write_all(&flood), async {
            while second.step().await.unwrap() == Step::Bytes {}
        });
        written.unwrap();
        let () = turned;
        Word::Go.say(second.get_mut()).await.unwrap();
        drop(program);
        on_port(&mut host_port).await;
    }

    #[tokio::test]
    async fn output_that_the_host_does_not_want_leaves_the_port_for_others() {
        for stop_first in [false, true] {
            let (port, host_port) = UnixStream::pair().unwrap();
            let port = OutputPort::of(port.into_std().unwrap());
            let mut host_port = Frames::new(host_port);
            let (mut guest, host) = tokio::io::duplex(1 << 20);
            let forgotten = CancellationToken::new();
            // It never ends.
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
                on_port(&mut host_port).await;
            };
            let (result, ()) = tokio::join!(copy_out(output, &mut guest, Some(&port), &forgotten), host);
            assert_eq!(
                result.unwrap_err().kind(),
                io::ErrorKind::UnexpectedEof,
                "the connection has ended"
            );
            let (mut guest, mut host) = tokio::io::duplex(1 << 20);
            Word::Go.say(&mut host).await.unwrap();
            assert!(port.turn(&mut guest).await.unwrap().is_some(), "the port is free");
        }
    }

    #[tokio::test]
    async fn a_port_that_has_failed_is_nobodys() {
        let (port, host_port) = UnixStream::pair().unwrap();
        let port = OutputPort::of(port.into_std().unwrap());
        let (mut guest, host) = tokio::io::duplex(1 << 20);
        let forgotten = CancellationToken::new();
        let host = async {
            let mut host = Frames::new(host);
            while host.step().await.unwrap() == Step::Bytes {}
            drop(host_port);
            Word::Go.say(host.get_mut()).await.unwrap();
        };
        let (result, ()) = tokio::join!(
            copy_out(tokio::io::repeat(7), &mut guest, Some(&port), &forgotten),
            host
        );
        result.unwrap_err();
        let (mut guest, _host) = tokio::io::duplex(1 << 20);
        assert!(port.turn(&mut guest).await.unwrap().is_none());
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
