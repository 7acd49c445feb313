//! How long a machine will be away while the sides are changed, told before it is turned off.
//!
//! Invariants
//! - Nothing of a running machine is read but the sizes of its files: what it holds back is not counted, what it has
//!   given up again is.

use std::{fmt, os::unix::fs::MetadataExt};

use serde::{Deserialize, Serialize};

use crate::{
    replica::model::{ReplicaRecord, Top},
    units,
};

/// A guess at the second pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// Bytes that were written since the last pass, at most.
    pub bytes: u64,
    /// Milliseconds the second pass takes; unknown where the first one was too short to tell.
    pub transfer_ms: Option<u64>,
}

/// What is left to be sent.
pub fn estimate(record: &ReplicaRecord) -> Estimate {
    let tops = record.failover.iter().flat_map(|failover| &failover.tops);
    let is_known = record.failback.as_ref().is_none_or(|failback| failback.is_as_sent());
    let stored = |top: &Top| {
        let meta = std::fs::metadata(record.folder.join(&top.file)).ok()?;
        // Where it is not known what production has, all of it is compared.
        Some(if is_known { meta.blocks().saturating_mul(512) } else { top.size })
    };
    let bytes: u64 = tops.filter_map(stored).sum();
    let rate = record.failback.as_ref().and_then(|failback| {
        let looked = failback.first.bytes_read.max(failback.first.bytes_written);
        let took = failback.first_ms.filter(|ms| *ms >= 10)?;
        looked.checked_mul(1000)?.checked_div(took).filter(|rate| *rate > 0)
    });
    Estimate { bytes, transfer_ms: rate.and_then(|rate| bytes.checked_mul(1000)?.checked_div(rate)) }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {} were written since the first pass", units::bytes(self.bytes))?;
        match self.transfer_ms {
            Some(ms) => {
                let (whole, tenth) = (ms / 1000, ms % 1000 / 100);
                write!(f, "; they take about {whole}.{tenth} s beside the two machines' own stop and start")
            }
            None => f.write_str("; how long they take is not known"),
        }
    }
}
