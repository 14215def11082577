//! What the programs of `bench-app` say, and how figures of many become one.
//!
//! Promises: types that both the programs in the pods and the benchmarks that start them know. Tested below, and in
//! `tests/benchmarks.rs`.

use serde::{Deserialize, Serialize};

/// What a client that made short connections has done.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Connected {
    /// Connections made, answered and closed. One that failed ends the client, and is no figure.
    pub connections: u64,
    /// From the first to the last.
    pub seconds: f64,
}

/// What a client that sent bytes back and forth on one connection has seen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Pinged {
    /// Bytes that came back.
    pub count: u64,
    /// Half came back within so many microseconds.
    pub p50_us: f64,
    /// And 99 of a hundred within so many.
    pub p99_us: f64,
}

/// What a client that asked again and again has seen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    /// Answers. One that was not right ends the client, and is no figure.
    pub count: u64,
    /// From the first to the last.
    pub seconds: f64,
    /// Half were there within so many microseconds.
    pub p50_us: f64,
    /// And 99 of a hundred within so many.
    pub p99_us: f64,
}

impl Asked {
    /// Of answers that took so many microseconds each.
    pub fn new(took: &[f64], seconds: f64) -> Self {
        let count = took.len() as u64;
        Self { count, seconds, p50_us: percentile(took, 0.5), p99_us: percentile(took, 0.99) }
    }

    /// Answers a second.
    pub fn per_second(&self) -> f64 {
        self.count as f64 / self.seconds
    }
}

/// What a client that sent as much as it could has sent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sent {
    /// Bytes that the other end has taken, every one.
    pub bytes: u64,
    /// From the first to the last.
    pub seconds: f64,
}

/// The value below which so much (0 to 1) of all values are; 0 where there are none.
pub fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(at.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or_default()
}

/// The value in the middle, or between the two in the middle; 0 where there are none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.get(middle) {
        None => 0.0,
        Some(upper) if sorted.len() % 2 == 1 => *upper,
        Some(upper) => f64::midpoint(sorted[middle - 1], *upper),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::float_cmp, reason = "each is one of the values, or exactly between two")]
    fn the_middle_and_the_tail() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!((percentile(&hundred, 0.5), percentile(&hundred, 0.99)), (50.0, 99.0));
        assert_eq!((percentile(&[7.0], 0.99), percentile(&[], 0.99)), (7.0, 0.0));
    }
}
