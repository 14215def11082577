//! Metrics over an upgrade: what agents before this one have counted, and those that drain still count.
//!
//! An agent that has handed over leaves its metrics as a text in a file of the run directory, again and again until it
//! ends. Whoever serves `/metrics` adds them all to its own: counters and histograms; of gauges only its own count.
//! Promises that no counter goes back while agents end and take over. Never writes to a file of another agent; removes
//! one whose agent has ended, once it was added up. Tested below.

use std::{
    collections::HashMap,
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// End of the name of a file that will not be written again.
const ENDED: &str = "ended";

/// What agents before this one have counted.
#[derive(Debug)]
pub(super) struct Inherited {
    /// By which this agent's file is told from others': process ids repeat.
    own: u64,
    state: Mutex<State>,
}

impl Default for Inherited {
    fn default() -> Self {
        Self { own: fastrand::u64(..), state: Mutex::default() }
    }
}

#[derive(Debug, Default)]
struct State {
    dir: Option<PathBuf>,
    /// The sum of those that have ended.
    ended: Option<String>,
}

impl Inherited {
    pub fn set_dir(&self, dir: PathBuf) {
        self.state().dir = Some(dir);
    }

    /// The texts are whole after every change.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This text with those of agents that have ended, as far as they were seen.
    fn add_ended(&self, own: String) -> String {
        match &self.state().ended {
            Some(ended) => sum(&own, &[ended]),
            None => own,
        }
    }

    /// This text with those of all agents before this one.
    pub fn add_all(&self, own: String) -> String {
        let mut state = self.state();
        let Some(dir) = state.dir.clone() else { return own };
        let mut living = Vec::new();
        for path in files(&dir) {
            // Gone since: its agent has ended, and is added next time.
            let Ok(text) = fs::read_to_string(&path) else { continue };
            if path.extension().is_some_and(|end| end == ENDED) {
                let ended = state.ended.take().map_or_else(|| text.clone(), |before| sum(&before, &[&text]));
                state.ended = Some(ended);
                // Were it to stay it would count twice, so that the run directory is worth a complaint.
                if let Err(error) = fs::remove_file(&path) {
                    tracing::warn!(path = %path.display(), %error, "metrics of an ended agent are left");
                }
            } else {
                living.push(text);
            }
        }
        let others: Vec<&str> = living.iter().map(String::as_str).chain(state.ended.as_deref()).collect();
        if others.is_empty() { own } else { sum(&own, &others) }
    }
}

impl Inherited {
    /// Writes this text, with those of agents that have ended, for another agent to read, at once and whole.
    pub fn leave(&self, dir: &Path, own: String, last: bool) -> io::Result<()> {
        let path = dir.join(self.own.to_string());
        let unfinished = path.with_extension("new");
        fs::write(&unfinished, self.add_ended(own))?;
        fs::rename(&unfinished, &path)?;
        if last { fs::rename(&path, path.with_extension(ENDED)) } else { Ok(()) }
    }
}

/// The files that agents have left; whole ones, whose names are numbers.
fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(io::Result::ok);
    let whole = |path: &PathBuf| {
        path.file_stem().and_then(|name| name.to_str()).is_some_and(|name| name.parse::<u64>().is_ok())
            && path.extension().is_none_or(|end| end == ENDED)
    };
    entries.map(|entry| entry.path()).filter(whole).collect()
}

/// One metric with its series.
#[derive(Debug, Default)]
struct Metric<'a> {
    /// Help, type and unit.
    head: Vec<&'a str>,
    /// Whether the sum of two agents' figures means anything.
    adds_up: bool,
    /// Name and labels of each series, in the order of the text, with its figure.
    series: Vec<(&'a str, Figure<'a>)>,
}

#[derive(Debug, Clone, Copy)]
enum Figure<'a> {
    Whole(u64),
    Other(&'a str),
    Sum(f64),
}

impl<'a> Figure<'a> {
    fn read(text: &'a str) -> Self {
        text.parse().map_or(Self::Other(text), Self::Whole)
    }

    fn add(self, other: Self) -> Self {
        match (self, other) {
            (Self::Whole(a), Self::Whole(b)) => Self::Whole(a.saturating_add(b)),
            (a, b) => Self::Sum(a.as_float() + b.as_float()),
        }
    }

    fn as_float(self) -> f64 {
        match self {
            Self::Whole(number) => number as f64,
            Self::Other(text) => text.parse().unwrap_or_default(),
            Self::Sum(number) => number,
        }
    }
}

/// The figures of the first text, with those of the others added; series of others alone come last in their metric.
fn sum(own: &str, others: &[&str]) -> String {
    let mut metrics = read(own);
    for other in others {
        for (name, metric) in read(other) {
            if metric.adds_up {
                add(&mut metrics, name, metric);
            }
        }
    }
    let mut text = String::with_capacity(own.len());
    for (_, metric) in &metrics {
        for line in &metric.head {
            text.push_str(line);
            text.push('\n');
        }
        for (series, figure) in &metric.series {
            // Writing to a String cannot fail.
            let _ = match figure {
                Figure::Whole(number) => writeln!(text, "{series} {number}"),
                Figure::Other(number) => writeln!(text, "{series} {number}"),
                Figure::Sum(number) => writeln!(text, "{series} {number:?}"),
            };
        }
    }
    text.push_str("# EOF\n");
    text
}

fn add<'a>(metrics: &mut Vec<(&'a str, Metric<'a>)>, name: &'a str, metric: Metric<'a>) {
    let Some((_, own)) = metrics.iter_mut().find(|(own, _)| *own == name) else {
        metrics.push((name, metric));
        return;
    };
    let places: HashMap<&str, usize> =
        own.series.iter().zip(0..).map(|((series, _), at)| (*series, at)).collect();
    for (series, figure) in metric.series {
        match places.get(series) {
            Some(at) => own.series[*at].1 = own.series[*at].1.add(figure),
            None => own.series.push((series, figure)),
        }
    }
}

/// The metrics of a text, by name, in its order.
fn read(text: &str) -> Vec<(&str, Metric<'_>)> {
    let mut metrics: Vec<(&str, Metric<'_>)> = Vec::new();
    for line in text.lines().filter(|line| *line != "# EOF") {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (what, name, rest) = (words.next(), words.next().unwrap_or_default(), words.next());
            if metrics.last().is_none_or(|(last, _)| *last != name) {
                metrics.push((name, Metric::default()));
            }
            if let Some((_, metric)) = metrics.last_mut() {
                metric.head.push(line);
                metric.adds_up |= what == Some("TYPE") && matches!(rest, Some("counter" | "histogram"));
            }
        } else if let (Some((series, figure)), Some((_, metric))) =
            (line.rsplit_once(' '), metrics.last_mut())
        {
            metric.series.push((series, Figure::read(figure)));
        }
    }
    metrics
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "# HELP requests All of them.\n# TYPE requests counter\nrequests_total{pod=\"a b\"} 2\n\
                       # HELP open Now.\n# TYPE open gauge\nopen 1\n\
                       # HELP took How long.\n# TYPE took histogram\ntook_sum 1.5\ntook_count 1\n\
                       took_bucket{le=\"1.0\"} 1\n# EOF\n";

    #[test]
    fn counters_and_histograms_add_up_and_gauges_do_not() {
        let other = "# HELP requests All of them.\n# TYPE requests counter\nrequests_total{pod=\"a b\"} 3\n\
                     requests_total{pod=\"c\"} 7\n# HELP open Now.\n# TYPE open gauge\nopen 5\n\
                     # HELP took How long.\n# TYPE took histogram\ntook_sum 2.25\ntook_count 2\n\
                     took_bucket{le=\"1.0\"} 0\n# HELP old Gone.\n# TYPE old counter\nold_total 1\n# EOF\n";
        let expected = "# HELP requests All of them.\n# TYPE requests counter\nrequests_total{pod=\"a b\"} 5\n\
                        requests_total{pod=\"c\"} 7\n# HELP open Now.\n# TYPE open gauge\nopen 1\n\
                        # HELP took How long.\n# TYPE took histogram\ntook_sum 3.75\ntook_count 3\n\
                        took_bucket{le=\"1.0\"} 1\n# HELP old Gone.\n# TYPE old counter\nold_total 1\n# EOF\n";
        assert_eq!(sum(OWN, &[other]), expected);
        assert_eq!(sum(OWN, &[]), OWN);
    }

    fn requests(text: &str) -> Option<&str> {
        text.lines().find_map(|line| line.strip_prefix("requests_total{pod=\"a b\"} "))
    }

    #[test]
    fn no_count_is_lost_or_counted_twice_when_an_agent_ends() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let (before, inherited) = (Inherited::default(), Inherited::default());
        assert_eq!(requests(&inherited.add_all(OWN.to_owned())), Some("2"), "there is no directory");
        inherited.set_dir(dir.path().to_owned());
        for last in [false, false, true] {
            before.leave(dir.path(), OWN.to_owned(), last)?;
            for _ in 0..2 {
                assert_eq!(requests(&inherited.add_all(OWN.to_owned())), Some("4"));
            }
        }
        assert_eq!(fs::read_dir(dir.path())?.count(), 0, "it is added up");
        // What this one leaves to its own successor has the ended one in it, once.
        assert_eq!(requests(&inherited.add_ended(OWN.to_owned())), Some("4"));
        Ok(())
    }
}
