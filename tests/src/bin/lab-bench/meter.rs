//! Where the machine's processor time goes.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use lab::cgroup;
use nix::unistd::{SysconfVar, sysconf};

/// Tells the lab's processor time from that of everything else.
#[derive(Debug)]
pub struct Meter {
    lab: PathBuf,
    /// Ours by cause, not by cgroup: this program, the kernel's threads that finish network work, and whom it is told of.
    processes: Vec<PathBuf>,
    cores: f64,
    tick: Duration,
}

/// Processor time used so far.
#[derive(Debug)]
pub struct Reading {
    at: Instant,
    busy: Duration,
    ours: Duration,
}

impl Meter {
    /// Of the lab with this cgroup.
    pub fn new(lab: &Path) -> Result<Self> {
        let ticks = sysconf(SysconfVar::CLK_TCK)?.context("the kernel's clock has no ticks")?;
        let mut processes = vec![PathBuf::from("/proc/self/stat")];
        for entry in fs::read_dir("/proc").context("reading /proc")? {
            let path = entry?.path();
            let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
            if name.starts_with("ksoftirqd/") {
                processes.push(path.join("stat"));
            }
        }
        let cores = std::thread::available_parallelism()?.get() as f64;
        let tick = Duration::from_secs_f64(1.0 / ticks as f64);
        Ok(Self { lab: lab.to_owned(), processes, cores, tick })
    }

    /// What these processes do is no other work either.
    pub fn with(mut self, pids: &[u32]) -> Self {
        self.processes.extend(pids.iter().map(|pid| PathBuf::from(format!("/proc/{pid}/stat"))));
        self
    }

    /// Used so far.
    pub fn read(&self) -> Result<Reading> {
        let stat = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        let busy = busy_ticks(&stat).context("/proc/stat begins with the sum of all processors")?;
        let mut ours = cgroup::cpu_time(&self.lab)?;
        for process in &self.processes {
            let stat =
                fs::read_to_string(process).with_context(|| format!("reading {}", process.display()))?;
            let ticks = process_ticks(&stat).with_context(|| format!("{stat:?} has no times"))?;
            ours += self.tick * ticks;
        }
        Ok(Reading { at: Instant::now(), busy: self.tick * busy, ours })
    }

    /// How much of the machine (0 to 1) has gone to somebody else since then.
    pub fn other_share(&self, before: &Reading) -> Result<f64> {
        let now = self.read()?;
        let ours = now.ours.saturating_sub(before.ours);
        let other = now.busy.saturating_sub(before.busy).saturating_sub(ours);
        Ok(other.as_secs_f64() / ((now.at - before.at).as_secs_f64() * self.cores))
    }
}

/// Everything but idling and waiting for disks: stolen time too.
fn busy_ticks(stat: &str) -> Option<u32> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    let ticks: Vec<u64> = fields.map_while(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guests are in user already.
    let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|at| ticks.get(*at)).sum();
    (ticks.len() >= 8).then(|| u32::try_from(busy).unwrap_or(u32::MAX))
}

fn process_ticks(stat: &str) -> Option<u32> {
    // The name, in parentheses, may hold anything; the state follows it.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u32>);
    ticks.sum::<Result<u32, _>>().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idling_is_not_work() {
        let stat = "cpu  100 10 20 9999 888 3 4 5 77 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(busy_ticks(stat), Some(142));
        assert_eq!(busy_ticks("intr 5"), None);
    }

    #[test]
    fn a_name_with_a_parenthesis() {
        let stat = "12 (a) b) S 1 1 1 0 -1 0 0 0 0 0 30 12 0 0 20 0 1 0 5 0 0";
        assert_eq!(process_ticks(stat), Some(42));
    }
}
