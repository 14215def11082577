//! `meshctl` in an agent's container: what it writes comes as it is written, and its exit code is ours.
//!
//! Never leaves it running there: a command that would go on for ever is told to end with its standard input, which ends
//! with the connection. Tested in `tests.rs`.

use std::{
    io::{self, Write},
    pin::pin,
};

use futures_util::FutureExt as _;
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::Status};
use kube::{Api, Client, api::AttachParams};
use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::{Asked, Failure, agents::CONTAINER, answered, chain};
use crate::ctl::{Agent, END_WITH_STDIN};

/// Bytes that wait to be written here.
const BUFFER: usize = 64 * 1024;

/// Runs it with these words, and passes on what it writes to both its outputs.
pub(super) async fn shown(
    client: &Client,
    namespace: &str,
    agent: &Agent,
    words: &[String],
    follows: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    run(client, namespace, agent, words, follows, (out, &mut io::stderr())).await
}

/// What it has answered.
pub(in crate::ctl) struct Kept {
    /// Its standard output.
    pub out: Vec<u8>,
    /// Why it has failed, in its own words, if it has.
    pub failed: Option<String>,
}

/// Runs it with these words, and keeps what it answers.
pub(in crate::ctl) async fn kept(
    client: &Client,
    namespace: &str,
    agent: &Agent,
    words: &[&str],
) -> Result<Kept, Failure> {
    let words: Vec<String> = words.iter().map(ToString::to_string).collect();
    let (mut out, mut errors) = (Vec::new(), Vec::new());
    let failed = match run(client, namespace, agent, &words, false, (&mut out, &mut errors)).await {
        Ok(()) => None,
        Err(failure @ Failure::Elsewhere(_)) => {
            let said = String::from_utf8_lossy(&errors).trim().to_owned();
            Some(if said.is_empty() { failure.to_string() } else { said })
        }
        Err(failure) => return Err(failure),
    };
    Ok(Kept { out, failed })
}

async fn run(
    client: &Client,
    namespace: &str,
    agent: &Agent,
    words: &[String],
    follows: bool,
    (out, errors): (&mut dyn Write, &mut dyn Write),
) -> Result<(), Failure> {
    let mut command = vec!["meshctl".to_owned()];
    command.extend(follows.then(|| format!("--{END_WITH_STDIN}")));
    command.extend_from_slice(words);
    let how = AttachParams::default().container(CONTAINER).stdin(follows).max_stdout_buf_size(BUFFER);
    // Websockets are asked for with GET, and newer API servers want the verb of what it does on top.
    let asked = Asked { verb: "create,get", resource: "pods/exec", namespace: Some(namespace) };
    let pods = Api::<Pod>::namespaced(client.clone(), namespace);
    let mut process = answered(asked, pods.exec(&agent.pod, command, &how)).await?;
    // Open for as long as this runs.
    let _stdin = process.stdin();
    let (stdout, stderr) = (process.stdout(), process.stderr());
    let status = process.take_status();
    let mut status = pin!(async { status?.await });
    let mut poured = pin!(async { tokio::try_join!(pour(stdout, out), pour(stderr, errors)) });
    let status = tokio::select! {
        done = &mut poured => {
            done?;
            status.await
        }
        status = &mut status => {
            // What was written has come before the status. Without one the connection is cut, and its streams never end.
            match status {
                Some(_) => drop(poured.await?),
                None => drop(poured.now_or_never().transpose()?),
            }
            status
        }
    };
    let why = match &status {
        Some(_) => String::new(),
        None => process.join().await.err().map(|error| format!(": {}", chain(&error))).unwrap_or_default(),
    };
    ended(status, agent).unwrap_or_else(|| {
        Err(Failure::Unreachable(format!(
            "the connection to {} of node {} was cut{why}",
            agent.pod, agent.node
        )))
    })
}

/// Writes what comes, each piece at once: the reader may be a pipe.
async fn pour(from: Option<impl AsyncRead + Unpin>, to: &mut dyn Write) -> Result<(), Failure> {
    let Some(mut from) = from else { return Ok(()) };
    let mut piece = vec![0; BUFFER];
    loop {
        // An end that is no end in order shows in the status, which is not there then.
        match from.read(&mut piece).await {
            Ok(0) | Err(_) => return Ok(()),
            Ok(length) => {
                to.write_all(&piece[..length])?;
                to.flush()?;
            }
        }
    }
}

/// How it ended, as the kubelet tells; none when it does not.
fn ended(status: Option<Status>, agent: &Agent) -> Option<Result<(), Failure>> {
    let status = status?;
    if status.status.as_deref() == Some("Success") {
        return Some(Ok(()));
    }
    let causes = status.details.and_then(|details| details.causes).unwrap_or_default();
    let code = causes.iter().find(|cause| cause.reason.as_deref() == Some("ExitCode"));
    let code = code.and_then(|cause| cause.message.as_deref()?.parse().ok());
    Some(Err(code.map_or_else(
        || {
            let said = status.message.unwrap_or_else(|| "no reason is given".to_owned());
            Failure::Request(format!("meshctl in {} of node {} was not run: {said}", agent.pod, agent.node))
        },
        Failure::Elsewhere,
    )))
}
