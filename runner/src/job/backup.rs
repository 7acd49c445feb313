//! Backup jobs: plain images, and machines of a `qemu` host, running or not.
//!
//! Invariants
//! - A bitmap is used only if a stored point names it as its own; one that counts from an earlier point than the newest
//!   says more than it must, never less.
//! - A bitmap that cannot be believed is replaced by reading and comparing everything, and that is said.
//! - The state the guest was in is recorded as it was seen: frozen, as after a loss of power, or off.
//!
//! Not here: storing (`backup`), holding a running machine's disks still ([`fleece`]).

pub mod agent;
pub mod fleece;
pub mod guard;

use std::path::PathBuf;

use aquifer_formats::{
    gate::Gate,
    qcow2::{BitmapTrust, Qcow2},
    repo::{DiskName, Machine, Point, PointState, Repository, record::Consistency},
};
use aquifer_vdisk::ChainSpec;
use jiff::Timestamp;
use serde_json::json;

use self::fleece::{Catch, Fleece, LiveDisk, NotFrozen};
use super::{
    place::Place,
    stored::{Report, Run, without},
};
use crate::{
    backup::{self, Hint, Made, Order, Wanted, describe},
    fail::{Code, Fail, Result},
    repository,
    site::{self, BackupJob, Freeze, MachineSource},
    source::{SelectedDisk, SourceOptions},
};

/// Points whose bitmaps are looked for, newest first.
const MARKS_LOOKED_AT: usize = 8;

/// Where a backup reads.
enum Source<'s> {
    Images(&'s site::Machine),
    Off(Place),
    Running(Place),
}

/// What became of the wish to freeze a running guest.
struct Froze {
    /// Milliseconds its file systems were frozen, if they were.
    ms: Option<u64>,
    /// Why they were not, where that was wanted.
    not: Option<NotFrozen>,
}

/// Makes a restore point of one machine.
///
/// # Errors
/// The source or the repository; [`Code::FileLocked`] where another backup of the machine runs.
pub fn run(run: &Run<'_>, job: &BackupJob) -> Result<Report> {
    run.warn_of_takeover();
    let repo = repository::open_named_to_change(run.context, &job.to)?;
    let unnamed = super::unnamed(&repo, run.context.site()?, run.machine)?;
    if !unnamed.is_empty() {
        run.inform_once(super::told_of_unnamed(run.machine, &job.to, &unnamed))?;
    }
    let machine = repo.machine_or_new(run.machine)?;
    let mut report = Report::default();
    let order = order(run, job, Consistency::Unknown, None);
    let made = match order.made_already(&repo, &machine)? {
        Some(made) => {
            tidy(run);
            made
        }
        None => make(run, job, &repo, &machine, &mut report)?,
    };
    let entry = entry(run)?;
    order.tell_of_gone_disks(&repo, &machine, &made.record, &entry.exclude_disks)?;
    if !entry.exclude_disks.is_empty() {
        run.inform_once(format!("{}{}", run.machine, without(run.context.site()?, run.machine)))?;
    }
    report.points.push(made.record.id);
    report.bytes_read = made.bytes_read;
    report.bytes_stored = made.bytes_stored;
    drop(repo);
    report.retained = run.retain(&job.to, job.keep.as_ref());
    Ok(report)
}

/// Takes down what an earlier attempt at a point added to the running machine before it was killed: a copy of what the
/// guest overwrites grows until somebody does.
fn tidy(run: &Run<'_>) {
    let tidied = match source(run) {
        Ok(Source::Running(place)) => fleece::claim(&place.sockets()).map(drop),
        Ok(Source::Images(_) | Source::Off(_)) => Ok(()),
        Err(fail) => Err(fail),
    };
    if let Err(fail) = tidied {
        let what =
            format!("{}: what a killed backup added to the machine may still be there: {}", run.machine, fail.what);
        run.note(Code::WarnHost, what);
    }
}

fn make(run: &Run<'_>, job: &BackupJob, repo: &Repository, machine: &Machine, report: &mut Report) -> Result<Made> {
    let parent = backup::newest(repo, machine)?;
    let points = marked(repo, machine)?;
    Ok(match source(run)? {
        Source::Images(entry) => {
            let wanted = images(run, entry, &points)?;
            store(run, job, repo, machine, parent.as_ref(), &wanted, &about(run, entry, None), Consistency::Unknown)?
        }
        Source::Off(place) => {
            let entry = entry(run)?;
            for what in place.doubtful(&entry.exclude_disks) {
                run.note(Code::WarnHost, format!("{}: {what}", run.machine));
            }
            let wanted = files(run, entry, &place, &points)?;
            let about = about(run, entry, Some(&place));
            store(run, job, repo, machine, parent.as_ref(), &wanted, &about, Consistency::Off)?
        }
        Source::Running(place) => {
            let (made, froze) = live(run, job, repo, machine, parent.as_ref(), &points, &place)?;
            (report.frozen_ms, report.not_frozen) = (froze.ms, froze.not);
            made
        }
    })
}

/// Bytes a run would read: of a running machine by what its bitmaps count now.
///
/// # Errors
/// As [`run`].
pub fn estimate(run: &Run<'_>, job: &BackupJob) -> Result<u64> {
    run.warn_of_takeover();
    let repo = repository::open_named(run.context, &job.to)?;
    let entry = entry(run)?;
    let (machine, parent) = match repo.machine(run.machine) {
        Ok(machine) => {
            let parent = backup::newest(&repo, &machine)?;
            (Some(machine), parent)
        }
        Err(aquifer_formats::repo::Error::NotFound { .. }) => (None, None),
        Err(error) => return Err(error.into()),
    };
    let points = machine.as_ref().map_or_else(|| Ok(Vec::new()), |machine| marked(&repo, machine))?;
    let order = order(run, job, Consistency::Unknown, None);
    let warn = |have: &[&DiskName]| {
        let is_settled =
            |disk: &DiskName| have.contains(&disk) || entry.exclude_disks.iter().any(|o| o == disk.as_str());
        if let Some(machine) = &machine {
            order.warn_of_gone_disks(machine, parent.as_ref(), &is_settled);
        }
    };
    let wanted = match source(run)? {
        Source::Images(entry) => images(run, entry, &points)?,
        Source::Off(place) => files(run, entry, &place, &points)?,
        Source::Running(place) => {
            let files = some(run, included(entry, &place))?;
            warn(&files.iter().map(|(name, _)| name).collect::<Vec<_>>());
            let missing = || Fail::new(Code::State, "the machine has just ended");
            let mut qmp = fleece::connect(&place.sockets())?.ok_or_else(missing)?;
            let files = place.opened(&mut qmp, files, &|_| {})?;
            let disks = fleece::disks(&mut qmp, &files)?.into_iter().map(|disk| catch(disk, &points));
            return Ok(disks.zip(&files).map(|(caught, (_, file))| dirty_bytes(&caught, file)).sum());
        }
    };
    warn(&wanted.iter().map(|disk| &disk.name).collect::<Vec<_>>());
    order.plan(&repo, &wanted, parent.as_ref())
}

fn entry<'a>(run: &Run<'a>) -> Result<&'a site::Machine> {
    let missing = || Fail::new(Code::NotFound, format!("the site file has no machine `{}`", run.machine));
    run.context.site()?.machines.get(run.machine).ok_or_else(missing)
}

fn source<'a>(run: &Run<'a>) -> Result<Source<'a>> {
    let entry = entry(run)?;
    match &entry.source {
        MachineSource::Images { .. } => Ok(Source::Images(entry)),
        MachineSource::Host { host, name } => {
            let missing = || Fail::new(Code::NotFound, format!("the site file has no host `{host}`"));
            let place = Place::find(run.context, host, run.context.site()?.hosts.get(host).ok_or_else(missing)?, name)?;
            let runs = fleece::connect(&place.sockets())?.is_some();
            Ok(if runs { Source::Running(place) } else { Source::Off(place) })
        }
    }
}

/// Complete points, newest first, as far back as bitmaps are looked for.
fn marked(repo: &Repository, machine: &Machine) -> Result<Vec<Point>> {
    let points = repo.points(machine)?.into_iter().rev();
    Ok(points.filter(|point| point.state == PointState::Complete).take(MARKS_LOOKED_AT).collect())
}

/// The bitmaps that points name for a disk, newest first; none where the newest point lacks the disk.
fn marks<'p>(points: &'p [Point], disk: &DiskName) -> Vec<&'p str> {
    let of = |point: &'p Point| {
        let disks = point.record.as_ref().map(|record| record.disks.as_slice()).unwrap_or_default();
        disks.iter().find(|known| known.name == *disk)
    };
    if points.first().and_then(of).is_none() {
        return Vec::new();
    }
    points.iter().filter_map(of).filter_map(|disk| disk.mark.as_deref()).collect()
}

fn about<'a>(run: &Run<'a>, entry: &'a site::Machine, place: Option<&'a Place>) -> describe::About<'a> {
    let (description, nvram) = match (&entry.source, place) {
        (MachineSource::Images { description, .. }, _) => (description.as_deref(), None),
        (MachineSource::Host { .. }, Some(place)) => (place.description.as_deref(), place.variables.as_deref()),
        (MachineSource::Host { .. }, None) => (None, None),
    };
    describe::About { machine: run.machine, description, nvram, left_out: &entry.exclude_disks }
}

fn order<'a>(run: &'a Run<'_>, job: &BackupJob, consistency: Consistency, created: Option<Timestamp>) -> Order<'a> {
    Order {
        context: run.context,
        by: "backup",
        hand: run.hand,
        full: false,
        fallback: job.on_incremental_impossible,
        consistency,
        created,
        origin: None,
        instead: None,
        stop: run.stop,
        pace: run.pace,
        ahead: Some(run.ahead),
        stages: Some(run.stages),
        notes: Some(&run.notes),
    }
}

#[expect(clippy::too_many_arguments, reason = "each of them is another thing, and a struct of them is used once")]
fn store(
    run: &Run<'_>,
    job: &BackupJob,
    repo: &Repository,
    machine: &Machine,
    parent: Option<&Point>,
    wanted: &[Wanted],
    about: &describe::About<'_>,
    consistency: Consistency,
) -> Result<Made> {
    let description = describe::describe(run.context, about, wanted)?;
    order(run, job, consistency, None).store(repo, machine, parent, wanted, description)
}

/// Disks of a machine of plain images.
fn images(run: &Run<'_>, entry: &site::Machine, points: &[Point]) -> Result<Vec<Wanted>> {
    let MachineSource::Images { disks, .. } = &entry.source else { return Ok(Vec::new()) };
    let mut wanted = Vec::new();
    for (name, word) in disks.iter().filter(|(name, _)| !entry.exclude_disks.contains(name)) {
        let name = DiskName::new(name.as_str())?;
        let mut disk = backup::open_source(run.context, &name, word, &SourceOptions::default(), Hint::None)?;
        disk.hint = hint_of_file(&disk, &marks(points, &name))?;
        wanted.push(disk);
    }
    some(run, wanted)
}

/// Disks of a machine that is off.
fn files(run: &Run<'_>, entry: &site::Machine, place: &Place, points: &[Point]) -> Result<Vec<Wanted>> {
    let mut wanted = Vec::new();
    for (name, path) in included(entry, place) {
        let raw = path.extension().is_none_or(|end| end != "qcow2");
        let word = if raw { format!("raw:{}", path.display()) } else { path.display().to_string() };
        let options = SourceOptions { allow_backing: vec![place.folder.clone()], ..SourceOptions::default() };
        let mut disk = backup::open_source(run.context, &name, &word, &options, Hint::None)?;
        disk.hint = hint_of_file(&disk, &marks(points, &name))?;
        wanted.push(disk);
    }
    some(run, wanted)
}

fn included(entry: &site::Machine, place: &Place) -> Vec<(DiskName, PathBuf)> {
    let all = place.disks.iter();
    all.filter(|(name, _)| !entry.exclude_disks.iter().any(|out| out == name.as_str())).cloned().collect()
}

fn some<T>(run: &Run<'_>, disks: Vec<T>) -> Result<Vec<T>> {
    if disks.is_empty() {
        return Err(Fail::new(Code::NotFound, format!("every disk of {} is excluded", run.machine)));
    }
    Ok(disks)
}

/// The newest believable bitmap in an image at rest that a point names.
fn hint_of_file(disk: &Wanted, marks: &[&str]) -> Result<Hint> {
    let ChainSpec::Image { path, .. } = &disk.selected.spec else { return Ok(Hint::None) };
    if marks.is_empty() || disk.format != "qcow2" {
        return Ok(Hint::None);
    }
    let image = Qcow2::open(Gate::default().enter(path)?.storage())?;
    let bitmaps = image.bitmaps()?;
    let counts =
        |mark: &str| bitmaps.iter().any(|b| b.name == mark && b.recording && b.trust == BitmapTrust::Consistent);
    let good = |mark: &&&str| counts(mark);
    Ok(match marks.iter().find(good) {
        Some(mark) => Hint::Bitmap((*mark).to_owned()),
        None => Hint::Missing(missing(marks)),
    })
}

fn missing(marks: &[&str]) -> String {
    let first = marks.first().copied().unwrap_or_default();
    format!("the bitmap {first} of the last point is not there, or was not closed properly")
}

/// Backs up a running machine; answers how long its guest was frozen.
fn live(
    run: &Run<'_>,
    job: &BackupJob,
    repo: &Repository,
    machine: &Machine,
    parent: Option<&Point>,
    points: &[Point],
    place: &Place,
) -> Result<(Made, Froze)> {
    let entry = entry(run)?;
    let sockets = place.sockets();
    let files = some(run, included(entry, place))?;
    let claim = fleece::claim(&sockets)?;
    let mut qmp = fleece::connect(&sockets)?.ok_or_else(|| Fail::new(Code::State, "the machine has just ended"))?;
    let tell = |what: String| run.note(Code::WarnHost, format!("{}: {what}", run.machine));
    let files = place.opened(&mut qmp, files, &tell)?;
    let disks = fleece::disks(&mut qmp, &files)?;
    drop(qmp);
    let caught: Vec<Catch> = disks.into_iter().map(|disk| catch(disk, points)).collect();
    let hints: Vec<Option<String>> = caught.iter().map(|catch| unbelievable(catch, points)).collect();
    let (guard, _) = run.context.own_command()?;
    let moment = Timestamp::now();
    let (fleece, not_frozen) = Fleece::catch(claim, sockets, caught, job.freeze, &guard)?;
    let ms = fleece.frozen.then(|| u64::try_from(fleece.freeze_time.as_millis()).unwrap_or(u64::MAX));
    let mut froze = Froze { ms, not: None };
    if let Some(why) = not_frozen {
        let what = format!("{}: the point is as after a loss of power: {why}", run.machine);
        let shown = json!({ "machine": run.machine, "agent": fleece.has_agent(), "why": why });
        run.context.out.record("not_frozen", &shown);
        match (job.freeze, fleece.has_agent()) {
            // Without an agent nobody expects more.
            (Freeze::Try, false) => run.context.out.say(what),
            _ => run.note(Code::WarnHost, what),
        }
        froze.not = Some(why);
    }
    let consistency = if fleece.frozen { Consistency::FileSystem } else { Consistency::Crash };
    let mut wanted = Vec::new();
    for ((name, _), missing) in files.iter().zip(hints) {
        let hint = match (fleece.bitmap(name), missing) {
            (Some(bitmap), _) => Hint::Bitmap(bitmap),
            (None, Some(why)) => Hint::Missing(why),
            (None, None) => Hint::None,
        };
        let selected = SelectedDisk { name: name.as_str().to_owned(), spec: ChainSpec::Nbd { uri: fleece.uri(name) } };
        let mut disk = backup::open_selected(run.context, name, selected, hint)?;
        disk.mark = fleece.mark(name).map(str::to_owned);
        wanted.push(disk);
    }
    let description = describe::describe(run.context, &about(run, entry, Some(place)), &wanted)?;
    let made = order(run, job, consistency, Some(moment)).store(repo, machine, parent, &wanted, description);
    // Whoever reads goes before what is read.
    drop(wanted);
    let made = made?;
    if let Err(fail) = fleece.end() {
        let what = format!("{}: what the backup added to the machine is still there: {}", run.machine, fail.what);
        run.note(Code::WarnHost, what);
    }
    Ok((made, froze))
}

/// What is caught of a disk: with the newest believable bitmap that a point names.
fn catch(disk: LiveDisk, points: &[Point]) -> Catch {
    let good = |mark: &&&str| disk.bitmaps.iter().any(|bitmap| bitmap.name == **mark && bitmap.usable);
    let marks = marks(points, &disk.name);
    let since = marks.iter().find(good).map(|mark| (*mark).to_owned());
    Catch { disk, since }
}

/// What is to be read of a disk that is caught: what its bitmap counts, or as much as its file holds.
fn dirty_bytes(catch: &Catch, file: &std::path::Path) -> u64 {
    let counted = catch.disk.bitmaps.iter().find(|bitmap| catch.since.as_ref() == Some(&bitmap.name));
    let held = || std::fs::metadata(file).map_or(0, |meta| meta.len());
    counted.map_or_else(held, |bitmap| bitmap.bytes)
}

/// Why everything is compared though a point names a bitmap.
fn unbelievable(catch: &Catch, points: &[Point]) -> Option<String> {
    let marks = marks(points, &catch.disk.name);
    (catch.since.is_none() && !marks.is_empty()).then(|| missing(&marks))
}
