//! Takes over what changes in the files of the authority, and in the list of what is revoked, while the agent runs.
//!
//! Promises: what can be used is in force within a second of its being written; new roots hold for every handshake at
//! once, before anything is signed under them; a change that cannot be used, or is only half there, changes nothing, is
//! logged once and stays among the agent's problems until it is put right. The lists have to be readable when an agent
//! starts; later the last good ones stay. Tested by the unit tests below and in the lab (`tests/tests/rotation.rs`,
//! `revocation.rs`).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls_pki_types::UnixTime;

use super::{
    Authority,
    bundle::Bundle,
    ca::EmbeddedCa,
    crl::RevocationLists,
    state_dir::{self, CaError},
};
use crate::watcher::{Pace, Watcher};

/// How often the files are looked at without a change: lists come to be out of date by waiting alone.
const LOOK: Duration = Duration::from_mins(5);

/// A file, or a directory of files, that is followed.
#[derive(Debug, Clone)]
enum Followed {
    StateDir(PathBuf),
    Lists(PathBuf),
}

impl Followed {
    fn directory(&self) -> &Path {
        match self {
            Self::StateDir(dir) => dir,
            // A file may be replaced by another one, or be a link that is; its directory sees both.
            Self::Lists(file) => match file.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            },
        }
    }

    /// Looks again; what is wrong.
    fn look(&self, authority: &Authority) -> Vec<String> {
        match self {
            Self::StateDir(dir) => match authority.reload(dir) {
                Ok(()) => Vec::new(),
                Err(error) => vec![format!("{error}; roots and signing certificate stay as they were")],
            },
            Self::Lists(file) => match RevocationLists::read(file) {
                Ok(lists) => authority.revoke(lists),
                Err(reason) => vec![format!("{reason}; what was revoked before stays so, and no more")],
            },
        }
    }
}

impl Authority {
    /// Follows the files of the state directory from now on.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub fn follow_state_dir(self: &Arc<Self>, dir: &Path) -> anyhow::Result<()> {
        self.follow(Followed::StateDir(dir.to_owned()))
    }

    /// Refuses what a file of certificate revocation lists names, and follows the file from now on.
    ///
    /// # Errors
    /// When it cannot be read now, or not be watched: nobody would know what is revoked.
    pub fn follow_crl(self: &Arc<Self>, file: &Path) -> anyhow::Result<()> {
        let lists = RevocationLists::read(file).map_err(anyhow::Error::msg)?;
        let problems = self.revoke(lists);
        self.set_problems(Self::LISTS, &problems);
        self.follow(Followed::Lists(file.to_owned()))
    }

    fn follow(self: &Arc<Self>, followed: Followed) -> anyhow::Result<()> {
        let watcher = Watcher::new(followed.directory().to_owned(), Pace::Together)?;
        let what = match followed {
            Followed::StateDir(_) => Self::STATE_DIR,
            Followed::Lists(_) => Self::LISTS,
        };
        // Ends with the authority, at the next look.
        let held = Arc::downgrade(self);
        tokio::spawn(keep_looking(watcher, move || {
            let authority = held.upgrade()?;
            authority.set_problems(what, &followed.look(&authority));
            Some(())
        }));
        Ok(())
    }

    fn reload(&self, dir: &Path) -> Result<(), CaError> {
        let Bundle { signer, roots } = state_dir::load(dir, self.trust_domain())?;
        let count = roots.all.len();
        if self.trust().believe(roots) {
            tracing::info!(roots = count, "the roots of the mesh have changed; they hold from now on");
        }
        self.sign_with(signer);
        Ok(())
    }

    fn revoke(&self, lists: RevocationLists) -> Vec<String> {
        let revoked = lists.revoked();
        let problems = lists.overdue(UnixTime::now());
        if self.trust().revoke(lists) {
            tracing::info!(revoked, "the list of revoked certificates has changed; it holds from now on");
        }
        problems
    }
}

impl EmbeddedCa {
    /// Follows the files of its state directory from now on, for who signs for others: what can be used is in force with the
    /// next certificate, the rest changes nothing and is logged once. Ends with the authority, at the next look.
    ///
    /// # Errors
    /// When the directory cannot be watched.
    pub(crate) fn follow(self: &Arc<Self>, dir: &Path, trust_domain: &str) -> anyhow::Result<()> {
        let watcher = Watcher::new(dir.to_owned(), Pace::Together)?;
        let (held, dir, trust_domain) = (Arc::downgrade(self), dir.to_owned(), trust_domain.to_owned());
        let mut problem = String::new();
        tokio::spawn(keep_looking(watcher, move || {
            match (held.upgrade()?, state_dir::load(&dir, &trust_domain)) {
                (ca, Ok(bundle)) => {
                    if ca.take(bundle) {
                        tracing::info!("roots or signing certificate have changed; they hold from now on");
                    }
                    problem.clear();
                }
                (_, Err(error)) if problem != error.to_string() => {
                    problem = error.to_string();
                    tracing::error!(
                        "--state-dir: {problem}; roots and signing certificate stay as they were"
                    );
                }
                _ => {}
            }
            Some(())
        }));
        Ok(())
    }
}

/// Looks at what a watcher tells of, at each change and now and then besides, until there is nobody to look for (`None`).
async fn keep_looking(mut watcher: Watcher, mut look: impl FnMut() -> Option<()> + Send + 'static) {
    loop {
        let _ = tokio::time::timeout(LOOK, watcher.changed()).await;
        let looked = tokio::task::spawn_blocking(move || {
            watcher.renew();
            look()?;
            Some((watcher, look))
        });
        let Ok(Some(next)) = looked.await else { return };
        (watcher, look) = next;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rcgen::{Issuer, KeyPair};
    use rustls_pki_types::{CertificateDer, pem::PemObject};
    use time::OffsetDateTime;

    use super::{
        super::{
            LeafPolicy, SpiffeId, drop_roots,
            pki::{self, list, serial},
            prepare, switch,
        },
        *,
    };

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    const DOMAIN: &str = "cluster.local";

    fn id() -> SpiffeId {
        SpiffeId { trust_domain: DOMAIN.into(), namespace: "a".into(), service_account: "b".into() }
    }

    fn names(authority: &Authority) -> Vec<String> {
        authority.authorities().into_iter().map(|one| format!("{} {}", one.role, one.serial)).collect()
    }

    /// An authority of this directory, whose leaves are replaced quickly when another pair signs.
    fn open(dir: &Path) -> Result<Arc<Authority>, Box<dyn std::error::Error>> {
        let policy = LeafPolicy { lifetime: Duration::from_mins(1), ..LeafPolicy::default() };
        let authority = Arc::new(Authority::open(dir, DOMAIN)?.with_leaf_policy(policy));
        authority.follow_state_dir(dir)?;
        Ok(authority)
    }

    #[tokio::test]
    async fn a_root_takes_anothers_place_in_a_running_agent() -> TestResult {
        let dir = tempfile::tempdir()?;
        let dir = dir.path();
        let authority = open(dir)?;
        let identity = authority.identity(&id()).await?;
        let (old, mut renewals, mut looks) = (names(&authority), identity.renewals(), authority.looks());
        prepare(dir, DOMAIN)?;
        looks.wait_for(|()| names(&authority).len() == 2).await?;
        let both = names(&authority);
        assert!(both.contains(&old[0]) && !renewals.has_changed()?, "believed first, used later");
        switch(dir, DOMAIN, true)?;
        renewals.changed().await?;
        assert_eq!(names(&authority), both);
        drop_roots(dir, DOMAIN, true)?;
        looks.wait_for(|()| names(&authority).len() == 1).await?;
        assert!(names(&authority) != old && both.contains(&names(&authority)[0]));
        assert!(authority.problems().is_empty());
        Ok(())
    }

    /// What a controller signs with, and whom it has others believe.
    #[tokio::test]
    async fn an_authority_that_signs_for_others_follows_too() -> TestResult {
        let dir = tempfile::tempdir()?;
        let dir = dir.path();
        let ca = Arc::new(EmbeddedCa::open(dir, DOMAIN)?);
        ca.follow(dir, DOMAIN)?;
        let (first, signing) = (ca.bundle(), ca.signer().certificate.clone());
        let mut changes = ca.changes();
        let mut becomes = async |roots: usize, another: bool| {
            let is = || ca.bundle().len() == roots && (ca.signer().certificate != signing) == another;
            changes.wait_for(|_| is()).await.map(drop)
        };
        prepare(dir, DOMAIN)?;
        becomes(2, false).await?;
        switch(dir, DOMAIN, true)?;
        becomes(2, true).await?;
        drop_roots(dir, DOMAIN, true)?;
        becomes(1, true).await?;
        assert_ne!(ca.bundle(), first);
        Ok(())
    }

    #[tokio::test]
    async fn what_cannot_be_used_changes_nothing_until_it_is_put_right() -> TestResult {
        let dir = tempfile::tempdir()?;
        let dir = dir.path();
        let authority = open(dir)?;
        let (before, mut looks) = (names(&authority), authority.looks());
        let stranger = pki::Authority::root("stranger")?;
        let root = fs::read(dir.join("ca-cert.pem"))?;
        let half = root.get(..root.len() / 2).unwrap_or_default();
        let (_, alien) = stranger.below("alien")?;
        for (file, contents, words) in [
            ("root-cert.pem", half, "is not a PEM certificate"),
            ("root-cert.pem", b"", "holds none"),
            ("ca-cert.pem", half, "is not a PEM certificate"),
            ("ca-key.pem", alien.as_bytes(), "is not the certificate of the key"),
        ] {
            let path = dir.join(file);
            let good = fs::read(&path).ok();
            fs::write(&path, contents)?;
            looks.wait_for(|()| authority.problems().iter().any(|problem| problem.contains(words))).await?;
            assert_eq!(names(&authority), before, "{file}");
            match good {
                Some(good) => fs::write(&path, good)?,
                None => fs::remove_file(&path)?,
            }
            looks.wait_for(|()| authority.problems().is_empty()).await?;
            assert_eq!(names(&authority), before, "{file}");
        }
        Ok(())
    }

    #[tokio::test]
    async fn an_authority_below_a_root_signs_once_its_chain_is_there() -> TestResult {
        let dir = tempfile::tempdir()?;
        let dir = dir.path();
        let root = pki::Authority::root("root")?;
        let (first, _) = root.below("first")?;
        let (second, key) = first.below("second")?;
        let pem = |all: &[&pki::Authority]| -> String {
            all.iter().map(|one| super::super::rotate::pem(std::slice::from_ref(&one.certificate))).collect()
        };
        state_dir::load_or_create(dir, DOMAIN)?;
        state_dir::replace(dir, "ca-key.pem", 0o600, key.as_bytes())?;
        state_dir::replace(dir, "ca-cert.pem", 0o644, pem(&[&second]).as_bytes())?;
        let why = |words: &str| match state_dir::load(dir, DOMAIN) {
            Err(error) => assert!(error.to_string().contains(words), "{error}"),
            Ok(_) => panic!("{words}: it was taken"),
        };
        why("is no root, and root-cert.pem beside it is missing");
        state_dir::replace(dir, "root-cert.pem", 0o644, pem(&[&root]).as_bytes())?;
        why("does not lead to a root");
        // As Istio has it, with itself and the root in it.
        let chain = pem(&[&second, &first, &root]);
        state_dir::replace(dir, "cert-chain.pem", 0o644, chain.as_bytes())?;
        let bundle = state_dir::load(dir, DOMAIN)?;
        assert_eq!(bundle.signer.above, [second.certificate, first.certificate]);
        let authority = Authority::open(dir, DOMAIN)?;
        let roles: Vec<_> = authority.authorities().into_iter().map(|one| one.role).collect();
        assert_eq!(roles, ["root", "signing"]);
        Ok(())
    }

    #[tokio::test]
    async fn a_certificate_of_ours_that_is_revoked_is_replaced_at_once() -> TestResult {
        let dir = tempfile::tempdir()?;
        let crl = dir.path().join("crl.pem");
        fs::write(&crl, "")?;
        let state = dir.path().join("state");
        let authority = open(&state)?;
        authority.follow_crl(&crl)?;
        let identity = authority.identity(&id()).await?;
        let (first, mut renewals) = (identity.certificate(), identity.renewals());
        let key = KeyPair::from_pem(&fs::read_to_string(state.join("ca-key.pem"))?)?;
        let root = CertificateDer::from_pem_file(state.join("ca-cert.pem"))?;
        let issuer = Issuer::from_ca_cert_der(&root, key)?;
        let tomorrow = OffsetDateTime::now_utc() + time::Duration::DAY;
        fs::write(&crl, list(&issuer, &[&serial(&first.serial)?], tomorrow)?.pem()?)?;
        renewals.changed().await?;
        assert_ne!(identity.certificate().serial, first.serial);
        assert_eq!(authority.revoked(), 1);

        let mut looks = authority.looks();
        fs::write(&crl, "garbage")?;
        looks.wait_for(|()| authority.problems().iter().any(|one| one.contains("stays so"))).await?;
        assert_eq!(authority.revoked(), 1, "the last good list holds");
        fs::write(&crl, list(&issuer, &[], OffsetDateTime::now_utc() - time::Duration::HOUR)?.pem()?)?;
        looks.wait_for(|()| authority.problems().iter().any(|one| one.contains("out of date"))).await?;
        assert!(Authority::in_memory(DOMAIN).map(Arc::new)?.follow_crl(&dir.path().join("none")).is_err());
        Ok(())
    }
}
