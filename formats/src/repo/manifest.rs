//! Generations: which points a machine has, and how that changes.
//!
//! Invariants
//! - A change reads the newest generation and creates the next; whoever loses the race reads again. The
//!   number is the receipt sequence.
//! - Each generation names the hash of the one before, and is created only once that one is durable. A
//!   damaged newest generation is an error, never a reason to fall back to an older one.
//! - A reader that remembers the highest generation it has seen detects an older or another one.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Error, Machine, Repository, Result, Store, name,
    record::{Hash, ManifestRecord, decode, encode},
};
use crate::planted::{Bug, planted};

/// How often a change is tried again after losing the race for a generation.
const TRIES: usize = 64;

/// How many generations back the chain of hashes is followed without a memory that asks for more.
const CHAIN_CHECKED: u64 = 4;

/// What a reader remembers of a machine's manifests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The highest generation seen.
    pub generation: u64,
    /// Its hash.
    pub hash: Hash,
}

/// What is known of a manifest's age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Nothing was remembered: it may be old.
    Unknown,
    /// It is what was seen last, or stands on it.
    AsSeenOrNewer,
}

/// A generation as read.
#[derive(Clone, Debug)]
pub(super) struct Manifest {
    pub(super) record: ManifestRecord,
    pub(super) hash: Hash,
}

impl Manifest {
    pub(super) fn seen(&self) -> Seen {
        Seen { generation: self.record.generation, hash: self.hash }
    }
}

fn get(store: &Store, machine: Uuid, number: u64) -> Result<Option<Manifest>> {
    let file = name::generation(machine, number);
    let Some(bytes) = store.get(&file)? else { return Ok(None) };
    let shown = store.path_of(&file);
    let record: ManifestRecord = decode(&shown, &bytes)?;
    if record.generation != number || record.machine != machine {
        let what = format!("is generation {} of machine {}", record.generation, record.machine);
        return Err(crate::Error::corrupt(shown, 0, what).into());
    }
    Ok(Some(Manifest { record, hash: Hash::of(&bytes) }))
}

/// The newest generation, with the last few links of its chain checked.
pub(super) fn latest(store: &Store, machine: Uuid) -> Result<Option<Manifest>> {
    let numbers = store.list(&name::chain(machine))?;
    let Some(number) = numbers.iter().filter_map(|file| name::parse_number(file)).max() else { return Ok(None) };
    let Some(newest) = get(store, machine, number)? else {
        // Deleted between the two calls: only a repository that is taken apart does that.
        return Err(Error::not_found(&store.path_of(&name::generation(machine, number)), "manifest"));
    };
    follow(store, machine, &newest, number.saturating_sub(CHAIN_CHECKED))?;
    Ok(Some(newest))
}

/// Follows hashes from `newest` down to generation `until`; generations that were let go end the walk.
fn follow(store: &Store, machine: Uuid, newest: &Manifest, until: u64) -> Result<Option<Manifest>> {
    let mut at = newest.clone();
    while at.record.generation > until.max(1) {
        let Some(before) = get(store, machine, at.record.generation - 1)? else { return Ok(None) };
        if at.record.previous != Some(before.hash) {
            let path = store.path_of(&name::generation(machine, at.record.generation));
            let what = format!("generation {} does not stand on the one before", at.record.generation);
            return Err(Error::RolledBack { path, what });
        }
        at = before;
    }
    Ok((at.record.generation == until).then_some(at))
}

/// Compares the newest generation with what a reader remembers.
pub(super) fn check(store: &Store, machine: Uuid, newest: &Manifest, seen: Option<Seen>) -> Result<Freshness> {
    let Some(seen) = seen else { return Ok(Freshness::Unknown) };
    let path = store.path_of(&name::generation(machine, newest.record.generation));
    let older = |what: String| Err(Error::RolledBack { path: path.clone(), what });
    if newest.record.generation < seen.generation {
        return older(format!("generation {} was seen, {} is the newest", seen.generation, newest.record.generation));
    }
    let then = if newest.record.generation == seen.generation {
        Some(newest.clone())
    } else {
        follow(store, machine, newest, seen.generation)?
    };
    match then {
        Some(then) if then.hash == seen.hash => Ok(Freshness::AsSeenOrNewer),
        Some(_) => older(format!("generation {} is another than the one that was seen", seen.generation)),
        None => older(format!("generation {} was seen and is gone", seen.generation)),
    }
}

/// Creates the next generation; `edit` may run several times, each on the newest state.
pub(super) fn change(
    repo: &Repository,
    machine: &Machine,
    mut edit: impl FnMut(&mut ManifestRecord) -> Result<()>,
) -> Result<Manifest> {
    let store = repo.store();
    let mut lost = None;
    for _ in 0..TRIES {
        let before = latest(store, machine.id)?;
        let generation = before.as_ref().map_or(0, |m| m.record.generation) + 1;
        let mut record = match &before {
            Some(before) => before.record.clone(),
            None => first(machine),
        };
        record.generation = generation;
        record.previous = before.map(|m| m.hash);
        record.writer = repo.me().clone();
        record.written = Timestamp::now();
        edit(&mut record)?;
        let bytes = encode(&record)?;
        // Whoever made the generation before may have been killed before its name was durable, and it must not be lost
        // while the next one stays: that one stands on it.
        if generation > 1 && !planted(Bug::GenerationTrusted) {
            store.settle(&name::chain(machine.id))?;
        }
        match store.create(&name::generation(machine.id, generation), &bytes) {
            Ok(()) => return Ok(Manifest { record, hash: Hash::of(&bytes) }),
            Err(e @ Error::Exists { .. }) => lost = Some(e),
            Err(e) => return Err(e),
        }
    }
    Err(lost.unwrap_or_else(|| Error::not_found(repo.label(), "free generation")))
}

fn first(machine: &Machine) -> ManifestRecord {
    ManifestRecord {
        machine: machine.id,
        generation: 0,
        previous: None,
        writer: super::record::Owner { id: Uuid::nil(), name: String::new() },
        written: Timestamp::UNIX_EPOCH,
        name: machine.name.clone(),
        aliases: machine.aliases.clone(),
        points: Vec::new(),
    }
}

impl Repository {
    /// The newest generation of a machine's manifest, for a reader's memory; `None` for a machine without.
    ///
    /// # Errors
    /// [`Error::RolledBack`] if it is older than, or another than, what was `seen`; damage; I/O.
    pub fn freshness(&self, machine: &Machine, seen: Option<Seen>) -> Result<(Option<Seen>, Freshness)> {
        match latest(self.store(), machine.id)? {
            Some(newest) => Ok((Some(newest.seen()), check(self.store(), machine.id, &newest, seen)?)),
            None if seen.is_some() => Err(Error::RolledBack {
                path: self.store().path_of(&name::chain(machine.id)),
                what: "manifests were seen, and none is there".into(),
            }),
            None => Ok((None, Freshness::Unknown)),
        }
    }
}
