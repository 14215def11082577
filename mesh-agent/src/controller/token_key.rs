//! The key that signs tokens: `token-key.pem` in the controller's state directory, mode 0600.
//!
//! Made once, by whoever comes first; never overwritten. To void all tokens, remove it and restart the controller.
//! Tested in `tests/tokens.rs`.

use std::{
    fs::File,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use jsonwebtoken::{DecodingKey, EncodingKey};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use zeroize::{Zeroize as _, Zeroizing};

use crate::identity;

const FILE: &str = "token-key.pem";

/// The two halves of the key.
pub struct TokenKey {
    pub(super) signing: EncodingKey,
    pub(super) verifying: DecodingKey,
}

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenKey").finish_non_exhaustive()
    }
}

impl TokenKey {
    /// The key of a state directory, made there if there is none yet.
    ///
    /// # Errors
    /// When it cannot be read or made, or others may read it.
    pub fn open(state_dir: &Path) -> Result<Self> {
        identity::prepare_dir(state_dir)?;
        let path = state_dir.join(FILE);
        let mut pem = read(&path)?;
        if pem.is_none() {
            let fresh = Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?.serialize_pem());
            identity::publish(state_dir, FILE, 0o600, fresh.as_bytes())?;
            // Another may have been first.
            pem = read(&path)?;
        }
        let pem = pem.with_context(|| format!("{} was removed just now", path.display()))?;
        Self::parse(&pem).with_context(|| {
            format!(
                "{} is not an ECDSA P-256 key; remove it for a new one (all tokens are void then)",
                path.display()
            )
        })
    }

    fn parse(pem: &str) -> Result<Self> {
        let mut key = KeyPair::from_pem_and_sign_algo(pem, &PKCS_ECDSA_P256_SHA256)?;
        let signing = EncodingKey::from_ec_der(key.serialized_der());
        let verifying = DecodingKey::from_ec_der(key.public_key_raw());
        key.zeroize();
        Ok(Self { signing, verifying })
    }
}

fn read(path: &Path) -> Result<Option<Zeroizing<String>>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("opening {}", path.display())),
    };
    let facts = file.metadata().with_context(|| format!("looking at {}", path.display()))?;
    if facts.mode() & 0o077 != 0 || facts.uid() != nix::unistd::geteuid().as_raw() {
        bail!(
            "{} may be read by others (mode {:04o}, owner {}): whoever has read it can make tokens for any node. Remove it \
             for a new one",
            path.display(),
            facts.mode() & 0o7777,
            facts.uid()
        );
    }
    let mut pem = Zeroizing::new(String::new());
    file.read_to_string(&mut pem).with_context(|| format!("reading {}", path.display()))?;
    Ok(Some(pem))
}
