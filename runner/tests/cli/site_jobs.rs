//! Promise: jobs of a site file are run, served, listed, paused and stopped from the command line; who only looks
//! leaves no trace; a catalogue that cannot be used is one clear error.

use std::{
    fs,
    io::{BufRead, BufReader},
    process::Stdio,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    carrier::Process,
    harness::{Outcome, Room},
};

/// A room with a repository, an image of a machine and a site file with jobs.
fn site(schedule: &str, more: &str) -> Room {
    let room = Room::new();
    room.ok(["init"]);
    let mut image = vec![0u8; 3 << 20];
    image[70_000..90_000].fill(7);
    fs::write(room.path("files.raw"), image).expect("an image");
    let text = format!(
        "version = 1\n{more}\n[repository]\nnas = {{ url = \"{}\" }}\n[machine]\nfiles = {{ disks = {{ vda = \"raw:{}\" }} }}\n\
         [job.night]\nkind = \"backup\"\nmachines = [\"files\"]\nto = \"nas\"\n{schedule}\n\
         retry = {{ count = 1, interval = \"1s\" }}\n[job.check]\nkind = \"health\"\nrepository = \"nas\"\nschedule = {{ after = \"night\" }}\n",
        room.text("repo"),
        room.text("files.raw"),
    );
    fs::write(room.path("site.toml"), text).expect("a site file");
    room
}

fn with<'a>(args: &[&'a str]) -> Vec<&'a str> {
    ["-c", "site.toml"].iter().chain(args).copied().collect()
}

#[test]
fn whoever_looks_leaves_no_trace() {
    let room = site("schedule = { daily = \"03:00\" }", "");
    let jobs = room.json(with(&["jobs"]));
    assert_eq!(jobs.code, 0, "{}", jobs.stdout);
    let names: Vec<Value> = jobs.kind("job").into_iter().map(|job| job["name"].clone()).collect();
    assert_eq!(names, ["check", "night"]);
    assert_eq!(room.json(with(&["sessions"])).code, 0);
    assert_eq!(room.json(with(&["events"])).code, 0);
    let planned = room.json(with(&["run", "night", "-n"]));
    assert_eq!(planned.code, 0, "{}", planned.stdout);
    assert!(!planned.kind("step").is_empty(), "{}", planned.stdout);
    assert_eq!(room.json(with(&["jobs", "night", "--pause", "-n"])).code, 0);
    assert!(!room.path("home/catalogue.db").exists(), "somebody who only looked made a catalogue");
    let unknown = room.json(with(&["run", "nihgt"]));
    assert_eq!((unknown.code, unknown.one("error")["code"].as_str()), (2, Some("E_NOT_FOUND")));
    assert_eq!(room.json(with(&["sessions", "7"])).code, 2);
    assert_eq!(room.json(with(&["sessions", "--cancel"])).code, 4, "which session?");
}

#[test]
fn a_schedule_is_paused_and_goes_on() {
    let room = site("schedule = { daily = \"03:00\" }", "");
    let paused = |room: &Room| room.json(with(&["jobs", "night"])).one("job")["paused"].clone();
    assert_eq!(paused(&room), false);
    room.ok(with(&["jobs", "night", "--pause"]));
    assert_eq!(paused(&room), true);
    room.ok(with(&["jobs", "night", "--resume"]));
    assert_eq!(paused(&room), false);
    let events = room.json(with(&["events", "--object", "job/night"])).kind("transition");
    let ops: Vec<&str> = events.iter().filter_map(|e| e["op"].as_str()).collect();
    assert_eq!(ops, ["pause", "resume"]);
}

#[test]
fn work_is_begun_stopped_and_shown() {
    let room = site("", "");
    let begun = room.json(with(&["run", "night", "--no-wait", "--reason", "before the upgrade"]));
    let session = begun.one("session");
    assert_eq!((session["id"].as_i64(), session["state"].as_str()), (Some(1), Some("waiting")), "{session}");
    let again = room.json(with(&["run", "night", "--no-wait"]));
    assert_eq!(again.one("session")["id"], 1, "the open run goes on instead of a second one");
    let foreseen = room.json(with(&["run", "night", "-n"]));
    assert_eq!((foreseen.code, &foreseen.one("goes_on")["session"]), (0, &1.into()), "{}", foreseen.stdout);
    assert!(!foreseen.kind("step").is_empty(), "and what is left of it: {}", foreseen.stdout);
    room.ok(with(&["sessions", "1", "--pause"]));
    let held = room.json(with(&["run", "night", "-n"]));
    assert_eq!((held.code, held.one("error")["code"].as_str()), (11, Some("E_BUSY")), "as the run is: {}", held.stdout);
    assert_eq!(room.json(with(&["run", "night"])).code, 11);
    room.ok(with(&["sessions", "1", "--resume"]));
    assert_eq!(room.json(with(&["sessions", "1", "--cancel", "-n"])).code, 0);
    assert_eq!(room.json(with(&["sessions", "1"])).one("session")["wish"], "run");
    let cancelled = room.json(with(&["sessions", "1", "--cancel"]));
    assert_eq!(cancelled.one("session")["result"], "cancelled", "{}", cancelled.stdout);
    assert_eq!(cancelled.one("work")["state"], "cancelled");
    let twice = room.json(with(&["sessions", "1", "--cancel"]));
    assert_eq!((twice.code, twice.one("error")["code"].as_str()), (3, Some("E_STATE")));
    let last = room.json(with(&["jobs", "night"])).one("job");
    assert_eq!(last["last_result"], "cancelled");
    assert!(room.json(with(&["run", "night", "-n"])).kind("goes_on").is_empty(), "it has ended");
    let events = room.json(with(&["events", "1"])).kind("transition");
    assert!(events.len() >= 4 && events.iter().all(|e| e["session"] == 1), "{events:?}");
}

#[test]
fn a_catalogue_that_cannot_be_used_is_one_error() {
    let room = site("", "");
    let catalogue = room.path("home/catalogue.db");
    fs::create_dir_all(room.path("home")).expect("home");
    for (content, code, exit) in [("not a database, but long enough to look at\n", "E_REFUSED", 3)] {
        fs::write(&catalogue, content).expect("a file");
        for verb in [&["jobs"][..], &["sessions"], &["run", "night"], &["serve"], &["worker", "--until-idle"]] {
            let outcome = room.json(with(verb));
            assert_eq!(
                (outcome.code, outcome.one("error")["code"].as_str()),
                (exit, Some(code)),
                "{verb:?}: {}",
                outcome.stdout
            );
        }
        assert_eq!(fs::read_to_string(&catalogue).expect("the file"), content, "it was changed");
    }
    let room = site("", "[catalogue]\nurl = \"postgres://nobody@127.0.0.1:1/aquifer\"\n");
    let outcome = room.json(with(&["jobs"]));
    assert_eq!((outcome.code, outcome.one("error")["code"].as_str()), (13, Some("E_NET")), "{}", outcome.stdout);
}

#[test]
fn serve_begins_runs_and_stops_in_order() {
    let room = site("schedule = { continuous = true }", "");
    let mut command = room.command(with(&["serve", "--json"]));
    let mut serve = Process(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("serve"));
    let mut lines = BufReader::new(serve.0.stdout.take().expect("stdout")).lines();
    let until = Instant::now() + Duration::from_secs(60);
    let mut seen = Vec::new();
    while !seen.iter().any(|e: &Value| e["op"] == "claim") {
        assert!(Instant::now() < until, "{seen:?}");
        let line = lines.next().expect("it goes on").expect("utf-8");
        seen.push(serde_json::from_str(&line).expect("json"));
    }
    assert_eq!(seen[0]["type"], "serving");
    let id = rustix::process::Pid::from_child(&serve.0);
    rustix::process::kill_process(id, rustix::process::Signal::TERM).expect("a signal");
    let rest: Vec<String> = lines.map(|line| line.expect("utf-8")).collect();
    let last: Value = serde_json::from_str(rest.last().expect("a last line")).expect("json");
    assert_eq!((last["type"].as_str(), last["exit"].as_i64()), (Some("done"), Some(0)), "{rest:?}");
    assert_eq!(serve.0.wait().expect("a status").code(), Some(0));
    // Nothing is left in anybody's hands.
    let open: Outcome = room.json(with(&["sessions", "--open"]));
    for session in open.kind("session") {
        let id = session["id"].to_string();
        for work in room.json(with(&["sessions", &id])).kind("work") {
            assert_ne!(work["state"], "running", "{work}");
        }
    }
}
