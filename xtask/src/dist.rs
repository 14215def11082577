//! `cargo xtask dist`: the programs that are shipped, optimised by what they do under load.
//!
//! The agent is built twice. The first build counts which branches are taken, and carries the loads of the benchmarks for a
//! few seconds each, on this machine and in the lab; the second is laid out by those counts
//! (`docs/decisions/034-laid-out-by-its-load.md`). What comes out is `target/dist/mesh-agent` and `target/dist/meshctl`.
//! Never changes what other builds use: everything on the way is below `target/pgo`. The pure parts are tested below, the load
//! by `tests/tests/benchmarks.rs`.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::bench::peers;
use crate::build_ebpf;
use crate::command::{answer, shown};
use crate::progress::Progress;
use crate::setup::{self, Missing};
use crate::test::mount_bpffs;
use crate::workspace;

/// What is built.
const PROGRAMS: [&str; 2] = ["mesh-agent", "meshctl"];

/// The loads that are counted, by their names in `cargo xtask bench`: what agents do for most of their lives.
const LOADS: [&str; 6] = ["http", "grpc", "tcp", "connections", "same-node", "neighbour"];

/// How the programs are built.
#[derive(Debug, Args)]
#[command(
    after_help = "The agent is built twice; between the builds it carries the loads of the benchmarks."
)]
pub struct Options {
    /// How long each load is carried
    #[arg(long, default_value_t = SECONDS)]
    seconds: f64,
    #[command(flatten)]
    ebpf: build_ebpf::Options,
}

/// How long each load is carried, unless somebody says otherwise.
const SECONDS: f64 = 4.0;

impl Default for Options {
    fn default() -> Self {
        Self { seconds: SECONDS, ebpf: build_ebpf::Options::default() }
    }
}

/// Builds, counts, builds again, and says where the programs are.
pub fn run(options: &Options) -> Result<()> {
    let mut progress = Progress::start();
    build(&mut progress, options)?;
    println!("\n{}\n", progress.table());
    for program in PROGRAMS {
        println!("{}", program_path(program).display());
    }
    Ok(())
}

/// The same as a part of another subcommand.
pub fn build(progress: &mut Progress, options: &Options) -> Result<()> {
    if !setup::is_root() {
        let text = "the agent carries load in the lab between two builds, which makes network namespaces and loads eBPF \
                    programs: run it as root, or build without it: cargo build --release --package mesh-agent";
        return Err(Missing(text.into()).into());
    }
    setup::packages(progress, &setup::BUILD, "the build")?;
    setup::packages(progress, &setup::LAB, "the lab")?;
    peers::load(progress)?;
    let profdata = profdata(progress)?;
    build_ebpf::build(progress, &options.ebpf)?;
    progress.step("build the load", || {
        shown(workspace::cargo().args(["build", "--locked", "--package", "lab", "--bins"]))
    })?;
    let counts = dir().join("counts");
    let profile = dir().join("mesh-agent.profdata");
    progress.step("build an agent that counts (minutes, the first time)", || {
        shown(&mut optimised(&format!("-Cprofile-generate={}", counts.display()), &PROGRAMS[..1]))
    })?;
    let counting = output().join(PROGRAMS[0]);
    progress.step("count under load", || count(options, &counting, &counts))?;
    progress.step("merge what was counted", || merge(&profdata, &counts, &profile))?;
    progress.step("build the programs by it (minutes)", || {
        shown(&mut optimised(&format!("-Cprofile-use={}", profile.display()), &PROGRAMS))
    })?;
    PROGRAMS.iter().try_for_each(|program| keep(program))
}

/// Where a program is put.
pub fn program_path(name: &str) -> PathBuf {
    workspace::target_dir().join("dist").join(name)
}

fn dir() -> PathBuf {
    workspace::target_dir().join("pgo")
}

/// The target is named, so that build scripts and macros are built without the flags, and once.
fn host() -> String {
    let said = answer(workspace::command("rustc").arg("-vV")).unwrap_or_default();
    said.lines().find_map(|line| line.strip_prefix("host: ")).unwrap_or("x86_64-unknown-linux-gnu").to_owned()
}

fn output() -> PathBuf {
    dir().join(host()).join("dist")
}

fn optimised(flag: &str, programs: &[&str]) -> Command {
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--locked", "--profile", "dist", "--package", "mesh-agent", "--target", &host()]);
    for program in programs {
        cargo.args(["--bin", program]);
    }
    cargo.arg("--target-dir").arg(dir());
    // The object is looked for in the directory of the usual builds.
    cargo.env("MESH_EBPF_OBJECT", workspace::ebpf_target_dir().join("bpfel-unknown-none/release/mesh-ebpf"));
    cargo.env("RUSTFLAGS", flag);
    cargo
}

/// Each agent writes its counts when it ends, into a file of its own.
fn count(options: &Options, agent: &Path, counts: &Path) -> Result<()> {
    if counts.exists() {
        fs::remove_dir_all(counts).with_context(|| format!("cannot remove {}", counts.display()))?;
    }
    fs::create_dir_all(counts).with_context(|| format!("cannot create {}", counts.display()))?;
    mount_bpffs()?;
    let mut load = workspace::command(workspace::debug_program("lab-bench"));
    load.args(LOADS).arg("--train").arg("--seconds").arg(options.seconds.to_string());
    load.arg("--out").arg(counts).env("MESH_AGENT_BIN", agent);
    load.env("LLVM_PROFILE_FILE", counts.join("%p.profraw"));
    shown(&mut load)
}

fn merge(profdata: &Path, counts: &Path, profile: &Path) -> Result<()> {
    let entries = fs::read_dir(counts).with_context(|| format!("cannot read {}", counts.display()))?;
    let files: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension() == Some(OsStr::new("profraw")))
        .collect();
    ensure!(!files.is_empty(), "no agent has written what it counted into {}", counts.display());
    let mut command = workspace::command(profdata);
    command.args(["merge", "--output"]).arg(profile).args(&files);
    shown(&mut command)
}

fn keep(program: &str) -> Result<()> {
    let kept = program_path(program);
    let parent = kept.parent().context("a file has a directory")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    // Removed first: what runs from there keeps its own.
    let _ = fs::remove_file(&kept);
    fs::copy(output().join(program), &kept).with_context(|| format!("cannot write {}", kept.display()))?;
    Ok(())
}

/// The program that reads what the compiler's instrumentation writes: of the toolchain itself (rustup's component
/// `llvm-tools`), else of an LLVM that is no older than the compiler's.
fn profdata(progress: &mut Progress) -> Result<PathBuf> {
    let rustc = |arguments: &[&str]| answer(workspace::command("rustc").args(arguments)).unwrap_or_default();
    let own = Path::new(&rustc(&["--print", "sysroot"])).join("lib/rustlib").join(host());
    let own = own.join("bin/llvm-profdata");
    if own.is_file() {
        return Ok(own);
    }
    let least = llvm(&rustc(&["-vV"])).context("rustc does not say which LLVM it has")?;
    let there = || (least..least + 3).map(of_debian).find(|path| path.is_file());
    if there().is_none() {
        setup::packages(progress, &setup::PROFDATA, "reading what the agent counts")?;
    }
    there().ok_or_else(|| {
        let text = format!(
            "what the agent counts is read by llvm-profdata of LLVM {least} or newer: \
             rustup component add llvm-tools, or your system's package llvm-{least}"
        );
        Missing(text).into()
    })
}

fn of_debian(version: u32) -> PathBuf {
    PathBuf::from(format!("/usr/lib/llvm-{version}/bin/llvm-profdata"))
}

/// The major version of LLVM in what `rustc -vV` says.
fn llvm(said: &str) -> Option<u32> {
    let version = said.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_is_the_compilers() {
        assert_eq!(llvm("rustc 1.95.0\nhost: x\nLLVM version: 22.1.2\n"), Some(22));
        assert_eq!(llvm("rustc 1.95.0\n"), None);
    }

    #[test]
    fn both_builds_are_of_one_profile_and_differ_in_one_flag() {
        let line = |flag| {
            let command = optimised(flag, &PROGRAMS[..1]);
            let flags = command.get_envs().find(|(name, _)| *name == "RUSTFLAGS");
            let flags = flags.and_then(|(_, value)| value).map(OsStr::to_os_string);
            (command.get_args().map(OsStr::to_os_string).collect::<Vec<_>>(), flags)
        };
        let (counting, by_count) = (line("-Cprofile-generate=a"), line("-Cprofile-use=b"));
        // Symbols have to be called alike for the counts to be found again.
        assert_eq!(counting.0, by_count.0);
        assert_eq!(counting.1.as_deref(), Some(OsStr::new("-Cprofile-generate=a")));
        assert_eq!(by_count.1.as_deref(), Some(OsStr::new("-Cprofile-use=b")));
    }

    #[test]
    fn nothing_counted_is_an_error_that_says_so() -> Result<()> {
        let dir = std::env::temp_dir().join(format!("mesh-dist-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let error = merge(Path::new("llvm-profdata"), &dir, &dir.join("out")).err();
        fs::remove_dir_all(&dir)?;
        let text = error.map(|error| error.to_string()).unwrap_or_default();
        assert!(text.starts_with("no agent has written"), "{text}");
        Ok(())
    }
}
