//! `meshctl validate`: what is wrong with manifests, without a mesh or a cluster.
//!
//! Promises the words in which the agents, the controller's webhook and the status of objects say it. Tested in
//! `tests/validate.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{Failure, Output, or_dash, output, output::Rows};
use crate::{
    source::validate::{self, Validation, Written},
    state::{
        Problem,
        compile::{Netns, Settings},
        defaults::ROOT_NAMESPACE,
    },
};

/// What stands for standard input.
const STANDARD_INPUT: &str = "-";

/// `meshctl validate`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Manifests: files, directories (their `*.yaml`, `*.yml` and `*.json`), or `-` for standard input
    #[arg(required = true, value_name = "FILE|DIR|-")]
    paths: Vec<PathBuf>,
    /// Namespace whose policies hold for the whole mesh
    #[arg(long, env = "MESH_ROOT_NAMESPACE", value_name = "NAMESPACE", default_value = ROOT_NAMESPACE)]
    root_namespace: String,
}

#[derive(Debug, Serialize)]
struct Report {
    files: usize,
    objects: usize,
    /// Kinds that are none of the mesh's.
    passed_over: BTreeSet<String>,
    problems: BTreeSet<Problem>,
}

pub(super) fn run(args: &Args, output: Output, out: &mut dyn Write) -> Result<(), Failure> {
    let written = read(&args.paths)?;
    let settings = Settings {
        root_namespace: args.root_namespace.as_str().into(),
        // As in a cluster: nobody writes down the network namespaces of pods.
        netns: Netns::Node(Path::new("").into()),
        ..Settings::default()
    };
    let Validation { objects, passed_over, problems } = validate::validate(&written, &settings);
    let report = Report { files: written.len(), objects: objects.len(), passed_over, problems };
    if output == Output::Table && report.problems.is_empty() {
        writeln!(out, "nothing is wrong with {} objects in {} files", report.objects, report.files)?;
    } else {
        output::print(output, out, &report, rows)?;
    }
    match report.problems.len() {
        0 => Ok(()),
        1 => Err(Failure::Request("1 problem".to_owned())),
        several => Err(Failure::Request(format!("{several} problems"))),
    }
}

/// Each file once, however often it is named.
fn read(paths: &[PathBuf]) -> Result<Vec<Written>, Failure> {
    let mut written = BTreeMap::new();
    for path in paths {
        let unread = |error: io::Error| Failure::Usage(format!("{}: {error}", path.display()));
        if path.as_os_str() == STANDARD_INPUT {
            let input = validate::read_from("standard input", &mut io::stdin().lock()).map_err(unread)?;
            written.insert(PathBuf::from(STANDARD_INPUT), input);
            continue;
        }
        for file in validate::read(path).map_err(unread)? {
            let place = file.from.canonicalize().unwrap_or_else(|_| file.from.clone());
            written.insert(place, file);
        }
    }
    Ok(written.into_values().collect())
}

fn rows(report: &Report) -> Rows {
    let mut rows = Rows::new(["FILE", "OBJECT", "FIELD", "CAUSE", "MESSAGE"]);
    for Problem { file, object, field, message, cause } in &report.problems {
        rows.push(&[
            file.clone(),
            or_dash(object.as_ref()),
            or_dash(field.as_ref()),
            cause.reason().to_owned(),
            message.clone(),
        ]);
    }
    rows
}
