//! Guests of a pod: nested containers and machines, whose connections have no socket in the pod.
//!
//! Promises: a guest has a network namespace of its own, reached from the pod alone, and the pod lets it out behind NAT; as
//! docker in a container does, and what runs machines in pods. Its processes are the pod's, by their cgroup. Tested by
//! `tests/traffic_without_sockets.rs`.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, AsRawFd as _},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    Pod, eventually,
    net::{Addresses, Netns},
};

/// Larger than any frame of a tap.
const LARGEST_FRAME: usize = 64 * 1024;
/// How often a wire looks whether it is to stop, where nothing comes (milliseconds).
const IDLE_MS: u16 = 50;

/// What is between a pod and its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behind {
    /// A veth: a nested container.
    Veth,
    /// A bridge with a veth: nested containers as docker makes them.
    Bridge,
    /// A tap that a process of the pod reads and writes: a virtual machine.
    Tap,
}

/// A guest of a pod. Its network goes with the lab.
#[derive(Debug)]
pub struct Guest {
    /// The guest as a pod, for what runs in it; no manifest names it.
    pub pod: Pod,
    /// The pod's own addresses on the way to the guest.
    pub gateway: Addresses,
    interface: String,
    /// The veth below it, where it is a bridge.
    port: Option<String>,
    outer: Pod,
    _wire: Option<Wire>,
}

impl Pod {
    /// Makes the `n`th guest of this pod.
    pub async fn guest(&self, n: u8, behind: Behind) -> Result<Guest> {
        let outer = self.clone();
        tokio::task::spawn_blocking(move || Guest::create(outer, n, behind)).await?
    }
}

impl Guest {
    fn create(outer: Pod, n: u8, behind: Behind) -> Result<Self> {
        let host = |k: u8| Addresses {
            v4: Ipv4Addr::new(192, 168, n, k),
            v6: Ipv6Addr::new(0xfd00, 0x192, 0x168, u16::from(n), 0, 0, 0, u16::from(k)),
        };
        let (gateway, own) = (host(1), host(2));
        let pod = outer.with_guest(&format!("guest{n}"), own)?;
        let (inside, outside) = (pod.netns(), outer.netns());
        let interface = format!("guest{n}");
        let (mut wire, mut port) = (None, None);
        match behind {
            Behind::Veth => {
                outside.ip(&[format!(
                    "link add {interface} type veth peer name eth0 netns {}",
                    inside.name()
                )])?;
            }
            Behind::Bridge => {
                let veth = format!("port{n}");
                outside.ip(&[
                    format!("link add {interface} type bridge"),
                    format!("link add {veth} type veth peer name eth0 netns {}", inside.name()),
                    format!("link set {veth} master {interface} up"),
                ])?;
                port = Some(veth);
            }
            Behind::Tap => wire = Some(Wire::new(outside, &interface, inside, "eth0")?),
        }
        let joined = [(outside, interface.as_str(), gateway), (inside, "eth0", own)];
        for (netns, name, Addresses { v4, v6 }) in joined {
            netns.ip(&[
                format!("addr add {v4}/24 dev {name}"),
                format!("addr add {v6}/64 dev {name} nodad"),
                format!("link set {name} up"),
            ])?;
        }
        inside.ip(&[
            format!("route add default via {}", gateway.v4),
            format!("route add ::/0 via {}", gateway.v6),
        ])?;
        let_out(outside, n)?;
        Ok(Self { pod, gateway, interface, port, outer, _wire: wire })
    }

    /// Waits until an agent has noticed the interface that leads to this guest.
    pub async fn captured(&self) -> Result<()> {
        let name = self.interface.clone();
        let index = self.outer.netns().inside(|| Ok(nix::net::if_::if_nametoindex(name.as_str())?))?;
        let pins = crate::agent::bpf_dir(self.outer.node()).join("pods");
        eventually("the agent's noticing of a guest", async || {
            let mut pods = std::fs::read_dir(&pins)?.filter_map(io::Result::ok);
            let noticed = pods.any(|pod| pod.path().join(format!("from-guest-{index}")).exists());
            ensure!(noticed, "{name} of {} is not noticed yet", self.outer.name());
            Ok(())
        })
        .await
    }

    /// The interfaces in the pod go, and the guest is cut off.
    pub fn leave(&self) -> Result<()> {
        let interfaces = self.port.iter().chain([&self.interface]);
        let lines: Vec<_> = interfaces.map(|interface| format!("link del {interface}")).collect();
        self.outer.netns().ip(&lines)
    }
}

/// The pod routes for its guest, and gives it its own address on the way out.
fn let_out(pod: &Netns, n: u8) -> Result<()> {
    for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        pod.sysctl(key, "1")?;
    }
    for (program, from) in
        [("iptables", format!("192.168.{n}.0/24")), ("ip6tables", format!("fd00:192:168:{n:x}::/64"))]
    {
        let mut command = Command::new(program);
        command.args(["-w", "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-s", &from, "-j", "MASQUERADE"]);
        let output =
            pod.inside(|| command.output().with_context(|| format!("running {program} (package iptables)")))?;
        ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Two taps whose frames a thread carries from one to the other, as the process of a virtual machine does.
#[derive(Debug)]
struct Wire {
    stop: Arc<AtomicBool>,
    carrier: Option<JoinHandle<()>>,
}

impl Wire {
    fn new(one: &Netns, one_name: &str, other: &Netns, other_name: &str) -> Result<Self> {
        let ends = [one.inside(|| tap(one_name))?, other.inside(|| tap(other_name))?];
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let carrier = std::thread::spawn(move || {
            if let Err(error) = carry(&ends, &stopping) {
                eprintln!("a wire between two taps: {error}");
            }
        });
        Ok(Self { stop, carrier: Some(carrier) })
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // What went wrong with it has been said.
        let _ = self.carrier.take().map(JoinHandle::join);
    }
}

fn carry(ends: &[File; 2], stop: &AtomicBool) -> io::Result<()> {
    let mut frame = vec![0; LARGEST_FRAME];
    while !stop.load(Ordering::Relaxed) {
        let mut ready = ends.each_ref().map(|end| PollFd::new(end.as_fd(), PollFlags::POLLIN));
        poll(&mut ready, PollTimeout::from(IDLE_MS))?;
        for from in 0..2 {
            let (mut from, mut to) = (&ends[from], &ends[1 - from]);
            match from.read(&mut frame) {
                // A network takes what it can, and drops the rest.
                Ok(n) => drop(to.write(&frame[..n])),
                // Nothing there; or the interface is down or gone.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if matches!(error.raw_os_error(), Some(nix::libc::EIO | nix::libc::EBADFD)) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Makes a tap in the thread's namespace; it goes with its descriptor.
fn tap(name: &str) -> Result<File> {
    use nix::libc::{IFF_NO_PI, IFF_TAP, O_NONBLOCK, TUNSETIFF, c_short, ifreq, ioctl};
    use std::os::unix::fs::OpenOptionsExt as _;

    let file = OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open("/dev/net/tun");
    let file = file.context("opening /dev/net/tun")?;
    #[expect(unsafe_code, reason = "no library in use makes a tap")]
    // SAFETY: `ifreq` is plain data for which all zeros is a value; the name is shorter than its field, and the kernel
    // keeps nothing of the request.
    let failed = unsafe {
        let mut request: ifreq = std::mem::zeroed();
        if name.len() >= request.ifr_name.len() {
            return Err(anyhow!("{name}: too long a name for an interface"));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI) as c_short;
        ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request)
    };
    if failed < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("making the tap {name}"));
    }
    Ok(file)
}
