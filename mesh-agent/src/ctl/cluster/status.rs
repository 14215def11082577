//! `meshctl status` of all nodes: a line for each agent, of what it answers itself.
//!
//! Agents are asked beside one another. One that cannot be asked has its reason in its line, and makes the command fail when
//! all have been shown. Tested in `tests.rs`.

use std::{collections::BTreeMap, io::Write};

use futures_util::{StreamExt as _, stream};
use kube::Client;
use serde::Serialize;
use serde_json::Value;

use super::{
    Agent, Failure,
    exec::{self, Kept},
};
use crate::ctl::{Output, Rows, print};

/// Agents that are asked at a time.
const AT_A_TIME: usize = 8;

/// One node.
#[derive(Debug, Serialize)]
pub(super) struct OfNode {
    node: String,
    pod: String,
    /// What `meshctl status` says there.
    status: Option<Value>,
    /// Why it says nothing.
    error: Option<String>,
}

pub(super) async fn run(
    client: &Client,
    namespace: &str,
    agents: &BTreeMap<String, Agent>,
    output: Output,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    if agents.is_empty() {
        return Err(super::agents::one(agents, None, namespace).err().unwrap_or(Failure::Elsewhere(1)));
    }
    let asked = stream::iter(agents.values()).map(|agent| of_node(client, namespace, agent));
    let nodes: Vec<OfNode> = asked.buffered(AT_A_TIME).collect().await;
    print(output, out, &nodes, |nodes| rows(nodes))?;
    match nodes.iter().filter(|node| node.status.is_none()).count() {
        0 => Ok(()),
        silent => Err(Failure::Unreachable(format!(
            "{silent} of {} agents could not be asked, for the reason that is shown",
            nodes.len()
        ))),
    }
}

async fn of_node(client: &Client, namespace: &str, agent: &Agent) -> OfNode {
    let asked = match &agent.trouble {
        Some(trouble) => Err(format!("does not run: {trouble}")),
        None => match exec::kept(client, namespace, agent, &["--output=json", "status"]).await {
            Ok(Kept { failed: Some(why), .. }) => Err(why),
            Ok(Kept { out, .. }) => {
                serde_json::from_slice(&out).map_err(|error| format!("its answer is no JSON: {error}"))
            }
            Err(failure) => Err(failure.to_string()),
        },
    };
    let (node, pod) = (agent.node.clone(), agent.pod.clone());
    match asked {
        Ok(status) => OfNode { node, pod, status: Some(status), error: None },
        Err(error) => OfNode { node, pod, status: None, error: Some(error) },
    }
}

const HEADINGS: [&str; 10] = [
    "NODE",
    "AGENT",
    "VERSION",
    "READY",
    "CONFIG",
    "ENROLLED",
    "FAILING",
    "CERTIFICATES",
    "PROBLEMS",
    "SHEDS",
];

fn rows(nodes: &[OfNode]) -> Rows {
    let mut rows = Rows::new(HEADINGS);
    for node in nodes {
        let mut cells = vec![node.node.clone(), node.pod.clone()];
        match &node.status {
            Some(status) => cells.extend(said(status)),
            None => cells.extend(["-".to_owned(), node.error.clone().unwrap_or_default()]),
        }
        cells.resize(HEADINGS.len(), "-".to_owned());
        rows.push(&cells);
    }
    rows
}

/// The cells of what an agent says, from its version on.
fn said(status: &Value) -> [String; 8] {
    let text = |name: &str| status[name].as_str().unwrap_or("-").to_owned();
    let count = |name: &str| status[name].as_array().map_or(0, Vec::len).to_string();
    let waits = status["waiting_for"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let ready = if status["ready"] == true {
        "yes".to_owned()
    } else {
        format!("waits for {}", waits.collect::<Vec<_>>().join(", "))
    };
    [
        text("version"),
        ready,
        status["config_revision"].to_string(),
        count("enrolled"),
        count("failing"),
        status["certificates"].to_string(),
        count("problems"),
        status["overload"]["level"].as_str().unwrap_or("-").to_owned(),
    ]
}
