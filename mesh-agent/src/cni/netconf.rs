//! What a container runtime tells a CNI plugin, and how a plugin answers (CNI specification 1.1.0: parameters in `CNI_…`
//! variables, the configuration on standard input, the result or an error as JSON on standard output).
//!
//! Pure. Tested below.

use std::{collections::HashMap, net::IpAddr, path::PathBuf, time::Duration};

use serde::Deserialize;
use serde_json::{Map, Value, json};

/// The versions of the specification that are spoken. The result is that of the plugins before, unchanged.
pub(super) const VERSIONS: [&str; 6] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.0.1", "1.1.0"];

/// How long the start of a pod waits for its enrolment, unless the configuration says otherwise. The kubelet gives the
/// whole sandbox two minutes (`--runtime-request-timeout`).
const PATIENCE: Duration = Duration::from_secs(30);

/// Error codes of the specification, and one of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    /// `CNI_…` variables are missing or wrong.
    Environment = 4,
    /// Standard input is not what it should be.
    Decode = 6,
    /// The configuration is wrong.
    Config = 7,
    /// The same may succeed later.
    TryAgain = 11,
    /// Pods cannot start now (`STATUS`).
    NotAvailable = 50,
    /// The pod is not as it was left (`CHECK`).
    NotAsLeft = 100,
}

/// Why a plugin fails, as the runtime shows it in the pod's events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub code: Code,
    pub message: String,
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// As JSON for standard output.
    pub fn json(&self, version: &str) -> Value {
        json!({"cniVersion": version, "code": self.code as u32, "msg": format!("mesh-cni: {}", self.message)})
    }
}

/// Our entry of the chain, as the runtime hands it over.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NetConf {
    #[serde(default = "first_version")]
    pub cni_version: String,
    /// The agent's socket.
    pub socket: PathBuf,
    /// What the agent leaves behind (`Namespaces`).
    pub namespaces: PathBuf,
    /// Namespaces whose pods are never held back.
    #[serde(default)]
    pub never: Vec<String>,
    #[serde(default)]
    pub patience_seconds: Option<u64>,
    /// What the plugins before have made.
    #[serde(default)]
    pub prev_result: Option<Map<String, Value>>,
}

fn first_version() -> String {
    VERSIONS[0].to_owned()
}

impl NetConf {
    pub fn parse(text: &[u8]) -> Result<Self, Failure> {
        let conf: Self = serde_json::from_slice(text)
            .map_err(|error| Failure::new(Code::Decode, format!("its configuration: {error}")))?;
        if !VERSIONS.contains(&&*conf.cni_version) {
            let text = format!("cniVersion {} is none of {}", conf.cni_version, VERSIONS.join(", "));
            return Err(Failure::new(Code::Config, text));
        }
        Ok(conf)
    }

    pub fn patience(&self) -> Duration {
        self.patience_seconds.map_or(PATIENCE, Duration::from_secs)
    }

    /// The pod's own addresses among those of the result: the ones of an interface inside its sandbox, or all where the
    /// result does not say whose they are.
    pub fn ips(&self) -> Vec<IpAddr> {
        let Some(result) = &self.prev_result else { return Vec::new() };
        let list =
            |name: &str| result.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let interfaces = list("interfaces");
        let inside = |ip: &Value| {
            let index =
                ip.get("interface").and_then(Value::as_u64).and_then(|index| usize::try_from(index).ok());
            let sandbox = index.and_then(|index| interfaces.get(index)?.get("sandbox")?.as_str());
            index.is_none() || sandbox.is_some_and(|sandbox| !sandbox.is_empty())
        };
        let address = |ip: &Value| ip.get("address")?.as_str()?.split('/').next()?.parse::<IpAddr>().ok();
        list("ips").iter().filter(|ip| inside(ip)).filter_map(address).map(|ip| ip.to_canonical()).collect()
    }
}

/// Which pod it is about, from the variables.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Sandbox {
    pub container: String,
    pub netns: Option<PathBuf>,
    pub namespace: String,
    pub pod: String,
    pub uid: Option<String>,
}

impl Sandbox {
    /// `None`: it is no pod of Kubernetes, for the runtime serves others too.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Failure> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let arguments = set("CNI_ARGS").unwrap_or_default();
        let arguments: HashMap<_, _> =
            arguments.split(';').filter_map(|pair| pair.trim().split_once('=')).collect();
        let argument = |name: &str| {
            arguments.get(name).filter(|value| !value.is_empty()).map(|value| (*value).to_owned())
        };
        let (Some(namespace), Some(pod)) = (argument("K8S_POD_NAMESPACE"), argument("K8S_POD_NAME")) else {
            return Ok(None);
        };
        let Some(container) = set("CNI_CONTAINERID") else {
            return Err(Failure::new(Code::Environment, "CNI_CONTAINERID is not set"));
        };
        let uid = argument("K8S_POD_UID");
        Ok(Some(Self { container, netns: set("CNI_NETNS").map(PathBuf::from), namespace, pod, uid }))
    }

    /// Whether the kubelet has made the pod of a file. Its UID is the MD5 of that (`kubelet/config`), not one of the API
    /// server's, which are UUIDs with hyphens.
    pub fn is_static(&self) -> bool {
        self.uid.as_ref().is_some_and(|uid| uid.len() == 32 && uid.bytes().all(|b| b.is_ascii_hexdigit()))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn conf(rest: &Value) -> Result<NetConf, Failure> {
        let mut conf = json!({"cniVersion": "1.0.0", "name": "net", "type": "mesh-cni",
            "socket": "/run/mesh/a/cni.sock", "namespaces": "/run/mesh/a/cni-namespaces.json"});
        for (field, value) in rest.as_object().into_iter().flatten() {
            conf[field] = value.clone();
        }
        NetConf::parse(conf.to_string().as_bytes())
    }

    #[test]
    fn the_pods_addresses_are_those_inside_its_sandbox() {
        let result = json!({"prevResult": {
            "interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/x"}],
            "ips": [{"address": "10.0.0.1/24", "interface": 0}, {"address": "10.0.0.7/24", "interface": 1},
                    {"address": "fd00::7/64", "interface": 1}, {"address": "nonsense"}, {"interface": 1}]}});
        let ips: Vec<_> = conf(&result).unwrap().ips().iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.0.0.7", "fd00::7"]);
        let older = json!({"cniVersion": "0.3.1", "prevResult": {"ips": [{"version": "4", "address": "10.0.0.7/24"}]}});
        assert_eq!(conf(&older).unwrap().ips().len(), 1);
        let wrong = json!({"prevResult": {"ips": [{"address": "10.0.0.7/24", "interface": 9}]}});
        assert!(conf(&wrong).unwrap().ips().is_empty());
        assert!(conf(&json!({})).unwrap().ips().is_empty());
    }

    #[test]
    fn what_is_wrong_with_a_configuration_is_said() {
        let failure = NetConf::parse(b"{").err().unwrap();
        assert_eq!(failure.code, Code::Decode);
        let failure = NetConf::parse(br#"{"cniVersion":"1.0.0"}"#).err().unwrap();
        assert!(failure.message.contains("missing field `socket`"), "{failure:?}");
        let failure = conf(&json!({"cniVersion": "9.0.0"})).err().unwrap();
        assert_eq!(failure.code, Code::Config);
        let said = failure.json("1.0.0");
        assert_eq!((said["code"].as_u64(), said["cniVersion"].as_str()), (Some(7), Some("1.0.0")));
        assert!(said["msg"].as_str().unwrap().starts_with("mesh-cni: cniVersion 9.0.0"), "{said}");
    }

    #[test]
    fn the_pod_is_named_by_the_runtimes_arguments() {
        let arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=u;K8S_POD_INFRA_CONTAINER_ID=c";
        let read = |arguments: &str, container: &str| {
            Sandbox::read(|name| match name {
                "CNI_ARGS" => Some(arguments.to_owned()),
                "CNI_CONTAINERID" => Some(container.to_owned()),
                "CNI_NETNS" => Some("/var/run/netns/cni-1".to_owned()),
                _ => None,
            })
        };
        let pod = read(arguments, "c").unwrap().unwrap();
        assert_eq!((&*pod.namespace, &*pod.pod, pod.uid.as_deref()), ("shop", "cart-0", Some("u")));
        assert_eq!(read("", "c"), Ok(None));
        assert_eq!(read("IgnoreUnknown=1;K8S_POD_NAME=x;;=;K8S_POD_NAMESPACE=", "c"), Ok(None));
        assert_eq!(read(arguments, "").err().unwrap().code, Code::Environment);
    }
}
