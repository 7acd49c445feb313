//! Promise: runs, backups, copies and takeovers of one machine side by side keep out of each other's way, and say so; seeds
//! are taken at their newest point, also for machines that come later; the site's figures can be collected.

use std::{
    fs,
    os::unix::fs::FileExt,
    process::{Command, Stdio},
    time::Duration,
};

use aquifer_runner::host::in_use;
use serde_json::Value;

use crate::{
    carrier::{Process, wait},
    harness::{Outcome, Room},
    replication::Site,
    takeover,
};

fn warnings(outcome: &Outcome) -> Vec<String> {
    outcome.kind("warning").iter().filter_map(|warning| warning["code"].as_str().map(str::to_owned)).collect()
}

/// Fills both disks, so that a slow run lasts for some seconds.
fn fill(site: &mut Site, byte: u8) {
    site.disks.iter_mut().for_each(|disk| disk.1.fill(byte));
    site.put_production();
}

#[test]
fn a_backup_beside_a_run_is_the_next_runs_point() {
    let mut site = Site::new("limits = { read = \"1MiB/s\" }");
    site.fill_long(1);
    site.back_up("r1", false);
    let first = site.disks.clone();
    let mut run = site.begin();
    site.wait_for_mark();
    fill(&mut site, 2);
    site.back_up("r1", false);
    assert!(run.runs(), "the run has not ended yet");
    assert!(run.ends().is_some_and(|code| code <= 1));
    let points = site.points();
    assert_eq!(points.len(), 1);
    site.assert_point(&points[0], &first);
    site.rewrite("limits = { read = \"1MiB/s\" }", "");
    site.replicate();
    let points = site.points();
    assert_eq!(points.len(), 2);
    site.assert_point(&points[0], &first);
    site.assert_point(&points[1], &site.disks);
}

#[test]
fn a_takeover_stops_a_run_only_where_that_is_asked_for() {
    let mut site = Site::new("");
    fill(&mut site, 1);
    site.back_up("r1", false);
    site.replicate();
    let before = site.disks.clone();
    fill(&mut site, 2);
    site.back_up("r1", false);
    site.rewrite("block_size", "limits = { read = \"128KiB/s\" }\nblock_size");
    let _run = site.begin();
    wait("it does not begin", || site.room.path("dr/db01_replica/vda/2.qcow2.part").exists());
    let refused = site.json(&["failover", "db01_replica", "--no-start"]);
    assert_eq!((refused.code, refused.one("error")["code"].as_str()), (11, Some("E_BUSY")), "{}", refused.stdout);
    let over = site.json(&["failover", "db01_replica", "--no-start", "--cancel-job"]);
    assert!(over.code <= 1, "{}{}", over.stdout, over.stderr);
    let points = site.points();
    assert_eq!(points.len(), 1, "what was half there is no point");
    site.assert_point(&points[0], &before);
    assert_eq!(site.json(&["replicas"]).one("replica")["state"], "failover");
}

#[test]
fn while_one_replica_serves_no_job_replicates_its_machine() {
    let mut site = Site::new("");
    let text = fs::read_to_string(site.room.path("site.toml")).expect("text");
    let job = text.split("[job.dr]").nth(1).expect("a job");
    fs::write(site.room.path("site.toml"), format!("{text}[job.two]{job}name_suffix = \"_two\"\n")).expect("site");
    site.back_up("r1", false);
    site.replicate();
    assert!(site.json(&["run", "two"]).code <= 1);
    assert!(site.json(&["failover", "db01_replica", "--no-start"]).code <= 1);
    site.change(1);
    site.back_up("r1", false);
    let held = site.json(&["run", "two"]);
    assert!(warnings(&held).iter().any(|code| code == "W_ON_HOLD"), "{}", held.stdout);
    let points = |name: &str| site.json(&["replicas", name]).kind("point");
    assert_eq!(points("db01_two").len(), 1);
    // What may be done at a point, and with a session, is what the states allow.
    assert_eq!(points("db01_two")[0]["allowed_operations"], serde_json::json!(["failover"]));
    assert_eq!(points("db01_replica")[0]["allowed_operations"], serde_json::json!([]));
    let sessions = site.json(&["sessions"]).kind("session");
    assert!(sessions.iter().all(|session| session["allowed_operations"] == serde_json::json!([])), "{sessions:?}");
    assert!(site.json(&["undo", "db01_replica", "--yes"]).code <= 1);
    assert!(site.json(&["run", "two"]).code <= 1);
    assert_eq!(points("db01_two").len(), 2);
    let waiting = site.json(&["run", "dr", "--no-wait"]).one("session")["id"].to_string();
    let shown = site.json(&["sessions", &waiting]).one("session");
    assert_eq!(shown["allowed_operations"], serde_json::json!(["cancel", "pause"]), "{shown}");
}

#[test]
fn a_chained_job_runs_after_one_that_failed() {
    let mut site = Site::new("schedule = { after = \"first\" }");
    let text = fs::read_to_string(site.room.path("site.toml")).expect("text");
    let more = format!(
        "[machine.none]\ndisks = {{ vda = \"raw:{}\" }}\n[job.first]\nkind = \"backup\"\nmachines = [\"none\"]\nto = \"r2\"\nretry = {{ count = 1, interval = \"1s\" }}\n",
        site.room.text("prod/nothing.raw")
    );
    fs::write(site.room.path("site.toml"), text + &more).expect("site");
    site.change(1);
    site.back_up("r1", false);
    let _serve = Process::start(site.room.command(["-c", "site.toml", "serve"]));
    let id = site.json(&["run", "first", "--no-wait"]).one("session")["id"].to_string();
    wait("the first one does not end", || !site.json(&["sessions", &id]).one("session")["ended"].is_null());
    assert_eq!(site.json(&["sessions", &id]).one("session")["result"], "failed");
    wait("the second one does not follow", || {
        let listed = site.json(&["replicas"]).kind("replica");
        listed.first().is_some_and(|replica| replica["points"] == 1 && replica["state"] == "ready")
    });
    site.assert_point(&site.points()[0], &site.disks);
}

#[test]
fn a_seed_is_taken_at_its_newest_point_also_for_a_machine_that_comes_later() {
    let mut site = Site::with("{ from = \"production\", seed = \"r2\" }", "");
    site.back_up("r2", false);
    site.change(1);
    site.back_up("r2", false);
    let seeded = site.disks.clone();
    site.change(1);
    site.replicate();
    let points = site.points();
    assert_eq!(points.len(), 2, "the seed's, and that of now");
    assert_eq!(points[0]["origin"], "seed");
    site.assert_point(&points[0], &seeded);
    site.assert_point(&points[1], &site.disks);
    // Another machine joins the job, and has a seed: its own first run takes it.
    let vda = site.room.text("prod/other.raw");
    fs::write(&vda, &site.disks[0].1).expect("an image");
    let backup =
        ["-r", &site.room.text("r2"), "backup", "db02", "--disk", &format!("vda=raw:{vda}")].map(str::to_owned);
    assert!(Outcome::of(site.room.command(backup).output().expect("backup")).code <= 1);
    site.rewrite("[machine]\n", &format!("[machine]\ndb02 = {{ disks = {{ vda = \"raw:{vda}\" }} }}\n"));
    site.rewrite("machines = [\"db01\"]", "machines = [\"db01\", \"db02\"]");
    let ran = site.json(&["run", "dr"]);
    assert!(ran.code <= 1, "{}", ran.stdout);
    let origins: Vec<Value> =
        site.json(&["replicas", "db02_replica"]).kind("point").iter().map(|point| point["origin"].clone()).collect();
    assert_eq!(origins, ["seed", "job"]);
}

#[test]
fn a_machine_that_somebody_started_by_hand_is_found_before_anything_is_written() {
    let mut site = Site::new("");
    let runtime = format!("runtime = \"{}\", images = \"{}\"", site.room.text("rt"), site.room.text("dr"));
    site.rewrite(&format!("images = \"{}\"", site.room.text("dr")), &runtime);
    site.back_up("r1", false);
    site.replicate();
    fs::create_dir_all(site.room.path("rt/db01_replica")).expect("a folder");
    let monitor = site.room.path("rt/db01_replica/qmp.sock");
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-S", "-machine", "q35", "-accel", "tcg", "-m", "32M", "-display", "none", "-qmp"]);
    qemu.arg(format!("unix:{},server=on,wait=off", monitor.display())).stdin(Stdio::null());
    let by_hand = Process(qemu.spawn().expect("qemu"));
    wait("QEMU does not come up", || monitor.exists());
    site.change(1);
    site.back_up("r1", false);
    let refused = site.json(&["run", "dr"]);
    assert_eq!(refused.one("error")["code"], "E_STATE", "{}", refused.stdout);
    assert_eq!(site.json(&["replicas"]).one("replica")["needs_resync"], true);
    drop(by_hand);
    let ran = site.json(&["run", "dr"]);
    assert!(warnings(&ran).iter().any(|code| code == "W_RESYNC"), "{}", ran.stdout);
    site.assert_point(&site.points()[1], &site.disks);
    assert!(ran.one("replicated")["digest_bytes"].as_u64() > Some(0), "{}", ran.stdout);
}

#[test]
fn the_figures_of_a_site_can_be_collected() {
    let site = Site::new("");
    site.back_up("r1", false);
    site.replicate();
    let shown = site.room.ok(["-c", "site.toml", "status", "--metrics"]);
    for line in [
        "# TYPE aquifer_replica_lag_seconds gauge",
        "aquifer_replica_points{replica=\"db01_replica\",machine=\"db01\"} 1",
        "aquifer_replica_state{replica=\"db01_replica\",machine=\"db01\",state=\"ready\"} 1",
        "aquifer_job_sessions{job=\"dr\",result=\"failed\"} 0",
    ] {
        assert!(shown.stdout.lines().any(|found| found == line), "{line} in {}", shown.stdout);
    }
    let metrics = site.json(&["status", "--metrics"]).kind("metric");
    let target = metrics
        .iter()
        .find(|metric| metric["name"] == "aquifer_job_last_bytes" && metric["labels"]["stage"] == "target");
    assert!(target.expect("bytes by stage")["value"].as_f64() > Some(0.0), "{metrics:?}");
}

#[test]
fn what_is_described_differently_at_home_is_listed_and_decided_before_anything_is_turned_off() {
    let site = takeover::Site::new(1);
    let home = site.room.path("prod/db01/machine.toml");
    let same = fs::read_to_string(&home).expect("text");
    let changed = same.replace("cpus = 1", "cpus = 2") + "[[nic]]\nmac = \"52:54:00:00:00:07\"\nnetwork = \"lan\"\n";
    assert_ne!(same, changed);
    fs::write(&home, &changed).expect("write");
    let json = |args: &[&str]| site.room.json(["-c", "site.toml"].iter().chain(args));
    let over = json(&["failover", takeover::REPLICA, "--no-start"]);
    assert!(over.code <= 1, "{}", over.stdout);
    let way = ["failback", takeover::REPLICA, "--switch", "now", "--no-start", "--grace", "0s"];
    let refused = json(&[&way[..], &["--yes"]].concat());
    assert_eq!(
        (refused.code, refused.one("error")["code"].as_str()),
        (3, Some("E_CONFIG_DRIFT")),
        "{}",
        refused.stdout
    );
    let listed = refused.one("drift")["differences"].to_string();
    assert!(listed.contains("processors: 1 at the replica, 2 at home"), "{listed}");
    assert!(listed.contains("the network card 52:54:00:00:00:07 is at home only"), "{listed}");
    let foreseen = json(&[&way[..], &["-n"]].concat());
    assert_eq!(foreseen.one("error")["code"], "E_CONFIG_DRIFT", "who only looks is told the same: {}", foreseen.stdout);
    assert_eq!(json(&[&way[..], &["-n", "--drift", "keep"]].concat()).code, 0);
    assert_eq!(site.state(), "failover", "nothing was done");
    let applied = json(&[&way[..], &["--drift", "apply", "--yes"]].concat());
    assert!(applied.code <= 1, "{}{}", applied.stdout, applied.stderr);
    let now = fs::read_to_string(&home).expect("text");
    assert!(now.contains("cpus = 1") && !now.contains("52:54:00:00:00:07"), "{now}");
    let undone = json(&["undo", takeover::REPLICA, "--yes"]);
    assert!(undone.code <= 1, "{}{}", undone.stdout, undone.stderr);
    assert_eq!(fs::read_to_string(&home).expect("text"), changed, "taken back with the change of sides");
    let kept = json(&[&way[..], &["--drift", "keep", "--verify", "--yes"]].concat());
    assert!(kept.code <= 1, "{}{}", kept.stdout, kept.stderr);
    assert_eq!(fs::read_to_string(&home).expect("text"), changed);
}

/// A machine of one raw image that cannot be read in less than a second, with a backup and a replica of production itself.
fn of_one_image() -> Room {
    let room = Room::new();
    room.ok(["init"]);
    fs::create_dir_all(room.path("prod/files")).expect("a folder");
    fs::create_dir_all(room.path("dr")).expect("a folder");
    fs::write(room.path("prod/files/vda.raw"), vec![7; 16 << 20]).expect("an image");
    room.write_site(&format!(
        "version = 1\n[repository]\nnas = {{ url = \"{}\" }}\n[host.prod]\nkind = \"qemu\"\nimages = \"{}\"\n\
         [host.dr]\nkind = \"qemu\"\nimages = \"{}\"\n[machine]\nfiles = {{ from = \"prod:files\" }}\n\
         [job.night]\nkind = \"backup\"\nmachines = [\"files\"]\nto = \"nas\"\nretry = {{ count = 0 }}\n\
         limits = {{ read = \"8MiB/s\" }}\n[job.copy]\nkind = \"replication\"\nmachines = [\"files\"]\ntarget = {{ host = \"dr\" }}\n\
         source = {{ from = \"production\" }}\nretry = {{ count = 0 }}\n",
        room.text("repo"),
        room.text("prod"),
        room.text("dr"),
    ));
    room
}

#[test]
fn no_point_is_made_of_images_that_somebody_writes_to() {
    let room = of_one_image();
    let image = room.path("prod/files/vda.raw");
    let busy = |args: &[&str]| {
        let outcome = room.json([&["-c", "site.toml"], args].concat());
        let error = outcome.one("error");
        assert_eq!((outcome.code, error["code"].as_str()), (11, Some("E_BUSY")), "{args:?}: {}", outcome.stdout);
        error
    };
    // Somebody has it open, and has not written anything yet.
    let socket = room.path("held");
    let mut door = Command::new("qemu-nbd");
    door.args(["-t", "-f", "raw", "-k"]).arg(&socket).arg(&image);
    let door = Process::start(door);
    wait("it has the image open", || matches!(in_use::by(&image, in_use::Against::Writers), Ok(Some(_))));
    let by_hand = format!("vda=raw:{}", image.display());
    for args in [&["run", "night"][..], &["run", "copy"], &["backup", "files", "--disk", &by_hand]] {
        let error = busy(args);
        assert!(error["what"].as_str().is_some_and(|what| what.contains("qemu-nbd")), "{error}");
        let look = format!("fuser -v {}", image.display());
        assert!(error["do"].as_str().is_some_and(|help| help.starts_with(&look)), "a command: {error}");
    }
    assert!(door.kill());

    // Somebody without locks writes while it is read.
    let mut run = Process::start(room.command(["-c", "site.toml", "run", "night"]));
    assert_eq!(run.ends_within(Duration::from_millis(700)), None, "it is read too fast for this test");
    let file = fs::OpenOptions::new().write(true).open(&image).expect("the image");
    file.write_all_at(&[9; 512], 0).expect("a write");
    assert_eq!(run.ends(), Some(11), "the point would have been of no moment");
    assert!(room.json(["points"]).kind("point").is_empty(), "a point of two states is listed");

    room.ok(["-c", "site.toml", "run", "night"]);
    room.ok(["export", "files@latest", "out.raw"]);
    assert!(fs::read(room.path("out.raw")).expect("out") == fs::read(&image).expect("image"));
    room.ok(["-c", "site.toml", "run", "copy"]);
}

#[test]
fn a_replica_whose_hosts_folder_was_moved_in_the_site_file_stays_where_it_is_and_says_so() {
    let mut site = Site::new("");
    site.back_up("r1", false);
    assert!(!site.replicate()["warnings"].to_string().contains("stays in"));
    fs::create_dir(site.room.path("dr2")).expect("a folder");
    let images = |name: &str| format!("images = \"{}\"", site.room.text(name));
    let (before, after) = (images("dr"), images("dr2"));
    site.rewrite(&before, &after);
    site.change(1);
    site.back_up("r1", false);
    let told = site.replicate()["warnings"].to_string();
    let (here, named) = (site.room.text("dr/db01_replica"), site.room.text("dr2"));
    assert!(told.contains(&format!("stays in {here}: {named}, which the site file names")), "{told}");
    assert!(!site.room.path("dr2/db01_replica").exists());
    site.assert_point(&site.points()[1], &site.disks);
}

#[test]
fn an_image_that_looks_like_a_copy_is_told_and_a_machine_that_runs_without_it_is_taken_without_it() {
    let room = of_one_image();
    let (prod, runtime) = (room.text("prod"), room.path("rp"));
    let text = fs::read_to_string(room.path("site.toml")).expect("a site file");
    let images = format!("images = \"{prod}\"\n");
    let text = text.replace(&images, &format!("{images}runtime = \"{}\"\n", runtime.display()));
    fs::write(room.path("site.toml"), text).expect("a site file");
    fs::copy(room.path("prod/files/vda.raw"), room.path("prod/files/vda-old.raw")).expect("a copy");
    let json = |args: &[&str]| room.json(["-c", "site.toml"].iter().chain(args));
    let checked = json(&["config", "check"]);
    assert_eq!(checked.code, 1, "{}", checked.stdout);
    assert!(checked.stdout.contains("vda-old.raw beside vda.raw is taken for a disk of its own"), "{}", checked.stdout);
    let ran = json(&["run", "copy"]);
    assert_eq!(ran.code, 1, "{}", ran.stdout);
    assert!(ran.stdout.contains("vda-old.raw beside vda.raw"), "{}", ran.stdout);

    let monitor = runtime.join("files/qmp.sock");
    fs::create_dir_all(runtime.join("files")).expect("a folder");
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-S", "-machine", "q35", "-accel", "tcg", "-m", "32M", "-display", "none", "-qmp"]);
    qemu.arg(format!("unix:{},server=on,wait=off", monitor.display()));
    qemu.arg("-drive").arg(format!("if=virtio,format=raw,file={prod}/files/vda.raw")).stdin(Stdio::null());
    let running = Process(qemu.spawn().expect("qemu"));
    wait("QEMU does not come up", || monitor.exists());
    let ran = json(&["run", "night"]);
    assert_eq!(ran.code, 1, "{}{}", ran.stdout, ran.stderr);
    assert!(ran.stdout.contains("vda-old.raw is no disk of the running machine, and left out"), "{}", ran.stdout);
    drop(running);
    let points = room.json(["points", "files"]).kind("point");
    let disks: Vec<_> = points[0]["disks"].as_array().expect("disks").iter().map(|disk| &disk["disk"]).collect();
    assert_eq!(disks, ["vda"]);
}
