//! Promise: a replica is made of backups alone, each run moves only what changed, a run without news moves nothing, and
//! the points that are kept are those that were taken.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::harness::{Outcome, Room};

const MIB: usize = 1 << 20;
const CLUSTER: usize = 64 << 10;

/// A site with production, two repositories and a host for replicas.
pub(crate) struct Site {
    pub(crate) room: Room,
    /// Production's disks, as they are.
    pub(crate) disks: Vec<(String, Vec<u8>)>,
    seed: u64,
}

impl Site {
    /// `more` are lines of the job `dr`.
    pub(crate) fn new(more: &str) -> Self {
        Self::with("{ from = \"backup\", repositories = [\"r1\", \"r2\"] }", more)
    }

    pub(crate) fn with(source: &str, more: &str) -> Self {
        let room = Room::new();
        for name in ["prod", "dr"] {
            fs::create_dir(room.path(name)).expect("a folder");
        }
        for repo in ["r1", "r2"] {
            let made = Outcome::of(room.command(["-r", &room.text(repo), "init"]).output().expect("init"));
            assert_eq!(made.code, 0, "{}", made.stderr);
        }
        let mut site = Self { room, disks: Vec::new(), seed: 7 };
        for (name, bytes) in [("vda", 4 * MIB), ("vdb", 2 * MIB + 4096)] {
            let mut content = vec![0u8; bytes];
            for at in (0..bytes).step_by(CLUSTER * 3) {
                let end = bytes.min(at + CLUSTER);
                content[at..end].fill_with(|| u8::try_from(site.roll() % 255).expect("small") + 1);
            }
            site.disks.push((name.into(), content));
        }
        site.put_production();
        let text = format!(
            "version = 1\n[host]\ndr = {{ kind = \"qemu\", images = \"{dr}\" }}\n\
             [repository]\nr1 = {{ url = \"{r1}\" }}\nr2 = {{ url = \"{r2}\" }}\n\
             [machine]\ndb01 = {{ disks = {{ vda = \"raw:{vda}\", vdb = \"raw:{vdb}\" }} }}\n\
             [job.dr]\nkind = \"replication\"\nmachines = [\"db01\"]\nsource = {source}\n\
             target = {{ host = \"dr\" }}\nblock_size = \"64KiB\"\nretry = {{ count = 0, interval = \"1s\" }}\n{more}\n",
            dr = site.room.text("dr"),
            r1 = site.room.text("r1"),
            r2 = site.room.text("r2"),
            vda = site.room.text("prod/vda.raw"),
            vdb = site.room.text("prod/vdb.raw"),
        );
        fs::write(site.room.path("site.toml"), text).expect("a site file");
        site
    }

    pub(crate) fn roll(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed >> 8
    }

    pub(crate) fn put_production(&self) {
        for (name, bytes) in &self.disks {
            fs::write(self.room.path(format!("prod/{name}.raw")), bytes).expect("production");
        }
    }

    /// Changes so many whole clusters of each disk; answers their bytes.
    pub(crate) fn change(&mut self, clusters: usize) -> u64 {
        let mut changed = 0;
        for disk in 0..self.disks.len() {
            let count = self.disks[disk].1.len() / CLUSTER;
            let first = usize::try_from(self.roll()).unwrap_or(0) % (count - clusters);
            for byte in first * CLUSTER..(first + clusters) * CLUSTER {
                let old = self.disks[disk].1[byte];
                self.disks[disk].1[byte] = old.wrapping_add(1).max(1);
            }
            changed += (clusters * CLUSTER) as u64;
        }
        self.put_production();
        changed
    }

    pub(crate) fn back_up(&self, repo: &str, full: bool) {
        let mut args = vec!["-r".to_owned(), self.room.text(repo), "backup".into(), "db01".into()];
        for (name, _) in &self.disks {
            args.extend(["--disk".into(), format!("{name}=raw:{}", self.room.text(&format!("prod/{name}.raw")))]);
        }
        if full {
            args.push("--full".into());
        }
        let made = Outcome::of(self.room.command(&args).output().expect("backup"));
        assert!(made.code <= 1, "{}{}", made.stdout, made.stderr);
    }

    pub(crate) fn json(&self, args: &[&str]) -> Outcome {
        self.room.json(["-c", "site.toml"].iter().chain(args))
    }

    /// Runs the job; what it reported.
    pub(crate) fn replicate(&self) -> Value {
        let ran = self.json(&["run", "dr"]);
        assert!(ran.code <= 1, "{}{}", ran.stdout, ran.stderr);
        ran.one("replicated")
    }

    pub(crate) fn points(&self) -> Vec<Value> {
        let listed = self.json(&["replicas", "db01_replica"]);
        assert_eq!(listed.code, 0, "{}", listed.stdout);
        listed.kind("point")
    }

    /// Compares a restore point with what production was, by QEMU's own reader.
    pub(crate) fn assert_point(&self, point: &Value, disks: &[(String, Vec<u8>)]) {
        assert_eq!(point["disks"].as_array().map(Vec::len), Some(disks.len()), "{point}");
        for (name, bytes) in disks {
            let tops = point["disks"].as_array().expect("disks");
            let top = tops.iter().find(|top| top["disk"] == name.as_str()).expect("the disk");
            let file = self.room.path("dr/db01_replica").join(top["file"].as_str().expect("a file"));
            let raw = self.room.path("oracle.raw");
            fs::write(&raw, bytes).expect("an oracle");
            img(&["compare", "-U", "-f", "raw", "-F", "qcow2"], &[&raw, &file]);
            img(&["check", "-q", "-U", "-f", "qcow2"], &[&file]);
        }
    }
}

pub(crate) fn img(args: &[&str], files: &[&Path]) {
    let done = Command::new("qemu-img").args(args).args(files).output().expect("qemu-img");
    let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "qemu-img {args:?} {files:?}: {said}");
}

fn bytes(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_else(|| panic!("{key} in {report}"))
}

#[test]
fn a_replica_is_made_of_backups_and_each_run_moves_what_changed() {
    let mut site = Site::new("restore_points_to_keep = 3");
    site.back_up("r1", false);
    let mut expected = vec![site.disks.clone()];
    // Whoever only looks leaves nothing behind, and sees what would be read.
    let foreseen = site.json(&["run", "dr", "-n"]);
    let steps = foreseen.kind("step");
    assert!(steps.len() == 1 && bytes(&steps[0], "bytes") > 0, "{steps:?}");
    assert!(!site.room.path("home/catalogue.db").exists() && !site.room.path("dr/db01_replica").exists());

    // From here on production is gone: every byte comes from the backup.
    let gone = |site: &Site| {
        for (name, _) in &site.disks {
            fs::remove_file(site.room.path(format!("prod/{name}.raw"))).expect("production goes");
        }
    };
    gone(&site);
    let first = site.replicate();
    assert_eq!(bytes(&first, "bytes_read_production"), 0);
    assert_eq!(bytes(&first, "bytes_read"), bytes(&steps[0], "bytes"), "as foreseen");
    assert_eq!(first["state"], "ready");
    site.assert_point(&site.points()[0], &site.disks);

    // Nothing new: nothing moves, and that is said.
    let again = site.json(&["run", "dr"]);
    assert_eq!(again.code, 1, "{}", again.stdout);
    let report = again.one("replicated");
    assert_eq!((bytes(&report, "bytes_read"), bytes(&report, "bytes_written")), (0, 0));
    assert!(report["points"].as_array().is_some_and(Vec::is_empty), "{report}");
    assert!(again.kind("warning").iter().any(|warning| warning["code"] == "W_NO_NEW_POINT"), "{}", again.stdout);
    assert_eq!(site.json(&["run", "dr", "-n"]).one("step")["bytes"], 0);

    // Only what changed moves, and the oldest points make room for the newest.
    for round in 0..4 {
        let changed = site.change(2);
        site.back_up("r1", false);
        gone(&site);
        let report = site.replicate();
        assert_eq!(bytes(&report, "bytes_written"), changed, "round {round}");
        assert!(bytes(&report, "bytes_read") <= 2 * changed, "round {round}: {report}");
        assert_eq!(bytes(&report, "bytes_read_production"), 0);
        expected.push(site.disks.clone());
        let points = site.points();
        assert_eq!(points.len(), expected.len().min(3));
        let stay = &expected[expected.len() - points.len()..];
        points.iter().zip(stay).for_each(|(point, disks)| site.assert_point(point, disks));
    }
    // What the session says is what the report says.
    let sessions = site.json(&["sessions", "--job", "dr"]).kind("session");
    let newest = sessions.iter().max_by_key(|session| session["id"].as_i64()).expect("a session");
    assert_eq!(newest["progress"]["bytes_read_production"], 0, "{newest}");
    assert!(bytes(&newest["progress"], "bytes_written") > 0, "{newest}");
    assert_eq!(site.json(&["replicas"]).one("replica")["points"], 3);
}

#[test]
fn points_below_the_kept_ones_are_merged_by_copying() {
    let mut site = Site::new("restore_points_to_keep = 2");
    let mut expected = Vec::new();
    for _ in 0..12 {
        site.back_up("r1", false);
        site.replicate();
        expected.push(site.disks.clone());
        site.change(1);
    }
    let points = site.points();
    assert_eq!(points.len(), 2);
    points.iter().zip(&expected[10..]).for_each(|(point, disks)| site.assert_point(point, disks));
    let layers = |disk: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(site.room.path("dr/db01_replica").join(disk)).expect("a folder");
        entries.flatten().map(|entry| entry.path()).collect()
    };
    let left = layers("vda");
    assert!(left.len() <= 10, "{left:?}");
    assert!(left.iter().all(|path| path.extension().is_some_and(|end| end == "qcow2")), "{left:?}");
}
