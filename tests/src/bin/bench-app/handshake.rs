//! Full handshakes of mutual TLS 1.3, one after the other on each worker: no session is kept. The other end is believed,
//! whoever it is; whether it believes this one is what its answer says.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use lab::bench::Connected;
use tokio::{io::AsyncReadExt as _, io::AsyncWriteExt as _, net::TcpStream, task::JoinSet};
use tokio_rustls::TlsConnector;

use crate::pair;

#[derive(Debug, Clone, Args)]
pub struct Options {
    /// The server
    server: SocketAddr,
    /// Directory with `cert.pem` and `key.pem`
    #[arg(long)]
    certs: std::path::PathBuf,
    /// What to say is spoken: `h2`, `mesh-h2`, `http/1.1`
    #[arg(long)]
    alpn: String,
    /// Handshakes at a time
    #[arg(long, default_value_t = 1)]
    workers: u16,
    /// For how long
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
}

pub fn run(options: &Options) -> Result<Connected> {
    let connector = pair::believer(&options.certs, options.alpn.as_bytes())?;
    crate::runtime()?.block_on(async {
        let (started, mut workers, mut connections) = (Instant::now(), JoinSet::new(), 0);
        let until = started + Duration::from_secs_f64(options.seconds);
        for _ in 0..options.workers {
            workers.spawn(work(options.clone(), connector.clone(), until));
        }
        while let Some(worker) = workers.join_next().await {
            connections += worker??;
        }
        Ok(Connected { connections, seconds: started.elapsed().as_secs_f64() })
    })
}

async fn work(options: Options, connector: Arc<rustls::ClientConfig>, until: Instant) -> Result<u64> {
    let mut done = 0;
    while Instant::now() < until {
        once(&options, Arc::clone(&connector)).await.with_context(|| format!("handshake {done}"))?;
        done += 1;
    }
    Ok(done)
}

/// With TLS 1.3 the client is done before it knows whether it is believed: it waits for the first word of the server.
async fn once(options: &Options, connector: Arc<rustls::ClientConfig>) -> Result<()> {
    let stream = TcpStream::connect(options.server).await?;
    stream.set_nodelay(true)?;
    let name = rustls::pki_types::ServerName::from(options.server.ip());
    let mut stream = TlsConnector::from(connector).connect(name, stream).await?;
    if options.alpn == "http/1.1" {
        stream.write_all(b"GET /nothing HTTP/1.1\r\nHost: server\r\nConnection: close\r\n\r\n").await?;
    } else {
        // The preface of HTTP/2 and settings of no change.
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await?;
    }
    let mut first = [0; 9];
    let read = stream.read(&mut first).await.context("the server does not believe this client")?;
    ensure!(read > 0, "the server has hung up");
    Ok(())
}
