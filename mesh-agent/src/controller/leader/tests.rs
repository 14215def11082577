//! Candidates for one Lease. Time stands still unless a test lets it pass, also while the API server is spoken to.
#![expect(clippy::unwrap_used, reason = "tests")]

use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::advance};

use super::*;
use crate::source::kubernetes::tests::fake::{Fake, Still};

struct Replica {
    leads: watch::Receiver<bool>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Replica {
    fn start(fake: &Fake, name: &str) -> Self {
        let candidate = Candidate::new(fake.cluster().client(), name.to_owned());
        let (leads, stop) = (candidate.leadership().0, CancellationToken::new());
        let task = tokio::spawn(candidate.run(stop.clone()));
        Self { leads, stop, task }
    }

    fn leads(&self) -> bool {
        *self.leads.borrow()
    }

    async fn until(&mut self, leads: bool) {
        self.leads.wait_for(|now| *now == leads).await.unwrap();
    }
}

fn lease(fake: &Fake) -> Value {
    fake.get_of("coordination.k8s.io", "leases", "default", LEASE).unwrap_or_default()
}

fn holder_of(fake: &Fake) -> Value {
    lease(fake)["spec"]["holderIdentity"].clone()
}

fn put(fake: &Fake, spec: &Value) {
    fake.put(
        "coordination.k8s.io",
        "leases",
        json!({"metadata": {"name": LEASE, "namespace": "default"}, "spec": spec}),
    );
}

/// Until every candidate that follows has seen the Lease as it is.
async fn until_renewed(fake: &Fake, times: usize) {
    fake.until_asked("PUT", times).await;
}

#[tokio::test(start_paused = true)]
async fn of_several_candidates_exactly_one_leads_for_as_long_as_it_renews() {
    let (_still, fake) = (Still::stand(), Fake::start().await);
    let mut replicas = ["a", "b", "c"].map(|name| Replica::start(&fake, name));
    fake.until(|fake| !holder_of(fake).is_null()).await;
    let first = holder_of(&fake);
    let leader = ["a", "b", "c"].iter().position(|name| first == *name).unwrap();
    replicas[leader].until(true).await;
    for renewal in 1..=10 {
        advance(RENEWED).await;
        until_renewed(&fake, renewal).await;
        let leading: Vec<_> = replicas.iter().map(Replica::leads).collect();
        assert_eq!(leading.iter().filter(|leads| **leads).count(), 1, "{leading:?}");
    }
    assert_eq!(holder_of(&fake), first);
    assert_eq!(lease(&fake)["spec"]["leaseTransitions"], 0);
}

#[tokio::test(start_paused = true)]
async fn when_the_leader_has_gone_another_one_takes_over_after_the_lease_has_run_out() {
    let (_still, fake) = (Still::stand(), Fake::start().await);
    let mut gone = Replica::start(&fake, "a");
    gone.until(true).await;
    fake.forget_asked();
    let mut other = Replica::start(&fake, "b");
    fake.until_asked("watch=true", 1).await;
    gone.task.abort();
    drop((&mut gone.task).await);
    advance(Duration::from_millis(14_999)).await;
    tokio::task::yield_now().await;
    assert!(!other.leads() && fake.asked("PUT").is_empty(), "too early");
    advance(Duration::from_secs(1)).await;
    other.until(true).await;
    assert_eq!((holder_of(&fake), lease(&fake)["spec"]["leaseTransitions"].clone()), (json!("b"), json!(1)));
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_is_told_to_stop_leaves_at_once() {
    let (_still, fake) = (Still::stand(), Fake::start().await);
    let mut first = Replica::start(&fake, "a");
    first.until(true).await;
    fake.forget_asked();
    let mut other = Replica::start(&fake, "b");
    fake.until_asked("watch=true", 1).await;
    first.stop.cancel();
    (&mut first.task).await.unwrap();
    assert!(!first.leads());
    other.until(true).await;
    assert_eq!(holder_of(&fake), "b");
}

/// Seconds after its last renewal at which it leads no more.
async fn seconds_until_lost(fake: &Fake, still: &Still, replica: &Replica) -> u64 {
    for second in 1..=60 {
        still.pass(Duration::from_secs(1)).await;
        if !replica.leads() {
            return second;
        }
        assert_eq!(holder_of(fake), "a");
    }
    panic!("it leads for ever");
}

#[tokio::test(start_paused = true)]
async fn while_the_api_server_cannot_be_asked_it_leads_for_less_than_the_lease_lasts() {
    for silent in [false, true] {
        let (still, fake) = (Still::stand(), Fake::start().await);
        let mut replica = Replica::start(&fake, "a");
        replica.until(true).await;
        if silent {
            fake.be_silent(true);
        } else {
            fake.stop().await;
        }
        let lost = seconds_until_lost(&fake, &still, &replica).await;
        assert_eq!(lost, 10, "silent: {silent}");
        if silent {
            fake.be_silent(false);
        } else {
            fake.go_on().await;
        }
        while !replica.leads() {
            still.pass(Duration::from_secs(1)).await;
        }
        assert_eq!(holder_of(&fake), "a");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_somebody_else_has_by_now_is_lost_at_once_and_one_that_was_labelled_is_not() {
    let (_still, fake) = (Still::stand(), Fake::start().await);
    let mut replica = Replica::start(&fake, "a");
    replica.until(true).await;
    let mut labelled = lease(&fake);
    labelled["metadata"]["labels"] = json!({"seen": "yes"});
    fake.put("coordination.k8s.io", "leases", labelled);
    advance(RENEWED).await;
    until_renewed(&fake, 2).await;
    assert!(replica.leads());
    assert_eq!(lease(&fake)["metadata"]["labels"]["seen"], "yes");
    put(&fake, &json!({"holderIdentity": "b", "leaseDurationSeconds": 15}));
    advance(RENEWED).await;
    replica.until(false).await;
    assert_eq!(holder_of(&fake), "b");
}

#[tokio::test(start_paused = true)]
async fn what_leads_is_dropped_where_it_is_and_begins_anew() {
    struct Dropped(watch::Sender<u32>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.send_modify(|times| *times += 1);
        }
    }
    let (leads, seen) = watch::channel(false);
    let (begun, mut begins) = watch::channel(0);
    let (dropped, mut drops) = watch::channel(0);
    let leading = tokio::spawn(Leadership(seen).lead(move || {
        begun.send_modify(|times| *times += 1);
        let here = Dropped(dropped.clone());
        async move {
            let _here = here;
            std::future::pending::<()>().await;
        }
    }));
    for times in 1..=2 {
        leads.send_replace(true);
        begins.wait_for(|begun| *begun == times).await.unwrap();
        leads.send_replace(false);
        drops.wait_for(|dropped| *dropped == times).await.unwrap();
    }
    drop(leads);
    leading.await.unwrap();
}
