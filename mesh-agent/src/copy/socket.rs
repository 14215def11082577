//! The socket below TLS: read in large pieces, and no more of it in one go than others can wait for.
//!
//! rustls reads 4 KiB at a time, so that each full record would take five system calls. Promises: whatever the reader asks for,
//! the socket is asked for much; what waits for bytes holds no buffer; who always finds bytes lets others have their turn.
//! Tested below.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{
    buffer::{Buffer, Size},
    turn::Turn,
};

/// A connection whose bytes are read by TLS.
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    /// Read of the socket, not yet by the reader; and how much of that the reader has.
    ahead: Option<(Buffer, usize)>,
    turn: Turn,
}

impl Socket {
    /// Of a connection that nobody has read of.
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, ahead: None, turn: Turn::default() }
    }

    /// Hands on what was read already, as far as there is room for it.
    fn hand_on(&mut self, into: &mut ReadBuf<'_>) {
        let Some((buffer, done)) = &mut self.ahead else { return };
        let rest = &buffer.filled()[*done..];
        let count = rest.len().min(into.remaining());
        into.put_slice(&rest[..count]);
        if count == rest.len() {
            self.ahead = None;
        } else {
            *done += count;
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.ahead.is_none() && into.remaining() > 0 {
            ready!(this.turn.poll(cx));
            let mut buffer = Buffer::take(Size::Medium);
            let mut space = ReadBuf::new(buffer.space());
            let polled = Pin::new(&mut this.stream).poll_read(cx, &mut space);
            let read = space.filled().len();
            if polled.is_pending() {
                this.turn.over();
            }
            ready!(polled)?;
            this.turn.took(read);
            buffer.fill(read);
            this.ahead = Some((buffer, 0));
        }
        this.hand_on(into);
        Poll::Ready(Ok(()))
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
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::{super::buffer, *};

    async fn pair() -> io::Result<(TcpStream, Socket)> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (peer, (accepted, _)) =
            tokio::try_join!(TcpStream::connect(listener.local_addr()?), listener.accept())?;
        Ok((peer, Socket::new(accepted)))
    }

    #[tokio::test]
    async fn all_that_has_come_is_read_at_once_and_handed_on_in_order() -> io::Result<()> {
        let (mut peer, mut socket) = pair().await?;
        let sent: Vec<u8> = (0..40_000_usize).map(|at| (at % 251) as u8).collect();
        peer.write_all(&sent).await?;
        let mut read = vec![socket.read_u8().await?];
        let nothing = socket.stream.try_read(&mut [0]).map_err(|error| error.kind());
        assert_eq!(nothing, Err(io::ErrorKind::WouldBlock));
        assert_eq!(buffer::lent(), [0, 1, 0]);
        for size in [1, 4096, 100, 30_000, 5_000, 802] {
            let mut piece = vec![0; size];
            socket.read_exact(&mut piece).await?;
            read.extend(piece);
        }
        assert!(read == sent);
        assert_eq!(buffer::lent(), [0; 3]);
        drop(peer);
        assert_eq!(socket.read(&mut [0; 9]).await?, 0);
        Ok(())
    }

    #[tokio::test]
    async fn who_waits_holds_no_buffer() -> io::Result<()> {
        let (mut peer, mut socket) = pair().await?;
        let reading = tokio::spawn(async move {
            let byte = socket.read_u8().await;
            (byte, socket.read(&mut []).await)
        });
        tokio::task::yield_now().await;
        assert_eq!(buffer::lent(), [0; 3]);
        peer.write_u8(7).await?;
        let (byte, nothing) = reading.await?;
        assert_eq!((byte?, nothing?), (7, 0));
        Ok(())
    }
}
