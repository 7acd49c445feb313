//! Promise: jobs that end in a repository: plain images, copies in other blocks, retention, health and repair.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    harness::{Outcome, Room},
    storm::Dice,
};

struct Site {
    room: Room,
}

impl Site {
    fn new(jobs: &str) -> Self {
        let room = Room::new();
        let dir = room.dir.path().display().to_string();
        let text = format!(
            "version = 1\nhome = \"{dir}/home\"\n[repository]\nnas = {{ url = \"{dir}/repo\", default = true }}\nvault = {{ url = \"{dir}/vault\" }}\n[machine]\nfiles = {{ disks = {{ data = \"{dir}/data.qcow2\" }} }}\n{jobs}"
        );
        room.write_site(&text.replace("DIR", &dir));
        room.ok(["init"]);
        room.ok(["-r", &room.text("vault"), "init", "--block", "256KiB"]);
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &room.text("data.qcow2"), "8M"]);
        Self { room }
    }

    fn write(&self, pattern: u8, at: &str, len: &str) {
        tool(
            "qemu-io",
            &["-f", "qcow2", "-c", &format!("write -P {pattern} {at} {len}"), &self.room.text("data.qcow2")],
        );
    }

    /// Writes what no compression makes smaller, and nothing else has.
    fn random(&self, seed: u64, at: &str, len: usize) {
        let mut bytes = vec![0; len];
        Dice(seed).fill(&mut bytes);
        fs::write(self.room.path("random"), bytes).expect("write");
        let order = format!("write -s {} {at} {len}", self.room.text("random"));
        tool("qemu-io", &["-f", "qcow2", "-c", &order, &self.room.text("data.qcow2")]);
    }

    fn run(&self, job: &str) -> Outcome {
        self.room.run(["-c", &self.room.text("site.toml"), "run", job])
    }

    fn ok(&self, job: &str) -> Outcome {
        let outcome = self.run(job);
        assert_eq!(outcome.code, 0, "{}{}", outcome.stdout, outcome.stderr);
        outcome
    }

    fn points(&self, repo: &str) -> Vec<Value> {
        self.room.json(["-r", &self.room.text(repo), "points", "files"]).kind("point")
    }

    fn compare(&self, repo: &str, point: &str, with: &Path) {
        let out = self.room.text("out.raw");
        let _ = fs::remove_file(&out);
        self.room.ok(["-r", &self.room.text(repo), "export", &format!("files@{point}:data"), &out]);
        tool("qemu-img", &["compare", "-q", "-f", "raw", "-F", "raw", &out, &with.display().to_string()]);
    }

    /// What the disk holds now.
    fn image(&self, name: &str) -> PathBuf {
        let to = self.room.path(name);
        let (from, text) = (self.room.text("data.qcow2"), to.display().to_string());
        tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &from, &text]);
        to
    }
}

fn tool(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect(program);
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stdout));
}

const BACKUP: &str = "[job.b]\nkind = \"backup\"\nmachines = [\"files\"]\nto = \"nas\"\n";

#[test]
fn copies_are_made_once_in_the_targets_blocks_and_stand_on_each_other() {
    let copy =
        "[job.c]\nkind = \"copy\"\nmachines = [\"files\"]\nfrom = [\"nas\"]\nto = \"vault\"\nmode = \"immediate\"\n";
    let site = Site::new(&format!("{BACKUP}{copy}"));
    site.write(1, "0", "2M");
    site.ok("b");
    site.write(2, "1M", "64k");
    site.ok("b");
    site.ok("c");
    assert_eq!(site.points("vault").len(), 1, "the first copy is of the newest point");
    let second = site.image("second.raw");
    site.compare("vault", "latest", &second);
    site.write(3, "3M", "64k");
    site.ok("b");
    let third = site.image("third.raw");
    site.write(4, "5M", "64k");
    site.ok("b");
    let said = site.ok("c").stderr;
    let copies = site.points("vault");
    assert_eq!(copies.len(), 3, "each point that was missed, oldest first: {said}");
    site.compare("vault", "latest~1", &third);
    site.compare("vault", "latest", &site.image("fourth.raw"));
    site.compare("vault", "latest~2", &second);
    let times = |points: &[Value]| points.iter().map(|p| p["created"].clone()).collect::<Vec<_>>();
    assert_eq!(times(&copies), times(&site.points("repo")[1..]), "the times of what was copied");
    site.ok("c");
    assert_eq!(site.points("vault").len(), 3, "nothing is copied twice");
}

#[test]
fn retention_gives_up_what_no_rule_wants() {
    let site = Site::new(&format!("{BACKUP}keep = {{ last = 2 }}\n"));
    for round in 1..=5u8 {
        site.write(round, &format!("{round}M"), "64k");
        site.ok("b");
        assert_eq!(site.points("repo").len(), usize::from(round.min(2)));
    }
    site.compare("repo", "latest", &site.image("now.raw"));
}

#[test]
fn damage_is_found_marked_and_put_right_from_a_copy() {
    let more = "[job.c]\nkind = \"copy\"\nmachines = [\"files\"]\nfrom = [\"nas\"]\nto = \"vault\"\n[job.h]\nkind = \"health\"\nrepository = \"nas\"\nrepair_from = [\"vault\"]\n";
    let site = Site::new(&format!("{BACKUP}{more}"));
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 4M", &site.room.text("data.qcow2")]);
    site.write(1, "1M", "64k");
    site.ok("b");
    site.ok("c");
    site.ok("h");
    let before = site.points("repo");
    let file = layer(&site.room.path("repo"));
    let mut bytes = fs::read(&file).expect("read");
    // Inside the first stored block.
    bytes[4096 + 200] ^= 0xff;
    fs::write(&file, bytes).expect("write");
    let outcome = site.run("h");
    assert_eq!(outcome.code, 1, "{}{}", outcome.stdout, outcome.stderr);
    let after = site.points("repo");
    assert_eq!(after.len(), 1, "{after:?}");
    assert_ne!(after[0]["point"], before[0]["point"], "a new point has its place");
    // The session says afterwards what was done, and of what.
    let ask = |args: &[&str]| site.room.json(["-c", "site.toml"].iter().chain(args));
    let sessions = ask(&["sessions", "--job", "h"]).kind("session");
    let session = sessions.iter().filter_map(|session| session["id"].as_i64()).max().expect("a session").to_string();
    let came = ask(&["sessions", &session]).one("work")["outcome"]["why"].to_string();
    assert!(came.contains("is damaged") && came.contains("1 damaged, 1 repaired"), "{came}");
    let mut events = ask(&["events", &session]).kind("transition");
    events.retain(|event| event["op"] == "repair");
    let ids = [&before[0]["point"], &after[0]["point"]].map(|id| id.as_str().expect("an id"));
    let what = format!("files@{} was put right as {} from vault", ids[0], ids[1]);
    assert!(events.len() == 1 && events[0]["reason"] == what && events[0]["object"] == "machine/files", "{events:?}");
    assert_eq!(after[0]["created"], before[0]["created"]);
    site.compare("repo", "latest", &site.image("now.raw"));
    site.ok("h");
}

#[test]
fn lost_points_are_reported_and_put_right_from_a_copy() {
    let more = "[job.c]\nkind = \"copy\"\nmachines = [\"files\"]\nfrom = [\"nas\"]\nto = \"vault\"\nmode = \"immediate\"\n[job.h]\nkind = \"health\"\nrepository = \"nas\"\npoints = \"all\"\nrepair_from = [\"vault\"]\n[job.alone]\nkind = \"health\"\nrepository = \"nas\"\npoints = \"all\"\n";
    let site = Site::new(&format!("{BACKUP}{more}"));
    let mut images = Vec::new();
    for round in 1..3u8 {
        site.random(round.into(), "0", 2 << 20);
        site.ok("b");
        site.ok("c");
        images.push(site.image(&format!("{round}.raw")));
    }
    let layer_of = |point: &Value| {
        let id = point["point"].as_str().expect("an id");
        let found = layers(&site.room.path("repo")).into_iter().find(|path| path.display().to_string().contains(id));
        found.expect("a layer")
    };
    let remove = |path: &Path| fs::remove_file(path).expect("remove");
    let truncate = |path: &Path| {
        let file = fs::OpenOptions::new().write(true).open(path).expect("open");
        file.set_len(5000).expect("cut");
    };
    // One of the two that each layer has of what describes it.
    let spare = |path: &Path| {
        let mut bytes = fs::read(path).expect("read");
        bytes[100] ^= 0xff;
        fs::write(path, bytes).expect("write");
    };
    for harm in [&remove as &dyn Fn(&Path), &truncate, &spare] {
        for lost in [1, 0] {
            let before = site.points("repo");
            harm(&layer_of(&before[lost]));
            let alone = site.run("alone");
            assert_eq!(alone.code, 1, "{}{}", alone.stdout, alone.stderr);
            let id = before[lost]["point"].as_str().expect("an id");
            assert!(alone.stderr.contains(id), "it is named: {}", alone.stderr);
            let mended = site.run("h");
            assert_eq!(mended.code, 1, "{}{}", mended.stdout, mended.stderr);
            let after = site.points("repo");
            assert_eq!(after.len(), 2, "{after:?}");
            assert!(after.iter().all(|point| point["state"] == "complete"), "{after:?}");
            for (back, image) in ["latest~1", "latest"].iter().zip(&images) {
                site.compare("repo", back, image);
            }
            site.ok("h");
        }
    }
}

fn layers(repo: &Path) -> Vec<PathBuf> {
    let (mut folders, mut found) = (vec![repo.to_path_buf()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("list") {
            let path = entry.expect("entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "aql") {
                found.push(path);
            }
        }
    }
    found
}

fn layer(repo: &Path) -> PathBuf {
    layers(repo).pop().expect("a layer")
}

#[test]
fn a_look_ahead_names_the_bytes_of_every_kind() {
    let more = "[job.c]\nkind = \"copy\"\nmachines = [\"files\"]\nfrom = [\"nas\"]\nto = \"vault\"\n[job.h]\nkind = \"health\"\nrepository = \"nas\"\n";
    let site = Site::new(&format!("{BACKUP}{more}"));
    site.random(1, "0", 2 << 20);
    let ahead = |job: &str| site.room.json(["-c", &site.room.text("site.toml"), "run", job, "-n"]);
    let bytes = |job: &str| {
        let said = ahead(job);
        let steps = said.kind("step");
        assert_eq!(steps.len(), 1, "{}", said.stdout);
        assert_eq!(said.one("done")["bytes"], steps[0]["bytes"], "{}", said.stdout);
        steps[0]["bytes"].as_u64().unwrap_or_else(|| panic!("{}", said.stdout))
    };
    assert_eq!(bytes("b"), 2 << 20, "what the image holds");
    let refused = ahead("c");
    assert_eq!((refused.code, refused.one("error")["code"].as_str()), (2, Some("E_NOT_FOUND")), "nothing to copy");
    assert!(site.room.has_no_catalogue(), "who looks ahead leaves no trace");
    assert_eq!(site.points("repo").len(), 0);
    site.ok("b");
    assert_eq!(bytes("c"), 2 << 20);
    assert_eq!(bytes("h"), 2 << 20);
    site.ok("c");
    assert_eq!(bytes("c"), 0, "nothing is copied twice");
}

/// Reads a disk over and over through a door, and compares, until a file appears.
const READER: &str = r#"
import nbd, os, sys, time
uri, oracle, told = sys.argv[1:]
want = open(oracle, 'rb').read()
door = nbd.NBD()
door.connect_uri(uri)
rounds, last = 0, False
while not last:
    last = os.path.exists('stop')
    for at in range(0, len(want), 65536):
        if door.pread(65536, at) != want[at:at + 65536]:
            sys.exit(f'offset {at} differs in round {rounds}')
        if not last:
            time.sleep(0.005)
    rounds += 1
    open(told, 'w').write(str(rounds))
"#;

/// A `mount` with a reader at its door; ended when the test ends early.
struct Reader {
    child: Child,
    told: PathBuf,
}

impl Reader {
    fn start(site: &Site, point: &str, name: &str) -> Self {
        let oracle = site.image(&format!("{name}.oracle"));
        let told = site.room.path(format!("{name}.rounds"));
        fs::write(site.room.path("reader.py"), READER).expect("write");
        let run = format!("python3 reader.py \"$uri\" {} {}", oracle.display(), told.display());
        let source = format!("files@{point}:data");
        let site_file = site.room.text("site.toml");
        let mut command = site.room.command(["-c", &site_file, "mount", &source, "--run", &run]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("mount");
        let reader = Self { child, told };
        let until = Instant::now() + Duration::from_secs(60);
        while reader.rounds() == 0 {
            assert!(Instant::now() < until, "nobody reads");
            std::thread::sleep(Duration::from_millis(20));
        }
        reader
    }

    fn rounds(&self) -> u64 {
        fs::read_to_string(&self.told).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    fn ends_well(mut self) {
        let mut said = String::new();
        let mut stderr = self.child.stderr.take().expect("stderr");
        std::io::Read::read_to_string(&mut stderr, &mut said).expect("utf-8");
        let status = self.child.wait().expect("a status");
        assert!(status.success(), "{status}: {said}");
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn readers_of_points_that_are_given_up_and_merged_read_on_and_no_job_waits() {
    let site = Site::new(&format!("{BACKUP}keep = {{ last = 2 }}\n"));
    // Every round reads from the files again.
    let text = fs::read_to_string(site.room.path("site.toml")).expect("read");
    fs::write(site.room.path("site.toml"), text.replace("version = 1\n", "version = 1\ncache = \"1MiB\"\n"))
        .expect("write");
    site.random(1, "0", 4 << 20);
    site.ok("b");
    let first = Reader::start(&site, "latest", "first");
    // Stands on the first for an eighth of it: worth writing anew when the first is given up.
    site.random(2, "512k", 3584 << 10);
    site.ok("b");
    let second = Reader::start(&site, "latest", "second");
    let ids = |points: &[Value]| points.iter().map(|point| point["point"].clone()).collect::<Vec<_>>();
    let before = ids(&site.points("repo"));
    let mut merged = 0;
    for round in 3..8 {
        site.random(round, "6M", 64 << 10);
        let began = Instant::now();
        let outcome = site.room.json(["-c", &site.room.text("site.toml"), "run", "b"]);
        assert_eq!(outcome.code, 0, "{}{}", outcome.stdout, outcome.stderr);
        assert!(began.elapsed() < Duration::from_secs(20), "it waited: {:?}", began.elapsed());
        merged += outcome.one("retained")["rebased"].as_object().map_or(0, serde_json::Map::len);
        assert_eq!(site.points("repo").len(), 2);
    }
    assert!(merged > 0, "nothing was merged");
    let now = ids(&site.points("repo"));
    assert!(before.iter().all(|id| !now.contains(id)), "both points that are read are gone from the list");
    site.compare("repo", "latest", &site.image("now.raw"));
    let rounds = (first.rounds(), second.rounds());
    fs::write(site.room.path("stop"), "").expect("write");
    let (a, b) = (first.told.clone(), second.told.clone());
    first.ends_well();
    second.ends_well();
    let after = |path: &Path| fs::read_to_string(path).expect("read").parse::<u64>().expect("a number");
    assert!(after(&a) > rounds.0 && after(&b) > rounds.1, "they read once more after all of it");
    // Now nobody holds the files, and the next run deletes them.
    site.write(9, "7M", "64k");
    let last = site.room.json(["-c", &site.room.text("site.toml"), "run", "b"]);
    assert!(last.one("retained")["bytes_freed"].as_u64() > Some(4 << 20), "{}", last.stdout);
    site.compare("repo", "latest", &site.image("now.raw"));
}

#[test]
fn copies_follow_new_points_by_themselves_or_take_the_newest_when_asked() {
    let copy = |name: &str, more: &str| {
        format!("[job.{name}]\nkind = \"copy\"\nmachines = [\"files\"]\nfrom = [\"nas\"]\nto = \"vault\"\n{more}\n")
    };
    let immediate = copy("c", "mode = \"immediate\"\nschedule = { on_new_point = true }");
    let site = Site::new(&format!("{BACKUP}{immediate}"));
    let mut command = site.room.command(["-c", &site.room.text("site.toml"), "serve"]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("serve");
    let _serve = Reader { child, told: PathBuf::new() };
    for round in 1..4u8 {
        site.write(round, "1M", "64k");
        site.ok("b");
        let until = Instant::now() + Duration::from_secs(60);
        while site.points("vault").len() < usize::from(round) {
            assert!(Instant::now() < until, "the point is not copied");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    site.compare("vault", "latest", &site.image("now.raw"));
    let site = Site::new(&format!("{BACKUP}{}", copy("p", "mode = \"periodic\"")));
    site.write(1, "0", "2M");
    for round in 2..6u8 {
        site.write(round, "1M", "64k");
        site.ok("b");
        if round > 2 {
            continue;
        }
        site.ok("p");
    }
    site.ok("p");
    assert_eq!((site.points("repo").len(), site.points("vault").len()), (4, 2), "those between are left out");
    site.compare("vault", "latest", &site.image("now.raw"));
}

#[test]
fn a_check_gives_way_and_goes_on_where_it_was() {
    let site = Site::new(&format!(
        "{BACKUP}[job.h]\nkind = \"health\"\nrepository = \"nas\"\npoints = \"all\"\nlimits = {{ read = \"3MiB/s\" }}\n"
    ));
    for seed in 1..6 {
        site.random(seed, &format!("{seed}M"), 1 << 20);
        site.ok("b");
    }
    let reader = Reader::start(&site, "latest", "reader");
    let check = || {
        let outcome = site.room.json(["-c", &site.room.text("site.toml"), "run", "h"]);
        assert_eq!(outcome.code, 0, "{}{}", outcome.stdout, outcome.stderr);
        let id = outcome.one("session")["id"].to_string();
        let shown = site.room.json(["-c", &site.room.text("site.toml"), "sessions", &id]);
        shown.one("work")["outcome"]["report"]["files"].clone()
    };
    let cut = check();
    assert_eq!(cut["gave_way"], true, "{cut}");
    fs::write(site.room.path("stop"), "").expect("write");
    reader.ends_well();
    let (rest, whole) = (check(), check());
    assert!(rest["gave_way"].is_null() && whole["gave_way"].is_null(), "{rest} {whole}");
    let bytes = |report: &Value| report["bytes_read"].as_u64().expect("bytes");
    assert!(bytes(&cut) > 0 && bytes(&rest) > 0, "{cut} {rest}");
    assert_eq!(bytes(&cut) + bytes(&rest), bytes(&whole), "it goes on where it was: {cut} {rest}");
}

#[test]
fn a_check_that_gave_way_tells_in_the_end_what_an_unbroken_one_tells() {
    let site = Site::new(
        "more = { disks = { a = \"raw:DIR/a.raw\", z = \"DIR/data.qcow2\" } }\n\
         [job.two]\nkind = \"backup\"\nmachines = [\"more\"]\nto = \"nas\"\n\
         [job.h]\nkind = \"health\"\nrepository = \"nas\"\nmachines = [\"more\"]\nlimits = { read = \"2MiB/s\" }\n",
    );
    fs::write(site.room.path("a.raw"), vec![3; 1 << 20]).expect("write");
    // A check looks for others behind each leaf, which says of 16 MiB what they hold.
    tool("qemu-img", &["resize", "-q", &site.room.text("data.qcow2"), "128M"]);
    for leaf in 0..8u64 {
        site.random(leaf + 1, &format!("{}M", leaf * 16), 1 << 20);
    }
    site.ok("two");
    // One of the two copies of what describes the first disk.
    let first = layers(&site.room.path("repo")).into_iter().find(|path| path.ends_with("a.aql")).expect("a layer");
    let mut bytes = fs::read(&first).expect("read");
    bytes[100] ^= 0xff;
    fs::write(&first, bytes).expect("write");

    let check = || site.room.json(["-c", &site.room.text("site.toml"), "run", "h"]);
    let unbroken = check();
    assert_eq!(unbroken.code, 1, "{}{}", unbroken.stdout, unbroken.stderr);
    let mut mount = site.room.command(["mount", "more", "--nbd", &format!("unix:{}", site.room.text("s"))]);
    let mut mount = mount.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("mount");
    let until = Instant::now() + Duration::from_secs(60);
    while !site.room.path("s").exists() {
        assert!(Instant::now() < until, "nobody reads");
        std::thread::sleep(Duration::from_millis(20));
    }
    let cut = check();
    assert_eq!(cut.code, 0, "it gave way in the second disk: {}{}", cut.stdout, cut.stderr);
    mount.kill().expect("kill");
    mount.wait().expect("reap");
    let rest = check();
    assert_eq!(rest.code, 1, "{}{}", rest.stdout, rest.stderr);
    let told = |outcome: &Outcome| {
        let warnings = outcome.kind("warning");
        warnings.iter().any(|warning| warning["what"].as_str().is_some_and(|what| what.contains("no second copy")))
    };
    assert!(told(&unbroken) && told(&rest), "{}{}", unbroken.stdout, rest.stdout);
}
