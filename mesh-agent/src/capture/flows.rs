//! Flows that have ended, and direct connections that begin: read from the kernel's ring buffer, reported once each, and taken out of the tables later.
//!
//! The live tables are read by who wants to see them (`inspect.rs`); this keeps them from filling up with what is over.
//! Tested below with a table of times, and in the lab.

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError, Weak},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{HashMap as BpfHashMap, MapData, RingBuf},
};
use mesh_common::{flow::FlowRecord, maps::CLOSED};
use nix::time::{ClockId, clock_gettime};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::{
    enrol::{Capture, Flows, Shared},
    loader,
};

/// How often the ring buffer is read. The kernel does not wake the agent for each record: that would cost six times as
/// much.
pub const READ_INTERVAL: Duration = Duration::from_millis(100);
/// How long a flow stays in its table after it ended, for people to see.
pub const KEEP_CLOSED: Duration = Duration::from_secs(30);
/// How long a packet flow, which has no end of its own, may be silent before it counts as ended. (The kernel's own limit
/// for answered UDP is two minutes.)
pub const PACKET_FLOW_IDLE: Duration = Duration::from_mins(1);
/// How often the tables are looked through for packet flows that have ended, and for closed flows whose report was lost.
const SWEEP_INTERVAL: Duration = Duration::from_secs(15);
/// Reports waiting for their reader; beyond that they wait in the ring buffer.
const QUEUE: usize = 1024;

impl Capture {
    /// Starts reading ended flows, and direct connections that begin (whose end is 0). They come through the channel
    /// returned, each once, until it is dropped or this capture is. To be called once, inside a tokio runtime.
    ///
    /// # Errors
    /// The ring buffer cannot be read, or is being read already.
    pub fn closed_flows(&self) -> Result<mpsc::Receiver<FlowRecord>> {
        let mut node = self.node.lock().unwrap_or_else(PoisonError::into_inner);
        let ring = loader::take(&mut node, CLOSED).context("ended flows are being read already")?;
        let (reports, receiver) = mpsc::channel(QUEUE);
        let stop = CancellationToken::new();
        let reader = read(ring, Arc::downgrade(&self.shared), reports, stop.clone());
        let reading = Reading { stop, reader: tokio::spawn(reader) };
        *self.reading.lock().unwrap_or_else(PoisonError::into_inner) = Some(reading);
        Ok(receiver)
    }

    /// Stops what reads the kernel's buffers, so that another process can. What was read is still reported.
    pub(super) async fn stop_reading(&self) {
        if let Some(forwarding) = self.forwarding.lock().unwrap_or_else(PoisonError::into_inner).take() {
            forwarding.abort();
        }
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Reading { stop, reader }) = reading {
            stop.cancel();
            // One that has failed reads no more either.
            let _ = reader.await;
        }
    }

    /// All flows in the tables now, open ones and those that ended a short while ago, read one by one. (Where there may
    /// be many of them, read the pinned maps in batches instead.)
    pub fn flows(&self) -> Vec<FlowRecord> {
        let mut records = Vec::new();
        for flows in self.shared.all_flows() {
            let sockets = flows.sockets.lock().unwrap_or_else(PoisonError::into_inner);
            let packets = flows.packets.lock().unwrap_or_else(PoisonError::into_inner);
            records.extend(sockets.iter().filter_map(Result::ok).map(|(_, record)| record));
            records.extend(packets.iter().filter_map(Result::ok).map(|(_, record)| record));
        }
        records
    }
}

/// The task that reads ended flows.
#[derive(Debug)]
pub(super) struct Reading {
    stop: CancellationToken,
    reader: JoinHandle<()>,
}

/// A closed flow that is still in its table.
struct Closed {
    remove_at: Instant,
    netns: u64,
    socket: u64,
    end_ns: u64,
}

async fn read(
    mut ring: RingBuf<MapData>,
    shared: Weak<Shared>,
    reports: mpsc::Sender<FlowRecord>,
    stop: CancellationToken,
) {
    let mut closed = VecDeque::new();
    let mut next_sweep = Instant::now() + SWEEP_INTERVAL;
    let mut tick = interval(READ_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = reports.closed() => return,
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let Some(shared) = shared.upgrade() else { return };
        let now = Instant::now();
        for record in drain(&mut ring) {
            let FlowRecord { netns, socket, end_ns, .. } = record;
            // A direct connection is told of when it begins, too.
            if end_ns != 0 {
                closed.push_back(Closed { remove_at: now + KEEP_CLOSED, netns, socket, end_ns });
            }
            if reports.send(record).await.is_err() {
                return;
            }
        }
        while let Some(flow) = closed.pop_front_if(|flow| flow.remove_at <= now) {
            forget(&shared, &flow);
        }
        if next_sweep <= now {
            next_sweep = now + SWEEP_INTERVAL;
            let ended = tokio::task::spawn_blocking(move || sweep(&shared)).await.unwrap_or_default();
            for record in ended {
                if reports.send(record).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// What is in the ring buffer now.
fn drain(ring: &mut RingBuf<MapData>) -> Vec<FlowRecord> {
    let mut records = Vec::new();
    while let Some(item) = ring.next() {
        if let Some(record) = from_bytes(&item) {
            records.push(record);
        } else {
            tracing::error!(bytes = item.len(), "the kernel programs are not of this agent's build");
        }
    }
    records
}

fn from_bytes(bytes: &[u8]) -> Option<FlowRecord> {
    if bytes.len() < size_of::<FlowRecord>() {
        return None;
    }
    #[expect(unsafe_code, reason = "the ring buffer gives bytes")]
    // SAFETY: there are enough bytes, and `FlowRecord` is plain data for which every pattern of bytes is a value.
    Some(unsafe { bytes.as_ptr().cast::<FlowRecord>().read_unaligned() })
}

/// Takes a flow out of its table, unless its socket has begun another one.
fn forget(shared: &Shared, flow: &Closed) {
    let Some(flows) = shared.flows_of(flow.netns) else { return };
    let mut table = flows.sockets.lock().unwrap_or_else(PoisonError::into_inner);
    if table.get(&flow.socket, 0).is_ok_and(|record| record.end_ns == flow.end_ns) {
        // Gone already is as good.
        let _ = table.remove(&flow.socket);
    }
}

/// Takes out of all tables what has ended without a report, and returns the packet flows among it.
fn sweep(shared: &Shared) -> Vec<FlowRecord> {
    let Some(now) = monotonic_ns() else { return Vec::new() };
    let mut ended = Vec::new();
    for flows in shared.all_flows() {
        let Flows { sockets, packets, .. } = &*flows;
        let mut packets = packets.lock().unwrap_or_else(PoisonError::into_inner);
        for mut record in take(&mut packets, |record| is_idle(record, now)) {
            record.end_ns = record.last_seen_ns;
            ended.push(record);
        }
        drop(packets);
        take(&mut sockets.lock().unwrap_or_else(PoisonError::into_inner), |record| is_stale(record, now));
    }
    ended
}

/// Removes the entries for which `ended` holds, and returns them.
fn take<K: Pod>(
    table: &mut BpfHashMap<MapData, K, FlowRecord>,
    ended: impl Fn(&FlowRecord) -> bool,
) -> Vec<FlowRecord> {
    // An entry that goes away while the table is read is an error of that step, not of the reading.
    let found: Vec<_> = table.iter().filter_map(Result::ok).filter(|(_, record)| ended(record)).collect();
    found.into_iter().filter(|(key, _)| table.remove(key).is_ok()).map(|(_, record)| record).collect()
}

fn is_idle(record: &FlowRecord, now_ns: u64) -> bool {
    older(record.last_seen_ns, PACKET_FLOW_IDLE, now_ns)
}

/// Closed for so long that the ring buffer would have told.
fn is_stale(record: &FlowRecord, now_ns: u64) -> bool {
    record.end_ns != 0 && older(record.end_ns, KEEP_CLOSED * 2, now_ns)
}

fn older(then_ns: u64, limit: Duration, now_ns: u64) -> bool {
    Duration::from_nanos(now_ns.saturating_sub(then_ns)) >= limit
}

/// The clock the kernel programs use.
fn monotonic_ns() -> Option<u64> {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).ok()?);
    u64::try_from(now.as_nanos()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn silent_packet_flows_end() {
        let record = FlowRecord { last_seen_ns: 100 * SECOND, ..FlowRecord::default() };
        assert!(!is_idle(&record, 159 * SECOND));
        assert!(is_idle(&record, 160 * SECOND));
        // A record the kernel has touched after the clock was read.
        assert!(!is_idle(&record, 99 * SECOND));
    }

    #[test]
    fn open_flows_are_never_stale() {
        let open = FlowRecord::default();
        assert!(!is_stale(&open, u64::MAX));
        let closed = FlowRecord { end_ns: SECOND, ..open };
        assert!(!is_stale(&closed, 60 * SECOND));
        assert!(is_stale(&closed, 61 * SECOND));
    }

    #[test]
    fn records_come_whole_or_not_at_all() {
        assert_eq!(from_bytes(&[0; 128]), Some(FlowRecord::default()));
        assert_eq!(from_bytes(&[0; 127]), None);
    }
}
