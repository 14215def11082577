//! What authorization policies cost: a request, by how many policies there are in the mesh, and compiling them.
//!
//! Measured in this process, in processor time of its one thread, so that other work of the machine has little say.

use std::{fmt::Write as _, hint::black_box, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use hyper::{HeaderMap, Method};
use mesh_agent::{
    policy::{self, Asked, Head},
    report::Reporter,
    source::read_text,
    state::{
        compile::{Settings, compile},
        resource::Objects,
        snapshot::Snapshot,
    },
};
use nix::time::{ClockId, clock_gettime};

use crate::{
    figures::{Figure, Measured, median_of, rows},
    rounds::{Plan, Rounds},
};

/// Policies in the mesh, and those of them that select each pod.
const POLICIES: usize = 10_000;
const QUICK_POLICIES: usize = 200;
const EACH_POD: usize = 20;
/// Pods in the mesh.
const PODS: usize = 1000;
const QUICK_PODS: usize = 20;
/// Rules of each policy.
const RULES: usize = 5;
/// Requests between two looks at the clock.
const BATCH: u32 = 1000;

const REQUEST: &str = "judging a request";
const COMPILING: &str = "compiling";

/// A mesh with this many policies.
struct Mesh {
    name: String,
    objects: Objects,
    snapshot: Snapshot,
}

pub fn run(plan: &Plan) -> Result<Measured> {
    let (policies, pods) = if plan.quick { (QUICK_POLICIES, QUICK_PODS) } else { (POLICIES, PODS) };
    let meshes = [0, EACH_POD, policies].map(|count| Mesh::new(count, pods));
    let meshes: Vec<Mesh> = meshes.into_iter().collect::<Result<_>>()?;
    let mut kept = Vec::new();
    for _ in 0..plan.rounds {
        let round: Result<Vec<_>> = meshes.iter().map(|mesh| mesh.measure(plan)).collect();
        kept.push(round?);
    }
    let names: Vec<&str> = meshes.iter().map(|mesh| &*mesh.name).collect();
    let rows = rows(&names, &Rounds { kept, discarded: 0, noisy: false });
    let of = |mesh: &Mesh, figure| median_of(&rows, &mesh.name, figure);
    let (few, many) = (of(&meshes[1], REQUEST)?, of(&meshes[2], REQUEST)?);
    let findings = vec![format!(
        "A request to a pod that {EACH_POD} policies select takes {:.2} µs where there are {EACH_POD} policies, and {:.2} µs \
         where there are {policies}.",
        few / 1000.0,
        many / 1000.0
    )];
    Ok(Measured {
        title: format!("{policies} authorization policies, {EACH_POD} of which select a pod"),
        about: about(pods),
        rows,
        findings,
        goals: Vec::new(),
        discarded: 0,
        noisy: false,
    })
}

fn about(pods: usize) -> Vec<String> {
    vec![
        format!(
            "{pods} pods. Each policy has {RULES} rules about principals, methods, paths (one a template) and a header, and selects \
             pods by a label. Half of them deny and none of their rules holds; the other half allow, and only the last rule \
             of the last one holds: all are looked at."
        ),
        "Judging is what is asked of policies for one request, its path being in its normal form already. Compiling is all of \
         it, from checked objects to the snapshot that the path reads, nothing being kept from before."
            .to_owned(),
        "All of it in one thread, in its processor time.".to_owned(),
    ]
}

/// One of the policies of an app, which selects its pods.
fn policy(app: usize, number: usize) -> String {
    let deny = number.is_multiple_of(2);
    let mut rules = String::new();
    for rule in 0..RULES {
        let last = number == EACH_POD - 1 && rule == RULES - 1;
        let path =
            if last { "/items/{*}/orders".to_owned() } else { format!("/never/{number}/{rule}/{{*}}") };
        let _ = write!(
            rules,
            "{{from: [{{source: {{principals: ['cluster.local/ns/default/*']}}}}], to: [{{operation: {{methods: [GET], \
             paths: [/x{rule}, '{path}']}}}}], when: [{{key: 'request.headers[x-team]', values: [blue, 'g*']}}]}}, "
        );
    }
    format!(
        "---\n{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: p-{app}-{number:02}}}, spec: \
         {{selector: {{matchLabels: {{app: app-{app}}}}}, action: {}, rules: [{rules}]}}}}\n",
        if deny { "DENY" } else { "ALLOW" }
    )
}

impl Mesh {
    fn new(policies: usize, pods: usize) -> Result<Self> {
        let apps = (policies / EACH_POD).max(1);
        let mut text = String::new();
        for number in 0..pods {
            let [high, low] = u16::try_from(number)?.to_be_bytes();
            let _ = writeln!(
                text,
                "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: pod-{number}, labels: {{app: app-{}}}}}, status: {{podIP: \
                 10.1.{high}.{low}}}}}",
                number % apps
            );
        }
        let places = (0..policies).map(|number| (number / EACH_POD, number % EACH_POD));
        text.extend(places.map(|(app, number)| policy(app, number)));
        let (objects, problems) = read_text(&text);
        ensure!(problems.is_empty(), "{:?}", problems.first());
        let (snapshot, problems) = compile(&objects, None, &Settings::default());
        ensure!(problems.is_empty(), "{:?}", problems.first());
        let name = if policies == 0 { "no policies".to_owned() } else { format!("{policies} policies") };
        Ok(Self { name, objects, snapshot })
    }

    fn measure(&self, plan: &Plan) -> Result<Vec<Figure>> {
        let pod = self.snapshot.workload_at("10.1.0.0".parse()?).context("the first pod")?;
        let (reporter, settings) = (Arc::new(Reporter::default()), Settings::default());
        let source = "spiffe://cluster.local/ns/default/sa/client".parse()?;
        let asked = Asked {
            workload: pod,
            destination: "10.1.0.0:8080".parse()?,
            source: Some(&source),
            client: "10.2.0.1:40000".parse()?,
            approved: &[],
        };
        let headers = HeaderMap::from_iter([("x-team".parse()?, "green".parse()?)]);
        let (method, authority, path) = (Method::GET, "app", "/items/7/orders");
        let head = Head { method: &method, authority, path, headers: &headers, claims: None };
        let judged = per_time(plan.seconds, BATCH, || {
            let permit = policy::request(black_box(&asked), black_box(&head), &reporter);
            ensure!(permit.is_ok(), "it is refused");
            Ok(())
        })?;
        let compiled = per_time(plan.seconds, 1, || {
            let (snapshot, _) = compile(black_box(&self.objects), None, &settings);
            black_box(snapshot);
            Ok(())
        })?;
        Ok(vec![
            Figure::new(REQUEST, "ns", 1e9 * judged.as_secs_f64()),
            Figure::new(COMPILING, "ms", 1000.0 * compiled.as_secs_f64()),
        ])
    }
}

/// What one call takes, in processor time, when it is made again and again for so long.
pub fn per_time(seconds: f64, batch: u32, mut call: impl FnMut() -> Result<()>) -> Result<Duration> {
    let now = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
    let (begun, mut calls) = (now()?, 0);
    loop {
        for _ in 0..batch {
            call()?;
        }
        calls += batch;
        let taken = now()?.saturating_sub(begun);
        if taken.as_secs_f64() >= seconds {
            return Ok(taken / calls);
        }
    }
}
