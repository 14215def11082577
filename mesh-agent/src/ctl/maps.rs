//! `meshctl maps`: the agent's BPF maps as they are in the kernel, with or without the agent.

use std::{io::Write, net::IpAddr, path::Path};

use mesh_common::maps::{ORIGINAL_DST, POD_ORIGINAL_DST};
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
                let of = entry.value["name"].as_str().unwrap_or(&dump.name);
                for element in inner {
                    let [key, value] = element_cells(of, &element["key"], &element["value"]);
                    rows.push(&[flat(&entry.key), key, value]);
                }
            }
            None => rows.push(&element_cells(&dump.name, &entry.key, &entry.value)),
        }
    }
    rows
}

/// Key and value of one element. The entry with the all-zero key, which is no connection, is named for what it is.
fn element_cells(map: &str, key: &Value, value: &Value) -> [String; 2] {
    // The kernel keeps 15 characters of a name.
    let marks = POD_ORIGINAL_DST.starts_with(map) && map.len() >= ORIGINAL_DST.len();
    if !marks || !is_zero(key) {
        return [flat(key), flat(value)];
    }
    let full = match value["full_ns"].as_u64() {
        Some(ns) if ns > 0 => format!(
            "the table was last full {}.{:03} s after boot",
            ns / 1_000_000_000,
            ns / 1_000_000 % 1000
        ),
        _ => "the table was never full".to_owned(),
    };
    ["(no connection)".to_owned(), full]
}

/// Whether nothing in it is set: no number but 0, no address but the unspecified one.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_u64() == Some(0),
        Value::String(text) => text.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_unspecified()),
        Value::Array(items) => items.iter().all(is_zero),
        Value::Object(fields) => fields.values().all(is_zero),
    }
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
