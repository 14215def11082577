//! Connections that do nothing: each is used once, and then held until this program is ended.

use std::{net::SocketAddr, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Semaphore,
    task::JoinSet,
};

use crate::http::Connection;

/// How many are made at a time.
const AT_ONCE: usize = 64;

#[derive(Debug, Args)]
pub struct Options {
    /// The server
    server: SocketAddr,
    /// The value of Host
    #[arg(long, default_value = "server")]
    host: String,
    /// How many
    #[arg(long)]
    connections: usize,
    /// A byte there and back in place of a request
    #[arg(long)]
    bytes: bool,
}

/// What is held open.
enum Held {
    Http(#[expect(dead_code, reason = "it is held, not used")] Connection),
    Bytes(#[expect(dead_code, reason = "it is held, not used")] TcpStream),
}

pub fn run(options: &Options) -> Result<()> {
    crate::allow_many_descriptors()?;
    crate::runtime()?.block_on(async {
        let (mut opening, mut held, turns) = (JoinSet::new(), Vec::new(), Arc::new(Semaphore::new(AT_ONCE)));
        for _ in 0..options.connections {
            let turn = Arc::clone(&turns).acquire_owned().await?;
            let (server, host, bytes) = (options.server, options.host.clone(), options.bytes);
            opening.spawn(async move {
                let opened = open(server, &host, bytes).await;
                drop(turn);
                opened
            });
        }
        while let Some(opened) = opening.join_next().await {
            held.push(opened??);
        }
        ensure!(held.len() == options.connections, "{} connections", held.len());
        crate::announce();
        std::future::pending().await
    })
}

async fn open(server: SocketAddr, host: &str, bytes: bool) -> Result<Held> {
    if !bytes {
        let mut connection = Connection::open(server, host).await?;
        connection.ask().await?;
        connection.rest();
        return Ok(Held::Http(connection));
    }
    let mut stream = TcpStream::connect(server).await.with_context(|| format!("connecting to {server}"))?;
    stream.write_all(&[0]).await?;
    stream.read_exact(&mut [0]).await?;
    Ok(Held::Bytes(stream))
}
