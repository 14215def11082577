//! The dialling end: one verified connection to a pod's 15008, and the streams on it.
//!
//! A connection is made for requests ([`connect`]) or for tunnels ([`connect_tunnels`]). It ends by itself when
//! its last handle and stream are gone. Tested in `tunnel/tests`.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Request, Response, StatusCode, header::FORWARDED};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Wire, failure,
    native::{note_refusal, strip_mesh_headers, to_wire, told_failure},
    settings::{
        CLIENT_MAX_STREAMS, HANDSHAKE_TIMEOUT, PING_INTERVAL, PING_TIMEOUT, ROOT_GONE_GRACE, client_builder,
    },
};
use crate::{
    body::{Body, Inform},
    copy::{Coalesced, Socket},
    error::{Error, Kind, Result},
    http2::{self, ByteStream, Failed, keep_alive},
    identity::{
        ALPN_H2, ALPN_MESH_H2, Shown, SpiffeId, Usage, Withdrawn, WorkloadIdentity, expected_identity,
        server_name,
    },
    state::snapshot::Protocol,
};

/// The client end of one mTLS connection to a pod's port 15008. Cheap to clone; streams share the connection.
pub struct MeshConnection {
    /// What the peer agreed to.
    pub wire: Wire,
    /// Whom the peer proved to be.
    pub peer: SpiffeId,
    shared: Arc<Shared>,
    /// The place the pool set aside for the next stream of this handle.
    reserved: Mutex<Option<OwnedSemaphorePermit>>,
}

struct Shared {
    address: SocketAddr,
    sender: SendRequest<Bytes>,
    places: Arc<Semaphore>,
    /// Grows with every stream.
    uses: AtomicU64,
    /// The peer's refusal of our certificate, which comes after the handshake.
    refusal: Arc<OnceLock<Error>>,
    closed: CancellationToken,
    /// Set when no new stream is to go here.
    retired: CancellationToken,
    /// Tells the driver that no handle is left.
    #[expect(dead_code, reason = "its drop is what it is for")]
    unused: DropGuard,
}

/// mTLS and h2 handshake over a stream that is already connected to the peer's 15008, for requests: `mesh-h2`
/// where the peer knows it, else `h2`.
///
/// # Errors
/// [`Kind::IdentityMismatch`] when the peer is none of `expected`, [`Kind::TlsFailure`] when it proves nothing.
pub async fn connect(
    stream: TcpStream,
    identity: &WorkloadIdentity,
    expected: &[SpiffeId],
) -> Result<MeshConnection> {
    establish(stream, identity, expected, &[ALPN_MESH_H2, ALPN_H2]).await
}

/// The same for byte streams: always `h2`, whose tunnels keep an abort an abort.
///
/// # Errors
/// As [`connect`].
pub async fn connect_tunnels(
    stream: TcpStream,
    identity: &WorkloadIdentity,
    expected: &[SpiffeId],
) -> Result<MeshConnection> {
    establish(stream, identity, expected, &[ALPN_H2]).await
}

async fn establish(
    stream: TcpStream,
    identity: &WorkloadIdentity,
    expected: &[SpiffeId],
    alpn: &[&[u8]],
) -> Result<MeshConnection> {
    let address = stream
        .peer_addr()
        .map_err(|error| Error::new(Kind::ConnectFailure, format!("the peer left: {error}")))?;
    // Only latency suffers when it fails.
    let _ = stream.set_nodelay(true);
    let beginning = identity.begin();
    let connector = TlsConnector::from(identity.client_config(expected, alpn)?);
    let tls = timeout(HANDSHAKE_TIMEOUT, connector.connect(server_name(address.ip()), Socket::new(stream)))
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake within 10 s")))
        .map_err(|error| failure::dialling(&error, address))?;
    let refused = |detail: &str| Error::new(Kind::TlsFailure, format!("{address} {detail}"));
    let session = tls.get_ref().1;
    let wire = Wire::from_alpn(session.alpn_protocol()).ok_or_else(|| refused("chose no ALPN of ours"))?;
    let chain = session.peer_certificates().unwrap_or_default();
    let peer = expected_identity(chain.first().ok_or_else(|| refused("showed no certificate"))?, expected)
        .map_err(|refusal| Error::new(Kind::IdentityMismatch, format!("{address}: {refusal}")))?;
    let shown = beginning.shown(chain, Usage::Server);
    let shared = Shared::start(tls, wire, address, shown).await?;
    Ok(MeshConnection { wire, peer, shared: Arc::new(shared), reserved: Mutex::default() })
}

impl Shared {
    async fn start(tls: TlsStream<Socket>, wire: Wire, address: SocketAddr, shown: Shown) -> Result<Self> {
        let refusal = Arc::new(OnceLock::new());
        let [closed, retired, unused] = std::array::from_fn(|_| CancellationToken::new());
        let io = Coalesced::new(Watched { io: tls, address, refusal: Arc::clone(&refusal) });
        let ended = closed.clone().drop_guard();
        let (sender, driver) =
            client_builder(wire).handshake(io).await.map_err(|error| failure::stream(&error, address))?;
        let standing = Standing { shown, retired: retired.clone(), refusal: Arc::clone(&refusal) };
        tokio::spawn(drive(driver, unused.clone(), ended, address, standing));
        let places = Arc::new(Semaphore::new(CLIENT_MAX_STREAMS));
        let (uses, unused) = (AtomicU64::new(0), unused.drop_guard());
        Ok(Self { address, sender, places, uses, refusal, closed, retired, unused })
    }

    fn is_closed(&self) -> bool {
        self.closed.is_cancelled() || self.retired.is_cancelled() || http2::is_closed(&self.sender)
    }

    fn failed(&self, failed: impl Into<Failed>) -> Error {
        self.refusal.get().cloned().unwrap_or_else(|| failure::failed(&failed.into(), self.address))
    }
}

/// What a connection stands on.
struct Standing {
    shown: Shown,
    retired: CancellationToken,
    refusal: Arc<OnceLock<Error>>,
}

impl Standing {
    /// Completes when the connection has to be cut; before that, it is retired.
    async fn gone(&self, peer: SocketAddr) {
        let why = self.shown.withdrawn().await;
        self.retired.cancel();
        let reason = match why {
            Withdrawn::Revoked => "its certificate is revoked",
            Withdrawn::RootGone => {
                tokio::time::sleep(ROOT_GONE_GRACE).await;
                "the root of its certificate is not believed any more"
            }
        };
        tracing::warn!(%peer, "mesh connection cut: {reason}");
        let _ = self.refusal.set(Error::new(Kind::TlsFailure, format!("{peer} is left: {reason}")));
    }
}

async fn drive(
    mut connection: h2::client::Connection<Coalesced<Watched>, Bytes>,
    unused: CancellationToken,
    _ended: DropGuard,
    peer: SocketAddr,
    standing: Standing,
) {
    let gone = standing.gone(peer);
    tokio::pin!(gone);
    let pings = connection.ping_pong();
    let keep_alive = keep_alive(pings, PING_INTERVAL, PING_TIMEOUT);
    tokio::pin!(keep_alive);
    let mut in_use = true;
    loop {
        tokio::select! {
            ended = &mut connection => {
                if let Err(error) = ended {
                    tracing::debug!(%peer, %error, "mesh connection ended");
                }
                return;
            }
            () = &mut keep_alive => {
                tracing::debug!(%peer, "mesh connection ended: no answer to PING");
                return;
            }
            () = &mut gone => return,
            // h2 does not wake for this by itself: look again, it may have nothing left to do.
            () = unused.cancelled(), if in_use => in_use = false,
        }
    }
}

impl MeshConnection {
    /// Whether another stream may be opened.
    pub fn is_open(&self) -> bool {
        !self.shared.is_closed() && (self.shared.places.available_permits() > 0 || self.is_reserved())
    }

    /// Where the peer is.
    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// Opens a CONNECT stream to `destination` (an address of the peer pod) for the connection of this client, and waits
    /// for its 200. Dropped before `shutdown`, the stream is reset.
    ///
    /// # Errors
    /// [`Kind::Denied`], [`Kind::ConnectFailure`] or [`Kind::BadRequest`] by the peer's answer;
    /// [`Kind::RefusedStream`] when another connection should be tried; [`Kind::UpstreamReset`] else.
    pub async fn open_tunnel(&self, destination: SocketAddr, client: SocketAddr) -> Result<ByteStream> {
        let place = self.take_place()?;
        let failed = |error: h2::Error| self.shared.failed(error);
        let request =
            Request::connect(destination.to_string()).header(FORWARDED, format!("for=\"{client}\""));
        let request = request.body(()).map_err(|error| {
            Error::new(Kind::BadRequest, format!("CONNECT to {destination} is not possible: {error}"))
        })?;
        let unsent = |error| self.shared.failed(Failed { error, untouched: true });
        let mut sender = self.shared.sender.clone().ready().await.map_err(unsent)?;
        let (response, send) = sender.send_request(request, false).map_err(unsent)?;
        let response = response.await.map_err(failed)?;
        check_status(response.status(), destination, self.shared.address)?;
        Ok(ByteStream::new(send, response.into_body(), Some(place)))
    }

    /// Sends a native request (only on [`Wire::MeshH2`]). `destination` is the app's address in the peer pod,
    /// `protocol` what the app speaks. The response body holds the stream's place on the connection.
    ///
    /// Upgrades do not survive HTTP/2: send a request that asks for one through a tunnel.
    ///
    /// # Errors
    /// [`Kind::RefusedStream`] when the peer never saw the request; [`Kind::UpstreamReset`] when it may have.
    pub async fn send(
        &self,
        request: Box<Request<Body>>,
        destination: SocketAddr,
        protocol: Protocol,
        inform: Option<&dyn Inform>,
    ) -> Result<Response<Body>> {
        if self.wire != Wire::MeshH2 {
            let address = self.shared.address;
            return Err(Error::new(Kind::BadRequest, format!("{address} speaks HBONE only: open a tunnel")));
        }
        let request = to_wire(request, destination, protocol)?;
        let place = self.take_place()?;
        let sent = http2::send(self.shared.sender.clone(), request, inform).await;
        let mut response = sent.map_err(|failed| self.shared.failed(failed))?;
        if let Some(kind) = told_failure(response.headers()) {
            let agent = self.shared.address.ip();
            return Err(Error::new(kind, format!("the agent of {agent} has no response of {destination}")));
        }
        note_refusal(&mut response);
        strip_mesh_headers(response.headers_mut());
        Ok(response.map(|body| body.held(Arc::new(place))))
    }

    /// A handle with the next stream's place set aside, unless the connection is full or closed.
    pub(super) fn reserve(&self) -> Option<Self> {
        if self.shared.is_closed() {
            return None;
        }
        let place = Arc::clone(&self.shared.places).try_acquire_owned().ok()?;
        self.shared.uses.fetch_add(1, Ordering::Relaxed);
        let handle = self.clone();
        *handle.lock() = Some(place);
        Some(handle)
    }

    /// Completes when the connection has ended, or takes no new stream.
    pub(super) async fn done(&self) {
        tokio::select! {
            () = self.shared.closed.cancelled() => {}
            () = self.shared.retired.cancelled() => {}
        }
    }

    /// Streams ever opened or set aside, and whether one is now.
    pub(super) fn usage(&self) -> (u64, bool) {
        let busy = self.shared.places.available_permits() < CLIENT_MAX_STREAMS;
        (self.shared.uses.load(Ordering::Relaxed), busy)
    }

    /// Whether both are handles of one connection.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<OwnedSemaphorePermit>> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_reserved(&self) -> bool {
        self.lock().is_some()
    }

    fn take_place(&self) -> Result<OwnedSemaphorePermit> {
        if let Some(place) = self.lock().take() {
            return Ok(place);
        }
        self.shared.uses.fetch_add(1, Ordering::Relaxed);
        Arc::clone(&self.shared.places).try_acquire_owned().map_err(|_| {
            let address = self.shared.address;
            let detail =
                format!("all {CLIENT_MAX_STREAMS} streams of this connection to {address} are in use");
            Error::new(Kind::RefusedStream, detail)
        })
    }
}

fn check_status(status: StatusCode, destination: SocketAddr, peer: SocketAddr) -> Result<()> {
    if status == StatusCode::OK { Ok(()) } else { Err(failure::refused_tunnel(status, destination, peer)) }
}

impl Clone for MeshConnection {
    /// Another handle of the same connection, without what the pool set aside for this one.
    fn clone(&self) -> Self {
        let (wire, peer, shared) = (self.wire, self.peer.clone(), Arc::clone(&self.shared));
        Self { wire, peer, shared, reserved: Mutex::default() }
    }
}

impl fmt::Debug for MeshConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("MeshConnection");
        out.field("address", &self.shared.address).field("wire", &self.wire).field("peer", &self.peer);
        out.field("open", &self.is_open()).finish_non_exhaustive()
    }
}

/// A TLS stream that remembers why the peer refused us.
struct Watched {
    io: TlsStream<Socket>,
    address: SocketAddr,
    refusal: Arc<OnceLock<Error>>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = ready!(Pin::new(&mut self.io).poll_read(cx, buffer));
        if let Err(error) = &read
            && let Some(refusal) = failure::late_refusal(error, self.address)
        {
            let _ = self.refusal.set(refusal);
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
