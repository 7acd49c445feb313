//! Promise: jobs that end in a repository: plain images, copies in other blocks, retention, health and repair.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::harness::{Outcome, Room};

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
        fs::write(room.path("site.toml"), text).expect("write");
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
    assert_eq!(after[0]["created"], before[0]["created"]);
    site.compare("repo", "latest", &site.image("now.raw"));
    site.ok("h");
}

fn layer(repo: &Path) -> PathBuf {
    let mut folders = vec![repo.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("list") {
            let path = entry.expect("entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "aql") {
                return path;
            }
        }
    }
    panic!("no layer")
}
