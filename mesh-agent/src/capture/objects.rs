//! What is loaded and attached in the kernel, whoever made it.
//!
//! Promises to walk the kernel's own lists by id, so that what nobody pinned is seen too; what comes or goes meanwhile
//! may be seen or not. Changes nothing but the one link that [`detach`] is told of. Tested in `residue.rs` and in the
//! lab (`tests/src/bpf.rs`, `tests/tests/no_residue.rs`).
#![expect(unsafe_code, reason = "libbpf is C; each call has its SAFETY comment")]

use std::{
    ffi::c_int,
    fmt, io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use aya::{maps::MapError, programs::ProgramError, sys::SyscallError};
use libbpf_sys::{
    BPF_LINK_TYPE_CGROUP, BPF_LINK_TYPE_NETNS, BPF_LINK_TYPE_TCX, bpf_link_detach, bpf_link_get_fd_by_id,
    bpf_link_get_info_by_fd, bpf_link_get_next_id, bpf_link_info,
};

/// A link of any kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Its id, as `bpftool link` shows it.
    pub id: u32,
    /// What it is attached to.
    pub target: Target,
    /// The id of the program it runs now.
    pub program: u32,
}

/// What a link is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The cgroup with this id.
    Cgroup(u64),
    /// The network namespace with this inode (0 once it is gone).
    Netns(u64),
    /// The interface with this index in its namespace (0 once it is gone).
    Interface(u32),
    /// Something that the mesh attaches nothing to.
    Other,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cgroup(id) => write!(f, "cgroup {id}"),
            Self::Netns(inode) => write!(f, "network namespace {inode}"),
            Self::Interface(index) => write!(f, "interface {index}"),
            Self::Other => f.write_str("something else"),
        }
    }
}

/// A loaded program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Its id, as `bpftool prog` shows it.
    pub id: u32,
    /// The kernel's name of it.
    pub name: String,
    /// Ids of the maps it uses.
    pub maps: Vec<u32>,
}

/// A map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    /// Its id, as `bpftool map` shows it.
    pub id: u32,
    /// The kernel's name of it.
    pub name: String,
}

/// All programs on the machine.
///
/// # Errors
/// The kernel does not say: this takes root.
pub fn programs() -> Result<Vec<Program>> {
    let mut all = Vec::new();
    for program in aya::programs::loaded_programs() {
        let program = match program {
            Err(ProgramError::SyscallError(error)) if has_gone(&error) => continue,
            other => other.context("walking the BPF programs (this needs root)")?,
        };
        let maps = match program.map_ids() {
            Err(ProgramError::SyscallError(error)) if has_gone(&error) => continue,
            other => other.context("asking for the maps of a BPF program")?.unwrap_or_default(),
        };
        let name = program.name_as_str().unwrap_or_default().to_owned();
        all.push(Program { id: program.id(), name, maps });
    }
    Ok(all)
}

/// All maps on the machine.
///
/// # Errors
/// The kernel does not say: this takes root.
pub fn maps() -> Result<Vec<Map>> {
    let mut all = Vec::new();
    for map in aya::maps::loaded_maps() {
        let map = match map {
            Err(MapError::SyscallError(error)) if has_gone(&error) => continue,
            other => other.context("walking the BPF maps (this needs root)")?,
        };
        all.push(Map { id: map.id(), name: map.name_as_str().unwrap_or_default().to_owned() });
    }
    Ok(all)
}

fn has_gone(error: &SyscallError) -> bool {
    is_gone(&error.io_error)
}

/// All links on the machine.
///
/// # Errors
/// The kernel does not say: this takes root.
pub fn links() -> Result<Vec<Link>> {
    let (mut all, mut last) = (Vec::new(), 0);
    loop {
        let mut id = 0;
        // SAFETY: the function writes one u32 where it is told, and `id` outlives the call.
        match check(unsafe { bpf_link_get_next_id(last, &raw mut id) }) {
            Err(error) if is_gone(&error) => return Ok(all),
            result => result.context("walking the BPF links (this needs root)")?,
        };
        let link = link(id).with_context(|| format!("looking at the BPF link {id}"))?;
        all.extend(link);
        last = id;
    }
}

/// The link with this id; `None` when it has gone.
fn link(id: u32) -> io::Result<Option<Link>> {
    let Some(fd) = open_link(id)? else { return Ok(None) };
    let mut info = bpf_link_info::default();
    let mut size = size_of::<bpf_link_info>() as u32;
    // SAFETY: `info` is plain data of `size` bytes, and both outlive the call.
    check(unsafe { bpf_link_get_info_by_fd(fd.as_raw_fd(), &raw mut info, &raw mut size) })?;
    let target = match info.type_ {
        // SAFETY: the kernel fills the variant that `type_` names; the rest is zero.
        BPF_LINK_TYPE_CGROUP => Target::Cgroup(unsafe { info.__bindgen_anon_1.cgroup.cgroup_id }),
        // SAFETY: as above.
        BPF_LINK_TYPE_NETNS => Target::Netns(u64::from(unsafe { info.__bindgen_anon_1.netns.netns_ino })),
        // SAFETY: as above.
        BPF_LINK_TYPE_TCX => Target::Interface(unsafe { info.__bindgen_anon_1.tcx.ifindex }),
        _ => Target::Other,
    };
    Ok(Some(Link { id, target, program: info.prog_id }))
}

/// Detaches the link with this id, wherever it is held; one that has gone is fine.
///
/// # Errors
/// The kernel refuses.
pub(super) fn detach(id: u32) -> io::Result<()> {
    let Some(fd) = open_link(id)? else { return Ok(()) };
    // SAFETY: the descriptor is open for the length of the call.
    match check(unsafe { bpf_link_detach(fd.as_raw_fd()) }) {
        Err(error) if error.raw_os_error() != Some(nix::libc::ENOLINK) => Err(error),
        _ => Ok(()),
    }
}

/// `None` when it has gone in the meantime, or is not there yet: a link that is being attached has its id already
/// (EAGAIN).
fn open_link(id: u32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: takes a number and returns a descriptor or an error.
    match check(unsafe { bpf_link_get_fd_by_id(id) }) {
        // SAFETY: libbpf has just opened this descriptor for us, and nobody else knows it.
        Ok(fd) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// libbpf returns a descriptor or zero, or a negative error number.
fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}
