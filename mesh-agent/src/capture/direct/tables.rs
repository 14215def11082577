//! The maps, and what is kept of them.

use std::sync::{Arc, Mutex};

use anyhow::Result;
use aya::maps::{HashMap as BpfHashMap, MapData};
use mesh_common::maps::{DIRECT, DIRECT_SLOTS, DirectKey, DirectService, ENDPOINTS, Endpoint, Slot, SlotKey};

use super::{Endpoints, Written};
use crate::capture::{links::BpfDir, loader};

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
}

impl Tables {
    pub fn open(dir: &BpfDir) -> Result<Self> {
        Ok(Self {
            routes: loader::open(dir, DIRECT)?,
            slots: loader::open(dir, DIRECT_SLOTS)?,
            endpoints: loader::open(dir, ENDPOINTS)?,
        })
    }
}
