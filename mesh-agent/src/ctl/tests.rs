//! Commands as users type them, against a real admin endpoint.

use anyhow::{Context as _, Result};
use serde_json::json;
use tokio::sync::mpsc;

use super::*;
use crate::{
    admin::{
        FlowEvent, Readiness,
        tests::{Agent, flow},
    },
    capture::inspect::{Dump, Element},
    report::FlowView,
};

fn parse(agent: Option<&Agent>, arguments: &[&str]) -> Result<Cli> {
    let admin = agent.map_or_else(
        || "--admin=unix:/nowhere/admin.sock".to_owned(),
        |agent| format!("--admin=unix:{}", agent.socket().display()),
    );
    Ok(Cli::try_parse_from(["meshctl", &admin].iter().chain(arguments))?)
}

async fn output(agent: &Agent, arguments: &[&str]) -> Result<String> {
    let mut out = Vec::new();
    run(parse(Some(agent), arguments)?, &mut out).await?;
    Ok(String::from_utf8(out)?)
}

#[test]
fn the_command_line_is_sound() {
    Cli::command().debug_assert();
}

#[tokio::test]
async fn flows_are_shown_in_each_form() -> Result<()> {
    let agent = Agent::start(&Readiness::default()).await?;
    let table = output(&agent, &["flows"]).await?;
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines.len(), 3);
    assert!(lines[0].starts_with("POD  DIR  PROTOCOL  LOCAL") && lines[0].ends_with("RETRANSMITS  AGE"));
    assert!(lines[1].contains("10.244.0.1:4"), "{table}");
    let only = output(&agent, &["flows", "--namespace", "other", "-o", "json"]).await?;
    assert_eq!(serde_json::from_str::<Vec<FlowView>>(&only)?, [flow(101)]);
    let yaml = output(&agent, &["flows", "-n", "default", "-o", "yaml"]).await?;
    assert!(
        yaml.contains("local: ") && yaml.contains("10.244.0.1:4") && yaml.contains("namespace: default\n"),
        "{yaml}"
    );
    assert!(yaml.contains("peer_pod: null\n"), "{yaml}");
    assert_eq!(output(&agent, &["flows", "--pod", "a&namespace=other", "-o", "json"]).await?, "[]\n");
    Ok(())
}

#[tokio::test]
async fn status_config_and_certs_tell_what_the_agent_has() -> Result<()> {
    let readiness = Readiness::default();
    let _capture = readiness.block("capture");
    let agent = Agent::start(&readiness).await?;
    let status = output(&agent, &["status"]).await?;
    for line in
        ["version          mesh-agent 1.2.3", "ready            waits for capture", "config revision  3"]
    {
        assert!(status.contains(line), "{status}");
    }
    let status: serde_json::Value = serde_json::from_str(&output(&agent, &["status", "-o", "json"]).await?)?;
    assert_eq!((&status["ready"], &status["waiting_for"]), (&json!(false), &json!(["capture"])));
    let config = output(&agent, &["config"]).await?;
    assert!(
        config.ends_with("problem: a.yaml: VirtualService default/x: spec.http: is missing\n"),
        "{config}"
    );
    assert!(output(&agent, &["config", "-o", "yaml"]).await?.contains("revision: 3\n"));
    assert_eq!(output(&agent, &["certs"]).await?, "IDENTITY  SERIAL  NOT BEFORE  NOT AFTER  EXPIRES IN\n");
    Ok(())
}

/// Hands each flushed piece on.
struct Pieces(mpsc::UnboundedSender<String>, Vec<u8>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        let piece = String::from_utf8_lossy(&std::mem::take(&mut self.1)).into_owned();
        self.0.send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

#[tokio::test]
async fn followed_flows_come_as_they_end() -> Result<()> {
    let agent = Agent::start(&Readiness::default()).await?;
    let cli = parse(Some(&agent), &["flows", "--follow", "-n", "default", "-o", "json"])?;
    let (sender, mut pieces) = mpsc::unbounded_channel();
    let mut out = Pieces(sender, Vec::new());
    let events = async {
        let mut next = async || -> Result<FlowEvent> {
            Ok(serde_json::from_str(&pieces.recv().await.context("the command ended")?)?)
        };
        assert_eq!(next().await?, FlowEvent::Flow(Box::new(flow(1))));
        for socket in [2, 150, 3] {
            agent.reporter.flow_closed(flow(socket));
        }
        assert_eq!(next().await?, FlowEvent::Flow(Box::new(flow(2))));
        assert_eq!(next().await?, FlowEvent::Flow(Box::new(flow(3))));
        agent.stop.cancel();
        Ok::<_, anyhow::Error>(())
    };
    let (command, seen) = tokio::join!(run(cli, &mut out), events);
    seen?;
    let failure = command.err().context("the agent stopped")?;
    assert_eq!(failure.code(), 3, "{failure}");
    Ok(())
}

#[tokio::test]
async fn a_closed_pipe_is_no_failure() -> Result<()> {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let agent = Agent::start(&Readiness::default()).await?;
    let commands: [&[&str]; 5] = [
        &["flows"],
        &["flows", "-o", "json"],
        &["flows", "-o", "yaml"],
        &["flows", "-f"],
        &["completions", "bash"],
    ];
    for arguments in commands {
        let failure =
            run(parse(Some(&agent), arguments)?, &mut Closed).await.err().context("nothing failed")?;
        assert_eq!(failure.code(), 0, "{arguments:?}: {failure:?}");
    }
    Ok(())
}

#[tokio::test]
async fn failures_have_their_exit_codes_and_say_what_to_do() -> Result<()> {
    let mut out = Vec::new();
    let nobody = run(parse(None, &["status"])?, &mut out).await.err().context("somebody answered")?;
    assert_eq!(nobody.code(), 3);
    assert!(
        nobody.to_string().contains("unix:/nowhere/admin.sock") && nobody.to_string().contains("--run-dir")
    );

    let empty = tempfile::tempdir()?;
    let no_maps = parse(None, &["maps", "list", "--bpf-dir", &empty.path().to_string_lossy()])?;
    let no_maps = run(no_maps, &mut out).await.err().context("there are no maps")?;
    assert_eq!(no_maps.code(), 1);
    assert!(no_maps.to_string().contains("check --bpf-dir"), "{no_maps}");
    let bad_name =
        run(parse(None, &["maps", "dump", "../x"])?, &mut out).await.err().context("a bad name")?;
    assert_eq!(bad_name.code(), 2);

    assert_eq!(only_run_dir(&empty.path().join("none")).err().map(|f| f.code()), Some(3));
    for node in ["a", "b"] {
        std::fs::create_dir(empty.path().join(node))?;
        std::fs::write(empty.path().join(node).join(SOCKET_NAME), "")?;
        let found = only_run_dir(empty.path());
        match node {
            "a" => assert_eq!(found.ok(), Some(empty.path().join("a"))),
            _ => assert_eq!(found.err().map(|failure| failure.code()), Some(2)),
        }
    }
    assert!(out.is_empty());
    Ok(())
}

#[test]
fn wrong_usage_is_told_by_the_parser() {
    for arguments in
        [&["meshctl", "--admin", "10.0.0.1:15000", "status"][..], &["meshctl", "flows", "-o", "xml"]]
    {
        let error = Cli::try_parse_from(arguments).err().map(|error| error.exit_code());
        assert_eq!(error, Some(2), "{arguments:?}");
    }
}

#[test]
fn dumps_become_rows() -> Result<(), Failure> {
    let element = |key, value| Element { key, value };
    let dump = |entries| Dump { name: "X".into(), id: 1, kind: "hash".into(), entries };
    let inner = json!({"name": "POD_FLOWS", "entries": [
        {"key": 9, "value": {"bytes": 5, "local": {"ip": "10.0.0.1", "port": 80}, "peer": {"ip": "fd00::1", "port": 1}}},
    ]});
    for (dump, expected) in [
        (
            dump(vec![element(json!(7), inner)]),
            "MAP  KEY  VALUE\n7    9    bytes=5 local=10.0.0.1:80 peer=[fd00::1]:1\n",
        ),
        (dump(vec![element(json!("0x01"), json!([1, 2]))]), "KEY   VALUE\n0x01  [1 2]\n"),
        (dump(vec![element(json!("\u{1b}[2J"), json!(true))]), "KEY        VALUE\n\\u{1b}[2J  true\n"),
    ] {
        let mut out = Vec::new();
        output::print(Output::Table, &mut out, &dump, maps::dump_rows)?;
        assert_eq!(String::from_utf8_lossy(&out), expected);
    }
    Ok(())
}
