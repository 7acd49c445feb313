//! Promise: workers are the proxies. Whatever is needed is looked at before a byte moves; one that dies before or in the
//! middle of a task is replaced by another, which goes on in the same point; it makes no difference to a replica where it
//! is worked on, or over which way its source is read; and what took the time is told.

use std::{fs, path::Path, process::Command, thread, time::Duration};

use serde_json::Value;

use crate::{
    carrier::{Process, wait},
    harness::Outcome,
    replication::{Site, img},
};

/// A worker with one slot, in another process.
fn worker(site: &Site) -> Process {
    Process::start(site.room.command(["-c", "site.toml", "worker", "--tasks", "1", "--lease", "2s"]))
}

fn begin(site: &Site) -> String {
    site.json(&["run", "dr", "--no-wait"]).one("session")["id"].to_string()
}

fn session(site: &Site, id: &str) -> Value {
    site.json(&["sessions", id]).kind("session").pop().expect("a session")
}

#[test]
fn a_worker_that_dies_before_or_in_the_middle_is_replaced_and_the_point_is_the_same() {
    let mut site = Site::new("limits = { read = \"1MiB/s\" }");
    site.fill_long(9);
    site.back_up("r1", false);
    // The one that dies before there is work.
    let idle = worker(&site);
    thread::sleep(Duration::from_millis(300));
    idle.kill();
    let id = begin(&site);
    let first = worker(&site);
    site.wait_for_mark();
    assert!(first.kill(), "it dies in the middle");
    let _second = worker(&site);
    wait("nobody ends it", || !session(&site, &id)["ended"].is_null());
    let ended = session(&site, &id);
    assert_eq!(ended["result"], "success", "{ended}");
    let points = site.points();
    assert_eq!(points.len(), 1, "one point, of one session");
    site.assert_point(&points[0], &site.disks);
    let read = ended["progress"]["bytes_read"].as_u64().expect("bytes");
    let all: usize = site.disks.iter().map(|disk| disk.1.len()).sum();
    assert!(read < all as u64, "the second one read {read} of {all}: it begins where the first one was");
}

/// Serves a file, read-only, as a computer does whose disks are read elsewhere.
fn serve(site: &Site, disk: &str) -> String {
    let socket = site.room.text(&format!("{disk}.sock"));
    let pid = site.room.text(&format!("{disk}.pid"));
    let done = Command::new("qemu-nbd")
        .args(["--fork", "-r", "-t", "-e", "16", "-f", "raw", "-x", disk, "--pid-file", &pid, "-k", &socket])
        .arg(site.room.path(format!("prod/{disk}.raw")))
        .status();
    assert!(done.expect("qemu-nbd").success());
    format!("nbd+unix:///{disk}?socket={socket}")
}

/// Ends what serves.
struct Served(Vec<String>);

impl Drop for Served {
    fn drop(&mut self) {
        for file in &self.0 {
            let pid = fs::read_to_string(file).unwrap_or_default();
            let _ = Command::new("kill").arg(pid.trim()).status();
        }
    }
}

fn digests(site: &Site, lineage: &str) -> Vec<(String, Vec<u8>)> {
    let folder = site.room.path("home/replicas").join(lineage);
    let mut found = Vec::new();
    let mut folders = vec![folder];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("digests").flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
            } else {
                found.push((entry.path().display().to_string(), fs::read(entry.path()).expect("read")));
            }
        }
    }
    found.sort();
    found
}

fn lineage(site: &Site, replica: &str) -> String {
    let stamp = fs::read(site.room.path("dr").join(replica).join("replica.json")).expect("a stamp");
    let stamp: Value = serde_json::from_slice(&stamp).expect("json");
    stamp["lineage"].as_str().expect("a lineage").to_owned()
}

#[test]
fn where_it_is_worked_on_makes_no_difference() {
    let mut site = Site::with("{ from = \"production\" }", "");
    let _served = Served(["vda", "vdb"].map(|disk| site.room.text(&format!("{disk}.pid"))).into());
    let (vda, vdb) = (serve(&site, "vda"), serve(&site, "vdb"));
    let more = format!("[machine]\nfar = {{ disks = {{ vda = \"{vda}\", vdb = \"{vdb}\" }} }}\n");
    site.rewrite("[machine]\n", &more);
    let text = fs::read_to_string(site.room.path("site.toml")).expect("text");
    let job = text.split("[job.dr]").nth(1).expect("a job").replace("\"db01\"", "\"far\"");
    fs::write(site.room.path("site.toml"), format!("{text}[job.off]{job}")).expect("a site file");
    for round in 0..3 {
        // On the computer that has the disks: their files are read, in the process that was asked.
        let here = site.replicate();
        // Elsewhere: another process reads them over the network's protocol. It would be as quick to take the other work.
        let _worker = worker(&site);
        let id = site.json(&["run", "off", "--no-wait"]).one("session")["id"].to_string();
        wait("nobody ends it", || !session(&site, &id)["ended"].is_null());
        let ended = session(&site, &id);
        assert_eq!(ended["result"], "success", "{ended}");
        assert_eq!(ended["progress"]["bytes_written"], here["bytes_written"], "round {round}");
        assert_eq!(ended["progress"]["blocks_equal"], here["blocks_equal"], "round {round}");
        for disk in ["vda", "vdb"] {
            let layer = format!("{disk}/{}.qcow2", round + 1);
            let files = ["db01_replica", "far_replica"].map(|name| site.room.path("dr").join(name).join(&layer));
            let refs: Vec<&Path> = files.iter().map(AsRef::as_ref).collect();
            img(&["compare", "-s", "-U", "-f", "qcow2", "-F", "qcow2"], &refs);
        }
        let of = |name: &str| digests(&site, &lineage(&site, name)).into_iter().map(|(_, bytes)| bytes);
        let mut both = [of("db01_replica").collect::<Vec<_>>(), of("far_replica").collect()];
        both.iter_mut().for_each(|all| all.sort());
        assert!(both[0] == both[1] && !both[0].is_empty(), "digests differ in round {round}");
        site.change(2);
    }
}

#[test]
fn whatever_is_needed_is_looked_at_before_anything_moves() {
    let site = Site::new("metadata_repository = \"r2\"");
    site.back_up("r1", false);
    let refused = |why: &[&str]| {
        let ran = site.json(&["run", "dr"]);
        let error = ran.one("error");
        assert_eq!(ran.code, 2, "{}", ran.stdout);
        let what = error["what"].as_str().expect("text").to_owned();
        why.iter().for_each(|why| assert!(what.contains(why), "{why} in {what}"));
        assert!(!site.room.path("dr/db01_replica").exists(), "nothing was made: {what}");
    };
    // A file where a folder should be, of the host and of the digests: both are named at once.
    let put = |name: &str, away: &str| {
        fs::rename(site.room.path(name), site.room.path(away)).expect("move");
        fs::write(site.room.path(name), "").expect("a file");
    };
    let back = |name: &str, away: &str| {
        fs::remove_file(site.room.path(name)).expect("remove");
        fs::rename(site.room.path(away), site.room.path(name)).expect("move");
    };
    put("dr", "dr-away");
    fs::write(site.room.path("r2/replicas"), "").expect("a file");
    refused(&["the target host dr cannot be used", "the metadata repository cannot be used"]);
    back("dr", "dr-away");
    refused(&["the metadata repository cannot be used"]);
    fs::remove_file(site.room.path("r2/replicas")).expect("remove");
    fs::rename(site.room.path("r1"), site.room.path("away")).expect("move");
    let ran = site.json(&["run", "dr"]);
    assert_eq!((ran.code, ran.one("error")["code"].as_str()), (10, Some("E_NO_REPOSITORY")), "{}", ran.stdout);
    fs::rename(site.room.path("away"), site.room.path("r1")).expect("move");
    site.replicate();
    site.assert_point(&site.points()[0], &site.disks);
}

#[test]
fn points_of_another_installation_are_read_where_the_job_says_so() {
    let site = Site::new("");
    site.back_up("r1", false);
    let other = |args: &[&str]| {
        let mut command = site.room.command(args);
        Outcome::of(command.env("AQUIFER_HOME", site.room.path("other")).output().expect("a run"))
    };
    assert_eq!(other(&["-r", &site.room.text("r1"), "init", "--take-over"]).code, 0);
    let refused = site.json(&["run", "dr"]);
    assert_eq!(
        (refused.code, refused.one("error")["code"].as_str()),
        (3, Some("E_FOREIGN_OWNER")),
        "{}",
        refused.stdout
    );
    assert!(!site.room.path("dr/db01_replica").exists());
    site.rewrite("from = \"backup\",", "from = \"backup\", imported = true,");
    site.replicate();
    site.assert_point(&site.points()[0], &site.disks);
    // Taken over, it is ours, and nobody needs to say anything.
    site.rewrite("imported = true,", "");
    assert_eq!(site.json(&["run", "dr"]).one("error")["code"], "E_FOREIGN_OWNER");
    site.room.ok(["-r", &site.room.text("r1"), "init", "--take-over"]);
    assert!(site.json(&["run", "dr"]).code <= 1);
}

#[test]
fn what_took_the_time_is_told() {
    let mut site = Site::new("limits = { read = \"2MiB/s\" }");
    site.disks.iter_mut().for_each(|disk| disk.1.fill(3));
    site.put_production();
    site.back_up("r1", false);
    let report = site.replicate();
    assert_eq!(report["bottleneck"], "throttle", "{report}");
    assert!(report["bottleneck_percent"].as_u64() > Some(50), "{report}");
    site.rewrite("limits = { read = \"2MiB/s\" }", "");
    site.disks.iter_mut().for_each(|disk| disk.1.fill(4));
    site.put_production();
    site.back_up("r1", false);
    let report = site.replicate();
    assert_ne!(report["bottleneck"], "throttle", "{report}");
    let busy = &report["busy"];
    assert_eq!(busy["throttle_ms"], 0, "{report}");
    assert!(busy["source_ms"].as_u64().zip(busy["target_ms"].as_u64()).is_some_and(|(a, b)| a + b > 0), "{report}");
    let listed = site.json(&["sessions"]).kind("session");
    assert!(listed.iter().any(|session| session["progress"]["busy"]["throttle_ms"].as_u64() > Some(0)), "{listed:?}");
}
