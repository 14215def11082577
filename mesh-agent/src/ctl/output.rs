//! Tables, JSON and YAML.
//!
//! Promises that nothing in a table can move the cursor of a terminal. Tested in `tests.rs`.

use std::{
    fmt::Write as _,
    io::{self, Write},
};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::{Failure, Output};

/// Rows under headings.
#[derive(Debug)]
pub(crate) struct Rows {
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Rows {
    pub fn new(headings: impl Into<Vec<&'static str>>) -> Self {
        Self { headings: headings.into(), rows: Vec::new() }
    }

    /// Adds a row; as many cells as headings.
    pub fn push(&mut self, cells: &[String]) {
        self.rows.push(cells.iter().map(|cell| printable(cell)).collect());
    }

    /// Writes the table.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(self.headings.clone());
        table.add_rows(self.rows.clone());
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        for line in table.lines() {
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Writes `value` as JSON or YAML, or as the table that `rows` makes of it.
pub(crate) fn print<T: Serialize>(
    output: Output,
    out: &mut dyn Write,
    value: &T,
    rows: impl FnOnce(&T) -> Rows,
) -> Result<(), Failure> {
    match output {
        Output::Table => rows(value).write(out)?,
        Output::Json => {
            serde_json::to_writer_pretty(&mut *out, value).map_err(io::Error::from)?;
            writeln!(out)?;
        }
        Output::Yaml => out.write_all(yaml(value)?.as_bytes())?,
    }
    Ok(())
}

/// One document of YAML, with its final newline.
pub(super) fn yaml<T: Serialize>(value: &T) -> Result<String, Failure> {
    let mut text =
        serde_saphyr::to_string(value).map_err(|e| Failure::Request(format!("writing YAML: {e}")))?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// Rows that come one by one: columns grow with what they have seen, and the headings are written again when they do,
/// so that every row stands below its heading.
#[derive(Debug)]
pub(super) struct Columns {
    headings: Vec<String>,
    widths: Vec<usize>,
    /// Whether the headings have been written with these widths.
    headed: bool,
}

impl Columns {
    /// Wide enough for these headings.
    pub fn new(headings: &[&str]) -> Self {
        let widths = headings.iter().map(|heading| heading.len()).collect();
        Self { headings: headings.iter().map(ToString::to_string).collect(), widths, headed: false }
    }

    /// Writes these rows; the headings first, where they have to be.
    pub fn write(&mut self, out: &mut dyn Write, rows: &[Vec<String>]) -> io::Result<()> {
        let rows: Vec<Vec<String>> =
            rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
        for row in &rows {
            for (width, cell) in self.widths.iter_mut().zip(row) {
                let needed = cell.chars().count();
                self.headed &= needed <= *width;
                *width = (*width).max(needed);
            }
        }
        if !self.headed {
            writeln!(out, "{}", self.line(&self.headings))?;
            self.headed = true;
        }
        rows.iter().try_for_each(|row| writeln!(out, "{}", self.line(row)))
    }

    fn line(&self, cells: &[String]) -> String {
        let mut line = String::new();
        for (width, cell) in self.widths.iter().zip(cells) {
            let _ = write!(line, "{cell:<0$}  ", *width);
        }
        line.truncate(line.trim_end().len());
        line
    }
}

/// Without control characters; everything else as it is.
pub(super) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_debug()) } else { out.push(c) }
    }
    out
}

/// What is there, or `-`.
pub(crate) fn or_dash<T: ToString>(value: Option<&T>) -> String {
    value.map_or_else(|| "-".to_owned(), ToString::to_string)
}

/// Milliseconds as people say it.
pub(super) fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0 => format!("{ms}ms"),
        1..60 => format!("{}.{}s", seconds, ms % 1000 / 100),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}
