//! Flows: those there are, when an operator asks, and each that ends, told of once.
//!
//! A connection without the agent is known from the kernel alone, and reported from here in metrics and access log as
//! others are by who carries them: once for either side, since no other agent sees it.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Result;
use mesh_common::flow::{FlowRecord, direction, verdict};
use tokio::sync::mpsc;

use crate::{
    admin,
    capture::{self, inspect},
    proxy::Mesh,
    report::{
        Clock, Context as FlowContext, FlowKey, FlowView, Peer, Security, Side, TcpLabels, join, socket_addr,
    },
    state::snapshot::{Snapshot, Workload},
};

/// Flows joined at once.
const AT_ONCE: usize = 1024;

/// Pods by the cookies of their network namespaces.
type PodsByCookie = HashMap<u64, Arc<Workload>>;

/// Reads the flows that there are.
pub(super) fn flows_of(bpf_dir: PathBuf, mesh: Arc<Mesh>) -> admin::Read<Result<Vec<FlowView>>> {
    Arc::new(move || {
        let mut records = inspect::read_flows(&bpf_dir)?;
        capture::bring_up_to_date(&mut records, mesh.pods.all().values().map(|pod| &**pod.net()));
        Ok(views(&records, &mesh))
    })
}

fn pods_by_cookie(mesh: &Mesh) -> PodsByCookie {
    mesh.pods.all().values().filter_map(|pod| Some((pod.net().cookie()?, pod.workload()))).collect()
}

fn views<'a>(records: impl IntoIterator<Item = &'a FlowRecord>, mesh: &Mesh) -> Vec<FlowView> {
    let (snapshot, pods) = (mesh.snapshot(), pods_by_cookie(mesh));
    let context = FlowContext {
        snapshot: &snapshot,
        pod_of: &|cookie| pods.get(&cookie).cloned(),
        facts: &|pod: &Workload, key: FlowKey| mesh.reporter.facts(pod, key),
        endpoint: &|number| mesh.endpoints.address(number),
        clock: Clock::now(),
    };
    records.into_iter().map(|record| join(record, &context)).collect()
}

/// Reports what the kernel tells of, until it tells no more.
pub(super) async fn report_flows(mut told: mpsc::Receiver<FlowRecord>, mesh: Arc<Mesh>) {
    let mut records = Vec::new();
    while told.recv_many(&mut records, AT_ONCE).await > 0 {
        report_direct(&records, &mesh);
        for flow in views(records.iter().filter(|record| record.end_ns != 0), &mesh) {
            mesh.reporter.flow_closed(flow);
        }
        records.clear();
    }
}

/// Connections without the agent, each by what its client's socket says.
fn report_direct(records: &[FlowRecord], mesh: &Mesh) {
    let direct =
        |record: &&FlowRecord| record.verdict == verdict::DIRECT && record.direction == direction::OUTBOUND;
    let mut direct = records.iter().filter(direct).peekable();
    if direct.peek().is_none() {
        return;
    }
    let (snapshot, pods) = (mesh.snapshot(), pods_by_cookie(mesh));
    for record in direct {
        let labels = labels(record, &snapshot, &pods, mesh);
        for labels in [TcpLabels { side: Side::Destination, ..labels.clone() }, labels] {
            if record.end_ns == 0 {
                mesh.reporter.direct_opened(&labels);
                continue;
            }
            let open = Duration::from_nanos(record.end_ns.saturating_sub(record.start_ns));
            mesh.reporter.direct_closed(&labels, record.tx_bytes, record.rx_bytes, open);
        }
    }
}

fn labels(record: &FlowRecord, snapshot: &Snapshot, pods: &PodsByCookie, mesh: &Mesh) -> TcpLabels {
    let (client, dialled) = (socket_addr(record.local), socket_addr(record.remote));
    let source = pods.get(&record.netns).or_else(|| snapshot.workload_at(client.ip()));
    let endpoint = mesh.endpoints.address(record.endpoint);
    let destination = endpoint.and_then(|endpoint| snapshot.workload_at(endpoint.ip()));
    let peer = |workload: &Arc<Workload>| Peer {
        workload: Some(Arc::clone(workload)),
        identity: Some(workload.identity.clone()),
    };
    let cluster = source.and_then(|source| {
        let service = snapshot.service_at(dialled.ip(), &source.namespace)?;
        Some(Arc::clone(&service.port_for(source.view(), dialled.port())?.cluster))
    });
    TcpLabels {
        side: Side::Source,
        source: source.map(peer).unwrap_or_default(),
        destination: destination.map(peer).unwrap_or_default(),
        cluster,
        // The bytes cross the node as they are.
        security: Security::None,
        client,
        original_dst: dialled,
        endpoint,
    }
}
