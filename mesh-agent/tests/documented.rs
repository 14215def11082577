//! What the documents show of configuration is what the agent takes: every block of YAML in the README and below `docs`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use mesh_agent::source::read_text;

/// All Markdown below a directory.
fn documents(directory: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            documents(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
    }
    Ok(())
}

/// The blocks between three backquotes that say that they are YAML.
fn blocks(text: &str) -> Vec<String> {
    let mut parts = text.split("\n```yaml\n").skip(1);
    parts.by_ref().filter_map(|part| Some(part.split_once("\n```")?.0.to_owned())).collect()
}

#[test]
fn every_block_of_yaml_is_read() -> io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = vec![root.join("README.md")];
    documents(&root.join("docs"), &mut files)?;
    let (mut seen, mut objects) = (0, 0);
    for file in files {
        for block in blocks(&fs::read_to_string(&file)?) {
            let (read, refused) = read_text(&block);
            assert!(refused.is_empty(), "{}: {refused:?} in\n{block}", file.display());
            assert!(!read.is_empty(), "{}: nothing is read of\n{block}", file.display());
            seen += 1;
            objects += read.len();
        }
    }
    assert!(seen >= 4 && objects >= seen, "{seen} blocks with {objects} objects: are they still written so?");
    Ok(())
}
