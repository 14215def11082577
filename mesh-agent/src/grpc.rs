//! A connection of hyper's, as tonic's client wants it: tonic is here without its own transport.
//!
//! Promises nothing of its own. Tested by those who call over it: `identity` and `source`.

use std::task::{Context, Poll};

use hyper::{body::Incoming, client::conn::http2::SendRequest};
use tonic::{
    body::Body,
    codegen::{BoxFuture, Service},
};

/// One HTTP/2 connection to a server of gRPC.
pub(crate) struct Connection(pub SendRequest<Body>);

impl Service<http::Request<Body>> for Connection {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
