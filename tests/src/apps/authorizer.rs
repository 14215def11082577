//! An external authorizer: `lab-app authorizer`, and what it has been asked.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::App;
use crate::Process;

/// The header of a request by which tests say what the authorizer is to do about it.
pub const WANT: &str = "x-want";

/// An external authorizer over gRPC and HTTP on one port.
///
/// It does as the header [`WANT`] of the request in question says; without one it says yes to requests, and to connections
/// of `…/sa/client`:
///
/// | | |
/// |---|---|
/// | `deny` | no, with status 401, the headers `x-reason: because` and `www-authenticate: Lab`, and the body `not you` |
/// | `bare-deny` | no, with nothing else to say |
/// | `change` | yes, with `x-user: joe` for the app, without `x-secret`, and with `x-told: yes` for the client |
/// | `hang` | no answer |
/// | `fail` | an error: gRPC status 13, or HTTP status 500 |
///
/// Each question is told on standard output; see [`questions`].
pub fn authorizer(port: u16) -> App {
    App::new("authorizer", port)
}

/// What an authorizer was asked.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Question {
    /// `grpc` or `http`.
    pub over: String,
    /// What `accept` returned as the peer's address.
    pub peer: String,
    /// Who asked the authorizer, as the mesh tells it (`x-forwarded-client-cert`); empty where it tells nothing.
    pub caller: String,
    /// Of gRPC: the SPIFFE id of who wants something.
    pub client: String,
    /// Of gRPC: the SPIFFE id of the pod that is asked.
    pub server: String,
    /// Of gRPC: the address of who wants something.
    pub client_ip: String,
    /// Method; empty where it is no request.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Authority.
    pub host: String,
    /// Headers by lower-case name; several values are joined by commas.
    pub headers: BTreeMap<String, String>,
    /// The body that was shown.
    pub body: String,
}

/// What an authorizer has been asked so far.
pub fn questions(authorizer: &Process) -> Vec<Question> {
    authorizer.stdout().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}
