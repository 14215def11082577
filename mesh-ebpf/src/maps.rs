//! The maps; names, layouts and capacities are `mesh_common::maps`'s. The agent that loads them puts the mark of its
//! instance in place of the zeros of each name.

use aya_ebpf::{
    Global,
    bindings::bpf_map_type::BPF_MAP_TYPE_SK_STORAGE,
    btf_maps::{HashMap, HashOfMaps, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SockMap, lpm_trie::Key},
    helpers::generated::{bpf_map_lookup_elem, bpf_sk_release, bpf_sk_storage_get},
    macros::btf_map,
};
use mesh_common::{
    addr::Addr,
    decide,
    flow::{FlowRecord, direction},
    maps::{
        ADMITTED_CAPACITY, Admitted, CLIENTS_CAPACITY, CLOSED_BYTES, CidrKey, CidrOf, DIRECT_CAPACITY,
        DIRECT_SLOTS_CAPACITY, DirectKey, DirectService, ENDPOINTS_CAPACITY, EXCLUDED_CIDRS_CAPACITY,
        Endpoint, Entry, FLOWS_CAPACITY, GUESTS_CAPACITY, HELD_CAPACITY, HeldKey, INNER_LINKS_CAPACITY,
        NO_PREALLOC, ORIGINAL_DST_CAPACITY, PACKET_FLOWS_CAPACITY, PODS_CAPACITY, PROBE_PORTS_CAPACITY,
        PROBES_CAPACITY, PacketKey, PodAddrs, PodPolicy, Probe, ProbePort, STORAGE_FLAGS, Slot, SlotKey,
        SocketFacts, Tuple, counter, listener, policy,
    },
};

type OriginalDsts = HashMap<Tuple, Entry, ORIGINAL_DST_CAPACITY, NO_PREALLOC>;
type Clients = HashMap<Tuple, Entry, CLIENTS_CAPACITY, NO_PREALLOC>;
type Flows = HashMap<u64, FlowRecord, FLOWS_CAPACITY, NO_PREALLOC>;
pub type Listeners = SockMap<{ listener::COUNT }>;
type Admissions = HashMap<Tuple, Admitted, ADMITTED_CAPACITY, NO_PREALLOC>;
type Probes = HashMap<Tuple, Probe, PROBES_CAPACITY, NO_PREALLOC>;
type PacketFlows = HashMap<PacketKey, FlowRecord, PACKET_FLOWS_CAPACITY, NO_PREALLOC>;

#[btf_map(name = "m000000_pods")]
pub static PODS: HashMap<u64, PodAddrs, PODS_CAPACITY, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "m000000_sockets")]
pub static SOCKETS: SocketStorage = SocketStorage::new();
#[btf_map(name = "m000000_origdst")]
pub static ORIGINAL_DST: HashOfMaps<u64, OriginalDsts, PODS_CAPACITY> = HashOfMaps::new();
#[btf_map(name = "m000000_clients")]
pub static CLIENTS: HashOfMaps<u64, Clients, PODS_CAPACITY> = HashOfMaps::new();
#[btf_map(name = "m000000_flows")]
pub static FLOWS: HashOfMaps<u64, Flows, PODS_CAPACITY> = HashOfMaps::new();
/// Only listed here, for who reads it by the pod: `tc.rs` writes into its own pod's map.
#[btf_map(name = "m000000_pktflow")]
pub static PACKET_FLOWS: HashOfMaps<u64, PacketFlows, PODS_CAPACITY> = HashOfMaps::new();
#[btf_map(name = "m000000_closed")]
pub static CLOSED: RingBuf<FlowRecord, CLOSED_BYTES> = RingBuf::new();
#[btf_map(name = "m000000_counter")]
pub static COUNTERS: PerCpuArray<u64, { counter::COUNT }> = PerCpuArray::new();
#[btf_map(name = "m000000_policy")]
pub static POLICIES: HashMap<u64, PodPolicy, PODS_CAPACITY, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "m000000_cidrs")]
static EXCLUDED_CIDRS: LpmTrie<CidrOf, u8, EXCLUDED_CIDRS_CAPACITY> = LpmTrie::new();
#[btf_map(name = "m000000_steer")]
static STEERING: HashOfMaps<u64, Listeners, PODS_CAPACITY> = HashOfMaps::new();
#[btf_map(name = "m000000_direct")]
pub static DIRECT: HashMap<DirectKey, DirectService, DIRECT_CAPACITY, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "m000000_slots")]
pub static DIRECT_SLOTS: HashMap<SlotKey, Slot, DIRECT_SLOTS_CAPACITY, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "m000000_endpts")]
pub static ENDPOINTS: HashMap<u32, Endpoint, ENDPOINTS_CAPACITY, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "m000000_admit")]
pub static ADMITTED: HashOfMaps<u64, Admissions, PODS_CAPACITY> = HashOfMaps::new();
#[btf_map(name = "m000000_held")]
pub static HELD: HashMap<HeldKey, u64, HELD_CAPACITY, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "m000000_prbport")]
pub static PROBE_PORTS: HashMap<Addr, ProbePort, PROBE_PORTS_CAPACITY, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "m000000_probes")]
pub static PROBES: HashOfMaps<u64, Probes, PODS_CAPACITY> = HashOfMaps::new();

// One of each per pod: the object is loaded once more for it.
#[btf_map(name = "m000000_pod_dst")]
pub static POD_ORIGINAL_DST: OriginalDsts = HashMap::new();
#[btf_map(name = "m000000_pod_cli")]
pub static POD_CLIENTS: Clients = HashMap::new();
#[btf_map(name = "m000000_pod_flw")]
pub static POD_FLOWS: Flows = HashMap::new();
#[btf_map(name = "m000000_pod_pkt")]
pub static POD_PACKET_FLOWS: PacketFlows = HashMap::new();
#[btf_map(name = "m000000_pod_adm")]
pub static POD_ADMITTED: Admissions = HashMap::new();
#[btf_map(name = "m000000_pod_prb")]
pub static POD_PROBES: Probes = HashMap::new();
#[btf_map(name = "m000000_listen")]
pub static LISTENERS: Listeners = SockMap::new();

#[btf_map(name = "m000000_inner")]
pub static INNER_LINKS: HashMap<u32, u32, INNER_LINKS_CAPACITY, NO_PREALLOC> = HashMap::new();
#[btf_map(name = "m000000_guests")]
pub static POD_GUESTS: LruHashMap<Tuple, u64, GUESTS_CAPACITY> = LruHashMap::new();

/// Network namespace cookie of the pod a program instance is for; of the node itself, for the node's programs.
///
/// The agent always sets it. A value that nothing else has keeps the compiler from letting other constants share its place,
/// which would change with it.
#[unsafe(no_mangle)]
pub static NETNS_COOKIE: Global<u64> = Global::new(0x6d65_7368_2063_6f6f);

/// The number of that pod's network namespace in the agent's, for its guard. Always set, as the cookie.
#[unsafe(no_mangle)]
pub static NETNS_NUMBER: Global<u64> = Global::new(0x6d65_7368_206e_756d);

/// Socket storage that sockets accepted by a listener inherit. (The library's own type has no flag for that.)
#[repr(C)]
pub struct SocketStorage {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const SocketFacts,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; STORAGE_FLAGS],
}

// SAFETY: the pointers only describe the map to the loader and are never read.
unsafe impl Sync for SocketStorage {}

impl SocketStorage {
    const fn new() -> Self {
        use core::ptr::null;
        Self { r#type: null(), key: null(), value: null(), max_entries: null(), map_flags: null() }
    }

    /// The facts of this socket, if there are any. `sk` is a non-null socket of the running hook, which holds the
    /// socket's lock, so that nothing else in the kernel changes them meanwhile.
    #[inline(always)]
    pub fn get<'a, T>(&self, sk: *mut T) -> Option<&'a mut SocketFacts> {
        // SAFETY: the verifier checks that `sk` is a socket; the helper returns null or a value of this map, which
        // lives as long as the hook runs.
        unsafe { storage(self, sk, core::ptr::null_mut(), 0).as_mut() }
    }

    /// The facts of this socket, which begin as these if there are none. `None` when there is no memory.
    #[inline(always)]
    pub fn get_or<'a, T>(&self, sk: *mut T, facts: &mut SocketFacts) -> Option<&'a mut SocketFacts> {
        const CREATE: u64 = aya_ebpf::bindings::BPF_SK_STORAGE_GET_F_CREATE as u64;
        // SAFETY: as in `get`.
        unsafe { storage(self, sk, facts, CREATE).as_mut() }
    }
}

#[inline(always)]
unsafe fn storage<T>(
    map: &SocketStorage,
    sk: *mut T,
    value: *mut SocketFacts,
    flags: u64,
) -> *mut SocketFacts {
    // SAFETY: the loader puts the map's descriptor where `map` points; the verifier checks the rest.
    unsafe { bpf_sk_storage_get((&raw const *map).cast_mut().cast(), sk.cast(), value.cast(), flags) }.cast()
}

/// Whether a pod with these bits of [`policy`] has its apps dial this address past the agent.
#[inline(always)]
pub fn excludes_outbound(flags: u8, netns: u64, dst: &Addr) -> bool {
    if flags & policy::OUTBOUND == 0 {
        return false;
    }
    // SAFETY: an entry is replaced as a whole and freed after the programs that hold it have ended.
    let by_port = flags & policy::OUTBOUND_PORTS != 0
        && unsafe { POLICIES.get(&netns) }.is_some_and(|pod| decide::holds(&pod.outbound, dst.port));
    by_port || (flags & policy::OUTBOUND_CIDRS != 0 && in_cidrs(direction::OUTBOUND, netns, dst))
}

/// Whether a pod with this policy takes connections from `remote` to this port past the agent.
#[inline(always)]
pub fn excludes_inbound(pod: &PodPolicy, netns: u64, port: u16, remote: &Addr) -> bool {
    (pod.flags & policy::INBOUND_PORTS != 0 && decide::holds(&pod.inbound, port))
        || (pod.flags & policy::INBOUND_CIDRS != 0 && in_cidrs(direction::INBOUND, netns, remote))
}

#[inline(always)]
fn in_cidrs(direction: u8, netns: u64, addr: &Addr) -> bool {
    let family = if addr.as_v4().is_some() { CidrOf::V4 } else { CidrOf::V6 };
    let key = CidrKey {
        prefix_len: size_of::<CidrOf>() as u32 * 8,
        of: CidrOf { direction, family, pad: [0; 2], netns: netns.to_ne_bytes(), ip: addr.ip },
    };
    // SAFETY: the library's key is the same two fields without alignment.
    EXCLUDED_CIDRS.get(unsafe { &*(&raw const key).cast::<Key<CidrOf>>() }).is_some()
}

/// Whether the agent listens in this pod, or in none of the kind: its listener leaves the map when it closes, whoever
/// closes it.
#[inline(always)]
pub fn agent_is_gone(netns: u64) -> bool {
    // SAFETY: inner maps are freed after the programs that hold them have ended.
    unsafe { STEERING.get(&netns) }.is_some_and(listener_is_gone)
}

/// Whether the agent's outbound listener has left this map of a pod's.
#[inline(always)]
pub fn listener_is_gone(listeners: &Listeners) -> bool {
    let index = listener::OUTBOUND;
    // SAFETY: the verifier knows that what is found in a map of sockets is a socket, and has it given back.
    unsafe {
        let sk = bpf_map_lookup_elem((&raw const *listeners).cast_mut().cast(), (&raw const index).cast());
        if sk.is_null() {
            return true;
        }
        bpf_sk_release(sk);
    }
    false
}

/// Adds one to a counter of [`counter`].
#[inline(always)]
pub fn count(index: u32) {
    if let Some(value) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: an entry of this CPU, and programs are not preempted by another that counts here.
        unsafe { *value += 1 };
    }
}

/// Atomic addition: the target's atomics have no compare-and-swap, so that Rust's own type is missing.
#[inline(always)]
pub unsafe fn xadd(to: *mut u64, value: u64) {
    // SAFETY: `to` is a field of a map value, aligned to eight bytes.
    unsafe {
        core::arch::asm!("lock *(u64 *)({to} + 0) += {value}", to = in(reg) to, value = in(reg) value, options(nostack));
    }
}

/// Atomic exchange, after which everything is read as it is then.
#[inline(always)]
pub unsafe fn xchg(to: *mut u64, value: u64) {
    // SAFETY: as in `xadd`.
    unsafe {
        core::arch::asm!("{value} = xchg_64({to} + 0, {value})", to = in(reg) to, value = inout(reg) value => _, options(nostack));
    }
}

/// The four words in which the kernel gives an IPv6 address, as its 16 bytes.
#[inline(always)]
pub const fn join(words: [u32; 4]) -> [u8; 16] {
    // SAFETY: both are 16 bytes of integers.
    unsafe { core::mem::transmute(words) }
}

/// The 16 bytes of an IPv6 address as four words.
#[inline(always)]
pub const fn split(ip: [u8; 16]) -> [u32; 4] {
    // SAFETY: both are 16 bytes of integers.
    unsafe { core::mem::transmute(ip) }
}
