//! `tunnel` of a `DestinationRule`. Tested by the table of `destination_rule.rs`.

use std::net::IpAddr;

use http::uri::Authority;
use serde::Deserialize;

use super::field::{Checked, FieldError};
use crate::state::snapshot::{Ask, HttpTunnel};

/// A `tunnel`, as it is written.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Wire {
    #[serde(default)]
    protocol: Protocol,
    target_host: String,
    target_port: u32,
}

/// The first is Istio's default.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "UPPERCASE")]
enum Protocol {
    #[default]
    Connect,
    Post,
}

impl Wire {
    pub(super) fn check(self) -> Checked<HttpTunnel> {
        let port = u16::try_from(self.target_port).ok().filter(|port| *port != 0);
        let Some(port) = port else {
            return Err(FieldError::new("targetPort", "port must be in range 1..65535"));
        };
        let host = match self.target_host.parse() {
            Ok(IpAddr::V6(ip)) => format!("[{ip}]"),
            _ => self.target_host,
        };
        let target = Authority::try_from(format!("{host}:{port}"));
        let target = target.ok().filter(|target| !host.is_empty() && target.host() == host);
        let Some(target) = target else {
            return Err(FieldError::new(
                "targetHost",
                format!("{host:?} is neither a host name nor an address"),
            ));
        };
        let ask = match self.protocol {
            Protocol::Connect => Ask::Connect,
            Protocol::Post => Ask::Post,
        };
        Ok(HttpTunnel { ask, target })
    }
}
