//! What a session says about itself. Bytes are integers, times UTC; what is not known is absent.

use aquifer_vdisk::unused::FileSystem;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::State;
use crate::confine::Confinement;

/// Schema of [`Status`] in JSON output.
pub const STATUS_SCHEMA: &str = "aquifer.session/1";

/// A session, as of now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// [`STATUS_SCHEMA`].
    pub schema: String,
    /// Identity.
    pub id: Uuid,
    /// Machine name.
    pub name: String,
    /// Session folder.
    pub dir: String,
    /// Where it stands, as recorded.
    pub state: State,
    /// Why, where that is not plain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When the session was made.
    pub created: Timestamp,
    /// The process that serves it.
    pub door: Door,
    /// Disks, in the machine's order.
    pub disks: Vec<DiskStatus>,
    /// Limit of background reading in bytes per second.
    pub rate: Option<u64>,
    /// When everything is to be local.
    pub ready_by: Option<Timestamp>,
    /// What ought to be known: an old session, confinement that is not complete, a mount left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// The serving process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Door {
    /// It answered.
    Running {
        /// Its process.
        pid: u32,
        /// The process that restarts it, if there is one.
        supervisor: Option<u32>,
        /// Since when.
        since: Timestamp,
        /// Decoded-block cache.
        cache: CacheStatus,
        /// What the process may still do.
        confinement: Confinement,
        /// NBD connections open now.
        connections: u64,
        /// Bytes read by NBD clients since the door started.
        bytes_read: u64,
        /// Bytes written by NBD clients since the door started.
        bytes_written: u64,
    },
    /// No process serves the session; figures come from the session's files.
    NotRunning,
}

/// Counters of the decoded-block cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheStatus {
    /// Budget in bytes.
    pub bytes_max: u64,
    /// Held now, in bytes.
    pub bytes: u64,
    /// Reads answered from it.
    pub hits: u64,
    /// Blocks that had to be decoded.
    pub decodes: u64,
    /// Bytes decoded since the door started: what was fetched from compressed sources.
    pub decoded_bytes: u64,
}

/// One disk of a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Name.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// NBD URI.
    pub uri: String,
    /// The disk as a file, where FUSE serves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Bytes the restore point really holds: what hydration has to bring over.
    pub used: Option<u64>,
    /// Bytes by where they are; absent on a read-only disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<OverlayStatus>,
    /// Background copying; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hydration: Option<HydrationStatus>,
    /// Bytes of data fetched from the source since the door started, as they are stored there; 0 without a door.
    #[serde(default)]
    pub fetched: u64,
    /// Why the source cannot be opened; absent while it is open or no longer needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_away: Option<String>,
    /// Reads that wait for a source that is away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parked: Vec<Parked>,
    /// What no file system on it uses, once that is known; absent where everything is copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unused: Option<UnusedStatus>,
    /// What its readers wait for; absent on a read-only disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub demand: Option<DemandStatus>,
    /// After a failed sync, the ranges whose latest bytes are in doubt, as offset and length.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub doubtful: Vec<(u64, u64)>,
}

/// Where a disk's bytes are. The four add up to the disk's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayStatus {
    /// Still only in the chain.
    pub absent: u64,
    /// Copied from the chain, or known to be zero there.
    pub hydrated: u64,
    /// Written by the guest.
    pub written: u64,
    /// Given back by the guest.
    pub trimmed: u64,
}

impl OverlayStatus {
    /// Bytes that no longer need the source.
    pub fn local(&self) -> u64 {
        self.hydrated.saturating_add(self.written).saturating_add(self.trimmed)
    }
}

/// Background copying.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HydrationStatus {
    /// What it is doing.
    pub phase: Phase,
    /// Bytes of the restore point's data already local.
    pub done: u64,
    /// Bytes of the restore point's data in all.
    pub total: u64,
    /// Bytes per second over the last minute.
    pub rate: u64,
    /// Seconds to the end at that rate; absent under ten seconds of measurement.
    pub eta_s: Option<u64>,
    /// Ranges that could not be copied because the source is damaged there, as offset and length.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<(u64, u64)>,
    /// The last error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Fetches of an earlier boot's trace: done, and in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<(usize, usize)>,
}

/// What is not copied because nothing uses it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnusedStatus {
    /// Absent bytes that will not be copied: unused, and read by nobody. They become zeros when all else is local.
    pub left_out: u64,
    /// What was found in each partition, or on a disk without any.
    pub volumes: Vec<VolumeStatus>,
    /// Why the disk was not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doubt: Option<String>,
}

/// One partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Where it begins on the disk in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// What it holds.
    pub file_system: FileSystem,
    /// Bytes its file system does not use, in runs long enough to be left out.
    pub unused: u64,
    /// Why all of it is copied although its file system is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doubt: Option<String>,
}

/// What the readers of a disk wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DemandStatus {
    /// Reads, or parts of them, that had to wait for the source since the door started.
    pub misses: u64,
    /// Bytes of those.
    pub miss_bytes: u64,
    /// While the disk is hydrated: how long half of the reads of the last second took at most, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p50_us: Option<u64>,
    /// The same for 99 in a hundred.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p99_us: Option<u64>,
}

/// What hydration is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Copying.
    Running,
    /// Somebody paused it.
    Paused,
    /// The source is away; tried again by itself.
    Waiting,
    /// No space left beside the overlay; tried again by itself.
    NoSpace,
    /// All is local.
    Done,
    /// It gave up; the reason is in the events.
    Failed,
}

/// A read that waits for its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parked {
    /// Start on the disk in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// How long it has waited, seconds.
    pub waited_s: u64,
}

impl Status {
    /// Whether every disk is local: the source and the door are no longer needed.
    pub fn is_local(&self) -> bool {
        self.disks.iter().all(|d| d.overlay.is_some_and(|o| o.absent == 0))
    }
}
