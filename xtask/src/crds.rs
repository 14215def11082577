//! `cargo xtask crds`: the resource definitions of the chart, made of the types that objects are read into.
//!
//! The types derive their schemas in tests alone, so that nothing of this is in what is shipped: the test that compares the
//! definitions with the types writes them where it is told to. Tested by that test, and by `mesh-agent/tests/definitions.rs`.

use anyhow::Result;
use clap::Args;

use crate::command::shown;
use crate::install_yaml;
use crate::progress::Progress;
use crate::workspace::{self, HOST_PACKAGES};

/// The test, and what has it write.
const TEST: &str = "the_chart_has_the_definitions_of_what_is_read";
const WRITE: &str = "MESH_WRITE_DEFINITIONS";

/// Nothing to choose.
#[derive(Debug, Args)]
pub struct Options {}

/// Writes them, and renders the chart that they are part of.
pub fn run(_: &Options) -> Result<()> {
    let mut progress = Progress::start();
    progress.step("definitions of the types", || {
        let mut cargo = workspace::cargo();
        cargo.args(["test", "--locked", "--quiet"]).args(HOST_PACKAGES).args(["--lib", TEST]).env(WRITE, "1");
        shown(&mut cargo)
    })?;
    println!("\n{}", progress.table());
    install_yaml::run(&install_yaml::Options::default())
}
