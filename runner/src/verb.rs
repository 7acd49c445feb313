//! One module per verb: its options and what it does.
//!
//! Invariants
//! - A verb prints through [`Context::out`] only and fails with a [`Fail`].
//! - What a dry run refuses, the real run refuses with the same code.

pub mod backup;
pub mod bench;
pub mod commit;
pub mod completions;
pub mod config;
pub mod demo;
pub mod diff;
pub mod doctor;
pub mod door;
pub mod events;
pub mod explain;
pub mod export;
pub mod failback;
pub mod failover;
pub mod finalize;
pub mod forget;
pub mod guard;
pub mod info;
pub mod init;
pub mod jobs;
pub mod leases;
pub mod man;
pub mod map;
pub mod mount;
mod ops;
pub mod permanent;
pub mod plan;
pub mod points;
pub mod recover;
pub mod replicas;
pub mod run;
pub mod serve;
pub mod session;
pub mod sessions;
pub mod status;
pub mod undo;
pub mod verify;
pub mod wait;
pub mod worker;

use crate::{cli::Verb, context::Context, fail::Result};

impl Verb {
    /// The verb's name, as in its JSON schema.
    pub fn name(&self) -> &'static str {
        match self {
            Verb::Info(_) => "info",
            Verb::Mount(_) => "mount",
            Verb::Recover(_) => "recover",
            Verb::Status(_) => "status",
            Verb::Wait(_) => "wait",
            Verb::Session(_) => "session",
            Verb::Finalize(_) => "finalize",
            Verb::Demo(_) => "demo",
            Verb::Init(_) => "init",
            Verb::Backup(_) => "backup",
            Verb::Points(_) => "points",
            Verb::Forget(_) => "forget",
            Verb::Verify(_) => "verify",
            Verb::Map(_) => "map",
            Verb::Diff(_) => "diff",
            Verb::Export(_) => "export",
            Verb::Leases(_) => "leases",
            Verb::Events(_) => "events",
            Verb::Config(_) => "config",
            Verb::Run(_) => "run",
            Verb::Serve(_) => "serve",
            Verb::Worker(_) => "worker",
            Verb::Sessions(_) => "sessions",
            Verb::Jobs(_) => "jobs",
            Verb::Failover(_) => "failover",
            Verb::Failback(_) => "failback",
            Verb::Commit(_) => "commit",
            Verb::Undo(_) => "undo",
            Verb::Permanent(_) => "permanent",
            Verb::Plan(_) => "plan",
            Verb::Replicas(_) => "replicas",
            Verb::Bench(_) => "bench",
            Verb::Doctor(_) => "doctor",
            Verb::Explain(_) => "explain",
            Verb::Completions(_) => "completions",
            Verb::Man(_) => "man",
            Verb::Door(_) => "door",
            Verb::Guard(_) => "guard",
        }
    }

    /// Does it.
    pub fn run(&self, context: &Context) -> Result<()> {
        match self {
            Verb::Info(args) => info::run(context, args),
            Verb::Mount(args) => mount::run(context, args),
            Verb::Recover(args) => recover::run(context, args),
            Verb::Status(args) => status::run(context, args),
            Verb::Wait(args) => wait::run(context, args),
            Verb::Session(args) => session::run(context, args),
            Verb::Finalize(args) => finalize::run(context, args),
            Verb::Demo(args) => demo::run(context, args),
            Verb::Init(args) => init::run(context, args),
            Verb::Backup(args) => backup::run(context, args),
            Verb::Points(args) => points::run(context, args),
            Verb::Forget(args) => forget::run(context, args),
            Verb::Verify(args) => verify::run(context, args),
            Verb::Map(args) => map::run(context, args),
            Verb::Diff(args) => diff::run(context, args),
            Verb::Export(args) => export::run(context, args),
            Verb::Leases(args) => leases::run(context, args),
            Verb::Events(args) => events::run(context, args),
            Verb::Config(args) => config::run(context, args),
            Verb::Run(args) => run::run(context, args),
            Verb::Serve(args) => serve::run(context, args),
            Verb::Worker(args) => worker::run(context, args),
            Verb::Sessions(args) => sessions::run(context, args),
            Verb::Jobs(args) => jobs::run(context, args),
            Verb::Failover(args) => failover::run(context, args),
            Verb::Failback(args) => failback::run(context, args),
            Verb::Commit(args) => commit::run(context, args),
            Verb::Undo(args) => undo::run(context, args),
            Verb::Permanent(args) => permanent::run(context, args),
            Verb::Plan(args) => plan::run(context, args),
            Verb::Replicas(args) => replicas::run(context, args),
            Verb::Bench(args) => bench::run(context, args),
            Verb::Doctor(args) => doctor::run(context, args),
            Verb::Explain(args) => explain::run(context, args),
            Verb::Completions(args) => completions::run(context, args),
            Verb::Man(args) => man::run(context, args),
            Verb::Door(args) => door::run(context, args),
            Verb::Guard(args) => guard::run(context, args),
        }
    }
}

/// A `NAME=SOURCE` option value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedSource {
    /// Name of the disk.
    pub name: String,
    /// SOURCE word, not yet read.
    pub source: String,
}

impl std::str::FromStr for NamedSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, source)) if !name.is_empty() && !source.is_empty() && !name.contains(['/', ':', '@']) => {
                Ok(Self { name: name.to_owned(), source: source.to_owned() })
            }
            _ => Err("it takes NAME=SOURCE, like vda=/images/db01.qcow2".to_owned()),
        }
    }
}
