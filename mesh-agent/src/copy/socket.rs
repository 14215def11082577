//! The socket below TLS, of which no more is read in one go than others can wait for.
//!
//! Promises that who always finds bytes lets the others of its thread have their turn. Nothing else: reading more at a time than
//! rustls asks for (4 KiB) and handing it on was measured, and cost more than the system calls it saved. Tested below.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::turn::Turn;

/// A connection whose bytes are read by TLS.
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    turn: Turn,
}

impl Socket {
    /// Of a connection.
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, turn: Turn::default() }
    }

    /// The connection itself.
    pub const fn stream(&self) -> &TcpStream {
        &self.stream
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.turn.poll(cx));
        let before = into.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, into);
        if polled.is_pending() {
            this.turn.over();
        }
        this.turn.took(into.filled().len() - before);
        polled
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::{io::AsyncWriteExt, net::TcpListener};

    use super::*;

    #[tokio::test]
    async fn others_have_their_turn_though_there_is_always_more_to_read() -> io::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (mut peer, (accepted, _)) =
            tokio::try_join!(TcpStream::connect(listener.local_addr()?), listener.accept())?;
        let mut socket = Socket::new(accepted);
        let (mut piece, mut read, mut turns) = (vec![0; 4096], 0, 0);
        while read < 600 << 10 {
            peer.write_all(&[7; 4096]).await?;
            assert_eq!(socket.stream.peek(&mut [0]).await?, 1);
            let polled = poll_fn(|cx| {
                let mut into = ReadBuf::new(&mut piece);
                let polled = Pin::new(&mut socket).poll_read(cx, &mut into);
                Poll::Ready((polled, into.filled().len()))
            });
            // The runtime would have it pause by itself, by the number of its reads.
            match tokio::task::unconstrained(polled).await {
                (Poll::Ready(result), count) => result.map(|()| read += count)?,
                (Poll::Pending, _) => turns += 1,
            }
        }
        assert_eq!(turns, 2);
        Ok(())
    }
}
