//! Promise: whatever is killed at whatever moment of a backup, a copy, a check or their retention, no point is lost or
//! there by half, each holds what its disk held, and the next run succeeds.
//!
//! Rounds: a few; `AQUIFER_TEST_SCALE` times as many.

#![allow(clippy::cast_possible_truncation, reason = "numbers of a small disk")]

use std::{
    collections::BTreeMap,
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::harness::Room;

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

/// How many rounds a test has, of `few` in the short form.
pub(crate) fn rounds(few: u32) -> u32 {
    few * std::env::var("AQUIFER_TEST_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}

/// A moment within most of the time something takes.
pub(crate) fn moment(dice: &mut Dice, takes: Duration) -> Duration {
    let millis = usize::try_from(takes.as_millis()).expect("short") * 8 / 10;
    Duration::from_millis(dice.below(millis.max(1)) as u64)
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
    kills: u32,
}

impl Storm {
    fn new() -> Self {
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
        fs::write(room.path("site.toml"), text).expect("write");
        room.ok(["init"]);
        room.ok(["-r", &room.text("vault"), "init", "--block", "256KiB"]);
        let mut storm = Self {
            room,
            dice: Dice(0x5707),
            disk: vec![0; SIZE],
            history: BTreeMap::new(),
            told: BTreeMap::new(),
            takes: BTreeMap::new(),
            kills: 0,
        };
        let Self { dice, disk, .. } = &mut storm;
        dice.fill(disk);
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

    fn command(&self, job: &str) -> Command {
        self.room.command(["-c", &self.room.text("site.toml"), "run", job])
    }

    /// Runs a job to its end, and it succeeds.
    fn run(&mut self, job: &'static str) {
        let began = Instant::now();
        let output = self.command(job).output().expect("run");
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        // With a warning where the session of a run that was killed goes on.
        let good = output.status.success() || (output.status.code() == Some(1) && said.contains("W_RESUMED"));
        assert!(good, "{job}: {:?}: {said}", output.status);
        self.takes.insert(job, began.elapsed());
    }

    fn kill(&mut self, job: &'static str) {
        let takes = self.takes.get(job).copied().unwrap_or(Duration::from_secs(1));
        let moment = moment(&mut self.dice, takes);
        let mut child = self.command(job).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("run");
        std::thread::sleep(moment);
        self.kills += u32::from(child.try_wait().expect("a status").is_none());
        child.kill().expect("kill");
        child.wait().expect("gone");
    }

    /// Versions that a repository lists, oldest first; each is looked at byte by byte.
    fn judge(&mut self, repo: &'static str, at_least: usize) {
        let dir = self.room.text(if repo == "nas" { "repo" } else { repo });
        let mut versions = Vec::new();
        let listed = self.room.json(["-r", &dir, "points"]);
        for point in listed.kind("point") {
            // What is not whole is told as such, and goes on or goes away.
            if point["state"] == "incomplete" {
                continue;
            }
            assert_eq!(point["state"], "complete", "{repo}: {point}");
            let id = point["point"].as_str().expect("an id");
            let out = self.room.text("out.raw");
            let _ = fs::remove_file(&out);
            self.room.ok(["-r", &dir, "export", &format!("files@{id}:data"), &out]);
            let bytes = fs::read(&out).expect("read");
            let version = u32::from_le_bytes(bytes[..4].try_into().expect("four"));
            assert!(self.history.get(&version) == Some(&bytes), "{repo}: {id} is not version {version}");
            versions.push(version);
        }
        // A run that was killed after its point was there is repeated: one more point of the same.
        assert!(versions.is_sorted(), "{repo}: {versions:?}");
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

#[test]
fn no_point_is_lost_or_half_there_whatever_is_killed() {
    let mut storm = Storm::new();
    for _ in 0..3 {
        storm.change();
        storm.run("b");
        storm.run("c");
    }
    storm.run("h");
    storm.judge("nas", 3);
    storm.judge("vault", 3);
    for round in 0..rounds(6) {
        storm.change();
        let victim = ["b", "c", "b", "h", "b", "c"][round as usize % 6];
        if victim == "c" {
            storm.run("b");
        }
        storm.kill(victim);
        storm.judge("nas", 3);
        storm.judge("vault", 3);
        for job in ["b", "c", "h"] {
            storm.run(job);
        }
        storm.judge("nas", 3);
        storm.judge("vault", 3);
        let version = storm.history.len() as u32;
        assert_eq!((storm.newest("nas"), storm.newest("vault")), (version, version), "round {round}");
    }
    assert!(storm.kills > 0, "nobody was killed in time");
    for repo in ["repo", "vault"] {
        let left = storm.room.json(["-r", &storm.room.text(repo), "leases"]);
        assert!(left.kind("lease").iter().all(|lease: &Value| lease["state"] != "alive"), "{}", left.stdout);
    }
}
