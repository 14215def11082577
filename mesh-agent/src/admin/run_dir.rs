//! The run directory of one agent: its sockets, a note of where its pins are, and what agents before it still count.
//!
//! Promises that others cannot look into it (mode 0700), that whoever finds it finds the agent's maps, and that it
//! goes with the agent that made it, or with the last of its successors. Never removes what no agent put there. Tested below, and with agents in the lab.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use super::{HANDOVER_SOCKET, SOCKET_NAME};

/// The file that says where the agent's pins are: the path, and nothing else.
const BPF_DIR_NOTE: &str = "bpf-dir";

/// The file that says that an agent made the directory, so that it goes with the last one.
const MADE: &str = "made";

/// The directory of metrics of agents that have handed over.
const METRICS: &str = "metrics";

/// The socket at which the agent's CNI plugin calls.
pub const CNI_SOCKET: &str = "cni.sock";

/// The file that says which namespaces were enrolled last, for the plugin to go by while there is no agent.
pub const CNI_NAMESPACES: &str = "cni-namespaces.json";

/// The file that says where the plugin is installed, and keeps the runtime's configurations as they were before.
pub const CNI_INSTALLED: &str = "cni-installed.json";

/// The directory of the network namespaces of a cluster's pods: links, by the pods' UIDs.
pub const NETNS_DIR: &str = "netns";

/// Bits of a mode that are of the group and of others.
const OTHERS: u32 = 6;

/// The run directory of a running agent. Dropped, its note goes, and the directory with it if it was made here.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    made: bool,
    noted: bool,
}

impl RunDir {
    /// Makes the directory unless it is there.
    ///
    /// # Errors
    /// It cannot be made, or is open to others.
    pub fn create(path: PathBuf) -> io::Result<Self> {
        let made = make_private(&path).map_err(|error| {
            io::Error::new(error.kind(), format!("--run-dir {}: {error}", path.display()))
        })?;
        if made {
            fs::write(path.join(MADE), "")?;
        }
        Ok(Self { path, made, noted: false })
    }

    /// Writes down where the pins are, so that `meshctl` and `mesh-agent clean` need not be told. To be called by an
    /// agent that has them for itself.
    ///
    /// # Errors
    /// The note cannot be written.
    pub fn note_bpf_dir(&mut self, bpf_dir: &Path) -> io::Result<()> {
        let bpf_dir = std::path::absolute(bpf_dir)?;
        self.noted = true;
        // By one that has crashed, if not by this one.
        self.made |= self.path.join(MADE).exists();
        // Of agents that have crashed.
        let _ = fs::remove_dir_all(self.metrics());
        fs::write(self.path.join(BPF_DIR_NOTE), bpf_dir.as_os_str().as_bytes())
    }

    /// Whether it goes with this agent.
    pub fn is_made(&self) -> bool {
        self.made
    }

    /// From here on it is this agent's: it was another's, which had or had not made it.
    pub fn take_over(&mut self, made: bool) {
        (self.made, self.noted) = (made, true);
    }

    /// From here on it is another agent's. Where to leave metrics.
    pub fn let_go(&mut self) -> PathBuf {
        (self.made, self.noted) = (false, false);
        self.metrics()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where an agent waits for its successor.
    pub fn handover_socket(&self) -> PathBuf {
        self.path.join(HANDOVER_SOCKET)
    }

    /// Where agents that have handed over leave their metrics.
    pub fn metrics(&self) -> PathBuf {
        self.path.join(METRICS)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // What cannot be removed now, `mesh-agent clean` finds.
        if self.noted {
            let _ = fs::remove_file(self.path.join(BPF_DIR_NOTE));
            let _ = fs::remove_dir_all(self.metrics());
            let _ = fs::remove_dir_all(self.path.join(NETNS_DIR));
        }
        if self.made {
            let _ = fs::remove_file(self.path.join(MADE));
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Where the agent of this run directory has its pins, as far as it has said so.
pub fn noted_bpf_dir(run_dir: &Path) -> Option<PathBuf> {
    let path = fs::read(run_dir.join(BPF_DIR_NOTE)).ok().filter(|path| !path.is_empty())?;
    Some(OsString::from_vec(path).into())
}

/// A run directory and what is in it; nothing where there is none.
///
/// # Errors
/// It cannot be listed.
pub fn run_dir_files(run_dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(run_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => {
            let within = entries?.map(|entry| Ok(entry?.path()));
            [Ok(run_dir.to_path_buf())].into_iter().chain(within).collect()
        }
    }
}

/// Whether an agent runs there.
pub fn is_answered(run_dir: &Path) -> bool {
    UnixStream::connect(run_dir.join(SOCKET_NAME)).is_ok()
}

/// Removes the run directory of an agent that has ended; one that is not there is clean.
///
/// # Errors
/// It holds what no agent puts there, or an agent still answers in it: then it is left as it is.
pub fn clean_run_dir(run_dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(run_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?.collect::<io::Result<Vec<_>>>()?,
    };
    for entry in &entries {
        let (name, kind) = (entry.file_name(), entry.file_type()?);
        let ours = match name.to_str() {
            Some(SOCKET_NAME | CNI_SOCKET | HANDOVER_SOCKET | "handover.sock.new") => kind.is_socket(),
            Some(BPF_DIR_NOTE | MADE | CNI_NAMESPACES | CNI_INSTALLED) => kind.is_file(),
            Some(METRICS | NETNS_DIR) => kind.is_dir(),
            _ => false,
        };
        if !ours {
            let text = format!("it holds {}, which no agent puts there: it is left as it is", name.display());
            return Err(io::Error::new(io::ErrorKind::DirectoryNotEmpty, text));
        }
    }
    if is_answered(run_dir) {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "an agent answers in it: stop it first"));
    }
    for entry in entries {
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(run_dir)
}

/// Makes the directory, or makes sure that it is closed to others. One that is open is refused, not changed: it may
/// be somebody else's.
/// Whether it was made.
pub(super) fn make_private(directory: &Path) -> io::Result<bool> {
    match fs::metadata(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map(|()| true)
        }
        Err(error) => Err(error),
        Ok(metadata) if metadata.permissions().mode().trailing_zeros() >= OTHERS => Ok(false),
        Ok(metadata) => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "directory {} has mode {:03o} and is open to others: use a directory of its own, or chmod 700",
                directory.display(),
                metadata.permissions().mode() & 0o777
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_note_is_found_and_goes_with_the_directory_that_was_made() -> io::Result<()> {
        let parent = tempfile::tempdir()?;
        let path = parent.path().join("mesh/a");
        let mut dir = RunDir::create(path.clone())?;
        assert_eq!(noted_bpf_dir(&path), None);
        dir.note_bpf_dir(Path::new("/sys/fs/bpf/elsewhere"))?;
        assert_eq!(noted_bpf_dir(&path), Some("/sys/fs/bpf/elsewhere".into()));
        // One that was there before stays, and only the note goes.
        drop(RunDir::create(path.clone())?);
        assert_eq!(noted_bpf_dir(&path), Some("/sys/fs/bpf/elsewhere".into()));
        drop(dir);
        assert!(!path.exists() && parent.path().join("mesh").exists());
        Ok(())
    }

    #[test]
    fn the_directory_of_a_crashed_agent_goes_with_the_next() -> io::Result<()> {
        let parent = tempfile::tempdir()?;
        let (path, given) = (parent.path().join("a"), parent.path().join("given"));
        std::mem::forget(RunDir::create(path.clone())?);
        // One that cannot start leaves it to those that can.
        drop(RunDir::create(path.clone())?);
        assert!(path.join(MADE).exists());
        let mut next = RunDir::create(path.clone())?;
        next.note_bpf_dir(Path::new("/sys/fs/bpf/mesh"))?;
        drop(next);
        assert!(!path.exists());
        // That of somebody else stays, whoever crashed in it.
        make_private(&given)?;
        let mut crashed = RunDir::create(given.clone())?;
        crashed.note_bpf_dir(Path::new("/sys/fs/bpf/mesh"))?;
        std::mem::forget(crashed);
        let mut next = RunDir::create(given.clone())?;
        next.note_bpf_dir(Path::new("/sys/fs/bpf/mesh"))?;
        drop(next);
        assert!(fs::read_dir(&given)?.next().is_none());
        Ok(())
    }

    #[test]
    fn only_what_an_agent_left_is_cleaned() -> io::Result<()> {
        let parent = tempfile::tempdir()?;
        let path = parent.path().join("a");
        clean_run_dir(&path)?;
        let mut dir = RunDir::create(path.clone())?;
        dir.note_bpf_dir(Path::new("/sys/fs/bpf/mesh"))?;
        std::mem::forget(dir);
        fs::create_dir(path.join(METRICS))?;
        fs::write(path.join(METRICS).join("1"), "")?;
        fs::create_dir(path.join(NETNS_DIR))?;
        drop(UnixListener::bind(path.join(HANDOVER_SOCKET))?);
        let socket = UnixListener::bind(path.join(SOCKET_NAME))?;
        let alive = clean_run_dir(&path).map_err(|error| error.to_string());
        assert!(alive.is_err_and(|text| text.contains("an agent answers")), "taken from a running agent");
        drop(socket);
        for stranger in ["notes.txt", "admin.sock.d"] {
            fs::write(path.join(stranger), "precious")?;
            let refused = clean_run_dir(&path).map_err(|error| error.to_string());
            assert!(refused.is_err_and(|text| text.contains(stranger)));
            assert!(path.join(SOCKET_NAME).exists() && path.join(BPF_DIR_NOTE).exists());
            fs::remove_file(path.join(stranger))?;
        }
        clean_run_dir(&path)?;
        assert!(!path.exists());
        Ok(())
    }
}
