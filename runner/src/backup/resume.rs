//! Going on with an interrupted backup.
//!
//! Invariants
//! - Blocks are taken over unread only if every file of every source is provably the one of the first
//!   run (`source::files`). Otherwise everything is read again; the writer stores
//!   again only what differs.

use std::{
    fs::{self, DirBuilder},
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
};

use aquifer_formats::{
    aql::WriterOptions,
    repo::{Error, LEASE_TTL, Liveness, Machine, Point, Repository, Transaction, keeper, record::Holder},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Hint, Order, Wanted};
use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    repository,
    source::files::{self, FileState},
};

/// The sources of a run, kept in the state folder until it is committed.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Sources {
    began: Timestamp,
    disks: Vec<Source>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Source {
    disk: String,
    bitmap: Option<String>,
    files: Vec<FileState>,
}

/// How a point is begun.
pub(super) struct Begun<'r> {
    /// The point under way.
    pub(super) transaction: Transaction<'r>,
    /// When the sources looked as they do now, if they are provably unchanged since an interrupted run.
    pub(super) same_since: Option<Timestamp>,
    /// How layers are written.
    pub(super) options: WriterOptions,
}

/// Begins a point, or goes on with the one that was interrupted.
pub(super) fn begin<'r>(
    order: &Order<'_>,
    repo: &'r Repository,
    machine: &Machine,
    parent: Option<&Point>,
    wanted: &[Wanted],
) -> Result<Begun<'r>> {
    let context = order.context;
    let may_wake = reclaim(order, repo, machine)?;
    let now = sources_of(wanted);
    if may_wake {
        // Its files are open in its hands: they are left to it, and to whoever clears up later.
        return afresh(order, repo, machine, parent, now);
    }
    let parent_id = parent.map(|point| point.id);
    let left = repo.interrupted(machine)?;
    if let Some(what) = left.iter().rev().find(|what| what.record.parent == parent_id) {
        let then = recorded(context, what.record.id);
        let same = matches!((&then, &now), (Some(then), Some(now)) if then.disks == now.disks);
        // What a bitmap mentioned then and does not mention now would keep the content of then.
        let by_comparison = wanted.iter().all(|disk| matches!(disk.hint, Hint::None | Hint::Missing(_)));
        if same || by_comparison {
            let options = repo.writer_options();
            let transaction = match repo.resume(machine, what, order.holder()) {
                // Another one was at it, and has committed it by now.
                Err(Error::Exists { .. }) => return afresh(order, repo, machine, parent, now),
                outcome => outcome?,
            };
            let how = if same { "the source has not changed" } else { "the source is read again" };
            context.out.say(format_args!("going on with the interrupted point {}: {how}", what.record.id));
            return Ok(Begun { transaction, same_since: then.filter(|_| same).map(|then| then.began), options });
        }
        keeper::discard(repo, machine, what, order.holder())?;
        forget(context, what.record.id);
    }
    afresh(order, repo, machine, parent, now)
}

/// Sets aside the leases of appenders that are gone. Answers whether one of them may yet wake up.
pub(super) fn reclaim(order: &Order<'_>, repo: &Repository, machine: &Machine) -> Result<bool> {
    let context = order.context;
    // Whoever was killed while appending still holds its lease.
    let tell = repository::tell(context)?;
    // Whoever had this very work before has lost it, also where it only stands still and may wake up.
    let superseded = |holder: &Holder| order.hand.is_some_and(|hand| hand.supersedes(holder));
    let judge = |holder: &Holder| if superseded(holder) { Liveness::Dead } else { tell(holder) };
    let gone = repository::observing(context, |observer| {
        Ok(keeper::reclaim(repo, machine, observer, &judge, LEASE_TTL + LEASE_TTL / 4)?)
    })?;
    let may_wake = gone.iter().any(|lease| superseded(&lease.holder) && tell(&lease.holder) != Liveness::Dead);
    for lease in gone {
        let since = lease.since.strftime("%Y-%m-%dT%H:%M:%SZ");
        let what = format!("{} held {} since {since} and is gone; its lease was set aside", lease.holder, machine.name);
        context.out.warn(Code::WarnLease, what, None);
    }
    Ok(may_wake)
}

/// Gives up what an interrupted run has stored, and begins a new point.
pub(super) fn begin_afresh<'r>(
    order: &Order<'_>,
    repo: &'r Repository,
    machine: &Machine,
    stale: Transaction<'_>,
    wanted: &[Wanted],
) -> Result<Begun<'r>> {
    let context = order.context;
    let (id, parent) = (stale.id(), stale.parent().cloned());
    stale.interrupt()?;
    context.out.say(format_args!("the interrupted point {id} is of an earlier state of the disks; it is given up"));
    if let Some(what) = repo.interrupted(machine)?.iter().find(|what| what.record.id == id) {
        keeper::discard(repo, machine, what, order.holder())?;
        forget(context, id);
    }
    afresh(order, repo, machine, parent.as_ref(), sources_of(wanted))
}

fn afresh<'r>(
    order: &Order<'_>,
    repo: &'r Repository,
    machine: &Machine,
    parent: Option<&Point>,
    now: Option<Sources>,
) -> Result<Begun<'r>> {
    let transaction = repo.begin(machine, parent, order.holder())?;
    if let Some(now) = now {
        keep(order.context, transaction.id(), &now)?;
    }
    Ok(Begun { transaction, same_since: None, options: repo.writer_options() })
}

/// The sources' present state, where all of them can be told by their files.
fn sources_of(wanted: &[Wanted]) -> Option<Sources> {
    let mut disks = Vec::new();
    for disk in wanted {
        let files = files::of_chain(&disk.chain)?;
        disks.push(Source { disk: disk.name.as_str().to_owned(), bitmap: bitmap_of(disk), files });
    }
    Some(Sources { began: Timestamp::now(), disks })
}

/// The bitmap a disk is read by.
fn bitmap_of(disk: &Wanted) -> Option<String> {
    match &disk.hint {
        Hint::Bitmap(name) | Hint::Named(name) => Some(name.clone()),
        _ => None,
    }
}

fn place(context: &Context, point: Uuid) -> Result<PathBuf> {
    Ok(context.home()?.join("backup").join(format!("{point}.json")))
}

fn keep(context: &Context, point: Uuid, sources: &Sources) -> Result<()> {
    let path = place(context, point)?;
    let folder = path.parent().unwrap_or(&path);
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|e| Fail::io(folder.display(), "create", &e))?;
    let text = serde_json::to_vec(sources).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
    fs::write(&path, text).map_err(|e| Fail::io(path.display(), "write", &e))
}

/// What was kept; anything unreadable is as good as nothing.
fn recorded(context: &Context, point: Uuid) -> Option<Sources> {
    serde_json::from_slice(&fs::read(place(context, point).ok()?).ok()?).ok()
}

/// Drops the record of a point that is committed or given up.
pub(super) fn forget(context: &Context, point: Uuid) {
    if let Ok(path) = place(context, point) {
        // A record that stays costs a few bytes and is never looked at again.
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests;
