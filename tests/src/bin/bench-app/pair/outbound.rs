//! The client's side of the pair: each request of any connection is a stream on one connection to the other side.

use std::{net::SocketAddr, rc::Rc};

use anyhow::{Context as _, Result};
use hyper::{
    Request, Response, Uri, Version,
    body::Incoming,
    client::conn::http2::{self, SendRequest},
    header::{CONNECTION, HOST},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Mutex,
};
use tokio_rustls::TlsConnector;

use super::{CONNECTION_WINDOW, Here, Options, STREAM_WINDOW, on_each_core, tls};

/// What one thread has.
struct Outbound {
    peer: SocketAddr,
    /// The name in the other side's certificate.
    name: ServerName<'static>,
    tls: TlsConnector,
    /// Locked while it is dialled, so that all who come meanwhile use what was dialled.
    sender: Mutex<Option<SendRequest<Incoming>>>,
}

pub fn run(options: &Options, name: &str) -> Result<()> {
    let tls = tls::connector(&options.certs)?;
    let (peer, name) = (options.peer, ServerName::try_from(name.to_owned())?);
    let serve = async move |listener: TcpListener| {
        let (tls, name) = (tls.clone(), name.clone());
        let outbound = Rc::new(Outbound { peer, name, tls, sender: Mutex::new(None) });
        loop {
            let (client, _) = listener.accept().await?;
            client.set_nodelay(true)?;
            let outbound = Rc::clone(&outbound);
            tokio::task::spawn_local(async move {
                let forward = service_fn(move |request| Rc::clone(&outbound).forward(request));
                if let Err(error) =
                    http1::Builder::new().serve_connection(TokioIo::new(client), forward).await
                {
                    eprintln!("{error}");
                }
            });
        }
    };
    on_each_core(&serve, options.listen)
}

impl Outbound {
    async fn forward(self: Rc<Self>, mut request: Request<Incoming>) -> Result<Response<Incoming>> {
        let authority = request.headers_mut().remove(HOST).context("no host")?;
        let target = request.uri().path_and_query().context("no path")?.as_str();
        let uri = Uri::builder().scheme("http").authority(authority.as_bytes()).path_and_query(target);
        *request.uri_mut() = uri.build()?;
        request.headers_mut().remove(CONNECTION);
        *request.version_mut() = Version::HTTP_2;
        let mut response = self.sender().await?.send_request(request).await?;
        *response.version_mut() = Version::HTTP_11;
        Ok(response)
    }

    async fn sender(&self) -> Result<SendRequest<Incoming>> {
        let mut kept = self.sender.lock().await;
        if let Some(sender) = kept.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let stream = TcpStream::connect(self.peer).await?;
        stream.set_nodelay(true)?;
        let stream = self.tls.connect(self.name.clone(), stream).await?;
        let mut client = http2::Builder::new(Here);
        client.initial_stream_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
        let (sender, connection) = client.handshake(TokioIo::new(stream)).await?;
        tokio::task::spawn_local(async {
            if let Err(error) = connection.await {
                eprintln!("{error}");
            }
        });
        *kept = Some(sender.clone());
        Ok(sender)
    }
}
