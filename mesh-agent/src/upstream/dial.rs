//! New connections, each from inside a pod's network namespace and within its connect timeout.
//!
//! Never takes longer than that for the connection and its TLS together. Tested below on a paused clock, and in the lab
//! (`tests/tests/connect_timeout.rs`).

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{BeginFlow, UpstreamStream, originate};
use crate::{
    capture::PodNet,
    error::{Error, Kind, Result},
    report::FlowGuard,
    state::snapshot::{ClientTls, Protocol, TcpKeepalive},
    tunnel::{Introduction, MESH_TLS_PORT},
};

/// Pause between two tries to reach a pod whose agent does not listen in it yet.
const TRY_AGAIN: Duration = Duration::from_millis(50);

/// One connection to be made.
#[derive(Clone, Copy)]
pub struct Dial<'a> {
    /// The pod whose network it is made in.
    pub net: &'a PodNet,
    /// Where to.
    pub to: SocketAddr,
    /// To the pod's own app, which is shown this client; `None`: out of the pod, from its own address.
    pub as_client: Option<SocketAddr>,
    /// Time to connect.
    pub timeout: Duration,
    /// Probes while nothing is said (`tcpKeepalive`).
    pub keepalive: Option<TcpKeepalive>,
    /// What is begun on it before anything is said.
    pub tls: Option<&'a ClientTls>,
    /// Whom the other end is told of, before everything else.
    pub introduces: Option<Introduction>,
    /// Begins the facts of the connection, where the app's end has some.
    pub flow: Option<&'a BeginFlow<'a>>,
}

impl Dial<'_> {
    /// The facts of the connection just made, for as long as it is open.
    pub fn begin_flow(&self) -> Option<FlowGuard> {
        self.flow.and_then(|begin| begin())
    }

    fn keep_alive(&self, stream: &TcpStream) -> io::Result<()> {
        let Some(wanted) = self.keepalive else { return Ok(()) };
        let (socket, mut probes) = (SockRef::from(stream), socket2::TcpKeepalive::new());
        if let Some(time) = wanted.time {
            probes = probes.with_time(time);
        }
        if let Some(interval) = wanted.interval {
            probes = probes.with_interval(interval);
        }
        if let Some(count) = wanted.probes {
            probes = probes.with_retries(count);
        }
        // By itself the socket asks for none, whatever the numbers are.
        socket.set_keepalive(true)?;
        if wanted == TcpKeepalive::default() { Ok(()) } else { socket.set_tcp_keepalive(&probes) }
    }

    /// Makes the connection, and begins TLS on it where there is to be any; within its time, both.
    pub async fn open(&self, protocol: Protocol) -> Result<UpstreamStream> {
        let deadline = Instant::now() + self.timeout;
        let stream = self.connect().await?;
        let Some(tls) = self.tls else { return Ok(UpstreamStream::Tcp(stream)) };
        // Boxed: rare, and every dial would have to make room for it.
        let handshake = Box::pin(originate::handshake(tls, protocol, stream));
        let late = |_| {
            let text = format!("no TLS with {} within {:?}", self.to, self.timeout);
            Error::new(Kind::TlsFailure, text)
        };
        let stream = timeout_at(deadline, handshake).await.map_err(late)??;
        Ok(UpstreamStream::Tls(Box::new(stream)))
    }

    /// Makes the connection.
    pub async fn connect(&self) -> Result<TcpStream> {
        self.connect_once_it_listens(|| None).await
    }

    /// As [`Dial::connect`]; where nobody listens it is tried again for as long as `joining` says that somebody is about to.
    pub async fn connect_once_it_listens(&self, joining: impl Fn() -> Option<Instant>) -> Result<TcpStream> {
        let dialling = async {
            loop {
                match self.try_once().await {
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused && joining().is_some() => {
                        sleep(TRY_AGAIN).await;
                    }
                    tried => return tried,
                }
            }
        };
        let to = self.to;
        let failed = |text| Err(Error::new(Kind::ConnectFailure, text));
        match timeout(self.timeout, dialling).await {
            Ok(Ok(stream)) => self
                .keep_alive(&stream)
                .map(|()| stream)
                .or_else(|error| failed(format!("the connection to {to} takes no keepalive: {error}"))),
            Ok(Err(error)) => failed(format!("cannot connect to {to}: {error}")),
            Err(_) if to.port() == MESH_TLS_PORT => failed(format!(
                "no connection to {to} within {:?}: is its agent up, and does a NetworkPolicy let port {MESH_TLS_PORT} in?",
                self.timeout
            )),
            Err(_) => failed(format!("no connection to {to} within {:?}", self.timeout)),
        }
    }

    async fn try_once(&self) -> io::Result<TcpStream> {
        let mut stream = match self.as_client {
            Some(client) => self.net.dial_app(self.to, client).await?,
            None => self.net.dial(self.to).await?,
        };
        if let Some(introduction) = &self.introduces {
            stream.write_all(&introduction.bytes()).await?;
        }
        Ok(stream)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::net::TcpListener;

    use socket2::{Domain, Socket, Type};

    use super::*;
    use crate::{report::samples, state::snapshot::TlsTerms};

    /// Listens, and has as many connections waiting as it lets wait: the kernel answers no other SYN.
    fn full() -> (TcpListener, std::net::TcpStream, SocketAddr) {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        socket.listen(0).unwrap();
        let listener = TcpListener::from(socket);
        let at = listener.local_addr().unwrap();
        (listener, std::net::TcpStream::connect(at).unwrap(), at)
    }

    fn dial<'a>(net: &'a PodNet, to: SocketAddr, timeout: Duration, tls: Option<&'a ClientTls>) -> Dial<'a> {
        let (as_client, keepalive, introduces, flow) = (None, None, None, None);
        Dial { net, to, as_client, timeout, keepalive, tls, introduces, flow }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_does_not_come_about_is_given_up_in_time() {
        let net = PodNet::fixed(samples::workload("a", 1)).unwrap();
        let (_listener, _waiting, at) = full();
        for limit in [Duration::from_millis(300), Duration::from_secs(10)] {
            let begun = Instant::now();
            let error = dial(&net, at, limit, None).connect().await.unwrap_err();
            assert_eq!((error.kind, begun.elapsed()), (Kind::ConnectFailure, limit), "{error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn tls_that_does_not_come_about_is_given_up_in_time() {
        let net = PodNet::fixed(samples::workload("a", 1)).unwrap();
        // It takes connections, and says nothing.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (server, names) = ("a.example".into(), Vec::new());
        let (roots, revoked, anybody, shows) = (None, None, true, None);
        let tls = ClientTls::new(TlsTerms { server, names, roots, revoked, anybody, shows });
        let limit = Duration::from_secs(3);
        let begun = Instant::now();
        let dial = dial(&net, listener.local_addr().unwrap(), limit, Some(&tls));
        let error = dial.open(Protocol::Opaque).await.unwrap_err();
        assert_eq!((error.kind, begun.elapsed()), (Kind::TlsFailure, limit), "{error}");
    }
}
