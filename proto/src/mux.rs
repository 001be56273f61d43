//! Many connections on one byte stream, for guests whose memory is shared copy-on-write: they cannot have a vsock device that another
//! process serves. The stream is a port of the guest's virtio-serial device, the multiplexing is yamux
//! (<https://github.com/hashicorp/yamux/blob/master/spec.md>), the host being its client.
//!
//! Ports are those of vsock. A connection begins with its port (u32, big endian); whoever takes it answers one byte, [`TAKEN`];
//! whoever does not, closes it.

use std::{
    collections::VecDeque,
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::timeout,
};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use yamux::{Config, Connection, Mode};

/// The byte that says that somebody is at the port.
const TAKEN: u8 = 1;
/// The other side takes a connection, or refuses it, within moments.
const DIAL: Duration = Duration::from_secs(5);
/// Connections that have arrived and of which nobody knows yet to which port.
const ARRIVING_MAX: usize = 64;
/// Requests for connections that wait for the task that makes them.
const REQUESTS: usize = 64;
/// Connections that either side takes for granted. One more would be the end of all, so that fewer are opened.
const STREAMS_MAX: usize = 256;
/// Connections that one side opens at the same time. What has been closed counts with the other side until it has answered.
const DIALED_MAX: usize = 200;
/// What the other side may have sent on one connection and nobody has read, in bytes: yamux's default, which does not grow here, for
/// the other side could have it grow as it likes.
const WINDOW: usize = 256 << 10;

/// A connection, as good as one of vsock.
#[derive(Debug)]
pub struct MuxStream {
    stream: Compat<yamux::Stream>,
    _place: Option<OwnedSemaphorePermit>,
}

/// Which side of the stream this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Host,
    Guest,
}

/// Opens connections to the other side.
#[derive(Debug, Clone)]
pub struct Mux {
    requests: mpsc::Sender<oneshot::Sender<yamux::Stream>>,
    places: Arc<Semaphore>,
}

/// The connections that the other side opens.
#[derive(Debug)]
pub struct Incoming(mpsc::Receiver<Arrival>);

/// A connection that the other side has opened. Dropping it refuses it.
#[derive(Debug)]
pub struct Arrival {
    pub port: u32,
    stream: MuxStream,
}

impl Mux {
    /// Both ends of the connections on `stream`, and the work that has to be done for all of them: it ends with the stream, and with
    /// it every connection.
    pub fn new(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        side: Side,
    ) -> (Self, Incoming, impl Future<Output = io::Result<()>> + Send) {
        let mode = match side {
            Side::Host => Mode::Client,
            Side::Guest => Mode::Server,
        };
        let mut config = Config::default();
        config.set_max_num_streams(STREAMS_MAX);
        config.set_max_connection_receive_window(Some(STREAMS_MAX * WINDOW));
        let connection = Connection::new(stream.compat(), config, mode);
        let (requests, asked) = mpsc::channel(REQUESTS);
        let (arrived, incoming) = mpsc::channel(ARRIVING_MAX);
        let places = Arc::new(Semaphore::new(DIALED_MAX));
        (
            Self { requests, places },
            Incoming(incoming),
            work(connection, asked, arrived),
        )
    }

    /// Connects to `port` of the other side.
    ///
    /// # Errors
    /// `ConnectionRefused` when nobody takes the connection; when the stream has ended, nobody answers within 5 s, or as long as 200
    /// connections are open.
    pub async fn dial(&self, port: u32) -> io::Result<MuxStream> {
        let dial = async {
            let (reply, opened) = oneshot::channel();
            let gone = || io::Error::from(io::ErrorKind::NotConnected);
            let place = self.places.clone().acquire_owned().await.map_err(|_| gone())?;
            self.requests.send(reply).await.map_err(|_| gone())?;
            let mut stream = MuxStream {
                stream: opened.await.map_err(|_| gone())?.compat(),
                _place: Some(place),
            };
            stream.write_u32(port).await?;
            stream.flush().await?;
            match stream.read_u8().await {
                Ok(TAKEN) => Ok(stream),
                _ => Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    format!("nobody is at port {port}"),
                )),
            }
        };
        timeout(DIAL, dial)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("nobody answers at port {port}")))?
    }
}

impl Incoming {
    /// The next connection; None when the stream has ended.
    pub async fn next(&mut self) -> Option<Arrival> {
        self.0.recv().await
    }
}

impl Arrival {
    /// Takes the connection.
    ///
    /// # Errors
    /// When it has ended meanwhile.
    pub async fn take(mut self) -> io::Result<MuxStream> {
        self.stream.write_u8(TAKEN).await?;
        self.stream.flush().await?;
        Ok(self.stream)
    }
}

async fn work<S: AsyncRead + AsyncWrite + Unpin>(
    mut connection: Connection<Compat<S>>,
    mut asked: mpsc::Receiver<oneshot::Sender<yamux::Stream>>,
    arrived: mpsc::Sender<Arrival>,
) -> io::Result<()> {
    let mut waiting = VecDeque::new();
    loop {
        let inbound = poll_fn(|cx| {
            while let Poll::Ready(Some(request)) = asked.poll_recv(cx) {
                waiting.push_back(request);
            }
            while let Some(request) = waiting.pop_front() {
                match connection.poll_new_outbound(cx) {
                    // Whoever gave up meanwhile closes it by not being there.
                    Poll::Ready(Ok(stream)) => drop(request.send(stream)),
                    Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(error))),
                    Poll::Pending => {
                        waiting.push_front(request);
                        break;
                    }
                }
            }
            connection.poll_next_inbound(cx)
        });
        match inbound.await {
            Some(Ok(stream)) => {
                let stream = MuxStream {
                    stream: stream.compat(),
                    _place: None,
                };
                tokio::spawn(arrive(stream, arrived.clone()));
            }
            Some(Err(error)) => return Err(io::Error::other(error)),
            None => return Ok(()),
        }
    }
}

/// Finds out to which port a connection is to go.
async fn arrive(mut stream: MuxStream, arrived: mpsc::Sender<Arrival>) {
    let Ok(Ok(port)) = timeout(DIAL, stream.read_u32()).await else {
        return;
    };
    // Who does not come to take them has too many already.
    let _ = arrived.try_send(Arrival { port, stream });
}

impl AsyncRead for MuxStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for MuxStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Mux, Mux, Incoming) {
        let (host, guest) = tokio::io::duplex(4096);
        let (host, _, host_work) = Mux::new(host, Side::Host);
        let (guest, incoming, guest_work) = Mux::new(guest, Side::Guest);
        tokio::spawn(host_work);
        tokio::spawn(guest_work);
        (host, guest, incoming)
    }

    #[tokio::test]
    async fn what_goes_in_comes_out_also_when_another_connection_is_not_read() {
        let (host, _guest, mut incoming) = pair();
        let server = tokio::spawn(async move {
            let mut held = Vec::new();
            while let Some(arrival) = incoming.next().await {
                let port = arrival.port;
                let mut stream = arrival.take().await.unwrap();
                if port == 7 {
                    held.push(stream);
                } else {
                    tokio::spawn(async move {
                        let (mut reader, mut writer) = tokio::io::split(&mut stream);
                        tokio::io::copy(&mut reader, &mut writer).await.unwrap();
                        writer.shutdown().await.unwrap();
                    });
                }
            }
        });
        let mut stuck = host.dial(7).await.unwrap();
        let flood = tokio::spawn(async move {
            let _ = stuck.write_all(&vec![0; 1 << 20]).await;
        });
        let mut echo = host.dial(8).await.unwrap();
        let sent: Vec<u8> = (0..=255).cycle().take(1_000_000).collect();
        let (mut reader, mut writer) = tokio::io::split(&mut echo);
        let mut back = Vec::new();
        let write = async {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let (_, read) = tokio::join!(write, reader.read_to_end(&mut back));
        read.unwrap();
        assert!(back == sent);
        flood.abort();
        server.abort();
    }

    #[tokio::test]
    async fn a_port_where_nobody_is_refuses() {
        let (host, _guest, mut incoming) = pair();
        tokio::spawn(async move { while incoming.next().await.is_some() {} });
        let error = host.dial(9).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test(start_paused = true)]
    async fn too_many_connections_are_refused_and_the_others_go_on() {
        let (host, _guest, mut incoming) = pair();
        tokio::spawn(async move {
            while let Some(arrival) = incoming.next().await {
                let mut stream = arrival.take().await.unwrap();
                tokio::spawn(async move {
                    let mut byte = [0];
                    while stream.read_exact(&mut byte).await.is_ok() {
                        stream.write_all(&byte).await.unwrap();
                        stream.flush().await.unwrap();
                    }
                });
            }
        });
        let mut open = Vec::new();
        for _ in 0..DIALED_MAX {
            open.push(host.dial(8).await.unwrap());
        }
        assert_eq!(host.dial(8).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        open[0].write_all(b"x").await.unwrap();
        open[0].flush().await.unwrap();
        assert_eq!(open[0].read_u8().await.unwrap(), b'x');
        for _ in 0..2 * STREAMS_MAX {
            open.pop();
            open.push(host.dial(8).await.unwrap());
        }
    }

    #[tokio::test]
    async fn both_sides_can_dial() {
        let (host, guest) = tokio::io::duplex(4096);
        let (_host, mut incoming, host_work) = Mux::new(host, Side::Host);
        let (guest, _incoming, guest_work) = Mux::new(guest, Side::Guest);
        tokio::spawn(host_work);
        tokio::spawn(guest_work);
        let greeted = tokio::spawn(async move {
            let arrival = incoming.next().await.unwrap();
            assert_eq!(arrival.port, 1026);
            let mut text = String::new();
            arrival.take().await.unwrap().read_to_string(&mut text).await.unwrap();
            text
        });
        let mut stream = guest.dial(1026).await.unwrap();
        stream.write_all(b"here I am\n").await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(greeted.await.unwrap(), "here I am\n");
    }

    #[tokio::test]
    async fn with_the_stream_everything_on_it_ends() {
        let (host, guest) = tokio::io::duplex(4096);
        let (host, _incoming, work) = Mux::new(host, Side::Host);
        let work = tokio::spawn(work);
        drop(guest);
        assert!(host.dial(1).await.is_err());
        let _ = work.await.unwrap();
        assert!(host.dial(1).await.is_err());
    }

    #[tokio::test]
    async fn nonsense_ends_the_stream_and_nothing_else() {
        for nonsense in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            &[0xff; 4096],
            &[0, 0, 0, 1, 0, 0, 0, 2, 0xff, 0xff, 0xff, 0xff],
        ] {
            let (host, mut guest) = tokio::io::duplex(8192);
            let (_host, _incoming, work) = Mux::new(host, Side::Host);
            let work = tokio::spawn(work);
            guest.write_all(nonsense).await.unwrap();
            drop(guest);
            let _ = work.await.unwrap();
        }
    }
}
