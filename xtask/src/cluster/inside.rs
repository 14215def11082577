//! The first process of a node: mounts of its own, then containerd, kubelet and kube-proxy, until one of them ends.
//!
//! It is started in new namespaces, with the machine's root file system; what a node has for itself is mounted over it:
//! `/run`, the directories of kubelet, containerd and CNI, cgroups below its own, a BPF file system. So pods with host
//! paths find what they expect, and nodes do not meet. It takes care of orphans, as a first process must; when it ends,
//! the kernel ends all others of the node, and the mounts go with the last. Never writes a sysctl that is not of the
//! node's network namespace alone. Tested below, and by `cargo xtask test cluster`.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, sethostname};

use super::control_plane::PATIENCE;
use super::images;
use super::node::{CGROUPS, delegate_controllers, has_v2_alone};
use super::state::{self, Node, ProxyMode};
use super::wait::until;
use crate::command::kept;

/// What every node has for itself, besides `/run`.
pub const OWN_DIRECTORIES: [&str; 7] = [
    "/etc/cni",
    "/opt/cni",
    "/var/lib/cni",
    "/var/lib/containerd",
    "/var/lib/kubelet",
    "/var/log/containers",
    "/var/log/pods",
];

/// Sysctls of the whole machine that the kubelet insists on. It is shown these values, and the machine keeps its own.
const SHOWN: [(&str, &str); 6] = [
    ("kernel/keys/root_maxbytes", "25000000"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
];

/// Where Debian puts CNI plugins.
const PLUGINS: &str = "/usr/lib/cni";

const SOCKET: &str = "/run/containerd/containerd.sock";

/// Lives as long as the node. An error when one of its processes has ended.
pub fn run(node: Node) -> Result<()> {
    let shape = state::running()?;
    sethostname(node.name()).context("cannot set the host name")?;
    private_mounts(node)?;
    write_configuration(node, shape.proxy)?;
    let containerd = spawn(node, "containerd", "containerd", &["-c".into(), file(node, "containerd.toml")])?;
    until("containerd listens", PATIENCE, || Ok(UnixStream::connect(SOCKET).is_ok()))?;
    for image in images::of_every_node() {
        let mut import = Command::new("ctr");
        import.args(["--namespace", "k8s.io", "images", "import"]).arg(image);
        kept(import)?;
    }
    let kubelet = spawn(node, "kubelet", &state::program("kubelet").display().to_string(), &kubelet(node))?;
    into_service(kubelet, "kubelet")?;
    let proxy = [format!("--config={}", file(node, "kube-proxy.yaml")), "--v=1".into()];
    let proxy = spawn(node, "kube-proxy", &state::program("kube-proxy").display().to_string(), &proxy)?;
    reap(&[("containerd", containerd), ("kubelet", kubelet), ("kube-proxy", proxy)])
}

/// Waits for every process that ends here, until one of these has.
fn reap(components: &[(&str, Pid)]) -> Result<()> {
    loop {
        let ended = match waitpid(None, None) {
            Ok(ended) => ended,
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error).context("cannot wait for processes"),
        };
        if let Some((name, _)) = components.iter().find(|(_, pid)| ended.pid() == Some(*pid)) {
            bail!("{name} has ended, and the node ends with it: {ended:?}");
        }
    }
}

fn spawn(node: Node, name: &str, program: &str, arguments: &[String]) -> Result<Pid> {
    let log = state::log(&format!("{}-{name}", node.name()));
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let path = std::env::var("PATH").unwrap_or_default();
    let child = Command::new(program)
        .args(arguments)
        .env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin"))
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    Ok(Pid::from_raw(child.id().cast_signed()))
}

/// Gives a process the cgroup that it would have as a service of systemd: what comes from the kubelet is told by that.
fn into_service(process: Pid, name: &str) -> Result<()> {
    let root = Path::new(CGROUPS);
    let root = if has_v2_alone(root) { root.to_owned() } else { root.join("unified") };
    let cgroup = root.join(format!("system.slice/{name}.service"));
    fs::create_dir_all(&cgroup).with_context(|| format!("cannot make {}", cgroup.display()))?;
    fs::write(cgroup.join("cgroup.procs"), process.to_string())
        .with_context(|| format!("cannot move {name} into {}", cgroup.display()))
}

fn kubelet(node: Node) -> Vec<String> {
    vec![
        format!("--config={}", file(node, "kubelet.yaml")),
        format!("--kubeconfig={}", file(node, "kubelet.kubeconfig")),
        format!("--hostname-override={}", node.name()),
        format!("--node-ip={}", node.address()),
        "--cert-dir=/var/lib/kubelet/pki".into(),
        "--v=2".into(),
    ]
}

fn file(node: Node, name: &str) -> String {
    node.dir().join(name).display().to_string()
}

fn private_mounts(node: Node) -> Result<()> {
    let v2_alone = has_v2_alone(Path::new(CGROUPS));
    propagate(MsFlags::MS_SLAVE)?;
    // The one that is there shows the links of another network namespace.
    mount_new("sysfs", "/sys", None)?;
    cgroups(v2_alone)?;
    mount_new("bpf", "/sys/fs/bpf", None)?;
    // Not every kernel has them, and no part of Kubernetes needs them.
    for (kind, place) in [("debugfs", "/sys/kernel/debug"), ("tracefs", "/sys/kernel/tracing")] {
        let _ = mount_new(kind, place, None);
    }
    for place in OWN_DIRECTORIES {
        let own = node.dir().join("root").join(place.trim_start_matches('/'));
        fs::create_dir_all(&own).with_context(|| format!("cannot create {}", own.display()))?;
        bind(&own, Path::new(place))?;
    }
    mount_new("tmpfs", "/run", Some("mode=755"))?;
    show_sysctls()?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("cannot let the node forward packets")?;
    // So that mounts of pods with bidirectional propagation are seen on the node.
    propagate(MsFlags::MS_SHARED)
}

fn propagate(how: MsFlags) -> Result<()> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | how, None::<&str>)
        .context("cannot change how mounts propagate")
}

fn mount_new(kind: &str, place: &str, options: Option<&str>) -> Result<()> {
    mount(Some(kind), place, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("cannot mount {kind} on {place}"))
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("cannot mount {} on {}", from.display(), to.display()))
}

/// The hierarchies of the machine, each with the node's own cgroup as its root.
fn cgroups(v2_alone: bool) -> Result<()> {
    if v2_alone {
        mount_new("cgroup2", CGROUPS, None)?;
        // Processes in the root itself would keep the pods' cgroups from having controllers.
        let first = Path::new(CGROUPS).join("first");
        fs::create_dir_all(&first).context("cannot make a cgroup for the node's own processes")?;
        fs::write(first.join("cgroup.procs"), "0").context("cannot join the node's own cgroup")?;
        delegate_controllers(Path::new(CGROUPS));
        return Ok(());
    }
    mount_new("tmpfs", CGROUPS, Some("mode=755"))?;
    let memberships = fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
    for (directory, kind, options) in hierarchies(&memberships) {
        let place = format!("{CGROUPS}/{directory}");
        fs::create_dir(&place).with_context(|| format!("cannot create {place}"))?;
        mount_new(kind, &place, options.as_deref())?;
    }
    Ok(())
}

/// Directory, file system and options of each hierarchy, by the lines of `/proc/self/cgroup`.
fn hierarchies(memberships: &str) -> Vec<(&str, &'static str, Option<String>)> {
    let all = memberships.lines().filter_map(|line| line.split(':').nth(1));
    all.map(|controllers| match controllers.strip_prefix("name=") {
        None if controllers.is_empty() => ("unified", "cgroup2", None),
        None => (controllers, "cgroup", Some(controllers.to_owned())),
        Some(name) => (name, "cgroup", Some(format!("none,name={name}"))),
    })
    .collect()
}

fn show_sysctls() -> Result<()> {
    for (name, value) in SHOWN {
        let shown = Path::new("/run/sysctl").join(name.replace('/', "."));
        fs::create_dir_all("/run/sysctl").context("cannot create /run/sysctl")?;
        fs::write(&shown, format!("{value}\n"))
            .with_context(|| format!("cannot write {}", shown.display()))?;
        bind(&shown, &Path::new("/proc/sys").join(name))?;
    }
    Ok(())
}

fn write_configuration(node: Node, proxy: ProxyMode) -> Result<()> {
    let write = |path: &Path, text: &str| {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        fs::write(path, filled(text, node, proxy)).with_context(|| format!("cannot write {}", path.display()))
    };
    let dir = node.dir();
    write(&dir.join("containerd.toml"), include_str!("../../../tests/cluster/config/containerd.toml"))?;
    write(&dir.join("kubelet.yaml"), include_str!("../../../tests/cluster/config/kubelet.yaml"))?;
    write(&dir.join("kube-proxy.yaml"), include_str!("../../../tests/cluster/config/kube-proxy.yaml"))?;
    // Pods with the node's own DNS get this; nothing listens there, and the cluster asks nobody outside.
    write(&dir.join("resolv.conf"), &format!("nameserver {}\n", state::control_plane()))?;
    write(
        Path::new("/etc/cni/net.d/10-pods.conflist"),
        include_str!("../../../tests/cluster/config/cni.conflist"),
    )?;
    // Named in the kubelet's configuration, which looks into it each second.
    let own = Path::new("/var/lib/kubelet/manifests");
    fs::create_dir_all(own).with_context(|| format!("cannot create {}", own.display()))?;
    plugins()
}

fn filled(text: &str, node: Node, proxy: ProxyMode) -> String {
    text.replace("@NODE@", &node.name())
        .replace("@DIR@", &node.dir().display().to_string())
        .replace("@STATE@", &state::dir().display().to_string())
        .replace("@PKI@", &state::pki().display().to_string())
        .replace("@PAUSE@", images::PAUSE)
        .replace("@DNS@", state::DNS)
        .replace("@MODE@", proxy.word())
        .replace("@NODES@", &state::node_network())
        .replace("@ALLPODS@", &state::pod_network())
        .replace("@PODS@", &node.pods())
}

/// In the directory that clusters usually have, where a DaemonSet may add its own.
fn plugins() -> Result<()> {
    let bin = Path::new("/opt/cni/bin");
    fs::create_dir_all(bin).context("cannot create /opt/cni/bin")?;
    for entry in fs::read_dir(PLUGINS).with_context(|| format!("cannot read {PLUGINS}"))? {
        let plugin = entry?;
        let link = bin.join(plugin.file_name());
        symlink(plugin.path(), &link).with_context(|| format!("cannot link {}", link.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_mounted_as_the_machine_has_them() {
        let found = hierarchies("9:name=systemd:/\n4:cpu,cpuacct:/x\n0::/\n");
        let expected = [
            ("systemd", "cgroup", Some("none,name=systemd".to_owned())),
            ("cpu,cpuacct", "cgroup", Some("cpu,cpuacct".to_owned())),
            ("unified", "cgroup2", None),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn nothing_stays_open_in_the_configuration() {
        for text in [
            include_str!("../../../tests/cluster/config/containerd.toml"),
            include_str!("../../../tests/cluster/config/kubelet.yaml"),
            include_str!("../../../tests/cluster/config/kube-proxy.yaml"),
            include_str!("../../../tests/cluster/config/cni.conflist"),
        ] {
            let filled = filled(text, Node(1), ProxyMode::Iptables);
            assert!(!filled.contains('@'), "{filled}");
        }
        let proxy = filled(
            include_str!("../../../tests/cluster/config/kube-proxy.yaml"),
            Node(1),
            ProxyMode::Iptables,
        );
        assert!(proxy.contains("mode: iptables\n") && proxy.contains("10.244.0.0/16"), "{proxy}");
    }

    #[test]
    fn the_network_of_pods_is_json() -> Result<()> {
        let text =
            filled(include_str!("../../../tests/cluster/config/cni.conflist"), Node(2), ProxyMode::Nftables);
        let list: serde_json::Value = serde_json::from_str(&text)?;
        assert_eq!(list["plugins"][0]["ipam"]["ranges"][0][0]["subnet"], "10.244.2.0/24");
        Ok(())
    }
}
