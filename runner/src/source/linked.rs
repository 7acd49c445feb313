//! Points that stand on disks of other products: what opens such a disk again.
//!
//! Invariants
//! - The words that open it come from a repository's record, which a person's command wrote; no file that is read
//!   chooses what is opened.

use std::{path::PathBuf, sync::Arc};

use aquifer_formats::{
    Error, Layer as _,
    aql::Reader,
    repo::{LinkedOpener, record::LinkedSource, record::PointDisk},
};
use aquifer_vdisk::{BlockCache, ChainSpec, open_below};

use crate::fail::{Code, Fail, Result};

/// Opens what points of a repository are linked to; decoded blocks go through `cache`.
pub(crate) fn opener(cache: Arc<BlockCache>) -> Arc<LinkedOpener> {
    Arc::new(move |linked: &LinkedSource| {
        let spec = below(linked)
            .map_err(|cause| Error::corrupt("point.json", 0, format!("what the point is linked to: {cause}")))?;
        open_below(&spec, cache.clone()).map_err(|error| match error {
            aquifer_vdisk::Error::Format(error) => error,
            other => Error::Refused { path: linked.locator.clone(), what: other.to_string() },
        })
    })
}

/// The words that [`opener`] understands.
pub(crate) fn locator(spec: &ChainSpec) -> Result<String> {
    serde_json::to_string(spec).map_err(|error| Fail::new(Code::Bug, error.to_string()))
}

fn below(linked: &LinkedSource) -> serde_json::Result<ChainSpec> {
    serde_json::from_str(&linked.locator)
}

/// What a disk of a point is opened from.
pub(crate) fn spec_of(reader: &Reader, disk: &PointDisk) -> Result<ChainSpec> {
    let path = PathBuf::from(reader.label());
    match &disk.linked {
        Some(linked) if reader.linked().is_some() => {
            let odd = |cause| Fail::new(Code::Corrupt, "what the point is linked to cannot be told").cause(cause);
            Ok(ChainSpec::Mixed { path, below: Box::new(below(linked).map_err(odd)?) })
        }
        _ => Ok(ChainSpec::Native { path }),
    }
}
