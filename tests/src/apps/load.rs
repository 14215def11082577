//! Load: clients of one kind that ask again and again, each answer checked, until they are told to stop.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::lab_app;
use crate::{Pod, Process, eventually};

/// How long the clients may take to end.
const GRACE: Duration = Duration::from_secs(20);

/// What each client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadKind {
    /// A request on a new connection each time, HTTP/1.1 and HTTP/2 in turn.
    Requests,
    /// Requests on one HTTP/1.1 connection, for as long as its server keeps it.
    KeptAlive,
    /// Bytes to an echo on one connection, to its end.
    Tcp,
    /// Notes of one gRPC call, to its end.
    Grpc,
    /// Messages of one WebSocket, to its end.
    WebSocket,
}

/// What the clients have seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// Connections made.
    pub opened: u64,
    /// Right answers of all clients.
    pub answers: u64,
    /// Right answers of the client that had the fewest.
    pub least: u64,
    /// Everything that was not a right answer, by reason.
    pub errors: BTreeMap<String, u64>,
}

/// Clients that are at it.
#[derive(Debug)]
#[must_use = "the clients run until `finish`"]
pub struct Load {
    kind: LoadKind,
    process: Process,
}

impl Pod {
    /// Starts so many clients, each with a pause after each answer, and waits until every one has had an answer.
    pub async fn load(&self, kind: LoadKind, url: &str, clients: u32, pause: Duration) -> Result<Load> {
        let mut command = lab_app()?;
        let name = kind.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        command.args(["load", &name, url, "--clients", &clients.to_string()]);
        command.args(["--pause-ms", &pause.as_millis().to_string()]);
        let load = Load { kind, process: self.spawn(command)? };
        load.goes_on(1).await?;
        Ok(load)
    }
}

impl Load {
    /// The process of all clients.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// What was seen a moment ago.
    pub fn seen(&self) -> Result<Loaded> {
        let said = self.process.stdout();
        let last = said.lines().last().unwrap_or_default();
        // A line may be only half there.
        let last = serde_json::from_str(last)
            .or_else(|_| serde_json::from_str(said.lines().rev().nth(1).unwrap_or_default()));
        last.with_context(|| format!("{:?} says nothing\n{}", self.kind, self.process.tail()))
    }

    /// Waits until every client has had so many more right answers; nothing else may have happened so far.
    pub async fn goes_on(&self, answers: u64) -> Result<()> {
        let before = self.seen().unwrap_or_default().least;
        eventually("answers to every client", async || {
            let now = self.seen()?;
            ensure!(now.errors.is_empty(), "{:?}: {now:?}", self.kind);
            ensure!(now.least >= before + answers, "{:?}: {now:?}, before: {before}", self.kind);
            Ok(())
        })
        .await
    }

    /// Ends it: every client ends what it has open, and waits for the other side to do the same.
    pub async fn finish(self) -> Result<Loaded> {
        let status = self.process.stop(GRACE).await?;
        ensure!(status.success(), "{:?} ended with {status}\n{}", self.kind, self.process.tail());
        self.seen()
    }
}
