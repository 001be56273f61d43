//! What goes over a WebSocket connection to containerd's streaming server, in the protocol `v4.channel.k8s.io` (a byte that names the
//! channel opens each message): an interactive exec, as `kubectl exec -it` has it, and a forwarded port.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use tungstenite::client::IntoClientRequest as _;
use tungstenite::http::HeaderValue;
use tungstenite::{Error, Message, WebSocket};

use crate::node::Node;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const END: u8 = 3;
const RESIZE: u8 = 4;

/// A process with open streams.
#[derive(Debug)]
pub struct Session {
    socket: WebSocket<TcpStream>,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    exit_code: Option<i32>,
}

impl Session {
    /// Connects to the address that [`crate::cri::Cri::exec_url`] answered.
    pub fn open(node: &Node, url: &str) -> Result<Self> {
        Ok(Self {
            socket: connect(node, url)?,
            stdout: Vec::new(),
            stderr: Vec::new(),
            exit_code: None,
        })
    }

    pub fn send(&mut self, input: &str) -> Result<()> {
        self.message(STDIN, input.as_bytes())
    }

    /// Tells the process's terminal its size.
    pub fn resize(&mut self, columns: u16, rows: u16) -> Result<()> {
        self.message(RESIZE, format!(r#"{{"Width":{columns},"Height":{rows}}}"#).as_bytes())
    }

    /// Reads until stdout contains a text.
    pub fn read_until(&mut self, text: &str, bound: Duration) -> Result<()> {
        let deadline = Instant::now() + bound;
        while !String::from_utf8_lossy(&self.stdout).contains(text) {
            ensure!(
                self.exit_code.is_none(),
                "the process ended without {text:?}; it said {:?}",
                self.said()
            );
            self.read(deadline)
                .with_context(|| format!("waiting for {text:?}; so far there is {:?}", self.said()))?;
        }
        Ok(())
    }

    /// Reads to the process's end and answers its exit code.
    pub fn wait(&mut self, bound: Duration) -> Result<i32> {
        let deadline = Instant::now() + bound;
        loop {
            if let Some(code) = self.exit_code {
                return Ok(code);
            }
            self.read(deadline)
                .with_context(|| format!("waiting for the end; so far there is {:?}", self.said()))?;
        }
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    fn message(&mut self, channel: u8, payload: &[u8]) -> Result<()> {
        let message = [&[channel], payload].concat();
        self.socket
            .send(Message::Binary(message.into()))
            .context("sending to the process")
    }

    /// Takes one message.
    fn read(&mut self, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "it took too long");
        self.socket.get_ref().set_read_timeout(Some(left))?;
        let message = match self.socket.read() {
            Ok(message) => message,
            Err(Error::Io(error)) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                bail!("it took too long")
            }
            Err(error) => return Err(error).context("reading from the process"),
        };
        let data = message.into_data();
        match data.split_first() {
            Some((&STDOUT, bytes)) => self.stdout.extend(bytes),
            Some((&STDERR, bytes)) => self.stderr.extend(bytes),
            Some((&END, status)) if !status.is_empty() => self.exit_code = Some(exit_code(status)?),
            _ => {}
        }
        Ok(())
    }
}

/// A connection to the streaming server.
fn connect(node: &Node, url: &str) -> Result<WebSocket<TcpStream>> {
    let address = url
        .strip_prefix("http://")
        .with_context(|| format!("{url} is no http address"))?;
    let host = address.split('/').next().unwrap_or_default().to_owned();
    let mut request = format!("ws://{address}")
        .into_client_request()
        .context("the stream's address")?;
    request
        .headers_mut()
        .insert("Sec-WebSocket-Protocol", HeaderValue::from_static("v4.channel.k8s.io"));

    let stream = node
        .in_network(|| TcpStream::connect(&host))?
        .with_context(|| format!("connecting to {host}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let (socket, _) = tungstenite::client(request, stream)
        .map_err(|error| anyhow::anyhow!("{error}"))
        .context("opening the streams")?;
    Ok(socket)
}

/// Asks a forwarded port, by the address that [`crate::cri::Cri::port_forward_url`] answered, and answers all that it says until the
/// connection ends: one channel has the data, another one errors; each begins with the port's number.
pub fn ask_port(node: &Node, url: &str, port: u16, question: &str) -> Result<String> {
    const DATA: u8 = 0;
    let mut socket = connect(node, &format!("{url}?port={port}"))?;
    let question = [&[DATA], question.as_bytes()].concat();
    socket
        .send(Message::Binary(question.into()))
        .context("asking the port")?;
    let mut channels = [Vec::new(), Vec::new()];
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match socket.read() {
            Ok(message) => {
                let data = message.into_data();
                if let Some((&channel, bytes)) = data.split_first()
                    && let Some(said) = channels.get_mut(usize::from(channel))
                {
                    said.extend_from_slice(bytes);
                }
            }
            Err(Error::ConnectionClosed | Error::AlreadyClosed | Error::Protocol(_)) => break,
            Err(Error::Io(error)) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) => return Err(error).context("reading from the port"),
        }
        ensure!(Instant::now() < deadline, "the port does not come to an end");
    }
    let [data, error] = channels.map(|said| said.get(2..).map(<[u8]>::to_vec).unwrap_or_default());
    ensure!(error.is_empty(), "{}", String::from_utf8_lossy(&error));
    Ok(String::from_utf8_lossy(&data).into_owned())
}

/// The Kubernetes API's `Status` that ends a stream.
#[derive(Debug, Deserialize)]
struct End {
    status: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    details: Details,
}

#[derive(Debug, Default, Deserialize)]
struct Details {
    #[serde(default)]
    causes: Vec<Cause>,
}

#[derive(Debug, Deserialize)]
struct Cause {
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
}

fn exit_code(status: &[u8]) -> Result<i32> {
    let end: End = serde_json::from_slice(status).context("the status that ends the exec")?;
    if end.status == "Success" {
        return Ok(0);
    }
    match end.details.causes.iter().find(|cause| cause.reason == "ExitCode") {
        Some(cause) => cause.message.parse().context("the exit code that ends the exec"),
        None => bail!("the exec failed: {}", end.message),
    }
}
