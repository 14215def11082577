//! A directory of manifests: `*.yaml`, `*.yml` and `*.json`, each with any number of documents or Lists.
//!
//! Promises that a file or object that becomes invalid keeps its last good state, that a deleted file's objects go,
//! and that there is one object per kind, namespace and name: the first file (by name) that has it. Objects of kinds
//! that are none of the mesh's business are passed over. The only place that knows YAML. Tested in `tests.rs` beside it.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, btree_map::Entry},
    ffi::OsStr,
    hash::{DefaultHasher, Hash, Hasher},
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use serde::Deserialize;
use serde_json::Value;

use crate::state::{
    Problem,
    resource::{
        self, Object, ObjectKey, Objects, Refused, Resource, authorization_policy,
        field::{FieldError, under},
        mesh_config,
    },
};

/// Largest file that is read, in bytes.
const LARGEST: u64 = 16 * 1024 * 1024;

/// What a directory held when it was last read.
#[derive(Debug)]
pub struct Directory {
    dir: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// Why the directory as a whole cannot be read.
    problem: Option<Problem>,
}

/// One file.
#[derive(Debug, Default)]
struct File {
    /// Of the content that was read last.
    hash: Option<u64>,
    /// The last good state.
    objects: Vec<(ObjectKey, Arc<Object>)>,
    problems: Vec<Problem>,
    /// Kinds of its objects that were passed over.
    foreign: BTreeSet<String>,
}

impl Directory {
    /// Nothing read yet.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, files: BTreeMap::new(), problem: None }
    }

    /// Whether the directory can be listed.
    pub fn check(&self) -> anyhow::Result<()> {
        std::fs::read_dir(&self.dir)
            .with_context(|| format!("cannot read the directory of manifests {}", self.dir.display()))?;
        Ok(())
    }

    /// Reads what changed. While the directory cannot be listed, everything keeps its last good state.
    pub fn read(&mut self) {
        let listed = match manifests(&self.dir) {
            Ok(listed) => listed,
            Err(error) => {
                let message = format!("the directory cannot be read, what it held stays in force: {error}");
                self.problem = Some(problem(&self.dir, message));
                return;
            }
        };
        self.problem = None;
        let mut before = std::mem::take(&mut self.files);
        for path in listed {
            let mut file = before.remove(&path).unwrap_or_default();
            if file.read(&path) {
                self.files.insert(path, file);
            }
        }
    }

    /// Kinds of objects that are here and not the mesh's, as `kind (apiVersion)`.
    pub fn foreign(&self) -> BTreeSet<String> {
        self.files.values().flat_map(|file| &file.foreign).cloned().collect()
    }

    /// All objects, and what is wrong with the files.
    pub fn merge(&self) -> (Objects, Vec<Problem>) {
        let mut objects = Objects::new();
        let mut problems: Vec<Problem> = self.problem.iter().cloned().collect();
        for (path, file) in &self.files {
            problems.extend_from_slice(&file.problems);
            for (key, object) in &file.objects {
                match objects.entry(key.clone()) {
                    Entry::Vacant(entry) => {
                        entry.insert(Arc::clone(object));
                    }
                    Entry::Occupied(mut entry) if entry.get().is_stand_in() => {
                        entry.insert(Arc::clone(object));
                    }
                    Entry::Occupied(entry) => problems.push(Problem {
                        object: Some(key.to_string()),
                        ..problem(
                            path,
                            format!("{} has this object too, and holds; remove one", entry.get().file),
                        )
                    }),
                }
            }
        }
        (objects, problems)
    }
}

impl File {
    /// Reads the file if its content changed; false when it is gone.
    fn read(&mut self, path: &Path) -> bool {
        let content = match content(path) {
            Ok(content) => content,
            Err(error) if error.kind() == ErrorKind::NotFound => return false,
            Err(error) => {
                self.hash = None;
                self.problems = vec![problem(path, format!("the file cannot be read: {error}"))];
                return true;
            }
        };
        let mut hasher = DefaultHasher::new();
        content.hash(&mut hasher);
        let hash = Some(hasher.finish());
        if self.hash != hash {
            self.hash = hash;
            self.take(path, &content);
        }
        true
    }

    /// Takes new content over, as far as it is good.
    fn take(&mut self, path: &Path, content: &[u8]) {
        let json = path.extension() == Some(OsStr::new("json"));
        let parsed = str::from_utf8(content)
            .map_err(|error| error.to_string())
            .and_then(|text| if json { json_documents(text) } else { documents(text) });
        let documents = match parsed {
            Ok(documents) => documents,
            Err(error) => {
                let message = format!("not valid {}: {error}", if json { "JSON" } else { "YAML" });
                self.problems = vec![problem(path, message)];
                return;
            }
        };
        let name: Arc<str> = path.to_string_lossy().into();
        self.problems.clear();
        let mut fresh: Vec<(ObjectKey, Arc<Object>)> = Vec::new();
        let mut seen = HashSet::new();
        let mut refused = Vec::new();
        let (results, foreign) = read_all(&documents);
        self.foreign = foreign;
        for (result, written) in results {
            match result {
                Ok((key, resource)) if seen.insert(key.clone()) => {
                    let file = Arc::clone(&name);
                    fresh.push((key, Arc::new(Object { file, resource })));
                }
                Ok((key, _)) => self.problems.push(Problem {
                    object: Some(key.to_string()),
                    ..problem(path, "the file has this object twice; the first holds".to_owned())
                }),
                Err(error) => refused.push((error, written)),
            }
        }
        self.keep(&name, fresh, &seen, &refused);
    }

    /// Of what was refused the last good state stays; of a policy that there never was a good state of, what refuses in
    /// its place.
    fn keep(
        &mut self,
        name: &Arc<str>,
        mut fresh: Vec<(ObjectKey, Arc<Object>)>,
        seen: &HashSet<ObjectKey>,
        refused: &[(Refused, &Value)],
    ) {
        let causes = || refused.iter().map(|(refused, _)| refused);
        self.problems.extend(causes().map(|refused| refused.problem(name)));
        // Of a manifest that does not say what it is, any object may be the last good state.
        let unnamed = causes().any(|refused| refused.key.is_none());
        let named: HashSet<&ObjectKey> = causes().filter_map(|refused| refused.key.as_ref()).collect();
        let old = std::mem::take(&mut self.objects).into_iter().filter(|(_, object)| !object.is_stand_in());
        let old = old.filter(|(key, _)| !seen.contains(key) && (unnamed || named.contains(key)));
        fresh.extend(old);
        let mut known: HashSet<ObjectKey> = fresh.iter().map(|(key, _)| key.clone()).collect();
        for (refused, written) in refused {
            let Some(key) = &refused.key else { continue };
            let Some(policy) = authorization_policy::stand_in(key, written) else { continue };
            if known.insert(key.clone()) {
                let resource = Resource::AuthorizationPolicy(Box::new(policy));
                fresh.push((key.clone(), Arc::new(Object { file: Arc::clone(name), resource })));
            }
        }
        self.objects = fresh;
    }
}

fn problem(path: &Path, message: String) -> Problem {
    Problem { file: path.to_string_lossy().into_owned(), object: None, field: None, message }
}

/// The manifests of a directory, by name; hidden files are none (a mounted `ConfigMap` keeps its data in one).
fn manifests(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        let manifest = path.extension().is_some_and(|extension| {
            [OsStr::new("yaml"), OsStr::new("yml"), OsStr::new("json")].contains(&extension)
        });
        if manifest && !hidden {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// The content of a regular file of bearable size; links are followed.
fn content(path: &Path) -> std::io::Result<Vec<u8>> {
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

type ReadResult = Result<(ObjectKey, Resource), Refused>;

/// Reads one object; the text of the mesh-wide settings, which is YAML within it, too.
fn read_object(object: &Value) -> ReadResult {
    let (key, resource) = resource::read(object)?;
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

/// Reads each object, those of Lists too; and the kinds that were passed over.
fn read_all(documents: &[Value]) -> (Vec<(ReadResult, &Value)>, BTreeSet<String>) {
    let (mut results, mut foreign) = (Vec::new(), BTreeSet::new());
    let mut read = |object, at: String| match foreign_kind(object) {
        Some(kind) => drop(foreign.insert(kind)),
        None => results.push((place(read_object(object), &at), object)),
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
    (results, foreign)
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

/// The objects of a YAML text, and what was refused: the same as if it stood in the file `test.yaml`.
pub fn read_text(text: &str) -> (Objects, Vec<Problem>) {
    let mut directory = Directory::new(PathBuf::new());
    let mut file = File::default();
    file.take(Path::new("test.yaml"), text.as_bytes());
    directory.files.insert("test.yaml".into(), file);
    directory.merge()
}
