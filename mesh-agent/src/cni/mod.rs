//! The mesh as a link in the node's chain of CNI plugins: a pod starts when its connections are captured, not a moment before.
//!
//! The container runtime runs the plugin ([`plugin`]) once the pod has its network; the plugin tells the agent of the pod, over
//! a socket in the agent's run directory, and waits for its word ([`ask`], [`serve`]). The agent keeps the plugin in the
//! chain as long as it runs ([`install`]). Promises: a pod that is to be enrolled does not start unenrolled; the absence of the
//! agent holds back nobody else, and no pod's end. Never decides by itself who is enrolled, and changes nothing of a pod's
//! network. Tested beside each file, and in the lab by `tests/tests/cni.rs`.
//!
//! The wire: one line of JSON each way ([`Request`], [`Answer`]). Agents and plugins of different versions meet during an
//! upgrade: fields are only added.

mod chain;
pub mod install;
mod netconf;
pub mod plugin;
pub mod serve;

use std::{
    collections::BTreeSet,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::IpAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::identity::write_over;

pub use crate::admin::{CNI_NAMESPACES as NAMESPACES_NAME, CNI_SOCKET as SOCKET_NAME};

/// The plugin's type, which is the name of its program in the runtime's directory of plugins.
pub const PLUGIN: &str = "mesh-cni";

/// The longest line of the wire, bytes: a pod has few addresses and short names.
const LONGEST_LINE: u64 = 64 * 1024;

/// What has become of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    /// It has its network, and is about to start.
    Add,
    /// It is gone, or was never to be.
    Del,
    /// The runtime asks whether all is as it was after `Add`.
    Check,
    /// The runtime asks whether pods could start.
    Status,
}

/// What a plugin tells the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// What has happened.
    pub verb: Verb,
    /// The pod's namespace; empty for `Status`.
    #[serde(default)]
    pub namespace: String,
    /// The pod's name; empty for `Status`.
    #[serde(default)]
    pub pod: String,
    /// Its `metadata.uid`, where the runtime tells it.
    #[serde(default)]
    pub uid: Option<String>,
    /// Its sandbox, by the runtime's name for it.
    #[serde(default)]
    pub container: String,
    /// Where its network namespace is.
    #[serde(default)]
    pub netns: Option<PathBuf>,
    /// The addresses that the plugins before have given it.
    #[serde(default)]
    pub ips: Vec<IpAddr>,
}

/// What the agent says to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// The pod is enrolled: it may start.
    Enrolled,
    /// The mesh has nothing to do with it: it may start.
    NotEnrolled,
    /// It is to be enrolled and is not: it may not start yet.
    Refused(String),
    /// Understood; nothing is to be waited for.
    Noted,
}

/// What the agent leaves for the plugin to go by while there is no agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// Namespaces whose pods are to be enrolled, some or all of them.
    pub enrolled: BTreeSet<String>,
}

impl Namespaces {
    /// What an agent has left; none where none has.
    ///
    /// # Errors
    /// The file cannot be read, or holds something else.
    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Leaves it there, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        Ok(write_over(path, 0o600, serde_json::to_string(self)?.as_bytes())?)
    }
}

/// Tells the agent behind a socket, and waits for its word no longer than `patience`.
///
/// # Errors
/// Nobody answers there, in time, or in a way that is understood.
pub fn ask(socket: &Path, request: &Request, patience: Duration) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream.take(LONGEST_LINE)).read_line(&mut answer)?;
    if answer.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the agent hung up"));
    }
    serde_json::from_str(&answer).map_err(io::Error::other)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_an_older_plugin_says_is_understood() {
        let text =
            r#"{"verb":"add","namespace":"a","pod":"b","netns":"/run/netns/x","ips":["10.0.0.1"],"new":1}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert_eq!((request.verb, request.uid, request.ips.len()), (Verb::Add, None, 1));
        let refused = serde_json::to_string(&Answer::Refused("no".to_owned())).unwrap();
        assert_eq!(refused, r#"{"refused":"no"}"#);
    }

    #[test]
    fn namespaces_are_left_whole_for_root_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAMESPACES_NAME);
        assert_eq!(Namespaces::read(&path).unwrap(), None);
        let left = Namespaces { enrolled: ["shop".to_owned()].into() };
        left.write(&path).unwrap();
        left.write(&path).unwrap();
        assert_eq!(Namespaces::read(&path).unwrap(), Some(left));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something lies beside it");
        std::fs::write(&path, "{").unwrap();
        assert!(Namespaces::read(&path).is_err());
    }
}
