//! HTTP through the mesh, within a node and between nodes: what clients and apps of every kind may rely on, and what
//! nobody gets away with.

mod abuse;
mod asked;
mod cors;
mod drain;
mod grpc_calls;
mod headers;
mod isolation;
mod limits;
mod local_answers;
mod messages;
mod mirror;
mod retries;
mod retry_budget;
mod retry_conditions;
mod routes;
mod stream_routes;
mod streaming;
mod strict;
mod upgrade;
mod visibility;
mod world;
