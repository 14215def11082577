//! What a node's kernel has of what an agent needs, and what is lost where it has not.
//!
//! What is read of this machine is gathered first; the judgement is a pure function of it. Capabilities are those of this
//! process: in the agent's container they are the agent's. Tested below.

use std::{fs, path::Path};

use super::Check;
use crate::mounts::mounts;

/// The oldest kernel whose programs and maps are enough.
const OLDEST: (u32, u32) = (5, 15);
/// The first one with TCX.
const TCX: (u32, u32) = (6, 6);

/// Number of each capability that an agent uses, its name, and what there is not without it (capabilities(7)).
const CAPABILITIES: [(u32, &str, &str); 10] = [
    (39, "BPF", "no program is loaded, so nothing is captured"),
    (38, "PERFMON", "programs that follow pointers are refused"),
    (12, "NET_ADMIN", "no program is attached to sockets or interfaces"),
    (21, "SYS_ADMIN", "the network namespaces of pods cannot be entered"),
    (19, "SYS_PTRACE", "pods that ran before the agent are not found"),
    (13, "NET_RAW", "connections cannot be dialled with the addresses of pods"),
    (10, "NET_BIND_SERVICE", "ports below 1024 of pods cannot be listened on"),
    (1, "DAC_OVERRIDE", "the configuration of CNI plugins cannot be written where another user owns it"),
    (3, "FOWNER", "files of other users' directories cannot be put in place"),
    (5, "KILL", "connections that a policy no longer allows are not ended"),
];

/// What there is.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    /// As `uname -r` has it.
    pub release: String,
    /// Whether the kernel describes its own types.
    pub btf: bool,
    /// `/proc/self/mountinfo`.
    pub mountinfo: String,
    /// Bits of this process's effective capabilities; none when they cannot be read.
    pub capabilities: Option<u64>,
}

impl Facts {
    /// Of this machine and process.
    pub fn gather() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self {
            release: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            mountinfo: read("/proc/self/mountinfo"),
            capabilities: effective(&read("/proc/self/status")),
        }
    }

    fn has(&self, kind: &str) -> Option<String> {
        let found = mounts(&self.mountinfo).find(|mount| mount.kind == kind);
        found.map(|mount| mount.point.display().to_string())
    }
}

/// The effective capabilities in `/proc/PID/status`.
fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// The judgement.
pub(super) fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![version(&facts.release), tcx(&facts.release), btf(facts.btf)];
    checks.push(match facts.has("cgroup2") {
        Some(place) => Check::ok("cgroup2", format!("mounted at {place}")),
        None => Check::failure(
            "cgroup2",
            "not mounted: connections are captured there, so none are",
            "boot with a unified or hybrid hierarchy, or `mount -t cgroup2 none /sys/fs/cgroup/unified`; in a container, mount the \
             host's",
        ),
    });
    checks.push(match facts.has("bpf") {
        Some(place) => Check::ok("bpffs", format!("mounted at {place}")),
        None => Check::failure(
            "bpffs",
            "not mounted: without pins, pods would be open whenever an agent is restarted",
            "`mount -t bpf bpf /sys/fs/bpf`; in a container, mount the host's",
        ),
    });
    checks.push(capabilities(facts.capabilities));
    checks
}

/// Major and minor of a release such as `6.1.0-13-amd64`.
fn number(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn version(release: &str) -> Check {
    let about = "kernel";
    match number(release) {
        Some(version) if version >= OLDEST => Check::ok(about, format!("Linux {release}")),
        Some(_) => Check::failure(
            about,
            format!("Linux {release} is older than {}.{}: programs are refused", OLDEST.0, OLDEST.1),
            "boot a newer kernel",
        ),
        None => Check::warning(about, format!("release {release:?} is not understood"), "see `uname -r`"),
    }
}

fn tcx(release: &str) -> Check {
    let about = "kernel: TCX";
    if number(release).is_some_and(|version| version >= TCX) {
        return Check::ok(about, "programs can stand beside those of others on interfaces");
    }
    Check::warning(
        about,
        "not there: flows without a socket, such as UDP, are not counted, and pods with containers or machines of their own \
         inside are not captured whole",
        format!("Linux {}.{} or newer has it", TCX.0, TCX.1),
    )
}

fn btf(is_there: bool) -> Check {
    let about = "kernel: BTF";
    if is_there {
        return Check::ok(about, "/sys/kernel/btf/vmlinux is there");
    }
    Check::warning(
        about,
        "/sys/kernel/btf/vmlinux is not there: the mesh does without, tools that look into the kernel do not",
        "a kernel with CONFIG_DEBUG_INFO_BTF has it",
    )
}

fn capabilities(has: Option<u64>) -> Check {
    let about = "capabilities";
    let Some(has) = has else {
        return Check::warning(about, "cannot be read", "see CapEff in /proc/self/status");
    };
    let missing: Vec<String> = CAPABILITIES
        .iter()
        .filter(|(bit, ..)| has & (1 << bit) == 0)
        .map(|(_, name, cost)| format!("{name} ({cost})"))
        .collect();
    if missing.is_empty() {
        return Check::ok(about, "all that an agent uses");
    }
    // Whoever runs this need not be the agent.
    Check::warning(
        about,
        format!("this process has not: {}", missing.join("; ")),
        "nothing, if the agent is started otherwise; else run it as root, or with what the chart adds for it",
    )
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    const MOUNTS: &str =
        "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n31 20 0:27 / /sys/fs/bpf rw - bpf bpf rw\n";

    fn facts() -> Facts {
        Facts {
            release: "6.6.8-1".to_owned(),
            btf: true,
            mountinfo: MOUNTS.to_owned(),
            capabilities: Some(u64::MAX),
        }
    }

    fn not_well(facts: &Facts) -> Vec<(String, Verdict)> {
        let not_well = checks(facts).into_iter().filter(|check| check.verdict != Verdict::Ok);
        not_well
            .map(|check| {
                assert!(check.remedy.is_some_and(|remedy| !remedy.is_empty()), "{}", check.about);
                (check.about, check.verdict)
            })
            .collect()
    }

    #[test]
    fn each_thing_that_is_missing_is_named() {
        assert_eq!(not_well(&facts()), []);
        let without = |change: fn(&mut Facts)| {
            let mut facts = facts();
            change(&mut facts);
            not_well(&facts)
        };
        let one = |about: &str, verdict| vec![(about.to_owned(), verdict)];
        assert_eq!(
            without(|facts| facts.release = "6.1.0-13-amd64".into()),
            one("kernel: TCX", Verdict::Warning)
        );
        assert_eq!(
            without(|facts| facts.release = "5.14.0".into()),
            [one("kernel", Verdict::Failure), one("kernel: TCX", Verdict::Warning)].concat()
        );
        assert_eq!(without(|facts| facts.btf = false), one("kernel: BTF", Verdict::Warning));
        assert_eq!(without(|facts| facts.mountinfo.truncate(52)), one("bpffs", Verdict::Failure));
        assert_eq!(without(|facts| facts.mountinfo = MOUNTS[52..].into()), one("cgroup2", Verdict::Failure));
        assert_eq!(
            without(|facts| facts.capabilities = Some(!(1 << 39))),
            one("capabilities", Verdict::Warning)
        );
    }

    #[test]
    fn releases_and_capabilities_are_read() {
        for (release, version) in [
            ("6.18.0", Some((6, 18))),
            ("5.15-rc1", Some((5, 15))),
            ("6.1.0-13-amd64", Some((6, 1))),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(number(release), version, "{release}");
        }
        assert_eq!(effective("Name:\ta\nCapInh:\t01\nCapEff:\t000001ffffffffff\n"), Some(0x1ff_ffff_ffff));
        assert_eq!(effective("CapEff:\tno\n"), None);
        let check = capabilities(Some(0));
        assert!(CAPABILITIES.iter().all(|(_, name, _)| check.found.contains(name)), "{}", check.found);
    }

    #[test]
    fn this_machine_is_seen() {
        let facts = Facts::gather();
        assert!(number(&facts.release).is_some() && facts.capabilities.is_some(), "{facts:?}");
    }
}
