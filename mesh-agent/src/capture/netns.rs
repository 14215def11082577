//! Network namespaces: opening a pod's, and making sockets inside it.
//!
//! A thread that cannot return to its own namespace is one whose next socket would be a stranger's: the process ends
//! rather than carry on with it. Tested with the kernel in the lab.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

/// An open network namespace. It lives for as long as this does, even when its last process has ended.
#[derive(Debug)]
pub(super) struct Netns {
    file: File,
    path: PathBuf,
    cookie: u64,
}

impl Netns {
    /// Opens the namespace at this path (`/run/netns/NAME`, `/proc/PID/ns/net`).
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let named = |error: io::Error| {
            let text = format!("network namespace {}: {error}", path.display());
            io::Error::new(error.kind(), text)
        };
        let file = File::open(path).map_err(named)?;
        let socket = enter(&file, || Socket::new(Domain::UNIX, Type::DGRAM, None));
        let cookie = socket.and_then(|socket| cookie_of(socket.as_fd())).map_err(named)?;
        Ok(Self { file, path: path.to_path_buf(), cookie })
    }

    /// Runs `f` on this thread with the thread in the namespace. `f` makes sockets and does nothing else.
    pub(super) fn enter<T>(&self, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        enter(&self.file, f)
    }

    /// The kernel's cookie of the namespace: unique for as long as the machine runs.
    pub(super) const fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Where it was opened.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn enter<T>(netns: &File, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let home = Home(File::open("/proc/thread-self/ns/net")?);
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    let made = f();
    drop(home);
    made
}

/// Brings the thread back to where it was, also when `f` panics.
struct Home(File);

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.0, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "cannot return to the agent's network namespace: ending before anything is mixed up");
            std::process::abort();
        }
    }
}

/// The cookie of the network namespace this socket is in (`SO_NETNS_COOKIE`, Linux 5.14).
pub(super) fn cookie_of(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as nix::libc::socklen_t;
    #[expect(unsafe_code, reason = "no library in use knows this socket option")]
    // SAFETY: the kernel writes at most `len` bytes into `cookie`, which has as many.
    let failed = unsafe {
        nix::libc::getsockopt(
            socket.as_raw_fd(),
            nix::libc::SOL_SOCKET,
            nix::libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if failed == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_namespace_is_named_in_the_error() {
        let error = Netns::open(Path::new("/run/netns/there-is-none")).map(|_| ());
        assert!(error.is_err_and(|e| e.to_string().contains("there-is-none")));
    }
}
