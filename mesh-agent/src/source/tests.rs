//! A directory of manifests as people change it. Every wait is for a receiver, never for a time.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use super::*;
use crate::state::{
    compile::{Change, Compiled},
    resource::Objects,
    snapshot::RouteAction,
};

mod named;
mod policies;

const HOST: &str = "a.default.svc.cluster.local";

fn service(name: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{ports: [{{port: 80}}]}}}}\n"
    )
}

fn routes_to(host: &str) -> String {
    format!(
        "{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: a}}, \
         spec: {{hosts: [a], http: [{{name: to-{host}, route: [{{destination: {{host: {host}}}}}]}}]}}}}\n"
    )
}

fn put(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    // As a careful writer does it: the file appears whole.
    let part = dir.join(format!(".{name}.part"));
    fs::write(&part, text).unwrap();
    fs::rename(&part, &path).unwrap();
    path
}

async fn start(dir: &Path) -> Source {
    directory(dir.to_owned(), Settings::default()).await.unwrap()
}

fn hosts(snapshot: &Snapshot) -> Vec<String> {
    let mut hosts: Vec<String> = snapshot.services.values().map(|service| service.name.to_string()).collect();
    hosts.sort();
    hosts
}

async fn until_hosts(source: &mut Source, expected: &[&str]) {
    source.snapshots.wait_for(|snapshot| hosts(snapshot) == expected).await.unwrap();
}

async fn until_problem(source: &mut Source, text: &str) -> Problem {
    let has = |problems: &Arc<[Problem]>| problems.iter().any(|problem| problem.to_string().contains(text));
    let problems = source.problems.wait_for(has).await.unwrap();
    problems.iter().find(|problem| problem.to_string().contains(text)).unwrap().clone()
}

async fn until_no_problem(source: &mut Source) {
    source.problems.wait_for(|problems| problems.is_empty()).await.unwrap();
}

fn first_route(source: &Source) -> String {
    let snapshot = source.snapshots.borrow();
    let routes = &snapshot.services[HOST].ports[0].routes;
    assert!(matches!(routes[0].action, RouteAction::Forward(_)));
    routes[0].name.to_string()
}

#[tokio::test]
async fn a_missing_directory_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("nowhere");
    let error = directory(missing.clone(), Settings::default()).await.unwrap_err();
    assert!(format!("{error:#}").contains(missing.to_str().unwrap()), "{error:#}");
    let file = put(dir.path(), "a.yaml", "");
    assert!(directory(file, Settings::default()).await.is_err());
}

#[tokio::test]
async fn an_empty_directory_is_a_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let source = start(dir.path()).await;
    assert_eq!(source.snapshots.borrow().revision, 1);
    assert!(source.problems.borrow().is_empty());
}

#[tokio::test]
async fn files_are_added_changed_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "a.yaml", &service("a"));
    put(dir.path(), "notes.txt", "not read");
    let mut source = start(dir.path()).await;
    assert_eq!(hosts(&source.snapshots.borrow()), ["a"]);
    let b = put(dir.path(), "b.yml", &format!("---\n{}---\n---\n{}", service("b"), service("c")));
    until_hosts(&mut source, &["a", "b", "c"]).await;
    put(dir.path(), "b.yml", &service("d"));
    until_hosts(&mut source, &["a", "d"]).await;
    let list = r#"{"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "e"}}]}"#;
    put(dir.path(), "e.json", list);
    until_hosts(&mut source, &["a", "d", "e"]).await;
    fs::remove_file(b).unwrap();
    until_hosts(&mut source, &["a", "e"]).await;
    // Written in place, by someone who does not rename.
    fs::write(dir.path().join("f.yaml"), service("f")).unwrap();
    until_hosts(&mut source, &["a", "e", "f"]).await;
    assert_eq!(source.snapshots.borrow().revision, source.counts.compiled.load(Ordering::Relaxed));
}

#[tokio::test]
async fn a_broken_file_keeps_its_last_good_state() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "a.yaml", &service("a"));
    put(dir.path(), "b.yaml", &service("b"));
    let mut source = start(dir.path()).await;
    let revision = source.snapshots.borrow().revision;
    put(dir.path(), "a.yaml", "kind: [");
    let problem = until_problem(&mut source, "not valid YAML").await;
    assert!(problem.file.ends_with("a.yaml") && problem.object.is_none());
    assert_eq!(hosts(&source.snapshots.borrow()), ["a", "b"]);
    assert_eq!(source.snapshots.borrow().revision, revision, "nothing was compiled");
    // A key given twice is an accident, not a choice.
    put(dir.path(), "a.yaml", "{apiVersion: v1, apiVersion: v2}");
    until_problem(&mut source, "duplicate").await;
    put(dir.path(), "a.yaml", &service("c"));
    until_no_problem(&mut source).await;
    until_hosts(&mut source, &["b", "c"]).await;
}

#[tokio::test]
async fn an_invalid_object_keeps_its_last_good_state_alone() {
    let dir = tempfile::tempdir().unwrap();
    let text = |routes: &str, name: &str| format!("{}---\n{}---\n{routes}", service("a"), service(name));
    put(dir.path(), "a.yaml", &text(&routes_to("a"), "b"));
    let mut source = start(dir.path()).await;
    assert_eq!(first_route(&source), "to-a");
    let broken = routes_to("b").replace("route:", "rout:");
    put(dir.path(), "a.yaml", &text(&broken, "c"));
    let problem = until_problem(&mut source, "unknown field").await;
    assert_eq!(problem.object.as_deref(), Some("VirtualService default/a"));
    assert_eq!(problem.field.as_deref(), Some("spec.http[0].rout"));
    until_hosts(&mut source, &["a", "c"]).await;
    assert_eq!(first_route(&source), "to-a");
    // Nobody can tell what this was: everything stays.
    put(dir.path(), "a.yaml", "{apiVersion: v1, kind: Service}");
    let problem = until_problem(&mut source, "is required (document 1)").await;
    assert_eq!(problem.field.as_deref(), Some("metadata.name"));
    assert_eq!(hosts(&source.snapshots.borrow()), ["a", "c"]);
    put(dir.path(), "a.yaml", &text(&routes_to("c"), "c"));
    until_no_problem(&mut source).await;
    source.snapshots.wait_for(|s| &*s.services[HOST].ports[0].routes[0].name == "to-c").await.unwrap();
}

#[tokio::test]
async fn one_file_has_an_object() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "a.yaml", &service("a"));
    put(dir.path(), "b.yaml", &(service("a") + "---\n" + &service("b") + "---\n" + &service("b")));
    let mut source = start(dir.path()).await;
    let problem = until_problem(&mut source, "has this object too").await;
    assert!(problem.file.ends_with("b.yaml") && problem.message.contains("a.yaml"), "{problem}");
    until_problem(&mut source, "twice").await;
    assert_eq!(source.problems.borrow().len(), 2);
    assert_eq!(source.counts.problems.load(Ordering::Relaxed), 2);
    fs::remove_file(dir.path().join("a.yaml")).unwrap();
    source.problems.wait_for(|problems| problems.len() == 1).await.unwrap();
    assert_eq!(hosts(&source.snapshots.borrow()), ["a", "b"]);
    assert_eq!(source.counts.problems.load(Ordering::Relaxed), 2, "what lasts is counted once");
}

#[tokio::test]
async fn problems_of_compiling_come_with_the_file() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "a.yaml", &service("a"));
    put(dir.path(), "routes.yaml", &routes_to("b"));
    let mut source = start(dir.path()).await;
    let problem = until_problem(&mut source, "no Service has the host b.default").await;
    assert!(problem.file.ends_with("routes.yaml"));
    assert_eq!(problem.field.as_deref(), Some("spec.http[0].route[0].destination.host"));
    put(dir.path(), "b.yaml", &service("b"));
    until_no_problem(&mut source).await;
}

#[tokio::test]
async fn a_mounted_config_map_is_swapped_whole() {
    let dir = tempfile::tempdir().unwrap();
    let data = |version: &str, name: &str| {
        let path = dir.path().join(version);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("a.yaml"), service(name)).unwrap();
    };
    let point_to = |version: &str| {
        symlink(version, dir.path().join("..tmp")).unwrap();
        fs::rename(dir.path().join("..tmp"), dir.path().join("..data")).unwrap();
    };
    data("..one", "a");
    point_to("..one");
    symlink("..data/a.yaml", dir.path().join("a.yaml")).unwrap();
    let mut source = start(dir.path()).await;
    assert_eq!(hosts(&source.snapshots.borrow()), ["a"]);
    data("..two", "b");
    point_to("..two");
    until_hosts(&mut source, &["b"]).await;
}

#[tokio::test]
async fn a_directory_that_goes_and_comes_back() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("config");
    fs::create_dir(&dir).unwrap();
    put(&dir, "a.yaml", &service("a"));
    let mut source = start(&dir).await;
    fs::rename(&dir, parent.path().join("away")).unwrap();
    until_problem(&mut source, "the directory cannot be read").await;
    assert_eq!(hosts(&source.snapshots.borrow()), ["a"]);
    fs::create_dir(&dir).unwrap();
    put(&dir, "b.yaml", &service("b"));
    until_hosts(&mut source, &["b"]).await;
    // And the new one is watched.
    put(&dir, "c.yaml", &service("c"));
    until_hosts(&mut source, &["b", "c"]).await;
    until_no_problem(&mut source).await;
}

#[tokio::test]
async fn rereading_finds_what_inotify_cannot_see() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let target = put(elsewhere.path(), "a.yaml", &service("a"));
    symlink(target, dir.path().join("a.yaml")).unwrap();
    let mut source = start(dir.path()).await;
    put(elsewhere.path(), "a.yaml", &service("b"));
    source.reread.reread();
    until_hosts(&mut source, &["b"]).await;
}

#[tokio::test]
async fn what_is_no_manifest_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("dir.yaml")).unwrap();
    fs::write(dir.path().join("bytes.yaml"), [0xff, 0xfe, 0x00]).unwrap();
    fs::write(dir.path().join("text.json"), "{").unwrap();
    nix::unistd::mkfifo(&dir.path().join("pipe.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let source = start(dir.path()).await;
    let problems: Vec<String> = source.problems.borrow().iter().map(ToString::to_string).collect();
    let expected = [
        "bytes.yaml: not valid YAML",
        "dir.yaml: the file cannot",
        "pipe.yaml: the file cannot",
        "text.json: not valid JSON",
    ];
    assert_eq!(problems.len(), expected.len(), "{problems:?}");
    for (problem, expected) in problems.iter().zip(expected) {
        assert!(problem.contains(expected), "{problem}");
    }
}

#[tokio::test]
async fn kinds_of_others_are_passed_over_and_ours_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let object = |api_version: &str, kind: &str| {
        format!("---\n{{apiVersion: {api_version}, kind: {kind}, metadata: {{name: x}}}}\n")
    };
    let foreign = [
        ("apps/v1", "Deployment"),
        ("apps/v1", "Deployment"),
        ("batch/v1", "Job"),
        ("v1", "PersistentVolumeClaim"),
        ("serving.knative.dev/v1", "Service"),
    ];
    let text: String = foreign.iter().map(|(api_version, kind)| object(api_version, kind)).collect();
    put(dir.path(), "a.yaml", &(service("a") + &text));
    let mut source = start(dir.path()).await;
    assert_eq!(source.problems.borrow().to_vec(), []);
    assert_eq!(hosts(&source.snapshots.borrow()), ["a"]);
    let mut directory = Directory::new(dir.path().to_owned());
    directory.read(&Look::Everything, &Objects::new());
    let named = [
        "Deployment (apps/v1)",
        "Job (batch/v1)",
        "PersistentVolumeClaim (v1)",
        "Service (serving.knative.dev/v1)",
    ];
    assert_eq!(directory.foreign().into_iter().collect::<Vec<_>>(), named);

    // What the mesh could be expected to read is a problem, and so is a typing error in its group.
    let ours = [
        ("networking.istio.io/v1", "Sidecar"),
        ("gateway.networking.k8s.io/v1", "Gateway"),
        ("telemetry.istio.io/v1", "Telemetry"),
        ("gateway.networking.k8s.io/v1", "HTTPRoute"),
        ("networking.istio.oi/v1", "VirtualService"),
        ("mesh.io/v1alpha1", "ServicePolicies"),
        ("v2", "Service"),
    ];
    let text: String = ours.iter().map(|(api_version, kind)| object(api_version, kind)).collect();
    put(dir.path(), "b.yaml", &text);
    let problems = source.problems.wait_for(|problems| problems.len() == ours.len()).await.unwrap();
    for (api_version, kind) in ours {
        let named =
            |problem: &Problem| problem.message.contains(&format!("kind {kind} (apiVersion {api_version})"));
        assert!(problems.iter().any(named), "{kind}: {problems:?}");
    }
}

#[test]
fn yaml_that_explodes_is_refused() {
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..12 {
        let before = format!("*a{}, ", i - 1).repeat(10);
        bomb.push_str(&["a", &i.to_string(), ": &a", &i.to_string(), " [", &before, "]\n"].concat());
    }
    for text in [bomb, "[".repeat(1_000), "{a: ".repeat(1_000), "a: &a [*a]".to_owned()] {
        let (objects, problems) = read_text(&text);
        assert!(objects.is_empty());
        assert_eq!(problems.len(), 1, "{problems:?}");
    }
}

#[tokio::test]
async fn the_watch_ends_with_its_receivers() {
    let dir = tempfile::tempdir().unwrap();
    let Source { snapshots, mut problems, .. } = start(dir.path()).await;
    drop(snapshots);
    assert!(problems.changed().await.is_err(), "the sender is gone");
}

/// Names of the files of a directory that somebody opens, until a file of this name is there.
fn opened(
    dir: &Path,
    end: &'static str,
) -> (notify::RecommendedWatcher, std::sync::mpsc::Receiver<BTreeSet<String>>) {
    use notify::{Event, EventKind, RecursiveMode, Watcher as _, event::AccessKind};
    let (told, all) = std::sync::mpsc::channel();
    let mut names = BTreeSet::new();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        let event = event.unwrap();
        let path = &event.paths[0];
        let name = path.file_name().unwrap_or_default().to_str().unwrap().to_owned();
        if name == end {
            let _ = told.send(std::mem::take(&mut names));
        } else if matches!(event.kind, EventKind::Access(AccessKind::Open(_))) && !name.starts_with('.') {
            names.insert(name);
        }
    })
    .unwrap();
    watcher.watch(dir, RecursiveMode::NonRecursive).unwrap();
    (watcher, all)
}

/// Counted, not timed: what has not changed is not read.
#[tokio::test(flavor = "multi_thread")]
async fn of_many_files_only_the_one_that_changed_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..100 {
        put(dir.path(), &format!("{number}.yaml"), &service(&format!("s{number}")));
    }
    let mut source = start(dir.path()).await;
    let (_watcher, names) = opened(dir.path(), "end.txt");
    put(dir.path(), "7.yaml", &service("other"));
    source.snapshots.wait_for(|snapshot| hosts(snapshot).contains(&"other".to_owned())).await.unwrap();
    fs::remove_file(dir.path().join("9.yaml")).unwrap();
    source.snapshots.wait_for(|snapshot| snapshot.services.len() == 99).await.unwrap();
    fs::write(dir.path().join("end.txt"), "").unwrap();
    assert_eq!(names.recv().unwrap().into_iter().collect::<Vec<_>>(), ["7.yaml"]);
}

/// Of a file with many objects only those are taken anew that are written otherwise.
#[test]
fn objects_that_are_written_as_before_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let text = |names: &[&str]| names.iter().map(|name| service(name)).collect::<Vec<_>>().join("---\n");
    put(dir.path(), "a.yaml", &text(&["a", "b", "c"]));
    let mut directory = Directory::new(dir.path().to_owned());
    let mut compiled = Compiled::new(Settings::default());
    let mut read = |look: Look| {
        let changes = directory.read(&look, compiled.objects());
        let names = changes.iter().map(|change| match change {
            Change::Set(key, _) => format!("+{}", key.name),
            Change::Gone(key) => format!("-{}", key.name),
        });
        let names: Vec<String> = names.collect();
        compiled.apply(changes);
        names
    };
    let entries = |names: &[&str]| Look::Entries(names.iter().map(Into::into).collect());
    assert_eq!(read(Look::Anything), ["+a", "+b", "+c"]);
    put(dir.path(), "a.yaml", &text(&["c", "d", "a"]).replace("kind: Service, ", "kind:  'Service' , "));
    assert_eq!(read(entries(&["a.yaml"])), ["+d", "-b"]);
    // Another file has it too, and comes after it; and then before it.
    put(dir.path(), "b.yaml", &text(&["d", "e"]));
    assert_eq!(read(entries(&["b.yaml"])), ["+e"]);
    put(dir.path(), "0.yaml", &text(&["a"]));
    assert_eq!(read(entries(&["0.yaml", ".hidden", "notes.txt"])), ["+a"]);
    fs::remove_file(dir.path().join("0.yaml")).unwrap();
    fs::remove_file(dir.path().join("a.yaml")).unwrap();
    let mut gone = read(entries(&["0.yaml", "a.yaml"]));
    gone.sort();
    assert_eq!(gone, ["+d", "-a", "-c"]);
    assert_eq!(read(Look::Everything), [""; 0]);
}
