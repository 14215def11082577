//! Active health checks: when an endpoint is asked, and what its answers come to.
//!
//! Promises that an endpoint gets nothing after so many failures in a row, and its share again after so many successes; that
//! what the first check finds holds at once; that what says nothing of the endpoint changes nothing; and that no endpoint is
//! asked while nobody uses its service. Tested below on a paused clock; in the lab by `tests/tests/health_checks.rs`.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::{
    sync::Semaphore,
    time::{Instant, sleep_until, timeout},
};

use super::outlier;
use crate::state::snapshot::{Checked, CheckedPort, Cluster, HealthCheck, Snapshot, Use};

/// How long a service's endpoints are checked after the last use of it.
pub const USED_LATELY: Duration = Duration::from_mins(5);

/// What one check has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// It answered as it should.
    Well,
    /// It did not, and how.
    Unwell(String),
    /// The check came to nothing that is the endpoint's fault (it was refused by policy), and why.
    Nothing(String),
}

/// What has become of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turned {
    /// It gets its share again.
    Healthy,
    /// It gets nothing, for this reason.
    Unhealthy(String),
}

/// Takes into account what a check has found. What becomes of the endpoint, where that is another than before.
pub fn learn(check: &HealthCheck, checked: &Checked, found: &Found, now: Instant) -> Option<Turned> {
    let mut run = checked.run();
    let first = run.due.is_none();
    if !matches!(found, Found::Nothing(_)) {
        // Else the next one is the first that finds anything.
        run.due = Some(now + pause(check, fastrand::f64()));
    }
    let (unhealthy, turned) = match found {
        Found::Nothing(_) => return None,
        Found::Well => {
            (run.failures, run.successes) = (0, run.successes.saturating_add(1));
            if !first && run.successes < check.healthy_threshold {
                return None;
            }
            (false, Turned::Healthy)
        }
        Found::Unwell(why) => {
            (run.failures, run.successes) = (run.failures.saturating_add(1), 0);
            if !first && run.failures < check.unhealthy_threshold {
                return None;
            }
            (true, Turned::Unhealthy(why.clone()))
        }
    };
    checked.set_unhealthy(unhealthy).then_some(turned)
}

/// The time to the next check; `random` from 0 to 1 says where within the jitter.
fn pause(check: &HealthCheck, random: f64) -> Duration {
    let jitter = f64::from(check.jitter_percent) / 100.0;
    check.interval.mul_f64(1.0 + jitter * (2.0 * random - 1.0))
}

/// Forgets what was found: whoever is asked no more is taken for healthy. Whether it was not.
pub fn forget(checked: &Checked) -> bool {
    *checked.run() = crate::state::snapshot::Run::default();
    checked.set_unhealthy(false)
}

/// Checks one endpoint again and again; `ask` asks it once, `done` is told of each check. `places`: so many are asked at a
/// time.
pub async fn keep_asking<A: Future<Output = Found>>(
    check: &HealthCheck,
    checked: &Checked,
    places: &Semaphore,
    ask: impl Fn() -> A,
    done: impl Fn(&Found, Option<Turned>),
) {
    loop {
        let due = checked.run().due;
        if let Some(due) = due {
            sleep_until(due).await;
        }
        let late = || Found::Unwell(format!("no answer within {:?}", check.timeout));
        // Nobody closes them.
        let place = places.acquire().await.ok();
        let found = timeout(check.timeout, ask()).await.unwrap_or_else(|_| late());
        drop(place);
        let turned = learn(check, checked, &found, Instant::now());
        done(&found, turned);
        if let Found::Nothing(_) = found {
            tokio::time::sleep(pause(check, fastrand::f64())).await;
        }
    }
}

/// Waits until a service is used.
pub async fn until_used(usage: &Use) {
    while !is_used(usage, Instant::now()) {
        usage.noted().await;
    }
}

/// Waits until a service has not been used for so long that its endpoints need not be checked.
pub async fn until_unused(usage: &Use) {
    while let Some((last, _)) = usage.last() {
        let end = last + USED_LATELY;
        if Instant::now() >= end {
            return;
        }
        sleep_until(end).await;
    }
}

fn is_used(usage: &Use, now: Instant) -> bool {
    usage.last().is_some_and(|(last, _)| now < last + USED_LATELY)
}

/// Counts anew, in each cluster of these ports, how many endpoints are away.
pub fn recount(snapshot: &Snapshot, ports: &[&CheckedPort]) {
    let key = |cluster: &Arc<Cluster>| (Arc::clone(&cluster.host), cluster.port);
    let ports: HashSet<(Arc<str>, u16)> = ports.iter().map(|port| key(&port.cluster)).collect();
    let are_of_them = snapshot.clusters().filter(|cluster| ports.contains(&key(cluster)));
    are_of_them.for_each(|cluster| outlier::recount(cluster));
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::{cell::RefCell, sync::atomic::Ordering};

    use tokio::time::advance;

    use super::*;
    use crate::{
        balance::{Wish, choose, serving, tests::cluster},
        state::{
            defaults,
            snapshot::{Balancing, Endpoint, HealthProbe, OutlierDetection, Standby},
        },
    };

    fn check() -> HealthCheck {
        HealthCheck {
            probe: HealthProbe::Tcp,
            port: None,
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            jitter_percent: 0,
            unhealthy_threshold: 3,
            healthy_threshold: 2,
        }
    }

    fn unwell() -> Found {
        Found::Unwell("503".to_owned())
    }

    /// What one check after the other comes to: `-` where nothing changes, else `h` or `u`.
    fn learned(checked: &Checked, found: &[Found]) -> String {
        let letter = |found| match learn(&check(), checked, found, Instant::now()) {
            None => '-',
            Some(Turned::Healthy) => 'h',
            Some(Turned::Unhealthy(_)) => 'u',
        };
        found.iter().map(letter).collect()
    }

    #[test]
    fn thresholds_hold_and_the_first_check_decides_alone() {
        let (w, u, n) = (|| Found::Well, unwell, || Found::Nothing("denied".to_owned()));
        let table: [(Vec<Found>, &str); 7] = [
            (vec![u(), u(), w(), w(), w()], "u--h-"),
            (vec![w(), u(), u(), w(), u(), u(), u(), u()], "------u-"),
            (vec![w(), u(), u(), u(), w(), u(), w(), w()], "---u---h"),
            (vec![w(), u(), u(), n(), u()], "----u"),
            (vec![n(), n(), u()], "--u"),
            (vec![n(), w(), u(), u(), u()], "----u"),
            (vec![u(), w(), n(), w()], "u--h"),
        ];
        for (found, expected) in table {
            assert_eq!(learned(&Checked::default(), &found), expected, "{found:?}");
        }
    }

    #[test]
    fn pauses_stay_within_the_jitter() {
        let check = HealthCheck { jitter_percent: 20, ..check() };
        let seconds = |random| pause(&check, random).as_secs_f64();
        assert_eq!((seconds(0.0), seconds(0.5), seconds(1.0)), (8.0, 10.0, 12.0));
    }

    /// Checks while an endpoint is well or not, second by second; returns when it was asked and what it turned into.
    async fn asked(checked: &Checked, how: impl Fn(u64) -> Found, for_seconds: u64) -> (Vec<u64>, Vec<u64>) {
        let begin = Instant::now();
        let second = || begin.elapsed().as_secs();
        let (times, turns) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
        let ask = async || {
            times.borrow_mut().push(second());
            match how(second()) {
                // Who does not answer.
                Found::Unwell(why) if why == "silent" => std::future::pending().await,
                found => found,
            }
        };
        let done = |_: &Found, turned: Option<Turned>| {
            if turned.is_some() {
                turns.borrow_mut().push(second());
            }
        };
        let (check, places) = (check(), Semaphore::new(1));
        let asking = keep_asking(&check, checked, &places, ask, done);
        let _ = timeout(Duration::from_secs(for_seconds), asking).await;
        (times.into_inner(), turns.into_inner())
    }

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_goes_and_comes_back_in_time() {
        let checked = Checked::default();
        let sick = |second| if (15..65).contains(&second) { unwell() } else { Found::Well };
        let (times, turns) = asked(&checked, sick, 105).await;
        assert_eq!(times, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]);
        assert_eq!(turns, [40, 80], "three failures, then two successes");
        assert!(!checked.is_unhealthy());
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_answer_in_time_has_failed_and_is_asked_again() {
        let checked = Checked::default();
        let (times, turns) = asked(&checked, |_| Found::Unwell("silent".to_owned()), 30).await;
        assert_eq!((times, turns), (vec![0, 11, 22], vec![1]));
        assert!(checked.is_unhealthy());
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_configuration_keeps_what_is_known_and_when_the_next_is_due() {
        let checked = Checked::default();
        assert_eq!(asked(&checked, |_| unwell(), 4).await, (vec![0], vec![0]));
        // Another checker takes over.
        let (times, _) = asked(&checked, |_| Found::Well, 30).await;
        assert_eq!(times.first(), Some(&6));
        assert!(!checked.is_unhealthy());
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_asked_while_nobody_uses_the_service() {
        let usage = Arc::new(Use::default());
        let pod = crate::report::samples::workload("client", 1);
        let waiting = tokio::spawn({
            let usage = Arc::clone(&usage);
            async move { until_used(&usage).await }
        });
        advance(Duration::from_hours(1)).await;
        assert!(!waiting.is_finished());
        usage.note(Instant::now(), || Arc::clone(&pod));
        waiting.await.unwrap();
        assert_eq!(usage.last().unwrap().1, pod);
        // Each use puts the end off.
        let begin = Instant::now();
        let user = async {
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_mins(1)).await;
                usage.note(Instant::now(), || Arc::clone(&pod));
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = user => {}
            () = until_unused(&usage) => {}
        }
        assert_eq!(begin.elapsed().as_secs(), 15 * 60);
    }

    #[test]
    fn a_use_is_noted_once_a_second() {
        let usage = Use::default();
        let now = Instant::now();
        let notes = RefCell::new(0);
        for ms in [0, 10, 900, 1_100, 1_200, 2_100] {
            usage.note(now + Duration::from_millis(ms), || {
                *notes.borrow_mut() += 1;
                crate::report::samples::workload("client", 1)
            });
        }
        assert_eq!(notes.into_inner(), 3);
    }

    fn checked_cluster(endpoints: u8, outlier: Option<OutlierDetection>) -> Cluster {
        let mut cluster = cluster(Balancing::LeastRequest, endpoints);
        cluster.outlier = outlier;
        cluster.standby.checks = Some(Arc::default());
        for endpoint in &mut cluster.endpoints {
            let alone = Endpoint::alone(endpoint.address, None);
            *endpoint = Arc::new(Endpoint { checked: Some(Arc::default()), ..alone });
        }
        cluster
    }

    fn set(cluster: &Cluster, index: usize, unhealthy: bool) {
        cluster.endpoints[index].checked.as_ref().unwrap().set_unhealthy(unhealthy);
        outlier::recount(cluster);
    }

    #[test]
    fn the_unhealthy_get_nothing_unless_too_few_are_left() {
        for balancing in [Balancing::LeastRequest, Balancing::Random, Balancing::RoundRobin] {
            let cluster = Cluster { balancing, ..checked_cluster(3, None) };
            set(&cluster, 0, true);
            let away = cluster.endpoints[0].address;
            assert!((0..200).all(|_| choose(&cluster, &Wish::default()).unwrap().endpoint.address != away));
            set(&cluster, 0, false);
            assert!((0..200).any(|_| choose(&cluster, &Wish::default()).unwrap().endpoint.address == away));
            (0..3).for_each(|index| set(&cluster, index, true));
            assert!(
                choose(&cluster, &Wish::default()).is_none(),
                "Istio's minHealthPercent is 0: nobody panics"
            );
        }
        let rule = OutlierDetection { min_health_percent: 50, ..defaults::OUTLIER_DETECTION };
        let cluster = checked_cluster(3, Some(rule));
        set(&cluster, 0, true);
        let chosen = || choose(&cluster, &Wish::default()).unwrap().endpoint.address;
        assert!((0..100).all(|_| chosen() != cluster.endpoints[0].address));
        // What is ejected counts with what is unhealthy.
        cluster.endpoints[1].state.health.eject(Instant::now());
        outlier::recount(&cluster);
        assert_eq!(cluster.state.away.load(Ordering::Relaxed), 2);
        assert!((0..100).any(|_| chosen() == cluster.endpoints[0].address), "one of three is less than half");
    }

    #[test]
    fn a_fallback_serves_while_nobody_else_does_and_never_for_another_fallback() {
        let third = Arc::new(checked_cluster(1, None));
        let mut second = checked_cluster(1, None);
        second.standby.fallbacks = vec![Arc::clone(&third)];
        let second = Arc::new(second);
        let empty = Arc::new(checked_cluster(0, None));
        let mut first = checked_cluster(2, None);
        first.standby.fallbacks = vec![Arc::clone(&empty), Arc::clone(&second)];
        let first = Arc::new(first);
        let is = |one: &Arc<Cluster>| Arc::ptr_eq(serving(&first), one);
        assert!(is(&first));
        set(&first, 0, true);
        assert!(is(&first), "one is left");
        set(&first, 1, true);
        assert!(is(&second), "the first that can");
        set(&second, 0, true);
        assert!(is(&first), "nobody can, and the second's own fallback is none of the first's");
        set(&first, 1, false);
        assert!(is(&first));
        let none = Arc::new(Cluster {
            standby: Standby { fallbacks: vec![Arc::clone(&third)], ..Standby::default() },
            ..cluster(Balancing::Random, 0)
        });
        assert!(Arc::ptr_eq(serving(&none), &third), "there are no endpoints at all");
    }
}
