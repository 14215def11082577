//! Keys and certificates of a cluster, and the files by which its parts and its administrator find the API server.
//!
//! One authority signs for everybody; openssl makes the keys (P-256), because a build tool needs no cryptography of its
//! own for what lives as long as a test. Never leaves `target/cluster`. Tested by `cargo xtask test cluster`, since every
//! connection of the cluster stands on it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::state::{self, Shape};
use crate::command::kept;

/// A certificate: the files it goes to, whose it is, and the names it answers to (none: a client's alone).
struct Leaf {
    file: String,
    subject: String,
    names: String,
}

impl Leaf {
    fn new(file: &str, subject: &str, names: &str) -> Self {
        Self { file: file.into(), subject: subject.into(), names: names.into() }
    }
}

/// Extensions are given one by one: those of the machine's own configuration would come twice.
const CONFIG: &str = "[req]\ndistinguished_name = subject\n[subject]\n";

/// Makes all of it.
pub fn make(shape: Shape) -> Result<()> {
    fs::write(state::pki().join("openssl.cnf"), CONFIG).context("cannot write openssl's configuration")?;
    authority()?;
    service_account_key()?;
    for leaf in leaves(shape) {
        sign(&leaf)?;
    }
    write_kubeconfig(&state::kubeconfig(), "admin")?;
    for name in ["kube-controller-manager", "kube-scheduler", "kube-proxy"] {
        write_kubeconfig(&state::dir().join(format!("{name}.kubeconfig")), name)?;
    }
    for node in shape.all_nodes() {
        write_kubeconfig(&node.dir().join("kubelet.kubeconfig"), &node.name())?;
    }
    Ok(())
}

fn leaves(shape: Shape) -> Vec<Leaf> {
    let api = [
        "IP:127.0.0.1".to_owned(),
        format!("IP:{}", state::control_plane()),
        format!("IP:{}", state::API_SERVICE),
        "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc".to_owned(),
        "DNS:kubernetes.default.svc.cluster.local".to_owned(),
    ]
    .join(",");
    let mut leaves = vec![
        Leaf::new("apiserver", "/CN=kube-apiserver", &api),
        Leaf::new("apiserver-kubelet", "/O=system:masters/CN=kube-apiserver-kubelet-client", ""),
        Leaf::new("admin", "/O=system:masters/CN=admin", ""),
        Leaf::new("kube-controller-manager", "/CN=system:kube-controller-manager", ""),
        Leaf::new("kube-scheduler", "/CN=system:kube-scheduler", ""),
        Leaf::new("kube-proxy", "/CN=system:kube-proxy", ""),
    ];
    leaves.extend(shape.all_nodes().map(|node| {
        let subject = format!("/O=system:nodes/CN=system:node:{}", node.name());
        Leaf::new(&node.name(), &subject, &format!("IP:{},DNS:{}", node.address(), node.name()))
    }));
    leaves
}

fn openssl() -> Command {
    let mut openssl = Command::new("openssl");
    openssl.current_dir(state::pki());
    openssl
}

/// `openssl req`, for a certificate with a new key.
fn request(file: &str, subject: &str) -> Command {
    let mut request = openssl();
    request.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-sha256",
    ]);
    request.args(["-config", "openssl.cnf", "-days", "3650", "-subj", subject]);
    request.args(["-keyout", &format!("{file}.key"), "-out", &format!("{file}.crt")]);
    request
}

fn authority() -> Result<()> {
    let mut request = request("ca", "/CN=kubernetes");
    request.args(["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "subjectKeyIdentifier=hash"]);
    request.args(["-addext", "keyUsage=critical,keyCertSign,digitalSignature"]);
    kept(request)
}

/// What service account tokens are signed with, and the public half that they are checked with.
fn service_account_key() -> Result<()> {
    let mut make = openssl();
    make.args(["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "sa.key"]);
    kept(make)?;
    let mut publish = openssl();
    publish.args(["pkey", "-in", "sa.key", "-pubout", "-out", "sa.pub"]);
    kept(publish)
}

fn sign(leaf: &Leaf) -> Result<()> {
    let mut request = request(&leaf.file, &leaf.subject);
    request.args(["-CA", "ca.crt", "-CAkey", "ca.key"]);
    request.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
    request.args(["-addext", "keyUsage=critical,digitalSignature"]);
    request.args(["-addext", "extendedKeyUsage=clientAuth,serverAuth"]);
    if !leaf.names.is_empty() {
        request.args(["-addext", &format!("subjectAltName={}", leaf.names)]);
    }
    kept(request)
}

/// A kubeconfig that holds what it needs, so that it can be copied elsewhere.
fn write_kubeconfig(path: &Path, name: &str) -> Result<()> {
    let encoded = |file: &str| -> Result<String> {
        let file = state::pki().join(file);
        Ok(base64(&fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?))
    };
    let (authority, certificate, key) =
        (encoded("ca.crt")?, encoded(&format!("{name}.crt"))?, encoded(&format!("{name}.key"))?);
    let server = format!("https://{}:{}", state::control_plane(), state::API_PORT);
    let text = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": state::NAME, "cluster": { "server": server, "certificate-authority-data": authority } }],
        "users": [{ "name": name, "user": { "client-certificate-data": certificate, "client-key-data": key } }],
        "contexts": [{ "name": state::NAME, "context": { "cluster": state::NAME, "user": name } }],
        "current-context": state::NAME,
    });
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    fs::write(path, format!("{text:#}\n")).with_context(|| format!("cannot write {}", path.display()))
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::state::ProxyMode;

    #[test]
    fn every_node_has_a_certificate_of_its_own() {
        let leaves = leaves(Shape { nodes: 2, proxy: ProxyMode::Nftables });
        let node = leaves.iter().find(|leaf| leaf.file == "node2");
        assert!(node.is_some_and(|node| {
            node.subject == "/O=system:nodes/CN=system:node:node2" && node.names == "IP:172.30.0.12,DNS:node2"
        }));
        assert!(leaves.iter().all(|leaf| leaf.file != "node3"));
    }
}
