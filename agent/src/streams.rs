//! The connections that carry stdin, stdout and stderr: one each, so that a slow reader holds back its own writer alone. Nothing is
//! read from a process that the host does not take, which is all the back-pressure there is.

use std::{io, sync::Arc, time::Duration};

use coreos_kvm_proto::frame::{self, Frames};
use futures::FutureExt as _;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use crate::{
    containers::Containers,
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
pub(crate) async fn serve(containers: Arc<Containers>, mut stream: impl AsyncRead + AsyncWrite + Unpin) {
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
        Some(Endpoint::Output(output)) => copy_out(output, &mut stream, process.forgotten()).await,
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
    mut output: impl AsyncRead + Unpin,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    forgotten: &CancellationToken,
) -> io::Result<()> {
    let mut buffer = vec![0; PACKET];
    loop {
        let count = tokio::select! {
            biased;
            count = output.read(&mut buffer[frame::HEADER..]) => count?,
            () = forgotten.cancelled() => match output.read(&mut buffer[frame::HEADER..]).now_or_never() {
                Some(count) => count?,
                None => 0,
            },
        };
        if count == 0 {
            break;
        }
        frame::write(stream, &mut buffer[..frame::HEADER + count]).await?;
        if frame::HEADER + count == buffer.len() {
            buffer.resize(BATCH, 0);
        }
    }
    frame::write_end(stream).await?;
    // A connection that is closed at once may lose what is still on its way: the host is the one who closes.
    let _ = tokio::time::timeout(FAREWELL, stream.read(&mut [0])).await;
    Ok(())
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
        let (result, all) = tokio::join!(copy_out(sent.as_slice(), &mut guest, &forgotten), received(host));
        result.unwrap();
        assert!(all == sent);
    }

    #[tokio::test]
    async fn a_forgotten_process_leaves_what_it_has_written_and_no_more() {
        let (mut guest, host) = tokio::io::duplex(1000);
        // A pipe that somebody else still holds open.
        let (mut held, output) = tokio::io::duplex(1000);
        held.write_all(b"last words").await.unwrap();
        let forgotten = CancellationToken::new();
        forgotten.cancel();
        let (result, all) = tokio::join!(copy_out(output, &mut guest, &forgotten), received(host));
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
