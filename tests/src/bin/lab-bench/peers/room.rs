//! What a proxy or server that is no part of the mesh needs: a directory that its user can read and write, and
//! certificates of one root for both ends.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use lab::{pki::Authority, servers::nobody};
use nix::unistd::chown;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use tempfile::TempDir;
use time::OffsetDateTime;

/// The name in every certificate of the peers.
pub const NAME: &str = "server.bench";

/// A root that signs for one run.
pub struct Root {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A directory, gone when dropped.
#[derive(Debug)]
pub struct Room(TempDir);

impl Root {
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.distinguished_name.push(DnType::CommonName, "bench root");
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { pem, issuer: Issuer::new(params, key) })
    }

    /// `ca.pem`, `cert.pem` and `key.pem` (P-256, as the mesh's own) in the room.
    pub fn certify(&self, room: &Room) -> Result<()> {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new([NAME.to_owned()])?.signed_by(&key, &self.issuer)?;
        room.write("ca.pem", &self.pem)?;
        room.write("cert.pem", &certificate.pem())?;
        // haproxy reads both from one file.
        room.write("both.pem", &(certificate.pem() + &key.serialize_pem()))?;
        room.write("key.pem", &key.serialize_pem())
    }

    /// A certificate of the mesh's own root for a pod's identity, in the room.
    pub fn certify_of_mesh(state_dir: &Path, identity: &str, room: &Room) -> Result<()> {
        let (issuer, key) = (Authority::of_state_dir(state_dir)?.issuer()?, KeyPair::generate()?);
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(identity.try_into()?)];
        let now = OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = (now - time::Duration::HOUR, now + time::Duration::DAY);
        room.write("cert.pem", &params.signed_by(&key, &issuer)?.pem())?;
        room.write("key.pem", &key.serialize_pem())
    }
}

impl Room {
    pub fn new() -> Result<Self> {
        let dir = TempDir::new().context("making a directory for a server")?;
        let user = nobody()?;
        chown(dir.path(), Some(user.uid), Some(user.gid))?;
        Ok(Self(dir))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file for the user of the room.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path().join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        let user = nobody()?;
        Ok(chown(&path, Some(user.uid), Some(user.gid))?)
    }
}
