//! What the kernel programs and the agent share: map layouts (`maps`), addresses (`addr`), flow records (`flow`)
//! and the pure capture decisions (`decide`), which run as the same code in the kernel and in host tests.
//!
//! Never allocates, never panics, never touches the kernel itself. Tested by its own unit tests.
#![no_std]
#![expect(
    clippy::inline_always,
    reason = "a function of the kernel programs must be part of its caller: its arguments may be on the caller's stack"
)]

#[cfg(test)]
extern crate std;

pub mod addr;
pub mod decide;
pub mod flow;
pub mod maps;
