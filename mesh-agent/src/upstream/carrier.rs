//! Carrier connections: what NetworkPolicy and the network itself say of a pass within the node.
//!
//! Bytes between two pods of one node change hands inside the agent, past the veths where a network plugin enforces its
//! policies. So a pass is allowed only while a carrier connection is up: opened from inside the source pod, at its own
//! address, to the destination pod's port 15008, and accepted by the agent there. It is made before the first pass, made
//! anew every so often (`--carrier-interval`) while it is used, and closed when it was not. Nothing is sent on it. Never counts a connection
//! that has arrived anywhere but in the destination pod: who gives the pod's address to itself gets no carrier.
//!
//! Connections of apps that are open when a carrier fails go on, as they do with network plugins that look at the
//! beginning of a connection. Tested in the lab (`tests/tests/network_policy.rs`).

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::TcpStream,
    sync::{oneshot, watch},
    time::timeout,
};

use super::{Pod, PodName, pool::lock};
use crate::{
    capture::{Captured, PodNet},
    error::{Error, Kind, Result},
    tunnel::MESH_TLS_PORT,
};

/// How long making one may take (Istio's default time to connect).
const LIMIT: Duration = Duration::from_secs(10);

/// How long a connection may take to be accepted once it is made, and how many are tried.
const ARRIVAL: Duration = Duration::from_secs(2);
const TRIES: u32 = 3;

/// How often it is looked whether a pod that leaves is gone.
const LEAVING: Duration = Duration::from_secs(1);

/// A pod's network namespace and the address it is reached at.
type Key = (u64, IpAddr);

/// Both ends of one.
type Ends = (TcpStream, Option<std::net::TcpStream>);

/// The carriers of one pod.
#[derive(Debug, Default)]
pub struct Carriers {
    /// Those that it has opened, by where they lead.
    open: Arc<Mutex<HashMap<Key, Carrier>>>,
    /// Those that are to arrive at it, by where they come from.
    expected: Mutex<HashMap<SocketAddr, oneshot::Sender<std::net::TcpStream>>>,
}

#[derive(Debug)]
struct Carrier {
    used: Arc<AtomicBool>,
    /// `None` until it is up or has failed.
    outcome: watch::Receiver<Option<Result<()>>>,
}

impl Pod {
    /// Returns once a carrier to this pod is up, after `limit` at most. At once where there is one, for the pod itself,
    /// and where there is no kernel side.
    pub(super) async fn carried(&self, to: &Arc<Self>, at: IpAddr, limit: Duration) -> Result<()> {
        let Some(cookie) = to.net().cookie().filter(|cookie| self.net().cookie() != Some(*cookie)) else {
            return Ok(());
        };
        let at = self.common_family(to, at);
        let mut outcome = self.carrier((cookie, at), to);
        if let Some(known) = &*outcome.borrow() {
            return known.clone();
        }
        // Boxed: rare, and every request would have to make room for it.
        match Box::pin(timeout(limit, outcome.wait_for(Option::is_some))).await {
            Ok(Ok(known)) => known.clone().unwrap_or(Ok(())),
            Ok(Err(_)) => Err(refused(to, at, "the pod has left the mesh")),
            Err(_) => Err(refused(to, at, &format!("nothing within {limit:?}"))),
        }
    }

    /// The address, or one of the other family where this pod has none of that.
    fn common_family(&self, to: &Self, at: IpAddr) -> IpAddr {
        let own = &self.net().workload.ips;
        let can = |ip: &IpAddr| own.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
        if can(&at) {
            return at;
        }
        to.net().workload.ips.iter().copied().find(can).unwrap_or(at)
    }

    /// The carrier that there is, or one that is being made from now on.
    fn carrier(&self, key: Key, to: &Arc<Self>) -> watch::Receiver<Option<Result<()>>> {
        let mut open = lock(&self.carriers.open);
        if let Some(carrier) = open.get(&key) {
            carrier.used.store(true, Ordering::Relaxed);
            return carrier.outcome.clone();
        }
        let (told, outcome) = watch::channel(None);
        let used = Arc::new(AtomicBool::new(false));
        let keeper = Keeper {
            from: Arc::clone(self.net()),
            source: self.address_towards(key.1),
            to: Arc::downgrade(to),
            key,
            used: Arc::clone(&used),
            open: Arc::clone(&self.carriers.open),
            again: self.limits.carrier_interval,
        };
        tokio::spawn(keeper.keep(told));
        open.insert(key, Carrier { used, outcome: outcome.clone() });
        outcome
    }

    /// Takes a connection that has arrived at port 15008 if it is a carrier; gives it back if it is not.
    pub fn take_carrier(&self, captured: Captured) -> Option<Captured> {
        match lock(&self.carriers.expected).remove(&captured.client) {
            Some(expects) => {
                // Whoever does not wait any more has no use for it.
                let _ = expects.send(captured.stream);
                None
            }
            None => Some(captured),
        }
    }
}

/// Makes one carrier again and again for as long as it is used.
struct Keeper {
    from: Arc<PodNet>,
    /// The source pod's address of the destination's family.
    source: IpAddr,
    to: Weak<Pod>,
    key: Key,
    used: Arc<AtomicBool>,
    open: Arc<Mutex<HashMap<Key, Carrier>>>,
    again: Duration,
}

impl Keeper {
    async fn keep(self, told: watch::Sender<Option<Result<()>>>) {
        // Held for as long as it stands; replaced before it is closed.
        let mut _standing = None;
        loop {
            let Some(to) = self.to.upgrade() else { break };
            match self.make(&to).await {
                Ok(ends) => _standing = Some(ends),
                Err(error) => {
                    // First the place, so that the next pass tries again.
                    lock(&self.open).remove(&self.key);
                    told.send_replace(Some(Err(error)));
                    return;
                }
            }
            told.send_replace(Some(Ok(())));
            let net = Arc::clone(to.net());
            drop(to);
            tokio::select! {
                () = tokio::time::sleep(self.again) => {}
                () = self.from.un_enrolled() => break self.stand().await,
                () = net.un_enrolled() => break self.stand().await,
            }
            let mut open = lock(&self.open);
            // Under the lock, so that nobody takes it for used at the same moment.
            if !self.used.swap(false, Ordering::Relaxed) {
                open.remove(&self.key);
                return;
            }
        }
        lock(&self.open).remove(&self.key);
    }

    /// What is under way when a pod leaves this agent is finished: what stands goes on for as long as that takes.
    async fn stand(&self) {
        while self.to.upgrade().is_some() {
            tokio::time::sleep(LEAVING).await;
        }
    }

    /// Both ends of a connection across the network between the pods. (The second is not ours to see once the pod's
    /// listeners are another agent's.)
    async fn make(&self, to: &Arc<Pod>) -> Result<Ends> {
        // While an agent takes over from another, both accept: what the other has accepted does not arrive here.
        for _ in 0..TRIES {
            if let Some(ends) = self.make_once(to).await? {
                return Ok(ends);
            }
        }
        Err(refused(to, self.key.1, &format!("{TRIES} connections were not accepted")))
    }

    /// `None`: it was connected, and has not arrived.
    async fn make_once(&self, to: &Arc<Pod>) -> Result<Option<Ends>> {
        let at = self.key.1;
        let (arrives, arrived) = oneshot::channel();
        let mut expecting = Expecting { at: to, from: None };
        let connecting = self.from.dial_from(self.source, SocketAddr::new(at, MESH_TLS_PORT), |own| {
            expecting.from = Some(own);
            lock(&to.carriers.expected).insert(own, arrives);
        });
        let both = async {
            let stream = connecting.await.map_err(|error| refused(to, at, &error.to_string()))?;
            if to.net().has_left() {
                return Ok(Some((stream, None)));
            }
            let other = timeout(ARRIVAL, arrived).await.ok().and_then(std::result::Result::ok);
            Ok(other.map(|other| (stream, Some(other))))
        };
        timeout(LIMIT, both)
            .await
            .unwrap_or_else(|_| Err(refused(to, at, &format!("nothing within {LIMIT:?}"))))
    }
}

/// Takes back what is expected where it has not arrived.
struct Expecting<'a> {
    at: &'a Pod,
    from: Option<SocketAddr>,
}

impl Drop for Expecting<'_> {
    fn drop(&mut self) {
        if let Some(from) = self.from {
            lock(&self.at.carriers.expected).remove(&from);
        }
    }
}

fn refused(to: &Pod, at: IpAddr, why: &str) -> Error {
    let (name, at) = (PodName::from(&*to.workload()), SocketAddr::new(at, MESH_TLS_PORT));
    Error::new(
        Kind::ConnectFailure,
        format!(
            "no carrier connection to pod {name} of this node at {at} ({why}): does a NetworkPolicy let port \
             {MESH_TLS_PORT} in?"
        ),
    )
}
