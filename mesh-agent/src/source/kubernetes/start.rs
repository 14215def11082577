//! What every watch is started with.

use kube::Client;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::{
    retry::{Retry, Waits},
    watch::{Told, Watch},
};

/// Starts watches that tell the same listener. Cheap to clone.
#[derive(Clone)]
pub(super) struct Starter {
    client: Client,
    told: mpsc::Sender<Told>,
    again: watch::Receiver<()>,
    waits: Waits,
}

impl Starter {
    /// `again`: when it changes, everything is listed anew.
    pub fn new(client: Client, told: mpsc::Sender<Told>, again: watch::Receiver<()>, retry: Retry) -> Self {
        Self { client, told, again, waits: retry.into() }
    }

    /// It ends when what is returned is dropped.
    pub fn start(&self, watch: Watch) -> AbortOnDropHandle<()> {
        let followed = watch.follow(self.told.clone(), self.again.clone(), self.waits.clone());
        AbortOnDropHandle::new(tokio::spawn(followed))
    }

    /// Who is spoken to.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Who is told.
    pub fn told(&self) -> &mpsc::Sender<Told> {
        &self.told
    }

    /// How it is waited after failures.
    pub fn waits(&self) -> Waits {
        self.waits.clone()
    }
}
