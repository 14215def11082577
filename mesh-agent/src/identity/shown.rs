//! What one end has shown of itself in a handshake, and whether that still stands.
//!
//! Promises: whoever keeps a connection learns when what the peer showed is withdrawn, changes during the handshake
//! included. A certificate that ends is not withdrawn by that: it was good when it was shown, and the next handshake
//! needs another. Costs nothing while roots and lists stay as they are. Tested by `tunnel/tests` and in the lab
//! (`tests/tests/revocation.rs`, `rotation.rs`).

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::sync::watch;

use super::trust::{Chain, Roots, Trust, Usage, Withdrawn};

/// A handshake under way: to be made before it begins, so that no change is missed.
#[derive(Debug)]
pub(crate) struct Beginning {
    trust: Arc<Trust>,
    algorithms: WebPkiSupportedAlgorithms,
    roots: Arc<Roots>,
    at: UnixTime,
    changes: watch::Receiver<u64>,
}

impl Beginning {
    pub(super) fn new(trust: &Arc<Trust>, algorithms: WebPkiSupportedAlgorithms) -> Self {
        let changes = trust.changes();
        Self { trust: Arc::clone(trust), algorithms, roots: trust.roots(), at: UnixTime::now(), changes }
    }

    /// What came of it: the certificates that the other end has shown, its own first.
    pub(crate) fn shown(self, chain: &[CertificateDer<'_>], usage: Usage) -> Shown {
        let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        Shown { beginning: self, chain, usage, cut: AtomicBool::new(false) }
    }
}

/// What one end has shown of itself.
#[derive(Debug)]
pub(crate) struct Shown {
    beginning: Beginning,
    chain: Box<[CertificateDer<'static>]>,
    usage: Usage,
    cut: AtomicBool,
}

impl Shown {
    /// Completes when it is withdrawn.
    pub(crate) async fn withdrawn(&self) -> Withdrawn {
        let mut changes = self.beginning.changes.clone();
        // The sender is in `trust`, which this keeps.
        while changes.changed().await.is_ok() {
            if let Some(withdrawn) = self.judge() {
                return withdrawn;
            }
        }
        std::future::pending().await
    }

    /// Says to all who share it that nothing stands on it any more.
    pub(crate) fn cut(&self) {
        self.cut.store(true, Ordering::Release);
    }

    /// Whether nothing stands on it any more.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    fn judge(&self) -> Option<Withdrawn> {
        let Beginning { trust, algorithms, roots, at, .. } = &self.beginning;
        let (leaf, intermediates) = self.chain.split_first()?;
        trust.judge(Chain { leaf, intermediates, usage: self.usage, algorithms }, *at, roots)
    }
}
