//! `backup`: stores a restore point of a machine.
//!
//! Invariants
//! - Nothing is listed before all disks are stored, sealed and durable.
//! - A bitmap only says where to look: if it cannot be trusted, everything is read and compared, and
//!   that is said.
//! - What an interrupted run has stored is used again; blocks are read anew unless the source is
//!   provably the same.
//! - Sources are never written, so their bitmaps are not cleared here.

mod changed;
mod feed;
pub(crate) mod machine;
mod resume;

use std::{path::PathBuf, sync::Arc, time::Instant};

use aquifer_formats::{
    aql::Stats,
    repo::{
        DiskName, Machine, NewPoint, Point, PointQuery, Repository, Transaction,
        record::{Consistency, Found, MachineDescription, PointKind, PointRecord},
    },
};
use aquifer_vdisk::{Chain, Disk};
use jiff::Timestamp;
use serde::Serialize;

use self::{changed::Look, resume::Begun};
use super::NamedSource;
use crate::{
    cli::DryRun,
    context::{Context, quoted},
    copy,
    fail::{Code, Fail, Result},
    repository,
    source::{SelectedDisk, Selection, SourceOptions, select},
    stop::Stop,
    units,
};

/// Options of `backup`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the machine
    #[arg(value_name = "MACHINE")]
    pub machine: String,
    /// A disk and where its content is read; may be given several times
    #[arg(long, value_name = "NAME=SOURCE", required = true)]
    pub disk: Vec<NamedSource>,
    /// The machine's description: TOML or libvirt domain XML
    #[arg(long = "machine", value_name = "FILE")]
    pub description: Option<PathBuf>,
    /// The file with its UEFI variables (libvirt's <nvram>), to travel with the point
    #[arg(long, value_name = "FILE")]
    pub nvram: Option<PathBuf>,
    /// Store everything, standing on no earlier point
    #[arg(long)]
    pub full: bool,
    /// Read only what this bitmap of the source says has changed since the last point
    #[arg(long, value_name = "NAME", conflicts_with = "full")]
    pub bitmap: Option<String>,
    /// Also follow backing files that lie in this folder; may be given several times
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

/// A disk to be backed up.
struct Wanted {
    name: DiskName,
    selected: SelectedDisk,
    /// Keeps a source in the repository from being forgotten.
    _selection: Selection,
    chain: Arc<Chain>,
    disk: Disk,
    format: String,
}

#[derive(Serialize)]
struct DiskRecord<'a> {
    disk: &'a str,
    source_format: &'a str,
    size: u64,
    found: &'a Found,
    bytes_to_read: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    counted: Option<Counted>,
}

#[derive(Serialize)]
struct Counted {
    blocks_given: u64,
    blocks_zero: u64,
    blocks_unchanged: u64,
    blocks_shared: u64,
    blocks_written: u64,
    bytes_raw: u64,
    bytes_stored: u64,
    file_bytes: u64,
}

impl Counted {
    fn of(stats: Stats, file_bytes: u64) -> Self {
        Self {
            blocks_given: stats.blocks_given,
            blocks_zero: stats.blocks_zero,
            blocks_unchanged: stats.blocks_unchanged,
            blocks_shared: stats.blocks_shared,
            blocks_written: stats.blocks_written,
            bytes_raw: stats.bytes_raw,
            bytes_stored: stats.bytes_stored,
            file_bytes,
        }
    }
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let stop = context.stop()?;
    let repo = if args.dry.dry_run { repository::open(context)? } else { repository::open_to_change(context)? };
    let wanted = open_sources(context, args)?;
    let description = machine::describe(context, args, &wanted)?;
    let known = match repo.machine(&args.machine) {
        Ok(machine) => Some(machine),
        Err(aquifer_formats::repo::Error::NotFound { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let parent = match &known {
        Some(machine) if !args.full => newest(&repo, machine)?,
        _ => None,
    };
    if args.dry.dry_run {
        return plan(context, args, &repo, &wanted, parent.as_ref());
    }
    let machine = match known {
        Some(machine) => machine,
        None => repo.machine_or_new(&args.machine)?,
    };
    let run = Run { context, args, stop, clock: Instant::now() };
    run.store(&repo, &machine, parent.as_ref(), &wanted, description)
}

fn open_sources(context: &Context, args: &Args) -> Result<Vec<Wanted>> {
    let cache = context.cache()?;
    let mut wanted: Vec<Wanted> = Vec::new();
    for named in &args.disk {
        let name =
            DiskName::new(named.name.as_str()).map_err(|error| Fail { code: Code::Usage, ..Fail::from(error) })?;
        if wanted.iter().any(|known| known.name == name) {
            return Err(Fail::new(Code::Usage, format!("the disk {name} is named twice")));
        }
        let options = SourceOptions { allow_backing: args.allow_backing.clone(), ..SourceOptions::default() };
        let selection = select(context, &named.source, &options)?;
        let selected = selection.single()?.clone();
        let chain = selected.open_chain(&cache)?;
        let disk = Disk::read_only(name.as_str(), chain.clone());
        let format = super::info::kind_of(&selected)?;
        wanted.push(Wanted { name, selected, _selection: selection, chain, disk, format });
    }
    Ok(wanted)
}

/// The newest complete point, if there is one.
fn newest(repo: &Repository, machine: &Machine) -> Result<Option<Point>> {
    match repo.resolve(machine, &PointQuery::Latest(0)) {
        Ok(point) => Ok(Some(point)),
        Err(aquifer_formats::repo::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Says what a run would do.
fn plan(context: &Context, args: &Args, repo: &Repository, wanted: &[Wanted], parent: Option<&Point>) -> Result<()> {
    for disk in wanted {
        let stands_on = parent_reader(repo, parent, &disk.name)?;
        let look = changed::look(context, args, disk, stands_on.as_deref())?;
        let bytes_to_read = look.bytes(&disk.disk)?;
        let record = DiskRecord {
            disk: disk.name.as_str(),
            source_format: &disk.format,
            size: disk.disk.size(),
            found: &look.found,
            bytes_to_read,
            counted: None,
        };
        context.out.record("plan", &record);
        let kind = if stands_on.is_some() { "an increment" } else { "a full" };
        context.out.line(format_args!(
            "would read {} of {} from {} for {kind}",
            units::bytes(bytes_to_read),
            units::bytes(disk.disk.size()),
            disk.selected.name
        ));
    }
    Ok(())
}

/// The parent's disk of this name.
fn parent_reader(
    repo: &Repository,
    parent: Option<&Point>,
    name: &DiskName,
) -> Result<Option<Arc<aquifer_formats::aql::Reader>>> {
    match parent {
        Some(point) if point.record.as_ref().is_some_and(|r| r.disks.iter().any(|d| d.name == *name)) => {
            Ok(Some(repo.open_disk(point, name)?))
        }
        _ => Ok(None),
    }
}

struct Run<'a> {
    context: &'a Context,
    args: &'a Args,
    stop: Stop,
    clock: Instant,
}

/// What became of a disk.
enum Stored {
    /// It is in the point, in a file of so many bytes.
    Whole(u64),
    /// An interrupted run had finished it, at a time when the source may have looked otherwise.
    Stale,
}

impl Run<'_> {
    fn store(
        &self,
        repo: &Repository,
        machine: &Machine,
        parent: Option<&Point>,
        wanted: &[Wanted],
        description: MachineDescription,
    ) -> Result<()> {
        let now = Timestamp::now();
        let mut begun = resume::begin(self.context, self.args, repo, machine, parent, wanted)?;
        let bytes = match self.disks(&mut begun, wanted) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => {
                let stale = begun.transaction;
                begun = resume::begin_afresh(self.context, self.args, repo, machine, stale, wanted)?;
                match self.disks(&mut begun, wanted) {
                    Ok(bytes) => bytes.unwrap_or_default(),
                    Err(fail) => return self.leave(begun.transaction, fail),
                }
            }
            Err(fail) => return self.leave(begun.transaction, fail),
        };
        let created = begun.same_since.unwrap_or(now);
        let new = NewPoint { created, consistency: Consistency::Unknown, machine: description };
        let id = begun.transaction.id();
        let record = begun.transaction.commit(new)?;
        resume::forget(self.context, id);
        self.report(machine, &record, bytes);
        Ok(())
    }

    /// What is stored stays, and the next run goes on with it.
    fn leave(&self, transaction: Transaction<'_>, fail: Fail) -> Result<()> {
        // A lease that cannot be withdrawn ends by standing still.
        let _ = transaction.interrupt();
        Err(self.advise(fail))
    }

    /// Stores all disks; answers their bytes. `None` where one is stale.
    fn disks(&self, begun: &mut Begun<'_>, wanted: &[Wanted]) -> Result<Option<u64>> {
        let mut bytes = 0;
        for disk in wanted {
            match self.disk(begun, disk)? {
                Stored::Whole(file_bytes) => bytes += file_bytes,
                Stored::Stale => return Ok(None),
            }
        }
        Ok(Some(bytes))
    }

    fn disk(&self, begun: &mut Begun<'_>, wanted: &Wanted) -> Result<Stored> {
        let stands_on = if self.args.full { None } else { begun.transaction.parent_disk(&wanted.name)? };
        let look = changed::look(self.context, self.args, wanted, stands_on.as_deref())?;
        let counted = match feed::feed(self, begun, wanted, &look)? {
            feed::Fed::Stale => return Ok(Stored::Stale),
            feed::Fed::Before => None,
            feed::Fed::Now(stats) => Some(stats),
        };
        let stored = begun.transaction.sealed(&wanted.name, look.found.clone(), &wanted.format)?;
        let record = DiskRecord {
            disk: wanted.name.as_str(),
            source_format: &wanted.format,
            size: wanted.disk.size(),
            found: &look.found,
            bytes_to_read: look.bytes(&wanted.disk)?,
            counted: counted.map(|stats| Counted::of(stats, stored.file_bytes)),
        };
        self.context.out.record("disk", &record);
        if let Some(stats) = counted {
            self.context.out.line(format_args!(
                "{}: {} blocks read, {} zero, {} unchanged, {} shared, {} written ({} in {})",
                wanted.name,
                stats.blocks_given,
                stats.blocks_zero,
                stats.blocks_unchanged,
                stats.blocks_shared,
                stats.blocks_written,
                units::bytes(stats.bytes_raw),
                units::bytes(stats.bytes_stored)
            ));
        }
        Ok(Stored::Whole(stored.file_bytes))
    }

    fn report(&self, machine: &Machine, record: &PointRecord, bytes: u64) {
        let kind = match record.kind {
            PointKind::Full => "full",
            PointKind::Increment => "increment",
        };
        let seconds = self.clock.elapsed().as_secs();
        self.context.out.record(
            "point",
            &serde_json::json!({
                "machine": machine.name, "point": record.id.to_string(), "kind": kind,
                "created": record.created, "bytes_stored": bytes, "seconds": seconds,
            }),
        );
        let (name, id) = (&machine.name, record.id);
        let (bytes, time) = (units::bytes(bytes), units::seconds(seconds));
        self.context.out.line(format_args!("{name}@{id}: {kind}, {bytes} stored in {time}"));
        let recover = format!("aquifer recover {} --into ./{}", quoted(name), quoted(name));
        self.context.out.next(recover);
    }

    fn advise(&self, fail: Fail) -> Fail {
        match fail.code {
            Code::Interrupted | Code::Terminated | Code::Capacity | Code::Net | Code::Timeout => {
                fail.help_again("    # it goes on from what is stored")
            }
            _ => fail,
        }
    }
}

impl Look {
    /// Bytes of the disk that have to be read.
    fn bytes(&self, disk: &Disk) -> Result<u64> {
        match &self.ranges {
            None => copy::used_bytes(disk),
            Some(delta) => Ok(delta.bytes()),
        }
    }
}
