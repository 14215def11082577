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
    for row in kept["rows"].as_array().context("no rows")? {
        let (figure, variant) = (row["figure"].as_str().unwrap_or(""), row["variant"].as_str().unwrap_or(""));
        // A difference of two latencies may be anything.
        let least = if figure.starts_with("added") { f64::MIN } else { f64::MIN_POSITIVE };
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
    for variant in ["no mesh", "mesh", "bare hyper pair", "nginx pair"] {
        let figures: Vec<_> =
            rows.iter().filter(|(_, of)| *of == variant).map(|(figure, _)| *figure).collect();
        assert_eq!(figures[0], "requests", "{rows:?}");
        assert_eq!(figures.contains(&"CPU of both proxies, per request"), variant != "no mesh", "{rows:?}");
    }
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
