//! What a check tells: damage place by place, damaged files, disks, and the verdict.
//!
//! Invariants
//! - Human lines and `--json` records say the same, and a place has the same words in both.

use std::{collections::BTreeMap, ops::Range};

use jiff::Timestamp;
use serde::Serialize;

use super::{Checked, Lost, memory::Done, scan::merged};
use crate::{
    context::Context,
    fail::{Code, Fail, FailRecord, Result},
    units,
};

/// Most damaged places that are listed one by one for a disk, and most ranges for a file.
const LISTED_MAX: usize = 1000;

/// Most ranges in a line for people.
const SHOWN_MAX: usize = 4;

#[derive(Serialize)]
struct RangeRecord {
    offset: u64,
    length: u64,
}

fn records(ranges: &[Range<u64>]) -> Vec<RangeRecord> {
    let record = |r: &Range<u64>| RangeRecord { offset: r.start, length: r.end - r.start };
    ranges.iter().take(LISTED_MAX).map(record).collect()
}

#[derive(Serialize)]
struct PlaceRecord<'a> {
    source: &'a str,
    disk: &'a str,
    #[serde(flatten)]
    fail: FailRecord<'a>,
    bytes_lost: u64,
    ranges: Vec<RangeRecord>,
}

#[derive(Serialize)]
struct PointRecord<'a> {
    source: &'a str,
    #[serde(flatten)]
    fail: FailRecord<'a>,
}

#[derive(Serialize)]
struct FileRecord<'a> {
    source: &'a str,
    disk: &'a str,
    path: &'a str,
    damaged_places: usize,
    bytes_lost: u64,
    ranges: Vec<RangeRecord>,
}

#[derive(Serialize)]
struct DiskRecord<'a> {
    source: &'a str,
    disk: &'a str,
    size: u64,
    bytes_checked: u64,
    bytes_lost: u64,
    damaged_places: usize,
}

/// What was found so far.
#[derive(Default)]
pub(super) struct Tally {
    disks: u64,
    damaged: usize,
    first: Option<Fail>,
}

/// Says that a check goes on with an interrupted one.
pub(super) fn resumed(context: &Context, source: &str, disk: &str, began: Timestamp, done: &Done) {
    let since = began.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    context.out.record(
        "resumed",
        &serde_json::json!({ "source": source, "disk": disk, "since": since, "bytes_checked": done.bytes,
                             "below": done.below }),
    );
    let at = units::bytes(done.below);
    context.out.say(format_args!("{source} {disk}: going on at {at} with the check that began {since}"));
}

impl Tally {
    /// Reports a disk.
    pub(super) fn disk(&mut self, context: &Context, source: &str, disk: &str, checked: Checked) {
        let Checked { size, bytes, damage } = checked;
        for lost in damage.iter().take(LISTED_MAX) {
            place(context, source, disk, lost);
        }
        files(context, source, disk, &damage);
        let lost = bytes_of(&all_ranges(&damage));
        let record =
            DiskRecord { source, disk, size, bytes_checked: bytes, bytes_lost: lost, damaged_places: damage.len() };
        context.out.record("verified", &record);
        let verdict = match damage.len() {
            0 => "whole".to_owned(),
            n => format!("{}, {} lost", units::count(n, "damaged place"), units::bytes(lost)),
        };
        let (bytes, size) = (units::bytes(bytes), units::bytes(size));
        context.out.line(format_args!("{source} {disk}: {verdict}, {bytes} checked of {size}"));
        self.disks += 1;
        self.damaged += damage.len();
        if self.first.is_none() {
            self.first = damage.into_iter().next().map(costing);
        }
    }

    /// Reports a point that cannot be read at all.
    pub(super) fn point(&mut self, context: &Context, source: &str, fail: Fail) {
        context.out.lines(&fail);
        context.out.record("damage", &PointRecord { source, fail: FailRecord::from(&fail) });
        self.damaged += 1;
        self.first.get_or_insert(fail);
    }

    /// The end of the command.
    pub(super) fn verdict(self, context: &Context) -> Result<()> {
        context.out.closing("disks", self.disks);
        context.out.closing("damaged_places", self.damaged);
        let Some(first) = self.first else { return Ok(()) };
        let places = match self.damaged {
            1 => "1 place is damaged".to_owned(),
            n => format!("{n} places are damaged"),
        };
        let what = format!("{places}; the first: {}", first.what);
        Err(Fail { code: Code::Corrupt, what, ..first }.help("aquifer points"))
    }
}

fn place(context: &Context, source: &str, disk: &str, lost: &Lost) {
    let fail = costing(lost.clone());
    context.out.lines(&fail);
    let record = PlaceRecord {
        source,
        disk,
        fail: FailRecord::from(&fail),
        bytes_lost: bytes_of(&lost.ranges),
        ranges: records(&lost.ranges),
    };
    context.out.record("damage", &record);
}

/// The damaged files, each with all that it costs.
fn files(context: &Context, source: &str, disk: &str, damage: &[Lost]) {
    let mut by_file: BTreeMap<&str, Vec<&Lost>> = BTreeMap::new();
    for lost in damage {
        let path = lost.fail.at.as_ref().map(|at| at.path.as_str()).unwrap_or_default();
        by_file.entry(path).or_default().push(lost);
    }
    for (path, places) in by_file {
        let ranges = all_ranges(places.iter().copied());
        let bytes_lost = bytes_of(&ranges);
        context.out.line(format_args!(
            "damaged file {path}: {}, {} of {disk} lost",
            units::count(places.len(), "place"),
            units::bytes(bytes_lost)
        ));
        let (damaged_places, ranges) = (places.len(), records(&ranges));
        let record = FileRecord { source, disk, path, damaged_places, bytes_lost, ranges };
        context.out.record("damaged_file", &record);
    }
}

fn all_ranges<'l>(damage: impl IntoIterator<Item = &'l Lost>) -> Vec<Range<u64>> {
    merged(damage.into_iter().flat_map(|lost| lost.ranges.iter().cloned()).collect())
}

fn bytes_of(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// The failure, saying which bytes of the disk are lost by it.
fn costing(lost: Lost) -> Fail {
    let shown: Vec<String> = lost.ranges.iter().take(SHOWN_MAX).map(|r| format!("{} to {}", r.start, r.end)).collect();
    let more = match lost.ranges.len().saturating_sub(SHOWN_MAX) {
        0 => String::new(),
        n => format!(" and {} more", units::count(n, "range")),
    };
    let mut fail = lost.fail;
    match shown.is_empty() {
        true => fail.what += "; a second copy serves",
        false => fail.what += &format!("; costs bytes {}{more} of the disk", shown.join(", ")),
    }
    fail
}
