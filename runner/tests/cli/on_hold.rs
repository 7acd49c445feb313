//! Promise: a machine whose replica is held holds up no other machine of its job; what stands, and what the site file asks
//! for, is told once; a run begins where a point is new, not where one is called otherwise.

use std::{fs, thread, time::Duration};

use aquifer_runner::catalogue::{self, NewWork};
use jiff::Timestamp;
use serde_json::Value;

use crate::{
    carrier::{Process, wait},
    harness::{Outcome, Room},
    replication,
    takeover::{REPLICA, Site},
    takeover_waits::begins_to_wait,
};

/// Sessions of a job that have ended.
fn ended(room: &Room, job: &str) -> Vec<Value> {
    let mut all = room.json(["-c", "site.toml", "sessions"]).kind("session");
    all.retain(|session| session["job"] == job && !session["ended"].is_null());
    all
}

fn back_up(room: &Room, repo: &str, machine: &str, image: &str) {
    let disk = format!("vda=raw:{}", room.text(image));
    let repo = room.text(repo);
    let made = Outcome::of(room.command(["-r", &repo, "backup", machine, "--disk", &disk]).output().expect("backup"));
    assert!(made.code <= 1, "{}{}", made.stdout, made.stderr);
}

fn codes(outcome: &Outcome) -> Vec<String> {
    outcome.kind("warning").iter().filter_map(|warning| warning["code"].as_str().map(str::to_owned)).collect()
}

#[test]
fn a_replica_that_waits_for_its_guest_is_passed_over_and_the_other_machines_go_on() {
    let site = Site::new(1);
    let path = site.room.path("site.toml");
    let text = fs::read_to_string(&path).expect("a site file");
    let image = site.room.path("other.raw");
    fs::write(&image, vec![1; 1 << 20]).expect("an image");
    let other = format!("[machine]\ndb02 = {{ disks = {{ vda = \"raw:{}\" }} }}\n", image.display());
    let text = text.replace("[machine]\n", &other);
    let of_dr = "kind = \"replication\"\nmachines = [\"db01\"";
    assert!(text.contains(of_dr), "{text}");
    fs::write(&path, text.replace(of_dr, &format!("{of_dr}, \"db02\""))).expect("a site file");

    site.start_production();
    site.does(&["failover", REPLICA, "--no-start"]);
    let waits = begins_to_wait(&site, &["failback", REPLICA, "--yes"]);
    let _serve = Process::start(site.room.command(["-c", "site.toml", "serve"]));
    for round in 1..=3u8 {
        fs::write(&image, vec![round; 1 << 20]).expect("an image");
        back_up(&site.room, "repo", "db02", "other.raw");
        wait("the other machine is not replicated", || {
            site.json(&["replicas", "db02_replica"]).kind("point").len() == usize::from(round)
        });
        wait("the run does not end", || ended(&site.room, "dr").len() == usize::from(round));
    }
    let sessions = ended(&site.room, "dr");
    let results: Vec<_> = sessions.iter().map(|session| session["result"].clone()).collect();
    assert_eq!(results, ["warning", "success", "success"], "told once: {sessions:?}");
    let reason = sessions[0]["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("W_ON_HOLD: db01_replica is on hold: failback, session"), "{reason}");
    assert!(waits.kill());
}

#[test]
fn no_run_of_a_job_goes_on_with_an_operation_that_was_cut_short() {
    let site = Site::new(1);
    site.start_production();
    site.does(&["failover", REPLICA, "--no-start"]);
    assert!(begins_to_wait(&site, &["failback", REPLICA, "--yes"]).kill());
    let ran = site.json(&["run", "dr"]);
    assert_eq!(ran.code, 1, "{}", ran.stdout);
    let reason = ran.one("session")["reason"].to_string();
    assert!(reason.contains("W_ON_HOLD") && reason.contains("failback, session"), "{reason}");
    assert_eq!((site.state().as_str(), site.running("prod").is_some()), ("failover", true), "as it was left");
    let open = site.room.catalogue().open_work().expect("work");
    let session = open.iter().find_map(|work| work.session).expect("the way home").to_string();
    assert_eq!(site.json(&["sessions", &session, "--cancel"]).code, 0);
    assert!(site.json(&["run", "dr"]).code <= 1);
    assert_eq!(
        (site.state().as_str(), site.running("prod").is_some()),
        ("failover", true),
        "nor when it was cancelled"
    );
}

#[test]
fn no_run_of_a_job_ends_a_takeover_whose_work_was_cancelled() {
    let site = Site::new(1);
    let catalogue = site.room.catalogue();
    // As a command leaves it that is killed in its last step, and whose session somebody cancels then.
    let object = format!("replica/{REPLICA}");
    catalogue.enqueue(&NewWork::new("test", object.as_str(), 900, Value::Null)).expect("work");
    let (_, fence) = catalogue.claim("somebody", &["test"], Timestamp::now()).expect("claim").expect("the work");
    catalogue.begin_operation(&fence, &object, "failover", &Value::Null).expect("begun");
    catalogue.finish(&fence, &catalogue::Outcome::Cancelled, None).expect("cancelled");
    let points = site.json(&["replicas", REPLICA]).kind("point").len();
    let ran = site.json(&["run", "dr"]);
    let reason = ran.one("session")["reason"].to_string();
    assert!(ran.code == 1 && reason.contains("its failover was cut short"), "{}", ran.stdout);
    assert_eq!(site.json(&["replicas", REPLICA]).kind("point").len(), points);
    assert_eq!(catalogue.open_operations().expect("operations").len(), 1, "it is as it was left");
}

#[test]
fn a_machine_on_hold_is_told_once_for_each_change() {
    let site = Site::new(1);
    let held = |what: &str| {
        let first = site.json(&["run", "dr"]);
        assert!(first.code == 1 && codes(&first).contains(&"W_ON_HOLD".to_owned()), "{what}: {}", first.stdout);
        for _ in 0..2 {
            let again = site.json(&["run", "dr", "--strict"]);
            assert_eq!((again.code, codes(&again)), (0, Vec::new()), "{what}: {}", again.stdout);
            assert!(again.one("session")["reason"].to_string().contains("is on hold"), "it is shown: {}", again.stdout);
        }
    };
    site.does(&["failover", REPLICA, "--no-start"]);
    held("failover");
    site.does(&["permanent", REPLICA, "--yes"]);
    held("permanent_failover");
}

#[test]
fn a_machine_that_was_renamed_in_the_site_file_is_told_of_the_points_it_had() {
    let job = "[job.b]\nkind = \"backup\"\nmachines = [\"db01\"]\nto = \"r1\"";
    let site = replication::Site::new(job);
    let told = |ran: &Outcome| ran.stdout.contains("the points of db01 there are of no machine of the site file");
    let check = || site.room.run(["-c", "site.toml", "config", "check"]).stderr;
    assert_eq!(site.json(&["run", "b"]).code, 0);
    assert!(!check().contains("of no machine"), "{}", check());
    site.rewrite("db01", "db02");
    assert!(check().contains("db02 begins a chain of its own in r1; the points of db01 there are"), "{}", check());
    let ran = site.json(&["run", "b"]);
    assert!(ran.code == 0 && told(&ran), "{}", ran.stdout);
    let again = site.json(&["run", "b"]);
    assert!(again.code == 0 && !told(&again), "{}", again.stdout);
    assert!(!check().contains("of no machine"), "{}", check());
}

#[test]
fn a_copy_of_a_point_is_no_new_point_and_a_machine_without_one_is_no_warning() {
    let site = replication::Site::new(
        "schedule = { on_new_point = true }\n[job.away]\nkind = \"copy\"\nmachines = [\"db01\"]\nfrom = [\"r1\"]\n\
         to = \"r2\"\nmode = \"immediate\"",
    );
    let image = site.room.text("prod/other.raw");
    fs::write(&image, vec![3; 1 << 20]).expect("an image");
    site.rewrite("[machine]\n", &format!("[machine]\ndb02 = {{ disks = {{ vda = \"raw:{image}\" }} }}\n"));
    site.rewrite(
        "kind = \"replication\"\nmachines = [\"db01\"]",
        "kind = \"replication\"\nmachines = [\"db01\", \"db02\"]",
    );
    site.back_up("r1", false);
    back_up(&site.room, "r1", "db02", "prod/other.raw");
    let _serve = Process::start(site.room.command(["-c", "site.toml", "serve"]));
    let runs = || ended(&site.room, "dr");
    wait("the points begin no run", || runs().len() == 1);
    assert!(site.json(&["run", "away"]).code <= 1);
    thread::sleep(Duration::from_secs(4));
    assert_eq!(runs().len(), 1, "{:?}", runs());
    // A point of one machine begins a run; the other one has none, and nobody expects one.
    site.back_up("r1", false);
    wait("the point begins no run", || runs().len() == 2);
    let results: Vec<_> = runs().iter().map(|session| session["result"].clone()).collect();
    assert_eq!(results, ["success", "success"], "{:?}", runs());
    let jobs = site.room.ok(["-c", "site.toml", "jobs"]).stdout;
    assert!(jobs.contains("at each new point") && jobs.contains("by hand only"), "{jobs}");
}
