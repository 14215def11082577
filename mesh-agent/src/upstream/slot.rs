//! The HTTP/2 connections to one address: as many as the peer's limit of streams asks for, one dialled at a time.
//!
//! Promises: the least used connection gets the next stream; what nobody has used for a while is closed; whoever waited while somebody dialled in vain is told what came of it, and does not dial again one after the
//! other. Tested below.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::client::SendRequest;
use tokio::{sync::Notify, time::Instant};

use super::pool::lock;
use crate::{
    error::{Error, Result},
    http2,
};

/// Connections to one address; beyond them, requests wait for a stream.
const MOST: usize = 16;

/// One connection, and as many more holders of its mark as there are streams on it.
#[derive(Debug)]
struct Open {
    sender: SendRequest<Bytes>,
    streams: Arc<()>,
    /// When it last got a stream.
    used: Instant,
}

impl Open {
    fn streams(&self) -> usize {
        Arc::strong_count(&self.streams) - 1
    }
}

/// A stream's place on a connection: to be held until the stream has ended.
#[derive(Debug)]
pub(super) struct Place {
    /// Let go of before the others are told.
    stream: Option<Arc<()>>,
    freed: Arc<Notify>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.stream = None;
        self.freed.notify_one();
    }
}

/// The connections to one address.
#[derive(Debug, Default)]
pub(super) struct Slot {
    open: Mutex<Vec<Open>>,
    dialling: tokio::sync::Mutex<()>,
    /// Dials that have come to something.
    dialled: AtomicU64,
    /// The last that failed: which it was, and why.
    failed: Mutex<Option<(u64, Error)>>,
    freed: Arc<Notify>,
}

impl Slot {
    /// A connection with room for another stream: one that is open, else one that `dial` makes.
    pub async fn get<D>(&self, dial: impl FnOnce() -> D) -> Result<(SendRequest<Bytes>, Place)>
    where
        D: Future<Output = Result<SendRequest<Bytes>>>,
    {
        if let Some(found) = self.free() {
            return Ok(found);
        }
        let before = self.dialled.load(Ordering::Acquire);
        let _turn = self.dialling.lock().await;
        if let Some(found) = self.free() {
            return Ok(found);
        }
        if let Some((which, error)) = &*lock(&self.failed)
            && *which > before
        {
            return Err(error.clone());
        }
        // Boxed: rare, and every request would have to make room for it.
        let made = Box::pin(dial()).await;
        let which = self.dialled.fetch_add(1, Ordering::AcqRel) + 1;
        match made {
            Ok(sender) => {
                let streams = Arc::new(());
                let place = self.place(&streams);
                lock(&self.open).push(Open { sender: sender.clone(), streams, used: Instant::now() });
                Ok((sender, place))
            }
            Err(error) => {
                *lock(&self.failed) = Some((which, error.clone()));
                Err(error)
            }
        }
    }

    /// Completes when a stream has ended.
    pub async fn freed(&self) {
        self.freed.notified().await;
    }

    /// Closes what has had no stream for so long; whether any connection is left.
    pub fn sweep(&self, idle: Duration) -> bool {
        let mut open = lock(&self.open);
        // With its last handle gone a connection says goodbye and ends.
        open.retain(|open| {
            !http2::is_closed(&open.sender) && (open.streams() > 0 || open.used.elapsed() < idle)
        });
        !open.is_empty()
    }

    fn place(&self, streams: &Arc<()>) -> Place {
        Place { stream: Some(Arc::clone(streams)), freed: Arc::clone(&self.freed) }
    }

    /// The first with room; where there are as many as may be, the least used, whose streams one waits for.
    fn free(&self) -> Option<(SendRequest<Bytes>, Place)> {
        let mut open = lock(&self.open);
        open.retain(|open| !http2::is_closed(&open.sender));
        let full = open.len() >= MOST;
        let has_room = |open: &Open| open.streams() < open.sender.current_max_send_streams();
        let found = match open.iter().position(has_room) {
            Some(found) => found,
            None if full => open.iter().enumerate().min_by_key(|(_, open)| open.streams())?.0,
            None => return None,
        };
        let found = &mut open[found];
        found.used = Instant::now();
        Some((found.sender.clone(), self.place(&found.streams)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::error::Kind;

    type TestResult = std::result::Result<(), Box<dyn std::error::Error + Send + Sync>>;

    /// A connection to a peer that lets so many streams be open and answers none.
    async fn connected(streams: u32) -> Result<SendRequest<Bytes>> {
        let failed = |error: h2::Error| Error::new(Kind::ConnectFailure, error.to_string());
        let (near, far) = tokio::io::duplex(1 << 16);
        tokio::spawn(async move {
            let mut builder = h2::server::Builder::new();
            let Ok(mut connection) = builder.max_concurrent_streams(streams).handshake::<_, Bytes>(far).await
            else {
                return;
            };
            let mut held = Vec::new();
            while let Some(Ok(stream)) = connection.accept().await {
                held.push(stream);
            }
        });
        let (sender, connection) = h2::client::handshake(near).await.map_err(failed)?;
        tokio::spawn(connection);
        // Its settings are known once it may have no more than those.
        while sender.current_max_send_streams() != streams as usize {
            tokio::task::yield_now().await;
        }
        Ok(sender)
    }

    #[tokio::test]
    async fn another_connection_is_made_when_all_streams_are_taken() -> TestResult {
        let slot = Slot::default();
        let mut held = Vec::new();
        for _ in 0..6 {
            held.push(slot.get(|| connected(2)).await?);
        }
        assert_eq!(lock(&slot.open).len(), 3);
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn who_waited_for_a_dial_in_vain_is_told_with_it() -> TestResult {
        let slot = Arc::new(Slot::default());
        let begun = tokio::time::Instant::now();
        let mut waiting = tokio::task::JoinSet::new();
        for _ in 0..10 {
            let slot = Arc::clone(&slot);
            waiting.spawn(async move {
                let black_hole = async {
                    tokio::time::sleep(Duration::from_secs(10)).await;
                    Err(Error::new(Kind::ConnectFailure, "no answer"))
                };
                slot.get(|| black_hole).await.map(drop).map_err(|error| error.kind)
            });
        }
        for outcome in waiting.join_all().await {
            assert_eq!(outcome, Err(Kind::ConnectFailure));
        }
        assert_eq!(begun.elapsed().as_secs(), 10);
        // Who comes later dials again.
        assert!(slot.get(|| connected(1)).await.is_ok());
        Ok(())
    }
}
