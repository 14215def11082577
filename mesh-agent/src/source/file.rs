//! One file of manifests: when it is read, and what of it is in force.
//!
//! Promises that what becomes invalid keeps its last good state, and that an object which is written as before is the very
//! same. The only place that knows YAML. Tested in `tests.rs` beside it.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    ffi::OsStr,
    fs::Metadata,
    hash::{DefaultHasher, Hash, Hasher},
    io::{ErrorKind, Read},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
    time::SystemTime,
};

use serde::Deserialize;
use serde_json::Value;

use crate::state::{
    Cause, Problem,
    resource::{
        self, Object, ObjectKey, Origin, Refused, Resource, authorization_policy,
        besides::besides,
        field::{FieldError, under},
        mesh_config,
    },
};

/// Largest file that is read, in bytes.
pub(super) const LARGEST: u64 = 16 * 1024 * 1024;

/// One file.
#[derive(Debug, Default)]
pub(super) struct File {
    /// Of the content that was read last.
    hash: Option<u64>,
    /// How the file looked before that; `None`: that tells nothing.
    looks: Option<Looks>,
    /// Whether its content may change without a word about its name.
    pub is_link: bool,
    /// The last good state.
    pub objects: Vec<Held>,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
    /// Kinds of its objects that were passed over.
    pub foreign: BTreeSet<String>,
    /// Files that its objects name.
    pub names: BTreeSet<Arc<str>>,
    /// Those that `Gateway`s name.
    pub gateways_names: BTreeSet<Arc<str>>,
}

/// An object of a file.
#[derive(Debug, Clone)]
pub(super) struct Held {
    /// Which one.
    pub key: ObjectKey,
    /// What it says.
    pub object: Arc<Object>,
    /// Of what is written; `None`: it is not read from what is written now.
    hash: Option<u64>,
}

/// How a file looks from outside: a change of its content shows in it, but for one right after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Looks {
    identity: (u64, u64),
    len: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Looks {
    pub fn of(meta: &Metadata) -> Self {
        Self {
            identity: (meta.dev(), meta.ino()),
            len: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// The same, where a change that comes after this look will show.
    pub fn settled(self) -> Option<Self> {
        self.tells(SystemTime::now()).then_some(self)
    }

    /// Whether a change that comes now is seen by the time it leaves: clocks of files are coarse, and some file systems
    /// count seconds.
    fn tells(&self, now: SystemTime) -> bool {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed());
        self.changed.0 + 2 < now && self.modified.0 + 2 < now
    }
}

/// A hash of it that holds for this process.
pub(super) fn hash_of(content: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    hasher.finish()
}

/// What came of looking at a file.
pub(super) enum Outcome {
    /// It says what it said.
    Same,
    /// It says something else than these.
    Taken(Vec<Held>),
    /// It is not there.
    Gone,
}

impl File {
    /// Reads the file, if its look has changed or it is to be read `whole`, and takes its content over if that has changed.
    pub fn read(&mut self, path: &Path, whole: bool) -> Outcome {
        let looks = std::fs::metadata(path).map(|meta| Looks::of(&meta)).ok();
        if !whole && looks.is_some() && self.looks == looks {
            return Outcome::Same;
        }
        self.looks = looks.and_then(Looks::settled);
        self.is_link =
            std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_symlink() || meta.nlink() > 1);
        let content = match content(path) {
            Ok(content) => content,
            Err(error) if error.kind() == ErrorKind::NotFound => return Outcome::Gone,
            Err(error) => {
                (self.hash, self.looks) = (None, None);
                self.problems = vec![problem(path, format!("the file cannot be read: {error}"))];
                return Outcome::Same;
            }
        };
        let hash = Some(hash_of(&content));
        if self.hash == hash {
            return Outcome::Same;
        }
        self.hash = hash;
        self.take(path, &content)
    }

    /// Takes new content over, as far as it is good.
    pub fn take(&mut self, path: &Path, content: &[u8]) -> Outcome {
        match parsed(path, content) {
            Ok(documents) => self.take_documents(path, &documents),
            Err(message) => {
                self.problems = vec![problem(path, message)];
                Outcome::Same
            }
        }
    }

    /// Takes new documents over, as far as they are good.
    pub fn take_documents(&mut self, path: &Path, documents: &[Value]) -> Outcome {
        let name: Arc<str> = path.to_string_lossy().into();
        self.problems.clear();
        let before = std::mem::take(&mut self.objects);
        let known = before.iter().filter_map(|held| Some((held.hash?, held))).collect();
        let (mut fresh, mut seen, mut refused) = (Vec::new(), HashSet::new(), Vec::new());
        let mut names = HashSet::new();
        let (found, foreign) = read_all(documents, &known);
        self.foreign = foreign;
        for (found, written) in found {
            let held = match found {
                Found::AsBefore(held) => held.clone(),
                Found::Anew(hash, Ok((mut key, resource))) => {
                    share(&mut names, &mut key.kind);
                    share(&mut names, &mut key.namespace);
                    let object = Arc::new(Object { file: Arc::clone(&name), resource });
                    Held { key, object, hash: Some(hash) }
                }
                Found::Anew(_, Err(error)) => {
                    refused.push((error, written));
                    continue;
                }
            };
            if seen.insert(held.key.clone()) {
                fresh.push(held);
            } else {
                self.problems.push(Problem {
                    object: Some(held.key.to_string()),
                    cause: Cause::Conflict,
                    ..problem(path, "the file has this object twice; the first holds".to_owned())
                });
            }
        }
        self.keep(&name, (&before, fresh), &seen, &refused);
        Outcome::Taken(before)
    }

    /// Of what was refused the last good state stays; of a policy that there never was a good state of, what refuses in
    /// its place.
    fn keep(
        &mut self,
        name: &Arc<str>,
        (before, mut fresh): (&[Held], Vec<Held>),
        seen: &HashSet<ObjectKey>,
        refused: &[(Refused, &Value)],
    ) {
        let causes = || refused.iter().map(|(refused, _)| refused);
        self.problems.extend(causes().map(|refused| refused.problem(name)));
        // Of a manifest that does not say what it is, any object may be the last good state.
        let unnamed = causes().any(|refused| refused.key.is_none());
        let named: HashSet<&ObjectKey> = causes().filter_map(|refused| refused.key.as_ref()).collect();
        let old = before.iter().filter(|held| !held.object.is_stand_in());
        let old = old.filter(|held| !seen.contains(&held.key) && (unnamed || named.contains(&held.key)));
        fresh.extend(old.cloned());
        let mut known: HashSet<ObjectKey> = fresh.iter().map(|held| held.key.clone()).collect();
        for (refused, written) in refused {
            let Some(key) = &refused.key else { continue };
            let Some(policy) = authorization_policy::stand_in(key, written) else { continue };
            if known.insert(key.clone()) {
                let resource = Resource::AuthorizationPolicy(Box::new(policy));
                let object = Arc::new(Object { file: Arc::clone(name), resource });
                fresh.push(Held { key: key.clone(), object, hash: None });
            }
        }
        fresh.shrink_to_fit();
        (self.names, self.gateways_names) = (BTreeSet::new(), BTreeSet::new());
        for held in &fresh {
            match &held.object.resource {
                Resource::DestinationRule(rule) => self.names.extend(rule.files().cloned()),
                Resource::Gateway(gateway) => self.gateways_names.extend(gateway.files().cloned()),
                _ => {}
            }
        }
        self.objects = fresh;
    }
}

/// Has a text be the same allocation as an equal one before.
pub(super) fn share(known: &mut HashSet<Arc<str>>, text: &mut Arc<str>) {
    match known.get(text) {
        Some(same) => *text = Arc::clone(same),
        None => drop(known.insert(Arc::clone(text))),
    }
}

/// A problem of a file as a whole.
pub(super) fn problem(path: &Path, message: String) -> Problem {
    let file = path.to_string_lossy().into_owned();
    Problem { file, object: None, field: None, message, cause: Cause::Invalid }
}

/// The documents of a file: JSON where its name says so, else YAML.
pub(super) fn parsed(path: &Path, content: &[u8]) -> Result<Vec<Value>, String> {
    let json = path.extension() == Some(OsStr::new("json"));
    let parsed = str::from_utf8(content)
        .map_err(|error| error.to_string())
        .and_then(|text| if json { json_documents(text) } else { documents(text) });
    parsed.map_err(|error| format!("not valid {}: {error}", if json { "JSON" } else { "YAML" }))
}

/// The content of a regular file of bearable size; links are followed.
pub(super) fn content(path: &Path) -> std::io::Result<Vec<u8>> {
    // Looked at before it is opened: opening a pipe would wait for a writer.
    let meta = std::fs::metadata(path)?;
    if !meta.is_file() {
        return Err(std::io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut content = Vec::new();
    std::fs::File::open(path)?.take(LARGEST + 1).read_to_end(&mut content)?;
    if content.len() as u64 > LARGEST {
        return Err(std::io::Error::new(ErrorKind::FileTooLarge, format!("larger than {LARGEST} bytes")));
    }
    Ok(content)
}

/// The documents of a YAML stream, empty ones left out. All or none.
fn documents(text: &str) -> Result<Vec<Value>, String> {
    let mut documents = Vec::new();
    for document in serde_yaml::Deserializer::from_str(text) {
        // Through YAML's own value: it refuses a key given twice, which JSON's would pass over.
        let mut value = serde_yaml::Value::deserialize(document).map_err(|error| error.to_string())?;
        value.apply_merge().map_err(|error| error.to_string())?;
        if !value.is_null() {
            documents.push(serde_json::to_value(value).map_err(|error| error.to_string())?);
        }
    }
    Ok(documents)
}

fn json_documents(text: &str) -> Result<Vec<Value>, String> {
    let values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    values.collect::<Result<_, _>>().map_err(|error| error.to_string())
}

/// What came of reading an object.
pub(super) type ReadResult = Result<(ObjectKey, Resource), Refused>;

/// Reads one object; the text of the mesh-wide settings, which is YAML within it, too.
pub(super) fn read_object(object: &Value, origin: Origin) -> ReadResult {
    let (key, resource) = resource::read(object, origin)?;
    let Some(text) = mesh_config::text(&key, object) else { return Ok((key, resource)) };
    let settings = match documents(text) {
        Ok(mut all) if all.len() <= 1 => mesh_config::check(&all.pop().unwrap_or_default()),
        Ok(_) => Err(FieldError::new("", "is several YAML documents")),
        Err(error) => Err(FieldError::new("", format!("not valid YAML: {error}"))),
    };
    match settings.map_err(under("data.mesh")) {
        Ok(settings) => Ok((key, Resource::MeshConfig(Box::new(settings)))),
        Err(error) => Err(Refused { key: Some(key), error }),
    }
}

/// What is wrong with an object that was refused besides that.
pub(super) fn read_on(
    object: &Value,
    origin: Origin,
    refused: &Refused,
) -> impl Iterator<Item = Refused> + use<> {
    let first = |object: &Value| read_object(object, origin).err().map(|refused| refused.error);
    let key = refused.key.clone();
    let more = if key.is_some() { besides(object, &refused.error, first) } else { Vec::new() };
    more.into_iter().map(move |error| Refused { key: key.clone(), error })
}

/// The objects of a document: those of a List, or it alone.
pub(super) fn objects_of(document: &Value) -> &[Value] {
    let list = document["kind"] == "List" && document["apiVersion"] == "v1";
    match document["items"].as_array().filter(|_| list) {
        Some(items) => items,
        None => std::slice::from_ref(document),
    }
}

/// What is found of a manifest.
enum Found<'k> {
    /// It is written as it was.
    AsBefore(&'k Held),
    /// It has this hash.
    Anew(u64, ReadResult),
}

/// Reads each object, those of Lists too, but for those that are written as before; and the kinds that were passed over.
fn read_all<'v, 'k>(
    documents: &'v [Value],
    before: &HashMap<u64, &'k Held>,
) -> (Vec<(Found<'k>, &'v Value)>, BTreeSet<String>) {
    let (mut found, mut foreign) = (Vec::new(), BTreeSet::new());
    let mut read = |object, at: String| {
        if let Some(kind) = foreign_kind(object) {
            foreign.insert(kind);
            return;
        }
        let hash = hash_of(object);
        let known = before.get(&hash).map(|held| Found::AsBefore(held));
        let known =
            known.unwrap_or_else(|| Found::Anew(hash, place(read_object(object, Origin::Manifest), &at)));
        found.push((known, object));
    };
    for (i, document) in documents.iter().enumerate() {
        let list = document["kind"] == "List" && document["apiVersion"] == "v1";
        match document["items"].as_array().filter(|_| list) {
            None => read(document, format!("document {}", i + 1)),
            Some(items) => {
                for (j, item) in items.iter().enumerate() {
                    read(item, format!("document {}, item {}", i + 1, j + 1));
                }
            }
        }
    }
    (found, foreign)
}

/// Kinds of Kubernetes' own that the mesh reads, some only to check them.
const KUBERNETES_KINDS: [&str; 8] =
    ["Namespace", "Pod", "Service", "Node", "ServiceAccount", "Secret", "ConfigMap", "EndpointSlice"];
/// Kinds that nobody else has: in another group than Istio's they are a typing error.
const ISTIO_KINDS: [&str; 2] = ["VirtualService", "DestinationRule"];

/// The kind of an object that is somebody else's business (a Deployment, a Job). What does not say what it is, and kinds
/// of Istio, of the Gateway API and of the mesh's own group that are not supported, are not: those have to be told.
fn foreign_kind(object: &Value) -> Option<String> {
    let text = |name: &str| object[name].as_str().filter(|text| !text.is_empty());
    let (api_version, kind) = (text("apiVersion")?, text("kind")?);
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    let ours = match group {
        "" | "discovery.k8s.io" => KUBERNETES_KINDS.contains(&kind),
        "gateway.networking.k8s.io" | "mesh.io" => true,
        _ => group.ends_with(".istio.io") || ISTIO_KINDS.contains(&kind),
    };
    (!ours).then(|| format!("{kind} ({api_version})"))
}

/// Says where in the file a manifest stands that does not say what it is.
fn place(mut result: ReadResult, place: &str) -> ReadResult {
    if let Err(refused) = &mut result
        && refused.key.is_none()
    {
        refused.error.message = format!("{} ({place})", refused.error.message);
    }
    result
}

/// The documents of a YAML text as JSON, empty ones left out. All or none.
///
/// # Errors
/// When the text is not YAML; the error says where.
pub fn read_documents(text: &str) -> Result<Vec<Value>, String> {
    documents(text)
}
