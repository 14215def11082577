//! The blocks of YAML in the README and below `docs`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The top of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Each block between three backquotes that says that it is YAML, with the file that it is in.
pub fn blocks() -> io::Result<Vec<(PathBuf, String)>> {
    let mut files = vec![root().join("README.md")];
    below(&root().join("docs"), "md", &mut files)?;
    let mut found = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file)?;
        let mut parts = text.split("\n```yaml\n").skip(1);
        let blocks = parts.by_ref().filter_map(|part| Some(part.split_once("\n```")?.0.to_owned()));
        found.extend(blocks.map(|block| (file.clone(), block)));
    }
    Ok(found)
}

/// All files below a directory whose names end so.
pub fn below(directory: &Path, ending: &str, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            below(&path, ending, found)?;
        } else if path.extension().is_some_and(|extension| extension == ending) {
            found.push(path);
        }
    }
    Ok(())
}
