//! Promise: a takeover loses nothing by what was going on beside it: an interrupted run, a second pair of hands, files of
//! somebody else, a damaged layer.

use std::{fs, process::Command, time::Duration};

use aquifer_runner::{
    host::{Attachment, Host, ImageFormat, Network, placed::Placed, qemu::Qemu},
    recover::shape::Wishes,
};
use serde_json::json;

use crate::takeover::{REPLICA, Site};

const PLAIN: [&str; 2] = ["--network", "none"];

#[test]
fn of_several_hands_that_take_back_one_step_one_does() {
    let site = Site::new(1);
    site.does(&["failover", REPLICA, "--no-start"]);
    site.does(&["failback", REPLICA, "--yes", "--full"]);
    assert_eq!(site.state(), "ready_to_switch");
    let undo = || site.room.command([&["-c", "site.toml", "undo", REPLICA][..], &PLAIN].concat());
    let hands: Vec<_> = (0..3).map(|_| undo().spawn().expect("undo")).collect();
    let codes: Vec<_> = hands.into_iter().map(|mut hand| hand.wait().expect("it ends").code()).collect();
    assert!(codes.iter().any(|code| code.is_some_and(|code| code <= 1)), "{codes:?}");
    assert_eq!(site.state(), "failover", "the takeover itself was not taken back: {codes:?}");
}

#[test]
fn a_run_that_was_cut_short_shares_no_file_with_the_takeover() {
    let site = Site::new(1);
    let room = &site.room;
    let production = room.text("prod/db01/vda.qcow2");
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x77 15M 4M", &production]);
    room.ok(["backup", "db01", "--disk", &format!("vda={production}")]);
    let text = fs::read_to_string(room.path("site.toml")).expect("site");
    let slow = text.replace("[job.dr]\n", "[job.dr]\nlimits = { read = \"256KiB/s\" }\n");
    fs::write(room.path("site.toml"), slow).expect("site");
    let mut run = room.command(["-c", "site.toml", "run", "dr"]).spawn().expect("run");
    let part = room.path("dr").join(REPLICA).join("vda");
    let begun =
        || fs::read_dir(&part).expect("list").flatten().any(|e| e.file_name().to_string_lossy().starts_with("2."));
    while !begun() {
        std::thread::sleep(Duration::from_millis(20));
    }
    tool("kill", &["-INT", &run.id().to_string()]);
    run.wait().expect("it ends");
    fs::write(room.path("site.toml"), text).expect("site");

    site.does(&["failover", REPLICA, "--no-start"]);
    let top = site.record().failover.expect("a takeover").tops[0].file.clone();
    assert_ne!(top, "vda/2.qcow2", "the number of what is still being made");
    let layer = room.path("dr").join(REPLICA).join(&top).display().to_string();
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x55 18M 1M", &layer]);
    site.does(&["failback", REPLICA, "--yes", "--full", "--switch", "now", "--no-start"]);
    site.does(&["commit", REPLICA, "--force", "--yes"]);
    let points = || room.json(["-c", "site.toml", "replicas", REPLICA]).stdout;
    let before = points();
    let again = room.json(["-c", "site.toml", "run", "dr"]);
    assert!(again.code <= 1, "{}", again.stdout);
    assert!(again.stdout.contains("newer points") || points() == before, "{}", again.stdout);
    // Whatever the run did, the state that came home is a restore point still, and reads as it did.
    tool("qemu-io", &["-r", "-U", "-f", "qcow2", "-c", "read -P 0x55 18M 1M", &layer]);
    site.assert_same(&top);
}

#[test]
fn what_is_somebody_elses_is_no_home() {
    let site = Site::new(1);
    site.does(&["failover", REPLICA, "--no-start"]);
    fs::create_dir_all(site.room.path("prod/precious")).expect("folder");
    fs::write(site.room.path("prod/precious/vda.qcow2"), "precious").expect("file");
    site.refused(&["failback", REPLICA, "--new", "prod:precious", "--yes"], "E_EXISTS");
    assert_eq!(fs::read(site.room.path("prod/precious/vda.qcow2")).expect("file"), b"precious");
    assert_eq!(site.state(), "failover");
}

#[test]
fn a_home_that_was_changed_between_the_passes_is_not_switched_to() {
    let site = Site::new(1);
    site.does(&["failover", REPLICA, "--no-start"]);
    site.does(&["failback", REPLICA, "--yes", "--full"]);
    let production = site.room.text("prod/db01/vda.qcow2");
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x99 2M 64k", &production]);
    site.refused(&["failback", REPLICA, "--switch", "now", "--no-start", "--yes"], "E_STATE");
    assert_eq!(site.state(), "ready_to_switch");
    site.does(&["undo", REPLICA]);
    site.does(&["failback", REPLICA, "--yes", "--full", "--switch", "now", "--no-start"]);
    let top = site.record().failover.expect("a takeover").tops[0].file.clone();
    site.assert_same(&top);
}

#[test]
fn a_layer_that_lost_its_end_is_not_started_on() {
    let site = Site::new(1);
    let layer = site.room.path("dr").join(REPLICA).join("vda/1.qcow2");
    let len = fs::metadata(&layer).expect("layer").len();
    fs::OpenOptions::new().write(true).open(&layer).and_then(|file| file.set_len(len / 8)).expect("cut");
    let outcome = site.json(&["failover", REPLICA, "--no-start"]);
    assert_eq!(outcome.one("error")["exit"], json!(14), "{}", outcome.stdout);
    assert_eq!(site.state(), "ready");
}

fn tool(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect("the tool is installed");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !said.contains("failed"), "{program} {args:?}: {said}");
}

#[test]
fn a_takeover_that_failed_is_tried_again_at_its_point_and_at_no_other() {
    let site = Site::new(2);
    // A hypervisor that answers what it is asked, and does not start.
    let bin = site.room.path("bin");
    fs::create_dir(&bin).expect("folder");
    let real = "/usr/bin/qemu-system-x86_64";
    let script = format!("#!/bin/sh\nfor word; do [ \"$word\" = -pidfile ] && exit 1; done\nexec {real} \"$@\"\n");
    fs::write(bin.join("qemu-system-x86_64"), script).expect("program");
    tool("chmod", &["755", &bin.join("qemu-system-x86_64").display().to_string()]);
    let mut broken =
        site.room.command(["-c", "site.toml", "failover", REPLICA, "--network", "none", "--to", "latest~1"]);
    let path = format!("{}:/usr/bin:/bin", bin.display());
    assert_eq!(broken.env("PATH", path).status().expect("it ends").code(), Some(2));
    assert_eq!(site.state(), "failed_failover");
    let failed = site.record().failover.expect("a takeover").point.to_string();
    let other = site.refused(&["failover", REPLICA, "--to", "latest"], "E_STATE");
    assert!(other["do"].as_str().is_some_and(|help| help.contains("undo")), "{other}");
    let report = site.does(&["failover", REPLICA]);
    assert_eq!((&report["state"], &report["point"]), (&json!("failover"), &json!(failed)));
}

#[test]
fn a_run_that_died_does_not_keep_a_takeover_waiting() {
    let site = Site::new(1);
    let room = &site.room;
    let production = room.text("prod/db01/vda.qcow2");
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x77 15M 4M", &production]);
    room.ok(["backup", "db01", "--disk", &format!("vda={production}")]);
    let text = fs::read_to_string(room.path("site.toml")).expect("site");
    fs::write(room.path("site.toml"), text.replace("[job.dr]\n", "[job.dr]\nlimits = { read = \"256KiB/s\" }\n"))
        .expect("site");
    let mut run = room.command(["-c", "site.toml", "run", "dr"]).spawn().expect("run");
    let begun = room.path("dr").join(REPLICA).join("vda/2.qcow2.part");
    while !begun.exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    run.kill().expect("kill");
    run.wait().expect("reap");
    fs::write(room.path("site.toml"), text).expect("site");
    let report = site.does(&["failover", REPLICA, "--no-start"]);
    assert_eq!(report["state"], "failover");
    let top = site.record().failover.expect("a takeover").tops[0].file.clone();
    assert_ne!(top, "vda/2.qcow2", "the number of what is still being made");
    assert_eq!(
        room.json(["-c", "site.toml", "replicas", REPLICA]).kind("point").len(),
        1,
        "nobody waited for the rest"
    );
}

#[test]
fn a_machine_that_runs_there_on_other_disks_is_not_taken_for_ours() {
    let site = Site::new(1);
    // Somebody has started the replica by hand, on a disk of his own.
    let folder = site.room.path("dr").join(REPLICA);
    let own = folder.join("own.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &own.display().to_string(), "32M"]);
    let placed = Placed::read(&folder).expect("a machine");
    let wishes = Wishes { network: Network::None, ..Wishes::default() };
    let shape = placed.shape("stranger", &wishes, &[]).expect("a shape");
    let places = site.rooms().places(&fs::canonicalize(&folder).expect("folder"));
    fs::create_dir_all(&places.runtime_dir).expect("folder");
    let disk = Attachment::File { path: own, format: ImageFormat::Qcow2 };
    let stranger = Qemu.start(&shape, &[disk], &places).expect("it starts");
    let outcome = site.json(&["failover", REPLICA, "--network", "none"]);
    let error = outcome.one("error");
    assert_eq!(error["exit"], 2, "{error}");
    assert!(error["what"].as_str().is_some_and(|what| what.contains("own.qcow2")), "{error}");
    assert_eq!(site.state(), "failed_failover");
    Qemu.power_off(&stranger).expect("it ends");
    site.does(&["failover", REPLICA]);
    assert_eq!(site.state(), "failover");
}
