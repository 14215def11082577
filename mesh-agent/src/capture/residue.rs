//! What of ours is in the kernel: programs, links, maps, pins, processes that hold any of them, and their listeners.
//!
//! Promises to find what carries a mark ([`Mark`]) by the kernel's own lists, whether or not it is pinned, and to tell one
//! instance's from another's. Rules and routes of pods with guests carry no mark: they are found where the pins say that there
//! are some. Never takes for ours what merely has the name of one of our maps. Tested in `tests/tests/no_residue.rs`; the lab ends each test with it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::maps::MapInfo;
use nix::sys::statfs::{FsType, statfs};
use serde::Serialize;

use super::{
    Listener,
    crashed::is_set_aside,
    guests,
    instance::Mark,
    links::{MAPS, list},
    live,
    netns::Netns,
    objects,
};

/// `NSFS_MAGIC`
const NSFS: FsType = FsType(0x6e73_6673);

/// Whose things are looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whose {
    /// Every instance's.
    All,
    /// Those of these instances.
    Of(BTreeSet<Mark>),
}

impl Whose {
    fn has(&self, mark: Mark) -> bool {
        match self {
            Self::All => true,
            Self::Of(marks) => marks.contains(&mark),
        }
    }
}

/// What kind of thing it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A loaded program.
    Program,
    /// A program's place at a hook.
    Link,
    /// A map.
    Map,
    /// A file or directory in bpffs.
    Pin,
    /// A process that has a program or map open: an agent that runs.
    Process,
    /// A listening socket of such a process in a pod.
    Socket,
    /// A file or directory of an agent outside the kernel.
    File,
    /// Rules or routes in the network namespace of a pod with guests.
    Route,
}

impl Kind {
    /// The word for one.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Program => "program",
            Self::Link => "link",
            Self::Map => "map",
            Self::Pin => "pin",
            Self::Process => "process",
            Self::Socket => "socket",
            Self::File => "file",
            Self::Route => "route",
        }
    }
}

/// One thing of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Trace {
    /// Whose it is, where that is known.
    pub instance: Option<Mark>,
    /// What kind of thing it is.
    pub kind: Kind,
    /// The kernel's number of it: of a program, link or map, or of a process.
    pub id: Option<u32>,
    /// Its name, path or place.
    pub what: String,
}

/// The instances that have pins in this directory, those that crashed too. None where it is not there, or was pinned by a
/// version that did not mark what it made.
///
/// # Errors
/// It cannot be read.
pub fn marks_in(bpf_dir: &Path) -> Result<BTreeSet<Mark>> {
    let mut marks = BTreeSet::new();
    let crashed = list(bpf_dir)?.into_iter().filter(|path| is_set_aside(path));
    for dir in crashed.chain([bpf_dir.to_path_buf()]) {
        for pin in list(&dir.join(MAPS))? {
            let info = MapInfo::from_pin(&pin).with_context(|| format!("map {}", pin.display()))?;
            marks.extend(info.name_as_str().and_then(Mark::in_name).map(|(mark, _)| mark));
        }
    }
    Ok(marks)
}

/// Everything of these instances that is in the kernel, and what is pinned in these directories.
///
/// # Errors
/// The kernel does not say: this takes root.
pub fn find(whose: &Whose, bpf_dirs: &[PathBuf]) -> Result<Vec<Trace>> {
    let objects = Objects::find(whose)?;
    let mut found = objects.traces.clone();
    for dir in bpf_dirs {
        let marks = marks_in(dir)?;
        let instance = marks.first().copied().filter(|_| marks.len() == 1);
        let trace = |kind, what| Trace { instance, kind, id: None, what };
        found.extend(tree(dir)?.into_iter().map(|path| trace(Kind::Pin, path.display().to_string())));
        let crashed = list(dir)?.into_iter().filter(|path| is_set_aside(path));
        for dir in crashed.chain([dir.clone()]) {
            found.extend(guests::written_down(&dir)?.into_iter().map(|what| trace(Kind::Route, what)));
        }
    }
    found.extend(objects.holders()?);
    found.sort();
    Ok(found)
}

/// Detaches the links of these instances that no pin holds (pins of another mount of bpffs, say). Nothing is done to an
/// instance that has a process.
///
/// # Errors
/// A link that the kernel does not let go of.
pub fn detach_unpinned(marks: &BTreeSet<Mark>) -> Result<()> {
    let objects = Objects::find(&Whose::Of(marks.clone()))?;
    let alive: HashSet<_> = objects.holders()?.into_iter().filter_map(|trace| trace.instance).collect();
    for link in objects.traces {
        if let (Kind::Link, Some(id), Some(mark)) = (link.kind, link.id, link.instance)
            && !alive.contains(&mark)
        {
            objects::detach(id).with_context(|| format!("cannot detach the BPF link {id}"))?;
        }
    }
    Ok(())
}

/// A directory and all that is below it; nothing where there is none.
fn tree(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut all = vec![dir.to_path_buf()];
    for path in list(dir)? {
        if path.is_dir() {
            all.extend(tree(&path)?);
        } else {
            all.push(path);
        }
    }
    Ok(all)
}

/// Programs, links and maps of ours.
struct Objects {
    traces: Vec<Trace>,
    programs: HashMap<u32, Mark>,
    maps: HashMap<u32, Mark>,
}

impl Objects {
    fn find(whose: &Whose) -> Result<Self> {
        let mut found = Self { traces: Vec::new(), programs: HashMap::new(), maps: HashMap::new() };
        let mut names = HashMap::new();
        // Maps that the loader makes beside ours (read-only data, its log) have no mark, and the one user.
        let mut used = HashMap::new();
        for program in objects::programs()? {
            if let Some((mark, _)) = Mark::in_name(&program.name).filter(|(mark, _)| whose.has(*mark)) {
                found.programs.insert(program.id, mark);
                used.extend(program.maps.into_iter().map(|map| (map, mark)));
                found.add(mark, Kind::Program, program.id, program.name.clone());
                names.insert(program.id, program.name);
            }
        }
        for map in objects::maps()? {
            let marked = Mark::in_name(&map.name).map(|(mark, _)| mark);
            if let Some(mark) = marked.or_else(|| used.get(&map.id).copied()).filter(|mark| whose.has(*mark))
            {
                found.maps.insert(map.id, mark);
                found.add(mark, Kind::Map, map.id, map.name);
            }
        }
        for link in objects::links()? {
            if let Some(mark) = found.programs.get(&link.program).copied() {
                let name = names.get(&link.program).map_or("", String::as_str);
                found.add(mark, Kind::Link, link.id, format!("{name} on {}", link.target));
            }
        }
        Ok(found)
    }

    fn add(&mut self, mark: Mark, kind: Kind, id: u32, what: String) {
        self.traces.push(Trace { instance: Some(mark), kind, id: Some(id), what });
    }

    /// Processes that have any of these open, and their listeners on the mesh's ports.
    fn holders(&self) -> Result<Vec<Trace>> {
        let mut found = Vec::new();
        if self.traces.is_empty() {
            return Ok(found);
        }
        for process in fs::read_dir("/proc").context("cannot list /proc")?.flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // It may end while it is looked at.
            let Ok(held) = Held::by(&process.path()) else { continue };
            for mark in self.marks_of(&held) {
                let what = command(&process.path());
                found.push(Trace { instance: Some(mark), kind: Kind::Process, id: Some(pid), what });
                found.extend(held.listeners().into_iter().map(|what| Trace {
                    instance: Some(mark),
                    kind: Kind::Socket,
                    id: None,
                    what: format!("{what}, of process {pid}"),
                }));
            }
        }
        Ok(found)
    }

    fn marks_of(&self, held: &Held) -> BTreeSet<Mark> {
        let programs = held.programs.iter().filter_map(|id| self.programs.get(id));
        programs.chain(held.maps.iter().filter_map(|id| self.maps.get(id))).copied().collect()
    }
}

/// What a process has open, as far as it matters here.
#[derive(Default)]
struct Held {
    programs: HashSet<u32>,
    maps: HashSet<u32>,
    /// Inodes of its sockets.
    sockets: HashSet<u32>,
    /// Network namespaces, by their inode.
    namespaces: BTreeMap<u64, PathBuf>,
}

impl Held {
    fn by(process: &Path) -> io::Result<Self> {
        let mut held = Self::default();
        for entry in fs::read_dir(process.join("fd"))?.flatten() {
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let target = target.to_string_lossy();
            if let Some(inode) = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) {
                held.sockets.extend(inode.parse::<u32>());
            } else if target.starts_with("anon_inode:bpf") {
                held.note_object(&process.join("fdinfo").join(entry.file_name()));
            } else if statfs(&entry.path()).is_ok_and(|fs| fs.filesystem_type() == NSFS)
                && let Ok(metadata) = fs::metadata(entry.path())
            {
                held.namespaces.insert(metadata.ino(), entry.path());
            }
        }
        Ok(held)
    }

    fn note_object(&mut self, info: &Path) {
        for line in fs::read_to_string(info).unwrap_or_default().lines() {
            match line.split_once(':').map(|(key, value)| (key, value.trim().parse())) {
                Some(("prog_id", Ok(id))) => _ = self.programs.insert(id),
                Some(("map_id", Ok(id))) => _ = self.maps.insert(id),
                _ => {}
            }
        }
    }

    /// Its listeners on the mesh's ports, in the namespaces it has open.
    fn listeners(&self) -> Vec<String> {
        let mut found = Vec::new();
        for path in self.namespaces.values() {
            // Other namespaces than those of networks are opened too, and some have just gone.
            let Ok(listening) = Netns::open(path).and_then(|netns| live::listening(&netns)) else { continue };
            let ours = listening.into_iter().filter(|(port, inode)| {
                Listener::ALL.iter().any(|one| one.port() == *port) && self.sockets.contains(inode)
            });
            let place = fs::read_link(path).unwrap_or_else(|_| path.clone());
            found.extend(ours.map(|(port, _)| format!("port {port} in {}", place.display())));
        }
        found
    }
}

/// The command line of a process, or its name where it has none.
fn command(process: &Path) -> String {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).replace('\0', " ").trim_end().to_owned();
    if line.is_empty() {
        fs::read_to_string(process.join("comm")).unwrap_or_default().trim().to_owned()
    } else {
        line
    }
}
