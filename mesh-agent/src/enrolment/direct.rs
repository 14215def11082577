//! Which connections of this node's pods run from app to app: kept in step with the configuration and with the pods that
//! are enrolled.
//!
//! Promises that a change of endpoints is in the kernel as soon as it is in force, whatever else is being done; and that
//! a change which forbids direct connections ends those that are open. What is forbidden and why is
//! `policy/direct.rs`'s. Tested in `direct_tests.rs` and in the lab (`tests/tests/direct/`).

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until},
};

use crate::{
    capture::{Capture, DirectEndpoint, DirectRoute, DirectSet, OpenDirect},
    policy::direct::{self, Because},
    proxy::Mesh,
    state::snapshot::{Endpoint, Service, ServicePort, SharedMap, Snapshot, Workload},
};

/// After a change, how long until it is looked once more for connections that were chosen just before it.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The enrolled pods of this node, as the configuration sees them now.
#[derive(Debug, Default)]
struct Local {
    by_cookie: HashMap<u64, Arc<Workload>>,
    cookies: HashMap<IpAddr, u64>,
}

impl Local {
    fn new(mesh: &Mesh, snapshot: &Snapshot) -> Self {
        let mut local = Self::default();
        for pod in mesh.pods.all().values() {
            let Some(cookie) = pod.net().cookie() else { continue };
            let held = &pod.net().workload;
            let now = held.ips.first().and_then(|ip| snapshot.workload_at(*ip));
            let same = |now: &&Arc<Workload>| {
                now.enrolled && now.namespace == held.namespace && now.name == held.name
            };
            if let Some(now) = now.filter(same) {
                local.add(cookie, now);
            }
        }
        local
    }

    /// Whether the same pods are the same.
    fn is_same(&self, other: &Self) -> bool {
        let same = |(cookie, pod)| other.by_cookie.get(cookie).is_some_and(|other| Arc::ptr_eq(pod, other));
        self.by_cookie.len() == other.by_cookie.len() && self.by_cookie.iter().all(same)
    }

    fn add(&mut self, cookie: u64, workload: &Arc<Workload>) {
        self.cookies.extend(workload.ips.iter().map(|ip| (*ip, cookie)));
        self.by_cookie.insert(cookie, Arc::clone(workload));
    }
}

/// Keeps the kernel in step, for as long as this is awaited. `pods`: they have changed.
pub(super) async fn keep(
    mesh: Arc<Mesh>,
    capture: Arc<Capture>,
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    pods: Arc<Notify>,
) {
    let (mut again, mut followed) = (None::<Instant>, Followed::default());
    loop {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        let changed =
            tokio::task::block_in_place(|| bring_up_to_date(&mesh, &capture, &snapshot, &mut followed));
        // Counted from the last change: what looks at other things meanwhile puts it off no further.
        let now = Instant::now();
        again = if changed { Some(now + LOOK_AGAIN) } else { again.filter(|at| *at > now) };
        tokio::select! {
            changed = snapshots.changed() => if changed.is_err() { return },
            () = pods.notified() => {}
            () = sleep_until(again.unwrap_or(now)), if again.is_some() => {}
        }
    }
}

fn bring_up_to_date(
    mesh: &Mesh,
    capture: &Capture,
    snapshot: &Arc<Snapshot>,
    followed: &mut Followed,
) -> bool {
    followed.follow(if mesh.direct { Local::new(mesh, snapshot) } else { Local::default() }, snapshot);
    let Followed { local, wanted, .. } = followed;
    let changed = capture.set_direct(wanted).unwrap_or_else(|error| {
        tracing::warn!(error = format!("{error:#}"), "some connections take the agent that need not");
        false
    });
    let ended = capture.end_direct(|open| {
        let because = forbidden(snapshot, local, open);
        if let Some(because) = because {
            let OpenDirect { dialled, endpoint, .. } = open;
            tracing::info!(%dialled, %endpoint, %because, "a direct connection is not allowed any more");
        }
        because.is_some()
    });
    changed || ended > 0
}

/// What the kernel is to choose from, for each of these pods and each address that it may dial; and by which configuration.
#[derive(Debug, Default)]
struct Followed {
    services: SharedMap<Arc<str>, Arc<Service>>,
    local: Local,
    wanted: HashMap<DirectRoute, Arc<DirectSet>>,
}

impl Followed {
    /// Looks at what has changed: all services where it is the pods.
    fn follow(&mut self, local: Local, snapshot: &Snapshot) {
        if !local.is_same(&self.local) {
            self.wanted.clear();
            self.local = local;
            snapshot.services.values().for_each(|service| self.add(service));
            self.services = snapshot.services.clone();
            return;
        }
        let before = std::mem::replace(&mut self.services, snapshot.services.clone());
        let changes = snapshot.services.changes(&before, Arc::ptr_eq);
        // First: an address may have come from one to another.
        for gone in changes.iter().filter_map(|(_, before, _)| *before) {
            self.remove(gone);
        }
        for new in changes.iter().filter_map(|(_, _, after)| *after) {
            self.add(new);
        }
    }

    fn add(&mut self, service: &Service) {
        if service.vips.is_empty() {
            return;
        }
        for (cookie, client) in &self.local.by_cookie {
            if !service.visible.to(&client.namespace) {
                continue;
            }
            for port in ports(service, client) {
                let Some(set) = set(port, client, &self.local) else { continue };
                let set = Arc::new(set);
                for vip in dialled(service, &set) {
                    self.wanted.insert((*cookie, SocketAddr::new(vip, port.port)), Arc::clone(&set));
                }
            }
        }
    }

    fn remove(&mut self, service: &Service) {
        let ports = || service.ports.iter().chain(service.views.values().flatten()).map(|port| port.port);
        for cookie in self.local.by_cookie.keys() {
            for vip in &service.vips {
                for port in ports() {
                    self.wanted.remove(&(*cookie, SocketAddr::new(*vip, port)));
                }
            }
        }
    }
}

fn ports<'a>(service: &'a Service, client: &Workload) -> impl Iterator<Item = &'a ServicePort> {
    service.ports_for(client.view()).iter().filter(|port| direct::port(port).is_ok())
}

/// The service's addresses of its endpoints' family: the kernel sends a socket to no other.
fn dialled(service: &Service, set: &DirectSet) -> impl Iterator<Item = IpAddr> {
    let v6 = set.endpoints.iter().any(|endpoint| endpoint.address.is_ipv6());
    service.vips.iter().copied().filter(move |vip| vip.is_ipv6() == v6)
}

/// All endpoints of a port; `None` where all of them are reached through the agent.
fn set(port: &ServicePort, client: &Workload, local: &Local) -> Option<DirectSet> {
    let endpoint = |endpoint: &Arc<Endpoint>| {
        let address = endpoint.address;
        let netns = endpoint.workload.as_ref().and_then(|_| local.cookies.get(&address.ip()).copied());
        let server = netns.and_then(|cookie| local.by_cookie.get(&cookie));
        let direct = server.is_some_and(|server| direct::pods(client, server, address).is_ok());
        DirectEndpoint { address, weight: 1, netns, direct }
    };
    let endpoints: Vec<DirectEndpoint> = port.cluster.endpoints.iter().map(endpoint).collect();
    let any = endpoints.iter().any(|endpoint| endpoint.direct);
    any.then_some(DirectSet { balancing: port.cluster.balancing, endpoints })
}

/// Why a direct connection may not go on. Endpoints that are not ready any more keep theirs, and so do pods and services
/// that are not the mesh's any more.
fn forbidden(snapshot: &Snapshot, local: &Local, open: &OpenDirect) -> Option<Because> {
    let (client, server) = (local.by_cookie.get(&open.client)?, local.by_cookie.get(&open.server)?);
    if let Err(because) = direct::pods(client, server, open.endpoint) {
        return Some(because);
    }
    let service = snapshot.service_at(open.dialled.ip(), &client.namespace)?;
    direct::port(service.port_for(client.view(), open.dialled.port())?).err()
}

#[cfg(test)]
#[path = "direct_tests.rs"]
mod tests;
