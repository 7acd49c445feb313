//! What the catalogue keeps of a replica and of its restore points.
//!
//! Invariants
//! - Records are versioned; one of a newer version is refused, never guessed at.
//! - Files are named relative to the replica's folder.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::Metadata,
    os::unix::fs::MetadataExt,
    path::PathBuf,
};

use aquifer_formats::repo::{Point, Repository, record::MachineDescription};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{rules::Rules, run::RunWork, state::State};
use crate::{
    fail::{Code, Fail, Result},
    host::Running,
};

/// Version of the records this build writes.
pub const VERSION: u32 = 1;

/// A replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicaRecord {
    /// Version of the record.
    pub version: u32,
    /// Its name, and that of its folder.
    pub name: String,
    /// Identity of its chain; the stamp in its folder has the same.
    pub lineage: Uuid,
    /// How often the sides were changed; the stamp in its folder has the same.
    pub epoch: u64,
    /// The machine it stands in for.
    pub machine: String,
    /// The job that makes it.
    #[serde(default)]
    pub job: Option<String>,
    /// The host it is on.
    pub host: String,
    /// Its folder there.
    pub folder: PathBuf,
    /// Where its digests are kept.
    pub metadata: PathBuf,
    /// Bytes of a block of the digests.
    pub digest_block: u64,
    /// Its state.
    pub state: State,
    /// Number of the next layer.
    pub next_layer: u64,
    /// Something outside was seen to have changed it: its digests are made anew at the next run.
    #[serde(default)]
    pub needs_resync: bool,
    /// The job leaves the machine out from now on.
    #[serde(default)]
    pub excluded: bool,
    /// What its job said of it at the last run.
    #[serde(default)]
    pub rules: Rules,
    /// A run that was interrupted: the next one finishes it first.
    #[serde(default)]
    pub unfinished: Option<Box<RunWork>>,
    /// While it serves.
    #[serde(default)]
    pub failover: Option<FailoverRecord>,
    /// While the way home is under way.
    #[serde(default)]
    pub failback: Option<FailbackRecord>,
}

impl ReplicaRecord {
    /// Refuses what this build does not know.
    ///
    /// # Errors
    /// [`Code::Unsupported`].
    pub fn check(self) -> Result<Self> {
        if self.version == VERSION {
            return Ok(self);
        }
        let what = format!("the record of replica {} is of version {}", self.name, self.version);
        Err(Fail::new(Code::Unsupported, what))
    }

    /// Whether another record is of this very chain, with as many changes of sides.
    pub fn is_same_chain(&self, other: &Self) -> bool {
        (self.lineage, self.epoch) == (other.lineage, other.epoch)
    }

    /// The file of a layer, relative to the folder.
    pub fn layer_name(disk: &str, number: u64) -> String {
        format!("{disk}/{number}.qcow2")
    }
}

/// A disk and the newest of its layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Top {
    /// Name of the disk.
    pub disk: String,
    /// The layer's file, relative to the replica's folder.
    pub file: String,
    /// Size of the disk, bytes.
    pub size: u64,
}

/// A takeover.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailoverRecord {
    /// The restore point it stands on.
    pub point: Uuid,
    /// When.
    pub since: Timestamp,
    /// Why.
    #[serde(default)]
    pub reason: Option<String>,
    /// What its machine writes to.
    pub tops: Vec<Top>,
    /// The machine, as the restore point has it: that may be given up before the takeover ends.
    #[serde(default)]
    pub description: MachineDescription,
    /// Its machine, where that was started.
    #[serde(default)]
    pub running: Option<Running>,
}

/// A disk of the machine that production is to be again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomeDisk {
    /// Name of the disk.
    pub disk: String,
    /// Its file.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: aquifer_formats::probe::Format,
}

/// Where a failback goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Home {
    /// Which of the three targets.
    pub kind: HomeKind,
    /// Name of the machine there.
    pub machine: String,
    /// Its host.
    pub host: String,
    /// Its folder.
    pub folder: PathBuf,
    /// Its disks.
    pub disks: Vec<HomeDisk>,
    /// How it is described anew, where that is wanted.
    #[serde(default)]
    pub configured: Option<Configured>,
    /// Names of those of its disks that it has not got yet: they are made with what comes home.
    #[serde(default)]
    pub made: Vec<String>,
    /// Which file was made for each of those, once it is there, where its file system tells: whoever takes it back looks
    /// whether it is still that one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub made_files: BTreeMap<String, MadeFile>,
}

/// What tells a file from all that come after it: its inode goes to the next one once it is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeFile {
    /// Number of its file system.
    pub device: u64,
    /// Number of its inode.
    pub inode: u64,
    /// When it was made.
    pub born: Timestamp,
}

impl MadeFile {
    /// None where the file system keeps no birth times.
    pub fn of(meta: &Metadata) -> Option<Self> {
        let born = Timestamp::try_from(meta.created().ok()?).ok()?;
        Some(Self { device: meta.dev(), inode: meta.ino(), born })
    }
}

impl Home {
    /// Whether this disk is not there before something comes home to it.
    pub fn makes(&self, disk: &str) -> bool {
        self.kind == HomeKind::New || self.made.iter().any(|made| made == disk)
    }
}

/// Two descriptions of production's machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configured {
    /// As it was found.
    pub before: String,
    /// As the replica's machine is.
    pub after: String,
}

/// The three targets of a failback.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HomeKind {
    /// The original machine, in its place.
    Original,
    /// A machine that was restored elsewhere beforehand.
    Restored,
    /// A machine that does not exist yet.
    New,
}

/// When the second pass begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Switch {
    /// At once.
    Auto,
    /// When somebody says so.
    #[default]
    Manual,
    /// Not before this time.
    At(Timestamp),
}

/// A way home.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailbackRecord {
    /// Where to.
    pub home: Home,
    /// When it was begun.
    pub since: Timestamp,
    /// When the second pass begins.
    pub switch: Switch,
    /// The layers whose content production has since the last pass.
    pub sent: Vec<Top>,
    /// When each of production's disks was written to last, as the first pass left them, nanoseconds; none where a second
    /// pass has begun to write: what production has is not known then.
    #[serde(default)]
    pub written: Vec<i64>,
    /// What the first pass moved.
    pub first: Carried,
    /// Milliseconds that took.
    #[serde(default)]
    pub first_ms: Option<u64>,
    /// What the second pass moved.
    #[serde(default)]
    pub second: Option<Carried>,
    /// The point that was made before the sides were changed.
    #[serde(default)]
    pub protective: Option<Uuid>,
    /// Production's machine, where it was started.
    #[serde(default)]
    pub running: Option<Running>,
    /// When the replica's machine was off.
    #[serde(default)]
    pub off_since: Option<Timestamp>,
    /// When production's machine was on.
    #[serde(default)]
    pub on_since: Option<Timestamp>,
}

/// What a pass or a run moved, bytes unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// Read from the side the data comes from.
    pub bytes_read: u64,
    /// Of these, read from production's disks.
    pub bytes_read_production: u64,
    /// Sent to the other side.
    pub bytes_written: u64,
    /// Blocks that were looked at and found equal.
    pub blocks_equal: u64,
}

impl FailbackRecord {
    /// Whether production's disks are known to hold what the layers that were sent do.
    pub fn is_as_sent(&self) -> bool {
        self.home.disks.is_empty() || !self.written.is_empty()
    }
}

impl Carried {
    /// Adds another disk's or pass's.
    pub fn add(&mut self, other: Self) {
        self.bytes_read += other.bytes_read;
        self.bytes_read_production += other.bytes_read_production;
        self.bytes_written += other.bytes_written;
        self.blocks_equal += other.blocks_equal;
    }
}

/// What a restore point came of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A run of the job.
    Job,
    /// A backup that was there before the job.
    Seed,
    /// A machine of the target that was there before the job.
    Mapped,
    /// Production, while it was on its way to a planned failover.
    Planned,
    /// The replica's own writes, before the sides were changed back.
    PreFailback,
}

/// The backup that a restore point was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SourcePoint {
    /// The repository.
    pub repository: Uuid,
    /// Its machine.
    pub machine: Uuid,
    /// The point, as it was called when it was read.
    pub point: Uuid,
    /// Whose content it has where it is a copy or was written anew: the repository and the point it was taken as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_as: Option<(Uuid, Uuid)>,
}

impl SourcePoint {
    /// A point of `repo`.
    pub fn of(repo: &Repository, point: &Point) -> Self {
        let origin = point.record.as_ref().and_then(|record| record.origin.as_ref());
        let taken_as = origin.map(|origin| (origin.repository, origin.point));
        Self { repository: repo.id(), machine: point.machine, point: point.id, taken_as }
    }

    /// The point among those that `repo` lists of its machine; retention may have written it anew, under another id.
    pub fn among<'p>(&self, repo: &Repository, listed: &'p [Point]) -> Option<&'p Point> {
        if repo.id() != self.repository {
            return None;
        }
        let taken_as = self.taken_as.unwrap_or((self.repository, self.point));
        let same = |point: &&Point| {
            let identity = point.identity(repo);
            point.machine == self.machine && (identity.repository, identity.point) == taken_as
        };
        listed.iter().find(|point| point.id == self.point).or_else(|| listed.iter().find(same))
    }
}

/// A restore point of a replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PointRecord {
    /// Version of the record.
    pub version: u32,
    /// Its id.
    pub id: Uuid,
    /// Number of its layers, and its place in the order.
    pub number: u64,
    /// When its disks looked like this: for a replica of a backup, the backup's own time.
    pub taken: Timestamp,
    /// When it was made.
    pub made: Timestamp,
    /// What it came of.
    pub origin: Origin,
    /// The backup it was made of.
    #[serde(default)]
    pub source: Option<SourcePoint>,
    /// Its disks.
    pub disks: Vec<Top>,
    /// The machine, as it was then.
    pub description: MachineDescription,
    /// What was moved for it.
    #[serde(default)]
    pub carried: Carried,
    /// Disks that the point before has, that it has not, and that no rule leaves out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<String>,
}

impl PointRecord {
    /// Disks that are not in this point and were in one before it. `earlier` are the points before it.
    pub fn lacks<'p>(&'p self, earlier: &'p [PointRecord]) -> BTreeSet<&'p str> {
        let gone = earlier.iter().chain([self]).flat_map(|point| &point.gone).map(String::as_str);
        gone.filter(|disk| !self.disks.iter().any(|top| top.disk == *disk)).collect()
    }
}
