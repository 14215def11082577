//! `mesh-agent gateway`: what comes from outside the mesh, and where it goes.

mod drain;
mod headers;
mod limits;
mod policies;
mod ports;
mod routing;
mod streams;
mod tls;
mod world;
