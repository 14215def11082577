//! `exportTo`: clients of which namespaces an object is there for.
//!
//! Tested by the tables below.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    dns_name,
    field::{Checked, FieldError, item},
};
use crate::state::snapshot::Visibility;

/// Reads the field of an Istio object in this namespace.
pub fn check(namespace: &str, written: Option<&[String]>) -> Checked<Visibility> {
    let written = written.unwrap_or_default();
    let mut named: BTreeSet<&str> = BTreeSet::new();
    for (i, to) in written.iter().enumerate() {
        let own = if to == "." { namespace } else { to };
        entry(to).map_err(item("exportTo", i))?;
        if !named.insert(own) {
            let message = if own == to {
                format!("duplicate entries in exportTo for entry {to}")
            } else {
                format!("duplicate entries in exportTo: . and current namespace {namespace}")
            };
            return Err(item("exportTo", i)(FieldError::new("", message)));
        }
    }
    if named.contains("*") && named.len() > 1 {
        let message = "cannot have both public (*) and non-public (i.e. . or specific namespaces) exportTo values \
                       for a resource";
        return Err(FieldError::new("exportTo", message));
    }
    Ok(visibility(&named))
}

fn entry(to: &str) -> Checked<()> {
    match to {
        "." | "*" => Ok(()),
        "~" => {
            let message = "exportTo ~ (none) is not allowed for Istio configuration objects";
            Err(FieldError::new("", message))
        }
        to if to.contains('.') || dns_name(to).is_err() => {
            let message =
                format!("{to:?}: only ., * or the name of a namespace is allowed as an exportTo entry");
            Err(FieldError::new("", message))
        }
        _ => Ok(()),
    }
}

/// Reads the annotation of a Service in this namespace: entries between commas, where `~` is nobody.
pub fn annotation(namespace: &str, text: &str) -> Visibility {
    let entries = text.split(',').map(str::trim).filter(|to| !to.is_empty());
    let named: BTreeSet<&str> = entries.map(|to| if to == "." { namespace } else { to }).collect();
    visibility(&named)
}

/// Nothing said is everywhere; `~` names no namespace.
fn visibility(named: &BTreeSet<&str>) -> Visibility {
    if named.is_empty() || named.contains("*") {
        return Visibility::Everywhere;
    }
    Visibility::Namespaces(named.iter().filter(|to| **to != "~").map(|to| Arc::from(*to)).collect())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn only(names: &[&str]) -> Visibility {
        Visibility::Namespaces(names.iter().map(|name| Arc::from(*name)).collect())
    }

    fn read(entries: &[&str]) -> Checked<Visibility> {
        let entries: Vec<String> = entries.iter().map(ToString::to_string).collect();
        check("shop", Some(&entries))
    }

    #[test]
    fn fields() {
        assert_eq!(check("shop", None).unwrap(), Visibility::Everywhere);
        let table: [(&[&str], Visibility); 5] = [
            (&[], Visibility::Everywhere),
            (&["*"], Visibility::Everywhere),
            (&["."], only(&["shop"])),
            (&["b", "."], only(&["b", "shop"])),
            (&["b", "a"], only(&["a", "b"])),
        ];
        for (entries, expected) in table {
            assert_eq!(read(entries).unwrap(), expected, "{entries:?}");
        }
        let bad: [(&[&str], &str, &str); 6] = [
            (&[".", "shop"], "exportTo[1]", "duplicate entries in exportTo for entry shop"),
            (&["shop", "."], "exportTo[1]", ". and current namespace shop"),
            (&["*", "*"], "exportTo[1]", "duplicate"),
            (&["*", "."], "exportTo", "both public"),
            (&["~"], "exportTo[0]", "(none) is not allowed"),
            (&["a.b"], "exportTo[0]", "only ., * or"),
        ];
        for (entries, field, message) in bad {
            let error = read(entries).unwrap_err();
            assert_eq!(error.field, field, "{entries:?}");
            assert!(error.message.contains(message), "{entries:?}: {}", error.message);
        }
    }

    #[test]
    fn annotations() {
        let table = [
            ("", Visibility::Everywhere),
            ("*", Visibility::Everywhere),
            ("., *", Visibility::Everywhere),
            (" . ,b", only(&["b", "shop"])),
            ("~", only(&[])),
        ];
        for (text, expected) in table {
            assert_eq!(annotation("shop", text), expected, "{text:?}");
        }
    }
}
