//! Limits hold exactly, whoever asks at the same instant and whoever gives up.

use std::{
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use tokio::task::JoinSet;

use super::*;

fn most(connections: u32, pending: u32) -> ConnectionPool {
    ConnectionPool { connections: Some(connections), pending: Some(pending), ..ConnectionPool::UNLIMITED }
}

fn polled<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

fn kind<T>(result: Result<T>) -> Option<Kind> {
    result.err().map(|error| error.kind)
}

/// How many are at it, and how many were at most.
#[derive(Default)]
struct Peak {
    now: AtomicU32,
    highest: AtomicU32,
}

impl Peak {
    async fn hold(&self) {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.highest.fetch_max(now, Ordering::SeqCst);
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        self.now.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_at_once_so_many_are_under_way_and_all_who_may_wait_have_their_turn() {
    let (usage, peak) = (Arc::<Usage>::default(), Arc::<Peak>::default());
    let mut all = JoinSet::new();
    for _ in 0..500 {
        let (usage, peak) = (Arc::clone(&usage), Arc::clone(&peak));
        all.spawn(async move {
            let place = usage.request(&most(7, 1000), Protocol::Http1).await;
            peak.hold().await;
            place.is_ok()
        });
    }
    assert!(all.join_all().await.into_iter().all(|served| served));
    assert_eq!(peak.highest.load(Ordering::SeqCst), 7, "exactly as many as there may be");
    let left = lock(&usage.connections);
    assert_eq!((left.used, left.waiting.len(), usage.pending.load(Ordering::SeqCst)), (0, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn requests_and_retries_are_counted_exactly() {
    let usage = Arc::<Usage>::default();
    let barrier = Arc::new(tokio::sync::Barrier::new(100));
    let mut all = JoinSet::new();
    for _ in 0..100 {
        let (usage, barrier) = (Arc::clone(&usage), Arc::clone(&barrier));
        all.spawn(async move {
            let most = ConnectionPool { requests: Some(10), ..ConnectionPool::UNLIMITED };
            barrier.wait().await;
            let got = (usage.request(&most, Protocol::Http2).await, usage.retry(3));
            // Nobody lets go before all have asked.
            barrier.wait().await;
            (kind(got.0), got.1.is_some())
        });
    }
    let got = all.join_all().await;
    let refused = |kind| got.iter().filter(|got| got.0 == kind).count();
    assert_eq!((refused(None), refused(Some(Kind::Full(Limit::Requests)))), (10, 90));
    assert_eq!(got.iter().filter(|got| got.1).count(), 3);
    assert!(usage.retry(1).is_some(), "all have let go");
}

#[tokio::test]
async fn who_waited_longest_is_next_and_nobody_passes() {
    let (usage, most) = (Arc::<Usage>::default(), most(1, 2));
    let first = usage.request(&most, Protocol::Http1).await.unwrap();
    let mut second = pin!(usage.request(&most, Protocol::Http1));
    let mut third = pin!(usage.request(&most, Protocol::Http1));
    assert!(polled(second.as_mut()).is_pending() && polled(third.as_mut()).is_pending());
    assert_eq!(
        kind(usage.request(&most, Protocol::Http1).await),
        Some(Kind::Full(Limit::Pending)),
        "two may wait"
    );
    assert_eq!(kind(usage.stream(&most)), Some(Kind::Full(Limit::Connections)), "bytes never wait");
    drop(first);
    assert_eq!(kind(usage.stream(&most)), Some(Kind::Full(Limit::Connections)), "it is the second's");
    assert!(polled(third.as_mut()).is_pending());
    let second = second.await.unwrap();
    let mut fourth = pin!(usage.request(&most, Protocol::Http1));
    assert!(polled(fourth.as_mut()).is_pending(), "the second does not wait any more");
    drop(second);
    assert!(polled(fourth.as_mut()).is_pending());
    drop(third.await.unwrap());
    fourth.await.unwrap();
}

#[tokio::test]
async fn who_gives_up_takes_nothing_along() {
    let (usage, most) = (Arc::<Usage>::default(), most(1, 1));
    let place = usage.request(&most, Protocol::Http1).await.unwrap();
    let mut waiting = Box::pin(usage.request(&most, Protocol::Http1));
    assert!(polled(waiting.as_mut()).is_pending());
    // While it waits.
    drop(waiting);
    let mut next = Box::pin(usage.request(&most, Protocol::Http1));
    assert!(polled(next.as_mut()).is_pending());
    // In the instant in which it is its turn.
    drop(place);
    drop(next);
    assert!(usage.stream(&most).unwrap().is_some());
}

#[tokio::test]
async fn another_limit_holds_from_the_next_on() {
    let usage = Arc::<Usage>::default();
    let first = usage.request(&most(2, 5), Protocol::Http1).await.unwrap();
    let second = usage.request(&most(2, 5), Protocol::Http1).await.unwrap();
    let lower = most(1, 5);
    let mut waiting = pin!(usage.request(&lower, Protocol::Http1));
    assert!(polled(waiting.as_mut()).is_pending());
    drop(first);
    assert!(polled(waiting.as_mut()).is_pending(), "one is still under way, and one is all there may be");
    // Where more may be, who waits goes first.
    let third = usage.request(&most(3, 5), Protocol::Http1).await.unwrap();
    assert_eq!(lock(&usage.connections).used, 3);
    drop((second, third, waiting.await.unwrap()));
    assert_eq!(lock(&usage.connections).used, 0);
}

#[tokio::test]
async fn http2_has_no_connection_of_its_own_to_wait_for() {
    let (usage, most) = (Arc::<Usage>::default(), most(1, 1));
    let places = [
        usage.request(&most, Protocol::Http2).await.unwrap(),
        usage.request(&most, Protocol::Http2).await.unwrap(),
    ];
    assert_eq!(lock(&usage.connections).used, 0);
    drop(places);
    // Unless the rule says how many requests a connection has.
    let most = ConnectionPool { streams: Some(2), ..self::most(2, 1) };
    let mut places = Vec::new();
    for _ in 0..4 {
        places.push(usage.request(&most, Protocol::Http2).await.unwrap());
    }
    let mut waiting = pin!(usage.request(&most, Protocol::Http2));
    assert!(polled(waiting.as_mut()).is_pending());
    assert_eq!(kind(usage.request(&most, Protocol::Http2).await), Some(Kind::Full(Limit::Pending)));
    // Those over HTTP/1 have connections of their own, and wait with the others.
    let over_http1 = usage.request(&most, Protocol::Http1).await.unwrap();
    drop(places.pop());
    waiting.await.unwrap();
    drop(over_http1);
}

#[test]
fn each_cluster_has_its_own_and_those_of_gone_clusters_go() {
    let (usages, most) = (Usages::default(), most(1, 1));
    let [one, other, third] = std::array::from_fn(|_| Arc::<ClusterState>::default());
    assert!(usages.of(&ConnectionPool::UNLIMITED, &one).is_none(), "nothing is limited");
    let of = |cluster: &Arc<ClusterState>| usages.of(&most, cluster).unwrap();
    let (a, again, b) = (of(&one), of(&one), of(&other));
    assert!(Arc::ptr_eq(&a, &again) && !Arc::ptr_eq(&a, &b));
    drop(one);
    of(&third);
    let known = usages.by_cluster.load();
    assert_eq!(known.len(), 2);
    assert!(known.contains_key(&other.id) && known.contains_key(&third.id));
}
