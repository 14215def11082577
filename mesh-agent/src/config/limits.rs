//! Bounds of what apps may ask of the agent over HTTP, each with its flag.

use std::time::Duration;

use clap::{Args, value_parser};

use super::{seconds, some_seconds};
use crate::body::Stall;

/// What a client may take of the agent. Times are in seconds; those whose help says so are off at 0.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "HTTP limits")]
pub struct HttpLimits {
    /// How long a client may be silent before its protocol is taken for unknown: bytes go on as they are, or the
    /// connection is refused where the port's requests are routed (Linkerd: 10 s)
    #[arg(long, env = "MESH_DETECTION_TIMEOUT", value_name = "SECONDS", default_value = "10", value_parser = some_seconds)]
    pub detection_timeout: Duration,
    /// Time for the head of an HTTP/1 request, first byte to last (408 after it)
    #[arg(long, env = "MESH_REQUEST_HEAD_TIMEOUT", value_name = "SECONDS", default_value = "60", value_parser = some_seconds)]
    pub request_head_timeout: Duration,
    /// How long a client's connection may be without a request before it is closed; 0: for ever (Envoy: 1 h)
    #[arg(long, env = "MESH_IDLE_TIMEOUT", value_name = "SECONDS", default_value = "3600", value_parser = seconds)]
    pub idle_timeout: Duration,
    /// How long nothing may move on a request under way, in either direction, upgrades apart; 0: for ever (Istio)
    #[arg(long, env = "MESH_STREAM_IDLE_TIMEOUT", value_name = "SECONDS", default_value = "0", value_parser = seconds)]
    pub stream_idle_timeout: Duration,
    /// How long a client may leave a response that is ready for it untaken (Envoy: 5 min)
    #[arg(long, env = "MESH_FLUSH_TIMEOUT", value_name = "SECONDS", default_value = "300", value_parser = some_seconds)]
    pub flush_timeout: Duration,
    /// Largest head of a request, bytes (431 above it; Envoy: 60 KiB)
    #[arg(long, env = "MESH_MAX_REQUEST_HEAD_BYTES", value_name = "BYTES", default_value_t = 60 << 10,
          value_parser = value_parser!(u32).range(1024..=1 << 20))]
    pub max_request_head_bytes: u32,
    /// Most headers of a request (431 above it; Envoy: 100)
    #[arg(long, env = "MESH_MAX_REQUEST_HEADERS", value_name = "COUNT", default_value_t = 100,
          value_parser = value_parser!(u32).range(1..=10_000))]
    pub max_request_headers: u32,
    /// Longest target (path and query) of a request, bytes (414 above it)
    #[arg(long, env = "MESH_MAX_REQUEST_TARGET_BYTES", value_name = "BYTES", default_value_t = 16 << 10,
          value_parser = value_parser!(u32).range(64..=65_534))]
    pub max_request_target_bytes: u32,
    /// Requests that one HTTP/2 connection may have under way
    #[arg(long, env = "MESH_MAX_STREAMS_PER_CONNECTION", value_name = "COUNT", default_value_t = 1024,
          value_parser = value_parser!(u32).range(1..))]
    pub max_streams_per_connection: u32,
    /// Connections that one pod may have open with the agent, those of its clients and its own; never more than take half
    /// of the agent's file descriptors
    #[arg(long, env = "MESH_MAX_CONNECTIONS_PER_POD", value_name = "COUNT", default_value_t = 1 << 16,
          value_parser = value_parser!(u32).range(1..=1 << 24))]
    pub max_connections_per_pod: u32,
}

impl HttpLimits {
    /// How long nothing may move on a request under way.
    pub fn stall(&self) -> Stall {
        Stall { idle: unless_off(self.stream_idle_timeout), flush: self.flush_timeout }
    }

    /// How long a connection may be without a request; `None` is unlimited.
    pub fn idle(&self) -> Option<Duration> {
        unless_off(self.idle_timeout)
    }
}

fn unless_off(limit: Duration) -> Option<Duration> {
    Some(limit).filter(|limit| !limit.is_zero())
}

impl Default for HttpLimits {
    /// What the flags default to.
    fn default() -> Self {
        Self {
            detection_timeout: Duration::from_secs(10),
            request_head_timeout: Duration::from_mins(1),
            idle_timeout: Duration::from_hours(1),
            stream_idle_timeout: Duration::ZERO,
            flush_timeout: Duration::from_mins(5),
            max_request_head_bytes: 60 << 10,
            max_request_headers: 100,
            max_request_target_bytes: 16 << 10,
            max_streams_per_connection: 1024,
            max_connections_per_pod: 1 << 16,
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        http: HttpLimits,
    }

    #[test]
    fn the_flags_default_to_the_default() {
        let parsed = Flags::try_parse_from(["mesh-agent"]).unwrap().http;
        assert_eq!(format!("{parsed:?}"), format!("{:?}", HttpLimits::default()));
        assert_eq!(parsed.stall().idle, None);
        let set = Flags::try_parse_from(["mesh-agent", "--stream-idle-timeout=0.5"]).unwrap().http;
        assert_eq!(set.stall().idle, Some(Duration::from_millis(500)));
        for bad in [
            "--max-request-headers=0",
            "--flush-timeout=0",
            "--request-head-timeout=0",
            "--detection-timeout=0",
        ] {
            assert!(Flags::try_parse_from(["mesh-agent", bad]).is_err(), "{bad}");
        }
    }
}
