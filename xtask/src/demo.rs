//! `cargo xtask demo`: set-up and builds, then the demo of the lab.
//!
//! The programs are debug builds: what the demo shows is what happens, not how fast, and the first run is for a person
//! who waits. The demo itself is the program `demo` of the package `lab`; its exit code decides.

use anyhow::{Result, bail};
use clap::Args;

use crate::build_ebpf;
use crate::command::shown;
use crate::progress::Progress;
use crate::setup::{self, Missing};
use crate::test::mount_bpffs;
use crate::workspace::{self, HOST_PACKAGES};

/// How the demo runs.
#[derive(Debug, Args)]
pub struct Options {
    /// Leave nodes, pods and agents running, and print how to send requests from a pod
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    ebpf: build_ebpf::Options,
}

/// Builds what is missing and runs the demo; an error when a row of its table failed.
pub fn run(options: &Options) -> Result<()> {
    if !setup::is_root() {
        let text = "the demo makes network namespaces and cgroups and loads eBPF programs: run it as root";
        return Err(Missing(text.into()).into());
    }
    let mut progress = Progress::start();
    setup::packages(&mut progress, &setup::BUILD, "the build")?;
    setup::packages(&mut progress, &setup::LAB, "the lab")?;
    build_ebpf::build(&mut progress, &options.ebpf)?;
    progress.step("build programs", || {
        shown(workspace::cargo().arg("build").args(HOST_PACKAGES).args(["--locked", "--bins"]))
    })?;
    let program = workspace::debug_program("demo");
    if !program.is_file() {
        bail!("the package lab has built no program `demo`; it belongs in tests/src/bin/demo.rs");
    }
    let result = progress.step("demo", || {
        mount_bpffs()?;
        shown(workspace::command(program).args(options.keep.then_some("--keep")))
    });
    println!("\n{}", progress.table());
    result
}
