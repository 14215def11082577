//! Taking a pod's connections from one of its listeners.
//!
//! Promises: what one connection does to fail is nobody else's trouble; a listener that was closed from inside the pod is
//! noticed. Serves nothing: what is accepted belongs to no runtime yet. Tested in `fixed.rs`, and with the kernel in the lab.

use std::{
    io,
    net::TcpListener,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::io::{Interest, unix::AsyncFd};

use super::{Captured, Listener, PodNet, Refused, is_of_one_connection, sockets, un_enrolled};

/// Pause after a failure to accept that is the whole process's (no file descriptors left), so that the accept loop does
/// not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Takes the connections of one listener of a pod; watches it by the runtime that it was made in.
#[derive(Debug)]
pub struct Acceptor {
    pod: Arc<PodNet>,
    listener: Listener,
    watched: AsyncFd<Listening>,
}

/// One of the three, all of which stay open with it.
#[derive(Debug)]
struct Listening {
    all: Arc<[TcpListener; 3]>,
    which: Listener,
}

impl Listening {
    fn socket(&self) -> &TcpListener {
        &self.all[self.which as usize]
    }
}

impl AsRawFd for Listening {
    fn as_raw_fd(&self) -> RawFd {
        self.socket().as_raw_fd()
    }
}

impl PodNet {
    /// What takes the connections of a listener.
    ///
    /// # Errors
    /// The pod is un-enrolled, or the system watches no more files.
    pub fn acceptor(self: &Arc<Self>, listener: Listener) -> io::Result<Acceptor> {
        let all = self.listeners.load_full().ok_or_else(un_enrolled)?;
        let listening = Listening { all, which: listener };
        #[expect(unsafe_code, reason = "a standard listener cannot be watched otherwise and stay shared")]
        // SAFETY: it holds the listener open, never exchanges it, and says the same descriptor for as long as it is.
        let watched = unsafe { AsyncFd::register_with_interest(listening, Interest::READABLE) };
        let watched = watched?;
        Ok(Acceptor { pod: Arc::clone(self), listener, watched })
    }

    /// The next captured connection, what is refused left out. An `Err` means the listener is gone (pod un-enrolled).
    pub async fn accept(self: &Arc<Self>, listener: Listener) -> io::Result<Captured> {
        let acceptor = self.acceptor(listener)?;
        loop {
            if let Ok(captured) = acceptor.next().await? {
                return Ok(captured);
            }
        }
    }
}

impl Acceptor {
    /// The next connection, captured or refused. An `Err` means the listener is gone (pod un-enrolled).
    pub async fn next(&self) -> io::Result<Result<Captured, Refused>> {
        let Self { pod, listener, watched } = self;
        loop {
            let accepted = tokio::select! {
                biased;
                () = pod.gone.cancelled() => return Err(un_enrolled()),
                accepted = watched.async_io(Interest::READABLE, |it| sockets::accept(it.socket())) => accepted,
            };
            match accepted {
                Ok((stream, client)) => return Ok(pod.identify(*listener, stream, client)),
                Err(error) if is_of_one_connection(&error) => {}
                // It does not listen any more: who has CAP_NET_ADMIN in the pod can destroy its sockets.
                Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => {
                    pod.lost.store(true, Ordering::Relaxed);
                    pod.gone.cancelled().await;
                }
                Err(error) => {
                    tracing::warn!(pod = %pod.name(), ?listener, %error, "cannot accept, trying again");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}
