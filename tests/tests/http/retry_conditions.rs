//! `retries.retryOn`: each condition has a request tried again for its failures and for no others, wherever the app is:
//! beside the client, or behind the agent of another node that has to tell what failed.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use lab::{Service, apps::CallKind};
use tokio::task::JoinSet;

use crate::world::{APP, GRPC, HTTP, HTTP2, Side, World};

const ON: [&str; 8] = [
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "refused-stream",
    "retriable-4xx",
    "503",
];

const GRPC_ON: [(&str, u32); 5] = [
    ("cancelled", 1),
    ("deadline-exceeded", 4),
    ("resource-exhausted", 8),
    ("internal", 13),
    ("unavailable", 14),
];

/// What an app does, what its client is told in the end, and which conditions ask for another try.
struct Failure {
    host: &'static str,
    port: u16,
    path: &'static str,
    status: &'static str,
    flags: &'static str,
    covered: &'static [&'static str],
}

impl Failure {
    /// The flags once every try has failed.
    fn given_up(&self) -> String {
        if self.flags == "-" { "URX".to_owned() } else { format!("{},URX", self.flags) }
    }
}

const FAILURES: [Failure; 9] = [
    Failure {
        host: "-dead",
        port: HTTP,
        path: "/",
        status: "503",
        flags: "UF",
        covered: &["5xx", "gateway-error", "reset", "reset-before-request", "connect-failure"],
    },
    Failure {
        host: "",
        port: HTTP2,
        path: "/reset/7",
        status: "503",
        flags: "UR",
        covered: &["5xx", "gateway-error", "reset", "reset-before-request", "refused-stream"],
    },
    Failure {
        host: "",
        port: HTTP2,
        path: "/reset/2",
        status: "502",
        flags: "UC",
        covered: &["5xx", "gateway-error", "reset"],
    },
    Failure { host: "", port: HTTP, path: "/status/500", status: "500", flags: "-", covered: &["5xx"] },
    Failure {
        host: "",
        port: HTTP,
        path: "/status/502",
        status: "502",
        flags: "-",
        covered: &["5xx", "gateway-error"],
    },
    Failure {
        host: "",
        port: HTTP,
        path: "/status/503",
        status: "503",
        flags: "-",
        covered: &["5xx", "gateway-error", "503"],
    },
    Failure {
        host: "",
        port: HTTP,
        path: "/status/409",
        status: "409",
        flags: "-",
        covered: &["retriable-4xx"],
    },
    Failure { host: "", port: HTTP, path: "/status/404", status: "404", flags: "-", covered: &[] },
    Failure {
        host: "",
        port: HTTP,
        path: "/slow/30000",
        status: "504",
        flags: "UT",
        covered: &["5xx", "gateway-error", "reset"],
    },
];

/// One route for each condition; what is slow has little time for each try.
fn routes(host: &str) -> String {
    let conditions = ON.iter().chain(GRPC_ON.iter().map(|(on, _)| on));
    let route = |on: &&str| {
        [("/slow", ", perTryTimeout: 100ms"), ("/", "")].map(|(prefix, limit)| {
            format!(
                "\n    - match: [{{ uri: {{ prefix: {prefix} }}, headers: {{ x-on: {{ exact: \"{on}\" }} }} }}]\n      \
                 retries: {{ attempts: 2, retryOn: \"{on}\", backoff: 1ms{limit} }}\n      \
                 route: [{{ destination: {{ host: {host} }} }}]"
            )
        })
    };
    let rules: String = conditions.flat_map(route).collect();
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\n\
         metadata: {{ name: {host}, namespace: default }}\nspec:\n  hosts: [{host}]\n  http:{rules}\n"
    )
}

/// The routes, and for each side a service that nobody listens for.
async fn apply(world: &World) -> Result<Vec<Service>> {
    let (mut text, mut dead) = (String::new(), Vec::new());
    for side in world.both() {
        let name = format!("{}-dead", side.name());
        dead.push(
            world.pair.lab.service(&name).selector("app", side.name()).port("http", HTTP, 9999).apply()?,
        );
        text += &[routes(side.name()), routes(&name), String::new()].join("---\n");
    }
    world.pair.apply("routes.yaml", &text).await?;
    Ok(dead)
}

/// Fails in this way once for each condition, and sees how often each was tried.
async fn fails(world: &World, side: &Side, dead: &Service, failure: &Failure) -> Result<()> {
    let host = format!("{}{}", side.name(), failure.host);
    let mut sending = JoinSet::new();
    for on in ON {
        let (client, authority) = (world.client().clone(), host.clone());
        let service = if failure.host.is_empty() { &side.service } else { dead };
        let url = service.url(failure.port, failure.path);
        sending.spawn(async move {
            let url = format!("{url}?on={on}");
            client.get(url).header("host", &authority).header("x-on", on).send().await
        });
    }
    for answer in sending.join_all().await {
        ensure!(answer?.status.to_string() == failure.status, "{}", failure.path);
    }
    for on in ON {
        let path = format!("{}?on={on}", failure.path);
        let line = [("path", path.as_str()), ("authority", &host), ("reporter", "source")];
        let line = world.pair.agent_a.logged(&line).await?;
        let (tries, flags) = if failure.covered.contains(&on) {
            ("3", failure.given_up())
        } else {
            ("1", failure.flags.to_owned())
        };
        ensure!(line["tries"] == tries && line["flags"] == flags, "{line:?}, not {tries} tries and {flags}");
    }
    Ok(())
}

/// All that was counted, once every failure has happened to a side.
async fn all_counted(world: &World, side: &Side) -> Result<()> {
    let mut expected = BTreeMap::new();
    for failure in &FAILURES {
        let host = format!("{}{}.default.svc.cluster.local", side.name(), failure.host);
        let covered = failure.covered.len() as u64;
        for (flags, count) in
            [(failure.given_up(), covered), (failure.flags.to_owned(), ON.len() as u64 - covered)]
        {
            *expected.entry((host.clone(), failure.status, flags)).or_default() += count;
        }
    }
    for ((host, status, flags), count) in expected {
        let labels = [("response_code", status), ("response_flags", &flags), ("destination_service", &host)];
        world.requests(&labels, count).await?;
    }
    Ok(())
}

#[tokio::test]
async fn each_condition_covers_its_failures_near_and_far() -> Result<()> {
    let Some(world) = World::new("retry-on").await? else { return Ok(()) };
    let dead = apply(&world).await?;
    for (side, dead) in world.both().into_iter().zip(&dead) {
        for failure in &FAILURES {
            fails(&world, side, dead, failure).await?;
        }
        all_counted(&world, side).await?;
        // The client has seen the head of a response: whatever comes then is its answer.
        for on in ["5xx", "reset"] {
            let url = side.service.url(HTTP2, &format!("/reset-late/8?on={on}"));
            let _ = world.client().get(url).h2c().header("host", side.name()).header("x-on", on).send().await;
            let seen = side.pod.stats(APP).await?.paths[&format!("/reset-late/8?on={on}")];
            let line = [
                ("path", &*format!("/reset-late/8?on={on}")),
                ("reporter", "source"),
                ("authority", side.name()),
            ];
            let line = world.pair.agent_a.logged(&line).await?;
            ensure!(line["flags"].starts_with("UC"), "{line:?}");
            // Where the head of the response was lost with the stream, there was no response yet.
            ensure!(line["status"] != "200" || (seen == 1 && line["tries"] == "1"), "{seen}: {line:?}");
        }
    }
    world.finish().await
}

#[tokio::test]
async fn statuses_of_grpc_are_conditions_too() -> Result<()> {
    let Some(world) = World::new("retry-grpc").await? else { return Ok(()) };
    apply(&world).await?;
    for side in world.both() {
        for (on, _) in GRPC_ON {
            for (_, status) in GRPC_ON {
                let call = world.client().call(&side.service.url(GRPC, ""), CallKind::Unary);
                let id = format!("{on}-{status}-{}", side.name());
                let call =
                    call.text(&format!("refuse/{status}")).header("x-on", on).header("x-request-id", &id);
                call.send().await?;
                let line = [("request_id", id.as_str()), ("reporter", "source")];
                let line = world.pair.agent_a.logged(&line).await?;
                let tries = if GRPC_ON.contains(&(on, status)) { "3" } else { "1" };
                ensure!(line["tries"] == tries && line["grpc_status"] == status.to_string(), "{line:?}");
            }
        }
        for (_, status) in GRPC_ON {
            let labels =
                [("grpc_response_status", &*status.to_string()), ("destination_workload", side.name())];
            world.requests(&labels, GRPC_ON.len() as u64).await?;
        }
    }
    world.finish().await
}
