//! Bytes from one socket to another through a pipe of the kernel's (`splice(2)`), without a copy through this process.
//!
//! Promises what `copy.rs` does. What carries bytes is borrowed for as long as there are bytes to move, so that an idle
//! connection holds neither a buffer nor a descriptor. Little goes through a buffer, much through the pipe, where one can be
//! had. Tested below.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::Shutdown,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice},
    sys::socket::{MsgFlags, recv},
    unistd::pipe2,
};
use socket2::SockRef;
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::TcpStream,
    task::coop::consume_budget,
};

use super::{Blame, Moved, client_broke, is_gone, server_broke, turn::Turn};
use crate::error::Result;

/// What a pipe is asked to hold, bytes. The kernel's own choice (64 KiB) stands where it gives no more.
const PIPE: u32 = 256 << 10;

/// What stands in for a pipe, bytes.
const BUFFER: usize = 16 << 10;

/// Pipes of the process at a time: who sends and takes nothing keeps one, with two descriptors and what is in it. Beyond that
/// bytes go through buffers.
const MOST: usize = 128;

/// Empty carriers that a thread keeps for its next connection with something to say.
const KEPT: usize = 8;

/// Moves bytes both ways until both ends have closed; `said` is what was read of the client's before.
///
/// # Errors
/// Those of [`super::both_ways`].
pub async fn between_sockets(
    client: TcpStream,
    said: &[u8],
    mut server: TcpStream,
    moved: &Moved,
) -> Result<()> {
    server.write_all(said).await.map_err(|error| server_broke(&error))?;
    moved.sent.store(said.len() as u64, Ordering::Relaxed);
    tokio::try_join!(
        one_way(&client, &server, &moved.sent, [client_broke, server_broke]),
        one_way(&server, &client, &moved.received, [server_broke, client_broke]),
    )?;
    Ok(())
}

async fn one_way(from: &TcpStream, to: &TcpStream, moved: &AtomicU64, blame: Blame) -> Result<()> {
    let [reading, writing] = blame;
    let mut turn = Turn::default();
    loop {
        from.readable().await.map_err(|error| reading(&error))?;
        let mut carrier = Carrier::take();
        // Until the socket has nothing more: a pipe that is full of small pieces has taken less than there was, too.
        loop {
            // Neither much nor many small pieces keep others from their turn: what is moved here counts as nothing to the runtime.
            consume_budget().await;
            poll_fn(|cx| turn.poll(cx)).await;
            match carrier.fill(from) {
                Ok(Filled { bytes: 0, .. }) => {
                    carrier.give_back();
                    return match SockRef::from(to).shutdown(Shutdown::Write) {
                        Err(error) if is_gone(&error) => Ok(()),
                        other => other.map_err(|error| writing(&error)),
                    };
                }
                Ok(filled) => {
                    carrier.empty(to, filled).await.map_err(|error| writing(&error))?;
                    turn.took(filled.bytes);
                    moved.fetch_add(filled.bytes as u64, Ordering::Relaxed);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(reading(&error)),
            }
        }
        turn.over();
        carrier.give_back();
    }
}

/// What carries bytes for a while. Holds none but between `fill` and the end of `empty`.
struct Carrier {
    pipe: Option<Pipe>,
    buffer: Vec<u8>,
    /// Whether the pipe is tried first: it is for much at a time. What fits a buffer costs less by way of that (measured: a
    /// fifth).
    by_pipe: bool,
}

/// How many bytes a carrier has taken, and where they are.
#[derive(Clone, Copy)]
struct Filled {
    bytes: usize,
    in_pipe: bool,
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    _counted: Counted,
}

/// One of the pipes of the process, counted until it is dropped.
struct Counted;

thread_local! {
    static IDLE: RefCell<Vec<Carrier>> = const { RefCell::new(Vec::new()) };
}

impl Carrier {
    fn take() -> Self {
        IDLE.with_borrow_mut(Vec::pop).unwrap_or_else(|| Self {
            pipe: Pipe::new(),
            buffer: vec![0; BUFFER],
            by_pipe: false,
        })
    }

    /// For the next connection of this thread.
    fn give_back(mut self) {
        self.by_pipe = false;
        IDLE.with_borrow_mut(|idle| {
            if idle.len() < KEPT && self.pipe.is_some() {
                idle.push(self);
            }
        });
    }

    /// Takes what a socket has, that may have nothing; no bytes are its end. That is the word of `recv` alone: `splice` stops at
    /// a byte that was sent as urgent, as if there were nothing, and takes what comes after for the end.
    fn fill(&mut self, from: &TcpStream) -> io::Result<Filled> {
        from.try_io(Interest::READABLE, || {
            if let Some(pipe) = self.pipe.as_ref().filter(|_| self.by_pipe) {
                match pass(from, &pipe.write, PIPE as usize) {
                    Ok(0) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Ok(bytes) => {
                        self.by_pipe = bytes >= BUFFER;
                        return Ok(Filled { bytes, in_pipe: true });
                    }
                    Err(error) => return Err(error),
                }
            }
            let bytes = recv(from.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT)?;
            self.by_pipe = self.pipe.is_some() && bytes == self.buffer.len();
            Ok(Filled { bytes, in_pipe: false })
        })
    }

    async fn empty(&self, to: &TcpStream, filled: Filled) -> io::Result<()> {
        let mut done = 0;
        while done < filled.bytes {
            let tried = match self.pipe.as_ref().filter(|_| filled.in_pipe) {
                Some(pipe) => to.try_io(Interest::WRITABLE, || pass(&pipe.read, to, filled.bytes - done)),
                None => to.try_write(&self.buffer[done..filled.bytes]),
            };
            match tried {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Pipe {
    /// `None`: there are enough of them, or the process is out of descriptors.
    fn new() -> Option<Self> {
        let counted = Counted::one()?;
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).ok()?;
        // Less does as well.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE.cast_signed()));
        Some(Self { read, write, _counted: counted })
    }
}

static PIPES: AtomicUsize = AtomicUsize::new(0);

impl Counted {
    fn one() -> Option<Self> {
        let counted = Self;
        (PIPES.fetch_add(1, Ordering::Relaxed) < MOST).then_some(counted)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        PIPES.fetch_sub(1, Ordering::Relaxed);
    }
}

fn pass(from: impl AsFd, to: impl AsFd, most: usize) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    loop {
        match splice(&from, None, &to, None, most, flags) {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::AsyncReadExt,
        net::TcpListener,
        task::{JoinHandle, yield_now},
    };

    use super::*;
    use crate::error::Kind;

    type Copying = JoinHandle<(Result<()>, (u64, u64))>;

    async fn pair() -> io::Result<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (near, (far, _)) =
            tokio::try_join!(TcpStream::connect(listener.local_addr()?), listener.accept())?;
        Ok((near, far))
    }

    /// A client and a server, and what copies between them.
    async fn joined(said: &'static [u8]) -> io::Result<(TcpStream, TcpStream, Copying)> {
        let ((client, client_side), (server, server_side)) = tokio::try_join!(pair(), pair())?;
        let copying = tokio::spawn(async move {
            let moved = Moved::default();
            (between_sockets(client_side, said, server_side, &moved).await, moved.get())
        });
        Ok((client, server, copying))
    }

    fn pattern(size: usize, seed: usize) -> Vec<u8> {
        (0..size).map(|i| ((i * 7 + i / 251 + seed) % 253) as u8).collect()
    }

    /// Writes in pieces of many sizes, single bytes among them.
    async fn say(to: &mut (impl AsyncWriteExt + Unpin), all: &[u8]) -> io::Result<()> {
        let (mut rest, mut size) = (all, 1);
        while !rest.is_empty() {
            let (piece, left) = rest.split_at(size.min(rest.len()));
            to.write_all(piece).await?;
            (rest, size) = (left, size * 5 % 130_001 + 1);
            yield_now().await;
        }
        to.shutdown().await
    }

    #[tokio::test]
    async fn every_byte_arrives_both_ways_at_once() -> io::Result<()> {
        let (client, server, copying) = joined(b"").await?;
        let (question, answer) = (pattern(9 << 20, 1), pattern(5 << 20, 2));
        let ends = [(client, question.clone(), answer.clone()), (server, answer, question)];
        let ends = ends.map(|(stream, says, hears)| {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.into_split();
                let mut heard = Vec::new();
                tokio::try_join!(say(&mut write, &says), read.read_to_end(&mut heard))?;
                assert!(heard == hears, "other bytes came than were sent");
                io::Result::Ok(())
            })
        });
        for end in ends {
            end.await??;
        }
        let (ended, moved) = copying.await?;
        assert_eq!((ended.map_err(|error| error.kind), moved), (Ok(()), (9 << 20, 5 << 20)));
        Ok(())
    }

    #[tokio::test]
    async fn half_close_leaves_the_other_direction_open_and_what_was_read_goes_first() -> io::Result<()> {
        let (mut client, mut server, copying) = joined(b"a long ").await?;
        client.write_all(b"question").await?;
        client.shutdown().await?;
        let mut question = String::new();
        server.read_to_string(&mut question).await?;
        assert_eq!(question, "a long question");
        server.write_all(b"answer").await?;
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await?;
        assert_eq!(answer, "answer");
        assert_eq!(copying.await?.1, (15, 6));
        // Both pipes have come back to this thread, the only one of this runtime.
        assert!(IDLE.with_borrow(|idle| (1..=2).contains(&idle.len())));
        Ok(())
    }

    #[tokio::test]
    async fn who_breaks_it_is_blamed() -> io::Result<()> {
        for (server_breaks, kind) in [(false, Kind::DownstreamReset), (true, Kind::UpstreamReset)] {
            let (client, server, copying) = joined(b"").await?;
            let (breaking, mut waiting) = if server_breaks { (server, client) } else { (client, server) };
            breaking.set_zero_linger()?;
            drop(breaking);
            assert_eq!(copying.await?.0.map_err(|error| error.kind), Err(kind));
            assert!(matches!(waiting.read(&mut [0; 1]).await, Ok(0) | Err(_)));
        }
        Ok(())
    }

    #[tokio::test]
    async fn what_is_sent_as_urgent_holds_nothing_up() -> io::Result<()> {
        let (client, mut server, copying) = joined(b"").await?;
        let mut heard = [0; 6];
        SockRef::from(&client).send(b"before")?;
        server.read_exact(&mut heard).await?;
        SockRef::from(&client).send_out_of_band(b"!")?;
        let (mut read, mut write) = client.into_split();
        write.write_all(b"after ").await?;
        let mut all = Vec::new();
        // The urgent byte itself is passed over, as read(2) has it.
        server.read_exact(&mut heard).await?;
        all.extend(heard);
        write.write_all(b"and more").await?;
        write.shutdown().await?;
        server.read_to_end(&mut all).await?;
        assert_eq!(String::from_utf8_lossy(&all), "after and more");
        server.shutdown().await?;
        assert_eq!(read.read(&mut [0; 1]).await?, 0);
        assert_eq!(copying.await?.1, (20, 0));
        Ok(())
    }

    #[tokio::test]
    async fn bytes_move_without_a_pipe_too() -> io::Result<()> {
        let ((mut client, from), (to, mut server)) = tokio::try_join!(pair(), pair())?;
        let mut carrier = Carrier { pipe: None, buffer: vec![0; 4], by_pipe: false };
        client.write_all(b"sixteen bytes...").await?;
        let (mut moved, mut heard) = (0, [0; 16]);
        while moved < 16 {
            from.readable().await?;
            let Ok(filled) = carrier.fill(&from) else { continue };
            carrier.empty(&to, filled).await?;
            moved += filled.bytes;
        }
        server.read_exact(&mut heard).await?;
        assert_eq!(&heard, b"sixteen bytes...");
        Ok(())
    }
}
