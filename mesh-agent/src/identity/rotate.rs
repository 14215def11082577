//! The steps by which a root takes another's place: `prepare`, `switch`, `drop`.
//!
//! Promises: each step leaves files that agents can start with, wherever it stops, and can be repeated; the order is
//! kept, so that nothing is signed under a root that nobody believes yet, and no root goes while it is signed under.
//! Agents follow the files (`follow.rs`). Tested by the unit tests below and, under load, by `tests/tests/rotation.rs`.

use std::{
    fs::{self, File},
    io::ErrorKind,
    path::Path,
    time::{Duration, SystemTime},
};

use rcgen::PublicKeyData;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    bundle::{Bundle, CERTIFICATE, CHAIN, KEY, ROOTS},
    ca::self_signed,
    early::MOST_SPREAD,
    key::SecretKey,
    state_dir::{self, CaError, io, publish, read_certificates, read_key_at, replace},
    trust::Roots,
};

const NEXT_KEY: &str = "next-ca-key.pem";
const NEXT_CERTIFICATE: &str = "next-ca-cert.pem";

/// How long a root has to be in the bundle before anything is signed under it: agents have read it long before.
const DISTRIBUTED: Duration = Duration::from_mins(1);
/// How long another pair has to sign before the root of the one before may go: all leaves are replaced by then.
const REPLACED: Duration = Duration::from_mins(6);

// The time for which renewals are spread, and a minute for those that fail at first.
const _: () = assert!(REPLACED.as_secs() >= MOST_SPREAD.as_secs() + 60);

/// Why a step is not taken.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// The files cannot be read, written or used.
    #[error(transparent)]
    Files(#[from] CaError),
    /// It is not its turn.
    #[error("{0}")]
    OutOfOrder(String),
}

fn out_of_order(text: impl Into<String>) -> RotationError {
    RotationError::OutOfOrder(text.into())
}

/// Makes a new root beside the one that signs, and has agents believe it. What was done, for people.
///
/// # Errors
/// When the files are not in order.
pub fn prepare(dir: &Path, trust_domain: &str) -> Result<String, RotationError> {
    let bundle = state_dir::load(dir, trust_domain)?;
    let next = next_root(dir, trust_domain)?;
    let mut roots: Vec<_> = bundle.roots.all.iter().map(|root| root.der.clone()).collect();
    if bundle.signer.certificate == next {
        return Ok("the prepared root signs already; go on with `switch`, which finishes".to_owned());
    }
    if !roots.contains(&next) {
        roots.push(next);
        replace(dir, ROOTS, 0o644, pem(&roots).as_bytes())?;
    }
    Ok(format!("{} roots are believed, a new one among them; next: `switch`", roots.len()))
}

/// Has the new root sign. What was done, for people.
///
/// # Errors
/// When none is prepared, or it is believed for less than a minute and that does not count (`now`).
pub fn switch(dir: &Path, trust_domain: &str, now: bool) -> Result<String, RotationError> {
    let bundle = state_dir::load(dir, trust_domain)?;
    let Some(next) = next_certificate(dir)? else {
        if bundle.roots.all.len() > 1 {
            return Ok("no other root is prepared; the one that signs stays. Next: `drop`".to_owned());
        }
        return Err(out_of_order("there is no root to switch to: `prepare` one first"));
    };
    if bundle.signer.certificate != next {
        if !bundle.roots.all.iter().any(|root| root.der == next) {
            return Err(out_of_order(format!("the prepared root is not in {ROOTS}: `prepare` it again")));
        }
        let wait = DISTRIBUTED.checked_sub(age(dir, ROOTS)?).filter(|wait| !now && !wait.is_zero());
        if let Some(wait) = wait {
            return Err(out_of_order(format!(
                "the new root is believed since a moment ago only; wait {} s, or say --now if every agent has it",
                wait.as_secs() + 1
            )));
        }
        // Both certificates first: whichever key is in place then has its own.
        let both = [next.clone(), bundle.signer.certificate.clone()];
        replace(dir, CERTIFICATE, 0o644, pem(&both).as_bytes())?;
        let (from, to) = (dir.join(NEXT_KEY), dir.join(KEY));
        // Its time tells `drop` since when it signs.
        let dated =
            File::options().append(true).open(&from).and_then(|file| file.set_modified(SystemTime::now()));
        dated.map_err(io("date", &from))?;
        fs::rename(&from, &to).map_err(io("move the key to", &to))?;
        state_dir::sync(dir)?;
    }
    replace(dir, CERTIFICATE, 0o644, pem(std::slice::from_ref(&next)).as_bytes())?;
    remove(dir, NEXT_CERTIFICATE)?;
    remove(dir, CHAIN)?;
    state_dir::load(dir, trust_domain)?;
    Ok("the new root signs; agents replace their leaves within five minutes. Next: `drop`".to_owned())
}

/// Has agents believe only the root that is signed under. What was done, for people.
///
/// # Errors
/// When another root is prepared, or what signs does so for less than six minutes and that does not count (`now`).
pub fn drop_roots(dir: &Path, trust_domain: &str, now: bool) -> Result<String, RotationError> {
    let bundle = state_dir::load(dir, trust_domain)?;
    if next_certificate(dir)?.is_some() || exists(dir, NEXT_KEY)? {
        return Err(out_of_order(
            "a root is prepared, and the one before it still signs: `switch` first, and drop the old one then",
        ));
    }
    let needed: Vec<_> = bundle.roots.all.iter().filter(|root| bundle.signer.leads_to(root)).collect();
    let dropped = bundle.roots.all.len() - needed.len();
    if dropped == 0 {
        return Ok("there is no root but the one that is signed under".to_owned());
    }
    let wait = REPLACED.checked_sub(age(dir, KEY)?).filter(|wait| !now && !wait.is_zero());
    if let Some(wait) = wait {
        return Err(out_of_order(format!(
            "leaves of the root before may be in use still; wait {} s, or say --now if `meshctl certs` shows none on any node",
            wait.as_secs() + 1
        )));
    }
    let needed: Vec<_> = needed.into_iter().map(|root| root.der.clone()).collect();
    replace(dir, ROOTS, 0o644, pem(&needed).as_bytes())?;
    Ok(format!(
        "{dropped} dropped; what they vouched for is refused from now on, and connections that stand on it are asked \
         to end and cut within ten seconds"
    ))
}

/// Where a rotation is, for people: what is believed, what signs, and which step is next.
///
/// # Errors
/// When the files are not in order.
pub fn rotation(dir: &Path, trust_domain: &str) -> Result<String, RotationError> {
    let Bundle { signer, roots: Roots { all, .. } } = state_dir::load(dir, trust_domain)?;
    let next = next_certificate(dir)?;
    let mut lines = Vec::new();
    for root in &all {
        let what = match () {
            () if next.as_ref() == Some(&root.der) && signer.certificate != root.der => "prepared",
            () if signer.leads_to(root) => "signed under",
            () => "believed",
        };
        lines.push(format!("root {} until {}: {what}", name(&root.der), root.not_after));
    }
    lines.push(format!("signing {} until {}", name(&signer.certificate), signer.not_after));
    let step = match (next.is_some(), all.len()) {
        (true, _) => "next: `switch`",
        (false, 1) => "next: nothing; `prepare` begins a rotation",
        (false, _) => "next: `drop`",
    };
    lines.push(step.to_owned());
    Ok(lines.join("\n"))
}

fn name(certificate: &CertificateDer<'_>) -> String {
    let parsed = X509Certificate::from_der(certificate);
    parsed.map_or_else(|error| error.to_string(), |(_, parsed)| parsed.subject().to_string())
}

/// The key and certificate that are prepared, made first if there are none.
fn next_root(dir: &Path, trust_domain: &str) -> Result<CertificateDer<'static>, RotationError> {
    let path = dir.join(NEXT_KEY);
    let Some(key) = read_key_at(&path)? else {
        if let Some(next) = next_certificate(dir)? {
            // The key has been moved already.
            return Ok(next);
        }
        publish(dir, NEXT_KEY, 0o600, SecretKey::generate().map_err(CaError::from)?.to_pem().as_bytes())?;
        return next_root(dir, trust_domain);
    };
    let Some(next) = next_certificate(dir)? else {
        let root = self_signed(trust_domain, &key, OffsetDateTime::now_utc()).map_err(CaError::from)?;
        publish(dir, NEXT_CERTIFICATE, 0o644, root.pem().as_bytes())?;
        return next_root(dir, trust_domain);
    };
    let of_key = X509Certificate::from_der(&next)
        .is_ok_and(|(_, parsed)| parsed.public_key().raw == key.subject_public_key_info());
    if !of_key {
        return Err(out_of_order(format!(
            "{NEXT_CERTIFICATE} is not the certificate of the key in {NEXT_KEY}; remove both and `prepare` again"
        )));
    }
    Ok(next)
}

fn next_certificate(dir: &Path) -> Result<Option<CertificateDer<'static>>, CaError> {
    Ok(read_certificates(dir, NEXT_CERTIFICATE)?.and_then(|all| all.into_iter().next()))
}

fn exists(dir: &Path, file: &str) -> Result<bool, CaError> {
    let path = dir.join(file);
    path.try_exists().map_err(io("look at", &path))
}

/// How long ago a file was written; a time to come is now.
fn age(dir: &Path, file: &str) -> Result<Duration, CaError> {
    let path = dir.join(file);
    let written = fs::metadata(&path).and_then(|facts| facts.modified()).map_err(io("look at", &path))?;
    Ok(written.elapsed().unwrap_or_default())
}

fn remove(dir: &Path, file: &str) -> Result<(), CaError> {
    let path = dir.join(file);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io("remove", &path)(error)),
        _ => Ok(()),
    }
}

/// Certificates in PEM.
pub(super) fn pem(certificates: &[CertificateDer<'_>]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let mut text = String::new();
    for certificate in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        for line in STANDARD.encode(certificate).as_bytes().chunks(64) {
            text.push_str(&String::from_utf8_lossy(line));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    const DOMAIN: &str = "cluster.local";

    fn out_of_turn(step: Result<String, RotationError>, words: &str) {
        match step {
            Err(RotationError::OutOfOrder(text)) => assert!(text.contains(words), "{text}"),
            other => panic!("{other:?}"),
        }
    }

    fn signs(dir: &Path) -> Result<CertificateDer<'static>, CaError> {
        Ok(state_dir::load(dir, DOMAIN)?.signer.certificate)
    }

    fn believed(dir: &Path) -> Result<Vec<CertificateDer<'static>>, CaError> {
        Ok(state_dir::load(dir, DOMAIN)?.roots.all.iter().map(|root| root.der.clone()).collect())
    }

    #[test]
    fn a_root_takes_anothers_place_step_by_step() -> TestResult {
        let dir = tempfile::tempdir()?;
        let dir = dir.path();
        let old = state_dir::load_or_create(dir, DOMAIN)?.signer.certificate;
        out_of_turn(switch(dir, DOMAIN, true), "`prepare` one first");
        assert!(drop_roots(dir, DOMAIN, true)?.contains("no root but the one"));

        prepare(dir, DOMAIN)?;
        let both = believed(dir)?;
        prepare(dir, DOMAIN)?;
        assert_eq!((believed(dir)?.len(), believed(dir)?), (2, both.clone()), "repeated, it makes another");
        assert_eq!(signs(dir)?, old, "believed first, used later");
        assert!(rotation(dir, DOMAIN)?.ends_with("next: `switch`"));
        out_of_turn(drop_roots(dir, DOMAIN, true), "`switch` first");
        out_of_turn(switch(dir, DOMAIN, false), "a moment ago");

        switch(dir, DOMAIN, true)?;
        let new = signs(dir)?;
        assert!(new != old && both.contains(&new));
        switch(dir, DOMAIN, true)?;
        assert_eq!((signs(dir)?, believed(dir)?), (new.clone(), both));
        assert!(rotation(dir, DOMAIN)?.ends_with("next: `drop`"));
        out_of_turn(drop_roots(dir, DOMAIN, false), "may be in use still");

        drop_roots(dir, DOMAIN, true)?;
        drop_roots(dir, DOMAIN, true)?;
        assert_eq!((believed(dir)?, signs(dir)?), (vec![new.clone()], new));
        let mut left: Vec<_> = fs::read_dir(dir)?
            .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_, _>>()?;
        left.sort();
        assert_eq!(left, [CERTIFICATE, KEY, ROOTS]);
        Ok(())
    }

    /// Wherever it stops, agents can start, and the step can be taken again.
    #[test]
    fn a_switch_that_stopped_half_way_is_finished() -> TestResult {
        let dir = tempfile::tempdir()?;
        let dir = dir.path();
        let old = state_dir::load_or_create(dir, DOMAIN)?.signer.certificate;
        prepare(dir, DOMAIN)?;
        let next = next_certificate(dir)?.ok_or("none is prepared")?;
        // Both certificates, and the old key.
        replace(dir, CERTIFICATE, 0o644, pem(&[next.clone(), old.clone()]).as_bytes())?;
        assert_eq!(signs(dir)?, old);
        // Both certificates, and the new key.
        fs::rename(dir.join(NEXT_KEY), dir.join(KEY))?;
        assert_eq!(signs(dir)?, next);
        assert!(prepare(dir, DOMAIN)?.contains("signs already"));
        out_of_turn(drop_roots(dir, DOMAIN, true), "`switch` first");
        switch(dir, DOMAIN, false)?;
        assert_eq!(signs(dir)?, next);
        assert_eq!(read_certificates(dir, CERTIFICATE)?, Some(vec![next]));
        Ok(())
    }

    #[test]
    fn agents_that_start_meanwhile_find_a_pair_that_fits() -> TestResult {
        let dir = tempfile::tempdir()?;
        let dir = dir.path();
        state_dir::load_or_create(dir, DOMAIN)?;
        std::thread::scope(|scope| -> TestResult {
            let reading = scope.spawn(|| -> Result<usize, String> {
                let mut loaded = 0;
                while !dir.join("done").exists() {
                    state_dir::load_or_create(dir, DOMAIN).map_err(|error| error.to_string())?;
                    loaded += 1;
                }
                Ok(loaded)
            });
            for _ in 0..20 {
                prepare(dir, DOMAIN)?;
                switch(dir, DOMAIN, true)?;
                drop_roots(dir, DOMAIN, true)?;
            }
            fs::write(dir.join("done"), "")?;
            let loaded = reading.join().map_err(|_| "the reader panicked")??;
            assert!(loaded > 20, "{loaded}");
            Ok(())
        })
    }
}
