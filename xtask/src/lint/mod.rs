//! `cargo xtask lint`: rustfmt, the rules of the sources, what is made of the chart, clippy, and cargo-deny.
//!
//! Quick checks first. Everything that can be checked is, before the first failure is reported. The rules themselves
//! are pure functions over a file's text: `imports.rs` the import law, `rules.rs` the others.

mod imports;
mod rules;
mod source;

use anyhow::{Result, bail};
use clap::Args;

use self::source::{Finding, Level, SourceFile};
use crate::build_ebpf;
use crate::command::shown;
use crate::install_yaml;
use crate::progress::Progress;
use crate::setup::{self, Missing, Tool};
use crate::workspace::{self, HOST_PACKAGES};

const CARGO_DENY: Tool =
    Tool { name: "cargo-deny", program: "cargo-deny", version: "0.20.2", takes: "two to four minutes" };

/// What is checked.
#[derive(Debug, Args)]
#[command(
    after_long_help = "The check of licences, bans and sources needs cargo-deny. It is installed into target/tools \
                             the first time, which takes two to four minutes on two cores; --fast leaves it out."
)]
pub struct Options {
    /// Without cargo-deny (licences, bans, sources)
    #[arg(long)]
    fast: bool,
    #[command(flatten)]
    ebpf: build_ebpf::Options,
}

/// Runs all checks; an error names those that failed.
pub fn run(options: &Options) -> Result<()> {
    let mut progress = Progress::start();
    let mut failed = Vec::new();
    let mut keep = |name: &'static str, result: Result<()>| {
        if let Err(error) = result {
            println!("    {error:#}");
            failed.push(name);
        }
    };
    keep("rustfmt", progress.step("rustfmt", || shown(workspace::cargo().args(["fmt", "--all", "--check"]))));
    keep("source rules", progress.step("source rules (import law, sizes, unsafe, words)", source_rules));
    keep("install.yaml", progress.step("deploy/install.yaml is of the chart as it is", install_yaml::check));
    // mesh-agent embeds the eBPF object, so clippy needs it too.
    setup::packages(&mut progress, &setup::BUILD, "the build")?;
    match build_ebpf::build(&mut progress, &options.ebpf) {
        Ok(_) => {
            keep("clippy", progress.step("clippy", clippy));
            match build_ebpf::clippy(&mut progress, &options.ebpf) {
                Ok(None) => {}
                Ok(Some(reason)) => progress.skip("clippy of mesh-ebpf", &reason),
                Err(error) => keep("clippy of mesh-ebpf", Err(error)),
            }
        }
        Err(error) if error.is::<Missing>() => return Err(error),
        Err(error) => {
            keep("build of mesh-ebpf", Err(error));
            progress.skip("clippy", "mesh-ebpf does not build");
        }
    }
    if options.fast {
        progress.skip("cargo-deny", "--fast leaves it out");
    } else {
        keep("cargo-deny", deny(&mut progress));
    }
    println!("\n{}", progress.table());
    if failed.is_empty() { Ok(()) } else { bail!("lint found problems: {}", failed.join(", ")) }
}

fn clippy() -> Result<()> {
    let mut cargo = workspace::cargo();
    cargo.arg("clippy").args(HOST_PACKAGES).args([
        "--locked",
        "--all-targets",
        "--keep-going",
        "--",
        "-D",
        "warnings",
    ]);
    shown(&mut cargo)
}

fn deny(progress: &mut Progress) -> Result<()> {
    let program = CARGO_DENY.install(progress, &[], None)?;
    progress.step("cargo-deny (licences, bans, sources)", || {
        let mut deny = workspace::command(program);
        shown(deny.args(["--locked", "check", "--hide-inclusion-graph", "licenses", "bans", "sources"]))
    })
}

fn source_rules() -> Result<()> {
    let files = source::read_all(&workspace::root())?;
    let findings: Vec<Finding> = files.iter().flat_map(findings).collect();
    for finding in &findings {
        println!("{finding}");
    }
    let errors = findings.iter().filter(|finding| finding.level == Level::Error).count();
    let warnings = findings.len() - errors;
    println!("    {} files, {errors} errors, {warnings} warnings", files.len());
    if errors > 0 {
        bail!("{errors} errors in the sources, listed above")
    }
    Ok(())
}

fn findings(file: &SourceFile) -> Vec<Finding> {
    let mut findings = imports::check(file);
    findings.extend(rules::check(file));
    findings
}
