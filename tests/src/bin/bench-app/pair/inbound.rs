//! The server's side of the pair: each stream is a request to the app, on a connection that is kept for the next.

use std::{cell::RefCell, net::SocketAddr, rc::Rc};

use anyhow::{Context as _, Result};
use hyper::{
    Request, Response, Uri, Version,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header::{CONNECTION, HOST, HeaderValue},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::{CONNECTION_WINDOW, Here, Options, STREAM_WINDOW, on_each_core, tls};

/// What one thread has.
struct Inbound {
    app: SocketAddr,
    tls: TlsAcceptor,
    /// Those that have nothing to do; the last used is the next.
    idle: RefCell<Vec<SendRequest<Incoming>>>,
}

pub fn run(options: &Options) -> Result<()> {
    let (app, tls) = (options.peer, tls::acceptor(&options.certs)?);
    let serve = async move |listener: TcpListener| {
        let inbound = Rc::new(Inbound { app, tls: tls.clone(), idle: RefCell::default() });
        loop {
            let (client, _) = listener.accept().await?;
            client.set_nodelay(true)?;
            let inbound = Rc::clone(&inbound);
            tokio::task::spawn_local(async move {
                if let Err(error) = inbound.serve(client).await {
                    eprintln!("{error:#}");
                }
            });
        }
    };
    on_each_core(&serve, options.listen)
}

impl Inbound {
    async fn serve(self: Rc<Self>, client: TcpStream) -> Result<()> {
        let stream = self.tls.accept(client).await.context("TLS")?;
        let mut server = http2::Builder::new(Here);
        server.initial_stream_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
        let forward = service_fn(move |request| Rc::clone(&self).forward(request));
        server.serve_connection(TokioIo::new(stream), forward).await.context("HTTP/2")
    }

    async fn forward(self: Rc<Self>, mut request: Request<Incoming>) -> Result<Response<Incoming>> {
        let authority = request.uri().authority().context("no authority")?.as_str();
        let host = HeaderValue::from_str(authority)?;
        let target = request.uri().path_and_query().context("no path")?.clone();
        *request.uri_mut() = Uri::from(target);
        request.headers_mut().insert(HOST, host);
        *request.version_mut() = Version::HTTP_11;
        let mut sender = self.sender().await?;
        let mut response = sender.send_request(request).await?;
        response.headers_mut().remove(CONNECTION);
        *response.version_mut() = Version::HTTP_2;
        // Free once the response's body has been read.
        tokio::task::spawn_local(async move {
            if sender.ready().await.is_ok() {
                self.idle.borrow_mut().push(sender);
            }
        });
        Ok(response)
    }

    async fn sender(&self) -> Result<SendRequest<Incoming>> {
        while let Some(sender) = self.idle.borrow_mut().pop() {
            if sender.is_ready() {
                return Ok(sender);
            }
        }
        let stream = TcpStream::connect(self.app).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::task::spawn_local(async {
            if let Err(error) = connection.await {
                eprintln!("{error}");
            }
        });
        Ok(sender)
    }
}
