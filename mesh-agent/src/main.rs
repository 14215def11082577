//! `mesh-agent`: the roles of the mesh as subcommands.
//!
//! Exit codes: 0 done, 1 failed, 2 called wrongly (nothing to configure it from, not root).

use std::process::ExitCode;

use clap::Parser;
use mesh_agent::{
    app::{self, NotStarted},
    config::{Cli, Role},
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let ended = match cli.role {
        Role::Node(config) => app::node(*config, &cli.log),
        Role::Clean(config) => app::clean(&config),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-agent: {error:#}");
            ExitCode::from(if error.is::<NotStarted>() { 2 } else { 1 })
        }
    }
}
