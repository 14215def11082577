//! What the agent leaves in bpffs while it runs, and taking it away.
//!
//! Maps and links are pinned under `BPF_DIR`: `maps/NAME`, `links/NAME`, and for each pod `pod-maps/COOKIE/NAME` and
//! `pods/COOKIE/NAME` (its links); `guests/COOKIE` leads to the namespace of a pod that has rules and routes. They outlive a crash, so that pods fail closed rather than open, and pass from an
//! agent to its successor, one of the two owning the directory at any time. Nothing outside the directory is ever
//! removed. Tested in the lab.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result, bail};
use aya::programs::links::FdLink;
use nix::sys::statfs::{FsType, statfs};

use super::{at_once::each_at_once, guests, netns::Netns};

/// Under an agent's directory: its shared maps, the node's links, and the links of each pod by its cookie.
pub(super) const MAPS: &str = "maps";
pub(super) const LINKS: &str = "links";
pub(super) const PODS: &str = "pods";
/// And where the pods with rules and routes in their namespace are written down, by their cookie.
pub(super) const GUESTS: &str = "guests";

/// `BPF_FS_MAGIC`.
const BPF_FS: FsType = FsType(0xcafe_4a11);

/// The directories in bpffs, for one agent alone.
#[derive(Debug)]
pub(super) struct BpfDir {
    path: PathBuf,
    /// Locked for as long as the agent lives; the kernel lets go of it when the process ends, however it ends. An agent
    /// and its successor hold the one lock together for a moment, and each lets go of it by closing it alone.
    lock: Mutex<Option<File>>,
    /// Whether it is this agent's to change, and to unlock: not before it was handed over, nor after.
    ours: AtomicBool,
    /// Whether something of agents that crashed may be there. Nothing comes to be there while an agent lives.
    pub(super) crashed: AtomicBool,
}

impl Drop for BpfDir {
    fn drop(&mut self) {
        if self.is_ours()
            && let Some(lock) = self.file().take()
        {
            // Closing it would do as well, if no child of this process held it open too.
            let _ = lock.unlock();
        }
    }
}

impl BpfDir {
    /// Makes the directories, empty. What an agent before us left is set aside, and goes on refusing, until
    /// [`Capture::forget_crashed`](super::Capture::forget_crashed).
    pub(super) fn create(path: &Path) -> Result<Self> {
        check_bpffs(path)?;
        fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        let dir = Self::lock(path)?;
        dir.set_aside()?;
        for sub in [dir.maps(), dir.links(), dir.pods(), dir.pod_maps()] {
            make(&sub)?;
        }
        Ok(dir)
    }

    /// The directory of an agent that hands over, by the lock it holds. Not ours until [`BpfDir::take`].
    pub(super) fn of_another(path: &Path, lock: OwnedFd) -> Self {
        Self {
            path: path.to_path_buf(),
            lock: Mutex::new(Some(lock.into())),
            ours: AtomicBool::new(false),
            crashed: AtomicBool::new(true),
        }
    }

    fn lock(path: &Path) -> Result<Self> {
        let lock = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                path: path.to_path_buf(),
                lock: Mutex::new(Some(lock)),
                ours: AtomicBool::new(true),
                crashed: AtomicBool::new(true),
            }),
            Err(fs::TryLockError::WouldBlock) => bail!(
                "another agent is running with {}: stop it, or give this one its own --bpf-dir",
                path.display()
            ),
            Err(fs::TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("cannot lock {}", path.display()))
            }
        }
    }

    /// Whether this agent may change what is there.
    pub(super) fn is_ours(&self) -> bool {
        self.ours.load(Ordering::Acquire)
    }

    /// From here on it is this agent's.
    pub(super) fn take(&self) {
        self.ours.store(true, Ordering::Release);
    }

    /// From here on it is another agent's, which holds the lock too.
    pub(super) fn let_go(&self) {
        self.ours.store(false, Ordering::Release);
        drop(self.file().take());
    }

    /// The lock, for another agent to hold too.
    pub(super) fn share_lock(&self) -> io::Result<OwnedFd> {
        match &*self.file() {
            Some(lock) => lock.as_fd().try_clone_to_owned(),
            None => Err(io::Error::other("it was handed over already")),
        }
    }

    fn file(&self) -> MutexGuard<'_, Option<File>> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes everything away, and the directory with it.
    pub(super) fn remove(&self) -> Result<()> {
        self.empty()?;
        fs::remove_dir(&self.path).with_context(|| format!("cannot remove {}", self.path.display()))
    }

    /// Takes everything away: links first, so that the kernel is back to itself before the maps go.
    fn empty(&self) -> Result<()> {
        self.forget_own()?;
        self.forget_crashed()?;
        for entry in list(&self.path)? {
            fs::remove_dir_all(&entry).with_context(|| format!("cannot remove {}", entry.display()))?;
        }
        Ok(())
    }

    /// Gives the directory up before anything was done with it: what a crashed agent refuses goes on being refused.
    pub(super) fn abandon(&self) -> Result<()> {
        self.forget_own()?;
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => {
                Err(error).with_context(|| format!("cannot remove {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Takes away what this agent has made, and nothing of one that crashed before it.
    fn forget_own(&self) -> Result<()> {
        detach_agent(&self.path)?;
        for own in [self.maps(), self.pods(), self.pod_maps(), self.guests()] {
            unpin_all(&own)?;
        }
        Ok(())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn maps(&self) -> PathBuf {
        self.path.join(MAPS)
    }

    pub(super) fn links(&self) -> PathBuf {
        self.path.join(LINKS)
    }

    /// The links of the pod in the network namespace with this cookie.
    pub(super) fn pod(&self, cookie: u64) -> PathBuf {
        self.pods().join(cookie.to_string())
    }

    fn pods(&self) -> PathBuf {
        self.path.join(PODS)
    }

    /// The maps of the pod in the network namespace with this cookie.
    pub(super) fn maps_of(&self, cookie: u64) -> PathBuf {
        self.pod_maps().join(cookie.to_string())
    }

    pub(super) fn guests(&self) -> PathBuf {
        self.path.join(GUESTS)
    }

    fn pod_maps(&self) -> PathBuf {
        self.path.join("pod-maps")
    }
}

/// Makes a directory that is not there yet.
pub(super) fn make(path: &Path) -> Result<()> {
    fs::create_dir(path).with_context(|| format!("cannot make {}", path.display()))
}

/// Removes a directory of pinned maps; one that is not there is fine.
pub(super) fn unpin_all(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Pins a link, which from then on lasts as long as its file.
pub(super) fn pin(link: FdLink, path: &Path) -> Result<()> {
    link.pin(path).map(drop).with_context(|| format!("cannot pin {}", path.display()))
}

/// Takes away everything an agent has left under this directory. A directory that is not there is clean; one that a
/// running agent uses is refused.
pub fn clean(bpf_dir: &Path) -> Result<()> {
    if !bpf_dir.exists() {
        return Ok(());
    }
    check_bpffs(bpf_dir)?;
    BpfDir::lock(bpf_dir)?.remove()
}

/// Detaches the links pinned in this directory that are none of those to keep.
pub(super) fn detach_others(dir: &Path, keep: impl Fn(&str) -> bool) -> Result<()> {
    for path in list(dir)? {
        if path.file_name().and_then(|name| name.to_str()).is_some_and(&keep) {
            continue;
        }
        detach(&path).with_context(|| format!("cannot detach {}", path.display()))?;
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// Detaches every link pinned in this directory and removes the directory.
pub(super) fn detach_all(dir: &Path) -> Result<()> {
    detach_others(dir, |_| false)?;
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Detaches every link of an agent whose things are in this directory: the node's, and those of its pods, whose rules and
/// routes go then.
pub(super) fn detach_agent(dir: &Path) -> Result<()> {
    detach_all(&dir.join(LINKS))?;
    each_at_once(&list(&dir.join(PODS))?, |pod| detach_all(pod))?;
    guests::leave_all(&dir.join(GUESTS))
}

/// The paths in a directory; none where there is no directory.
pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect()),
    };
    entries.with_context(|| format!("cannot list {}", dir.display()))
}

/// Has a pinned link run this program from here on, in one step: at no instant is there none. False when there is no
/// such link, or what it was attached to is gone.
pub(super) fn replace(path: &Path, program: BorrowedFd<'_>) -> Result<bool> {
    let replaced = open_link(path).and_then(|link| {
        #[expect(unsafe_code, reason = "the loader library replaces no program of a pinned link")]
        // SAFETY: both descriptors are open for the length of the call; no options are given.
        let failed =
            unsafe { libbpf_sys::bpf_link_update(link.as_raw_fd(), program.as_raw_fd(), std::ptr::null()) };
        if failed < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    });
    match replaced {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) if is_detached(&error) => {
            fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
            Ok(false)
        }
        Err(error) => Err(error).with_context(|| format!("cannot replace the program of {}", path.display())),
    }
}

/// Which packets of an interface a program sees.
#[derive(Debug, Clone, Copy)]
pub(super) enum Hook {
    /// Those that come in.
    Ingress,
    /// Those that go out.
    Egress,
}

/// Attaches a program to an interface of the namespace (`None`: the agent's own), after those that are there (TCX, Linux 6.6), and pins its link. A
/// link that is there already is given the program instead.
pub(super) fn attach_tcx(
    netns: Option<&Netns>,
    program: BorrowedFd<'_>,
    interface: u32,
    hook: Hook,
    pinned: &Path,
) -> Result<()> {
    if replace(pinned, program)? {
        return Ok(());
    }
    let hook = match hook {
        Hook::Ingress => libbpf_sys::BPF_TCX_INGRESS,
        Hook::Egress => libbpf_sys::BPF_TCX_EGRESS,
    };
    let path = CString::new(pinned.as_os_str().as_bytes())?;
    let attach = || {
        #[expect(
            unsafe_code,
            reason = "the loader library attaches no program that it has not loaded itself"
        )]
        // SAFETY: an open descriptor, an index, and no options; a descriptor that is not negative is ours, and closed by
        // its owner here.
        unsafe {
            let fd = libbpf_sys::bpf_link_create(
                program.as_raw_fd(),
                interface.cast_signed(),
                hook,
                std::ptr::null(),
            );
            if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
        }
    };
    let link = match netns {
        Some(netns) => netns.enter(attach),
        None => attach(),
    };
    let link = link.context("the kernel does not attach a program to it")?;
    #[expect(unsafe_code, reason = "as above")]
    // SAFETY: `path` is a C string, and the descriptor is open for the length of the call.
    let failed = unsafe { libbpf_sys::bpf_obj_pin(link.as_raw_fd(), path.as_ptr()) };
    if failed < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("cannot pin {}", pinned.display()));
    }
    Ok(())
}

/// What the link was attached to is gone.
fn is_detached(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::ENOLINK)
}

/// Detaches a pinned link at once. Removing its file would do as well, but only after a while: the kernel waits for
/// running programs first.
fn detach(path: &Path) -> io::Result<()> {
    let link = open_link(path)?;
    #[expect(unsafe_code, reason = "the loader library has no call to detach a pinned link")]
    // SAFETY: the descriptor is open for the length of the call.
    let failed = unsafe { libbpf_sys::bpf_link_detach(link.as_raw_fd()) };
    match io::Error::last_os_error() {
        _ if failed >= 0 => Ok(()),
        error if is_detached(&error) => Ok(()),
        error => Err(error),
    }
}

fn open_link(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    #[expect(unsafe_code, reason = "the loader library opens no pinned link by its descriptor")]
    // SAFETY: `path` is a C string; a descriptor that is not negative is ours and closed by its owner here.
    unsafe {
        let fd = libbpf_sys::bpf_obj_get(path.as_ptr());
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// The nearest directory that exists has to be in bpffs.
fn check_bpffs(path: &Path) -> Result<()> {
    let Some(there) = path.ancestors().find(|ancestor| ancestor.is_dir()) else {
        bail!("{}: no such directory", path.display());
    };
    let kind = statfs(there).with_context(|| format!("{}", there.display()))?.filesystem_type();
    if kind != BPF_FS {
        bail!(
            "{} is not in a BPF file system: run `mount -t bpf bpf /sys/fs/bpf` (in a container, mount the host's), or \
             name another directory with --bpf-dir",
            path.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elsewhere_than_bpffs_is_refused_and_left_alone() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        fs::create_dir(dir.path().join("maps"))?;
        for result in [clean(dir.path()), BpfDir::create(&dir.path().join("mesh")).map(drop)] {
            assert!(result.is_err_and(|error| error.to_string().contains("mount -t bpf")));
        }
        assert!(dir.path().join("maps").exists());
        Ok(())
    }

    #[test]
    fn nothing_there_is_clean() -> Result<()> {
        clean(Path::new("/sys/fs/bpf/there-is-no-such-directory"))
    }
}
