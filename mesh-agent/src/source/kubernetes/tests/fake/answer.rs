//! What the API server answers.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{Method, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{Body, Happened, Key, World, exec};

/// What a path is about.
#[derive(Clone)]
struct Target {
    group: String,
    version: String,
    plural: String,
    namespace: Option<String>,
    name: Option<String>,
    /// The subresource.
    part: Option<String>,
}

impl Target {
    fn of(path: &str) -> Option<Self> {
        let mut parts = path.trim_matches('/').split('/');
        let group = match parts.next()? {
            "api" => String::new(),
            _ => parts.next()?.to_owned(),
        };
        let version = parts.next()?.to_owned();
        let mut rest: Vec<String> = parts.map(str::to_owned).collect();
        let namespace = (rest.len() > 2 && rest[0] == "namespaces").then(|| rest.drain(..2).nth(1)).flatten();
        let mut rest = rest.into_iter();
        let plural = rest.next().unwrap_or_default();
        Some(Self { group, version, plural, namespace, name: rest.next(), part: rest.next() })
    }

    fn key(&self) -> Key {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        (self.group.clone(), self.plural.clone(), text(&self.namespace), text(&self.name))
    }

    fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    fn has(&self, key: &Key) -> bool {
        let (group, plural, namespace, _) = key;
        *group == self.group
            && *plural == self.plural
            && self.namespace.as_ref().is_none_or(|own| own == namespace)
    }

    /// Whether the kind is there.
    fn is_served(&self, world: &World) -> bool {
        let built_in = self.group.is_empty() || self.group == "apps" || self.group.ends_with(".k8s.io");
        built_in
            || world.served.get(&self.api_version()).is_some_and(|plurals| plurals.contains(&self.plural))
    }
}

/// `a.b=c` and `a.b!=c`, all of which have to hold.
fn selected(selector: &str, object: &Value) -> bool {
    selector.split(',').filter(|term| !term.is_empty()).all(|term| {
        let (path, value, equal) = match term.split_once("!=") {
            Some((path, value)) => (path, value, false),
            None => term.split_once('=').map(|(path, value)| (path, value, true)).unwrap(),
        };
        let at = object.pointer(&format!("/{}", path.replace('.', "/")));
        (at.and_then(Value::as_str).unwrap_or_default() == value) == equal
    })
}

/// Labels `a=b`, all of which have to be there.
fn labelled(selector: &str, object: &Value) -> bool {
    let mut terms = selector.split(',').filter_map(|term| term.split_once('='));
    terms.all(|(name, value)| object["metadata"]["labels"][name] == value)
}

pub(super) async fn answer(
    world: Arc<Mutex<World>>,
    changed: watch::Sender<()>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let upgrade = hyper::upgrade::on(&mut request);
    let (head, body) = request.into_parts();
    let sent = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let query = head.uri.query().unwrap_or_default().to_owned();
    let query: BTreeMap<String, String> = query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| {
            let value = value.replace('+', " ");
            (name.to_owned(), percent_encoding::percent_decode_str(&value).decode_utf8_lossy().into_owned())
        })
        .collect();
    let shown: Vec<String> = query.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let by = head.headers.get(AUTHORIZATION).and_then(|by| by.to_str().ok()).unwrap_or_default();
    {
        let mut world = world.lock().unwrap();
        world.asked.push(format!("{} {}?{}", head.method, head.uri.path(), shown.join("&")));
        by.clone_into(&mut world.authorization);
    }
    changed.send_replace(());
    let mut told = changed.subscribe();
    while world.lock().unwrap().silent {
        let _ = told.changed().await;
    }
    if head.uri.path() == "/version" {
        return Ok(whole(200, &version()));
    }
    let Some(target) = Target::of(head.uri.path()) else { return Ok(status(404, "no such path")) };
    let known = world.lock().unwrap();
    if target.plural.is_empty() {
        let Some(plurals) = known.served.get(&target.api_version()) else {
            return Ok(status(404, "not found"));
        };
        let one = |plural: &String| json!({"name": plural, "kind": plural, "namespaced": true, "singularName": "", "verbs": []});
        let resources: Vec<Value> = plurals.iter().map(one).collect();
        let list =
            json!({"kind": "APIResourceList", "groupVersion": target.api_version(), "resources": resources});
        return Ok(whole(200, &list));
    }
    if !target.is_served(&known) {
        return Ok(status(404, "the server could not find the requested resource"));
    }
    if target.part.as_deref() == Some("exec") && !known.forbidden.contains("pods/exec") {
        let (Some(run), Some(pod)) = (known.run.clone(), &target.name) else {
            return Ok(status(404, "not found"));
        };
        drop(known);
        let ran = run(pod, &exec::command(head.uri.query().unwrap_or_default()));
        return Ok(exec::answer(ran, &head.headers, upgrade));
    }
    let is_write = head.method == Method::PATCH;
    let is_exec = target.part.as_deref() == Some("exec");
    if known.forbidden.contains(&target.plural) || (is_write && known.read_only) || is_exec {
        return Ok(status(403, &format!("{} is forbidden", target.plural)));
    }
    if target.plural == "selfsubjectaccessreviews" {
        let mut review: Value = serde_json::from_slice(&sent).unwrap();
        review["status"] = json!({"allowed": !known.denies});
        return Ok(whole(201, &review));
    }
    if head.method == Method::POST {
        drop(known);
        return Ok(created(&world, &changed, &target, &sent));
    }
    if head.method == Method::PUT {
        drop(known);
        return Ok(replaced(&world, &changed, &target, &sent));
    }
    if head.method == Method::PATCH {
        drop(known);
        let kind = head.headers.get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if kind.starts_with("application/apply-patch") {
            return Ok(applied(&world, &changed, &target, &sent));
        }
        let by_name = kind.starts_with("application/strategic-merge-patch");
        return Ok(patch((&world, &changed), &target, &sent, by_name));
    }
    if query.get("watch").is_some_and(|value| value == "true" || value == "1") {
        drop(known);
        return Ok(watched(world, changed.subscribe(), target, &query));
    }
    if target.name.is_some() {
        let found = known.objects.get(&target.key());
        return Ok(found.map_or_else(|| status(404, "not found"), |object| whole(200, object)));
    }
    Ok(listed(&known, &target, &query))
}

fn version() -> Value {
    let names = ["buildDate", "compiler", "gitCommit", "gitTreeState", "goVersion", "platform"];
    let mut version: serde_json::Map<String, Value> =
        names.into_iter().map(|name| (name.to_owned(), "-".into())).collect();
    for (name, value) in [("major", "1"), ("minor", "35"), ("gitVersion", "v1.35.0")] {
        version.insert(name.to_owned(), value.into());
    }
    version.into()
}

/// Makes an object, unless there is one.
fn created(
    world: &Mutex<World>,
    changed: &watch::Sender<()>,
    target: &Target,
    sent: &[u8],
) -> Response<Body> {
    let mut object: Value = serde_json::from_slice(sent).unwrap();
    let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let target = Target { name: Some(name), ..target.clone() };
    let mut world = world.lock().unwrap();
    if world.objects.contains_key(&target.key()) {
        let conflict = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 409, "reason": "AlreadyExists",
                              "message": "it is there already"});
        return whole(409, &conflict);
    }
    let answer = placed(&mut world, &target, &mut object, 201);
    drop(world);
    changed.send_replace(());
    answer
}

/// Replaces an object that is still as the new one says that it was.
fn replaced(
    world: &Mutex<World>,
    changed: &watch::Sender<()>,
    target: &Target,
    sent: &[u8],
) -> Response<Body> {
    let mut object: Value = serde_json::from_slice(sent).unwrap();
    let mut world = world.lock().unwrap();
    let Some(before) = world.objects.get(&target.key()) else { return status(404, "not found") };
    let version = &object["metadata"]["resourceVersion"];
    if !version.is_null() && *version != before["metadata"]["resourceVersion"] {
        return status(409, "the object has been modified");
    }
    let answer = placed(&mut world, target, &mut object, 200);
    drop(world);
    changed.send_replace(());
    answer
}

/// What is applied stands in place of what was there: nobody else owns any of its fields here.
fn applied(
    world: &Mutex<World>,
    changed: &watch::Sender<()>,
    target: &Target,
    sent: &[u8],
) -> Response<Body> {
    let mut object: Value = serde_json::from_slice(sent).unwrap();
    let answer = placed(&mut world.lock().unwrap(), target, &mut object, 200);
    changed.send_replace(());
    answer
}

fn placed(world: &mut World, target: &Target, object: &mut Value, code: u16) -> Response<Body> {
    world.version += 1;
    let (version, key) = (world.version, target.key());
    let metadata = object["metadata"].as_object_mut().unwrap();
    metadata.insert("namespace".to_owned(), key.2.clone().into());
    metadata.insert("resourceVersion".to_owned(), version.to_string().into());
    metadata.entry("uid").or_insert_with(|| format!("uid-{version}").into());
    let before = world.objects.insert(key.clone(), object.clone());
    world.history.push(Happened { version, key, before, after: Some(object.clone()) });
    whole(code, object)
}

fn listed(world: &World, target: &Target, query: &BTreeMap<String, String>) -> Response<Body> {
    let selector = query.get("fieldSelector").map_or("", String::as_str);
    let labels = query.get("labelSelector").map_or("", String::as_str);
    let all = world
        .objects
        .iter()
        .filter(|(key, object)| target.has(key) && selected(selector, object) && labelled(labels, object));
    let from = query.get("continue").map_or(0, |from| from.parse().unwrap());
    let asked = query.get("limit").map_or(usize::MAX, |limit| limit.parse().unwrap());
    let page = world.page.unwrap_or(usize::MAX).min(asked);
    let mut items: Vec<Value> =
        all.skip(from).take(page.saturating_add(1)).map(|(_, object)| object.clone()).collect();
    let mut metadata = json!({"resourceVersion": world.version.to_string()});
    if items.len() > page {
        items.truncate(page);
        metadata["continue"] = (from + page).to_string().into();
    }
    whole(
        200,
        &json!({"kind": "List", "apiVersion": target.api_version(), "metadata": metadata, "items": items}),
    )
}

fn watched(
    world: Arc<Mutex<World>>,
    changed: watch::Receiver<()>,
    target: Target,
    query: &BTreeMap<String, String>,
) -> Response<Body> {
    let from: u64 = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
    let selector = query.get("fieldSelector").cloned().unwrap_or_default();
    let bookmarks = query.get("allowWatchBookmarks").is_some_and(|value| value == "true");
    if from < world.lock().unwrap().oldest {
        let gone = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired",
                          "message": "too old resource version"});
        let line = line("ERROR", &gone);
        return streamed(stream::iter([line]));
    }
    let ends = world.lock().unwrap().ends;
    let start = (world, changed, target, selector, bookmarks, from);
    let events =
        stream::unfold(start, move |(world, mut changed, target, selector, bookmarks, from)| async move {
            loop {
                let happened: Vec<Happened> = {
                    let world = world.lock().unwrap();
                    world.history.iter().filter(|happened| happened.version > from).cloned().collect()
                };
                let last = happened.last().map(|happened| happened.version);
                let lines: String = happened
                    .iter()
                    .filter_map(|happened| event(happened, &target, &selector, bookmarks))
                    .collect();
                if let (false, Some(last)) = (lines.is_empty(), last) {
                    return Some((lines, (world, changed, target, selector, bookmarks, last)));
                }
                if world.lock().unwrap().ends > ends {
                    return None;
                }
                changed.changed().await.ok()?;
            }
        });
    streamed(events)
}

fn event(happened: &Happened, target: &Target, selector: &str, bookmarks: bool) -> Option<String> {
    let version = happened.version.to_string();
    if happened.key.1 == "bookmarks" {
        let mark = json!({"kind": "Any", "apiVersion": target.api_version(), "metadata": {"resourceVersion": version}});
        return bookmarks.then(|| line("BOOKMARK", &mark));
    }
    if !target.has(&happened.key) {
        return None;
    }
    let there = |object: &Option<Value>| object.as_ref().is_some_and(|object| selected(selector, object));
    let (kind, object) = match (there(&happened.before), there(&happened.after)) {
        (false, true) => ("ADDED", happened.after.clone()?),
        (true, true) => ("MODIFIED", happened.after.clone()?),
        (true, false) => ("DELETED", happened.before.clone()?),
        (false, false) => return None,
    };
    let mut object = object;
    object["metadata"]["resourceVersion"] = version.into();
    object["apiVersion"] = target.api_version().into();
    object["kind"] = object["kind"].as_str().unwrap_or("Any").into();
    Some(line(kind, &object))
}

/// A merge patch of one object; `by_name`: one of its lists' entries too.
fn patch(
    (world, changed): (&Mutex<World>, &watch::Sender<()>),
    target: &Target,
    sent: &[u8],
    by_name: bool,
) -> Response<Body> {
    let patch: Value = serde_json::from_slice(sent).unwrap();
    let mut world = world.lock().unwrap();
    let Some(before) = world.objects.get(&target.key()).cloned() else { return status(404, "not found") };
    let uid = &patch["metadata"]["uid"];
    if !uid.is_null() && *uid != before["metadata"]["uid"] {
        return status(409, "the UID in the precondition does not match");
    }
    let version = &patch["metadata"]["resourceVersion"];
    if !version.is_null() && *version != before["metadata"]["resourceVersion"] {
        return status(409, "the object has been modified");
    }
    let mut after = before;
    merge(&mut after, &patch, by_name);
    let answer = placed(&mut world, target, &mut after, 200);
    drop(world);
    changed.send_replace(());
    answer
}

fn merge(into: &mut Value, patch: &Value, by_name: bool) {
    if let (true, Value::Array(entries), Value::Array(patches)) = (by_name, &mut *into, patch) {
        for patch in patches {
            match entries.iter_mut().find(|entry| entry["name"] == patch["name"]) {
                Some(entry) => merge(entry, patch, by_name),
                None => entries.push(patch.clone()),
            }
        }
        return;
    }
    let Value::Object(fields) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    let into = into.as_object_mut().unwrap();
    for (name, value) in fields {
        if value.is_null() {
            into.remove(name);
        } else {
            merge(into.entry(name.clone()).or_insert(Value::Null), value, by_name);
        }
    }
}

fn line(kind: &str, object: &Value) -> String {
    format!("{}\n", json!({"type": kind, "object": object}))
}

fn status(code: u16, message: &str) -> Response<Body> {
    let reason = if code == 404 { "NotFound" } else { "" };
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code,
                        "reason": reason});
    whole(code, &status)
}

pub(super) fn whole(code: u16, value: &Value) -> Response<Body> {
    let mut response = streamed(stream::iter([value.to_string()]));
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}

fn streamed(texts: impl Stream<Item = String> + Send + 'static) -> Response<Body> {
    let frames = texts.map(|text| Ok(Frame::data(Bytes::from(text))));
    Response::builder()
        .header("content-type", "application/json")
        .body(BodyExt::boxed_unsync(StreamBody::new(frames)))
        .unwrap()
}
