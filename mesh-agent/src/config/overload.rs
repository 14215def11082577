//! How much memory the agent may use, and from where on it refuses new work, each with its flag.

use clap::{Args, value_parser};

/// When the agent refuses new work to stay alive.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Overload")]
pub struct OverloadMarks {
    /// Memory that the agent may use, bytes, with suffixes as in Kubernetes (`512Mi`, `1G`); 0: any [default: the limit of its
    /// cgroup or of one above it, the tightest]
    #[arg(long, env = "MESH_MEMORY_LIMIT", value_name = "BYTES", value_parser = bytes)]
    pub memory_limit: Option<u64>,
    /// Percentage of it from which on new connections and requests of the pods that hold most are refused (closed, 503)
    #[arg(long, env = "MESH_MEMORY_HIGH", value_name = "PERCENT", default_value_t = 85, value_parser = value_parser!(u8).range(1..=100))]
    pub memory_high: u8,
    /// Percentage of it from which on all new connections and requests are refused
    #[arg(long, env = "MESH_MEMORY_CRITICAL", value_name = "PERCENT", default_value_t = 95, value_parser = value_parser!(u8).range(1..=100))]
    pub memory_critical: u8,
}

/// A quantity of Kubernetes, as far as bytes are written so.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "k" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        other => return Err(format!("no suffix of bytes: {other} (k, M, G, Ki, Mi, Gi)")),
    };
    let number: u64 = digits.parse().map_err(|error| format!("not a number of bytes: {error}"))?;
    number.checked_mul(unit).ok_or_else(|| "more bytes than there can be".to_owned())
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn bytes_have_the_suffixes_of_kubernetes() {
        assert_eq!(bytes("123"), Ok(123));
        assert_eq!(bytes("96Mi"), Ok(96 << 20));
        assert_eq!(bytes("2Gi"), Ok(2 << 30));
        assert_eq!(bytes("3k"), Ok(3000));
        assert_eq!(bytes("0"), Ok(0));
        for bad in ["", "Mi", "-1", "1.5Gi", "1mi", "1 Mi", "99999999999999999999", "99999999999Gi"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }
}
