//! The steps of a subcommand: what runs, how long it took, and how it ended.
//!
//! Tested below.

use std::time::{Duration, Instant};

use anyhow::Result;

/// A failure that its subcommand has told of already; nothing more is printed.
#[derive(Debug)]
pub struct Reported;

impl std::error::Error for Reported {}

impl std::fmt::Display for Reported {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("see above")
    }
}

/// The steps done so far, in order.
#[derive(Debug)]
pub struct Progress {
    started: Instant,
    steps: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    name: String,
    took: Duration,
    end: End,
}

#[derive(Debug)]
enum End {
    Done,
    Failed,
    Skipped(String),
}

impl Progress {
    /// Starts the clock of the whole.
    pub fn start() -> Self {
        Self { started: Instant::now(), steps: Vec::new() }
    }

    /// Runs one step, with a line before it and one after it.
    pub fn step<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        println!("==> {name}");
        let started = Instant::now();
        let result = work();
        let took = started.elapsed();
        let end = if result.is_ok() { End::Done } else { End::Failed };
        let word = if result.is_ok() { "done" } else { "FAILED" };
        println!("    {word} after {}", seconds(took));
        self.steps.push(Step { name: name.to_owned(), took, end });
        result
    }

    /// Records a step that does not run, and says why.
    pub fn skip(&mut self, name: &str, reason: &str) {
        println!("==> {name}: skipped, {reason}");
        self.steps.push(Step {
            name: name.to_owned(),
            took: Duration::ZERO,
            end: End::Skipped(reason.to_owned()),
        });
    }

    /// The closing table: each step, its time, its end.
    pub fn table(&self) -> String {
        let width =
            self.steps.iter().map(|step| step.name.chars().count()).max().unwrap_or(0).max("total".len());
        let mut table = String::new();
        for Step { name, took, end } in &self.steps {
            let end = match end {
                End::Done => "ok".to_owned(),
                End::Failed => "FAILED".to_owned(),
                End::Skipped(reason) => format!("skipped: {reason}"),
            };
            table.push_str(&format_row(name, width, *took, &end));
        }
        table.push_str(&format_row("total", width, self.started.elapsed(), ""));
        table.trim_end().to_owned()
    }
}

fn format_row(name: &str, width: usize, took: Duration, end: &str) -> String {
    format!("  {name:width$}  {:>9}  {end}\n", seconds(took))
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn the_table_tells_how_each_step_ended() {
        let mut progress = Progress::start();
        let _ = progress.step("good", || Ok(()));
        let _ = progress.step("bad", || -> Result<()> { bail!("no") });
        progress.skip("other", "it needs root");
        let table = progress.table();
        let ends: Vec<_> = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
        assert_eq!(ends[0], ["good", "0.0", "s", "ok"]);
        assert_eq!(ends[1], ["bad", "0.0", "s", "FAILED"]);
        assert_eq!(ends[2].join(" "), "other 0.0 s skipped: it needs root");
        assert_eq!(ends[3][0], "total");
    }
}
