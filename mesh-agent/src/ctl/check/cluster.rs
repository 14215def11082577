//! The part of the check that asks the API server, and the agents through it.
//!
//! What may not be asked is a line of its own, and what can be told without it is told. Tested in `tests.rs`.

use std::{collections::BTreeSet, fmt::Debug};

use futures_util::{StreamExt as _, stream};
use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, Deployment},
        authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
        core::v1::{ConfigMap, Node, Pod},
        networking::v1::NetworkPolicy,
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
};
use serde::de::DeserializeOwned;

use super::{Check, Report, certificates, installed, network_policies};
use crate::{
    ctl::{
        Failure,
        cluster::{Agent, Asked, agents, answered, kept},
    },
    source::definitions,
};

/// The oldest API server the chart is for.
const OLDEST: (u32, u32) = (1, 30);
/// Agents that are asked at a time.
const AT_A_TIME: usize = 8;
/// Objects in a page of a list.
const PAGE: u32 = 500;
/// What agents say of a pod that is in the mesh.
const ENROLLED: &str = "mesh.io/enrolled";
/// Where the controller publishes the roots.
const ROOTS: (&str, &str) = ("mesh-ca-root", "root-cert.pem");

pub(super) async fn checks(client: &Client, namespace: &str) -> Vec<Check> {
    let asked = Asked { verb: "get", resource: "version", namespace: None };
    let server = match answered(asked, client.apiserver_version()).await {
        Ok(server) => server,
        Err(failure) => {
            let remedy = "see --kubeconfig and --context, and whether the network leads there";
            return vec![Check::failure("API server", failure.to_string(), remedy)];
        }
    };
    let mut checks = vec![version(&server.major, &server.minor, &server.git_version)];
    checks.extend(allowed(client, namespace).await);
    for (name, definition, versions) in definitions() {
        let api = Api::<CustomResourceDefinition>::all(client.clone());
        checks.push(match get(&api, "customresourcedefinitions", None, &definition).await {
            Ok(found) => installed::kind(name, versions, found.as_ref()),
            Err(failure) => unknown(&format!("kind {name}"), &failure),
        });
    }
    let deployments = Api::<Deployment>::namespaced(client.clone(), namespace);
    checks.push(match get(&deployments, "deployments", Some(namespace), "mesh-controller").await {
        Ok(found) => installed::controller(found.as_ref(), namespace),
        Err(failure) => unknown("controller", &failure),
    });
    checks.push(roots(client, namespace).await);
    checks.extend(of_agents(client, namespace).await);
    checks.extend(policies(client).await);
    checks
}

/// What could not be looked at.
fn unknown(about: &str, failure: &Failure) -> Check {
    Check::warning(about, format!("not known: {failure}"), "run this as somebody who may ask")
}

fn version(major: &str, minor: &str, name: &str) -> Check {
    let number =
        |text: &str| text.trim_end_matches(|c: char| !c.is_ascii_digit()).parse::<u32>().unwrap_or_default();
    if (number(major), number(minor)) >= OLDEST {
        return Check::ok("API server", format!("answers; Kubernetes {name}"));
    }
    Check::failure(
        "API server",
        format!("Kubernetes {name} has no admission policies, on which the mesh's say of pods rests"),
        format!("{}.{} or newer has", OLDEST.0, OLDEST.1),
    )
}

async fn get<K>(
    api: &Api<K>,
    resource: &str,
    namespace: Option<&str>,
    name: &str,
) -> Result<Option<K>, Failure>
where
    K: Clone + DeserializeOwned + Debug,
{
    answered(Asked { verb: "get", resource, namespace }, api.get_opt(name)).await
}

/// Whether whoever runs this may do what `meshctl` does.
async fn allowed(client: &Client, namespace: &str) -> Vec<Check> {
    let mesh = Some(namespace);
    let mut checks = Vec::new();
    for (verb, resource, part, namespace, cost) in [
        ("list", "pods", None, mesh, "no agent is found"),
        ("create", "pods", Some("exec"), mesh, "no agent is asked"),
        ("get", "pods", Some("exec"), mesh, "no agent is asked"),
        ("get", "pods", None, None, "--pod finds no node"),
    ] {
        let about = "your permissions";
        let what = part.map_or_else(|| resource.to_owned(), |part| format!("{resource}/{part}"));
        let place =
            namespace.map_or("all namespaces".to_owned(), |namespace| format!("namespace {namespace}"));
        let attributes = ResourceAttributes {
            verb: Some(verb.to_owned()),
            resource: Some(resource.to_owned()),
            subresource: part.map(str::to_owned),
            namespace: namespace.map(str::to_owned),
            ..ResourceAttributes::default()
        };
        let spec = SelfSubjectAccessReviewSpec {
            resource_attributes: Some(attributes),
            ..SelfSubjectAccessReviewSpec::default()
        };
        let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
        let api = Api::<SelfSubjectAccessReview>::all(client.clone());
        let asked = Asked { verb: "create", resource: "selfsubjectaccessreviews", namespace: None };
        checks.push(match answered(asked, api.create(&PostParams::default(), &review)).await {
            Ok(answer) if answer.status.as_ref().is_some_and(|status| status.allowed) => {
                Check::ok(about, format!("{verb} {what} in {place}"))
            }
            Ok(_) => Check::warning(
                about,
                format!("you may not {verb} {what} in {place}: {cost}"),
                format!("a role with verb `{verb}` on `{what}` there, if you are to use meshctl from here"),
            ),
            Err(failure) => unknown(about, &failure),
        });
    }
    checks
}

async fn roots(client: &Client, namespace: &str) -> Check {
    let (name, key) = ROOTS;
    let about = format!("roots: ConfigMap {name}");
    let api = Api::<ConfigMap>::namespaced(client.clone(), namespace);
    match get(&api, "configmaps", Some(namespace), name).await {
        Ok(None) => Check::failure(
            &about,
            "is not there: agents believe no certificate, and do not start",
            "the controller makes it when it starts: see its log",
        ),
        Ok(Some(map)) => {
            let pem = map.data.and_then(|mut data| data.remove(key)).unwrap_or_default();
            certificates::of_roots(&about, &pem, Timestamp::now().as_second())
        }
        Err(failure) => unknown(&about, &failure),
    }
}

/// The agents as the API server has them, and what each says of its node.
async fn of_agents(client: &Client, namespace: &str) -> Vec<Check> {
    let sets = Api::<DaemonSet>::namespaced(client.clone(), namespace);
    let set = get(&sets, "daemonsets", Some(namespace), "mesh-agent").await;
    let found = agents(client, namespace, None).await;
    let (set, found) = match (set, found) {
        (Ok(set), Ok(found)) => (set, found),
        (Err(failure), _) | (_, Err(failure)) => return vec![unknown("agents", &failure)],
    };
    let nodes = all(Api::<Node>::all(client.clone()), "nodes").await;
    let names = nodes.as_ref().ok().map(|nodes| {
        nodes.iter().filter_map(|node| node.metadata.name.clone()).collect::<BTreeSet<String>>()
    });
    let mut checks = installed::agents(set.as_ref(), &found, names.as_ref(), namespace);
    checks.extend(nodes.err().map(|failure| unknown("agents: nodes", &failure)));
    let running = found.values().filter(|agent| agent.trouble.is_none());
    let asked = stream::iter(running).map(|agent| of_node(client, namespace, agent));
    checks.extend(asked.buffered(AT_A_TIME).collect::<Vec<_>>().await.into_iter().flatten());
    checks
}

/// What `meshctl check` says in an agent's container.
async fn of_node(client: &Client, namespace: &str, agent: &Agent) -> Vec<Check> {
    let place = format!("node {}", agent.node);
    let answer = match kept(client, namespace, agent, &["--output=json", "check"]).await {
        Ok(answer) => answer,
        Err(failure) => return vec![unknown(&place, &failure)],
    };
    // It fails where a check has: what it has found is there all the same.
    match serde_json::from_slice::<Report>(&answer.out) {
        Ok(report) => {
            let of_node = |check: Check| Check { about: format!("{place}: {}", check.about), ..check };
            report.checks.into_iter().map(of_node).collect()
        }
        Err(error) => {
            let why = answer.failed.unwrap_or_else(|| format!("its answer is not understood ({error})"));
            vec![Check::warning(&place, format!("not known: {why}"), "is its agent of another version?")]
        }
    }
}

async fn policies(client: &Client) -> Vec<Check> {
    let policies = all(Api::<NetworkPolicy>::all(client.clone()), "networkpolicies").await;
    let pods = all(Api::<Pod>::all(client.clone()), "pods").await;
    let is_enrolled = |pod: &Pod| {
        pod.metadata
            .annotations
            .as_ref()
            .is_some_and(|all| all.get(ENROLLED).is_some_and(|value| value == "true"))
    };
    match (policies, pods) {
        (Ok(policies), Ok(mut pods)) => {
            pods.retain(is_enrolled);
            network_policies::checks(&policies, &pods)
        }
        (Err(failure), _) | (_, Err(failure)) => vec![unknown("NetworkPolicies", &failure)],
    }
}

/// All of a kind, page by page.
async fn all<K>(api: Api<K>, resource: &str) -> Result<Vec<K>, Failure>
where
    K: Clone + DeserializeOwned + Debug,
{
    let mut params = ListParams::default().limit(PAGE);
    let mut items = Vec::new();
    loop {
        let page = answered(Asked { verb: "list", resource, namespace: None }, api.list(&params)).await?;
        items.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(items),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn versions_of_clusters_are_told_apart() {
        for (minor, verdict) in
            [("30", Verdict::Ok), ("35+", Verdict::Ok), ("29", Verdict::Failure), ("", Verdict::Failure)]
        {
            assert_eq!(version("1", minor, "v1.x").verdict, verdict, "{minor}");
        }
    }
}
