//! `mesh-agent`: the roles of the mesh as subcommands.
//!
//! Exit codes: 0 done, 1 failed (or, of `clean --check`, something is there), 2 called wrongly (nothing to configure it from, not root).

use std::{io, process::ExitCode};

use clap::Parser;
use mesh_agent::{
    app::{self, NotStarted},
    capture::Allocator,
    cni::plugin,
    config::{Cli, Role},
};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> ExitCode {
    if plugin::is_started_by_a_runtime() {
        return cni();
    }
    let cli = Cli::parse();
    let ended = match cli.role {
        Role::Node(config) => app::node(*config, &cli.log).map(|()| true),
        Role::Gateway(config) => app::gateway(*config, &cli.log).map(|()| true),
        Role::Controller(config) => app::controller(*config, &cli.log).map(|()| true),
        Role::Token(config) => app::token(&config, &mut io::stdout().lock()).map(|()| true),
        Role::Ca(config) => app::ca(&config, &mut io::stdout().lock()).map(|()| true),
        Role::Cni => return cni(),
        Role::Ready(config) => app::ready(&config, &mut io::stdout().lock()),
        Role::Remove(config) => app::remove_agents(&config).map(|()| true),
        Role::Clean(config) => app::clean(&config, &mut io::stdout().lock()),
    };
    match ended {
        Ok(good) => ExitCode::from(u8::from(!good)),
        Err(error) => {
            eprintln!("mesh-agent: {error:#}");
            ExitCode::from(if error.is::<NotStarted>() { 2 } else { 1 })
        }
    }
}

/// The container runtime reads why from standard output.
fn cni() -> ExitCode {
    match plugin::run(&mut io::stdin().lock(), &mut io::stdout().lock()) {
        Ok(good) => ExitCode::from(u8::from(!good)),
        Err(error) => {
            eprintln!("mesh-cni: {error}");
            ExitCode::FAILURE
        }
    }
}
