//! Maps are read from outside as they are: every element that stays, once, whatever else changes meanwhile; flows of
//! all pods; any map pretty-printed by its BTF.
//!
//! Needs root (or `CAP_BPF` and `CAP_SYS_ADMIN`). Touches only maps it makes and a bpffs in its own mount namespace.
#![expect(unsafe_code, reason = "maps and BTF are made through libbpf, which is C")]

use std::{
    collections::HashSet,
    ffi::CString,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    ptr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context, Result, ensure};
use libbpf_sys as sys;
use mesh_agent::capture::inspect::{self, Map};
use mesh_common::{addr::Addr, flow::FlowRecord};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use serde_json::json;

/// A map made by a test; gone with its descriptor.
struct Made(OwnedFd);

/// What to make.
#[derive(Clone, Copy)]
struct Shape {
    kind: u32,
    key: u32,
    value: u32,
    max: u32,
}

const fn hash(key: u32, value: u32, max: u32) -> Shape {
    Shape { kind: sys::BPF_MAP_TYPE_HASH, key, value, max }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}

impl Made {
    fn new(name: &str, shape: Shape, change: impl FnOnce(&mut sys::bpf_map_create_opts)) -> Result<Self> {
        let mut opts = sys::bpf_map_create_opts {
            sz: size_of::<sys::bpf_map_create_opts>() as sys::size_t,
            ..Default::default()
        };
        change(&mut opts);
        let name = CString::new(name)?;
        // SAFETY: name and options outlive the call; the descriptor it returns is new and ours.
        let fd = unsafe {
            let fd = sys::bpf_map_create(
                shape.kind,
                name.as_ptr(),
                shape.key,
                shape.value,
                shape.max,
                &raw const opts,
            );
            OwnedFd::from_raw_fd(check(fd).context("making a map: this test needs root")?)
        };
        Ok(Self(fd))
    }

    fn put(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        // SAFETY: the callers' keys and values have the sizes the map was made with.
        let result = unsafe {
            sys::bpf_map_update_elem(self.0.as_raw_fd(), key.as_ptr().cast(), value.as_ptr().cast(), 0)
        };
        check(result).map(drop)
    }

    fn remove(&self, key: &[u8]) -> io::Result<()> {
        // SAFETY: the callers' keys have the size the map was made with.
        check(unsafe { sys::bpf_map_delete_elem(self.0.as_raw_fd(), key.as_ptr().cast()) }).map(drop)
    }

    fn pin(&self, path: &Path) -> Result<()> {
        let path = CString::new(path.to_string_lossy().as_bytes())?;
        // SAFETY: the path outlives the call.
        check(unsafe { sys::bpf_obj_pin(self.0.as_raw_fd(), path.as_ptr()) })?;
        Ok(())
    }

    fn open(&self) -> Result<Map> {
        Ok(Map::from_fd(self.0.try_clone()?)?)
    }
}

fn key_of(entry: &[u8]) -> Result<u64> {
    Ok(u64::from_ne_bytes(entry.try_into()?))
}

#[test]
fn what_stays_is_read_once_while_other_elements_come_and_go() -> Result<()> {
    const STAY: u64 = 20_000;
    let made = Made::new("churn", hash(8, 8, 65_536), |_| ())?;
    for key in 0..STAY {
        made.put(&key.to_ne_bytes(), &(key * 2).to_ne_bytes())?;
    }
    let map = made.open()?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let churn = scope.spawn(|| -> io::Result<()> {
            for round in (STAY..).step_by(500) {
                for key in round..round + 500 {
                    made.put(&key.to_ne_bytes(), &[0; 8])?;
                }
                for key in round..round + 500 {
                    made.remove(&key.to_ne_bytes())?;
                }
                if done.load(Ordering::Relaxed) {
                    break;
                }
            }
            Ok(())
        });
        let read = (0..10).try_for_each(|_| -> Result<()> {
            let entries = map.entries()?;
            let mut seen = HashSet::new();
            for (key, value) in entries.iter() {
                let (key, value) = (key_of(key)?, key_of(value)?);
                if key < STAY {
                    ensure!(value == key * 2, "{key} has {value}");
                    ensure!(seen.insert(key), "{key} came twice");
                }
            }
            ensure!(seen.len() as u64 == STAY, "{} of {STAY} were read", seen.len());
            Ok(())
        });
        done.store(true, Ordering::Relaxed);
        churn.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        read
    })
}

#[test]
fn a_batch_grows_where_a_bucket_holds_more_than_it() -> Result<()> {
    // Values so large that a batch begins with one element: eight in eight buckets almost surely share some.
    let made = Made::new("large", hash(8, 2 << 20, 8), |opts| opts.map_flags = sys::BPF_F_NO_PREALLOC)?;
    for key in 0..8_u64 {
        made.put(&key.to_ne_bytes(), &vec![key as u8; 2 << 20])?;
    }
    let entries = made.open()?.entries()?;
    let mut keys: Vec<_> =
        entries.iter().map(|(key, value)| (key[0], value[0], value[(2 << 20) - 1])).collect();
    keys.sort_unstable();
    assert_eq!(keys, (0..8).map(|key| (key, key, key)).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn every_kind_of_map_of_ours_is_read_or_refused_with_its_type() -> Result<()> {
    let empty = Made::new("empty", hash(8, 8, 16), |_| ())?;
    assert!(empty.open()?.entries()?.is_empty());

    let per_cpu = Shape { kind: sys::BPF_MAP_TYPE_PERCPU_ARRAY, key: 4, value: 8, max: 3 };
    let counters = Made::new("counters", per_cpu, |_| ())?;
    // SAFETY: takes nothing and returns a number.
    let cpus = check(unsafe { sys::libbpf_num_possible_cpus() })? as usize;
    let values: Vec<u8> = (0..cpus as u64).flat_map(u64::to_ne_bytes).collect();
    counters.put(&1_u32.to_ne_bytes(), &values)?;
    let dump = inspect::dump_map(&counters.open()?, "COUNTERS")?;
    assert_eq!(dump.entries.len(), 3);
    assert_eq!(dump.entries[1].value, json!((0..cpus).collect::<Vec<_>>()));

    let trie = Shape { kind: sys::BPF_MAP_TYPE_LPM_TRIE, key: 8, value: 4, max: 64 };
    let trie = Made::new("trie", trie, |opts| opts.map_flags = sys::BPF_F_NO_PREALLOC)?;
    for net in 0..50_u8 {
        trie.put(&[24, 0, 0, 0, 10, 0, net, 0], &[net, 0, 0, 0])?;
    }
    let nets: HashSet<u8> = trie.open()?.entries()?.iter().map(|(key, _)| key[6]).collect();
    assert_eq!(nets.len(), 50);

    let ring = Shape { kind: sys::BPF_MAP_TYPE_RINGBUF, key: 0, value: 0, max: 4096 };
    let ring = Made::new("closed", ring, |_| ())?.open()?;
    let error = inspect::dump_map(&ring, "CLOSED").err().map(|error| error.to_string());
    assert_eq!(
        error.as_deref(),
        Some("map CLOSED is of type ringbuf, whose elements the kernel does not list")
    );
    Ok(())
}

/// Types of a small record in the kernel: (object, id of u64, id of the record).
fn load_btf() -> Result<(*mut sys::btf, u32, u32)> {
    // SAFETY: the object is ours and not NULL; all names are constants that end with NUL.
    unsafe {
        let btf = sys::btf__new_empty();
        ensure!(!btf.is_null(), "libbpf made no BTF");
        let int = |name: &std::ffi::CStr, size| check(sys::btf__add_int(btf, name.as_ptr(), size, 0));
        let (u8_, u16_, u64_) = (int(c"u8", 1)?, int(c"u16", 2)?, int(c"u64", 8)?);
        let bytes = check(sys::btf__add_array(btf, u8_, u8_, 16))?;
        check(sys::btf__add_struct(btf, c"Addr".as_ptr(), 20))?;
        for (name, kind, bit) in [(c"ip", bytes, 0), (c"port", u16_, 128), (c"pad", u16_, 144)] {
            check(sys::btf__add_field(btf, name.as_ptr(), kind, bit, 0))?;
        }
        let addr = sys::btf__type_cnt(btf).cast_signed() - 1;
        check(sys::btf__add_struct(btf, c"Record".as_ptr(), 32))?;
        for (name, kind, bit) in [(c"bytes", u64_, 0), (c"remote", addr, 64)] {
            check(sys::btf__add_field(btf, name.as_ptr(), kind, bit, 0))?;
        }
        let record = sys::btf__type_cnt(btf) - 1;
        check(sys::btf__load_into_kernel(btf))?;
        Ok((btf, u64_.cast_unsigned(), record))
    }
}

#[test]
fn a_map_is_shown_by_its_btf() -> Result<()> {
    let (btf, key, record) = load_btf()?;
    let made = Made::new("records", hash(8, 32, 16), |opts| {
        // SAFETY: the object is not NULL and loaded.
        opts.btf_fd = unsafe { sys::btf__fd(btf) }.cast_unsigned();
        opts.btf_key_type_id = key;
        opts.btf_value_type_id = record;
    });
    // SAFETY: the object is ours, and freed once.
    unsafe { sys::btf__free(btf) };
    let made = made?;
    let mut value = 5_000_000_000_u64.to_ne_bytes().to_vec();
    value.extend([0; 10].iter().chain(&[0xff, 0xff, 10, 244, 0, 7]));
    value.extend(9080_u16.to_ne_bytes());
    value.extend([0; 6]);
    made.put(&42_u64.to_ne_bytes(), &value)?;
    let dump = inspect::dump_map(&made.open()?, "RECORDS")?;
    assert_eq!(
        json!(dump.entries),
        json!([{"key": 42, "value": {"bytes": 5_000_000_000_u64, "remote": {"ip": "10.244.0.7", "port": 9080}}}])
    );
    Ok(())
}

fn flow(netns: u64, socket: u64) -> FlowRecord {
    FlowRecord {
        netns,
        socket,
        tx_bytes: socket * 10,
        local: Addr::v4([10, 244, 0, 1], 40_000),
        protocol: 6,
        ..FlowRecord::default()
    }
}

fn bytes_of(record: &FlowRecord) -> &[u8] {
    // SAFETY: a record is plain integers without padding, alive as long as the slice.
    unsafe { std::slice::from_raw_parts(ptr::from_ref(record).cast(), size_of::<FlowRecord>()) }
}

/// A map of maps with an inner map of this many flows for each pod.
fn outer(name: &str, pods: &[(u64, u64)]) -> Result<Made> {
    let inner = hash(8, size_of::<FlowRecord>() as u32, 1024);
    let template = Made::new("template", inner, |_| ())?;
    let outer = Shape { kind: sys::BPF_MAP_TYPE_HASH_OF_MAPS, key: 8, value: 4, max: 64 };
    let outer = Made::new(name, outer, |opts| opts.inner_map_fd = template.0.as_raw_fd().cast_unsigned())?;
    for (netns, flows) in pods {
        let pod = Made::new("POD_FLOWS", inner, |_| ())?;
        for socket in 1..=*flows {
            pod.put(&socket.to_ne_bytes(), bytes_of(&flow(*netns, socket)))?;
        }
        outer.put(&netns.to_ne_bytes(), &pod.0.as_raw_fd().to_ne_bytes())?;
    }
    Ok(outer)
}

/// A bpffs at `dir` that only this thread sees.
fn private_bpffs(dir: &Path) -> Result<()> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace: this test needs root")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("bpf"), dir, Some("bpf"), MsFlags::empty(), none)?;
    std::fs::create_dir(dir.join("maps"))?;
    Ok(())
}

fn pins_are_read_without_an_agent_here() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let missing = inspect::read_flows(dir.path()).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(missing.contains("maps/FLOWS") && missing.contains("--bpf-dir"), "{missing}");
    private_bpffs(dir.path())?;
    let flows = outer("FLOWS", &[(7, 3), (8, 0), (9, 500)])?;
    flows.pin(&dir.path().join("maps/FLOWS"))?;
    assert_eq!(inspect::read_flows(dir.path())?.len(), 503);
    outer("PACKET_FLOWS", &[(9, 1)])?.pin(&dir.path().join("maps/PACKET_FLOWS"))?;
    let mut read = inspect::read_flows(dir.path())?;
    assert_eq!(read.len(), 504);
    read.sort_by_key(|flow| (flow.netns, flow.socket));
    assert_eq!(read[..3], [flow(7, 1), flow(7, 2), flow(7, 3)]);

    let list = inspect::list(dir.path())?;
    let rows: Vec<_> =
        list.iter().map(|row| (row.name.as_str(), row.kind.as_str(), row.max_entries, row.count)).collect();
    assert_eq!(rows, [("FLOWS", "hash_of_maps", 64, Some(3)), ("PACKET_FLOWS", "hash_of_maps", 64, Some(1))]);

    // A pod that goes takes its map with it; the rest is still read.
    flows.remove(&9_u64.to_ne_bytes())?;
    assert_eq!(inspect::read_flows(dir.path())?.len(), 4);
    let dump = inspect::dump(dir.path(), "FLOWS")?;
    let pod = dump.entries.iter().find(|entry| entry.key == json!(7)).context("pod 7 is missing")?;
    assert_eq!(pod.value["name"], "POD_FLOWS");
    assert_eq!(pod.value["entries"].as_array().map(Vec::len), Some(3));
    nix::mount::umount(dir.path())?;
    Ok(())
}

#[test]
fn pins_are_read_without_an_agent() -> Result<()> {
    // A thread of its own: its mount namespace ends with it.
    thread::spawn(pins_are_read_without_an_agent_here)
        .join()
        .map_err(|panic| anyhow::anyhow!("{}", panic.downcast_ref::<String>().cloned().unwrap_or_default()))?
}
