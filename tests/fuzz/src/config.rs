//! Configuration: whatever a file holds, it is read and compiled or refused, and compiling twice gives the same.

use std::path::Path;

use mesh_agent::{
    source::read_text,
    state::compile::{Netns, Settings, compile},
};

/// Reads the bytes as a file of YAML documents and compiles what was accepted.
///
/// # Panics
/// Where what the module promises does not hold.
pub fn run(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    let (objects, _) = read_text(text);
    if objects.is_empty() {
        return;
    }
    for netns in [Netns::Annotation, Netns::Node(Path::new("/run/netns").into())] {
        let settings = Settings { netns, ..Settings::default() };
        let (first, problems) = compile(&objects, None, &settings);
        let (second, again) = compile(&objects, Some(&first), &settings);
        assert_eq!(problems, again, "the same objects have the same problems");
        assert_eq!(first.services.len(), second.services.len());
        assert_eq!(first.workloads.len(), second.workloads.len());
    }
}
