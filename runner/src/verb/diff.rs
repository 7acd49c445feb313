//! `diff`: what differs between two points or images, from metadata.
//!
//! Invariants
//! - No differing byte is missed. Images that record no content ids may name ranges that were
//!   rewritten with equal bytes; `--read` reads those ranges and drops what is equal.
//! - Exit code 5 only with `--exit-code`, and only where something differs.

use std::{fmt, ops::Range, path::PathBuf, sync::Arc};

use aquifer_vdisk::{Chain, Delta, delta_between};
use serde::Serialize;

use crate::{
    context::Context,
    fail::Result,
    source::{KeyOptions, SelectedDisk, SourceOptions, select},
    stop::Stop,
    units,
};

/// Options of `diff`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The older one
    #[arg(value_name = "A")]
    pub a: String,
    /// The newer one
    #[arg(value_name = "B")]
    pub b: String,
    /// Only this disk; may be given several times
    #[arg(long, value_name = "NAME")]
    pub disk: Vec<String>,
    /// Also read what may differ, and drop what is equal
    #[arg(long)]
    pub read: bool,
    /// Exit with 5 where they differ
    #[arg(long)]
    pub exit_code: bool,
    /// Also follow backing files that lie in this folder; may be given several times
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// What opens encrypted snapshots.
    #[command(flatten)]
    pub key: KeyOptions,
}

/// Exit code of a difference.
const DIFFERENT: u8 = 5;

/// Ranges are compared in pieces of this many bytes.
const PIECE_BYTES: u64 = 64 << 10;

#[derive(Serialize)]
struct RangeRecord<'a> {
    disk: &'a str,
    offset: u64,
    length: u64,
}

impl fmt::Display for RangeRecord<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<12} {:>16} {:>16}", self.disk, self.offset, self.length)
    }
}

#[derive(Serialize)]
struct DiskRecord<'a> {
    disk: &'a str,
    change: &'static str,
    size_a: Option<u64>,
    size_b: Option<u64>,
    bytes_different: u64,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let stop = context.stop()?;
    let options = SourceOptions {
        disk: args.disk.clone(),
        allow_backing: args.allow_backing.clone(),
        key: args.key.clone(),
        ..SourceOptions::default()
    };
    let a = select(context, &args.a, &options)?;
    let b = select(context, &args.b, &options)?;
    let pairs = pair(&a.disks, &b.disks);
    let mut different = 0;
    for (old, new) in pairs {
        different += compare(context, args, old, new, stop)?;
    }
    context.out.closing("bytes_different", different);
    if different > 0 && args.exit_code {
        context.out.closing("exit", DIFFERENT);
    }
    Ok(())
}

type Pair<'a> = (Option<&'a SelectedDisk>, Option<&'a SelectedDisk>);

/// Disks of equal names; two single disks are a pair whatever they are called.
fn pair<'a>(a: &'a [SelectedDisk], b: &'a [SelectedDisk]) -> Vec<Pair<'a>> {
    if let ([old], [new]) = (a, b) {
        return vec![(Some(old), Some(new))];
    }
    let mut pairs: Vec<Pair<'a>> = b.iter().map(|new| (a.iter().find(|old| old.name == new.name), Some(new))).collect();
    pairs.extend(a.iter().filter(|old| b.iter().all(|new| new.name != old.name)).map(|old| (Some(old), None)));
    pairs
}

/// Prints what differs in one disk, and counts it in bytes.
fn compare(
    context: &Context,
    args: &Args,
    old: Option<&SelectedDisk>,
    new: Option<&SelectedDisk>,
    stop: Stop,
) -> Result<u64> {
    let cache = context.cache()?;
    let open = |disk: Option<&SelectedDisk>| disk.map(|disk| disk.open_chain(&cache)).transpose();
    let (a, b) = (open(old)?, open(new)?);
    let name = new.or(old).map(|disk| disk.name.as_str()).unwrap_or_default();
    let sizes = (a.as_ref().map(|c| c.size()), b.as_ref().map(|c| c.size()));
    let (change, ranges) = match (&a, &b) {
        (Some(a), Some(b)) => {
            let delta = delta_between(a, b)?;
            let ranges: Vec<Range<u64>> = delta.iter().collect();
            let ranges = if args.read { really_different(a, b, &ranges, stop)? } else { ranges };
            let change = match (ranges.is_empty(), a.size() == b.size()) {
                (true, true) => "equal",
                (_, false) => "resized",
                (false, true) => "changed",
            };
            (change, ranges)
        }
        (None, Some(b)) => ("added", Delta::full(b.size()).iter().collect()),
        (Some(a), None) => ("removed", Delta::full(a.size()).iter().collect()),
        (None, None) => ("equal", Vec::new()),
    };
    let cut = sizes.0.unwrap_or_default().saturating_sub(sizes.1.unwrap_or_default());
    let removed = if change == "resized" { cut } else { 0 };
    let bytes_different = ranges.iter().map(|r| r.end - r.start).sum::<u64>() + removed;
    let records = ranges.iter().map(|r| RangeRecord { disk: name, offset: r.start, length: r.end - r.start });
    context.out.table("range", records);
    let record = DiskRecord { disk: name, change, size_a: sizes.0, size_b: sizes.1, bytes_different };
    context.out.record("disk", &record);
    context.out.line(format_args!("{name}: {change}, {} differ", units::bytes(bytes_different)));
    Ok(bytes_different)
}

/// Reads the ranges of both and keeps what differs, in pieces. Past its end, `a` reads as zeros.
fn really_different(a: &Arc<Chain>, b: &Arc<Chain>, ranges: &[Range<u64>], stop: Stop) -> Result<Vec<Range<u64>>> {
    let mut kept: Vec<Range<u64>> = Vec::new();
    let (mut old, mut new) = (Vec::new(), Vec::new());
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            stop.check()?;
            let end = ((at / PIECE_BYTES + 1) * PIECE_BYTES).min(range.end);
            let len = usize::try_from(end - at).unwrap_or_default();
            old.clear();
            old.resize(len, 0);
            new.resize(len, 0);
            b.read(at, &mut new)?;
            let both = usize::try_from(a.size().saturating_sub(at)).unwrap_or(usize::MAX).min(len);
            if let Some(part) = old.get_mut(..both).filter(|part| !part.is_empty()) {
                a.read(at, part)?;
            }
            if old != new {
                match kept.last_mut().filter(|last| last.end == at) {
                    Some(last) => last.end = end,
                    None => kept.push(at..end),
                }
            }
            at = end;
        }
    }
    Ok(kept)
}
