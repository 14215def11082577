//! Requests that come and go on a paused clock, to replicas of which one is slow, has stopped answering, or refuses.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{cmp::Reverse, collections::BinaryHeap, net::SocketAddr, time::Duration};

use tokio::time::{Instant, advance};

use super::{Chosen, Wish, choose, tests::cluster};
use crate::state::snapshot::{Balancing, Cluster};

const REPLICAS: u8 = 10;
const REQUESTS: usize = 10_000;
/// On average, a thousand a second.
const BETWEEN: Duration = Duration::from_millis(1);
/// Clients wait no longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the replica with index 0 does.
#[derive(Debug, Clone, Copy)]
enum First {
    AsTheOthers,
    Takes(Duration),
    Stalls,
    /// Refuses, a millisecond after it was asked.
    Fails,
}

struct Seen {
    /// Requests that the first replica got.
    first: usize,
    /// How long each request took, the longest last.
    took: Vec<Duration>,
}

impl Seen {
    fn share_of_first(&self) -> f64 {
        self.first as f64 / self.took.len() as f64
    }

    fn p99(&self) -> Duration {
        self.took[self.took.len() * 99 / 100]
    }
}

/// What becomes of a request in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Answered,
    Failed,
    GivenUp,
}

/// Half as long to one and a half times as long as this.
fn around(time: Duration) -> Duration {
    time.mul_f64(0.5 + fastrand::f64())
}

async fn run(balancing: Balancing, first: First) -> Seen {
    run_at(balancing, first, Duration::from_millis(10)).await
}

/// `healthy`: how long the others take on average.
async fn run_at(balancing: Balancing, first: First, healthy: Duration) -> Seen {
    fastrand::seed(17);
    let cluster = cluster(balancing, REPLICAS);
    let first_address = cluster.endpoints[0].address;
    let begin = Instant::now();
    let mut seen = Seen { first: 0, took: Vec::with_capacity(REQUESTS) };
    let mut open = Open { ends: BinaryHeap::new(), chosen: Vec::with_capacity(REQUESTS) };
    let mut next = begin;
    for _ in 0..REQUESTS {
        next += BETWEEN.mul_f64(-(1.0 - fastrand::f64()).ln());
        open.until(next).await;
        let (address, takes) = open.ask(&cluster, |address| match first {
            First::Takes(time) if address == first_address => (time, End::Answered),
            First::Stalls if address == first_address => (PATIENCE, End::GivenUp),
            First::Fails if address == first_address => (Duration::from_millis(1), End::Failed),
            _ => (around(healthy), End::Answered),
        });
        seen.first += usize::from(address == first_address);
        seen.took.push(takes);
    }
    seen.took.sort_unstable();
    seen
}

/// Requests under way.
struct Open {
    /// When and how each ends, and its number.
    ends: BinaryHeap<Reverse<(Instant, End, usize)>>,
    chosen: Vec<Option<Chosen>>,
}

impl Open {
    async fn until(&mut self, then: Instant) {
        while let Some(Reverse((end, how, number))) = self.ends.peek().copied() {
            if end > then {
                break;
            }
            self.ends.pop();
            advance(end.saturating_duration_since(Instant::now())).await;
            let mut chosen = self.chosen[number].take().unwrap();
            match how {
                End::Answered => chosen.answered(),
                End::Failed => chosen.failed(),
                End::GivenUp => {}
            }
        }
        advance(then.saturating_duration_since(Instant::now())).await;
    }

    fn ask(
        &mut self,
        cluster: &Cluster,
        fate: impl Fn(SocketAddr) -> (Duration, End),
    ) -> (SocketAddr, Duration) {
        let chosen = choose(cluster, &Wish::default()).unwrap();
        let address = chosen.endpoint.address;
        let (takes, how) = fate(address);
        self.ends.push(Reverse((Instant::now() + takes, how, self.chosen.len())));
        self.chosen.push(Some(chosen));
        (address, takes)
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_replica_among_ten_gets_under_three_percent() {
    let slow = First::Takes(Duration::from_secs(1));
    for balancing in [Balancing::LeastRequest, Balancing::PeakEwma] {
        let seen = run(balancing, slow).await;
        assert!(seen.share_of_first() < 0.03, "{balancing:?}: {}", seen.share_of_first());
        assert!(seen.first > 0, "{balancing:?}: it would never be known to be well again");
    }
    // Whoever does not look gives it its tenth.
    assert!(run(Balancing::Random, slow).await.share_of_first() > 0.08);
}

/// Ten times as slow, and too quick for its requests to pile up: latency tells, what is in flight hardly does.
#[tokio::test(start_paused = true)]
async fn latency_tells_what_is_in_flight_does_not() {
    let slow = First::Takes(Duration::from_millis(100));
    let by_latency = run(Balancing::PeakEwma, slow).await.share_of_first();
    let by_requests = run(Balancing::LeastRequest, slow).await.share_of_first();
    assert!(by_latency < 0.01 && by_latency * 2.0 < by_requests, "{by_latency} and {by_requests}");
}

#[tokio::test(start_paused = true)]
async fn one_that_stalls_does_not_double_the_slowest_hundredth() {
    for balancing in [Balancing::LeastRequest, Balancing::PeakEwma] {
        let healthy = run(balancing, First::AsTheOthers).await.p99();
        let stalled = run(balancing, First::Stalls).await.p99();
        assert!(stalled <= healthy * 2, "{balancing:?}: {stalled:?}, when all are well {healthy:?}");
    }
    assert_eq!(
        run(Balancing::RoundRobin, First::Stalls).await.p99(),
        PATIENCE,
        "whoever does not look waits"
    );
}

/// The fastest answer of all is a refusal.
#[tokio::test(start_paused = true)]
async fn one_that_refuses_at_once_attracts_nothing() {
    // Where all take long, failing is worse than that still.
    for (healthy, most) in [(10, 0.01), (2_000, 0.03)] {
        let healthy = Duration::from_millis(healthy);
        let share = run_at(Balancing::PeakEwma, First::Fails, healthy).await.share_of_first();
        assert!(share < most, "{share}, where the others take {healthy:?}");
        assert!(share > 0.0, "it would never be known to be well again");
    }
    // Whoever looks at what is in flight alone sends it most of all.
    assert!(run(Balancing::LeastRequest, First::Fails).await.share_of_first() > 0.1);
}

#[tokio::test(start_paused = true)]
async fn equal_replicas_are_equal_by_latency() {
    let share = run(Balancing::PeakEwma, First::AsTheOthers).await.share_of_first();
    assert!((0.05..0.15).contains(&share), "{share}");
}
