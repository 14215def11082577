//! Connections that are shared, and those that must not be.

use std::{
    future,
    slice::from_ref,
    sync::atomic::{AtomicUsize, Ordering},
    task::Poll,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::oneshot,
};

use super::*;

fn key(node: &Node, pair: &Pair, wire: Wire) -> PoolKey {
    PoolKey::new(pair.client.id.clone(), POD, node.address, from_ref(&pair.server.id), wire)
}

#[tokio::test]
async fn one_dial_for_all_who_ask_at_once() -> TestResult {
    let (pair, pool) = (Arc::new(Pair::new().await?), Arc::new(Pool::default()));
    let node = Arc::new(Node::start(&pair.server, 2, echo).await?);
    let dials = Arc::new(AtomicUsize::new(0));
    let mut asking = JoinSet::new();
    for _ in 0..32 {
        let (pair, pool, node, dials) = (pair.clone(), pool.clone(), node.clone(), dials.clone());
        asking.spawn(async move {
            let dial = async {
                dials.fetch_add(1, Ordering::Relaxed);
                node.dial().await
            };
            pool.get(&key(&node, &pair, Wire::MeshH2), &pair.client, dial).await
        });
    }
    let connections = asking.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    assert!(connections.iter().all(|connection| connection.is_same(&connections[0])));
    assert_eq!((dials.load(Ordering::Relaxed), pool.connections()), (1, 1));
    Ok(())
}

/// Polls once what must not be ready yet.
async fn begin(get: &mut (impl Future<Output = Result<MeshConnection>> + Unpin)) -> TestResult {
    let pending = future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *get).poll(cx).is_pending())).await;
    if pending { Ok(()) } else { Err("it was ready at once".into()) }
}

#[tokio::test]
async fn a_failed_dial_fails_all_who_waited_for_it() -> TestResult {
    let (pair, pool) = (Pair::new().await?, Pool::default());
    let node = Node::start(&pair.server, 1, echo).await?;
    let key = key(&node, &pair, Wire::Hbone);
    let (fail, failed) = oneshot::channel::<()>();
    let dial = async {
        let _ = failed.await;
        Err(Error::new(Kind::ConnectFailure, "nobody there"))
    };
    let mut first = Box::pin(pool.get(&key, &pair.client, dial));
    begin(&mut first).await?;
    let mut waiting = Vec::new();
    for _ in 0..8 {
        let mut get = Box::pin(pool.get(&key, &pair.client, node.dial()));
        begin(&mut get).await?;
        waiting.push(get);
    }
    drop(fail);
    assert_eq!(first.await.map(|_| ()).map_err(|error| error.kind), Err(Kind::ConnectFailure));
    for get in waiting {
        // Its own dial would have succeeded.
        assert_eq!(get.await.map(|_| ()).map_err(|error| error.kind), Err(Kind::ConnectFailure));
    }
    assert_eq!(pool.connections(), 0);
    // The failure is not remembered.
    pool.get(&key, &pair.client, node.dial()).await?;
    Ok(())
}

#[tokio::test]
async fn an_abandoned_dial_passes_to_the_next() -> TestResult {
    let (pair, pool) = (Pair::new().await?, Pool::default());
    let node = Node::start(&pair.server, 1, echo).await?;
    let key = key(&node, &pair, Wire::Hbone);
    let mut first = Box::pin(pool.get(&key, &pair.client, future::pending()));
    begin(&mut first).await?;
    let mut second = Box::pin(pool.get(&key, &pair.client, node.dial()));
    begin(&mut second).await?;
    drop(first);
    second.await?;
    Ok(())
}

#[tokio::test]
async fn the_hundred_and_first_stream_gets_another_connection() -> TestResult {
    let (pair, pool) = (Pair::new().await?, Pool::default());
    let node = Node::start(&pair.server, 2, echo).await?;
    let key = key(&node, &pair, Wire::Hbone);
    let mut tunnels = Vec::new();
    for _ in 0..101 {
        let connection = pool.get(&key, &pair.client, node.dial()).await?;
        tunnels.push(connection.open_tunnel(ECHO, CLIENT).await?);
    }
    assert_eq!(pool.connections(), 2);
    Ok(())
}

#[tokio::test]
async fn other_keys_get_other_connections() -> TestResult {
    let (pair, pool) = (Pair::new().await?, Pool::default());
    let node = Node::start(&pair.server, 5, echo).await?;
    let base = key(&node, &pair, Wire::MeshH2);
    let (source, server) = (pair.client.id.clone(), pair.server.id.clone());
    let at = |ip: &str| ip.parse::<IpAddr>();
    let keys = [
        base.clone(),
        PoolKey::new(spiffe("other"), POD, node.address, from_ref(&server), Wire::MeshH2),
        PoolKey::new(source.clone(), at("127.0.0.2")?, node.address, from_ref(&server), Wire::MeshH2),
        PoolKey::new(source.clone(), POD, node.address, &[server.clone(), spiffe("x")], Wire::MeshH2),
        key(&node, &pair, Wire::Hbone),
    ];
    for (count, key) in keys.iter().enumerate() {
        pool.get(key, &pair.client, node.dial()).await?;
        assert_eq!(pool.connections(), count + 1);
    }
    let same = PoolKey::new(source, POD, node.address, &[server.clone(), server], Wire::MeshH2);
    pool.get(&same, &pair.client, future::pending()).await?;
    Ok(())
}

#[tokio::test]
async fn a_closed_connection_is_dropped() -> TestResult {
    let (pair, pool) = (Pair::new().await?, Pool::default());
    let mut node = Node::start(&pair.server, 2, echo).await?;
    let key = key(&node, &pair, Wire::Hbone);
    let first = pool.get(&key, &pair.client, node.dial()).await?;
    let mut tunnel = first.open_tunnel(ECHO, CLIENT).await?;
    node.served.abort_all();
    assert!(tunnel.read(&mut [0]).await.is_err());
    first.done().await;
    let node = Node::start(&pair.server, 1, echo).await?;
    let second = pool.get(&key, &pair.client, node.dial()).await?;
    assert!(!second.is_same(&first));
    second.open_tunnel(ECHO, CLIENT).await?;
    Ok(())
}

#[tokio::test]
async fn an_idle_connection_is_released() -> TestResult {
    let (pair, pool) = (Pair::new().await?, Pool::default());
    let mut node = Node::start(&pair.server, 1, echo).await?;
    let key = key(&node, &pair, Wire::Hbone);
    drop(pool.get(&key, &pair.client, node.dial()).await?);
    // Only now: a paused clock would run out on a handshake that has to wait for the machine.
    tokio::time::pause();
    let start = tokio::time::Instant::now();
    assert_eq!(pool.connections(), 1);
    node.served.join_next().await.ok_or("nothing was served")???;
    assert_eq!(pool.connections(), 0);
    assert!(start.elapsed() >= settings::POOL_IDLE);
    Ok(())
}

#[tokio::test]
async fn the_pool_takes_its_connections_with_it() -> TestResult {
    let (pair, pool) = (Pair::new().await?, Pool::default());
    let mut node = Node::start(&pair.server, 2, echo).await?;
    for wire in [Wire::Hbone, Wire::MeshH2] {
        let connection = pool.get(&key(&node, &pair, wire), &pair.client, node.dial()).await?;
        let mut tunnel = connection.open_tunnel(ECHO, CLIENT).await?;
        tunnel.shutdown().await?;
        assert_eq!(tunnel.read(&mut [0]).await?, 0);
    }
    assert_eq!(pool.connections(), 2);
    drop(pool);
    while let Some(served) = node.served.join_next().await {
        served??;
    }
    Ok(())
}
