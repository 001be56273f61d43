//! The connections that the host makes with the agent, and the one by which the agent greets it: over vsock, or, in a clone that has
//! none, all of them on one serial port ([`coreos_kvm_proto::mux`]).

use std::{io, sync::Arc};

use anyhow::Result;
use coreos_kvm_proto::{
    AGENT_PORT, FORWARD_PORT, STREAM_PORT,
    mux::{Arrival, Incoming, Mux, Side},
};
use futures::stream::{Stream, poll_fn};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    task::JoinSet,
};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use crate::{containers::Containers, forward, output_window::OutputWindow, serial::SerialPort, streams};

/// Where connections are taken.
const PORTS: [u32; 3] = [AGENT_PORT, STREAM_PORT, FORWARD_PORT];
/// Connections that nobody has taken yet.
const WAITING: usize = 64;

/// A connection with the host.
pub(crate) trait Connection: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Connection for T {}

/// Takes connections, by whatever way they come.
pub(crate) struct Connections {
    calls: mpsc::Sender<Box<dyn Connection>>,
    containers: Arc<Containers>,
    output: Arc<OutputWindow>,
    tasks: JoinSet<Result<()>>,
}

impl Connections {
    /// Takes those that come over vsock from now on. Also answers the connections for calls.
    ///
    /// # Errors
    /// When a port cannot be listened at.
    pub(crate) fn listen(
        containers: Arc<Containers>,
    ) -> io::Result<(
        Self,
        impl Stream<Item = io::Result<Box<dyn Connection>>> + Send + 'static,
    )> {
        let (calls, mut called) = mpsc::channel(WAITING);
        let mut connections = Self {
            calls,
            containers,
            output: Arc::default(),
            tasks: JoinSet::new(),
        };
        for port in PORTS {
            let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
            let taker = connections.taker();
            connections.tasks.spawn(async move {
                loop {
                    let (stream, peer) = listener.accept().await?;
                    // Programs of the guest can make vsock connections as well, but these are the host's.
                    if peer.cid() == VMADDR_CID_HOST {
                        taker.take(port, stream).await;
                    }
                }
            });
        }
        let calls = poll_fn(move |cx| called.poll_recv(cx).map(|call| call.map(Ok)));
        Ok((connections, calls))
    }

    /// Takes those that come on a serial port from now on, too.
    pub(crate) fn serve(&mut self, port: SerialPort) -> Host {
        let (mux, incoming, work) = Mux::new(port, Side::Guest);
        self.tasks.spawn(async move { Ok(work.await?) });
        self.tasks.spawn(arrivals(incoming, self.taker()));
        Host::Mux(mux)
    }

    fn taker(&self) -> Taker {
        Taker {
            calls: self.calls.clone(),
            containers: self.containers.clone(),
            output: self.output.clone(),
        }
    }

    /// Waits until one of the ways is at its end, which is the machine's.
    pub(crate) async fn ended(mut self) -> Result<()> {
        match self.tasks.join_next().await {
            Some(ended) => ended?,
            None => Ok(()),
        }
    }
}

async fn arrivals(mut incoming: Incoming, taker: Taker) -> Result<()> {
    while let Some(arrival) = incoming.next().await {
        let taker = taker.clone();
        tokio::spawn(async move { taker.take_arrival(arrival).await });
    }
    Ok(())
}

/// Gives each connection to whom it is for.
#[derive(Clone)]
struct Taker {
    calls: mpsc::Sender<Box<dyn Connection>>,
    containers: Arc<Containers>,
    output: Arc<OutputWindow>,
}

impl Taker {
    async fn take(&self, port: u32, stream: impl Connection + 'static) {
        match port {
            // The server takes them as long as the agent lives.
            AGENT_PORT => drop(self.calls.send(Box::new(stream)).await),
            FORWARD_PORT => drop(tokio::spawn(forward::serve(stream))),
            _ => {
                let (containers, output) = (self.containers.clone(), self.output.clone());
                tokio::spawn(streams::serve(containers, output, stream));
            }
        }
    }

    async fn take_arrival(&self, arrival: Arrival) {
        let port = arrival.port;
        if PORTS.contains(&port)
            && let Ok(stream) = arrival.take().await
        {
            self.take(port, stream).await;
        }
    }
}

/// The way to the host.
pub(crate) enum Host {
    Vsock,
    Mux(Mux),
}

impl Host {
    /// Connects to a port of the host.
    ///
    /// # Errors
    /// When nobody listens there.
    pub(crate) async fn dial(&self, port: u32) -> io::Result<Box<dyn Connection>> {
        Ok(match self {
            Self::Vsock => Box::new(VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port)).await?),
            Self::Mux(mux) => Box::new(mux.dial(port).await?),
        })
    }
}
