//! Commands as users type them, against a real admin endpoint.

mod validate;

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
    Ok(Cli::read(["meshctl", &admin].iter().chain(arguments))?)
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
    for line in [
        "version          mesh-agent 1.2.3",
        "ready            waits for capture",
        "config revision  3",
        "node             a",
        "enrolled pods    1 of this node",
        "failing pods     1 of this node",
        "memory           440 MiB and 9 MiB to come, of 512 MiB",
        "sheds            new work of pods that hold most: memory is near its limit",
        "shed             default/client",
        "not enrolled     default/lost: its network namespace is not there",
    ] {
        assert!(status.contains(line), "{status}");
    }
    let status: serde_json::Value = serde_json::from_str(&output(&agent, &["status", "-o", "json"]).await?)?;
    assert_eq!((&status["ready"], &status["waiting_for"]), (&json!(false), &json!(["capture"])));
    assert_eq!(status["enrolled"], json!(["default/client"]));
    assert_eq!(status["failing"][0]["pod"], "default/lost");
    let config = output(&agent, &["config"]).await?;
    assert!(
        config.ends_with("problem: a.yaml: VirtualService default/x: spec.http: is missing\n"),
        "{config}"
    );
    assert!(output(&agent, &["config", "-o", "yaml"]).await?.contains("revision: 3\n"));
    let endpoints = output(&agent, &["config", "endpoints", "reviews"]).await?;
    assert!(
        endpoints.starts_with("CLUSTER  ENDPOINT  WORKLOAD") && endpoints.lines().count() == 1,
        "{endpoints}"
    );
    assert_eq!(
        output(&agent, &["certs"]).await?,
        "ROLE  IDENTITY  SERIAL  NOT BEFORE  NOT AFTER  EXPIRES IN\n"
    );
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
        // That the list is through is for tables; programs read flows.
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
async fn followed_flows_stand_below_their_headings() -> Result<()> {
    let agent = Agent::start(&Readiness::default()).await?;
    let cli = parse(Some(&agent), &["flows", "--follow"])?;
    let (sender, mut pieces) = mpsc::unbounded_channel();
    let mut out = Pieces(sender, Vec::new());
    let blocks = async {
        let mut next = async || pieces.recv().await.context("the command ended");
        // All there are, at once.
        let listed = next().await?;
        assert_eq!(listed.lines().count(), 3, "{listed}");
        let mut usual = flow(2);
        usual.pod = Some("p".to_owned());
        agent.reporter.flow_closed(usual.clone());
        let one = next().await?;
        // One that is wider than all before has the headings written again.
        usual.pod = Some("a-name-longer-than-any-so-far".to_owned());
        agent.reporter.flow_closed(usual.clone());
        let wide = next().await?;
        agent.reporter.flow_closed(flow(3));
        let narrow = next().await?;
        agent.stop.cancel();
        Ok::<_, anyhow::Error>([listed, one, wide, narrow].concat())
    };
    let (command, seen) = tokio::join!(run(cli, &mut out), blocks);
    assert_eq!(command.err().map(|failure| failure.code()), Some(3));
    let (seen, mut below) = (seen?, None);
    for line in seen.lines() {
        match line.find("LOCAL") {
            Some(heading) => below = Some(heading),
            None => assert_eq!(line.find("10.244.0.1:4"), below, "{seen}"),
        }
    }
    assert_eq!(seen.matches("LOCAL").count(), 3, "for the list, for `default/p`, for the long name:\n{seen}");
    Ok(())
}

#[tokio::test]
async fn the_configuration_is_shown_with_workloads_and_endpoints() -> Result<()> {
    let dump = json!({
        "problems": ["a.yaml: found \"b\"\nand a line break"],
        "workloads": [{"namespace": "default", "name": "web", "node": "b", "ips": ["10.0.0.1", "fd00::1"],
            "enrolled": true, "identity": "spiffe://cluster.local/ns/default/sa/web"}],
        "services": [{"host": "web.default.svc.cluster.local", "ports": [{"port": 80, "protocol": "http1",
            "cluster": {"name": "outbound|80||web", "endpoints": [
                {"address": "10.0.0.1:8080", "workload": "default/web"}]},
            "routes": [{"name": "default", "origin": "Service", "action": {"forward": [{"weight": 1,
                "cluster": {"name": "outbound|80|v2|web", "endpoints": []}}]}}]}]}],
    });
    let mut out = Vec::new();
    config::write(&dump, &mut out)?;
    let text = String::from_utf8(out)?;
    for line in [
        "default/web  b     10.0.0.1 fd00::1  yes   spiffe://cluster.local/ns/default/sa/web",
        "outbound|80||web    10.0.0.1:8080  default/web",
        "outbound|80|v2|web  -              -",
        r#"problem: a.yaml: found "b"\nand a line break"#,
    ] {
        assert!(text.lines().any(|is| is == line), "{line}\n{text}");
    }
    Ok(())
}

#[test]
fn the_run_directory_says_where_the_maps_are() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let run_dir = format!("--run-dir={}", dir.path().display());
    assert_eq!(bpf_dir(&parse(None, &[&run_dir, "maps", "list"])?).ok(), Some(BPF_DIR.into()));
    std::fs::write(dir.path().join("bpf-dir"), "/sys/fs/bpf/of-this-agent")?;
    let noted = parse(None, &[&run_dir, "maps", "list"])?;
    assert_eq!(bpf_dir(&noted).ok(), Some("/sys/fs/bpf/of-this-agent".into()));
    let told = parse(None, &[&run_dir, "--bpf-dir", "/sys/fs/bpf/x", "maps", "list"])?;
    assert_eq!(bpf_dir(&told).ok(), Some("/sys/fs/bpf/x".into()));
    Ok(())
}

#[test]
fn help_is_about_meshctl() {
    let help = Cli::command().render_long_help().to_string();
    assert!(help.starts_with("Looks into the mesh: flows"), "{help}");
    let flows = Cli::command().find_subcommand_mut("flows").map(|flows| flows.render_help().to_string());
    assert!(flows.as_ref().is_some_and(|help| help.contains("30 s")), "{flows:?}");
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
    std::fs::create_dir(empty.path().join("maps"))?;
    let no_such = parse(None, &["maps", "dump", "NOPE", "--bpf-dir", &empty.path().to_string_lossy()])?;
    let no_such = run(no_such, &mut out).await.err().context("there is no such map")?.to_string();
    assert!(no_such.contains("no such map: NOPE") && no_such.contains("meshctl maps list"), "{no_such}");
    std::fs::remove_dir(empty.path().join("maps"))?;
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
    let nowhere = json!({"src": {"ip": "::", "port": 0}, "dst": {"ip": "0.0.0.0", "port": 0}});
    let somewhere = json!({"src": {"ip": "10.0.0.1", "port": 9}, "dst": {"ip": "::", "port": 0}});
    let tables = |full_ns| {
        json!({"name": "POD_ORIGINAL_DS", "entries": [
            {"key": nowhere, "value": {"socket": 0, "full_ns": full_ns}},
            {"key": somewhere, "value": {"socket": 7}},
        ]})
    };
    for (dump, expected) in [
        (
            dump(vec![
                element(json!(7), tables(0)),
                element(json!(8), tables(1_500_000_000_u64)),
                element(json!(9), json!({"name": "POD_CLIENTS", "entries": [{"key": nowhere, "value": 1}]})),
            ]),
            "MAP  KEY                        VALUE\n\
             7    (no connection)            the table was never full\n\
             7    dst=[::]:0 src=10.0.0.1:9  socket=7\n\
             8    (no connection)            the table was last full 1.500 s after boot\n\
             8    dst=[::]:0 src=10.0.0.1:9  socket=7\n\
             9    dst=0.0.0.0:0 src=[::]:0   1\n",
        ),
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
