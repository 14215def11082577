//! Whoever wants a stream gets one as soon as there is one, and no connection has more than it may have.

use std::{pin::Pin, task::Poll};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    task::JoinSet,
};

use super::*;
use crate::error::{Kind, Limit};

type TestResult = std::result::Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// Frames of a peer: no more streams than this at a time, and a goodbye that covers the first stream.
const fn settings(streams: u8) -> [u8; 15] {
    [0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, streams]
}
const GOODBYE: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];

/// A slot, and the far ends of the connections dialled for it.
#[derive(Default)]
struct Dialled {
    slot: Arc<Slot>,
    peers: Mutex<Vec<DuplexStream>>,
}

impl Dialled {
    /// So many places on connections to peers that let this many streams be open and answer none.
    async fn places(&self, count: usize, streams: u8) -> Result<Vec<Place>> {
        let mut places = Vec::new();
        for _ in 0..count {
            places.push(self.get(streams).await?.1);
        }
        Ok(places)
    }

    async fn get(&self, streams: u8) -> Result<Found> {
        self.get_under(Kept::FREELY, streams).await
    }

    async fn get_under(&self, kept: Kept<'_>, streams: u8) -> Result<Found> {
        self.slot.get(kept, || self.dial(streams)).await
    }

    async fn dial(&self, streams: u8) -> Result<(SendRequest<Bytes>, impl Future<Output = ()> + use<>)> {
        let failed = |error: &dyn std::error::Error| Error::new(Kind::ConnectFailure, error.to_string());
        let (near, mut far) = tokio::io::duplex(1 << 16);
        far.write_all(&settings(streams)).await.map_err(|error| failed(&error))?;
        let handshake = h2::client::handshake(near).await;
        let (sender, mut connection) = handshake.map_err(|error| failed(&error))?;
        lock(&self.peers).push(far);
        // Until its settings are known.
        poll_fn(|cx| {
            let _ = Pin::new(&mut connection).poll(cx);
            let known = sender.current_max_send_streams() == streams as usize;
            if known { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        let connection = async {
            let _ = connection.await;
        };
        Ok((sender, connection))
    }

    /// The places taken on each connection.
    fn taken(&self) -> Vec<usize> {
        lock(&self.slot.connections).open.iter().map(Open::streams).collect()
    }
}

async fn waits(future: Pin<&mut impl Future>) -> bool {
    let mut future = future;
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await
}

#[tokio::test]
async fn another_connection_is_made_when_all_streams_are_taken() -> TestResult {
    let dialled = Dialled::default();
    let _places = dialled.places(6, 2).await?;
    assert_eq!(dialled.taken(), [2, 2, 2]);
    Ok(())
}

#[tokio::test]
async fn where_all_are_full_the_first_place_that_is_freed_is_taken() -> TestResult {
    let dialled = Dialled::default();
    let mut places = dialled.places(MOST * 2, 2).await?;
    let (mut first, mut second) = (pin!(dialled.get(2)), pin!(dialled.get(2)));
    assert!(waits(first.as_mut()).await && waits(second.as_mut()).await);
    assert_eq!(dialled.taken(), [2; MOST], "who waits belongs to none");
    drop(places.remove(19));
    assert_eq!(dialled.taken()[9], 1);
    let _first = first.await?;
    assert_eq!(dialled.taken(), [2; MOST]);
    assert!(waits(second.as_mut()).await);
    drop(places.remove(7));
    let _second = second.await?;
    Ok(())
}

#[tokio::test]
async fn who_gives_up_when_told_leaves_it_to_the_next() -> TestResult {
    let dialled = Dialled::default();
    let mut places = dialled.places(MOST, 1).await?;
    let mut first = Box::pin(dialled.get(1));
    let mut second = pin!(dialled.get(1));
    assert!(waits(first.as_mut()).await && waits(second.as_mut()).await);
    drop(places.remove(9));
    drop(first);
    second.await?;
    Ok(())
}

#[tokio::test]
async fn where_the_connections_die_those_who_wait_get_a_new_one() -> TestResult {
    let dialled = Dialled::default();
    let _places = dialled.places(MOST, 1).await?;
    let mut waiting = pin!(async { tokio::join!(dialled.get(1), dialled.get(1)) });
    assert!(waits(waiting.as_mut()).await);
    lock(&dialled.peers).clear();
    let (first, second) = waiting.await;
    let _places = (first?, second?);
    assert_eq!(dialled.taken(), [1, 1]);
    Ok(())
}

#[tokio::test]
async fn what_a_peer_says_may_be_room() -> TestResult {
    let dialled = Dialled::default();
    let mut places = dialled.places(MOST, 1).await?;
    for (frame, taken) in [(&settings(2)[..], 2), (&GOODBYE, 1)] {
        let mut waiting = pin!(dialled.get(1));
        assert!(waits(waiting.as_mut()).await);
        let mut peer = lock(&dialled.peers).remove(3);
        peer.write_all(frame).await?;
        places.push(waiting.await?.1);
        lock(&dialled.peers).insert(3, peer);
        assert_eq!((dialled.taken().len(), dialled.taken()[3]), (MOST, taken));
    }
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn who_waited_for_a_dial_in_vain_is_told_with_it() -> TestResult {
    let dialled = Dialled::default();
    let begun = Instant::now();
    let mut waiting = JoinSet::new();
    for _ in 0..10 {
        let slot = Arc::clone(&dialled.slot);
        waiting.spawn(async move {
            let black_hole = async {
                tokio::time::sleep(Duration::from_secs(10)).await;
                Err::<(_, std::future::Ready<()>), _>(Error::new(Kind::ConnectFailure, "no answer"))
            };
            slot.get(Kept::FREELY, || black_hole).await.map(drop).map_err(|error| error.kind)
        });
    }
    for outcome in waiting.join_all().await {
        assert_eq!(outcome, Err(Kind::ConnectFailure));
    }
    assert_eq!(begun.elapsed().as_secs(), 10);
    // Who comes later dials again.
    assert!(dialled.get(1).await.is_ok());
    Ok(())
}

fn under(pool: &ConnectionPool) -> Kept<'_> {
    Kept { pool, ..Kept::FREELY }
}

#[tokio::test]
async fn a_rule_says_how_many_streams_a_connection_has() -> TestResult {
    let (dialled, usage) = (Dialled::default(), Arc::default());
    let pool = ConnectionPool {
        streams: Some(2),
        connections: Some(2),
        pending: Some(1),
        ..ConnectionPool::UNLIMITED
    };
    let kept = Kept { usage: Some(&usage), ..under(&pool) };
    let mut places = Vec::new();
    for _ in 0..4 {
        places.push(dialled.get_under(kept, 100).await?.1);
    }
    assert_eq!(dialled.taken(), [2, 2]);
    let mut waiting = pin!(dialled.get_under(kept, 100));
    assert!(waits(waiting.as_mut()).await, "there may be no third connection");
    let refused = dialled.get_under(kept, 100).await.map(drop).map_err(|error| error.kind);
    assert_eq!(refused, Err(Kind::Full(Limit::Pending)), "one may wait");
    places.pop();
    places.push(waiting.await?.1);
    assert_eq!(dialled.taken(), [2, 2]);
    // Who has waited does not count as waiting any more.
    let mut waiting = pin!(dialled.get_under(kept, 100));
    assert!(waits(waiting.as_mut()).await);
    Ok(())
}

#[tokio::test]
async fn a_rule_says_how_many_requests_a_connection_has() -> TestResult {
    let dialled = Dialled::default();
    let pool = ConnectionPool {
        requests_per_connection: Some(2),
        connections: Some(1),
        ..ConnectionPool::UNLIMITED
    };
    let (first, second) =
        (dialled.get_under(under(&pool), 100).await?.1, dialled.get_under(under(&pool), 100).await?.1);
    // It counts until its last request has ended, and ends with it.
    let mut waiting = pin!(dialled.get_under(under(&pool), 100));
    assert!(waits(waiting.as_mut()).await);
    drop(first);
    assert!(waits(waiting.as_mut()).await);
    drop(second);
    let _third = waiting.await?;
    let mut peer = lock(&dialled.peers).remove(0);
    let mut rest = Vec::new();
    peer.read_to_end(&mut rest).await?;
    assert_eq!(dialled.taken(), [1]);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_rule_says_how_long_a_connection_lasts() -> TestResult {
    let (lasts, idle) = (Duration::from_secs(30), Duration::from_secs(4));
    let pool = ConnectionPool {
        max_duration: Some(lasts),
        idle: crate::state::snapshot::Idle::After(idle),
        ..ConnectionPool::UNLIMITED
    };
    let (dialled, begun) = (Dialled::default(), Instant::now());
    drop(dialled.get_under(under(&pool), 100).await?);
    assert_eq!(dialled.slot.sweep(Instant::now()), Some(begun + idle));
    // Unused since its last stream has ended, however long that took.
    let place = dialled.get_under(under(&pool), 100).await?.1;
    tokio::time::sleep(Duration::from_secs(3)).await;
    drop(place);
    let after = dialled.slot.sweep(Instant::now());
    assert_eq!(after, Some(begun + Duration::from_secs(3) + idle));
    let place = dialled.get_under(under(&pool), 100).await?.1;
    tokio::time::sleep(lasts).await;
    assert_eq!(dialled.taken(), [1], "nobody has looked");
    // Too old for another stream; what it has goes on.
    let _other = dialled.get_under(under(&pool), 100).await?;
    assert_eq!((dialled.taken(), lock(&dialled.slot.connections).number()), (vec![1], 2));
    drop(place);
    assert_eq!(lock(&dialled.slot.connections).number(), 1);
    Ok(())
}
