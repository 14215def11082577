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
pub(super) struct Rows {
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

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
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
pub(super) fn print<T: Serialize>(
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

/// Rows that come one by one: columns grow with what they have seen.
#[derive(Debug)]
pub(super) struct Columns(Vec<usize>);

impl Columns {
    /// Wide enough for these headings.
    pub fn new(headings: &[&str]) -> Self {
        Self(headings.iter().map(|heading| heading.len()).collect())
    }

    /// One line.
    pub fn line(&mut self, cells: &[String]) -> String {
        let mut line = String::new();
        for (width, cell) in self.0.iter_mut().zip(cells) {
            let cell = printable(cell);
            *width = (*width).max(cell.chars().count());
            let _ = write!(line, "{cell:<0$}  ", *width);
        }
        line.truncate(line.trim_end().len());
        line
    }
}

/// Without control characters.
fn printable(text: &str) -> String {
    if text.chars().any(char::is_control) { text.escape_debug().to_string() } else { text.to_owned() }
}

/// What is there, or `-`.
pub(super) fn or_dash<T: ToString>(value: Option<&T>) -> String {
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
