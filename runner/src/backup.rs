//! Storing a restore point: what the verb `backup` and the jobs share.
//!
//! Invariants
//! - Nothing is listed before all disks are stored, sealed and durable.
//! - A bitmap only says where to look: if it cannot be trusted, everything is read and compared, and
//!   that is said.
//! - What an interrupted run has stored is used again; blocks are read anew unless the source is
//!   provably the same.
//! - Sources are never written, so their bitmaps are not cleared here.
//!
//! Not here: where disks are found, how a running machine holds still ([`crate::job`]), options (`verb::backup`).

pub(crate) mod changed;
pub(crate) mod describe;
mod feed;
mod link;
mod resume;

use std::{sync::Arc, time::Instant};

use aquifer_formats::{
    aql::Stats,
    repo::{
        DiskName, Error, Machine, NewPoint, Point, PointQuery, PointState, Repository, Transaction,
        record::{Consistency, Found, Holder, MachineDescription, Origin, PointKind, PointRecord},
    },
};
use aquifer_vdisk::{Chain, Delta, Disk};
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::Serialize;

use self::{changed::Look, resume::Begun};
use crate::{
    context::{Context, quoted},
    copy,
    fail::{Code, Fail, Result},
    repository::{self, Hand},
    site::OnImpossible,
    source::{SelectedDisk, Selection, SourceOptions, files::Still, select},
    stop::Stop,
    tasks::Stages,
    units,
};

/// Called with the bytes of each piece that was moved: it may wait, to keep a rate, and ends the work by failing.
pub type Pace<'a> = &'a (dyn Fn(u64) -> Result<()> + Sync);

/// Called with the bytes there are to read, for each disk as it begins.
pub type Ahead<'a> = &'a (dyn Fn(u64) + Sync);

/// No rate, no end.
pub fn at_will(_: u64) -> Result<()> {
    Ok(())
}

/// What is known of the changes of a disk.
#[derive(Clone, Debug, Default)]
pub(crate) enum Hint {
    /// Nothing: it is read and compared.
    #[default]
    None,
    /// A bitmap of the source that was begun with a point.
    Bitmap(String),
    /// A bitmap of the source that somebody names.
    Named(String),
    /// Somebody wanted a bitmap, and there is none to be believed.
    Missing(String),
    /// Proven by the maps of two points of another repository.
    Ranges(Delta),
}

/// A disk to be backed up.
pub(crate) struct Wanted {
    pub(crate) name: DiskName,
    pub(crate) selected: SelectedDisk,
    /// Keeps a source in the repository from being forgotten.
    pub(crate) selection: Option<Selection>,
    pub(crate) chain: Arc<Chain>,
    pub(crate) disk: Disk,
    pub(crate) format: String,
    pub(crate) hint: Hint,
    /// Its files, where they have to stand still by themselves.
    pub(crate) still: Option<Still>,
    /// Bitmap of the source that counts changes from the new point on.
    pub(crate) mark: Option<String>,
}

/// How a point is made.
pub(crate) struct Order<'a> {
    pub(crate) context: &'a Context,
    /// Who makes it, as leases name it.
    pub(crate) by: &'static str,
    /// The piece of work it is made for, if it is for one.
    pub(crate) hand: Option<Hand>,
    /// Store everything, standing on no earlier point.
    pub(crate) full: bool,
    /// What to do where the changes are not known.
    pub(crate) fallback: OnImpossible,
    /// What state the guest was in.
    pub(crate) consistency: Consistency,
    /// When the disks looked like this; `None`: when the work began.
    pub(crate) created: Option<Timestamp>,
    /// The point of another repository that this is a copy of.
    pub(crate) origin: Option<Origin>,
    /// The damaged point whose place the new one takes.
    pub(crate) instead: Option<&'a Point>,
    pub(crate) stop: Stop,
    pub(crate) pace: Pace<'a>,
    /// Who is told how many bytes there are to read, for each disk as it begins; `None`: a bar is shown.
    pub(crate) ahead: Option<Ahead<'a>>,
    /// Where the time goes, where somebody wants to know.
    pub(crate) stages: Option<&'a Stages>,
    /// Where warnings are noted besides being said.
    pub(crate) notes: Option<&'a Mutex<Vec<String>>>,
}

/// What was stored.
#[derive(Clone, Debug)]
pub struct Made {
    /// The point.
    pub record: PointRecord,
    /// Bytes of its files.
    pub bytes_stored: u64,
    /// Bytes that were read from the sources.
    pub bytes_read: u64,
    /// How long it took, seconds.
    pub seconds: u64,
}

#[derive(Serialize)]
pub(crate) struct DiskRecord<'a> {
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

/// Opens a disk by a SOURCE word. Its files must not be written to meanwhile, and that is looked at.
pub(crate) fn open_source(
    context: &Context,
    name: &DiskName,
    word: &str,
    options: &SourceOptions,
    hint: Hint,
) -> Result<Wanted> {
    let selection = select(context, word, options)?;
    let selected = selection.single()?.clone();
    let seen = open_selected(context, name, selected.clone(), Hint::None)?;
    let still = Still::of(name.as_str(), &seen.chain)?;
    drop(seen);
    // An image's tables are read when it is opened: that has to be after it was looked at.
    let mut wanted = open_selected(context, name, selected, hint)?;
    wanted.selection = Some(selection);
    wanted.still = Some(still);
    Ok(wanted)
}

/// Opens a disk that was found already.
pub(crate) fn open_selected(context: &Context, name: &DiskName, selected: SelectedDisk, hint: Hint) -> Result<Wanted> {
    let chain = selected.open_chain(&context.cache()?)?;
    let disk = Disk::read_only(name.as_str(), chain.clone());
    let format = crate::verb::info::kind_of(&selected)?;
    Ok(Wanted { name: name.clone(), selected, selection: None, chain, disk, format, hint, still: None, mark: None })
}

/// The newest complete point, if there is one.
pub(crate) fn newest(repo: &Repository, machine: &Machine) -> Result<Option<Point>> {
    match repo.resolve(machine, &PointQuery::Latest(0)) {
        Ok(point) => Ok(Some(point)),
        Err(aquifer_formats::repo::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
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

/// What became of a disk.
enum Stored {
    /// It is in the point, in a file of so many bytes.
    Whole(u64),
    /// An interrupted run had finished it, at a time when the source may have looked otherwise.
    Stale,
}

impl Order<'_> {
    /// This process and its work, as leases name them.
    fn holder(&self) -> Holder {
        let session = self.hand.map(|hand| hand.to_string());
        Holder { session, work: self.work(), ..repository::holder(self.by) }
    }

    /// The piece of work the point is made for, as the point names it; a run that copies makes several.
    fn work(&self) -> Option<String> {
        let work = self.hand?.work();
        let of = self.origin.as_ref().map(|origin| format!(", copy of {}", origin.point));
        Some(work + &of.unwrap_or_default())
    }

    /// The point that an earlier attempt at this work has made, before it was cut short.
    ///
    /// # Errors
    /// The repository's.
    pub(crate) fn made_already(&self, repo: &Repository, machine: &Machine) -> Result<Option<Made>> {
        let Some(work) = self.work() else { return Ok(None) };
        let points = repo.points(machine)?.into_iter().rev();
        let mut whole = points.filter(|point| point.state == PointState::Complete).filter_map(|point| point.record);
        let Some(record) = whole.find(|record| record.work.as_ref() == Some(&work)) else { return Ok(None) };
        self.context.out.say(format_args!("{}: the point {} of this run is there already", machine.name, record.id));
        let bytes_stored = record.disks.iter().map(|disk| disk.file_bytes).sum();
        Ok(Some(Made { record, bytes_stored, bytes_read: 0, seconds: 0 }))
    }

    /// Says what a run would do; answers the bytes it would read.
    pub(crate) fn plan(&self, repo: &Repository, wanted: &[Wanted], parent: Option<&Point>) -> Result<u64> {
        let mut bytes = 0;
        for disk in wanted {
            let stands_on = parent_reader(repo, parent, &disk.name)?;
            let look = changed::look(self, disk, stands_on.as_ref(), parent)?;
            let bytes_to_read = look.bytes(&disk.disk)?;
            let record = DiskRecord {
                disk: disk.name.as_str(),
                source_format: &disk.format,
                size: disk.disk.size(),
                found: &look.found,
                bytes_to_read,
                counted: None,
            };
            self.context.out.record("plan", &record);
            let kind = if stands_on.is_some() { "an increment" } else { "a full" };
            self.context.out.line(format_args!(
                "would read {} of {} from {} for {kind}",
                units::bytes(bytes_to_read),
                units::bytes(disk.disk.size()),
                disk.selected.name
            ));
            bytes += bytes_to_read;
        }
        Ok(bytes)
    }

    /// Stores a point.
    pub(crate) fn store(
        &self,
        repo: &Repository,
        machine: &Machine,
        parent: Option<&Point>,
        wanted: &[Wanted],
        description: MachineDescription,
    ) -> Result<Made> {
        let (clock, now) = (Instant::now(), Timestamp::now());
        let mut begun = resume::begin(self, repo, machine, parent, wanted)?;
        let (bytes_stored, bytes_read) = match self.disks(&mut begun, wanted) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => {
                let stale = begun.transaction;
                begun = resume::begin_afresh(self, repo, machine, stale, wanted)?;
                match self.disks(&mut begun, wanted) {
                    Ok(bytes) => bytes.unwrap_or_default(),
                    Err(fail) => return leave((repo, machine), begun.transaction, fail),
                }
            }
            Err(fail) => return leave((repo, machine), begun.transaction, fail),
        };
        if let Err(fail) = wanted.iter().filter_map(|disk| disk.still.as_ref()).try_for_each(Still::check) {
            return leave((repo, machine), begun.transaction, fail);
        }
        let created = self.created.or(begun.same_since).unwrap_or(now);
        let new =
            NewPoint { created, consistency: self.consistency, machine: description, origin: self.origin.clone() };
        let id = begun.transaction.id();
        let committed = match self.instead {
            Some(damaged) => begun.transaction.commit_instead(damaged),
            None => begun.transaction.commit(new),
        };
        let record = match committed {
            // Another attempt at this work, which was thought lost, was first.
            Err(error @ Error::Exists { .. }) => return self.made_already(repo, machine)?.ok_or_else(|| error.into()),
            outcome => outcome?,
        };
        resume::forget(self.context, id);
        let made = Made { record, bytes_stored, bytes_read, seconds: clock.elapsed().as_secs() };
        self.report(machine, &made);
        Ok(made)
    }

    /// Stores all disks; answers the bytes of their files and the bytes read. `None` where one is stale.
    fn disks(&self, begun: &mut Begun<'_>, wanted: &[Wanted]) -> Result<Option<(u64, u64)>> {
        let (mut stored, mut read) = (0, 0);
        for disk in wanted {
            match self.disk(begun, disk, &mut read)? {
                Stored::Whole(file_bytes) => stored += file_bytes,
                Stored::Stale => return Ok(None),
            }
        }
        Ok(Some((stored, read)))
    }

    fn disk(&self, begun: &mut Begun<'_>, wanted: &Wanted, read: &mut u64) -> Result<Stored> {
        let stands_on = if self.full { None } else { begun.transaction.parent_disk(&wanted.name)? };
        let look = changed::look(self, wanted, stands_on.as_ref(), begun.transaction.parent())?;
        let counted = match feed::feed(self, begun, wanted, &look)? {
            feed::Fed::Stale => return Ok(Stored::Stale),
            feed::Fed::Before => None,
            feed::Fed::Now(stats) => Some(stats),
        };
        let stored = begun.transaction.sealed(&wanted.name, look.found.clone(), &wanted.format)?.file_bytes;
        if let Some(mark) = &wanted.mark {
            begun.transaction.mark(&wanted.name, mark);
        }
        begun.transaction.counting(&wanted.name, changed::counting(wanted)?);
        let bytes_to_read = look.bytes(&wanted.disk)?;
        if counted.is_some() {
            *read += bytes_to_read;
        }
        let record = DiskRecord {
            disk: wanted.name.as_str(),
            source_format: &wanted.format,
            size: wanted.disk.size(),
            found: &look.found,
            bytes_to_read,
            counted: counted.map(|stats| Counted::of(stats, stored)),
        };
        self.context.out.record("disk", &record);
        // A job has several machines at once, and tells of each in one line.
        if let Some(stats) = counted.filter(|_| self.ahead.is_none()) {
            self.context.out.line(format_args!(
                "{}: {} read; {} blocks: {} zero, {} unchanged, {} shared, {} written ({} in {})",
                wanted.name,
                units::bytes(bytes_to_read),
                stats.blocks_given,
                stats.blocks_zero,
                stats.blocks_unchanged,
                stats.blocks_shared,
                stats.blocks_written,
                units::bytes(stats.bytes_raw),
                units::bytes(stats.bytes_stored)
            ));
        }
        Ok(Stored::Whole(stored))
    }

    /// Tells of disks that the complete point before a new one has, and it has not. `left_out` are meant to be missing.
    ///
    /// # Errors
    /// The repository's.
    pub(crate) fn tell_of_gone_disks(
        &self,
        repo: &Repository,
        machine: &Machine,
        made: &PointRecord,
        left_out: &[String],
    ) -> Result<()> {
        let points = repo.points(machine)?;
        let older = points.iter().take_while(|point| point.id != made.id);
        let before = older.filter(|point| point.state == PointState::Complete).last();
        self.warn_of_gone_disks(machine, before, &|disk| {
            left_out.iter().any(|out| out == disk.as_str()) || made.disks.iter().any(|known| known.name == *disk)
        });
        Ok(())
    }

    /// Warns of the disks of a point that are neither there any more nor meant to be missing.
    pub(crate) fn warn_of_gone_disks(
        &self,
        machine: &Machine,
        before: Option<&Point>,
        is_settled: &dyn Fn(&DiskName) -> bool,
    ) {
        let disks = before.and_then(|before| before.record.as_ref()).map(|record| record.disks.as_slice());
        for disk in disks.unwrap_or_default().iter().filter(|disk| !is_settled(&disk.name)) {
            let what = format!("{}: disk {} of the point before is not there any more", machine.name, disk.name);
            self.warn(Code::WarnDiskGone, what, None);
        }
    }

    fn report(&self, machine: &Machine, made: &Made) {
        let record = &made.record;
        let kind = match record.kind {
            PointKind::Full => "full",
            PointKind::Increment => "increment",
        };
        let (seconds, bytes) = (made.seconds, made.bytes_stored);
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
        if self.notes.is_none() {
            let recover = format!("aquifer recover {} --into ./{}", quoted(name), quoted(name));
            self.context.out.next(recover);
        }
    }

    /// Says a warning, and notes it.
    fn warn(&self, code: Code, what: String, help: Option<&str>) {
        self.context.out.warn(code, what.clone(), help);
        if let Some(notes) = self.notes {
            notes.lock().push(what);
        }
    }
}

/// What is stored stays, and the next run goes on with it.
fn leave<T>(of: (&Repository, &Machine), transaction: Transaction<'_>, fail: Fail) -> Result<T> {
    // A lease that cannot be withdrawn ends by standing still.
    let _ = transaction.interrupt();
    Err(advise(of, fail))
}

/// What a run that was cut short leaves, and how it goes on.
fn advise((repo, machine): (&Repository, &Machine), mut fail: Fail) -> Fail {
    if fail.code == Code::Capacity {
        let (place, name) = (quoted(repo.label()), quoted(&machine.name));
        fail.what += &format!(
            "; what is stored stays for the next run, or goes with `aquifer -r {place} forget --interrupted {name}`"
        );
    }
    match fail.code {
        Code::Interrupted | Code::Terminated | Code::Capacity | Code::Net | Code::Timeout => {
            fail.help_again("    # it goes on from what is stored")
        }
        _ => fail,
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
