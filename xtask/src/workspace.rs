//! Where things are, and how cargo is called from inside cargo.
//!
//! Never reads or writes anything itself. Tested below, and by every subcommand.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The top of this checkout.
pub fn root() -> PathBuf {
    // Cargo sets the variable for `cargo run`; the compiled-in one serves an xtask that is started by its path.
    let manifest = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let manifest = manifest.filter(|dir| dir.ends_with("xtask"));
    let manifest = manifest.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
    manifest.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// The directory of the host's builds: `CARGO_TARGET_DIR`, else `target`.
pub fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// A program of the workspace as a debug build leaves it; it need not be there.
pub fn debug_program(name: &str) -> PathBuf {
    target_dir().join("debug").join(name)
}

/// The same of a release build.
pub fn release_program(name: &str) -> PathBuf {
    target_dir().join("release").join(name)
}

/// The target directory of the eBPF build; mesh-agent embeds the object from there.
pub fn ebpf_target_dir() -> PathBuf {
    target_dir().join("ebpf")
}

/// Where build tools are installed, apart from everything the user has.
pub fn tools_dir() -> PathBuf {
    target_dir().join("tools")
}

/// `program`, to be run at the top of the workspace, without what the outer `cargo run` put into the environment:
/// those variables would make build scripts run again, or send another toolchain's cargo astray.
pub fn command(program: impl Into<OsString>) -> Command {
    let mut command = Command::new(program.into());
    command.current_dir(root());
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(leaks_from_cargo_run) {
            command.env_remove(name);
        }
    }
    command
}

/// The cargo that runs this xtask, for the host's builds.
pub fn cargo() -> Command {
    command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Every package that is built for the host. One selection for build and tests alike: another one would unify other
/// features, and compile most of the tree a second time.
pub const HOST_PACKAGES: [&str; 3] = ["--workspace", "--exclude", "mesh-ebpf"];

fn leaks_from_cargo_run(name: &str) -> bool {
    const EXACT: [&str; 8] = [
        "CARGO",
        "CARGO_BIN_NAME",
        "CARGO_CRATE_NAME",
        "CARGO_PRIMARY_PACKAGE",
        "LD_LIBRARY_PATH",
        "OUT_DIR",
        "RUST_RECURSION_COUNT",
        "TARGET",
    ];
    EXACT.contains(&name) || name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_holds_the_workspace() {
        assert!(root().join("Cargo.toml").is_file());
        assert!(root().join("xtask/Cargo.toml").is_file());
    }

    #[test]
    fn only_what_cargo_run_adds_is_removed() {
        for name in ["CARGO_PKG_NAME", "CARGO_MANIFEST_DIR", "LD_LIBRARY_PATH", "CARGO"] {
            assert!(leaks_from_cargo_run(name), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_INCREMENTAL", "CARGO_TARGET_DIR", "RUSTUP_HOME", "PATH"] {
            assert!(!leaks_from_cargo_run(name), "{name}");
        }
    }
}
