//! `cargo xtask build-ebpf`: the object that mesh-agent embeds.
//!
//! Stable Rust has no `core` for the BPF target. It comes from one of two places, and this module finds out which:
//! a nightly toolchain of rustup with `rust-src`, which builds `core` itself, or Debian's Rust for its web packages,
//! which brings it ready made (`docs/decisions/002-two-worlds-of-ebpf-builds.md`). Either way the object is at
//! `target/ebpf/bpfel-unknown-none/release/mesh-ebpf`, with BTF; cargo decides whether anything is to be done. Never
//! changes `Cargo.lock`. The pure parts are tested below, both builds by running them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::command::{answer, kept, shown};
use crate::progress::Progress;
use crate::setup::{self, DEBIAN_EBPF, LLVM, Missing, Tool};
use crate::workspace;

const TARGET: &str = "bpfel-unknown-none";

/// The linker that turns LLVM bitcode into a BPF object.
const LINKER: Tool =
    Tool { name: "bpf-linker", program: "bpf-linker", version: "0.13.0", takes: "about a minute" };

/// The LLVMs that this bpf-linker can be built with, in order of preference: 22 is that of the toolchains tried.
const LINKER_LLVMS: [u32; 3] = [22, 23, 21];

/// Which LLVM the installed linker was built with; it does not tell by itself.
const LINKER_LLVM_FILE: &str = "bpf-linker.llvm";

/// How the object is built.
#[derive(Debug, Clone, Default, Args)]
#[group(id = "ebpf")]
pub struct Options {
    /// Where the compiler for the BPF target comes from; found out when not given
    #[arg(long = "ebpf-toolchain", env = "MESH_EBPF_TOOLCHAIN", value_name = "WHICH")]
    toolchain: Option<Which>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    /// A nightly toolchain of rustup with rust-src; core is built from source
    Rustup,
    /// Debian's rustc-web, with a ready-made core
    Debian,
}

/// A compiler that can build for the BPF target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Toolchain {
    /// The name of a nightly toolchain, and the major version of its LLVM.
    Rustup(String, u32),
    /// Debian's, in /usr/bin.
    Debian,
}

/// Builds the object and says where it is.
pub fn run(options: &Options) -> Result<()> {
    let mut progress = Progress::start();
    let object = build(&mut progress, options)?;
    println!("{}", object.display());
    Ok(())
}

/// Builds the object as a step of another subcommand; returns its path.
pub fn build(progress: &mut Progress, options: &Options) -> Result<PathBuf> {
    let toolchain = choose(progress, options.toolchain)?;
    let linker = linker(progress, toolchain.llvm())?;
    let object = workspace::ebpf_target_dir().join(TARGET).join("release/mesh-ebpf");
    progress.step(&format!("build mesh-ebpf for {TARGET} with {}", toolchain.name()), || {
        shown(&mut toolchain.cargo("build", &linker))?;
        if !object.is_file() {
            bail!("cargo succeeded, but there is no object at {}", object.display());
        }
        Ok(object)
    })
}

/// Checks the programs with clippy for their own target. `Ok(Some(reason))`: not possible here, and why.
pub fn clippy(progress: &mut Progress, options: &Options) -> Result<Option<String>> {
    let toolchain = choose(progress, options.toolchain)?;
    if toolchain == Toolchain::Debian && !setup::missing(&setup::DEBIAN_EBPF_CLIPPY).is_empty() {
        if !setup::is_root() {
            return Ok(Some("it needs the package rust-web-clippy".into()));
        }
        setup::packages(progress, &setup::DEBIAN_EBPF_CLIPPY, "clippy of the eBPF programs")?;
    }
    if let Toolchain::Rustup(name, _) = &toolchain
        && answer(workspace::command("rustup").args(["run", name, "cargo", "clippy", "--version"])).is_none()
    {
        return Ok(Some(format!("{name} has no clippy: rustup component add clippy --toolchain {name}")));
    }
    let linker = linker(progress, toolchain.llvm())?;
    progress.step(&format!("clippy of mesh-ebpf for {TARGET} with {}", toolchain.name()), || {
        shown(toolchain.cargo("clippy", &linker).args(["--", "-D", "warnings"]))
    })?;
    Ok(None)
}

impl Toolchain {
    fn name(&self) -> &str {
        match self {
            Self::Rustup(name, _) => name,
            Self::Debian => "Debian's rustc",
        }
    }

    fn llvm(&self) -> u32 {
        match self {
            Self::Rustup(_, llvm) => *llvm,
            Self::Debian => 22,
        }
    }

    fn cargo(&self, verb: &str, linker: &Path) -> Command {
        let mut cargo = match self {
            Self::Rustup(name, _) => {
                let mut rustup = workspace::command("rustup");
                rustup.args(["run", name, "cargo", verb, "-Z", "build-std=core"]);
                rustup
            }
            Self::Debian => {
                // Cargo looks for `cargo-clippy` in its home before PATH, where another toolchain's may be.
                let program = if verb == "clippy" { "/usr/bin/cargo-clippy" } else { "/usr/bin/cargo" };
                let mut cargo = workspace::command(program);
                cargo
                    .env("PATH", "/usr/bin:/bin")
                    .env("CARGO", "/usr/bin/cargo")
                    .env("RUSTC", "/usr/bin/rustc");
                cargo.env("RUSTC_BOOTSTRAP", "1").arg(verb);
                cargo
            }
        };
        for variable in ["RUSTUP_TOOLCHAIN", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET"]
        {
            cargo.env_remove(variable);
        }
        cargo.env_remove("CARGO_ENCODED_RUSTFLAGS");
        cargo.env("RUSTFLAGS", format!("-C linker={} -C link-arg=--btf -C target-cpu=v3", linker.display()));
        // BTF is made from full debug information. One unit, since the linker optimizes the whole at once anyway.
        cargo.env("CARGO_PROFILE_RELEASE_DEBUG", "2").env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
        cargo.env("CARGO_PROFILE_RELEASE_LTO", "fat");
        cargo.args(["--locked", "--release", "--target", TARGET, "--package", "mesh-ebpf", "--target-dir"]);
        cargo.arg(workspace::ebpf_target_dir());
        cargo
    }
}

/// What is ready comes first, then what can be made ready without the network of rustup, then rustup.
fn choose(progress: &mut Progress, wanted: Option<Which>) -> Result<Toolchain> {
    let may = |which| wanted.is_none_or(|wanted| wanted == which);
    if may(Which::Rustup)
        && let Some(toolchain) = ready_nightly()
    {
        return Ok(toolchain);
    }
    if may(Which::Debian) && setup::is_debian() {
        if setup::missing(&DEBIAN_EBPF).is_empty() {
            return Ok(Toolchain::Debian);
        }
        if setup::is_root() {
            match setup::packages(progress, &DEBIAN_EBPF, "the eBPF programs") {
                Ok(()) => return Ok(Toolchain::Debian),
                Err(error) if wanted.is_some() => return Err(error),
                Err(error) => println!("    apt has no Rust for the BPF target ({error:#}); trying rustup"),
            }
        }
    }
    if may(Which::Rustup)
        && setup::in_path("rustup")
        && install_nightly(progress).is_ok()
        && let Some(toolchain) = ready_nightly()
    {
        return Ok(toolchain);
    }
    Err(Missing(nothing_found()).into())
}

fn ready_nightly() -> Option<Toolchain> {
    let list = answer(workspace::command("rustup").args(["toolchain", "list"]))?;
    nightlies(&list).into_iter().find_map(|name| {
        let rustc = |argument| answer(workspace::command("rustup").args(["run", &name, "rustc", argument]));
        let has_source =
            Path::new(&rustc("--print=sysroot")?).join("lib/rustlib/src/rust/library/core").is_dir();
        let llvm = llvm_major(&rustc("-vV")?)?;
        let linkable = LINKER_LLVMS.iter().any(|&linker| linker >= llvm);
        (has_source && linkable).then(|| Toolchain::Rustup(name.clone(), llvm))
    })
}

fn install_nightly(progress: &mut Progress) -> Result<()> {
    let list = answer(workspace::command("rustup").args(["toolchain", "list"])).unwrap_or_default();
    if let Some(name) = nightlies(&list).first() {
        return progress.step(&format!("rustup component add rust-src --toolchain {name}"), || {
            let mut rustup = workspace::command("rustup");
            rustup.args(["component", "add", "rust-src", "--toolchain", name]);
            kept(rustup)
        });
    }
    progress.step("rustup toolchain install nightly (minimal, with rust-src)", || {
        let mut rustup = workspace::command("rustup");
        rustup.args(["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"]);
        kept(rustup)
    })
}

/// A bpf-linker that reads the bitcode of this LLVM: its own LLVM may be newer, not older.
fn linker(progress: &mut Progress, llvm: u32) -> Result<PathBuf> {
    let marker = workspace::tools_dir().join(LINKER_LLVM_FILE);
    let built_with = fs::read_to_string(&marker).ok().and_then(|text| text.trim().parse::<u32>().ok());
    if LINKER.is_installed() && built_with.is_some_and(|built_with| built_with >= llvm) {
        return Ok(LINKER.path());
    }
    if llvm_prefix(llvm).is_none() && llvm <= LINKER_LLVMS[0] {
        setup::packages(progress, &LLVM, "bpf-linker")?;
    }
    let Some((version, prefix)) = llvm_prefix(llvm) else {
        let text =
            format!("bpf-linker needs the development files of LLVM {llvm} (llvm-config-{llvm} in PATH)");
        return Err(Missing(text).into());
    };
    // One that was built with another LLVM has the right version, and would be taken for the right one.
    let _ = fs::remove_file(LINKER.path());
    let features = format!("llvm-{version}");
    let path =
        LINKER.install(progress, &["--no-default-features", "--features", &features], Some(&prefix))?;
    fs::write(&marker, version.to_string())?;
    Ok(path)
}

fn llvm_prefix(at_least: u32) -> Option<(u32, PathBuf)> {
    LINKER_LLVMS.iter().filter(|&&version| version >= at_least).find_map(|&version| {
        let asked = answer(Command::new(format!("llvm-config-{version}")).arg("--prefix")).map(PathBuf::from);
        let prefix = asked.unwrap_or_else(|| PathBuf::from(format!("/usr/lib/llvm-{version}")));
        prefix.join("include/llvm-c/Core.h").is_file().then_some((version, prefix))
    })
}

fn nightlies(list: &str) -> Vec<String> {
    let names = list.lines().filter_map(|line| line.split_whitespace().next());
    names.filter(|name| name.starts_with("nightly")).map(str::to_owned).collect()
}

fn llvm_major(version: &str) -> Option<u32> {
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    llvm.split('.').next()?.trim().parse().ok()
}

fn nothing_found() -> String {
    let packages: Vec<_> = DEBIAN_EBPF.iter().chain(&LLVM).map(setup::Package::name).collect();
    format!(
        "no compiler for the BPF target. One of these makes it possible:\n  \
         rustup toolchain install nightly --profile minimal --component rust-src\n  \
         apt-get install -y --no-install-recommends {} (Debian, as root)",
        packages.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nightly_toolchains_are_found_in_rustups_list() {
        let list =
            "stable-x86_64-unknown-linux-gnu (active, default)\nnightly-2026-01-01-x86_64\nnightly-x86_64\n";
        assert_eq!(nightlies(list), ["nightly-2026-01-01-x86_64", "nightly-x86_64"]);
        assert!(nightlies("no installed toolchains\n").is_empty());
    }

    #[test]
    fn the_major_version_of_llvm_is_read() {
        assert_eq!(llvm_major("rustc 1.97.0-nightly\nrelease: x\nLLVM version: 22.1.4\n"), Some(22));
        assert_eq!(llvm_major("rustc 1.97.0\n"), None);
    }

    #[test]
    fn the_build_has_its_own_flags_and_target_directory() {
        for toolchain in [Toolchain::Debian, Toolchain::Rustup("nightly".into(), 22)] {
            let command = toolchain.cargo("build", Path::new("/tools/bpf-linker"));
            let flags =
                command.get_envs().find(|(name, _)| *name == "RUSTFLAGS").and_then(|(_, value)| value);
            let flags = flags.map(|flags| flags.to_string_lossy().into_owned()).unwrap_or_default();
            assert_eq!(flags, "-C linker=/tools/bpf-linker -C link-arg=--btf -C target-cpu=v3");
            assert!(command.get_args().any(|argument| argument == "--locked"));
            assert!(command.get_args().last().is_some_and(|dir| Path::new(dir).ends_with("ebpf")));
        }
    }
}
