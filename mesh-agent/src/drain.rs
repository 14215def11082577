//! Shutting down without losing anything: stop taking, finish what is open, within a deadline.

use std::time::Duration;

use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// One drain, for the whole agent or for one pod. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    stopping: CancellationToken,
    open: TaskTracker,
}

impl Drain {
    /// A drain that starts by itself or with its parent, whichever comes first.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { stopping: self.stopping.child_token(), open: TaskTracker::new() }
    }

    /// Resolves when draining begins.
    pub async fn started(&self) {
        self.stopping.cancelled().await;
    }

    /// Cancelled when draining begins.
    pub fn token(&self) -> CancellationToken {
        self.stopping.clone()
    }

    /// Runs a connection as a task that [`Drain::finish`] waits for.
    pub fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        self.open.spawn(connection);
    }

    /// Begins draining.
    pub fn start(&self) {
        self.stopping.cancel();
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
}
