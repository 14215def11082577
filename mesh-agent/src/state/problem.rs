//! What is wrong with the configuration, for the operator: file (if it is of one), object, field, and a sentence; and for
//! programs, what sort of trouble it is.
//!
//! A problem never stops the mesh: it says which object (or route) is not in force, and why. Tested with
//! everything that makes one.

use std::fmt;

use serde::{Serialize, Serializer};

/// One thing wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// Where the object was read, for example a file's path; empty for objects of a cluster, which their names tell.
    pub file: String,
    /// The object, for example `VirtualService default/reviews`; none when the file as a whole is broken.
    pub object: Option<String>,
    /// Path of the offending field, for example `spec.http[0].route[1].weight`; none when it is the whole object.
    pub field: Option<String>,
    /// What is wrong with it.
    pub message: String,
    /// What sort of trouble that is.
    pub cause: Cause,
}

/// What sort of trouble a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// What is written cannot be taken: the last good state stays in force, if there is one.
    Invalid,
    /// Something is named that is not there, or not so; with the kind of the object that is missing.
    NotFound(&'static str),
    /// Another object has the same place, and holds.
    Conflict,
    /// It is taken, and has no effect, or another one than it says.
    NoEffect,
}

impl Cause {
    /// One word for it, as reasons of Kubernetes' conditions are written.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Invalid => "Invalid",
            Self::NotFound(_) => "ReferenceNotFound",
            Self::Conflict => "Conflict",
            Self::NoEffect => "NoEffect",
        }
    }
}

impl Serialize for Cause {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.reason())
    }
}

impl Problem {
    /// Field and sentence, for who knows which object it is.
    pub fn said(&self) -> String {
        match &self.field {
            Some(field) => format!("{field}: {}", self.message),
            None => self.message.clone(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.file.is_empty() {
            write!(f, "{}: ", self.file)?;
        }
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if let Some(field) = &self.field {
            write!(f, "{field}: ")?;
        }
        f.write_str(&self.message)
    }
}
