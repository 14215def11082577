//! The programs of the cluster: containerd, runc and CNI plugins from Debian, Kubernetes, etcd and CoreDNS built from
//! their Go modules.
//!
//! The versions are those of `tests/cluster/kubebox/go.mod`, and `go.sum` pins the sources. They are built once, and
//! again when a file of that directory changes. What Go keeps meanwhile, some four gigabytes, goes below
//! `target/tools/kubernetes` and is removed when the programs are there. The pure parts are tested below, the build by
//! `cargo xtask test cluster`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::state;
use crate::clients;
use crate::command::{answer, kept};
use crate::go::{self, Go};
use crate::progress::Progress;
use crate::{setup, workspace};

/// What the one program can be, by the names that it is started under.
const COMPONENTS: [&str; 7] = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
];

/// Beside the programs: what they were built from.
const SOURCES_FILE: &str = "sources";

/// Debian 12's own Go is older than what these modules ask for.
const GO_MINOR: u32 = 26;

/// Finds, installs or builds all of it.
pub fn prepare(progress: &mut Progress) -> Result<()> {
    setup::packages(progress, &setup::BUILD, "the cluster")?;
    setup::packages(progress, &setup::CLUSTER, "the cluster")?;
    setup::packages_at_rest(progress, &setup::unseen(&setup::CONTAINERS), "the cluster")?;
    let source = workspace::root().join("tests/cluster/kubebox");
    let sources = sources(&source)?;
    let marker = state::tools().join(SOURCES_FILE);
    let built = COMPONENTS.iter().chain(&["coredns"]).all(|name| state::program(name).is_file());
    if built && fs::read_to_string(&marker).is_ok_and(|known| known == sources) {
        return Ok(());
    }
    require_go(progress)?;
    progress.step(
        "go build Kubernetes, etcd and CoreDNS into target/tools (once, some 8 minutes on two cores)",
        || {
            build(&source)?;
            fs::write(&marker, &sources).context("cannot say what Kubernetes was built from")?;
            remove_caches()
        },
    )
}

fn require_go(progress: &mut Progress) -> Result<()> {
    if go::find().is_none() {
        setup::packages(progress, &setup::GO, "Kubernetes")?;
    }
    let found = go::find();
    if found.as_ref().and_then(Go::minor).is_some_and(|minor| minor >= GO_MINOR) {
        return Ok(());
    }
    let found =
        found.map_or_else(|| "none".to_owned(), |go| format!("{} in {}", go.version, go.path.display()));
    let text = format!(
        "Kubernetes is built with Go 1.{GO_MINOR} or newer, and there is {found}: put a newer one into PATH or /usr/local/go \
         (https://go.dev/dl/)"
    );
    Err(setup::Missing(text).into())
}

fn build(source: &Path) -> Result<()> {
    let bin = state::tools().join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("cannot create {}", bin.display()))?;
    let version = answer(go(source)?.args(["list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes"]));
    let Some(version) = version else { bail!("`go list` does not know the version of Kubernetes in go.mod") };
    kept(go_build(source, "kubebox", ".", &stamp(&version)?)?)?;
    kept(go_build(source, "coredns", "./coredns", "")?)?;
    for name in COMPONENTS {
        let link = bin.join(name);
        let _ = fs::remove_file(&link);
        symlink("kubebox", &link).with_context(|| format!("cannot link {}", link.display()))?;
    }
    Ok(())
}

fn go_build(source: &Path, program: &str, package: &str, stamp: &str) -> Result<Command> {
    let mut build = go(source)?;
    build.args(["build", "-mod=readonly", "-modcacherw", "-trimpath"]);
    // No debug information, and no methods kept only because somebody might ask for them by name: half the size.
    build.args(["-tags", "grpcnotrace", "-gcflags=all=-dwarf=false"]);
    build.arg("-ldflags").arg(format!("-s -w {stamp}").trim_end());
    build.arg("-o").arg(state::program(program)).arg(package);
    Ok(build)
}

fn go(source: &Path) -> Result<Command> {
    let mut go = clients::go_command()?;
    let kept = go_dir();
    go.env("GOPATH", &kept).env("GOMODCACHE", kept.join("pkg/mod")).env("GOCACHE", kept.join("cache"));
    go.current_dir(source);
    Ok(go)
}

fn go_dir() -> PathBuf {
    state::tools().join("go")
}

fn remove_caches() -> Result<()> {
    fs::remove_dir_all(go_dir()).with_context(|| format!("cannot remove {}", go_dir().display()))
}

/// What the components say that they are: a release of this version. Kubelet and API server refuse one another without.
fn stamp(version: &str) -> Result<String> {
    let mut parts = version.trim_start_matches('v').split('.');
    let (Some(major), Some(minor)) = (parts.next(), parts.next()) else {
        bail!("{version:?} is no version of Kubernetes")
    };
    let commit = "0".repeat(40);
    let values = [
        ("gitVersion", version),
        ("gitMajor", major),
        ("gitMinor", minor),
        ("gitCommit", &commit),
        ("gitTreeState", "clean"),
        ("buildDate", "1970-01-01T00:00:00Z"),
    ];
    let set = |(name, value)| format!("-X k8s.io/component-base/version.{name}={value}");
    Ok(values.map(set).join(" "))
}

/// Every file below the directory, in the order of their paths, each under its own.
fn sources(dir: &Path) -> Result<String> {
    let mut all = String::new();
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        entries.push(entry?.path());
    }
    entries.sort();
    for path in entries {
        if path.is_dir() {
            all.push_str(&sources(&path)?);
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.strip_prefix(workspace::root()).unwrap_or(&path).display().to_string();
        all.extend(["--- ", &name, "\n", &text]);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_stamped_in_all_its_parts() -> Result<()> {
        let stamp = stamp("v1.37.2")?;
        for part in ["gitVersion=v1.37.2 ", "gitMajor=1 ", "gitMinor=37 "] {
            assert!(stamp.contains(part), "{part} in {stamp}");
        }
        assert!(super::stamp("one").is_err());
        Ok(())
    }

    #[test]
    fn the_sources_of_both_programs_decide() -> Result<()> {
        let sources = sources(&workspace::root().join("tests/cluster/kubebox"))?;
        let names: Vec<_> = sources.lines().filter_map(|line| line.strip_prefix("--- ")).collect();
        let expected = ["coredns/main.go", "go.mod", "go.sum", "main.go"];
        assert_eq!(names, expected.map(|name| format!("tests/cluster/kubebox/{name}")));
        Ok(())
    }
}
