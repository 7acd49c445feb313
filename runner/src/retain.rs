//! Which restore points stay, and why: a pure rule over what is stored, and its execution.
//!
//! Invariants
//! - The order of points is that of their receipt; clocks only say which day a point belongs to, and a point of the
//!   future counts as one of today.
//! - The newest complete point stays whatever the rule says; so does every pinned one, and the last one that has a disk
//!   which no later one has: nobody reads a disk again that has left the machine. What cannot be used is left for
//!   somebody to look at, and counts for nothing.
//! - A point that is read is given up like any other: its files stay until the reader ends, and nobody waits.
//! - Given-up files that retained points draw little from are set free by writing those points anew, so that the bytes
//!   written, tables included, never exceed the bytes set free. So what was written anew is not written anew again for
//!   the file it took the place of: it draws all of that one's blocks.
//!
//! Not here: deleting (`aquifer_formats::repo::keeper`).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use aquifer_formats::repo::{
    Machine, Point, PointState, Repository,
    keeper::{self, LastPoint},
    rebase::{self, Burden},
};
use jiff::{Timestamp, ToSpan, civil::Date, tz::TimeZone};
use uuid::Uuid;

use crate::{
    context::Context,
    fail::{Code, Result},
    repository,
    site::Keep,
    units,
};

/// Points that a rule by days never goes below.
const DAYS_FLOOR: usize = 3;

/// Why a point stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The newest complete one.
    Newest,
    /// Somebody pinned it.
    Pinned,
    /// No later one has one of its disks.
    LastOfDisk,
    /// It cannot be used; somebody has to look at it.
    NotComplete,
    /// No rule was given.
    NoRule,
    /// Among the last.
    Last,
    /// Of the last days.
    Days,
    /// One of the few that a rule by days leaves at least.
    Floor,
    /// The newest of its hour.
    Hourly,
    /// The newest of its day.
    Daily,
    /// The newest of its ISO week.
    Weekly,
    /// The newest of its month.
    Monthly,
    /// The newest of its year.
    Yearly,
}

/// A point, as far as the rule looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The point.
    pub id: Uuid,
    /// When its disks looked like this.
    pub created: Timestamp,
    /// Whether it can be used.
    pub complete: bool,
    /// Whether it must stay.
    pub pinned: bool,
    /// Whether it has a disk that no later complete one has.
    pub last_of_disk: bool,
}

/// What becomes of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The point.
    pub id: Uuid,
    /// Why it stays; nothing: it goes.
    pub reasons: BTreeSet<Reason>,
}

/// Judges points given in the order of their receipt, oldest first.
pub fn judge(points: &[Candidate], keep: Option<&Keep>, zone: &TimeZone, now: Timestamp) -> Vec<Verdict> {
    let mut verdicts: Vec<Verdict> =
        points.iter().map(|point| Verdict { id: point.id, reasons: BTreeSet::new() }).collect();
    let mut stay = |index: usize, reason: Reason| {
        if let Some(verdict) = verdicts.get_mut(index) {
            verdict.reasons.insert(reason);
        }
    };
    for (index, point) in points.iter().enumerate() {
        if point.pinned {
            stay(index, Reason::Pinned);
        }
        if point.last_of_disk {
            stay(index, Reason::LastOfDisk);
        }
        if !point.complete {
            stay(index, Reason::NotComplete);
        }
        if keep.is_none() {
            stay(index, Reason::NoRule);
        }
    }
    // Newest first from here on.
    let usable: Vec<(usize, Timestamp)> =
        points.iter().enumerate().rev().filter(|(_, p)| p.complete).map(|(i, p)| (i, p.created.min(now))).collect();
    if let Some((newest, _)) = usable.first() {
        stay(*newest, Reason::Newest);
    }
    let Some(keep) = keep else { return verdicts };
    let few = |count: Option<u32>| usize::try_from(count.unwrap_or(0)).unwrap_or(usize::MAX);
    usable.iter().take(few(keep.last)).for_each(|(index, _)| stay(*index, Reason::Last));
    if let Some(days) = keep.days {
        let today = now.to_zoned(zone.clone()).date();
        let first = today.checked_sub(i64::from(days).days()).unwrap_or(Date::MIN);
        let recent = usable.iter().filter(|(_, created)| created.to_zoned(zone.clone()).date() >= first);
        recent.for_each(|(index, _)| stay(*index, Reason::Days));
        usable.iter().take(DAYS_FLOOR).for_each(|(index, _)| stay(*index, Reason::Floor));
    }
    for (count, reason, period) in [
        (keep.hourly, Reason::Hourly, Period::Hour),
        (keep.daily, Reason::Daily, Period::Day),
        (keep.weekly, Reason::Weekly, Period::Week),
        (keep.monthly, Reason::Monthly, Period::Month),
        (keep.yearly, Reason::Yearly, Period::Year),
    ] {
        let mut seen: BTreeSet<(i64, i64)> = BTreeSet::new();
        for (index, created) in &usable {
            let of = period.of(*created, zone);
            if seen.len() < few(count) && seen.insert(of) {
                stay(*index, reason);
            }
        }
    }
    verdicts
}

#[derive(Clone, Copy)]
enum Period {
    Hour,
    Day,
    Week,
    Month,
    Year,
}

impl Period {
    /// A number for the period a time lies in; equal numbers are one period.
    fn of(self, at: Timestamp, zone: &TimeZone) -> (i64, i64) {
        let local = at.to_zoned(zone.clone());
        let date = local.date();
        let days = |date: Date| date.duration_since(Date::ZERO).as_hours() / 24;
        match self {
            // By elapsed time from the day's start: an hour that a clock shows twice is two.
            Self::Hour => {
                let start = local.start_of_day().map_or(at, |start| start.timestamp());
                (days(date), at.duration_since(start).as_secs() / 3600)
            }
            Self::Day => (days(date), 0),
            Self::Week => {
                let week = date.iso_week_date();
                (week.year().into(), week.week().into())
            }
            Self::Month => (date.year().into(), date.month().into()),
            Self::Year => (date.year().into(), 0),
        }
    }
}

/// What a run of retention did.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Retained {
    /// Points that stay.
    pub kept: usize,
    /// Points that were given up.
    pub given_up: Vec<Uuid>,
    /// Points that were written anew, and what took their place.
    pub rebased: BTreeMap<Uuid, Uuid>,
    /// Bytes deleted.
    pub bytes_freed: u64,
    /// Given-up points whose files stay because somebody reads them.
    pub leased: usize,
    /// Given-up points whose files stay because retained points draw from them.
    pub needed: usize,
    /// Disks, and the points that stay for nothing but their being the last to have them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub last_of: Vec<(String, Uuid)>,
}

fn candidate(point: &Point, last_of: &[(String, Uuid)]) -> Candidate {
    Candidate {
        id: point.id,
        created: point.created().unwrap_or(Timestamp::UNIX_EPOCH),
        complete: point.state == PointState::Complete,
        pinned: point.pinned,
        last_of_disk: last_of.iter().any(|(_, last)| *last == point.id),
    }
}

/// The disks that the newest complete point has not, each with the last complete one that has it. `left_out` are meant to
/// be missing.
fn last_of(points: &[Point], left_out: &[String]) -> Vec<(String, Uuid)> {
    let mut complete = points.iter().rev().filter(|point| point.state == PointState::Complete);
    let disks = |point: &Point| -> Vec<String> {
        point.record.iter().flat_map(|record| &record.disks).map(|disk| disk.name.as_str().to_owned()).collect()
    };
    let mut seen: BTreeSet<String> = complete.next().map(disks).unwrap_or_default().into_iter().collect();
    seen.extend(left_out.iter().cloned());
    complete
        .flat_map(|point| disks(point).into_iter().map(|disk| (disk, point.id)))
        .filter(|(disk, _)| seen.insert(disk.clone()))
        .collect()
}

/// Applies the rule to a machine: gives points up, sets free what they hold, deletes. Of the disks in `left_out` no point
/// has to stay.
///
/// # Errors
/// I/O; a foreign owner; damage. Cut anywhere, the next run goes on.
pub fn apply(
    context: &Context,
    repo: &Repository,
    machine: &Machine,
    keep: Option<&Keep>,
    (zone, left_out): (&TimeZone, &[String]),
) -> Result<Retained> {
    let points = repo.points(machine)?;
    let mut last_of = last_of(&points, left_out);
    let candidates: Vec<Candidate> = points.iter().map(|point| candidate(point, &last_of)).collect();
    let verdicts = judge(&candidates, keep, zone, Timestamp::now());
    let going: Vec<Uuid> = verdicts.iter().filter(|v| v.reasons.is_empty()).map(|v| v.id).collect();
    let only = BTreeSet::from([Reason::LastOfDisk]);
    last_of.retain(|(_, point)| verdicts.iter().any(|verdict| verdict.id == *point && verdict.reasons == only));
    let kept = verdicts.len() - going.len();
    let mut done = Retained { kept, given_up: going.clone(), last_of, ..Retained::default() };
    if !going.is_empty() {
        keeper::forget(repo, machine, &going, LastPoint::Stays)?;
    }
    if keep.is_some() {
        done.rebased = set_free(context, repo, machine)?;
        let Retained { last_of, rebased, .. } = &mut done;
        for (_, point) in last_of {
            *point = rebased.get(point).copied().unwrap_or(*point);
        }
    }
    let tell = repository::tell(context)?;
    let swept =
        repository::observing(context, |observer| Ok(keeper::sweep(repo, machine, observer, Instant::now(), &tell)?))?;
    done.bytes_freed = swept.bytes;
    done.leased = swept.leased.len();
    done.needed = swept.needed.len();
    Ok(done)
}

/// Writes points anew that keep given-up files alive, oldest first.
fn set_free(context: &Context, repo: &Repository, machine: &Machine) -> Result<BTreeMap<Uuid, Uuid>> {
    // What is written anew is at most half of what that sets free.
    let worth = |burden: &Burden| burden.cost().saturating_mul(2) <= burden.file_bytes;
    let burdens: Vec<Burden> = rebase::burdens(repo, machine)?.into_iter().filter(worth).collect();
    let mut rebased = BTreeMap::new();
    if burdens.is_empty() {
        return Ok(rebased);
    }
    let needed: u64 = burdens.iter().map(Burden::cost).sum();
    if let Some(free) = free_beside(repo)
        && free < needed.saturating_add(needed / 8).saturating_add(64 << 20)
    {
        let what = format!(
            "{}: {} would be copied to set old files free, and {} are left; they stay",
            machine.name,
            units::bytes(needed),
            units::bytes(free)
        );
        context.out.warn(Code::WarnSkipped, what, None);
        return Ok(rebased);
    }
    // One that was killed in the middle of this may have left its lease: whoever can be seen to be gone is not waited for.
    let tell = repository::tell(context)?;
    repository::observing(context, |observer| Ok(keeper::reclaim(repo, machine, observer, &tell, Duration::ZERO)?))?;
    keeper::clear(repo, machine, repository::holder("retention"))?;
    let without: BTreeSet<Uuid> = burdens.iter().map(|burden| burden.point).collect();
    let carriers: BTreeSet<Uuid> = burdens.iter().flat_map(|burden| burden.drawn.keys().copied()).collect();
    for point in repo.points(machine)?.iter().filter(|point| carriers.contains(&point.id)) {
        let holder = repository::holder("retention");
        match rebase::rebase(repo, machine, point, &without, repo.writer_options(), holder) {
            Ok(record) => {
                rebased.insert(point.id, record.id);
            }
            // A backup of this machine runs: the next run of retention does it.
            Err(aquifer_formats::repo::Error::Locked { holder, .. }) => {
                let what = format!("{}: old files stay for now: {holder} is at work", machine.name);
                context.out.warn(Code::WarnSkipped, what, None);
                break;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(rebased)
}

/// Bytes free on the repository's file system, where that can be told.
fn free_beside(repo: &Repository) -> Option<u64> {
    let found = rustix::fs::statvfs(repo.label()).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(test)]
mod tests;
