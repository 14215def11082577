//! What is to be reached, and whether it was.
//!
//! Promises: a verdict comes from medians of this run alone; what was not compared, because a peer is not installed, is not
//! said to be met.

use serde::{Deserialize, Serialize};

use crate::figures::{Row, median_of};

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sense {
    AtMost,
    AtLeast,
}

/// One thing to be reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Goal {
    /// Of what, and against what.
    pub what: String,
    pub sense: Sense,
    /// `None`: it is aimed at, and not required.
    pub required: Option<f64>,
    /// Further than what is required.
    pub aim: Option<f64>,
    /// `×` where it is a ratio.
    pub unit: String,
    /// `None`: it was not compared in this run.
    pub measured: Option<f64>,
}

impl Goal {
    fn new(what: impl Into<String>, sense: Sense, measured: Option<f64>, required: f64) -> Self {
        let required = Some(required);
        Self { what: what.into(), sense, required, aim: None, unit: "×".to_owned(), measured }
    }

    /// No more than this.
    pub fn at_most(what: impl Into<String>, measured: Option<f64>, required: f64) -> Self {
        Self::new(what, Sense::AtMost, measured, required)
    }

    /// No less than this.
    pub fn at_least(what: impl Into<String>, measured: Option<f64>, required: f64) -> Self {
        Self::new(what, Sense::AtLeast, measured, required)
    }

    /// And what would be better still.
    pub fn aim(mut self, aim: f64) -> Self {
        self.aim = Some(aim);
        self
    }

    /// Not required, but aimed at.
    pub fn only_aimed_at(mut self) -> Self {
        self.aim = self.required.take();
        self
    }

    /// What it is counted in, where it is no ratio.
    pub fn unit(mut self, unit: &str) -> Self {
        unit.clone_into(&mut self.unit);
        self
    }

    /// `None` where there is no such limit, or nothing to hold against it.
    fn reaches(&self, limit: Option<f64>) -> Option<bool> {
        let (measured, limit) = (self.measured?, limit?);
        Some(match self.sense {
            Sense::AtMost => measured <= limit,
            Sense::AtLeast => measured >= limit,
        })
    }

    /// In a word.
    pub fn verdict(&self) -> &'static str {
        match (self.reaches(self.required), self.reaches(self.aim)) {
            (None, None) => "not compared",
            (Some(false), _) => "MISSED",
            (Some(true), None) => "met",
            (Some(true), Some(false)) => "met, the aim is not",
            (Some(true), Some(true)) => "met, and the aim",
            (None, Some(true)) => "the aim is met",
            (None, Some(false)) => "the aim is not met",
        }
    }

    /// The limit, as people write it.
    pub fn limit(&self) -> String {
        let sign = if self.sense == Sense::AtMost { "≤" } else { "≥" };
        let required = self.required.map(|required| format!("{sign} {required} {}", self.unit));
        let aim = self.aim.map(|aim| format!("aim {sign} {aim} {}", self.unit));
        required.into_iter().chain(aim).collect::<Vec<_>>().join(", ")
    }
}

/// The median of a figure of one variant over that of another; `None` where either is not there, or nothing can be divided by
/// it.
pub fn times(rows: &[Row], figure: &str, of: &str, over: &str) -> Option<f64> {
    let of = median_of(rows, of, figure).ok()?;
    let over = median_of(rows, over, figure).ok()?;
    (over > 0.0).then(|| of / over)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_that_of_the_figure() {
        let most = |measured| Goal::at_most("CPU", measured, 0.47).aim(0.36).verdict();
        assert_eq!(most(Some(0.30)), "met, and the aim");
        assert_eq!(most(Some(0.47)), "met, the aim is not");
        assert_eq!(most(Some(0.48)), "MISSED");
        assert_eq!(most(None), "not compared");
        let least = |measured| Goal::at_least("rate", Some(measured), 2.5).verdict();
        assert_eq!((least(2.5), least(2.4)), ("met", "MISSED"));
        assert_eq!(Goal::at_most("memory", None, 15.0).unit("MB").limit(), "≤ 15 MB");
        assert_eq!(Goal::at_least("rate", None, 0.9).aim(1.2).limit(), "≥ 0.9 ×, aim ≥ 1.2 ×");
        let aim = Goal::at_most("latency", Some(1.1), 1.0).only_aimed_at();
        assert_eq!((aim.verdict(), &*aim.limit()), ("the aim is not met", "aim ≤ 1 ×"));
    }
}
