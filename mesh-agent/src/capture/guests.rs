//! Guests of a pod: nested containers and virtual machines, whose connections have no socket in the pod. They come in by
//! *inner* interfaces, which this finds, for as long as the pod is enrolled, and has handed to the agent.
//!
//! Inner are bridges, taps and tuns, and veths whose other end is not with the agent, but none with an address of the
//! pod's: what comes in by them was sent inside the pod. On each, the programs of `mesh-ebpf/src/guests.rs` mark what is
//! the agent's; a rule and a route of the pod's namespace deliver what is marked. A pod without such an interface has
//! neither. Where there are some, `BPF_DIR/guests/COOKIE` says in which namespace, so that they are taken away even after a
//! crash. Tested below and in the lab (`tests/tests/traffic_without_sockets.rs`).

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    net::IpAddr,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::{
    maps::{HashMap as BpfHashMap, Map, MapData},
    programs::SchedClassifier,
};
use mesh_common::maps::{INNER_LINKS, INNER_LINKS_CAPACITY};
use netlink_packet_route::link::InfoKind;
use socket2::SockRef;
use tokio::{
    io::unix::AsyncFd,
    task::spawn_blocking,
    time::{Instant, sleep, sleep_until},
};

use super::{
    Listener, Net, PodNet,
    enrol::missing_is_fine,
    links::{self, BpfDir, Hook},
    loader::{self, Object},
    netns::Netns,
    rtnetlink::{self, Link, RouteSocket},
    tables::Quiet,
};

/// How long until what failed is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// Least time between two looks at a pod's interfaces: whoever changes them all the time keeps nobody busy.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// The programs, and what the pins of their links begin with.
const FROM: &str = "from-guest-";
const TO: &str = "to-guest-";

/// One pod's guests.
#[derive(Debug)]
pub(super) struct Guests {
    from: OwnedFd,
    to: OwnedFd,
    /// Where its links are pinned, its map of inner interfaces, and where its namespace is written down.
    links: PathBuf,
    inner: PathBuf,
    record: PathBuf,
    state: Mutex<State>,
}

/// By index, the names of interfaces.
type Interfaces = BTreeMap<u32, String>;

#[derive(Debug, Default)]
struct State {
    /// What is in place; `None` until it was made so for the first time.
    known: Option<Interfaces>,
    /// The pod is no longer this agent's.
    closed: bool,
    /// What the log is told: that guests are captured, that they are not, that there are too many.
    told: Quiet,
    failed: Quiet,
    crowded: Quiet,
}

impl Guests {
    /// Of the pod whose object this is. Nothing is looked for yet.
    pub(super) fn of(object: &mut Object, dir: &BpfDir, cookie: u64) -> Result<Arc<Self>> {
        let mut program = |name| -> Result<OwnedFd> {
            let program: &mut SchedClassifier = loader::program(object, name)?;
            Ok(program.fd()?.as_fd().try_clone_to_owned()?)
        };
        Ok(Arc::new(Self {
            from: program("gst_in")?,
            to: program("gst_out")?,
            links: dir.pod(cookie),
            inner: dir.maps_of(cookie).join(INNER_LINKS),
            record: dir.guests().join(cookie.to_string()),
            state: Mutex::default(),
        }))
    }

    /// Looks for inner interfaces now and whenever one comes or goes, until the pod leaves. A pod where that is not possible
    /// goes without, and the log says so. To be called inside a tokio runtime.
    pub(super) fn follow(self: &Arc<Self>, pod: &Arc<PodNet>) {
        let Net::Kernel(net) = &pod.net else { return };
        // Listening comes before looking: nothing is missed in between.
        let changes = rtnetlink::watch(net.netns());
        let looked = self.look(pod);
        // Since the guard was put in place something may have come.
        pod.look_again();
        match changes {
            Ok(changes) => {
                let (guests, pod, gone) = (Arc::clone(self), Arc::downgrade(pod), pod.gone.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        () = gone.cancelled() => {}
                        () = guests.keep_looking(changes, pod, looked) => {}
                    }
                });
            }
            Err(error) => {
                tracing::warn!(pod = %pod.name(), %error, "interfaces that come later are not noticed");
            }
        }
    }

    async fn keep_looking(
        self: Arc<Self>,
        changes: AsyncFd<socket2::Socket>,
        pod: Weak<PodNet>,
        mut looked: bool,
    ) {
        let mut last = Instant::now();
        loop {
            let ready = tokio::select! {
                () = sleep(TRY_AGAIN), if !looked => None,
                ready = changes.readable() => Some(ready),
            };
            // All that comes until then is one change.
            sleep_until(last + LOOK_EVERY).await;
            if let Some(ready) = ready {
                let Ok(mut ready) = ready else { return };
                match rtnetlink::drain(ready.get_inner()) {
                    Ok(true) => ready.clear_ready(),
                    Ok(false) => {}
                    Err(_) => return,
                }
            }
            let Some(pod) = pod.upgrade() else { return };
            let guests = Arc::clone(&self);
            let look = spawn_blocking(move || {
                let looked = guests.look(&pod);
                pod.look_again();
                looked
            });
            // One that has panicked is tried again.
            looked = look.await.unwrap_or(false);
            last = Instant::now();
        }
    }

    /// False when it has to be tried again.
    fn look(&self, pod: &PodNet) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let looked = self.try_look(&mut state, pod);
        if let Err(error) = &looked
            && let Some(times) = state.failed.tell(1, Instant::now().into_std())
        {
            let error = format!("{error:#}");
            tracing::warn!(
                pod = %pod.name(), error, times, "what is behind the pod's inner interfaces is not captured"
            );
        }
        looked.is_ok()
    }

    fn try_look(&self, state: &mut State, pod: &PodNet) -> Result<()> {
        let Net::Kernel(net) = &pod.net else { return Ok(()) };
        if state.closed {
            return Ok(());
        }
        let mut found = inner_interfaces(net.netns(), &pod.workload.ips)?;
        let now = Instant::now().into_std();
        if found.len() > INNER_LINKS_CAPACITY {
            if state.crowded.tell(1, now).is_some() {
                let all = found.len();
                tracing::warn!(
                    pod = %pod.name(), all, "guests behind {INNER_LINKS_CAPACITY} of its interfaces are captured"
                );
            }
            found = found.into_iter().take(INNER_LINKS_CAPACITY).collect();
        }
        if state.known.as_ref() != Some(&found) {
            // Whatever comes of it, it is not what was known.
            state.known = None;
            self.make_so(net.netns(), pod, &found)?;
            if !found.is_empty()
                && let Some(changes) = state.told.tell(1, now)
            {
                let interfaces: Vec<_> = found.values().map(String::as_str).collect();
                let interfaces = interfaces.join(" ");
                tracing::info!(pod = %pod.name(), interfaces, changes, "connections of guests are captured");
            }
            state.known = Some(found);
        }
        Ok(())
    }

    /// From here on nothing is changed in the pod, which is another agent's or is being let go of.
    pub(super) fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
    }

    /// Takes away what is for other interfaces, and adds what is missing for these; what marks packets comes last.
    fn make_so(&self, netns: &Netns, pod: &PodNet, found: &Interfaces) -> Result<()> {
        links::detach_others(&self.links, |pinned| index_of(pinned).is_none_or(|i| found.contains_key(&i)))?;
        let routes = RouteSocket::open(netns)?;
        for rule in routes.rules().context("rules of its namespace")? {
            if !found.values().any(|name| rtnetlink::interface_of(&rule) == Some(name)) {
                routes.remove_rule(rule).context("a rule of its namespace")?;
            }
        }
        self.list_inner(found)?;
        if found.is_empty() {
            routes.remove_route().context("the route of its namespace")?;
            return remove_record(&self.record);
        }
        self.write_record(netns)?;
        if let Some(listeners) = &*pod.listeners.load() {
            // What the listener accepts answers from the address that the guest dialled.
            let listener = SockRef::from(&listeners[Listener::Outbound as usize]);
            listener.set_ip_transparent_v4(true).context("the outbound listener")?;
        }
        routes.add_route().context("the route of its namespace")?;
        for (index, name) in found {
            routes.add_rule(name).context("a rule of its namespace")?;
            for (prefix, program, hook) in [(TO, &self.to, Hook::Egress), (FROM, &self.from, Hook::Ingress)] {
                let pinned = self.links.join(format!("{prefix}{index}"));
                links::attach_tcx(Some(netns), program.as_fd(), *index, hook, &pinned)
                    .with_context(|| format!("interface {name}"))?;
            }
        }
        Ok(())
    }

    fn list_inner(&self, found: &Interfaces) -> Result<()> {
        let map = MapData::from_pin(&self.inner).and_then(Map::from_map_data);
        let mut map: BpfHashMap<MapData, u32, u32> =
            map.and_then(TryInto::try_into).context("map INNER_LINKS")?;
        let listed: Vec<u32> = map.keys().filter_map(Result::ok).collect();
        for index in listed.iter().filter(|index| !found.contains_key(index)) {
            missing_is_fine(map.remove(index)).context("map INNER_LINKS")?;
        }
        for index in found.keys() {
            map.insert(index, index, 0).context("map INNER_LINKS")?;
        }
        Ok(())
    }

    /// bpffs holds no files, but links to other places.
    fn write_record(&self, netns: &Netns) -> Result<()> {
        if let Some(dir) = self.record.parent() {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        remove_record(&self.record)?;
        std::os::unix::fs::symlink(netns.path(), &self.record)
            .with_context(|| format!("cannot make {}", self.record.display()))
    }
}

/// The interface whose packets this pinned link is for.
fn index_of(pinned: &str) -> Option<u32> {
    [FROM, TO].iter().find_map(|prefix| pinned.strip_prefix(prefix)?.parse().ok())
}

/// The pod's inner interfaces.
fn inner_interfaces(netns: &Netns, pods: &[IpAddr]) -> Result<Interfaces> {
    let routes = RouteSocket::open(netns)?;
    let links = routes.links().context("interfaces of its namespace")?;
    let addresses = routes.addresses().context("addresses of its namespace")?;
    let agents = File::open("/proc/self/ns/net").context("the agent's own network namespace")?;
    let agents = routes.number_of(agents.as_fd()).context("the agent's own network namespace")?;
    let has_pods =
        |link: &Link| addresses.iter().any(|(index, ip)| *index == link.index && pods.contains(ip));
    let inner = links.into_iter().filter(|link| is_inner(link, has_pods(link), agents));
    Ok(inner.map(|link| (link.index, link.name)).collect())
}

/// Whether what comes in by this interface was sent inside the pod. `has_pods`: it has an address of the pod's, so that it
/// leads out. `agents`: the number of the agent's namespace, which is the node's.
fn is_inner(link: &Link, has_pods: bool, agents: Option<i32>) -> bool {
    // What comes in by a port comes in by its bridge, unless it stays among the bridge's ports.
    if has_pods || link.has_controller {
        return false;
    }
    match link.kind {
        // What comes out of a tap or tun was put there by a process of the pod.
        Some(InfoKind::Bridge | InfoKind::Tun) => true,
        Some(InfoKind::Veth) => agents.is_none() || link.peer_netns != agents,
        _ => false,
    }
}

fn remove_record(record: &Path) -> Result<()> {
    match fs::remove_file(record) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", record.display()))
        }
        _ => Ok(()),
    }
}

/// The namespace that was written down here, unless it has gone.
fn recorded(record: &Path) -> Option<Netns> {
    let cookie = record.file_name().and_then(|name| name.to_str()?.parse().ok());
    let netns = fs::read_link(record).and_then(|path| Netns::open(&path)).ok()?;
    (Some(netns.cookie()) == cookie).then_some(netns)
}

/// The mesh's rules and routes in the namespaces that are written down in this directory of pins, in words.
pub(super) fn written_down(bpf_dir: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for netns in links::list(&bpf_dir.join(links::GUESTS))?.iter().filter_map(|record| recorded(record)) {
        let path = netns.path().display();
        let left = rules_and_routes(&netns).with_context(|| format!("rules and routes in {path}"))?;
        found.extend(left.into_iter().map(|what| format!("{what} in {path}")));
    }
    Ok(found)
}

/// Takes rules and routes out of the namespace that was written down here, unless it has gone, and the record away.
pub(super) fn leave(record: &Path) -> Result<()> {
    if let Some(netns) = &recorded(record) {
        clear(netns).with_context(|| format!("rules and routes in {}", netns.path().display()))?;
    }
    remove_record(record)
}

/// As [`leave`], for all that are written down in this directory.
pub(super) fn leave_all(dir: &Path) -> Result<()> {
    links::list(dir)?.iter().try_for_each(|record| leave(record))
}

/// Forgets what was written down and leaves the namespace as it is: another agent's.
pub(super) fn forget(record: &Path) -> Result<()> {
    remove_record(record)
}

fn clear(netns: &Netns) -> io::Result<()> {
    let routes = RouteSocket::open(netns)?;
    for rule in routes.rules()? {
        routes.remove_rule(rule)?;
    }
    routes.remove_route()
}

/// What is left of the mesh's rules and routes in a network namespace, in words.
///
/// # Errors
/// The namespace cannot be asked.
pub fn rules_and_routes_in(netns: &Path) -> io::Result<Vec<String>> {
    rules_and_routes(&Netns::open(netns)?)
}

fn rules_and_routes(netns: &Netns) -> io::Result<Vec<String>> {
    let routes = RouteSocket::open(netns)?;
    let rules = routes.rules()?.len();
    let count = [(rules, "rule"), (routes.routes()?, "route")];
    let left = count.into_iter().filter(|(count, _)| *count > 0);
    Ok(left.map(|(count, what)| format!("{count} {what}(s) of table {}", rtnetlink::TABLE)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(kind: Option<InfoKind>, has_controller: bool, peer_netns: Option<i32>) -> Link {
        Link { index: 7, name: "x".to_owned(), kind, has_controller, peer: 2, peer_netns }
    }

    #[test]
    fn inner_is_what_was_made_inside() {
        let agents = Some(3);
        for kind in [InfoKind::Bridge, InfoKind::Tun] {
            assert!(is_inner(&link(Some(kind.clone()), false, None), false, agents));
            assert!(!is_inner(&link(Some(kind.clone()), true, None), false, agents), "a port");
            assert!(!is_inner(&link(Some(kind), false, None), true, agents), "the pod's own");
        }
        let veth = |peer| link(Some(InfoKind::Veth), false, peer);
        assert!(is_inner(&veth(Some(4)), false, agents), "a nested container");
        assert!(is_inner(&veth(None), false, agents), "both ends in the pod");
        assert!(is_inner(&veth(Some(4)), false, None), "no interface leads to the agent");
        assert!(!is_inner(&veth(agents), false, agents), "another network of the node's");
        assert!(!is_inner(&veth(Some(4)), true, agents), "the pod's own");
        for kind in [None, Some(InfoKind::MacVlan), Some(InfoKind::Wireguard), Some(InfoKind::Dummy)] {
            assert!(!is_inner(&link(kind, false, None), false, agents));
        }
    }

    #[test]
    fn pins_say_their_interface() {
        assert_eq!(index_of("from-guest-12"), Some(12));
        assert_eq!(index_of("to-guest-3"), Some(3));
        for other in ["inbound", "egress-3", "from-guest-x"] {
            assert_eq!(index_of(other), None);
        }
    }
}
