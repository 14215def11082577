//! `cargo xtask clean`: removes what tests and demos may have left on this machine.
//!
//! What is ours is known to `lab-residue clean`, the program that also checks for it; with `--all`, what `build-ebpf`
//! and `lint` have put below `target/` goes too. Never touches the user's builds: that is `cargo clean`.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};
use clap::Args;

use crate::command::shown;
use crate::setup;
use crate::workspace;

/// How much is removed.
#[derive(Debug, Args)]
pub struct Options {
    /// Also the eBPF object and the installed build tools (target/ebpf and target/tools)
    #[arg(long)]
    all: bool,
}

/// Cleans up; doing so twice is fine.
pub fn run(options: &Options) -> Result<()> {
    let builds = [workspace::debug_program("lab-residue"), workspace::release_program("lab-residue")];
    match builds.into_iter().find(|program| program.is_file()) {
        None => println!("lab-residue is not built, so no lab has run from here: no residue to look for"),
        Some(program) if setup::is_root() => shown(workspace::command(program).arg("clean"))?,
        Some(_) => println!("residue: skipped, namespaces, cgroups and pinned maps belong to root"),
    }
    if options.all {
        remove(&workspace::ebpf_target_dir())?;
        remove(&workspace::tools_dir())?;
    }
    Ok(())
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Ok(()) => println!("removed {}", dir.display()),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot remove {}", dir.display())),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removing_twice_is_fine() -> Result<()> {
        let dir = std::env::temp_dir().join(format!("xtask-clean-{}", std::process::id()));
        fs::create_dir_all(dir.join("sub"))?;
        remove(&dir)?;
        assert!(!dir.exists());
        remove(&dir)
    }
}
