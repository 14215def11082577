//! What is wrong with the configuration, for the operator: file (if it is of one), object, field, and a sentence.
//!
//! A problem never stops the mesh: it says which object (or route) is not in force, and why. Tested with
//! everything that makes one.

use std::fmt;

use serde::Serialize;

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
