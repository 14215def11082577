//! What the documents show of configuration is what the agent takes: every block of YAML in the README and below `docs`.

mod documents;

use std::io;

use mesh_agent::source::read_text;

#[test]
fn every_block_of_yaml_is_read() -> io::Result<()> {
    let (mut seen, mut objects) = (0, 0);
    for (file, block) in documents::blocks()? {
        let (read, refused) = read_text(&block);
        assert!(refused.is_empty(), "{}: {refused:?} in\n{block}", file.display());
        assert!(!read.is_empty(), "{}: nothing is read of\n{block}", file.display());
        seen += 1;
        objects += read.len();
    }
    assert!(seen >= 4 && objects >= seen, "{seen} blocks with {objects} objects: are they still written so?");
    Ok(())
}
