//! The wire as both ends see it: real handshakes and streams over loopback, no root.

mod abuse;
mod handshake;
mod native;
mod pool;
mod tunnels;
mod withdrawn;

use std::{
    future::Future,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use crate::drain::Drain;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::*;
use crate::{
    body::{Body, Stall},
    error::{Error, Kind, Result},
    http2::{Reply, ServerStream},
    identity::{Authority, SpiffeId, WorkloadIdentity},
};

/// Any byte stream.
trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

const FLUSH: Duration = Duration::from_mins(5);
const STALL: Stall = Stall { idle: None, flush: FLUSH };

type TestResult = std::result::Result<(), Box<dyn std::error::Error + Send + Sync>>;
type AppFuture = Pin<Box<dyn Future<Output = ()> + Send>>;
/// What an app does with one tunnelled connection.
type App = fn(Box<dyn Bytes>) -> AppFuture;

const POD: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Whose connection a tunnel is.
const CLIENT: SocketAddr = SocketAddr::new(POD, 40_000);
const ECHO: SocketAddr = SocketAddr::new(POD, 7);

fn spiffe(name: &str) -> SpiffeId {
    SpiffeId {
        trust_domain: "cluster.local".into(),
        namespace: "default".into(),
        service_account: name.into(),
    }
}

/// A client's and a server's identity of one mesh.
struct Pair {
    client: Arc<WorkloadIdentity>,
    server: Arc<WorkloadIdentity>,
}

impl Pair {
    async fn new() -> std::result::Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let authority = Authority::in_memory("cluster.local")?;
        let (client, server) = (spiffe("client"), spiffe("server"));
        Ok(Self { client: authority.identity(&client).await?, server: authority.identity(&server).await? })
    }
}

/// Two ends of a loopback connection.
async fn sockets() -> std::io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((POD, 0)).await?;
    let (dialled, accepted) = tokio::join!(TcpStream::connect(listener.local_addr()?), listener.accept());
    Ok((dialled?, accepted?.0))
}

/// The accepting end of a pod, as the agent of its node plays it.
struct Node {
    address: SocketAddr,
    drain: Drain,
    served: JoinSet<Result<()>>,
}

impl Node {
    /// Serves the next `connections`, tunnels to `app`, native requests by telling what came in.
    async fn start(identity: &Arc<WorkloadIdentity>, connections: usize, app: App) -> std::io::Result<Self> {
        let listener = Arc::new(TcpListener::bind((POD, 0)).await?);
        let (address, drain, mut served) = (listener.local_addr()?, Drain::default(), JoinSet::new());
        for _ in 0..connections {
            let (listener, identity, drain) = (Arc::clone(&listener), Arc::clone(identity), drain.clone());
            served.spawn(async move {
                let (stream, _) = listener
                    .accept()
                    .await
                    .map_err(|error| Error::new(Kind::ConnectFailure, error.to_string()))?;
                serve(stream, &identity, &drain, app).await
            });
        }
        Ok(Self { address, drain, served })
    }

    async fn dial(&self) -> Result<TcpStream> {
        TcpStream::connect(self.address)
            .await
            .map_err(|error| Error::new(Kind::ConnectFailure, error.to_string()))
    }

    async fn connect(&self, pair: &Pair) -> Result<MeshConnection> {
        connect(self.dial().await?, &pair.client, std::slice::from_ref(&pair.server.id)).await
    }

    async fn connect_tunnels(&self, pair: &Pair) -> Result<MeshConnection> {
        connect_tunnels(self.dial().await?, &pair.client, std::slice::from_ref(&pair.server.id)).await
    }
}

async fn serve(stream: TcpStream, identity: &WorkloadIdentity, drain: &Drain, app: App) -> Result<()> {
    let Accepted { tls, peer, wire, shown } = accept(stream, identity).await?;
    let (peer, from) = (Arc::new(peer), CLIENT);
    let withdrawn = withdrawn(&shown, from, || {}, || {});
    super::serve(tls, wire, &[POD], drain, FLUSH, withdrawn, move |stream| {
        answer(stream, Arc::clone(&peer), app)
    })
    .await
}

async fn answer(stream: MeshStream, peer: Arc<SpiffeId>, app: App) {
    match stream {
        MeshStream::Tunnel(tunnel) => match tunnel.destination.port() {
            401 => tunnel.refuse(http::StatusCode::UNAUTHORIZED),
            503 => drop(tunnel),
            _ => {
                if let Ok(stream) = tunnel.accept() {
                    app(Box::new(stream)).await;
                }
            }
        },
        MeshStream::Http { request, port, protocol, stream } => {
            let response = native::answer(*request, port, protocol, &peer);
            run(stream, response).await;
        }
        MeshStream::Neither { stream, .. } => stream.refuse(http::StatusCode::BAD_REQUEST),
    }
}

async fn run(stream: ServerStream, response: http::Response<Body>) {
    let reply: Reply<Body> = Reply::Response(response);
    stream.run(std::future::ready(reply), STALL).await;
}

fn echo(mut stream: Box<dyn Bytes>) -> AppFuture {
    Box::pin(async move {
        let (mut reader, mut writer) = tokio::io::split(&mut stream);
        let _ = tokio::io::copy(&mut reader, &mut writer).await;
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut writer).await;
    })
}
