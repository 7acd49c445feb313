//! Backup copy: restore points of one repository into another.
//!
//! Invariants
//! - A point is copied once, whatever it is called where; a copy has the content, time, machine and identity of what
//!   it was copied from, in blocks of the size that the target has.
//! - Where the point below was copied from the same repository, the maps of the two points say what to read.
//! - What is read is held by a lease until it was copied.
//!
//! Not here: storing (`backup`), which copies stay (`retain`).

use std::collections::BTreeSet;

use aquifer_formats::repo::{
    Machine, Point, PointState, Repository,
    record::{Origin, PointDisk, PointRecord},
};
use aquifer_vdisk::Delta;

use super::stored::{Report, Run};
use crate::{
    backup::{self, Hint, Order, Wanted},
    fail::{Code, Fail, Result},
    repository::{self, Hold},
    site::{CopyJob, CopyMode, OnImpossible},
    source::{SelectedDisk, spec_of},
};

/// A point that is to be copied.
struct Candidate<'r> {
    repo: &'r Repository,
    machine: Machine,
    point: Point,
    record: PointRecord,
    identity: Origin,
}

/// Copies what the job wants of one machine.
///
/// # Errors
/// A repository; [`Code::NotFound`] where no source has the machine.
pub fn run(run: &Run<'_>, job: &CopyJob) -> Result<Report> {
    let target = repository::open_named_to_change(run.context, &job.to)?;
    let sources = sources(run, job)?;
    let machine = target.machine_or_new(run.machine)?;
    let mut report = Report::default();
    let wanted = choose(run, job, &sources, &target, Some(&machine))?;
    if wanted.is_empty() {
        run.context.out.say(format_args!("{}: every point is copied already", run.machine));
    }
    for candidate in &wanted {
        let parent = backup::newest(&target, &machine)?;
        let made = copy_point(run, candidate, &target, &machine, parent.as_ref(), None)?;
        report.points.push(made.record.id);
        report.bytes_read += made.bytes_read;
        report.bytes_stored += made.bytes_stored;
    }
    drop(wanted);
    drop(target);
    report.retained = run.retain(&job.to, job.keep.as_ref());
    Ok(report)
}

/// Bytes a run would read at most: those of the disks that were not copied yet.
///
/// # Errors
/// As [`run`].
pub fn estimate(run: &Run<'_>, job: &CopyJob) -> Result<u64> {
    let target = repository::open_named(run.context, &job.to)?;
    let sources = sources(run, job)?;
    let machine = target.machine(run.machine).ok();
    let wanted = choose(run, job, &sources, &target, machine.as_ref())?;
    let bytes = |disk: &PointDisk| if machine.is_none() { disk.data_bytes } else { disk.stored_bytes };
    Ok(wanted.iter().flat_map(|candidate| &candidate.record.disks).map(bytes).sum())
}

fn sources(run: &Run<'_>, job: &CopyJob) -> Result<Vec<Repository>> {
    job.from.iter().map(|name| repository::open_named(run.context, name)).collect()
}

/// The points to copy, oldest first.
fn choose<'r>(
    run: &Run<'_>,
    job: &CopyJob,
    sources: &'r [Repository],
    target: &Repository,
    machine: Option<&Machine>,
) -> Result<Vec<Candidate<'r>>> {
    let copies = machine.map_or_else(|| Ok(Vec::new()), |machine| target.points(machine))?;
    let complete: Vec<&Point> = copies.iter().filter(|copy| copy.state == PointState::Complete).collect();
    let mut known: BTreeSet<Origin> = complete.iter().map(|copy| copy.identity(target)).collect();
    let newest = complete.iter().filter_map(|copy| copy.created()).max();
    let mut found = Vec::new();
    let mut seen = false;
    for repo in sources {
        let source = match repo.machine(run.machine) {
            Ok(source) => source,
            Err(aquifer_formats::repo::Error::NotFound { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        for point in repo.points(&source)? {
            seen = true;
            let Some(record) = point.record.clone().filter(|_| point.state == PointState::Complete) else { continue };
            let identity = point.identity(repo);
            // What retention has taken from the target is older than its newest, and is not brought back.
            if newest.is_some_and(|newest| record.created <= newest) || !known.insert(identity.clone()) {
                continue;
            }
            found.push(Candidate { repo, machine: source.clone(), point, record, identity });
        }
    }
    if !seen {
        let what = format!("no backup of {} was found in {}", run.machine, job.from.join(", "));
        return Err(Fail::new(Code::NotFound, what).help("aquifer points"));
    }
    found.sort_by_key(|candidate| candidate.record.created);
    // The first copy is of the newest point; from then on each, or the newest at each run.
    if newest.is_none() || job.mode == CopyMode::Periodic {
        found.drain(..found.len().saturating_sub(1));
    }
    Ok(found)
}

/// Copies a point; with `instead` into the place of a damaged one, standing on nothing.
fn copy_point(
    run: &Run<'_>,
    from: &Candidate<'_>,
    target: &Repository,
    machine: &Machine,
    parent: Option<&Point>,
    instead: Option<&Point>,
) -> Result<backup::Made> {
    let _hold = Hold::read(from.repo, &from.machine, &from.point, repository::holder("copy"))?;
    let below = parent.map(|parent| parent.identity(target));
    let below = below.and_then(|identity| same_point(from.repo, &from.machine, &identity).transpose()).transpose()?;
    let mut wanted: Vec<Wanted> = Vec::new();
    for disk in &from.record.disks {
        let reader = from.repo.open_disk(&from.point, &disk.name)?;
        let hint = match &below {
            Some(below) if has(below, disk) => changed(from.repo, below, &reader, disk)?,
            _ => Hint::None,
        };
        let spec = spec_of(&reader, disk)?;
        let selected = SelectedDisk { name: disk.name.as_str().to_owned(), spec };
        wanted.push(backup::open_selected(run.context, &disk.name, selected, hint)?);
    }
    let order = Order {
        context: run.context,
        by: "copy",
        hand: run.hand,
        full: instead.is_some(),
        fallback: OnImpossible::Full,
        consistency: from.record.consistency,
        created: Some(from.record.created),
        origin: Some(from.identity.clone()),
        instead,
        stop: run.stop,
        pace: run.pace,
        ahead: Some(run.ahead),
        stages: Some(run.stages),
        notes: Some(&run.notes),
    };
    order.store(target, machine, parent, &wanted, from.record.machine.clone())
}

fn has(point: &Point, disk: &PointDisk) -> bool {
    point.record.iter().flat_map(|record| &record.disks).any(|known| known.name == disk.name)
}

/// What the maps of two points of one repository say.
fn changed(repo: &Repository, below: &Point, reader: &aquifer_formats::aql::Reader, disk: &PointDisk) -> Result<Hint> {
    let old = repo.open_disk(below, &disk.name)?;
    match aquifer_formats::aql::delta(&old, reader) {
        Ok(ranges) => Ok(Hint::Ranges(ranges.into_iter().collect::<Delta>())),
        // Other block sizes: only the bytes can tell.
        Err(aquifer_formats::Error::Unsupported { .. }) => Ok(Hint::None),
        Err(error) => Err(error.into()),
    }
}

/// The complete point of that identity.
fn same_point(repo: &Repository, machine: &Machine, identity: &Origin) -> Result<Option<Point>> {
    let points = repo.points(machine)?;
    Ok(points.into_iter().find(|point| point.state == PointState::Complete && point.identity(repo) == *identity))
}

/// Puts a damaged point right from the first repository that has its copy; answers the new point and that repository, if
/// one had.
pub(super) fn repair(
    run: &Run<'_>,
    copies: &[String],
    target: &Repository,
    machine: &Machine,
    damaged: &Point,
) -> Result<Option<(backup::Made, String)>> {
    let identity = damaged.identity(target);
    for name in copies {
        let repo = repository::open_named(run.context, name)?;
        let Ok(source) = repo.machine(run.machine) else { continue };
        let Some(point) = same_point(&repo, &source, &identity)? else { continue };
        let Some(record) = point.record.clone() else { continue };
        let candidate = Candidate { repo: &repo, machine: source, point, record, identity: identity.clone() };
        let made = copy_point(run, &candidate, target, machine, None, Some(damaged))?;
        return Ok(Some((made, name.clone())));
    }
    Ok(None)
}
