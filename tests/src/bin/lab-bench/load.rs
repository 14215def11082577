//! The load: wrk as fast as it goes, fortio at a fixed rate, h2load for HTTP/2, and `bench-app` for all that they cannot.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{
    Output, Pod,
    bench::{Asked, Sent},
    clients::tool,
};
use serde_json::Value;

use crate::{peers::Course, rounds::Plan, world::ask};

pub const WRK: &str = "/usr/bin/wrk";
pub const H2LOAD: &str = "/usr/bin/h2load";
/// Where `cargo xtask bench` puts it.
const FORTIO: &str = "tools/bin/fortio";
/// Connections of wrk.
pub const CONNECTIONS: u32 = 64;
/// Requests per second at the fixed rate, and on how many connections.
pub const RATE: u32 = 1000;
pub const RATE_CONNECTIONS: u32 = 16;
/// How much of the fixed rate has to be reached for its latencies to count.
const REACHED: f64 = 0.95;

impl Paced {
    /// Whether the latencies are of the rate that was asked for.
    pub fn reached(&self) -> bool {
        self.rate >= REACHED * f64::from(RATE)
    }
}

/// How much longer than it was told a client may take.
const GRACE: Duration = Duration::from_secs(30);

/// What wrk says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flood {
    pub requests: u64,
    pub per_second: f64,
}

/// What fortio says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Paced {
    /// Requests per second that there really were.
    pub rate: f64,
    /// In milliseconds.
    pub p50: f64,
    pub p99: f64,
}

/// Whether connections are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connections {
    Kept,
    /// Each request has one of its own.
    New,
}

/// Requests, each as soon as the last has been answered.
pub async fn flood(pod: &Pod, url: &str, connections: Connections, seconds: f64) -> Result<Flood> {
    let mut wrk = Command::new(WRK);
    if connections == Connections::New {
        wrk.args(["-H", "Connection: close"]);
    }
    let threads = std::thread::available_parallelism()?.to_string();
    let seconds = seconds.ceil();
    wrk.args(["-t", &threads, "-c", &CONNECTIONS.to_string(), "-d", &format!("{seconds}s"), url]);
    let output = run(pod, wrk, seconds).await?;
    flooded(&output.stdout).with_context(|| format!("wrk {url}"))
}

fn flooded(said: &str) -> Result<Flood> {
    // Both lines are there only where something went wrong.
    ensure!(
        !said.contains("Non-2xx") && !said.contains("Socket errors"),
        "not every request succeeded: {said}"
    );
    let line =
        |has: &str| said.lines().find(|line| line.contains(has)).with_context(|| format!("wrk says {said}"));
    let requests = line(" requests in ")?.split_whitespace().next().and_then(|count| count.parse().ok());
    let per_second = line("Requests/sec:")?.split_whitespace().nth(1).and_then(|rate| rate.parse().ok());
    let requests = requests.filter(|requests| *requests > 0).context("no request was answered")?;
    Ok(Flood { requests, per_second: per_second.context("no rate")? })
}

/// Whether there is a client for a fixed rate: a run that only sees whether all works goes without.
pub fn can_pace() -> bool {
    tool(FORTIO).is_ok()
}

/// Requests at a fixed rate, far from what any of them can do.
pub async fn paced(pod: &Pod, url: &str, seconds: f64) -> Result<Paced> {
    let mut fortio = Command::new(tool(FORTIO).context("`cargo xtask bench http` installs it")?);
    fortio.args([
        "load",
        "-json",
        "-",
        "-quiet",
        "-qps",
        &RATE.to_string(),
        "-c",
        &RATE_CONNECTIONS.to_string(),
    ]);
    // Histograms of 10 µs.
    fortio.args(["-t", &format!("{seconds}s"), "-r", "0.00001", "-p", "50,99", "-uniform", url]);
    let output = run(pod, fortio, seconds).await?;
    let said: Value =
        serde_json::from_str(&output.stdout).with_context(|| format!("fortio says {}", output.stdout))?;
    pacing(&said).with_context(|| format!("fortio {url}"))
}

fn pacing(said: &Value) -> Result<Paced> {
    let codes = said["RetCodes"].as_object().context("no statuses")?;
    ensure!(codes.keys().all(|code| code == "200"), "not every request succeeded: {codes:?}");
    let rate = said["ActualQPS"].as_f64().context("no rate")?;
    let percentiles = said["DurationHistogram"]["Percentiles"].as_array().context("no percentiles")?;
    let milliseconds = |wanted: f64| {
        let found = percentiles.iter().find(|one| one["Percentile"].as_f64() == Some(wanted));
        let seconds = found.and_then(|one| one["Value"].as_f64());
        anyhow::Ok(1000.0 * seconds.with_context(|| format!("no percentile {wanted}"))?)
    };
    Ok(Paced { rate, p50: milliseconds(50.0)?, p99: milliseconds(99.0)? })
}

/// Where gRPC's own checks are answered, and such a question: a message of no bytes.
const CHECK: &str = "/grpc.health.v1.Health/Check";
const NO_BYTES: &str = "\0\0\0\0\0";

/// gRPC's unary calls on one connection, so many at a time.
pub async fn calls(course: &Course, streams: u32, seconds: f64) -> Result<Flood> {
    course.room().write("message", NO_BYTES)?;
    let mut h2load = Command::new(H2LOAD);
    h2load.args(["-c", "1", "-t", "1", "-m", &streams.to_string(), "-D", &seconds.ceil().to_string()]);
    h2load.args(["-H", "content-type: application/grpc", "-H", "te: trailers", "-d"]);
    h2load.arg(course.room().path().join("message"));
    h2load.arg(format!("http://{}{CHECK}", course.at));
    let output = run(&course.client, h2load, seconds.ceil()).await?;
    called(&output.stdout).with_context(|| format!("h2load says {}", output.stdout))
}

fn called(said: &str) -> Result<Flood> {
    let line = said.lines().find(|line| line.starts_with("requests: ")).context("no requests")?;
    let number = |after: &str| -> Option<u64> {
        line.split(", ").find_map(|part| part.trim().strip_suffix(after)?.trim().parse().ok())
    };
    let [requests, failed, errored, timed_out] =
        [" succeeded", " failed", " errored", " timeout"].map(number);
    ensure!([failed, errored, timed_out] == [Some(0); 3], "not every call succeeded: {line}");
    let finished = said.lines().find(|line| line.starts_with("finished in ")).context("no rate")?;
    let rate = finished.split(", ").find_map(|part| part.trim().strip_suffix(" req/s")?.parse().ok());
    let requests = requests.filter(|requests| *requests > 0).context("no call was answered")?;
    Ok(Flood { requests, per_second: rate.context("no rate")? })
}

/// What exchanges of bytes are made of.
#[derive(Debug, Clone, Copy)]
pub struct Exchange {
    pub bytes: usize,
    pub connections: usize,
}

/// Bytes there and back.
pub async fn exchange(plan: &Plan, course: &Course, what: Exchange) -> Result<Asked> {
    let (at, seconds) = (course.at.to_string(), plan.seconds.to_string());
    let (bytes, connections) = (what.bytes.to_string(), what.connections.to_string());
    let args = ["exchange", &at, "--bytes", &bytes, "--connections", &connections, "--seconds", &seconds];
    ask(plan, &course.client, &args).await
}

/// As many bytes as go.
pub async fn bulk(plan: &Plan, course: &Course) -> Result<Sent> {
    let (at, seconds) = (course.at.to_string(), plan.seconds.to_string());
    ask(plan, &course.client, &["bulk", &at, "--seconds", &seconds]).await
}

/// Requests of `bench-app` on kept connections, at a rate or as fast as it goes.
pub async fn asks(plan: &Plan, course: &Course, connections: u32, rate: Option<u32>) -> Result<Asked> {
    let (at, seconds, count) = (course.at.to_string(), plan.seconds.to_string(), connections.to_string());
    let mut args = vec!["ask", &*at, "--connections", &count, "--seconds", &seconds];
    let rate = rate.map(|rate| rate.to_string());
    args.extend(rate.iter().flat_map(|rate| ["--rate", rate]));
    ask(plan, &course.client, &args).await
}

async fn run(pod: &Pod, command: Command, seconds: f64) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = pod.run_within(Duration::from_secs_f64(seconds) + GRACE, command).await?;
    ensure!(output.status.success(), "{program}: {}{}", output.stdout, output.stderr);
    Ok(output)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SAID: &str = "Running 1s test @ http://10.1.1.2:80/\n  2 threads and 64 connections\n  \
                        12345 requests in 1.00s, 14.5MB read\nRequests/sec:  12300.50\nTransfer/sec:     14.4MB\n";

    #[test]
    fn what_wrk_says_is_read() -> Result<()> {
        assert_eq!(flooded(SAID)?, Flood { requests: 12_345, per_second: 12_300.5 });
        assert!(flooded(&format!("{SAID}  Non-2xx or 3xx responses: 3\n")).is_err());
        assert!(flooded("  Socket errors: connect 0, read 1, write 0, timeout 0\n").is_err());
        Ok(())
    }

    #[test]
    fn what_h2load_says_is_read() -> Result<()> {
        let said = |failed: u32| {
            format!(
                "finished in 1.00s, 12300.50 req/s, 1.00MB/s\nrequests: 12345 total, 12445 started, 12345 done, \
                 12345 succeeded, {failed} failed, 0 errored, 0 timeout\nstatus codes: 12345 2xx, 0 3xx, 0 4xx, 0 5xx\n"
            )
        };
        assert_eq!(called(&said(0))?, Flood { requests: 12_345, per_second: 12_300.5 });
        assert!(called(&said(1)).is_err());
        Ok(())
    }

    #[test]
    fn a_rate_that_was_not_reached_is_told() -> Result<()> {
        let percentiles =
            json!([{ "Percentile": 50, "Value": 0.0005 }, { "Percentile": 99, "Value": 0.002 }]);
        let said = |rate: f64, code: &str| {
            let histogram = json!({ "Percentiles": percentiles });
            json!({ "RetCodes": { code: 10 }, "ActualQPS": rate, "DurationHistogram": histogram })
        };
        let slow = pacing(&said(900.0, "200"))?;
        assert_eq!((slow.p50, slow.p99, slow.reached()), (0.5, 2.0, false));
        assert!(pacing(&said(999.0, "200"))?.reached() && pacing(&said(999.0, "503")).is_err());
        Ok(())
    }
}
