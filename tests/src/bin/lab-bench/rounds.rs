//! Rounds: everything that is compared is measured once in each, in the same order.
//!
//! A round is quiet when, in each of its measurements, the machine spent no more than [`QUIET`] of its processor time on
//! anything but the lab, what serves it and the kernel's network threads, time that the hypervisor took away included. Other rounds are
//! discarded and measured again, up to as many as were asked for. Where there are still too few quiet ones, those with the
//! least other work stand in, and the outcome says so.

use anyhow::Result;

use crate::{figures::Figure, meter::Meter};

/// The share of the machine's processor time that other work may have.
const QUIET: f64 = 0.1;

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub rounds: usize,
    /// Of each measurement.
    pub seconds: f64,
    /// Small worlds, no warm-up, nothing discarded.
    pub quick: bool,
    /// Whether the agents are those that are shipped (`cargo xtask dist`).
    pub dist: bool,
}

/// What was measured: round by round, variant by variant.
#[derive(Debug)]
pub struct Rounds {
    pub kept: Vec<Vec<Vec<Figure>>>,
    pub discarded: usize,
    pub noisy: bool,
}

/// A round, and the most that other work had of the machine meanwhile.
type Tried = (f64, Vec<Vec<Figure>>);

impl Plan {
    /// What a person types to have the same.
    pub fn command(&self, suite: &str) -> String {
        let quick = if self.quick { " --quick" } else { "" };
        let dist = if self.dist { " --dist" } else { "" };
        format!("cargo xtask bench {suite} --rounds {} --seconds {}{quick}{dist}", self.rounds, self.seconds)
    }
}

/// Measures `count` variants in turn. `measure` is given which.
pub async fn alternate(
    plan: &Plan,
    meter: &Meter,
    count: usize,
    mut measure: impl AsyncFnMut(usize) -> Result<Vec<Figure>>,
) -> Result<Rounds> {
    if !plan.quick {
        // Caches, ports that have been used before, lazily made connections.
        for variant in 0..count {
            measure(variant).await?;
        }
    }
    let most = if plan.quick { plan.rounds } else { 2 * plan.rounds };
    let (mut tried, mut quiet) = (Vec::new(), 0);
    while tried.len() < most && quiet < plan.rounds {
        let (mut other, mut round) = (0.0_f64, Vec::new());
        for variant in 0..count {
            let before = meter.read()?;
            round.push(measure(variant).await?);
            other = other.max(meter.other_share(&before)?);
        }
        quiet += usize::from(other <= QUIET);
        println!("  round {}: {:.0} % of the machine had other work", tried.len() + 1, 100.0 * other);
        tried.push((other, round));
    }
    Ok(keep(tried, plan.rounds))
}

fn keep(tried: Vec<Tried>, wanted: usize) -> Rounds {
    let measured = tried.len();
    let mut order: Vec<usize> = (0..measured).collect();
    order.sort_by(|a, b| tried[*a].0.total_cmp(&tried[*b].0));
    // Quiet rounds are all alike: the first of them stand, in the order they were measured.
    let (quiet, loud): (Vec<usize>, Vec<usize>) = order.into_iter().partition(|at| tried[*at].0 <= QUIET);
    let noisy = quiet.len() < wanted;
    let chosen: Vec<usize> = quiet.into_iter().chain(loud).take(wanted).collect();
    let kept = tried.into_iter().enumerate().filter(|(at, _)| chosen.contains(at));
    let kept: Vec<_> = kept.map(|(_, (_, round))| round).collect();
    Rounds { discarded: measured - kept.len(), kept, noisy }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(others: &[f64], wanted: usize) -> (Vec<f64>, usize, bool) {
        let round = |other: &f64| (*other, vec![vec![Figure::new("other", "", *other)]]);
        let rounds = keep(others.iter().map(round).collect(), wanted);
        let kept = rounds.kept.iter().map(|round| round[0][0].value).collect();
        (kept, rounds.discarded, rounds.noisy)
    }

    #[test]
    fn loud_rounds_are_discarded_while_there_are_enough_quiet_ones() {
        assert_eq!(kept(&[0.05, 0.5, 0.02, 0.1], 3), (vec![0.05, 0.02, 0.1], 1, false));
        assert_eq!(kept(&[0.05, 0.5, 0.02, 0.3], 3), (vec![0.05, 0.02, 0.3], 1, true));
        assert_eq!(kept(&[0.9], 1), (vec![0.9], 0, true));
    }
}
