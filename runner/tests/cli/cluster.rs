//! Promise: a replica of a cluster is made, kept and started as long as one member can be used; a member that is lost, also
//! in the middle of a run, is replaced by another without a byte copied twice, and never while its machine still runs.

use std::{path::PathBuf, process::Command};

use serde_json::{Value, json};

use crate::{
    carrier::{Process, wait},
    recall::as_printed,
    replication::Site,
};

/// The members' folder as one of them has it mounted; gone with the test.
struct Mounted {
    shared: PathBuf,
    at: PathBuf,
}

impl Mounted {
    fn new(site: &Site, name: &str) -> Self {
        let mounted = Self { shared: site.room.path("dr"), at: site.room.path(name) };
        std::fs::create_dir(&mounted.at).expect("a folder");
        mounted.come_back();
        mounted
    }

    fn come_back(&self) {
        let done = Command::new("mount").arg("--bind").args([&self.shared, &self.at]).status();
        assert!(done.expect("mount").success(), "this test needs root");
    }

    /// What is left is an empty folder, as where a network file system is not mounted.
    fn is_lost(&self) {
        let done = Command::new("umount").arg("-l").arg(&self.at).status();
        assert!(done.expect("umount").success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

/// A site whose host for replicas is a cluster of two.
fn cluster(more: &str) -> (Site, Mounted, Mounted) {
    let site = Site::new(more);
    let (one, two) = (Mounted::new(&site, "m1"), Mounted::new(&site, "m2"));
    let member = |name: &str| {
        let room = site.room.dir.path().display();
        format!("{name} = {{ kind = \"qemu\", images = \"{room}/{name}\", runtime = \"{room}/run-{name}\" }}\n")
    };
    let single = format!("dr = {{ kind = \"qemu\", images = \"{}\" }}\n", site.room.text("dr"));
    let both = "dr = { kind = \"cluster\", members = [\"m1\", \"m2\"] }\n";
    site.rewrite(&single, &format!("{}{}{both}", member("m1"), member("m2")));
    (site, one, two)
}

fn replica(site: &Site) -> Value {
    site.json(&["replicas"]).one("replica")
}

fn assert_on(site: &Site, member: &str, points: u64) {
    let replica = replica(site);
    let is = (replica["host"].as_str(), replica["points"].as_u64(), replica["state"].as_str());
    assert_eq!(is, (Some(member), Some(points), Some("ready")), "{replica}");
    site.assert_point(site.points().last().expect("a point"), &site.disks);
}

#[test]
fn a_job_succeeds_while_one_member_can_be_used() {
    let (mut site, one, two) = cluster("");
    site.back_up("r1", false);
    site.replicate();
    assert_on(&site, "m1", 1);
    one.is_lost();
    let changed = site.change(2);
    site.back_up("r1", false);
    let report = site.replicate();
    assert_on(&site, "m2", 2);
    assert_eq!(report["bytes_written"].as_u64(), Some(changed), "it goes on, and is not made anew");
    two.is_lost();
    site.change(2);
    site.back_up("r1", false);
    let none = site.json(&["run", "dr"]);
    assert_eq!(none.one("error")["code"], "E_REPO_OFFLINE", "{}", none.stdout);
    let empty = |name: &str| std::fs::read_dir(site.room.path(name)).expect("a folder").next().is_none();
    assert!(empty("m1") && empty("m2"), "nothing is put where the members' folder should be");
    one.come_back();
    site.replicate();
    assert_on(&site, "m1", 3);
    two.come_back();
    // A third folder is not theirs.
    std::fs::create_dir(site.room.path("strange")).expect("a folder");
    one.is_lost();
    std::fs::write(
        site.room.path("m1/aquifer-cluster.json"),
        "{\"version\":1,\"cluster\":\"dr\",\"id\":\"4d6b5b3e-8a64-4f6e-9d55-000000000000\"}",
    )
    .expect("a mark");
    site.change(2);
    site.back_up("r1", false);
    let refused = site.json(&["run", "dr"]);
    assert_eq!(refused.one("error")["code"], "E_REFUSED", "{}", refused.stdout);
}

#[test]
fn a_member_that_is_lost_in_the_middle_of_a_run_is_replaced_in_that_run() {
    let (mut site, one, _two) = cluster("limits = { read = \"1MiB/s\" }");
    site.fill_long(7);
    site.back_up("r1", false);
    let mut run = site.begin();
    site.wait_for_mark();
    assert!(run.runs(), "it is on its way");
    one.is_lost();
    let code = run.ends();
    assert!(code.is_some_and(|code| code <= 1), "{code:?}");
    assert_on(&site, "m2", 1);
    let events = site.json(&["events"]).kind("transition");
    assert!(events.iter().any(|event| event["op"] == "move"), "{events:?}");
}

#[test]
fn a_takeover_begins_on_another_member_and_never_on_two() {
    let (site, one, two) = cluster("");
    site.back_up("r1", false);
    site.replicate();
    one.is_lost();
    let over = site.json(&["failover", "db01_replica", "--network", "none"]);
    assert!(over.code <= 1, "{}{}", over.stdout, over.stderr);
    let state = replica(&site);
    assert_eq!((state["host"].as_str(), state["state"].as_str()), (Some("m2"), Some("failover")), "{state}");
    assert!(site.room.path("run-m2/db01_replica/qmp.sock").exists(), "it runs on the other one");
    // Its folder is gone from where it runs, and it runs: nobody else touches it.
    two.is_lost();
    one.come_back();
    let refused = site.json(&["undo", "db01_replica", "--yes"]);
    assert_eq!(refused.one("error")["code"], "E_STATE", "{}", refused.stdout);
    two.come_back();
    let undone = site.json(&["undo", "db01_replica", "--yes"]);
    assert!(undone.code <= 1, "{}", undone.stdout);
    assert_on(&site, "m2", 1);
}

#[test]
fn a_machine_that_is_left_on_a_lost_member_is_shown_and_parked_by_a_word() {
    let (site, one, two) = cluster("");
    site.back_up("r1", false);
    site.replicate();
    one.is_lost();
    let over = site.json(&["failover", "db01_replica", "--network", "none"]);
    assert!(over.code <= 1, "{}{}", over.stdout, over.stderr);
    assert!(replica(&site).get("strays").is_none());
    two.is_lost();
    one.come_back();
    // It runs still, and no verb touches it by the way; what is printed is the way to do it.
    let refused = site.json(&["undo", "db01_replica", "--yes"]).one("error");
    assert_eq!(refused["code"], "E_STATE", "{refused}");
    let asks = as_printed(&site.room, &refused).one("error");
    assert_eq!(asks["code"], "E_CONFIRM", "{asks}");
    let listed = site.json(&["replicas"]);
    let now = listed.one("replica");
    let stray = &now["strays"][0];
    assert_eq!((&stray["member"], &stray["why"]), (&json!("m2"), &json!("lost")), "{now}");
    assert_eq!((&stray["lineage"], &stray["epoch"]), (&now["lineage"], &now["epoch"]), "{now}");
    let warned = listed.one("warning");
    assert!(warned["do"].as_str().is_some_and(|help| help.contains("--park")), "{warned}");
    let pid = stray["pid"].as_u64().expect("a process");
    let foreseen = site.json(&["replicas", "db01_replica", "--park", "-n"]).one("plan");
    assert_eq!(foreseen["act"], "park", "{foreseen}");
    assert!(runs(pid), "whoever only looks ends nothing");

    let parked = site.json(&["replicas", "db01_replica", "--park", "--yes"]);
    assert!(parked.code <= 1, "{}{}", parked.stdout, parked.stderr);
    assert!(!runs(pid));
    let events = site.json(&["events"]).kind("transition");
    let told = events.iter().find(|event| event["op"] == "park").expect("an event");
    assert!(told["reason"].as_str().is_some_and(|why| why.contains("m2")), "{told}");
    // It has not been taken back: it goes on with what it wrote, on the other member, by a word.
    assert_eq!(replica(&site)["state"], "failover");
    let started = site.json(&["replicas", "db01_replica", "--start", "--network", "none"]);
    assert!(started.code <= 1, "{}{}", started.stdout, started.stderr);
    assert_eq!(replica(&site)["host"], "m1");
    let none = site.json(&["replicas", "db01_replica", "--park", "--yes"]).one("error");
    assert_eq!(none["code"], "E_STATE", "the one that serves is not one too many: {none}");
    two.come_back();
    assert!(replica(&site).get("strays").is_none());
    let undone = site.json(&["undo", "db01_replica", "--yes"]);
    assert!(undone.code <= 1, "{}", undone.stdout);
    assert_on(&site, "m1", 1);
}

#[test]
fn a_machine_that_comes_back_beside_the_one_that_serves_is_the_one_that_is_parked() {
    let (site, one, two) = cluster("");
    site.back_up("r1", false);
    site.replicate();
    one.is_lost();
    let over = ["failover", "db01_replica", "--network", "none"];
    assert!(site.json(&over).code <= 1);
    let first = replica(&site);
    let pid = first["failover"]["running"]["process"]["pid"].as_u64().expect("a process");
    // The whole computer is out of reach: its folder, its sockets, and the locks that it holds on files.
    two.is_lost();
    let (there, away) = (site.room.path("run-m2"), site.room.path("run-away"));
    std::fs::rename(&there, &away).expect("out of reach");
    std::fs::remove_file(site.room.path("dr/db01_replica/qemu.pid")).expect("its lock");
    one.come_back();
    let undone = site.json(&["undo", "db01_replica", "--force", "--yes"]);
    assert!(undone.code <= 1, "{}", undone.stdout);
    let again = site.json(&over);
    assert!(again.code <= 1, "{}{}", again.stdout, again.stderr);
    let serves = replica(&site);
    assert_eq!(serves["host"], "m1", "{serves}");
    let ours = serves["failover"]["running"]["process"]["pid"].as_u64().expect("a process");
    assert!(runs(pid) && runs(ours) && pid != ours, "two of them, and nobody can see the one");

    // It is back.
    std::fs::rename(&away, &there).expect("back");
    two.come_back();
    let now = replica(&site);
    let stray = &now["strays"][0];
    assert_eq!(
        (&stray["member"], &stray["why"], &stray["pid"]),
        (&json!("m2"), &json!("beside"), &json!(pid)),
        "{now}"
    );
    assert_eq!((&stray["lineage"], &stray["epoch"]), (&now["lineage"], &first["epoch"]), "of before: {now}");
    assert_ne!(stray["epoch"], now["epoch"]);
    let parked = site.json(&["replicas", "db01_replica", "--park", "--yes"]);
    assert!(parked.code <= 1, "{}{}", parked.stdout, parked.stderr);
    assert!(!runs(pid) && runs(ours), "the one that serves goes on");
    let now = replica(&site);
    assert!(now.get("strays").is_none() && now["needs_resync"] == true, "{now}");
    assert!(site.json(&["undo", "db01_replica", "--yes"]).code <= 1);
    assert_on(&site, "m1", 1);
}

fn runs(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

#[test]
fn another_target_is_for_new_replicas() {
    let mut site = Site::new("");
    site.back_up("r1", false);
    site.replicate();
    let more = format!("[host]\nelsewhere = {{ kind = \"qemu\", images = \"{}\" }}\n", site.room.text("elsewhere"));
    site.rewrite("[host]\n", &more);
    site.rewrite("target = { host = \"dr\" }", "target = { host = \"elsewhere\" }");
    site.change(1);
    site.back_up("r1", false);
    let ran = site.json(&["run", "dr"]);
    assert_eq!(ran.code, 1, "{}", ran.stdout);
    let told = ran.one("replicated")["warnings"].to_string();
    assert!(told.contains("stays on dr"), "{told}");
    assert_on(&site, "dr", 2);
    assert!(!site.room.path("elsewhere/db01_replica").exists());
}

#[test]
fn a_machine_that_only_has_its_name_is_shown_and_never_parked() {
    let (site, _one, two) = cluster("");
    site.back_up("r1", false);
    site.replicate();
    two.is_lost();
    let folder = site.room.path("m2/db01_replica");
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("machine.toml"), "an ordinary machine").expect("a file");
    let number = folder.join("qemu.pid");
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-nodefaults", "-display", "none", "-S", "-m", "16", "-pidfile"]).arg(&number);
    let mut machine = Process::start(command);
    wait("it does not start", || std::fs::read_to_string(&number).is_ok_and(|text| text.ends_with('\n')));
    let is_left_alone = |machine: &mut Process, how: &str| {
        let listed = site.json(&["replicas"]);
        let now = listed.one("replica");
        let stray = &now["strays"][0];
        assert_eq!((&stray["member"], &stray["why"]), (&json!("m2"), &json!("stranger")), "{how}: {now}");
        assert!(listed.kind("warning").iter().all(|warned| warned.get("do").is_none()), "{how}: {}", listed.stdout);
        let refused = site.json(&["replicas", "db01_replica", "--park", "--yes"]).one("error");
        assert_eq!(refused["code"], "E_STATE", "{how}: {refused}");
        assert!(machine.runs(), "{how}");
    };
    is_left_alone(&mut machine, "no note");
    // The note of a machine of ours that ran there before.
    let runtime = site.room.path("run-m2/db01_replica");
    std::fs::create_dir_all(&runtime).expect("a folder");
    std::fs::copy(site.room.path("dr/db01_replica/replica.json"), runtime.join("replica.json")).expect("a note");
    is_left_alone(&mut machine, "the note of another one");
}
