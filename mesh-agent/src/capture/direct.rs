//! Direct connections, from the agent's side: the maps that the kernel chooses from, kept in step with what the agent
//! wants, and an end to connections that may not go on without it.
//!
//! Promises that a service's endpoints change as one; that an endpoint keeps its number, and the kernel its count of
//! connections, for as long as it is wanted or in use. What a map has no room for is reached through the agent. Never
//! decides who may be reached: that is `policy/direct.rs`. Tested in the lab (`tests/tests/direct/`).

mod destroy;
mod tables;
mod weights;

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use arc_swap::ArcSwap;
use mesh_common::{
    addr::Addr,
    maps::{DirectKey, DirectService, Endpoint, SlotKey, balancing},
};

pub use self::destroy::OpenDirect;
pub(super) use self::tables::Direct;
use self::tables::Tables;
use super::{
    enrol::{Capture, missing_is_fine},
    flows::KEEP_CLOSED,
};
use crate::state::snapshot::Balancing;

/// How long the number of an endpoint is known after it went: for as long as a flow that ended is shown, and reported.
const KNOWN: Duration = Duration::from_secs(KEEP_CLOSED.as_secs() * 2);

/// A service as one pod may reach it: the cookie of the pod's network namespace, and the address dialled.
pub type DirectRoute = (u64, SocketAddr);

/// The endpoints of a service. Pods that see the same share one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DirectSet {
    /// How one is chosen.
    pub balancing: Balancing,
    /// All of them: those that are reached through the agent have their share too.
    pub endpoints: Vec<DirectEndpoint>,
}

/// One of the endpoints of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DirectEndpoint {
    /// Where the app listens.
    pub address: SocketAddr,
    /// Its share, among those of the others.
    pub weight: u32,
    /// Cookie of its pod's network namespace, when the pod is enrolled on this node.
    pub netns: Option<u64>,
    /// Whether it may be reached without the agent.
    pub direct: bool,
}

/// Addresses of the endpoints that the kernel chooses from, by their numbers. Never takes a lock.
#[derive(Debug, Default)]
pub struct Endpoints(ArcSwap<HashMap<u32, SocketAddr>>);

impl Endpoints {
    /// The address of an endpoint that the kernel chose; `None` when it chose none, or the number means nothing here.
    pub fn address(&self, number: u32) -> Option<SocketAddr> {
        if number == 0 { None } else { self.0.load().get(&number).copied() }
    }
}

/// What is written in the kernel.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Which set each route has.
    routes: HashMap<DirectRoute, u32>,
    /// The sets by what they say, as far as this agent has written them.
    sets: HashMap<Arc<DirectSet>, u32>,
    /// How many places each has.
    places: HashMap<u32, u32>,
    endpoints: HashMap<(SocketAddr, Option<u64>), u32>,
    /// Endpoints nobody wants any more, for as long as they are known.
    gone: HashMap<u32, (SocketAddr, Instant)>,
    /// The last numbers given.
    last_set: u32,
    last_endpoint: u32,
}

impl Written {
    /// What another agent has written. Its sets are of unknown content, and go when nobody has them any more.
    fn read(tables: &Tables) -> Self {
        let mut written = Self::default();
        for (key, service) in tables.routes.iter().filter_map(Result::ok) {
            written.routes.insert((key.netns, key.addr.into()), service.set);
        }
        for key in tables.slots.keys().filter_map(Result::ok) {
            let places = written.places.entry(key.set).or_default();
            *places = (*places).max(key.place + 1);
            written.last_set = written.last_set.max(key.set);
        }
        for (number, endpoint) in tables.endpoints.iter().filter_map(Result::ok) {
            let netns = Some(endpoint.netns).filter(|netns| *netns != 0);
            written.endpoints.insert((endpoint.addr.into(), netns), number);
            written.last_endpoint = written.last_endpoint.max(number);
        }
        written
    }
}

impl Capture {
    /// The endpoints that the kernel chooses from.
    pub fn endpoints(&self) -> Arc<Endpoints> {
        Arc::clone(&self.direct.known)
    }

    /// Has the kernel send these connections straight to these endpoints, and no others. Whether that changed anything.
    ///
    /// # Errors
    /// A map has no room, or is gone: what could not be written is reached through the agent.
    pub fn set_direct(&self, wanted: &HashMap<DirectRoute, Arc<DirectSet>>) -> Result<bool> {
        let mut state = self.direct.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.dir.is_ours() {
            return Ok(false);
        }
        if state.is_none() {
            let tables = self.direct_tables()?;
            let written = Written::read(&tables);
            *state = Some((tables, written));
        }
        let Some((tables, written)) = &mut *state else { return Ok(false) };
        let changed = written.apply(tables, wanted);
        self.direct.known.0.store(Arc::new(written.known()));
        changed
    }

    /// Lets go of the directory, and of what is written there for direct connections.
    pub(super) fn let_go_of_direct(&self) {
        let _nobody_writes = self.direct.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.dir.let_go();
    }

    /// Knows the endpoints that the agent before has written: connections that it handed over may speak of them.
    pub(super) fn learn_endpoints(&self) -> Result<()> {
        let tables = self.direct_tables()?;
        self.direct.known.0.store(Arc::new(Written::read(&tables).known()));
        Ok(())
    }

    /// The pod with this cookie dials through the agent from now on.
    pub(super) fn forget_direct(&self, cookie: u64) -> Result<()> {
        let mut state = self.direct.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((tables, written)) = &mut *state else { return Ok(()) };
        let routes: Vec<DirectRoute> =
            written.routes.keys().filter(|(netns, _)| *netns == cookie).copied().collect();
        routes.into_iter().try_for_each(|route| written.remove_route(tables, route))
    }
}

impl Written {
    /// Sets first, then what points to them, then what nobody points to any more.
    fn apply(&mut self, tables: &mut Tables, wanted: &HashMap<DirectRoute, Arc<DirectSet>>) -> Result<bool> {
        let mut changed = false;
        let mut failed = Ok(());
        for (route, set) in wanted {
            let before = self.routes.get(route).copied();
            let number = match self.sets.get(set) {
                Some(number) => Ok(*number),
                None => self.write_set(tables, set),
            };
            let written = match number {
                Ok(number) if before == Some(number) => continue,
                Ok(number) => self.write_route(tables, *route, set, number),
                Err(error) => Err(error),
            };
            changed = true;
            if let Err(error) = written {
                // What it said before must not stay in force.
                let removed = self.remove_route(tables, *route);
                let error: Result<()> = Err(error);
                failed = failed.and(error).and(removed);
            }
        }
        let stale: Vec<DirectRoute> =
            self.routes.keys().filter(|route| !wanted.contains_key(*route)).copied().collect();
        for route in stale {
            changed = true;
            failed = failed.and(self.remove_route(tables, route));
        }
        self.forget_sets(tables)?;
        self.forget_endpoints(tables)?;
        failed.map(|()| changed)
    }

    fn write_set(&mut self, tables: &mut Tables, set: &Arc<DirectSet>) -> Result<u32> {
        let number = self.last_set.wrapping_add(1);
        self.last_set = number;
        let shares: Vec<u32> = set.endpoints.iter().map(|endpoint| endpoint.weight).collect();
        self.places.insert(number, 0);
        for (place, (endpoint, mut slot)) in set.endpoints.iter().zip(weights::aliases(&shares)).enumerate() {
            slot.endpoint = self.number(tables, endpoint)?;
            slot.direct = u32::from(endpoint.direct);
            let place = u32::try_from(place)?;
            tables.slots.insert(SlotKey { set: number, place }, slot, 0).context("map DIRECT_SLOTS")?;
            self.places.insert(number, place + 1);
        }
        self.sets.insert(Arc::clone(set), number);
        Ok(number)
    }

    /// The number of an endpoint, which it is given if it has none. 0 is nobody's.
    fn number(&mut self, tables: &mut Tables, endpoint: &DirectEndpoint) -> Result<u32> {
        let key = (endpoint.address, endpoint.netns);
        if let Some(number) = self.endpoints.get(&key) {
            return Ok(*number);
        }
        let number = self.last_endpoint.checked_add(1).context("the numbers of endpoints are used up")?;
        let entry = Endpoint {
            addr: endpoint.address.into(),
            netns: endpoint.netns.unwrap_or_default(),
            room: tables.room,
            open: 0,
        };
        tables.endpoints.insert(number, entry, 0).context("map ENDPOINTS")?;
        self.last_endpoint = number;
        self.endpoints.insert(key, number);
        Ok(number)
    }

    fn write_route(
        &mut self,
        tables: &mut Tables,
        route: DirectRoute,
        set: &DirectSet,
        number: u32,
    ) -> Result<()> {
        let balancing = match set.balancing {
            // The agent chooses by latency, and where there is no choice.
            Balancing::LeastRequest | Balancing::PeakEwma | Balancing::Passthrough => {
                balancing::LEAST_REQUEST
            }
            Balancing::Random => balancing::RANDOM,
            Balancing::RoundRobin => balancing::ROUND_ROBIN,
        };
        let count = u32::try_from(set.endpoints.len())?;
        // Not all pods begin with the same one.
        let next = fastrand::u32(..);
        let service = DirectService { set: number, count, balancing, next };
        tables.routes.insert(key(route), service, 0).context("map DIRECT")?;
        self.routes.insert(route, number);
        Ok(())
    }

    fn remove_route(&mut self, tables: &mut Tables, route: DirectRoute) -> Result<()> {
        self.routes.remove(&route);
        missing_is_fine(tables.routes.remove(&key(route))).context("map DIRECT")
    }

    /// Takes away the sets that no route has.
    fn forget_sets(&mut self, tables: &mut Tables) -> Result<()> {
        let used: HashSet<u32> = self.routes.values().copied().collect();
        self.sets.retain(|_, number| used.contains(number));
        let unused: Vec<(u32, u32)> =
            self.places.iter().filter(|(set, _)| !used.contains(*set)).map(|(set, n)| (*set, *n)).collect();
        for (set, places) in unused {
            for place in 0..places {
                missing_is_fine(tables.slots.remove(&SlotKey { set, place })).context("map DIRECT_SLOTS")?;
            }
            self.places.remove(&set);
        }
        Ok(())
    }

    /// Takes away the endpoints that no set has and no connection.
    fn forget_endpoints(&mut self, tables: &mut Tables) -> Result<()> {
        let wanted: HashSet<(SocketAddr, Option<u64>)> = self
            .sets
            .keys()
            .flat_map(|set| &set.endpoints)
            .map(|endpoint| (endpoint.address, endpoint.netns))
            .collect();
        let unwanted: Vec<((SocketAddr, Option<u64>), u32)> =
            self.endpoints.iter().filter(|(key, _)| !wanted.contains(*key)).map(|(k, n)| (*k, *n)).collect();
        let now = Instant::now();
        self.gone.retain(|_, (_, since)| now.duration_since(*since) < KNOWN);
        for (key, number) in unwanted {
            if tables.endpoints.get(&number, 0).is_ok_and(|endpoint| endpoint.open != 0) {
                continue;
            }
            missing_is_fine(tables.endpoints.remove(&number)).context("map ENDPOINTS")?;
            self.endpoints.remove(&key);
            self.gone.insert(number, (key.0, now));
        }
        Ok(())
    }

    fn known(&self) -> HashMap<u32, SocketAddr> {
        let there = self.endpoints.iter().map(|((address, _), number)| (*number, *address));
        there.chain(self.gone.iter().map(|(number, (address, _))| (*number, *address))).collect()
    }
}

fn key((netns, dialled): DirectRoute) -> DirectKey {
    DirectKey { netns, addr: Addr::from(dialled), pad: 0 }
}
