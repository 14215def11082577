//! What would be wrong with objects if they were the configuration, said without a mesh.
//!
//! Promises the problems that the sources would report, in the same words: of each object by itself, of those that are there
//! twice, and of what lies between objects. What cannot be known from a part of a cluster is not said: a set without any
//! Service does not tell which Services there are. [`validate`] is pure; [`read`] alone reads files. Tested below.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    directory::{Directory, manifests},
    file::{File, LARGEST, content, objects_of, parsed, problem, read_object, read_on},
};
use crate::state::{
    Cause, Problem,
    compile::{Settings, compile},
    resource::{Objects, Origin, Resource},
};

/// Kinds of which a set may hold none without saying that there are none: others make them than those who write rules.
const MADE_ELSEWHERE: [&str; 5] = ["Service", "Secret", "ConfigMap", "File", "Gateway"];

/// The documents of a file, and where they are from.
#[derive(Debug, Clone)]
pub struct Written {
    /// The file's path, or another name for people.
    pub from: PathBuf,
    /// Its documents, with Lists as they are; or why there are none to be had.
    pub documents: Result<Vec<Value>, String>,
}

impl Written {
    /// The documents of a text, JSON where the name ends so, else YAML.
    pub fn parsed(from: PathBuf, text: &[u8]) -> Self {
        let documents = parsed(&from, text);
        Self { from, documents }
    }
}

/// What came of looking at them.
#[derive(Debug)]
pub struct Validation {
    /// The objects that can be taken, those included that stand in for a policy that cannot.
    pub objects: Objects,
    /// Kinds of objects that are none of the mesh's, as `kind (apiVersion)`.
    pub passed_over: BTreeSet<String>,
    /// All that is wrong, by file and object.
    pub problems: BTreeSet<Problem>,
}

/// Says everything that is wrong with these, taken together.
pub fn validate(written: &[Written], settings: &Settings) -> Validation {
    let mut files = BTreeMap::new();
    let mut problems = BTreeSet::new();
    for Written { from, documents } in written {
        let mut file = File::default();
        match documents {
            Ok(documents) => {
                file.take_documents(from, documents);
                problems.extend(besides_the_first(from, documents, &file));
            }
            Err(message) => drop(problems.insert(problem(from, message.clone()))),
        }
        files.insert(from.clone(), file);
    }
    let mut directory = Directory::of(files);
    let objects = directory.merge();
    problems.extend(directory.problems().cloned());
    problems.extend(between(&objects, settings));
    let passed_over = directory.foreign().into_iter().map(str::to_owned).collect();
    Validation { objects, passed_over, problems }
}

/// What is wrong with objects of a file that were refused, besides what it has said of them.
fn besides_the_first(from: &Path, documents: &[Value], file: &File) -> Vec<Problem> {
    let name = from.to_string_lossy();
    let refused = documents.iter().flat_map(objects_of).filter_map(|object| {
        let refused = read_object(object, Origin::Manifest).err()?;
        // Kinds that are passed over are none of the mesh's business.
        file.problems.contains(&refused.problem(&name)).then_some((object, refused))
    });
    refused
        .flat_map(|(object, refused)| read_on(object, Origin::Manifest, &refused))
        .map(|refused| refused.problem(&name))
        .collect()
}

/// What lies between objects, as far as it can be known from these.
fn between(objects: &Objects, settings: &Settings) -> impl Iterator<Item = Problem> {
    let has = |kind: &str| {
        objects.iter().any(|(key, object)| match kind {
            // Of ConfigMaps one alone is meant.
            "ConfigMap" => matches!(object.resource, Resource::MeshConfig(_)),
            _ => *key.kind == *kind,
        })
    };
    let unknown: Vec<&str> = MADE_ELSEWHERE.into_iter().filter(|kind| !has(kind)).collect();
    let is_known =
        move |problem: &Problem| !matches!(problem.cause, Cause::NotFound(kind) if unknown.contains(&kind));
    compile(objects, None, settings).1.into_iter().filter(is_known)
}

/// The files at a path: it alone, or the manifests in a directory (`*.yaml`, `*.yml`, `*.json`, not below it). A file whose
/// content cannot be had has a problem, like one that is not YAML.
///
/// # Errors
/// There is nothing at the path, or the directory cannot be listed.
pub fn read(path: &Path) -> io::Result<Vec<Written>> {
    let files = if std::fs::metadata(path)?.is_dir() { manifests(path)? } else { [path.to_owned()].into() };
    let read = |from: PathBuf| match content(&from) {
        Ok(text) => Written::parsed(from, &text),
        Err(error) => Written { from, documents: Err(format!("the file cannot be read: {error}")) },
    };
    Ok(files.into_iter().map(read).collect())
}

/// What is read from elsewhere, up to the size that files may have.
///
/// # Errors
/// It cannot be read, or is larger.
pub fn read_from(name: &str, text: &mut dyn Read) -> io::Result<Written> {
    let mut content = Vec::new();
    text.take(LARGEST + 1).read_to_end(&mut content)?;
    if content.len() as u64 > LARGEST {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {LARGEST} bytes")));
    }
    Ok(Written::parsed(name.into(), &content))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: &str = "{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 80}]}}";

    fn virtual_service(name: &str, spec: &str) -> String {
        format!(
            "{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: {name}}}, spec: {spec}}}"
        )
    }

    fn told(files: &[(&str, &str)]) -> Vec<String> {
        let written: Vec<Written> =
            files.iter().map(|(name, text)| Written::parsed(name.into(), text.as_bytes())).collect();
        let problems = validate(&written, &Settings::default()).problems;
        problems.iter().map(|problem| format!("{}: {problem}", problem.cause.reason())).collect()
    }

    #[test]
    fn what_is_wrong_with_one_object_is_told_with_its_field() {
        let timeout =
            virtual_service("v", "{hosts: [a], http: [{timeout: soon, route: [{destination: {host: a}}]}]}");
        let found = told(&[("a.yaml", &timeout)]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].starts_with("Invalid: a.yaml: VirtualService default/v: spec.http[0].timeout: "),
            "{found:?}"
        );
        let more = virtual_service(
            "v",
            "{hosts: [a], http: [{timeout: soon, route: [{destination: {host: a}}]}, {timeout: never, route: []}]}",
        );
        let list = format!("{{apiVersion: v1, kind: List, items: [{more}]}}");
        for text in [more, list] {
            let fields: Vec<_> = told(&[("a.yaml", &text)]);
            let names = |field: &str| fields.iter().filter(|said| said.contains(field)).count();
            assert!(names("http[0].timeout") == 1 && names("http[1].timeout") == 1, "{fields:?}");
        }
        for (file, text, expected) in [
            ("b.yaml", "{a: [", "Invalid: b.yaml: not valid YAML: "),
            ("b.json", "{a: 1}", "Invalid: b.json: not valid JSON: "),
            ("c.yaml", "kind: Service", "Invalid: c.yaml: apiVersion: is required (document 1)"),
        ] {
            let found = told(&[(file, text)]);
            assert!(found.len() == 1 && found[0].starts_with(expected), "{found:?}");
        }
    }

    #[test]
    fn what_lies_between_objects_is_told_as_far_as_the_set_knows() {
        let subset =
            virtual_service("v", "{hosts: [a], http: [{route: [{destination: {host: a, subset: v9}}]}]}");
        assert_eq!(told(&[("v.yaml", &subset)]), [""; 0], "without Services nobody knows which there are");
        let found = told(&[("v.yaml", &subset), ("s.yaml", SERVICE)]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].starts_with(
                "ReferenceNotFound: v.yaml: VirtualService default/v: spec.http[0].route[0].destination.subset: \
                 no DestinationRule defines the subset \"v9\""
            ),
            "{found:?}"
        );
        let plain = |name| virtual_service(name, "{hosts: [a], http: [{route: [{destination: {host: a}}]}]}");
        let found = told(&[("1.yaml", &plain("v")), ("2.yaml", &plain("w")), ("s.yaml", SERVICE)]);
        assert!(
            found.len() == 1 && found[0].starts_with("Conflict: 2.yaml: VirtualService default/w: "),
            "{found:?}"
        );
        let found = told(&[("1.yaml", &plain("v")), ("2.yaml", &plain("v")), ("s.yaml", SERVICE)]);
        assert!(found.len() == 1 && found[0].contains("1.yaml has this object too"), "{found:?}");
    }

    #[test]
    fn what_is_read_from_elsewhere_has_a_bound() {
        let read = |len: u64| {
            let written = read_from("standard input", &mut io::repeat(b'#').take(len));
            written.map(|written| written.documents).map_err(|error| error.kind())
        };
        assert_eq!(read(LARGEST), Ok(Ok(Vec::new())));
        assert_eq!(read(LARGEST + 1), Err(io::ErrorKind::FileTooLarge));
    }

    #[test]
    fn kinds_of_others_are_passed_over_and_named() {
        let list = format!(
            "{{apiVersion: v1, kind: List, items: [{SERVICE}, {{apiVersion: apps/v1, kind: Deployment, metadata: {{name: a}}}}]}}"
        );
        let found = validate(&[Written::parsed("l.yaml".into(), list.as_bytes())], &Settings::default());
        assert_eq!(found.problems, BTreeSet::new());
        assert_eq!(found.objects.len(), 1);
        assert_eq!(found.passed_over, BTreeSet::from(["Deployment (apps/v1)".to_owned()]));
    }
}
