//! An object that somebody wants a cluster to have, read as it will be read when the cluster has it.
//!
//! Promises the answer that the watch of its kind would come to. Tested with who uses it.

use kube::core::DynamicObject;

use super::{kinds::DEFINED, prune::Detail, prune::pruned};
use crate::{
    source::file::{read_object, read_on},
    state::resource::{ObjectKey, Origin, Refused, Resource},
};

/// What was read, or what is wrong: what the watch would say, and whatever else is.
pub(crate) type Proposed = Result<(ObjectKey, Resource), (Refused, Vec<Refused>)>;

/// What is read of it; `None`: it is of no kind, or version, that is watched.
pub(crate) fn read_proposed(mut object: DynamicObject) -> Option<Proposed> {
    let types = object.types.take()?;
    let (group, version) = types.api_version.split_once('/')?;
    let kind = DEFINED.iter().find(|kind| kind.group == group && kind.name == types.kind)?;
    if !kind.versions.contains(&version) {
        return None;
    }
    // The API server makes up the rest of a generated name.
    if let (None, Some(prefix)) = (&object.metadata.name, &object.metadata.generate_name) {
        object.metadata.name = Some(format!("{prefix}x"));
    }
    let object = pruned(kind, &types.api_version, Detail::Whole, object);
    Some(read_object(&object, Origin::ApiServer).map_err(|refused| {
        let more = read_on(&object, Origin::ApiServer, &refused).collect();
        (refused, more)
    }))
}
