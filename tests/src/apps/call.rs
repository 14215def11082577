//! gRPC calls of all four kinds, to the service `lab.Notes` of the gRPC app.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::Pod;

/// The kinds of calls, each a method of `lab.Notes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CallKind {
    /// `Unary`: a note, and a note back.
    Unary,
    /// `ServerStream`: a note, and as many back as its `count` says.
    ServerStream,
    /// `ClientStream`: notes, and one back that says how many.
    ClientStream,
    /// `Bidi`: each note back as it comes.
    Bidi,
}

impl CallKind {
    /// The method's path.
    pub fn path(self) -> &'static str {
        match self {
            Self::Unary => "/lab.Notes/Unary",
            Self::ServerStream => "/lab.Notes/ServerStream",
            Self::ClientStream => "/lab.Notes/ClientStream",
            Self::Bidi => "/lab.Notes/Bidi",
        }
    }
}

/// The message of `lab.Notes`, both ways.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, prost::Message)]
pub struct Note {
    /// Free text, which comes back. A request can ask for trouble: `sleep/MS` waits before each answer, `status/N`
    /// ends the call with this gRPC code once everything was answered, `refuse/N` before anything is.
    #[prost(string, tag = "1")]
    pub text: String,
    /// How many notes are wanted, or were received.
    #[prost(uint64, tag = "2")]
    pub count: u64,
    /// In answers: the pod.
    #[prost(string, tag = "3")]
    pub pod: String,
    /// In answers: the `grpc-timeout` the request came with.
    #[prost(string, tag = "4")]
    pub timeout: String,
    /// Filling, to make large messages.
    #[prost(bytes = "vec", tag = "5")]
    pub filling: Vec<u8>,
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Called {
    /// The gRPC status code's name, for example `Ok` or `DeadlineExceeded`.
    pub code: String,
    /// The status message.
    pub message: String,
    /// The answers that came before the end.
    pub notes: Vec<Note>,
    /// The trailers, or the headers of an answer that had nothing but a status.
    pub metadata: BTreeMap<String, String>,
    /// How long it took.
    pub millis: u64,
}

/// A call, made one option at a time.
#[derive(Debug, Clone)]
#[must_use = "a call goes out with `send`"]
pub struct Call<'a> {
    pod: &'a Pod,
    args: Vec<String>,
}

impl Pod {
    /// Begins a call of `lab.Notes` from this pod.
    pub fn call(&self, url: &str, kind: CallKind) -> Call<'_> {
        let kind = kind.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        Call { pod: self, args: vec!["grpc-call".to_owned(), url.to_owned(), kind] }
    }
}

impl Call<'_> {
    fn arg(mut self, arg: String) -> Self {
        self.args.push(arg);
        self
    }

    /// How many notes are sent, or asked for (1).
    pub fn count(self, count: u64) -> Self {
        self.arg(format!("--count={count}"))
    }

    /// The text of each note.
    pub fn text(self, text: &str) -> Self {
        self.arg(format!("--text={text}"))
    }

    /// Bytes of filling in each note.
    pub fn filling(self, bytes: u64) -> Self {
        self.arg(format!("--filling={bytes}"))
    }

    /// Sends this `grpc-timeout`. The client does not act on it itself: whatever ends the call is somebody else.
    pub fn deadline(self, deadline: Duration) -> Self {
        self.arg(format!("--deadline-ms={}", deadline.as_millis()))
    }

    /// Adds a header.
    pub fn header(self, name: &str, value: &str) -> Self {
        self.arg(format!("--header={name}: {value}"))
    }

    /// Makes the call. A status of any kind is an answer.
    pub async fn send(self) -> Result<Called> {
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        self.pod.client(&args).await
    }
}
