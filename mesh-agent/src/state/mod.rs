//! Configuration: what users write ([`resource`]), how it is compiled ([`compile`], pure), and the immutable
//! result the path reads ([`snapshot`]).
//!
//! Never does I/O. Tested by tables of YAML in the unit tests of each file.

pub mod compile;
pub mod defaults;
mod problem;
pub mod resource;
pub mod snapshot;

pub use problem::{Cause, Problem};
