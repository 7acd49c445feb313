//! Where operations on replicas are carried out: catalogue, host, journal, and the way back after a crash.
//!
//! Invariants
//! - An operation begins with a look at the state, the stamp in the folder and whatever died there before it.
//! - The state changes in the catalogue after the last step of an operation, in the write that ends the operation. A
//!   death before it is gone on from and changes nothing twice.
//! - A stamp that is not the catalogue's means that somebody else has this replica: nothing is touched.
//!
//! Not here: what the operations do.

use std::{
    fmt::Debug,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use aquifer_formats::repo::record::Owner;
use aquifer_vdisk::BlockCache;
use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use uuid::Uuid;

use super::{
    build::Pace,
    digests::put_file,
    model::{PointRecord, ReplicaRecord},
    state::{Op, State},
    trust,
};
use crate::{
    catalogue::{self, Catalogue, Change, Event, Fence, OperationId, PointRow, Stored},
    fail::{Code, Fail, Result},
    host::{Host, Network, Places, Rooms, Running},
    step::{AfterCrash, End, Journal, Plan, Progress},
};

/// A replica as the catalogue has it.
pub type Row = Stored<ReplicaRecord>;

/// Told warnings.
pub type Warn<'a> = &'a (dyn Fn(Code, String) + Sync);

/// Says whether this process may go on.
pub type Alive<'a> = &'a (dyn Fn() -> Result<()> + Sync);

/// What operations work with.
#[derive(Clone, Copy)]
pub struct Desk<'a> {
    /// The catalogue.
    pub catalogue: &'a Catalogue,
    /// The lease everything durable is done under.
    pub fence: &'a Fence,
    /// The hypervisor of both sides.
    pub host: &'a dyn Host,
    /// Folders for the sockets of machines.
    pub rooms: &'a Rooms,
    /// This installation.
    pub me: &'a Owner,
    /// Decoded blocks.
    pub cache: &'a Arc<BlockCache>,
    /// Told what is read; may hold back or end it.
    pub pace: Pace<'a>,
    /// Told what to look at.
    pub warn: Warn<'a>,
    /// Where network cards are plugged in.
    pub network: Network,
    /// How long a guest of production has to turn itself off.
    pub grace: Duration,
    /// Asked before and after each note in the journal; a failure ends everything at once, as the death of the process
    /// would.
    pub alive: Alive<'a>,
}

impl Debug for Desk<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").field("fence", &self.fence).finish_non_exhaustive()
    }
}

/// How an operation went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Went {
    /// To its end.
    Done,
    /// Wholly back.
    Undone(Fail),
    /// Past its point of no return, and not to its end.
    Stuck(Fail),
}

/// An operation as it is known to whoever has to go on with it.
pub trait Work: Serialize + DeserializeOwned + Clone {
    /// Which operation.
    const OP: Op;

    /// Its name in the journal.
    const KIND: &'static str;

    /// Its steps.
    fn plan<'a>(desk: &'a Desk<'a>) -> Plan<'a, Self>;

    /// What it has made of the replica. Done twice it is done once.
    fn settle(&self, record: &mut ReplicaRecord, went: &Went);
}

/// The stamp in a replica's folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Version of the stamp.
    pub version: u32,
    /// Identity of the chain.
    pub lineage: Uuid,
    /// How often the sides were changed.
    pub epoch: u64,
    /// The installation that works with it.
    pub owner: Uuid,
    /// Its name, for people.
    pub owner_name: String,
    /// When, for people.
    pub written: Timestamp,
}

/// Name of the stamp.
pub(super) const STAMP: &str = "replica.json";

impl Stamp {
    /// The stamp of a folder, if there is one.
    ///
    /// # Errors
    /// [`Code::Corrupt`]; I/O.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(STAMP);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| {
                Fail::new(Code::Corrupt, "the stamp of a replica cannot be read").at(path.display()).cause(e)
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Fail::io(path.display(), "read", &error)),
        }
    }
}

struct Kept<'a> {
    desk: &'a Desk<'a>,
    id: OperationId,
}

impl Journal for Kept<'_> {
    fn note(&self, cursor: u32, data: &Value, with: &[Change]) -> Result<()> {
        (self.desk.alive)()?;
        self.desk.catalogue.step(self.desk.fence, self.id, cursor, data, with)?;
        (self.desk.alive)()
    }
}

/// How the catalogue names a replica.
pub fn object(name: &str) -> String {
    format!("replica/{name}")
}

impl Desk<'_> {
    /// A replica.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub fn load(&self, name: &str) -> Result<Row> {
        let row = self.catalogue.replica::<ReplicaRecord>(name)?;
        let row = row.ok_or_else(|| {
            Fail::new(Code::NotFound, format!("there is no replica `{name}`")).help("aquifer replicas")
        })?;
        Ok(Stored { record: row.record.clone().check()?, ..row })
    }

    /// Tells what happens to a replica.
    ///
    /// # Errors
    /// A lost lease.
    pub fn tell(&self, name: &str, op: &str, what: String) -> Result<()> {
        let event = Event {
            object: object(name),
            op: op.to_owned(),
            session: self.fence.session,
            user: self.fence.owner.clone(),
            reason: Some(what),
            ..Event::default()
        };
        Ok(self.catalogue.event_of(self.fence, &event)?)
    }

    /// Stores a replica.
    ///
    /// # Errors
    /// [`Code::Busy`] where it was changed meanwhile; a lost lease.
    pub fn store(&self, row: Row) -> Result<Row> {
        let state = row.record.state.name().to_owned();
        let (source, job) = (row.record.machine.clone(), row.record.job.clone());
        Ok(self.catalogue.put_replica(self.fence, &Stored { state, source, job, ..row })?)
    }

    /// The same as part of another change.
    ///
    /// # Errors
    /// A record that cannot be written.
    pub fn stored(&self, row: Row) -> Result<Change> {
        let Stored { name, revision, record, .. } = row;
        let state = record.state.name().to_owned();
        let (source, job) = (record.machine.clone(), record.job.clone());
        Ok(Change::Replica(Stored { name, revision, state, source, job, record: value(&record)? }))
    }

    /// The restore points of a replica in the order they were made.
    ///
    /// # Errors
    /// The catalogue's.
    pub fn points(&self, name: &str) -> Result<Vec<PointRecord>> {
        let mut points: Vec<PointRecord> =
            self.catalogue.points_of::<PointRecord>(name)?.into_iter().map(|row| row.record).collect();
        points.sort_by_key(|point| point.number);
        Ok(points)
    }

    /// Makes a restore point known; one that is known stays as it is.
    ///
    /// # Errors
    /// The catalogue's.
    pub fn put_point(&self, name: &str, point: &PointRecord) -> Result<()> {
        let id = point_id(point.number);
        if self.catalogue.points_of::<PointRecord>(name)?.iter().any(|row| row.id == id) {
            return Ok(());
        }
        let taken_at = point.taken.as_millisecond();
        let row = PointRow { id, revision: 0, taken_at, state: "complete".into(), record: point.clone() };
        self.catalogue.put_point(self.fence, name, &row)?;
        Ok(())
    }

    /// The same as part of another change.
    ///
    /// # Errors
    /// A record that cannot be written.
    pub fn known(&self, name: &str, point: &PointRecord) -> Result<Change> {
        let (id, taken_at) = (point_id(point.number), point.taken.as_millisecond());
        let row = PointRow { id, revision: 0, taken_at, state: "complete".into(), record: value(point)? };
        Ok(Change::Point(name.to_owned(), row))
    }

    /// Makes a restore point unknown.
    ///
    /// # Errors
    /// The catalogue's.
    pub fn drop_point(&self, name: &str, number: u64) -> Result<()> {
        Ok(self.catalogue.drop_point(self.fence, name, &point_id(number))?)
    }

    /// Makes all restore points of a replica unknown.
    ///
    /// # Errors
    /// The catalogue's.
    pub fn drop_points(&self, name: &str) -> Result<()> {
        self.points(name)?.iter().try_for_each(|point| self.drop_point(name, point.number))
    }

    /// Where the files and sockets of the machine in `folder` are.
    pub fn places(&self, folder: &Path) -> Places {
        self.rooms.places(folder)
    }

    /// The machine that runs in `folder`.
    pub fn running(&self, folder: &Path) -> Option<Running> {
        self.host.find(&self.places(folder))
    }

    /// Refuses a folder that is somebody else's, or that was changed behind the catalogue.
    ///
    /// # Errors
    /// [`Code::ForeignOwner`].
    pub fn check_stamp(&self, record: &ReplicaRecord) -> Result<()> {
        self.check_stamp_during(record, None)
    }

    /// The same while `open`, an operation that was cut short, has not come to its end: it may have put its stamp, or
    /// taken ours away.
    ///
    /// # Errors
    /// As [`Desk::check_stamp`].
    pub(super) fn check_stamp_during(&self, record: &ReplicaRecord, open: Option<Op>) -> Result<()> {
        let stamp = Stamp::read(&record.folder)?;
        let foreign = |why: String| {
            let fail =
                Fail::new(Code::ForeignOwner, format!("the replica {} is not ours any more: {why}", record.name));
            Err(fail.at(record.folder.join(STAMP).display()))
        };
        match stamp {
            None if record.state == State::Absent || matches!(open, Some(Op::Remove | Op::Permanent)) => Ok(()),
            None if !has_entries(&record.folder) => {
                let what = format!("the folder of the replica {} is not there, or is empty", record.name);
                let help = format!("aquifer replicas {} --remove --force    # if it is lost for good", record.name);
                let cause = "what holds it may not be mounted";
                Err(Fail::new(Code::RepoOffline, what).at(record.folder.display()).cause(cause).help(help))
            }
            None if trust::recall(&record.folder)?.is_some_and(|copy| copy.record.is_same_chain(record)) => {
                let what = format!("the stamp of {} was gone; the ledger of its layers proves it ours", record.name);
                (self.warn)(Code::WarnHost, what);
                self.stamp(&record.folder, record.lineage, record.epoch)
            }
            None => foreign("its stamp is gone".into()).map_err(|fail: Fail| {
                fail.help(format!("aquifer replicas {} --remove --force    # then its folder is yours", record.name))
            }),
            Some(stamp) if stamp.lineage != record.lineage => {
                foreign(format!("its folder holds another chain, of {}", stamp.owner_name))
            }
            // A change of sides that was cut short: the stamp is put before the catalogue hears of it.
            Some(stamp)
                if stamp.epoch == record.epoch + 1
                    && stamp.owner == self.me.id
                    && open.is_some_and(Op::changes_sides) =>
            {
                Ok(())
            }
            Some(stamp) if stamp.epoch != record.epoch => {
                let (theirs, ours) = (stamp.epoch, record.epoch);
                foreign(format!("its sides were changed {theirs} times by {}, here {ours} are known", stamp.owner_name))
            }
            Some(_) => Ok(()),
        }
    }

    /// Puts the stamp.
    ///
    /// # Errors
    /// I/O.
    pub fn stamp(&self, folder: &Path, lineage: Uuid, epoch: u64) -> Result<()> {
        let (owner, owner_name) = (self.me.id, self.me.name.clone());
        let stamp = Stamp { version: 1, lineage, epoch, owner, owner_name, written: Timestamp::now() };
        let text = serde_json::to_vec_pretty(&stamp).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
        put_file(&folder.join(STAMP), &text)
    }

    /// Puts the stamp of a replica that is known, with this count of changes of sides.
    ///
    /// # Errors
    /// [`Code::NotFound`]; I/O.
    pub fn stamp_as(&self, name: &str, epoch: u64) -> Result<()> {
        let record = self.load(name)?.record;
        self.stamp(&record.folder, record.lineage, epoch)
    }

    /// Looks whether `op` is possible now, after whatever died before it was brought to an end.
    ///
    /// # Errors
    /// [`Code::State`], [`Code::ForeignOwner`], [`Code::Busy`].
    pub fn ready_for(&self, name: &str, op: Op) -> Result<Row> {
        super::recover::recover_for(self, name, op)?;
        let row = self.load(name)?;
        row.record.state.step(op)?;
        self.check_stamp(&row.record)?;
        Ok(row)
    }

    /// Carries out an operation.
    ///
    /// # Errors
    /// Why it went back or got stuck; [`Code::Busy`] while another one is open.
    pub fn carry_out<W: Work>(&self, name: &str, work: W, reason: Option<String>) -> Result<W> {
        let intent = value(&Progress::new(work.clone()))?;
        // What it begins with is the first note of its journal.
        let id = self.catalogue.begin_operation(self.fence, &object(name), W::OP.name(), &intent)?;
        (self.alive)()?;
        let plan = W::plan(self);
        let end = plan.execute(Progress::new(work), &Kept { desk: self, id })?;
        self.conclude(name, id, end, reason)
    }

    /// Goes on with an operation whose worker died.
    ///
    /// # Errors
    /// As [`Desk::carry_out`].
    pub(super) fn go_on<W: Work>(&self, name: &str, operation: &catalogue::Operation) -> Result<W> {
        self.go_on_with(name, operation, |_| ())
    }

    /// The same, told what its worker was not.
    ///
    /// # Errors
    /// As [`Desk::carry_out`].
    pub(super) fn go_on_with<W: Work>(
        &self,
        name: &str,
        operation: &catalogue::Operation,
        tell: impl FnOnce(&mut W),
    ) -> Result<W> {
        self.resume(name, operation, W::plan(self), tell)
    }

    /// Takes an operation back whose worker died, if it has not passed its point of no return.
    ///
    /// # Errors
    /// As [`Desk::carry_out`].
    pub(super) fn go_back<W: Work>(&self, name: &str, operation: &catalogue::Operation) -> Result<W> {
        self.resume(name, operation, W::plan(self).after_crash(AfterCrash::Back), |_| ())
    }

    fn resume<W: Work>(
        &self,
        name: &str,
        operation: &catalogue::Operation,
        plan: Plan<'_, W>,
        tell: impl FnOnce(&mut W),
    ) -> Result<W> {
        let data = if operation.data.is_null() { &operation.intent } else { &operation.data };
        let mut at = Progress::<W>::read(data.clone())?;
        tell(&mut at.work);
        let end = plan.recover(at, &Kept { desk: self, id: operation.id })?;
        self.conclude(name, operation.id, end, Some("its worker died".into()))
    }

    /// An operation that got stuck may have put its stamp or not: the record follows what is there.
    fn follow_stamp(&self, record: &mut ReplicaRecord, before: u64) -> Result<()> {
        let ours = |stamp: &Stamp| stamp.lineage == record.lineage && stamp.owner == self.me.id;
        if let Some(stamp) = Stamp::read(&record.folder)?.filter(ours)
            && (before..=before + 1).contains(&stamp.epoch)
        {
            record.epoch = stamp.epoch;
        }
        Ok(())
    }

    fn conclude<W: Work>(&self, name: &str, id: OperationId, end: End<W>, reason: Option<String>) -> Result<W> {
        let (work, went) = match end {
            End::Done(work) => (work, Went::Done),
            End::Undone(work, fail) => (work, Went::Undone(fail)),
            End::Stuck(work, fail) => (work, Went::Stuck(fail)),
        };
        (self.alive)()?;
        let mut row = self.load(name)?;
        let before = row.record.clone();
        work.settle(&mut row.record, &went);
        if matches!(went, Went::Stuck(_)) && W::OP.changes_sides() {
            self.follow_stamp(&mut row.record, before.epoch)?;
        }
        let (from, to) = (before.state, row.record.state);
        if !to.is_final() && row.record.folder.join(STAMP).exists() {
            // The copy lies outside of the catalogue, and tells what the operation ends with: whoever dies before that
            // is written comes here again.
            self.catalogue.still_ours(self.fence)?;
            trust::remember(self, &row.record)?;
        }
        let error = match &went {
            Went::Done => None,
            Went::Undone(fail) | Went::Stuck(fail) => Some(fail.what.clone()),
        };
        let mut with = Vec::new();
        if row.record != before {
            with.push(self.stored(row)?);
        }
        with.push(Change::Told(Event {
            object: object(name),
            from: Some(from.name().into()),
            to: Some(to.name().into()),
            op: W::OP.name().into(),
            session: self.fence.session,
            user: self.fence.owner.clone(),
            reason,
            error,
        }));
        let (ended, outcome) = match went {
            Went::Done => (catalogue::End::Done, Ok(work)),
            Went::Undone(fail) => (catalogue::End::Undone(fail.what.clone()), Err(fail)),
            Went::Stuck(fail) => (catalogue::End::Failed(fail.what.clone()), Err(fail)),
        };
        (self.alive)()?;
        self.catalogue.end_operation(self.fence, id, &ended, &with)?;
        outcome
    }
}

fn value(of: &impl Serialize) -> Result<Value> {
    serde_json::to_value(of).map_err(|e| Fail::new(Code::Bug, e.to_string()))
}

/// How the catalogue names a restore point: sorts as the points do.
pub fn point_id(number: u64) -> String {
    format!("{number:012}")
}

/// A file of a replica.
pub fn in_folder(folder: &Path, file: &str) -> PathBuf {
    folder.join(file)
}

/// Whether anything lies in a folder: an empty one is what is left where nothing is mounted.
fn has_entries(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}
