//! Bytes from one stream to another, both ways, each way to its own end.
//!
//! Promises: an end of file is handed on as a half-close and never ends the other direction; a reset or error of
//! either stream ends both. A direction has a buffer only while it has bytes: an idle connection holds none. Tested
//! below over in-memory pipes, and end to end in `tests/tests/`.

mod buffer;
mod coalesced;
mod socket;
mod splice;
mod turn;

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use self::buffer::{Buffer, Size};
pub use self::{coalesced::Coalesced, socket::Socket, splice::between_sockets, turn::Turn};
use crate::error::{Error, Kind, Result};

/// Bytes that have to have passed before large buffers are used (ztunnel's).
const LARGE_AFTER: u64 = 10 << 20;

/// Bytes moved so far, readable while the copy runs.
#[derive(Debug, Default)]
pub struct Moved {
    /// From the first stream (the client) to the second.
    pub sent: AtomicU64,
    /// From the second stream (the server) to the first.
    pub received: AtomicU64,
}

impl Moved {
    /// Both counts: sent to the server, received from it.
    pub fn get(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }
}

/// Copies both ways until both ends have closed.
///
/// # Errors
/// [`Kind::DownstreamReset`] when the client's stream broke, [`Kind::UpstreamReset`] when the server's did.
pub async fn both_ways<A, B>(mut client: A, mut server: B, moved: &Moved) -> Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut there, mut back) = (Way::default(), Way::default());
    poll_fn(|cx| {
        let sent = there.poll(&mut client, &mut server, &moved.sent, [client_broke, server_broke], cx)?;
        let received =
            back.poll(&mut server, &mut client, &moved.received, [server_broke, client_broke], cx)?;
        if sent.is_ready() && received.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
}

fn client_broke(error: &io::Error) -> Error {
    Error::new(Kind::DownstreamReset, format!("the client broke the connection: {error}"))
}

fn server_broke(error: &io::Error) -> Error {
    Error::new(Kind::UpstreamReset, format!("the server broke the connection: {error}"))
}

/// What a failure means: that of the stream read from, that of the stream written to.
type Blame = [fn(&io::Error) -> Error; 2];

/// One direction, which knows neither of its streams: the other direction has the same.
#[derive(Debug, Default)]
struct Way {
    doing: Doing,
    turn: Turn,
    /// Bytes that were moved.
    total: u64,
    /// Whether large buffers are of use.
    much: bool,
}

/// What a direction is about.
#[derive(Debug, Default)]
enum Doing {
    /// Waits for bytes.
    #[default]
    Reading,
    /// Has bytes, not all of which are written.
    Writing(Buffer),
    /// Has written so many.
    Flushing(usize),
    /// Hands on the end.
    Closing,
    /// Has nothing more to do.
    Done,
}

impl Way {
    /// Moves what there is; ready when the end was handed on.
    fn poll<R, W>(
        &mut self,
        from: &mut R,
        to: &mut W,
        moved: &AtomicU64,
        blame: Blame,
        cx: &mut Context<'_>,
    ) -> Poll<Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let [reading, writing] = blame;
        loop {
            self.doing = match &mut self.doing {
                Doing::Reading => {
                    ready!(self.turn.poll(cx));
                    let size = if self.much { Size::Large } else { Size::Small };
                    match ready!(poll_read(from, size, cx)).map_err(|error| reading(&error))? {
                        Some(buffer) => Doing::Writing(buffer),
                        None => Doing::Closing,
                    }
                }
                Doing::Writing(buffer) => {
                    ready!(buffer.poll_write_to(to, cx)).map_err(|error| writing(&error))?;
                    Doing::Flushing(buffer.filled().len())
                }
                Doing::Flushing(written) => {
                    ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(|error| writing(&error))?;
                    self.turn.took(*written);
                    self.total += *written as u64;
                    moved.store(self.total, Ordering::Relaxed);
                    self.much = self.total >= LARGE_AFTER && *written >= Size::Small.bytes();
                    Doing::Reading
                }
                Doing::Closing => match ready!(Pin::new(&mut *to).poll_shutdown(cx)) {
                    // A peer that has already gone cannot be told that we are done; its own direction reports the failure.
                    Err(error) if !is_gone(&error) => return Poll::Ready(Err(writing(&error))),
                    _ => Doing::Done,
                },
                Doing::Done => return Poll::Ready(Ok(())),
            };
        }
    }
}

/// Reads into a buffer that is there only once there is something to read; `None` at the end of file.
fn poll_read<R: AsyncRead + Unpin>(
    from: &mut R,
    size: Size,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Option<Buffer>>> {
    let mut buffer = Buffer::take(size);
    let mut space = ReadBuf::new(buffer.space());
    ready!(Pin::new(from).poll_read(cx, &mut space))?;
    let read = space.filled().len();
    buffer.fill(read);
    Poll::Ready(Ok((read > 0).then_some(buffer)))
}

/// Whether the peer has closed its stream, as an app does that has said and heard all.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotConnected | io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    #[tokio::test]
    async fn who_breaks_it_is_blamed() -> io::Result<()> {
        for (server_breaks, kind) in [(false, Kind::DownstreamReset), (true, Kind::UpstreamReset)] {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let (breaking, (broken, _)) =
                tokio::try_join!(TcpStream::connect(listener.local_addr()?), listener.accept())?;
            breaking.set_zero_linger()?;
            drop(breaking);
            let (_app, waiting) = tokio::io::duplex(64);
            let moved = Moved::default();
            let ended = if server_breaks {
                both_ways(waiting, broken, &moved).await
            } else {
                both_ways(broken, waiting, &moved).await
            };
            assert_eq!(ended.map_err(|error| error.kind), Err(kind));
        }
        Ok(())
    }

    #[tokio::test]
    async fn half_close_leaves_the_other_direction_open() -> io::Result<()> {
        let (mut client, client_side) = tokio::io::duplex(64);
        let (mut server, server_side) = tokio::io::duplex(64);
        let copying = tokio::spawn(async move {
            let moved = Moved::default();
            both_ways(client_side, server_side, &moved).await.map(|()| moved.get())
        });
        client.write_all(b"question").await?;
        client.shutdown().await?;
        let mut question = String::new();
        server.read_to_string(&mut question).await?;
        assert_eq!(question, "question");
        // All of them have come back to this thread, the only one of this runtime, though the streams are open.
        tokio::task::yield_now().await;
        assert_eq!((buffer::lent(), buffer::kept()), ([0; 2], [1, 0]));
        server.write_all(b"a longer answer").await?;
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await?;
        assert_eq!(answer, "a longer answer");
        assert_eq!(copying.await?.map_err(io::Error::other)?, (8, 15));
        Ok(())
    }

    #[tokio::test]
    async fn every_byte_arrives_whatever_the_buffer() -> io::Result<()> {
        const SIZE: usize = 11 << 20;
        let (mut client, client_side) = tokio::io::duplex(1 << 16);
        let (server, server_side) = tokio::io::duplex(1 << 16);
        let copying = tokio::spawn(async move {
            let moved = Moved::default();
            both_ways(client_side, server_side, &moved).await.map(|()| moved.get())
        });
        let (mut server_read, mut server_write) = tokio::io::split(server);
        let reading = tokio::spawn(async move {
            let mut all = Vec::new();
            server_read.read_to_end(&mut all).await.map(|_| all)
        });
        let sent: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8).collect();
        client.write_all(&sent).await?;
        client.shutdown().await?;
        assert!(reading.await?? == sent);
        server_write.shutdown().await?;
        assert_eq!(copying.await?.map_err(io::Error::other)?, (SIZE as u64, 0));
        Ok(())
    }
}
