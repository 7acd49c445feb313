//! `forget`: gives restore points up and deletes the files that nothing needs any more.
//!
//! Invariants
//! - What is lost is said before it is asked, and nothing is changed before the answer.
//! - The last complete point of a machine goes only with `--even-last`.
//! - A point that is read goes only with `--even-read`; it keeps its files until its lease ends, and that is said.

use std::time::Instant;

use aquifer_formats::repo::{
    LEASE_TTL, Machine, Point, PointState, Repository,
    keeper::{self, LastPoint},
    record::{LeaseKind, LeaseRecord},
};
use serde::Serialize;

use crate::{
    cli::{Confirm, DryRun},
    confirm::confirm,
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    repository::{self, Named},
    source::Source,
    units,
};

/// Options of `forget`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The points, as MACHINE@POINT; may be several
    #[arg(value_name = "MACHINE@POINT", required_unless_present = "interrupted")]
    pub points: Vec<String>,
    /// Also when no complete point of the machine would be left
    #[arg(long)]
    pub even_last: bool,
    /// Also points that are being read: their files stay until the reader ends
    #[arg(long)]
    pub even_read: bool,
    /// Delete what interrupted backups of this machine have written, instead of points
    #[arg(long, value_name = "MACHINE", conflicts_with = "points")]
    pub interrupted: Option<String>,
    /// Whether to ask.
    #[command(flatten)]
    pub confirm: Confirm,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

#[derive(Serialize)]
struct Forgotten<'a> {
    machine: &'a str,
    point: String,
    created: Option<jiff::Timestamp>,
    bytes_stored: u64,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let repo = if args.dry.dry_run { repository::open(context)? } else { repository::open_to_change(context)? };
    if let Some(machine) = &args.interrupted {
        return interrupted(context, args, &repo, machine);
    }
    let chosen = choose(&repo, &args.points)?;
    for (machine, points) in &chosen {
        check_last(&repo, args, machine, points)?;
        check_read(context, &repo, args, machine, points)?;
    }
    let records: Vec<Forgotten<'_>> = chosen
        .iter()
        .flat_map(|(machine, points)| {
            points.iter().map(|point| Forgotten {
                machine: &machine.name,
                point: point.id.to_string(),
                created: point.created(),
                bytes_stored: point.record.iter().flat_map(|record| &record.disks).map(|disk| disk.file_bytes).sum(),
            })
        })
        .collect();
    let loss = loss(&records);
    if args.dry.dry_run {
        records.iter().for_each(|record| context.out.record("plan", record));
        context.out.lines(loss);
        return Ok(());
    }
    confirm(context, &args.confirm, &loss)?;
    let last = if args.even_last { LastPoint::MayGo } else { LastPoint::Stays };
    let mut freed = 0;
    let tell = repository::tell(context)?;
    for (machine, points) in &chosen {
        let ids: Vec<uuid::Uuid> = points.iter().map(|point| point.id).collect();
        keeper::forget(&repo, machine, &ids, last)?;
        let swept = repository::observing(context, |observer| {
            Ok(keeper::sweep(&repo, machine, observer, Instant::now(), &tell)?)
        })?;
        freed += swept.bytes;
        if !swept.leased.is_empty() {
            context.out.say(format_args!(
                "files of {} of {} stay until whoever reads them ends (aquifer leases)",
                units::count(swept.leased.len(), "point"),
                machine.name
            ));
        }
        if !swept.needed.is_empty() {
            context.out.say(format_args!("newer points of {} still need some of the files", machine.name));
        }
    }
    records.iter().for_each(|record| context.out.record("forgotten", record));
    context.out.closing("bytes_freed", freed);
    context.out.line(format_args!("{} forgotten, {} freed", units::count(records.len(), "point"), units::bytes(freed)));
    Ok(())
}

/// The points, by machine, each once.
fn choose(repo: &Repository, words: &[String]) -> Result<Vec<(Machine, Vec<Point>)>> {
    let mut chosen: Vec<(Machine, Vec<Point>)> = Vec::new();
    for word in words {
        let (machine, point) = match Source::parse(word)? {
            Source::Point { machine, point, disk: None } if word.contains('@') => {
                meant(word, repository::find(repo, &machine, &point)?)?
            }
            _ => {
                let what = format!("`{word}` does not name a point; write MACHINE@POINT");
                return Err(Fail::new(Code::Source, what).help("aquifer points"));
            }
        };
        match chosen.iter_mut().find(|(known, _)| known.id == machine.id) {
            Some((_, points)) if points.iter().any(|known| known.id == point.id) => {}
            Some((_, points)) => points.push(point),
            None => chosen.push((machine, vec![point])),
        }
    }
    Ok(chosen)
}

/// The point, unless the word could as well mean a damaged one: what is deleted is never guessed.
fn meant(word: &str, named: Named) -> Result<(Machine, Point)> {
    let Named { machine, point, passed_over } = named;
    let Some(newest) = passed_over.first() else { return Ok((machine, point)) };
    let what = format!(
        "`{word}` may mean {}, which is complete, or {}, which is newer and {}; name one by its id",
        point.id,
        newest.id,
        newest.state.name()
    );
    Err(Fail::new(Code::Ambiguous, what).help(format!("aquifer points {}", quoted(&machine.name))))
}

/// As the keeper will check it: a dry run refuses what the real one refuses.
fn check_last(repo: &Repository, args: &Args, machine: &Machine, points: &[Point]) -> Result<()> {
    if let Some(pinned) = points.iter().find(|point| point.pinned) {
        return Err(Fail::new(Code::Refused, format!("point {} of {} is pinned", pinned.id, machine.name)));
    }
    let complete = |point: &&Point| point.state == PointState::Complete;
    let all = repo.points(machine)?;
    let left = all.iter().filter(complete).any(|point| points.iter().all(|going| going.id != point.id));
    if left || args.even_last || !all.iter().any(|point| point.state == PointState::Complete) {
        return Ok(());
    }
    let what = format!("no complete point of {} would be left", machine.name);
    Err(Fail::new(Code::Refused, what).help_again("--even-last"))
}

/// Somebody who recovers from a point should not have it taken away by a slip of the hand.
fn check_read(context: &Context, repo: &Repository, args: &Args, machine: &Machine, points: &[Point]) -> Result<()> {
    if args.even_read {
        return Ok(());
    }
    let tell = repository::tell(context)?;
    let (live, _) = repository::observing(context, |observer| Ok(observer.observe(repo, Instant::now(), &tell)?))?;
    let read = |lease: &&LeaseRecord| lease.kind == LeaseKind::Read && points.iter().any(|p| lease.point == Some(p.id));
    let Some((lease, point)) = live.iter().find(read).and_then(|lease| Some((lease, lease.point?))) else {
        return Ok(());
    };
    let (name, since) = (&machine.name, lease.since.strftime("%Y-%m-%dT%H:%M:%SZ"));
    let what = format!("{name}@{point} is read by {} since {since}", lease.holder);
    Err(Fail::new(Code::PointInUse, what).help_again("--even-read"))
}

fn loss(records: &[Forgotten<'_>]) -> String {
    let mut lines = Vec::new();
    for record in records {
        let age = record.created.map_or_else(
            || "of unknown age".to_owned(),
            |at| {
                format!(
                    "taken {} ago",
                    units::seconds(
                        u64::try_from(jiff::Timestamp::now().as_second() - at.as_second()).unwrap_or_default()
                    )
                )
            },
        );
        let (machine, point) = (record.machine, &record.point);
        lines.push(format!("lost: {machine}@{point}, {age}, up to {}", units::bytes(record.bytes_stored)));
    }
    lines.join("\n")
}

/// Deletes what interrupted backups have left.
fn interrupted(context: &Context, args: &Args, repo: &Repository, machine: &str) -> Result<()> {
    let machine = repo.machine(machine)?;
    let left = repo.interrupted(&machine)?;
    if left.is_empty() {
        context.out.line(format_args!("{} has no interrupted backup", machine.name));
        return Ok(());
    }
    let loss = format!("lost: what {} of {} read", units::count(left.len(), "interrupted backup"), machine.name);
    if args.dry.dry_run {
        context.out.lines(loss);
        return Ok(());
    }
    confirm(context, &args.confirm, &loss)?;
    set_aside(context, repo, &machine)?;
    let mut freed = 0;
    let (mut left, mut full) = (left, None);
    while !left.is_empty() {
        let (before, mut again) = (left.len(), Vec::new());
        for what in left {
            match keeper::discard(repo, &machine, &what, repository::holder("forget")).map_err(Fail::from) {
                Ok(swept) => freed += swept.bytes,
                // One that has written nothing has no room to give; the others have.
                Err(fail) if fail.code == Code::Capacity => {
                    again.push(what);
                    full = Some(fail);
                }
                Err(fail) => return Err(fail),
            }
        }
        if let (true, Some(fail)) = (again.len() == before, full.take()) {
            return Err(fail);
        }
        left = again;
    }
    context.out.closing("bytes_freed", freed);
    context.out.line(format_args!("{} freed", units::bytes(freed)));
    Ok(())
}

/// Sets aside the leases of backups that were killed: what they have left is what is given up.
fn set_aside(context: &Context, repo: &Repository, machine: &Machine) -> Result<()> {
    let tell = repository::tell(context)?;
    let patience = LEASE_TTL + LEASE_TTL / 4;
    repository::observing(context, |observer| Ok(keeper::reclaim(repo, machine, observer, &tell, patience)?)).map(drop)
}
