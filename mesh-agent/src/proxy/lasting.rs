//! How long a byte stream may last: since it was opened (`maxConnectionDuration`), and since anything moved
//! (`tcp.idleTimeout`).
//!
//! Promises that none is closed before its time; one on which nothing moves is closed at most an eighth later than it says.
//! Tested below, and in the lab (`tests/tests/connection_pool.rs`).

use std::{future::pending, time::Duration};

use tokio::time::sleep;

use crate::{
    copy::Moved,
    error::{Error, Kind, Result},
    state::snapshot::ConnectionPool,
};

/// In how many parts of its time an idle stream is looked at.
const LOOKS: u32 = 8;

/// Whether the rule says anything about it.
pub(super) const fn limits(pool: &ConnectionPool) -> bool {
    pool.max_duration.is_some() || pool.stream_idle.is_some()
}

/// Copies for as long as the rule lets the stream last.
pub(super) async fn within(
    pool: &ConnectionPool,
    moved: &Moved,
    copying: impl Future<Output = Result<()>>,
) -> Result<()> {
    tokio::select! {
        biased;
        ended = copying => ended,
        error = over(pool, moved) => Err(error),
    }
}

/// Why the stream is over, once it is.
async fn over(pool: &ConnectionPool, moved: &Moved) -> Error {
    let old = async {
        match pool.max_duration {
            Some(limit) => {
                sleep(limit).await;
                Error::new(Kind::TooOld, format!("open for {limit:?}, as long as connectionPool allows"))
            }
            None => pending().await,
        }
    };
    let idle = async {
        match pool.stream_idle {
            Some(limit) => {
                unmoved(limit, moved).await;
                Error::new(Kind::StreamIdle, format!("nothing moved either way for {limit:?}"))
            }
            None => pending().await,
        }
    };
    tokio::select! {
        error = old => error,
        error = idle => error,
    }
}

/// Completes once nothing has moved for so long.
async fn unmoved(limit: Duration, moved: &Moved) {
    let (mut before, mut looks) = (moved.get(), 0);
    while looks < LOOKS {
        sleep(limit / LOOKS).await;
        let now = moved.get();
        looks = if now == before { looks + 1 } else { 0 };
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use tokio::time::Instant;

    use super::*;

    async fn lasts(pool: &ConnectionPool, moved: &Moved) -> (Option<Kind>, Duration) {
        let begun = Instant::now();
        let ended = within(pool, moved, pending()).await;
        (ended.err().map(|error| error.kind), begun.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_ends_when_it_is_old_and_not_before() {
        let minute = Duration::from_mins(1);
        let pool = ConnectionPool { max_duration: Some(minute), ..ConnectionPool::UNLIMITED };
        let (kind, after) = lasts(&pool, &Moved::default()).await;
        assert_eq!(kind, Some(Kind::TooOld));
        assert!((minute..minute + Duration::from_millis(2)).contains(&after), "{after:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_ends_when_nothing_has_moved_for_so_long() {
        let limit = Duration::from_secs(8);
        let pool = ConnectionPool { stream_idle: Some(limit), ..ConnectionPool::UNLIMITED };
        let (kind, after) = lasts(&pool, &Moved::default()).await;
        assert_eq!(kind, Some(Kind::StreamIdle));
        assert!((limit..=limit * 9 / 8 + Duration::from_millis(10)).contains(&after), "{after:?}");
        // Each way counts.
        let moved = Moved::default();
        let talking = async {
            for count in [&moved.sent, &moved.received, &moved.sent] {
                sleep(Duration::from_millis(7900)).await;
                count.fetch_add(1, Ordering::Relaxed);
            }
            pending::<()>().await;
        };
        tokio::select! {
            (kind, after) = lasts(&pool, &moved) => {
                let talked = Duration::from_millis(3 * 7900);
                assert_eq!(kind, Some(Kind::StreamIdle));
                assert!((talked + limit..=talked + limit * 9 / 8 + Duration::from_millis(10)).contains(&after), "{after:?}");
            }
            () = talking => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_rule_it_lasts() {
        let moved = Moved::default();
        let lasting = within(&ConnectionPool::UNLIMITED, &moved, async {
            sleep(Duration::from_hours(100)).await;
            Ok(())
        });
        assert!(lasting.await.is_ok());
    }
}
