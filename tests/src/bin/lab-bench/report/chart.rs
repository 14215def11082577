//! The figures of a suite as bars: a group for each figure, a bar for each variant, from nothing to the largest of the group.
//!
//! Promises: the same figures give the same bytes; the whisker of a bar is from the least to the most of all rounds.

use anyhow::{Result, anyhow};
use plotters::{
    backend::SVGBackend,
    prelude::{DrawingBackend as _, IntoFont as _},
    style::{BLACK, Color as _, FontStyle, RGBColor, TextStyle, WHITE},
};

use super::number;
use crate::figures::{Outcome, Row};

const WIDTH: u32 = 900;
const BAR: i32 = 16;
const GAP: i32 = 4;
const HEADING: i32 = 30;
const MARGIN: i32 = 12;
/// Where names end and bars begin, and how long the longest is.
const BARS_AT: i32 = 220;
const LONGEST: f64 = 500.0;
const FONT: (&str, i32) = ("sans-serif", 16);
const MESH: RGBColor = RGBColor(0x1f, 0x6f, 0xb5);
const OTHERS: RGBColor = RGBColor(0xb0, 0xb7, 0xbf);

/// The variants that stand out: what the mesh carries.
const OURS: [&str; 5] = ["mesh", "agent", "direct (mesh)", "through the agent", "beside bulk in the mesh"];

/// The chart of all rows.
pub fn svg(outcome: &Outcome) -> Result<String> {
    let groups: Vec<&[Row]> = outcome.rows.chunk_by(|a, b| a.figure == b.figure).collect();
    let (headings, bars) = (i32::try_from(groups.len())?, i32::try_from(outcome.rows.len())?);
    let height = 2 * MARGIN + headings * HEADING + bars * (BAR + GAP);
    let mut text = String::new();
    {
        let mut canvas = Canvas(SVGBackend::with_string(&mut text, (WIDTH, height.unsigned_abs())));
        canvas.rectangle((0, 0), (WIDTH.cast_signed(), height), WHITE)?;
        let mut top = MARGIN;
        for group in groups {
            canvas.text(&group[0].figure, (MARGIN, top + HEADING - BAR - GAP), true)?;
            top += HEADING;
            let largest = group.iter().map(|row| row.most.max(row.median)).fold(0.0, f64::max);
            for row in group {
                canvas.bar(row, top, largest)?;
                top += BAR + GAP;
            }
        }
        canvas.0.present().map_err(|error| anyhow!("{error}"))?;
    }
    Ok(text)
}

struct Canvas<'a>(SVGBackend<'a>);

impl Canvas<'_> {
    fn bar(&mut self, row: &Row, top: i32, largest: f64) -> Result<()> {
        // A difference may be below nothing.
        let at = |value: f64| {
            let share = if largest > 0.0 { (value / largest).clamp(0.0, 1.0) } else { 0.0 };
            BARS_AT + (share * LONGEST).round() as i32
        };
        self.text(&row.variant, (2 * MARGIN, top + 2), false)?;
        let is_mesh = OURS.contains(&&*row.variant);
        let color = if is_mesh { MESH } else { OTHERS };
        self.rectangle((BARS_AT, top), (at(row.median), top + BAR), color)?;
        let middle = top + BAR / 2;
        self.rectangle((at(row.least), middle), (at(row.most), middle + 1), BLACK)?;
        let label = format!("{} {}", number(row.median), row.unit);
        self.text(&label, (at(row.most.max(row.median)) + GAP, top + 2), false)
    }

    fn rectangle(&mut self, from: (i32, i32), to: (i32, i32), color: RGBColor) -> Result<()> {
        let style = color.filled();
        self.0.draw_rect(from, to, &style, true).map_err(|error| anyhow!("{error}"))
    }

    fn text(&mut self, text: &str, at: (i32, i32), strong: bool) -> Result<()> {
        let font = FONT.into_font();
        let font = if strong { font.style(FontStyle::Bold) } else { font };
        let style = TextStyle::from(font).color(&BLACK);
        self.0.draw_text(text, &style, at).map_err(|error| anyhow!("{error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::Machine;

    fn outcome(medians: &[(&str, f64)]) -> Outcome {
        let row = |(variant, median): &(&str, f64)| Row {
            variant: (*variant).to_owned(),
            figure: "CPU <of both>".to_owned(),
            unit: "µs".to_owned(),
            median: *median,
            least: *median,
            most: *median,
            ratio: None,
            values: vec![*median],
        };
        Outcome {
            suite: "http".to_owned(),
            title: "HTTP".to_owned(),
            about: Vec::new(),
            date: "2026-01-31".to_owned(),
            command: String::new(),
            machine: Machine { cores: 2, cpu: String::new(), kernel: String::new() },
            rounds: 1,
            seconds: 1.0,
            discarded: 0,
            noisy: false,
            rows: medians.iter().map(row).collect(),
            findings: Vec::new(),
            goals: Vec::new(),
        }
    }

    #[test]
    fn a_bar_is_as_long_as_its_figure() -> Result<()> {
        let svg = svg(&outcome(&[("mesh", 25.0), ("Envoy pair", 100.0), ("less than none", -1.0)]))?;
        let width = |share: f64| format!("width=\"{}\" height=\"{BAR}\"", (LONGEST * share) as i32);
        assert!(
            svg.contains(&width(0.25)) && svg.contains(&width(1.0)) && svg.contains(&width(0.0)),
            "{svg}"
        );
        assert!(svg.contains("25.0 µs") && svg.contains("-1.00 µs"), "{svg}");
        // What is said of a figure is text, whatever it holds.
        assert!(svg.contains("CPU &lt;of both&gt;"), "{svg}");
        assert!(svg.trim_start().starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        Ok(())
    }
}
