//! Connecting by `io_uring`, as the runtimes that use it do: the kernel opens the connection in a context of its own.
//!
//! Promises: one connect, to its end; says when the kernel has no `io_uring` for us. Tested by
//! `tests/capture/sockets.rs`.

#![expect(unsafe_code, reason = "the kernel reads an address from our memory while we wait; see SAFETY")]

use std::{io, net::SocketAddr, os::fd::AsRawFd};

use io_uring::{IoUring, opcode, squeue::Flags, types::Fd};
use socket2::SockAddr;

/// Why this kernel has no `io_uring` for this process; `None` where it has.
pub fn missing() -> Option<io::Error> {
    IoUring::new(1).err()
}

/// Connects a socket by `io_uring`, on a worker thread of the kernel's, and waits for the end of it.
pub fn connect(socket: &impl AsRawFd, to: SocketAddr) -> io::Result<()> {
    let mut ring = IoUring::new(1)?;
    let address = SockAddr::from(to);
    let connect = opcode::Connect::new(Fd(socket.as_raw_fd()), address.as_ptr().cast(), address.len());
    let entry = connect.build().flags(Flags::ASYNC);
    // SAFETY: the address and the socket live until the completion below has been taken.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let done = ring.completion().next().ok_or_else(|| io::Error::other("no completion"))?;
    match done.result() {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}
