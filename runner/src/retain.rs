//! Which restore points stay, and why: a pure rule over what is stored, and its execution.
//!
//! Invariants
//! - The order of points is that of their receipt; clocks only say which day a point belongs to, and a point of the
//!   future counts as one of today.
//! - The newest complete point stays whatever the rule says; so does every pinned one. What cannot be used is left for
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
}

/// What the rule says about a machine's points.
///
/// # Errors
/// A damaged manifest; I/O.
pub fn verdicts(
    repo: &Repository,
    machine: &Machine,
    keep: Option<&Keep>,
    zone: &TimeZone,
    now: Timestamp,
) -> Result<Vec<Verdict>> {
    let points = repo.points(machine)?;
    let candidates: Vec<Candidate> = points.iter().map(candidate).collect();
    Ok(judge(&candidates, keep, zone, now))
}

fn candidate(point: &Point) -> Candidate {
    Candidate {
        id: point.id,
        created: point.created().unwrap_or(Timestamp::UNIX_EPOCH),
        complete: point.state == PointState::Complete,
        pinned: point.pinned,
    }
}

/// Applies the rule to a machine: gives points up, sets free what they hold, deletes.
///
/// # Errors
/// I/O; a foreign owner; damage. Cut anywhere, the next run goes on.
pub fn apply(
    context: &Context,
    repo: &Repository,
    machine: &Machine,
    keep: Option<&Keep>,
    zone: &TimeZone,
) -> Result<Retained> {
    let verdicts = verdicts(repo, machine, keep, zone, Timestamp::now())?;
    let going: Vec<Uuid> = verdicts.iter().filter(|v| v.reasons.is_empty()).map(|v| v.id).collect();
    let mut done = Retained { kept: verdicts.len() - going.len(), given_up: going.clone(), ..Retained::default() };
    if !going.is_empty() {
        keeper::forget(repo, machine, &going, LastPoint::Stays)?;
    }
    if keep.is_some() {
        done.rebased = set_free(context, repo, machine)?;
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
