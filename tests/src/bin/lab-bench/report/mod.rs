//! What is shown and kept: a table, a file of JSON for each suite, and Markdown with charts of all of them.

mod chart;

use std::{fmt::Write as _, fs, io::ErrorKind, path::Path};

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::{
    figures::{Outcome, Row},
    goals::Goal,
};

const HEADINGS: [&str; 5] = ["figure", "", "median", "least to most", "ratio"];
const GOAL_HEADINGS: [&str; 4] = ["goal", "", "measured", "verdict"];
const INTRODUCTION: &str = "\
# Benchmarks

Measured by `cargo xtask bench --report`, which wrote this file. What is compared takes turns, round after round, in one run;
each figure is the median of all rounds, each ratio one of medians, over the first row of its figure. A round in which the
machine spent more than a tenth of its processor time on other work is discarded and measured again. No measurement had a
failed connection or request: one fails the run. The figures are of one machine: ratios travel better than they do. Where
something is to be reached, the table of goals says whether these figures reach it.
";

/// For a terminal.
pub fn table(outcome: &Outcome) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(HEADINGS);
    table.add_rows(cells(&outcome.rows));
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if at > 1 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = String::new();
    for line in table.lines() {
        let _ = writeln!(text, "{}", line.trim_end());
    }
    for finding in &outcome.findings {
        let _ = writeln!(text, "{finding}");
    }
    for [what, limit, measured, verdict] in goals(&outcome.goals) {
        let _ = writeln!(text, "{verdict}: {what}: {measured} ({limit})");
    }
    let _ = writeln!(text, "{}", rounds(outcome));
    text
}

fn goals(goals: &[Goal]) -> Vec<[String; 4]> {
    let cells = |goal: &Goal| {
        let measured = goal.measured.map(|measured| format!("{} {}", number(measured), goal.unit));
        let measured = measured.unwrap_or_else(|| "-".to_owned());
        [goal.what.clone(), goal.limit(), measured, goal.verdict().to_owned()]
    };
    goals.iter().map(cells).collect()
}

fn rounds(outcome: &Outcome) -> String {
    let Outcome { rounds, seconds, discarded, noisy, .. } = outcome;
    let noise = if *noisy {
        "; too few were quiet, so that NOISY ROUNDS ARE AMONG THESE and the figures are not to be relied on"
    } else {
        ""
    };
    format!("{rounds} rounds of {seconds} s, {discarded} discarded{noise}.")
}

/// The name of a figure stands in its first row alone.
fn cells(rows: &[Row]) -> Vec<[String; 5]> {
    let mut last = "";
    let mut cells = Vec::new();
    for row in rows {
        let figure = if row.figure == last { "" } else { &*row.figure };
        last = &row.figure;
        cells.push([
            figure.to_owned(),
            row.variant.clone(),
            format!("{} {}", number(row.median), row.unit),
            format!("{} to {}", number(row.least), number(row.most)),
            row.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
        ]);
    }
    cells
}

/// Three digits that mean something, and thousands apart.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => {
            let whole = format!("{value:.0}");
            let (thousands, rest) = whole.split_at(whole.len() - 3);
            format!("{thousands},{rest}")
        }
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Writes `DIR/SUITE.json`.
pub fn keep(outcome: &Outcome, dir: &Path) -> Result<()> {
    let path = dir.join(format!("{}.json", outcome.suite));
    let mut text = serde_json::to_string_pretty(outcome)?;
    text.push('\n');
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

/// What is in the directory of these suites, in their order.
pub fn kept(dir: &Path, suites: &[&str]) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for suite in suites {
        let path = dir.join(format!("{suite}.json"));
        match fs::read_to_string(&path) {
            Ok(text) => outcomes
                .push(serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))?),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }
    Ok(outcomes)
}

/// Writes the report of all outcomes, and its charts beside it.
pub fn write(outcomes: &[Outcome], path: &Path) -> Result<()> {
    let dir = path.parent().context("a report is a file in a directory")?.join(CHARTS);
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    for outcome in outcomes {
        let file = dir.join(chart_of(outcome));
        fs::write(&file, chart::svg(outcome)?).with_context(|| format!("writing {}", file.display()))?;
    }
    fs::write(path, markdown(outcomes)).with_context(|| format!("writing {}", path.display()))
}

/// Beside the report.
const CHARTS: &str = "benchmarks";

fn chart_of(outcome: &Outcome) -> String {
    format!("{}.svg", outcome.suite)
}

fn markdown(outcomes: &[Outcome]) -> String {
    let mut text = INTRODUCTION.to_owned();
    for outcome in outcomes {
        let Outcome { title, date, command, machine, .. } = outcome;
        let _ = write!(text, "\n## {title}\n\n");
        for (at, paragraph) in outcome.about.iter().enumerate() {
            let bullet = if at == 0 { "" } else { "- " };
            let gap = if at == 0 { "\n" } else { "" };
            let _ = write!(text, "{bullet}{paragraph}\n{gap}");
        }
        let _ = write!(text, "\n![{title}]({CHARTS}/{})\n", chart_of(outcome));
        let _ = write!(text, "\n| {} |\n|---|---|---:|---:|---:|\n", HEADINGS.join(" | "));
        for row in cells(&outcome.rows) {
            let _ = writeln!(text, "| {} |", row.join(" | "));
        }
        text.push('\n');
        for finding in &outcome.findings {
            let _ = writeln!(text, "{finding}");
        }
        if !outcome.goals.is_empty() {
            let _ = write!(text, "\n| {} |\n|---|---|---:|---|\n", GOAL_HEADINGS.join(" | "));
            for row in goals(&outcome.goals) {
                let _ = writeln!(text, "| {} |", row.join(" | "));
            }
        }
        let (cores, cpu, kernel) = (machine.cores, &machine.cpu, &machine.kernel);
        let _ = write!(
            text,
            "\n{date}, `{command}`: {}\n{cores} cores ({cpu}), Linux {kernel}.\n",
            rounds(outcome)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_digits_that_mean_something() {
        let shown = [12_345.6, 999.6, 123.4, 12.34, 1.234, 0.0].map(number);
        assert_eq!(shown, ["12,346", "1000", "123", "12.3", "1.23", "0.00"]);
    }

    #[test]
    fn a_figure_is_named_once() {
        let row = |variant: &str| Row {
            variant: variant.to_owned(),
            figure: "rate".to_owned(),
            unit: "1/s".to_owned(),
            median: 1.0,
            least: 1.0,
            most: 2.0,
            ratio: None,
            values: vec![1.0],
        };
        let cells = cells(&[row("a"), row("b")]);
        assert_eq!(cells[0], ["rate", "a", "1.00 1/s", "1.00 to 2.00", "-"]);
        assert_eq!(cells[1][..2], ["", "b"]);
    }
}
