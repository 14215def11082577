//! The normal form of paths: one form for all spellings that a server may take for the same.

use mesh_agent::{config::PathNormalization, policy::normalise};

/// Whatever stands in a target, its normal form is its own normal form, and leads nowhere that it does not say.
///
/// # Panics
/// Where what the module promises does not hold.
pub fn run(input: &[u8]) {
    let Ok(target) = http::uri::PathAndQuery::try_from(input) else { return };
    let path = target.path();
    assert_eq!(normalise(path, PathNormalization::None).as_deref(), Ok(path), "nothing is to be changed");
    for how in
        [PathNormalization::Base, PathNormalization::MergeSlashes, PathNormalization::DecodeAndMergeSlashes]
    {
        let Ok(normal) = normalise(path, how) else { continue };
        assert_eq!(normalise(&normal, how).as_deref(), Ok(&*normal), "{how:?} {path:?}");
        if !path.starts_with('/') {
            continue;
        }
        assert!(normal.starts_with('/') && !normal.contains('\\'), "{how:?} {path:?}: {normal:?}");
        let dots = normal.split('/').any(|segment| [".", ".."].contains(&segment));
        assert!(!dots, "{how:?} {path:?}: {normal:?}");
        assert!(!normal.contains("//") || how == PathNormalization::Base, "{how:?} {path:?}: {normal:?}");
        // What policy has judged is sent on: it must be a target again.
        assert!(http::uri::PathAndQuery::try_from(&*normal).is_ok(), "{how:?} {path:?}: {normal:?}");
    }
}
