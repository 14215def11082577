//! The least that a pair of proxies has to do, as a floor: HTTP/1.1 in, HTTP/2 over mutual TLS 1.3 between the two,
//! HTTP/1.1 out. From hyper and rustls as the agent is, with no routing, no policy, no metrics, no log, no retries.
//!
//! One thread for each core, with a runtime, a listener (`SO_REUSEPORT`) and connections of its own, so that nothing is
//! shared between threads.

mod inbound;
mod outbound;
mod tls;

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::mpsc::{self, Sender},
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use hyper::rt::Executor;
use socket2::{Domain, Socket, Type};
use tokio::{net::TcpListener, task::LocalSet};

pub use self::{inbound::run as inbound, outbound::run as outbound, tls::believer};

const BACKLOG: i32 = 4096;
/// As the agents have it between each other, so that no window is what limits it.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Where to listen
    #[arg(long)]
    listen: SocketAddr,
    /// Whom to dial: the other of the pair, or the app
    #[arg(long)]
    peer: SocketAddr,
    /// Directory with `ca.pem`, `cert.pem` and `key.pem`
    #[arg(long)]
    certs: PathBuf,
}

/// Runs what a thread does on each core; returns when one of them has failed.
fn on_each_core(
    serve: &(impl AsyncFn(TcpListener) -> Result<()> + Clone + Send + 'static),
    at: SocketAddr,
) -> Result<()> {
    let (failed, failures) = mpsc::channel();
    for _ in 0..thread::available_parallelism()?.get() {
        let (serve, failed): (_, Sender<anyhow::Error>) = (serve.clone(), failed.clone());
        let listener = listen(at)?;
        thread::spawn(move || {
            let ended = on_this_thread(&serve, listener);
            let _ = failed.send(ended.err().unwrap_or_else(|| anyhow!("it ended")));
        });
    }
    crate::announce();
    Err(failures.recv().context("every thread has panicked")?)
}

fn on_this_thread(
    serve: &impl AsyncFn(TcpListener) -> Result<()>,
    listener: std::net::TcpListener,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async { serve(TcpListener::from_std(listener)?).await })
}

fn listen(at: SocketAddr) -> Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&at.into()).with_context(|| format!("listening on {at}"))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// hyper's tasks stay on the thread of their connection.
#[derive(Debug, Clone, Copy)]
struct Here;

impl<F: Future<Output: 'static> + 'static> Executor<F> for Here {
    fn execute(&self, task: F) {
        tokio::task::spawn_local(task);
    }
}
