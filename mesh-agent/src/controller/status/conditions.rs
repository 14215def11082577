//! What is said of an object in its status: Istio's form of conditions.
//!
//! Pure. Promises that what is said already is not said again, that a time of transition stays while the status of its condition
//! does, and that conditions of others are left as they are. Tested below.

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use serde_json::{Value, json};

use crate::state::{Cause, Problem};

/// Bytes of a message.
const LONGEST: usize = 1024;

/// A condition as it has to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Condition {
    kind: &'static str,
    status: &'static str,
    reason: &'static str,
    message: String,
}

/// All conditions of an object: `refused`: why it cannot be taken; `problems`: what else is wrong with it.
pub(super) fn conditions(refused: Option<&Problem>, problems: &[Problem]) -> [Condition; 4] {
    if let Some(refused) = refused {
        let message = format!("{}; the last good state stays in force, if there is one", refused.said());
        let unknown = |kind| Condition {
            kind,
            status: "Unknown",
            reason: Cause::Invalid.reason(),
            message: "it cannot be taken as it is".to_owned(),
        };
        let reason = Cause::Invalid.reason();
        let accepted = Condition { kind: "Accepted", status: "False", reason, message: bounded(message) };
        return [accepted, unknown("ResolvedRefs"), unknown("Conflicted"), unknown("Effective")];
    }
    let accepted = Condition {
        kind: "Accepted",
        status: "True",
        reason: "Accepted",
        message: "the mesh has taken it".to_owned(),
    };
    [
        accepted,
        found("ResolvedRefs", ["True", "False"], ("ResolvedRefs", "ReferenceNotFound"), problems),
        found("Conflicted", ["False", "True"], ("NoConflicts", "Conflict"), problems),
        found("Effective", ["True", "False"], ("Effective", "NoEffect"), problems),
    ]
}

/// A condition that has one status without, and another with problems of this reason.
fn found(
    kind: &'static str,
    [good, bad]: [&'static str; 2],
    (well, reason): (&'static str, &'static str),
    problems: &[Problem],
) -> Condition {
    let own = problems.iter().filter(|problem| problem.cause.reason() == reason);
    let messages: Vec<String> = own.map(Problem::said).collect();
    let (status, reason) = if messages.is_empty() { (good, well) } else { (bad, reason) };
    Condition { kind, status, reason, message: bounded(messages.join("; ")) }
}

fn bounded(mut text: String) -> String {
    if text.len() > LONGEST {
        text.truncate(text.floor_char_boundary(LONGEST - "…".len()));
        text.push('…');
    }
    text
}

/// The list of conditions as it has to be, where it is not so: these, of this generation, and those of others.
pub(super) fn corrected(now: &[Value], wanted: &[Condition], generation: Option<i64>) -> Option<Vec<Value>> {
    let of_kind = |kind: &str| now.iter().find(|condition| condition["type"] == kind);
    let is_said = |condition: &Condition| {
        of_kind(condition.kind).is_some_and(|said| {
            let generation_said = said.get("observedGeneration").and_then(Value::as_i64);
            said["status"] == condition.status
                && said["reason"] == condition.reason
                && said["message"] == condition.message
                // Older definitions of kinds have no place for it.
                && (generation_said.is_none() || generation_said == generation)
        })
    };
    if wanted.iter().all(is_said) {
        return None;
    }
    let is_ours = |condition: &&Value| wanted.iter().any(|wanted| condition["type"] == wanted.kind);
    let others = now.iter().filter(|condition| !is_ours(condition)).cloned();
    let ours = wanted.iter().map(|condition| {
        let before = of_kind(condition.kind).filter(|before| before["status"] == condition.status);
        let since =
            before.map(|before| before["lastTransitionTime"].clone()).filter(|since| !since.is_null());
        json!({
            "type": condition.kind,
            "status": condition.status,
            "reason": condition.reason,
            "message": condition.message,
            "lastTransitionTime": since.unwrap_or_else(|| json!(Time(Timestamp::now()))),
            "observedGeneration": generation,
        })
    });
    Some(others.chain(ours).collect())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn problem(cause: Cause, field: &str, message: &str) -> Problem {
        Problem {
            file: String::new(),
            object: Some("VirtualService default/v".to_owned()),
            field: Some(field.to_owned()),
            message: message.to_owned(),
            cause,
        }
    }

    /// `Type=Status/Reason` of each.
    fn short(conditions: &[Condition]) -> Vec<String> {
        conditions.iter().map(|one| format!("{}={}/{}", one.kind, one.status, one.reason)).collect()
    }

    #[test]
    fn each_cause_has_its_condition() {
        let good = [
            "Accepted=True/Accepted",
            "ResolvedRefs=True/ResolvedRefs",
            "Conflicted=False/NoConflicts",
            "Effective=True/Effective",
        ];
        assert_eq!(short(&conditions(None, &[])), good);
        for (cause, place, bad) in [
            (Cause::NotFound("Service"), 1, "ResolvedRefs=False/ReferenceNotFound"),
            (Cause::Conflict, 2, "Conflicted=True/Conflict"),
            (Cause::NoEffect, 3, "Effective=False/NoEffect"),
        ] {
            let all = conditions(None, &[problem(cause, "spec.a", "one"), problem(cause, "spec.b", "two")]);
            let mut expected = good;
            expected[place] = bad;
            assert_eq!(short(&all), expected);
            assert_eq!(all[place].message, "spec.a: one; spec.b: two");
        }
        let refused = problem(Cause::Invalid, "spec.http", "is missing");
        let all = conditions(Some(&refused), &[problem(Cause::Conflict, "spec.a", "one")]);
        let unknown =
            ["ResolvedRefs=Unknown/Invalid", "Conflicted=Unknown/Invalid", "Effective=Unknown/Invalid"];
        assert_eq!(short(&all)[0], "Accepted=False/Invalid");
        assert_eq!(short(&all)[1..], unknown);
        assert!(all[0].message.starts_with("spec.http: is missing; "), "{all:?}");
    }

    #[test]
    fn what_is_said_is_not_said_again_and_what_others_say_stays() {
        let theirs = json!({"type": "Reconciled", "status": "True"});
        let (good, bad) = (conditions(None, &[]), conditions(None, &[problem(Cause::Conflict, "spec", "x")]));
        let first = corrected(std::slice::from_ref(&theirs), &good, Some(1)).unwrap();
        assert_eq!((first.len(), &first[0]), (5, &theirs));
        assert_eq!(corrected(&first, &good, Some(1)), None);
        // Of another generation, said at the same time as before.
        let mut aged = first.clone();
        for condition in &mut aged[1..] {
            condition["lastTransitionTime"] = json!("2020-01-01T00:00:00Z");
        }
        let second = corrected(&aged, &good, Some(2)).unwrap();
        assert!(second[1..].iter().all(|one| one["observedGeneration"] == 2), "{second:?}");
        assert!(
            second[1..].iter().all(|one| one["lastTransitionTime"] == "2020-01-01T00:00:00Z"),
            "{second:?}"
        );
        let third = corrected(&aged, &bad, Some(1)).unwrap();
        let times: Vec<bool> =
            third.iter().map(|one| one["lastTransitionTime"] == "2020-01-01T00:00:00Z").collect();
        assert_eq!(
            times,
            [false, true, true, false, true],
            "that of what has turned alone is new: {third:?}"
        );
        assert_eq!(third[0], theirs);
        // Where there is no place for the generation, it is not written for ever.
        for condition in &mut aged[1..] {
            condition.as_object_mut().unwrap().remove("observedGeneration");
        }
        assert_eq!(corrected(&aged, &good, Some(7)), None);
    }

    #[test]
    fn messages_have_a_bound() {
        let long = conditions(None, &[problem(Cause::Conflict, "spec", &"é".repeat(LONGEST))]);
        assert!(long[2].message.len() <= LONGEST && long[2].message.ends_with('…'));
    }
}
