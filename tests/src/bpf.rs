//! What is loaded and attached in the kernel, as far as the residue check asks.
//!
//! Promises: finds links by what they are attached to, whoever made them, and asks each interface what is attached to it.
//! Never: attaches, detaches or changes anything. Tested below.

#![expect(unsafe_code, reason = "libbpf-sys is C; each call has its SAFETY comment")]

use std::{collections::HashSet, ffi::c_int, io, path::Path};

use anyhow::{Context as _, Result};
use libbpf_sys::{BPF_TCX_EGRESS, BPF_TCX_INGRESS, bpf_prog_query_opts};
pub use mesh_agent::capture::objects::{Link, Target, links};

/// How many programs on one hook of one interface are counted; more than anybody attaches.
const MOST_PROGRAMS: u32 = 64;

/// Links attached to any of these cgroups or network namespaces.
pub(crate) fn links_to(cgroups: &HashSet<u64>, namespaces: &HashSet<u64>) -> Result<Vec<Link>> {
    let mut links = links()?;
    links.retain(|link| match link.target {
        Target::Cgroup(id) => cgroups.contains(&id),
        Target::Netns(inode) => namespaces.contains(&inode),
        Target::Interface(_) | Target::Other => false,
    });
    Ok(links)
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

/// libbpf returns a descriptor or zero, or a negative error number.
fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        ptr,
    };

    use libbpf_sys::{
        BPF_CGROUP_INET4_CONNECT, BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_PROG_TYPE_SCHED_CLS, bpf_attach_type,
        bpf_insn, bpf_link_create, bpf_prog_load, bpf_prog_load_opts, bpf_prog_type,
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
        let program = opened(fd)?;
        // SAFETY: an open descriptor, a number that the hook understands, and no options.
        let link = unsafe { bpf_link_create(program.as_raw_fd(), target, hook, ptr::null()) };
        opened(link)
    }

    fn opened(result: c_int) -> Result<OwnedFd> {
        // SAFETY: libbpf has just opened this descriptor for us, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(check(result)?) })
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
}
