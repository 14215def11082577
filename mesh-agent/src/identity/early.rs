//! Why a certificate is replaced before its time: it is withdrawn, or another pair signs now.
//!
//! Promises: a certificate of ours that is listed as revoked, or whose root is not believed any more, is replaced at once,
//! with a new key; where others are only to come from another signer, they come spread over a while, so that thousands do
//! not ask together. A certificate is withdrawn once: one that is issued and is no good either waits for the next change.
//! Tested by the unit tests of `authority.rs` and `follow.rs`.

use std::time::Duration;

use tokio::sync::watch;

use super::{Shown, Withdrawn};

/// Renewals after a change of the signer are spread over this share of a leaf's life, in percent …
const SPREAD_PERCENT: u32 = 5;
/// … and over this at most: after it, what the signer before has signed is in no use any more.
pub(super) const MOST_SPREAD: Duration = Duration::from_mins(5);

/// Tells when a certificate has to be replaced before its time.
#[derive(Debug)]
pub(super) struct Early {
    signers: watch::Receiver<u64>,
    spread: Duration,
}

impl Early {
    /// To be made before the certificate is issued, so that no change is missed.
    pub(super) fn new(signers: watch::Receiver<u64>, lifetime: Duration) -> Self {
        Self { signers, spread: (lifetime * SPREAD_PERCENT / 100).min(MOST_SPREAD) }
    }

    /// Completes when the certificate shown has to be replaced.
    pub(super) async fn due(&mut self, shown: &Shown) {
        let signers = &mut self.signers;
        let others_sign = async {
            // Without the authority there is nobody to sign; the handle goes soon.
            if signers.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(self.spread.mul_f64(fastrand::f64())).await;
        };
        tokio::select! {
            biased;
            withdrawn = shown.withdrawn() => match withdrawn {
                Withdrawn::Revoked => tracing::warn!("a certificate of this agent's is revoked; it is replaced now"),
                Withdrawn::RootGone => tracing::warn!(
                    "the root of a certificate of this agent's is not believed any more; it is replaced now"
                ),
            },
            () = others_sign => {}
        }
    }
}
