//! `cargo xtask install-yaml`: the chart as plain YAML, for those who install without helm.
//!
//! `deploy/install.yaml` is what helm makes of `deploy/chart` with the chart's own values, after the namespace: definitions
//! first. Its first line has the digest of the chart's files, so that `cargo xtask lint` notices a chart that has changed
//! since, without helm. Never writes that file with other values than the chart's. Tested below.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use sha2::{Digest, Sha256};

use crate::bench::peers;
use crate::oci;
use crate::progress::Progress;
use crate::workspace;

/// What renders and installs the chart.
const HELM: &str = "3.19.0";

/// The oldest Kubernetes that the chart is for: what is rendered has to do for all of them. helm refuses an older one.
const KUBERNETES: &str = "1.30.0";

/// Where everything is put.
const NAMESPACE: &str = "mesh-system";

const CHART: &str = "deploy/chart";
const RENDERED: &str = "deploy/install.yaml";

/// What the first line says before the digest.
const HEAD: &str = "# Made by `cargo xtask install-yaml` of deploy/chart, whose files have the digest ";

/// What is rendered.
#[derive(Debug, Default, Args)]
pub struct Options {
    /// Where it goes [default: deploy/install.yaml]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// A value of the chart other than its own, as of `helm --set`
    #[arg(long, value_name = "NAME=VALUE", requires = "out")]
    set: Vec<String>,
}

/// Renders it.
pub fn run(options: &Options) -> Result<()> {
    let mut progress = Progress::start();
    let helm = helm(&mut progress)?;
    let out = options.out.clone().unwrap_or_else(|| workspace::root().join(RENDERED));
    progress.step("helm template", || {
        let rendered = rendered(&helm, &options.set)?;
        fs::write(&out, rendered).with_context(|| format!("cannot write {}", out.display()))
    })?;
    println!("\n{}\n\n{}", progress.table(), out.display());
    Ok(())
}

/// Builds helm, unless it is there.
pub fn helm(progress: &mut Progress) -> Result<PathBuf> {
    peers::of_go(progress, "helm", HELM, "helm.sh/helm/v3", "./cmd/helm")?;
    Ok(peers::program("helm"))
}

/// Says what to do when the file is not that of the chart.
pub fn check() -> Result<()> {
    let text = fs::read_to_string(workspace::root().join(RENDERED));
    let text = text.with_context(|| format!("there is no {RENDERED}: run `cargo xtask install-yaml`"))?;
    is_of(&text, &digest_of(&workspace::root().join(CHART))?)
}

fn is_of(text: &str, digest: &str) -> Result<()> {
    let has = text.lines().next().and_then(|line| line.strip_prefix(HEAD));
    ensure!(has == Some(digest), "{RENDERED} is not of the chart as it is: run `cargo xtask install-yaml`");
    Ok(())
}

fn rendered(helm: &Path, set: &[String]) -> Result<String> {
    let mut template = workspace::command(helm);
    template.args([
        "template",
        "mesh",
        CHART,
        "--namespace",
        NAMESPACE,
        "--include-crds",
        // Hooks are helm's: nobody else runs them.
        "--no-hooks",
        "--kube-version",
        KUBERNETES,
    ]);
    template.args(set.iter().flat_map(|value| ["--set", value]));
    let output = template.stdin(Stdio::null()).output().context("cannot start helm")?;
    if !output.status.success() {
        bail!("helm template: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let objects = String::from_utf8(output.stdout).context("helm wrote no text")?;
    Ok(document(&objects, &digest_of(&workspace::root().join(CHART))?))
}

/// What helm wrote, below its first line and the namespace, and without the words that it is helm's.
fn document(objects: &str, digest: &str) -> String {
    let of_helm = |line: &&str| {
        let line = line.trim_start();
        line.starts_with("app.kubernetes.io/managed-by: ") || line.starts_with("helm.sh/chart: ")
    };
    let mut text = format!("{HEAD}{digest}\n{}", namespace());
    for line in objects.lines().filter(|line| !of_helm(line)) {
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// Agents are on the host's network and have its directories, which only this level of Kubernetes' pod security lets pass.
fn namespace() -> String {
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: {NAMESPACE}\n  labels:\n    \
         app.kubernetes.io/part-of: mesh\n    pod-security.kubernetes.io/enforce: privileged\n"
    )
}

/// Of the names and bytes of all files below a directory.
fn digest_of(dir: &Path) -> Result<String> {
    let mut files = BTreeMap::new();
    gather(dir, dir, &mut files)?;
    let mut hash = Sha256::new();
    for (name, bytes) in files {
        hash.update(format!("{name}\n{}\n", bytes.len()));
        hash.update(bytes);
    }
    Ok(oci::digest(hash))
}

fn gather(top: &Path, dir: &Path, files: &mut BTreeMap<String, Vec<u8>>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            gather(top, &path, files)?;
            continue;
        }
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        files.insert(path.strip_prefix(top).unwrap_or(&path).to_string_lossy().into_owned(), bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_of_the_chart() -> Result<()> {
        check()
    }

    #[test]
    fn a_file_of_another_chart_is_noticed() {
        let text = document("---\nkind: A\n", "abc");
        assert!(is_of(&text, "abc").is_ok());
        for other in ["abd", "", "abcd"] {
            let error = is_of(&text, other).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.ends_with("run `cargo xtask install-yaml`"), "{error}");
        }
        assert!(is_of("", "abc").is_err());
    }

    #[test]
    fn the_namespace_comes_first_and_nothing_is_helms() {
        let labels =
            "  labels:\n    app.kubernetes.io/managed-by: Helm\n    helm.sh/chart: mesh-1\n    a: b\n";
        let text = document(&format!("---\nkind: A\nmetadata:\n{labels}"), "abc");
        assert!(text.starts_with(&format!("{HEAD}abc\n---\napiVersion: v1\nkind: Namespace\n")), "{text}");
        assert!(text.ends_with("---\nkind: A\nmetadata:\n  labels:\n    a: b\n"), "{text}");
    }

    #[test]
    fn each_byte_and_each_name_counts() -> Result<()> {
        let dir = std::env::temp_dir().join(format!("install-yaml-{}", std::process::id()));
        fs::create_dir_all(dir.join("templates"))?;
        let of = |name: &str, text: &str| {
            fs::write(dir.join(name), text)?;
            let digest = digest_of(&dir)?;
            fs::remove_file(dir.join(name))?;
            anyhow::Ok(digest)
        };
        let digests =
            [of("a", "x")?, of("a", "y")?, of("b", "x")?, of("templates/a", "x")?, digest_of(&dir)?];
        let again = of("a", "x")?;
        fs::remove_dir_all(&dir)?;
        assert_eq!(again, digests[0]);
        for (i, one) in digests.iter().enumerate() {
            assert!(digests[i + 1..].iter().all(|other| other != one), "{digests:?}");
        }
        Ok(())
    }
}
