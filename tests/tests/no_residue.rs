//! Nothing of an agent is left: not after SIGTERM, and after SIGKILL not once `mesh-agent clean` was run. What is there of
//! one agent is told from what is there of another on the same kernel, which serves on undisturbed.

use std::{collections::BTreeSet, process::Command, time::Duration};

use anyhow::{Result, ensure};
use lab::{Behind, Lab, Node, Pod, apps, apps::LoadKind, require_root};
use mesh_agent::capture::{Mark, rules_and_routes_in};
use serde_json::Value;

const PAUSE: Duration = Duration::from_millis(20);

/// Everything that a namespace can be set to and the mesh could have: rules, routes, addresses, sysctls, packet filters,
/// disciplines.
async fn settings(pod: &Pod) -> Result<String> {
    let script = "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all | sed 's/expires [0-9]*sec//'; \
                  ip addr; tc qdisc show; tc filter show dev eth0 ingress 2>/dev/null; nft list ruleset 2>/dev/null; \
                  find /proc/sys/net -type f ! -name flush -exec grep -H . {} + 2>/dev/null | sort";
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    Ok(pod.run(command).await?.stdout)
}

fn kinds(found: &[Value]) -> BTreeSet<&str> {
    found.iter().filter_map(|trace| trace["kind"].as_str()).collect()
}

/// All that has a mark has this one, and is nobody else's.
fn is_all_of(found: &[Value], node: &Node) -> Result<()> {
    let mark = Mark::of(node.name(), &node.bpf_dir()).to_string();
    for trace in found {
        let ours = trace["instance"] == mark.as_str() || trace["kind"] == "file";
        ensure!(ours, "not of {} ({mark}): {trace}", node.name());
    }
    Ok(())
}

#[tokio::test]
async fn a_killed_agents_things_are_named_and_removed_and_no_other_agents() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("no-residue").await?;
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let dying = a.pod("dying").start().await?;
    let (client, server) = (b.pod("client").start().await?, b.pod("server").start().await?);
    dying.serve(apps::http(8080)).await?;
    server.serve(apps::http(8080)).await?;
    ensure!(a.residue().await?.is_empty() && b.residue().await?.is_empty(), "something is there before");
    let before = settings(&dying).await?;
    let (killed, _other) = (a.agent().start().await?, b.agent().start().await?);
    for pod in [&dying, &client, &server] {
        pod.enrolled().await?;
    }
    let all = BTreeSet::from(["file", "link", "map", "pin", "process", "program", "socket"]);
    for node in [&a, &b] {
        let found = node.residue().await?;
        is_all_of(&found, node)?;
        ensure!(kinds(&found) == all, "{found:#?}");
        let sockets = found.iter().filter(|trace| trace["kind"] == "socket").count();
        ensure!(sockets == if node.name() == "a" { 3 } else { 6 }, "{sockets} sockets: {found:#?}");
    }
    let url = format!("http://{}/", server.at(8080));
    let requests = client.load(LoadKind::KeptAlive, &url, 2, PAUSE).await?;
    let socket = client.load(LoadKind::WebSocket, &format!("{url}ws"), 1, PAUSE).await?;

    let theirs = b.residue().await?;
    killed.kill().await?;
    let left = a.residue().await?;
    is_all_of(&left, &a)?;
    // What lives as long as a process went with it.
    let stays = BTreeSet::from(["file", "link", "map", "pin", "program"]);
    ensure!(kinds(&left) == stays, "{left:#?}");
    let said = a.clean().await?;
    ensure!(said.starts_with("removed ") && said.contains(" programs, "), "{said}");
    ensure!(a.residue().await?.is_empty());
    let after = settings(&dying).await?;
    ensure!(after == before, "the namespace is not as it was:\n{before}\n---\n{after}");
    ensure!(a.clean().await?.starts_with("nothing to remove"), "it does not say that there was nothing");

    for load in [&requests, &socket] {
        load.goes_on(5).await?;
    }
    ensure!(b.residue().await? == theirs, "the other agent's things have changed");
    for load in [requests, socket] {
        let seen = load.finish().await?;
        ensure!(seen.errors.is_empty(), "{seen:?}");
    }
    lab.finish().await
}

/// A crash before a life that ends in order, too.
#[tokio::test]
async fn nothing_is_left_after_an_ordinary_end() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("no-residue-end").await?;
    let node = lab.node("a").await?;
    let pod = node.pod("p").start().await?;
    let before = settings(&pod).await?;
    for crashes in [true, false] {
        let agent = node.agent().start().await?;
        pod.enrolled().await?;
        let found = node.residue().await?;
        is_all_of(&found, &node)?;
        ensure!(!found.is_empty());
        if crashes {
            agent.kill().await?;
        } else {
            ensure!(agent.stop().await?.success());
        }
    }
    let left = node.residue().await?;
    ensure!(left.is_empty(), "{left:#?}");
    ensure!(!node.run_dir().exists(), "the run directory is left");
    let after = settings(&pod).await?;
    ensure!(after == before, "the namespace is not as it was:\n{before}\n---\n{after}");
    lab.finish().await
}

/// For people: a table, of all agents where none is named.
#[tokio::test]
async fn the_check_shows_a_table() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("no-residue-table").await?;
    let node = lab.node("a").await?;
    let agent = node.agent().start().await?;
    let program = lab::binary("mesh-agent", "MESH_AGENT_BIN", "mesh-agent")?;
    let output = tokio::process::Command::new(program).args(["clean", "--check"]).output().await?;
    let table = String::from_utf8(output.stdout)?;
    ensure!(output.status.code() == Some(1), "{}: {table}", output.status);
    let mark = Mark::of(node.name(), &node.bpf_dir()).to_string();
    let mut rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    ensure!(rows.next() == Some(vec!["INSTANCE", "KIND", "ID", "WHAT"]), "{table}");
    let ours: Vec<_> = rows.filter(|row| row.first() == Some(&mark.as_str())).collect();
    let connect = format!("{mark}_conn4");
    ensure!(ours.iter().any(|row| row[1] == "program" && row[3] == connect), "{table}");
    agent.stop().await?;
    lab.finish().await
}

/// They carry no mark, and are in a namespace that is not the agent's.
#[tokio::test]
async fn rules_and_routes_for_guests_are_named_and_removed() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("no-residue-guests").await?;
    let node = lab.node("a").await?;
    let pod = node.pod("p").start().await?;
    let agent = node.agent().start().await?;
    pod.enrolled().await?;
    let guest = pod.guest(1, Behind::Bridge).await?;
    guest.captured().await?;
    agent.kill().await?;
    let left = node.residue().await?;
    is_all_of(&left, &node)?;
    let routes: Vec<_> = left.iter().filter(|trace| trace["kind"] == "route").collect();
    let place = format!("in {}", pod.netns().path().display());
    let named = |what: &str| {
        routes
            .iter()
            .filter_map(|trace| trace["what"].as_str())
            .any(|said| said.contains(what) && said.ends_with(&place))
    };
    ensure!(named("rule(s)") && named("route(s)") && routes.len() == 2, "{left:#?}");
    let said = node.clean().await?;
    ensure!(said.starts_with("removed ") && said.contains(" 2 routes"), "{said}");
    ensure!(node.residue().await?.is_empty());
    let rules = rules_and_routes_in(&pod.netns().path())?;
    ensure!(rules.is_empty(), "{rules:?}");
    guest.leave()?;
    lab.finish().await
}
