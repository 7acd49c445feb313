//! `replicas`: machines kept ready on another host, their restore points and their state.
//!
//! Invariants
//! - Listing makes no catalogue and touches no folder.
//! - Sizes are those of the files as they are, in bytes on the host's disk.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use jiff::Timestamp;
use serde::Serialize;

use super::ops::{self, Manner, Options, Starts, Wanted};
use crate::{
    catalogue::{Catalogue, NewSession, NewWork, SessionResult, Stored},
    cli::{Confirm, DryRun},
    confirm::confirm,
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    host::{Host, qemu::Qemu},
    job::give_up::{self, Act},
    operate::{Act as Ask, RunOfJob},
    output::plain,
    replica::{
        desk::object,
        model::{PointRecord, ReplicaRecord},
        seat,
        state::{Op, State},
        stray::{self, Stray},
        trust,
    },
    tasks::follow::at,
    units,
};

/// Options of `replicas`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this one, with its restore points
    #[arg(value_name = "REPLICA")]
    pub replica: Option<String>,
    /// Also those that were given up
    #[arg(long)]
    pub all: bool,
    /// Give it up: no file is deleted, they stay as an ordinary machine, and its job leaves the machine out. Does not ask
    #[arg(long, requires = "replica", conflicts_with_all = ["delete", "readmit"])]
    pub remove: bool,
    /// Give it up and delete its files; the next run of its job makes it anew
    #[arg(long, requires = "replica", conflicts_with = "readmit")]
    pub delete: bool,
    /// Let its job make it again after it was given up
    #[arg(long, requires = "replica")]
    pub readmit: bool,
    /// With --remove: its folder is somebody else's by now; only what is known here goes
    #[arg(long, requires = "remove")]
    pub force: bool,
    /// Take it back into a catalogue that has lost it, from what is written down in its folder
    #[arg(long, requires = "replica", conflicts_with_all = ["remove", "delete", "readmit"])]
    pub take_back: bool,
    /// Turn off its machines that run where it does not serve: on a host that is lost, or beside the one that serves
    #[arg(long, requires = "replica", conflicts_with_all = ["remove", "delete", "readmit", "take_back"])]
    pub park: bool,
    /// Start its machine again, which has ended while it serves
    #[arg(long, requires = "replica", conflicts_with_all = ["remove", "delete", "readmit", "take_back", "park"])]
    pub start: bool,
    /// How it is started.
    #[command(flatten)]
    pub starts: Starts,
    /// Whether to ask.
    #[command(flatten)]
    pub confirm: Confirm,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

impl Args {
    fn act(&self) -> Option<(&str, Act)> {
        let remove = if self.force { Act::Drop } else { Act::Remove };
        let acts = [
            (self.remove, remove),
            (self.delete, Act::Delete),
            (self.readmit, Act::Readmit),
            (self.take_back, Act::TakeBack),
            (self.park, Act::Park),
        ];
        let act = acts.into_iter().find(|(asked, _)| *asked).map(|(_, act)| act)?;
        Some((self.replica.as_deref()?, act))
    }
}

#[derive(Serialize)]
struct Listed<'a> {
    #[serde(flatten)]
    record: &'a ReplicaRecord,
    allowed_operations: Vec<Op>,
    /// What is being done to it, if anything.
    operation: Option<String>,
    points: usize,
    newest: Option<Timestamp>,
    replica_lag_seconds: Option<i64>,
    bytes_on_disk: u64,
    /// Whether its machine runs, while it serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    runs: Option<bool>,
    /// Machines of it that run where it does not serve.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    strays: Vec<Stray>,
}

#[derive(Serialize)]
struct ListedPoint<'a> {
    #[serde(flatten)]
    point: &'a PointRecord,
    allowed_operations: &'a [Op],
    /// Why no takeover begins at it as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    trouble: Option<String>,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    if let (true, Some(name)) = (args.start, &args.replica) {
        let options = Options::default().network(args.starts.network.into());
        let manner = Manner { dry: &args.dry, confirm: None, run: RunOfJob::Ends, ops: &[Op::Start], options };
        return ops::carry_out(context, std::slice::from_ref(name), &manner, |_, record| {
            Ok(Wanted::of(args.starts.ask(&record.name, Ask::Start)))
        });
    }
    if let Some((name, Act::TakeBack)) = args.act() {
        return take_back(context, args, name);
    }
    let catalogue = context.catalogue_if_there()?;
    if let Some((name, act)) = args.act() {
        return give_up(context, args, catalogue.as_ref(), name, act);
    }
    let stored: Vec<Stored<ReplicaRecord>> =
        catalogue.as_ref().map_or_else(|| Ok(Vec::new()), |catalogue| catalogue.replicas())?;
    let wanted = |row: &&Stored<ReplicaRecord>| match &args.replica {
        Some(name) => row.name == *name,
        None => args.all || !row.record.state.is_final(),
    };
    let found: Vec<_> = stored.iter().filter(wanted).collect();
    if let (Some(name), true) = (&args.replica, found.is_empty()) {
        return Err(match &catalogue {
            Some(catalogue) => ops::nobody(catalogue, name)?,
            None => Fail::new(Code::NotFound, format!("there is no replica `{name}`")).help("aquifer replicas"),
        });
    }
    for row in &found {
        if let Some(catalogue) = &catalogue {
            show(context, catalogue, &row.record, args.replica.is_some())?;
        }
    }
    if found.is_empty() {
        context.out.say("there is no replica");
        context.out.next("aquifer jobs");
    }
    context.out.closing("replicas", found.len());
    Ok(())
}

fn give_up(context: &Context, args: &Args, catalogue: Option<&Catalogue>, name: &str, act: Act) -> Result<()> {
    let found = catalogue.map(|catalogue| catalogue.replica::<ReplicaRecord>(name)).transpose()?.flatten();
    let (Some(catalogue), Some(row)) = (catalogue, found) else {
        return Err(Fail::new(Code::NotFound, format!("there is no replica `{name}`")).help("aquifer replicas"));
    };
    let record = row.record.check()?;
    act.check(&record)?;
    let points = catalogue.points_of::<PointRecord>(name)?.len();
    let mut confirmed = Vec::new();
    let loss = match act {
        Act::Delete => format!(
            "lost: {name} with {} and every file in {} ({})",
            units::count(points, "restore point"),
            record.folder.display(),
            units::bytes(bytes_of(&record.folder))
        ),
        Act::Remove => {
            format!(
                "{name} leaves the list with {}; its files stay, nothing is deleted",
                units::count(points, "restore point")
            )
        }
        Act::Readmit => readmitted(context, name, &record.folder),
        Act::Drop => format!(
            "lost: what is known here of {name}, with {}; {} is left alone",
            units::count(points, "restore point"),
            record.folder.display()
        ),
        Act::TakeBack => String::new(),
        Act::Park => {
            let strays = stray::to_park(catalogue, &record, strays(context, &record))?;
            confirmed = strays.iter().map(Stray::process).collect();
            let each: Vec<_> = strays.iter().map(|stray| plain(&stray.told(name, record.epoch)).into_owned()).collect();
            format!("lost: what these have not written to their disks yet\n{}", each.join("\n"))
        }
    };
    let plan = serde_json::json!({ "replica": name, "act": act, "points": points, "folder": record.folder });
    if args.dry.dry_run {
        context.out.record("plan", &plan);
        if act == Act::Park {
            context.out.lines(loss)
        } else {
            context.out.line(loss)
        }
        return Ok(());
    }
    if matches!(act, Act::Delete | Act::Drop | Act::Park) {
        confirm(context, &args.confirm, &loss)?;
    }
    let told = match act {
        Act::Park => format!("turned off: {} of {name}", units::count(confirmed.len(), "machine")),
        _ => loss,
    };
    work(context, args, catalogue, &give_up::work(name, act, &confirmed), (act, &told))
}

/// What follows from letting a replica's job make it again: files that stayed are nobody's to overwrite.
fn readmitted(context: &Context, name: &str, folder: &Path) -> String {
    let again = format!("the next run of its job makes {name} again");
    if !folder.exists() {
        return again;
    }
    let shown = folder.display().to_string();
    context.out.next(format!("mv {} {}", quoted(&shown), quoted(&format!("{shown}.given-up"))));
    format!("{again}, once what it left in {shown} has been moved or deleted: that is not overwritten")
}

/// Learns of a replica from its folder.
fn take_back(context: &Context, args: &Args, name: &str) -> Result<()> {
    let (job, machine) = give_up::named(context.site()?, name)?;
    let known = context.catalogue_if_there()?.map(|catalogue| catalogue.replica::<ReplicaRecord>(name)).transpose()?;
    if let Some(row) = known.flatten() {
        Act::TakeBack.check(&row.record.check()?)?;
    }
    let loss = format!("whoever else knows {name}, the replica of {machine} by the job {job}, is refused from then on");
    if args.dry.dry_run {
        context.out.record("plan", &serde_json::json!({ "replica": name, "act": Act::TakeBack, "job": job }));
        context.out.line(loss);
        return Ok(());
    }
    confirm(context, &args.confirm, &loss)?;
    let told = format!("{name} is known again");
    let act = Act::TakeBack;
    work(context, args, &context.catalogue()?, &give_up::work(name, act, &[]), (act, &told))
}

/// Carries it out, as work of the queue.
fn work(context: &Context, args: &Args, catalogue: &Catalogue, work: &NewWork, (act, told): (Act, &str)) -> Result<()> {
    let stop = context.stop()?;
    let session = NewSession {
        kind: act.name().to_owned(),
        job: None,
        initiator: context.user(),
        reason: args.starts.why.reason.clone(),
        retry_of: None,
    };
    let id = catalogue.begin_work(&session, std::slice::from_ref(work))?;
    super::run::follow(context, catalogue, id, stop)?;
    let session = catalogue.session(id)?;
    context.out.record("session", &session);
    if session.ended.is_none() {
        stop.check()?;
    }
    match session.result {
        SessionResult::Success | SessionResult::Warning => {
            context.out.line(told);
            Ok(())
        }
        _ => {
            let failed = catalogue.work_of(id)?.into_iter().find_map(|work| work.outcome);
            let text = |key: &str| failed.as_ref().and_then(|o| o.get(key)).and_then(|v| v.as_str()).map(str::to_owned);
            let code = text("code").as_deref().and_then(Code::find).unwrap_or(Code::Failed);
            let what = text("why").unwrap_or_else(|| format!("session {id} ended without doing it"));
            Err(Fail::new(code, what).help(text("do").unwrap_or_else(|| format!("aquifer sessions {id}"))))
        }
    }
}

/// Machines of a replica that run where it does not serve, as far as the site file says where to look.
fn strays(context: &Context, record: &ReplicaRecord) -> Vec<Stray> {
    let seen = context.site().and_then(|site| Ok((site, seat::rooms(context)?)));
    seen.map(|(site, rooms)| stray::find(&Qemu, &rooms, site, record)).unwrap_or_default()
}

/// Tells where layers were changed from outside that a replica which serves, or served, stands on, or that went home of it.
/// Looks at the files, and reads none of their data.
pub(super) fn tell_of_changes(context: &Context, record: &ReplicaRecord, points: &[PointRecord]) {
    let served = record.failover.as_ref().and_then(|failover| points.iter().find(|point| point.id == failover.point));
    let Some(point) = served.filter(|_| record.folder.exists()) else { return };
    let name = &record.name;
    let (what, help) = match (trust::look(record, point), thawed(record)) {
        (Ok(touched), None) if touched.is_empty() => return,
        (_, Some(file)) if record.state == State::ReadyToSwitch => {
            let what =
                format!("{file} of {name} was changed from outside since it went home: the sides are not changed");
            (what, Some(format!("aquifer undo {}    # then failback again", quoted(name))))
        }
        (Err(fail), _) => {
            (format!("the layers that the machine of {name} stands on cannot be read: {}", fail.what), None)
        }
        (Ok(touched), thawed) => {
            let files: Vec<_> = touched.into_iter().map(|layer| layer.file).chain(thawed).collect();
            let files = files.join(", ");
            (format!("{files} of {name} was changed from outside, and its machine stands on it"), None)
        }
    };
    context.out.warn(Code::WarnResync, what, help.as_deref());
}

/// A layer that went home with the first pass, and was changed since.
fn thawed(record: &ReplicaRecord) -> Option<String> {
    let sent = record.failback.iter().flat_map(|failback| &failback.sent);
    sent.map(|sent| &sent.file).find(|file| !trust::is_frozen(record, file).unwrap_or(false)).cloned()
}

/// Whether the machine of a replica that serves runs: its guest may have turned it off.
fn runs(context: &Context, record: &ReplicaRecord) -> Option<bool> {
    if !matches!(record.state, State::Failover | State::ReadyToSwitch) {
        return None;
    }
    let rooms = seat::rooms(context).ok()?;
    Some(Qemu.find(&rooms.places(&record.folder)).is_some())
}

/// What is wrong with the layers of a restore point, as far as their looks tell. Reads none of their data.
pub(super) fn trouble(record: &ReplicaRecord, point: &PointRecord) -> Option<String> {
    match trust::doubtful(record, point) {
        Ok(touched) if touched.is_empty() => None,
        Ok(touched) => {
            let files: Vec<_> = touched.into_iter().map(|layer| layer.file).collect();
            Some(format!("{} was changed from outside", files.join(", ")))
        }
        Err(fail) => Some(format!("its layers cannot be read: {}", fail.what)),
    }
}

fn show(context: &Context, catalogue: &Catalogue, record: &ReplicaRecord, with_points: bool) -> Result<()> {
    let mut points: Vec<PointRecord> =
        catalogue.points_of::<PointRecord>(&record.name)?.into_iter().map(|row| row.record).collect();
    points.sort_by_key(|point| point.number);
    let newest = points.last().map(|point| point.taken);
    let open = catalogue.open_operations()?.into_iter().find(|open| open.object == object(&record.name));
    // What an operation under way has started is not recorded yet.
    let strays = if open.is_some() { Vec::new() } else { strays(context, record) };
    let runs = runs(context, record);
    let runs_now = runs == Some(true);
    let listed = Listed {
        record,
        allowed_operations: record.state.allowed().into_iter().filter(|op| *op != Op::Start || !runs_now).collect(),
        operation: open.map(|open| open.op),
        points: points.len(),
        newest,
        replica_lag_seconds: newest.map(|taken| Timestamp::now().duration_since(taken).as_secs().max(0)),
        bytes_on_disk: bytes_of(&record.folder),
        runs,
        strays,
    };
    context.out.record("replica", &listed);
    context.out.line(line(&listed));
    for stray in &listed.strays {
        let help = format!("aquifer replicas {} --park", quoted(&record.name));
        let help = stray.is_ours().then_some(help.as_str());
        context.out.warn(Code::WarnHost, stray.told(&record.name, record.epoch), help);
    }
    tell_of_changes(context, record, &points);
    // While something is done to it, its layers change by right.
    let is_ready = record.state == State::Ready && listed.operation.is_none() && record.folder.exists();
    let trouble = |point: &PointRecord| if is_ready { trouble(record, point) } else { None };
    let newest = points.last().and_then(&trouble);
    if let Some(trouble) = &newest {
        let what = format!("the newest point of {} is no place to take over at: {trouble}", record.name);
        context.out.warn(Code::WarnResync, what, None);
    }
    if with_points {
        for point in &points {
            let trouble = trouble(point);
            // A takeover begins at any point of one that is ready; the one it stands on is taken with `latest`.
            let is_allowed = record.state == State::Ready && trouble.is_none();
            let allowed: &[Op] = if is_allowed { &[Op::Failover] } else { &[] };
            let told = trouble.as_ref().map(|trouble| format!("  ({trouble})")).unwrap_or_default();
            context.out.record("point", &ListedPoint { point, allowed_operations: allowed, trouble });
            context.out.line(format_args!("{}{told}", point_line(point)));
        }
        if record.state == State::Ready && newest.is_none() {
            context.out.next(format!("aquifer failover {}", quoted(&record.name)));
        }
    }
    Ok(())
}

fn line(listed: &Listed<'_>) -> String {
    let record = listed.record;
    let newest = match (listed.newest, listed.replica_lag_seconds) {
        (Some(newest), Some(lag)) => {
            format!(", newest {} ({} behind)", at(newest), units::seconds(u64::try_from(lag).unwrap_or_default()))
        }
        _ => String::new(),
    };
    let operation = listed.operation.as_deref().map(|op| format!(", {op} under way")).unwrap_or_default();
    let off = if listed.runs == Some(false) { " (its machine is off: --start starts it)" } else { "" };
    let half = if record.unfinished.is_some() { ", a run was interrupted" } else { "" };
    format!(
        "{:<20} of {} on {}: {}{off}{operation}, {}{newest}, {}{half}",
        record.name,
        record.machine,
        record.host,
        record.state,
        units::count(listed.points, "point"),
        units::bytes(listed.bytes_on_disk),
    )
}

fn point_line(point: &PointRecord) -> String {
    let carried = &point.carried;
    let size: u64 = point.disks.iter().map(|disk| disk.size).sum();
    let id = point.id.to_string();
    let gone: String = point.gone.iter().map(|disk| format!(", without {disk}")).collect();
    format!(
        "  {}  {}  {} in {}{gone}, {} read, {} written",
        at(point.taken),
        id,
        units::bytes(size),
        units::count(point.disks.len(), "disk"),
        units::bytes(carried.bytes_read),
        units::bytes(carried.bytes_written)
    )
}

/// Bytes that the files below a folder take; what cannot be looked at takes none.
fn bytes_of(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let each = entries.flatten().map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes_of(&entry.path()),
        Ok(meta) => meta.blocks().saturating_mul(512),
        Err(_) => 0,
    });
    each.sum()
}
