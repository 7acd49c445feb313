//! What a site consists of. Names are the cross-reference; every one of them was proven when the file was read.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::schedule::Schedule;

/// One repository of a site.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RepositoryEntry {
    /// Its folder.
    pub url: PathBuf,
    /// Whether commands use it when none is named.
    pub default: bool,
    /// Disks read or written at once; `None` is the default.
    pub max_tasks: Option<u32>,
    /// How fast it is read and written.
    pub limits: Limits,
}

/// Rates of all tasks together, bytes per second.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Reading; `None` is no limit.
    pub read: Option<u64>,
    /// Writing; `None` is no limit.
    pub write: Option<u64>,
    /// Other rates at other times; the lowest that applies counts.
    pub hours: Vec<LimitHours>,
}

/// Rates for a part of the day.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitHours {
    /// When they apply.
    pub window: crate::schedule::Window,
    /// Reading, bytes per second.
    pub read: Option<u64>,
    /// Writing, bytes per second.
    pub write: Option<u64>,
}

/// The catalogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogueEntry {
    /// `sqlite:PATH` or `postgres://USER@HOST/DATABASE`, without a password.
    pub url: String,
    /// Where the password is.
    pub password: Option<Secret>,
}

/// Where a secret is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Secret {
    /// A systemd credential.
    Credential(String),
    /// A file.
    File(PathBuf),
    /// What a program prints.
    Command(String),
    /// An environment variable.
    Env(String),
}

/// Where machines run: QEMU, started and steered by us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Folder of the machines: `IMAGES/MACHINE/machine.toml` and disks.
    pub images: PathBuf,
    /// Folder of the QMP sockets of running machines; `None` is below the runtime folder.
    pub runtime: Option<PathBuf>,
    /// Disks read or written at once; `None` is the default.
    pub max_tasks: Option<u32>,
}

/// Hosts that have one folder of machines between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Names of hosts, the one to begin with first.
    pub members: Vec<String>,
    /// Disks read or written at once on all of them; `None` is the sum of the members'.
    pub max_tasks: Option<u32>,
}

/// A machine that is protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Where its disks are.
    pub source: MachineSource,
    /// Its newest point is to be no older than this.
    pub rpo: Option<Duration>,
    /// Disks that are left out.
    pub exclude_disks: Vec<String>,
}

/// Where a machine's disks are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineSource {
    /// On a host, running or not.
    Host {
        /// Name of the host.
        host: String,
        /// What the host calls it: the name of its folder there.
        name: String,
    },
    /// Images that nothing runs on.
    Images {
        /// SOURCE by disk.
        disks: BTreeMap<String, String>,
        /// Its description, TOML or libvirt XML.
        description: Option<PathBuf>,
    },
}

/// Something that is done again and again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Whether it runs by itself.
    pub enabled: bool,
    /// Whether it goes before others.
    pub high_priority: bool,
    /// When it runs.
    pub schedule: Schedule,
    /// What happens after a failure.
    pub retry: Retry,
    /// Program before the first disk.
    pub pre: Option<PathBuf>,
    /// Program after the last.
    pub post: Option<PathBuf>,
    /// How fast it reads and writes.
    pub limits: Limits,
    /// What it does.
    pub kind: JobKind,
}

/// What a job does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// Makes restore points.
    Backup(BackupJob),
    /// Keeps replicas.
    Replication(ReplicationJob),
    /// Copies restore points.
    Copy(CopyJob),
    /// Checks stored points.
    Health(HealthJob),
}

impl JobKind {
    /// The word for it in the file.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Backup(_) => "backup",
            Self::Replication(_) => "replication",
            Self::Copy(_) => "copy",
            Self::Health(_) => "health",
        }
    }

    /// The machines it names; none where it takes what it finds.
    pub fn machines(&self) -> &[String] {
        match self {
            Self::Backup(job) => &job.machines,
            Self::Replication(job) => &job.machines,
            Self::Copy(job) => &job.machines,
            Self::Health(job) => &job.machines,
        }
    }
}

/// After a failure: only what failed is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// How often.
    pub count: u32,
    /// How long after.
    pub interval: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self { count: 3, interval: Duration::from_secs(600) }
    }
}

/// Which points stay: what any rule wants. No rule at all keeps everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// The newest points.
    pub last: Option<u32>,
    /// Points of so many days; the day of the run is not counted.
    pub days: Option<u32>,
    /// The newest of so many hours.
    pub hourly: Option<u32>,
    /// Of so many days that have one.
    pub daily: Option<u32>,
    /// Of so many ISO weeks.
    pub weekly: Option<u32>,
    /// Of so many months.
    pub monthly: Option<u32>,
    /// Of so many years.
    pub yearly: Option<u32>,
}

/// Makes a restore point of each machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupJob {
    /// Machines.
    pub machines: Vec<String>,
    /// Repository.
    pub to: String,
    /// Which points stay.
    pub keep: Option<Keep>,
    /// Where the changed blocks are not known.
    pub on_incremental_impossible: OnImpossible,
    /// Application consistency.
    pub freeze: Freeze,
    /// Disks of a machine at once.
    pub parallel_disks: u32,
}

/// What to do where the changed blocks are not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnImpossible {
    /// Everything is read and compared, and that is reported.
    #[default]
    Full,
    /// The machine fails.
    Fail,
}

/// Whether the guest is asked to settle its file systems.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Freeze {
    /// Without it the machine fails.
    Require,
    /// Without it the point is crash-consistent: with a warning where the machine has an agent that does not do it, with
    /// a note where it has none.
    #[default]
    Try,
    /// Never.
    Off,
}

/// Keeps a machine ready to start on another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicationJob {
    /// Machines.
    pub machines: Vec<String>,
    /// Where content comes from.
    pub source: ReplicaSource,
    /// Host where the replicas stand.
    pub host: String,
    /// Another folder than the host's `images`.
    pub path: Option<PathBuf>,
    /// The replica's name is the machine's with this.
    pub name_suffix: String,
    /// Points of each replica.
    pub points_to_keep: u32,
    /// Repository for digests.
    pub metadata: Option<String>,
    /// Networks of the target.
    pub network_map: Vec<NetworkMap>,
    /// Addresses at failover.
    pub reip: Vec<ReIp>,
    /// Existing machines of the target, by machine.
    pub mapping: BTreeMap<String, String>,
    /// Disks of a machine at once.
    pub parallel_disks: u32,
    /// Bytes of a block of the digests.
    pub block_bytes: u64,
    /// The newest point is to be no older than this.
    pub rpo_warn: Option<Duration>,
    /// Whether what was written is read back.
    pub verify: bool,
    /// Whether repositories that belong to another installation are read as well.
    pub imported: bool,
}

impl ReplicationJob {
    /// The name of a machine's replica.
    pub fn replica_of(&self, machine: &str) -> String {
        self.mapping.get(machine).cloned().unwrap_or_else(|| format!("{machine}{}", self.name_suffix))
    }
}

/// Where a replica's content comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplicaSource {
    /// Production storage.
    Production {
        /// A restore point instead, if it is younger than this.
        prefer_backup: Option<Duration>,
        /// Repository for the first run.
        seed: Option<String>,
        /// Repositories whose points may be preferred.
        repositories: Vec<String>,
    },
    /// Restore points only.
    Backup {
        /// The newest complete point of any of them.
        repositories: Vec<String>,
        /// Which of the points that were missed.
        catch_up: CatchUpPoints,
    },
}

/// Which of the points that a replica has missed are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CatchUpPoints {
    /// The newest.
    #[default]
    Latest,
    /// Each, in order.
    All,
}

/// A network of the source and what takes its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkMap {
    /// Network of the source.
    pub from: String,
    /// Network of the target.
    pub to: String,
    /// VLAN of the source; `None` and 0 are any.
    pub from_vlan: Option<u32>,
    /// VLAN of the target; `None` and 0 are untagged.
    pub to_vlan: Option<u32>,
}

/// A rule for addresses at failover.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReIp {
    /// Pattern of the source, a star for any number.
    pub from: String,
    /// Pattern of the target.
    pub to: String,
    /// Netmask.
    pub mask: String,
    /// Default gateway.
    pub gateway: Option<String>,
    /// Name servers.
    pub dns: Vec<String>,
    /// Who changes them in the guest.
    pub through: Through,
}

/// Who changes addresses in a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Through {
    /// Programs of a plan, which are given the rule.
    #[default]
    Programs,
    /// The guest's agent, as soon as it answers.
    Agent,
}

/// Copies restore points to another repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyJob {
    /// Machines.
    pub machines: Vec<String>,
    /// Repositories that are read.
    pub from: Vec<String>,
    /// Repository that is written.
    pub to: String,
    /// Which points.
    pub mode: CopyMode,
    /// Which copies stay.
    pub keep: Option<Keep>,
}

/// Which points a copy job takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyMode {
    /// Each new one, oldest first.
    Immediate,
    /// The newest at each run.
    #[default]
    Periodic,
}

/// Reads stored points back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthJob {
    /// What is checked.
    pub repository: String,
    /// Only these machines, if any are named.
    pub machines: Vec<String>,
    /// Whether all points are read, or each machine's newest.
    pub points: HealthPoints,
    /// Repositories with copies.
    pub repair_from: Vec<String>,
}

/// Which points are checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HealthPoints {
    /// Each machine's newest complete one, with all files it draws from.
    #[default]
    Latest,
    /// All.
    All,
}

/// How much one worker does at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    /// Disks at once.
    pub max_tasks: u32,
    /// What all tasks together may read, bytes per second.
    pub read: Option<u64>,
    /// What all tasks together may write, bytes per second.
    pub write: Option<u64>,
}

impl Default for Proxy {
    fn default() -> Self {
        Self { max_tasks: 4, read: None, write: None }
    }
}

/// Machines that fail over together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// In this order.
    pub entries: Vec<PlanEntry>,
    /// What happens to the source machines.
    pub fence: Fencing,
    /// Programs before the first machine.
    pub pre: Vec<PathBuf>,
    /// Programs after the last.
    pub post: Vec<PathBuf>,
    /// Machines starting at once.
    pub at_once: u32,
}

/// What happens to a source machine at failover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fencing {
    /// It is asked to shut down.
    Graceful,
    /// It is switched off.
    Force,
    /// Nothing.
    #[default]
    None,
}

/// A machine of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanEntry {
    /// The machine.
    pub machine: String,
    /// Machines of the plan that are ready before it; `None` is the entry before.
    pub after: Option<Vec<String>>,
    /// Waited after its start.
    pub delay: Duration,
    /// When it is ready: all of them have opened, one after the other.
    pub gates: Vec<Gate>,
    /// How long its gates may take together.
    pub timeout: Duration,
    /// What happens when it does not come up.
    pub on_failure: OnFailure,
}

/// When a machine is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Its agent answers.
    Agent,
    /// A port takes connections.
    Tcp(u16),
    /// A page answers.
    Http {
        /// Port.
        port: u16,
        /// Path, with its slash.
        path: String,
    },
    /// A program ends with 0.
    Program(PathBuf),
}

/// What happens when a machine of a plan does not come up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// The others go on.
    #[default]
    Continue,
    /// The plan halts.
    Stop,
    /// Somebody decides.
    Wait,
}
