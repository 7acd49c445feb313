//! `points`: machines and their restore points, of the repository or of another product's store.
//!
//! Invariants
//! - One that is listed and cannot be read is warned of, with why: nobody learns of it only when it is needed.

use aquifer_formats::repo::{
    Machine, Point, PointState,
    record::{PointDisk, PointKind},
};
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    repository,
    source::{
        Source,
        store::{self, StorePoint, StoreState},
    },
    units,
};

/// Options of `points`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this machine, as MACHINE, or this point, as MACHINE@POINT; or a store of another product: a folder of
    /// Veeam's backup files, a datastore of Proxmox Backup Server (pbs:DIR), a remote of Xen Orchestra (xo:DIR), a backup
    /// store of Longhorn (longhorn:DIR), a storage of Benji (benji:DIR)
    #[arg(value_name = "SOURCE")]
    pub source: Option<String>,
}

#[derive(Serialize)]
struct PointRecord<'a> {
    machine: &'a str,
    machine_id: String,
    point: String,
    created: Option<Timestamp>,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<&'a str>,
    kind: Option<PointKind>,
    parent: Option<String>,
    pinned: bool,
    bytes_stored: u64,
    disks: Vec<DiskRecord<'a>>,
    allowed_operations: &'static [&'static str],
}

/// A point of another product's store.
#[derive(Serialize)]
struct StoredRecord<'a> {
    machine: &'a str,
    point: &'a str,
    created: Option<Timestamp>,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<&'a str>,
    kind: &'static str,
    parent: Option<&'a str>,
    /// What to name as SOURCE.
    source: &'a str,
    disks: Vec<StoredDisk<'a>>,
}

#[derive(Serialize)]
struct StoredDisk<'a> {
    disk: &'a str,
    size: u64,
}

#[derive(Serialize)]
struct DiskRecord<'a> {
    disk: &'a str,
    size: u64,
    bytes_data: u64,
    bytes_stored: u64,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let source = args.source.as_deref().map(Source::parse).transpose()?;
    if let Some(Source::Path(path)) = &source {
        return stored(context, &store::list(path)?);
    }
    let repo = repository::open(context)?;
    let (machines, only) = match source {
        None => (repo.machines()?, None),
        Some(Source::Point { machine, point, .. }) if names_a_point(args) => {
            let named = repository::find(&repo, &machine, &point)?;
            named.warn(context);
            (vec![named.machine], Some(named.point.id))
        }
        Some(Source::Point { machine, .. }) => (vec![repo.machine(&machine)?], None),
        Some(_) => {
            return Err(
                Fail::new(Code::Source, "points are listed of machines in the repository").help("aquifer points")
            );
        }
    };
    let mut shown = 0;
    for machine in &machines {
        let points = repo.points(machine)?;
        let kept: Vec<&Point> = points.iter().filter(|point| only.is_none_or(|id| id == point.id)).collect();
        context.out.line(format_args!("{}  ({})", machine.name, units::count(kept.len(), "point")));
        for point in &kept {
            context.out.record("point", &record(machine, point));
            context.out.line(sentence(point));
            repository::warn_of_damage(context, machine, point);
            if only.is_some() {
                details(context, point);
            }
        }
        shown += kept.len();
    }
    if machines.is_empty() {
        context.out.say("there are no machines yet");
        context.out.next("aquifer backup MACHINE --disk vda=IMAGE");
    }
    context.out.closing("machines", machines.len());
    context.out.closing("points", shown);
    Ok(())
}

/// The points of another product's store.
fn stored(context: &Context, points: &[StorePoint]) -> Result<()> {
    let mut machines = 0;
    for group in points.chunk_by(|a, b| a.machine == b.machine) {
        let Some(first) = group.first() else { continue };
        machines += 1;
        context.out.line(format_args!("{}  ({})", first.machine, units::count(group.len(), "point")));
        for point in group {
            let (source, size) = (point.source.display().to_string(), point.disks.iter().map(|(_, size)| size).sum());
            let record = StoredRecord {
                machine: &point.machine,
                point: &point.id,
                created: point.created,
                state: point.state.name(),
                why: point.state.why(),
                kind: point.kind.name(),
                parent: point.parent.as_deref(),
                source: &source,
                disks: point.disks.iter().map(|(disk, size)| StoredDisk { disk, size: *size }).collect(),
            };
            context.out.record("stored_point", &record);
            let created =
                point.created.map_or_else(|| "unknown".to_owned(), |at| at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
            let (kind, state) = (point.kind.name(), point.state.name());
            context.out.line(format_args!("  {created}  {kind:<9} {:>9}  {state}  {source}", units::bytes(size)));
            if let (StoreState::Missing(why) | StoreState::Corrupted(why), word) = (&point.state, quoted(&source)) {
                let what = format!("{}: the point {} of {created} is {state} ({why})", point.machine, point.id);
                context.out.warn(Code::WarnDamagedPoint, what, Some(&format!("aquifer verify {word}")));
            }
        }
    }
    if let Some(last) = points.iter().rev().find(|point| point.state == StoreState::Complete) {
        context.out.next(format!("aquifer info {}", quoted(&last.source.display().to_string())));
    }
    context.out.closing("machines", machines);
    context.out.closing("points", points.len());
    Ok(())
}

fn names_a_point(args: &Args) -> bool {
    args.source.as_ref().is_some_and(|word| word.contains('@'))
}

fn disks(point: &Point) -> &[PointDisk] {
    point.record.as_ref().map(|record| record.disks.as_slice()).unwrap_or_default()
}

fn record<'a>(machine: &'a Machine, point: &'a Point) -> PointRecord<'a> {
    let disks = disks(point);
    let disks = disks.iter().map(|disk| DiskRecord {
        disk: disk.name.as_str(),
        size: disk.size,
        bytes_data: disk.data_bytes,
        bytes_stored: disk.file_bytes,
    });
    let disks: Vec<DiskRecord<'_>> = disks.collect();
    PointRecord {
        machine: &machine.name,
        machine_id: machine.id.to_string(),
        point: point.id.to_string(),
        created: point.created(),
        state: point.state.name(),
        why: point.state.why(),
        kind: point.record.as_ref().map(|record| record.kind),
        parent: point.record.as_ref().and_then(|record| record.parent).map(|id| id.to_string()),
        pinned: point.pinned,
        bytes_stored: disks.iter().map(|disk| disk.bytes_stored).sum(),
        disks,
        allowed_operations: allowed(point),
    }
}

/// What can be done with a point in its state.
fn allowed(point: &Point) -> &'static [&'static str] {
    match (&point.state, point.pinned) {
        (PointState::Complete, false) => &["info", "mount", "recover", "map", "diff", "export", "verify", "forget"],
        (PointState::Complete, true) => &["info", "mount", "recover", "map", "diff", "export", "verify"],
        (PointState::Missing { .. } | PointState::Corrupted { .. }, false) => &["verify", "forget"],
        (_, false) => &["forget"],
        (_, true) => &[],
    }
}

fn sentence(point: &Point) -> String {
    let short: String = point.id.to_string().chars().take(SHORT_ID_CHARS).collect();
    let created =
        point.created().map_or_else(|| "unknown".to_owned(), |at| at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
    let kind = match point.record.as_ref().map(|record| record.kind) {
        Some(PointKind::Full) => "full",
        Some(PointKind::Increment) => "increment",
        None => "-",
    };
    let stored: u64 = disks(point).iter().map(|disk| disk.file_bytes).sum();
    let names: Vec<&str> = disks(point).iter().map(|disk| disk.name.as_str()).collect();
    let pin = if point.pinned { ", pinned" } else { "" };
    let state = point.state.name();
    format!("  {short}  {created}  {kind:<9} {:>9}  {state}{pin}  {}", units::bytes(stored), names.join(" "))
}

/// So many characters of a time-ordered id tell points of one machine apart.
const SHORT_ID_CHARS: usize = 18;

fn details(context: &Context, point: &Point) {
    context.out.line(format_args!("    id {}", point.id));
    for disk in disks(point) {
        context.out.line(format_args!(
            "    disk {}: {} of {} hold data, {} stored here, {} needed",
            disk.name,
            units::bytes(disk.data_bytes),
            units::bytes(disk.size),
            units::bytes(disk.file_bytes),
            units::count(disk.needs.len(), "older file")
        ));
    }
    for (disk, linked) in disks(point).iter().filter_map(|disk| Some((disk, disk.linked.as_ref()?))) {
        let top = linked.files.first().map_or("", |file| file.path.as_str());
        let files = units::count(linked.files.len(), "file");
        context.out.line(format_args!("    disk {} stands on {files} of {}: {top}", disk.name, linked.format));
    }
}
