//! The API server that was given: who writes to it here, and how the agent of a node of the lab reaches it.
//!
//! Promises that no more than [`AT_ONCE`] objects are on their way to it, and that a relay goes with what holds it.

use std::{
    fs,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result};
use kube::{
    Api, Client, Config,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use lab::net::Netns;
use serde_json::Value;
use tempfile::NamedTempFile;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

/// Objects that are written at a time.
const AT_ONCE: usize = 32;

/// Who is spoken to, as one who may do everything.
pub struct ApiServer {
    client: Client,
    kubeconfig: Value,
    address: SocketAddr,
}

/// What is open in the node's network namespace, and leads to the API server: nothing else leads out of a lab.
pub struct Relay {
    _task: AbortOnDropHandle<()>,
    /// How the agent finds it.
    pub kubeconfig: NamedTempFile,
}

impl ApiServer {
    /// Of a file with one cluster and one user in it, as JSON.
    pub async fn new(kubeconfig: &Path) -> Result<Self> {
        let about = || format!("--kubeconfig {}", kubeconfig.display());
        let text = fs::read_to_string(kubeconfig).with_context(about)?;
        let written: Value = serde_json::from_str(&text).with_context(about)?;
        let read: Kubeconfig = serde_json::from_str(&text).with_context(about)?;
        let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
        let config = config.with_context(about)?;
        let address = config.cluster_url.authority().map(|authority| authority.as_str().parse());
        let address =
            address.with_context(about)?.context("the API server's address is an IP with a port")?;
        Ok(Self { client: Client::try_from(config)?, kubeconfig: written, address })
    }

    /// Opens a relay to it, and says so in a kubeconfig.
    pub fn relay(&self, netns: &Netns) -> Result<Relay> {
        let listener = netns.inside(|| {
            let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })?;
        let listener = TcpListener::from_std(listener)?;
        let mut kubeconfig = self.kubeconfig.clone();
        let server =
            kubeconfig.pointer_mut("/clusters/0/cluster/server").context("a cluster with a server")?;
        *server = format!("https://{}", listener.local_addr()?).into();
        let mut file = NamedTempFile::new().context("making a kubeconfig")?;
        file.write_all(kubeconfig.to_string().as_bytes()).context("writing a kubeconfig")?;
        let task = AbortOnDropHandle::new(tokio::spawn(relay(listener, self.address)));
        Ok(Relay { _task: task, kubeconfig: file })
    }

    /// Whether it serves this kind.
    pub async fn serves(&self, kind: &ApiResource) -> Result<bool> {
        match self.client.list_api_group_resources(&kind.api_version).await {
            Ok(served) => Ok(served.resources.iter().any(|one| one.name == kind.plural)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
            Err(error) => Err(error).with_context(|| format!("asking for {}", kind.api_version)),
        }
    }

    /// Objects of a kind that has namespaces.
    pub fn of(&self, kind: &ApiResource, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), namespace, kind)
    }

    /// Makes a namespace.
    pub async fn make_namespace(&self, object: &Value) -> Result<()> {
        create(&Api::all_with(self.client.clone(), &resource("v1", "Namespace", "namespaces")), object)
            .await
            .map(drop)
    }

    /// Has a namespace go, with all that is in it.
    pub async fn remove_namespace(&self, name: &str) -> Result<()> {
        let kind = resource("v1", "Namespace", "namespaces");
        let all: Api<DynamicObject> = Api::all_with(self.client.clone(), &kind);
        all.delete(name, &DeleteParams::default()).await.with_context(|| format!("deleting {name}"))?;
        Ok(())
    }

    /// Writes them all.
    pub async fn create_all(&self, objects: impl Iterator<Item = (Api<DynamicObject>, Value)>) -> Result<()> {
        let mut writing = JoinSet::new();
        for (api, object) in objects {
            if writing.len() == AT_ONCE
                && let Some(written) = writing.join_next().await
            {
                written??;
            }
            writing.spawn(async move { create(&api, &object).await.map(drop) });
        }
        while let Some(written) = writing.join_next().await {
            written??;
        }
        Ok(())
    }
}

/// A kind of objects.
pub fn resource(api_version: &str, kind: &str, plural: &str) -> ApiResource {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}

/// Writes an object, and returns it as it is there.
pub async fn create(api: &Api<DynamicObject>, object: &Value) -> Result<DynamicObject> {
    let object: DynamicObject = serde_json::from_value(object.clone())?;
    let written = api.create(&PostParams::default(), &object).await;
    written.with_context(|| format!("creating {:?}", object.metadata.name))
}

/// Changes what is named in an object.
pub async fn merge(api: &Api<DynamicObject>, name: &str, change: &Value) -> Result<()> {
    let merged = api.patch(name, &PatchParams::default(), &Patch::Merge(change)).await;
    merged.with_context(|| format!("changing {name}")).map(drop)
}

async fn relay(listener: TcpListener, to: SocketAddr) {
    let mut open = JoinSet::new();
    loop {
        // One that is gone before it was taken concerns nobody else.
        let Ok((mut near, _)) = listener.accept().await else { continue };
        while open.try_join_next().is_some() {}
        open.spawn(async move {
            near.set_nodelay(true)?;
            let mut far = TcpStream::connect(to).await?;
            far.set_nodelay(true)?;
            copy_bidirectional(&mut near, &mut far).await
        });
    }
}
