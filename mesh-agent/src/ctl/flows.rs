//! `meshctl flows`: what flows, from the kernel's records joined with names, identity and route.
//!
//! With `--follow`, first all flows there are, then each that ends, told by the agent as it happens: nothing is asked
//! for again and again.

use std::io::Write;

use serde::Serialize;

use super::{
    Failure, Output, Place,
    client::{Client, encoded},
    output::{self, Columns, Rows, duration, or_dash},
};
use crate::{
    admin::FlowEvent,
    report::{Direction, FlowView},
};

/// Which flows.
#[derive(Debug, Default, clap::Args)]
pub(super) struct Args {
    /// Go on with each flow that ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only pods of this namespace
    #[arg(short, long)]
    pub namespace: Option<String>,
}

const HEADINGS: [&str; 16] = [
    "POD", "DIR", "PROTOCOL", "LOCAL", "REMOTE", "SERVICE", "ENDPOINT", "PEER", "IDENTITY", "ROUTE",
    "SECURITY", "STATE", "VERDICT", "TX", "RX", "RTT",
];

impl Args {
    fn path(&self, place: &Place) -> String {
        // Without a namespace, a pod's name is that of any namespace.
        let (namespace, pod) = match place.pod.as_deref().map(|pod| (pod.split_once('/'), pod)) {
            Some((Some((namespace, name)), _)) => (Some(namespace), Some(name)),
            Some((None, name)) => (self.namespace.as_deref(), Some(name)),
            None => (self.namespace.as_deref(), None),
        };
        let wanted = [("namespace", namespace), ("pod", pod)];
        let mut query: Vec<_> = wanted
            .iter()
            .filter_map(|(key, value)| value.map(|value| format!("{key}={}", encoded(value))))
            .collect();
        if self.follow {
            query.push("follow=true".to_owned());
        }
        if query.is_empty() { "/flows".to_owned() } else { format!("/flows?{}", query.join("&")) }
    }
}

pub(super) async fn run(
    client: &Client,
    args: &Args,
    place: &Place,
    output: Output,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let path = args.path(place);
    if args.follow {
        return follow(client, &path, output, out).await;
    }
    let flows: Vec<FlowView> = client.get(&path).await?;
    output::print(output, out, &flows, |flows| {
        let mut rows = Rows::new([&HEADINGS[..], &["RETRANSMITS", "AGE"]].concat());
        for flow in flows {
            let mut cells = cells(flow);
            cells.extend([flow.retransmits.to_string(), duration(flow.age_ms)]);
            rows.push(&cells);
        }
        rows
    })
}

async fn follow(client: &Client, path: &str, output: Output, out: &mut dyn Write) -> Result<(), Failure> {
    let mut lines = client.lines(path).await?;
    let mut columns = Columns::new(&HEADINGS);
    // What there is already is written at once, in columns that fit all of it.
    let mut listed = Some(Vec::new());
    while let Some(event) = lines.next::<FlowEvent>().await? {
        match (&event, output) {
            (FlowEvent::Flow(flow), Output::Table) => {
                let row = cells(flow);
                match &mut listed {
                    Some(rows) => {
                        rows.push(row);
                        continue;
                    }
                    None => columns.write(out, &[row])?,
                }
            }
            (FlowEvent::Listed, Output::Table) => columns.write(out, &listed.take().unwrap_or_default())?,
            (FlowEvent::Listed, Output::Json | Output::Yaml) => continue,
            (FlowEvent::Lost(lost), Output::Table) => {
                writeln!(out, "({lost} flows ended and are not shown: this reader is too slow)")?;
            }
            (event, Output::Json) => write_json_line(out, event)?,
            (event, Output::Yaml) => write!(out, "---\n{}", output::yaml(event)?)?,
        }
        // Each line as it comes: the reader may be a pipe.
        out.flush()?;
    }
    Err(Failure::Unreachable("the agent ended the stream: it is stopping".to_owned()))
}

fn write_json_line(out: &mut dyn Write, event: &impl Serialize) -> Result<(), Failure> {
    serde_json::to_writer(&mut *out, event).map_err(std::io::Error::from)?;
    Ok(writeln!(out)?)
}

fn cells(flow: &FlowView) -> Vec<String> {
    let pod = match (&flow.namespace, &flow.pod) {
        (Some(namespace), Some(pod)) => format!("{namespace}/{pod}"),
        _ => "-".to_owned(),
    };
    let direction = match flow.direction {
        Direction::Outbound => "out",
        Direction::Inbound => "in",
        Direction::Unknown => "-",
    };
    let rtt = if flow.srtt_us == 0 { "-".to_owned() } else { format!("{}us", flow.srtt_us) };
    vec![
        pod,
        direction.to_owned(),
        flow.protocol.to_string(),
        flow.local.to_string(),
        flow.remote.to_string(),
        or_dash(flow.service.as_ref()),
        or_dash(flow.endpoint.as_ref()),
        or_dash(flow.peer_pod.as_ref()),
        or_dash(flow.peer_identity.as_ref()),
        or_dash(flow.route.as_ref()),
        flow.security.word().to_owned(),
        flow.state.to_string(),
        flow.verdict.word().to_owned(),
        flow.tx_bytes.to_string(),
        flow.rx_bytes.to_string(),
        rtt,
    ]
}
