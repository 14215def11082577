//! Outlier detection, as Envoy does it: endpoints that fail again and again get nothing for a while.
//!
//! Promises that what an endpoint has answered costs an atomic operation or two; that no more are away than the rule
//! allows, but that one may always be where there are others; and that each comes back when its time is over, which
//! grows with each ejection. Tested below on a paused clock, and in the lab (`tests/tests/outlier_detection.rs`).

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use tokio::time::Instant;

use crate::state::snapshot::{Cluster, Endpoint, OutlierDetection};

/// Longest ejection, unless the base time is longer (Envoy's `max_ejection_time`).
const LONGEST_EJECTION: Duration = Duration::from_mins(5);

/// How a request or connection went, as far as it tells of the endpoint's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It answered with this HTTP status.
    Answered(u16),
    /// Its connection came about; opaque bytes tell no more.
    Connected,
    /// There was no answer: it could not be reached, broke off, or was too late.
    Failed,
}

/// Why an endpoint was ejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// `consecutive5xxErrors`.
    ServerErrors,
    /// `consecutiveGatewayErrors`.
    GatewayErrors,
    /// `consecutiveLocalOriginFailures`.
    LocalFailures,
}

impl Reason {
    /// As metrics and logs call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ServerErrors => "consecutive_5xx",
            Self::GatewayErrors => "consecutive_gateway_failure",
            Self::LocalFailures => "consecutive_local_origin_failure",
        }
    }
}

/// Takes an outcome into account. Says why, if the endpoint is ejected for it now.
pub fn learn(cluster: &Cluster, endpoint: &Endpoint, outcome: Outcome) -> Option<Reason> {
    let rule = cluster.outlier.as_ref()?;
    let health = &endpoint.state.health;
    let reset = |errors: &AtomicU32| {
        // Read first: the line of a healthy endpoint stays shared between the cores.
        if errors.load(Ordering::Relaxed) != 0 {
            errors.store(0, Ordering::Relaxed);
        }
    };
    let status = match (outcome, rule.local_failures) {
        (Outcome::Answered(status), _) => {
            reset(&health.local_failures);
            as_error(rule, status)
        }
        (Outcome::Connected, None) => 200,
        (Outcome::Failed, None) => 503,
        (Outcome::Connected, Some(_)) => {
            reset(&health.local_failures);
            return None;
        }
        (Outcome::Failed, Some(most)) => {
            let reached = reaches(&health.local_failures, most);
            return reached.then(|| eject(cluster, rule, endpoint, Reason::LocalFailures)).flatten();
        }
    };
    let gateway = matches!(status, 502..=504);
    if status < 500 || !gateway {
        reset(&health.gateway_errors);
    }
    if status < 500 {
        reset(&health.server_errors);
        return None;
    }
    let gateway = gateway && reaches(&health.gateway_errors, rule.gateway_errors);
    let server = reaches(&health.server_errors, rule.server_errors);
    match (server, gateway) {
        (true, _) => eject(cluster, rule, endpoint, Reason::ServerErrors),
        (false, true) => eject(cluster, rule, endpoint, Reason::GatewayErrors),
        (false, false) => None,
    }
}

/// What a status counts as: where a rule names those that are errors, they alone are (Envoy's `error_matcher`).
fn as_error(rule: &OutlierDetection, status: u16) -> u16 {
    match &rule.errors {
        None => status,
        Some(errors) if !errors.contains(status) => 200,
        Some(_) => status.max(500),
    }
}

/// Counts one more. Whether that is as many as may be; those that come after begin anew.
fn reaches(errors: &AtomicU32, most: u32) -> bool {
    let reached = most > 0 && errors.fetch_add(1, Ordering::Relaxed) + 1 >= most;
    if reached {
        errors.store(0, Ordering::Relaxed);
    }
    reached
}

fn eject(cluster: &Cluster, rule: &OutlierDetection, endpoint: &Endpoint, reason: Reason) -> Option<Reason> {
    let (away, all) = (&cluster.state.ejected, cluster.endpoints.len() as u64);
    let allowed = |away: u32| {
        let next = u64::from(away) + 1;
        next * 100 <= u64::from(rule.max_ejection_percent) * all
            || (away == 0 && all > 1 && rule.max_ejection_percent > 0)
    };
    // Taken before it is ejected: two that fail at once do not go over the limit together.
    let taken =
        away.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |away| allowed(away).then_some(away + 1));
    taken.ok()?;
    if endpoint.state.health.eject(Instant::now()) {
        recount(cluster);
        return Some(reason);
    }
    away.fetch_sub(1, Ordering::Relaxed);
    None
}

/// Whether an endpoint is to get nothing: ejected, where a rule lets it come back, or found unhealthy by its checks.
pub fn is_away(cluster: &Cluster, endpoint: &Endpoint) -> bool {
    let unhealthy = endpoint.checked.as_ref().is_some_and(|checked| checked.is_unhealthy());
    unhealthy || (cluster.outlier.is_some() && endpoint.state.health.is_ejected())
}

/// Counts those that are away, for [`panics`] and for the levels. To be called when that has changed: requests only read the number.
pub fn recount(cluster: &Cluster) {
    let away = cluster.endpoints.iter().filter(|endpoint| is_away(cluster, endpoint)).count();
    cluster.state.away.store(away as u32, Ordering::Relaxed);
    cluster.spread.changed();
}

/// Whether so many are away that all are used, healthy or not (`minHealthPercent`), whatever they are away for.
pub fn panics(cluster: &Cluster, rule: &OutlierDetection) -> bool {
    let (away, all) = (cluster.state.away.load(Ordering::Relaxed) as usize, cluster.endpoints.len());
    all.saturating_sub(away) * 100 < rule.min_health_percent as usize * all
}

/// Lets the endpoints of a cluster come back whose time is over, and forgives the others a little. To be called once each
/// interval. Returns those that have come back.
pub fn sweep<'a>(cluster: &'a Cluster, rule: &OutlierDetection, now: Instant) -> Vec<&'a Endpoint> {
    let mut back = Vec::new();
    let mut away = 0;
    for endpoint in &cluster.endpoints {
        let health = &endpoint.state.health;
        let times = health.ejections.load(Ordering::Relaxed);
        match health.ejected_since() {
            Some(since) if now.saturating_duration_since(since) >= ejection_time(rule, times) => {
                health.give_back();
                back.push(&**endpoint);
            }
            Some(_) => away += 1,
            None if times > 0 => health.ejections.store(times - 1, Ordering::Relaxed),
            None => {}
        }
    }
    // Counted anew: endpoints that have left the cluster took their share along. It bounds how many may be away; who is,
    // each endpoint says itself.
    cluster.state.ejected.store(away, Ordering::Relaxed);
    recount(cluster);
    back
}

fn ejection_time(rule: &OutlierDetection, times: u32) -> Duration {
    let base = rule.base_ejection_time;
    base.saturating_mul(times.max(1)).min(LONGEST_EJECTION.max(base))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use tokio::time::advance;

    use super::*;
    use crate::{
        balance::{Wish, choose, tests::cluster},
        state::{
            defaults,
            snapshot::{Balancing, Statuses},
        },
    };

    const RULE: OutlierDetection =
        OutlierDetection { max_ejection_percent: 50, ..defaults::OUTLIER_DETECTION };

    fn with(rule: OutlierDetection, endpoints: u8) -> Cluster {
        Cluster { outlier: Some(rule), ..cluster(Balancing::LeastRequest, endpoints) }
    }

    /// Learns these outcomes of the endpoint with this index, and returns what the last came to.
    fn outcomes(cluster: &Cluster, index: usize, outcomes: &[Outcome]) -> Option<Reason> {
        let mut last = None;
        for outcome in outcomes {
            last = learn(cluster, &cluster.endpoints[index], *outcome);
        }
        last
    }

    fn ejected(cluster: &Cluster) -> Vec<bool> {
        cluster.endpoints.iter().map(|endpoint| endpoint.state.health.is_ejected()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn what_ejects_is_so_many_in_a_row() {
        use Outcome::{Answered, Connected, Failed};
        let gateway = OutlierDetection { gateway_errors: 2, ..RULE };
        let apart = OutlierDetection { local_failures: Some(2), ..RULE };
        let off = OutlierDetection { server_errors: 0, ..RULE };
        let named =
            OutlierDetection { errors: Some(Statuses::from_iter([429, 503])), gateway_errors: 4, ..RULE };
        let (server, gateways, local) =
            (Some(Reason::ServerErrors), Some(Reason::GatewayErrors), Some(Reason::LocalFailures));
        let table: [(&str, OutlierDetection, Vec<Outcome>, Option<Reason>); 18] = [
            ("one too few", RULE, vec![Answered(500); 4], None),
            ("as many as that", RULE, vec![Answered(500); 5], server),
            ("no answer is a 503", RULE, vec![Failed; 5], server),
            ("of any kind", RULE, [vec![Failed; 2], vec![Answered(500); 3]].concat(), server),
            ("broken by an answer", RULE, [vec![Failed; 4], vec![Answered(404), Failed]].concat(), None),
            ("broken by a connection", RULE, [vec![Failed; 4], vec![Connected, Failed]].concat(), None),
            ("off", off, vec![Answered(500); 50], None),
            ("gateways", gateway, vec![Answered(502), Answered(504)], gateways),
            ("no answer is a gateway's", gateway, vec![Answered(503), Failed], gateways),
            ("another error between", gateway, vec![Answered(502), Answered(500), Answered(502)], None),
            ("apart", apart, vec![Failed; 2], local),
            ("apart, and no error", apart, [vec![Answered(500); 4], vec![Failed]].concat(), None),
            ("apart, broken", apart, vec![Failed, Answered(500), Failed], None),
            ("named", named, vec![Answered(429); 5], server),
            ("not named", named, vec![Answered(500); 50], None),
            ("named, a gateway's", named, vec![Answered(503); 4], gateways),
            (
                "broken by what is not named",
                named,
                [vec![Answered(429); 4], vec![Answered(502), Failed]].concat(),
                None,
            ),
            ("apart, connected", apart, vec![Failed, Connected, Failed], None),
        ];
        for (name, rule, seen, expected) in table {
            let cluster = with(rule, 4);
            assert_eq!(outcomes(&cluster, 1, &seen), expected, "{name}");
            let away = expected.is_some();
            assert_eq!(ejected(&cluster), [false, away, false, false], "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_rule_learns_nothing() {
        let cluster = cluster(Balancing::LeastRequest, 2);
        assert_eq!(outcomes(&cluster, 0, &[Outcome::Failed; 50]), None);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_are_away_than_may_be() {
        for (percent, endpoints, most) in
            [(50, 4, 2), (10, 3, 1), (100, 3, 3), (0, 3, 0), (99, 1, 0), (100, 1, 1)]
        {
            let cluster = with(OutlierDetection { max_ejection_percent: percent, ..RULE }, endpoints);
            for index in 0..usize::from(endpoints) {
                outcomes(&cluster, index, &[Outcome::Failed; 5]);
            }
            let away = ejected(&cluster).into_iter().filter(|away| *away).count();
            assert_eq!(away, most, "{percent} % of {endpoints}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_comes_back_later_than_the_last_time() {
        let cluster = with(RULE, 4);
        let endpoint = &cluster.endpoints[0];
        for times in 1..=12 {
            assert!(outcomes(&cluster, 0, &[Outcome::Failed; 5]).is_some());
            let away = (RULE.base_ejection_time * times).min(LONGEST_EJECTION);
            advance(away.saturating_sub(Duration::from_millis(1))).await;
            assert!(sweep(&cluster, &RULE, Instant::now()).is_empty(), "back too soon, time {times}");
            advance(Duration::from_millis(1)).await;
            let back: Vec<_> =
                sweep(&cluster, &RULE, Instant::now()).iter().map(|endpoint| endpoint.address).collect();
            assert_eq!(back, [endpoint.address], "time {times}");
            assert_eq!(cluster.state.ejected.load(Ordering::Relaxed), 0);
        }
        // Twelve quiet intervals, and it is as if nothing had been.
        for _ in 0..12 {
            sweep(&cluster, &RULE, Instant::now());
        }
        assert_eq!(endpoint.state.health.ejections.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_ejected_endpoint_gets_nothing_and_then_its_share() {
        let share = |cluster: &Cluster| {
            fastrand::seed(7);
            let address = cluster.endpoints[0].address;
            let chosen = (0..4_000).map(|_| choose(cluster, &Wish::default()).unwrap().endpoint.address);
            chosen.filter(|chosen| *chosen == address).count()
        };
        for balancing in [Balancing::LeastRequest, Balancing::Random, Balancing::RoundRobin] {
            let cluster = Cluster { balancing, ..with(RULE, 4) };
            outcomes(&cluster, 0, &[Outcome::Failed; 5]);
            assert_eq!(share(&cluster), 0, "{balancing:?}");
            advance(RULE.base_ejection_time).await;
            sweep(&cluster, &RULE, Instant::now());
            assert!((850..1150).contains(&share(&cluster)), "{balancing:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn with_too_few_left_all_are_used() {
        let rule = OutlierDetection { max_ejection_percent: 100, min_health_percent: 50, ..RULE };
        let cluster = with(rule, 4);
        for (away, panic) in [(1, false), (2, false), (3, true), (4, true)] {
            outcomes(&cluster, away - 1, &[Outcome::Failed; 5]);
            assert_eq!(panics(&cluster, &rule), panic, "{away} of 4");
        }
        assert!(choose(&cluster, &Wish::default()).is_some());
        let strict = with(OutlierDetection { min_health_percent: 0, ..rule }, 1);
        outcomes(&strict, 0, &[Outcome::Failed; 5]);
        assert!(choose(&strict, &Wish::default()).is_none(), "all are ejected, and nobody panics");
    }
}
