//! The agent that serves: listens for its successor, offers, and lets go.

use std::{
    io,
    net::Shutdown,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::Arc,
    time::Duration,
};

use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    FLOWS_AT_ONCE, Message, OwnListeners, Place, VERSION,
    link::{Link, SHORTLY, unexpected},
};
use crate::{
    admin::{KeepFile, Socket},
    capture::OfferedPod,
    report::KnownFlow,
};

/// How long a successor may take to make itself ready: hundreds of pods take seconds.
const PREPARING: Duration = Duration::from_mins(2);

/// Pause after a failure to accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where a successor calls. Its file goes with it, unless the successor has put its own in its place.
#[derive(Debug)]
pub struct Door {
    asked: mpsc::Receiver<Asked>,
    listening: JoinHandle<()>,
    keep: KeepFile,
}

impl Drop for Door {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

/// A successor that waits for an offer.
#[derive(Debug)]
pub struct Asked {
    link: Arc<Link>,
    /// Until they are offered: held longer, they would outlive those who listen.
    own: Option<Arc<OwnListeners>>,
    made_run_dir: bool,
}

impl Door {
    /// Listens at this path from here on, whatever was there.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn open(path: &Path, place: Place, own: OwnListeners, made_run_dir: bool) -> io::Result<Self> {
        let socket = Socket::put(path)?;
        let keep = socket.keep_file();
        let (asking, asked) = mpsc::channel(1);
        let own = Arc::new(own);
        let listening = tokio::spawn(async move {
            loop {
                let called = match socket.accept().await {
                    Ok(stream) => stream.into_std(),
                    Err(error) => Err(error),
                };
                let (place, asking, own) = (place.clone(), asking.clone(), Arc::clone(&own));
                match called {
                    Ok(stream) => {
                        tokio::task::spawn_blocking(move || {
                            if let Err(error) = greet(stream, &place, own, made_run_dir, &asking) {
                                tracing::warn!(%error, "somebody called to take over and did not");
                            }
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot hear whether a successor calls");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        });
        Ok(Self { asked, listening, keep })
    }

    /// Listens no more; the file of the socket is gone when this returns.
    pub async fn close(mut self) {
        self.listening.abort();
        // Told to end, it does.
        let _ = (&mut self.listening).await;
    }

    /// Leaves the file of the socket to the successor, which puts its own in its place.
    pub fn leave_file(&self) {
        self.keep.set(true);
    }

    /// The next successor that may take over.
    pub async fn asked(&mut self) -> Asked {
        match self.asked.recv().await {
            Some(asked) => asked,
            // The task that listens ends only with this.
            None => std::future::pending().await,
        }
    }
}

fn greet(
    stream: UnixStream,
    place: &Place,
    own: Arc<OwnListeners>,
    made_run_dir: bool,
    asking: &mpsc::Sender<Asked>,
) -> io::Result<()> {
    let link = Link::new(stream)?;
    let refused = match link.receive(SHORTLY)?.0 {
        Message::Hello { version, .. } if version != VERSION => {
            format!("it hands over by version {VERSION} of the protocol, not {version}")
        }
        Message::Hello { place: wanted, .. } if wanted != *place => format!(
            "it serves node {} with --bpf-dir {}, not node {} with {}",
            place.node,
            place.bpf_dir.display(),
            wanted.node,
            wanted.bpf_dir.display()
        ),
        Message::Hello { .. } => {
            let link = Arc::new(link);
            match asking.try_send(Asked { link: Arc::clone(&link), own: Some(own), made_run_dir }) {
                Ok(()) => return Ok(()),
                Err(_) => return refuse(&link, "another one is taking over".to_owned()),
            }
        }
        other => return Err(unexpected(&other)),
    };
    refuse(&link, refused)
}

fn refuse(link: &Link, reason: String) -> io::Result<()> {
    let text = io::Error::other(reason.clone());
    link.send(&Message::Refused { reason }, &[])?;
    Err(text)
}

impl Asked {
    /// Offers these pods and waits until the successor serves them.
    ///
    /// # Errors
    /// It failed, or took too long: nothing has happened.
    pub async fn offer(&mut self, lock: OwnedFd, pods: Vec<OfferedPod>) -> io::Result<()> {
        let own = self.own.take().ok_or_else(|| io::Error::other("it was offered already"))?;
        let (link, made_run_dir) = (Arc::clone(&self.link), self.made_run_dir);
        // Given up, this wakes the thread that waits for the answer.
        let mut hang_up = HangUp(Some(self.link.handle()?));
        let offering = tokio::task::spawn_blocking(move || {
            let files = [lock.as_fd(), own.admin.as_fd(), own.metrics.as_fd(), own.readiness.as_fd()];
            link.send(&Message::Offer { made_run_dir, pods: pods.len() }, &files)?;
            for pod in &pods {
                let [outbound, inbound, mesh] = &pod.listeners;
                link.send(&Message::of(pod), &[outbound.as_fd(), inbound.as_fd(), mesh.as_fd()])?;
            }
            // What was sent is the successor's to close.
            drop(pods);
            match link.receive(PREPARING)?.0 {
                Message::Serving => Ok(()),
                other => Err(unexpected(&other)),
            }
        });
        offering.await.map_err(io::Error::other)??;
        hang_up.0 = None;
        Ok(())
    }

    /// Says that everything is the successor's, and what is known of the connections that stay here, which is until this
    /// is dropped.
    ///
    /// # Errors
    /// The successor is gone.
    pub async fn done(&self, mut flows: Vec<KnownFlow>) -> io::Result<()> {
        let link = Arc::clone(&self.link);
        let done = tokio::task::spawn_blocking(move || {
            while !flows.is_empty() {
                let rest = flows.split_off(flows.len().min(FLOWS_AT_ONCE));
                link.send(&Message::Flows { flows }, &[])?;
                flows = rest;
            }
            link.send(&Message::Done, &[])
        });
        done.await.map_err(io::Error::other)?
    }
}

/// Ends the conversation when it is dropped with it.
struct HangUp(Option<UnixStream>);

impl Drop for HangUp {
    fn drop(&mut self) {
        if let Some(stream) = &self.0 {
            // Ended already is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
