//! Shutting down without losing anything: stop taking, finish what is open, within a deadline.
//!
//! Two steps. *Leaving*: clients are asked to come anew, each at a moment at which it loses nothing; by then somebody else
//! takes what is new, or will before long. *Draining*: there is no more time than the deadline, and what is idle is closed.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// One drain, for the whole agent or for one pod. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    leaving: CancellationToken,
    stopping: CancellationToken,
    open: TaskTracker,
}

impl Drain {
    /// A drain that starts by itself or with its parent, whichever comes first.
    #[must_use]
    pub fn child(&self) -> Self {
        let (leaving, stopping) = (self.leaving.child_token(), self.stopping.child_token());
        Self { leaving, stopping, open: TaskTracker::new() }
    }

    /// Resolves when clients are to go, at the latest when draining begins.
    pub async fn left(&self) {
        self.leaving.cancelled().await;
    }

    /// Whether clients are to go.
    pub fn is_leaving(&self) -> bool {
        self.leaving.is_cancelled()
    }

    /// Connections that are open go on until they end; those of HTTP are told to end when they have something to answer.
    pub fn leave(&self) {
        self.leaving.cancel();
    }

    /// Resolves when draining begins.
    pub async fn started(&self) {
        self.stopping.cancelled().await;
    }

    /// Whether draining has begun.
    pub fn is_started(&self) -> bool {
        self.stopping.is_cancelled()
    }

    /// Runs a connection as a task that [`Drain::finish`] waits for.
    pub fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        self.open.spawn(connection);
    }

    /// The same, on this runtime.
    pub fn spawn_on(&self, connection: impl Future<Output = ()> + Send + 'static, runtime: &Handle) {
        self.open.spawn_on(connection, runtime);
    }

    /// Begins draining.
    pub fn start(&self) {
        self.leave();
        self.stopping.cancel();
    }

    /// Waits until every connection has ended by itself.
    pub async fn finished(&self) {
        self.open.close();
        self.open.wait().await;
    }

    /// Begins draining and waits until every connection has ended; false when some were still open at the deadline.
    pub async fn finish(&self, deadline: Duration) -> bool {
        self.start();
        self.open.close();
        tokio::time::timeout(deadline, self.open.wait()).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waits_for_connections_up_to_the_deadline() {
        let drain = Drain::default();
        let child = drain.child();
        let ends_when_told = child.clone();
        child.spawn(async move { ends_when_told.started().await });
        drain.start();
        assert!(child.finish(Duration::from_secs(1)).await);

        let stuck = Drain::default();
        stuck.spawn(std::future::pending());
        assert!(!stuck.finish(Duration::from_secs(5)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn leaving_ends_no_connection() {
        let drain = Drain::default();
        let child = drain.child();
        let ends_when_told = child.clone();
        child.spawn(async move { ends_when_told.started().await });
        drain.leave();
        child.left().await;
        assert!(!child.is_started(), "leaving is not draining");
        let finished = tokio::time::timeout(Duration::from_secs(9), child.finished()).await;
        assert!(finished.is_err(), "the connection was ended");
        drain.start();
        child.finished().await;
    }
}
