//! etcd, API server, controller manager and scheduler: processes of the machine itself, reached over the bridge.
//!
//! Each has a session of its own, writes to a log below `target/cluster/log`, and is known by its pid. Nothing here waits
//! longer than the process it waits for lives. Tested by `cargo xtask test cluster`.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::state::{self, Process, Shape};
use super::wait::until;
use crate::command::{answer, kept};

/// How long something may take to be ready, with room for a machine that is busy building.
pub const PATIENCE: Duration = Duration::from_mins(3);

/// The processes of the control plane, in the order of their start.
pub const COMPONENTS: [&str; 4] = ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"];

/// Those of a cluster with so many nodes: without any, there is nothing to control and nothing to schedule.
pub fn components(nodes: u8) -> &'static [&'static str] {
    if nodes == 0 { &COMPONENTS[..2] } else { &COMPONENTS }
}

/// kubectl as the administrator.
pub fn kubectl(arguments: &[&str]) -> Command {
    let mut kubectl = Command::new(state::program("kubectl"));
    kubectl.env("KUBECONFIG", state::kubeconfig()).args(arguments);
    kubectl
}

/// Ends a component, as if it had crashed.
pub fn stop(name: &str) -> Result<()> {
    let Some(process) = state::remembered(name).filter(|process| process.lives()) else {
        bail!("{name} does not run");
    };
    end(process.pid).with_context(|| format!("cannot end {name}, process {}", process.pid))?;
    until(&format!("{name} has ended"), PATIENCE, || Ok(!process.lives()))
}

/// Starts a component that was stopped; of the API server, until it is ready.
pub fn start_again(name: &str) -> Result<()> {
    if state::remembered(name).is_some_and(Process::lives) {
        bail!("{name} runs already");
    }
    match name {
        "etcd" => start(name, &etcd()),
        "kube-controller-manager" => start(name, &controller_manager()),
        "kube-scheduler" => start(name, &scheduler()),
        "kube-apiserver" => {
            start(name, &api_server())?;
            api_ready()
        }
        _ => bail!("{name} is no component of the control plane"),
    }
}

/// Ends a process at once, if it has not ended.
pub fn end(pid: u32) -> Result<()> {
    match kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn api_ready() -> Result<()> {
    ready("kube-apiserver", || answer(&mut kubectl(&["get", "--raw", "/readyz"])).is_some())
}

/// etcd and the API server, until the latter says that it is ready.
pub fn start_api() -> Result<()> {
    start("etcd", &etcd())?;
    start("kube-apiserver", &api_server())?;
    api_ready()
}

/// The controller manager, until it makes service accounts, and the scheduler.
pub fn start_controllers() -> Result<()> {
    start("kube-controller-manager", &controller_manager())?;
    start("kube-scheduler", &scheduler())?;
    kept(kubectl(&["wait", "--for=create", "--timeout=180s", "serviceaccount/default", "-n", "default"]))
}

/// The nodes as objects, so that each keeps its range of addresses; their kubelets come later.
pub fn declare_nodes(shape: Shape) -> Result<()> {
    for node in shape.all_nodes() {
        let text = include_str!("../../../tests/cluster/config/node.yaml")
            .replace("@NODE@", &node.name())
            .replace("@PODS@", &node.pods())
            .replace("@ZONE@", &node.zone());
        apply(&node.dir().join("node.yaml"), &text)?;
    }
    Ok(())
}

/// Runs kubectl, which waits for an event, as long as these processes live.
pub fn await_kubectl(arguments: &[&str], processes: &[String]) -> Result<()> {
    let mut child = kubectl(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("cannot start kubectl")?;
    let done = until(&arguments.join(" "), PATIENCE, || {
        if let Some(status) = child.try_wait().context("cannot wait for kubectl")? {
            return if status.success() { Ok(true) } else { bail!("kubectl {} failed", arguments.join(" ")) };
        }
        let alive = |name: &&String| state::remembered(name).is_some_and(Process::lives);
        match processes.iter().find(|name| !alive(name)) {
            Some(ended) => bail!("{ended} has ended: {}", tail(ended)),
            None => Ok(false),
        }
    });
    if done.is_err() {
        // It may have ended by itself meanwhile, and nobody else asks for it.
        let _ = child.kill();
        let _ = child.wait();
    }
    done
}

/// Writes the text down and has the API server apply it.
pub fn apply(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    let mut apply = kubectl(&["apply", "-f"]);
    apply.arg(file);
    kept(apply)
}

/// Starts a program in a session of its own, so that it survives the terminal, and writes it down.
pub fn start(name: &str, command: &[String]) -> Result<()> {
    let log = state::log(name);
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let child = Command::new("setsid")
        .args(command)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let Some(process) = Process::now(child.id()) else { bail!("{name} has ended at once: {}", tail(name)) };
    state::remember(name, process)
}

/// Waits until the probe succeeds; fails at once, with the end of its log, when the process does not live any more.
pub fn ready(name: &str, mut probe: impl FnMut() -> bool) -> Result<()> {
    until(&format!("{name} is ready: {}", tail(name)), PATIENCE, || {
        if probe() {
            return Ok(true);
        }
        if !state::remembered(name).is_some_and(Process::lives) {
            bail!("{name} has ended: {}", tail(name));
        }
        Ok(false)
    })
}

/// Where the log is, and its last lines.
pub fn tail(name: &str) -> String {
    let file = state::log(name);
    let text = fs::read(&file).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<_> = text.lines().rev().take(8).collect();
    let last: Vec<_> = lines.into_iter().rev().collect();
    format!("see {}\n{}", file.display(), last.join("\n"))
}

fn words(program: &str, arguments: &[&str]) -> Vec<String> {
    let program = state::program(program).display().to_string();
    std::iter::once(program).chain(arguments.iter().map(|&argument| argument.to_owned())).collect()
}

fn etcd() -> Vec<String> {
    let client = format!("http://127.0.0.1:{}", state::ETCD_PORT);
    let peer = format!("http://127.0.0.1:{}", state::ETCD_PORT + 1);
    let data = state::dir().join("etcd").display().to_string();
    // What is lost with the machine is lost with the cluster.
    let mut etcd = words("etcd", &["--unsafe-no-fsync", "--log-level", "warn", "--name", state::NAME]);
    etcd.extend(["--data-dir".into(), data]);
    etcd.extend(["--listen-client-urls".into(), client.clone(), "--advertise-client-urls".into(), client]);
    etcd.extend(["--listen-peer-urls".into(), peer]);
    etcd
}

fn api_server() -> Vec<String> {
    let pki = state::pki();
    let file = |flag: &str, name: &str| format!("--{flag}={}", pki.join(name).display());
    let mut server = words("kube-apiserver", &["--v=1", "--allow-privileged=true", "--bind-address=0.0.0.0"]);
    server.extend([
        format!("--etcd-servers=http://127.0.0.1:{}", state::ETCD_PORT),
        format!("--advertise-address={}", state::control_plane()),
        format!("--secure-port={}", state::API_PORT),
        format!("--service-cluster-ip-range={}", state::SERVICES),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        // Nobody translates addresses of services here, outside of the nodes: webhooks are called at their pods' own.
        "--enable-aggregator-routing=true".into(),
        file("client-ca-file", "ca.crt"),
        file("tls-cert-file", "apiserver.crt"),
        file("tls-private-key-file", "apiserver.key"),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
        file("service-account-key-file", "sa.pub"),
        file("service-account-signing-key-file", "sa.key"),
        "--kubelet-preferred-address-types=InternalIP".into(),
        file("kubelet-certificate-authority", "ca.crt"),
        file("kubelet-client-certificate", "apiserver-kubelet.crt"),
        file("kubelet-client-key", "apiserver-kubelet.key"),
        file("cert-dir", "apiserver"),
    ]);
    server
}

fn controller_manager() -> Vec<String> {
    let pki = state::pki();
    let file = |flag: &str, name: &str| format!("--{flag}={}", pki.join(name).display());
    let mut manager = words("kube-controller-manager", &["--v=1", "--leader-elect=false"]);
    manager.extend([
        kubeconfig("kube-controller-manager"),
        "--bind-address=127.0.0.1".into(),
        "--use-service-account-credentials=true".into(),
        file("service-account-private-key-file", "sa.key"),
        file("root-ca-file", "ca.crt"),
        file("cluster-signing-cert-file", "ca.crt"),
        file("cluster-signing-key-file", "ca.key"),
        file("cert-dir", "controller-manager"),
    ]);
    manager
}

fn scheduler() -> Vec<String> {
    let mut scheduler = words("kube-scheduler", &["--v=1", "--leader-elect=false"]);
    scheduler.extend([
        kubeconfig("kube-scheduler"),
        "--bind-address=127.0.0.1".into(),
        format!("--cert-dir={}", state::pki().join("scheduler").display()),
    ]);
    scheduler
}

fn kubeconfig(name: &str) -> String {
    format!("--kubeconfig={}", state::dir().join(format!("{name}.kubeconfig")).display())
}
