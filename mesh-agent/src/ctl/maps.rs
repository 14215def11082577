//! `meshctl maps`: the agent's BPF maps as they are in the kernel, with or without the agent.

use std::{io::Write, path::Path};

use serde_json::Value;

use super::{
    Failure, Output,
    output::{self, Rows, or_dash},
};
use crate::capture::inspect;

/// What to do with maps.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// All maps of the agent: type, sizes, elements
    List,
    /// The elements of one map; the maps inside a map of maps too
    Dump {
        /// Name of the map, as `maps list` shows it
        name: String,
    },
}

impl From<inspect::Error> for Failure {
    fn from(error: inspect::Error) -> Self {
        Self::Request(error.to_string())
    }
}

pub(super) fn run(
    command: &Command,
    bpf_dir: &Path,
    output: Output,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    match command {
        Command::List => output::print(output, out, &inspect::list(bpf_dir)?, |maps| {
            let mut rows = Rows::new(["NAME", "ID", "TYPE", "KEY", "VALUE", "CAPACITY", "ELEMENTS"]);
            for map in maps {
                rows.push(&[
                    map.name.clone(),
                    map.id.to_string(),
                    map.kind.clone(),
                    map.key_size.to_string(),
                    map.value_size.to_string(),
                    map.max_entries.to_string(),
                    or_dash(map.count.as_ref()),
                ]);
            }
            rows
        }),
        Command::Dump { name } => {
            if name.contains('/') {
                return Err(Failure::Usage(format!(
                    "`{name}` is no name of a map: `meshctl maps list` shows them"
                )));
            }
            output::print(output, out, &inspect::dump(bpf_dir, name)?, dump_rows)
        }
    }
}

/// A map of maps becomes one table: the outer key, then key and value of each inner element.
pub(super) fn dump_rows(dump: &inspect::Dump) -> Rows {
    let is_nested = dump.entries.iter().any(|entry| entry.value["entries"].is_array());
    let mut rows = Rows::new(if is_nested { &["MAP", "KEY", "VALUE"][..] } else { &["KEY", "VALUE"] });
    for entry in &dump.entries {
        match entry.value["entries"].as_array() {
            Some(inner) => {
                for element in inner {
                    rows.push(&[flat(&entry.key), flat(&element["key"]), flat(&element["value"])]);
                }
            }
            None => rows.push(&[flat(&entry.key), flat(&entry.value)]),
        }
    }
    rows
}

/// A value on one line; an address and its port as they are usually written.
fn flat(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => format!("[{}]", items.iter().map(flat).collect::<Vec<_>>().join(" ")),
        Value::Object(fields) => {
            if let (2, Some(Value::String(ip)), Some(port)) =
                (fields.len(), fields.get("ip"), fields.get("port"))
            {
                return if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") };
            }
            fields.iter().map(|(name, value)| format!("{name}={}", flat(value))).collect::<Vec<_>>().join(" ")
        }
        other => other.to_string(),
    }
}
