//! While there is no agent, a pod's connections are refused at once or pass untouched, as the pod or the node says.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
};

use anyhow::Result;
use mesh_agent::{
    capture::{Listener, PodNet},
    state::snapshot::{CapturePolicy, WhenAgentIsDown},
};

use crate::world::{Agent, LIMIT, Ns, PEER4, PEER6, POD4, POD6, World, addr, pair};

fn asking(when: WhenAgentIsDown) -> CapturePolicy {
    CapturePolicy { when_agent_is_down: Some(when), ..CapturePolicy::default() }
}

/// Both directions and both families: an app of one dials an app of the other.
fn ways<'a>(pod: &'a Ns, peer: &'a Ns) -> Result<[(&'a Ns, &'a Ns, SocketAddr); 4]> {
    Ok([
        (pod, peer, addr(PEER4, 7000)?),
        (pod, peer, addr(PEER6, 7000)?),
        (peer, pod, addr(POD4, 7000)?),
        (peer, pod, addr(POD6, 7000)?),
    ])
}

fn passes(pod: &Ns, peer: &Ns) -> Result<Vec<TcpStream>> {
    let mut open = Vec::new();
    for (from, to, target) in ways(pod, peer)? {
        let listener = to.run(move || Ok(TcpListener::bind(target)?))?;
        let client = from.run(move || Ok(TcpStream::connect_timeout(&target, LIMIT)?))?;
        let (server, from) = listener.accept()?;
        assert_eq!((from, client.peer_addr()?), (client.local_addr()?, target));
        open.extend([client, server]);
    }
    Ok(open)
}

fn is_refused(from: &Ns, target: SocketAddr) -> Result<()> {
    let result = from.run(move || Ok(TcpStream::connect_timeout(&target, LIMIT).map(drop)))?;
    assert_eq!(result.map_err(|error| error.kind()), Err(ErrorKind::ConnectionRefused), "{target}");
    Ok(())
}

fn is_closed(pod: &Ns, peer: &Ns) -> Result<()> {
    for (from, to, target) in ways(pod, peer)? {
        // It would be served if it got through.
        let _listener = to.run(move || Ok(TcpListener::bind(target)?))?;
        is_refused(from, target)?;
    }
    Ok(())
}

fn is_captured(agent: &Agent, net: &Arc<PodNet>, pod: &Ns, peer: &Ns) -> Result<()> {
    for (from, _, target) in ways(pod, peer)? {
        let _client = from.run(move || Ok(TcpStream::connect_timeout(&target, LIMIT)?))?;
        let listener = if std::ptr::eq(from, pod) { Listener::Outbound } else { Listener::Inbound };
        assert_eq!(agent.accept(net, listener)?.original_dst, target);
    }
    Ok(())
}

#[test]
fn an_open_pod_is_passed_and_captured_again_by_the_next_agent() -> Result<()> {
    // In the order in which they may go, the last one first.
    let World { pod, peer, mut agent, net } = World::asking(asking(WhenAgentIsDown::Open))?;
    is_captured(&agent, &net, &pod, &peer)?;
    agent.crash([net]);
    let open = passes(&pod, &peer)?;
    // Nobody speaks for the mesh: who expects it is refused, and is not answered by an app.
    let mesh = addr(POD4, Listener::Mesh.port())?;
    let squatter = pod.run(move || Ok(TcpListener::bind(mesh)?))?;
    is_refused(&peer, mesh)?;
    drop(squatter);

    agent.restart()?;
    let net = agent.enrol_as(&pod, &[POD4, POD6], asking(WhenAgentIsDown::Open))?;
    is_captured(&agent, &net, &pod, &peer)?;
    for (n, stream) in open.iter().enumerate() {
        assert!(stream.take_error()?.is_none() && stream.peer_addr().is_ok(), "connection {n} was lost");
    }
    Ok(())
}

#[test]
fn a_closed_pod_is_refused_both_ways() -> Result<()> {
    let World { pod, peer, mut agent, net } = World::asking(asking(WhenAgentIsDown::Closed))?;
    agent.crash([net]);
    is_closed(&pod, &peer)
}

#[test]
fn the_nodes_default_is_for_pods_that_do_not_say() -> Result<()> {
    let ((silent, silents_peer), (shut, shuts_peer)) = (pair()?, pair()?);
    let mut agent = Agent::new()?;
    agent.config.when_agent_is_down = WhenAgentIsDown::Open;
    agent.crash([]);
    agent.restart()?;
    let nets = [
        agent.enrol(&silent, &[POD4, POD6])?,
        agent.enrol_as(&shut, &[POD4, POD6], asking(WhenAgentIsDown::Closed))?,
    ];
    agent.crash(nets);
    passes(&silent, &silents_peer)?;
    is_closed(&shut, &shuts_peer)
}

#[test]
fn what_is_excluded_passes_with_and_without_an_agent() -> Result<()> {
    let mut asked = asking(WhenAgentIsDown::Closed);
    let range = mesh_agent::state::snapshot::PortRange { first: 7000, last: 7000 };
    asked.exclude_outbound.ports.push(range);
    asked.exclude_inbound.ports.push(range);
    let World { pod, peer, mut agent, net } = World::asking(asked)?;
    passes(&pod, &peer)?;
    agent.crash([net]);
    passes(&pod, &peer)?;
    is_refused(&pod, addr(PEER4, 7001)?)
}

#[test]
fn a_closed_pod_is_never_passed_while_the_next_agent_starts() -> Result<()> {
    let World { pod, peer, mut agent, net } = World::asking(asking(WhenAgentIsDown::Closed))?;
    // One that nobody wants any more when the next agent comes.
    let (left, friend) = pair()?;
    let left_net = agent.enrol(&left, &[POD4, POD6])?;
    agent.crash([net, left_net]);
    is_closed(&pod, &peer)?;
    // An agent that cannot start changes nothing, nor does one that crashes before it has enrolled anything.
    let good = agent.config.clone();
    agent.config.pods_cgroup = Some("/nowhere".into());
    assert!(agent.restart().is_err());
    agent.config = good;
    is_closed(&pod, &peer)?;
    agent.restart()?;
    is_closed(&pod, &peer)?;
    agent.crash([]);
    is_closed(&pod, &peer)?;

    agent.restart()?;
    is_closed(&pod, &peer)?;
    let net = agent.enrol(&pod, &[POD4, POD6])?;
    is_captured(&agent, &net, &pod, &peer)?;
    is_closed(&left, &friend)?;
    agent.capture()?.forget_crashed();
    passes(&left, &friend)?;
    is_captured(&agent, &net, &pod, &peer)?;
    agent.remove()
}
