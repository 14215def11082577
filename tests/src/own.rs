//! Servers of the test itself, in a pod's network.
//!
//! Promises that one listens when [`Pod::serve_own`] returns, and that it and its connections end when what is returned is
//! dropped. Tested by the tests that use it.

use anyhow::Result;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::Pod;

impl Pod {
    /// Listens on a port of the pod, and serves each connection by this. What goes wrong with one is for the test to see at
    /// its client.
    pub fn serve_own<F>(
        &self,
        port: u16,
        serve: impl Fn(TcpStream) -> F + Send + 'static,
    ) -> Result<JoinSet<()>>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = self.netns().inside(|| Ok(std::net::TcpListener::bind(("0.0.0.0", port))?))?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream));
            }
        });
        Ok(serving)
    }
}
