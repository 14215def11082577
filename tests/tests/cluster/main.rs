//! What holds on a real cluster of two nodes, which `cargo xtask test cluster` gives; `cargo xtask test` leaves it out.

mod api_server;
mod bookinfo;
mod failures;
mod gateway;
mod installed;
mod load;
mod measured;
mod mesh;
mod nodes;
mod operators;
mod workloads;
