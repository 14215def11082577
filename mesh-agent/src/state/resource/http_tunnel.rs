//! `tunnel` of a `DestinationRule`. Tested by the tables below.

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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn targets_are_hosts_and_ports() {
        for (host, target) in
            [("a.example", "a.example:443"), ("10.0.0.1", "10.0.0.1:443"), ("fd00::1", "[fd00::1]:443")]
        {
            let wire: Wire = serde_json::from_value(json!({"targetHost": host, "targetPort": 443})).unwrap();
            let tunnel = wire.check().unwrap();
            assert_eq!((tunnel.ask, tunnel.target.as_str()), (Ask::Connect, target));
        }
        let post = json!({"protocol": "POST", "targetHost": "a", "targetPort": 1});
        assert_eq!(serde_json::from_value::<Wire>(post).unwrap().check().unwrap().ask, Ask::Post);
        assert!(
            serde_json::from_value::<Wire>(json!({"protocol": "GET", "targetHost": "a", "targetPort": 1}))
                .is_err()
        );
    }

    #[test]
    fn bad_targets_name_their_field() {
        for (host, port, field, message) in [
            ("a", 65536, "targetPort", "range"),
            ("a", 0, "targetPort", "range"),
            ("u@a", 1, "targetHost", "neither a host name"),
            ("a/b", 1, "targetHost", "neither a host name"),
            ("", 1, "targetHost", "neither a host name"),
        ] {
            let wire: Wire = serde_json::from_value(json!({"targetHost": host, "targetPort": port})).unwrap();
            let error = wire.check().unwrap_err();
            assert!(error.field == field && error.message.contains(message), "{host}:{port}: {error:?}");
        }
    }
}
