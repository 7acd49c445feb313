//! Promise: a disk that a machine has lost is told where it leaves its backups and its replica, once, and never where that
//! was meant.

use std::{fs, process::Command};

use crate::{
    harness::Outcome,
    takeover::{REPLICA, Site},
};

fn tool(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect("the tool is installed");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What was told of disks that are gone.
fn told(outcome: &Outcome) -> Vec<String> {
    let warnings = outcome.kind("warning").into_iter().filter(|warning| warning["code"] == "W_DISK_GONE");
    warnings.map(|warning| warning["what"].as_str().expect("text").to_owned()).collect()
}

#[test]
fn a_disk_that_leaves_the_machine_is_told_once_where_it_leaves_its_points() {
    let site = Site::new(1);
    let machine = site.room.path("prod/db01/machine.toml");
    let without = fs::read_to_string(&machine).expect("text");
    let with = format!("{without}[[disk]]\nname = \"vdb\"\n");
    fs::write(&machine, &with).expect("write");
    let vdb = site.room.text("prod/db01/vdb.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &vdb, "4M"]);
    // Exit 2 is what --strict makes of a warning, and only of that.
    let run = |job: &str, gone: bool| {
        let ran = site.json(&["run", job, "--strict"]);
        assert_eq!(
            (ran.code, told(&ran).len()),
            if gone { (2, 1) } else { (0, 0) },
            "{job}: {}{}",
            ran.stdout,
            ran.stderr
        );
        assert!(told(&ran).iter().all(|what| what.contains("disk vdb of the point before")), "{:?}", told(&ran));
        let session = site.json(&["sessions", &ran.one("session")["id"].to_string()]);
        assert_eq!(session.one("work")["outcome"].to_string().contains("disk vdb of the point before"), gone);
    };
    run("night", false);
    run("dr", false);

    fs::write(&machine, &without).expect("write");
    assert_eq!(told(&site.json(&["run", "night", "-n"])).len(), 1);
    run("night", true);
    assert_eq!(told(&site.json(&["run", "dr", "-n"])).len(), 1);
    run("dr", true);
    run("night", false);
    run("dr", false);
    // Where somebody is about to stand on it, it is told for as long as a point says so.
    let notes = || site.json(&["failover", REPLICA, "-n"]).one("plan")["notes"].to_string();
    assert!(notes().contains("without the disk vdb"), "{}", notes());
    let points = site.json(&["replicas", REPLICA]).kind("point");
    let gone: Vec<_> = points.iter().map(|point| point["gone"].to_string()).collect();
    assert_eq!(gone, ["null", "null", "[\"vdb\"]", "null"]);

    // By hand, and back again.
    let disks = [format!("vda={}", site.production()), format!("vdb={vdb}")];
    let by_hand = |disks: &[String], more: &[&str]| {
        let named = disks.iter().flat_map(|disk| ["--disk", disk]);
        site.room.json(["backup", "db01"].into_iter().chain(named).chain(more.iter().copied()))
    };
    assert!(told(&by_hand(&disks, &[])).is_empty());
    for more in [&["-n"][..], &["--full"]] {
        let less = by_hand(&disks[..1], more);
        assert_eq!((less.code, told(&less).len()), (1, 1), "{more:?}: {}", less.stdout);
    }
    assert!(told(&by_hand(&disks[..1], &[])).is_empty());
    assert!(!told(&by_hand(&disks[1..], &[])).is_empty());

    // One that is left out on purpose is not missed.
    fs::write(&machine, &with).expect("write");
    run("night", false);
    let file = site.room.path("site.toml");
    let text = fs::read_to_string(&file).expect("text");
    fs::write(&file, text.replace("from = \"prod:db01\"", "from = \"prod:db01\", exclude_disks = [\"vdb\"]"))
        .expect("write");
    for _ in 0..2 {
        run("night", false);
    }
    let step = site.json(&["run", "night", "-n"]).one("step");
    assert!(step["what"].as_str().is_some_and(|what| what.ends_with("that exclude_disks names: vdb")), "{step}");
    let events = site.json(&["events"]).kind("transition");
    let informed = events.iter().filter(|event| event["op"] == "note" && event.to_string().contains("exclude_disks"));
    assert_eq!(informed.count(), 1, "by the first run");
}

#[test]
fn the_last_point_of_a_backup_with_a_disk_that_is_gone_stays_and_that_of_a_replica_is_told_before_it_goes() {
    let jobs = "restore_points_to_keep = 2\n[job.b]\nkind = \"backup\"\nmachines = [\"db01\"]\nto = \"r1\"\nkeep = { last = 1 }\n";
    let mut site = crate::replication::Site::with("{ from = \"backup\", repositories = [\"r1\"] }", jobs);
    let text = |outcome: &Outcome| told(outcome).join("; ");
    let points = || {
        let listed = site.room.json(["-r", &site.room.text("r1"), "points", "db01"]).kind("point");
        listed.iter().map(|point| point["point"].as_str().expect("an id").to_owned()).collect::<Vec<_>>()
    };
    let run = |job: &str| site.json(&["run", job]);
    assert_eq!((run("b").code, run("dr").code), (0, 0));
    let first = points().remove(0);
    let vdb = format!(", vdb = \"raw:{}\"", site.room.text("prod/vdb.raw"));
    site.rewrite(&vdb, "");
    let told = text(&run("b"));
    assert!(told.contains(&format!("db01@{first} stays in r1: no later point has the disk vdb")), "{told}");
    let told = text(&run("dr"));
    assert!(told.contains("the last point that has the disk vdb"), "{told}");

    // Only the newest of those with the disk, for as long as nobody gives it up; told once.
    let again = run("b");
    assert_eq!((again.code, text(&again)), (0, String::new()), "{}", again.stdout);
    assert!(points().len() == 2 && points().contains(&first), "{:?}", points());
    let again = run("dr");
    assert_eq!((again.code, text(&again)), (0, String::new()), "{}", again.stdout);
    site.room.ok(["-r", &site.room.text("r1"), "forget", &format!("db01@{first}"), "--yes"]);
    assert_eq!((run("b").code, points().len()), (0, 1));
    site.disks.pop();
    site.assert_point(site.points().last().expect("a point"), &site.disks);
}
