//! Open files that pass from one agent to another over a unix socket (`SCM_RIGHTS`).
//!
//! Promises that what was sent together arrives together, and that whatever arrives is owned: nothing leaks into
//! programs that are started, and what is not wanted is closed. Tested below.

use std::{
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use nix::{
    cmsg_space,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
};

/// Files that travel with one message at most.
pub const MOST_FILES: usize = 8;

/// Sends these bytes, and the files with the first of them.
///
/// # Errors
/// Those of the socket; there are no bytes, or more files than [`MOST_FILES`].
pub fn send(mut stream: &UnixStream, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    if files.len() > MOST_FILES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many files for one message"));
    }
    let raw: Vec<RawFd> = files.iter().map(std::os::fd::AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    let sent =
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None)?;
    stream.write_all(&bytes[sent..])
}

/// Fills the buffer; the files are those that came with its first byte.
///
/// # Errors
/// Those of the socket; it ended before the buffer was full.
pub fn receive(mut stream: &UnixStream, buffer: &mut [u8]) -> io::Result<Vec<OwnedFd>> {
    let mut files = Vec::new();
    let mut space = cmsg_space!([RawFd; MOST_FILES]);
    let received = {
        let mut parts = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = part {
                #[expect(unsafe_code, reason = "the kernel gives descriptors as numbers")]
                // SAFETY: the kernel has just opened each of them for this process, and nobody else knows of it.
                files.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        message.bytes
    };
    if received == 0 && !buffer.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    stream.read_exact(&mut buffer[received..])?;
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, os::fd::AsFd as _};

    use super::*;

    #[test]
    fn a_listener_arrives_with_its_message_and_is_the_same() -> io::Result<()> {
        let (near, far) = UnixStream::pair()?;
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        send(&near, b"first", &[])?;
        send(&near, b"second", &[listener.as_fd()])?;
        let mut buffer = [0; 5];
        assert!(receive(&far, &mut buffer)?.is_empty());
        let mut buffer = [0; 6];
        let mut files = receive(&far, &mut buffer)?;
        assert_eq!((&buffer, files.len()), (b"second", 1));
        let same = files.pop().map(TcpListener::from).ok_or(io::ErrorKind::NotFound)?;
        let at = listener.local_addr()?;
        assert_eq!(same.local_addr()?, at);
        drop(listener);
        std::net::TcpStream::connect(at)?;
        same.accept().map(drop)
    }

    #[test]
    fn an_end_in_the_middle_is_an_error() -> io::Result<()> {
        let (near, far) = UnixStream::pair()?;
        send(&near, b"abc", &[])?;
        drop(near);
        let error = receive(&far, &mut [0; 4]).map_err(|error| error.kind());
        assert_eq!(error.map(|_| ()), Err(io::ErrorKind::UnexpectedEof));
        Ok(())
    }
}
