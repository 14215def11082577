//! The bytes that large transfers are made of.
//!
//! Promises: a block that is lost, repeated or out of place is noticed; making and checking them costs a comparison
//! of memory, so that gibibytes pass in the time of a debug build. Tested below.

/// The pattern repeats after this many bytes, but for the number each block begins with.
const BLOCK: u64 = 64 * 1024;
/// Bytes of a block's number.
const NUMBER: u64 = 8;

/// A byte that depends on all of its position, so that nothing can be swapped unnoticed.
pub fn pattern(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// The lab's pattern for large bodies, from any position on: blocks of 64 KiB, each with its number at its start.
#[derive(Debug)]
pub struct Pattern {
    block: Vec<u8>,
    at: u64,
    intact: bool,
}

impl Default for Pattern {
    fn default() -> Self {
        Self { block: (0..BLOCK).map(pattern).collect(), at: 0, intact: true }
    }
}

impl Pattern {
    /// How many bytes were made or checked.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Whether all bytes checked so far were the pattern.
    pub fn intact(&self) -> bool {
        self.intact
    }

    /// The next bytes of the pattern: `limit` at most, at least one if that is not 0.
    pub fn next(&mut self, limit: u64) -> &[u8] {
        let from = self.at % BLOCK;
        if from < NUMBER {
            let number = (self.at / BLOCK).to_be_bytes();
            self.block[..number.len()].copy_from_slice(&number);
        }
        let to = from + limit.min(BLOCK - from);
        self.at += to - from;
        &self.block[from as usize..to as usize]
    }

    /// Checks the next bytes.
    pub fn check(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let expected = self.next(bytes.len() as u64);
            let (now, rest) = bytes.split_at(expected.len());
            let same = now == expected;
            self.intact &= same;
            bytes = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_repeated_or_changed_is_noticed() {
        let mut made = Vec::new();
        let mut source = Pattern::default();
        while source.at() < 3 * BLOCK + 5 {
            let more = source.next((3 * BLOCK + 5 - source.at()).min(1000)).to_vec();
            made.extend(more);
        }
        let intact = |bytes: &[u8]| {
            let mut pattern = Pattern::default();
            bytes.chunks(777).for_each(|chunk| pattern.check(chunk));
            pattern.intact() && pattern.at() == bytes.len() as u64
        };
        let block = BLOCK as usize;
        assert!(intact(&made));
        assert!(!intact(&made[block..]), "the first block is missing");
        assert!(!intact(&[&made[..block], &made[..block]].concat()), "a block came twice");
        made[block + 9] ^= 1;
        assert!(!intact(&made));
    }
}
