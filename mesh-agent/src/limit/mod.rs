//! What a pod's port takes of requests: rate limits and adaptive concurrency.
//!
//! Promises that no request waits for another to be asked about: what is remembered is kept in atomics, and reading takes no
//! lock. Tested in each file; in the lab by `tests/tests/rate_limits.rs` and `adaptive_concurrency.rs`.

pub mod concurrency;
pub mod rate;
