//! `verify`: reads everything a source stands on and checks every checksum.
//!
//! A restore point is checked by what it stores: seals, roots, map pages, and each block's checksum,
//! decoding and content id. Anything else is read from its first byte to its last.
//!
//! Invariants
//! - Damage is listed with file and offset, and ends nothing; the exit code says that there was some.
//! - A listed point that is not whole any more is damage; one that was never completed is none.
//! - Nothing is written and nothing repaired.
//!
//! Not here: getting a good copy from elsewhere.

mod scan;

use std::{
    num::NonZero,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use aquifer_formats::{
    Layer as _,
    aql::{Depth, Finding, Reader, verify},
    repo::PointState,
};
use parking_lot::Mutex;
use serde::Serialize;

use crate::{
    context::Context,
    copy,
    fail::{At, Code, Fail, Result},
    repository,
    source::{SelectedDisk, Selection, SourceOptions, select},
    stop::Stop,
    units,
};

/// Options of `verify`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to check; without one, every complete point of the repository
    #[arg(value_name = "SOURCE")]
    pub source: Option<String>,
    /// Which disks, and how they are read.
    #[command(flatten)]
    pub options: SourceOptions,
}

/// Most damaged places that are listed one by one for a disk.
const LISTED_MAX: usize = 1000;

#[derive(Serialize)]
struct DiskRecord<'a> {
    source: &'a str,
    disk: &'a str,
    size: u64,
    bytes_checked: u64,
    damaged_places: usize,
}

/// What was found so far.
#[derive(Default)]
struct Tally {
    disks: u64,
    damaged: usize,
    first: Option<Fail>,
}

impl Tally {
    /// Counts a point that cannot be read at all.
    fn add(&mut self, context: &Context, fail: Fail) {
        context.out.damage(&fail);
        self.damaged += 1;
        self.first.get_or_insert(fail);
    }
}

/// What is wrong with a point that was whole once.
fn lost(word: &str, state: &PointState) -> Option<Fail> {
    let why = match state {
        PointState::Complete | PointState::Incomplete => return None,
        PointState::Missing { path } => format!("{path} is gone"),
        PointState::Corrupted { why } => why.clone(),
    };
    let error = aquifer_formats::repo::Error::PointState { path: word.to_owned(), state: state.name(), why };
    Some(Fail::from(error))
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let stop = context.stop()?;
    let mut tally = Tally::default();
    match &args.source {
        Some(source) => check(context, &select(context, source, &args.options)?, stop, &mut tally)?,
        None => {
            let repo = repository::open(context)?;
            for machine in repo.machines()? {
                for point in repo.points(&machine)? {
                    let word = format!("{}@{}", machine.name, point.id);
                    match lost(&word, &point.state) {
                        Some(fail) => tally.add(context, fail),
                        None if point.state == PointState::Incomplete => {}
                        None => check(context, &select(context, &word, &args.options)?, stop, &mut tally)?,
                    }
                }
            }
        }
    }
    context.out.closing("disks", tally.disks);
    context.out.closing("damaged_places", tally.damaged);
    let Some(first) = tally.first else { return Ok(()) };
    let places =
        if tally.damaged == 1 { "1 place is damaged".into() } else { format!("{} places are damaged", tally.damaged) };
    Err(Fail { code: Code::Corrupt, what: format!("{places}; the first: {}", first.what), ..first }
        .help("aquifer points"))
}

fn check(context: &Context, selection: &Selection, stop: Stop, tally: &mut Tally) -> Result<()> {
    for selected in &selection.disks {
        let (size, checked, damage) = match &selection.point {
            Some(point) => {
                let repo = repository::open(context)?;
                let stored = point.record.disks.iter().find(|stored| stored.name.as_str() == selected.name);
                let stored = stored.ok_or_else(|| Fail::new(Code::NotFound, format!("no disk {}", selected.name)))?;
                let reader = repo.open_disk(&point.point, &stored.name)?;
                let depth = Depth::Deep(Some(repo.content_key().clone()));
                let (checked, damage) = check_native(context, &reader, depth, stop)?;
                (reader.size(), checked, damage)
            }
            None => check_other(context, selected, stop)?,
        };
        report(context, selection, selected, (size, checked), &damage);
        tally.disks += 1;
        tally.damaged += damage.len();
        if tally.first.is_none() {
            tally.first = damage.into_iter().next();
        }
    }
    Ok(())
}

fn report(
    context: &Context,
    selection: &Selection,
    selected: &SelectedDisk,
    (size, checked): (u64, u64),
    damage: &[Fail],
) {
    for fail in damage.iter().take(LISTED_MAX) {
        context.out.damage(fail);
    }
    let (source, disk) = (selection.word.as_str(), selected.name.as_str());
    let record = DiskRecord { source, disk, size, bytes_checked: checked, damaged_places: damage.len() };
    context.out.record("verified", &record);
    let verdict = match damage.len() {
        0 => "whole".to_owned(),
        1 => "1 damaged place".to_owned(),
        n => format!("{n} damaged places"),
    };
    context.out.line(format_args!(
        "{source} {disk}: {verdict}, {} checked of {}",
        units::bytes(checked),
        units::bytes(size)
    ));
}

/// Checks all that a native point stores, several leaves at a time.
fn check_native(context: &Context, reader: &Reader, depth: Depth, stop: Stop) -> Result<(u64, Vec<Fail>)> {
    let steps = verify(reader, depth);
    let progress = context.out.progress("verify", Some(reader.size()));
    let found = Mutex::new(Vec::new());
    let (next, checked) = (AtomicU64::new(0), AtomicU64::new(0));
    let note = |finding: Finding| {
        checked.fetch_add(finding.blocks_read.saturating_mul(reader.grain()), Ordering::Relaxed);
        progress.add(finding.disk.end - finding.disk.start);
        let damage = finding.damage.into_iter().map(|d| costing(Fail::from(d.error), &d.disk));
        found.lock().extend(damage);
    };
    note(steps.whole());
    let threads = thread::available_parallelism().map_or(2, NonZero::get).clamp(1, 16);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let leaf = next.fetch_add(1, Ordering::Relaxed);
                    if leaf >= steps.leaves() || stop.check().is_err() {
                        return;
                    }
                    note(steps.leaf(leaf));
                }
            });
        }
    });
    stop.check()?;
    let mut found = found.into_inner();
    found.sort_by_key(|fail| fail.at.as_ref().map(|at| (at.path.clone(), at.offset)));
    Ok((checked.into_inner(), found))
}

fn check_other(context: &Context, selected: &SelectedDisk, stop: Stop) -> Result<(u64, u64, Vec<Fail>)> {
    let disk = selected.open(&context.cache()?)?;
    let used = copy::used_bytes(&disk)?;
    let progress = context.out.progress("verify", Some(used));
    let (found, outcome) = scan::scan(&disk, stop, &progress);
    outcome?;
    let list = found.into_values().map(|lost| {
        let whole = lost.ranges.first().map_or(0, |r| r.start)..lost.ranges.last().map_or(0, |r| r.end);
        costing(lost.fail, &whole)
    });
    Ok((disk.size(), used, list.collect()))
}

/// Says which bytes of the disk are lost by it.
fn costing(mut fail: Fail, disk: &Range<u64>) -> Fail {
    if disk.is_empty() {
        fail.what += "; a second copy serves";
    } else {
        fail.what += &format!("; costs bytes {} to {} of the disk", disk.start, disk.end);
    }
    fail.at.get_or_insert_with(At::default);
    fail
}
