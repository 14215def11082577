//! The maps, and what is kept of them.

use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap as BpfHashMap, MapData};
use mesh_common::maps::{
    DIRECT, DIRECT_SLOTS, DirectKey, DirectService, ENDPOINTS, Endpoint, HELD, HeldKey, Slot, SlotKey,
};

use super::{Endpoints, Written};
use crate::capture::{
    enrol::{Capture, missing_is_fine},
    links::BpfDir,
    loader,
};

/// The part of the kernel side that is about direct connections.
#[derive(Debug, Default)]
pub(in crate::capture) struct Direct {
    pub known: Arc<Endpoints>,
    /// From the first time that something is wanted.
    pub state: Mutex<Option<(Tables, Written)>>,
}

/// The shared maps.
#[derive(Debug)]
pub(in crate::capture) struct Tables {
    pub routes: BpfHashMap<MapData, DirectKey, DirectService>,
    pub slots: BpfHashMap<MapData, SlotKey, Slot>,
    pub endpoints: BpfHashMap<MapData, u32, Endpoint>,
    /// How many direct connections a pod's table holds.
    pub room: u32,
}

impl Tables {
    pub fn open(dir: &BpfDir, room: u32) -> Result<Self> {
        Ok(Self {
            routes: loader::open(dir, DIRECT)?,
            slots: loader::open(dir, DIRECT_SLOTS)?,
            endpoints: loader::open(dir, ENDPOINTS)?,
            room,
        })
    }
}

impl Capture {
    /// The shared maps.
    pub(super) fn direct_tables(&self) -> Result<Tables> {
        Tables::open(&self.dir, self.with.tables.max_direct_connections_per_pod)
    }

    /// How many entries each client has in each server's table.
    pub(super) fn held(&self) -> Result<BpfHashMap<MapData, HeldKey, i64>> {
        loader::open(&self.dir, HELD)
    }

    /// The pod with this cookie has none any more, and nobody has any in its table.
    pub(in crate::capture) fn forget_held(&self, cookie: u64) -> Result<()> {
        let mut held = self.held()?;
        let keys: Vec<HeldKey> = held.keys().filter_map(Result::ok).collect();
        let mut of_it = keys.into_iter().filter(|key| key.server == cookie || key.client == cookie);
        of_it.try_for_each(|key| missing_is_fine(held.remove(&key)).context("map HELD"))
    }
}

/// Entries of a client's were taken out of a server's table. The kernel counts on meanwhile: what it counts between the
/// reading and the writing here is lost, one or two at most.
pub(super) fn held_less(
    held: &mut BpfHashMap<MapData, HeldKey, i64>,
    server: u64,
    client: u64,
) -> Result<()> {
    for client in [client, HeldKey::ALL] {
        let key = HeldKey { server, client };
        if let Ok(count) = held.get(&key, 0) {
            held.insert(key, count - 1, 0).context("map HELD")?;
        }
    }
    Ok(())
}
