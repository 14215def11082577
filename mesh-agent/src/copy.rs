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

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use self::{
    buffer::{Buffer, Size},
    turn::Turn,
};
pub use self::{coalesced::Coalesced, socket::Socket, splice::between_sockets};
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
pub async fn both_ways<A, B>(client: A, server: B, moved: &Moved) -> Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (client_read, client_write) = tokio::io::split(client);
    let (server_read, server_write) = tokio::io::split(server);
    tokio::try_join!(
        one_way(client_read, server_write, &moved.sent, [client_broke, server_broke]),
        one_way(server_read, client_write, &moved.received, [server_broke, client_broke]),
    )?;
    Ok(())
}

fn client_broke(error: &io::Error) -> Error {
    Error::new(Kind::DownstreamReset, format!("the client broke the connection: {error}"))
}

fn server_broke(error: &io::Error) -> Error {
    Error::new(Kind::UpstreamReset, format!("the server broke the connection: {error}"))
}

/// What a failure means: that of the stream read from, that of the stream written to.
type Blame = [fn(&io::Error) -> Error; 2];

async fn one_way<R, W>(mut from: R, mut to: W, moved: &AtomicU64, blame: Blame) -> Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let [reading, writing] = blame;
    let (mut size, mut total, mut turn) = (Size::Small, 0, Turn::default());
    loop {
        poll_fn(|cx| turn.poll(cx)).await;
        let read = poll_fn(|cx| poll_read(&mut from, size, cx)).await.map_err(|error| reading(&error))?;
        let Some(buffer) = read else {
            // A peer that has already gone cannot be told that we are done; its own direction reports the failure.
            return match to.shutdown().await {
                Err(error) if is_gone(&error) => Ok(()),
                other => other.map_err(|error| writing(&error)),
            };
        };
        to.write_all(buffer.filled()).await.map_err(|error| writing(&error))?;
        to.flush().await.map_err(|error| writing(&error))?;
        turn.took(buffer.filled().len());
        total += buffer.filled().len() as u64;
        moved.store(total, Ordering::Relaxed);
        let much = total >= LARGE_AFTER && buffer.filled().len() >= Size::Small.bytes();
        size = if much { Size::Large } else { Size::Small };
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
        io::AsyncReadExt,
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
        assert_eq!((buffer::lent(), buffer::kept()), ([0; 3], [1, 0, 0]));
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
