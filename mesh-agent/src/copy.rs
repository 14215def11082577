//! Bytes from one stream to another, both ways, each way to its own end.
//!
//! Promises: an end of file is handed on as a half-close and never ends the other direction; a reset or error of
//! either stream ends both. Buffers start small, so that an idle connection is cheap, and grow with use. Tested
//! below over in-memory pipes, and end to end in `tests/tests/`.

mod splice;

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub use self::splice::between_sockets;
use crate::error::{Error, Kind, Result};

/// Buffer sizes in bytes and the traffic after which the next is used: 1 KiB for what mostly waits, 16 KiB once
/// 128 KiB have passed, 256 KiB once 10 MiB have passed (ztunnel's steps).
const STEPS: [(usize, u64); 3] = [(1 << 10, 0), (16 << 10, 128 << 10), (256 << 10, 10 << 20)];

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
    let mut step = 0;
    let mut buffer = vec![0; STEPS[step].0];
    let mut total = 0;
    loop {
        let read = from.read(&mut buffer).await.map_err(|error| reading(&error))?;
        if read == 0 {
            // A peer that has already gone cannot be told that we are done; its own direction reports the failure.
            return match to.shutdown().await {
                Err(error) if is_gone(&error) => Ok(()),
                other => other.map_err(|error| writing(&error)),
            };
        }
        to.write_all(&buffer[..read]).await.map_err(|error| writing(&error))?;
        to.flush().await.map_err(|error| writing(&error))?;
        total += read as u64;
        moved.store(total, Ordering::Relaxed);
        if let Some((size, after)) = STEPS.get(step + 1)
            && total >= *after
        {
            step += 1;
            buffer = vec![0; *size];
        }
    }
}

/// Whether the peer has closed its stream, as an app does that has said and heard all.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotConnected | io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

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
        server.write_all(b"a longer answer").await?;
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await?;
        assert_eq!(answer, "a longer answer");
        assert_eq!(copying.await?.map_err(io::Error::other)?, (8, 15));
        Ok(())
    }

    #[tokio::test]
    async fn buffers_grow_and_every_byte_arrives() -> io::Result<()> {
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
