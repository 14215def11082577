//! A directory of manifests: `*.yaml`, `*.yml` and `*.json`, each with any number of documents or Lists.
//!
//! Promises that a file or object that becomes invalid keeps its last good state, that a deleted file's objects go,
//! and that there is one object per kind, namespace and name: the first file (by name) that has it; and that of what has
//! changed only the files are read that say so, and only the objects checked that are written otherwise. Objects of kinds
//! that are none of the mesh's business are passed over. What objects name as files is `named.rs`'s to read. Tested in
//! `tests.rs` beside it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map::Entry},
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;

use super::{
    file::{File, Held, Outcome, problem},
    named::Named,
};
use crate::state::{
    Cause, Problem,
    compile::Change,
    resource::{Object, ObjectKey, Objects},
};

/// Where to look for changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Look {
    /// At these entries of the directory.
    Entries(BTreeSet<OsString>),
    /// At all entries; files that look as they did are not read.
    Anything,
    /// At the content of all files, however they look.
    Everything,
}

/// What a directory held when it was last read.
#[derive(Debug)]
pub struct Directory {
    dir: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// What the objects name as files; and which.
    named: Named,
    names: BTreeSet<Arc<str>>,
    /// Whether it is read for a gateway.
    serves: bool,
    /// Objects that several files have.
    contested: BTreeSet<ObjectKey>,
    /// Which of them.
    contests: Vec<Problem>,
    /// Whether the content of a file may change without a word about its own name: some are links.
    has_links: bool,
    /// Why the directory as a whole cannot be read.
    problem: Option<Problem>,
}

impl Directory {
    /// Nothing read yet.
    pub fn new(dir: PathBuf) -> Self {
        let (files, contested, contests) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
        let (named, names) = (Named::default(), BTreeSet::new());
        Self { dir, files, named, names, serves: false, contested, contests, has_links: false, problem: None }
    }

    /// Whether it is read for a gateway, which needs the files that `Gateway`s name: the keys are for nobody else.
    pub fn serving(self, serves: bool) -> Self {
        Self { serves, ..self }
    }

    /// Whether the directory can be listed.
    pub fn check(&self) -> anyhow::Result<()> {
        std::fs::read_dir(&self.dir)
            .with_context(|| format!("cannot read the directory of manifests {}", self.dir.display()))?;
        Ok(())
    }

    /// Reads what changed: what has become of `objects`, which are those of the directory as it was. While the directory
    /// cannot be listed, everything keeps its last good state.
    pub fn read(&mut self, look: &Look, objects: &Objects) -> Vec<Change> {
        let mut touched = Vec::new();
        match look {
            // Where some are links, the content of any may have changed.
            Look::Entries(names) if self.problem.is_none() && !self.has_links => {
                for name in names.iter().filter(|name| is_manifest(Path::new(name))) {
                    self.read_file(self.dir.join(name), true, &mut touched);
                }
            }
            _ => self.read_all(*look == Look::Everything, &mut touched),
        }
        if !touched.is_empty() {
            let of_gateways =
                self.files.values().filter(|_| self.serves).flat_map(|file| &file.gateways_names);
            let names = self.files.values().flat_map(|file| &file.names);
            self.names = names.chain(of_gateways).cloned().collect();
        }
        let mut changes = self.changes(touched, objects);
        if self.problem.is_none() {
            changes.extend(self.named.read(&self.dir, &self.names, *look == Look::Everything));
        }
        changes
    }

    /// Directories, besides this one, where a change may be one of the configuration.
    pub fn places(&self) -> BTreeSet<PathBuf> {
        self.named.places(&self.dir)
    }

    fn read_all(&mut self, whole: bool, touched: &mut Vec<Touched>) {
        let listed = match manifests(&self.dir) {
            Ok(listed) => listed,
            Err(error) => {
                let message = format!("the directory cannot be read, what it held stays in force: {error}");
                self.problem = Some(problem(&self.dir, message));
                return;
            }
        };
        self.problem = None;
        let gone: Vec<PathBuf> = self.files.keys().filter(|path| !listed.contains(*path)).cloned().collect();
        for path in gone.into_iter().chain(listed) {
            self.read_file(path, whole, touched);
        }
        self.has_links = self.files.values().any(|file| file.is_link);
    }

    /// `whole`: whatever it looks like.
    fn read_file(&mut self, path: PathBuf, whole: bool, touched: &mut Vec<Touched>) {
        let mut file = self.files.remove(&path).unwrap_or_default();
        match file.read(&path, whole) {
            Outcome::Taken(before) => compare(&path, &before, &file.objects, touched),
            Outcome::Gone if self.dir.is_dir() => return compare(&path, &file.objects, &[], touched),
            // Gone with all the others: whoever looks next says so.
            Outcome::Same | Outcome::Gone => {}
        }
        self.has_links |= file.is_link;
        self.files.insert(path, file);
    }

    /// What has become of the objects. Where only one file has an object that is simple.
    fn changes(&mut self, touched: Vec<Touched>, objects: &Objects) -> Vec<Change> {
        let mut names = BTreeSet::new();
        let alone = |one: &Touched| {
            let others = objects.get(&one.key).is_some_and(|held| *held.file != *one.path.to_string_lossy());
            !others && !self.contested.contains(&one.key) && names.insert(one.key.clone())
        };
        if touched.iter().all(alone) {
            let change = |one: Touched| match one.after {
                Some(object) => Change::Set(one.key, object),
                None => Change::Gone(one.key),
            };
            return touched.into_iter().map(change).collect();
        }
        let now = self.merge();
        let gone = objects.keys().filter(|key| !now.contains_key(*key)).cloned().map(Change::Gone);
        let mut changes: Vec<Change> = gone.collect();
        let new = now
            .into_iter()
            .filter(|(key, object)| objects.get(key).is_none_or(|before| !Arc::ptr_eq(before, object)));
        changes.extend(new.map(|(key, object)| Change::Set(key, object)));
        changes
    }

    /// Kinds of objects that are here and not the mesh's, as `kind (apiVersion)`.
    pub fn foreign(&self) -> BTreeSet<&str> {
        self.files.values().flat_map(|file| &file.foreign).map(String::as_str).collect()
    }

    /// What is wrong with the files.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        let of_files = self.files.values().flat_map(|file| &file.problems);
        self.problem.iter().chain(of_files).chain(&self.contests)
    }

    /// With these files, read already.
    pub(super) fn of(files: BTreeMap<PathBuf, File>) -> Self {
        Self { files, ..Self::new(PathBuf::new()) }
    }

    /// All objects; and which several files have.
    pub(super) fn merge(&mut self) -> Objects {
        let mut objects: Objects = self.named.objects().collect();
        self.contested.clear();
        self.contests.clear();
        for (path, file) in &self.files {
            for Held { key, object, .. } in &file.objects {
                match objects.entry(key.clone()) {
                    Entry::Vacant(entry) => {
                        entry.insert(Arc::clone(object));
                        continue;
                    }
                    Entry::Occupied(mut entry) if entry.get().is_stand_in() => {
                        entry.insert(Arc::clone(object));
                    }
                    Entry::Occupied(entry) => self.contests.push(Problem {
                        object: Some(key.to_string()),
                        cause: Cause::Conflict,
                        ..problem(
                            path,
                            format!("{} has this object too, and holds; remove one", entry.get().file),
                        )
                    }),
                }
                self.contested.insert(key.clone());
            }
        }
        objects
    }
}

/// An object that a file has now and had not, or has no more.
struct Touched {
    path: PathBuf,
    key: ObjectKey,
    after: Option<Arc<Object>>,
}

fn compare(path: &Path, before: &[Held], after: &[Held], touched: &mut Vec<Touched>) {
    let mut old: HashMap<&ObjectKey, &Arc<Object>> =
        before.iter().map(|held| (&held.key, &held.object)).collect();
    let mut touch = |key: &ObjectKey, after| {
        touched.push(Touched { path: path.to_owned(), key: key.clone(), after });
    };
    for Held { key, object, .. } in after {
        if !old.remove(key).is_some_and(|before| Arc::ptr_eq(before, object)) {
            touch(key, Some(Arc::clone(object)));
        }
    }
    for key in old.into_keys() {
        touch(key, None);
    }
}

/// The manifests of a directory, by name.
pub(super) fn manifests(dir: &Path) -> std::io::Result<BTreeSet<PathBuf>> {
    let mut paths = BTreeSet::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if is_manifest(&path) {
            paths.insert(path);
        }
    }
    Ok(paths)
}

/// Hidden files are none (a mounted `ConfigMap` keeps its data in one).
fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let extensions = ["yaml", "yml", "json"].map(OsStr::new);
    !hidden && path.extension().is_some_and(|extension| extensions.contains(&extension))
}

/// The objects of a YAML text, and what was refused: the same as if it stood in the file `test.yaml`.
pub fn read_text(text: &str) -> (Objects, Vec<Problem>) {
    let mut file = File::default();
    file.take(Path::new("test.yaml"), text.as_bytes());
    let mut directory = Directory::of([("test.yaml".into(), file)].into());
    (directory.merge(), directory.problems().cloned().collect())
}
