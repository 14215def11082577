//! HTTP/2 streams as messages and bodies, for apps and between nodes: [`serve`] takes requests, [`send`] sends one.
//!
//! Stands on the `h2` crate rather than on hyper's connections, for what those keep to themselves: interim responses,
//! the codes of resets in both directions, byte streams that end as TCP ends, and streams that can be given up one by
//! one when nothing moves. Never opens sockets and knows nothing of routes. Tested in `tests.rs` beside it.

mod bytes;
mod client;
mod pipe;
mod refused;
mod serve;
mod stream;
#[cfg(test)]
mod tests;

pub use self::{
    bytes::ByteStream,
    client::{Failed, is_closed, send},
    refused::{Along, ReadAlong, StreamRefusal},
    serve::{Ended, Options, Watch, keep_alive, serve},
    stream::{Reply, ServerStream, Taken},
};
