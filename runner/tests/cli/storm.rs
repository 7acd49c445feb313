//! Promise: whatever is killed at whatever moment of a backup, a copy, a check or their retention, no point is lost, there
//! by half or there twice, each holds what its disk held, and the next run succeeds. Whoever carries the work out is
//! killed: the command, a worker, the service.
//!
//! Rounds: [`rounds`], of each kind.

#![allow(clippy::cast_possible_truncation, reason = "numbers of a small disk")]

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use aquifer_formats::repo::{DiskName, PointState, Repository, record::Owner};
use aquifer_vdisk::{BlockCache, Chain, Disk};
use serde_json::Value;

use crate::{
    carrier::{Carrier, goes_on, newest_run},
    harness::Room,
    ledger::Ledger,
};

/// Bytes of the disk.
const SIZE: usize = 3 << 20;

/// Numbers that look random and are the same on every run (splitmix64).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            part.copy_from_slice(&word[..part.len()]);
        }
    }
}

/// How many rounds a test has: so few in the short form, five times `AQUIFER_TEST_SCALE` in the long one, so a hundred
/// where that is 20, as in `make test-long`.
pub(crate) fn rounds(few: u32) -> u32 {
    let scale = std::env::var("AQUIFER_TEST_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    if scale == 1 { few } else { 5 * scale }
}

/// A moment within most of the time something takes.
pub(crate) fn moment(dice: &mut Dice, takes: Duration) -> Duration {
    let millis = usize::try_from(takes.as_millis()).expect("short") * 8 / 10;
    Duration::from_millis(dice.below(millis.max(1)) as u64)
}

/// What is in the way of a killer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// Any of the whole run.
    Any,
    /// After the new point was made: of retention.
    Retention,
}

struct Storm {
    room: Room,
    dice: Dice,
    disk: Vec<u8>,
    /// What each version of the disk was; its number is in its first bytes.
    history: BTreeMap<u32, Vec<u8>>,
    /// Newest version that each repository has told to have.
    told: BTreeMap<&'static str, u32>,
    /// How long each job takes.
    takes: BTreeMap<&'static str, Duration>,
    kills: BTreeMap<&'static str, u64>,
    points: u64,
}

impl Storm {
    fn new(seed: u64) -> Self {
        let room = Room::new();
        let dir = room.dir.path().display().to_string();
        let text = format!(
            "version = 1\nhome = \"{dir}/home\"\n[repository]\nnas = {{ url = \"{dir}/repo\", default = true }}\n\
             vault = {{ url = \"{dir}/vault\" }}\n[machine]\nfiles = {{ disks = {{ data = \"raw:{dir}/data.raw\" }} }}\n\
             [job.b]\nkind = \"backup\"\nmachines = [\"files\"]\nto = \"nas\"\nkeep = {{ last = 3 }}\n\
             [job.c]\nkind = \"copy\"\nmachines = [\"files\"]\nfrom = [\"nas\"]\nto = \"vault\"\nmode = \"immediate\"\n\
             keep = {{ last = 4 }}\n\
             [job.h]\nkind = \"health\"\nrepository = \"nas\"\npoints = \"all\"\nrepair_from = [\"vault\"]\n"
        );
        room.write_site(&text);
        room.ok(["init"]);
        room.ok(["-r", &room.text("vault"), "init", "--block", "256KiB"]);
        let mut storm = Self {
            room,
            dice: Dice(seed),
            disk: vec![0; SIZE],
            history: BTreeMap::new(),
            told: BTreeMap::new(),
            takes: BTreeMap::new(),
            kills: BTreeMap::new(),
            points: 0,
        };
        let Self { dice, disk, .. } = &mut storm;
        dice.fill(disk);
        for _ in 0..3 {
            storm.change();
            storm.run("b");
            storm.run("c");
        }
        storm.run("h");
        storm.judge("nas", 3);
        storm.judge("vault", 3);
        storm
    }

    /// The disk changes.
    fn change(&mut self) {
        let version = self.history.len() as u32 + 1;
        let (at, len) = (self.dice.below(SIZE - (1 << 20)), 1 + self.dice.below(1 << 20));
        self.dice.fill(&mut self.disk[at..at + len]);
        self.disk[..4].copy_from_slice(&version.to_le_bytes());
        fs::write(self.room.path("data.raw"), &self.disk).expect("write");
        self.history.insert(version, self.disk.clone());
    }

    /// Runs a job to its end, and it succeeds.
    fn run(&mut self, job: &'static str) {
        let since = newest_run(&self.room, job);
        let began = Instant::now();
        Carrier::Command.carries_through(&self.room, job, since);
        self.takes.insert(job, began.elapsed());
    }

    fn kill(&mut self, job: &'static str, carrier: Carrier, when: Moment) {
        let takes = self.takes.get(job).copied().unwrap_or(Duration::from_secs(1));
        let killed = match when {
            Moment::Any => {
                let moment = moment(&mut self.dice, takes);
                carrier.is_killed(&self.room, job, moment)
            }
            Moment::Retention => {
                let before = self.made();
                let mut process = carrier.begins(&self.room, job);
                let until = Instant::now() + Duration::from_secs(60);
                while self.made() == before && Instant::now() < until && process.runs() {
                    thread::sleep(Duration::from_millis(1));
                }
                thread::sleep(Duration::from_micros(self.dice.below(60_000) as u64));
                process.kill()
            }
        };
        let who = match carrier {
            Carrier::Command => "commands killed",
            Carrier::Worker => "workers killed",
            Carrier::Serve => "services killed",
        };
        *self.kills.entry(who).or_default() += u64::from(killed);
    }

    /// The newest record of a point.
    fn made(&self) -> Option<PathBuf> {
        let machines = fs::read_dir(self.room.path("repo/machines")).expect("machines").flatten();
        let points = machines.filter_map(|machine| fs::read_dir(machine.path().join("points")).ok()).flatten();
        points.flatten().map(|point| point.path().join("point.json")).filter(|record| record.exists()).max()
    }

    /// Versions that a repository lists, oldest first; each is looked at byte by byte.
    fn judge(&mut self, repo: &'static str, at_least: usize) {
        let dir = self.room.path(if repo == "nas" { "repo" } else { repo });
        let nobody = Owner { id: uuid::Uuid::nil(), name: "a look".into() };
        let repository = Repository::open(&dir, nobody).expect("the repository");
        let machine = repository.machine("files").expect("the machine");
        let mut versions = Vec::new();
        for point in repository.points(&machine).expect("points") {
            // What is not whole is told as such, and goes on or goes away.
            if point.state == PointState::Incomplete {
                continue;
            }
            assert_eq!(point.state, PointState::Complete, "{repo}: {point:?}");
            let layer = repository.open_disk(&point, &DiskName::new("data").expect("a name")).expect("the disk");
            let cache = Arc::new(BlockCache::new(1 << 20));
            let disk = Disk::read_only("data", Arc::new(Chain::new(vec![layer], cache).expect("a chain")));
            let mut bytes = vec![0; SIZE];
            disk.read(0, &mut bytes).expect("every byte");
            let version = u32::from_le_bytes(bytes[..4].try_into().expect("four"));
            assert!(self.history.get(&version) == Some(&bytes), "{repo}: {} is not version {version}", point.id);
            versions.push(version);
            self.points += 1;
        }
        // A run that was killed after its point was there has made its point.
        assert!(versions.is_sorted_by(|a, b| a < b), "{repo}: {versions:?}");
        let newest = versions.last().copied().unwrap_or(0);
        let told = self.told.entry(repo).or_default();
        assert!(newest >= *told, "{repo}: {versions:?}, and {told} had been there");
        assert!(versions.len() >= at_least, "{repo}: {versions:?}, of {at_least} at least");
        *told = newest;
    }

    fn newest(&self, repo: &str) -> u32 {
        self.told.get(repo).copied().unwrap_or(0)
    }
}

/// Kills of one job, each followed by a look at every point and by runs of all jobs.
fn kills(proof: &'static str, seed: u64, victim: &'static str, when: Moment) {
    let ledger = Ledger::begin(proof);
    let mut storm = Storm::new(seed);
    let (mut round, rounds) = (0, rounds(3));
    while goes_on(round, rounds, storm.kills.values().sum()) {
        let carrier = Carrier::of(round);
        storm.change();
        if victim != "b" {
            storm.run("b");
        }
        let since = newest_run(&storm.room, victim);
        storm.kill(victim, carrier, when);
        storm.judge("nas", 3);
        storm.judge("vault", 3);
        carrier.carries_through(&storm.room, victim, since);
        for job in ["c", "h"].into_iter().filter(|job| *job != victim) {
            storm.run(job);
        }
        storm.judge("nas", 3);
        storm.judge("vault", 3);
        let version = storm.history.len() as u32;
        assert_eq!((storm.newest("nas"), storm.newest("vault")), (version, version), "round {round}");
        round += 1;
    }
    for repo in ["repo", "vault"] {
        let left = storm.room.json(["-r", &storm.room.text(repo), "leases"]);
        assert!(left.kind("lease").iter().all(|lease: &Value| lease["state"] != "alive"), "{}", left.stdout);
    }
    let mut counts = vec![("rounds", u64::from(round))];
    counts.extend(storm.kills.iter().map(|(who, count)| (*who, *count)));
    let least = (u64::from(rounds) / 3).max(1);
    assert!(storm.kills.values().sum::<u64>() >= least, "{counts:?}: too few in time");
    counts.push(("points compared", storm.points));
    ledger.tell(&seed.to_string(), &counts);
}

#[test]
fn no_point_is_lost_or_half_there_when_a_backup_is_killed() {
    kills("kills of a backup of images", 0x5707, "b", Moment::Any);
}

#[test]
fn no_point_is_lost_or_half_there_when_a_copy_is_killed() {
    kills("kills of a copy", 0x5708, "c", Moment::Any);
}

#[test]
fn no_point_is_lost_or_half_there_when_a_check_is_killed() {
    kills("kills of a health check", 0x5709, "h", Moment::Any);
}

#[test]
fn no_point_is_lost_or_half_there_when_retention_is_killed() {
    kills("kills of retention", 0x570a, "b", Moment::Retention);
}
