//! Which replica of the controller leads: the one that holds a Lease of the cluster.
//!
//! Promises that no two lead at the same time, as far as monotonic clocks go equally fast: a leader that has not renewed the Lease
//! for ten seconds stops, whatever the API server does, and others take it over only after they have seen no renewal for fifteen.
//! What leads is dropped in the middle of whatever it does when it is lost. Others' clocks are never believed: a time that is
//! written in the Lease is for people. Followers watch it and ask nothing. Tested in `tests.rs`, against an API server in this
//! process ([why so](../../../../docs/decisions/041-one-leader.md)).

#[cfg(test)]
mod tests;

use std::{pin::pin, time::Duration};

use futures_util::StreamExt as _;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::PostParams,
    runtime::{WatchStreamExt as _, watcher::watch_object},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;

/// The Lease, in the controller's own namespace.
pub const LEASE: &str = "mesh-controller";

/// How long others wait after the last renewal that they have seen; written in the Lease. Three times as in client-go.
const DURATION: Duration = Duration::from_secs(15);
/// How long the leader leads after it has asked for the last renewal that it got.
const LEADS_FOR: Duration = Duration::from_secs(10);
/// How often the leader renews it.
const RENEWED: Duration = Duration::from_secs(3);
/// Pause after the API server has not answered, or has refused.
const AGAIN: Duration = Duration::from_secs(1);

/// Whether this replica leads. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Leadership(watch::Receiver<bool>);

impl Leadership {
    /// Does the work for as long as this replica leads, anew each time it begins to. Ends with who decides about it.
    pub async fn lead<F: Future<Output = ()>>(mut self, mut work: impl FnMut() -> F) {
        while self.0.wait_for(|leads| *leads).await.is_ok() {
            let work = async {
                work().await;
                std::future::pending::<()>().await;
            };
            tokio::select! {
                // What has not come to its end by now must not.
                biased;
                lost = self.0.wait_for(|leads| !*leads) => if lost.is_err() { return },
                () = work => {}
            }
        }
    }
}

/// A replica that may lead.
pub struct Candidate {
    leases: Api<Lease>,
    identity: String,
    leads: watch::Sender<bool>,
}

/// The Lease as it was seen.
struct Seen {
    /// `None`: there is none.
    lease: Option<Lease>,
    /// Since when it has been so, by this process's clock.
    since: Instant,
}

impl Candidate {
    /// By this name, which no other process ever has.
    pub fn new(client: Client, identity: String) -> Self {
        Self { leases: Api::default_namespaced(client), identity, leads: watch::Sender::new(false) }
    }

    /// Whether it leads.
    pub fn leadership(&self) -> Leadership {
        Leadership(self.leads.subscribe())
    }

    /// Leads whenever it can, until `stop`; then gives the Lease back.
    pub async fn run(self, stop: CancellationToken) {
        loop {
            let taken = tokio::select! {
                () = stop.cancelled() => return,
                taken = self.take() => taken,
            };
            let (lease, until) = taken;
            tracing::info!(
                identity = self.identity,
                "this replica leads: it writes what one alone may write"
            );
            self.leads.send_replace(true);
            let held = tokio::select! {
                () = stop.cancelled() => None,
                why = self.keep(lease, until) => Some(why),
            };
            self.leads.send_replace(false);
            match held {
                Some(why) => tracing::warn!(identity = self.identity, "this replica leads no more: {why}"),
                None => return self.give_back().await,
            }
        }
    }

    /// Waits until the Lease can be had, and takes it: what was taken, and until when it holds.
    async fn take(&self) -> (Lease, Instant) {
        let mut news = pin!(watch_object(self.leases.clone(), LEASE).default_backoff());
        let (mut seen, mut not_before): (Option<Seen>, _) = (None, Instant::now());
        let mut trouble = Trouble::default();
        loop {
            let free = seen.as_ref().map(|seen| seen.free(&self.identity).max(not_before));
            let wait = async {
                match free {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                told = news.next() => match told {
                    Some(Ok(lease)) => Seen::note(&mut seen, lease),
                    Some(Err(error)) => trouble.say(format!("Lease {LEASE} cannot be followed: {error}")),
                    // A watch has no end.
                    None => std::future::pending().await,
                },
                () = wait => {
                    let asked = Instant::now();
                    let before = seen.as_ref().and_then(|seen| seen.lease.as_ref());
                    let taking = self.write(self.taken_from(before));
                    match timeout_at(asked + LEADS_FOR, taking).await {
                        Ok(Ok(lease)) => return (lease, asked + LEADS_FOR),
                        // Somebody was faster: the watch tells who.
                        Ok(Err(kube::Error::Api(status))) if status.code == 409 => {}
                        Ok(Err(error)) => trouble.say(format!("Lease {LEASE} cannot be taken: {error}")),
                        Err(_) => trouble.say(format!("Lease {LEASE} cannot be taken: no answer in time")),
                    }
                    not_before = Instant::now() + AGAIN;
                }
            }
        }
    }

    /// Renews the Lease for as long as it goes: why it does no more.
    async fn keep(&self, mut lease: Lease, mut until: Instant) -> String {
        let (mut next, mut trouble) = (until - LEADS_FOR + RENEWED, String::from("nothing was answered"));
        loop {
            sleep_until(next.min(until)).await;
            let asked = Instant::now();
            if asked >= until {
                return format!("it could not renew the Lease in time: {trouble}");
            }
            match timeout_at(until, self.write(renewed(&lease))).await {
                Ok(Ok(renewed)) => (lease, until, next) = (renewed, asked + LEADS_FOR, asked + RENEWED),
                Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => {
                    match timeout_at(until, self.leases.get_opt(LEASE)).await {
                        // Somebody has written something else in it.
                        Ok(Ok(Some(now))) if holder(&now) == Some(&self.identity) => lease = now,
                        Ok(Ok(Some(now))) => {
                            return format!("{} has the Lease", holder(&now).unwrap_or("nobody"));
                        }
                        Ok(Ok(None)) => return "the Lease was deleted".to_owned(),
                        Ok(Err(error)) => (next, trouble) = (asked + AGAIN, error.to_string()),
                        Err(_) => "no answer in time".clone_into(&mut trouble),
                    }
                }
                Ok(Err(error)) => (next, trouble) = (asked + AGAIN, error.to_string()),
                Err(_) => "no answer in time".clone_into(&mut trouble),
            }
        }
    }

    /// So that the next one need not wait. What fails here is waited out by it.
    async fn give_back(&self) {
        let giving = async {
            let mut lease = self.leases.get(LEASE).await?;
            if let Some(spec) =
                lease.spec.as_mut().filter(|spec| spec.holder_identity.as_ref() == Some(&self.identity))
            {
                spec.holder_identity = None;
                self.write(lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        match timeout_at(Instant::now() + AGAIN, giving).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::info!("Lease {LEASE} is not given back: {error}"),
            Err(_) => tracing::info!("Lease {LEASE} is not given back: no answer"),
        }
    }

    /// Writes it where it is still as it was, and makes it where there was none.
    async fn write(&self, lease: Lease) -> kube::Result<Lease> {
        match lease.metadata.resource_version {
            Some(_) => self.leases.replace(LEASE, &PostParams::default(), &lease).await,
            None => self.leases.create(&PostParams::default(), &lease).await,
        }
    }

    /// It, taken over by this replica.
    fn taken_from(&self, before: Option<&Lease>) -> Lease {
        let metadata = ObjectMeta { name: Some(LEASE.to_owned()), ..ObjectMeta::default() };
        let mut lease = before.cloned().unwrap_or(Lease { metadata, spec: None });
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        if spec.holder_identity.as_ref() != Some(&self.identity) {
            let was = before.is_some();
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or_default() + i32::from(was));
            spec.acquire_time = Some(MicroTime(Timestamp::now()));
        }
        spec.holder_identity = Some(self.identity.clone());
        renewed(&lease)
    }
}

/// What was said last of what does not go.
#[derive(Default)]
struct Trouble(String);

impl Trouble {
    /// Says it once for as long as it is the same.
    fn say(&mut self, text: String) {
        if self.0 != text {
            tracing::warn!("{text}; it is tried again");
            self.0 = text;
        }
    }
}

impl Seen {
    /// Takes note of the Lease as it is now: what is told twice has not changed since.
    fn note(seen: &mut Option<Self>, lease: Option<Lease>) {
        let version =
            |lease: &Option<Lease>| lease.as_ref().map(|lease| lease.metadata.resource_version.clone());
        if seen.as_ref().is_none_or(|seen| version(&seen.lease) != version(&lease)) {
            *seen = Some(Self { lease, since: Instant::now() });
        }
    }

    /// When it may be taken.
    fn free(&self, by: &str) -> Instant {
        match self.lease.as_ref().and_then(holder) {
            Some(other) if other != by => {
                let spec = self.lease.as_ref().and_then(|lease| lease.spec.as_ref());
                let written = spec.and_then(|spec| spec.lease_duration_seconds);
                // Of what is written wrongly, ours.
                let written =
                    written.and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
                self.since + written.map_or(DURATION, Duration::from_secs).max(DURATION)
            }
            _ => self.since,
        }
    }
}

/// It, renewed by who has it.
fn renewed(lease: &Lease) -> Lease {
    let mut lease = lease.clone();
    let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
    spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
    spec.renew_time = Some(MicroTime(Timestamp::now()));
    lease
}

/// Who has it, if anybody.
fn holder(lease: &Lease) -> Option<&str> {
    let holder = lease.spec.as_ref()?.holder_identity.as_deref();
    holder.filter(|holder| !holder.is_empty())
}
