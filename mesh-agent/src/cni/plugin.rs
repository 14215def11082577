//! The plugin itself: `mesh-agent cni`, which the container runtime also starts by the name `mesh-cni`.
//!
//! Promises: the result of the plugins before is passed on as it is; a pod whose enrolment fails, or whose namespace is enrolled
//! while there is no agent, does not start, and its events say why; `DEL` and `GC` never fail. Never holds back a pod of a
//! namespace that was not enrolled when the agent ran last, nor one of those in `never` (the system's and the mesh's own), nor a
//! static pod.
//! Tested below, with an agent's socket.

use std::{
    io::{self, Read, Write},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    Answer, Namespaces, Request, Verb, ask,
    netconf::{Code, Failure, NetConf, Sandbox, VERSIONS},
};

/// Pause between two calls of an agent that is not there.
const AGAIN: Duration = Duration::from_millis(100);

/// Whether this process was started by the plugin's name, as container runtimes do, without arguments.
pub fn is_started_by_a_runtime() -> bool {
    let name = std::env::args_os().next().map(std::path::PathBuf::from);
    name.as_deref().and_then(Path::file_name) == Some(super::PLUGIN.as_ref())
}

/// Does what `CNI_COMMAND` says with the configuration from `input`, and writes what the runtime is to read. False: it is an
/// error, and the process has to end with a code that says so.
///
/// # Errors
/// Nothing can be written.
pub fn run(input: &mut impl Read, output: &mut impl Write) -> io::Result<bool> {
    run_with(|name| std::env::var(name).ok(), input, output)
}

fn run_with(
    variable: impl Fn(&str) -> Option<String>,
    input: &mut impl Read,
    output: &mut impl Write,
) -> io::Result<bool> {
    let mut text = Vec::new();
    input.read_to_end(&mut text)?;
    let version = serde_json::from_slice(&text)
        .ok()
        .and_then(|conf: Value| Some(conf.get("cniVersion")?.as_str()?.to_owned()));
    let version = version.unwrap_or_else(|| VERSIONS[0].to_owned());
    let (said, good) = match answer(&variable, &text) {
        Ok(said) => (said, true),
        Err(failure) => (Some(failure.json(&version)), false),
    };
    if let Some(said) = said {
        writeln!(output, "{said}")?;
    }
    Ok(good)
}

fn answer(variable: &impl Fn(&str) -> Option<String>, text: &[u8]) -> Result<Option<Value>, Failure> {
    match variable("CNI_COMMAND").as_deref() {
        Some("VERSION") => {
            Ok(Some(json!({"cniVersion": VERSIONS[VERSIONS.len() - 1], "supportedVersions": VERSIONS})))
        }
        Some("ADD") => {
            let conf = NetConf::parse(text)?;
            if let Some(sandbox) = Sandbox::read(variable)? {
                add(&conf, sandbox)?;
            }
            let mut result = conf.prev_result.unwrap_or_default();
            result.entry("cniVersion").or_insert_with(|| conf.cni_version.into());
            Ok(Some(Value::Object(result)))
        }
        Some("CHECK") => {
            let conf = NetConf::parse(text)?;
            Sandbox::read(variable)?.map_or(Ok(()), |sandbox| check(&conf, sandbox))?;
            Ok(None)
        }
        Some("DEL") => {
            // What cannot be told now, the agent sees by the namespace being gone.
            if let (Ok(conf), Ok(Some(sandbox))) = (NetConf::parse(text), Sandbox::read(variable)) {
                let _ = ask(&conf.socket, &request(Verb::Del, sandbox, &conf), conf.patience());
            }
            Ok(None)
        }
        Some("STATUS") => status(&NetConf::parse(text)?).map(|()| None),
        Some("GC") => Ok(None),
        Some(other) => Err(Failure::new(Code::Environment, format!("CNI_COMMAND {other} is not known"))),
        None => {
            Err(Failure::new(Code::Environment, "CNI_COMMAND is not set: the container runtime runs this"))
        }
    }
}

fn request(verb: Verb, sandbox: Sandbox, conf: &NetConf) -> Request {
    let Sandbox { container, netns, namespace, pod, uid } = sandbox;
    Request { verb, namespace, pod, uid, container, netns, ips: conf.ips() }
}

fn add(conf: &NetConf, sandbox: Sandbox) -> Result<(), Failure> {
    if never_waits(conf, &sandbox) {
        return Ok(());
    }
    let request = request(Verb::Add, sandbox, conf);
    match ask_one_that_returns(conf, &request) {
        Ok(Answer::Refused(reason)) => Err(Failure::new(
            Code::TryAgain,
            format!("{}/{} is not enrolled: {reason}", request.namespace, request.pod),
        )),
        Err(error) if is_enrolled(conf, &request.namespace)? => Err(Failure::new(
            Code::TryAgain,
            format!(
                "namespace {} is enrolled in the mesh and its agent on this node does not answer at {}: {error}",
                request.namespace,
                conf.socket.display()
            ),
        )),
        Ok(Answer::Enrolled | Answer::NotEnrolled | Answer::Noted) | Err(_) => Ok(()),
    }
}

/// The agent's own pod, for one, starts before it can answer; and a static pod is the kubelet's before the API server has heard of
/// it, under a UID that never gets there.
fn never_waits(conf: &NetConf, sandbox: &Sandbox) -> bool {
    conf.never.contains(&sandbox.namespace) || sandbox.is_static()
}

/// Asks the agent, and again for a while where the pod cannot start without one: one that is replaced is back in a moment.
fn ask_one_that_returns(conf: &NetConf, request: &Request) -> io::Result<Answer> {
    let patience = conf.patience();
    let end = Instant::now() + patience / 6;
    loop {
        let asked = ask(&conf.socket, request, patience);
        let waits =
            asked.is_err() && Instant::now() < end && is_enrolled(conf, &request.namespace).unwrap_or(false);
        if !waits {
            return asked;
        }
        thread::sleep(AGAIN);
    }
}

/// Whether a namespace was enrolled when the agent ran last.
fn is_enrolled(conf: &NetConf, namespace: &str) -> Result<bool, Failure> {
    let unread = |error| {
        let text =
            format!("which namespaces are enrolled cannot be read at {}: {error}", conf.namespaces.display());
        Failure::new(Code::TryAgain, text)
    };
    let left = Namespaces::read(&conf.namespaces).map_err(unread)?;
    Ok(left.is_some_and(|left| left.enrolled.contains(namespace)))
}

fn check(conf: &NetConf, sandbox: Sandbox) -> Result<(), Failure> {
    if never_waits(conf, &sandbox) {
        return Ok(());
    }
    match ask(&conf.socket, &request(Verb::Check, sandbox, conf), conf.patience()) {
        Ok(Answer::Refused(reason)) => Err(Failure::new(Code::NotAsLeft, reason)),
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::new(Code::TryAgain, not_there(&conf.socket, &error))),
    }
}

fn status(conf: &NetConf) -> Result<(), Failure> {
    let request = Request {
        verb: Verb::Status,
        namespace: String::new(),
        pod: String::new(),
        uid: None,
        container: String::new(),
        netns: None,
        ips: Vec::new(),
    };
    match ask(&conf.socket, &request, conf.patience()) {
        Ok(_) => Ok(()),
        // Pods of other namespaces start without it: a node is not to be called unfit for them.
        Err(_)
            if Namespaces::read(&conf.namespaces)
                .is_ok_and(|left| left.is_none_or(|left| left.enrolled.is_empty())) =>
        {
            Ok(())
        }
        Err(error) => Err(Failure::new(Code::NotAvailable, not_there(&conf.socket, &error))),
    }
}

fn not_there(socket: &Path, error: &io::Error) -> String {
    format!("the mesh's agent on this node does not answer at {}: {error}", socket.display())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::{
        io::{BufRead as _, BufReader},
        os::unix::net::UnixListener,
        path::PathBuf,
        thread::JoinHandle,
    };

    use tempfile::TempDir;

    use super::*;

    /// A node: where its agent's socket and what it leaves behind are.
    struct Node(TempDir);

    impl Node {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn socket(&self) -> PathBuf {
            self.0.path().join(super::super::SOCKET_NAME)
        }

        fn namespaces(&self) -> PathBuf {
            self.0.path().join(super::super::NAMESPACES_NAME)
        }

        fn enrols(&self, namespaces: &[&str]) {
            let enrolled = namespaces.iter().map(|name| (*name).to_owned()).collect();
            Namespaces { enrolled }.write(&self.namespaces()).unwrap();
        }

        /// An agent that answers once.
        fn agent(&self, answer: Answer) -> JoinHandle<Request> {
            let listener = UnixListener::bind(self.socket()).unwrap();
            thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
                writeln!(stream, "{}", serde_json::to_string(&answer).unwrap()).unwrap();
                serde_json::from_str(&line).unwrap()
            })
        }

        fn runs(&self, command: &str, namespace: &str) -> (bool, Value) {
            self.runs_for(command, namespace, "u1")
        }

        fn runs_for(&self, command: &str, namespace: &str, uid: &str) -> (bool, Value) {
            let conf = json!({"cniVersion": "1.0.0", "name": "net", "type": "mesh-cni", "socket": self.socket(),
                "namespaces": self.namespaces(), "never": ["kube-system"], "patienceSeconds": 5,
                "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.7/24"}], "dns": {"x": 1}}});
            let variable = |name: &str| match name {
                "CNI_COMMAND" => Some(command.to_owned()),
                "CNI_CONTAINERID" => Some("c1".to_owned()),
                "CNI_NETNS" => Some("/run/netns/p".to_owned()),
                "CNI_ARGS" => {
                    Some(format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=cart;K8S_POD_UID={uid}"))
                }
                _ => None,
            };
            let (conf, mut output) = (conf.to_string(), Vec::new());
            let good = run_with(variable, &mut conf.as_bytes(), &mut output).unwrap();
            (good, serde_json::from_slice(&output).unwrap_or(Value::Null))
        }
    }

    #[test]
    fn a_pod_starts_once_the_agent_says_so_with_the_result_it_had() {
        let node = Node::new();
        let agent = node.agent(Answer::Enrolled);
        let (good, result) = node.runs("ADD", "shop");
        assert!(good);
        let before = json!({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.7/24"}], "dns": {"x": 1}});
        assert_eq!(result, before);
        let told = agent.join().unwrap();
        assert_eq!((told.verb, &*told.namespace, &*told.pod), (Verb::Add, "shop", "cart"));
        assert_eq!((told.uid.as_deref(), &*told.container), (Some("u1"), "c1"));
        assert_eq!((told.netns, told.ips.len()), (Some("/run/netns/p".into()), 1));
    }

    #[test]
    fn a_pod_that_cannot_be_enrolled_does_not_start_and_is_told_why() {
        let node = Node::new();
        let agent = node.agent(Answer::Refused("port 15001 is taken".to_owned()));
        let (good, error) = node.runs("ADD", "shop");
        assert!(!good);
        assert_eq!(error["code"], 11);
        let said = error["msg"].as_str().unwrap();
        assert!(said.contains("shop/cart") && said.contains("port 15001 is taken"), "{said}");
        agent.join().unwrap();
    }

    #[test]
    fn without_an_agent_only_enrolled_namespaces_wait() {
        let node = Node::new();
        assert!(node.runs("ADD", "shop").0, "no agent has ever run here");
        node.enrols(&["shop", "kube-system"]);
        let (good, error) = node.runs("ADD", "shop");
        assert!(!good && error["code"] == 11, "{error}");
        assert!(error["msg"].as_str().unwrap().contains("does not answer"), "{error}");
        assert!(node.runs("ADD", "other").0);
        assert!(node.runs("ADD", "kube-system").0, "the system's pods were held back");
        std::fs::write(node.namespaces(), "{").unwrap();
        assert!(!node.runs("ADD", "other").0, "nobody knows which namespaces are enrolled");
        assert!(node.runs("ADD", "kube-system").0);
    }

    #[test]
    fn a_static_pod_waits_for_nobody() {
        let node = Node::new();
        node.enrols(&["shop"]);
        let (of_kubelet, of_api_server) =
            ("0123456789abcdef0123456789abcdef", "01234567-89ab-cdef-0123-456789abcdef");
        for command in ["ADD", "CHECK"] {
            assert!(node.runs_for(command, "shop", of_kubelet).0, "{command}");
            assert!(!node.runs_for(command, "shop", of_api_server).0, "{command}");
        }
    }

    #[test]
    fn a_pods_end_never_waits() {
        let node = Node::new();
        node.enrols(&["shop"]);
        assert_eq!(node.runs("DEL", "shop"), (true, Value::Null));
        assert_eq!(node.runs("GC", "shop"), (true, Value::Null));
        let agent = node.agent(Answer::Noted);
        assert_eq!(node.runs("DEL", "shop"), (true, Value::Null));
        assert_eq!(agent.join().unwrap().verb, Verb::Del);
    }

    #[test]
    fn checks_and_the_plugins_state_are_the_agents() {
        let node = Node::new();
        assert!(node.runs("STATUS", "").0, "nothing is enrolled here");
        node.enrols(&["shop"]);
        assert_eq!(node.runs("STATUS", "").1["code"], 50);
        assert_eq!(node.runs("CHECK", "shop").1["code"], 11);
        let agent = node.agent(Answer::Refused("it has left".to_owned()));
        assert_eq!(node.runs("CHECK", "shop").1["code"], 100);
        agent.join().unwrap();
        let versions = node.runs("VERSION", "").1;
        assert!(versions["supportedVersions"].as_array().unwrap().contains(&json!("1.0.0")));
        assert_eq!(node.runs("NONSENSE", "").1["code"], 4);
    }
}
