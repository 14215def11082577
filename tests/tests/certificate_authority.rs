//! Agents of two nodes take their pods' certificates from a controller: each for its own pods, with a good token, and not too
//! often; what it refuses is told at both ends, and while it is away pods that run go on.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use lab::{
    Agent, Controller, Lab, Node, PATIENCE, Pod, Service, apps, eventually, metric, net, require_root,
};
use mesh_agent::{
    config::ServiceAccountName,
    controller::{TokenFor, TokenKey},
    identity::{Authority, RemoteCaConfig, SpiffeId},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use time::OffsetDateTime;

/// Two nodes that trust one controller, which runs on the first.
struct World {
    lab: Lab,
    a: Node,
    b: Node,
    controller: Controller,
}

impl World {
    async fn new(name: &str, flags: &[&str]) -> Result<Self> {
        let lab = Lab::new(name).await?;
        let (a, b) = (lab.node("a").await?, lab.node("b").await?);
        let controller = a.controller(flags).await?;
        Ok(Self { lab, a, b, controller })
    }

    /// An agent with a good token, ready.
    async fn agent(&self, node: &Node) -> Result<Agent> {
        self.controller.token(node).await?;
        self.controller.agent(node).start().await
    }
}

/// Waits until this pod cannot be enrolled for a reason that has all of these parts.
async fn fails(agent: &Agent, pod: &str, parts: &[&str]) -> Result<()> {
    let pod = format!("default/{pod}");
    eventually("a pod that cannot be enrolled", async || {
        let status = agent.status().await?;
        let failing = status["failing"].as_array().context("no list of failing pods")?;
        let reason = failing.iter().find(|one| one["pod"] == pod.as_str());
        let reason = reason.with_context(|| format!("{pod} does not fail: {status}"))?["reason"].as_str();
        let reason = reason.unwrap_or_default();
        ensure!(parts.iter().all(|part| reason.contains(part)), "{parts:?}: {reason}");
        Ok(())
    })
    .await
}

async fn server(lab: &Lab, node: &Node) -> Result<(Pod, Service)> {
    let server = node.pod("server").sa("keeper").label("app", "server").start().await?;
    server.serve(apps::http(8080)).await?;
    let service = lab.service("server").selector("app", "server").port("http", 80, 8080).apply()?;
    Ok((server, service))
}

async fn answered(client: &Pod, service: &Service) -> Result<()> {
    eventually("an answer", async || {
        let answer = client.http_get(&service.url(80, "/"), &[]).await?;
        ensure!(answer.status == 200, "{answer:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn pods_are_certified_by_the_controller_and_speak_mutual_tls() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("ca", &[]).await?;
    let client = world.a.pod("client").sa("client").start().await?;
    let (pod, service) = server(&world.lab, &world.b).await?;
    let (mut agent_a, agent_b) = tokio::try_join!(world.agent(&world.a), world.agent(&world.b))?;
    tokio::try_join!(client.enrolled(), pod.enrolled())?;
    answered(&client, &service).await?;
    let names = [
        ("connection_security_policy", "mutual_tls"),
        ("source_principal", "spiffe://cluster.local/ns/default/sa/client"),
        ("destination_principal", "spiffe://cluster.local/ns/default/sa/keeper"),
    ];
    for agent in [&agent_a, &agent_b] {
        let metrics = agent.metrics().await?;
        ensure!(metric(&metrics, "istio_requests_total", &names) >= 1.0, "{metrics}");
        // Nothing that certifies is on the nodes.
        ensure!(!agent.state_dir().exists(), "{} has an authority of its own", agent.node().name());
    }
    for (node, account) in [("a", "client"), ("b", "keeper")] {
        let caller = format!("caller=\"mesh-system/mesh-agent on node {node}\"");
        let identity = format!("identity=\"spiffe://cluster.local/ns/default/sa/{account}\"");
        world.controller.audited("issued", &[&caller, &identity, "serial=", "key=\"ECDSA P-256\""]).await?;
    }
    let certificates = agent_a.meshctl(&["certs", "-o", "json"]).await?;
    ensure!(certificates.contains("/sa/client") && !certificates.contains("/sa/keeper"), "{certificates}");
    // A successor has keys of its own certified.
    let issued = world.controller.audit("issued").len();
    let before = agent_a.upgrade().await?;
    answered(&client, &service).await?;
    ensure!(world.controller.audit("issued").len() > issued, "the successor has asked for nothing");
    ensure!(before.wait(PATIENCE).await?.success(), "the agent before did not end well\n{}", before.tail());
    world.controller.stop().await?;
    world.lab.finish().await
}

/// An authority in Istio's `cacerts` layout: a root, and an intermediate that certifies.
fn authority_from_elsewhere(dir: &Path) -> Result<()> {
    let params = |name: &str| {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    };
    let (root_key, key) = (KeyPair::generate()?, KeyPair::generate()?);
    let root = params("the root of the company");
    let certificate = root.self_signed(&root_key)?.pem();
    let intermediate = params("mesh").signed_by(&key, &Issuer::from_params(&root, &root_key))?.pem();
    fs::create_dir(dir)?;
    fs::write(dir.join("ca-key.pem"), key.serialize_pem())?;
    fs::set_permissions(dir.join("ca-key.pem"), fs::Permissions::from_mode(0o600))?;
    fs::write(dir.join("ca-cert.pem"), &intermediate)?;
    fs::write(dir.join("cert-chain.pem"), &intermediate)?;
    fs::write(dir.join("root-cert.pem"), certificate)?;
    Ok(())
}

#[tokio::test]
async fn an_authority_from_elsewhere_may_be_plugged_in() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("cacerts").await?;
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let elsewhere = tempfile::tempdir()?;
    let dir = elsewhere.path().join("cacerts");
    authority_from_elsewhere(&dir)?;
    let controller = a.controller(&["--ca-certs", &dir.to_string_lossy()]).await?;
    let controller = controller.believed_by(dir.join("root-cert.pem"));
    let world = World { lab, a, b, controller };
    let client = world.a.pod("client").sa("client").start().await?;
    let (pod, service) = server(&world.lab, &world.b).await?;
    let _agents = tokio::try_join!(world.agent(&world.a), world.agent(&world.b))?;
    tokio::try_join!(client.enrolled(), pod.enrolled())?;
    // Each end shows the intermediate behind its leaf, and believes the root alone.
    answered(&client, &service).await?;
    ensure!(!world.controller.state_dir().join("ca-key.pem").exists(), "an authority of its own was made");
    world.controller.stop().await?;
    world.lab.finish().await
}

#[tokio::test]
async fn tokens_open_nothing_but_the_pods_of_their_own_node() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("tokens", &[]).await?;
    let client = world.a.pod("client").sa("client").start().await?;
    let file = world.controller.token_file(&world.a);
    let show = |token: &str| fs::write(&file, token);
    let account: ServiceAccountName = "mesh-system/mesh-agent".parse().map_err(anyhow::Error::msg)?;
    let whom = TokenFor {
        trust_domain: "cluster.local",
        audience: "istio-ca",
        account: &account,
        node: "a",
        duration: Duration::from_hours(1),
    };
    let now = OffsetDateTime::now_utc();
    let (ours, strange) =
        (TokenKey::open(world.controller.state_dir())?, tempfile::tempdir().context("a directory")?);
    let old = ours.issue(&whom, now - Duration::from_mins(5))?;
    // Another mesh's, one that is over, one for another audience, and the other node's.
    show(&TokenKey::open(strange.path())?.issue(&whom, now)?)?;
    let agent = world.controller.agent(&world.a).start().await?;
    let address = world.controller.address();
    fails(&agent, "client", &[&address, "Unauthenticated", "not signed by this controller's key"]).await?;
    show(&ours.issue(&whom, now - Duration::from_hours(2))?)?;
    fails(&agent, "client", &[&address, "Unauthenticated", "the token has expired"]).await?;
    show(&ours.issue(&TokenFor { audience: "vault", ..whom.clone() }, now)?)?;
    fails(&agent, "client", &["Unauthenticated", "for another audience than \"istio-ca\""]).await?;
    world.controller.token(&world.b).await?;
    fs::copy(world.controller.token_file(&world.b), &file)?;
    let refusal = "no enrolled pod of that identity runs on node b";
    fails(&agent, "client", &["PermissionDenied", "mesh-agent on node b may not have", refusal]).await?;
    ensure!(!client.listens(15008), "a pod without a certificate was enrolled");
    // Each refusal is in the controller's log, with who was refused what.
    let identity = "identity=\"spiffe://cluster.local/ns/default/sa/client\"";
    world.controller.audited("refused", &["code=Unauthenticated", "has expired"]).await?;
    world.controller.audited("refused", &["code=PermissionDenied", "on node b\"", identity, refusal]).await?;
    let issued = world.controller.audit("issued");
    ensure!(issued.is_empty(), "{issued:?}");

    // A good one opens, without a restart. From then on one that is older does not.
    world.controller.token(&world.a).await?;
    client.enrolled().await?;
    show(&old)?;
    let late = world.a.pod("late").sa("late").start().await?;
    fails(
        &agent,
        "late",
        &["Unauthenticated", "a newer one of mesh-system/mesh-agent on node a has been used"],
    )
    .await?;
    world.controller.token(&world.a).await?;
    late.enrolled().await?;
    world.controller.stop().await?;
    world.lab.finish().await
}

/// Asks as the agent of this node does, again and again for the identity of one pod, until it is told to wait.
async fn ask_too_often(world: &World, node: &Node, account: &str) -> Result<String> {
    let config = RemoteCaConfig {
        address: world.controller.address(),
        server_name: "mesh-controller.mesh-system.svc".to_owned(),
        roots: world.controller.state_dir().join("ca-cert.pem"),
        token: world.controller.token_file(node),
    };
    let id: SpiffeId = format!("spiffe://cluster.local/ns/default/sa/{account}").parse()?;
    let netns = node.netns().path();
    tokio::task::spawn_blocking(move || {
        net::inside(&netns, || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(until_refused(config, id))
        })
    })
    .await?
}

async fn until_refused(config: RemoteCaConfig, id: SpiffeId) -> Result<String> {
    let authority = Authority::remote(config, "cluster.local")?;
    eventually("a refusal", async || match authority.identity(&id).await {
        Err(error) if error.detail.contains("ResourceExhausted") => Ok(error.detail),
        other => bail!("it is not refused: {other:?}"),
    })
    .await
}

#[tokio::test]
async fn a_node_that_asks_too_often_waits_and_others_do_not() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("rate", &["--requests-per-second", "1", "--request-burst", "3"]).await?;
    let client = world.a.pod("client").sa("client").start().await?;
    let other = world.b.pod("other").sa("other").start().await?;
    world.controller.token(&world.a).await?;
    let refusal = ask_too_often(&world, &world.a, "client").await?;
    let told = "mesh-system/mesh-agent on node a asks for more than 1 certificates a second (3 at once)";
    ensure!(refusal.contains(told), "{refusal}");
    let caller = "caller=\"mesh-system/mesh-agent on node a\"";
    world.controller.audited("refused", &["code=ResourceExhausted", caller, told]).await?;
    let agent_b = world.agent(&world.b).await?;
    other.enrolled().await?;
    ensure!(agent_b.status().await?["failing"] == serde_json::json!([]));
    let refused = world.controller.audit("refused");
    ensure!(!refused.iter().any(|line| line.contains("on node b")), "{refused:#?}");
    // The node itself goes on as soon as it asks less.
    world.controller.agent(&world.a).start().await?;
    client.enrolled().await?;
    world.controller.stop().await?;
    world.lab.finish().await
}

#[tokio::test]
async fn while_the_controller_is_away_pods_go_on_and_new_ones_wait() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("away", &[]).await?;
    let client = world.a.pod("client").sa("client").start().await?;
    let (pod, service) = server(&world.lab, &world.b).await?;
    let (agent_a, _agent_b) = tokio::try_join!(world.agent(&world.a), world.agent(&world.b))?;
    tokio::try_join!(client.enrolled(), pod.enrolled())?;
    let (address, root) = (world.controller.address(), world.controller.state_dir().join("ca-cert.pem"));
    let before = fs::read(&root)?;
    world.controller.stop().await?;

    let late = world.a.pod("late").sa("late").start().await?;
    let parts = ["no certificate for", "/sa/late", &address, "cannot connect"];
    fails(&agent_a, "late", &parts).await?;
    answered(&client, &service).await?;

    let controller = world.a.controller(&[]).await?;
    ensure!(fs::read(&root)? == before, "another root after a restart");
    late.enrolled().await?;
    answered(&late, &service).await?;
    controller.stop().await?;
    world.lab.finish().await
}

#[tokio::test]
async fn tokens_are_written_for_their_owner_alone() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("mode", &[]).await?;
    let file = world.controller.token_file(&world.a);
    fs::write(&file, "an old one")?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
    let token = world.controller.token(&world.a).await?;
    ensure!(token.matches('.').count() == 2 && token.ends_with('\n'), "{token}");
    ensure!(fs::metadata(&file)?.permissions().mode() & 0o777 == 0o600);
    world.controller.stop().await?;
    world.lab.finish().await
}
