//! The byte stream of a CONNECT, which ends as TCP ends.
//!
//! `END_STREAM` is FIN and is sent by `shutdown` alone; a stream dropped before that is reset with `CONNECT_ERROR`
//! (RFC 9113, section 8.5: what a proxy's TCP error is), and a reset is an error to whoever reads: half a transfer
//! never passes for a whole one. Tested in `tunnel/tests`.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::OwnedSemaphorePermit,
};

/// The bytes of one CONNECT stream, at either end.
pub struct ByteStream {
    send: SendStream<Bytes>,
    receive: RecvStream,
    /// Received, not yet read; its flow-control window is given back as it is read.
    unread: Bytes,
    finished: bool,
    /// Its place on the connection, at the dialling end.
    _place: Option<OwnedSemaphorePermit>,
}

impl ByteStream {
    /// Both directions of an open stream; `place` is held until the end of it.
    pub fn new(send: SendStream<Bytes>, receive: RecvStream, place: Option<OwnedSemaphorePermit>) -> Self {
        Self { send, receive, unread: Bytes::new(), finished: false, _place: place }
    }
}

impl std::fmt::Debug for ByteStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ByteStream").field("id", &self.send.stream_id()).finish_non_exhaustive()
    }
}

fn reset(error: h2::Error) -> io::Error {
    if error.is_io() {
        return error.into_io().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into());
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

impl AsyncRead for ByteStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.unread.is_empty() {
            match ready!(this.receive.poll_data(cx)) {
                None => return Poll::Ready(Ok(())),
                Some(Ok(data)) => this.unread = data,
                Some(Err(error)) => return Poll::Ready(Err(reset(error))),
            }
        }
        let count = this.unread.len().min(buffer.remaining());
        buffer.put_slice(&this.unread[..count]);
        this.unread.advance(count);
        this.receive.flow_control().release_capacity(count).map_err(reset)?;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ByteStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        // Reserved only while there is something to send: an idle stream holds none of the connection's window.
        this.send.reserve_capacity(data.len());
        while this.send.capacity() == 0 {
            match ready!(this.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(reset(error))),
                None => return Poll::Ready(Err(this.why_closed(cx))),
            }
        }
        let count = this.send.capacity().min(data.len());
        this.send.send_data(Bytes::copy_from_slice(&data[..count]), false).map_err(reset)?;
        Poll::Ready(Ok(count))
    }

    /// h2 sends by itself; nothing is kept back here.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.finished {
            this.finished = true;
            // A stream that the peer has closed needs no end; how it was closed is told to whoever reads.
            let closed = |error| io::Error::new(io::ErrorKind::NotConnected, error);
            this.send.send_data(Bytes::new(), true).map_err(closed)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl ByteStream {
    fn why_closed(&mut self, cx: &mut Context<'_>) -> io::Error {
        match self.send.poll_reset(cx) {
            Poll::Ready(Ok(reason)) => reset(reason.into()),
            Poll::Ready(Err(error)) => reset(error),
            Poll::Pending => io::ErrorKind::BrokenPipe.into(),
        }
    }
}

impl Drop for ByteStream {
    fn drop(&mut self) {
        if !self.finished {
            self.send.send_reset(Reason::CONNECT_ERROR);
        }
    }
}
