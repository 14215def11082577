//! Where the agent's own endpoints listen.
//!
//! Promises that the admin socket is the administrator's alone (mode 0600 in a directory of mode 0700, or loopback),
//! and that it goes with its listener, or with the successor it was handed to. Never takes a socket away from an agent
//! that still answers on it, unless it was told to. Tested in `tests.rs`.

use std::{
    fmt, io,
    net::SocketAddr,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::net::{TcpListener, UnixListener, UnixStream};

use super::run_dir::make_private;

/// Name of the admin socket in the run directory.
pub const SOCKET_NAME: &str = "admin.sock";
/// Name of the socket, in the run directory, on which an agent waits for its successor.
pub const HANDOVER_SOCKET: &str = "handover.sock";

/// Where the operator's endpoints are: `unix:PATH`, or `IP:PORT` on loopback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// Loopback TCP.
    Tcp(SocketAddr),
}

/// Why a text is no admin address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither form.
    #[error("`{0}` is neither unix:PATH nor IP:PORT")]
    Syntax(String),
    /// Everybody on the network could reach it.
    #[error(
        "`{0}` is not a loopback address: the admin endpoint is for this machine only; use 127.0.0.1 or unix:PATH"
    )]
    NotLoopback(SocketAddr),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        let address: SocketAddr = text.parse().map_err(|_| AddressError::Syntax(text.to_owned()))?;
        if address.ip().to_canonical().is_loopback() {
            Ok(Self::Tcp(address))
        } else {
            Err(AddressError::NotLoopback(address))
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// A bound listener, of either kind.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket.
    Unix(Socket),
    /// TCP.
    Tcp(TcpListener),
}

/// A bound unix socket; its file goes when it is dropped.
#[derive(Debug)]
pub struct Socket {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file: what another has put in its place is not ours to remove.
    file: (u64, u64),
    keep: KeepFile,
}

/// Whether the file of a unix socket outlives its listener in this process, because it is another's. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct KeepFile(Arc<AtomicBool>);

impl KeepFile {
    /// The file stays, or goes, when the listener does.
    pub fn set(&self, keep: bool) {
        self.0.store(keep, Ordering::Release);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let ours = file_id(&self.path).is_ok_and(|file| file == self.file);
        if !self.keep.0.load(Ordering::Acquire)
            && ours
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "a socket is left");
        }
    }
}

impl Socket {
    /// Binds this path (mode 0600), in place of whatever socket is there, at no instant leaving nothing.
    pub fn put(path: &Path) -> io::Result<Self> {
        let mut beside = path.as_os_str().to_owned();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        match std::fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut socket = bind_private(&beside)?;
        std::fs::rename(&beside, path)?;
        path.clone_into(&mut socket.path);
        Ok(socket)
    }

    /// Says whether the file goes with this socket.
    pub fn keep_file(&self) -> KeepFile {
        self.keep.clone()
    }

    /// The next connection.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

fn file_id(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

impl Listener {
    /// Binds the operator's endpoint. A unix socket's directory is made (0700) if it is not there; a socket that
    /// nobody listens on any more is replaced.
    pub async fn bind_admin(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => bind_unix(path).await.map(Self::Unix),
            Address::Tcp(address) => Self::bind(*address).await,
        }
        .map_err(|error| io::Error::new(error.kind(), format!("admin endpoint {address}: {error}")))
    }

    /// Binds a TCP address, of any interface.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let bound = TcpListener::bind(address).await;
        bound
            .map(Self::Tcp)
            .map_err(|error| io::Error::new(error.kind(), format!("listening on {address}: {error}")))
    }

    /// The listener another agent has had, if it listens at this address. The file of a unix socket stays, until
    /// [`Listener::keep_file`] says otherwise.
    ///
    /// # Errors
    /// It is no socket that can be listened on.
    pub fn handed_over(file: OwnedFd, wanted: &Address) -> io::Result<Option<Self>> {
        match wanted {
            Address::Tcp(address) => {
                let listener = std::net::TcpListener::from(file);
                if listener.local_addr().ok() != Some(*address) {
                    return Ok(None);
                }
                TcpListener::from_std(listener).map(Self::Tcp).map(Some)
            }
            Address::Unix(path) => {
                let listener = std::os::unix::net::UnixListener::from(file);
                let at = listener.local_addr().ok();
                if at.as_ref().and_then(|at| at.as_pathname()) != Some(path) {
                    return Ok(None);
                }
                let (listener, keep) = (UnixListener::from_std(listener)?, KeepFile::default());
                keep.set(true);
                let socket = Socket { listener, path: path.clone(), file: file_id(path)?, keep };
                Ok(Some(Self::Unix(socket)))
            }
        }
    }

    /// The same socket, for another process.
    pub fn share(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Unix(socket) => socket.listener.as_fd().try_clone_to_owned(),
            Self::Tcp(listener) => listener.as_fd().try_clone_to_owned(),
        }
    }

    /// Says whether the file of a unix socket goes with this listener; of no effect on TCP.
    pub fn keep_file(&self) -> KeepFile {
        match self {
            Self::Unix(socket) => socket.keep.clone(),
            Self::Tcp(_) => KeepFile::default(),
        }
    }

    /// Whether it is TCP.
    pub fn is_tcp(&self) -> bool {
        matches!(self, Self::Tcp(_))
    }

    /// Its address, if TCP; for callers that asked for port 0.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Unix(_) => None,
            Self::Tcp(listener) => listener.local_addr().ok(),
        }
    }
}

async fn bind_unix(path: &Path) -> io::Result<Socket> {
    if let Some(directory) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_private(directory)?;
    }
    remove_stale(path).await?;
    bind_private(path)
}

fn bind_private(path: &Path) -> io::Result<Socket> {
    // Between binding and chmod the socket has the mode of the umask; its directory keeps others out.
    let listener = UnixListener::bind(path)?;
    let keep = KeepFile::default();
    let socket = Socket { listener, path: path.to_owned(), file: file_id(path)?, keep };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(socket)
}

async fn remove_stale(path: &Path) -> io::Result<()> {
    let metadata = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if !metadata.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another agent answers on it: give each node's agent its own --run-dir",
        )),
    }
}
