//! `cargo xtask fuzz`: the targets of `tests/fuzz` under libFuzzer, each for a given time.
//!
//! On the Rust that builds everything else: the coverage that steers libFuzzer is a pass of LLVM, which needs no
//! nightly compiler. Everything is below `target/fuzz`: the builds, which are of no other use, what was found worth
//! keeping (`corpus`), and inputs that crash (`artifacts`). The pure parts are tested below.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::command::{answer, shown};
use crate::progress::Progress;
use crate::setup;
use crate::workspace;

/// Directory below `tests/fuzz/seeds`, and program.
const TARGETS: [(&str, &str); 6] = [
    ("detection", "fuzz-detection"),
    ("http1_edge", "fuzz-http1-edge"),
    ("config", "fuzz-config"),
    ("path", "fuzz-path"),
    ("identity", "fuzz-identity"),
    ("jwt", "fuzz-jwt"),
];

/// What lets libFuzzer see which code an input reaches, and what it was compared with. Optimisation that merges
/// functions or strips sections would lose the counters, hence one unit per crate (`[profile.fuzz]`).
const COVERAGE: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Largest input, bytes; an input that takes longer, seconds, or more memory, MiB, is a finding too.
const LIMITS: [&str; 3] = ["-max_len=16384", "-timeout=10", "-rss_limit_mb=2048"];

/// What is fuzzed, and for how long.
#[derive(Debug, Args)]
pub struct Options {
    /// Only this target
    #[arg(value_parser = TARGETS.map(|(name, _)| name))]
    target: Option<String>,
    /// How long each target runs
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
}

/// How one target ended.
#[derive(Debug)]
struct Outcome {
    name: &'static str,
    seconds: f64,
    executions: Option<u64>,
    /// The input that failed, or where to read why there is none.
    failure: Option<PathBuf>,
}

/// Builds and runs the targets; an error names the inputs that failed.
pub fn run(options: &Options) -> Result<()> {
    let mut progress = Progress::start();
    setup::packages(&mut progress, &setup::BUILD, "the build")?;
    let programs = progress.step("build the targets", build)?;
    let chosen =
        TARGETS.into_iter().filter(|(name, _)| options.target.as_deref().is_none_or(|only| only == *name));
    let chosen: Vec<_> = chosen.collect();
    let name = format!("fuzz, {} s each", options.seconds);
    let outcomes = progress.step(&name, || fuzz_all(&chosen, &programs, options.seconds))?;
    println!("\n{}\n", progress.table());
    for outcome in &outcomes {
        println!("{}", outcome.line());
    }
    let failed = outcomes.iter().filter_map(|outcome| outcome.failure.as_deref());
    let failed: Vec<_> = failed.map(|path| path.display().to_string()).collect();
    if failed.is_empty() { Ok(()) } else { bail!("these inputs fail: {}", failed.join(", ")) }
}

fn fuzz_dir() -> PathBuf {
    workspace::target_dir().join("fuzz")
}

/// Builds the programs and says where they are.
fn build() -> Result<PathBuf> {
    let version = answer(workspace::command("rustc").arg("-vV")).context("cannot run `rustc -vV`")?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.context("`rustc -vV` does not name its host")?;
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--locked", "--package", "mesh-fuzz", "--features", "libfuzzer", "--bins"]);
    // With a target named, the flags are not those of build scripts and macros.
    cargo.args(["--profile", "fuzz", "--target", host, "--target-dir"]).arg(fuzz_dir());
    cargo.env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\u{1f}"));
    shown(&mut cargo)?;
    Ok(fuzz_dir().join(host).join("fuzz"))
}

/// Runs the targets, as many at a time as there are processors; they come back in their own order.
fn fuzz_all(chosen: &[(&'static str, &str)], programs: &Path, seconds: u32) -> Result<Vec<Outcome>> {
    let waiting = Mutex::new(chosen.iter().enumerate());
    let outcomes = Mutex::new(Vec::new());
    let worker = || -> Result<()> {
        loop {
            let next = waiting.lock().ok().and_then(|mut waiting| waiting.next());
            let Some((place, (name, program))) = next else { return Ok(()) };
            let outcome = fuzz_one(name, &programs.join(program), seconds)?;
            println!("    {}", outcome.line());
            if let Ok(mut outcomes) = outcomes.lock() {
                outcomes.push((place, outcome));
            }
        }
    };
    let processors = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..processors.min(chosen.len())).map(|_| scope.spawn(worker)).collect();
        for worker in workers {
            match worker.join() {
                Ok(done) => done?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        anyhow::Ok(())
    })?;
    let mut outcomes = outcomes.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    outcomes.sort_by_key(|(place, _)| *place);
    Ok(outcomes.into_iter().map(|(_, outcome)| outcome).collect())
}

fn fuzz_one(name: &'static str, program: &Path, seconds: u32) -> Result<Outcome> {
    let corpus = fuzz_dir().join("corpus").join(name);
    let artifacts = fuzz_dir().join("artifacts").join(name);
    let log = fuzz_dir().join(format!("{name}.log"));
    for dir in [&corpus, &artifacts] {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let started = Instant::now();
    let status = Command::new(program)
        .arg(&corpus)
        .arg(workspace::root().join("tests/fuzz/seeds").join(name))
        .args(LIMITS)
        .args([format!("-max_total_time={seconds}"), format!("-artifact_prefix={}/", artifacts.display())])
        .arg("-print_final_stats=1")
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let seconds = started.elapsed().as_secs_f64();
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let failure = (!status.success()).then(|| failing_input(&text).unwrap_or_else(|| log.clone()));
    Ok(Outcome { name, seconds, executions: executions(&text), failure })
}

impl Outcome {
    fn line(&self) -> String {
        let Self { name, seconds, executions, failure } = self;
        let executions = executions.map_or_else(
            || "stopped".to_owned(),
            |count| format!("{count} executions, {:.0} per second", count as f64 / seconds),
        );
        let end =
            failure.as_ref().map_or_else(|| "ok".to_owned(), |path| format!("FAILED: {}", path.display()));
        format!("{name}: {executions}, {seconds:.0} s, {end}")
    }
}

/// How many inputs libFuzzer says it ran.
fn executions(log: &str) -> Option<u64> {
    log.lines()
        .rev()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?
        .trim()
        .parse()
        .ok()
}

/// The file libFuzzer says it kept the failing input in.
fn failing_input(log: &str) -> Option<PathBuf> {
    log.lines()
        .rev()
        .find_map(|line| line.split_once("Test unit written to "))
        .map(|(_, path)| path.trim().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_tells_how_a_target_ended() {
        let fine =
            "Done 100 runs in 2 second(s)\nstat::number_of_executed_units: 100\nstat::peak_rss_mb: 40\n";
        assert_eq!(executions(fine), Some(100));
        assert_eq!(failing_input(fine), None);
        let failed = "SUMMARY: libFuzzer: deadly signal\nartifact_prefix='/x/'; Test unit written to /x/crash-1\n\
                      Base64: AA==\nstat::number_of_executed_units: 7\n";
        assert_eq!(executions(failed), Some(7));
        assert_eq!(failing_input(failed), Some("/x/crash-1".into()));
    }

    #[test]
    fn a_summary_line_names_the_failing_input() {
        let outcome = Outcome { name: "config", seconds: 2.0, executions: Some(300), failure: None };
        assert_eq!(outcome.line(), "config: 300 executions, 150 per second, 2 s, ok");
        let outcome = Outcome { executions: None, failure: Some("/x/crash-1".into()), ..outcome };
        assert_eq!(outcome.line(), "config: stopped, 2 s, FAILED: /x/crash-1");
    }

    #[test]
    fn every_target_has_seeds_and_a_program() -> Result<()> {
        let fuzz = workspace::root().join("tests/fuzz");
        let manifest = fs::read_to_string(fuzz.join("Cargo.toml"))?;
        for (name, program) in TARGETS {
            assert!(fs::read_dir(fuzz.join("seeds").join(name))?.next().is_some(), "{name}");
            assert!(manifest.contains(&format!("name = \"{program}\"")), "{program}");
        }
        Ok(())
    }
}
