//! What an agent that crashed has left in place, while its successor enrols the pods again.
//!
//! Promises that a pod which fails closed stays so until it is captured again: the links of the crashed agent go on
//! refusing, set aside in `BPF_DIR/crashed-N`, and each pod is taken out of them when this agent has enrolled it. What is
//! left once no pod waits for its enrolment belongs to nobody and goes. Tested in the lab (`tests/tests/capture/agent_gone.rs`).

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap as BpfHashMap, Map, MapData};
use mesh_common::maps::{PODS, PodAddrs};

use super::{
    enrol::{Capture, missing_is_fine},
    guests,
    links::{self, BpfDir, detach_agent, detach_all, list, make},
};

const SET_ASIDE: &str = "crashed-";

impl BpfDir {
    /// Moves what is there out of the way of what is to be made; the kernel goes on with it.
    pub(super) fn set_aside(&self) -> Result<()> {
        let left: Vec<PathBuf> = list(self.path())?.into_iter().filter(|path| !is_set_aside(path)).collect();
        if left.is_empty() {
            return Ok(());
        }
        // More than one when an agent has crashed before it was through with the one before it.
        let free = |n: &u32| !self.path().join(format!("{SET_ASIDE}{n}")).exists();
        let n = (0..u32::MAX).find(free).unwrap_or_default();
        let aside = self.path().join(format!("{SET_ASIDE}{n}"));
        make(&aside)?;
        for path in left {
            let Some(name) = path.file_name() else { continue };
            let to = aside.join(name);
            fs::rename(&path, &to).with_context(|| format!("cannot move {}", path.display()))?;
        }
        Ok(())
    }

    /// Where crashed agents' things are. Asked for at each look at the pods, so only as long as there may be any.
    fn crashed(&self) -> Result<Vec<PathBuf>> {
        if !self.crashed.load(Ordering::Acquire) {
            return Ok(Vec::new());
        }
        Ok(list(self.path())?.into_iter().filter(|path| is_set_aside(path)).collect())
    }

    /// Takes one pod out of what crashed agents have left: it is captured anew.
    fn release(&self, cookie: u64) -> Result<()> {
        for crashed in self.crashed()? {
            let path = crashed.join(links::MAPS).join(PODS);
            if path.exists() {
                let map = MapData::from_pin(&path).and_then(Map::from_map_data);
                let mut pods: BpfHashMap<MapData, u64, PodAddrs> =
                    map.and_then(TryInto::try_into).with_context(|| format!("map {}", path.display()))?;
                missing_is_fine(pods.remove(&cookie)).with_context(|| format!("map {}", path.display()))?;
            }
            detach_all(&crashed.join(links::PODS).join(cookie.to_string()))?;
            guests::forget(&crashed.join(links::GUESTS).join(cookie.to_string()))?;
        }
        Ok(())
    }

    /// Takes away what crashed agents have left.
    pub(super) fn forget_crashed(&self) -> Result<()> {
        for crashed in self.crashed()? {
            detach_agent(&crashed)?;
            fs::remove_dir_all(&crashed).with_context(|| format!("cannot remove {}", crashed.display()))?;
        }
        self.crashed.store(false, Ordering::Release);
        Ok(())
    }
}

pub(super) fn is_set_aside(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(SET_ASIDE))
}

impl Capture {
    /// The pod is captured by this agent: what a crashed one did with it ends.
    pub(super) fn take_from_crashed(&self, cookie: u64) {
        if let Err(error) = self.dir.release(cookie) {
            tracing::warn!(
                error = format!("{error:#}"),
                "something of an agent that crashed is left in a pod"
            );
        }
    }

    /// Every pod of the node has had its turn: what crashed agents refuse is no longer anybody's.
    pub fn forget_crashed(&self) {
        if !self.dir.is_ours() {
            return;
        }
        if let Err(error) = self.dir.forget_crashed() {
            tracing::warn!(error = format!("{error:#}"), "something of an agent that crashed is left");
        }
    }
}
