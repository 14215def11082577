//! The embedded authority's files: `ca-key.pem` (0600) and `ca-cert.pem` in the state directory, and beside them, where
//! there is more than one root or one between it and the leaves, `root-cert.pem` and `cert-chain.pem` (`bundle.rs`).
//!
//! Any number of agents may start at once on one directory and end up with the same root, wherever one of them
//! stops: the key is linked into place whole and only once, and the certificate is made from the key that is in
//! place. Nothing waits, and an agent never overwrites anything; the steps of a rotation (`rotate.rs`) replace whole files.
//! Tested by the unit tests below.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt as _},
    path::{Path, PathBuf},
};

use rcgen::PublicKeyData;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::{
    bundle::{Bundle, CERTIFICATE, CHAIN, KEY, Parts, ROOTS, certificates},
    ca::self_signed,
    key::SecretKey,
    spiffe::is_trust_domain,
};

/// How often files that are replaced while they are read are read again.
const TRIES: usize = 3;

/// Why the embedded authority cannot start.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The trust domain asked for cannot be one.
    #[error("trust domain {0:?} is not lower-case letters, digits, '.', '-' and '_'")]
    TrustDomain(String),
    /// The name asked for cannot be a server's.
    #[error("{0:?} is neither a DNS name nor an address")]
    ServerName(String),
    /// A file of an authority from elsewhere.
    #[error("{} {reason}", path.display())]
    Plugged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file system said no.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
    /// Somebody else may read the key.
    #[error("{} may be read by others (mode {mode:04o}, owner {owner}); chmod 600 and chown it to the agent's user", path.display())]
    Exposed {
        /// The key.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Its owner.
        owner: u32,
    },
    /// Somebody else may replace the files.
    #[error("state directory {} may be written by others (mode {mode:04o}); chmod 700 it", path.display())]
    Writable {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A certificate without its key.
    #[error("{} is there but {KEY} beside it is not; bring the key back, or remove the certificate for a new root", path.display())]
    KeyMissing {
        /// The certificate.
        path: PathBuf,
    },
    /// Gone while it is in use.
    #[error("{} was removed", path.display())]
    Gone {
        /// The file.
        path: PathBuf,
    },
    /// Roots, or what is between them and the leaves, that cannot be used.
    #[error("{} {reason}", path.display())]
    Bundle {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Not what it should be.
    #[error("{} {reason}; bring it back from a copy, or remove both {CERTIFICATE} and {KEY} for a new root", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Key or certificate could not be made.
    #[error("cannot make the root certificate: {0}")]
    Crypto(#[from] rcgen::Error),
}

pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CaError {
    let path = path.to_owned();
    move |source| CaError::Io { action, path, source }
}

fn unusable(path: &Path, reason: impl Into<String>) -> CaError {
    CaError::Unusable { path: path.to_owned(), reason: reason.into() }
}

/// What is in this directory, made first if there is nothing.
pub(super) fn load_or_create(dir: &Path, trust_domain: &str) -> Result<Bundle, CaError> {
    load_as(dir, trust_domain, true)
}

/// What is in this directory.
pub(super) fn load(dir: &Path, trust_domain: &str) -> Result<Bundle, CaError> {
    load_as(dir, trust_domain, false)
}

fn load_as(dir: &Path, trust_domain: &str, create: bool) -> Result<Bundle, CaError> {
    if !is_trust_domain(trust_domain) {
        return Err(CaError::TrustDomain(trust_domain.to_owned()));
    }
    if create {
        prepare(dir)?;
    }
    check_directory(dir)?;
    let mut tries = 1;
    loop {
        let parts = read(dir, trust_domain, create)?;
        let public = parts.key.subject_public_key_info();
        let error = match Bundle::of(parts, trust_domain) {
            Ok(bundle) => return Ok(bundle),
            Err(wrong) => {
                let path = dir.join(wrong.file);
                match wrong.file {
                    KEY | CERTIFICATE => unusable(&path, wrong.reason),
                    _ => CaError::Bundle { path, reason: wrong.reason },
                }
            }
        };
        // The key is what a rotation replaces first: then what was read beside it was too old, or too new.
        let replaced = read_key(dir)?.is_some_and(|key| key.subject_public_key_info() != public);
        if !replaced || tries == TRIES {
            return Err(error);
        }
        tries += 1;
    }
}

fn read(dir: &Path, trust_domain: &str, create: bool) -> Result<Parts, CaError> {
    let gone = |name| CaError::Gone { path: dir.join(name) };
    let key = match read_key(dir)? {
        Some(key) => key,
        None if create => create_key(dir)?,
        None => return Err(gone(KEY)),
    };
    let certificates = match read_certificates(dir, CERTIFICATE)? {
        Some(certificates) => certificates,
        None if create => create_certificate(dir, trust_domain, &key)?,
        None => return Err(gone(CERTIFICATE)),
    };
    let chain = read_certificates(dir, CHAIN)?.unwrap_or_default();
    Ok(Parts { key, certificates, chain, roots: read_certificates(dir, ROOTS)? })
}

/// Makes the directory, the user's own; refuses one that others may write to.
pub(crate) fn prepare_dir(dir: &Path) -> Result<(), CaError> {
    prepare(dir)?;
    check_directory(dir)
}

fn prepare(dir: &Path) -> Result<(), CaError> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent).map_err(io("create the directory", parent))?;
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(io("create the state directory", dir)(error))
        }
        _ => Ok(()),
    }
}

/// What others may write they may replace.
fn check_directory(dir: &Path) -> Result<(), CaError> {
    let mode = fs::metadata(dir).map_err(io("look at the state directory", dir))?.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(CaError::Writable { path: dir.to_owned(), mode });
    }
    Ok(())
}

fn open(path: &Path) -> Result<Option<File>, CaError> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io("open", path)(error)),
    }
}

fn read_key(dir: &Path) -> Result<Option<SecretKey>, CaError> {
    read_key_at(&dir.join(KEY))
}

/// A private key that nobody else may read.
pub(super) fn read_key_at(path: &Path) -> Result<Option<SecretKey>, CaError> {
    let Some(mut file) = open(path)? else { return Ok(None) };
    let facts = file.metadata().map_err(io("look at", path))?;
    if facts.mode() & 0o077 != 0 || facts.uid() != nix::unistd::geteuid().as_raw() {
        let path = path.to_owned();
        return Err(CaError::Exposed { path, mode: facts.mode() & 0o7777, owner: facts.uid() });
    }
    // Made large enough at once: what grows leaves its beginnings behind.
    let mut pem = Zeroizing::new(Vec::with_capacity(facts.len() as usize + 1));
    file.read_to_end(&mut pem).map_err(io("read", path))?;
    SecretKey::from_pem(&pem)
        .map(Some)
        .map_err(|error| unusable(path, format!("is not a private key ({error})")))
}

fn create_key(dir: &Path) -> Result<SecretKey, CaError> {
    let certificate = dir.join(CERTIFICATE);
    if open(&certificate)?.is_some() {
        // Another agent may have put both there since we looked for the key.
        return read_key(dir)?.ok_or(CaError::KeyMissing { path: certificate });
    }
    publish(dir, KEY, 0o600, SecretKey::generate()?.to_pem().as_bytes())?;
    read_key(dir)?.ok_or_else(|| unusable(&dir.join(KEY), "was removed while the agent started"))
}

/// The certificates of a file; none where there is no file.
pub(super) fn read_certificates(
    dir: &Path,
    name: &str,
) -> Result<Option<Vec<CertificateDer<'static>>>, CaError> {
    let path = dir.join(name);
    let Some(mut file) = open(&path)? else { return Ok(None) };
    let mut pem = Vec::new();
    file.read_to_end(&mut pem).map_err(io("read", &path))?;
    certificates(&pem).map(Some).map_err(|reason| match name {
        CERTIFICATE => unusable(&path, reason),
        _ => CaError::Bundle { path, reason },
    })
}

fn create_certificate(
    dir: &Path,
    trust_domain: &str,
    key: &SecretKey,
) -> Result<Vec<CertificateDer<'static>>, CaError> {
    let root = self_signed(trust_domain, key, OffsetDateTime::now_utc())?;
    publish(dir, CERTIFICATE, 0o644, root.pem().as_bytes())?;
    read_certificates(dir, CERTIFICATE)?
        .ok_or_else(|| unusable(&dir.join(CERTIFICATE), "was removed while the agent started"))
}

/// Puts a whole file in place unless there is one already; which of the two is no matter to the caller.
pub(crate) fn publish(dir: &Path, name: &str, mode: u32, contents: &[u8]) -> Result<(), CaError> {
    put(dir, name, mode, contents, |temporary, place| match fs::hard_link(temporary, place) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    })
}

/// Puts a whole file in the place of what may be there: readers see the one or the other.
pub(super) fn replace(dir: &Path, name: &str, mode: u32, contents: &[u8]) -> Result<(), CaError> {
    put(dir, name, mode, contents, |temporary, place| fs::rename(temporary, place))
}

fn put(
    dir: &Path,
    name: &str,
    mode: u32,
    contents: &[u8],
    place: impl FnOnce(&Path, &Path) -> io::Result<()>,
) -> Result<(), CaError> {
    let temporary = dir.join(format!(".{name}.{:016x}", fastrand::u64(..)));
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut file| file.write_all(contents).and_then(|()| file.sync_all()));
    let placed = written.and_then(|()| place(&temporary, &dir.join(name)));
    let removed = match fs::remove_file(&temporary) {
        // It was moved.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    placed.map_err(io("write", &dir.join(name)))?;
    removed.map_err(io("remove", &temporary))?;
    sync(dir)
}

/// Makes what was done in a directory last.
pub(super) fn sync(dir: &Path) -> Result<(), CaError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("sync", dir))
}

/// Puts a whole file, wherever it is, in place of what is there.
pub(crate) fn write_over(path: &Path, mode: u32, contents: &[u8]) -> Result<(), CaError> {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{:016x}", fastrand::u64(..)));
    let temporary = path.with_file_name(name);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(contents)?;
            // The mask of the process may have taken some of it.
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // It may not have been made at all.
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(io("write", path))
}

#[cfg(test)]
mod tests {
    use std::{sync::Barrier, thread};

    use super::*;

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    const DOMAIN: &str = "cluster.local";

    fn why(dir: &Path) -> String {
        load_or_create(dir, DOMAIN).map_or_else(|error| error.to_string(), |_| "it was accepted".into())
    }

    fn chmod(path: &Path, mode: u32) -> io::Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    }

    #[test]
    fn made_once_then_loaded() -> TestResult {
        let parent = tempfile::tempdir()?;
        let dir = parent.path().join("a/b");
        let (first, second) = (load_or_create(&dir, DOMAIN)?, load_or_create(&dir, DOMAIN)?);
        assert_eq!(first.signer.certificate, second.signer.certificate);
        assert_eq!(first.roots.all, second.roots.all);
        assert_eq!(fs::metadata(&dir)?.mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(dir.join(KEY))?.mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(&dir)?.count(), 2, "temporary files were left");
        Ok(())
    }

    #[test]
    fn agents_that_start_at_once_agree() -> TestResult {
        for _ in 0..20 {
            let parent = tempfile::tempdir()?;
            let dir = parent.path().join("state");
            let start = Barrier::new(8);
            let roots = thread::scope(|scope| {
                let open = || {
                    start.wait();
                    load_or_create(&dir, DOMAIN).map(|bundle| bundle.signer.certificate)
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
                threads.into_iter().map(|t| t.join().map_err(|_| "a thread panicked")).collect::<Vec<_>>()
            });
            let mut roots = roots.into_iter().map(|root| Ok::<_, Box<dyn std::error::Error>>(root??));
            let first = roots.next().ok_or("no root")??;
            for root in roots {
                assert_eq!(root?, first);
            }
            assert_eq!(fs::read_dir(&dir)?.count(), 2, "temporary files were left");
        }
        Ok(())
    }

    #[test]
    fn a_start_that_stopped_half_way_is_finished() -> TestResult {
        let dir = tempfile::tempdir()?;
        create_key(dir.path())?;
        let key = fs::read(dir.path().join(KEY))?;
        load_or_create(dir.path(), DOMAIN)?;
        assert_eq!(fs::read(dir.path().join(KEY))?, key);
        Ok(())
    }

    #[test]
    fn a_key_or_directory_open_to_others_is_refused() -> TestResult {
        let dir = tempfile::tempdir()?;
        load_or_create(dir.path(), DOMAIN)?;
        chmod(&dir.path().join(KEY), 0o640)?;
        assert!(why(dir.path()).contains("may be read by others (mode 0640"), "{}", why(dir.path()));
        chmod(&dir.path().join(KEY), 0o600)?;
        chmod(dir.path(), 0o777)?;
        assert!(why(dir.path()).contains("may be written by others"), "{}", why(dir.path()));
        Ok(())
    }

    #[test]
    fn broken_pairs_are_named() -> TestResult {
        let dir = tempfile::tempdir()?;
        let (key, certificate) = (dir.path().join(KEY), dir.path().join(CERTIFICATE));
        load_or_create(dir.path(), DOMAIN)?;
        let good = fs::read(&certificate)?;

        let other = tempfile::tempdir()?;
        load_or_create(other.path(), DOMAIN)?;
        fs::copy(other.path().join(CERTIFICATE), &certificate)?;
        assert!(why(dir.path()).contains("is not the certificate of the key"), "{}", why(dir.path()));

        fs::write(&certificate, "no certificate")?;
        assert!(why(dir.path()).contains("is not a PEM certificate"), "{}", why(dir.path()));

        fs::write(&certificate, &good)?;
        fs::write(&key, "no key")?;
        assert!(why(dir.path()).contains("is not a private key"), "{}", why(dir.path()));

        fs::remove_file(&key)?;
        assert!(why(dir.path()).contains("beside it is not"), "{}", why(dir.path()));
        assert!(!key.exists(), "a key was made for somebody else's certificate");
        Ok(())
    }

    #[test]
    fn roots_out_of_time_are_refused() -> TestResult {
        let ten_years = time::Duration::days(3650);
        for (offset, expected) in [(-2 * ten_years, "expired at"), (ten_years, "is not valid before")] {
            let dir = tempfile::tempdir()?;
            let key = create_key(dir.path())?;
            let root = self_signed(DOMAIN, &key, OffsetDateTime::now_utc() + offset)?;
            fs::write(dir.path().join(CERTIFICATE), root.pem())?;
            assert!(why(dir.path()).contains(expected), "{}", why(dir.path()));
        }
        Ok(())
    }

    #[test]
    fn the_root_of_another_trust_domain_is_refused() -> TestResult {
        let dir = tempfile::tempdir()?;
        load_or_create(dir.path(), "other.example")?;
        assert!(why(dir.path()).contains("trust domain \"other.example\""), "{}", why(dir.path()));
        assert!(matches!(load_or_create(dir.path(), "No/Domain"), Err(CaError::TrustDomain(_))));
        Ok(())
    }
}
