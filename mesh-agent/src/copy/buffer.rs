//! Buffers for bytes on their way, borrowed from the thread.
//!
//! Promises: whoever waits for bytes holds no buffer, and whoever has some gets one without an allocation as a rule, for each
//! thread keeps a few. Never lends out what somebody else has written as if it had just been read. Tested below, and in
//! `copy.rs`.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::AsyncWrite;

/// How much a buffer takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    /// 16 KiB, what most of a TLS record holds: for nearly everything.
    Small,
    /// 256 KiB (ztunnel's largest): for who has moved much and goes on.
    Large,
}

impl Size {
    /// Its room.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Small => 16 << 10,
            Self::Large => 256 << 10,
        }
    }

    /// Empty ones that a thread keeps: beyond that they are freed.
    const fn kept(self) -> usize {
        match self {
            Self::Small => 8,
            Self::Large => 2,
        }
    }
}

/// A buffer; goes back to the thread that drops it.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    filled: usize,
    /// Of what it is filled with, how much somebody has taken.
    taken: usize,
    size: Size,
}

thread_local! {
    static KEPT: RefCell<[Vec<Vec<u8>>; 2]> = const { RefCell::new([const { Vec::new() }; 2]) };
}

impl Buffer {
    /// An empty one.
    pub fn take(size: Size) -> Self {
        #[cfg(test)]
        tests::LENT.with_borrow_mut(|lent| lent[size as usize] += 1);
        let kept = KEPT.with_borrow_mut(|kept| kept[size as usize].pop());
        Self { bytes: kept.unwrap_or_else(|| vec![0; size.bytes()]), filled: 0, taken: 0, size }
    }

    /// All of its room.
    pub fn space(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// So many bytes of it have been written.
    pub fn fill(&mut self, bytes: usize) {
        self.filled = bytes;
    }

    /// How much more it takes.
    pub fn room(&self) -> usize {
        self.bytes.len() - self.filled
    }

    /// Takes as much of this as there is room for, and tells how much that was.
    pub fn append(&mut self, data: &[u8]) -> usize {
        let count = data.len().min(self.room());
        self.bytes[self.filled..][..count].copy_from_slice(&data[..count]);
        self.filled += count;
        count
    }

    /// What has been written.
    pub fn filled(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }

    /// Writes all that it is filled with and that was not written before.
    pub fn poll_write_to<W>(&mut self, to: &mut W, cx: &mut Context<'_>) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        while self.taken < self.filled {
            match ready!(Pin::new(&mut *to).poll_write(cx, &self.bytes[self.taken..self.filled]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.taken += count,
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let (bytes, size) = (std::mem::take(&mut self.bytes), self.size);
        #[cfg(test)]
        tests::LENT.with_borrow_mut(|lent| lent[size as usize] -= 1);
        // A thread that ends keeps nothing.
        let _ = KEPT.try_with(|kept| {
            let kept = &mut kept.borrow_mut()[size as usize];
            if kept.len() < size.kept() {
                kept.push(bytes);
            }
        });
    }
}

#[cfg(test)]
pub(super) use tests::{kept, lent};

#[cfg(test)]
mod tests {
    use super::*;

    thread_local! {
        pub(super) static LENT: RefCell<[isize; 2]> = const { RefCell::new([0; 2]) };
    }

    /// How many of each size somebody has, of this thread: less than none where they came from another.
    pub fn lent() -> [isize; 2] {
        LENT.with_borrow(|lent| *lent)
    }

    /// How many of each size the thread keeps.
    pub fn kept() -> [usize; 2] {
        KEPT.with_borrow(|kept| kept.each_ref().map(Vec::len))
    }

    #[test]
    fn a_thread_keeps_few_and_lends_them_again() {
        assert_eq!(kept(), [0; 2]);
        let sizes = [Size::Small, Size::Large];
        let many: Vec<_> = sizes.into_iter().cycle().take(20).map(Buffer::take).collect();
        assert_eq!(lent(), [10; 2]);
        drop(many);
        let all = sizes.map(Size::kept);
        assert_eq!((lent(), kept()), ([0; 2], all));
        let mut again = Buffer::take(Size::Large);
        assert_eq!(kept(), [all[0], all[1] - 1]);
        assert_eq!((again.space().len(), again.filled()), (256 << 10, &[][..]));
        again.fill(3);
        assert_eq!((again.append(b"abc"), &again.filled()[3..]), (3, &b"abc"[..]));
        again.fill((256 << 10) - 1);
        assert_eq!((again.append(b"abc"), again.room()), (1, 0));
    }
}
