//! Promise: a replica is made of backups alone, each run moves only what changed, a run without news moves nothing, the
//! points that are kept are those that were taken, and a run that is killed is gone on with.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    carrier::{Process, wait},
    harness::{Outcome, Room},
};

const MIB: usize = 1 << 20;
const CLUSTER: usize = 64 << 10;

/// Disks of a machine, by name.
pub(crate) type Disks = Vec<(String, Vec<u8>)>;

/// What production was at each point's moment.
type Known = Vec<(Value, Disks)>;

/// A site with production, two repositories and a host for replicas.
pub(crate) struct Site {
    pub(crate) room: Room,
    /// Production's disks, as they are.
    pub(crate) disks: Disks,
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
        site.room.write_site(&text);
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
        if self.room.path("prod/machine.toml").exists() {
            args.extend(["--machine".into(), self.room.text("prod/machine.toml")]);
        }
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

    /// When the newest point of a repository was made.
    pub(crate) fn newest_backup(&self, repo: &str) -> Value {
        let listed = Outcome::of(
            self.room.command(["-r", &self.room.text(repo), "points", "db01", "--json"]).output().expect("points"),
        );
        listed.kind("point").last().expect("a point")["created"].clone()
    }

    pub(crate) fn points(&self) -> Vec<Value> {
        self.points_of("db01_replica")
    }

    fn points_of(&self, replica: &str) -> Vec<Value> {
        let listed = self.json(&["replicas", replica]);
        assert_eq!(listed.code, 0, "{}", listed.stdout);
        listed.kind("point")
    }

    /// Begins a run that somebody will kill.
    pub(crate) fn begin(&self) -> Process {
        Process::start(self.room.command(["-c", "site.toml", "run", "dr", "--json"]))
    }

    /// Fills the disks with one byte; the first one with so much of it that a slow run marks where it is several times.
    pub(crate) fn fill_long(&mut self, byte: u8) {
        self.disks[0].1.resize(16 * MIB, byte);
        self.disks.iter_mut().for_each(|disk| disk.1.fill(byte));
        self.put_production();
    }

    /// Waits until a run has marked how far it has come in the first disk of its first point.
    pub(crate) fn wait_for_mark(&self) {
        wait("no mark is put", || self.room.path("dr/db01_replica/vda/1.qcow2.mark").exists());
    }

    /// Changes a line of the site file.
    pub(crate) fn rewrite(&self, from: &str, to: &str) {
        let path = self.room.path("site.toml");
        let text = fs::read_to_string(&path).expect("a site file");
        assert!(text.contains(from), "{from} in {text}");
        fs::write(path, text.replace(from, to)).expect("a site file");
    }

    /// Compares a restore point with what production was, by QEMU's own reader.
    pub(crate) fn assert_point(&self, point: &Value, disks: &[(String, Vec<u8>)]) {
        self.assert_point_of("db01_replica", point, disks);
    }

    /// Whether a restore point is what production was, by QEMU's own reader; its images are sound.
    pub(crate) fn holds(&self, point: &Value, disks: &[(String, Vec<u8>)]) -> bool {
        let tops = point["disks"].as_array().expect("disks");
        tops.len() == disks.len()
            && disks.iter().all(|(name, bytes)| {
                let top = tops.iter().find(|top| top["disk"] == name.as_str()).expect("the disk");
                let file = self.room.path("dr/db01_replica").join(top["file"].as_str().expect("a file"));
                let raw = self.room.path("point.raw");
                img(&["check", "-q", "-U", "-f", "qcow2"], &[&file]);
                img(&["convert", "-U", "-f", "qcow2", "-O", "raw"], &[&file, &raw]);
                fs::read(raw).expect("read") == *bytes
            })
    }

    fn assert_point_of(&self, replica: &str, point: &Value, disks: &[(String, Vec<u8>)]) {
        assert_eq!(point["disks"].as_array().map(Vec::len), Some(disks.len()), "{point}");
        for (name, bytes) in disks {
            let tops = point["disks"].as_array().expect("disks");
            let top = tops.iter().find(|top| top["disk"] == name.as_str()).expect("the disk");
            let file = self.room.path("dr").join(replica).join(top["file"].as_str().expect("a file"));
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
    assert!(site.room.has_no_catalogue() && !site.room.path("dr/db01_replica").exists());

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
    let mut merged = 0;
    for _ in 0..12 {
        site.back_up("r1", false);
        let ran = site.json(&["run", "dr"]);
        assert!(ran.code <= 1, "{}{}", ran.stdout, ran.stderr);
        // What was moved is told apart from what was merged where it lies.
        let progress = &ran.one("session")["progress"];
        let report = ran.one("replicated");
        assert_eq!(bytes(progress, "bytes_written"), bytes(&report, "bytes_written"), "{progress}");
        assert_eq!(bytes(progress, "bytes_read"), bytes(&report, "bytes_read"), "{progress}");
        merged += bytes(progress, "bytes_merged");
        expected.push(site.disks.clone());
        site.change(1);
    }
    assert!(merged > 0, "nothing was merged");
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

/// Bytes of the clusters that have to be written to make `old` into `new`.
fn clusters(old: &[(String, Vec<u8>)], new: &[(String, Vec<u8>)]) -> u64 {
    let mut bytes = 0;
    for (name, new) in new {
        let old = old.iter().find(|(known, _)| known == name).map(|(_, bytes)| bytes.as_slice()).unwrap_or_default();
        for (at, cluster) in new.chunks(CLUSTER).enumerate() {
            let from = (at * CLUSTER).min(old.len());
            let mut before = old[from..old.len().min(from + cluster.len())].to_vec();
            before.resize(cluster.len(), 0);
            if before != cluster && cluster.iter().any(|byte| *byte != 0) {
                bytes += cluster.len() as u64;
            }
        }
    }
    bytes
}

#[test]
fn alternating_repositories_a_new_full_and_resized_disks_move_what_differs() {
    let mut site = Site::new("restore_points_to_keep = 20");
    let mut known: Known = Vec::new();
    let mut before: Disks = Vec::new();
    // A run after a backup: the right point, of the right time, with the bytes that differ and no others.
    let mut follow = |site: &Site, repo: &str, what: &str| {
        let report = site.replicate();
        assert_eq!(bytes(&report, "bytes_written"), clusters(&before, &site.disks), "{what}: {report}");
        assert_eq!(bytes(&report, "bytes_read_production"), 0, "{what}");
        let points = site.points();
        let taken = site.newest_backup(repo);
        assert_eq!(points.last().expect("a point")["taken"], taken, "{what}");
        known.push((taken, site.disks.clone()));
        before = site.disks.clone();
        report
    };
    site.back_up("r1", false);
    follow(&site, "r1", "full of the first");
    site.change(2);
    site.back_up("r2", false);
    follow(&site, "r2", "full of the second");
    let changed = site.change(1);
    site.back_up("r1", false);
    let report = follow(&site, "r1", "increment of the first");
    let total: u64 = site.disks.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    assert!(bytes(&report, "bytes_read") < total / 2 && changed > 0, "the tables say where to look: {report}");
    for _ in 0..2 {
        let idle = site.json(&["run", "dr"]);
        assert_eq!((idle.code, bytes(&idle.one("replicated"), "bytes_read")), (1, 0), "{}", idle.stdout);
    }
    site.back_up("r1", true);
    let report = follow(&site, "r1", "a new full with nothing new");
    assert_eq!(bytes(&report, "bytes_written"), 0, "{report}");
    assert_eq!(bytes(&report, "bytes_read"), 0, "its tables prove that nothing differs: {report}");
    // One grows, one shrinks, one is new; then one is gone.
    site.disks[0].1.resize(5 * MIB + 512, 0);
    site.disks[0].1[4 * MIB + 70_000..4 * MIB + 90_000].fill(9);
    site.disks[1].1.truncate(MIB + 4096);
    site.disks.push(("vdc".into(), vec![3; 2 * CLUSTER]));
    site.put_production();
    site.back_up("r2", false);
    follow(&site, "r2", "resized");
    site.disks.remove(1);
    site.disks[0].1.truncate(3 * MIB);
    site.change(1);
    site.back_up("r1", false);
    follow(&site, "r1", "a disk less");
    let points = site.points();
    assert_eq!(points.len(), known.len());
    for (point, (taken, disks)) in points.iter().zip(&known) {
        assert_eq!(point["taken"], *taken);
        site.assert_point(point, disks);
    }
}

#[test]
fn a_seed_gives_the_first_point_and_production_the_rest() {
    let mut site = Site::with("{ from = \"production\", seed = \"r1\" }", "verify = true");
    site.back_up("r1", false);
    let seed = site.disks.clone();
    let changed = site.change(2);
    let report = site.replicate();
    let origins: Vec<_> = report["points"].as_array().expect("points").iter().map(|p| p["origin"].clone()).collect();
    assert_eq!(origins, ["seed", "job"], "{report}");
    let points = site.points();
    site.assert_point(&points[0], &seed);
    site.assert_point(&points[1], &site.disks);
    assert_eq!(bytes(&points[0]["carried"], "bytes_read_production"), 0);
    assert_eq!(bytes(&points[1]["carried"], "bytes_written"), changed);
    assert!(bytes(&points[1]["carried"], "bytes_read_production") > 0);
    // Production that has not changed makes a point without content.
    let report = site.replicate();
    assert_eq!((bytes(&report, "bytes_written"), report["points"].as_array().map(Vec::len)), (0, Some(1)));
    site.assert_point(site.points().last().expect("a point"), &site.disks);
}

#[test]
fn a_machine_of_the_target_becomes_the_replica_it_is_mapped_to() {
    let mut site = Site::new("mapping = { db01 = \"old01\" }");
    // What was restored there some time ago.
    let old = site.disks.clone();
    let folder = site.room.path("dr/old01");
    fs::create_dir_all(&folder).expect("a folder");
    let raw = site.room.path("prod/vda.raw");
    img(&["convert", "-f", "raw", "-O", "qcow2"], &[&raw, &folder.join("vda.qcow2")]);
    fs::copy(site.room.path("prod/vdb.raw"), folder.join("data.raw")).expect("a copy");
    let text =
        "version = 1\nname = \"old01\"\n[[disk]]\nname = \"vda\"\n[[disk]]\nname = \"vdb\"\nsource = \"data.raw\"\n";
    fs::write(folder.join("machine.toml"), text).expect("a description");
    let changed = site.change(2);
    site.back_up("r1", false);
    let report = site.replicate();
    let origins: Vec<_> = report["points"].as_array().expect("points").iter().map(|p| p["origin"].clone()).collect();
    assert_eq!(origins, ["mapped", "job"], "{report}");
    assert_eq!(bytes(&report, "bytes_written"), changed, "{report}");
    let points = site.points_of("old01");
    site.assert_point_of("old01", &points[0], &old);
    site.assert_point_of("old01", &points[1], &site.disks);
    assert!(!folder.join("data.raw").exists() && folder.join("vdb/0.raw").exists());
    // One that is not there is told, and nothing is made in its place.
    site.rewrite("old01", "none01");
    let refused = site.json(&["run", "dr"]);
    assert_eq!((refused.code, refused.one("error")["code"].as_str()), (2, Some("E_NOT_FOUND")), "{}", refused.stdout);
    assert!(!site.room.path("dr/none01").exists());
}

#[test]
fn networks_are_mapped_and_rules_are_recorded() {
    let site = Site::new(
        "network_map = [{ from = \"prod\", to = \"dr\", to_vlan = 7 }]\n\
         reip = [{ from = \"10.0.0.*\", to = \"10.9.0.*\", mask = \"255.255.255.0\", gateway = \"10.9.0.1\" }]",
    );
    let machine = "version = 1\nname = \"db01\"\ncpus = 2\n[[disk]]\nname = \"vda\"\n[[disk]]\nname = \"vdb\"\n[[nic]]\nnetwork = \"prod\"\n";
    fs::write(site.room.path("prod/machine.toml"), machine).expect("a description");
    site.back_up("r1", false);
    site.replicate();
    let placed = fs::read_to_string(site.room.path("dr/db01_replica/machine.toml")).expect("a description");
    assert!(placed.contains("network = \"dr.7\"") && placed.contains("cpus = 2"), "{placed}");
    let listed = site.json(&["replicas"]).one("replica");
    assert_eq!(listed["rules"]["networks"][0]["to"], "dr", "{listed}");
    assert_eq!(listed["rules"]["addresses"][0]["gateway"], "10.9.0.1", "{listed}");
    assert_eq!(site.points()[0]["description"]["nics"][0]["network"], "prod", "the point keeps the machine as it was");
}

/// How often a run waits until files are durable whose path has `part` in it.
fn waits(site: &Site, part: &str) -> usize {
    let (run, trace) = (site.room.command(["-c", "site.toml", "run", "dr"]), site.room.path("trace"));
    let mut traced = Command::new("strace");
    traced.args(["-f", "-y", "-e", "trace=fsync,fdatasync", "-o"]).arg(&trace);
    traced.arg(run.get_program()).args(run.get_args());
    run.get_envs().for_each(|(key, value)| match value {
        Some(value) => drop(traced.env(key, value)),
        None => drop(traced.env_remove(key)),
    });
    if let Some(dir) = run.get_current_dir() {
        traced.current_dir(dir);
    }
    let ran = Outcome::of(traced.output().expect("strace is installed"));
    assert!(ran.code <= 1, "{}{}", ran.stdout, ran.stderr);
    fs::read_to_string(trace).expect("a trace").lines().filter(|line| line.contains(part)).count()
}

/// Each of them takes as long as the disk under the catalogue needs for a write: ten milliseconds and more.
#[test]
fn a_run_waits_for_the_catalogue_a_few_times() {
    let mut site = Site::new("restore_points_to_keep = 2");
    for _ in 0..3 {
        site.change(1);
        site.back_up("r1", false);
        site.replicate();
    }
    if !site.room.path("home/catalogue.db").exists() {
        // A database of several waits by itself.
        return;
    }
    site.change(1);
    site.back_up("r1", false);
    // Begun, taken, five notes of its journal, ended; the log itself begun, and put into the database at the end.
    let waits = waits(&site, "catalogue.db");
    assert!((5..=12).contains(&waits), "{waits}");
    let points = site.points();
    assert_eq!(points.len(), 2);
    site.assert_point(&points[1], &site.disks);
}

#[test]
fn a_replica_is_given_up_and_let_in_again() {
    let mut site = Site::new("");
    site.back_up("r1", false);
    site.replicate();
    let folder = site.room.path("dr/db01_replica");
    let code = |args: &[&str]| site.json(args).code;
    assert_eq!(code(&["replicas", "db01_replica", "--delete", "-n"]), 0);
    assert_eq!(code(&["replicas", "db01_replica", "--readmit"]), 3);
    assert_eq!(code(&["replicas", "other", "--remove"]), 2);
    assert!(folder.join("vda/1.qcow2").exists());
    // Its files go, and the next run makes it anew.
    assert_eq!(code(&["replicas", "db01_replica", "--delete", "--yes"]), 0);
    assert!(!folder.exists());
    assert_eq!(site.json(&["replicas"]).kind("replica").len(), 0);
    assert_eq!(site.json(&["replicas", "--all"]).one("replica")["state"], "removed");
    site.replicate();
    site.assert_point(&site.points()[0], &site.disks);
    // Its files stay: an ordinary machine, which the job leaves alone.
    assert_eq!(site.json(&["replicas", "db01_replica", "--remove"]).code, 0);
    assert!(folder.join("machine.toml").exists() && !folder.join("replica.json").exists());
    img(&["check", "-q", "-f", "qcow2"], &[&folder.join("vda/1.qcow2")]);
    site.change(1);
    site.back_up("r1", false);
    let held = site.json(&["run", "dr"]);
    assert!(held.kind("warning").iter().any(|warning| warning["code"] == "W_ON_HOLD"), "{}", held.stdout);
    assert_eq!(site.json(&["replicas", "db01_replica", "--remove"]).code, 3, "twice");
    let readmitted = site.room.run(["-c", &site.room.text("site.toml"), "replicas", "db01_replica", "--readmit"]);
    assert_eq!(readmitted.code, 0, "{}", readmitted.stderr);
    let shown = folder.display();
    assert!(
        readmitted.stdout.contains(&format!("once what it left in {shown} has been moved")),
        "{}",
        readmitted.stdout
    );
    assert!(readmitted.stderr.contains(&format!("next: mv {shown} {shown}.given-up")), "{}", readmitted.stderr);
    // The machine that stayed is nobody's to overwrite.
    let refused = site.json(&["run", "dr"]);
    assert_eq!(refused.one("error")["code"], "E_EXISTS", "{}", refused.stdout);
    fs::remove_dir_all(&folder).expect("it goes");
    site.replicate();
    site.assert_point(&site.points()[0], &site.disks);
}

#[test]
fn a_killed_run_goes_on_in_the_same_point() {
    let mut site = Site::new("limits = { read = \"4MiB/s\" }");
    let mut content = vec![0u8; 24 * MIB];
    content.fill_with(|| u8::try_from(site.roll() % 255).expect("small") + 1);
    site.disks[0].1 = content;
    site.put_production();
    site.back_up("r1", false);
    let total: u64 = 24 * MIB as u64;
    let run = site.begin();
    let mark = site.room.path("dr/db01_replica/vda/1.qcow2.mark");
    let until = Instant::now() + Duration::from_secs(60);
    let done =
        || -> Option<u64> { serde_json::from_slice::<Value>(&fs::read(&mark).ok()?).ok()?["done_until"].as_u64() };
    let marked = loop {
        assert!(Instant::now() < until, "nothing was marked");
        match done() {
            Some(bytes) if bytes >= total / 4 => break bytes,
            _ => thread::sleep(Duration::from_millis(20)),
        }
    };
    assert!(run.kill(), "it was killed on its way");
    assert_eq!(site.json(&["replicas"]).one("replica")["points"], 0, "half a point is no point");
    site.rewrite("limits = { read = \"4MiB/s\" }", "");
    let ran = site.json(&["run", "dr"]);
    assert!(ran.code <= 1, "{}{}", ran.stdout, ran.stderr);
    let points = site.points();
    assert_eq!(points.len(), 1);
    site.assert_point(&points[0], &site.disks);
    let moved = bytes(&ran.one("session")["progress"], "bytes_read");
    let rest = total - marked + site.disks[1].1.len() as u64;
    assert!(moved <= rest, "{moved} bytes were read to move the last {rest}");
}

#[test]
fn a_new_point_begins_a_run() {
    let mut site = Site::new("schedule = { on_new_point = true }");
    let serve = Process::start(site.room.command(["-c", "site.toml", "serve"]));
    for count in 1..=2 {
        site.change(1);
        site.back_up("r1", false);
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let listed = site.json(&["replicas"]).kind("replica");
            if listed.first().is_some_and(|replica| replica["points"] == count && replica["state"] == "ready") {
                break;
            }
            assert!(Instant::now() < until, "point {count} was not followed: {listed:?}");
            thread::sleep(Duration::from_millis(100));
        }
        site.assert_point(site.points().last().expect("a point"), &site.disks);
    }
    serve.kill();
}

#[test]
fn every_missed_point_is_made_where_that_is_asked_for_and_a_dry_source_is_told() {
    let mut site =
        Site::with("{ from = \"backup\", repositories = [\"r1\"], catch_up = \"all\" }", "rpo_warn = \"1s\"");
    let mut expected = Vec::new();
    for _ in 0..3 {
        site.back_up("r1", false);
        expected.push(site.disks.clone());
        if expected.len() != 2 {
            site.replicate();
        }
        site.change(1);
    }
    let points = site.points();
    assert_eq!(points.len(), 3, "the one that was missed is there");
    points.iter().zip(&expected).for_each(|(point, disks)| site.assert_point(point, disks));
    thread::sleep(Duration::from_millis(2100));
    let dry = site.json(&["run", "dr"]);
    let codes: Vec<_> = dry.kind("warning").iter().map(|warning| warning["code"].clone()).collect();
    assert!(codes.iter().any(|code| code == "W_STALE_SOURCE"), "{codes:?}");
    assert!(dry.one("replicated")["replica_lag_seconds"].as_i64() >= Some(2), "{}", dry.stdout);
}

#[test]
fn a_machine_without_a_backup_fails_alone_and_one_without_a_seed_is_left_out() {
    let site = Site::new("");
    let other = format!("[machine]\ndb02 = {{ disks = {{ vda = \"raw:{}\" }} }}\n", site.room.text("prod/vda.raw"));
    site.rewrite("[machine]\n", &other);
    site.rewrite("machines = [\"db01\"]", "machines = [\"db02\", \"db01\"]");
    site.back_up("r1", false);
    let ran = site.json(&["run", "dr"]);
    assert_eq!((ran.code, ran.one("error")["code"].as_str()), (2, Some("E_NOT_FOUND")), "{}", ran.stdout);
    assert_eq!(ran.one("replicated")["machine"], "db01");
    site.assert_point(&site.points()[0], &site.disks);

    let site = Site::with("{ from = \"production\", seed = \"r2\" }", "");
    let ran = site.json(&["run", "dr"]);
    assert!(ran.code <= 1, "{}", ran.stdout);
    assert!(ran.kind("warning").iter().any(|warning| warning["code"] == "W_SKIPPED"), "{}", ran.stdout);
    assert!(ran.kind("replicated").is_empty() && !site.room.path("dr/db01_replica/machine.toml").exists());
}

/// A file system of its own, gone with the test.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, options: &str) -> Self {
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&at).status();
        assert!(done.expect("mount").success(), "this test needs root");
        Self(at)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_target_costs_the_run_and_nothing_else() {
    let mut site = Site::new("");
    let small = Small::mount(site.room.path("dr"), "size=6m");
    site.back_up("r1", false);
    site.replicate();
    let before = site.disks.clone();
    site.disks[0].1.fill_with(|| 5);
    site.disks[1].1.fill_with(|| 6);
    site.put_production();
    site.back_up("r1", false);
    let full = site.json(&["run", "dr"]);
    assert_eq!((full.code, full.one("error")["code"].as_str()), (2, Some("E_CAPACITY")), "{}", full.stdout);
    let points = site.points();
    assert_eq!(points.len(), 1);
    site.assert_point(&points[0], &before);
    let left: Vec<_> = fs::read_dir(site.room.path("dr/db01_replica/vda")).expect("a folder").flatten().collect();
    assert_eq!(left.len(), 1, "the room is given back: {left:?}");
    let grown = Command::new("mount").args(["-o", "remount,size=64m"]).arg(&small.0).status();
    assert!(grown.expect("mount").success());
    site.replicate();
    site.assert_point(&site.points()[1], &site.disks);
}
