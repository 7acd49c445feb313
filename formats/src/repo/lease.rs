//! Leases: who reads or appends what.
//!
//! Invariants
//! - Taking a lease is creating an object; a lease says nothing about data and is the only kind of object
//!   that is withdrawn; its beat grows in place.
//! - Whether a holder lives is judged by its beat, unchanged over the *observer's* monotonic time, or by
//!   an observer that can see the process itself. Wall clocks decide nothing.
//! - Order that makes deletion safe: a reader takes its lease, then looks whether the point is still
//!   retained; the keeper gives points up first and then looks for leases.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Error, Machine, Point, Repository, Result, Store, keeper, manifest, name,
    record::{Holder, LeaseKind, LeaseRecord, encode, read},
};

/// How long a beat may stand still before its holder counts as gone. Holders beat four times as often.
pub const LEASE_TTL: Duration = Duration::from_secs(60);

/// How often, and how long, one of two that come at the same moment waits for the other.
const LOOKS: u32 = 40;
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A claim of this process.
#[derive(Debug)]
pub struct Lease {
    store: Store,
    record: LeaseRecord,
}

impl Lease {
    /// What it says.
    pub fn record(&self) -> &LeaseRecord {
        &self.record
    }

    /// Gives a sign of life. To be called every [`LEASE_TTL`] / 4.
    ///
    /// # Errors
    /// [`Error::NotFound`] if somebody took the lease away: whatever stands on it must stop. I/O.
    pub fn beat(&mut self) -> Result<()> {
        let file = name::lease(self.record.id);
        if self.store.len(&file)?.is_none() {
            return Err(Error::not_found(&self.store.path_of(&file), "lease: it was reclaimed"));
        }
        self.record.beat += 1;
        self.store.replace(&file, &encode(&self.record)?)
    }

    /// Withdraws it.
    ///
    /// # Errors
    /// I/O; the lease then ends by standing still.
    pub fn release(self) -> Result<()> {
        keeper::withdraw(&self.store, self.record.id)
    }
}

/// What an observer saw, to be kept between short-lived processes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseMemory {
    /// The boot of the computer, whose clock counts below.
    pub boot: String,
    /// Lease, its beat, and since how many seconds after that boot it stands there.
    pub seen: Vec<(Uuid, u64, u64)>,
}

/// What an observer can tell of a holder by other means than its beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// It runs.
    Alive,
    /// It does not run any more.
    Dead,
    /// It cannot be told from here.
    Unknown,
}

/// Judges leases over time. One per process, kept as long as the process lives.
#[derive(Debug, Default)]
pub struct LeaseObserver {
    seen: HashMap<Uuid, (u64, Instant)>,
}

impl LeaseObserver {
    /// One that has seen nothing: every lease counts as live for the first [`LEASE_TTL`], unless its
    /// holder can be seen to be dead.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that goes on where another left off, if that was since the same boot. `now` is the present on
    /// both clocks: this process's monotonic one and the seconds since the boot.
    pub fn recall(memory: &LeaseMemory, boot: &str, now: (Instant, Duration)) -> Self {
        let mut seen = HashMap::new();
        for (lease, beat, since) in memory.seen.iter().filter(|_| memory.boot == boot) {
            let age = now.1.checked_sub(Duration::from_secs(*since));
            if let Some(since) = age.and_then(|age| now.0.checked_sub(age)) {
                seen.insert(*lease, (*beat, since));
            }
        }
        Self { seen }
    }

    /// What it has seen, for [`LeaseObserver::recall`].
    pub fn remember(&self, boot: &str, now: (Instant, Duration)) -> LeaseMemory {
        let since = |at: &Instant| now.1.saturating_sub(now.0.saturating_duration_since(*at));
        // Rounded up: a lease never looks older than it is.
        let seconds = |at: Duration| at.as_secs() + u64::from(at.subsec_nanos() > 0);
        let seen = self.seen.iter().map(|(lease, (beat, at))| (*lease, *beat, seconds(since(at)))).collect();
        LeaseMemory { boot: boot.to_owned(), seen }
    }

    /// The live leases, and the others.
    ///
    /// # Errors
    /// A damaged lease; I/O.
    pub fn observe(
        &mut self,
        repo: &Repository,
        now: Instant,
        tell: &dyn Fn(&Holder) -> Liveness,
    ) -> Result<(Vec<LeaseRecord>, Vec<LeaseRecord>)> {
        let all = repo.leases()?;
        self.seen.retain(|id, _| all.iter().any(|lease| lease.id == *id));
        let (mut live, mut dead) = (Vec::new(), Vec::new());
        for lease in all {
            let (beat, since) = self.seen.entry(lease.id).or_insert((lease.beat, now));
            if *beat != lease.beat {
                (*beat, *since) = (lease.beat, now);
            }
            let still = now.saturating_duration_since(*since) >= LEASE_TTL;
            match (tell(&lease.holder), still) {
                (Liveness::Alive, _) | (Liveness::Unknown, false) => live.push(lease),
                (Liveness::Dead, _) | (Liveness::Unknown, true) => dead.push(lease),
            }
        }
        Ok((live, dead))
    }
}

impl Repository {
    /// All leases, whether their holders live or not.
    ///
    /// # Errors
    /// A damaged lease; I/O.
    pub fn leases(&self) -> Result<Vec<LeaseRecord>> {
        let mut leases = Vec::new();
        for file in self.store().list(name::LEASES)? {
            let Some(id) = name::parse_id(&file) else { continue };
            // One may be withdrawn between the two calls.
            leases.extend(read::<LeaseRecord>(self.store(), &name::lease(id))?);
        }
        Ok(leases)
    }

    /// Claims a point for reading: its files stay until the lease ends.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the point has been given up meanwhile; I/O (also on a store that cannot be
    /// written: then nobody deletes there either, and the caller may go on without).
    pub fn lease_read(&self, machine: &Machine, point: &Point, holder: Holder) -> Result<Lease> {
        let lease = self.take(machine, LeaseKind::Read, Some(point.id), holder)?;
        if self.listed(machine)?.iter().any(|listed| listed.id == point.id) {
            return Ok(lease);
        }
        lease.release()?;
        Err(Error::not_found(self.label(), format!("point {} of {}: it has been given up", point.id, machine.name)))
    }

    /// Claims a machine for adding a point, standing on `parent`. Of two at the same moment, at most one
    /// gets it.
    pub(super) fn lease_append(&self, machine: &Machine, parent: Option<Uuid>, holder: Holder) -> Result<Lease> {
        let lease = self.take(machine, LeaseKind::Append, parent, holder)?;
        for look in 0.. {
            let all = self.leases()?;
            let other =
                |l: &&LeaseRecord| l.kind == LeaseKind::Append && l.machine == machine.id && l.id != lease.record.id;
            let Some(other) = all.iter().find(other) else { break };
            // Two at the same moment: the lesser id waits for the other to withdraw. Who was there before
            // does not, whatever its id.
            if look < LOOKS && lease.record.id < other.id {
                std::thread::sleep(LOOK_AGAIN);
                continue;
            }
            let error = Error::Locked {
                path: self.store().path_of(&name::machine_folder(machine.id)),
                holder: other.holder.to_string(),
                kind: "append",
                since: other.since.to_string(),
            };
            lease.release()?;
            return Err(error);
        }
        let gone = parent.filter(|parent| self.listed(machine).is_ok_and(|all| all.iter().all(|p| p.id != *parent)));
        match gone {
            None => Ok(lease),
            Some(parent) => {
                lease.release()?;
                Err(Error::not_found(self.label(), format!("point {parent} of {}", machine.name)))
            }
        }
    }

    fn take(&self, machine: &Machine, kind: LeaseKind, point: Option<Uuid>, holder: Holder) -> Result<Lease> {
        let generation = manifest::latest(self.store(), machine.id)?.map_or(0, |m| m.record.generation);
        let record = LeaseRecord {
            id: Uuid::new_v4(),
            kind,
            machine: machine.id,
            point,
            generation,
            holder,
            since: Timestamp::now(),
            beat: 0,
        };
        self.store().create(&name::lease(record.id), &encode(&record)?)?;
        Ok(Lease { store: self.store().clone(), record })
    }
}
