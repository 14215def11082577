//! Direct connections: which endpoint, and whether it may be reached without the agent.
//!
//! Pure: what is in the maps is asked for through closures. Tested by the unit tests below.

use crate::{
    addr::Addr,
    maps::{DirectService, PodAddrs, Slot, balancing},
};

/// The slot of the endpoint that a connection goes to. `random`: two numbers for each of two draws. `slot` finds a place
/// of the set; `open` says how many connections an endpoint has open. `None`: the set is gone, and the agent chooses.
#[inline(always)]
pub fn choose(
    service: &DirectService,
    random: [u32; 4],
    slot: impl Fn(u32) -> Option<Slot>,
    open: impl Fn(u32) -> u64,
) -> Option<Slot> {
    if service.count == 0 {
        return None;
    }
    if service.balancing == balancing::ROUND_ROBIN {
        return slot(service.next % service.count);
    }
    let [place, toss, second_place, second_toss] = random;
    let first = draw(service.count, place, toss, &slot)?;
    if service.balancing == balancing::RANDOM || service.count == 1 {
        return Some(first);
    }
    let second = draw(service.count, second_place, second_toss, &slot)?;
    Some(if open(second.endpoint) < open(first.endpoint) { second } else { first })
}

/// One by its weight.
#[inline(always)]
fn draw(count: u32, place: u32, toss: u32, slot: &impl Fn(u32) -> Option<Slot>) -> Option<Slot> {
    let here = slot(((u64::from(place) * u64::from(count)) >> 32) as u32)?;
    if toss <= here.threshold { Some(here) } else { slot(here.alias) }
}

/// Whether this pod's connection to `dialled` may go to the app at `endpoint` itself. Not to the pod's own app, which it
/// would reach from the address that it goes to; not from an address that the agent does not know as the pod's, for by
/// that address others know the pod; not across families.
#[inline(always)]
pub const fn may_go_to(pod: &PodAddrs, bound: &Addr, dialled: &Addr, endpoint: &Addr) -> bool {
    (bound.is_unspecified() || is_own(pod, bound))
        && !is_own(pod, endpoint)
        && dialled.as_v4().is_some() == endpoint.as_v4().is_some()
}

/// Whether a client may have one more direct connection to a pod whose table holds `room`: it has `held`, all clients
/// together have `all`. A quarter is its share, so that no client fills the table, and the last eighth is left to those
/// that choose at the same time. 0: nobody has said how many it holds.
#[inline(always)]
pub const fn has_room(room: u32, held: i64, all: i64) -> bool {
    let share = if room < 8 { 1 } else { room / 4 };
    room == 0 || (held < share as i64 && all < (room - room / 8) as i64)
}

/// Whether this is the pod's address by which others know it.
#[inline(always)]
pub const fn is_own(pod: &PodAddrs, addr: &Addr) -> bool {
    if addr.as_v4().is_some() {
        pod.has_v4 != 0 && addr.same_ip(&Addr::v4(pod.v4, 0))
    } else {
        pod.has_v6 != 0 && addr.same_ip(&Addr::v6(pod.v6, 0))
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    const POD: PodAddrs =
        PodAddrs { v4: [10, 0, 0, 7], v6: [0xfd; 16], has_v4: 1, has_v6: 1, low_ports: 0, flags: 0 };
    const ANY: Addr = Addr::v4([0; 4], 0);
    const EVEN: u32 = u32::MAX;

    fn slot(endpoint: u32, threshold: u32, alias: u32) -> Slot {
        Slot { endpoint, threshold, alias, direct: 1 }
    }

    fn service(balancing: u32, count: u32) -> DirectService {
        DirectService { set: 1, count, balancing, next: 0 }
    }

    /// How often each of the endpoints 1..=n is chosen in a walk over the whole range of random numbers.
    fn chosen(service: &DirectService, slots: &[Slot], open: &[u64]) -> Vec<usize> {
        let mut counts = std::vec![0; slots.len()];
        let steps: Vec<u32> = (0..16).map(|n: u32| n * (1 << 28) + 7).collect();
        let mut add = |random| {
            let get = |place: u32| slots.get(place as usize).copied();
            let open = |endpoint: u32| open[endpoint as usize - 1];
            if let Some(slot) = choose(service, random, get, open) {
                counts[slot.endpoint as usize - 1] += 1;
            }
        };
        for n in 0..1 << 16 {
            add([0, 4, 8, 12].map(|shift| steps[(n >> shift) & 15]));
        }
        counts
    }

    #[test]
    fn equal_weights_are_even_and_the_less_busy_wins() {
        let slots = [slot(1, EVEN, 0), slot(2, EVEN, 1)];
        let two = service(balancing::LEAST_REQUEST, 2);
        assert_eq!(chosen(&two, &slots, &[5, 5]), [1 << 15, 1 << 15]);
        // Both draws fall on the busy one a quarter of the time.
        assert_eq!(chosen(&two, &slots, &[6, 5]), [1 << 14, 3 << 14]);
        assert_eq!(chosen(&service(balancing::RANDOM, 2), &slots, &[600, 5]), [1 << 15, 1 << 15]);
    }

    #[test]
    fn weights_are_kept_by_aliases() {
        // One to three: half of the first place is the second's.
        let slots = [slot(1, u32::MAX / 2, 1), slot(2, EVEN, 1)];
        for balancing in [balancing::LEAST_REQUEST, balancing::RANDOM] {
            assert_eq!(chosen(&service(balancing, 2), &slots, &[1, 1]), [1 << 14, 3 << 14]);
        }
    }

    #[test]
    fn turns_are_taken() {
        let slots = [slot(1, EVEN, 0), slot(2, EVEN, 1), slot(3, EVEN, 2)];
        let turn = |next| {
            let service = DirectService { next, ..service(balancing::ROUND_ROBIN, 3) };
            choose(&service, [9; 4], |place| slots.get(place as usize).copied(), |_| 0).map(|s| s.endpoint)
        };
        assert_eq!([0, 1, 2, 3, 4].map(turn), [1, 2, 3, 1, 2].map(Some));
    }

    #[test]
    fn a_set_that_is_gone_chooses_nobody() {
        for balancing in [balancing::LEAST_REQUEST, balancing::RANDOM, balancing::ROUND_ROBIN] {
            assert_eq!(choose(&service(balancing, 2), [0; 4], |_| None, |_| 0), None);
            assert_eq!(choose(&service(balancing, 0), [0; 4], |_| Some(slot(1, EVEN, 0)), |_| 0), None);
        }
    }

    #[test]
    fn a_quarter_is_a_clients_share_and_the_last_eighth_is_nobodys() {
        assert!(has_room(64, 15, 55) && !has_room(64, 16, 16) && !has_room(64, 0, 56));
        assert!(has_room(1, 0, 0) && !has_room(1, 0, 1) && !has_room(1, 1, 1), "the smallest table");
        assert!(has_room(0, 1 << 20, 1 << 20), "nobody has said");
        assert!(has_room(64, -3, -3), "counted off by a few");
    }

    #[test]
    fn only_from_the_pods_own_address_and_only_to_others_of_the_family() {
        let (vip, other) = (Addr::v4([10, 96, 0, 1], 80), Addr::v4([10, 0, 0, 8], 8080));
        let own = Addr::v4(POD.v4, 0);
        assert!(may_go_to(&POD, &ANY, &vip, &other) && may_go_to(&POD, &own, &vip, &other));
        assert!(!may_go_to(&POD, &Addr::v4([10, 0, 0, 9], 0), &vip, &other), "another address of the pod");
        assert!(!may_go_to(&POD, &ANY, &vip, &Addr::v4(POD.v4, 8080)), "the pod itself");
        assert!(!may_go_to(&POD, &ANY, &Addr::v6([1; 16], 80), &other), "another family");
        assert!(may_go_to(&POD, &Addr::v6([0; 16], 0), &Addr::v6([1; 16], 80), &Addr::v6([2; 16], 80)));
        let only_v4 = PodAddrs { has_v6: 0, ..POD };
        assert!(!is_own(&only_v4, &Addr::v6(POD.v6, 0)));
    }
}
