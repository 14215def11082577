//! The check of a node with an agent, and of a cluster.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{Check, Report, Verdict};
use crate::{
    admin::{Readiness, tests::Agent},
    ctl::{
        Cli,
        cluster::tests::{World, agent},
    },
    source::kubernetes::tests::fake::{Fake, Ran},
};

fn verdict(report: &Report, about: &str) -> Result<Verdict> {
    let one = report.checks.iter().find(|check| check.about == about);
    Ok(one.with_context(|| format!("{about} in {report:#?}"))?.verdict)
}

#[tokio::test]
async fn an_agent_says_what_is_wrong_with_it() -> Result<()> {
    let readiness = Readiness::default();
    let agent = Agent::start(&readiness).await?;
    let admin = format!("--admin=unix:{}", agent.socket().display());
    let report = async || -> Result<(Report, Option<u8>)> {
        let mut out = Vec::new();
        let done = crate::ctl::run(Cli::read(["meshctl", &admin, "check", "-o", "json"])?, &mut out).await;
        Ok((serde_json::from_slice(&out)?, done.err().map(|failure| failure.code())))
    };
    let (found, _) = report().await?;
    assert_eq!(verdict(&found, "agent")?, Verdict::Ok);
    // Its admin endpoint shows one that has a pod it cannot enrol, and a broken VirtualService.
    assert_eq!(verdict(&found, "pods")?, Verdict::Failure);
    assert_eq!(verdict(&found, "configuration")?, Verdict::Warning);
    let _capture = readiness.block("capture");
    let (found, code) = report().await?;
    assert_eq!((verdict(&found, "agent")?, code), (Verdict::Failure, Some(1)));
    verdict(&found, "kernel")?;
    Ok(())
}

fn definition(fake: &Fake, name: &str, version: &str) {
    let (plural, group) = name.split_once('.').unwrap_or_default();
    let spec = json!({"group": group, "names": {"kind": plural, "plural": plural}, "scope": "Namespaced",
                      "versions": [{"name": version, "served": true, "storage": true}]});
    fake.put(
        "apiextensions.k8s.io",
        "customresourcedefinitions",
        json!({"metadata": {"name": name}, "spec": spec}),
    );
}

/// A cluster where all is well.
async fn well() -> Result<World> {
    let world = World::with(&[("agent-a", "a"), ("agent-b", "b")]).await?;
    let fake = &world.fake;
    for (_, name, versions) in crate::source::definitions() {
        definition(fake, &name, versions[0]);
    }
    let mesh = |name: &str, rest: Value| {
        let mut object = json!({"metadata": {"name": name, "namespace": "mesh-system"}});
        if let (Some(object), Value::Object(rest)) = (object.as_object_mut(), rest) {
            object.extend(rest);
        }
        object
    };
    let spec = json!({"replicas": 2, "selector": {}, "template": {}});
    let status = json!({"readyReplicas": 2});
    fake.put("apps", "deployments", mesh("mesh-controller", json!({"spec": spec, "status": status})));
    let status = json!({"desiredNumberScheduled": 2, "currentNumberScheduled": 2, "numberMisscheduled": 0, "numberReady": 2});
    fake.put(
        "apps",
        "daemonsets",
        mesh("mesh-agent", json!({"spec": {"selector": {}, "template": {}}, "status": status})),
    );
    for node in ["a", "b"] {
        fake.put("", "nodes", json!({"metadata": {"name": node}}));
    }
    let key = rcgen::KeyPair::generate()?;
    let pem = rcgen::CertificateParams::new(vec![])?.self_signed(&key)?.pem();
    fake.put("", "configmaps", mesh("mesh-ca-root", json!({"data": {"root-cert.pem": pem}})));
    let annotations = json!({"mesh.io/enrolled": "true"});
    let metadata =
        json!({"name": "web", "namespace": "shop", "labels": {"app": "web"}, "annotations": annotations});
    fake.put("", "pods", json!({"metadata": metadata, "spec": {"nodeName": "b", "containers": []}}));
    let report = Report { checks: vec![Check::ok("kernel", "Linux")] };
    let said = serde_json::to_string(&report)?;
    fake.runs(move |_, _| Ran { out: vec![said.clone()], code: Some(0), ..Ran::default() });
    Ok(world)
}

async fn checked(world: &World) -> Result<(Report, Option<u8>)> {
    let (out, done) = world.output("check -o json").await;
    Ok((serde_json::from_str(&out).with_context(|| out.clone())?, done.err().map(|failure| failure.code())))
}

#[tokio::test]
async fn a_cluster_where_all_is_well_has_nothing_but_ok() -> Result<()> {
    let world = well().await?;
    let (report, code) = checked(&world).await?;
    let not_well: Vec<_> = report.checks.iter().filter(|check| check.verdict != Verdict::Ok).collect();
    assert!(not_well.is_empty() && code.is_none(), "{not_well:#?}");
    for about in [
        "API server",
        "your permissions",
        "kind VirtualService",
        "controller",
        "agents",
        "agents: nodes",
        "agents: versions",
        "roots: ConfigMap mesh-ca-root",
        "node a: kernel",
        "node b: kernel",
        "NetworkPolicies",
    ] {
        verdict(&report, about)?;
    }
    Ok(())
}

#[tokio::test]
async fn each_thing_that_is_not_well_in_a_cluster_is_a_line() -> Result<()> {
    type Change = fn(&Fake);
    let changes: [(&str, Verdict, Change); 9] = [
        ("kind ServicePolicy", Verdict::Warning, |fake| {
            fake.delete("apiextensions.k8s.io", "customresourcedefinitions", "", "servicepolicies.mesh.io");
        }),
        ("kind VirtualService", Verdict::Failure, |fake| {
            definition(fake, "virtualservices.networking.istio.io", "v9");
        }),
        ("controller", Verdict::Failure, |fake| {
            fake.delete("apps", "deployments", "mesh-system", "mesh-controller");
        }),
        ("roots: ConfigMap mesh-ca-root", Verdict::Failure, |fake| {
            fake.delete("", "configmaps", "mesh-system", "mesh-ca-root");
        }),
        ("agents", Verdict::Failure, |fake| fake.delete("", "pods", "mesh-system", "agent-b")),
        ("agents: nodes", Verdict::Warning, |fake| fake.put("", "nodes", json!({"metadata": {"name": "c"}}))),
        ("agents: versions", Verdict::Warning, |fake| {
            let mut other = agent("agent-b", "b");
            other["spec"]["containers"][0]["image"] = "mesh-agent:2".into();
            fake.put("", "pods", other);
        }),
        ("NetworkPolicies", Verdict::Failure, |fake| {
            let policy =
                json!({"metadata": {"name": "deny", "namespace": "shop"}, "spec": {"podSelector": {}}});
            fake.put("networking.k8s.io", "networkpolicies", policy);
        }),
        ("NetworkPolicies", Verdict::Warning, |fake| fake.forbid("networkpolicies", true)),
    ];
    for (about, expected, change) in changes {
        let world = well().await?;
        change(&world.fake);
        let (report, code) = checked(&world).await?;
        assert_eq!(verdict(&report, about)?, expected, "{about}");
        assert_eq!(code, (expected == Verdict::Failure).then_some(1), "{about}");
        let silent =
            report.checks.iter().find(|check| check.verdict != Verdict::Ok && check.remedy.is_none());
        assert_eq!(silent, None, "{about}");
    }
    Ok(())
}

#[tokio::test]
async fn what_a_node_finds_is_told_with_its_name_though_it_fails_there() -> Result<()> {
    let world = well().await?;
    let report = Report { checks: vec![Check::failure("bpffs", "not mounted", "mount it")] };
    let said = serde_json::to_string(&report)?;
    world.fake.runs(move |_, _| Ran {
        out: vec![said.clone()],
        errors: "meshctl: no".to_owned(),
        code: Some(1),
    });
    let (report, code) = checked(&world).await?;
    assert_eq!((verdict(&report, "node a: bpffs")?, code), (Verdict::Failure, Some(1)));
    world.fake.runs(|_, _| Ran {
        errors: "meshctl: unknown command".to_owned(),
        code: Some(2),
        ..Ran::default()
    });
    let (report, _) = checked(&world).await?;
    assert_eq!(verdict(&report, "node b")?, Verdict::Warning);
    Ok(())
}

#[tokio::test]
async fn who_may_not_ask_is_told_what_is_missing() -> Result<()> {
    let world = well().await?;
    world.fake.allow(false);
    let (report, code) = checked(&world).await?;
    let denied: Vec<_> = report.checks.iter().filter(|check| check.about == "your permissions").collect();
    assert!(denied.len() == 4 && denied.iter().all(|check| check.verdict == Verdict::Warning), "{denied:#?}");
    assert!(denied.iter().any(|check| check.found.contains("create pods/exec in namespace mesh-system")));
    assert_eq!(code, None);
    world.fake.stop().await;
    let (report, code) = checked(&world).await?;
    assert_eq!((report.checks.len(), verdict(&report, "API server")?, code), (1, Verdict::Failure, Some(1)));
    Ok(())
}
