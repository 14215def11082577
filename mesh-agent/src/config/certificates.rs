//! How long the certificates of workloads last, whose are revoked, and the steps of replacing a root, each with its flag.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand};

use super::seconds;
use crate::state::defaults::TRUST_DOMAIN;

/// Shorter lives than this would be all renewal, seconds.
const SHORTEST_LIFE: Duration = Duration::from_secs(5);

/// The certificates of workloads.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Certificates")]
pub struct CertificateFlags {
    /// How long the certificate of a workload is valid, seconds (5 at least); it is renewed when 70 % of that are over
    #[arg(long, env = "MESH_CERTIFICATE_LIFETIME", value_name = "SECONDS", default_value = "86400", value_parser = lifetime)]
    pub certificate_lifetime: Duration,
    /// File of certificate revocation lists, PEM or DER, watched for changes: peers whose certificate is listed are refused,
    /// and connections of theirs that are open are cut within a second. An empty file revokes nothing
    #[arg(long, env = "MESH_CRL", value_name = "FILE")]
    pub crl: Option<PathBuf>,
}

fn lifetime(text: &str) -> Result<Duration, String> {
    let life = seconds(text)?;
    if life < SHORTEST_LIFE { Err("must be 5 at least".to_owned()) } else { Ok(life) }
}

/// `mesh-agent ca`.
#[derive(Debug, Clone, Args)]
pub struct CaConfig {
    /// What to do.
    #[command(subcommand)]
    pub step: CaStep,
    /// The agents' directory, which holds the certificate authority
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR", default_value = "/var/lib/mesh", global = true)]
    pub state_dir: PathBuf,
    /// Trust domain of every identity
    #[arg(long, env = "MESH_TRUST_DOMAIN", default_value = TRUST_DOMAIN, global = true)]
    pub trust_domain: String,
}

/// The steps, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
pub enum CaStep {
    /// Shows what is believed, what signs, and which step is next
    Status,
    /// Makes a new root, which agents believe from then on, beside the one that signs
    Prepare,
    /// Has the new root sign: agents replace all leaves within five minutes
    Switch {
        /// Every agent has the new root: do not wait until it is there for a minute
        #[arg(long)]
        now: bool,
    },
    /// Has agents believe only the root that is signed under: connections that stand on another are cut
    Drop {
        /// No leaf of the root before is in use: do not wait for six minutes after the switch
        #[arg(long)]
        now: bool,
    },
}
