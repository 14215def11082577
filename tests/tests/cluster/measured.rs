//! `cargo xtask bench kubernetes` measures what it says, so that it does not rot: a short run with a hundred Services ends well,
//! leaves nothing in the cluster, and has every figure. How fast anything is, no test asserts.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use lab::cluster::Cluster;
use serde_json::Value;
use tempfile::TempDir;

#[test]
fn an_api_server_with_many_services_is_measured_against_one_with_few() -> Result<()> {
    let Some(cluster) = Cluster::alone()? else { return Ok(()) };
    let kubeconfig = std::env::var_os("KUBECONFIG").context("a cluster is given with its KUBECONFIG")?;
    let out = TempDir::new()?;
    let mut bench = Command::new(lab::binary("lab-bench", "MESH_LAB_BENCH", "lab")?);
    bench.args(["kubernetes", "--quick", "--kubeconfig"]).arg(kubeconfig).arg("--out").arg(out.path());
    let output = bench.output().context("starting lab-bench")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    cluster.kubectl(["wait", "--for=delete", "namespace/mesh-bench", "--timeout=120s"])?;
    let kept: Value = serde_json::from_slice(&std::fs::read(out.path().join("kubernetes.json"))?)?;
    let rows = kept["rows"].as_array().context("no rows")?;
    for figure in [
        "an agent's start, until it is ready",
        "memory of the agent",
        "the most it held",
        "CPU of a change of one endpoint",
        "change asked for, until in force, p50",
        "change asked for, until in force, p99",
        "change answered, until in force, p50",
        "change answered, until in force, p99",
    ] {
        for variant in ["10 Services", "100 Services"] {
            let row = rows.iter().find(|row| row["figure"] == figure && row["variant"] == variant);
            let row = row.with_context(|| format!("{variant} has no figure {figure:?}: {rows:?}"))?;
            // The agent may know of a change before the one who asked for it, and use no more than it does anyway.
            let may_be_nothing = figure.starts_with("change answered") || figure.starts_with("CPU");
            let median = row["median"].as_f64().context("no median")?;
            ensure!(median > 0.0 || may_be_nothing && median == 0.0, "{row}");
            ensure!(
                said.contains(figure) && said.contains(variant),
                "{figure} of {variant} is not in {said}"
            );
        }
    }
    let goals = kept["goals"].as_array().context("no goals")?;
    ensure!(goals.len() == 3 && goals.iter().all(|goal| goal["measured"].is_number()), "{goals:?}");
    Ok(())
}
