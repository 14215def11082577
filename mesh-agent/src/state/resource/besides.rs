//! What else is wrong with an object that was refused: whoever reads it says what it comes upon first.
//!
//! What is named is put right, or taken out, and the rest is read again. Promises fields that are wrong whatever becomes of the
//! others: what is then said of the same field, of those beside it or of what they are in may come of the change alone, and ends
//! the search. Looks no more than [`MOST`] times. Tested below.

use serde_json::{Value, json};

use super::field::FieldError;

/// Fields that are looked for.
const MOST: usize = 8;

/// A step on the way to a field.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Name(String),
    Index(usize),
}

/// Every field besides the `first`. `read` says what is wrong with an object first, if anything.
pub fn besides(
    value: &Value,
    first: &FieldError,
    read: impl Fn(&Value) -> Option<FieldError>,
) -> Vec<FieldError> {
    let (mut rest, mut found) = (value.clone(), vec![first.clone()]);
    let mut changed = Vec::new();
    while found.len() <= MOST {
        let Some(path) = found.last().and_then(|error| path(&rest, &error.field)) else { break };
        changed.push(path);
        let next = changed.last().and_then(|path| next(&rest, path, &changed, &read));
        let Some((without, next)) = next else { break };
        rest = without;
        found.push(next);
    }
    found.remove(0);
    found
}

/// The object with something else in this place, and what is wrong with it then that does not come of that.
fn next(
    value: &Value,
    path: &[Step],
    changed: &[Vec<Step>],
    read: &impl Fn(&Value) -> Option<FieldError>,
) -> Option<(Value, FieldError)> {
    // What is right in most places, and nothing.
    let instead = [Some(json!("a")), Some(json!("1s")), Some(json!(1)), Some(json!({})), None];
    instead.into_iter().find_map(|instead| {
        let mut other = value.clone();
        put(&mut other, path, instead)?;
        let error = read(&other)?;
        let at = path_as_written(&error.field);
        (!changed.iter().any(|changed| touches(changed, &at))).then_some((other, error))
    })
}

/// Whether what is said of one may come of what was done to the other. Entries of a list have nothing to do with one another.
fn touches(changed: &[Step], at: &[Step]) -> bool {
    let Some((last, within)) = changed.split_last() else { return true };
    let beside = matches!(last, Step::Name(_)) && at.len() == changed.len() && at.starts_with(within);
    beside || within.starts_with(at) || at.starts_with(changed)
}

/// The steps to what a message names, as far as it is there: all of them.
fn path(value: &Value, field: &str) -> Option<Vec<Step>> {
    let steps = path_as_written(field);
    let found = steps.iter().try_fold(value, |value, step| match step {
        Step::Name(name) => value.get(name),
        Step::Index(index) => value.get(index),
    });
    found.filter(|_| !steps.is_empty()).map(|_| steps)
}

/// `spec.http[0].timeout` in its steps. One that has a dot in a name is found nowhere.
fn path_as_written(field: &str) -> Vec<Step> {
    let names = field.split('.').filter(|part| !part.is_empty());
    let steps = names.flat_map(|part| {
        let mut parts = part.split('[');
        let name = parts.next().filter(|name| !name.is_empty()).map(|name| Step::Name(name.to_owned()));
        let index = |part: &str| part.trim_end_matches(']').parse().ok().map(Step::Index);
        name.into_iter().chain(parts.filter_map(index)).collect::<Vec<_>>()
    });
    steps.collect()
}

/// Puts something else there, or takes it out of what it is in: only out of an object, where that moves nothing else.
fn put(value: &mut Value, path: &[Step], instead: Option<Value>) -> Option<()> {
    let (last, within) = path.split_last()?;
    let within = within.iter().try_fold(value, |value, step| match step {
        Step::Name(name) => value.get_mut(name),
        Step::Index(index) => value.get_mut(index),
    })?;
    match (last, instead) {
        (Step::Name(name), Some(instead)) => *within.get_mut(name)? = instead,
        (Step::Index(index), Some(instead)) => *within.get_mut(index)? = instead,
        (Step::Name(name), None) => drop(within.as_object_mut()?.remove(name)?),
        (Step::Index(_), None) => return None,
    }
    Some(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::state::resource::{Origin, read};

    fn wrong(api_version: &str, kind: &str, spec: &Value) -> Vec<String> {
        let object =
            json!({ "apiVersion": api_version, "kind": kind, "metadata": { "name": "a" }, "spec": spec });
        let first = |object: &Value| read(object, Origin::ApiServer).err().map(|refused| refused.error);
        let error = first(&object).unwrap();
        let more = besides(&object, &error, first);
        [error].into_iter().chain(more).map(|error| error.field).collect()
    }

    #[test]
    fn each_field_that_is_wrong_by_itself_is_named() {
        let to = json!([{ "destination": { "host": "a" } }]);
        let found = wrong(
            "networking.istio.io/v1",
            "VirtualService",
            &json!({
                "hosts": ["a"],
                "http": [
                    { "route": to, "timeout": "soon", "retries": { "attempts": 1, "perTryTimeout": "later" } },
                    { "route": to },
                    { "route": to, "timeout": "never" },
                    { "route": [{ "destination": { "host": "a" }, "weight": "much" }] },
                ],
            }),
        );
        let mut sorted = found.clone();
        sorted.sort_unstable();
        let expected = [
            "spec.http[0].retries.perTryTimeout",
            "spec.http[0].timeout",
            "spec.http[2].timeout",
            "spec.http[3].route[0].weight",
        ];
        assert_eq!(sorted, expected, "{found:?}");
    }

    #[test]
    fn what_comes_of_the_search_is_not_told() {
        for (kind, spec, expected) in [
            // The credential belongs to a mode that is none.
            (
                "DestinationRule",
                json!({ "host": "a", "trafficPolicy": { "tls": { "mode": "simple", "credentialName": "c" } } }),
                "spec.trafficPolicy.tls.mode",
            ),
            (
                "VirtualService",
                json!({ "hosts": ["a"], "http": [{ "timeout": "soon" }] }),
                "spec.http[0].timeout",
            ),
            ("VirtualService", json!({ "hosts": "a" }), "spec.hosts"),
            ("VirtualService", json!({}), "spec.http"),
        ] {
            let found = wrong("networking.istio.io/v1", kind, &spec);
            assert!(found.len() == 1 && found[0].starts_with(expected), "{kind} {spec}: {found:?}");
        }
    }

    #[test]
    fn there_is_a_bound() {
        let routes: Vec<_> = (0..3 * MOST)
            .map(|_| json!({ "timeout": "soon", "route": [{ "destination": { "host": "a" } }] }))
            .collect();
        let found =
            wrong("networking.istio.io/v1", "VirtualService", &json!({ "hosts": ["a"], "http": routes }));
        assert_eq!(found.len(), 1 + MOST, "{found:?}");
    }
}
