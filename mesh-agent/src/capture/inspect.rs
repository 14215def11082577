//! Reading the kernel's maps from outside: flows in batches, and any map of ours as JSON values.
//!
//! Promises to work without the agent (from the pins under `BPF_DIR/maps` alone) and to be right while the kernel
//! goes on writing: an element that stays is read once, one that comes or goes meanwhile may be read or not. Never
//! writes to a map. The system calls are in `kernel.rs`, BTF in `btf.rs`. Tested in `btf.rs` and, as root, in
//! `tests/tests/map_inspection.rs`.

mod btf;
mod kernel;

use std::{collections::HashMap, io, path::Path};

use mesh_common::flow::FlowRecord;
use serde::Serialize;
use serde_json::{Value, json};

use super::instance::plain_name;

pub use self::{
    btf::{Btf, Type},
    kernel::{Entries, Info, Map},
};

/// Why a map could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pins cannot be listed or opened.
    #[error("{path}: {error}; {}", pin_hint(.error))]
    Pin {
        /// The directory or pin.
        path: String,
        /// What the kernel says.
        error: io::Error,
    },
    /// There are maps, and none of this name.
    #[error("no such map: {name}; `meshctl maps list` shows those there are")]
    NoSuchMap {
        /// The name asked for.
        name: String,
    },
    /// The map is there and cannot be read.
    #[error("map {name} cannot be read: {error}")]
    Read {
        /// Name of the map.
        name: String,
        /// What the kernel says.
        error: io::Error,
    },
    /// User space cannot list the elements of such a map.
    #[error("map {name} is of type {kind}, whose elements the kernel does not list")]
    NotListable {
        /// Name of the map.
        name: String,
        /// Its type.
        kind: String,
    },
}

fn pin_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "no agent has pinned its maps there: check --bpf-dir, and that this is the host's mount of bpffs"
        }
        io::ErrorKind::PermissionDenied => {
            "reading BPF maps needs root, or CAP_BPF and access to the directory"
        }
        _ => "check --bpf-dir",
    }
}

/// One line of [`list`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Name of the pin.
    pub name: String,
    /// The kernel's id of the map.
    pub id: u32,
    /// Type, in the words of bpftool.
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value (for one CPU, where there is one for each).
    pub value_size: u32,
    /// Capacity.
    pub max_entries: u32,
    /// Elements now; absent where the kernel does not list them. For a map of maps, how many maps.
    pub count: Option<usize>,
}

/// A map with its elements.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Dump {
    /// Name of the pin, or of an inner map.
    pub name: String,
    /// The kernel's id of the map.
    pub id: u32,
    /// Type, in the words of bpftool.
    #[serde(rename = "type")]
    pub kind: String,
    /// The elements, in the kernel's order.
    pub entries: Vec<Element>,
}

/// One element of a map.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Element {
    /// Its key, by BTF where the map has it, else a number or hexadecimal.
    pub key: Value,
    /// Its value: by BTF, else hexadecimal; a [`Dump`] in a map of maps; an array where each CPU has its own.
    pub value: Value,
}

fn open(bpf_dir: &Path, name: &str) -> Result<Map, Error> {
    let maps = bpf_dir.join("maps");
    let path = maps.join(name);
    Map::open_pinned(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound if maps.is_dir() => Error::NoSuchMap { name: name.to_owned() },
        _ => Error::Pin { path: path.display().to_string(), error },
    })
}

/// All maps pinned under `bpf_dir/maps`, by name.
pub fn list(bpf_dir: &Path) -> Result<Vec<Summary>, Error> {
    let dir = bpf_dir.join("maps");
    let failed = |error| Error::Pin { path: dir.display().to_string(), error };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.file_type().map_err(failed)?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    names.into_iter().map(|name| summary(&open(bpf_dir, &name)?, name)).collect()
}

fn summary(map: &Map, name: String) -> Result<Summary, Error> {
    let info = map.info();
    let count = if map.is_listable() {
        Some(map.entries().map_err(|error| Error::Read { name: name.clone(), error })?.len())
    } else {
        None
    };
    Ok(Summary {
        name,
        id: info.id,
        kind: map.kind(),
        key_size: info.key_size,
        value_size: info.value_size,
        max_entries: info.max_entries,
        count,
    })
}

/// The map pinned as `name`, with all its elements; the maps inside a map of maps too.
pub fn dump(bpf_dir: &Path, name: &str) -> Result<Dump, Error> {
    dump_map(&open(bpf_dir, name)?, name)
}

/// The same for a map that is open already; `name` is for people.
pub fn dump_map(map: &Map, name: &str) -> Result<Dump, Error> {
    dump_with(map, name, &mut HashMap::new())
}

fn dump_with(map: &Map, name: &str, loaded: &mut HashMap<u32, Option<Btf>>) -> Result<Dump, Error> {
    if !map.is_listable() {
        return Err(Error::NotListable { name: name.to_owned(), kind: map.kind() });
    }
    let info = *map.info();
    let read = |error| Error::Read { name: name.to_owned(), error };
    let raw = map.entries().map_err(read)?;
    // The maps of many pods share one BTF object; a map whose BTF cannot be loaded is shown as hexadecimal.
    let btf = loaded.entry(info.btf_id).or_insert_with(|| kernel::load_btf(info.btf_id)).as_ref();
    let key_type = btf.and_then(|btf| btf.resolve(info.btf_key_type_id));
    let value_type = btf.and_then(|btf| btf.resolve(info.btf_value_type_id));
    let mut entries = Vec::with_capacity(raw.len());
    for (key, value) in raw.iter() {
        let key = btf::decode_or_raw(key_type.as_ref(), key);
        let value = match map.inner(value) {
            None => decode_value(map, value_type.as_ref(), value),
            Some(inner) => match inner {
                Ok(inner) => {
                    let name = inner.name();
                    json!(dump_with(&inner, plain_name(&name), loaded)?)
                }
                // Gone since: its pod was removed while we read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(read(error)),
            },
        };
        entries.push(Element { key, value });
    }
    Ok(Dump { name: name.to_owned(), id: info.id, kind: map.kind(), entries })
}

fn decode_value(map: &Map, value_type: Option<&Type>, value: &[u8]) -> Value {
    match map.per_cpu_size() {
        None => btf::decode_or_raw(value_type, value),
        Some(size) => {
            let size_used = map.info().value_size as usize;
            value.chunks_exact(size).map(|one| btf::decode_or_raw(value_type, &one[..size_used])).collect()
        }
    }
}

/// The flows of all pods, from the maps pinned as `FLOWS` and (where there is one) `PACKET_FLOWS`.
pub fn read_flows(bpf_dir: &Path) -> Result<Vec<FlowRecord>, Error> {
    let mut flows = read_flows_of(&open(bpf_dir, "FLOWS")?)?;
    match open(bpf_dir, "PACKET_FLOWS") {
        Ok(map) => flows.append(&mut read_flows_of(&map)?),
        Err(Error::NoSuchMap { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(flows)
}

/// The records in the maps inside this map of maps.
pub fn read_flows_of(outer: &Map) -> Result<Vec<FlowRecord>, Error> {
    let read = |map: &Map, error| Error::Read { name: plain_name(&map.name()).to_owned(), error };
    let mut flows = Vec::new();
    for (_, id) in outer.entries().map_err(|error| read(outer, error))?.iter() {
        let inner = match outer.inner(id) {
            Some(Ok(inner)) => inner,
            // Gone since: its pod was removed while we read.
            Some(Err(error)) if error.kind() == io::ErrorKind::NotFound => continue,
            Some(Err(error)) => return Err(read(outer, error)),
            None => {
                return Err(Error::NotListable {
                    name: plain_name(&outer.name()).to_owned(),
                    kind: outer.kind(),
                });
            }
        };
        let entries = inner.entries().map_err(|error| read(&inner, error))?;
        flows.extend(entries.iter().map(|(_, value)| kernel::flow_record(value)));
    }
    Ok(flows)
}
