//! The threads that carry connections: as many as there are cores, each with a runtime of its own.
//!
//! Promises: a connection, and whatever is opened for it, stays on the thread that it was given to, so that nothing of a
//! request wakes another thread or waits for a lock that another one holds; a new connection goes to the thread that has
//! fewest, among equals to the caller's own. Never runs what watches, enrols or reports: that has the main runtime, and
//! waits for nobody's traffic. Tested below, and by everything in the lab.

use std::{
    cell::Cell,
    io,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// What is kept for later use is kept for one thread: whoever runs on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shard(u16);

thread_local! {
    static CURRENT: Cell<Shard> = const { Cell::new(Shard::SHARED) };
}

impl Shard {
    /// Of all threads together, and of those that carry no connections.
    pub const SHARED: Self = Self(0);

    /// That of the thread which asks.
    pub fn current() -> Self {
        CURRENT.get()
    }
}

/// The threads, for whoever has a connection to be carried. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Workers {
    all: Arc<[Worker]>,
    /// Who accepts next.
    next: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Worker {
    shard: Shard,
    runtime: Handle,
    connections: Arc<AtomicUsize>,
}

/// A connection's place on a thread: to be held for as long as that carries it.
#[derive(Debug)]
pub struct Seat {
    runtime: Handle,
    connections: Arc<AtomicUsize>,
}

impl Seat {
    /// Where the connection is to run.
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Workers {
    /// A place on the thread that carries fewest connections; `None` without threads: on the runtime of whoever asks.
    pub fn seat(&self) -> Option<Seat> {
        let here = Shard::current();
        let load = |worker: &&Worker| (worker.connections.load(Ordering::Relaxed), worker.shard != here);
        let Worker { runtime, connections, .. } = self.all.iter().min_by_key(load)?;
        connections.fetch_add(1, Ordering::Relaxed);
        Some(Seat { runtime: runtime.clone(), connections: Arc::clone(connections) })
    }

    /// Runs what takes connections on one of them, each of which gets its share of those.
    pub fn spawn(&self, accepting: impl Future<Output = ()> + Send + 'static) {
        match self.all.get(self.next.fetch_add(1, Ordering::Relaxed) % self.all.len().max(1)) {
            Some(worker) => drop(worker.runtime.spawn(accepting)),
            None => drop(tokio::spawn(accepting)),
        }
    }
}

/// Ends the threads when it is dropped, with whatever they still carry.
#[derive(Debug)]
pub struct Threads {
    stop: CancellationToken,
    all: Vec<JoinHandle<()>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop.cancel();
        for thread in self.all.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// Starts so many threads.
///
/// # Errors
/// The system has no thread, or no `epoll`, left.
pub fn start(number: NonZeroUsize) -> io::Result<(Workers, Threads)> {
    let mut threads = Threads { stop: CancellationToken::new(), all: Vec::new() };
    let mut all = Vec::new();
    for n in 1..=u16::try_from(number.get()).unwrap_or(u16::MAX) {
        let shard = Shard(n);
        let runtime = Builder::new_current_thread().enable_all().build()?;
        all.push(Worker { shard, runtime: runtime.handle().clone(), connections: Arc::default() });
        let stop = threads.stop.clone();
        threads.all.push(thread::Builder::new().name(format!("connections-{n}")).spawn(move || {
            CURRENT.set(shard);
            runtime.block_on(stop.cancelled());
        })?);
    }
    Ok((Workers { all: all.into(), next: Arc::default() }, threads))
}

#[cfg(test)]
mod tests {
    use super::*;

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    fn two() -> io::Result<(Workers, Threads)> {
        start(NonZeroUsize::MIN.saturating_add(1))
    }

    #[test]
    fn connections_are_spread_evenly_and_give_their_places_back() -> TestResult {
        let (workers, _threads) = two()?;
        let seats: Vec<_> = (0..10).filter_map(|_| workers.seat()).collect();
        let open = || workers.all.iter().map(|w| w.connections.load(Ordering::Relaxed)).collect::<Vec<_>>();
        assert_eq!((seats.len(), open()), (10, vec![5, 5]));
        drop(seats);
        assert_eq!(open(), [0, 0]);
        Ok(())
    }

    #[test]
    fn what_a_connection_opens_stays_on_its_thread() -> TestResult {
        let (workers, _threads) = two()?;
        let runtime = Builder::new_current_thread().build()?;
        let (mut seats, mut shards) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            let seat = workers.seat().ok_or("no thread")?;
            let opened = async { (Shard::current(), tokio::spawn(async { Shard::current() }).await) };
            let (own, opened) = runtime.block_on(seat.runtime().spawn(opened))?;
            assert_eq!(own, opened?);
            seats.push(seat);
            shards.push(own);
        }
        shards.push(Shard::SHARED);
        shards.sort_unstable_by_key(|shard| shard.0);
        assert_eq!(shards, [Shard::SHARED, Shard(1), Shard(2)]);
        assert_eq!(Shard::current(), Shard::SHARED);
        Ok(())
    }

    #[test]
    fn with_the_threads_ends_what_they_carry() -> TestResult {
        let (workers, threads) = two()?;
        let seat = workers.seat().ok_or("no thread")?;
        let carried = Arc::new(());
        let held = Arc::clone(&carried);
        seat.runtime().spawn(async move {
            std::future::pending::<()>().await;
            drop(held);
        });
        drop(threads);
        assert_eq!(Arc::strong_count(&carried), 1);
        assert!(Workers::default().seat().is_none());
        Ok(())
    }
}
