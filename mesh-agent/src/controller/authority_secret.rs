//! The authority's key and certificates in a Secret of the cluster, so that every replica of the controller is the same authority.
//!
//! Promises that replicas which start at once agree on one key, that a Secret that is there is never written over, and that one
//! which is taken away while the controller runs comes back with the same key: a new one would cut the mesh in two. What is
//! kept on this side is the state directory, as everywhere; in a pod that is memory. The layout is Istio's `cacerts`, so an
//! authority from elsewhere is plugged in by making the Secret first. Tested below, against an API server of its own.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    pin::pin,
};

use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt as _;
use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Client,
    api::PostParams,
    runtime::{WatchStreamExt as _, watcher::watch_object},
};
use zeroize::Zeroizing;

use crate::identity::{CERTIFICATE, CHAIN, EmbeddedCa, KEY, ROOTS, prepare_dir, write_over};

/// The files of an authority, by their names in the Secret; roots and chain are there only for one that is no root itself, or
/// while roots change.
const FILES: [&str; 4] = [CERTIFICATE, KEY, ROOTS, CHAIN];

/// Who makes what is made here, for people who find it.
const MANAGER: (&str, &str) = ("app.kubernetes.io/managed-by", "mesh-controller");

/// One Secret and the directory it stands for.
#[derive(Clone)]
pub struct AuthoritySecret {
    secrets: Api<Secret>,
    name: String,
    dir: PathBuf,
    trust_domain: String,
}

impl AuthoritySecret {
    /// That of this name in the controller's own namespace.
    pub fn new(client: Client, name: &str, dir: &Path, trust_domain: &str) -> Self {
        let secrets = Api::default_namespaced(client);
        Self { secrets, name: name.to_owned(), dir: dir.to_owned(), trust_domain: trust_domain.to_owned() }
    }

    /// Has the same authority in the directory and in the Secret: what the Secret holds, or what is made here where there is
    /// none.
    ///
    /// # Errors
    /// The API server refuses, or the Secret is no authority's.
    pub async fn settle(&self) -> Result<()> {
        let what = || format!("--ca-secret {}", self.name);
        if let Some(secret) = self.secrets.get_opt(&self.name).await.with_context(what)? {
            return self.take(&secret).with_context(what);
        }
        // Left by a controller whose Secret is gone: the mesh knows that one.
        drop(EmbeddedCa::open(&self.dir, &self.trust_domain).with_context(what)?);
        match self.create().await {
            Ok(()) => {
                tracing::info!(
                    secret = self.name,
                    "a certificate authority was made and is kept in a Secret"
                );
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                let secret = self.secrets.get(&self.name).await.with_context(what)?;
                self.take(&secret).with_context(what)
            }
            Err(error) => Err(error).with_context(what),
        }
    }

    /// Follows the Secret: what replaces it is in the directory, which whoever signs follows. Ends never.
    pub async fn follow(self) {
        let mut seen = pin!(watch_object(self.secrets.clone(), &self.name).default_backoff());
        while let Some(news) = seen.next().await {
            match news {
                Ok(Some(secret)) => {
                    if let Err(error) = self.take(&secret) {
                        tracing::error!("Secret {}: {error:#}; the authority stays as it was", self.name);
                    }
                }
                Ok(None) => self.put_back().await,
                Err(error) => {
                    tracing::warn!("Secret {} cannot be followed: {error}; it is tried again", self.name);
                }
            }
        }
    }

    async fn put_back(&self) {
        match self.create().await {
            Ok(()) => tracing::warn!("Secret {} was deleted; it is back with the same key", self.name),
            Err(error) => tracing::error!("Secret {} is gone: {error}", self.name),
        }
    }

    /// Puts what the Secret holds into the directory, where that is something else.
    fn take(&self, secret: &Secret) -> Result<()> {
        let held = secret.data.as_ref();
        let of = |name: &str| held.and_then(|data| data.get(name)).map(|ByteString(bytes)| bytes);
        for name in &FILES[..2] {
            ensure!(of(name).is_some_and(|bytes| !bytes.is_empty()), "it has no {name}");
        }
        // As `EmbeddedCa::open` would make it.
        prepare_dir(&self.dir)?;
        for name in FILES {
            let path = self.dir.join(name);
            match of(name) {
                Some(bytes) => {
                    let there = fs::read(&path).ok().map(Zeroizing::new);
                    if there.as_deref() != Some(bytes) {
                        write_over(&path, 0o600, bytes)?;
                    }
                }
                None => match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                    _ => {}
                },
            }
        }
        Ok(())
    }

    /// Makes the Secret of what is in the directory.
    async fn create(&self) -> Result<(), kube::Error> {
        let mut data = BTreeMap::new();
        for name in FILES {
            match fs::read(self.dir.join(name)) {
                Ok(bytes) => drop(data.insert(name.to_owned(), ByteString(bytes))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(kube::Error::Service(Box::new(error))),
            }
        }
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                labels: Some([MANAGER].map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
                ..ObjectMeta::default()
            },
            data: Some(data),
            type_: Some("Opaque".to_owned()),
            ..Secret::default()
        };
        self.secrets.create(&PostParams::default(), &secret).await.map(|_| ())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::{Value, json};
    use tempfile::TempDir;

    use super::*;
    use crate::{controller::root_config_map, source::kubernetes::tests::fake::Fake};

    const NAME: &str = "mesh-ca";

    /// A controller's replica: its directory, and what it makes of the Secret.
    struct Replica {
        dir: TempDir,
        secret: AuthoritySecret,
    }

    impl Replica {
        fn of(fake: &Fake) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let state = dir.path().join("state");
            let secret = AuthoritySecret::new(fake.cluster().client(), NAME, &state, "cluster.local");
            Self { dir, secret }
        }

        fn file(&self, name: &str) -> Vec<u8> {
            fs::read(self.dir.path().join("state").join(name)).unwrap()
        }

        fn ca(&self) -> std::sync::Arc<EmbeddedCa> {
            std::sync::Arc::new(EmbeddedCa::open(&self.dir.path().join("state"), "cluster.local").unwrap())
        }
    }

    fn held(fake: &Fake) -> Value {
        fake.get("secrets", "default", NAME).unwrap()["data"]["ca-key.pem"].clone()
    }

    #[tokio::test]
    async fn replicas_that_start_at_once_are_one_authority() {
        let fake = Fake::start().await;
        let replicas = [Replica::of(&fake), Replica::of(&fake), Replica::of(&fake)];
        let settled = futures_util::future::join_all(replicas.iter().map(|replica| replica.secret.settle()));
        settled.await.into_iter().collect::<Result<Vec<_>>>().unwrap();
        let keys: Vec<_> = replicas.iter().map(|replica| replica.file("ca-key.pem")).collect();
        assert!(keys.iter().all(|key| *key == keys[0]), "several authorities");
        let bundles: Vec<_> = replicas.iter().map(|replica| replica.ca().bundle()).collect();
        assert!(bundles.iter().all(|bundle| *bundle == bundles[0]));
    }

    #[tokio::test]
    async fn a_secret_that_is_no_authority_is_refused_and_left() {
        let fake = Fake::start().await;
        let wrong =
            json!({"metadata": {"name": NAME, "namespace": "default"}, "data": {"ca-cert.pem": "eA=="}});
        fake.put("", "secrets", wrong);
        let error = Replica::of(&fake).secret.settle().await.err().map(|error| format!("{error:#}"));
        assert!(error.as_ref().is_some_and(|error| error.contains("it has no ca-key.pem")), "{error:?}");
        assert!(held(&fake).is_null());
    }

    #[tokio::test]
    async fn a_secret_that_is_deleted_comes_back_with_the_same_key() {
        let fake = Fake::start().await;
        let replica = Replica::of(&fake);
        replica.secret.settle().await.unwrap();
        let key = held(&fake);
        let following = tokio::spawn(replica.secret.clone().follow());
        fake.until_asked("watch=true", 1).await;
        fake.delete("", "secrets", "default", NAME);
        fake.until(|fake| fake.get("secrets", "default", NAME).is_some()).await;
        assert_eq!(held(&fake), key);
        following.abort();
    }

    #[tokio::test]
    async fn the_roots_are_published_and_put_right() {
        let fake = Fake::start().await;
        let replica = Replica::of(&fake);
        replica.secret.settle().await.unwrap();
        let publishing = tokio::spawn(root_config_map::publish(fake.cluster().client(), replica.ca()));
        let roots = replica.ca().other_roots_than("").await;
        let published = |fake: &Fake| {
            let map = fake.get("configmaps", "default", root_config_map::NAME);
            map.is_some_and(|map| map["data"]["root-cert.pem"] == roots)
        };
        fake.until(published).await;
        fake.delete("", "configmaps", "default", root_config_map::NAME);
        fake.until(published).await;
        publishing.abort();
    }
}
