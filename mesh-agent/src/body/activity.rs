//! Whether anything moves on an exchange, and since when not.
//!
//! One of these belongs to an HTTP/1 connection (its exchanges follow one another) or to an HTTP/2 stream. Costs one
//! reading of the clock for each frame. Tested below with a paused clock.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// How long nothing may move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// On an exchange under way, in either direction; `None` is unlimited.
    pub idle: Option<Duration>,
    /// While the client does not take what is ready for it.
    pub flush: Duration,
}

/// What the exchanges of one connection have in common.
#[derive(Debug)]
pub struct Connection {
    begun: Instant,
    /// Milliseconds after `begun`.
    taken: AtomicU64,
    given_up: AtomicBool,
}

impl Default for Connection {
    fn default() -> Self {
        Self { begun: Instant::now(), taken: AtomicU64::new(0), given_up: AtomicBool::new(false) }
    }
}

impl Connection {
    /// The client has taken some of what has been ready for long: it is slow, and not stuck.
    pub fn taken(&self) {
        self.taken.store(self.begun.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn last_taken(&self) -> Instant {
        self.begun + Duration::from_millis(self.taken.load(Ordering::Relaxed))
    }

    /// Gives all of them up: whoever reports the end of one will say why.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }
}

/// When something last moved.
#[derive(Debug)]
pub struct Activity {
    connection: Arc<Connection>,
    begun: Instant,
    /// Milliseconds after `begun`.
    last: AtomicU64,
    /// A frame was handed over and the next one not asked for: the client's side is busy with it.
    handed_over: AtomicBool,
    /// Exchanges under way.
    open: AtomicU32,
    stalled: AtomicBool,
    /// Waits of our own that are under way.
    own: AtomicU32,
}

/// Completes once what has gone on since then, if anything, has done so for this long.
pub async fn lasted(since: impl Fn() -> Option<Instant>, limit: Duration) {
    loop {
        let now = Instant::now();
        match since() {
            Some(since) if since + limit <= now => return,
            since => tokio::time::sleep_until(since.unwrap_or(now) + limit).await,
        }
    }
}

/// While it lives we wait for ourselves, and that nothing moves is nobody's fault.
#[derive(Debug)]
#[must_use]
pub struct OwnWait(Arc<Activity>);

impl Drop for OwnWait {
    fn drop(&mut self) {
        self.0.touch();
        self.0.own.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Activity {
    /// That of an exchange, or of one after the other, on this connection.
    pub fn on(connection: Arc<Connection>) -> Self {
        Self {
            connection,
            begun: Instant::now(),
            last: AtomicU64::new(0),
            handed_over: AtomicBool::new(false),
            open: AtomicU32::new(0),
            stalled: AtomicBool::new(false),
            own: AtomicU32::new(0),
        }
    }

    /// Something moved.
    pub fn touch(&self) {
        self.last.store(self.begun.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// A frame for the client was asked for: it has taken the one before.
    pub fn asked(&self) {
        self.handed_over.store(false, Ordering::Relaxed);
    }

    /// A frame for the client was handed over.
    pub fn handed_over(&self) {
        self.handed_over.store(true, Ordering::Relaxed);
        self.touch();
    }

    /// An exchange begins.
    pub fn begin(&self) {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.handed_over.store(false, Ordering::Relaxed);
        self.touch();
    }

    /// An exchange has ended.
    pub fn end(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        self.handed_over.store(false, Ordering::Relaxed);
        self.touch();
    }

    /// The mesh makes the exchange wait: a delay that is injected, the pause before another try.
    pub fn own_wait(self: &Arc<Self>) -> OwnWait {
        self.own.fetch_add(1, Ordering::Relaxed);
        OwnWait(Arc::clone(self))
    }

    /// Whether an exchange is under way.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed) > 0
    }

    /// When something last moved.
    pub fn last(&self) -> Instant {
        self.begun + Duration::from_millis(self.last.load(Ordering::Relaxed))
    }

    /// Whether it was given up because nothing moved, alone or with its connection.
    pub fn has_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed) || self.connection.given_up.load(Ordering::Acquire)
    }

    /// Gives it up: whoever reports its end will say why.
    pub fn give_up(&self) {
        self.stalled.store(true, Ordering::Relaxed);
    }

    /// Until when the exchange under way may go on without anything moving; `None` is unlimited.
    pub fn deadline(&self, stall: Stall) -> Option<Instant> {
        if self.own.load(Ordering::Relaxed) > 0 {
            return None;
        }
        if !self.handed_over.load(Ordering::Relaxed) {
            return stall.idle.map(|idle| self.last() + idle);
        }
        // A slow client is known by its connection, which cannot tell whose bytes it takes.
        let last = self.last().max(self.connection.last_taken());
        Some(last + stall.idle.map_or(stall.flush, |idle| idle.min(stall.flush)))
    }

    /// Completes when nothing has moved for too long, and marks it as given up.
    pub async fn stalled(&self, stall: Stall) {
        loop {
            let now = Instant::now();
            // Without a limit now there may be one later: the client may stop taking.
            let deadline = self.deadline(stall).unwrap_or(now + stall.flush);
            tokio::time::sleep_until(deadline).await;
            if self.deadline(stall).is_some_and(|deadline| deadline <= Instant::now()) {
                self.give_up();
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Stall = Stall { idle: None, flush: Duration::from_secs(10) };

    #[tokio::test(start_paused = true)]
    async fn silence_is_limited_only_where_a_limit_is_set() {
        let activity = Activity::on(Arc::default());
        let silent = tokio::time::timeout(Duration::from_hours(1), activity.stalled(STALL));
        assert!(silent.await.is_err());
        assert!(!activity.has_stalled());
        let idle = Stall { idle: Some(Duration::from_mins(1)), ..STALL };
        activity.touch();
        let begun = Instant::now();
        activity.stalled(idle).await;
        assert_eq!(begun.elapsed().as_secs(), 60);
        assert!(activity.has_stalled());
    }

    #[tokio::test(start_paused = true)]
    async fn our_own_waits_do_not_count() {
        let activity = Arc::new(Activity::on(Arc::default()));
        let idle = Stall { idle: Some(Duration::from_mins(1)), ..STALL };
        let own = activity.own_wait();
        assert_eq!(activity.deadline(idle), None);
        tokio::time::advance(Duration::from_mins(5)).await;
        drop(own);
        assert_eq!(activity.deadline(idle), Some(activity.last() + Duration::from_mins(1)));
        assert!(activity.last() >= Instant::now() - Duration::from_millis(1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_its_connection_takes_counts_while_the_client_has_to_take() {
        let connection = Arc::<Connection>::default();
        let activity = Activity::on(Arc::clone(&connection));
        let idle = Stall { idle: Some(Duration::from_mins(1)), ..STALL };
        let silent = activity.deadline(idle);
        tokio::time::advance(Duration::from_secs(5)).await;
        connection.taken();
        // It waits for the endpoint.
        assert_eq!(activity.deadline(idle), silent);
        activity.handed_over();
        tokio::time::advance(Duration::from_secs(9)).await;
        connection.taken();
        assert_eq!(activity.deadline(idle), Some(Instant::now() + STALL.flush));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_given_up() {
        let activity = Activity::on(Arc::default());
        activity.handed_over();
        let moving = async {
            for _ in 0..5 {
                tokio::time::sleep(Duration::from_secs(9)).await;
                activity.asked();
                activity.handed_over();
            }
            std::future::pending::<()>().await;
        };
        let begun = Instant::now();
        tokio::select! {
            () = activity.stalled(STALL) => {}
            () = moving => {}
        }
        assert_eq!(begun.elapsed().as_secs(), 55);
    }
}
