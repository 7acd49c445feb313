//! Health check: reads stored points back, goes on where it was cut, gives way to others, repairs from copies.
//!
//! Invariants
//! - A check that was cut, or gave way, goes on with the leaf it had come to, and tells in the end what an unbroken one
//!   tells; a point that changed in between is begun anew.
//! - Damage is noted in the repository before anything is tried: a damaged point is no source of anything any more,
//!   and the next backup stands on a point that is whole.
//! - A repair is a new point in the place of the damaged one; nothing is written over.
//! - A point that is lost before anything of it is read, with a file that is gone or cut off, is damaged like one whose
//!   blocks are. What is lost is not noted: a file may come back.
//! - Where only one of two copies of what describes a layer is damaged, nothing is lost, and that is told and mended all
//!   the same: the next damage would cost the disk.
//!
//! Not here: the checks themselves (`aquifer_formats::aql::verify`).

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use aquifer_formats::{
    Layer as _,
    aql::{Depth, verify},
    repo::{Machine, Point, PointState, Repository, keeper, record::PointDisk},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    copy,
    stored::{Report, Run},
};
use crate::{
    fail::{Code, Fail, Result},
    repository::{self, Hold},
    site::{HealthJob, HealthPoints},
};

/// How often the cursor is kept, and others are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How far a check has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Cursor {
    /// Points that were checked whole in this round, with the seals of their disks.
    done: Vec<Uuid>,
    /// The point that is being checked.
    point: Option<Uuid>,
    /// The disk of it.
    disk: String,
    /// Leaves of it that were checked.
    leaves: u64,
    /// What has no second copy in disks of it that were checked.
    #[serde(default)]
    weakened: Option<String>,
    /// When others were looked for, in this run.
    #[serde(skip)]
    looked: Option<Instant>,
}

/// How a disk's check ended.
enum End {
    Whole,
    /// All can be read, from the only copy that is left of something.
    Weakened(String),
    Damaged(String),
    GaveWay,
}

/// Checks one machine's points.
///
/// # Errors
/// The repository; the interruption. Damage is no failure of the check, it is reported.
pub fn run(run: &Run<'_>, job: &HealthJob) -> Result<Report> {
    let report = look(run, job)?;
    if !report.damaged.is_empty() {
        let what = format!("{}: {} damaged, {} repaired", run.machine, report.damaged.len(), report.repaired.len());
        run.context.out.say(&what);
        run.notes.lock().push(what);
    }
    Ok(report)
}

fn look(run: &Run<'_>, job: &HealthJob) -> Result<Report> {
    let repo = repository::open_named_to_change(run.context, &job.repository)?;
    let machine = repo.machine(run.machine)?;
    let place = place(run, &repo, &machine)?;
    let mut cursor: Cursor = fs::read(&place).ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
    // So much is done in every run, whoever else is there.
    cursor.looked = Some(Instant::now());
    let mut report = Report::default();
    for point in chosen(&repo, &machine, job.points)? {
        if cursor.done.contains(&point.id) {
            continue;
        }
        let before = repo.points(&machine)?;
        if !before.iter().any(|known| known.id == point.id) {
            continue;
        }
        // As far as names and lengths tell.
        if let Some(why) = point.state.why() {
            report.damaged.push(point.id);
            run.note(Code::ChainBroken, format!("{}@{} is {}: {why}", run.machine, point.id, point.state.name()));
            mend(run, job, &repo, &machine, &point, &mut report)?;
            cursor.done.push(point.id);
            keep(&place, &cursor);
            continue;
        }
        if cursor.point != Some(point.id) {
            cursor = Cursor { point: Some(point.id), disk: String::new(), leaves: 0, weakened: None, ..cursor };
        }
        match check(run, &repo, &machine, &point, &mut cursor, &place, &mut report)? {
            End::Whole => {}
            End::Weakened(why) => {
                report.damaged.push(point.id);
                let what =
                    format!("{}@{} can be read, but has no second copy of something: {why}", run.machine, point.id);
                run.note(Code::WarnCheck, what);
                mend(run, job, &repo, &machine, &point, &mut report)?;
            }
            End::GaveWay => {
                report.gave_way = true;
                return Ok(report);
            }
            End::Damaged(why) => {
                keeper::mark_damaged(&repo, &machine, point.id, Some(why.clone()))?;
                report.damaged.push(point.id);
                run.note(Code::BlockCorrupt, format!("{}@{} is damaged: {why}", run.machine, point.id));
                mend(run, job, &repo, &machine, &point, &mut report)?;
            }
        }
        cursor.done.push(point.id);
        cursor.point = None;
        keep(&place, &cursor);
    }
    // The round is over; the next one begins anew.
    let _ = fs::remove_file(&place);
    Ok(report)
}

/// Bytes a run would read: what the chosen points hold.
///
/// # Errors
/// As [`run`].
pub fn estimate(run: &Run<'_>, job: &HealthJob) -> Result<u64> {
    let repo = repository::open_named(run.context, &job.repository)?;
    let machine = repo.machine(run.machine)?;
    let mut points = chosen(&repo, &machine, job.points)?;
    points.retain(|point| point.state == PointState::Complete);
    Ok(points.iter().filter_map(|point| point.record.as_ref()).flat_map(|r| &r.disks).map(|d| d.data_bytes).sum())
}

/// The points to check, newest first. One that was not finished is none yet.
fn chosen(repo: &Repository, machine: &Machine, which: HealthPoints) -> Result<Vec<Point>> {
    let mut points = repo.points(machine)?;
    points.retain(|point| point.state != PointState::Incomplete);
    points.reverse();
    if which == HealthPoints::Latest {
        points.truncate(1);
    }
    Ok(points)
}

fn check(
    run: &Run<'_>,
    repo: &Repository,
    machine: &Machine,
    point: &Point,
    cursor: &mut Cursor,
    place: &PathBuf,
    report: &mut Report,
) -> Result<End> {
    let hold = Hold::read(repo, machine, point, repository::holder("health"))?;
    let disks: Vec<&PointDisk> = point.record.iter().flat_map(|record| &record.disks).collect();
    let from = disks.iter().position(|disk| disk.name.as_str() == cursor.disk).unwrap_or(0);
    for disk in disks.into_iter().skip(from) {
        if cursor.disk != disk.name.as_str() {
            disk.name.as_str().clone_into(&mut cursor.disk);
            cursor.leaves = 0;
        }
        let reader = match repo.open_disk(point, &disk.name) {
            Ok(reader) => reader,
            Err(error) => return Ok(End::Damaged(format!("{}: {error}", disk.name))),
        };
        let steps = verify(&reader, Depth::Deep(Some(repo.content_key().clone())));
        let damaged = |damage: &aquifer_formats::aql::Damage| End::Damaged(format!("{}: {}", disk.name, damage.error));
        let whole = steps.whole();
        if let Some(damage) = whole.damage.iter().find(|damage| !damage.disk.is_empty()) {
            return Ok(damaged(damage));
        }
        if let Some(damage) = whole.damage.first() {
            cursor.weakened = Some(format!("{}: {}", disk.name, damage.error));
        }
        while cursor.leaves < steps.leaves() {
            let finding = steps.leaf(cursor.leaves);
            let bytes = finding.blocks_read.saturating_mul(reader.grain());
            report.bytes_read += bytes;
            if let Some(damage) = finding.damage.first() {
                return Ok(damaged(damage));
            }
            cursor.leaves += 1;
            let went_on = (run.pace)(bytes).and_then(|()| run.stop.check());
            if cursor.looked.is_none_or(|at| at.elapsed() >= LOOK_EVERY) || went_on.is_err() {
                keep(place, cursor);
                cursor.looked = Some(Instant::now());
                went_on?;
                if others(run, repo, machine)? {
                    let what = format!("{}: others need the chain; the check goes on later", run.machine);
                    run.context.out.say(what);
                    drop(hold);
                    return Ok(End::GaveWay);
                }
            }
        }
        cursor.disk.clear();
        cursor.leaves = 0;
    }
    Ok(cursor.weakened.take().map_or(End::Whole, End::Weakened))
}

/// Whether somebody else who lives reads or appends to the machine.
fn others(run: &Run<'_>, repo: &Repository, machine: &Machine) -> Result<bool> {
    let me = repository::holder("health");
    let mine = |name: &str, process: u32| name == me.name && process == me.process;
    let tell = repository::tell(run.context)?;
    let (live, _) = repository::observing(run.context, |seen| Ok(seen.observe(repo, Instant::now(), &tell)?))?;
    Ok(live.iter().any(|l| l.machine == machine.id && !mine(&l.holder.name, l.holder.process)))
}

/// Puts a damaged point right, if some copy of it is whole.
fn mend(
    run: &Run<'_>,
    job: &HealthJob,
    repo: &Repository,
    machine: &Machine,
    point: &Point,
    report: &mut Report,
) -> Result<()> {
    match copy::repair(run, &job.repair_from, repo, machine, point) {
        Ok(Some((made, from))) => {
            report.repaired.push(made.record.id);
            report.bytes_stored += made.bytes_stored;
            let what = format!("{}@{} was put right as {} from {from}", run.machine, point.id, made.record.id);
            run.tell("repair", what)
        }
        Ok(None) if job.repair_from.is_empty() => Ok(()),
        Ok(None) => {
            let what = format!("{}@{}: none of {} has a whole copy", run.machine, point.id, job.repair_from.join(", "));
            run.note(Code::WarnSkipped, what);
            Ok(())
        }
        Err(fail) if matches!(fail.code, Code::Interrupted | Code::Terminated) => Err(fail),
        Err(fail) => {
            run.note(Code::WarnSkipped, format!("{}@{} cannot be repaired: {}", run.machine, point.id, fail.what));
            Ok(())
        }
    }
}

fn place(run: &Run<'_>, repo: &Repository, machine: &Machine) -> Result<PathBuf> {
    let folder = run.context.home()?.join("health");
    fs::create_dir_all(&folder).map_err(|e| Fail::io(folder.display(), "create", &e))?;
    Ok(folder.join(format!("{}-{}-{}.json", repo.id().simple(), machine.id.simple(), run.job)))
}

/// A cursor that cannot be kept costs a check its way, no more.
fn keep(place: &PathBuf, cursor: &Cursor) {
    if let Ok(text) = serde_json::to_vec(cursor) {
        let _ = fs::write(place, text);
    }
}
