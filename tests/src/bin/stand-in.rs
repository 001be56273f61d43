//! Stands in for the programs of critest's images, where there is no way to pull those. What it is depends on its name:
//!
//! - `nginx`: a web server; it notes its process id where nginx does. The last argument is the port.
//! - `httpd`: the same, and says on stdout that it is there.
//! - `nnp`: prints its effective user id; its file is root's, with the set-user-ID bit.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

const PAGE: &str = "critest asks for nothing but the status of this page\n";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let name = arguments.first().map(|path| Path::new(path).file_name());
    let name = name.flatten().unwrap_or_default().to_string_lossy();
    match &*name {
        "nnp" => {
            println!("Effective uid: {}", nix::unistd::geteuid());
            Ok(())
        }
        "nginx" => {
            fs::write("/var/run/nginx.pid", format!("{}\n", std::process::id())).context("noting the process id")?;
            serve(arguments.last().context("no port")?)
        }
        "httpd" => {
            println!("httpd: ready");
            serve(arguments.last().context("no port")?)
        }
        name => bail!("there is nothing that '{name}' stands in for"),
    }
}

fn serve(port: &str) -> Result<()> {
    let port: u16 = port.parse().with_context(|| format!("'{port}' is no port"))?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).context("listening")?;
    loop {
        // One that goes away early is its own matter.
        let _ = listener.accept().and_then(|(stream, _)| answer(stream));
    }
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut request: Vec<u8> = Vec::new();
    let mut part = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut part)? {
            0 => return Ok(()),
            length => request.extend(&part[..length]),
        }
        if request.len() > 64 * 1024 {
            return Ok(());
        }
    }
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{PAGE}",
        PAGE.len()
    )
}
