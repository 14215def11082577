//! Direct connections, in the hooks that they take part in: an endpoint is chosen as the app connects, the connection is
//! listed for the server's pod before its SYN leaves, and struck off when both its sockets have closed: a client may close
//! its own without a word to the other.
//!
//! A connection is listed by the kernel alone, from its socket's own ends and namespace, and is let in once. Nothing is
//! chosen while the agent does not listen. Tested in the lab (`tests/tests/direct/`).

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock,
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_setsockopt,
    },
    programs::SockOpsContext,
};
use core::ptr::read_volatile;
use mesh_common::{
    addr::Addr,
    decide::{direct, seen, tcp},
    flow::verdict,
    maps::{Admitted, DirectKey, Endpoint, HeldKey, PodAddrs, SlotKey, Tuple, counter, kind},
};

use crate::{
    ends::ends,
    maps::{
        ADMITTED, DIRECT, DIRECT_SLOTS, ENDPOINTS, HELD, PODS, SOCKETS, agent_is_gone, count, xadd, xchg,
    },
};

/// How long after its choice a direct connection may begin: well within the second after which the agent looks again for
/// what a change forbids.
const CHOICE_HOLDS_NS: u64 = 500_000_000;

/// What the kernel has chosen for a connection.
pub struct Choice {
    /// The endpoint's number.
    pub endpoint: u32,
    /// Its address, when the connection goes there without the agent.
    pub direct: Option<Addr>,
}

/// Chooses for a connection of this pod; `None` leaves it to the agent.
#[inline(always)]
pub fn choose(netns: u64, pod: &PodAddrs, bound: &Addr, dialled: &Addr) -> Option<Choice> {
    let drawn = draw(&DirectKey { netns, addr: *dialled, pad: 0 });
    let (number, may_be_direct) = (drawn as u32, drawn >> 32 != 0);
    if number == 0 {
        return None;
    }
    // SAFETY: an entry is freed after the programs that hold it have ended.
    let endpoint = unsafe { ENDPOINTS.get(&number) }?;
    let direct = may_be_direct
        && direct::may_go_to(pod, bound, dialled, &endpoint.addr)
        // Its pod may have left the mesh a moment ago.
        // SAFETY: inner maps are freed after the programs that hold them have ended.
        && unsafe { ADMITTED.get(&endpoint.netns) }.is_some();
    Some(Choice { endpoint: number, direct: direct.then_some(endpoint.addr) })
}

/// The number of an endpoint, with bit 32 where the connection may go there without the agent; 0 leaves it to the agent. (A
/// function of its own in the kernel as well: there the stack of the hook is full.)
#[inline(never)]
fn draw(key: &DirectKey) -> u64 {
    let Some(service) = DIRECT.get_ptr_mut(key) else { return 0 };
    if agent_is_gone(key.netns) {
        return 0;
    }
    // SAFETY: an entry is freed after the programs that hold it have ended; a turn that two take is no harm.
    let service = unsafe {
        let now = *service;
        (*service).next = now.next.wrapping_add(1);
        now
    };
    // SAFETY: the helper takes nothing.
    let random = [0; 4].map(|_: u32| unsafe { bpf_get_prandom_u32() });
    // SAFETY: an entry is freed after the programs that hold it have ended.
    let slot = |place| unsafe { DIRECT_SLOTS.get(&SlotKey { set: service.set, place }) }.copied();
    let open = |endpoint: u32| {
        // SAFETY: as above; the count is written by single instructions.
        ENDPOINTS.get_ptr_mut(&endpoint).map_or(0, |found| unsafe { read_volatile(&raw const (*found).open) })
    };
    let Some(slot) = direct::choose(&service, random, slot, open) else { return 0 };
    let direct = slot.direct != 0 && has_room(key.netns, slot.endpoint);
    u64::from(direct) << 32 | u64::from(slot.endpoint)
}

/// Whether this client may have one more direct connection to the pod of this endpoint; else it takes the agent.
#[inline(always)]
fn has_room(client: u64, endpoint: u32) -> bool {
    // SAFETY: an entry is freed after the programs that hold it have ended.
    let Some(endpoint) = (unsafe { ENDPOINTS.get(&endpoint) }) else { return false };
    let (server, room) = (endpoint.netns, endpoint.room);
    let held = |client| {
        // SAFETY: as above; the count is written by single instructions.
        HELD.get_ptr_mut(&HeldKey { server, client }).map_or(0, |held| unsafe { read_volatile(held) }) as i64
    };
    direct::has_room(room, held(client), held(HeldKey::ALL))
}

/// The client has one more entry in the server's table, or (`u64::MAX`) one less.
#[inline(never)]
fn hold(server: u64, client: u64, n: u64) {
    const BPF_NOEXIST: u64 = 1;
    for client in [client, HeldKey::ALL] {
        let key = HeldKey { server, client };
        if n == 1 {
            let _ = HELD.insert(&key, &0, BPF_NOEXIST);
        }
        if let Some(held) = HELD.get_ptr_mut(&key) {
            // SAFETY: as above.
            unsafe { xadd(held, n) };
        }
    }
}

/// An app's captured socket is about to send its SYN: its endpoint counts one more, and a direct connection is listed
/// where its server's pod looks for it. What cannot be listed for want of room is refused.
#[inline(never)]
pub fn connecting(ctx: SockOpsContext, sk: *mut bpf_sock) {
    let ctx = &ctx;
    let Some(facts) = SOCKETS.get(sk) else { return };
    if facts.kind != kind::CLIENT || facts.endpoint == 0 {
        return;
    }
    let Some(endpoint) = ENDPOINTS.get_ptr_mut(&facts.endpoint) else {
        // Gone since it was chosen. The connection goes to its address as one from outside the mesh.
        facts.endpoint = 0;
        if facts.verdict == verdict::DIRECT {
            facts.verdict = verdict::BYPASSED;
        }
        return;
    };
    add(endpoint, 1);
    facts.seen |= seen::COUNTED;
    if facts.verdict != verdict::DIRECT {
        return;
    }
    // With TCP Fast Open the SYN leaves when the app first writes. What was chosen too long before may be allowed no more,
    // and the agent has looked for it in vain.
    // SAFETY: the helper takes nothing.
    if unsafe { bpf_ktime_get_ns() }.wrapping_sub(facts.start_ns) > CHOICE_HOLDS_NS {
        refuse(ctx);
        return;
    }
    let (local, remote) = ends(ctx);
    // SAFETY: the helpers take the context of this hook; entries are freed after the programs that hold them have ended.
    let (netns, socket, to) = unsafe {
        (bpf_get_netns_cookie(ctx.as_ptr()), bpf_get_socket_cookie(ctx.as_ptr()), (*endpoint).netns)
    };
    // SAFETY: as above.
    let own = unsafe { PODS.get(&netns) }.is_some_and(|pod| direct::is_own(pod, &local));
    // SAFETY: as above.
    if !own || unsafe { ADMITTED.get(&to) }.is_none() {
        facts.verdict = verdict::BYPASSED;
        return;
    }
    let tuple = Tuple { src: local, dst: remote };
    let (dialled, endpoint) = (facts.addr, facts.endpoint);
    if !list(to, &tuple, &mut Admitted { netns, socket, accepted: 0, dialled, endpoint, before: 0 }) {
        count(counter::ADMITTED_FULL);
        refuse(ctx);
    }
}

/// Lists a connection in the table of the server's pod, or says that there is no room: the choice may be older than many
/// others that found the same room. An earlier one of the same ends is replaced, and its server's socket, while that is
/// open, goes over into the new entry.
#[inline(never)]
fn list(server: u64, tuple: &Tuple, one: &mut Admitted) -> bool {
    const BPF_NOEXIST: u64 = 1;
    const BPF_EXIST: u64 = 2;
    // SAFETY: inner maps, and their entries, are freed after the programs that hold them have ended.
    let Some(map) = (unsafe { ADMITTED.get(&server) }) else { return false };
    if let Some(other) = map.get_ptr_mut(tuple) {
        // SAFETY: as above.
        one.before = unsafe { read(other) }.servers();
        if map.insert(tuple, &*one, BPF_EXIST).is_ok() {
            // What that socket came to meanwhile is told to the entry that is replaced, and what it comes to from now on to
            // the new one (`closed` looks twice).
            // SAFETY: as above.
            let now = unsafe { read(other) }.servers();
            if now != one.before
                && let Some(listed) = map.get_ptr_mut(tuple)
            {
                // SAFETY: as above.
                unsafe { xchg(&raw mut (*listed).before, now) };
            }
            return true;
        }
        // It has been struck off, so that socket has closed.
        one.before = 0;
    }
    if !has_room(one.netns, one.endpoint) || map.insert(tuple, &*one, BPF_NOEXIST).is_err() {
        return false;
    }
    hold(server, one.netns, 1);
    true
}

/// Whether the change of its TCP state that a socket tells of is its end.
#[inline(always)]
pub fn closes(ctx: &SockOpsContext) -> bool {
    // SAFETY: a context field.
    let new = unsafe { read_volatile(&raw const (*ctx.ops).__bindgen_anon_1.args[1]) as u8 };
    new == tcp::CLOSE
}

/// Leaves a connection no way to go: `connect` fails with `EHOSTUNREACH`.
#[inline(always)]
pub fn refuse(ctx: &SockOpsContext) {
    const SOL_SOCKET: i32 = 1;
    const SO_BINDTOIFINDEX: i32 = 62;
    let mut no_interface = i32::MAX;
    let value = (&raw mut no_interface).cast();
    // SAFETY: the helper takes the context of this hook, and reads four bytes.
    unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_BINDTOIFINDEX, value, 4) };
}

/// Whether a connection that an app accepts is a direct one; from then on no other SYN is let in for it.
#[inline(always)]
pub fn accepted(ctx: &SockOpsContext, netns: u64, tuple: &Tuple) -> bool {
    // SAFETY: inner maps, and their entries, are freed after the programs that hold them have ended.
    let Some(admitted) = (unsafe { ADMITTED.get_value_ptr_mut(&netns, tuple) }) else { return false };
    // SAFETY: as above; the helper takes the context of this hook.
    unsafe {
        if (*admitted).accepted != 0 {
            return false;
        }
        (*admitted).accepted = bpf_get_socket_cookie(ctx.as_ptr());
    }
    true
}

/// The socket changes its TCP state, and its flow has been told of: when it closes, its endpoint counts one less, and
/// its connection is struck off if that is over at the server too.
#[inline(never)]
pub fn closing(ctx: SockOpsContext, sk: *mut bpf_sock) {
    let ctx = &ctx;
    if !closes(ctx) {
        return;
    }
    let Some(facts) = SOCKETS.get(sk) else { return };
    // One that ended before it was established counts as failed.
    if facts.kind == kind::APP && matches!(facts.verdict, verdict::DIRECT | verdict::FAILED) {
        let (local, remote) = ends(ctx);
        // SAFETY: the helpers take the context of this hook.
        let (server, socket) =
            unsafe { (bpf_get_netns_cookie(ctx.as_ptr()), bpf_get_socket_cookie(ctx.as_ptr())) };
        closed(server, &Tuple { src: remote, dst: local }, socket);
        return;
    }
    if facts.kind != kind::CLIENT || facts.endpoint == 0 || facts.seen & seen::COUNTED == 0 {
        return;
    }
    facts.seen &= !seen::COUNTED;
    let found = ENDPOINTS.get_ptr_mut(&facts.endpoint);
    facts.endpoint = 0;
    let Some(endpoint) = found else { return };
    add(endpoint, u64::MAX);
    let (src, dst) = ends(ctx);
    // SAFETY: entries are freed after the programs that hold them have ended; the helper takes the context of this hook.
    let (server, socket) = unsafe { ((*endpoint).netns, bpf_get_socket_cookie(ctx.as_ptr())) };
    closed(server, &Tuple { src, dst }, socket);
}

/// This socket, at either end of a connection to the pod `server`, has closed.
#[inline(never)]
fn closed(server: u64, tuple: &Tuple, socket: u64) {
    // SAFETY: inner maps, and their entries, are freed after the programs that hold them have ended.
    let Some(map) = (unsafe { ADMITTED.get(&server) }) else { return };
    let Some(one) = map.get_ptr_mut(tuple) else { return };
    // SAFETY: as above.
    if !unsafe { strike(one, socket) } {
        return;
    }
    // A connection that takes the same ends over may have replaced that entry by one that names this socket too.
    let Some(one) = map.get_ptr_mut(tuple) else { return };
    // Each end is written by its own socket alone, and read after that: of two that close at once, one sees both closed.
    // SAFETY: as above.
    let now = unsafe {
        strike(one, socket);
        read(one)
    };
    if now.is_over() && map.remove(tuple).is_ok() {
        hold(server, now.netns, u64::MAX);
    }
}

/// Writes that this socket has closed, where the entry names it.
///
/// # Safety
/// `one` is an entry of a table of this run.
#[inline(always)]
unsafe fn strike(one: *mut Admitted, socket: u64) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        if read_volatile(&raw const (*one).socket) == socket {
            xchg(&raw mut (*one).socket, Admitted::CLOSED);
        } else if read_volatile(&raw const (*one).accepted) == socket {
            xchg(&raw mut (*one).accepted, Admitted::CLOSED);
        } else if read_volatile(&raw const (*one).before) == socket {
            xchg(&raw mut (*one).before, 0);
        } else {
            return false;
        }
    }
    true
}

/// What the entry says now of its client and its sockets.
///
/// # Safety
/// `one` is an entry of a table of this run.
#[inline(always)]
unsafe fn read(one: *const Admitted) -> Admitted {
    // SAFETY: the caller's promise.
    unsafe {
        Admitted {
            netns: read_volatile(&raw const (*one).netns),
            socket: read_volatile(&raw const (*one).socket),
            accepted: read_volatile(&raw const (*one).accepted),
            before: read_volatile(&raw const (*one).before),
            ..Admitted::default()
        }
    }
}

/// `u64::MAX` takes one away.
#[inline(always)]
fn add(endpoint: *mut Endpoint, n: u64) {
    // SAFETY: the entry is freed after the programs that hold it have ended.
    unsafe { xadd(&raw mut (*endpoint).open, n) };
}
