//! Opaque connections within a node run from app to app, without the agent: byte for byte, where nothing asks for more,
//! for as long as nothing does, and counted all the same.

mod bytes;
mod choice;
mod outsiders;
mod permission;
mod reports;
mod world;
