//! Runs one case through the product's own functions, and says what is not as expected.

use std::{collections::BTreeMap, fmt::Debug, net::IpAddr, sync::Arc};

use anyhow::{Context, Result, anyhow, ensure};
use http::{HeaderMap, HeaderName, HeaderValue, Request, header::ORIGIN, request::Parts};
use mesh_agent::{
    route::{self, StreamFacts, cors},
    source::read_text,
    state::{
        Problem,
        compile::{Settings, compile},
        snapshot::{Backend, Cluster, HttpRoute, RequestMatch, RouteAction, ServicePort, Snapshot, Workload},
    },
};
use serde_json::{Value, json};

use super::{
    case::{self, Case, Expect, File, Stream, To, Values, World},
    outcome,
};

/// What is wrong with a case; nothing when it came out as written.
pub fn case(world: &World, file: &File, case: &Case) -> Vec<String> {
    let mut wrong = Wrong::default();
    if let Err(error) = check(world, file, case, &mut wrong) {
        wrong.0.push(format!("{error:#}"));
    }
    wrong.0
}

/// Collects what is not as expected.
#[derive(Default)]
struct Wrong(Vec<String>);

impl Wrong {
    fn compare<T: PartialEq + Debug>(&mut self, what: &str, expected: Option<&T>, found: &T) {
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            self.0.push(format!("{what}: expected {expected:?}, found {found:?}"));
        }
    }
}

fn check(world: &World, file: &File, case: &Case, wrong: &mut Wrong) -> Result<()> {
    // JSON is YAML, and one document for each object keeps what is refused apart.
    let objects = case::objects(world, file, case);
    let text = objects.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n---\n");
    let (objects, refused) = read_text(&text);
    if let Some(expected) = &case.refused {
        let [problem] = &refused[..] else { return Err(anyhow!("not one refusal but {refused:?}")) };
        wrong.compare("field", Some(&expected.field), &problem.field.clone().unwrap_or_default());
        ensure!(problem.message.contains(&expected.reason), "refused for another reason: {problem}");
        return Ok(());
    }
    ensure!(refused.is_empty(), "refused: {}", lines(&refused));
    let settings = Settings::default();
    let (snapshot, problems) = compile(&objects, None, &settings);
    let as_expected = problems.len() == case.problems.len()
        && problems.iter().zip(&case.problems).all(|(found, part)| found.to_string().contains(part.as_str()));
    if !as_expected {
        wrong.0.push(format!("problems: expected {:?}, found {}", case.problems, lines(&problems)));
    }
    let Some(expect) = &case.expect else {
        ensure!(!case.problems.is_empty(), "the case expects nothing");
        return Ok(());
    };
    let client = client(&snapshot, &case.from)?;
    let Some(port) = port(&snapshot, &case.to, &client.namespace)? else {
        wrong.compare("nothing", Some(&expect.nothing), &Some("no service".to_owned()));
        return Ok(());
    };
    match &case.stream {
        Some(connection) => stream(case, connection, expect, port, &client, wrong),
        None => request(case, expect, port, &client, wrong),
    }
}

fn lines(problems: &[Problem]) -> String {
    let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
    lines.join("\n    ")
}

fn client(snapshot: &Snapshot, from: &str) -> Result<Arc<Workload>> {
    let mut pods = snapshot.workloads.values();
    let pod = pods.find(|pod| format!("{}/{}", pod.namespace, pod.name) == from);
    pod.cloned().with_context(|| format!("no pod {from}"))
}

/// The port that a client dials by the service's address; `None` when the service is not there for it.
fn port<'s>(snapshot: &'s Snapshot, to: &str, namespace: &str) -> Result<Option<&'s ServicePort>> {
    let (name, port) = to.split_once(':').unwrap_or((to, "80"));
    let (name, of) = name.split_once('.').unwrap_or((name, "default"));
    let host = format!("{name}.{of}.svc.cluster.local");
    let service = snapshot.services.get(host.as_str()).with_context(|| format!("no service {host}"))?;
    let vip = *service.vips.first().context("the service has no address")?;
    let Some(service) = snapshot.service_at(vip, namespace) else { return Ok(None) };
    let number = port.parse().context("the port")?;
    Ok(Some(service.port_for(namespace, number).with_context(|| format!("no port {number}"))?))
}

fn stream(
    case: &Case,
    connection: &Stream,
    expect: &Expect,
    port: &ServicePort,
    client: &Workload,
    wrong: &mut Wrong,
) -> Result<()> {
    let ip = |text: &Option<String>, default: &str| -> Result<IpAddr> {
        Ok(text.as_deref().unwrap_or(default).parse()?)
    };
    let facts = StreamFacts {
        sni: connection.sni.as_deref(),
        destination: ip(&connection.destination, "10.96.0.1")?,
        port: port.port,
        source: client,
        source_ip: ip(&connection.source, "10.0.9.1")?,
    };
    ensure!(case.request.is_none(), "a connection, or a request");
    let found = route::find_stream(&port.streams, &facts);
    wrong.compare("needs_sni", expect.needs_sni.as_ref(), &route::needs_sni(&port.streams));
    let name = found.map_or("none", |route| &*route.name).to_owned();
    wrong.compare("route", expect.route.as_ref(), &name);
    let whole = BTreeMap::from([(outcome::cluster(&port.cluster), 1)]);
    let backends = found.map_or(whole, |route| outcome::weighted(&route.backends));
    destinations(expect, &backends, wrong);
    let backend = found.map(|route| &route.backends[0].backend);
    match backend {
        None => cluster(expect, &port.cluster, wrong),
        Some(Backend::Cluster(first)) => cluster(expect, first, wrong),
        Some(Backend::Missing(_)) => {}
    }
    Ok(())
}

fn destinations(expect: &Expect, found: &BTreeMap<String, u32>, wrong: &mut Wrong) {
    match &expect.to {
        None => {}
        Some(To::Weighted(expected)) => wrong.compare("to", Some(expected), found),
        Some(To::One(expected)) => {
            let only = found.keys().next().filter(|_| found.len() == 1);
            let same = only.is_some_and(|only| match expected.strip_prefix("missing: ") {
                // Of a sentence, a part is enough.
                Some(part) => only.starts_with("missing: ") && only.contains(part),
                None => only == expected,
            });
            if !same {
                wrong.0.push(format!("to: expected {expected:?}, found {found:?}"));
            }
        }
    }
}

fn cluster(expect: &Expect, found: &Cluster, wrong: &mut Wrong) {
    wrong.compare("balancing", expect.balancing.as_ref(), &format!("{:?}", found.balancing));
    wrong.compare("connect_timeout", expect.connect_timeout.as_ref(), &found.connect_timeout.as_secs());
    let budget = (outcome::percent(found.retry_budget.percent), found.retry_budget.min_concurrency);
    wrong.compare("budget", expect.budget.as_ref(), &budget);
    let endpoints: Vec<String> =
        found.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
    wrong.compare("endpoints", expect.endpoints.as_ref(), &endpoints);
    let view = found.view.as_deref().unwrap_or_default().to_owned();
    wrong.compare("view", expect.view.as_ref(), &view);
}

fn parts(case: &Case) -> Result<Parts> {
    let line = case.request.as_deref().unwrap_or("GET /");
    let (method, url) = line.split_once(' ').context("METHOD URL")?;
    let (mut parts, ()) = Request::builder().method(method).uri(url).body(())?.into_parts();
    parts.headers = header_map(&case.headers)?;
    if parts.uri.authority().is_none() && !parts.headers.contains_key("host") {
        parts.headers.insert("host", HeaderValue::from_static("a"));
    }
    Ok(parts)
}

fn header_map(written: &BTreeMap<String, Values>) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    for (name, values) in written {
        for value in values.all() {
            headers.append(HeaderName::from_bytes(name.as_bytes())?, HeaderValue::from_str(&value)?);
        }
    }
    Ok(headers)
}

fn request(
    case: &Case,
    expect: &Expect,
    port: &ServicePort,
    client: &Workload,
    wrong: &mut Wrong,
) -> Result<()> {
    let parts = parts(case)?;
    let found = route::find(&port.routes, &parts, port.port, client);
    let nothing = found.is_none().then(|| "no route".to_owned());
    wrong.compare("nothing", Some(&expect.nothing), &nothing);
    let Some((route, matched)) = found else { return Ok(()) };
    decisions(expect, route, matched, &parts, wrong);
    let forwards = matches!(route.action, RouteAction::Forward(_));
    ensure!(forwards || expect.to.is_none(), "answered, not forwarded");
    match &route.action {
        RouteAction::Redirect(redirect) => {
            let location = route::location(redirect, &parts, matched, port.port);
            let found = format!("{} {location}", redirect.status.as_u16());
            wrong.compare("redirect", Some(expect.redirect.as_ref().unwrap_or(&String::new())), &found);
            response(case, expect, route, None, &parts, wrong)?;
        }
        RouteAction::Direct { status, body } => {
            let found = format!("{} {}", status.as_u16(), String::from_utf8_lossy(body));
            wrong.compare("direct", Some(expect.direct.as_ref().unwrap_or(&String::new())), &found);
            response(case, expect, route, None, &parts, wrong)?;
        }
        RouteAction::Forward(backends) => {
            destinations(expect, &outcome::weighted(backends), wrong);
            ensure!(expect.redirect.is_none() && expect.direct.is_none(), "forwarded, not answered");
            if let Backend::Cluster(first) = &backends[0].backend {
                cluster(expect, first, wrong);
            }
            forwarded(expect, route, matched, parts.clone(), wrong);
            response(case, expect, route, Some(&backends[0].headers.response), &parts, wrong)?;
        }
    }
    Ok(())
}

/// What the route says of a request before it is sent anywhere.
fn decisions(
    expect: &Expect,
    route: &HttpRoute,
    matched: Option<&RequestMatch>,
    parts: &Parts,
    wrong: &mut Wrong,
) {
    wrong.compare("route", expect.route.as_ref(), &route.name_of(matched).to_string());
    let stat = route.stat_name_of(matched).map_or("none", |name| &**name).to_owned();
    wrong.compare("stat", expect.stat.as_ref(), &stat);
    wrong.compare("origin", expect.origin.as_ref(), &route.origin.to_string());
    let injection = route::injection(&route.fault, &parts.headers);
    wrong.compare("delay", expect.delay.as_ref(), &outcome::delay(&injection));
    wrong.compare("abort", expect.abort.as_ref(), &outcome::abort(&injection));
    let timeout = route.timeout.map_or_else(|| "none".to_owned(), |timeout| format!("{timeout:?}"));
    wrong.compare("timeout", expect.timeout.as_ref(), &timeout);
    wrong.compare("retries", expect.retries.as_ref(), &outcome::retries(&route.retries));
    let mirrors = route.mirrors.iter();
    let mirrors =
        mirrors.map(|mirror| (outcome::backend(&mirror.backend), outcome::percent(mirror.percentage)));
    wrong.compare("mirrors", expect.mirrors.as_ref(), &mirrors.collect());
    let answer = route.cors.as_ref().and_then(|policy| cors::preflight(policy, parts));
    let answer = answer.map_or(json!("none"), |(status, headers)| {
        let headers: BTreeMap<&str, String> = headers
            .keys()
            .map(|name| (name.as_str(), outcome::values(&headers, name.as_str()).join("; ")))
            .collect();
        json!({"status": status.as_u16(), "headers": headers})
    });
    let expected: Option<&Value> = expect.preflight.as_ref();
    wrong.compare("preflight", expected, &answer);
}

/// The request as the app of the first destination sees it.
fn forwarded(
    expect: &Expect,
    route: &HttpRoute,
    matched: Option<&RequestMatch>,
    mut parts: Parts,
    wrong: &mut Wrong,
) {
    let RouteAction::Forward(backends) = &route.action else { return };
    route::apply_request(&mut parts, &route.headers.request);
    route::apply_request(&mut parts, &backends[0].headers.request);
    route::rewrite(&mut parts, &route.rewrite, matched);
    let path = parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    wrong.compare("path", expect.path.as_ref(), &path);
    let in_uri = parts.uri.authority().map(ToString::to_string);
    let authority = in_uri.unwrap_or_else(|| outcome::values(&parts.headers, "host").join("; "));
    wrong.compare("authority", expect.authority.as_ref(), &authority);
    for (name, expected) in &expect.headers {
        wrong.compare(name, Some(expected), &outcome::values(&parts.headers, name));
    }
}

/// The response as the client sees it.
fn response(
    case: &Case,
    expect: &Expect,
    route: &HttpRoute,
    of_backend: Option<&mesh_agent::state::snapshot::HeaderOp>,
    request: &Parts,
    wrong: &mut Wrong,
) -> Result<()> {
    let mut headers = header_map(&case.response)?;
    if let (Some(policy), Some(origin)) = (&route.cors, request.headers.get(ORIGIN)) {
        cors::apply(policy, origin, &mut headers);
    }
    route::apply_response(&mut headers, &route.headers.response);
    if let Some(op) = of_backend {
        route::apply_response(&mut headers, op);
    }
    for (name, expected) in &expect.response {
        wrong.compare(&format!("response {name}"), Some(expected), &outcome::values(&headers, name));
    }
    Ok(())
}
