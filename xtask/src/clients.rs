//! The clients and servers of the real world that lab tests run inside pods: packages, and one client that is built from
//! source.
//!
//! The gRPC client is written in Go, as most gRPC clients are; its versions are pinned by `tests/clients/grpc/go.sum`
//! to ones that Debian's own Go builds. It is built once, and again only when its sources change. What Go keeps
//! of it goes below `target/tools` and not into the user's caches. The pure parts are tested below, the build by `.ci/run`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::kept;
use crate::go;
use crate::progress::Progress;
use crate::setup;
use crate::workspace;

/// The program; the lab looks for it under this name in `target/tools/bin`.
const PROGRAM: &str = "lab-grpc-client";

/// Beside the program: the sources it was built from.
const SOURCES_FILE: &str = "lab-grpc-client.sources";

/// Finds or installs every client and server.
pub fn prepare(progress: &mut Progress) -> Result<()> {
    setup::packages(progress, &setup::CLIENTS, "the lab's clients")?;
    setup::packages_at_rest(progress, &setup::PROXIES, "the smoke run of the benchmarks")?;
    setup::packages(progress, &setup::PERF, "the smoke run of a profile")?;
    setup::packages_at_rest(progress, &setup::SERVERS, "the lab's servers")?;
    let sources = sources(&workspace::root().join("tests/clients/grpc"))?;
    let built_from = fs::read_to_string(workspace::tools_dir().join(SOURCES_FILE)).unwrap_or_default();
    if program().is_file() && built_from == sources {
        return Ok(());
    }
    if go::find().is_none() {
        setup::packages(progress, &setup::GO, "the lab's gRPC client")?;
    }
    progress.step("go build lab-grpc-client into target/tools (once, about a minute)", || build(&sources))
}

fn program() -> PathBuf {
    workspace::tools_dir().join("bin").join(PROGRAM)
}

fn build(sources: &str) -> Result<()> {
    let tools = workspace::tools_dir();
    fs::create_dir_all(tools.join("bin")).context("cannot create target/tools/bin")?;
    let mut go = go_command()?;
    go.current_dir(workspace::root().join("tests/clients/grpc"));
    // Else the module cache is read-only, and nobody but root can remove it.
    go.args(["build", "-mod=readonly", "-modcacherw", "-trimpath", "-o"]).arg(program()).arg(".");
    kept(go)?;
    forget_go()?;
    fs::write(tools.join(SOURCES_FILE), sources).context("cannot say what the gRPC client was built from")
}

/// Where Go keeps modules and objects while it builds.
pub fn go_dir() -> PathBuf {
    workspace::tools_dir().join("go")
}

/// The Go that is there, as it is: a newer one is not fetched, and no C compiler is asked for. What it keeps is below
/// `target/tools`.
pub fn go_command() -> Result<Command> {
    let kept = go_dir();
    let mut go = workspace::command(go::find().context("there is no Go")?.path);
    go.env("GOTOOLCHAIN", "local").env("GOWORK", "off").env("CGO_ENABLED", "0");
    go.env("GOPATH", &kept).env("GOMODCACHE", kept.join("pkg/mod")).env("GOCACHE", kept.join("cache"));
    Ok(go)
}

/// Removes what it keeps: hundreds of mebibytes that only the next change of the sources would use.
pub fn forget_go() -> Result<()> {
    fs::remove_dir_all(go_dir()).context("cannot remove what Go kept")
}

/// All files of a directory, one after the other in the order of their names, each under its name.
fn sources(dir: &Path) -> Result<String> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        paths.push(entry?.path());
    }
    paths.sort();
    let mut all = String::new();
    for path in paths {
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        all.extend(["--- ", &name, "\n", &text]);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sources_are_all_files_in_order() -> Result<()> {
        let sources = sources(&workspace::root().join("tests/clients/grpc"))?;
        let names: Vec<_> = sources.lines().filter_map(|line| line.strip_prefix("--- ")).collect();
        assert_eq!(names, ["go.mod", "go.sum", "main.go"]);
        assert!(sources.contains("\npackage main\n"));
        Ok(())
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let error = sources(Path::new("/nonexistent")).err().map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some("cannot read /nonexistent"));
    }
}
