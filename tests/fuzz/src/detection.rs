//! Judging the first bytes of a client: what is decided on some bytes stays decided, whatever follows.

use mesh_agent::detect::{Verdict, judge};

/// The first two bytes say where the rest is cut; every verdict on a start must be the verdict on the whole.
///
/// # Panics
/// Where what the module promises does not hold.
pub fn run(input: &[u8]) {
    let Some((cut, bytes)) = input.split_at_checked(2) else { return };
    let cut = usize::from(u16::from_be_bytes([cut[0], cut[1]])).min(bytes.len());
    let whole = judge(bytes);
    for end in (cut..bytes.len().min(cut + 8)).chain(0..bytes.len().min(64)) {
        let start = judge(&bytes[..end]);
        assert!(
            start == Verdict::Undecided || start == whole,
            "{start:?} on {end} bytes, {whole:?} on all {}",
            bytes.len()
        );
    }
}
