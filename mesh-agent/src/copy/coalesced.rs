//! What HTTP/2 writes, gathered: frames of many streams go out as one TLS record and one system call.
//!
//! h2 writes and flushes after each frame that carries data. Promises: what is written goes out, in its order, once whoever
//! writes has nothing more to write and everything else that was ready on its thread has run; sooner where a whole record's
//! worth, or [`MOST`] frames, have gathered. Never keeps a buffer when all is written. For connections whose owner is polled
//! by a task until they end, as h2's are. Tested below.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::buffer::{Buffer, Size};

/// Flushes that may be put off one after the other: frames that are small and never end go out all the same.
const MOST: u8 = 64;

/// A connection whose writes are gathered.
#[derive(Debug)]
pub struct Coalesced<S: AsyncWrite + Unpin> {
    io: S,
    /// Gathered, and not all written.
    held: Option<Buffer>,
    /// Whether anything was gathered since the last flush.
    appended: bool,
    /// Flushes that were put off.
    put_off: u8,
}

impl<S: AsyncWrite + Unpin> Coalesced<S> {
    /// Of a connection with nothing to write yet.
    pub fn new(io: S) -> Self {
        Self { io, held: None, appended: false, put_off: 0 }
    }

    /// Writes what is gathered.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(buffer) = &mut self.held {
            ready!(buffer.poll_write_to(&mut self.io, cx))?;
            self.held = None;
        }
        (self.appended, self.put_off) = (false, 0);
        Poll::Ready(Ok(()))
    }

    /// Whether the next piece of this length does as well by itself: a copy would only cost.
    fn goes_directly(&self, bytes: usize) -> bool {
        self.held.is_none() && bytes >= Size::Small.bytes() / 2
    }

    /// Room for more, after what is gathered went out where there is none.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<&mut Buffer>> {
        if self.held.as_ref().is_some_and(|buffer| buffer.room() == 0) {
            ready!(self.poll_drain(cx))?;
        }
        self.appended = true;
        Poll::Ready(Ok(self.held.get_or_insert_with(|| Buffer::take(Size::Small))))
    }
}

impl<S: AsyncWrite + AsyncRead + Unpin> AsyncRead for Coalesced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Coalesced<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.goes_directly(data.len()) {
            return Pin::new(&mut self.io).poll_write(cx, data);
        }
        Poll::Ready(Ok(ready!(self.poll_room(cx))?.append(data)))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.goes_directly(data.iter().map(|piece| piece.len()).sum()) {
            return Pin::new(&mut self.io).poll_write_vectored(cx, data);
        }
        let buffer = ready!(self.poll_room(cx))?;
        Poll::Ready(Ok(data.iter().map(|piece| buffer.append(piece)).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.appended && self.put_off < MOST {
            self.appended = false;
            self.put_off += 1;
            // The owner is polled once more, behind whatever is ready now, and flushes then in earnest.
            cx.waker().wake_by_ref();
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Who drops it in the belief that all is flushed is not to be disappointed, as far as the peer takes it at once.
impl<S: AsyncWrite + Unpin> Drop for Coalesced<S> {
    fn drop(&mut self) {
        if self.held.is_some() {
            let mut cx = Context::from_waker(Waker::noop());
            if self.poll_drain(&mut cx).is_ready() {
                let _ = Pin::new(&mut self.io).poll_flush(&mut cx);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::{
            Mutex,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::{super::buffer, *};

    /// Takes down what is written with each call, as far as it takes it.
    #[derive(Debug, Default)]
    struct Written<'a> {
        calls: Option<&'a Mutex<Vec<Vec<u8>>>>,
        most: usize,
    }

    impl AsyncWrite for Written<'_> {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
            let count = data.len().min(self.most);
            if let Some(mut calls) = self.calls.and_then(|calls| calls.lock().ok()) {
                calls.push(data[..count].to_vec());
            }
            Poll::Ready(Ok(count))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn taken(calls: &Mutex<Vec<Vec<u8>>>) -> Vec<Vec<u8>> {
        calls.lock().map(|mut calls| std::mem::take(&mut *calls)).unwrap_or_default()
    }

    #[tokio::test]
    async fn frames_go_out_together_once_others_have_run() -> io::Result<()> {
        let calls = Mutex::default();
        let mut io = Coalesced::new(Written { calls: Some(&calls), most: usize::MAX });
        let (mut polls, mut other) = (0, None);
        poll_fn(|cx| {
            polls += 1;
            let mut io = Pin::new(&mut io);
            if polls == 1 {
                other = Some(tokio::spawn(async {}));
                for frame in [&b"one"[..], b"two", b"three"] {
                    assert!(matches!(io.as_mut().poll_write(cx, frame), Poll::Ready(Ok(_))));
                    assert!(io.as_mut().poll_flush(cx).is_ready());
                }
                assert!(taken(&calls).is_empty());
                return Poll::Pending;
            }
            // Woken by nobody else.
            assert!(other.take().is_some_and(|other| other.is_finished()));
            io.poll_flush(cx)
        })
        .await?;
        assert_eq!((polls, taken(&calls)), (2, vec![b"onetwothree".to_vec()]));
        assert_eq!(buffer::lent(), [0; 2]);
        Ok(())
    }

    #[tokio::test]
    async fn a_whole_record_goes_out_at_once_and_much_is_not_copied() -> io::Result<()> {
        let calls = Mutex::default();
        let mut io = Coalesced::new(Written { calls: Some(&calls), most: usize::MAX });
        let large = vec![1; 8 << 10];
        io.write_all(&large).await?;
        assert!(taken(&calls) == std::slice::from_ref(&large));
        io.write_all(b"head").await?;
        let taken_of_both = io.write_vectored(&[IoSlice::new(&large), IoSlice::new(&large)]).await?;
        assert_eq!(taken_of_both, (16 << 10) - b"head".len());
        assert!(taken(&calls).is_empty());
        io.write_all(b"next").await?;
        assert_eq!(taken(&calls).concat().len(), 16 << 10);
        io.shutdown().await?;
        assert_eq!(taken(&calls), [b"next"]);
        Ok(())
    }

    #[tokio::test]
    async fn small_frames_without_end_are_not_put_off_without_end() -> io::Result<()> {
        let calls = Mutex::default();
        let mut io = Coalesced::new(Written { calls: Some(&calls), most: usize::MAX });
        for _ in 0..=MOST {
            assert!(taken(&calls).is_empty());
            io.write_all(b".").await?;
            io.flush().await?;
        }
        assert_eq!(taken(&calls).concat().len(), usize::from(MOST) + 1);
        Ok(())
    }

    #[tokio::test]
    async fn whatever_the_peer_takes_at_a_time_all_arrives_in_order() -> io::Result<()> {
        let calls = Mutex::default();
        let mut io = Coalesced::new(Written { calls: Some(&calls), most: 7 });
        let sent: Vec<u8> = (0..50_000_usize).map(|at| (at % 251) as u8).collect();
        for piece in sent.chunks(900) {
            io.write_all(piece).await?;
            io.flush().await?;
        }
        drop(io);
        assert!(taken(&calls).concat() == sent);
        Ok(())
    }

    #[tokio::test]
    async fn what_was_flushed_arrives_though_it_is_dropped() -> io::Result<()> {
        let (near, mut far) = tokio::io::duplex(64);
        let mut io = Coalesced::new(near);
        io.write_all(b"goodbye").await?;
        io.flush().await?;
        drop(io);
        let mut read = String::new();
        far.read_to_string(&mut read).await?;
        assert_eq!(read, "goodbye");
        // A peer that takes no more keeps nobody.
        let mut io = Coalesced::new(Written { calls: None, most: 0 });
        io.write_all(b"lost").await?;
        drop(io);
        assert_eq!(buffer::lent(), [0; 2]);
        Ok(())
    }

    /// Counts what is written in how many calls.
    struct Counted<'a>(tokio::io::DuplexStream, &'a AtomicUsize);

    impl AsyncRead for Counted<'_> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            into: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, into)
        }
    }

    impl AsyncWrite for Counted<'_> {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            data: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.1.fetch_add(1, Ordering::Relaxed);
            Pin::new(&mut self.0).poll_write(cx, data)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    /// The responses of 32 streams, of 1 KiB each, that are there at once.
    #[tokio::test]
    async fn responses_of_many_streams_share_their_writes() -> Result<(), h2::Error> {
        let (near, far) = tokio::io::duplex(1 << 20);
        let written = AtomicUsize::new(0);
        let serving = async {
            let mut connection = h2::server::handshake(Coalesced::new(Counted(far, &written))).await?;
            let mut replies = Vec::new();
            while let Some(accepted) = connection.accept().await {
                replies.push(accepted?.1);
                if replies.len() < 32 {
                    continue;
                }
                written.store(0, Ordering::Relaxed);
                for mut reply in replies.drain(..) {
                    let mut body = reply.send_response(http::Response::new(()), false)?;
                    body.send_data(vec![0; 1024].into(), true)?;
                }
            }
            Ok::<_, h2::Error>(written.load(Ordering::Relaxed))
        };
        let asking = async {
            let (sender, connection) = h2::client::handshake(near).await?;
            tokio::spawn(connection);
            let mut sender = sender.ready().await?;
            let mut responses = Vec::new();
            for _ in 0..32 {
                responses.push(sender.send_request(http::Request::new(()), true)?.0);
            }
            for response in responses {
                let mut body = response.await?.into_body();
                assert_eq!(body.data().await.transpose()?.map(|data| data.len()), Some(1024));
            }
            Ok(())
        };
        let (writes, ()) = tokio::try_join!(serving, asking)?;
        // 33 KiB, and what a connection says when it ends: each would be one by itself otherwise.
        assert!((1..=8).contains(&writes), "{writes} writes");
        Ok(())
    }
}
