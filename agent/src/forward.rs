//! Connections to ports of the guest's loopback, for whoever forwards a port of the pod ([`coreos_kvm_proto::carry`]).

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use coreos_kvm_proto::carry::{CONNECTED, REFUSED, carry};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, sink},
    net::TcpStream,
    time::timeout,
};

/// The host says at once which port it wants; loopback takes or refuses at once.
const BOUND: Duration = Duration::from_secs(10);

/// Serves one of them.
pub(crate) async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let Ok(Ok(port)) = timeout(BOUND, stream.read_u16()).await else {
        return tracing::warn!("a connection did not say to which port it is to be forwarded");
    };
    let Some(mut connection) = connect(port).await else {
        let _ = stream.write_u8(REFUSED).await;
        let _ = stream.flush().await;
        return;
    };
    let carried = async {
        stream.write_u8(CONNECTED).await?;
        carry(&mut connection, &mut stream).await
    };
    match carried.await {
        // A connection that is closed at once may lose what is still on its way: the host is the one who closes.
        Ok(()) => drop(timeout(BOUND, copy(&mut stream, &mut sink())).await),
        Err(error) => {
            tracing::debug!(port, %error, "a forwarded connection ended early");
            // The server is not to take what it has for all there was.
            let _ = connection.set_zero_linger();
        }
    }
}

/// As `localhost` is looked up: a server may be at one of the addresses alone.
async fn connect(port: u16) -> Option<TcpStream> {
    let addresses: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    for address in addresses {
        if let Ok(Ok(connection)) = timeout(BOUND, TcpStream::connect((address, port))).await {
            // What is said in small pieces is to arrive in time.
            let _ = connection.set_nodelay(true);
            return Some(connection);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use tokio::{io::duplex, net::TcpListener};

    use super::*;

    #[tokio::test]
    async fn a_port_without_a_server_is_refused() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let (mut host, guest) = duplex(100);
        host.write_u16(port).await.unwrap();
        serve(guest).await;
        assert_eq!(host.read_u8().await.unwrap(), REFUSED);
    }

    #[tokio::test]
    async fn a_server_on_ipv6_alone_is_found() {
        let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(connect(port).await.is_some());
    }
}
