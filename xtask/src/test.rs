//! `cargo xtask test`: the unit, direct and lab tests, and the residue check; `cargo xtask test cluster`: those that need
//! a Kubernetes cluster, which it starts and ends.
//!
//! The lab runs as root only; for other users it is skipped, and the summary says so. All tests run even when some
//! fail; the last line sums up in the format of libtest. The pure parts are tested below, the whole by `.ci/run`.

use std::fs;
use std::io::IsTerminal;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::build_ebpf;
use crate::clients;
use crate::cluster;
use crate::command::{kept, shown, watched};
use crate::image;
use crate::install_yaml;
use crate::progress::{Progress, Reported};
use crate::setup;
use crate::workspace::{self, HOST_PACKAGES};

/// Lab tests at a time. They wait more than they compute, and each has namespaces and processes of its own.
const LAB_THREADS: &str = "4";

const BPFFS: &str = "/sys/fs/bpf";

/// The target of `tests/tests` that needs a cluster, and is left out without one.
const CLUSTER_TARGET: &str = "cluster";

/// What is tested.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    suite: Option<Suite>,
    /// Only the tests that need no root: those of the default members
    #[arg(long)]
    unit: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
    #[command(flatten)]
    ebpf: build_ebpf::Options,
}

#[derive(Debug, Subcommand)]
enum Suite {
    /// Starts a Kubernetes cluster, runs the tests that need one, and proves that it leaves nothing behind (root)
    Cluster(ClusterOptions),
}

#[derive(Debug, Args)]
struct ClusterOptions {
    #[command(flatten)]
    wanted: cluster::Wanted,
    /// Leave the cluster running
    #[arg(long)]
    keep: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
    #[command(flatten)]
    ebpf: build_ebpf::Options,
}

/// Runs the tests; an error when one of them failed.
pub fn run(options: &Options) -> Result<()> {
    let mut progress = Progress::start();
    let mut totals = Totals::default();
    let (result, filter) = match &options.suite {
        None => (steps(options, &mut progress, &mut totals), &options.filter),
        Some(Suite::Cluster(options)) => (on_cluster(options, &mut progress, &mut totals), &options.filter),
    };
    let result = result.and_then(|()| totals.check(filter.as_deref()));
    println!("\n{}\n", progress.table());
    if totals.binaries == 0 {
        return result;
    }
    // The sum comes last, also when something failed: it is what people and programs look for. Before it what each
    // failed test said, which is else buried under what its processes printed.
    for reason in &totals.reasons {
        println!("{reason}");
    }
    let sum = totals.line(result.is_ok());
    match result {
        Ok(()) => println!("{sum}"),
        Err(error) => {
            println!("error: {error:#}\n\n{sum}");
            return Err(Reported.into());
        }
    }
    Ok(())
}

fn steps(options: &Options, progress: &mut Progress, totals: &mut Totals) -> Result<()> {
    setup::packages(progress, &setup::BUILD, "the build")?;
    build_ebpf::build(progress, &options.ebpf)?;
    if options.unit {
        return progress.step("unit and direct tests", || run_tests(&[], &[], options, totals));
    }
    if !setup::is_root() {
        progress.step("unit and direct tests", || run_tests(&[], &[], options, totals))?;
        progress.skip("lab tests", "network namespaces, cgroups and eBPF need root");
        progress.skip("residue check", "without the lab there is none");
        return Ok(());
    }
    setup::packages(progress, &setup::LAB, "the lab")?;
    setup::packages(progress, &setup::IPTABLES, "guests of the lab's pods")?;
    clients::prepare(progress)?;
    build_everything(progress)?;
    let results = [
        progress.step("unit and direct tests", || {
            let mut selection: Vec<String> = HOST_PACKAGES.map(str::to_owned).to_vec();
            selection.extend(["--lib".into(), "--bins".into()]);
            for package in ["mesh-common", "mesh-agent", "xtask", "deploy/samples/bookinfo"] {
                selection.extend(targets(&workspace::root().join(package).join("tests"))?);
            }
            run_tests(&selection, &[], options, totals)
        }),
        progress.step("examples in documentation", || {
            let mut selection: Vec<String> = HOST_PACKAGES.map(str::to_owned).to_vec();
            selection.push("--doc".into());
            run_tests(&selection, &[], options, totals)
        }),
        lab(options, progress, totals),
        residue(progress),
    ];
    let failed: Vec<_> =
        results.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("\n       ")) }
}

/// The cluster up, the tests, the cluster down: the last also when one of them failed, unless it is to be kept.
fn on_cluster(options: &ClusterOptions, progress: &mut Progress, totals: &mut Totals) -> Result<()> {
    setup::packages(progress, &setup::BUILD, "the build")?;
    build_ebpf::build(progress, &options.ebpf)?;
    progress.step("build programs and tests", || {
        let mut cargo = workspace::cargo();
        cargo.arg("build").args(HOST_PACKAGES).args(["--locked", "--bins", "--test", CLUSTER_TARGET]);
        shown(&mut cargo)
    })?;
    let helm = install_yaml::helm(progress)?;
    let tested = cluster::up(progress, options.wanted).and_then(|()| {
        let images = progress.step("images of tests", || {
            let [bookinfo, client] = cluster::images::of_tests()?;
            Ok([bookinfo, client, image::of_debug_build()?])
        })?;
        for archive in images {
            cluster::load(progress, &archive)?;
        }
        progress.step("cluster tests", || {
            let mut cargo = workspace::cargo();
            cluster::environment(&mut cargo);
            cargo.env("MESH_CLUSTER_HELM", &helm).env("MESH_CLUSTER_IMAGE", image::NAME);
            cargo.args(["test", "--locked"]).args(HOST_PACKAGES).args(["--test", CLUSTER_TARGET]);
            cargo.args(options.filter.as_deref()).env("MESH_REQUIRE_CLUSTER", "1");
            watch(cargo, totals)
        })
    });
    if options.keep {
        return tested;
    }
    let ended = cluster::down(progress);
    tested.and(ended)
}

fn build_everything(progress: &mut Progress) -> Result<()> {
    progress.step("build programs and tests", || {
        shown(workspace::cargo().arg("build").args(HOST_PACKAGES).args(["--locked", "--bins", "--tests"]))
    })
}

fn lab(options: &Options, progress: &mut Progress, totals: &mut Totals) -> Result<()> {
    let targets = without_cluster(&targets(&workspace::root().join("tests/tests"))?);
    if targets.is_empty() {
        progress.skip("lab tests", "tests/tests holds none");
        return Ok(());
    }
    progress.step("lab tests", || {
        mount_bpffs()?;
        let mut selection: Vec<String> = HOST_PACKAGES.map(str::to_owned).to_vec();
        selection.extend(targets);
        run_tests(&selection, &["--test-threads", LAB_THREADS], options, totals)
    })
}

fn residue(progress: &mut Progress) -> Result<()> {
    let program = workspace::debug_program("lab-residue");
    if !program.is_file() {
        progress.skip("residue check", "the lab has no program lab-residue");
        return Ok(());
    }
    progress.step("residue check", || shown(workspace::command(program).arg("check")))
}

/// `cargo test` with this selection of packages and targets (none: the default members).
fn run_tests(selection: &[String], harness: &[&str], options: &Options, totals: &mut Totals) -> Result<()> {
    let mut cargo = workspace::cargo();
    cargo.args(["test", "--locked", "--no-fail-fast"]).args(selection);
    cargo.args(options.filter.as_deref()).arg("--").args(harness);
    if std::io::stdout().is_terminal() {
        cargo.args(["--color", "always"]);
    }
    if setup::is_root() && !options.unit {
        // Without it, a lab test that lacks something skips; here that is a failure.
        cargo.env("MESH_REQUIRE_LAB", "1");
    }
    watch(cargo, totals)
}

fn watch(mut cargo: Command, totals: &mut Totals) -> Result<()> {
    watched(&mut cargo, |line| {
        println!("{line}");
        totals.add(line);
    })
}

/// `--test NAME` for every integration test in a directory, which need not exist.
fn targets(dir: &Path) -> Result<Vec<String>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        let is_target =
            path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file();
        if let (true, Some(name)) = (is_target, path.file_stem()) {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names.into_iter().flat_map(|name| ["--test".to_owned(), name]).collect())
}

/// What [`targets`] found, but for the one that needs a cluster.
fn without_cluster(targets: &[String]) -> Vec<String> {
    let pairs = targets.chunks(2).filter(|pair| pair.last().is_some_and(|name| name != CLUSTER_TARGET));
    pairs.flatten().cloned().collect()
}

/// Mounts the BPF file system, where the agent pins its maps and links, unless it is mounted.
pub fn mount_bpffs() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    if has_bpffs(&mounts) {
        return Ok(());
    }
    let mut mount = Command::new("mount");
    mount.args(["-t", "bpf", "bpf", BPFFS]);
    kept(mount)
}

fn has_bpffs(mountinfo: &str) -> bool {
    mountinfo.lines().filter_map(|line| line.split_once(" - ")).any(|(mount, source)| {
        mount.split(' ').nth(4) == Some(BPFFS) && source.split(' ').next() == Some("bpf")
    })
}

/// The sum of libtest's closing lines.
#[derive(Debug, Default)]
struct Totals {
    binaries: u64,
    passed: u64,
    failed: u64,
    ignored: u64,
    filtered: u64,
    seconds: f64,
    /// What failed tests said, without the output of the processes they had started.
    reasons: Vec<String>,
    /// How many more lines of what the failed test says are kept.
    wanted: usize,
}

/// As much of what one failed test says is repeated at the end.
const REASON_LINES: usize = 12;
const REASON_WIDTH: usize = 1500;

impl Totals {
    fn add(&mut self, line: &str) {
        self.keep_reason(line);
        let Some((_, counts)) = line.split_once("test result: ") else { return };
        self.binaries += 1;
        for part in counts.split(';') {
            let mut words = part.split_whitespace().rev();
            let Some(word) = words.next() else { continue };
            let number = words.find_map(|word| word.parse::<u64>().ok()).unwrap_or_default();
            match word {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                "out" => self.filtered += number,
                time => self.seconds += time.trim_end_matches('s').parse::<f64>().unwrap_or_default(),
            }
        }
    }

    /// libtest shows what a failed test printed below `---- NAME stdout ----`, up to the list of `failures:`.
    fn keep_reason(&mut self, line: &str) {
        let of_process = line.starts_with(' ') && (line.contains(" stdout: ") || line.contains(" stderr: "));
        if line.starts_with("---- ") {
            self.wanted = REASON_LINES;
        } else if line == "failures:" {
            self.wanted = 0;
        }
        if self.wanted > 0 && !of_process && !line.is_empty() {
            self.wanted -= 1;
            self.reasons.push(line.chars().take(REASON_WIDTH).collect());
        }
    }

    /// A filter that selects nothing is a typing error, not a success.
    fn check(&self, filter: Option<&str>) -> Result<()> {
        match filter {
            Some(filter) if self.passed == 0 => bail!("no test that ran has `{filter}` in its name"),
            _ => Ok(()),
        }
    }

    fn line(&self, ok: bool) -> String {
        let Self { binaries, passed, failed, ignored, filtered, seconds, .. } = self;
        let verdict = if ok { "ok" } else { "FAILED" };
        format!(
            "sum of {binaries} test binaries\ntest result: {verdict}. {passed} passed; {failed} failed; {ignored} ignored; \
             0 measured; {filtered} filtered out; finished in {seconds:.2}s"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_summed() {
        let mut totals = Totals::default();
        totals.add("running 3 tests");
        totals.add(
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 1.50s",
        );
        totals.add("test result: \u{1b}[31mFAILED\u{1b}[0m. 4 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.25s");
        let line = totals.line(false);
        let expected = "sum of 2 test binaries\ntest result: FAILED. 7 passed; 1 failed; 1 ignored; 0 measured; \
                        2 filtered out; finished in 1.75s";
        assert_eq!(line, expected);
        assert!(totals.check(Some("name")).is_ok());
        assert!(Totals::default().check(None).is_ok());
        assert!(Totals::default().check(Some("name")).is_err());
    }

    #[test]
    fn what_a_failed_test_said_is_kept_without_its_processes() {
        let mut totals = Totals::default();
        let output = "test one ... FAILED\n\nfailures:\n\n---- one stdout ----\n  a mesh-agent stdout: event=request\n\
                      \x20 a app stderr: bye\nError: waited in vain\n\nCaused by:\n    no answer\n\n\nfailures:\n    one\n";
        output.lines().for_each(|line| totals.add(line));
        assert_eq!(
            totals.reasons,
            ["---- one stdout ----", "Error: waited in vain", "Caused by:", "    no answer"]
        );
    }

    #[test]
    fn a_mounted_bpf_file_system_is_recognized() {
        assert!(has_bpffs("30 23 0:27 / /sys/fs/bpf rw,nosuid shared:9 - bpf bpf rw,mode=700\n"));
        assert!(!has_bpffs(
            "30 23 0:27 / /sys/fs/bpf rw - tmpfs tmpfs rw\n30 23 0:27 / /mnt rw - bpf bpf rw\n"
        ));
    }

    #[test]
    fn the_lab_does_not_need_a_cluster() -> Result<()> {
        let all = targets(&workspace::root().join("tests/tests"))?;
        let lab = without_cluster(&all);
        assert_eq!(all.len(), lab.len() + 2);
        assert!(!lab.iter().any(|name| name == CLUSTER_TARGET), "{lab:?}");
        assert!(lab.windows(2).any(|pair| pair == ["--test", "bookinfo"]), "{lab:?}");
        Ok(())
    }

    #[test]
    fn integration_tests_are_listed_by_name() -> Result<()> {
        assert_eq!(targets(Path::new("/nonexistent"))?, Vec::<String>::new());
        let found = targets(&workspace::root().join("xtask/src"))?;
        assert!(found.windows(2).any(|pair| pair == ["--test", "progress"]), "{found:?}");
        Ok(())
    }
}
