//! `meshctl check`: whether everything is there that the mesh needs, and what to do about what is not.
//!
//! On a node: its kernel (`kernel.rs`) and its agent (`node.rs`). In a cluster: what the API server tells (`cluster.rs`,
//! `installed.rs`, `network_policies.rs`), and what each agent says of its own node. Promises that each line which is not
//! well says what it costs and what to do, and exit code 0 only where nothing has failed. Never changes anything. Tested in
//! each file, and in `tests.rs` with an agent and with an API server.

mod certificates;
mod cluster;
mod installed;
mod kernel;
mod network_policies;
mod node;
#[cfg(test)]
mod tests;

use std::io::Write;

use serde::{Deserialize, Serialize};

use super::{Cli, Failure, Output, Rows, cluster::Place, print};

/// How one check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it has to be.
    Ok,
    /// The mesh works, without something.
    Warning,
    /// Something does not work.
    Failure,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Check {
    /// What is checked, for example `kernel` or `node a: kernel`.
    about: String,
    verdict: Verdict,
    /// What was found, and what it costs.
    found: String,
    /// What to do; none where it is well.
    remedy: Option<String>,
}

impl Check {
    fn ok(about: &str, found: impl Into<String>) -> Self {
        Self { about: about.to_owned(), verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn warning(about: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        let remedy = Some(remedy.into());
        Self { about: about.to_owned(), verdict: Verdict::Warning, found: found.into(), remedy }
    }

    fn failure(about: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Failure, ..Self::warning(about, found, remedy) }
    }
}

/// Everything that was checked.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Report {
    checks: Vec<Check>,
}

/// Checks this node.
pub(super) async fn here(cli: &Cli, out: &mut dyn Write) -> Result<(), Failure> {
    let mut checks = kernel::checks(&kernel::Facts::gather());
    checks.extend(node::checks(cli).await);
    shown(&Report { checks }, cli.output, out)
}

/// Checks a cluster, with the nodes that have an agent.
pub(super) async fn of_cluster(place: &Place, output: Output, out: &mut dyn Write) -> Result<(), Failure> {
    let client = place.client().await?;
    shown(&Report { checks: cluster::checks(&client, &place.mesh_namespace).await }, output, out)
}

fn shown(report: &Report, output: Output, out: &mut dyn Write) -> Result<(), Failure> {
    print(output, out, report, rows)?;
    let count = |verdict| report.checks.iter().filter(|check| check.verdict == verdict).count();
    match (count(Verdict::Failure), count(Verdict::Warning)) {
        (0, _) => Ok(()),
        (failures, warnings) => Err(Failure::Request(format!(
            "of {} checks {failures} failed, and {warnings} warn",
            report.checks.len()
        ))),
    }
}

fn rows(report: &Report) -> Rows {
    let mut rows = Rows::new(["RESULT", "ABOUT", "FOUND", "WHAT TO DO"]);
    for check in &report.checks {
        let result = match check.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Failure => "failure",
        };
        let remedy = check.remedy.clone().unwrap_or_default();
        rows.push(&[result.to_owned(), check.about.clone(), check.found.clone(), remedy]);
    }
    rows
}
