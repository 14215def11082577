//! Loading the kernel programs: once for the node, and once more for each pod with maps of its own.
//!
//! Programs that belong to a pod read that pod's maps directly, and its namespace's cookie from read-only data; what all
//! programs share they find by its pin. Tested in the lab.

use std::{
    io::ErrorKind,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData},
    programs::{
        CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSockAddr, Program, ProgramError,
        SchedClassifier, SockOps, links::FdLink,
    },
};
use aya_log::EbpfLogger;
use mesh_common::maps::{NETNS_COOKIE, NETNS_NUMBER, OF_A_POD, SHARED};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::AbortHandle,
};

use super::{
    instance::Mark,
    links::{BpfDir, detach_others, pin, replace},
    netns::Netns,
    probes,
    tables::PodTables,
};
use crate::state::snapshot::WhenAgentIsDown;

#[cfg(not(mesh_ebpf_missing))]
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf"));
#[cfg(mesh_ebpf_missing)]
static OBJECT: &[u8] = &[];

/// The log's ring buffer, as the log library names it.
const LOG_MAP: &str = "AYA_LOGS";

/// The program of pods whose egress is restricted.
const GUARD: &str = "guard";

/// How the kernel side is set up.
#[derive(Debug, Clone)]
pub struct CaptureConfig {
    /// The cgroup that holds the agent and the pods; `None` finds the root of the host's hierarchy.
    pub cgroup_root: Option<PathBuf>,
    /// The cgroup below it that holds the pods alone; `None` looks for a kubelet's, and takes the root where there is none.
    pub pods_cgroup: Option<PathBuf>,
    /// The kubelet's cgroup, from the root on; `None` looks for it.
    pub kubelet_cgroup: Option<PathBuf>,
    /// The name of the agent's node.
    pub node: String,
    /// Where maps and links are pinned; no other agent may have the same.
    pub bpf_dir: PathBuf,
    /// What the kernel programs log.
    pub ebpf_log: EbpfLog,
    /// What becomes of the connections of pods that do not say, while there is no agent.
    pub when_agent_is_down: WhenAgentIsDown,
    /// How much the tables of a pod hold.
    pub tables: PodTables,
}

/// How much the kernel programs log (target `mesh_ebpf`). Each step includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, clap::ValueEnum)]
pub enum EbpfLog {
    /// Nothing: a log call costs a branch.
    #[default]
    Off,
    /// What failed.
    Error,
    /// What looks wrong.
    Warn,
    /// What is worth knowing.
    Info,
    /// Every connection.
    Debug,
    /// Everything.
    Trace,
}

/// What the object is loaded with.
#[derive(Debug)]
pub(super) struct Loading {
    pub(super) mark: Mark,
    pub(super) log: EbpfLog,
    pub(super) tables: PodTables,
}

impl Loading {
    pub(super) fn of(config: &CaptureConfig) -> Self {
        let mark = Mark::of(&config.node, &config.bpf_dir);
        Self { mark, log: config.ebpf_log, tables: config.tables }
    }
}

/// The loaded object: programs and maps by the names that the agent has for them.
#[derive(Debug)]
pub(super) struct Object {
    ebpf: Ebpf,
    mark: Mark,
}

/// Loads the programs of the node. The shared maps are pinned on the way, or found where they are pinned.
pub(super) fn load(dir: &BpfDir, with: &Loading) -> Result<Object> {
    raise_limits();
    let own = Netns::open(Path::new("/proc/self/ns/net"))?;
    let mut node = load_object(dir, with, Of::Node(own.cookie()), 0)?;
    for (name, program) in node.ebpf.programs_mut() {
        let loaded = match program {
            Program::SockOps(program) => uninterrupted(|| program.load()),
            Program::CgroupSockAddr(program) => uninterrupted(|| program.load()),
            Program::CgroupSkb(program) => uninterrupted(|| program.load()),
            _ => Ok(()),
        };
        loaded.with_context(|| {
            format!(
                "the kernel refuses the {name} program (Linux 5.15 or newer, with CAP_BPF and CAP_NET_ADMIN)"
            )
        })?;
    }
    // Only the programs of a pod use these, each pod having its own.
    for name in OF_A_POD {
        drop(node.ebpf.take_map(&node.mark.map_name(name)));
    }
    Ok(node)
}

/// Loads the programs of the pod in the network namespace with this cookie. Its maps are pinned on the way, or found
/// where they are pinned.
pub(super) fn load_pod(dir: &BpfDir, with: &Loading, cookie: u64) -> Result<Object> {
    let mut pod = load_object(dir, with, Of::Pod(cookie), 0)?;
    let guard = pod.mark.name(GUARD);
    // Before any map is taken out and closed: until it is loaded a program knows its maps by their descriptors.
    for (name, program) in pod.ebpf.programs_mut() {
        let loaded = match program {
            Program::SkLookup(program) => uninterrupted(|| program.load()),
            // Few pods have one.
            _ if name == guard => Ok(()),
            Program::SchedClassifier(program) => uninterrupted(|| program.load()),
            _ => Ok(()),
        };
        loaded.with_context(|| format!("the kernel refuses the {name} program"))?;
    }
    Ok(pod)
}

/// Loads the guard of a pod that [`load_pod`] was called for. `number`: of its network namespace in the agent's.
pub(super) fn load_guard(dir: &BpfDir, with: &Loading, cookie: u64, number: u64) -> Result<Object> {
    let mut object = load_object(dir, with, Of::Pod(cookie), number)?;
    let guard: &mut SchedClassifier = program(&mut object, GUARD)?;
    uninterrupted(|| guard.load()).with_context(|| format!("the kernel refuses the {GUARD} program"))?;
    Ok(object)
}

/// Loads a program. The kernel gives the verifier's work up with `EAGAIN` when a signal for the thread comes meanwhile,
/// which says nothing of the program: on a busy machine that takes long enough for one to come. Asked again ten times.
fn uninterrupted(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    const AGAIN: usize = 10;
    for _ in 0..AGAIN {
        match load() {
            Err(ProgramError::LoadError { io_error, .. }) if io_error.kind() == ErrorKind::WouldBlock => {}
            loaded => return loaded,
        }
    }
    load()
}

/// Whose programs are loaded, by the cookie of the network namespace.
#[derive(Debug, Clone, Copy)]
enum Of {
    Node(u64),
    Pod(u64),
}

fn load_object(dir: &BpfDir, with: &Loading, of: Of, number: u64) -> Result<Object> {
    if OBJECT.is_empty() {
        bail!(
            "this agent was built without its kernel programs: run `cargo xtask build-ebpf` and build it again"
        );
    }
    let (level, mark) = (with.log as u8, with.mark);
    let (cookie, is_pod) = match of {
        Of::Node(cookie) => (cookie, false),
        Of::Pod(cookie) => (cookie, true),
    };
    let shared = SHARED.into_iter().chain([LOG_MAP]).map(|name| (mark.map_name(name), dir.maps().join(name)));
    let own = is_pod.then_some(OF_A_POD).into_iter().flatten();
    let own = own.map(|name| (mark.map_name(name), dir.maps_of(cookie).join(name)));
    let (pins, sizes): (Vec<_>, _) = (shared.chain(own).collect(), with.tables.sizes(mark));
    let mut loader = EbpfLoader::new();
    loader.override_global(aya_log::LEVEL, &level, true).override_global(NETNS_COOKIE, &cookie, true);
    loader.override_global(NETNS_NUMBER, &number, true);
    for (name, entries) in &sizes {
        loader.map_max_entries(name, *entries);
    }
    for (name, path) in &pins {
        loader.map_pin_path(name, path);
    }
    let ebpf = loader.load(&mark.put_in(OBJECT)).map_err(|error| {
        anyhow!(error)
            .context("the kernel refuses the maps: the agent needs CAP_BPF and CAP_NET_ADMIN, or root")
    })?;
    Ok(Object { ebpf, mark })
}

/// The programs of the node, and the pins of their links.
const OF_THE_NODE: [(&str, &str); 5] = [
    ("sockops", "sockops"),
    ("peer4", "getpeername4"),
    ("peer6", "getpeername6"),
    ("conn4", "connect4"),
    ("conn6", "connect6"),
];

/// Attaches the programs of the node and pins their links: what apps ask for at the cgroup of the pods, what connections
/// do at the root, for one end of those inside a pod is the agent's. A link that is there already is given the program
/// instead.
pub(super) fn attach(node: &mut Object, dir: &BpfDir, root: &Path, pods: &Path) -> Result<()> {
    let open = |path: &Path| std::fs::File::open(path).with_context(|| format!("cgroup {}", path.display()));
    let (root, pods) = (open(root)?, open(pods)?);
    for (name, hook) in OF_THE_NODE {
        let cgroup = if hook == "sockops" { &root } else { &pods };
        let program = node.program_mut(name)?;
        let pinned = dir.links().join(hook);
        if replace(&pinned, program.fd()?.as_fd())? {
            continue;
        }
        let link = attach_to_cgroup(program, cgroup)
            .with_context(|| format!("the kernel does not attach the {hook} program"))?;
        pin(link, &pinned)?;
    }
    // Hooks of an older agent that this one does without.
    detach_others(&dir.links(), |pinned| {
        OF_THE_NODE.iter().any(|(_, hook)| *hook == pinned) || probes::is_pin(pinned)
    })
}

pub(super) fn attach_to_cgroup(program: &mut Program, cgroup: &std::fs::File) -> Result<FdLink> {
    // A link attaches beside others, whatever their number; "single" is the flags value 0 that links have to be
    // given.
    let mode = CgroupAttachMode::Single;
    Ok(match program {
        Program::SockOps(program) => {
            let program: &mut SockOps = program;
            let id = program.attach(cgroup, mode)?;
            program.take_link(id)?.try_into()?
        }
        Program::CgroupSockAddr(program) => {
            let program: &mut CgroupSockAddr = program;
            let id = program.attach(cgroup, mode)?;
            program.take_link(id)?.try_into()?
        }
        Program::CgroupSkb(program) => {
            let program: &mut CgroupSkb = program;
            let id = program.attach(cgroup, CgroupSkbAttachType::Egress, mode)?;
            program.take_link(id)?.try_into()?
        }
        other => bail!("unexpected type of program: {:?}", other.prog_type()),
    })
}

impl Object {
    pub(super) fn program_mut(&mut self, name: &str) -> Result<&mut Program> {
        self.ebpf.program_mut(&self.mark.name(name)).ok_or_else(|| missing(name))
    }
}

/// A map of the object, as the type it has.
pub(super) fn take<T>(object: &mut Object, name: &str) -> Result<T>
where
    T: TryFrom<Map, Error = aya::maps::MapError>,
{
    let map = object.ebpf.take_map(&object.mark.map_name(name)).ok_or_else(|| missing(name))?;
    T::try_from(map).with_context(|| format!("map {name}"))
}

/// A pinned shared map, as the type it has.
pub(super) fn open<T>(dir: &BpfDir, name: &str) -> Result<T>
where
    T: TryFrom<Map, Error = aya::maps::MapError>,
{
    let map = MapData::from_pin(dir.maps().join(name)).and_then(Map::from_map_data);
    map.and_then(T::try_from).with_context(|| format!("map {name}"))
}

/// A program of the object, as the type it has.
pub(super) fn program<'a, T>(object: &'a mut Object, name: &str) -> Result<T>
where
    T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    T::try_from(object.program_mut(name)?).with_context(|| format!("program {name}"))
}

fn missing(name: &str) -> anyhow::Error {
    anyhow!("the kernel object has no {name}: it was not built with this agent; run `cargo xtask build-ebpf`")
}

/// Hands what the kernel programs log to the process's log, until it is aborted.
pub(super) fn forward_log(node: &mut Object) -> Result<AbortHandle> {
    let logger = EbpfLogger::init(&mut node.ebpf).context("log of the kernel programs")?;
    #[expect(
        unsafe_code,
        reason = "what is registered has to keep its descriptor, which no type can promise"
    )]
    // SAFETY: the logger owns its ring buffer and gives the same descriptor, open, for as long as it lives.
    let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }?;
    let forwarding = tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
    Ok(forwarding.abort_handle())
}

/// Raises what may be raised: before Linux 5.11 maps counted as locked memory; three listeners and seven maps a pod take
/// file descriptors. Where it is not allowed the agent goes on, and fails where it must.
fn raise_limits() {
    for resource in [Resource::RLIMIT_MEMLOCK, Resource::RLIMIT_NOFILE] {
        let raised = getrlimit(resource)
            .and_then(|(soft, hard)| if soft < hard { setrlimit(resource, hard, hard) } else { Ok(()) });
        if let Err(error) = raised {
            tracing::debug!(?resource, %error, "limit not raised");
        }
    }
}
