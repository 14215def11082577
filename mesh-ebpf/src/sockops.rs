//! cgroup/sockops: what the two ends of a connection inside a pod have to know of each other, and the app's flows.
//!
//! At connect, before the SYN leaves, an app's captured socket lists its original destination by its addresses, and
//! the agent's dialling socket the client it stands for. Once established, the accepting socket takes that over:
//! from then on everything stands on the socket itself. Flow records are written when a flow begins, is established
//! and ends, and while data is acknowledged at most every [`REFRESH_NS`].
//!
//! The agent's own sockets are never flows. Tested in the lab.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG, BPF_SOCK_OPS_PARSE_HDR_OPT_CB,
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTT_CB, BPF_SOCK_OPS_RTT_CB_FLAG,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns},
    macros::sock_ops,
    programs::SockOpsContext,
};
use aya_log_ebpf::debug;
use core::ptr::read_volatile;
use mesh_common::{
    addr::Addr,
    decide::{self, IPPROTO_TCP, seen, tcp},
    flow::{FlowRecord, direction, verdict},
    maps::{Entry, REFRESH_NS, SocketFacts, Tuple, counter, kind, policy},
};

use crate::{
    direct,
    ends::ends,
    maps::{CLIENTS, CLOSED, FLOWS, ORIGINAL_DST, PODS, POLICIES, SOCKETS, count, excludes_inbound},
    probes,
};

/// The agent reads the ring buffer on its own clock; waking it for each record would cost six times the call.
const BPF_RB_NO_WAKEUP: u64 = 1;
const WATCH: u32 = BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTT_CB_FLAG;

#[sock_ops]
pub fn m000000_sockops(ctx: SockOpsContext) -> u32 {
    let ops = ctx.ops;
    // SAFETY: context fields; volatile so that each is read on its own, as the verifier wants it.
    let (op, sk) = unsafe {
        (read_volatile(&raw const (*ops).op), read_volatile(&raw const (*ops).__bindgen_anon_2.sk))
    };
    if sk.is_null() {
        return 1;
    }
    // Each a function of its own in the kernel as well: all in one need more than its 512 bytes of stack.
    match op {
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            direct::connecting(SockOpsContext::new(ops), sk);
            connecting(SockOpsContext::new(ops), sk);
            probes::connecting(SockOpsContext::new(ops), sk);
        }
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            taken(SockOpsContext::new(ops), sk);
            accepted(SockOpsContext::new(ops), sk);
            probes::accepted(SockOpsContext::new(ops), sk);
        }
        BPF_SOCK_OPS_STATE_CB => {
            state(SockOpsContext::new(ops), sk);
            direct::closing(SockOpsContext::new(ops), sk);
            probes::closing(SockOpsContext::new(ops), sk);
        }
        BPF_SOCK_OPS_RTT_CB => acknowledged(SockOpsContext::new(ops), sk),
        BPF_SOCK_OPS_PARSE_HDR_OPT_CB => segment_after_fin(SockOpsContext::new(ops), sk),
        _ => {}
    }
    1
}

/// A socket is about to send its SYN.
#[inline(never)]
fn connecting(ctx: SockOpsContext, sk: *mut bpf_sock) {
    let ctx = &ctx;
    let (local, remote) = ends(ctx);
    let known = SOCKETS.get(sk);
    let dialler = match known.as_ref().map(|facts| (facts.kind, facts.addr)) {
        Some((kind::DIALLER, client)) => Some(client),
        _ => None,
    };
    let tuple = Tuple { src: local, dst: remote };
    if let Some(client) = dialler {
        if !client.is_unspecified() {
            let entry = Entry { addr: client, ..Entry::default() };
            // SAFETY: inner maps are freed after the programs that hold them have ended.
            if let Some(map) = unsafe { CLIENTS.get(&netns(ctx)) }
                && map.insert(&tuple, &entry, 0).is_err()
            {
                // The app would take the agent for its client. `inbound` refuses the connection.
                count(counter::CLIENTS_FULL);
                if let Some(mark) = map.get_ptr_mut(&Tuple::default()) {
                    // SAFETY: the agent put this entry there and never removes it while the map is in use.
                    unsafe { (*mark).full_ns = now() };
                }
            }
            watch(ctx, WATCH);
        }
        return;
    }
    let now = now();
    let facts = match known {
        Some(facts) if facts.kind == kind::CLIENT => {
            // A direct one goes to no port of the pod's.
            if facts.verdict == verdict::CAPTURED && decide::is_low_source(&local) {
                beware_of_low_ports(ctx, &tuple);
            }
            list_original_dst(ctx, &tuple, facts, now);
            facts
        }
        Some(facts) if facts.kind == kind::EXCLUDED => {
            facts.verdict = verdict::EXCLUDED;
            facts.addr = remote;
            facts
        }
        _ => {
            // SAFETY: an entry is replaced as a whole and freed after the programs that hold it have ended.
            if unsafe { PODS.get(&netns(ctx)) }.is_none() || remote.is_loopback() {
                return;
            }
            let mut fresh = SocketFacts::default();
            let Some(facts) = SOCKETS.get_or(sk, &mut fresh) else { return };
            facts.kind = kind::PASSING;
            facts.verdict = verdict::BYPASSED;
            facts.addr = remote;
            facts
        }
    };
    begin(ctx, facts, seen::ACTIVE, now);
    write(ctx, facts, now, 0, false);
}

/// The pod's source ports may be those that its connections are sent to: from here on they are sent to others. This
/// one, if it is about to connect to itself, has no way to go: `connect` fails with `EHOSTUNREACH`.
#[inline(always)]
fn beware_of_low_ports(ctx: &SockOpsContext, tuple: &Tuple) {
    if let Some(pod) = PODS.get_ptr_mut(&netns(ctx)) {
        // SAFETY: the entry is freed after the programs that hold it have ended; all write the same.
        unsafe { (*pod).low_ports = 1 };
    }
    if tuple.src.port == tuple.dst.port && tuple.src.same_ip(&tuple.dst) {
        direct::refuse(ctx);
    }
}

#[inline(always)]
fn list_original_dst(ctx: &SockOpsContext, tuple: &Tuple, facts: &SocketFacts, now: u64) {
    let entry = Entry { socket: cookie(ctx), full_ns: 0, addr: facts.addr, endpoint: facts.endpoint };
    // SAFETY: inner maps are freed after the programs that hold them have ended.
    let Some(map) = (unsafe { ORIGINAL_DST.get(&netns(ctx)) }) else { return };
    if map.insert(tuple, &entry, 0).is_err() {
        // The SYN goes out all the same, to a port of the pod where an app may listen. `inbound` refuses it there.
        count(counter::ORIGINAL_DST_FULL);
        if let Some(mark) = map.get_ptr_mut(&Tuple::default()) {
            // SAFETY: the agent put this entry there and never removes it while the map is in use.
            unsafe { (*mark).full_ns = now };
        }
    }
}

/// The new socket of the agent's outbound listener, before the agent can accept it.
#[inline(never)]
fn taken(ctx: SockOpsContext, sk: *mut bpf_sock) {
    let ctx = &ctx;
    let Some(facts) = SOCKETS.get(sk) else { return };
    if facts.kind != kind::OUTBOUND_LISTENER {
        return;
    }
    facts.kind = kind::ACCEPTED;
    let (local, remote) = ends(ctx);
    let tuple = Tuple { src: remote, dst: local };
    // SAFETY: inner maps are freed after the programs that hold them have ended.
    let entry = unsafe { ORIGINAL_DST.get_value(&netns(ctx), &tuple) };
    (facts.addr, facts.endpoint) = match entry {
        Some(entry) => (entry.addr, entry.endpoint),
        None if is_guests(ctx, &tuple) => (local, 0),
        None => (Addr::default(), 0),
    };
    watch(ctx, BPF_SOCK_OPS_RTT_CB_FLAG);
}

/// Another listener's new socket, before anybody can accept it.
#[inline(never)]
fn accepted(ctx: SockOpsContext, sk: *mut bpf_sock) {
    let ctx = &ctx;
    let (local, remote) = ends(ctx);
    let tuple = Tuple { src: remote, dst: local };
    let known = SOCKETS.get(sk);
    if matches!(known.as_ref().map_or(kind::NONE, |facts| facts.kind), kind::LISTENER | kind::ACCEPTED) {
        return;
    }
    let netns = netns(ctx);
    // SAFETY: as above.
    let Some(pod) = (unsafe { PODS.get(&netns) }) else { return };
    // SAFETY: as above; the entry stays for as long as the agent's socket is open, and `socket` is ours to write.
    let client = unsafe { CLIENTS.get_value_ptr_mut(&netns, &tuple) }.map(|entry| unsafe {
        (*entry).socket = cookie(ctx);
        (*entry).addr
    });
    if client.is_none() && remote.is_loopback() {
        // The pod talks to itself. What a listener that once dialled has left on it does not count.
        if let Some(facts) = known {
            facts.kind = kind::NONE;
        }
        return;
    }
    let mut fresh = SocketFacts::default();
    let Some(facts) = SOCKETS.get_or(sk, &mut fresh) else { return };
    facts.kind = kind::APP;
    facts.verdict = if client.is_some() {
        verdict::CAPTURED
    } else if direct::accepted(ctx, netns, &tuple) {
        verdict::DIRECT
    } else if pod.flags & policy::INBOUND != 0 && excluded(netns, local.port, &remote) {
        verdict::EXCLUDED
    } else {
        verdict::BYPASSED
    };
    facts.addr = client.unwrap_or(remote);
    begin(ctx, facts, 0, now());
}

/// Whether a guest of the pod has dialled `tuple.dst`, which is why the listener has it.
#[inline(always)]
fn is_guests(ctx: &SockOpsContext, tuple: &Tuple) -> bool {
    // SAFETY: an entry is replaced as a whole and freed after the programs that hold it have ended.
    unsafe { PODS.get(&netns(ctx)) }.is_some_and(|pod| decide::is_guests(pod, &tuple.dst, &tuple.src))
}

/// Whether the pod takes this connection past the agent. (`inbound.rs` has decided so when its SYN came.)
#[inline(always)]
fn excluded(netns: u64, port: u16, remote: &Addr) -> bool {
    // SAFETY: an entry is replaced as a whole and freed after the programs that hold it have ended.
    unsafe { POLICIES.get(&netns) }.is_some_and(|pod| excludes_inbound(pod, netns, port, remote))
}

/// The socket changes its TCP state.
#[inline(never)]
fn state(ctx: SockOpsContext, sk: *mut bpf_sock) {
    let ctx = &ctx;
    let ops = ctx.ops;
    // SAFETY: context fields.
    let (old, new, snd_una, snd_nxt) = unsafe {
        (
            read_volatile(&raw const (*ops).__bindgen_anon_1.args[0]) as u8,
            read_volatile(&raw const (*ops).__bindgen_anon_1.args[1]) as u8,
            read_volatile(&raw const (*ops).snd_una),
            read_volatile(&raw const (*ops).snd_nxt),
        )
    };
    let Some(facts) = SOCKETS.get(sk) else { return };
    if facts.kind == kind::DIALLER && new == tcp::CLOSE {
        let (local, remote) = ends(ctx);
        // SAFETY: inner maps are freed after the programs that hold them have ended.
        if let Some(map) = unsafe { CLIENTS.get(&netns(ctx)) } {
            let _ = map.remove(&Tuple { src: local, dst: remote });
        }
    }
    if !is_flow(facts) || old == tcp::CLOSE {
        return;
    }
    facts.seen = decide::on_state(facts.seen, old, new, snd_una == snd_nxt);
    facts.tcp_state = new;
    match new {
        tcp::ESTABLISHED => {
            // Nobody in user space sees a direct connection begin: the agent is told.
            let told = facts.verdict == verdict::DIRECT && facts.kind == kind::CLIENT;
            write(ctx, facts, now(), 0, told);
        }
        // From here on the socket may end without telling whether the peer's FIN came: look at what arrives.
        tcp::FIN_WAIT1 => watch(ctx, BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG),
        tcp::CLOSE => end(ctx, facts),
        _ => {}
    }
}

#[inline(always)]
fn end(ctx: &SockOpsContext, facts: &mut SocketFacts) {
    if facts.seen & seen::ESTABLISHED == 0 {
        facts.verdict = verdict::FAILED;
    }
    let now = now();
    write(ctx, facts, now, now, true);
    if facts.kind == kind::CLIENT {
        let (local, remote) = ends(ctx);
        // SAFETY: inner maps are freed after the programs that hold them have ended.
        if let Some(map) = unsafe { ORIGINAL_DST.get(&netns(ctx)) } {
            let tuple = Tuple { src: local, dst: remote };
            // A new connection may have taken the same ends over while this one was being put to TIME_WAIT.
            // SAFETY: as above.
            if unsafe { map.get(&tuple) }.is_some_and(|entry| entry.socket == cookie(ctx)) {
                let _ = map.remove(&tuple);
            }
        }
    }
    debug!(ctx, target: "mesh_ebpf", "flow of socket {} ended, verdict {}", cookie(ctx), facts.verdict);
}

/// Data of ours was acknowledged.
#[inline(never)]
fn acknowledged(ctx: SockOpsContext, sk: *mut bpf_sock) {
    let ctx = &ctx;
    let Some(facts) = SOCKETS.get(sk) else { return };
    let now = now();
    if now.saturating_sub(facts.written_ns) < REFRESH_NS {
        return;
    }
    if is_flow(facts) {
        write(ctx, facts, now, 0, false);
    } else if matches!(facts.kind, kind::ACCEPTED | kind::DIALLER) {
        facts.written_ns = now;
        app_received(ctx, facts.kind, now);
    }
}

/// What the app has acknowledged to the agent it has received. An app that only receives has no acknowledgements to
/// see, so that without this its record would stand still.
#[inline(always)]
fn app_received(ctx: &SockOpsContext, of: u8, now: u64) {
    let (local, remote) = ends(ctx);
    let netns = netns(ctx);
    // SAFETY: inner maps are freed after the programs that hold them have ended.
    let (entry, syn) = unsafe {
        if of == kind::ACCEPTED {
            (ORIGINAL_DST.get_value(&netns, &Tuple { src: remote, dst: local }), 0)
        } else {
            (CLIENTS.get_value(&netns, &Tuple { src: local, dst: remote }), 1)
        }
    };
    let Some(app) = entry.map(|entry| entry.socket) else { return };
    // SAFETY: a context field.
    let acked = unsafe { read_volatile(&raw const (*ctx.ops).bytes_acked) };
    // SAFETY: as above. Only this program writes the record, and a torn one is mended by its next write.
    if let Some(record) = unsafe { FLOWS.get_value_ptr_mut(&netns, &app) } {
        unsafe {
            if (*record).end_ns == 0 {
                (*record).rx_bytes = acked.saturating_sub(syn);
                (*record).last_seen_ns = now;
            }
        }
    }
}

/// A segment arrived after we closed our side: does it carry the peer's FIN?
#[inline(never)]
fn segment_after_fin(ctx: SockOpsContext, sk: *mut bpf_sock) {
    let ctx = &ctx;
    const TCP_HEADER: usize = 20;
    const FIN: u8 = 1;
    let ops = ctx.ops;
    let Some(facts) = SOCKETS.get(sk) else { return };
    if !is_flow(facts) {
        return;
    }
    // SAFETY: context fields.
    let (data, data_end, len) = unsafe {
        (
            read_volatile(&raw const (*ops).__bindgen_anon_3.skb_data).cast::<u8>(),
            read_volatile(&raw const (*ops).__bindgen_anon_4.skb_data_end).cast::<u8>(),
            read_volatile(&raw const (*ops).skb_len),
        )
    };
    if data as usize + TCP_HEADER > data_end as usize {
        return;
    }
    // SAFETY: the header was just checked to be there.
    let header: [u8; TCP_HEADER] = unsafe { data.cast::<[u8; TCP_HEADER]>().read_unaligned() };
    if header[13] & FIN == 0 {
        return;
    }
    let seq = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    let payload = len.wrapping_sub(u32::from(header[12] >> 4) * 4);
    facts.fin_end = seq.wrapping_add(payload).wrapping_add(1);
    facts.seen |= seen::FIN_COMING;
}

#[inline(always)]
fn is_flow(facts: &SocketFacts) -> bool {
    facts.start_ns != 0 && matches!(facts.kind, kind::CLIENT | kind::PASSING | kind::EXCLUDED | kind::APP)
}

/// The flow of this socket begins.
#[inline(always)]
fn begin(ctx: &SockOpsContext, facts: &mut SocketFacts, bits: u8, now: u64) {
    facts.start_ns = now;
    facts.seen = bits | (facts.seen & seen::COUNTED);
    facts.tcp_state = tcp::SYN_SENT;
    watch(ctx, WATCH);
}

/// Writes the flow's record; `end_ns` other than 0 ends it. `told`: the agent reads it in the ring buffer.
#[inline(always)]
fn write(ctx: &SockOpsContext, facts: &mut SocketFacts, now: u64, end_ns: u64, told: bool) {
    facts.written_ns = now;
    let record = record(ctx, facts, now, end_ns);
    // SAFETY: inner maps are freed after the programs that hold them have ended.
    // No table: the pod is not enrolled any more, or is the agent's probe.
    let Some(table) = (unsafe { FLOWS.get(&record.netns) }) else { return };
    if table.insert(&record.socket, &record, 0).is_err() {
        count(counter::FLOWS_FULL);
    }
    if told && CLOSED.output(&record, BPF_RB_NO_WAKEUP).is_err() {
        count(counter::CLOSED_FULL);
    }
}

#[inline(always)]
fn record(ctx: &SockOpsContext, facts: &SocketFacts, now: u64, end_ns: u64) -> FlowRecord {
    let ops = ctx.ops;
    // SAFETY: context fields.
    let (acked, received, rcv_nxt, srtt, retransmits, segs_out, segs_in) = unsafe {
        (
            read_volatile(&raw const (*ops).bytes_acked),
            read_volatile(&raw const (*ops).bytes_received),
            read_volatile(&raw const (*ops).rcv_nxt),
            read_volatile(&raw const (*ops).srtt_us),
            read_volatile(&raw const (*ops).total_retrans),
            read_volatile(&raw const (*ops).segs_out),
            read_volatile(&raw const (*ops).segs_in),
        )
    };
    let (tx_bytes, rx_bytes) = decide::payload(facts.seen, acked, received, facts.fin_end, rcv_nxt);
    let (local, _) = ends(ctx);
    FlowRecord {
        netns: netns(ctx),
        socket: cookie(ctx),
        start_ns: facts.start_ns,
        last_seen_ns: now,
        end_ns,
        tx_bytes,
        rx_bytes,
        tx_packets: u64::from(segs_out),
        rx_packets: u64::from(segs_in),
        // The kernel keeps it in eighths.
        srtt_us: srtt >> 3,
        retransmits,
        local,
        remote: facts.addr,
        direction: if facts.kind == kind::APP { direction::INBOUND } else { direction::OUTBOUND },
        verdict: facts.verdict,
        protocol: IPPROTO_TCP as u8,
        tcp_state: facts.tcp_state,
        endpoint: facts.endpoint,
    }
}

/// Has the kernel call us for more events of this socket.
#[inline(always)]
fn watch(ctx: &SockOpsContext, flags: u32) {
    // SAFETY: a context field. What others have asked for stays.
    let now = unsafe { read_volatile(&raw const (*ctx.ops).bpf_sock_ops_cb_flags) };
    let _ = ctx.set_cb_flags((now | flags) as i32);
}

#[inline(always)]
fn netns(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the helper takes the context of this hook.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

#[inline(always)]
fn cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the helper takes the context of this hook.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper takes nothing.
    unsafe { bpf_ktime_get_ns() }
}
