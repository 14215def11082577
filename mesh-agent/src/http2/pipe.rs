//! A body onto a stream: no more of it is taken than the peer has room for.
//!
//! At most one frame waits here. A body that breaks off resets the stream with the code it was given; a stream that
//! is reset drops the body, which tells whoever feeds it. Tested in `tests.rs` beside it.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use crate::body::Breaking;
use bytes::Bytes;
use h2::{Reason, SendStream};

/// Sends a body; completes when all of it is queued, or when the stream has ended otherwise.
pub(super) struct Pipe<B> {
    body: B,
    stream: SendStream<Bytes>,
    /// Taken from the body, not yet sent.
    waiting: Bytes,
}

/// Why a body was not sent to its end.
#[derive(Debug)]
pub(super) enum Broken {
    /// The peer reset the stream, or the connection ended.
    Stream,
    /// The body broke off; the stream was reset.
    Body,
}

impl<B> Pipe<B>
where
    B: Breaking,
{
    pub fn new(body: B, stream: SendStream<Bytes>) -> Self {
        Self { body, stream, waiting: Bytes::new() }
    }

    /// Ends the stream in the middle.
    pub fn reset(&mut self, reason: Reason) {
        self.stream.send_reset(reason);
    }

    /// Sends what waits, as the peer makes room for it; `true` when that was the end of the body.
    fn poll_waiting(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Broken>> {
        while !self.waiting.is_empty() {
            self.stream.reserve_capacity(self.waiting.len());
            while self.stream.capacity() == 0 {
                match ready!(self.stream.poll_capacity(cx)) {
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return Poll::Ready(Err(Broken::Stream)),
                }
            }
            let room = self.stream.capacity().min(self.waiting.len());
            let data = self.waiting.split_to(room);
            let last = self.waiting.is_empty() && self.body.is_end_stream();
            self.stream.send_data(data, last).map_err(|_| Broken::Stream)?;
            if last {
                return Poll::Ready(Ok(true));
            }
        }
        Poll::Ready(Ok(false))
    }
}

impl<B> Future for Pipe<B>
where
    B: Breaking,
{
    type Output = Result<(), Broken>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            // Asked first, so that a reset is noticed while there is nothing to send.
            if this.stream.poll_reset(cx).is_ready() {
                return Poll::Ready(Err(Broken::Stream));
            }
            let Poll::Ready(waiting) = this.poll_waiting(cx) else {
                // A peer that takes nothing does not put that off.
                return this.body.poll_broken(cx).map(|error| {
                    this.stream.send_reset(error.reason());
                    Err(Broken::Body)
                });
            };
            if waiting? {
                return Poll::Ready(Ok(()));
            }
            let frame = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => {
                    this.stream.send_reset(error.reason());
                    return Poll::Ready(Err(Broken::Body));
                }
                None => {
                    let ended = this.stream.send_data(Bytes::new(), true);
                    return Poll::Ready(ended.map_err(|_| Broken::Stream));
                }
            };
            match frame.into_data() {
                Ok(data) => this.waiting = data,
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    let ended = this.stream.send_trailers(trailers);
                    return Poll::Ready(ended.map_err(|_| Broken::Stream));
                }
            }
            if this.waiting.is_empty() && this.body.is_end_stream() {
                let ended = this.stream.send_data(Bytes::new(), true);
                return Poll::Ready(ended.map_err(|_| Broken::Stream));
            }
        }
    }
}
