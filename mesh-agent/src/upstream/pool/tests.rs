//! Connections are kept as the rule says under which they were used last.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, DuplexStream},
    task::JoinSet,
};

use super::*;
use crate::{
    state::snapshot::{ConnectionPool, Idle as Waits, Pings},
    upstream::Usage,
};

type TestResult = std::result::Result<(), Box<dyn std::error::Error + Send + Sync>>;

fn key(port: u16, cluster: ClusterId) -> Key {
    let to = SocketAddr::from(([10, 0, 0, 1], port));
    Key { to, client: None, cluster: Some(cluster), tls: None, introduces: None, shard: Shard::SHARED }
}

/// A connection that has had so many requests, and its far end.
async fn connection(pool: &ConnectionPool, served: u32) -> Result<(Connection, DuplexStream)> {
    let (near, far) = tokio::io::duplex(1 << 10);
    let sender = connect_http1(TokioIo::new(near), SocketAddr::from(([10, 0, 0, 1], 80)), None).await?;
    Ok((Connection { sender, made: Instant::now(), served, terms: Terms::of(pool) }, far))
}

/// How long it is until the far end sees the end of its connection.
async fn closed_after(far: &mut DuplexStream) -> std::io::Result<Duration> {
    let begun = Instant::now();
    far.read_to_end(&mut Vec::new()).await?;
    Ok(begun.elapsed())
}

fn about(limit: Duration) -> std::ops::Range<Duration> {
    limit..limit + Duration::from_millis(5)
}

#[tokio::test(start_paused = true)]
async fn a_connection_waits_for_its_next_request_as_long_as_the_rule_says() -> TestResult {
    let (pool, key) = (Arc::<Pool>::default(), key(80, ClusterId::default()));
    // The last is put while somebody sleeps because of those before.
    let (second, minute) = (Duration::from_secs(1), Duration::from_mins(1));
    let table = [
        (Waits::After(Duration::from_mins(10)), None, Duration::from_mins(10)),
        (Waits::Default, None, Duration::from_secs(50)),
        (Waits::Never, Some(minute), minute),
        (Waits::After(second), Some(minute), second),
    ];
    let mut closing = JoinSet::new();
    for (idle, max_duration, expected) in table {
        let (connection, mut far) =
            connection(&ConnectionPool { max_duration, idle, ..ConnectionPool::UNLIMITED }, 1).await?;
        pool.put(key, connection);
        closing.spawn(async move { closed_after(&mut far).await.map(|after| (expected, after)) });
    }
    for closed in closing.join_all().await {
        let (expected, after) = closed?;
        assert!(about(expected).contains(&after), "{after:?} for {expected:?}");
    }
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_waits_for_good_is_there_for_the_next_request() -> TestResult {
    let (pool, key) = (Arc::<Pool>::default(), key(80, ClusterId::default()));
    let rule = ConnectionPool { idle: Waits::Never, ..ConnectionPool::UNLIMITED };
    let (connection, _far) = connection(&rule, 1).await?;
    pool.put(key, connection);
    tokio::time::sleep(Duration::from_hours(100)).await;
    let kept = pool.take(&key, Terms::of(&rule)).ok_or("it is gone")?;
    pool.put(key, kept);
    // Another rule holds at once, and under it it has waited for too long.
    tokio::time::sleep(Duration::from_secs(51)).await;
    assert!(pool.take(&key, Terms::of(&ConnectionPool::UNLIMITED)).is_none());
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_has_had_its_requests_is_closed() -> TestResult {
    let (pool, key) = (Arc::<Pool>::default(), key(80, ClusterId::default()));
    let rule = ConnectionPool { requests_per_connection: Some(3), ..ConnectionPool::UNLIMITED };
    let (connection, mut far) = connection(&rule, 2).await?;
    Lease { h1: Some((Arc::clone(&pool), key, connection)) }.finished();
    // It may have one more, once it has seen to its end.
    let mut last = loop {
        match pool.take(&key, Terms::of(&rule)) {
            Some(connection) => break connection,
            None => tokio::task::yield_now().await,
        }
    };
    last.served += 1;
    Lease { h1: Some((Arc::clone(&pool), key, last)) }.finished();
    assert_eq!(closed_after(&mut far).await?, Duration::ZERO);
    assert!(pool.take(&key, Terms::of(&rule)).is_none());
    Ok(())
}

#[tokio::test]
async fn there_is_room_for_the_next_where_others_wait() -> TestResult {
    let (pool, cluster) = (Arc::<Pool>::default(), ClusterId::default());
    let rule = ConnectionPool { connections: Some(3), ..ConnectionPool::UNLIMITED };
    let mut far_ends = Vec::new();
    for port in [1, 1, 2] {
        let (connection, far) = connection(&rule, 1).await?;
        pool.put(key(port, cluster), connection);
        far_ends.push(far);
    }
    // Of another cluster: none of its business.
    let (other, other_far) = connection(&rule, 1).await?;
    let elsewhere = key(1, ClusterId::default());
    pool.put(elsewhere, other);
    let usage = Arc::<Usage>::default();
    let _first = usage.stream(&rule)?;
    pool.make_room(Kept { pool: &rule, cluster: Some(cluster), usage: Some(&usage), ..Kept::FREELY });
    let waiting = |port| lock(&pool.idle).get(&key(port, cluster)).map_or(0, Vec::len);
    assert_eq!((waiting(1), waiting(2)), (1, 1), "the oldest is gone, and two wait beside the one to come");
    let _second = usage.stream(&rule)?;
    let _third = usage.stream(&rule)?;
    pool.make_room(Kept { pool: &rule, cluster: Some(cluster), usage: Some(&usage), ..Kept::FREELY });
    assert_eq!((waiting(1), waiting(2)), (0, 0));
    assert_eq!(lock(&pool.idle).get(&elsewhere).map_or(0, Vec::len), 1);
    drop((far_ends, other_far));
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_answers_no_ping_is_left_in_time() -> TestResult {
    let (near, far) = tokio::io::duplex(1 << 16);
    let seconds = Duration::from_secs;
    let peer = tokio::spawn(async move {
        let mut server = h2::server::handshake(far).await?;
        // Answers what comes within 25 seconds, two PINGs among it; after that it is there, and no more.
        let asked = tokio::time::timeout(seconds(25), server.accept()).await.is_ok();
        Ok::<_, h2::Error>((server, asked))
    });
    let pings = Pings { interval: seconds(10), timeout: seconds(3) };
    let to = SocketAddr::from(([10, 0, 0, 1], 80));
    let (sender, connection) = connect_http2(near, to, None, Some(pings)).await?;
    let begun = Instant::now();
    connection.await;
    assert!(about(seconds(33)).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert!(http2::is_closed(&sender));
    assert!(!peer.await??.1, "it was asked for nothing else");
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn without_pings_nobody_is_asked() -> TestResult {
    let (near, far) = tokio::io::duplex(1 << 16);
    let peer = tokio::spawn(async move { h2::server::handshake(far).await });
    let to = SocketAddr::from(([10, 0, 0, 1], 80));
    let (_sender, connection) = connect_http2(near, to, None, None).await?;
    let ended = tokio::time::timeout(Duration::from_hours(1), connection).await;
    assert!(ended.is_err(), "a peer that says nothing is no peer that has gone");
    drop(peer);
    Ok(())
}
