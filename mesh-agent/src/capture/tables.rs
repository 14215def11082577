//! How much the kernel's tables of one pod hold, and what was refused or lost because one of them was full.
//!
//! A table never gives up an entry for another one: what does not fit is refused, or not recorded, and counted. Tested
//! below and in the lab (`tests/tests/capture/full_maps.rs`).

use std::{
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use aya::maps::{MapData, MapError, PerCpuArray};
use clap::{Args, value_parser};
use mesh_common::maps::{
    ADMITTED_CAPACITY, CLIENTS_CAPACITY, COUNTERS, FLOWS_CAPACITY, ORIGINAL_DST_CAPACITY,
    PACKET_FLOWS_CAPACITY, POD_ADMITTED, POD_CLIENTS, POD_FLOWS, POD_ORIGINAL_DST, POD_PACKET_FLOWS, counter,
};

use super::{enrol::Capture, instance::Mark, loader};

/// Least time between two lines of the log about the same reason.
const QUIET: Duration = Duration::from_mins(1);

/// How much the kernel's tables of one pod hold. An entry takes memory when it comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Args)]
#[command(next_help_heading = "Kernel tables of each pod")]
pub struct PodTables {
    /// Captured connections that the apps of a pod may have open; more are refused
    #[arg(long, env = "MESH_MAX_CAPTURED_CONNECTIONS_PER_POD", value_name = "COUNT",
          default_value_t = ORIGINAL_DST_CAPACITY as u32, value_parser = value_parser!(u32).range(1..=1 << 24))]
    pub max_captured_connections_per_pod: u32,
    /// Connections that the agent may have open to the apps of a pod; more are refused
    #[arg(long, env = "MESH_MAX_APP_CONNECTIONS_PER_POD", value_name = "COUNT",
          default_value_t = CLIENTS_CAPACITY as u32, value_parser = value_parser!(u32).range(1..=1 << 24))]
    pub max_app_connections_per_pod: u32,
    /// Connections that the apps of this node's pods may have open to a pod without the agent, each pod a quarter of them;
    /// more take the agent
    #[arg(long, env = "MESH_MAX_DIRECT_CONNECTIONS_PER_POD", value_name = "COUNT",
          default_value_t = ADMITTED_CAPACITY as u32, value_parser = value_parser!(u32).range(1..=1 << 24))]
    pub max_direct_connections_per_pod: u32,
    /// Flows of a pod that can be seen at once, those that ended in the last half minute too; more are reported only
    /// when they end
    #[arg(long, env = "MESH_MAX_FLOWS_PER_POD", value_name = "COUNT",
          default_value_t = FLOWS_CAPACITY as u32, value_parser = value_parser!(u32).range(1..=1 << 24))]
    pub max_flows_per_pod: u32,
    /// Flows of a pod without a socket (UDP) that are counted at once; more are not counted
    #[arg(long, env = "MESH_MAX_PACKET_FLOWS_PER_POD", value_name = "COUNT",
          default_value_t = PACKET_FLOWS_CAPACITY as u32, value_parser = value_parser!(u32).range(1..=1 << 24))]
    pub max_packet_flows_per_pod: u32,
}

impl Default for PodTables {
    /// What the flags default to.
    fn default() -> Self {
        Self {
            max_captured_connections_per_pod: ORIGINAL_DST_CAPACITY as u32,
            max_app_connections_per_pod: CLIENTS_CAPACITY as u32,
            max_direct_connections_per_pod: ADMITTED_CAPACITY as u32,
            max_flows_per_pod: FLOWS_CAPACITY as u32,
            max_packet_flows_per_pod: PACKET_FLOWS_CAPACITY as u32,
        }
    }
}

impl PodTables {
    /// The tables of the object with this mark, and how many entries each is to have. Two of them have an entry more,
    /// where the kernel notes that they were full.
    pub(super) fn sizes(self, mark: Mark) -> [(String, u32); 5] {
        [
            (POD_ORIGINAL_DST, self.max_captured_connections_per_pod + 1),
            (POD_CLIENTS, self.max_app_connections_per_pod + 1),
            (POD_ADMITTED, self.max_direct_connections_per_pod),
            (POD_FLOWS, self.max_flows_per_pod),
            (POD_PACKET_FLOWS, self.max_packet_flows_per_pod),
        ]
        .map(|(name, entries)| (mark.map_name(name), entries))
    }
}

/// What became of what did not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A connection was refused.
    Refused,
    /// A flow was not recorded or not reported; its connection was not touched.
    Lost,
    /// A packet was dropped that had no business where it was.
    Dropped,
}

/// One counter of the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reason {
    index: u32,
    /// What became of it.
    pub outcome: Outcome,
    /// The word in metrics and logs.
    pub word: &'static str,
    /// What to do about it.
    advice: &'static str,
}

/// All counters of the kernel's, by their index.
pub const REASONS: [Reason; counter::COUNT] = {
    use Outcome::{Dropped, Lost, Refused};
    const fn reason(index: u32, outcome: Outcome, word: &'static str, advice: &'static str) -> Reason {
        Reason { index, outcome, word, advice }
    }
    [
        reason(
            counter::ORIGINAL_DST_FULL,
            Refused,
            "captured_connections_full",
            "a pod has --max-captured-connections-per-pod open",
        ),
        reason(
            counter::CLIENTS_FULL,
            Refused,
            "app_connections_full",
            "--max-app-connections-per-pod are open to the apps of a pod",
        ),
        reason(
            counter::FLOWS_FULL,
            Lost,
            "flows_full",
            "see --max-flows-per-pod, --max-packet-flows-per-pod",
        ),
        reason(counter::CLOSED_FULL, Lost, "closed_flows_full", "more flows end than the agent can read"),
        reason(counter::NO_STORAGE, Refused, "no_memory", "the kernel has no memory for a socket's storage"),
        reason(
            counter::LEAKED,
            Dropped,
            "leaked",
            "a pod with mesh.io/egress: restricted sends TCP around the agent; `meshctl flows` shows which, verdict leaked",
        ),
        reason(
            counter::ADMITTED_FULL,
            Refused,
            "direct_connections_full",
            "--max-direct-connections-per-pod are open to a pod",
        ),
        reason(
            counter::PROBES_FULL,
            Refused,
            "probes_full",
            "the kubelet has 1024 connections open to the ports that a pod declares for probes",
        ),
        reason(
            counter::PROBE_BYTES,
            Dropped,
            "probe_bytes",
            "the kubelet sends bytes to a port that its pod declares for TCP probes alone: some pod's httpGet.host names that pod",
        ),
    ]
};

/// Reads the kernel's counters, and logs what they say: each reason once a minute at most.
pub struct Losses {
    counters: PerCpuArray<MapData, u64>,
    seen: [u64; counter::COUNT],
    log: [Quiet; counter::COUNT],
}

impl fmt::Debug for Losses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Losses").field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl Capture {
    /// What is refused and lost in the kernel from now on.
    ///
    /// # Errors
    /// The counters cannot be opened.
    pub fn losses(&self) -> Result<Losses> {
        let counters = loader::open(&self.dir, COUNTERS)?;
        let mut losses = Losses { counters, seen: [0; counter::COUNT], log: Default::default() };
        losses.seen = losses.read()?;
        Ok(losses)
    }
}

impl Losses {
    fn read(&self) -> Result<[u64; counter::COUNT]> {
        let mut sums = [0; counter::COUNT];
        for (sum, reason) in sums.iter_mut().zip(REASONS) {
            *sum = match self.counters.get(&reason.index, 0) {
                Ok(counted) => counted.iter().sum(),
                // The table is that of an older agent, which counted less.
                Err(MapError::KeyNotFound) => 0,
                Err(error) => return Err(error).context("map COUNTERS"),
            };
        }
        Ok(sums)
    }

    /// How often each reason came up since the last time this was asked.
    ///
    /// # Errors
    /// The counters cannot be read.
    pub fn since(&mut self) -> Result<[(Reason, u64); counter::COUNT]> {
        let now = self.read()?;
        let mut since = [(REASONS[0], 0); counter::COUNT];
        for (i, reason) in REASONS.into_iter().enumerate() {
            since[i] = (reason, now[i].saturating_sub(self.seen[i]));
            if let Some(count) = self.log[i].tell(since[i].1, Instant::now()) {
                let Reason { outcome, word, advice, .. } = reason;
                match outcome {
                    Outcome::Dropped => {
                        tracing::warn!(reason = word, count, advice, "packets around the agent were dropped");
                    }
                    Outcome::Refused | Outcome::Lost => {
                        tracing::warn!(reason = word, count, ?outcome, advice, "the kernel had no room");
                    }
                }
            }
        }
        self.seen = now;
        Ok(since)
    }
}

/// Keeps a line of the log from coming too often: once a minute at most.
#[derive(Debug, Default)]
pub(super) struct Quiet {
    told: Option<Instant>,
    untold: u64,
}

impl Quiet {
    /// How many to tell of now, if it is time.
    pub(super) fn tell(&mut self, more: u64, now: Instant) -> Option<u64> {
        self.untold += more;
        let quiet = self.told.is_some_and(|told| now.duration_since(told) < QUIET);
        if self.untold == 0 || quiet {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        tables: PodTables,
    }

    #[test]
    fn the_flags_default_to_the_default() {
        assert_eq!(Flags::try_parse_from(["mesh-agent"]).unwrap().tables, PodTables::default());
        assert!(Flags::try_parse_from(["mesh-agent", "--max-flows-per-pod=0"]).is_err());
    }

    #[test]
    fn reasons_stand_at_their_index() {
        for (i, reason) in REASONS.into_iter().enumerate() {
            assert_eq!(reason.index as usize, i, "{}", reason.word);
        }
    }

    #[test]
    fn a_reason_is_told_at_once_and_then_once_a_minute_with_what_came_meanwhile() {
        let (mut log, start) = (Quiet::default(), Instant::now());
        assert_eq!(log.tell(0, start), None);
        assert_eq!(log.tell(3, start), Some(3));
        assert_eq!(log.tell(4, start + Duration::from_secs(1)), None);
        assert_eq!(log.tell(0, start + QUIET), Some(4));
        assert_eq!(log.tell(0, start + 2 * QUIET), None);
    }
}
