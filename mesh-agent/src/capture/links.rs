//! What the agent leaves in bpffs while it runs, and taking it away.
//!
//! Maps and links are pinned under `BPF_DIR`: `maps/NAME`, `links/NAME`, `pods/COOKIE/NAME`. They outlive a crash, so
//! that pods fail closed rather than open. Nothing outside the directory is ever removed. Tested in the lab.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use aya::programs::links::FdLink;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::statfs::{FsType, statfs},
};

/// `BPF_FS_MAGIC`.
const BPF_FS: FsType = FsType(0xcafe_4a11);

/// The directories in bpffs, for one agent alone.
#[derive(Debug)]
pub(super) struct BpfDir {
    path: PathBuf,
    /// Held for as long as the agent lives; the kernel lets go of it when the process ends, however it ends.
    _lock: Flock<File>,
}

impl BpfDir {
    /// Makes the directories, empty. What an agent before us left is taken away first: its links would steer
    /// connections to listeners that are gone.
    pub(super) fn create(path: &Path) -> Result<Self> {
        check_bpffs(path)?;
        fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        let dir = Self::lock(path)?;
        dir.empty()?;
        for sub in [dir.maps(), dir.links(), dir.pods()] {
            fs::create_dir(&sub).with_context(|| format!("cannot make {}", sub.display()))?;
        }
        Ok(dir)
    }

    fn lock(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { path: path.to_path_buf(), _lock: lock }),
            Err((_, Errno::EWOULDBLOCK)) => bail!(
                "another agent is running with {}: stop it, or give this one its own --bpf-dir",
                path.display()
            ),
            Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// Takes everything away, and the directory with it.
    pub(super) fn remove(&self) -> Result<()> {
        self.empty()?;
        fs::remove_dir(&self.path).with_context(|| format!("cannot remove {}", self.path.display()))
    }

    /// Takes everything away: links first, so that the kernel is back to itself before the maps go.
    fn empty(&self) -> Result<()> {
        detach_all(&self.links())?;
        for pod in list(&self.pods())? {
            detach_all(&pod)?;
        }
        for entry in list(&self.path)? {
            fs::remove_dir_all(&entry).with_context(|| format!("cannot remove {}", entry.display()))?;
        }
        Ok(())
    }

    pub(super) fn maps(&self) -> PathBuf {
        self.path.join("maps")
    }

    pub(super) fn links(&self) -> PathBuf {
        self.path.join("links")
    }

    /// The links of the pod in the network namespace with this cookie.
    pub(super) fn pod(&self, cookie: u64) -> PathBuf {
        self.pods().join(cookie.to_string())
    }

    fn pods(&self) -> PathBuf {
        self.path.join("pods")
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

/// Detaches every link pinned in this directory and removes the directory.
pub(super) fn detach_all(dir: &Path) -> Result<()> {
    for path in list(dir)? {
        detach(&path).with_context(|| format!("cannot detach {}", path.display()))?;
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// The paths in a directory; none where there is no directory.
fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect()),
    };
    entries.with_context(|| format!("cannot list {}", dir.display()))
}

/// Detaches a pinned link at once. Removing its file would do as well, but only after a while: the kernel waits for
/// running programs first.
fn detach(path: &Path) -> io::Result<()> {
    use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

    let path = CString::new(path.as_os_str().as_bytes())?;
    #[expect(unsafe_code, reason = "the loader library has no call to detach a pinned link")]
    // SAFETY: `path` is a C string; a descriptor that is not negative is ours and closed by its owner here.
    let link = unsafe {
        let fd = libbpf_sys::bpf_obj_get(path.as_ptr());
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    #[expect(unsafe_code, reason = "as above")]
    // SAFETY: the descriptor is open for the length of the call.
    let failed = unsafe { libbpf_sys::bpf_link_detach(link.as_raw_fd()) };
    match io::Error::last_os_error() {
        _ if failed >= 0 => Ok(()),
        // What it was attached to is gone already.
        error if error.raw_os_error() == Some(nix::libc::ENOLINK) => Ok(()),
        error => Err(error),
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
