//! The successor: calls, is offered, serves, and is told that the other has let go.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    time::Duration,
};

use super::{
    Message, OwnListeners, Place, VERSION,
    link::{Link, SHORTLY, invalid, unexpected},
};
use crate::{capture::OfferedPod, report::KnownFlow};

/// How long an agent may take to offer: one that has just started enrols its pods first.
const TO_OFFER: Duration = Duration::from_secs(30);

/// What an agent offers its successor.
#[derive(Debug)]
pub struct Offered {
    /// The lock of the directory of pins.
    pub lock: OwnedFd,
    /// The agent's own listeners.
    pub own: OwnListeners,
    /// Whether the run directory goes with its agent.
    pub made_run_dir: bool,
    /// Its enrolled pods.
    pub pods: Vec<OfferedPod>,
}

/// A hand-over that has begun. Dropped, it has not happened.
#[derive(Debug)]
pub struct Succession(Link);

/// Calls the agent that listens at this path. `None`: nobody does. Blocks its thread.
///
/// # Errors
/// A sentence that says why it does not hand over.
pub fn call(path: &Path, place: Place) -> io::Result<Option<(Succession, Offered)>> {
    let stream = match UnixStream::connect(path) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        stream => stream?,
    };
    let link = Link::new(stream)?;
    link.send(&Message::Hello { version: VERSION, place }, &[])?;
    let (made_run_dir, pods, files) = match link.receive(TO_OFFER)? {
        (Message::Offer { made_run_dir, pods }, files) => (made_run_dir, pods, files),
        (Message::Refused { reason }, _) => {
            let text = format!("the agent that runs does not hand over: {reason}");
            return Err(io::Error::other(text));
        }
        (other, _) => return Err(unexpected(&other)),
    };
    let [lock, admin, metrics, readiness] = exactly(files)?;
    let own = OwnListeners { admin, metrics, readiness };
    let pods = (0..pods).map(|_| next_pod(&link)).collect::<io::Result<_>>()?;
    Ok(Some((Succession(link), Offered { lock, own, made_run_dir, pods })))
}

fn next_pod(link: &Link) -> io::Result<OfferedPod> {
    match link.receive(SHORTLY)? {
        (Message::Pod { namespace, name, cookie }, files) => {
            Ok(OfferedPod { namespace, name, cookie, listeners: exactly(files)? })
        }
        (other, _) => Err(unexpected(&other)),
    }
}

fn exactly<const N: usize>(files: Vec<OwnedFd>) -> io::Result<[OwnedFd; N]> {
    files.try_into().map_err(|_| invalid("a message came without the files it should have"))
}

impl Succession {
    /// Says that connections are accepted here. From the moment the other one hears it there is no way back. What is
    /// returned is what it knows of the connections it keeps, and a stream that ends when it has kept the last. Blocks
    /// its thread.
    ///
    /// # Errors
    /// The other one is gone, before or after it heard.
    pub fn serving(self) -> io::Result<(Vec<KnownFlow>, UnixStream)> {
        self.0.send(&Message::Serving, &[])?;
        let mut known = Vec::new();
        loop {
            match self.0.receive(SHORTLY)?.0 {
                Message::Flows { mut flows } => known.append(&mut flows),
                Message::Done => return Ok((known, self.0.handle()?)),
                other => return Err(unexpected(&other)),
            }
        }
    }
}
