//! The lab keeps its own promises, with no agent anywhere: pods reach each other as on two real nodes, processes are
//! where they should be, apps and clients say what they see, and residue is found.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use lab::{Lab, Pod, apps, residue};
use serde_json::Value;

/// Two nodes with a pod on each.
async fn two_pods(name: &str) -> Result<(Lab, Pod, Pod)> {
    let lab = Lab::new(name).await?;
    let client = lab.node("a").await?.pod("client").start().await?;
    let server = lab.node("b").await?.pod("server").label("app", "server").start().await?;
    Ok((lab, client, server))
}

#[tokio::test]
async fn pods_of_two_nodes_reach_each_other_over_both_families() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let (lab, client, server) = two_pods("reach").await?;
    server.serve(apps::http(8080)).await?;
    for (to, from) in [(server.at(8080), client.ip()), (server.at6(8080), client.ip6())] {
        let answer = client.http_get(&format!("http://{to}/hello?x=1"), &[("x-greeting", "hi")]).await?;
        let echo = answer.echo()?;
        assert_eq!((answer.status, answer.peer, answer.local.ip()), (200, to, from));
        assert_eq!((echo.peer, echo.local), (answer.local, to));
        assert_eq!(
            (echo.pod.as_str(), echo.target.as_str(), echo.version.as_str()),
            ("server", "/hello?x=1", "HTTP/1.1")
        );
        assert_eq!(
            (echo.headers.get("x-greeting").map(String::as_str), echo.authority),
            (Some("hi"), to.to_string())
        );
    }
    lab.finish().await
}

#[tokio::test]
async fn pods_of_one_node_reach_each_other_and_their_node() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let lab = Lab::new("same-node").await?;
    let node = lab.node("a").await?;
    let (one, two) = (node.pod("one").start().await?, node.pod("two").start().await?);
    two.serve(apps::tcp_echo(7)).await?;
    assert_eq!(one.tcp(two.at(7), 10, &[]).await?.received, 10);
    assert_eq!(one.tcp(two.at6(7), 10, &[]).await?.received, 10);
    lab.finish().await
}

#[tokio::test]
async fn a_service_address_leads_nowhere_without_the_mesh() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let (lab, client, server) = two_pods("vip").await?;
    server.serve(apps::http(8080)).await?;
    let service = lab.service("server").selector("app", "server").port("http", 80, 8080).apply()?;
    for url in [service.url(80, "/"), service.url6(80, "/")] {
        let error = client.http_get(&url, &[]).await.err().context("a service address answered")?;
        let error = format!("{error:#}");
        assert!(error.contains("unreachable") || error.contains("No route"), "{error}");
    }
    lab.finish().await
}

#[tokio::test]
async fn processes_are_in_the_namespace_and_cgroup_of_their_pod() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let (lab, client, _server) = two_pods("place").await?;
    let process = client.serve(apps::tcp_echo(7000)).await?;
    let namespace = fs::metadata(format!("/proc/{}/ns/net", process.pid()))?.ino();
    assert_eq!(namespace, client.netns().inode());
    assert_ne!(namespace, fs::metadata("/proc/self/ns/net")?.ino());
    assert_eq!(lab::cgroup::processes(client.cgroup()), [process.pid()]);
    assert!(client.listens(7000) && !client.listens(7001));
    // The machine's own view of /sys is the pod's: nothing is mounted over.
    let mounts = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt"));
    assert_eq!(mounts(&process.pid().to_string())?, mounts("self")?);
    lab.finish().await
}

#[tokio::test]
async fn a_process_is_ended_and_its_output_kept() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let (lab, client, _server) = two_pods("process").await?;
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' TERM; echo deaf; echo oh >&2; while :; do sleep 0.1; done"]);
    let deaf = client.spawn(shell)?;
    lab::eventually("the shell's first words", async || {
        ensure!(deaf.stdout() == "deaf\n" && deaf.stderr() == "oh\n", "{}", deaf.tail());
        Ok(())
    })
    .await?;
    let status = deaf.stop(std::time::Duration::from_millis(200)).await?;
    assert!(!status.success() && !Path::new("/proc").join(deaf.pid().to_string()).exists());
    let failed = client.run(Command::new("false")).await?;
    assert_eq!(failed.status.code(), Some(1));
    let late = client.run_within(std::time::Duration::from_millis(100), sleeping(60)).await;
    assert!(late.is_err_and(|error| error.to_string().contains("still running")));
    lab.finish().await
}

#[tokio::test]
async fn http_apps_and_clients_do_what_they_are_asked() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let (lab, client, server) = two_pods("http").await?;
    server.serve(apps::http(8080)).await?;
    server.serve(apps::http(8081).arg("--status=503")).await?;
    let url = |path: &str| format!("http://{}{path}", server.at(8080));
    assert_eq!(client.get(url("/status/418")).send().await?.status, 418);
    for expected in [503, 503, 200] {
        assert_eq!(client.get(url("/fail-first/2?key=a")).send().await?.status, expected);
    }
    let h2 = client.get(url("/trailers")).h2c().header("host", "reviews:9080").send().await?;
    assert_eq!((h2.version.as_str(), h2.echo()?.authority.as_str()), ("HTTP/2.0", "reviews:9080"));
    assert_eq!(h2.trailers.get("x-lab-trailer").map(String::as_str), Some("last"));
    let post = client.get(url("/")).method("POST").body_bytes(100_000).send().await?.echo()?;
    assert_eq!((post.method.as_str(), post.body_bytes), ("POST", 100_000));
    assert_eq!(client.get(url("/mirror")).h2c().body_bytes(3_000_000).send().await?.body_bytes, 3_000_000);
    assert_eq!(client.get(url("/bytes/1000001")).send().await?.body_bytes, 1_000_001);
    assert!(client.get(url("/cut")).send().await.is_err());
    let tally = client.get(url("/")).many(20, 4, None).await?;
    assert_eq!((tally.statuses.get(&200), tally.pods.get("server")), (Some(&20), Some(&20)));
    let failing = client.get(format!("http://{}/", server.at(8081))).many(3, 1, None).await?;
    assert_eq!((failing.sent, failing.statuses.get(&503)), (3, Some(&3)));
    assert_eq!(server.stats(8080).await?.paths["/fail-first/2?key=a"], 3);
    lab.finish().await
}

#[tokio::test]
async fn tcp_apps_half_close_greet_and_report() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let (lab, client, server) = two_pods("tcp").await?;
    server.serve(apps::tcp_echo(7000).arg("--report")).await?;
    server.serve(apps::server_first(7001)).await?;
    server.serve(apps::sink(7002)).await?;
    let echo = client.tcp(server.at(7000), 1_000_000, &["--report"]).await?;
    assert!(echo.intact);
    assert_eq!((echo.sent, echo.received, echo.peer), (1_000_000, 1_000_000, server.at(7000)));
    let report = echo.report.context("no report")?;
    assert_eq!((report.peer, report.peername, report.local), (echo.local, echo.local, server.at(7000)));
    assert_eq!(report.received, 1_000_000);
    let greeted = client.tcp(server.at6(7001), 10, &["--greeting"]).await?;
    assert_eq!((greeted.greeting.as_deref(), greeted.received), (Some("220 server ready"), 10));
    let sunk = client.tcp(server.at(7002), 500_000, &["--sink"]).await?;
    assert_eq!((sunk.received, sunk.report.map(|report| report.received)), (0, Some(500_000)));
    assert!(client.tcp(server.at(7003), 1, &[]).await.is_err(), "nobody listens there");
    lab.finish().await
}

#[tokio::test]
async fn udp_and_grpc_apps_answer() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let (lab, client, server) = two_pods("udp-grpc").await?;
    server.serve(apps::udp_echo(5000)).await?;
    server.serve(apps::grpc(9000)).await?;
    for to in [server.at(5000), server.at6(5000)] {
        let udp = client.udp(to, 3, 1000).await?;
        assert_eq!((udp.sent, udp.received), (3, 3));
    }
    let url = format!("http://{}", server.at(9000));
    let grpc = client.grpc(&url, "count/3").await?;
    assert_eq!(
        (grpc.check.as_str(), grpc.pod.as_deref(), grpc.ended.as_str()),
        ("SERVING", Some("server"), "Ok")
    );
    assert_eq!(grpc.stream, ["SERVING", "NOT_SERVING", "SERVING"]);
    let unknown = client.grpc(&url, "nobody").await?;
    assert_eq!((unknown.check.as_str(), unknown.ended.as_str()), ("NotFound", "NotFound"));
    lab.finish().await
}

#[tokio::test]
async fn manifests_say_what_an_api_server_would() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let lab = Lab::new("manifests").await?;
    let node = lab.node("a").await?;
    let pod = node.pod("p").ns("shop").sa("seller").labels([("app", "p")]).start().await?;
    node.pod("q").unenrolled().start().await?;
    let read = |file: &str| -> Result<Value> {
        let path = lab.config_dir().join(file);
        Ok(serde_json::from_slice(&fs::read(&path).with_context(|| path.display().to_string())?)?)
    };
    let written = read("pod-shop-p.yaml")?;
    assert_eq!(written["spec"]["nodeName"], "a");
    assert_eq!(written["spec"]["serviceAccountName"], "seller");
    assert_eq!(written["status"]["podIPs"][0]["ip"], pod.ip().to_string());
    assert_eq!(written["status"]["podIPs"][1]["ip"], pod.ip6().to_string());
    assert_eq!(written["metadata"]["labels"]["app"], "p");
    let netns = written["metadata"]["annotations"]["mesh.io/netns"].as_str().context("no namespace")?;
    assert_eq!(Path::new(netns), pod.netns().path());
    assert_eq!(read("namespace-shop.yaml")?["metadata"]["labels"]["mesh.io/dataplane-mode"], "node");
    assert_eq!(read("pod-default-q.yaml")?["metadata"]["labels"]["mesh.io/dataplane-mode"], "none");
    pod.remove().await?;
    assert!(read("pod-shop-p.yaml").is_err());
    lab.finish().await
}

#[tokio::test]
async fn a_pod_that_vanishes_disturbs_nobody() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let (lab, client, server) = two_pods("vanish").await?;
    server.serve(apps::tcp_echo(7)).await?;
    let other = lab.node("a").await?.pod("other").start().await?;
    let (gone, file) = (other.netns().path(), lab.config_dir().join("pod-default-other.yaml"));
    other.serve(apps::tcp_echo(7)).await?;
    other.vanish().await?;
    assert!(!gone.exists() && file.exists());
    assert_eq!(client.tcp(server.at(7), 10, &[]).await?.received, 10);
    lab.finish().await
}

#[tokio::test]
async fn two_labs_stand_side_by_side() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let (one, two) = tokio::try_join!(two_pods("twin"), two_pods("twin"))?;
    for (name, (_, client, server)) in [("one", &one), ("two", &two)] {
        server.serve(apps::http(8080).arg(format!("--delay-ms={}", name.len()))).await?;
        assert_eq!(client.http_get(&format!("http://{}/", server.at(8080)), &[]).await?.status, 200);
    }
    assert_eq!(one.1.ip(), two.1.ip());
    // Ending one leaves the other as it was.
    one.0.finish().await?;
    let (lab, client, server) = two;
    assert_eq!(client.http_get(&format!("http://{}/", server.at(8080)), &[]).await?.status, 200);
    lab.finish().await
}

#[tokio::test]
async fn what_a_lab_leaves_behind_is_found() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let (lab, client, _server) = two_pods("residue").await?;
    // A pin directory that nobody takes away.
    let pins = Path::new("/sys/fs/bpf").join(format!("{}-a", lab.unique()));
    fs::create_dir(&pins)?;
    // A process in a pod's network namespace that left the pod's cgroup, as a daemon might.
    let moved = client.spawn(sleeping(600))?;
    fs::write(lab::cgroup::root()?.join("cgroup.procs"), moved.pid().to_string())?;
    let unique = lab.unique().to_owned();
    let found: Vec<String> = residue::any()?.iter().map(ToString::to_string).collect();
    for expected in ["network namespace", "cgroup", "directory", "pinned maps", "mount"] {
        assert!(
            found.iter().any(|line| line.starts_with(expected) && line.contains(&unique)),
            "{expected}: {found:?}"
        );
    }
    let error = lab.finish().await.err().context("nothing was found")?.to_string();
    assert!(!pins.exists(), "what was found must not be in the way of others");
    assert!(error.contains(&format!("pinned maps and links in {}", pins.display())), "{error}");
    let left = residue::any()?;
    assert!(!left.iter().any(|leftover| leftover.to_string().contains(&unique)), "{left:?}");
    Ok(())
}

#[tokio::test]
async fn what_is_left_of_a_pid_that_was_used_again_is_cleaned() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let lab = Lab::new("alive").await?;
    // As ours, of a process that had our pid before us.
    let ours = lab::unique("reused")?;
    let (before, after) = ours.split_once("-s").context("a name holds the start of its process")?;
    let (_, after) = after.split_once('-').context("and a number after it")?;
    let reused = std::env::temp_dir().join(format!("{before}-s1-{after}"));
    fs::create_dir(&reused)?;
    let (removed, failed) = residue::clean()?;
    assert!(removed.iter().any(|leftover| leftover.to_string().ends_with(&format!("{}", reused.display()))));
    assert!(!reused.exists() && failed.is_empty(), "{failed:?}");
    assert!(lab.config_dir().exists(), "a lab in use was touched");
    lab.finish().await
}

#[tokio::test]
async fn a_lab_that_is_dropped_cleans_up() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let (lab, client, _server) = two_pods("dropped").await?;
    let process = client.serve(apps::tcp_echo(7)).await?;
    let unique = lab.unique().to_owned();
    drop(lab);
    assert!(process.status().is_some());
    let left = residue::any()?;
    assert!(!left.iter().any(|leftover| leftover.to_string().contains(&unique)), "{left:?}");
    Ok(())
}

#[tokio::test]
async fn the_tap_sees_what_crosses_between_nodes_and_only_that() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let (lab, client, server) = two_pods("tap").await?;
    let neighbour = lab.node("a").await?.pod("neighbour").start().await?;
    neighbour.serve(apps::http(8080)).await?;
    server.serve(apps::http(8080)).await?;
    let tap = lab.tap()?;
    client.http_get(&format!("http://{}/", server.at(8080)), &[("x-secret", "crosses-the-wire")]).await?;
    client.http_get(&format!("http://{}/", neighbour.at(8080)), &[("x-secret", "stays-at-home")]).await?;
    let recording = tap.stop()?;
    assert!(recording.contains(b"x-secret: crosses-the-wire"), "{} frames", recording.frames.len());
    assert!(!recording.contains(b"stays-at-home"));
    lab.finish().await
}

#[tokio::test]
async fn an_agent_that_ends_by_itself_is_noticed() -> Result<()> {
    if !lab::require_root()? {
        return Ok(());
    }
    let lab = Lab::new("no-agent").await?;
    let node = lab.node("a").await?;
    let started = node.agent().binary("/bin/false".into()).start().await;
    let error = started.err().context("it started")?.to_string();
    assert!(error.contains("a false ended at once (exit status: 1)"), "{error}");
    let error = lab.finish().await.err().context("nobody noticed")?.to_string();
    assert!(error.contains("ended by itself (exit status: 1)"), "{error}");
    Ok(())
}

fn sleeping(seconds: u32) -> Command {
    let mut command = Command::new("sleep");
    command.arg(seconds.to_string());
    command
}
