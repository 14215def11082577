//! What the agent of this node says of itself.
//!
//! Tested in `tests.rs`, with an agent's admin endpoint.

use std::path::Path;

use serde_json::Value;

use super::{Check, certificates};
use crate::{
    admin::{CertificateView, HealthView, PodsView, VersionView},
    cni::install::Installation,
    config::RUN_DIRS,
    ctl::{Cli, Failure, admin_address, client::Client, only_run_dir, run_dirs},
};

/// Pods and problems that are named one by one; of the rest, how many.
const NAMED: usize = 5;

pub(super) async fn checks(cli: &Cli) -> Vec<Check> {
    let told = cli.admin.is_some() || cli.run_dir.is_some();
    if !told && run_dirs(Path::new(RUN_DIRS)).is_empty() {
        return vec![Check::warning(
            "agent",
            "none runs on this node",
            "nothing, if the mesh is not installed yet; else see the pods of the DaemonSet mesh-agent",
        )];
    }
    let mut checks = match of_agent(cli).await {
        Ok(checks) => checks,
        Err(failure) => vec![Check::failure("agent", failure.to_string(), "see the agent's log")],
    };
    let run_dir = cli.run_dir.clone().map_or_else(|| only_run_dir(Path::new(RUN_DIRS)), Ok);
    checks.extend(run_dir.ok().map(|dir| cni(&dir)));
    checks
}

async fn of_agent(cli: &Cli) -> Result<Vec<Check>, Failure> {
    let client = Client::new(admin_address(cli)?);
    let version: VersionView = client.get("/version").await?;
    let health: HealthView = client.get("/healthz").await?;
    let pods: PodsView = client.get("/pods").await?;
    let config: Value = client.get("/config_dump").await?;
    let certificates: Vec<CertificateView> = client.get("/certs").await?;
    let mut checks = vec![ready(&version, &health), enrolled(&pods), problems(&config)];
    checks.extend(certificates::of_agent(&certificates));
    Ok(checks)
}

fn ready(version: &VersionView, health: &HealthView) -> Check {
    let who = format!("{} {}", version.component, version.version);
    if health.ready {
        return Check::ok("agent", format!("{who} is ready"));
    }
    let waits = health.waiting_for.join(", ");
    Check::failure(
        "agent",
        format!("{who} is not ready: waits for {waits}"),
        "see its log for why that takes so long",
    )
}

fn enrolled(pods: &PodsView) -> Check {
    let about = "pods";
    if pods.failing.is_empty() {
        return Check::ok(about, format!("{} enrolled, none failing", pods.enrolled.len()));
    }
    let failing = pods.failing.iter().map(|one| format!("{} ({})", one.pod, one.reason));
    Check::failure(
        about,
        format!("not enrolled: {}", first(failing)),
        "put right what each reason names; each is tried again by itself",
    )
}

fn problems(config: &Value) -> Check {
    let about = "configuration";
    let problems: Vec<&str> =
        config["problems"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if problems.is_empty() {
        return Check::ok(about, "without problems");
    }
    Check::warning(
        about,
        format!("what was good last is in force for: {}", first(problems.iter().map(ToString::to_string))),
        "put these objects right",
    )
}

/// The first few, and how many more.
fn first(all: impl ExactSizeIterator<Item = String>) -> String {
    let more = all.len().saturating_sub(NAMED);
    let text = all.take(NAMED).collect::<Vec<_>>().join("; ");
    if more == 0 { text } else { format!("{text}; and {more} more") }
}

/// Whether the plugin stands in a configuration of the container runtime.
fn cni(run_dir: &Path) -> Check {
    let about = "CNI plugin";
    match Installation::left_in(run_dir) {
        Ok(None) => Check::warning(
            about,
            "the agent installs none here: pods may start before they are enrolled",
            "nothing, if that is wanted; else start the agent with --cni-bin-dir and --cni-conf-dir",
        ),
        Ok(Some(plugin)) => {
            in_place(&plugin.files().iter().map(|file| file.display().to_string()).collect::<Vec<_>>())
        }
        Err(error) => Check::failure(about, format!("{error:#}"), "see the agent's log"),
    }
}

/// By the files it is in: its program, and the configurations that name it.
fn in_place(files: &[String]) -> Check {
    let about = "CNI plugin";
    if files.len() > 1 {
        return Check::ok(about, format!("in {}", files.join(", ")));
    }
    let found = match files {
        [] => "its program is not there, and no configuration of the container runtime names it".to_owned(),
        files => format!("{} alone: either the program or the configuration is missing", files.join(", ")),
    };
    Check::failure(
        about,
        format!("{found}: pods may start before they are enrolled"),
        "is --cni-conf-dir (`node.cniConfDir` of the chart) where the container runtime of this node reads? Its network plugin \
         has to have a configuration there first",
    )
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn the_plugin_needs_its_program_and_a_configuration() {
        let verdict =
            |files: &[&str]| in_place(&files.iter().map(ToString::to_string).collect::<Vec<_>>()).verdict;
        assert_eq!(verdict(&["/opt/cni/bin/mesh-cni", "/etc/cni/net.d/10-a.conflist"]), Verdict::Ok);
        assert_eq!(verdict(&["/opt/cni/bin/mesh-cni"]), Verdict::Failure);
        assert_eq!(verdict(&[]), Verdict::Failure);
    }

    #[test]
    fn the_first_few_are_named() {
        let text = |count: usize| first((0..count).map(|i| i.to_string()));
        assert_eq!(text(2), "0; 1");
        assert_eq!(text(7), "0; 1; 2; 3; 4; and 2 more");
    }
}
