//! `meshctl config`: the configuration the agent acts on. As JSON and YAML all of it; for people three tables
//! (workloads, routes, endpoints) and the problems. Tested
//! below and in `tests.rs`.

use std::{collections::BTreeMap, io::Write};

use serde_json::Value;

use super::{
    Failure, Output,
    client::Client,
    output::{self, Rows, printable},
};

pub(super) async fn run(client: &Client, output: Output, out: &mut dyn Write) -> Result<(), Failure> {
    let dump: Value = client.get("/config_dump").await?;
    if output != Output::Table {
        return output::print(output, out, &dump, routes);
    }
    write(&dump, out)
}

/// As tables.
pub(super) fn write(dump: &Value, out: &mut dyn Write) -> Result<(), Failure> {
    for table in [workloads(dump), routes(dump), endpoints(dump)] {
        table.write(out)?;
        writeln!(out)?;
    }
    for problem in items(&dump["problems"]) {
        writeln!(out, "problem: {}", printable(&text(problem)))?;
    }
    Ok(())
}

fn workloads(dump: &Value) -> Rows {
    let mut rows = Rows::new(["WORKLOAD", "NODE", "ADDRESSES", "MESH", "IDENTITY"]);
    for pod in items(&dump["workloads"]) {
        rows.push(&[
            format!("{}/{}", text(&pod["namespace"]), text(&pod["name"])),
            text(&pod["node"]),
            items(&pod["ips"]).map(text).collect::<Vec<_>>().join(" "),
            if pod["enrolled"] == true { "yes" } else { "no" }.to_owned(),
            text(&pod["identity"]),
        ]);
    }
    rows
}

fn routes(dump: &Value) -> Rows {
    let mut rows = Rows::new(["SERVICE", "PORT", "PROTOCOL", "ROUTE", "FROM", "TO"]);
    for service in items(&dump["services"]) {
        let host = text(&service["host"]);
        add(&mut rows, &host, &service["ports"]);
        for (client, ports) in service["views"].as_object().into_iter().flatten() {
            add(&mut rows, &format!("{host} (for {client})"), ports);
        }
    }
    rows
}

/// The endpoints of each cluster that something leads to, once.
fn endpoints(dump: &Value) -> Rows {
    let ports = || items(&dump["services"]).flat_map(|service| items(&service["ports"]));
    let routed = ports().flat_map(|port| items(&port["routes"]));
    let backends = routed.flat_map(|route| items(&route["action"]["forward"])).map(|to| &to["cluster"]);
    let whole = ports().map(|port| &port["cluster"]);
    let clusters: BTreeMap<&str, &Value> =
        whole.chain(backends).filter_map(|cluster| Some((cluster["name"].as_str()?, cluster))).collect();
    let mut rows = Rows::new(["CLUSTER", "ENDPOINT", "WORKLOAD"]);
    for (name, cluster) in clusters {
        let mut none = true;
        for endpoint in items(&cluster["endpoints"]) {
            none = false;
            rows.push(&[name.to_owned(), text(&endpoint["address"]), text(&endpoint["workload"])]);
        }
        if none {
            rows.push(&[name.to_owned(), "-".to_owned(), "-".to_owned()]);
        }
    }
    rows
}

/// The routes of a service's ports: those of connections after those of requests.
fn add(rows: &mut Rows, host: &str, ports: &Value) {
    for port in items(ports) {
        let mut row = |route: &Value, to: &Value| {
            rows.push(&[
                host.to_owned(),
                text(&port["port"]),
                text(&port["protocol"]),
                text(&route["name"]),
                text(&route["origin"]),
                destination(to),
            ]);
        };
        items(&port["routes"]).for_each(|route| row(route, &route["action"]));
        items(&port["streams"]).for_each(|route| row(route, route));
    }
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn destination(action: &Value) -> String {
    if !action["redirect"].is_null() {
        return format!("redirect {}", text(&action["redirect"]["status"]));
    }
    if !action["direct"].is_null() {
        return format!("answer {}", text(&action["direct"]["status"]));
    }
    let one = |backend: &Value| {
        let endpoints = items(&backend["cluster"]["endpoints"]).count();
        match backend["missing"].as_str() {
            Some(why) => format!("{}: missing ({why})", backend["weight"]),
            None => format!(
                "{}: {} ({endpoints} endpoints)",
                backend["weight"],
                text(&backend["cluster"]["name"])
            ),
        }
    };
    items(&action["forward"]).map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use anyhow::{Result, anyhow};
    use serde_json::json;

    use super::*;

    #[test]
    fn views_and_routes_of_connections_have_rows_of_their_own() -> Result<()> {
        let forward = json!([{"weight": 1, "cluster": {"name": "c", "endpoints": []}}]);
        let route =
            json!({"name": "r", "origin": "VirtualService default/a", "action": {"forward": forward}});
        let stream = json!({"name": "tcp[0]", "origin": "VirtualService default/a", "forward": forward});
        let dump = json!({"services": [{
            "host": "a",
            "ports": [{"port": 80, "protocol": null, "routes": [route], "streams": [stream]}],
            "views": {"shop": [{"port": 80, "protocol": "http1", "routes": [route], "streams": []}]},
        }]});
        let mut out = Vec::new();
        output::print(Output::Table, &mut out, &dump, routes).map_err(|failure| anyhow!("{failure}"))?;
        let text = String::from_utf8(out)?;
        let lines: Vec<Vec<&str>> = text
            .lines()
            .skip(1)
            .map(|line| line.split("  ").filter(|cell| !cell.is_empty()).collect())
            .collect();
        let trimmed = |line: &[&str]| line.iter().map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
        let lines: Vec<_> = lines.iter().map(|line| trimmed(line)).collect();
        let of = |host, protocol, name| {
            [host, "80", protocol, name, "VirtualService default/a", "1: c (0 endpoints)"].map(str::to_owned)
        };
        assert_eq!(lines, [of("a", "-", "r"), of("a", "-", "tcp[0]"), of("a (for shop)", "http1", "r")]);
        Ok(())
    }
}
