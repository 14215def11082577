//! The embedded authority's files: `ca-key.pem` (0600) and `ca-cert.pem` in the state directory.
//!
//! Any number of agents may start at once on one directory and end up with the same root, wherever one of them
//! stops: the key is linked into place whole and only once, and the certificate is made from the key that is in
//! place. Nothing waits, nothing is ever overwritten. Tested by the unit tests below.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use zeroize::Zeroizing;

use super::{ca::self_signed, spiffe::is_trust_domain};

const KEY: &str = "ca-key.pem";
const CERTIFICATE: &str = "ca-cert.pem";

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

fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CaError {
    let path = path.to_owned();
    move |source| CaError::Io { action, path, source }
}

fn unusable(path: &Path, reason: impl Into<String>) -> CaError {
    CaError::Unusable { path: path.to_owned(), reason: reason.into() }
}

/// The root and key of this directory, made first if there are none.
pub(super) fn load_or_create(
    dir: &Path,
    trust_domain: &str,
) -> Result<(CertificateDer<'static>, KeyPair), CaError> {
    if !is_trust_domain(trust_domain) {
        return Err(CaError::TrustDomain(trust_domain.to_owned()));
    }
    prepare(dir)?;
    let key = match read_key(dir)? {
        Some(key) => key,
        None => create_key(dir)?,
    };
    let root = match read_certificate(dir)? {
        Some(root) => root,
        None => create_certificate(dir, trust_domain, &key)?,
    };
    check(&root, &key, trust_domain, &dir.join(CERTIFICATE))?;
    Ok((root, key))
}

/// Makes the directory, the user's own; refuses one that others may write to.
pub(crate) fn prepare(dir: &Path) -> Result<(), CaError> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent).map_err(io("create the directory", parent))?;
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(io("create the state directory", dir)(error)),
    }
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

fn read_key(dir: &Path) -> Result<Option<KeyPair>, CaError> {
    let path = dir.join(KEY);
    let Some(mut file) = open(&path)? else { return Ok(None) };
    let facts = file.metadata().map_err(io("look at", &path))?;
    if facts.mode() & 0o077 != 0 || facts.uid() != nix::unistd::geteuid().as_raw() {
        return Err(CaError::Exposed { path, mode: facts.mode() & 0o7777, owner: facts.uid() });
    }
    let mut pem = Zeroizing::new(String::new());
    file.read_to_string(&mut pem).map_err(io("read", &path))?;
    KeyPair::from_pem(&pem)
        .map(Some)
        .map_err(|error| unusable(&path, format!("is not a private key ({error})")))
}

fn create_key(dir: &Path) -> Result<KeyPair, CaError> {
    let certificate = dir.join(CERTIFICATE);
    if open(&certificate)?.is_some() {
        // Another agent may have put both there since we looked for the key.
        return read_key(dir)?.ok_or(CaError::KeyMissing { path: certificate });
    }
    let pem = Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?.serialize_pem());
    publish(dir, KEY, 0o600, pem.as_bytes())?;
    read_key(dir)?.ok_or_else(|| unusable(&dir.join(KEY), "was removed while the agent started"))
}

fn read_certificate(dir: &Path) -> Result<Option<CertificateDer<'static>>, CaError> {
    let path = dir.join(CERTIFICATE);
    let Some(mut file) = open(&path)? else { return Ok(None) };
    let mut pem = Vec::new();
    file.read_to_end(&mut pem).map_err(io("read", &path))?;
    CertificateDer::from_pem_slice(&pem)
        .map(Some)
        .map_err(|error| unusable(&path, format!("is not a PEM certificate ({error})")))
}

fn create_certificate(
    dir: &Path,
    trust_domain: &str,
    key: &KeyPair,
) -> Result<CertificateDer<'static>, CaError> {
    let root = self_signed(trust_domain, key, OffsetDateTime::now_utc())?;
    publish(dir, CERTIFICATE, 0o644, root.pem().as_bytes())?;
    read_certificate(dir)?
        .ok_or_else(|| unusable(&dir.join(CERTIFICATE), "was removed while the agent started"))
}

/// Puts a whole file in place unless there is one already; which of the two is no matter to the caller.
pub(crate) fn publish(dir: &Path, name: &str, mode: u32, contents: &[u8]) -> Result<(), CaError> {
    let temporary = dir.join(format!(".{name}.{:016x}", fastrand::u64(..)));
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut file| file.write_all(contents).and_then(|()| file.sync_all()));
    let linked = written.and_then(|()| match fs::hard_link(&temporary, dir.join(name)) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    });
    let removed = fs::remove_file(&temporary);
    linked.map_err(io("write", &dir.join(name)))?;
    removed.map_err(io("remove", &temporary))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("sync", dir))
}

/// Puts a whole file in place of what is there.
pub(crate) fn replace(path: &Path, mode: u32, contents: &[u8]) -> Result<(), CaError> {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{:016x}", fastrand::u64(..)));
    let temporary = path.with_file_name(name);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut file| file.write_all(contents).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // It may not have been made at all.
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(io("write", path))
}

fn check(root: &CertificateDer<'_>, key: &KeyPair, trust_domain: &str, path: &Path) -> Result<(), CaError> {
    let (_, parsed) = X509Certificate::from_der(root)
        .map_err(|error| unusable(path, format!("is not an X.509 certificate ({error})")))?;
    if parsed.public_key().raw != key.subject_public_key_info() {
        return Err(unusable(path, format!("is not the certificate of the key in {KEY}")));
    }
    if !parsed.is_ca() {
        return Err(unusable(path, "is not the certificate of an authority (basicConstraints CA)"));
    }
    let validity = parsed.validity();
    let now = OffsetDateTime::now_utc();
    if validity.not_after.to_datetime() <= now {
        return Err(unusable(path, format!("expired at {}", validity.not_after)));
    }
    if validity.not_before.to_datetime() > now {
        return Err(unusable(
            path,
            format!("is not valid before {} (is the clock right?)", validity.not_before),
        ));
    }
    check_trust_domain(&parsed, trust_domain, path)
}

/// A root that says which trust domain it is for must say ours; one that does not say is the operator's choice.
fn check_trust_domain(root: &X509Certificate<'_>, trust_domain: &str, path: &Path) -> Result<(), CaError> {
    let names = root
        .subject_alternative_name()
        .map_err(|error| unusable(path, format!("has an unreadable subjectAltName ({error})")))?
        .map(|extension| extension.value.general_names.as_slice())
        .unwrap_or_default();
    for name in names {
        if let GeneralName::URI(uri) = name
            && let Some(theirs) = uri.strip_prefix("spiffe://")
            && theirs != trust_domain
        {
            let reason =
                format!("is the root of trust domain {theirs:?}, the agent runs with {trust_domain:?}");
            return Err(unusable(path, reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, sync::Barrier, thread};

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
        let (first, _) = load_or_create(&dir, DOMAIN)?;
        let (second, _) = load_or_create(&dir, DOMAIN)?;
        assert_eq!(first, second);
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
                    load_or_create(&dir, DOMAIN).map(|(root, _)| root)
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
