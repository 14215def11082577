//! A connection of the HTTP server, and its socket, which odd answers reach past hyper.

use std::{
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use anyhow::Result;
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::Notify,
};

use super::Server;
use crate::listen;

/// Limits that are the proxy's to have, not the app's.
const HEADERS: usize = 4096;
const HEADER_BYTES: usize = 4 * 1024 * 1024;

/// One connection, as its requests see it.
#[derive(Debug)]
pub struct Connection {
    /// In the order of `accept`, from 1.
    pub number: u64,
    /// What `accept` returned as the peer.
    pub peer: SocketAddr,
    /// What `getsockname` says.
    pub local: SocketAddr,
    /// Its socket.
    pub wire: Wire,
    requests: AtomicU64,
    goodbye: Notify,
}

impl Connection {
    pub fn new(stream: TcpStream, peer: SocketAddr, number: u64) -> Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self {
            number,
            peer: listen::canonical(peer),
            local: listen::canonical(stream.local_addr()?),
            wire: Wire(Arc::new(stream)),
            requests: AtomicU64::new(0),
            goodbye: Notify::new(),
        })
    }

    /// Counts a request: which one it is, from 1.
    pub fn request(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// This connection is to take no more requests.
    pub fn say_goodbye(&self) {
        self.goodbye.notify_one();
    }

    pub async fn serve(self, server: Arc<Server>) {
        let this = Arc::new(self);
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().max_headers(HEADERS).max_buf_size(HEADER_BYTES);
        builder
            .http2()
            .enable_connect_protocol()
            .max_concurrent_streams(server.options.max_streams)
            .max_header_list_size(HEADER_BYTES as u32);
        let requests = Arc::clone(&this);
        let service = service_fn(move |request| {
            let (server, connection) = (Arc::clone(&server), Arc::clone(&requests));
            async move { server.answer(request, &connection).await }
        });
        let io = TokioIo::new(this.wire.clone());
        let mut served = pin!(builder.serve_connection_with_upgrades(io, service));
        let ended = tokio::select! {
            ended = &mut served => ended,
            () = this.goodbye.notified() => {
                served.as_mut().graceful_shutdown();
                served.await
            }
        };
        if let Err(error) = ended {
            eprintln!("connection of {}: {error}", this.peer);
        }
    }
}

/// A socket that hyper reads and writes, and that can be written, reset or closed beside it.
#[derive(Debug, Clone)]
pub struct Wire(Arc<TcpStream>);

impl Wire {
    /// Writes bytes now, before all that hyper has not written yet.
    pub async fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.0.writable().await?;
            match self.0.try_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Ends both directions at once.
    pub fn end(&self) -> io::Result<()> {
        socket2::SockRef::from(&*self.0).shutdown(std::net::Shutdown::Both)
    }

    /// Closing sends a reset from now on.
    pub fn reset_on_close(&self) -> io::Result<()> {
        self.0.set_zero_linger()
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buffer.initialize_unfilled()) {
                Ok(read) => {
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = socket2::SockRef::from(&*self.0).shutdown(std::net::Shutdown::Write);
        // Whoever resets has nothing left to end.
        Poll::Ready(ended.or_else(|error| match error.kind() {
            io::ErrorKind::NotConnected => Ok(()),
            _ => Err(error),
        }))
    }
}
