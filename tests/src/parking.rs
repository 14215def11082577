//! More sockets than a process may have file descriptors.
//!
//! Promises that what is parked stays open until the parking is dropped. Used by `tests/source_ports.rs` and
//! `tests/many_flows.rs`.

use std::{
    io::IoSlice,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// The most file descriptors that fit one message (`SCM_MAX_FD`).
const MESSAGE: usize = 253;
/// How many such messages fit a socket pair, with room to spare.
const MESSAGES: usize = 100;

/// Sockets that stay open though no process has them as file descriptors, of which a process may have fewer: they are
/// on their way through socket pairs that nobody reads.
#[derive(Debug, Default)]
pub struct Parking {
    arriving: Vec<OwnedFd>,
    parked: Vec<(UnixStream, UnixStream)>,
    messages: usize,
}

impl Parking {
    /// Keeps this socket open.
    pub fn park(&mut self, socket: impl Into<OwnedFd>) -> Result<()> {
        self.arriving.push(socket.into());
        if self.arriving.len() < MESSAGE {
            return Ok(());
        }
        if self.messages.is_multiple_of(MESSAGES) {
            self.parked.push(UnixStream::pair()?);
        }
        self.messages += 1;
        let (pair, _) = self.parked.last().context("no pair")?;
        let fds: Vec<RawFd> = self.arriving.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(pair.as_raw_fd(), &[IoSlice::new(b"p")], &rights, MsgFlags::MSG_DONTWAIT, None)?;
        self.arriving.clear();
        Ok(())
    }
}
