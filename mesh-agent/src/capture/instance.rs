//! The mark of an agent's instance: what every program and map of one agent carries in its name, so that the kernel tells
//! whose they are when no pin and no process does.
//!
//! Promises that an agent and its successors have one mark, and that two agents on one kernel have two: it is a hash of
//! what both are told, the node's name and the directory of pins. Why in the names: `docs/decisions/009-marks.md`.
//! Tested below, and with the kernel in `tests/tests/no_residue.rs`.

use std::{
    fmt,
    os::unix::ffi::OsStrExt as _,
    path::{self, Path},
};

use memchr::memmem;
use mesh_common::maps::{KERNEL_NAMES, UNMARKED};
use serde::{Serialize, Serializer};

/// What follows the mark in the names of the programs.
pub(super) const PROGRAMS: [&str; 14] = [
    "conn4", "conn6", "peer4", "peer6", "sockops", "inbound", "egress", "ingress", "gst_in", "gst_out",
    "guard", "kube4", "kube6", "kubeout",
];

/// Bits of the hash in a mark.
const BITS: u32 = 24;

/// The mark of one instance, `m` and six hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mark(u32);

impl Mark {
    /// The mark of the agent of this node that has its pins in this directory.
    pub fn of(node: &str, bpf_dir: &Path) -> Self {
        let bpf_dir = path::absolute(bpf_dir).unwrap_or_else(|_| bpf_dir.to_path_buf());
        let bytes = node.bytes().chain([0]).chain(bpf_dir.as_os_str().as_bytes().iter().copied());
        // FNV-1a: agents of every version have to come to the same.
        let hash =
            bytes.fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        Self((hash >> BITS) ^ (hash & ((1 << BITS) - 1)))
    }

    /// The mark in a name of the kernel's, and the rest of the name. `None` where the program or map is not ours.
    pub fn in_name(name: &str) -> Option<(Self, &str)> {
        let (mark, rest) = name.split_once('_')?;
        let digits = mark.strip_prefix('m').filter(|digits| digits.len() == 6)?;
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let known = PROGRAMS.contains(&rest) || KERNEL_NAMES.iter().any(|(_, short)| *short == rest);
        // What the loader makes for a moment, to show the kernel how the maps in a map are laid out.
        let template = rest.split_once('.').is_some_and(|(of, _)| KERNEL_NAMES.iter().any(|(_, s)| *s == of));
        let mark = u32::from_str_radix(digits, 16).ok().filter(|_| digits.bytes().all(is_digit))?;
        (known || template).then_some((Self(mark), rest))
    }

    /// What the object calls a program, or a map by what follows its mark.
    pub(super) fn name(self, rest: &str) -> String {
        format!("{self}_{rest}")
    }

    /// What the object calls the map that the agent knows by this name; maps of libraries have no mark.
    pub(super) fn map_name(self, map: &str) -> String {
        match KERNEL_NAMES.iter().find(|(name, _)| *name == map) {
            Some((_, short)) => self.name(short),
            None => map.to_owned(),
        }
    }

    /// The object with the mark in all its names.
    pub(super) fn put_in(self, object: &[u8]) -> Vec<u8> {
        let (mut marked, name) = (object.to_vec(), self.name(""));
        for place in memmem::find_iter(object, UNMARKED) {
            marked[place..place + UNMARKED.len()].copy_from_slice(name.as_bytes());
        }
        marked
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "m{:06x}", self.0)
    }
}

impl Serialize for Mark {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The name that people know a map by, of the name that the kernel has.
pub fn plain_name(kernels: &str) -> &str {
    let short = Mark::in_name(kernels).map_or(kernels, |(_, rest)| rest);
    KERNEL_NAMES.iter().find(|(_, name)| *name == short).map_or(kernels, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use mesh_common::maps::{OF_A_POD, POD_FLOWS, SHARED};

    use super::*;

    #[test]
    fn a_mark_is_of_the_node_and_the_directory() {
        let dir = Path::new("/sys/fs/bpf/mesh");
        let mark = Mark::of("a", dir);
        assert_eq!(mark, Mark::of("a", dir));
        assert_ne!(mark, Mark::of("b", dir));
        assert_ne!(mark, Mark::of("a", Path::new("/sys/fs/bpf/other")));
        // Older and newer agents have to come to the same.
        assert_eq!(mark.to_string(), "m888b13");
    }

    #[test]
    fn every_name_fits_and_is_known_again() {
        let mark = Mark::of("a", Path::new("/sys/fs/bpf/mesh"));
        assert_eq!(mark.name("").len(), UNMARKED.len());
        let maps = SHARED.iter().chain(&OF_A_POD).map(|map| (mark.map_name(map), *map));
        for (name, map) in maps {
            assert!(name.len() <= 15, "{name}");
            assert_eq!((Mark::in_name(&name).map(|(mark, _)| mark), plain_name(&name)), (Some(mark), map));
        }
        for program in PROGRAMS {
            let name = mark.name(program);
            assert!(name.len() <= 15 && Mark::in_name(&name) == Some((mark, program)), "{name}");
        }
    }

    #[test]
    fn other_names_are_nobodys() {
        for other in [
            "PODS",
            "m12345_pods",
            "m888b13_others",
            "m888b13",
            "mABCDEF_pods",
            "x1b5843_pods",
            "m+12345_pods",
        ] {
            assert_eq!(Mark::in_name(other), None, "{other}");
            assert_eq!(plain_name(other), other);
        }
        assert_eq!(plain_name("m888b13_pod_flw"), POD_FLOWS);
    }

    #[test]
    fn the_mark_takes_the_place_of_the_zeros() {
        let marked =
            Mark::of("a", Path::new("/sys/fs/bpf/mesh")).put_in(b"\0m000000_pods\0PODS\0m000000_conn4");
        assert_eq!(marked, b"\0m888b13_pods\0PODS\0m888b13_conn4");
    }
}
