//! Kernel programs of others: what a socket load balancer or a network plugin has attached beside the mesh's.
//!
//! Promises: a program is attached for as long as its value lives, and says how often it has run. Each is a few
//! instructions, written out here. Tested by `tests/living_with_others.rs`.

#![expect(unsafe_code, reason = "libbpf-sys is C; each call has its SAFETY comment")]

use std::{
    ffi::c_int,
    fs::File,
    io,
    net::SocketAddrV4,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
};

use anyhow::{Context as _, Result};
use libbpf_sys::{
    BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_SOCK_OPS, BPF_MAP_TYPE_ARRAY, BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
    BPF_PROG_TYPE_SCHED_CLS, BPF_PROG_TYPE_SOCK_OPS, BPF_TCX_EGRESS, BPF_TCX_INGRESS, bpf_attach_type,
    bpf_insn, bpf_link_create, bpf_map_create, bpf_map_lookup_elem, bpf_prog_load, bpf_prog_load_opts,
    bpf_prog_type,
};

/// The registers, as the instructions name them.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R6: u8 = 6;
const R10: u8 = 10;

/// An attached program.
#[derive(Debug)]
pub struct Foreign {
    runs: OwnedFd,
    _links: Vec<OwnedFd>,
}

impl Foreign {
    /// A socket load balancer at a cgroup: who connects to `service` is sent to `backend`.
    pub fn load_balancer(cgroup: &Path, service: SocketAddrV4, backend: SocketAddrV4) -> Result<Self> {
        const ADDRESS: i16 = 4;
        const PORT: i16 = 24;
        let runs = counter()?;
        let ip = |at: SocketAddrV4| i32::from_ne_bytes(at.ip().octets());
        let port = i32::from(backend.port().to_be());
        let mut code = counted(&runs);
        code.extend([
            op(0x61, R2, R6, ADDRESS, 0),
            // Anybody else's address: past the four that follow.
            op(0x56, R2, 0, 4, ip(service)),
            op(0xb4, R1, 0, 0, ip(backend)),
            op(0x63, R6, R1, ADDRESS, 0),
            op(0xb4, R1, 0, 0, port),
            op(0x63, R6, R1, PORT, 0),
            op(0xb7, R0, 0, 0, 1),
            op(0x95, 0, 0, 0, 0),
        ]);
        let program = load(BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_CGROUP_INET4_CONNECT, &code)?;
        let link = at_cgroup(&program, cgroup, BPF_CGROUP_INET4_CONNECT)?;
        Ok(Self { runs, _links: vec![link] })
    }

    /// A program at a cgroup that watches what connections do.
    pub fn sockops(cgroup: &Path) -> Result<Self> {
        let runs = counter()?;
        let mut code = counted(&runs);
        code.extend([op(0xb7, R0, 0, 0, 1), op(0x95, 0, 0, 0, 0)]);
        let program = load(BPF_PROG_TYPE_SOCK_OPS, BPF_CGROUP_SOCK_OPS, &code)?;
        let link = at_cgroup(&program, cgroup, BPF_CGROUP_SOCK_OPS)?;
        Ok(Self { runs, _links: vec![link] })
    }

    /// A program that sees the packets of an interface, both ways, and lets them pass. To be called inside the network
    /// namespace.
    pub fn tcx(interface: &str) -> Result<Self> {
        let runs = counter()?;
        let mut code = counted(&runs);
        // TCX_NEXT.
        code.extend([op(0xb4, R0, 0, 0, -1), op(0x95, 0, 0, 0, 0)]);
        let index = c_int::try_from(nix::net::if_::if_nametoindex(interface)?)?;
        let mut links = Vec::new();
        for hook in [BPF_TCX_INGRESS, BPF_TCX_EGRESS] {
            let program = load(BPF_PROG_TYPE_SCHED_CLS, hook, &code)?;
            links.push(attach(&program, index, hook)?);
        }
        Ok(Self { runs, _links: links })
    }

    /// How often it has run.
    pub fn runs(&self) -> Result<u64> {
        let (key, mut value) = (0_u32, 0_u64);
        // SAFETY: key and value have the sizes the map was made with, and outlive the call.
        let result = unsafe {
            bpf_map_lookup_elem(self.runs.as_raw_fd(), (&raw const key).cast(), (&raw mut value).cast())
        };
        check(result).context("reading how often a program has run")?;
        Ok(value)
    }
}

/// The beginning of each program: keeps the context in register 6 and adds one to the counter.
fn counted(runs: &OwnedFd) -> Vec<bpf_insn> {
    vec![
        op(0xbf, R6, R1, 0, 0),
        op(0x62, R10, 0, -4, 0),
        op(0xbf, R2, R10, 0, 0),
        op(0x07, R2, 0, 0, -4),
        // The map by its descriptor: two instructions long.
        op(0x18, R1, 1, 0, runs.as_raw_fd()),
        op(0, 0, 0, 0, 0),
        // bpf_map_lookup_elem; none: past the two that follow.
        op(0x85, 0, 0, 0, 1),
        op(0x15, R0, 0, 2, 0),
        op(0xb7, R1, 0, 0, 1),
        op(0xdb, R0, R1, 0, 0),
    ]
}

fn op(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> bpf_insn {
    let mut made = bpf_insn { code, off, imm, ..Default::default() };
    made.set_dst_reg(dst);
    made.set_src_reg(src);
    made
}

fn counter() -> Result<OwnedFd> {
    let name = c"lab_foreign".as_ptr();
    // SAFETY: the name outlives the call, and there are no options.
    opened(unsafe { bpf_map_create(BPF_MAP_TYPE_ARRAY, name, 4, 8, 1, std::ptr::null()) })
        .context("making a map")
}

fn load(kind: bpf_prog_type, hook: bpf_attach_type, code: &[bpf_insn]) -> Result<OwnedFd> {
    let mut opts = bpf_prog_load_opts {
        sz: size_of::<bpf_prog_load_opts>() as libbpf_sys::size_t,
        expected_attach_type: hook,
        ..Default::default()
    };
    let (name, license) = (c"lab_foreign".as_ptr(), c"GPL".as_ptr());
    let count = code.len() as libbpf_sys::size_t;
    // SAFETY: the instructions are handed over with their count; all pointers outlive the call.
    let fd = unsafe { bpf_prog_load(kind, name, license, code.as_ptr(), count, &raw mut opts) };
    opened(fd).context("loading a program")
}

fn at_cgroup(program: &OwnedFd, cgroup: &Path, hook: bpf_attach_type) -> Result<OwnedFd> {
    let directory = File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
    attach(program, directory.as_raw_fd(), hook)
}

fn attach(program: &OwnedFd, target: c_int, hook: bpf_attach_type) -> Result<OwnedFd> {
    // SAFETY: an open descriptor, a number that the hook understands, and no options.
    let link = unsafe { bpf_link_create(program.as_raw_fd(), target, hook, std::ptr::null()) };
    opened(link).context("attaching a program")
}

fn opened(result: c_int) -> io::Result<OwnedFd> {
    // SAFETY: libbpf has just opened this descriptor for us, and nobody else knows it.
    check(result).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// libbpf returns a descriptor or zero, or a negative error number.
fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}
