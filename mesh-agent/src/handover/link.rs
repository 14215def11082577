//! Messages over a unix socket: the length, and JSON; files travel with the length. Blocks its thread.

use std::{
    io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::Message;
use crate::capture::descriptors;

/// The longest message, bytes: a thousand flows take less than half a mebibyte.
const LONGEST: u32 = 4 << 20;

/// How long a word may take that the other side need not think about.
pub(super) const SHORTLY: Duration = Duration::from_secs(5);

/// One side of the conversation.
#[derive(Debug)]
pub(super) struct Link(UnixStream);

impl Link {
    /// Speaks over this stream, if the other side is of the same user.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        let peer = getsockopt(&stream, PeerCredentials)?;
        let own = nix::unistd::geteuid().as_raw();
        if peer.uid() != own {
            let text = format!("user {} may not speak to an agent of user {own}", peer.uid());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(SHORTLY))?;
        Ok(Self(stream))
    }

    pub(super) fn send(&self, message: &Message, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let length = u32::try_from(text.len()).ok().filter(|length| *length <= LONGEST);
        let length = length.ok_or_else(|| invalid("a message is too long"))?;
        descriptors::send(&self.0, &length.to_be_bytes(), files)?;
        descriptors::send(&self.0, &text, &[])
    }

    /// The next message, waited for so long at most.
    pub(super) fn receive(&self, limit: Duration) -> io::Result<(Message, Vec<OwnedFd>)> {
        self.0.set_read_timeout(Some(limit))?;
        let mut length = [0; 4];
        let files = descriptors::receive(&self.0, &mut length).map_err(in_words)?;
        let length = u32::from_be_bytes(length);
        if length > LONGEST {
            return Err(invalid("it speaks another protocol"));
        }
        let mut text = vec![0; length as usize];
        descriptors::receive(&self.0, &mut text).map_err(in_words)?;
        Ok((serde_json::from_slice(&text)?, files))
    }

    /// A handle that ends the conversation from another thread.
    pub(super) fn handle(&self) -> io::Result<UnixStream> {
        self.0.try_clone()
    }
}

fn in_words(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "the other agent hung up"),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::new(io::ErrorKind::TimedOut, "the other agent does not answer")
        }
        _ => error,
    }
}

pub(super) fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// What came is not what was to come next.
pub(super) fn unexpected(message: &Message) -> io::Error {
    let text = format!("the other agent said what it should not have: {message:?}");
    io::Error::new(io::ErrorKind::InvalidData, text)
}
