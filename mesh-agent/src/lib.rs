//! The node agent of a sidecarless service mesh.
//!
//! A connection's story is told in [`proxy`]: `outbound.rs` and `inbound.rs` read top to bottom, and each step
//! is a room of its own beside it. `ARCHITECTURE.md` at the top of the repository has the map.

pub mod admin;
pub mod app;
pub mod balance;
pub mod body;
pub mod capture;
pub mod cni;
pub mod config;
pub mod controller;
pub mod copy;
pub mod ctl;
pub mod detect;
pub mod drain;
pub mod enrolment;
pub mod error;
mod grpc;
pub mod handover;
pub mod http1;
pub mod http2;
pub mod identity;
pub mod limit;
pub mod mounts;
pub mod overload;
pub mod policy;
pub mod proxy;
pub mod report;
pub mod route;
pub mod source;
pub mod state;
pub mod tunnel;
pub mod upstream;
mod watcher;
pub mod workers;
