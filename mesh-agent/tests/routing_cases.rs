//! What becomes of requests and connections under a configuration, as data.
//!
//! Each file of `routing_cases/` holds cases: what is configured, what a client sends, and where that must lead, or
//! how the configuration must be refused. `world.yaml` has the services and pods that all cases share. The way is the
//! product's own: read, compile, then the pure functions of `route/`. Needs no root and opens no socket.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use mesh_agent::source::read_documents;
use serde::de::DeserializeOwned;

#[path = "routing_cases/case.rs"]
mod case;
#[path = "routing_cases/outcome.rs"]
mod outcome;
#[path = "routing_cases/run.rs"]
mod run;

use case::{File, World};

/// Fewer cases than this means that files were not found or not read.
const AT_LEAST: usize = 150;

/// Fewer refusals than this, likewise.
const REFUSALS_AT_LEAST: usize = 30;

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let name = || path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(name)?;
    let mut documents = read_documents(&text).map_err(anyhow::Error::msg).with_context(name)?;
    ensure!(documents.len() == 1, "{}: one document is expected", path.display());
    serde_path_to_error::deserialize(documents.remove(0)).with_context(name)
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let is_yaml = path.extension().is_some_and(|extension| extension == "yaml");
        if is_yaml && path.file_name().is_some_and(|name| name != "world.yaml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[test]
fn every_case_comes_out_as_written() -> Result<()> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/routing_cases");
    let world: World = read(&dir.join("world.yaml"))?;
    let (mut ran, mut refusals, mut failures) = (0, 0, Vec::new());
    for path in files(&dir)? {
        let file: File = read(&path)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        for case in &file.cases {
            ran += 1;
            refusals += usize::from(case.refused.is_some());
            let wrong = run::case(&world, &file, case);
            failures.extend(wrong.into_iter().map(|wrong| format!("{name}: {}: {wrong}", case.name)));
        }
    }
    println!("{ran} routing cases, {refusals} of them refusals");
    ensure!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    ensure!(ran >= AT_LEAST, "only {ran} cases ran, at least {AT_LEAST} are expected");
    ensure!(
        refusals >= REFUSALS_AT_LEAST,
        "only {refusals} refusals, at least {REFUSALS_AT_LEAST} are expected"
    );
    Ok(())
}
