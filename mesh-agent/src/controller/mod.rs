//! `mesh-agent controller`: the certificate authority of a mesh as a service, and the key sets of issuers of tokens.
//!
//! Promises that a certificate is given only to who has shown a token of this mesh, for its own identity or, to agents,
//! for those of pods that run on the agent's own node; that every refusal says who was refused what, and why; and that
//! each certificate issued or refused is a line in the log. Connections, requests and messages are bounded. Keys of
//! workloads are never here. What a tenant's configuration names is fetched from here alone, never from a node, and never
//! from where the mesh or the cluster is at home. Tested by `tests/` beside this file and `tests/certificate_authority.rs`.

mod audit;
mod authentication;
mod authority_secret;
mod certificates;
mod connections;
mod csr;
pub mod jwks;
pub mod key_sets;
pub mod leader;
mod pods;
mod rate_limit;
pub(crate) mod root_config_map;
mod serve;
mod server_certificate;
pub(crate) mod status;
#[cfg(test)]
mod tests;
mod token_key;
mod token_review;
mod tokens;
pub mod webhook;

pub use self::{
    authentication::{Accounts, Callers},
    authority_secret::AuthoritySecret,
    certificates::{CertificateService, Limits},
    serve::{Services, serve},
    server_certificate::ServerCertificate,
    token_key::TokenKey,
    token_review::{ApiServer, Reviews},
    tokens::{TokenError, TokenFor, Tokens},
};
