//! Who gets how much, by chi-square at a confidence of 99.9 % (`statistics.rs`): every way to choose, weights, shares of
//! places, levels, and endpoints that warm up.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::{Instant, advance};

use super::{Chosen, Visited, Wish, choose, statistics::assert_shares, tests::cluster};
use crate::state::{
    defaults,
    snapshot::{
        Balancing, ByClient, Cluster, ConsistentHash, Endpoint, EndpointState, Group, HashKey, HashTable,
        Level, Locality, Origin, Spread, Traits, UtilizationRule, Wanted, Warmup, ZoneRule, Zones, hash_of,
    },
};

const AT_RANDOM: [Balancing; 3] = [Balancing::LeastRequest, Balancing::PeakEwma, Balancing::Random];
const CHOICES: usize = 20_000;

fn weighted(balancing: Balancing, weights: &[u32]) -> Cluster {
    let even = cluster(balancing, weights.len() as u8);
    let with = |(one, weight): (&Arc<Endpoint>, &u32)| {
        let state = Arc::clone(&one.state);
        Arc::new(Endpoint { weight: *weight, state, ..Endpoint::alone(one.address, None) })
    };
    let endpoints = even.endpoints.iter().zip(weights).map(with).collect();
    let groups = [Group::new(1, None, weights)].into();
    let spread = Arc::new(Spread { levels: [Level { groups }].into(), ..Spread::default() });
    Cluster { endpoints, spread, ..even }
}

/// Levels of groups, each with its share and the indices of its endpoints.
fn leveled(endpoints: u8, levels: &[&[(u32, &[u32])]]) -> Cluster {
    let group = |(share, members): &(u32, &[u32])| {
        let weights = vec![1; members.len()];
        Group::new(*share, Some((*members).into()), &weights)
    };
    let level = |groups: &&[(u32, &[u32])]| Level { groups: groups.iter().map(group).collect() };
    let levels = levels.iter().map(level).collect();
    let outlier = Some(defaults::OUTLIER_DETECTION);
    let spread = Arc::new(Spread { levels, ..Spread::default() });
    Cluster { spread, outlier, ..cluster(Balancing::LeastRequest, endpoints) }
}

fn eject(cluster: &Cluster, indices: impl IntoIterator<Item = usize>) {
    for index in indices {
        cluster.endpoints[index].state.health.eject(Instant::now());
    }
    cluster.spread.changed();
}

fn counts(cluster: &Cluster) -> BTreeMap<SocketAddr, usize> {
    fastrand::seed(11);
    let mut counts = BTreeMap::new();
    for _ in 0..CHOICES {
        *counts.entry(choose(cluster, &Wish::default()).unwrap().endpoint.address).or_default() += 1;
    }
    counts
}

/// The endpoints with these indices, each with its share.
fn shares(cluster: &Cluster, shares: &[(usize, f64)]) -> Vec<(SocketAddr, f64)> {
    shares.iter().map(|(index, share)| (cluster.endpoints[*index].address, *share)).collect()
}

#[tokio::test(start_paused = true)]
async fn equal_endpoints_get_equal_shares() {
    let all: Vec<_> = (0..10).map(|index| (index, 1.0)).collect();
    for balancing in AT_RANDOM {
        let cluster = cluster(balancing, 10);
        assert_shares(&format!("{balancing:?}"), &counts(&cluster), &shares(&cluster, &all));
    }
    let turns = counts(&cluster(Balancing::RoundRobin, 10));
    assert!(turns.len() == 10 && turns.values().all(|count| *count == CHOICES / 10), "{turns:?}");
}

#[tokio::test(start_paused = true)]
async fn endpoints_get_shares_by_their_weights() {
    let weights = [1, 2, 5, 2];
    let wanted: Vec<_> = weights.iter().map(|weight| f64::from(*weight)).enumerate().collect();
    for balancing in AT_RANDOM {
        let cluster = weighted(balancing, &weights);
        assert_shares(&format!("{balancing:?}"), &counts(&cluster), &shares(&cluster, &wanted));
    }
    let cluster = weighted(Balancing::RoundRobin, &weights);
    let turns = counts(&cluster);
    for (endpoint, weight) in cluster.endpoints.iter().zip(weights) {
        assert_eq!(turns[&endpoint.address], CHOICES / 10 * weight as usize, "{turns:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_in_flight_is_by_weight_too() {
    fastrand::seed(3);
    let cluster = weighted(Balancing::LeastRequest, &[1, 1, 3, 5]);
    let held: Vec<Chosen> = (0..1_000).map(|_| choose(&cluster, &Wish::default()).unwrap()).collect();
    let in_flight: Vec<u32> = cluster
        .endpoints
        .iter()
        .map(|one| one.state.in_flight.load(std::sync::atomic::Ordering::Relaxed))
        .collect();
    for (found, wanted) in in_flight.iter().zip([100_u32, 100, 300, 500]) {
        assert!(found.abs_diff(wanted) <= wanted / 20, "{in_flight:?}");
    }
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn an_ejected_endpoints_share_goes_to_the_others_by_their_weights() {
    let weights = [1, 2, 5, 2];
    for balancing in [AT_RANDOM.as_slice(), &[Balancing::RoundRobin]].concat() {
        let outlier = Some(defaults::OUTLIER_DETECTION);
        let cluster = Cluster { outlier, ..weighted(balancing, &weights) };
        eject(&cluster, [2]);
        let found = counts(&cluster);
        assert_eq!(found.get(&cluster.endpoints[2].address), None, "{balancing:?}");
        let wanted = shares(&cluster, &[(0, 1.0), (1, 2.0), (3, 2.0)]);
        assert_shares(&format!("{balancing:?}"), &found, &wanted);
        cluster.endpoints[2].state.health.give_back();
        let back = counts(&cluster)[&cluster.endpoints[2].address];
        assert!(back.abs_diff(CHOICES / 2) < CHOICES / 50, "{balancing:?}: {back}");
    }
}

#[tokio::test(start_paused = true)]
async fn places_have_their_shares() {
    let cluster = leveled(6, &[&[(70, &[0, 1, 2]), (20, &[3]), (10, &[4, 5])]]);
    let third = 70.0 / 3.0;
    let wanted = [(0, third), (1, third), (2, third), (3, 20.0), (4, 5.0), (5, 5.0)];
    assert_shares("all", &counts(&cluster), &shares(&cluster, &wanted));
    // Of three, one is left: by Envoy's factor of 1.4 the place is good for 46.66 % of its share.
    eject(&cluster, [0, 1]);
    let left = 70.0 * 0.4666;
    let wanted = [(2, left), (3, 20.0), (4, 5.0), (5, 5.0)];
    assert_shares("one of three", &counts(&cluster), &shares(&cluster, &wanted));
    eject(&cluster, [2]);
    assert_shares("none of three", &counts(&cluster), &shares(&cluster, &wanted[1..]));
}

/// Envoy's own table of its priority levels, with ten endpoints in each of two.
#[tokio::test(start_paused = true)]
async fn what_a_level_is_not_good_for_spills_over() {
    let (near, far): (Vec<u32>, Vec<u32>) = ((0..10).collect(), (10..20).collect());
    for (near_left, far_left, near_share) in [
        (10, 10, 100),
        (8, 10, 100),
        (7, 10, 98),
        (5, 10, 70),
        (1, 10, 14),
        (0, 10, 0),
        (2, 2, 50),
        (10, 0, 100),
        (3, 2, 60),
    ] {
        let cluster = leveled(20, &[&[(1, &near)], &[(1, &far)]]);
        eject(&cluster, (near_left..10).chain(10 + far_left..20));
        let found = counts(&cluster);
        let of = |range: std::ops::Range<usize>| -> usize {
            range.filter_map(|index| found.get(&cluster.endpoints[index].address)).sum()
        };
        let levels = BTreeMap::from([("near", of(0..10)), ("far", of(10..20))]);
        let what = format!("{near_left} and {far_left} of ten left");
        match near_share {
            0 | 100 => assert_eq!(levels["near"], CHOICES * near_share / 100, "{what}"),
            share => assert_shares(&what, &levels, &[("near", share as f64), ("far", 100.0 - share as f64)]),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_level_in_panic_uses_all_it_has() {
    let rule =
        crate::state::snapshot::OutlierDetection { min_health_percent: 50, ..defaults::OUTLIER_DETECTION };
    let cluster = Cluster { outlier: Some(rule), ..leveled(4, &[&[(1, &[0, 1])], &[(1, &[2, 3])]]) };
    // The second level makes up for the first: nobody panics.
    eject(&cluster, [0, 1]);
    assert_shares("one level", &counts(&cluster), &shares(&cluster, &[(2, 1.0), (3, 1.0)]));
    eject(&cluster, [2, 3]);
    assert_shares("none", &counts(&cluster), &shares(&cluster, &[(0, 1.0), (1, 1.0)]));
    let strict = Cluster { outlier: Some(defaults::OUTLIER_DETECTION), ..cluster };
    assert!(choose(&strict, &Wish::default()).is_none());
}

#[tokio::test(start_paused = true)]
async fn retries_go_elsewhere_from_the_third_try_on_where_they_are_told_to() {
    let cluster = leveled(3, &[&[(1, &[0])], &[(1, &[1])], &[(1, &[2])]]);
    let mut visited = Visited::default();
    let mut levels = Vec::new();
    for _ in 0..8 {
        let chosen = choose(&cluster, &Wish { visited, ..Wish::default() }).unwrap();
        visited.note(&chosen);
        levels.push(chosen.level);
    }
    // When all were visited, it begins anew.
    assert_eq!(levels, [0, 0, 1, 1, 2, 2, 0, 0]);
}

/// Endpoints 0 and 1 have the first client's label, 2 and 3 the second's.
#[tokio::test(start_paused = true)]
async fn whom_a_clients_own_labels_prefer_gets_what_it_sends() {
    let table = (Arc::new(HashKey::SourceIp), HashTable::Ring(1024));
    for hash in [None, Some(table)] {
        let traits = |value: &str| Traits { values: [value.into()].into(), distance: 0 };
        let endpoints = ["red", "red", "blue", "blue"].map(traits);
        let wanted = [Wanted::OfClient("team".into())];
        let by_client = Some(ByClient::new(wanted.into(), endpoints.into(), hash.clone()));
        let spread = Arc::new(Spread { by_client, ..Spread::default() });
        let even = cluster(Balancing::LeastRequest, 4);
        let addresses: Vec<_> = even.endpoints.iter().map(|one| one.address).collect();
        let hash = hash.map(|(key, table)| ConsistentHash::new(key, table, &addresses));
        let hashes = hash.is_some();
        let cluster = Cluster { spread, hash, outlier: Some(defaults::OUTLIER_DETECTION), ..even };
        let drawn = |team: &str| {
            let labels = BTreeMap::from([("team".into(), team.into())]);
            let mut drawn = vec![0; 4];
            for key in 0..400_u64 {
                let hash = hashes.then(|| hash_of(&key.to_be_bytes()));
                let wish = Wish { hash, labels: Some(&labels), ..Wish::default() };
                let chosen = choose(&cluster, &wish).unwrap().endpoint.address;
                drawn[addresses.iter().position(|one| *one == chosen).unwrap()] += 1;
            }
            drawn.into_iter().map(|count| count > 100).collect::<Vec<_>>()
        };
        assert_eq!(
            (drawn("red"), drawn("blue")),
            (vec![true, true, false, false], vec![false, false, true, true])
        );
        // Each client's levels learn of an ejection at once.
        eject(&cluster, [0, 1]);
        assert_eq!(
            (drawn("red"), drawn("blue")),
            (vec![false, false, true, true], vec![false, false, true, true])
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_hash_stays_in_its_level_and_goes_on_in_the_next() {
    let (near, far): (Vec<u32>, Vec<u32>) = ((0..4).collect(), (4..8).collect());
    let all = leveled(8, &[&[(1, &near)], &[(1, &far)]]);
    let placed = |indices: &[u32]| {
        let placed = |index: &u32| crate::state::snapshot::Placed {
            index: *index,
            address: all.endpoints[*index as usize].address,
            weight: 1,
        };
        indices.iter().map(placed).collect::<Vec<_>>()
    };
    let (key, table) =
        (Arc::new(crate::state::snapshot::HashKey::SourceIp), crate::state::snapshot::HashTable::Ring(1024));
    let hash = crate::state::snapshot::ConsistentHash::by_level(key, table, &[placed(&near), placed(&far)]);
    let cluster = Cluster { hash: Some(hash), ..all };
    let index_of = |hash| {
        let chosen = choose(&cluster, &Wish { hash: Some(hash), ..Wish::default() }).unwrap();
        cluster.endpoints.iter().position(|one| one.address == chosen.endpoint.address).unwrap()
    };
    let keys = || (0..500_u64).map(|key| crate::state::snapshot::hash_of(&key.to_be_bytes()));
    let before: Vec<usize> = keys().map(index_of).collect();
    assert!(before.iter().all(|index| *index < 4));
    eject(&cluster, 0..4);
    assert!(keys().map(index_of).all(|index| index >= 4));
    for one in &cluster.endpoints {
        one.state.health.give_back();
    }
    cluster.spread.changed();
    assert_eq!(keys().map(index_of).collect::<Vec<_>>(), before);
}

#[tokio::test(start_paused = true)]
async fn who_has_come_lately_gets_a_part_that_grows() {
    let warmup = Warmup { duration: Duration::from_secs(100), minimum_percent: 10.0, aggression: 1.0 };
    for balancing in [Balancing::LeastRequest, Balancing::PeakEwma, Balancing::RoundRobin] {
        let old = cluster(balancing, 3);
        advance(Duration::from_secs(1_000)).await;
        let spread = Arc::new(Spread { warmup: Some(warmup), ..Spread::default() });
        let mut cluster = Cluster { spread, ..old };
        let fresh = Endpoint {
            state: Arc::new(EndpointState::default()),
            ..Endpoint::alone(([10, 0, 0, 4], 80).into(), None)
        };
        cluster.endpoints.push(Arc::new(fresh));
        for (seconds, part) in [(0, 0.1), (50, 0.5), (50, 1.0)] {
            advance(Duration::from_secs(seconds)).await;
            let wanted = shares(&cluster, &[(0, 1.0), (1, 1.0), (2, 1.0), (3, part)]);
            assert_shares(&format!("{balancing:?}, {part}"), &counts(&cluster), &wanted);
        }
    }
    // Where all are new, nobody waits for anybody.
    let all_new = Cluster {
        spread: Arc::new(Spread { warmup: Some(warmup), ..Spread::default() }),
        ..cluster(Balancing::LeastRequest, 3)
    };
    assert_shares("all new", &counts(&all_new), &shares(&all_new, &[(0, 1.0), (1, 1.0), (2, 1.0)]));
}

#[tokio::test(start_paused = true)]
async fn who_says_it_is_busy_gets_less() {
    let rule = Arc::new(UtilizationRule { blackout: Duration::ZERO, ..defaults::backend_utilization() });
    let spread = Arc::new(Spread { utilization: Some(Arc::clone(&rule)), ..Spread::default() });
    let cluster = Cluster { spread, ..cluster(Balancing::RoundRobin, 5) };
    let even: Vec<_> = (0..5).map(|index| (index, 1.0)).collect();
    let report = |index: usize, weight| {
        let endpoint: &Endpoint = &cluster.endpoints[index];
        endpoint.state.reported.report(&rule, Instant::now(), weight);
    };
    // One alone tells nothing, nor does what nobody has compared yet.
    report(0, 1.0);
    assert_shares("one report", &counts(&cluster), &shares(&cluster, &even));
    for (index, weight) in [(1, 2.0), (2, 3.0), (3, 6.0)] {
        report(index, weight);
    }
    assert_shares("not yet", &counts(&cluster), &shares(&cluster, &even));
    // Who has said nothing counts as average.
    advance(rule.update).await;
    let wanted = [(0, 1.0), (1, 2.0), (2, 3.0), (3, 6.0), (4, 3.0)];
    assert_shares("four reports", &counts(&cluster), &shares(&cluster, &wanted));
    // Who says that it has next to nothing to do does not get everything: the others have a tenth of the average.
    report(3, 1e9);
    advance(rule.update).await;
    let wanted = [(0, 0.1), (1, 0.1), (2, 0.1), (3, 4.0), (4, 1.0)];
    assert_shares("one far away", &counts(&cluster), &shares(&cluster, &wanted));
    // Who is ejected is nobody's measure.
    let outlier = Some(defaults::OUTLIER_DETECTION);
    let cluster = Cluster { outlier, ..cluster };
    eject(&cluster, [3]);
    advance(rule.update).await;
    let wanted = [(0, 1.0), (1, 2.0), (2, 3.0), (4, 2.0)];
    assert_shares("one ejected", &counts(&cluster), &shares(&cluster, &wanted));
    cluster.endpoints[3].state.health.give_back();
    cluster.spread.changed();
    // Old reports are forgotten.
    advance(rule.expiration).await;
    assert_shares("expired", &counts(&cluster), &shares(&cluster, &even));
}

/// Endpoints in zones of one region; of each zone, how many there are.
fn zoned(balancing: Balancing, counts: &[usize], own: usize) -> Cluster {
    let place = |zone: usize| Locality::parse(&format!("r/z{zone}"));
    let places: Vec<Locality> =
        counts.iter().enumerate().flat_map(|(zone, count)| vec![place(zone); *count]).collect();
    let even = cluster(balancing, places.len() as u8);
    let at = |(one, locality): (&Arc<Endpoint>, Locality)| {
        Arc::new(Endpoint { locality, ..Endpoint::alone(one.address, None) })
    };
    let endpoints: Vec<_> = even.endpoints.iter().zip(places).map(at).collect();
    let zones = Zones::of_first(&ZoneRule { own: place(own), least: 6 }, &[], &endpoints);
    let spread = Arc::new(Spread { zones, ..Spread::default() });
    Cluster { endpoints, spread, outlier: Some(defaults::OUTLIER_DETECTION), ..even }
}

/// What each zone gets of clients in this zone.
fn from_zone(cluster: &Cluster, origin: &Origin) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    for _ in 0..CHOICES {
        let wish = Wish { origin: Some(origin), ..Wish::default() };
        let chosen = choose(cluster, &wish).unwrap();
        *found.entry(chosen.endpoint.locality.zone.to_string()).or_default() += 1;
    }
    found
}

fn origin(counts: &[usize]) -> Origin {
    let mut origin = Origin::default();
    for (zone, count) in counts.iter().enumerate() {
        (0..*count).for_each(|_| origin.add(&Locality::parse(&format!("r/z{zone}"))));
    }
    origin
}

#[tokio::test(start_paused = true)]
async fn what_a_zone_has_room_for_stays_there() {
    fastrand::seed(19);
    let z = |shares: &[f64]| -> Vec<(String, f64)> {
        shares.iter().enumerate().map(|(zone, share)| (format!("z{zone}"), *share)).collect()
    };
    for balancing in [AT_RANDOM.as_slice(), &[Balancing::RoundRobin]].concat() {
        // Half of the clients are here, and a quarter of the endpoints: half of what they send stays.
        let cluster = zoned(balancing, &[2, 6], 0);
        let found = from_zone(&cluster, &origin(&[4, 4]));
        assert_shares(&format!("{balancing:?}, half"), &found, &z(&[50.0, 50.0]));
        // From the other zone all of it does.
        let found = from_zone(&zoned(balancing, &[2, 6], 1), &origin(&[4, 4]));
        assert_eq!(found, BTreeMap::from([("z1".to_owned(), CHOICES)]), "{balancing:?}");
        // What does not stay goes where there is room: of the other two, one has as many clients as endpoints.
        let found = from_zone(&zoned(balancing, &[2, 4, 6], 0), &origin(&[6, 4, 2]));
        let stays = 100.0 / 3.0;
        let wanted = [("z0".to_owned(), stays), ("z2".to_owned(), 100.0 - stays)];
        assert_shares(&format!("{balancing:?}, room"), &found, &wanted);
        // With an endpoint of three ejected here, less stays: two of eight are here, and half of the clients.
        let cluster = zoned(balancing, &[3, 6], 0);
        eject(&cluster, [0]);
        let found = from_zone(&cluster, &origin(&[1, 1]));
        assert_shares(&format!("{balancing:?}, ejected"), &found, &z(&[50.0, 50.0]));
        // Nobody is left here; or too few are left at all: all others are used alike.
        eject(&cluster, [1, 2]);
        assert_eq!(from_zone(&cluster, &origin(&[1, 1])), BTreeMap::from([("z1".to_owned(), CHOICES)]));
        let few = zoned(balancing, &[2, 3], 0);
        let found = from_zone(&few, &origin(&[1, 1]));
        assert_shares(&format!("{balancing:?}, few"), &found, &z(&[2.0, 3.0]));
    }
}

/// What zone-aware routing is for: each endpoint gets as much as any other, wherever the clients are, and what can stay does.
#[tokio::test(start_paused = true)]
async fn endpoints_of_all_zones_get_the_same_from_the_clients_of_all_zones() {
    fastrand::seed(23);
    let (endpoints, clients) = ([2_usize, 3, 5], [5_usize, 3, 2]);
    let mut found: BTreeMap<SocketAddr, usize> = BTreeMap::new();
    let (mut stayed, mut all) = (0, 0);
    for (zone, pods) in clients.iter().enumerate() {
        let cluster = zoned(Balancing::Random, &endpoints, zone);
        let origin = origin(&clients);
        for _ in 0..pods * 4_000 {
            let chosen = choose(&cluster, &Wish { origin: Some(&origin), ..Wish::default() }).unwrap();
            *found.entry(chosen.endpoint.address).or_default() += 1;
            stayed += usize::from(*chosen.endpoint.locality.zone == *format!("z{zone}"));
            all += 1;
        }
    }
    let wanted: Vec<_> = found.keys().map(|address| (*address, 1.0)).collect();
    assert_eq!(wanted.len(), 10);
    assert_shares("each endpoint", &found, &wanted);
    // Two tenths, three tenths, two tenths: as much as there is room for in each client's zone.
    let kept = BTreeMap::from([("stayed", stayed), ("left", all - stayed)]);
    assert_shares("kept", &kept, &[("stayed", 0.7), ("left", 0.3)]);
}

#[tokio::test(start_paused = true)]
async fn who_has_tried_all_of_its_zone_goes_elsewhere() {
    let cluster = zoned(Balancing::LeastRequest, &[2, 6], 1);
    let tried: Vec<SocketAddr> = cluster.endpoints[2..].iter().map(|one| one.address).collect();
    let origin = origin(&[1, 1]);
    for _ in 0..100 {
        let wish = Wish { tried: &tried, origin: Some(&origin), ..Wish::default() };
        assert_eq!(&*choose(&cluster, &wish).unwrap().endpoint.locality.zone, "z0");
    }
}

/// Weights hold among very many endpoints as they do among few.
#[tokio::test(start_paused = true)]
async fn ten_thousand_endpoints_are_shared_out_as_few_are() {
    fastrand::seed(5);
    let endpoint = |n: u32| {
        let address = SocketAddr::from(([10, 1, (n >> 8) as u8, n as u8], 80));
        Arc::new(Endpoint { weight: 1 + n % 3, ..Endpoint::alone(address, None) })
    };
    let endpoints: Vec<_> = (0..10_000).map(endpoint).collect();
    let weights: Vec<u32> = endpoints.iter().map(|one| one.weight).collect();
    for balancing in [AT_RANDOM.as_slice(), &[Balancing::RoundRobin]].concat() {
        let groups = [Group::new(1, None, &weights)].into();
        let spread = Arc::new(Spread { levels: [Level { groups }].into(), ..Spread::default() });
        let cluster = Cluster { endpoints: endpoints.clone(), spread, ..cluster(balancing, 0) };
        let mut by_weight = BTreeMap::new();
        for _ in 0..CHOICES {
            let chosen = choose(&cluster, &Wish::default()).unwrap();
            *by_weight.entry(chosen.endpoint.weight).or_default() += 1;
        }
        let share = |weight: u32| {
            let all = weights.iter().filter(|other| **other == weight).count();
            (weight, f64::from(weight) * all as f64)
        };
        assert_shares(&format!("{balancing:?}"), &by_weight, &[share(1), share(2), share(3)]);
    }
}
