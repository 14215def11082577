//! `cargo xtask image`: mesh-agent and meshctl as an OCI archive.
//!
//! The image holds the two programs, the libraries they are linked with, the authorities that this machine trusts and the
//! users that an image needs, and nothing else: no shell, no package manager. `deploy/Dockerfile` makes the same with
//! Docker, from what `--root` leaves. Never needs a daemon, a registry or root. Tested below, and by `cargo xtask test cluster`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::build_ebpf;
use crate::command::{answer, shown};
use crate::dist;
use crate::oci::Image;
use crate::progress::Progress;
use crate::setup;
use crate::workspace::{self, HOST_PACKAGES};

/// What the image is called.
pub const NAME: &str = concat!("mesh-agent:", env!("CARGO_PKG_VERSION"));

/// The programs of the image; the first is the one that starts.
const PROGRAMS: [&str; 2] = ["mesh-agent", "meshctl"];

/// Which image.
#[derive(Debug, Args)]
pub struct Options {
    /// Where the archive goes [default: target/image/mesh-agent.tar]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Also put the files of the image into this directory, which must not exist
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// The debug build, which takes less time
    #[arg(long)]
    debug: bool,
    /// The programs that are shipped, built as `cargo xtask dist` does
    #[arg(long, conflicts_with = "debug")]
    dist: bool,
    #[command(flatten)]
    ebpf: build_ebpf::Options,
}

/// Builds what is missing, and the archive.
pub fn run(options: &Options) -> Result<()> {
    let mut progress = Progress::start();
    let archive = build(&mut progress, options)?;
    println!("\n{}\n\n{}", progress.table(), archive.display());
    Ok(())
}

fn build(progress: &mut Progress, options: &Options) -> Result<PathBuf> {
    setup::packages(progress, &setup::BUILD, "the build")?;
    setup::packages(progress, &setup::AUTHORITIES, "the image")?;
    build_ebpf::build(progress, &options.ebpf)?;
    let programs = if options.debug {
        workspace::debug_program
    } else if options.dist {
        dist::program_path
    } else {
        workspace::release_program
    };
    if options.dist {
        dist::build(progress, &dist::Options::default())?;
    } else {
        programs_of_cargo(progress, options)?;
    }
    let archive = options.out.clone().unwrap_or_else(|| workspace::target_dir().join("image/mesh-agent.tar"));
    progress.step(&format!("image {NAME}"), || {
        let image = image(programs)?;
        println!("    {}", image.write(NAME, &archive)?);
        if let Some(root) = &options.root {
            image.unpack(root)?;
        }
        Ok(archive)
    })
}

/// The image of the debug build as it is, for tests.
pub fn of_debug_build() -> Result<PathBuf> {
    let archive = workspace::target_dir().join("image/mesh-agent-debug.tar");
    image(workspace::debug_program)?.write(NAME, &archive)?;
    Ok(archive)
}

fn programs_of_cargo(progress: &mut Progress, options: &Options) -> Result<()> {
    progress.step("build programs", || {
        let mut cargo = workspace::cargo();
        // The packages of every other build, so that nothing is compiled with other features for this one alone.
        cargo.arg("build").args(HOST_PACKAGES).arg("--locked");
        cargo.args(PROGRAMS.iter().flat_map(|program| ["--bin", program]));
        cargo.args((!options.debug).then_some("--release"));
        shown(&mut cargo)
    })
}

fn image(programs: fn(&str) -> PathBuf) -> Result<Image> {
    let mut image = Image::minimal();
    for name in PROGRAMS {
        image.program(&format!("usr/local/bin/{name}"), &programs(name))?;
    }
    image.authorities();
    image.entrypoint = vec![format!("/usr/local/bin/{}", PROGRAMS[0])];
    let revision = answer(workspace::command("git").args(["rev-parse", "HEAD"]));
    for (label, value) in labels(revision.as_deref()) {
        image.labels.insert(format!("org.opencontainers.image.{label}"), value);
    }
    Ok(image)
}

fn labels(revision: Option<&str>) -> Vec<(&'static str, String)> {
    let mut labels = vec![
        ("title", "mesh-agent".to_owned()),
        ("description", "The agent of a node, its controller and meshctl".to_owned()),
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("licenses", "Apache-2.0".to_owned()),
    ];
    // Without git, or outside of a checkout, nobody knows it.
    labels.extend(revision.map(|revision| ("revision", revision.to_owned())));
    labels
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_dockerfile_makes_the_same_image() -> Result<()> {
        let text = fs::read_to_string(workspace::root().join("deploy/Dockerfile"))?;
        assert!(text.contains("ENTRYPOINT [\"/usr/local/bin/mesh-agent\"]"), "{text}");
        for program in PROGRAMS {
            assert!(text.contains(&format!("usr/local/bin/{program}")), "{program}");
        }
        for (label, value) in labels(None) {
            assert!(text.contains(&format!("org.opencontainers.image.{label}=\"{value}\"")), "{label}");
        }
        Ok(())
    }

    #[test]
    fn the_revision_is_a_label_where_it_is_known() {
        assert!(labels(Some("abc")).contains(&("revision", "abc".to_owned())));
        assert!(labels(None).iter().all(|(label, _)| *label != "revision"));
    }
}
