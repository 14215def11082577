//! Files that objects name by their paths: certificates, keys and lists of what is revoked.
//!
//! Promises that none is read but regular files inside the directory of the configuration: the kernel itself resolves each
//! path beneath it (`openat2`), whatever links lead to. What has become of a file, its absence too, is an object of its own, so
//! that a change of it is a change of the configuration. Never looks at what is in one. Tested in `tests.rs` beside it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read as _,
    os::fd::AsRawFd as _,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
};

use super::file::Looks;
use crate::state::{
    compile::Change,
    resource::{Object, ObjectKey, Resource, file_key},
};

/// Largest file that is read, in bytes: a bundle of every public authority has a quarter of it.
const LARGEST: u64 = 1024 * 1024;

/// How often a path is resolved that somebody changes in the meantime (`openat2` says `EAGAIN` then).
const TRIES: u32 = 16;

/// The files that are named now.
#[derive(Debug, Default)]
pub(super) struct Named {
    held: BTreeMap<Arc<str>, Held>,
}

/// One of them.
#[derive(Debug)]
struct Held {
    object: Arc<Object>,
    /// How it looked; `None`: that tells nothing.
    looks: Option<Looks>,
    /// The directory where it really is.
    place: Option<PathBuf>,
}

impl Named {
    /// All of them, as objects.
    pub fn objects(&self) -> impl Iterator<Item = (ObjectKey, Arc<Object>)> {
        self.held.iter().map(|(path, held)| (file_key(path), Arc::clone(&held.object)))
    }

    /// Where changes of them show, besides the directory of the configuration itself.
    pub fn places(&self, root: &Path) -> BTreeSet<PathBuf> {
        let mut places = BTreeSet::new();
        for (path, held) in &self.held {
            if let Ok(within) = within(root, path) {
                let above = within.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty());
                places.extend(above.map(|above| root.join(above)));
            }
            places.extend(held.place.clone());
        }
        places
    }

    /// Reads those that look otherwise than before: what has become of them. `whole`: all, whatever they look like.
    pub fn read(&mut self, root: &Path, wanted: &BTreeSet<Arc<str>>, whole: bool) -> Vec<Change> {
        let mut changes = Vec::new();
        self.held.retain(|path, _| {
            let stays = wanted.contains(path);
            if !stays {
                changes.push(Change::Gone(file_key(path)));
            }
            stays
        });
        for path in wanted {
            let before = self.held.get(path);
            let known = before.and_then(|held| held.looks).filter(|_| !whole);
            let Some(Content { bytes, looks, place }) = read(root, path, known) else { continue };
            let says_so =
                |held: &&Held| matches!(&held.object.resource, Resource::File(before) if *before == bytes);
            let same = before.filter(says_so).map(|held| Arc::clone(&held.object));
            let object = same.unwrap_or_else(|| {
                let file = root.join(&**path).to_string_lossy().into();
                let object = Arc::new(Object { file, resource: Resource::File(bytes) });
                changes.push(Change::Set(file_key(path), Arc::clone(&object)));
                object
            });
            self.held.insert(Arc::clone(path), Held { object, looks, place });
        }
        changes
    }
}

/// What came of looking at a file.
struct Content {
    bytes: Result<Arc<[u8]>, String>,
    looks: Option<Looks>,
    place: Option<PathBuf>,
}

/// Reads one; `None` where it looks as it did.
fn read(root: &Path, path: &str, known: Option<Looks>) -> Option<Content> {
    let unread = |why: String| {
        let why = format!("the file {path:?} {why}");
        Some(Content { bytes: Err(why), looks: None, place: None })
    };
    let file = match within(root, path).and_then(|within| open(root, within)) {
        Ok(file) => file,
        Err(why) => return unread(why),
    };
    let meta = match file.metadata() {
        Ok(meta) if meta.is_file() => meta,
        Ok(_) => return unread("is not a regular file".to_owned()),
        Err(error) => return unread(format!("cannot be read: {error}")),
    };
    let looks = Looks::of(&meta);
    if known == Some(looks) {
        return None;
    }
    let place = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok();
    let place = place.and_then(|path| path.parent().map(Path::to_owned));
    let mut bytes = Vec::new();
    let bytes = match file.take(LARGEST + 1).read_to_end(&mut bytes) {
        Err(error) => return unread(format!("cannot be read: {error}")),
        Ok(_) if bytes.len() as u64 > LARGEST => {
            Err(format!("the file {path:?} is larger than {LARGEST} bytes"))
        }
        Ok(_) => Ok(bytes.into()),
    };
    Some(Content { bytes, looks: looks.settled(), place })
}

/// The path of a file from the directory of the configuration on.
fn within<'p>(root: &Path, path: &'p str) -> Result<&'p Path, String> {
    let written = Path::new(path);
    let from_root = written.strip_prefix(root).unwrap_or(written);
    if from_root.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Ok(from_root);
    }
    Err(format!("is not inside {}, and files are read from there alone", root.display()))
}

fn open(root: &Path, path: &Path) -> Result<File, String> {
    let dir = File::open(root).map_err(|error| format!("cannot be read: {}: {error}", root.display()))?;
    // A pipe is not waited for.
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let how = OpenHow::new().flags(flags).resolve(resolve);
    let mut opened = openat2(&dir, path, how);
    for _ in 1..TRIES {
        match opened {
            Err(Errno::EAGAIN) => opened = openat2(&dir, path, how),
            _ => break,
        }
    }
    opened.map(File::from).map_err(|error| match error {
        Errno::EXDEV => format!("leads out of {}, and files are read from inside it alone", root.display()),
        Errno::ENOENT => "is not there".to_owned(),
        error => format!("cannot be read: {}", error.desc()),
    })
}
