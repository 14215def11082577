//! `meshctl config endpoints`: what the agent knows of each endpoint now.

use std::io::Write;

use clap::Args as ClapArgs;

use super::{
    Failure, Output,
    client::Client,
    output::{self, Rows, duration},
};
use crate::admin::EndpointView;

#[derive(Debug, ClapArgs)]
pub(super) struct Args {
    /// Show only clusters whose name contains this, for example `reviews.default` or `|9080|v2|`
    cluster: Option<String>,
}

pub(super) async fn run(
    client: &Client,
    args: &Args,
    output: Output,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let mut endpoints: Vec<EndpointView> = client.get("/endpoints").await?;
    if let Some(part) = &args.cluster {
        endpoints.retain(|one| one.cluster.contains(part));
    }
    output::print(output, out, &endpoints, |endpoints| rows(endpoints))
}

fn rows(endpoints: &[EndpointView]) -> Rows {
    let headings =
        ["CLUSTER", "ENDPOINT", "WORKLOAD", "LOCALITY", "LEVEL", "WEIGHT", "HEALTH", "IN FLIGHT", "LATENCY"];
    let mut rows = Rows::new(headings);
    for one in endpoints {
        let view = one.view.as_ref().map(|view| format!(" (for {view})")).unwrap_or_default();
        let since = one.ejected_seconds.map(|seconds| format!(" {}", duration((seconds * 1e3) as u64)));
        let dash = |text: Option<String>| text.filter(|text| !text.is_empty()).unwrap_or("-".to_owned());
        rows.push(&[
            format!("{}{view}", one.cluster),
            one.address.to_string(),
            dash(one.workload.clone()),
            dash(Some(one.locality.clone())),
            dash(Some(level(one))),
            weight(one),
            format!("{}{}", one.health, since.unwrap_or_default()),
            one.in_flight.to_string(),
            dash(one.latency_ms.map(|ms| format!("{ms:.1}ms"))),
        ]);
    }
    rows
}

/// Its share, and what it reports of itself.
fn weight(one: &EndpointView) -> String {
    let reported = one.reported_weight.map(|weight| format!(" ({weight:.0} reported)"));
    format!("{}{}", one.weight, reported.unwrap_or_default())
}

/// The level for everybody, or for each kind of client that has asked.
fn level(one: &EndpointView) -> String {
    if one.level_by_client.is_empty() {
        return one.level.map(|level| level.to_string()).unwrap_or_default();
    }
    let each = one.level_by_client.iter().map(|(labels, level)| format!("{level} for {labels}"));
    each.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_says_all() -> Result<(), Failure> {
        let endpoint = EndpointView {
            cluster: "outbound|80||a".into(),
            view: Some("shop".into()),
            address: ([10, 0, 0, 1], 80).into(),
            workload: None,
            locality: "r/z".into(),
            weight: 3,
            reported_weight: Some(412.4),
            level: Some(1),
            level_by_client: [("version=v1".to_owned(), 1), ("version=v2".to_owned(), 0)].into(),
            health: "ejected".into(),
            ejected_seconds: Some(61.0),
            ejections: 2,
            in_flight: 4,
            latency_ms: Some(12.34),
        };
        let mut out = Vec::new();
        rows(&[endpoint]).write(&mut out)?;
        let text = String::from_utf8_lossy(&out);
        let cells: Vec<&str> = text
            .lines()
            .nth(1)
            .unwrap_or_default()
            .split("  ")
            .map(str::trim)
            .filter(|c| !c.is_empty())
            .collect();
        let expected = [
            "outbound|80||a (for shop)",
            "10.0.0.1:80",
            "-",
            "r/z",
            "1 for version=v1; 0 for version=v2",
            "3 (412 reported)",
            "ejected 1m01s",
            "4",
            "12.3ms",
        ];
        assert_eq!(cells, expected, "{text}");
        Ok(())
    }
}
