//! Network namespaces and the plan of addresses.
//!
//! Promises: a namespace is a file under `/run/netns` that anybody may enter; everything inside is made by `ip` in
//! one batch per namespace, with fixed hardware addresses and permanent neighbours, so that nothing waits for ARP,
//! neighbour discovery or duplicate address detection. Never: touches an interface, route or sysctl outside the
//! namespaces it made, or remounts `/sys` (as `ip netns exec` does). Tested in `tests/lab.rs`.

use std::{
    fs::{self, File},
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

/// Where network namespaces are named, as `ip netns` has it.
pub const NETNS_DIR: &str = "/run/netns";

/// A named network namespace. It stays until [`Netns::remove`].
#[derive(Debug, Clone)]
pub struct Netns {
    name: String,
    inode: u64,
}

impl Netns {
    /// Makes the namespace, with loopback up and addresses of IPv6 usable at once. Fails where the name is taken.
    pub fn create(name: &str) -> Result<Self> {
        fs::create_dir_all(NETNS_DIR).context("making /run/netns")?;
        let path = Path::new(NETNS_DIR).join(name);
        File::create_new(&path)
            .with_context(|| format!("naming the network namespace {}", path.display()))?;
        if let Err(error) = bind_new_namespace(&path) {
            // The mount did not happen, so the file alone is left to take away.
            let _ = fs::remove_file(&path);
            return Err(error.context(format!("making the network namespace {name}")));
        }
        let inode = fs::metadata(&path)?.ino();
        let netns = Self { name: name.to_owned(), inode };
        netns.sysctl("net/ipv6/conf/all/accept_dad", "0")?;
        netns.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        netns.ip(&["link set lo up".to_owned()])?;
        Ok(netns)
    }

    /// Its name under `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file.
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&self.name)
    }

    /// The inode that `/proc/PID/ns/net` shows for processes in it.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `work` on a thread inside the namespace. Sockets it opens stay in the namespace wherever they go.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        inside(&self.path(), work)
    }

    /// Sets a value under `/proc/sys` as seen from inside.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.inside(|| {
            fs::write(Path::new("/proc/sys").join(key), value)
                .with_context(|| format!("setting {key}={value} in {}", self.name))
        })
    }

    /// Runs `ip -batch` inside the namespace.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        self.inside(|| ip_batch(lines)).with_context(|| format!("in the network namespace {}", self.name))
    }

    /// Takes the name away. The namespace itself goes with the last process and socket in it.
    pub fn remove(&self) -> Result<()> {
        remove_named(&self.path())
    }
}

/// Takes a named namespace away; it is no error if it is gone already.
pub fn remove_named(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL) => {}
        Err(errno) => return Err(anyhow!(errno).context(format!("unmounting {}", path.display()))),
    }
    fs::remove_file(path).with_context(|| format!("removing {}", path.display()))
}

/// Runs `work` on a thread of its own inside the namespace at `path`.
pub fn inside<T: Send>(path: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file =
        File::open(path).with_context(|| format!("opening the network namespace {}", path.display()))?;
    on_a_thread(|| {
        setns(&file, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("entering the network namespace {}", path.display()))?;
        work()
    })
}

fn bind_new_namespace(path: &Path) -> Result<()> {
    on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("unshare (this needs root)")?;
        mount(Some("/proc/thread-self/ns/net"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("binding it to {}", path.display()))
    })
}

/// Namespaces belong to threads: whatever changes them runs on a thread that ends right afterwards.
fn on_a_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn ip_batch(lines: &[String]) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("running `ip` (package iproute2)")?;
    let mut text = lines.join("\n");
    text.push('\n');
    let mut stdin = child.stdin.take().ok_or_else(|| anyhow!("ip has no standard input"))?;
    let written = stdin.write_all(text.as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("ip: {}in this batch:\n{text}", String::from_utf8_lossy(&output.stderr));
    }
    written.context("writing to ip")
}

/// The two addresses of a node, a pod or a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// The IPv4 address.
    pub v4: Ipv4Addr,
    /// The IPv6 address.
    pub v6: Ipv6Addr,
}

impl Addresses {
    /// Of the `n`th node (from 1) on the network between nodes.
    pub fn of_node(n: u8) -> Self {
        Self {
            v4: Ipv4Addr::new(172, 30, 0, n),
            v6: Ipv6Addr::new(0xfd00, 0x172, 0x30, 0, 0, 0, 0, u16::from(n)),
        }
    }

    /// Of the `k`th pod (from 2) of the `n`th node: `10.n.1.k` and `fd00:10:n:1::k`.
    pub fn of_pod(n: u8, k: u8) -> Self {
        Self {
            v4: Ipv4Addr::new(10, n, 1, k),
            v6: Ipv6Addr::new(0xfd00, 0x10, u16::from(n), 1, 0, 0, 0, u16::from(k)),
        }
    }

    /// Of the `k`th service, in ranges that nothing routes: `10.96.0.0/16` and `fd00:10:96::/112`.
    pub fn of_service(k: u16) -> Self {
        let [high, low] = k.to_be_bytes();
        Self { v4: Ipv4Addr::new(10, 96, high, low), v6: Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, k) }
    }

    /// Both, IPv4 first.
    pub fn both(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// Joins a node to the fabric: `port` is the fabric's end.
pub fn join_fabric(fabric: &Netns, node: &Netns, n: u8) -> Result<()> {
    let Addresses { v4, v6 } = Addresses::of_node(n);
    fabric.ip(&[
        format!("link add node{n} type veth peer name eth0 address {} netns {}", node_mac(n), node.name()),
        format!("link set node{n} master br0 up"),
    ])?;
    for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        node.sysctl(key, "1")?;
    }
    node.ip(&[
        format!("addr add {v4}/24 dev eth0"),
        format!("addr add {v6}/64 dev eth0 nodad"),
        "link set eth0 up".to_owned(),
    ])
}

/// Makes the bridge that joins the nodes.
pub fn make_fabric(fabric: &Netns) -> Result<()> {
    fabric.ip(&["link add br0 type bridge".to_owned(), "link set br0 up".to_owned()])
}

/// Teaches `node` the way to the pods of node `other`.
pub fn route_to_node(node: &Netns, other: u8) -> Result<()> {
    let Addresses { v4, v6 } = Addresses::of_node(other);
    let mac = node_mac(other);
    node.ip(&[
        format!("neigh replace {v4} lladdr {mac} dev eth0 nud permanent"),
        format!("neigh replace {v6} lladdr {mac} dev eth0 nud permanent"),
        format!("route add 10.{other}.0.0/16 via {v4}"),
        format!("route add fd00:10:{other:x}::/48 via {v6}"),
    ])
}

/// Hangs a pod off its node by a veth, with host routes and a gateway that needs no address, as CNI plugins do.
pub fn join_pod(node: &Netns, pod: &Netns, n: u8, k: u8) -> Result<()> {
    let Addresses { v4, v6 } = Addresses::of_pod(n, k);
    let (inner, outer) = (format!("02:00:00:01:{n:02x}:{k:02x}"), format!("02:00:00:02:{n:02x}:{k:02x}"));
    node.ip(&[
        format!(
            "link add pod{k} address {outer} type veth peer name eth0 address {inner} netns {}",
            pod.name()
        ),
        format!("link set pod{k} up"),
        format!("route add {v4}/32 dev pod{k}"),
        format!("route add {v6}/128 dev pod{k}"),
        format!("neigh replace {v4} lladdr {inner} dev pod{k} nud permanent"),
        format!("neigh replace {v6} lladdr {inner} dev pod{k} nud permanent"),
    ])?;
    pod.ip(&[
        format!("addr add {v4}/32 dev eth0"),
        format!("addr add {v6}/128 dev eth0 nodad"),
        "link set eth0 up".to_owned(),
        format!("neigh replace 169.254.1.1 lladdr {outer} dev eth0 nud permanent"),
        format!("neigh replace fe80::1 lladdr {outer} dev eth0 nud permanent"),
        "route add 0.0.0.0/0 via 169.254.1.1 dev eth0 onlink".to_owned(),
        "route add ::/0 via fe80::1 dev eth0 onlink".to_owned(),
    ])
}

fn node_mac(n: u8) -> String {
    format!("02:00:00:00:00:{n:02x}")
}
