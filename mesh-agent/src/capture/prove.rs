//! Proof that the hooks fire: a socket of the agent's own, in a network namespace made for it, is captured.
//!
//! Nothing leaves that namespace, which ends with the proof. Tested in the lab.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, AsRawFd as _},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use mesh_common::maps::{PodAddrs, SocketFacts, kind};
use nix::sched::{CloneFlags, unshare};
use socket2::{Domain, Socket, Type};

use super::{enrol::Capture, kernel::Facts, netns::cookie_of};

/// What the probe dials: an address for documentation (RFC 5737), which the hook replaces.
const PROBE: ([u8; 4], u16) = ([192, 0, 2, 1], 9);
/// Where the hook sends it: loopback of the probe's namespace, where nobody listens.
const REFUSES: PodAddrs =
    PodAddrs { v4: [127, 0, 0, 1], v6: [0; 16], has_v4: 1, has_v6: 0, low_ports: 0, flags: 0 };
/// The refusal is immediate; without the hook the namespace has no route, which is too.
const LIMIT: Duration = Duration::from_secs(5);

impl Capture {
    /// Shows that the hooks fire for sockets below the cgroup root: readiness. Where the pods have a cgroup of their own and
    /// the agent is not below it, none of its sockets can be captured: that a kubelet's cgroup is there says that this is
    /// the host's hierarchy, and it is the hook at the root that has to fire.
    ///
    /// # Errors
    /// They do not: the agent itself is outside the cgroup root, so that no connection would be told what it is for.
    pub fn prove(&self) -> Result<()> {
        let facts = Facts::open(&self.dir.maps())?;
        let mut pods = self.pods_map()?;
        let apart = self.cgroups.pods != self.cgroups.root;
        let (made, ready) = std::sync::mpsc::sync_channel(0);
        let (go, gone) = std::sync::mpsc::sync_channel::<()>(0);
        // A thread of its own: it never comes back from the namespace it makes.
        let prober = thread::spawn(move || -> Result<Option<SocketFacts>> {
            let socket = probe_socket().context("cannot make a network namespace for a probe")?;
            let cookie = cookie_of(socket.as_fd())?;
            if made.send(cookie).is_ok() && gone.recv().is_ok() {
                // Refused, as it has to be: what counts is what the hooks have written on the socket.
                let _ = socket.connect_timeout(&SocketAddr::from(PROBE).into(), LIMIT);
                if apart && facts.read(&socket)?.is_none() {
                    // Not below the pods' cgroup: as if the hook there had seen it.
                    facts.write(&socket, kind::CLIENT, SocketAddr::from(PROBE).into())?;
                    let _ = socket.connect_timeout(&SocketAddr::from((REFUSES.v4, PROBE.1)).into(), LIMIT);
                }
            }
            Ok(facts.read(&socket)?)
        });
        if let Ok(cookie) = ready.recv() {
            pods.insert(cookie, REFUSES, 0).context("map PODS")?;
            let _ = go.send(());
            let seen = join(prober);
            pods.remove(&cookie).context("map PODS")?;
            return judge(seen?);
        }
        judge(join(prober)?)
    }
}

fn join(prober: thread::JoinHandle<Result<Option<SocketFacts>>>) -> Result<Option<SocketFacts>> {
    prober.join().map_err(|_| anyhow!("the probe has failed"))?
}

fn judge(seen: Option<SocketFacts>) -> Result<()> {
    let captured = seen.is_some_and(|facts| {
        facts.kind == kind::CLIENT && SocketAddr::from(facts.addr) == SocketAddr::from(PROBE)
    });
    ensure!(
        captured,
        "the connect hook does not fire for a socket of the agent: the agent has to run in a cgroup below the cgroup \
         root (see --cgroup-root)"
    );
    ensure!(
        seen.is_some_and(|facts| facts.start_ns != 0),
        "the sockops hook does not fire for a socket of the agent: is a program attached without leave for others at a \
         cgroup above it?"
    );
    Ok(())
}

/// Makes a network namespace with loopback up, for this thread alone, and a socket in it.
fn probe_socket() -> io::Result<Socket> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let socket = Socket::new(Domain::IPV4, Type::STREAM.cloexec(), None)?;
    loopback_up(&socket)?;
    Ok(socket)
}

fn loopback_up(socket: &Socket) -> io::Result<()> {
    use nix::libc::{IFF_UP, SIOCSIFFLAGS, c_short, ifreq, ioctl};

    #[expect(unsafe_code, reason = "no library in use sets the flags of an interface")]
    // SAFETY: `ifreq` is plain data for which all zeros is a value; the kernel reads `request` and keeps nothing.
    let failed = unsafe {
        let mut request: ifreq = std::mem::zeroed();
        std::ptr::copy_nonoverlapping(c"lo".as_ptr(), request.ifr_name.as_mut_ptr(), c"lo".count_bytes());
        request.ifr_ifru.ifru_flags = IFF_UP as c_short;
        ioctl(socket.as_raw_fd(), SIOCSIFFLAGS, &raw const request)
    };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
