//! What a pod's annotations say of its capture, and what it declares for the kubelet. Read in `resource/pod.rs`, carried out in the kernel.

use std::fmt;

use super::{ProbePort, Subnet};

/// What a pod asks of its capture.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CapturePolicy {
    /// What its apps dial past the agent.
    pub exclude_outbound: Exclusions,
    /// What reaches its apps past the agent; addresses are those of who dials.
    pub exclude_inbound: Exclusions,
    /// What becomes of its connections while there is no agent; `None` leaves that to the node.
    pub when_agent_is_down: Option<WhenAgentIsDown>,
    /// TCP that leaves around the agent is dropped.
    pub restrict_egress: bool,
    /// Whether all connections from and to it take the agent (`mesh.io/direct: disabled`).
    pub no_direct: bool,
    /// What the kubelet may ask of it.
    pub probes: Vec<ProbePort>,
}

/// What is not captured: a connection that any of these holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exclusions {
    /// Ports.
    pub ports: Vec<PortRange>,
    /// Addresses.
    pub cidrs: Vec<Subnet>,
}

/// Ports, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

impl PortRange {
    /// Whether a port is one of them.
    pub const fn holds(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { first, last } if first == last => write!(f, "{first}"),
            Self { first, last } => write!(f, "{first}-{last}"),
        }
    }
}

/// What becomes of an enrolled pod's connections while no agent serves them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum WhenAgentIsDown {
    /// Refused at once, in both directions: nothing is ever sent in the clear.
    #[default]
    Closed,
    /// Passed untouched, in both directions.
    Open,
}

impl WhenAgentIsDown {
    /// The word in annotations and flags.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
        }
    }
}
