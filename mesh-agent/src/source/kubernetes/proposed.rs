//! An object that somebody wants a cluster to have, read as it will be read when the cluster has it.
//!
//! Promises the answer that the watch of its kind would come to. Tested with who uses it.

use kube::core::DynamicObject;

use super::{kinds::DEFINED, prune::Detail, prune::pruned};
use crate::{
    source::file::{ReadResult, read_object},
    state::resource::Origin,
};

/// What is read of it; `None`: it is of no kind, or version, that is watched.
pub(crate) fn read_proposed(mut object: DynamicObject) -> Option<ReadResult> {
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
    Some(read_object(&pruned(kind, &types.api_version, Detail::Whole, object), Origin::ApiServer))
}
