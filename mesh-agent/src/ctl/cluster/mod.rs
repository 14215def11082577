//! `meshctl` against a cluster: the same commands, answered by the agent of the node that is meant.
//!
//! An agent's admin endpoint is a socket on its node, which nobody reaches over the network. So the command runs in the
//! agent's own container, by the API server's word: who may do that in the mesh's namespace may do anything there already
//! (`docs/decisions/042-meshctl-in-a-cluster.md`). Promises that what is missing is named: the pod, the agent, or the verb
//! that whoever runs it lacks. Never writes an object, but for asking what it may do. Finding agents is `agents.rs`,
//! running there `exec.rs`, all nodes at once `status.rs`. Tested in `tests.rs` against an API server of its own.

mod agents;
mod exec;
mod status;
#[cfg(test)]
pub(super) mod tests;

use std::{
    env,
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::time::timeout;

pub(super) use self::{
    agents::{Agent, agents},
    exec::kept,
};
use super::{Cli, Command, Failure, check};

/// Time for the API server to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Says where the API server is, in every pod of a cluster.
const SERVICE_HOST: &str = "KUBERNETES_SERVICE_HOST";

/// Which cluster, and which of its nodes.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "In a cluster")]
pub(super) struct Place {
    /// Kubeconfig file of the cluster [default: KUBECONFIG, ~/.kube/config, or the cluster in one of whose pods this runs]
    #[arg(long, global = true, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig [default: its current one]
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// Namespace that the mesh is installed in
    #[arg(long, global = true, env = "MESH_NAMESPACE", value_name = "NAME", default_value = "mesh-system")]
    pub mesh_namespace: String,
    /// Ask the agent of this node of the cluster
    #[arg(long, global = true, value_name = "NAME")]
    pub node: Option<String>,
    /// Ask the agent of the node that this pod is on; `flows` shows this pod's alone (on a node, its name will do)
    #[arg(short, long, global = true, value_name = "[NAMESPACE/]NAME", conflicts_with = "node")]
    pub pod: Option<String>,
}

impl Place {
    /// Names of the arguments that say where, and nothing else.
    pub const WHERE: [&str; 5] = ["kubeconfig", "context", "mesh_namespace", "node", "pod"];

    /// Whether it can mean nothing but a cluster.
    pub fn is_of_a_cluster(&self) -> bool {
        self.kubeconfig.is_some() || self.context.is_some() || self.node.is_some()
    }

    /// Namespace and name of the pod; without a namespace, that which the command is about.
    pub fn pod<'a>(&'a self, namespace: Option<&'a str>) -> Option<(&'a str, &'a str)> {
        let named = self.pod.as_deref()?;
        Some(named.split_once('/').unwrap_or((namespace.unwrap_or("default"), named)))
    }

    /// A client of the API server.
    pub async fn client(&self) -> Result<Client, Failure> {
        let usage = |error: &dyn std::fmt::Display| Failure::Usage(format!("the cluster: {error}"));
        let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
        let kubeconfig = match &self.kubeconfig {
            Some(file) => Some(Kubeconfig::read_from(file)),
            None => has_kubeconfig().then(Kubeconfig::read),
        };
        let config = match kubeconfig {
            Some(read) => {
                let kubeconfig = read.map_err(|error| usage(&chain(&error)))?;
                let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
                config.map_err(|error| usage(&chain(&error)))?
            }
            None if self.context.is_some() => {
                return Err(usage(
                    &"--context needs a kubeconfig; there is neither KUBECONFIG nor ~/.kube/config",
                ));
            }
            None => Config::incluster().map_err(|_| usage(&NOWHERE))?,
        };
        Client::try_from(config).map_err(|error| usage(&chain(&error)))
    }
}

const NOWHERE: &str =
    "there is no --kubeconfig, no KUBECONFIG, no ~/.kube/config, and this is no pod of a cluster";

/// Whether there is a cluster to be found without being told which.
pub(super) fn is_known() -> bool {
    has_kubeconfig() || env::var_os(SERVICE_HOST).is_some()
}

fn has_kubeconfig() -> bool {
    let named = env::var_os("KUBECONFIG").is_some_and(|files| !files.is_empty());
    named || env::home_dir().is_some_and(|home| Path::new(&home).join(".kube/config").is_file())
}

/// Runs a command of the command line where its place says.
pub(super) async fn run(cli: &Cli, out: &mut dyn Write) -> Result<(), Failure> {
    let place = &cli.place;
    if matches!(cli.command, Command::Check) && place.node.is_none() && place.pod.is_none() {
        return check::of_cluster(place, cli.output, out).await;
    }
    let client = place.client().await?;
    let namespace = match &cli.command {
        Command::Flows(args) => args.namespace.as_deref(),
        _ => None,
    };
    let node = match place.pod(namespace) {
        Some((namespace, name)) => Some(agents::node_of(&client, namespace, name).await?),
        None => place.node.clone(),
    };
    let agents = agents(&client, &place.mesh_namespace, node.as_deref()).await?;
    if node.is_none() && matches!(cli.command, Command::Status) {
        return status::run(&client, &place.mesh_namespace, &agents, cli.output, out).await;
    }
    let agent = agents::one(&agents, node.as_deref(), &place.mesh_namespace)?;
    let follows = matches!(&cli.command, Command::Flows(args) if args.follow);
    exec::shown(&client, &place.mesh_namespace, agent, &cli.said, follows, out).await
}

/// What was asked of the API server, for errors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    pub verb: &'a str,
    pub resource: &'a str,
    pub namespace: Option<&'a str>,
}

impl Asked<'_> {
    /// The failure that an error of the client is, in words that say what to do.
    pub fn failed(self, error: &kube::Error) -> Failure {
        match error {
            kube::Error::Api(status) => self.refused(status.code, &status.message),
            kube::Error::UpgradeConnection(kube::client::UpgradeConnectionError::ProtocolSwitch(status)) => {
                self.refused(status.as_u16(), status.canonical_reason().unwrap_or_default())
            }
            error => Failure::Unreachable(format!("the API server cannot be asked: {}", chain(error))),
        }
    }

    fn refused(self, code: u16, message: &str) -> Failure {
        let Self { verb, resource, .. } = self;
        let place = self.namespace.map_or_else(
            || "in the whole cluster".to_owned(),
            |namespace| format!("in namespace {namespace}"),
        );
        match code {
            401 => Failure::Request(format!(
                "the API server does not know you ({message}): is what the kubeconfig says still valid?"
            )),
            403 => Failure::Request(format!(
                "you may not {verb} {resource} {place} ({message}): a role has to allow you verb `{verb}` on `{resource}` \
                 there"
            )),
            _ => Failure::Request(format!("{verb} {resource} {place}: {message} ({code})")),
        }
    }
}

/// What the API server answers, within its time.
pub(super) async fn answered<T>(
    asked: Asked<'_>,
    answer: impl Future<Output = kube::Result<T>>,
) -> Result<T, Failure> {
    match timeout(ANSWER_TIMEOUT, answer).await {
        Ok(answer) => answer.map_err(|error| asked.failed(&error)),
        Err(_) => Err(Failure::Unreachable(format!(
            "the API server has not answered within {} s",
            ANSWER_TIMEOUT.as_secs()
        ))),
    }
}

/// An error with its causes, where these say more.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        source = cause.source();
    }
    text
}
