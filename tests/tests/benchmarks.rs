//! `cargo xtask bench` measures what it says, so that it does not rot: a short run in a small world ends well, leaves
//! nothing behind, and has every figure of everything that it compares. How fast anything is, no test asserts.

use std::{path::Path, process::Output, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Command;

/// For a machine that is busy building.
const LIMIT: Duration = Duration::from_mins(3);

/// Whether the lab can run, and `program` is installed.
fn can_run(program: &str) -> Result<bool> {
    if !lab::require_root()? {
        return Ok(false);
    }
    if Path::new(program).is_file() {
        return Ok(true);
    }
    ensure!(std::env::var_os("MESH_REQUIRE_LAB").is_none(), "no {program}: `cargo xtask test` installs it");
    eprintln!("skipped: no {program}: `cargo xtask test` installs it");
    Ok(false)
}

async fn bench(out: &Path, args: &[&str]) -> Result<Output> {
    let mut command = Command::new(lab::binary("lab-bench", "MESH_LAB_BENCH", "lab")?);
    command.args(args).arg("--out").arg(out).kill_on_drop(true);
    let ended = tokio::time::timeout(LIMIT, command.output()).await;
    Ok(ended.with_context(|| format!("lab-bench did not end within {LIMIT:?}"))??)
}

/// Runs one suite to its end, and returns what it has kept.
async fn quick(suite: &str) -> Result<Value> {
    let out = TempDir::new()?;
    let report = out.path().join("report.md");
    let output = bench(out.path(), &[suite, "--quick", "--report", &report.to_string_lossy()]).await?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let kept: Value = serde_json::from_slice(&std::fs::read(out.path().join(format!("{suite}.json")))?)?;
    let report = std::fs::read_to_string(report)?;
    let chart = std::fs::read_to_string(out.path().join(format!("benchmarks/{suite}.svg")))?;
    ensure!(chart.contains("</svg>") && report.contains(&format!("(benchmarks/{suite}.svg)")), "{chart}");
    for row in kept["rows"].as_array().context("no rows")? {
        let (figure, variant) = (row["figure"].as_str().unwrap_or(""), row["variant"].as_str().unwrap_or(""));
        // A difference of two latencies may be anything, and what grew or was used beside something else may be nothing.
        let least = match figure {
            _ if figure.starts_with("added") => f64::MIN,
            _ if figure.starts_with("per idle") || figure.starts_with("CPU of a change") => 0.0,
            _ => f64::MIN_POSITIVE,
        };
        ensure!(row["median"].as_f64().is_some_and(|value| value >= least), "{row}");
        ensure!(row["values"].as_array().is_some_and(|values| !values.is_empty()), "{row}");
        for text in [&*said, &report] {
            ensure!(
                text.contains(figure) && text.contains(variant),
                "{figure} of {variant} is not in {text}"
            );
        }
    }
    Ok(kept)
}

/// Every figure of every variant, in the order in which they are shown.
fn rows(kept: &Value) -> Vec<(&str, &str)> {
    let rows = kept["rows"].as_array().map(Vec::as_slice).unwrap_or_default();
    rows.iter()
        .map(|row| (row["figure"].as_str().unwrap_or(""), row["variant"].as_str().unwrap_or("")))
        .collect()
}

#[tokio::test]
async fn capture_is_measured_against_redirect_and_none() -> Result<()> {
    if !can_run("/usr/sbin/iptables")? {
        return Ok(());
    }
    let kept = quick("capture").await?;
    let expected = [
        ("connections", "no capture"),
        ("connections", "mesh"),
        ("connections", "iptables REDIRECT"),
        ("CPU of all, per connection", "no capture"),
        ("CPU of all, per connection", "mesh"),
        ("CPU of all, per connection", "iptables REDIRECT"),
        ("CPU of the relay, per connection", "mesh"),
        ("CPU of the relay, per connection", "iptables REDIRECT"),
    ];
    assert_eq!(rows(&kept), expected);
    assert_eq!(kept["command"], "cargo xtask bench capture --rounds 1 --seconds 1 --quick");
    assert!(kept["machine"]["cores"].as_u64().is_some_and(|cores| cores > 0), "{}", kept["machine"]);
    Ok(())
}

#[tokio::test]
async fn pods_that_are_not_enrolled_are_measured_with_and_without_an_agent() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let kept = quick("unenrolled").await?;
    let rows = rows(&kept);
    assert_eq!(rows.len(), 12, "{rows:?}");
    for variant in ["no agent", "no agent, again", "agent"] {
        assert_eq!(rows.iter().filter(|(_, of)| *of == variant).count(), 4, "{rows:?}");
    }
    Ok(())
}

#[tokio::test]
async fn enrolments_are_timed() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let kept = quick("enrolment").await?;
    assert_eq!(rows(&kept), [("manifest to enrolled, p50", "mesh"), ("manifest to enrolled, p99", "mesh")]);
    assert_eq!(kept["rows"][0]["values"].as_array().map(Vec::len), Some(2));
    Ok(())
}

#[tokio::test]
async fn http_is_measured_against_pairs_of_proxies() -> Result<()> {
    if !can_run("/usr/sbin/nginx")? || !can_run("/usr/bin/wrk")? {
        return Ok(());
    }
    let kept = quick("http").await?;
    let rows = rows(&kept);
    for variant in ["no mesh", "mesh", "bare hyper pair", "nginx pair", "haproxy pair"] {
        let figures: Vec<_> =
            rows.iter().filter(|(_, of)| *of == variant).map(|(figure, _)| *figure).collect();
        assert_eq!(figures[0], "requests", "{rows:?}");
        assert_eq!(figures.contains(&"CPU of both proxies, per request"), variant != "no mesh", "{rows:?}");
    }
    let goals = judged(&kept, "CPU per request")?;
    assert_eq!(goals.len(), 3, "{goals:?}");
    Ok(())
}

/// Figures of the goals whose name begins so, by what they are measured against. A peer that is not installed leaves its own
/// out, and says so; everything else is there.
fn judged(kept: &Value, begins: &str) -> Result<Vec<(String, Option<f64>)>> {
    let all = kept["goals"].as_array().context("no goals")?;
    let name = |goal: &Value| goal["what"].as_str().unwrap_or_default().to_owned();
    let goals: Vec<_> = all.iter().filter(|goal| name(goal).starts_with(begins)).collect();
    ensure!(!goals.is_empty(), "no goal {begins}: {all:?}");
    let peers = ["Envoy", "nginx", "haproxy"];
    for goal in &goals {
        let of_peer = peers.iter().any(|peer| name(goal).contains(peer));
        ensure!(of_peer || goal["measured"].is_number(), "{goal}");
    }
    Ok(goals.iter().map(|goal| (name(goal), goal["measured"].as_f64())).collect())
}

/// Whether every variant that needs no peer has every one of these figures.
fn have(kept: &Value, variants: &[&str], figures: &[&str]) -> Result<()> {
    let rows = rows(kept);
    for variant in variants {
        for figure in figures {
            ensure!(rows.contains(&(*figure, *variant)), "{variant} has no {figure}: {rows:?}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn new_connections_and_handshakes_are_measured_against_nginx() -> Result<()> {
    if !can_run("/usr/sbin/nginx")? || !can_run("/usr/bin/wrk")? || !can_run("/usr/sbin/iptables")? {
        return Ok(());
    }
    let kept = quick("connections").await?;
    have(&kept, &["no mesh", "mesh", "nginx pair"], &["new connections"])?;
    have(
        &kept,
        &["mesh", "nginx pair"],
        &["CPU of both proxies, per connection", "CPU of the one who answers, per full handshake"],
    )?;
    for (goal, measured) in judged(&kept, "")? {
        ensure!(measured.is_some_and(|measured| measured > 0.0), "{goal}: {measured:?}");
    }
    Ok(())
}

#[tokio::test]
async fn opaque_tcp_is_measured_against_pairs_of_proxies() -> Result<()> {
    if !can_run("/usr/sbin/haproxy")? {
        return Ok(());
    }
    let kept = quick("tcp").await?;
    let figures = ["exchanges of 1 KiB", "1 KiB there and back on one connection, p50", "bulk"];
    have(&kept, &["no mesh", "mesh", "haproxy pair"], &figures)?;
    let figures = ["CPU of both proxies, per exchange", "CPU of the proxies, per GiB"];
    have(&kept, &["mesh", "haproxy pair"], &figures)?;
    assert_eq!(judged(&kept, "CPU")?.len(), 2);
    Ok(())
}

#[tokio::test]
async fn pods_of_one_node_are_measured_with_and_without_an_agent_between() -> Result<()> {
    if !can_run("/usr/sbin/nginx")? || !can_run("/usr/bin/wrk")? || !can_run("/usr/sbin/iptables")? {
        return Ok(());
    }
    let kept = quick("same-node").await?;
    have(&kept, &["no mesh", "mesh", "nginx, one hop, no TLS"], &["requests"])?;
    let figures = ["CPU of all, per exchange of 1 KiB", "1 byte there and back, p50"];
    have(&kept, &["no mesh, bytes", "direct (mesh)", "through the agent", "tokio copy"], &figures)?;
    have(&kept, &["no mesh, bytes", "direct (mesh)"], &["time per connection"])?;
    have(&kept, &["through the agent", "tokio copy"], &["CPU of the proxies, per GiB"])?;
    judged(&kept, "direct")?;
    judged(&kept, "through the agent")?;
    Ok(())
}

#[tokio::test]
async fn grpc_is_measured_on_one_connection() -> Result<()> {
    if !can_run("/usr/bin/h2load")? {
        return Ok(());
    }
    let kept = quick("grpc").await?;
    have(&kept, &["no mesh", "mesh"], &["calls"])?;
    have(&kept, &["mesh"], &["CPU of both proxies, per call"])?;
    assert_eq!(judged(&kept, "calls")?.len(), 1);
    Ok(())
}

#[tokio::test]
async fn memory_is_measured_idle_and_by_what_is_held() -> Result<()> {
    if !can_run("/usr/sbin/nginx")? {
        return Ok(());
    }
    let kept = quick("memory").await?;
    have(&kept, &["mesh"], &["idle", "per idle HTTP connection", "per idle TCP connection"])?;
    assert_eq!(judged(&kept, "an idle")?.len(), 3);
    Ok(())
}

#[tokio::test]
async fn busy_connections_are_measured_beside_idle_ones() -> Result<()> {
    if !can_run("/usr/sbin/nginx")? {
        return Ok(());
    }
    let kept = quick("idle").await?;
    have(&kept, &["none idle", "many idle"], &["requests", "p50 of the busy ones", "p99 of the busy ones"])?;
    judged(&kept, "p99").map(drop)
}

#[tokio::test]
async fn a_pod_is_measured_beside_a_loud_one() -> Result<()> {
    if !can_run("/usr/sbin/nginx")? {
        return Ok(());
    }
    let kept = quick("neighbour").await?;
    let beside = ["beside bulk outside the mesh", "beside bulk in the mesh"];
    have(&kept, &beside, &["p50 at 1,000/s", "p99 at 1,000/s", "bulk"])?;
    have(&kept, &["alone"], &["p50 at 1,000/s", "p99 at 1,000/s"])?;
    judged(&kept, "p99").map(drop)
}

#[tokio::test]
async fn many_services_are_measured_against_few() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let kept = quick("scale").await?;
    let figures = [
        "lookup, route and balance of a request",
        "memory of the agent",
        "a change of one endpoint, until it is in force",
    ];
    have(&kept, &["10 Services", "100 Services"], &figures)?;
    assert_eq!(judged(&kept, "")?.len(), 4);
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_measured_is_said() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let out = TempDir::new()?;
    for (args, says) in [
        (["capture", "--rounds=0"], "--rounds is a number from 1 to 100"),
        (["capture", "--seconds=100"], "--seconds is a number from 0.1 to 60"),
        (["no-such-suite", "--quick"], "invalid value 'no-such-suite'"),
    ] {
        let output = bench(out.path(), &args).await?;
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(says), "{args:?}: {error}");
    }
    Ok(())
}

#[tokio::test]
async fn authorization_is_measured_by_the_number_of_policies() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let kept = quick("authorization").await?;
    let variants = ["no policies", "20 policies", "200 policies"];
    let expected = ["judging a request", "compiling"].map(|figure| variants.map(|variant| (figure, variant)));
    ensure!(rows(&kept) == expected.concat(), "{:?}", rows(&kept));
    Ok(())
}

#[tokio::test]
async fn a_profile_has_the_stacks_of_the_agents() -> Result<()> {
    if !can_run("/usr/bin/perf")? || !can_run("/usr/bin/wrk")? {
        return Ok(());
    }
    let out = TempDir::new()?;
    let file = out.path().join("samples.txt");
    let output = bench(out.path(), &["http", "--quick", "--profile", &file.to_string_lossy()]).await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = std::fs::read_to_string(&file)?;
    // A sample is a line with its event, then its calls, the last one first.
    let samples = said.lines().filter(|line| line.contains("cpu-clock")).count();
    ensure!(samples > 0 && said.contains("mesh_agent::proxy::"), "{samples} samples: {said:.2000}");
    let left: Vec<_> = std::fs::read_dir(out.path())?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left == ["samples.txt"], "{left:?}");
    let output = bench(out.path(), &["scale", "--quick", "--profile", &file.to_string_lossy()]).await?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && error.contains("scale has no load that an agent carries"), "{error}");
    Ok(())
}

#[tokio::test]
async fn loads_are_put_on_agents_that_count_and_a_failed_one_is_told() -> Result<()> {
    if !can_run("/usr/bin/wrk")? {
        return Ok(());
    }
    let out = TempDir::new()?;
    let output = bench(out.path(), &["http", "tcp", "--train", "--seconds", "0.5"]).await?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(said.contains("http: 0.5 s on the mesh") && said.contains("tcp: 0.5 s on the mesh"), "{said}");
    ensure!(std::fs::read_dir(out.path())?.next().is_none(), "figures of a load that measures nothing");
    // A suite without agents has no load for them.
    let output = bench(out.path(), &["unenrolled", "--train"]).await?;
    ensure!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}
