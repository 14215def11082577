//! Figures of single measurements, and what becomes of many of them.

use std::fs;

use anyhow::{Context as _, Result};
use lab::bench::median;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::{
    goals::Goal,
    rounds::{Plan, Rounds},
};

/// One figure of one measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figure {
    /// What it is of.
    pub name: &'static str,
    /// What it counts.
    pub unit: &'static str,
    pub value: f64,
}

/// A figure of one of those that are compared, over all rounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Whose.
    pub variant: String,
    /// What it is of.
    pub figure: String,
    pub unit: String,
    pub median: f64,
    /// The least and the most of all rounds.
    pub least: f64,
    pub most: f64,
    /// The median over that of the first variant that has this figure.
    pub ratio: Option<f64>,
    /// One of each round, in order.
    pub values: Vec<f64>,
}

/// What a suite has found.
#[derive(Debug)]
pub struct Measured {
    /// One sentence.
    pub title: String,
    /// What exactly is compared, and how.
    pub about: Vec<String>,
    pub rows: Vec<Row>,
    /// What follows from the rows, computed.
    pub findings: Vec<String>,
    /// What is to be reached, if anything.
    pub goals: Vec<Goal>,
    pub discarded: usize,
    pub noisy: bool,
}

/// What is kept of a suite.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub suite: String,
    pub title: String,
    pub about: Vec<String>,
    /// The day, as `2026-01-31`.
    pub date: String,
    /// What a person types to have the same.
    pub command: String,
    pub machine: Machine,
    pub rounds: usize,
    pub seconds: f64,
    /// Rounds that were measured and not used.
    pub discarded: usize,
    /// Whether rounds had to be used that the rule would have discarded.
    pub noisy: bool,
    pub rows: Vec<Row>,
    pub findings: Vec<String>,
    #[serde(default)]
    pub goals: Vec<Goal>,
}

/// What the figures depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub cores: usize,
    pub cpu: String,
    /// The version alone.
    pub kernel: String,
}

impl Figure {
    pub fn new(name: &'static str, unit: &'static str, value: f64) -> Self {
        Self { name, unit, value }
    }
}

impl Row {
    fn new(variant: &str, figure: Figure, values: Vec<f64>) -> Self {
        Self {
            variant: variant.to_owned(),
            figure: figure.name.to_owned(),
            unit: figure.unit.to_owned(),
            median: median(&values),
            least: values.iter().copied().fold(f64::INFINITY, f64::min),
            most: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            ratio: None,
            values,
        }
    }
}

/// The rows of all rounds: figure by figure, and in each the variants in their order.
pub fn rows(variants: &[&str], rounds: &Rounds) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let all = || rounds.kept.iter().flat_map(|round| round.iter().flatten());
    let mut names: Vec<&str> = Vec::new();
    for figure in all() {
        if !names.contains(&figure.name) {
            names.push(figure.name);
        }
    }
    for name in names {
        for (at, variant) in variants.iter().enumerate() {
            let of = |round: &Vec<Vec<Figure>>| round[at].iter().find(|figure| figure.name == name).copied();
            let figures: Vec<Figure> = rounds.kept.iter().filter_map(of).collect();
            let Some(first) = figures.first().copied() else { continue };
            rows.push(Row::new(variant, first, figures.iter().map(|figure| figure.value).collect()));
        }
    }
    let base = |rows: &[Row], row: &Row| {
        let first = rows.iter().find(|other| other.figure == row.figure)?;
        (first.median > 0.0).then(|| row.median / first.median)
    };
    let ratios: Vec<_> = rows.iter().map(|row| base(&rows, row)).collect();
    rows.iter_mut().zip(ratios).for_each(|(row, ratio)| row.ratio = ratio);
    rows
}

/// One row of samples that all rounds have given together.
pub fn pooled(variant: &str, figure: Figure, values: Vec<f64>) -> Row {
    Row { median: figure.value, ..Row::new(variant, figure, values) }
}

/// The median of a figure of one of the variants.
pub fn median_of(rows: &[Row], variant: &str, figure: &str) -> Result<f64> {
    let row = rows.iter().find(|row| row.variant == variant && row.figure == figure);
    Ok(row.with_context(|| format!("{variant} has no figure {figure:?}"))?.median)
}

impl Measured {
    /// Of all rounds, with nothing to be reached yet.
    pub fn new(title: &str, about: Vec<String>, variants: &[&str], rounds: &Rounds) -> Self {
        Self {
            title: title.to_owned(),
            about,
            rows: rows(variants, rounds),
            findings: Vec::new(),
            goals: Vec::new(),
            discarded: rounds.discarded,
            noisy: rounds.noisy,
        }
    }
}

impl Outcome {
    pub fn new(suite: &str, plan: &Plan, measured: Measured) -> Result<Self> {
        let Measured { title, about, rows, findings, goals, discarded, noisy } = measured;
        Ok(Self {
            suite: suite.to_owned(),
            title,
            about,
            date: OffsetDateTime::now_utc().date().to_string(),
            command: plan.command(suite),
            machine: Machine::this()?,
            rounds: plan.rounds,
            seconds: plan.seconds,
            discarded,
            noisy,
            rows,
            findings,
            goals,
        })
    }
}

impl Machine {
    fn this() -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let release =
            fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's version")?;
        Ok(Self {
            cores: std::thread::available_parallelism()?.get(),
            cpu: model
                .map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, model)| model.trim().to_owned()),
            // What follows the version names who built it, and says nothing about how fast it is.
            kernel: release.trim().split('-').next().unwrap_or_default().to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_one_of_medians() {
        let round = |rates: [f64; 2]| {
            rates.iter().map(|rate| vec![Figure::new("rate", "1/s", *rate)]).collect::<Vec<_>>()
        };
        let kept = vec![round([10.0, 5.0]), round([100.0, 6.0]), round([20.0, 70.0])];
        let rounds = Rounds { kept, discarded: 0, noisy: false };
        let rows = rows(&["none", "mesh"], &rounds);
        let seen: Vec<_> = rows.iter().map(|row| (&*row.variant, row.median, row.ratio)).collect();
        assert_eq!(seen, [("none", 20.0, Some(1.0)), ("mesh", 6.0, Some(0.3))]);
        assert!((rows[1].least - 5.0).abs() < f64::EPSILON && (rows[1].most - 70.0).abs() < f64::EPSILON);
    }

    #[test]
    fn a_figure_is_compared_with_the_first_that_has_it() {
        let of = |name, value| vec![Figure::new(name, "", value)];
        let round = vec![of("a", 1.0), of("b", 2.0), of("b", 3.0)];
        let rounds = Rounds { kept: vec![round], discarded: 0, noisy: false };
        let ratios: Vec<_> = rows(&["x", "y", "z"], &rounds).iter().map(|row| row.ratio).collect();
        assert_eq!(ratios, [Some(1.0), Some(1.0), Some(1.5)]);
    }
}
