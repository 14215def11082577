//! `meshctl config`: the configuration the agent acts on. As JSON and YAML all of it, as a table the routes.

use std::io::Write;

use serde_json::Value;

use super::{
    Failure, Output,
    client::Client,
    output::{self, Rows},
};

pub(super) async fn run(client: &Client, output: Output, out: &mut dyn Write) -> Result<(), Failure> {
    let dump: Value = client.get("/config_dump").await?;
    output::print(output, out, &dump, rows)?;
    if output == Output::Table {
        for problem in dump["problems"].as_array().into_iter().flatten() {
            writeln!(out, "problem: {}", text(problem).escape_debug())?;
        }
    }
    Ok(())
}

fn rows(dump: &Value) -> Rows {
    let mut rows = Rows::new(["SERVICE", "PORT", "PROTOCOL", "ROUTE", "FROM", "TO"]);
    for service in items(&dump["services"]) {
        for port in items(&service["ports"]) {
            for route in items(&port["routes"]) {
                rows.push(&[
                    text(&service["host"]),
                    text(&port["port"]),
                    text(&port["protocol"]),
                    text(&route["name"]),
                    text(&route["origin"]),
                    destination(&route["action"]),
                ]);
            }
        }
    }
    rows
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
