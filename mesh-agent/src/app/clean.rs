//! `mesh-agent clean`: takes away what agents have left, or shows it (`--check`).
//!
//! Promises to concern one instance alone where it is told which, to say what it removed or that there was nothing, and
//! to fail if anything is still there afterwards. Never touches what belongs to an agent that runs. Tested in the lab
//! (`tests/tests/no_residue.rs`, `tests/tests/start_and_stop.rs`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    admin,
    capture::{
        self, Mark,
        residue::{self, Kind, Trace, Whose},
    },
    cni::install::Installation,
    config::{BPF_DIR, CleanConfig, RUN_DIRS},
    ctl::{self, Rows},
};

/// The kernel frees programs and maps a moment after the last pin has gone.
const SETTLING: Duration = Duration::from_secs(5);
const SETTLED_EVERY: Duration = Duration::from_millis(20);

/// Where the traces of one agent are.
struct Place {
    run_dir: PathBuf,
    /// `None` where its pins are not known, and the usual place has another's.
    bpf_dir: Option<PathBuf>,
}

/// What is cleaned or looked at.
struct Scope {
    whose: Whose,
    places: Vec<Place>,
}

/// `mesh-agent clean`. False when `--check` finds anything.
///
/// # Errors
/// An agent runs, or something is left.
pub fn clean(config: &CleanConfig, out: &mut dyn Write) -> Result<bool> {
    let scope = Scope::of(config)?;
    let found = scope.find()?;
    if !config.check {
        return remove(&scope, &found, out).map(|()| true);
    }
    ctl::print(config.output, out, &found, |found| rows(found))?;
    Ok(found.is_empty())
}

fn rows(found: &[Trace]) -> Rows {
    let mut rows = Rows::new(["INSTANCE", "KIND", "ID", "WHAT"]);
    for Trace { instance, kind, id, what } in found {
        rows.push(&[
            ctl::or_dash(instance.as_ref()),
            kind.word().to_owned(),
            ctl::or_dash(id.as_ref()),
            what.clone(),
        ]);
    }
    rows
}

impl Scope {
    fn of(config: &CleanConfig) -> Result<Self> {
        if config.names_one() { Self::of_one(config) } else { Self::of_all() }
    }

    fn of_one(config: &CleanConfig) -> Result<Self> {
        let run_dir = config.run_dir();
        let told = config.bpf_dir.clone().or_else(|| admin::noted_bpf_dir(&run_dir));
        let usual = PathBuf::from(BPF_DIR);
        let own = config.node.as_ref().map(|node| Mark::of(node, told.as_ref().unwrap_or(&usual)));
        let bpf_dir = match (told, own) {
            (Some(told), _) => Some(told),
            // Another node's agent may have its pins there.
            (None, Some(own)) => Some(usual).filter(|usual| is_of(own, usual)),
            (None, None) => Some(usual),
        };
        let mut marks: BTreeSet<Mark> = own.into_iter().collect();
        if let Some(dir) = &bpf_dir {
            marks.extend(residue::marks_in(dir)?);
        }
        Ok(Self { whose: Whose::Of(marks), places: vec![Place { run_dir, bpf_dir }] })
    }

    fn of_all() -> Result<Self> {
        let mut places = Vec::new();
        for entry in fs::read_dir(RUN_DIRS).into_iter().flatten() {
            let run_dir = entry.with_context(|| format!("cannot list {RUN_DIRS}"))?.path();
            let bpf_dir = admin::noted_bpf_dir(&run_dir);
            places.push(Place { run_dir, bpf_dir });
        }
        let usual = PathBuf::from(BPF_DIR);
        if !places.iter().any(|place| place.bpf_dir.as_ref() == Some(&usual)) {
            places.push(Place { run_dir: PathBuf::new(), bpf_dir: Some(usual) });
        }
        Ok(Self { whose: Whose::All, places })
    }

    fn find(&self) -> Result<Vec<Trace>> {
        let bpf_dirs: Vec<_> = self.places.iter().filter_map(|place| place.bpf_dir.clone()).collect();
        let mut found = residue::find(&self.whose, &bpf_dirs)?;
        for Place { run_dir, .. } in &self.places {
            let files =
                admin::run_dir_files(run_dir).with_context(|| format!("looking at {}", run_dir.display()))?;
            let file = |path: PathBuf| Trace {
                instance: None,
                kind: Kind::File,
                id: None,
                what: path.display().to_string(),
            };
            let plugin = Installation::left_in(run_dir)?.map(|left| left.files()).unwrap_or_default();
            found.extend(files.into_iter().chain(plugin).map(file));
        }
        Ok(found)
    }
}

fn is_of(mark: Mark, bpf_dir: &Path) -> bool {
    residue::marks_in(bpf_dir).is_ok_and(|marks| marks.iter().all(|other| *other == mark))
}

fn remove(scope: &Scope, found: &[Trace], out: &mut dyn Write) -> Result<()> {
    let mut failed = Vec::new();
    for place in &scope.places {
        failed.extend(place.remove().err().map(|error| format!("{error:#}")));
    }
    if let (Whose::Of(marks), true) = (&scope.whose, failed.is_empty()) {
        residue::detach_unpinned(marks)?;
    }
    let deadline = Instant::now() + SETTLING;
    let mut left = scope.find()?;
    while failed.is_empty() && !left.is_empty() && Instant::now() < deadline {
        thread::sleep(SETTLED_EVERY);
        left = scope.find()?;
    }
    let gone: Vec<_> = found.iter().filter(|trace| !left.contains(trace)).collect();
    match (gone.is_empty(), left.is_empty()) {
        (false, _) => writeln!(out, "removed {}", counted(gone.into_iter()))?,
        (true, true) => writeln!(out, "nothing to remove: no agent has left anything here")?,
        (true, false) => {}
    }
    if !left.is_empty() {
        failed.push(format!("still there: {}; `mesh-agent clean --check` shows each", counted(left.iter())));
    }
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("\n")) }
}

impl Place {
    fn remove(&self) -> Result<()> {
        if let Some(bpf_dir) = &self.bpf_dir {
            capture::clean(bpf_dir)?;
        }
        if !admin::is_answered(&self.run_dir)
            && let Some(plugin) = Installation::left_in(&self.run_dir)?
        {
            plugin.remove().context("removing the CNI plugin")?;
        }
        admin::clean_run_dir(&self.run_dir).with_context(|| format!("removing {}", self.run_dir.display()))
    }
}

/// How many of each kind, in words.
fn counted<'a>(traces: impl Iterator<Item = &'a Trace>) -> String {
    let mut counts: BTreeMap<Kind, usize> = BTreeMap::new();
    for trace in traces {
        *counts.entry(trace.kind).or_default() += 1;
    }
    let words = counts.into_iter().map(|(kind, count)| match (kind, count) {
        (kind, 1) => format!("1 {}", kind.word()),
        (Kind::Process, count) => format!("{count} processes"),
        (kind, count) => format!("{count} {}s", kind.word()),
    });
    words.collect::<Vec<_>>().join(", ")
}
