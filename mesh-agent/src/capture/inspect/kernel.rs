//! The system calls of inspection, through libbpf: opening maps, reading them in batches, loading their BTF.
//!
//! Promises safe functions over `unsafe` calls: every buffer is as large as the kernel was told. Never keeps a
//! pointer past a call. Tested as root in `tests/tests/map_inspection.rs`.
#![expect(unsafe_code, reason = "libbpf is C; each call states why it is sound")]

use std::{
    collections::HashSet,
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use libbpf_sys as sys;
use mesh_common::flow::FlowRecord;
use nix::libc;

use super::btf::Btf;

/// Elements asked for at once; 100,000 small elements then take 25 calls.
const BATCH: usize = 4096;
/// Bytes asked for at once, where elements are large.
const BATCH_BYTES: usize = 4 << 20;
/// `ENOTSUPP`, which the kernel returns for an operation that a map type lacks and libc has no name for.
const ENOTSUPP: i32 = 524;
/// Times a batch may be interrupted before it is an error.
const INTERRUPTIONS: u32 = 100;

/// What the kernel says of a map.
#[derive(Debug, Clone, Copy)]
pub struct Info {
    /// A `BPF_MAP_TYPE_…` number.
    pub kind: u32,
    /// The kernel's id.
    pub id: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value (for one CPU, where there is one for each).
    pub value_size: u32,
    /// Capacity.
    pub max_entries: u32,
    /// Id of the BTF object, 0 when the map has none.
    pub btf_id: u32,
    /// Type of the key in it.
    pub btf_key_type_id: u32,
    /// Type of the value in it.
    pub btf_value_type_id: u32,
    name: [u8; 16],
}

/// A map, open for reading.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    info: Info,
}

/// Elements as bytes.
#[derive(Debug, Default)]
pub struct Entries {
    key_size: usize,
    value_size: usize,
    keys: Vec<u8>,
    values: Vec<u8>,
}

impl Entries {
    /// How many elements.
    pub fn len(&self) -> usize {
        self.values.len() / self.value_size.max(1)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Key and value of each.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.keys.chunks_exact(self.key_size.max(1)).zip(self.values.chunks_exact(self.value_size.max(1)))
    }
}

/// libbpf returns the negative error number.
fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}

fn owned(result: i32) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the call that returned this descriptor has just made it, and nothing else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Map {
    /// The map pinned at this path.
    pub fn open_pinned(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let opts = sys::bpf_obj_get_opts {
            sz: size_of::<sys::bpf_obj_get_opts>() as sys::size_t,
            file_flags: sys::BPF_F_RDONLY,
            path_fd: 0,
        };
        // SAFETY: the path ends with NUL and the options state their size; both outlive the call.
        let fd = owned(unsafe { sys::bpf_obj_get_opts(path.as_ptr(), &raw const opts) })?;
        Self::from_fd(fd)
    }

    /// The map with this id. `NotFound` when there is none (any more).
    pub fn open_id(id: u32) -> io::Result<Self> {
        let opts = sys::bpf_get_fd_by_id_opts {
            sz: size_of::<sys::bpf_get_fd_by_id_opts>() as sys::size_t,
            open_flags: sys::BPF_F_RDONLY,
            token_fd: 0,
        };
        // SAFETY: the options state their size and outlive the call.
        let fd = owned(unsafe { sys::bpf_map_get_fd_by_id_opts(id, &raw const opts) })?;
        Self::from_fd(fd)
    }

    /// A map that is open already. An `Err` when the descriptor is not a map's.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let mut raw = sys::bpf_map_info::default();
        let mut len = size_of::<sys::bpf_map_info>() as u32;
        // SAFETY: `raw` is `len` bytes of plain data that the kernel fills, and outlives the call.
        check(unsafe { sys::bpf_map_get_info_by_fd(fd.as_raw_fd(), &raw mut raw, &raw mut len) })?;
        let info = Info {
            kind: raw.type_,
            id: raw.id,
            key_size: raw.key_size,
            value_size: raw.value_size,
            max_entries: raw.max_entries,
            btf_id: raw.btf_id,
            btf_key_type_id: raw.btf_key_type_id,
            btf_value_type_id: raw.btf_value_type_id,
            name: raw.name.map(i8::cast_unsigned),
        };
        Ok(Self { fd, info })
    }

    /// What the kernel says of it.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// The kernel's name of it, at most 15 characters.
    pub fn name(&self) -> String {
        let name = CStr::from_bytes_until_nul(&self.info.name);
        name.map_or_else(|_| String::new(), |name| name.to_string_lossy().into_owned())
    }

    /// Its type in the words of bpftool, else the number.
    pub fn kind(&self) -> String {
        // SAFETY: libbpf returns NULL or a string constant.
        let name = unsafe {
            let name = sys::libbpf_bpf_map_type_str(self.info.kind);
            if name.is_null() { None } else { Some(CStr::from_ptr(name)) }
        };
        name.map_or_else(|| self.info.kind.to_string(), |name| name.to_string_lossy().into_owned())
    }

    /// Whether user space can list its elements.
    pub fn is_listable(&self) -> bool {
        matches!(
            self.info.kind,
            sys::BPF_MAP_TYPE_HASH
                | sys::BPF_MAP_TYPE_ARRAY
                | sys::BPF_MAP_TYPE_LRU_HASH
                | sys::BPF_MAP_TYPE_LPM_TRIE
                | sys::BPF_MAP_TYPE_ARRAY_OF_MAPS
                | sys::BPF_MAP_TYPE_HASH_OF_MAPS
        ) || self.is_per_cpu()
    }

    fn is_per_cpu(&self) -> bool {
        matches!(
            self.info.kind,
            sys::BPF_MAP_TYPE_PERCPU_HASH
                | sys::BPF_MAP_TYPE_PERCPU_ARRAY
                | sys::BPF_MAP_TYPE_LRU_PERCPU_HASH
                | sys::BPF_MAP_TYPE_PERCPU_CGROUP_STORAGE
        )
    }

    /// Bytes from one CPU's value to the next, where each CPU has its own.
    pub fn per_cpu_size(&self) -> Option<usize> {
        self.is_per_cpu().then(|| (self.info.value_size as usize).next_multiple_of(8))
    }

    /// In a map of maps, opens the map that this value names. `None` in any other map.
    pub fn inner(&self, value: &[u8]) -> Option<io::Result<Self>> {
        match self.info.kind {
            sys::BPF_MAP_TYPE_ARRAY_OF_MAPS | sys::BPF_MAP_TYPE_HASH_OF_MAPS => {
                let id = value.first_chunk().copied().map_or(0, u32::from_ne_bytes);
                Some(Self::open_id(id))
            }
            _ => None,
        }
    }

    /// Bytes of one element's value as the kernel hands it out.
    fn slot(&self) -> io::Result<usize> {
        let Some(size) = self.per_cpu_size() else { return Ok(self.info.value_size as usize) };
        // SAFETY: takes nothing and returns a number.
        let cpus = check(unsafe { sys::libbpf_num_possible_cpus() })?;
        Ok(size * cpus as usize)
    }

    /// All elements. Elements that come or go meanwhile may be in it or not; one that stays is in it once.
    pub fn entries(&self) -> io::Result<Entries> {
        let (key_size, value_size) = (self.info.key_size as usize, self.slot()?);
        let mut all = Entries { key_size, value_size, ..Entries::default() };
        match self.read_in_batches(&mut all) {
            Err(error)
                if all.is_empty()
                    && matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP)) =>
            {
                self.read_one_by_one(&mut all)?;
            }
            other => other?,
        }
        Ok(all)
    }

    fn read_in_batches(&self, all: &mut Entries) -> io::Result<()> {
        let largest = (self.info.max_entries as usize).max(1);
        let fitting = BATCH_BYTES / (all.key_size + all.value_size).max(1);
        let mut size = fitting.clamp(1, BATCH).min(largest);
        // The place in the map: a bucket's number in hashes, a key in others.
        let token_size = all.key_size.max(8);
        let (mut place, mut next) = (vec![0_u8; token_size], vec![0_u8; token_size]);
        let (mut first, mut interrupted) = (true, 0);
        loop {
            let mut batch = Batch::new(size, all);
            let from = if first { None } else { Some(&mut place) };
            match batch.read(&self.fd, from, &mut next) {
                Ok(()) => {
                    batch.append_to(all);
                    std::mem::swap(&mut place, &mut next);
                    first = false;
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENOENT) => {
                        batch.append_to(all);
                        return Ok(());
                    }
                    // One bucket holds more than a batch.
                    Some(libc::ENOSPC) if size < largest.saturating_mul(2) => size *= 2,
                    Some(libc::EINTR | libc::EAGAIN) if interrupted < INTERRUPTIONS => interrupted += 1,
                    _ => return Err(error),
                },
            }
        }
    }

    fn read_one_by_one(&self, all: &mut Entries) -> io::Result<()> {
        let mut seen = HashSet::new();
        let mut key: Option<Vec<u8>> = None;
        // A key deleted meanwhile makes the kernel start again, so keys may come twice, but not for ever.
        for _ in 0..(self.info.max_entries as usize).saturating_mul(4).saturating_add(16) {
            let mut next = vec![0_u8; all.key_size];
            let previous = key.as_ref().map_or(ptr::null(), |key| key.as_ptr().cast());
            // SAFETY: both keys are `key_size` bytes (or the first NULL) and outlive the call.
            let result =
                unsafe { sys::bpf_map_get_next_key(self.fd.as_raw_fd(), previous, next.as_mut_ptr().cast()) };
            match check(result) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
                Err(error) => return Err(error),
            }
            if seen.insert(next.clone()) {
                self.read_one(&next, all)?;
            }
            key = Some(next);
        }
        Ok(())
    }

    fn read_one(&self, key: &[u8], all: &mut Entries) -> io::Result<()> {
        let mut value = vec![0_u8; all.value_size];
        // SAFETY: the key is `key_size` bytes and the value as large as the kernel writes; both outlive the call.
        let result = unsafe {
            sys::bpf_map_lookup_elem(self.fd.as_raw_fd(), key.as_ptr().cast(), value.as_mut_ptr().cast())
        };
        match check(result) {
            Ok(_) => {
                all.keys.extend_from_slice(key);
                all.values.append(&mut value);
                Ok(())
            }
            // Deleted since.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Buffers of one batch.
struct Batch {
    keys: Vec<u8>,
    values: Vec<u8>,
    /// Elements there is room for before the call, elements read after it.
    count: u32,
    room: usize,
}

impl Batch {
    fn new(size: usize, all: &Entries) -> Self {
        Self {
            keys: vec![0; size * all.key_size],
            values: vec![0; size * all.value_size],
            count: size as u32,
            room: size,
        }
    }

    fn read(&mut self, fd: &OwnedFd, place: Option<&mut Vec<u8>>, next: &mut [u8]) -> io::Result<()> {
        let opts = sys::bpf_map_batch_opts {
            sz: size_of::<sys::bpf_map_batch_opts>() as sys::size_t,
            elem_flags: 0,
            flags: 0,
        };
        let place = place.map_or(ptr::null_mut(), |place| place.as_mut_ptr().cast());
        // SAFETY: keys and values have room for `count` elements of the sizes the kernel told, both places for a key
        // or a bucket's number, whichever is larger; all outlive the call.
        let result = unsafe {
            sys::bpf_map_lookup_batch(
                fd.as_raw_fd(),
                place,
                next.as_mut_ptr().cast(),
                self.keys.as_mut_ptr().cast(),
                self.values.as_mut_ptr().cast(),
                &raw mut self.count,
                &raw const opts,
            )
        };
        check(result).map(drop)
    }

    fn append_to(&self, all: &mut Entries) {
        let count = (self.count as usize).min(self.room);
        all.keys.extend_from_slice(&self.keys[..count * all.key_size]);
        all.values.extend_from_slice(&self.values[..count * all.value_size]);
    }
}

/// The BTF object with this id; `None` for id 0 and for what cannot be loaded or understood.
pub(super) fn load_btf(id: u32) -> Option<Btf> {
    if id == 0 {
        return None;
    }
    // SAFETY: takes a number; returns NULL or an object that we own.
    let btf = unsafe { sys::btf__load_from_kernel_by_id(id) };
    if btf.is_null() {
        return None;
    }
    let mut size = 0;
    // SAFETY: `btf` is not NULL; the data belongs to it and is copied before it is freed, which happens once.
    let bytes = unsafe {
        let data = sys::btf__raw_data(btf, &raw mut size).cast::<u8>();
        let bytes = (!data.is_null()).then(|| std::slice::from_raw_parts(data, size as usize).to_vec());
        sys::btf__free(btf);
        bytes
    };
    Btf::parse(&bytes?)
}

/// A record from the bytes of a value. Layouts only grow at their end: what an older agent's record lacks reads as
/// zero, what a newer one has besides is left out.
pub(super) fn flow_record(value: &[u8]) -> FlowRecord {
    let mut bytes = [0_u8; size_of::<FlowRecord>()];
    let known = value.len().min(bytes.len());
    bytes[..known].copy_from_slice(&value[..known]);
    // SAFETY: a record is integers and arrays of them without padding (its size is asserted where it is declared), so
    // any bytes are one; the read does not ask for alignment.
    unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) }
}
