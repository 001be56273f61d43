//! One HTTP request, as plain as the protocol allows (HTTP/1.0, RFC 1945).

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::node::Node;

/// Gets `/` of an address in the node's network and answers the body.
pub fn get(node: &Node, address: SocketAddr) -> Result<String> {
    node.in_network(|| request(address))?
        .with_context(|| format!("asking http://{address}/"))
}

fn request(address: SocketAddr) -> Result<String> {
    let bound = Duration::from_secs(10);
    let mut stream = TcpStream::connect_timeout(&address, bound)?;
    stream.set_read_timeout(Some(bound))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let (head, body) = response.split_once("\r\n\r\n").context("the reply is no HTTP")?;
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.contains(" 200 "), "the reply is {status:?}");
    Ok(body.to_owned())
}
