//! An API server in this process: lists in pages, watches with bookmarks, discovery, merge patches; what it is asked is kept.
//!
//! It can be stopped and started again, cut the connections it has, forget old versions, and refuse kinds.

mod answer;
mod exec;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, mpsc},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use kube::Config;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use self::answer::answer;
pub(crate) use self::exec::{Ran, Run};
use super::super::Cluster;

/// Group and plural, namespace, name.
type Key = (String, String, String, String);
type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What became of an object.
#[derive(Clone)]
struct Happened {
    version: u64,
    key: Key,
    before: Option<Value>,
    after: Option<Value>,
}

#[derive(Default)]
struct World {
    version: u64,
    objects: BTreeMap<Key, Value>,
    history: Vec<Happened>,
    /// Versions before this one are forgotten.
    oldest: u64,
    /// `GROUP/VERSION` to plurals.
    served: BTreeMap<String, BTreeSet<String>>,
    /// Plurals that nobody may list.
    forbidden: BTreeSet<String>,
    /// What is run in containers.
    run: Option<Run>,
    /// Whether whoever asks what they may do may nothing.
    denies: bool,
    /// How often watches were ended.
    ends: u64,
    /// Of pages.
    page: Option<usize>,
    /// Whether nothing may be patched.
    read_only: bool,
    /// Whether nothing is answered.
    silent: bool,
    /// Method and target of each request.
    asked: Vec<String>,
    /// What the last request has shown.
    authorization: String,
    /// Tasks of connections.
    connections: Vec<JoinHandle<()>>,
}

/// While it is there, nothing but a test moves a paused clock, also while a server is waited for.
pub(crate) struct Still(#[expect(dead_code, reason = "its end is what is waited for")] mpsc::Sender<()>);

impl Still {
    /// From now on.
    pub fn stand() -> Self {
        let (until, ended) = mpsc::channel();
        tokio::task::spawn_blocking(move || {
            let _ = ended.recv();
        });
        Self(until)
    }

    /// Lets time pass, and everything come to its end that this leads to at once.
    pub async fn pass(&self, time: Duration) {
        tokio::time::advance(time).await;
        for _ in 0..200 {
            tokio::task::yield_now().await;
        }
    }
}

/// The server.
pub(crate) struct Fake {
    world: Arc<Mutex<World>>,
    /// Sent to after every change.
    changed: watch::Sender<()>,
    address: SocketAddr,
    accepting: Mutex<Option<JoinHandle<()>>>,
}

impl Fake {
    /// One that serves nothing but Kubernetes' own kinds, and has no objects.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let fake = Self {
            world: Arc::default(),
            changed: watch::channel(()).0,
            address,
            accepting: Mutex::default(),
        };
        // No version is 0 for an API server.
        fake.world().version = 1;
        fake.accept(listener);
        fake
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    fn accept(&self, listener: TcpListener) {
        let (world, changed) = (Arc::clone(&self.world), self.changed.clone());
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (of_connection, changed) = (Arc::clone(&world), changed.clone());
                let service =
                    service_fn(move |request| answer(Arc::clone(&of_connection), changed.clone(), request));
                let connection =
                    http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades();
                world.lock().unwrap().connections.push(tokio::spawn(async move { drop(connection.await) }));
            }
        });
        *self.accepting.lock().unwrap() = Some(accepting);
    }

    /// Ends every connection, in the middle of whatever it says.
    pub fn cut(&self) {
        for connection in self.world().connections.drain(..) {
            connection.abort();
        }
    }

    /// Nobody listens on its port any more.
    pub async fn stop(&self) {
        let accepting = self.accepting.lock().unwrap().take();
        if let Some(accepting) = accepting {
            accepting.abort();
            drop(accepting.await);
        }
        self.cut();
    }

    /// After a stop, on the same port.
    pub async fn go_on(&self) {
        self.accept(TcpListener::bind(self.address).await.unwrap());
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What is run in every container from now on.
    pub fn runs(&self, run: impl Fn(&str, &[String]) -> Ran + Send + Sync + 'static) {
        self.world().run = Some(Arc::new(run));
    }

    /// What whoever asks is told of what they may do.
    pub fn allow(&self, allowed: bool) {
        self.world().denies = !allowed;
    }
    /// It, as a client has it.
    pub fn cluster(&self) -> Cluster {
        Cluster::of(Config::new(self.url().parse().unwrap())).unwrap()
    }

    /// Whether it takes requests and answers none.
    pub fn be_silent(&self, silent: bool) {
        self.world().silent = silent;
        self.changed.send_replace(());
    }

    /// Pages of lists are no larger.
    pub fn pages_of(&self, size: usize) {
        self.world().page = Some(size);
    }

    /// Whether this kind may be listed and watched.
    pub fn forbid(&self, plural: &str, forbidden: bool) {
        let mut world = self.world();
        if forbidden {
            world.forbidden.insert(plural.to_owned())
        } else {
            world.forbidden.remove(plural)
        };
    }

    /// Whether nothing may be patched.
    pub fn forbid_writing(&self, forbidden: bool) {
        self.world().read_only = forbidden;
    }

    /// Serves a kind in these versions alone.
    pub fn serve(&self, group: &str, plural: &str, versions: &[&str]) {
        let mut world = self.world();
        for (served, plurals) in &mut world.served {
            if served.starts_with(&format!("{group}/")) {
                plurals.remove(plural);
            }
        }
        for version in versions {
            world.served.entry(format!("{group}/{version}")).or_default().insert(plural.to_owned());
        }
    }

    /// Defines a kind: it is served, and there is a definition.
    pub fn define(&self, group: &str, plural: &str, versions: &[&str]) {
        self.serve(group, plural, versions);
        let definition = json!({"metadata": {"name": format!("{plural}.{group}")}});
        self.put("apiextensions.k8s.io", "customresourcedefinitions", definition);
    }

    /// Puts an object there, as it is or in place of the one before. Plurals are as in paths.
    pub fn put(&self, group: &str, plural: &str, mut object: Value) {
        let mut world = self.world();
        world.version += 1;
        let version = world.version;
        let key = key(group, plural, &object);
        let before = world.objects.get(&key).cloned();
        let metadata = object["metadata"].as_object_mut().unwrap();
        metadata.insert("resourceVersion".to_owned(), version.to_string().into());
        let uid = before.as_ref().map(|before| before["metadata"]["uid"].clone());
        metadata.entry("uid").or_insert_with(|| uid.unwrap_or_else(|| format!("uid-{version}").into()));
        metadata.insert("managedFields".to_owned(), json!([{"manager": "fake", "operation": "Update"}]));
        world.objects.insert(key.clone(), object.clone());
        world.history.push(Happened { version, key, before, after: Some(object) });
        drop(world);
        self.changed.send_replace(());
    }

    /// Takes an object away.
    pub fn delete(&self, group: &str, plural: &str, namespace: &str, name: &str) {
        let mut world = self.world();
        world.version += 1;
        let key = (group.to_owned(), plural.to_owned(), namespace.to_owned(), name.to_owned());
        let before = Some(world.objects.remove(&key).unwrap());
        let version = world.version;
        world.history.push(Happened { version, key, before, after: None });
        drop(world);
        self.changed.send_replace(());
    }

    /// An object of the core group as it is now.
    pub fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        self.get_of("", plural, namespace, name)
    }

    /// An object as it is now.
    pub fn get_of(&self, group: &str, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = (group.to_owned(), plural.to_owned(), namespace.to_owned(), name.to_owned());
        self.world().objects.get(&key).cloned()
    }

    /// All objects of a kind.
    pub fn all(&self, group: &str, plural: &str) -> Vec<Value> {
        let world = self.world();
        let all = world.objects.iter().filter(|(key, _)| key.0 == group && key.1 == plural);
        all.map(|(_, object)| object.clone()).collect()
    }

    /// Tells every watch which version it is.
    pub fn bookmark(&self) {
        let mut world = self.world();
        world.version += 1;
        let key = (String::new(), "bookmarks".to_owned(), String::new(), String::new());
        let version = world.version;
        world.history.push(Happened { version, key, before: None, after: None });
        drop(world);
        self.changed.send_replace(());
    }

    /// Ends every watch in order, once it has told everything.
    pub fn end_watches(&self) {
        self.world().ends += 1;
        self.changed.send_replace(());
    }

    /// Forgets all versions but the one it is.
    pub fn forget(&self) {
        let mut world = self.world();
        world.oldest = world.version;
    }

    /// What was asked so far that contains this.
    pub fn asked(&self, text: &str) -> Vec<String> {
        self.world().asked.iter().filter(|asked| asked.contains(text)).cloned().collect()
    }

    /// The `authorization` of the last request.
    pub fn authorization(&self) -> String {
        self.world().authorization.clone()
    }

    /// Forgets what was asked.
    pub fn forget_asked(&self) {
        self.world().asked.clear();
    }

    /// Waits until every connection has ended.
    pub async fn until_unused(&self) {
        let connections: Vec<_> = self.world().connections.drain(..).collect();
        for connection in connections {
            connection.await.unwrap();
        }
    }

    /// Waits until something was asked so many times, or more.
    pub async fn until_asked(&self, text: &str, times: usize) {
        self.until(|fake| fake.asked(text).len() >= times).await;
    }

    /// Waits until something is so.
    pub async fn until(&self, is_so: impl Fn(&Self) -> bool) {
        let mut changed = self.changed.subscribe();
        while !is_so(self) {
            changed.changed().await.unwrap();
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(accepting) = self.accepting.lock().unwrap().take() {
            accepting.abort();
        }
        self.cut();
    }
}

fn key(group: &str, plural: &str, object: &Value) -> Key {
    let text = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
    (group.to_owned(), plural.to_owned(), text("namespace"), text("name"))
}
