//! Promise: of what a takeover and a way home say they do, the rarer parts are done as well: several machines in one
//! command, a check of production's own notes that finds one which lies, a disk whose file is gone; and no way home leads
//! into a machine that is another one's.

use std::{fs, process::Command};

use aquifer_runner::replica::model::ReplicaRecord;

use crate::takeover::{REPLICA, Site};

fn tool(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect("the tool is installed");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_note_of_production_that_lies_is_found_where_everything_is_compared() {
    let site = Site::new(1);
    site.start_production();
    for job in ["night", "dr"] {
        let run = site.json(&["run", job]);
        assert!(run.code <= 1, "{job}: {}{}", run.stdout, run.stderr);
    }
    site.does(&["failover", REPLICA, "--fence", "graceful", "--no-start"]);
    // Somebody writes to production, and the note of it is lost.
    let production = site.production();
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x99 18M 128k", &production]);
    let known: serde_json::Value =
        serde_json::from_str(&tool("qemu-img", &["info", "--output=json", &production])).expect("json");
    let notes = known["format-specific"]["data"]["bitmaps"].as_array().expect("notes").clone();
    assert!(!notes.is_empty(), "{known}");
    for note in &notes {
        tool("qemu-img", &["bitmap", "--clear", &production, note["name"].as_str().expect("a name")]);
    }
    let before = fs::read(&production).expect("an image");
    let refused = site.refused(&["failback", REPLICA, "--verify", "--yes"], "E_FAILED");
    assert!(refused["what"].as_str().is_some_and(|what| what.contains("of vda differ beside those")), "{refused}");
    assert!(refused["do"].as_str().is_some_and(|help| help.contains("--full")), "{refused}");
    assert_eq!(site.state(), "failover", "nobody has changed sides");
    assert!(fs::read(&production).expect("an image") == before, "production was not written");

    site.does(&["failback", REPLICA, "--full", "--switch", "now", "--no-start", "--yes"]);
    let top = site.record().failover.expect("a takeover").tops[0].file.clone();
    site.assert_same(&top);
}

/// A second machine on production's host, like the first, that the job replicates as well.
fn with_a_second(site: &Site) -> String {
    let room = &site.room;
    tool("cp", &["-a", &room.text("prod/db01"), &room.text("prod/db02")]);
    let description = room.path("prod/db02/machine.toml");
    let text = fs::read_to_string(&description).expect("a description").replace("db01", "db02");
    fs::write(&description, text).expect("a description");
    let text = fs::read_to_string(room.path("site.toml")).expect("site");
    let text = text.replace("[machine]\n", "[machine]\ndb02 = { from = \"prod:db02\" }\n");
    let (one, both) = ("machines = [\"db01\"]\nsource", "machines = [\"db01\", \"db02\"]\nsource");
    assert!(text.contains(one), "{text}");
    fs::write(room.path("site.toml"), text.replace(one, both)).expect("site");
    room.text("prod/db02/vda.qcow2")
}

#[test]
fn no_way_home_leads_into_another_machine_of_the_site() {
    let site = Site::new(1);
    let theirs = with_a_second(&site);
    let before = fs::read(&theirs).expect("an image");
    site.does(&["failover", REPLICA, "--no-start"]);
    for target in [["--to", "prod:db02"], ["--new", "prod:db02"]] {
        for more in [&["-n"][..], &["--drift", "keep", "--yes"]] {
            let refused = site.refused(&[&["failback", REPLICA][..], &target, more].concat(), "E_REFUSED");
            assert!(refused["what"].as_str().is_some_and(|what| what.contains("the machine db02")), "{refused}");
        }
    }
    assert!(fs::read(&theirs).expect("an image") == before);
    assert_eq!(site.json(&["failback", REPLICA, "--to", "prod:db01", "-n"]).code, 0, "its own place");
}

#[test]
fn a_disk_whose_file_is_gone_comes_home_anew() {
    let site = Site::new(1);
    site.does(&["failover", REPLICA, "--no-start"]);
    fs::remove_file(site.production()).expect("the file");
    let said = site.refused(&["failback", REPLICA, "--yes"], "E_CONFIG_DRIFT");
    assert!(said["do"].as_str().is_some_and(|help| help.contains("--drift apply")), "{said}");
    site.does(&["failback", REPLICA, "--drift", "apply", "--switch", "now", "--no-start", "--yes"]);
    let top = site.record().failover.expect("a takeover").tops[0].file.clone();
    site.assert_same(&top);
    let description = fs::read_to_string(site.room.path("prod/db01/machine.toml")).expect("a description");
    assert_eq!(description.matches("[[disk]]").count(), 1, "{description}");
}

#[test]
fn a_machine_that_was_given_up_is_told_as_such() {
    let site = Site::new(1);
    let foreseen = site.room.run(["-c", "site.toml", "plan", "run", "all", "-n", "--to", "2040-01-01T00:00:00Z"]);
    assert!(
        format!("{}{}", foreseen.stdout, foreseen.stderr).contains("plan run all --to 2040-01-01T00:00:00Z"),
        "{}",
        foreseen.stdout
    );
    site.does(&["failover", REPLICA, "--no-start"]);
    site.does(&["permanent", REPLICA, "--yes"]);
    for more in [&["-n"][..], &[]] {
        site.refused(&[&["failover", REPLICA][..], more].concat(), "E_STATE");
    }
    let checked = site.json(&["plan", "check", "all"]).stdout;
    assert!(checked.contains("db01_replica of db01 is permanent_failover"), "{checked}");
    let ran = site.json(&["plan", "run", "all", "--network", "none"]);
    assert_eq!(ran.one("plan")["run"]["record"]["entries"][0]["step"], "skipped", "{}", ran.stdout);
}

#[test]
fn a_run_that_is_in_the_way_is_told_with_the_option_that_stops_it() {
    let site = Site::new(1);
    let room = &site.room;
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x77 15M 4M", &site.production()]);
    room.ok(["backup", "db01", "--disk", &format!("vda={}", site.production())]);
    let text = fs::read_to_string(room.path("site.toml")).expect("site");
    fs::write(room.path("site.toml"), text.replace("[job.dr]\n", "[job.dr]\nlimits = { read = \"256KiB/s\" }\n"))
        .expect("site");
    let mut run = room.command(["-c", "site.toml", "run", "dr"]).spawn().expect("run");
    let in_the_way = || site.json(&["failover", REPLICA, "-n"]).code == 11;
    let began = std::time::Instant::now();
    while !in_the_way() && began.elapsed().as_secs() < 20 {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    for more in [&["-n"][..], &["--no-start"]] {
        let busy = site.refused(&[&["failover", REPLICA][..], more].concat(), "E_BUSY");
        assert!(busy["do"].as_str().is_some_and(|help| help.ends_with("--cancel-job")), "{busy}");
    }
    site.does(&["failover", REPLICA, "--no-start", "--cancel-job"]);
    run.wait().expect("it ends");
}

#[test]
fn several_machines_take_over_by_one_plan_of_the_command_line() {
    let site = Site::new(1);
    let room = &site.room;
    let vda = with_a_second(&site);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x42 19M 64k", &vda]);
    room.ok(["backup", "db02", "--disk", &format!("vda={vda}"), "--machine", &room.text("prod/db02/machine.toml")]);
    let ran = site.json(&["run", "dr"]);
    assert!(ran.code <= 1, "{}", ran.stdout);
    // What only production has: a planned takeover loses none of it.
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x43 20M 64k", &vda]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x44 20M 64k", &site.production()]);

    let second = "db02_replica";
    let moved = site.json(&["failover", REPLICA, second, "--planned", "--no-start", "--network", "none"]);
    assert!(moved.code <= 1, "{}{}", moved.stdout, moved.stderr);
    let reports = moved.kind("replica");
    assert_eq!(reports.len(), 2, "{}", moved.stdout);
    for (replica, production) in [(REPLICA, site.production()), (second, vda)] {
        assert!(
            reports.iter().any(|report| report["replica"] == replica && report["state"] == "failover"),
            "{reports:?}"
        );
        let record = room.catalogue().replica::<ReplicaRecord>(replica).expect("read").expect("a replica").record;
        let top = room.path("dr").join(replica).join(&record.failover.expect("a takeover").tops[0].file);
        tool("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", top.to_str().expect("text"), &production]);
    }

    // What comes next is said of both, and the point is the one they stand on.
    let home = room.run(["-c", "site.toml", "failback", REPLICA, second, "--yes", "--network", "none"]);
    let next = format!("failback {REPLICA} {second} --switch now    # or undo");
    assert!(home.stderr.trim_end().ends_with(&next), "{}{}", home.stdout, home.stderr);
    assert!(home.stdout.contains(&format!("{second} is ready_to_switch, at the point ")), "{}", home.stdout);
}
