//! `meshctl status`: whether the agent serves, and what it has.

use std::io::Write;

use serde::Serialize;
use serde_json::Value;

use super::{
    Failure, Output,
    client::Client,
    output::{self, Rows},
};
use crate::admin::{CertificateView, FailingPod, HealthView, OverloadView, PodsView, VersionView};

#[derive(Debug, Serialize)]
struct Status {
    version: String,
    ready: bool,
    waiting_for: Vec<String>,
    config_revision: u64,
    problems: Vec<String>,
    workloads: usize,
    node: String,
    enrolled: Vec<String>,
    failing: Vec<FailingPod>,
    services: usize,
    certificates: usize,
    overload: OverloadView,
}

pub(super) async fn run(client: &Client, output: Output, out: &mut dyn Write) -> Result<(), Failure> {
    let version: VersionView = client.get("/version").await?;
    let health: HealthView = client.get("/healthz").await?;
    let config: Value = client.get("/config_dump").await?;
    let pods: PodsView = client.get("/pods").await?;
    let overload: OverloadView = client.get("/overload").await?;
    let certificates: Vec<CertificateView> = client.get("/certs").await?;
    let count = |name: &str| config[name].as_array().map_or(0, Vec::len);
    let strings = |value: &Value| {
        value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let status = Status {
        version: format!("{} {}", version.component, version.version),
        ready: health.ready,
        waiting_for: health.waiting_for,
        config_revision: config["revision"].as_u64().unwrap_or_default(),
        problems: strings(&config["problems"]),
        workloads: count("workloads"),
        node: pods.node,
        enrolled: pods.enrolled,
        failing: pods.failing,
        services: count("services"),
        certificates: certificates.iter().filter(|one| one.role == CertificateView::WORKLOAD).count(),
        overload,
    };
    output::print(output, out, &status, rows)
}

fn rows(status: &Status) -> Rows {
    let mut rows = Rows::new(["WHAT", "IS"]);
    let ready =
        if status.ready { "yes".to_owned() } else { format!("waits for {}", status.waiting_for.join(", ")) };
    for (what, is) in [
        ("version", status.version.clone()),
        ("ready", ready),
        ("config revision", status.config_revision.to_string()),
        ("node", status.node.clone()),
        ("enrolled pods", format!("{} of this node", status.enrolled.len())),
        ("failing pods", format!("{} of this node", status.failing.len())),
        ("workloads", format!("{} in the mesh's configuration", status.workloads)),
        ("services", status.services.to_string()),
        ("certificates", status.certificates.to_string()),
        ("problems", status.problems.len().to_string()),
        ("memory", memory(&status.overload)),
        ("sheds", sheds(&status.overload).to_owned()),
    ] {
        rows.push(&[what.to_owned(), is]);
    }
    for pod in &status.overload.shed {
        rows.push(&["shed".to_owned(), pod.clone()]);
    }
    for FailingPod { pod, reason } in &status.failing {
        rows.push(&["not enrolled".to_owned(), format!("{pod}: {reason}")]);
    }
    for problem in &status.problems {
        rows.push(&["problem".to_owned(), problem.clone()]);
    }
    rows
}

fn memory(overload: &OverloadView) -> String {
    let mebibytes = |bytes: u64| format!("{} MiB", bytes >> 20);
    match overload.memory_limit_bytes {
        Some(limit) => {
            let [used, promised] = [overload.memory_bytes, overload.memory_promised_bytes].map(mebibytes);
            format!("{used} and {promised} to come, of {}", mebibytes(limit))
        }
        None => "has no limit".to_owned(),
    }
}

fn sheds(overload: &OverloadView) -> &'static str {
    match overload.level.as_str() {
        "none" => "no",
        "critical" => "all new work: memory is at its limit",
        _ => "new work of pods that hold most: memory is near its limit",
    }
}
