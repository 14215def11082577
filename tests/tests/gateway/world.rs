//! Two nodes with an agent each, a shop in two versions on the second, a gateway on the first, and a client outside the mesh.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, ensure};
use lab::{Agent, Gateway, Lab, Pod, apps, pki::Authority};
use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use serde_json::{Value, json};

/// Where the apps listen.
pub const APP: u16 = 8080;

/// The gateway's own identity.
pub const IDENTITY: &str = "cluster.local/ns/default/sa/edge";

/// See the module.
pub struct World {
    pub lab: Lab,
    pub gateway: Gateway,
    /// Outside the mesh.
    pub client: Pod,
    pub v1: Pod,
    pub v2: Pod,
    agents: [Agent; 2],
    markers: AtomicU32,
}

impl World {
    /// With these manifests besides, in force from the start, and these flags for the gateway.
    pub async fn with(name: &str, manifests: &str, flags: &[&str]) -> Result<Self> {
        let lab = Lab::new(name).await?;
        let (a, b) = (lab.node("a").await?, lab.node("b").await?);
        lab.service("shop").selector("app", "shop").port("http", 80, APP).apply()?;
        lab.apply("subsets.yaml", SUBSETS)?;
        lab.apply("gateway.yaml", manifests)?;
        let version = async |version: &str| {
            let pod = b.pod(&format!("shop-{version}")).sa("shop");
            let pod = pod.labels([("app", "shop"), ("version", version)]).start().await?;
            pod.serve(apps::http(APP)).await?;
            anyhow::Ok(pod)
        };
        let (v1, v2) = (version("v1").await?, version("v2").await?);
        let edge =
            a.pod("edge").sa("edge").label("istio", "ingressgateway").label("app", "edge").unenrolled();
        let edge = edge.start().await?;
        let client = a.pod("client").unenrolled().start().await?;
        let agents = [a.agent().start().await?, b.agent().start().await?];
        v1.enrolled().await?;
        v2.enrolled().await?;
        let gateway = edge.gateway(flags).await?;
        Ok(Self { lab, gateway, client, v1, v2, agents, markers: AtomicU32::new(0) })
    }

    /// The same without flags.
    pub async fn new(name: &str, manifests: &str) -> Result<Self> {
        Self::with(name, manifests, &[]).await
    }

    /// A URL of the gateway.
    pub fn url(&self, port: u16, path: &str) -> String {
        format!("http://{}{path}", self.gateway.pod().at(port))
    }

    /// Writes a manifest and waits until all have it in force.
    pub async fn apply(&self, file: &str, yaml: &str) -> Result<()> {
        self.lab.apply(file, yaml)?;
        self.settled().await
    }

    /// Waits until everything written so far is in force, in agents and gateway.
    pub async fn settled(&self) -> Result<()> {
        let marker = format!("marker-{}", self.markers.fetch_add(1, Ordering::Relaxed));
        let host = self.lab.service(&marker).port("tcp", 1, 1).apply()?.host();
        let there = |dump: &Value| {
            ensure!(dump.to_string().contains(&host), "{host} is not there yet");
            Ok(())
        };
        for agent in &self.agents {
            agent.config("what was written is in force", there).await?;
        }
        self.gateway.config("what was written is in force at the gateway", there).await?;
        self.lab.delete(&format!("service-default-{marker}.yaml"))
    }

    /// Ends all, which must succeed, and finds nothing left.
    pub async fn finish(self) -> Result<()> {
        let Self { lab, gateway, agents, .. } = self;
        let status = gateway.stop().await?;
        ensure!(status.success(), "the gateway ended with {status}");
        end(lab, agents).await
    }

    /// The same where the gateway has ended already.
    pub async fn ended(self) -> Result<()> {
        let Self { lab, gateway, agents, .. } = self;
        gateway.has_ended();
        end(lab, agents).await
    }
}

async fn end(lab: Lab, agents: [Agent; 2]) -> Result<()> {
    for agent in agents {
        ensure!(agent.stop().await?.success(), "an agent ended badly");
    }
    lab.finish().await
}

const SUBSETS: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: shop, namespace: default }
spec:
  host: shop
  subsets:
  - { name: v1, labels: { version: v1 } }
  - { name: v2, labels: { version: v2 } }
";

/// A `Gateway` called `edge` with these servers.
pub fn gateway(servers: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{ name: edge, namespace: default }}
spec:
  selector: {{ istio: ingressgateway }}
  servers:
{servers}"
    )
}

/// A `VirtualService` bound to it, for a host, with these rules (indented by two).
pub fn bound(name: &str, host: &str, rules: &str) -> String {
    format!(
        "
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{ name: {name}, namespace: default }}
spec:
  hosts: [\"{host}\"]
  gateways: [edge]
{rules}"
    )
}

/// Everything to this version of the shop.
pub fn to_version(version: &str) -> String {
    format!("  http:\n  - route: [{{ destination: {{ host: shop, subset: {version} }} }}]\n")
}

/// A certificate and its key, in PEM: for a name (of a host) and a URI, if there is one.
pub fn leaf(authority: &Authority, name: &str, uri: Option<&str>) -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![name.to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names.extend(uri.map(|uri| anyhow::Ok(SanType::URI(uri.try_into()?))).transpose()?);
    let certificate = params.signed_by(&key, &authority.issuer()?)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

/// A Secret of TLS, with the authority of clients if there is one.
pub fn secret(name: &str, shown: &(String, String), clients: Option<&Authority>) -> String {
    let mut data = json!({ "tls.crt": shown.0, "tls.key": shown.1 });
    if let Some(clients) = clients {
        data["ca.crt"] = clients.certificate.clone().into();
    }
    let object = json!({ "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
                         "metadata": { "name": name, "namespace": "default" }, "stringData": data });
    format!("\n---\n{object}\n")
}
