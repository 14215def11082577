//! Connections of the controller's servers: taken, with TLS begun, and ended.
//!
//! Promises a bound of how many there are at once and of the time for a handshake, and that no error of one connection ends
//! another. Never knows what is spoken. Tested through the servers (`tests/`, `webhook/tests.rs`).

use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use hyper_util::server::graceful::GracefulConnection;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::server_certificate::ServerCertificate;

/// Time for a handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Pause after the process ran out of descriptors: `accept` would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Takes connections until `stop`, `most` at a time (more wait in the backlog), and has each served once TLS has begun. What is
/// returned are those that are still open. `server`: what logs call it.
pub(super) async fn take<F>(
    (listener, certificate): (&TcpListener, &ServerCertificate),
    (server, most): (&'static str, usize),
    stop: &CancellationToken,
    serve: impl Fn(TlsStream<TcpStream>, SocketAddr) -> F + Clone + Send + 'static,
) -> TaskTracker
where
    F: Future<Output = anyhow::Result<()>> + Send,
{
    let (room, tasks) = (Arc::new(Semaphore::new(most)), TaskTracker::new());
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return tasks,
            accepted = accept(listener, &room) => accepted,
        };
        match accepted {
            Ok((stream, peer, permit)) => {
                let tls = TlsAcceptor::from(certificate.config());
                let (serve, stop) = (serve.clone(), stop.clone());
                tasks.spawn(async move {
                    if let Err(error) = begin(stream, peer, tls, &stop, serve).await {
                        tracing::debug!(%peer, error = format!("{error:#}"), "a connection to {server} ended");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a connection to {server}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let permit = Arc::clone(room).acquire_owned().await.map_err(std::io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    Ok((stream, SocketAddr::new(peer.ip().to_canonical(), peer.port()), permit))
}

async fn begin<F: Future<Output = anyhow::Result<()>>>(
    stream: TcpStream,
    peer: SocketAddr,
    tls: TlsAcceptor,
    stop: &CancellationToken,
    serve: impl Fn(TlsStream<TcpStream>, SocketAddr) -> F,
) -> anyhow::Result<()> {
    // Small messages, each waited for.
    let _ = stream.set_nodelay(true);
    let stream = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        stream = timeout(HANDSHAKE, tls.accept(stream)) => stream??,
    };
    serve(stream, peer).await
}

/// Serves a connection to its end; after `stop` requests under way are answered, within the limit.
///
/// # Errors
/// The connection's own, and that it has not ended in time.
pub(super) async fn until_stopped<C>(
    connection: C,
    stop: &CancellationToken,
    limit: Duration,
) -> anyhow::Result<()>
where
    C: GracefulConnection<Error: std::error::Error + Send + Sync + 'static>,
{
    let mut connection = pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => ended?,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            timeout(limit, connection).await??;
        }
    }
    Ok(())
}
