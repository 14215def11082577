//! `meshctl`: what flows, what is configured, and what is in the kernel's maps, for people.
//!
//! All of it is in the library's `ctl`; this is the process around it.

use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_agent::ctl::main()
}
