//! The files the rules look at, and what they find in them.
//!
//! Reads only `.rs` files of this workspace, never build output. Tested below.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use proc_macro2::TokenStream;

/// One Rust file.
#[derive(Debug)]
pub struct SourceFile {
    /// From the top of the workspace, with `/`.
    pub path: String,
    /// As it stands.
    pub text: String,
    /// Its code: no comments, strings as single literals.
    pub tokens: TokenStream,
}

/// A breach of a rule.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether it fails the check.
    pub level: Level,
    /// The file.
    pub path: String,
    /// From 1.
    pub line: usize,
    /// What is wrong and what to do.
    pub message: String,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Shown.
    Warning,
    /// Shown, and the check fails.
    Error,
}

impl SourceFile {
    /// Reads the tokens of a file's text.
    pub fn new(path: &str, text: String) -> Result<Self> {
        let tokens = text.parse().map_err(|error| anyhow!("{path} is not Rust: {error}"))?;
        Ok(Self { path: path.to_owned(), text, tokens })
    }

    /// A finding in this file.
    pub fn finding(&self, level: Level, line: usize, message: impl Into<String>) -> Finding {
        Finding { level, path: self.path.clone(), line, message: message.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            Level::Warning => "warning",
            Level::Error => "error",
        };
        write!(out, "{level}: {}:{}: {}", self.path, self.line, self.message)
    }
}

/// Every Rust file of the workspace, in order of path.
pub fn read_all(root: &Path) -> Result<Vec<SourceFile>> {
    let mut files = Vec::new();
    read_dir(root, root, &mut files)?;
    files.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(files)
}

fn read_dir(root: &Path, dir: &Path, files: &mut Vec<SourceFile>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let entry = entry?;
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        // Symbolic links are not followed: file_type tells of the link itself.
        let kind = entry.file_type()?;
        if kind.is_dir() && name != "target" && !name.starts_with('.') {
            read_dir(root, &path, files)?;
        } else if kind.is_file() && path.extension().is_some_and(|extension| extension == "rs") {
            let text =
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let relative = path.strip_prefix(root).unwrap_or(&path);
            files.push(SourceFile::new(&relative.to_string_lossy(), text)?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace;

    #[test]
    fn this_workspace_is_read_without_its_build_output() -> Result<()> {
        let files = read_all(&workspace::root())?;
        assert!(files.iter().any(|file| file.path == "xtask/src/lint/source.rs"));
        assert!(files.iter().all(|file| !file.path.starts_with("target/")));
        Ok(())
    }

    #[test]
    fn a_finding_says_where() -> Result<()> {
        let file = SourceFile::new("a/b.rs", "fn f() {}".into())?;
        assert_eq!(file.finding(Level::Error, 3, "no").to_string(), "error: a/b.rs:3: no");
        Ok(())
    }
}
