//! TCX on the pod's interfaces: counts the flows no socket hook sees: UDP, other IP protocols, and TCP that
//! has no socket in the pod (nested containers and virtual machines). Everything else is left at once.
//!
//! Never drops, marks or redirects a packet: `guests.rs` marks, `guard.rs` drops. Tested in the lab.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_hdr_start_off::BPF_HDR_START_NET, bpf_sock_tuple},
    helpers::generated::{
        bpf_ktime_get_ns, bpf_sk_fullsock, bpf_sk_release, bpf_skb_load_bytes_relative, bpf_skc_lookup_tcp,
    },
    macros::classifier,
    programs::TcContext,
};
use core::{mem::zeroed, ptr::read_volatile};
use mesh_common::{
    decide::IPPROTO_TCP,
    flow::{FlowRecord, direction, verdict},
    maps::{PacketKey, Tuple, counter, kind},
};

use crate::maps::{NETNS_COOKIE, POD_PACKET_FLOWS, SOCKETS, count, split, xadd};

/// The next program decides; ours only counts.
pub const TCX_NEXT: i32 = -1;
/// `BPF_F_CURRENT_NETNS`
pub const THIS_NETNS: u64 = u64::MAX;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
pub const TCP: u8 = IPPROTO_TCP as u8;
const UDP: u8 = 17;
const SCTP: u8 = 132;
pub const IPV6_HEADER: u32 = 40;
/// Bytes of the headers of a segment that the kernel has merged into one packet, beside its IP header.
const UDP_HEADER: u64 = 8;
const TCP_HEADER: u64 = 20;

#[classifier]
pub fn m000000_egress(ctx: TcContext) -> i32 {
    // SAFETY: a context field.
    let sk = unsafe { read_volatile(&raw const (*ctx.skb.skb).__bindgen_anon_2.sk) };
    let _ = account(&ctx, true, !sk.is_null());
    TCX_NEXT
}

#[classifier]
pub fn m000000_ingress(ctx: TcContext) -> i32 {
    let _ = account(&ctx, false, false);
    TCX_NEXT
}

/// What a packet says beside its addresses.
pub struct Packet {
    /// IPv6, whatever its addresses look like: that of a mapped IPv4 address may stand in such a packet too.
    pub v6: bool,
    /// Bytes of the IP header.
    pub header: u32,
    /// IP bytes of the packet, or of all those it stands for.
    pub bytes: u64,
    /// How many it stands for.
    pub packets: u64,
    /// It begins with a transport header: not a later fragment.
    pub first: bool,
}

/// What the IP header of a packet says beside the addresses.
struct Ip {
    header: u32,
    total: u64,
    first: bool,
}

#[inline(always)]
fn account(ctx: &TcContext, sent: bool, has_socket: bool) -> Option<()> {
    let mut key = PacketKey::default();
    let packet = read(ctx, sent, &mut key)?;
    if key.protocol == TCP && has_socket {
        return None;
    }
    let flow = match POD_PACKET_FLOWS.get_ptr_mut(&key) {
        // SAFETY: an entry of the map, freed after the programs that hold it have ended. What leaks is counted where it is
        // dropped.
        Some(flow) if unsafe { (*flow).verdict } == verdict::LEAKED => return None,
        Some(flow) => flow,
        // Incoming TCP is a socket's unless the answers have shown otherwise.
        None if key.protocol == TCP && !sent => return None,
        None => begin(&key, if sent { direction::OUTBOUND } else { direction::INBOUND }, verdict::BYPASSED)?,
    };
    add(flow, sent, &packet);
    Some(())
}

/// Reads a packet that its local end has sent, or receives. (The key is passed by reference and filled in place: the
/// stack of a kernel program has 512 bytes.)
#[inline(always)]
pub fn read(ctx: &TcContext, sent: bool, key: &mut PacketKey) -> Option<Packet> {
    let skb = ctx.skb.skb;
    // SAFETY: context fields.
    let (ethertype, segments, len) = unsafe {
        (
            read_volatile(&raw const (*skb).protocol),
            read_volatile(&raw const (*skb).gso_segs),
            read_volatile(&raw const (*skb).len),
        )
    };
    let ethertype = u16::from_be(ethertype as u16);
    let ip = match ethertype {
        ETH_P_IP => ipv4(ctx, len, sent, key)?,
        ETH_P_IPV6 => ipv6(ctx, len, sent, key)?,
        _ => return None,
    };
    if ip.first && matches!(key.protocol, TCP | UDP | SCTP) {
        let [source, destination] = load::<[u16; 2]>(ctx, ip.header).unwrap_or_default().map(u16::from_be);
        (key.local.port, key.remote.port) = if sent { (source, destination) } else { (destination, source) };
    }
    // A merged packet stands for several, each with headers of its own.
    let packets = if segments > 1 { u64::from(segments) } else { 1 };
    let transport = match key.protocol {
        TCP => TCP_HEADER,
        UDP => UDP_HEADER,
        _ => 0,
    };
    let bytes = ip.total + (packets - 1) * (u64::from(ip.header) + transport);
    Some(Packet { v6: ethertype == ETH_P_IPV6, header: ip.header, bytes, packets, first: ip.first })
}

/// The flow begins: its record. `None` when the table is full.
#[inline(always)]
pub fn begin(key: &PacketKey, direction: u8, verdict: u8) -> Option<*mut FlowRecord> {
    // SAFETY: the helper takes nothing.
    let now = unsafe { bpf_ktime_get_ns() };
    let record = FlowRecord {
        netns: NETNS_COOKIE.load(),
        start_ns: now,
        local: key.local,
        remote: key.remote,
        direction,
        verdict,
        protocol: key.protocol,
        ..FlowRecord::default()
    };
    // Another CPU may have been first: its record counts on.
    const BPF_NOEXIST: u64 = 1;
    let _ = POD_PACKET_FLOWS.insert(key, &record, BPF_NOEXIST);
    let flow = POD_PACKET_FLOWS.get_ptr_mut(key);
    if flow.is_none() {
        count(counter::FLOWS_FULL);
    }
    flow
}

/// Counts a packet.
#[inline(always)]
pub fn add(flow: *mut FlowRecord, sent: bool, packet: &Packet) {
    let (bytes, packets) = (packet.bytes, packet.packets);
    // SAFETY: an entry of the map, freed after the programs that hold it have ended; other CPUs add at the same time.
    unsafe {
        (*flow).last_seen_ns = bpf_ktime_get_ns();
        if sent {
            xadd(&raw mut (*flow).tx_bytes, bytes);
            xadd(&raw mut (*flow).tx_packets, packets);
        } else {
            xadd(&raw mut (*flow).rx_bytes, bytes);
            xadd(&raw mut (*flow).rx_packets, packets);
        }
    }
}

/// The socket that has these ends (`src` is the other side's): its state and what is known of it. A listener where there is
/// none but one.
#[inline(always)]
pub fn socket(ctx: &TcContext, tuple: &Tuple, netns: u64) -> Option<(u8, u8)> {
    // SAFETY: integers alone.
    let mut ends: bpf_sock_tuple = unsafe { zeroed() };
    let (sport, dport) = (tuple.src.port.to_be(), tuple.dst.port.to_be());
    let is_v4 = if let (Some(src), Some(dst)) = (tuple.src.as_v4(), tuple.dst.as_v4()) {
        // SAFETY: writing a field of a union of integers.
        let v4 = unsafe { &mut ends.__bindgen_anon_1.ipv4 };
        (v4.saddr, v4.daddr) = (u32::from_ne_bytes(src), u32::from_ne_bytes(dst));
        (v4.sport, v4.dport) = (sport, dport);
        true
    } else {
        // SAFETY: as above.
        let v6 = unsafe { &mut ends.__bindgen_anon_1.ipv6 };
        (v6.saddr, v6.daddr) = (split(tuple.src.ip), split(tuple.dst.ip));
        (v6.sport, v6.dport) = (sport, dport);
        false
    };
    // SAFETY: the helper reads as many bytes; what it returns is given back, which the verifier checks.
    unsafe {
        let sk = if is_v4 {
            bpf_skc_lookup_tcp(ctx.as_ptr(), &raw mut ends, 12, netns, 0)
        } else {
            bpf_skc_lookup_tcp(ctx.as_ptr(), &raw mut ends, 36, netns, 0)
        };
        if sk.is_null() {
            return None;
        }
        let state = read_volatile(&raw const (*sk).state) as u8;
        let mut known = kind::NONE;
        // What is not yet or no longer a whole socket has no storage.
        let whole = bpf_sk_fullsock(sk);
        if !whole.is_null()
            && let Some(facts) = SOCKETS.get(whole)
        {
            known = facts.kind;
        }
        bpf_sk_release(sk.cast());
        Some((state, known))
    }
}

#[inline(always)]
fn ipv4(ctx: &TcContext, len: u32, sent: bool, key: &mut PacketKey) -> Option<Ip> {
    const MAPPED: u16 = 0xffff;
    let start: [u8; 10] = load(ctx, 0)?;
    let [source, destination]: [[u8; 4]; 2] = load(ctx, 12)?;
    let (local, remote) = if sent { (source, destination) } else { (destination, source) };
    key.local.ip[10..12].copy_from_slice(&MAPPED.to_ne_bytes());
    key.local.ip[12..].copy_from_slice(&local);
    key.remote.ip[10..12].copy_from_slice(&MAPPED.to_ne_bytes());
    key.remote.ip[12..].copy_from_slice(&remote);
    key.protocol = start[9];
    let total = u16::from_be_bytes([start[2], start[3]]);
    Some(Ip {
        header: u32::from(start[0] & 0xf) * 4,
        // A merged packet above 64 KiB says 0.
        total: if total == 0 { u64::from(len) } else { u64::from(total) },
        first: u16::from_be_bytes([start[6], start[7]]) & 0x1fff == 0,
    })
}

/// Extension headers are not followed: such a packet is counted under the first one's number, without ports.
#[inline(always)]
fn ipv6(ctx: &TcContext, len: u32, sent: bool, key: &mut PacketKey) -> Option<Ip> {
    let start: [u8; 8] = load(ctx, 0)?;
    let (source, destination) = if sent { (8, 24) } else { (24, 8) };
    load_into(ctx, source, &mut key.local.ip)?;
    load_into(ctx, destination, &mut key.remote.ip)?;
    key.protocol = start[6];
    let payload = u16::from_be_bytes([start[4], start[5]]);
    Some(Ip {
        header: IPV6_HEADER,
        total: if payload == 0 { u64::from(len) } else { u64::from(payload) + u64::from(IPV6_HEADER) },
        first: true,
    })
}

/// Bytes of the packet from its IP header on, whatever the link layer is. `T` is made of integers alone.
#[inline(always)]
pub fn load<T: Default>(ctx: &TcContext, offset: u32) -> Option<T> {
    let mut to = T::default();
    load_into(ctx, offset, &mut to)?;
    Some(to)
}

#[inline(always)]
fn load_into<T>(ctx: &TcContext, offset: u32, to: &mut T) -> Option<()> {
    let to = (&raw mut *to).cast();
    // SAFETY: the helper writes all of `to` or fails.
    let failed = unsafe {
        bpf_skb_load_bytes_relative(ctx.as_ptr(), offset, to, size_of::<T>() as u32, BPF_HDR_START_NET)
    };
    (failed == 0).then_some(())
}
