//! `connectionPool` of a `DestinationRule`, checked.
//!
//! A number of 0 is one that was left out, as everywhere in Istio. Tested by the tables below.

use std::time::Duration;

use serde::Deserialize;

use super::{
    duration::IstioDuration,
    field::{Checked, FieldError},
};
use crate::state::snapshot::{ConnectionPool, Idle, Pings, TcpKeepalive};

/// `connectionPool`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pool {
    /// `tcp.connectTimeout`.
    pub connect_timeout: Option<Duration>,
    /// Everything else.
    pub limits: ConnectionPool,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Wire {
    tcp: Option<WireTcp>,
    http: Option<WireHttp>,
}

#[derive(Debug, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireTcp {
    max_connections: Option<i32>,
    connect_timeout: Option<IstioDuration>,
    tcp_keepalive: Option<WireKeepalive>,
    max_connection_duration: Option<IstioDuration>,
    idle_timeout: Option<IstioDuration>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireKeepalive {
    probes: Option<u32>,
    time: Option<IstioDuration>,
    interval: Option<IstioDuration>,
}

#[derive(Debug, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireHttp {
    http1_max_pending_requests: Option<i32>,
    http2_max_requests: Option<i32>,
    max_requests_per_connection: Option<i32>,
    max_retries: Option<i32>,
    idle_timeout: Option<IstioDuration>,
    #[serde(default)]
    h2_upgrade_policy: WireUpgrade,
    #[serde(default)]
    use_client_protocol: bool,
    max_concurrent_streams: Option<i32>,
    http2_keep_alive: Option<WirePings>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WirePings {
    interval: Option<IstioDuration>,
    timeout: Option<IstioDuration>,
}

/// `DEFAULT` is what the mesh-wide settings say, where Istio's default is not to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum WireUpgrade {
    #[default]
    Default,
    DoNotUpgrade,
    Upgrade,
}

impl Wire {
    pub fn check(self) -> Checked<Pool> {
        let (tcp, http) = (self.tcp.unwrap_or_default(), self.http.unwrap_or_default());
        let upgrade = http.h2_upgrade_policy == WireUpgrade::Upgrade;
        if upgrade && http.use_client_protocol {
            let message = "useClientProtocol must not be true where h2UpgradePolicy is UPGRADE";
            return Err(FieldError::new("http.useClientProtocol", message));
        }
        let limits = ConnectionPool {
            connections: most("tcp.maxConnections", tcp.max_connections)?,
            keepalive: tcp.tcp_keepalive.map(WireKeepalive::check).transpose()?,
            max_duration: time("tcp.maxConnectionDuration", tcp.max_connection_duration)?,
            // 0s: never, which is what holds without a rule.
            stream_idle: match tcp.idle_timeout {
                Some(IstioDuration(Duration::ZERO)) => None,
                written => time("tcp.idleTimeout", written)?,
            },
            pending: most("http.http1MaxPendingRequests", http.http1_max_pending_requests)?,
            requests: most("http.http2MaxRequests", http.http2_max_requests)?,
            requests_per_connection: most("http.maxRequestsPerConnection", http.max_requests_per_connection)?,
            retries: most("http.maxRetries", http.max_retries)?,
            idle: match http.idle_timeout {
                None => Idle::Default,
                Some(IstioDuration(Duration::ZERO)) => Idle::Never,
                Some(written) => Idle::After(written.at_least_a_millisecond("http.idleTimeout")?),
            },
            streams: most("http.maxConcurrentStreams", http.max_concurrent_streams)?,
            upgrade,
            client_protocol: http.use_client_protocol,
            pings: http.http2_keep_alive.map(WirePings::check).transpose()?,
        };
        Ok(Pool { connect_timeout: time("tcp.connectTimeout", tcp.connect_timeout)?, limits })
    }
}

impl WireKeepalive {
    fn check(self) -> Checked<TcpKeepalive> {
        Ok(TcpKeepalive {
            time: seconds("tcp.tcpKeepalive.time", self.time)?,
            interval: seconds("tcp.tcpKeepalive.interval", self.interval)?,
            probes: match self.probes {
                Some(probes @ 128..) => {
                    let message = format!("probes {probes} are more than the 127 that there may be");
                    return Err(FieldError::new("tcp.tcpKeepalive.probes", message));
                }
                probes => probes.filter(|probes| *probes > 0),
            },
        })
    }
}

impl WirePings {
    /// Both are needed: Envoy takes no settings without `timeout`, and without `interval` nothing would be asked.
    fn check(self) -> Checked<Pings> {
        let time = |field, written: Option<IstioDuration>| {
            time(field, written)?.ok_or_else(|| FieldError::new(field, "is required"))
        };
        Ok(Pings {
            interval: time("http.http2KeepAlive.interval", self.interval)?,
            timeout: time("http.http2KeepAlive.timeout", self.timeout)?,
        })
    }
}

fn most(field: &str, written: Option<i32>) -> Checked<Option<u32>> {
    let Some(written) = written.filter(|written| *written != 0) else { return Ok(None) };
    let most = u32::try_from(written).map_err(|_| {
        FieldError::new(field, format!("{written} is negative; it must be 0 (unlimited) or more"))
    })?;
    Ok(Some(most))
}

fn time(field: &str, written: Option<IstioDuration>) -> Checked<Option<Duration>> {
    written.map(|written| written.at_least_a_millisecond(field)).transpose()
}

/// The kernel counts in whole seconds, from 1 to 32767 (`TCP_KEEPIDLE`, `TCP_KEEPINTVL`).
fn seconds(field: &str, written: Option<IstioDuration>) -> Checked<Option<Duration>> {
    const RANGE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(32_767);
    match written {
        Some(IstioDuration(written)) if !RANGE.contains(&written) => {
            Err(FieldError::new(field, format!("{written:?} is not in range 1s..32767s")))
        }
        written => Ok(written.map(|written| written.0)),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(value: &Value) -> Checked<Pool> {
        crate::state::resource::field::deserialize::<Wire>(value)?.check()
    }

    #[test]
    fn every_field_is_read() {
        let pool = read(&json!({
            "tcp": {
                "maxConnections": 7, "connectTimeout": "30ms", "maxConnectionDuration": "1h", "idleTimeout": "5m",
                "tcpKeepalive": { "probes": 3, "time": "7200s", "interval": "75s" }
            },
            "http": {
                "http1MaxPendingRequests": 1, "http2MaxRequests": 2, "maxRequestsPerConnection": 3, "maxRetries": 4,
                "idleTimeout": "10s", "h2UpgradePolicy": "UPGRADE", "maxConcurrentStreams": 5,
                "http2KeepAlive": { "interval": "30s", "timeout": "5s" }
            }
        }))
        .unwrap();
        let keepalive = TcpKeepalive {
            time: Some(Duration::from_hours(2)),
            interval: Some(Duration::from_secs(75)),
            probes: Some(3),
        };
        let expected = ConnectionPool {
            connections: Some(7),
            keepalive: Some(keepalive),
            max_duration: Some(Duration::from_hours(1)),
            stream_idle: Some(Duration::from_mins(5)),
            pending: Some(1),
            requests: Some(2),
            requests_per_connection: Some(3),
            retries: Some(4),
            idle: Idle::After(Duration::from_secs(10)),
            streams: Some(5),
            upgrade: true,
            client_protocol: false,
            pings: Some(Pings { interval: Duration::from_secs(30), timeout: Duration::from_secs(5) }),
        };
        assert_eq!((pool.connect_timeout, pool.limits), (Some(Duration::from_millis(30)), expected));
    }

    #[test]
    fn what_is_left_out_or_0_is_unlimited() {
        let zeros = json!({
            "tcp": { "maxConnections": 0, "idleTimeout": "0s" },
            "http": {
                "http1MaxPendingRequests": 0, "http2MaxRequests": 0, "maxRequestsPerConnection": 0, "maxRetries": 0,
                "maxConcurrentStreams": 0, "h2UpgradePolicy": "DO_NOT_UPGRADE"
            }
        });
        for written in [json!({}), json!({"tcp": {}, "http": {}}), zeros] {
            assert_eq!(read(&written).unwrap().limits, ConnectionPool::UNLIMITED, "{written}");
        }
        let by_default = |keepalive| json!({ "tcp": { "tcpKeepalive": keepalive } });
        assert_eq!(read(&by_default(json!({}))).unwrap().limits.keepalive, Some(TcpKeepalive::default()));
        let never =
            read(&json!({ "http": { "idleTimeout": "0s", "useClientProtocol": true } })).unwrap().limits;
        assert_eq!((never.idle, never.client_protocol), (Idle::Never, true));
    }

    #[test]
    fn bad_rules_name_their_field() {
        let (tcp, http) = (|tcp| json!({ "tcp": tcp }), |http| json!({ "http": http }));
        let table = [
            (tcp(json!({"maxConnections": -1})), "tcp.maxConnections", "negative"),
            (tcp(json!({"maxConnections": "1"})), "tcp.maxConnections", "invalid type"),
            (tcp(json!({"connectTimeout": "10"})), "tcp.connectTimeout", "not a duration"),
            (tcp(json!({"connectTimeout": "1us"})), "tcp.connectTimeout", "1ms"),
            (tcp(json!({"maxConnectionDuration": "0s"})), "tcp.maxConnectionDuration", "1ms"),
            (tcp(json!({"idleTimeout": "1us"})), "tcp.idleTimeout", "1ms"),
            (tcp(json!({"tcpKeepalive": {"time": "10ms"}})), "tcp.tcpKeepalive.time", "1s..32767s"),
            (tcp(json!({"tcpKeepalive": {"interval": "10h"}})), "tcp.tcpKeepalive.interval", "1s..32767s"),
            (tcp(json!({"tcpKeepalive": {"probes": 128}})), "tcp.tcpKeepalive.probes", "127"),
            (http(json!({"http1MaxPendingRequests": -1})), "http.http1MaxPendingRequests", "negative"),
            (http(json!({"http2MaxRequests": -1})), "http.http2MaxRequests", "negative"),
            (http(json!({"maxRequestsPerConnection": -1})), "http.maxRequestsPerConnection", "negative"),
            (http(json!({"maxRetries": -1})), "http.maxRetries", "negative"),
            (http(json!({"maxConcurrentStreams": -1})), "http.maxConcurrentStreams", "negative"),
            (http(json!({"idleTimeout": "1us"})), "http.idleTimeout", "1ms"),
            (http(json!({"h2UpgradePolicy": "ALWAYS"})), "http.h2UpgradePolicy", "unknown variant"),
            (
                http(json!({"h2UpgradePolicy": "UPGRADE", "useClientProtocol": true})),
                "http.useClientProtocol",
                "UPGRADE",
            ),
            (http(json!({"http2KeepAlive": {}})), "http.http2KeepAlive.interval", "required"),
            (http(json!({"http2KeepAlive": {"interval": "1s"}})), "http.http2KeepAlive.timeout", "required"),
            (
                http(json!({"http2KeepAlive": {"interval": "1us", "timeout": "1s"}})),
                "http.http2KeepAlive.interval",
                "1ms",
            ),
            (json!({"udp": {}}), "udp", "unknown field"),
        ];
        for (value, field, message) in table {
            let error = read(&value).unwrap_err();
            assert_eq!(error.field, field, "{value}");
            assert!(error.message.contains(message), "{value}: {}", error.message);
        }
    }
}
