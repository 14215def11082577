//! What is loaded and attached in the kernel, as far as the residue check asks.
//!
//! Promises: walks the kernel's own lists of links and maps by id, so that objects nobody pinned are seen too, and
//! asks each interface what is attached to it. Never: attaches, detaches or changes anything. Tested below.

#![expect(unsafe_code, reason = "libbpf-sys is C; each call has its SAFETY comment")]

use std::{
    collections::HashSet,
    ffi::c_int,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
};

use anyhow::{Context as _, Result};
use libbpf_sys::{
    BPF_LINK_TYPE_CGROUP, BPF_LINK_TYPE_NETNS, BPF_TCX_EGRESS, BPF_TCX_INGRESS, bpf_link_get_fd_by_id,
    bpf_link_get_info_by_fd, bpf_link_get_next_id, bpf_link_info, bpf_map_get_fd_by_id,
    bpf_map_get_info_by_fd, bpf_map_get_next_id, bpf_map_info, bpf_prog_query_opts,
};

/// Maps that only the mesh's programs have: any of them on the machine belongs to an agent, running or not.
pub const OUR_MAPS: &[&str] = &["ORIGINAL_DST", "PACKET_FLOWS"];
/// How many programs on one hook of one interface are counted; more than anybody attaches.
const MOST_PROGRAMS: u32 = 64;

/// A link of a kind that the lab can attribute.
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
}

/// All links to cgroups and network namespaces on the machine.
pub fn links() -> Result<Vec<Link>> {
    let mut links = Vec::new();
    for id in ids(bpf_link_get_next_id) {
        let id = id.context("walking the BPF links (this needs root)")?;
        if let Some((target, program)) =
            looked_at(id).with_context(|| format!("looking at the BPF link {id}"))?
        {
            links.push(Link { id, target, program });
        }
    }
    Ok(links)
}

/// Links attached to any of these cgroups or network namespaces.
pub(crate) fn links_to(cgroups: &HashSet<u64>, namespaces: &HashSet<u64>) -> Result<Vec<Link>> {
    let mut links = links()?;
    links.retain(|link| match link.target {
        Target::Cgroup(id) => cgroups.contains(&id),
        Target::Netns(inode) => namespaces.contains(&inode),
    });
    Ok(links)
}

/// Ids and names of the maps on the machine that have one of these names.
pub fn maps_named(names: &[&str]) -> Result<Vec<(u32, String)>> {
    let mut maps = Vec::new();
    for id in ids(bpf_map_get_next_id) {
        let id = id.context("walking the BPF maps (this needs root)")?;
        let name = map_name(id).with_context(|| format!("looking at the BPF map {id}"))?;
        if let Some(name) = name.filter(|name| names.contains(&name.as_str())) {
            maps.push((id, name));
        }
    }
    Ok(maps)
}

/// How many programs sit on the TCX hooks of each interface of a network namespace, where there are any.
pub fn tcx_programs(netns: &Path) -> Result<Vec<(String, u32)>> {
    crate::net::inside(netns, || {
        let mut found = Vec::new();
        for interface in &nix::net::if_::if_nameindex().context("listing interfaces")? {
            let index = c_int::try_from(interface.index())?;
            let count = tcx_count(index, BPF_TCX_INGRESS)? + tcx_count(index, BPF_TCX_EGRESS)?;
            if count > 0 {
                found.push((interface.name().to_string_lossy().into_owned(), count));
            }
        }
        Ok(found)
    })
}

fn tcx_count(interface: c_int, hook: libbpf_sys::bpf_attach_type) -> Result<u32> {
    let mut programs = [0_u32; MOST_PROGRAMS as usize];
    let mut opts = bpf_prog_query_opts {
        sz: size_of::<bpf_prog_query_opts>() as libbpf_sys::size_t,
        prog_ids: programs.as_mut_ptr(),
        ..Default::default()
    };
    opts.__bindgen_anon_1.count = MOST_PROGRAMS;
    // SAFETY: `opts` says its own size, and `prog_ids` has room for the `count` ids it announces; both outlive the call.
    let result = unsafe { libbpf_sys::bpf_prog_query_opts(interface, hook, &raw mut opts) };
    match check(result) {
        // SAFETY: `count` and `prog_cnt` are the same 32 bits under two names.
        Ok(_) => Ok(unsafe { opts.__bindgen_anon_1.count }),
        // Kernels before TCX know no such hook (EINVAL); interfaces without programs may say so in this way (ENOENT);
        // one may go meanwhile, with its other end in another namespace (ENODEV).
        Err(error) if matches!(error.raw_os_error(), Some(22 | 2 | 19)) => Ok(0),
        Err(error) => Err(error).context("asking for the programs of an interface"),
    }
}

type NextId = unsafe extern "C" fn(u32, *mut u32) -> c_int;

/// Every id of one kind. An id may be gone by the time it is looked at.
fn ids(next: NextId) -> impl Iterator<Item = io::Result<u32>> {
    let mut last = Some(0);
    std::iter::from_fn(move || {
        let mut id = 0;
        // SAFETY: the function writes one u32 where it is told, and `id` outlives the call.
        let result = check(unsafe { next(last?, &raw mut id) });
        last = result.is_ok().then_some(id);
        match result {
            Ok(_) => Some(Ok(id)),
            Err(error) if is_gone(&error) => None,
            Err(error) => Some(Err(error)),
        }
    })
}

/// What a link is attached to, and its program.
fn looked_at(id: u32) -> io::Result<Option<(Target, u32)>> {
    // SAFETY: takes a number and returns a descriptor or an error.
    let Some(fd) = opened(unsafe { bpf_link_get_fd_by_id(id) })? else { return Ok(None) };
    let mut info = bpf_link_info::default();
    let mut size = size_of::<bpf_link_info>() as u32;
    // SAFETY: `info` is plain data of `size` bytes, and both outlive the call.
    check(unsafe { bpf_link_get_info_by_fd(fd.as_raw_fd(), &raw mut info, &raw mut size) })?;
    let target = match info.type_ {
        // SAFETY: the kernel fills the variant that `type_` names; the rest is zero.
        BPF_LINK_TYPE_CGROUP => Some(Target::Cgroup(unsafe { info.__bindgen_anon_1.cgroup.cgroup_id })),
        // SAFETY: as above.
        BPF_LINK_TYPE_NETNS => {
            Some(Target::Netns(u64::from(unsafe { info.__bindgen_anon_1.netns.netns_ino })))
        }
        _ => None,
    };
    Ok(target.map(|target| (target, info.prog_id)))
}

fn map_name(id: u32) -> io::Result<Option<String>> {
    // SAFETY: takes a number and returns a descriptor or an error.
    let Some(fd) = opened(unsafe { bpf_map_get_fd_by_id(id) })? else { return Ok(None) };
    let mut info = bpf_map_info::default();
    let mut size = size_of::<bpf_map_info>() as u32;
    // SAFETY: `info` is plain data of `size` bytes, and both outlive the call.
    check(unsafe { bpf_map_get_info_by_fd(fd.as_raw_fd(), &raw mut info, &raw mut size) })?;
    let name = info.name.iter().map(|c| c.cast_unsigned()).take_while(|c| *c != 0).collect();
    Ok(Some(String::from_utf8_lossy(&Vec::from_iter::<Vec<u8>>(name)).into_owned()))
}

/// The descriptor behind a libbpf result; `None` if the object has gone in the meantime, or is not there yet: a link
/// that is being attached has its id already (EAGAIN).
fn opened(result: c_int) -> io::Result<Option<OwnedFd>> {
    match check(result) {
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

#[cfg(test)]
mod tests {
    use std::{ffi::CStr, fs, ptr};

    use libbpf_sys::{
        BPF_CGROUP_INET4_CONNECT, BPF_MAP_TYPE_ARRAY, BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
        BPF_PROG_TYPE_SCHED_CLS, bpf_attach_type, bpf_insn, bpf_link_create, bpf_map_create, bpf_prog_load,
        bpf_prog_load_opts, bpf_prog_type,
    };

    use super::*;
    use crate::cgroup;

    /// Loads `return verdict` and attaches it to a cgroup's descriptor or an interface's index.
    fn attach(kind: bpf_prog_type, hook: bpf_attach_type, verdict: i32, target: c_int) -> Result<OwnedFd> {
        let mut mov = bpf_insn { code: 0xb7, imm: verdict, ..Default::default() };
        mov.set_dst_reg(0);
        let program = [mov, bpf_insn { code: 0x95, ..Default::default() }];
        let mut opts = bpf_prog_load_opts {
            sz: size_of::<bpf_prog_load_opts>() as libbpf_sys::size_t,
            expected_attach_type: hook,
            ..Default::default()
        };
        let (name, license) = (c"lab_pass".as_ptr(), c"GPL".as_ptr());
        // SAFETY: two instructions are handed over with their count; all pointers outlive the call.
        let fd = unsafe { bpf_prog_load(kind, name, license, program.as_ptr(), 2, &raw mut opts) };
        let program = opened(fd)?.context("no program")?;
        // SAFETY: an open descriptor, a number that the hook understands, and no options.
        let link = unsafe { bpf_link_create(program.as_raw_fd(), target, hook, ptr::null()) };
        opened(link)?.context("no link")
    }

    fn make_map(name: &CStr) -> Result<OwnedFd> {
        // SAFETY: the name outlives the call, and there are no options.
        let fd = unsafe { bpf_map_create(BPF_MAP_TYPE_ARRAY, name.as_ptr(), 4, 4, 1, ptr::null()) };
        opened(fd)?.context("no map")
    }

    #[test]
    fn a_link_to_a_cgroup_is_found_while_it_lives() -> Result<()> {
        if !crate::require_root()? {
            return Ok(());
        }
        let path = cgroup::root()?.join(crate::unique("bpf")?);
        fs::create_dir(&path)?;
        let ours = HashSet::from([cgroup::id(&path)?]);
        let directory = fs::File::open(&path)?;
        let (kind, hook) = (BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET4_CONNECT);
        let link = attach(kind, hook, 1, directory.as_raw_fd())?;
        let found = links_to(&ours, &HashSet::new())?;
        drop(link);
        let after = links_to(&ours, &HashSet::new())?;
        cgroup::remove_tree(&path)?;
        assert_eq!(
            found.iter().map(|l| l.target).collect::<Vec<_>>(),
            ours.iter().map(|id| Target::Cgroup(*id)).collect::<Vec<_>>()
        );
        assert_eq!(after, []);
        Ok(())
    }

    #[test]
    fn programs_of_an_interface_are_found_in_its_namespace() -> Result<()> {
        if !crate::require_root()? {
            return Ok(());
        }
        let netns = crate::net::Netns::create(&crate::unique("tcx")?)?;
        let before = tcx_programs(&netns.path())?;
        let link = netns.inside(|| attach(BPF_PROG_TYPE_SCHED_CLS, BPF_TCX_EGRESS, -1, 1))?;
        let attached = tcx_programs(&netns.path())?;
        drop(link);
        let after = tcx_programs(&netns.path())?;
        netns.remove()?;
        assert_eq!((before, attached, after), (vec![], vec![("lo".to_owned(), 1)], vec![]));
        Ok(())
    }

    #[test]
    fn a_map_is_found_by_its_name() -> Result<()> {
        if !crate::require_root()? {
            return Ok(());
        }
        let map = make_map(c"lab_named_map")?;
        assert_eq!(maps_named(&["lab_named_map"])?.len(), 1);
        drop(map);
        Ok(())
    }
}
