//! Settings of the whole mesh that the path reads.

use clap::ValueEnum;

/// Istio's `pathNormalization`, each with all that the one before it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum PathNormalization {
    /// Nothing is changed.
    None,
    /// RFC 3986: dot segments, percent-encoding; `\` becomes `/`.
    Base,
    /// Slashes in a row become one.
    MergeSlashes,
    /// First `%2f` and `%5c` become the slashes they stand for.
    DecodeAndMergeSlashes,
}
