//! Clients whose bytes are copied as they are, each kind of connection in its own way.

use std::pin::Pin;

use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use crate::{
    copy::{self, Moved, Socket},
    detect::Prefixed,
    error::Result,
    upstream::UpstreamStream,
};

/// Bytes on their way, until both sides are done. Boxed, each in its own size: it lasts, and is handed on.
pub(super) type Copying<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

/// A client whose bytes are copied.
pub(super) trait Copied {
    /// To this stream, and back.
    fn copied(self, server: UpstreamStream, moved: &Moved) -> Copying<'_>;
}

impl Copied for Prefixed<TcpStream> {
    fn copied(self, server: UpstreamStream, moved: &Moved) -> Copying<'_> {
        match server {
            UpstreamStream::Tcp(server) => {
                let (said, client) = self.into_parts();
                Box::pin(async move { copy::between_sockets(client, &said, server, moved).await })
            }
            server => Box::pin(copy::both_ways(self, server, moved)),
        }
    }
}

impl Copied for Box<TlsStream<Prefixed<Socket>>> {
    fn copied(self, server: UpstreamStream, moved: &Moved) -> Copying<'_> {
        Box::pin(copy::both_ways(*self, server, moved))
    }
}
