//! One agent's place taken by another, its successor, while connections go on.
//!
//! The agent that serves listens on `RUN_DIR/handover.sock`; one that is started with the same run directory calls
//! there ([`call`]), is given the listening sockets and the pins, makes everything ready beside the one that serves, and
//! says [`Succession::serving`] once it accepts too. Up to then either may fail and nothing has happened; from then on
//! the other takes nothing new, keeps what it has until that ends, and removes nothing.
//!
//! Only the same user may call. Both have to be of one version of the protocol, node and directory of pins. Tested below
//! and, with agents that serve, in `tests/tests/upgrade.rs`.

mod door;
mod link;
mod succession;

use std::{os::fd::OwnedFd, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use self::{
    door::{Asked, Door},
    succession::{Offered, Succession, call},
};
use crate::{capture::OfferedPod, report::KnownFlow};

/// Version of the protocol: agents of different ones do not take over from one another.
const VERSION: u32 = 1;

/// Flows told of in one message.
const FLOWS_AT_ONCE: usize = 1000;

/// Who calls, and for what: it has to be what the other one serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Name of the node.
    pub node: String,
    /// Directory of pins.
    pub bpf_dir: PathBuf,
}

/// The agent's own listening sockets.
#[derive(Debug)]
pub struct OwnListeners {
    /// The operator's endpoint.
    pub admin: OwnedFd,
    /// `/metrics`.
    pub metrics: OwnedFd,
    /// `/healthz/ready`.
    pub readiness: OwnedFd,
}

/// What travels, in this order. Unknown fields are passed over, so that later versions can be refused in words.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
enum Message {
    /// The successor's first word.
    Hello {
        version: u32,
        place: Place,
    },
    Refused {
        reason: String,
    },
    /// With the lock of the directory of pins and the agent's own listeners.
    Offer {
        /// Whether the run directory goes with its agent.
        made_run_dir: bool,
        pods: usize,
    },
    /// With its three listeners.
    Pod {
        namespace: String,
        name: String,
        cookie: u64,
    },
    /// The successor accepts connections: it cannot go back.
    Serving,
    /// What is known of connections that stay where they are.
    Flows {
        flows: Vec<KnownFlow>,
    },
    /// The other one has let go.
    Done,
}

impl Message {
    fn of(pod: &OfferedPod) -> Self {
        Self::Pod { namespace: pod.namespace.clone(), name: pod.name.clone(), cookie: pod.cookie }
    }
}

#[cfg(test)]
mod tests;
