//! Promise: who waits for a guest is told so, and ends the wait with a word; what was cut short is never gone on with in
//! another way than it was asked for.

use std::{
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use aquifer_runner::{
    catalogue::{EventFilter, SessionId, SessionResult},
    host::{Host, qemu::Qemu},
};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    carrier::{Process, wait},
    harness::Outcome,
    takeover::{REPLICA, Site},
};

/// Longer than any test.
const GRACE: &str = "10m";

/// How long an end may take that somebody asked for.
const AT_ONCE: Duration = Duration::from_secs(30);

/// Begins a command that comes to wait for a guest which does not listen.
pub(crate) fn begins_to_wait(site: &Site, args: &[&str]) -> Process {
    let waits = |site: &Site| {
        let events = site.room.catalogue().events(0, &EventFilter::default()).expect("events");
        events.iter().filter(|record| record.event.op == "wait").count()
    };
    let before = waits(site);
    let mut command = site.room.command(["-c", "site.toml"].iter().chain(args));
    command.args(["--grace", GRACE, "--network", "none", "--json"]);
    let out = fs::File::create(site.room.path("said")).expect("a file");
    let process = Process(command.stdout(out).stderr(Stdio::null()).spawn().expect("a process"));
    wait("it waits for the guest", || waits(site) > before);
    process
}

/// What it has said, after its end.
fn ends(site: &Site, process: &mut Process) -> Outcome {
    let asked = Instant::now();
    let code = process.ends().unwrap_or(-1);
    assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
    let stdout = fs::read_to_string(site.room.path("said")).expect("what was said");
    Outcome { code, stdout, stderr: String::new() }
}

fn session_of(site: &Site) -> SessionId {
    let open = site.room.catalogue().open_work().expect("work");
    open.iter().find_map(|work| work.session).expect("a session")
}

#[test]
fn a_wait_for_a_guest_is_told_and_ends_with_a_signal_or_a_word() {
    let site = Site::new(1);
    site.start_production();
    site.does(&["failover", REPLICA, "--no-start"]);
    let home = ["failback", REPLICA, "--yes"];
    let on = |site: &Site| (site.state(), site.running("prod").is_some());

    let mut process = begins_to_wait(&site, &home);
    kill_process(Pid::from_child(&process.0), Signal::INT).expect("a signal");
    let said = ends(&site, &mut process);
    assert_eq!((said.code, said.one("error")["code"].as_str()), (130, Some("E_INTERRUPTED")), "{}", said.stdout);
    let told = said.kind("event").into_iter().find(|event| event["op"] == "wait").expect("it is told");
    let until = told["reason"].as_str().unwrap_or_default();
    assert!(until.starts_with("waiting for the guest to turn itself off, at most until 20"), "{told}");
    assert_eq!(on(&site), ("failover".to_owned(), true), "as if nothing had happened");

    // What was cut short is gone on with as it was begun, or not at all; who only looks is told the same.
    let cut = session_of(&site);
    let as_begun = [&home[..], &["--grace", GRACE, "--network", "none", "-n"]].concat();
    let foreseen = site.json(&as_begun);
    let goes_on = foreseen.one("goes_on");
    assert_eq!((foreseen.code, goes_on["session"].as_i64()), (0, Some(cut.0)), "{}", foreseen.stdout);
    assert!(goes_on["with"][0].as_str().is_some_and(|with| with.contains("--grace 10m")), "{goes_on}");
    assert!(foreseen.kind("plan").is_empty(), "nobody knows what it leads to: {}", foreseen.stdout);
    site.refused(&[&home[..], &["--grace", "1s", "--network", "none", "-n"]].concat(), "E_STATE");
    let other =
        site.refused(&["failback", REPLICA, "--yes", "--grace", "1s", "--network", "none", "--no-start"], "E_STATE");
    let what = other["what"].as_str().unwrap_or_default();
    assert!(what.contains(&format!("session {cut}")) && what.contains("--grace"), "{other}");
    assert!(what.contains("--no-start"), "{other}");
    assert!(other["do"].as_str().is_some_and(|help| help.contains(&format!("sessions {cut} --cancel"))), "{other}");
    assert_eq!(site.json(&["sessions", &cut.to_string(), "--cancel"]).code, 0);

    let mut process = begins_to_wait(&site, &home);
    assert_eq!(site.json(&["sessions", &session_of(&site).to_string(), "--cancel"]).code, 0);
    let said = ends(&site, &mut process);
    assert_eq!(said.code, 2, "{}", said.stdout);
    assert_eq!(on(&site), ("failover".to_owned(), true));

    // It is still asked to turn itself off, and does not listen: after the grace it is turned off.
    assert_eq!(site.does(&["failback", REPLICA, "--yes"])["state"], "ready_to_switch");
    assert!(site.running("prod").is_none());
}

#[test]
fn a_planned_takeover_and_a_graceful_fence_are_waited_for_no_longer_than_wanted() {
    let site = Site::new(1);
    site.start_production();
    for how in [["--planned", "--no-start"], ["--fence", "graceful"]] {
        let mut process = begins_to_wait(&site, &["failover", REPLICA, how[0], how[1]]);
        kill_process(Pid::from_child(&process.0), Signal::TERM).expect("a signal");
        assert_eq!(ends(&site, &mut process).code, 143);
        assert_eq!((site.state().as_str(), site.running("prod").is_some()), ("ready", true), "{how:?}");
        assert_eq!(site.json(&["sessions", &session_of(&site).to_string(), "--cancel"]).code, 0);
    }
    let done = site.does(&["failover", REPLICA, "--fence", "graceful", "--no-start"]);
    assert_eq!(done["state"], "failover");
    assert!(site.running("prod").is_none());
}

#[test]
fn what_was_killed_is_gone_on_with_only_as_it_was_asked_for() {
    let site = Site::new(1);
    site.start_production();
    site.does(&["failover", REPLICA, "--no-start"]);
    let process = begins_to_wait(&site, &["failback", REPLICA, "--switch", "now", "--yes"]);
    assert!(process.kill());
    let begun = session_of(&site);
    let short = ["failback", REPLICA, "--switch", "now", "--yes", "--grace", "1s", "--network", "none", "--no-start"];
    let refused = site.refused(&short, "E_STATE");
    assert!(refused["what"].as_str().is_some_and(|what| what.contains("--grace 10m")), "{refused}");
    assert_eq!(site.json(&["sessions", &begun.to_string(), "--cancel"]).code, 0);
    let done = site.json(&short);
    assert!(done.code <= 1, "{}", done.stdout);
    assert_eq!(done.one("replica")["state"], "failback");
    let warned = done.kind("warning").into_iter().find(|warning| warning["code"] == "W_TAKEN_BACK");
    assert!(warned.is_some(), "with its own code: {}", done.stdout);
    assert!(site.running("prod").is_none(), "it was not to be started");
}

#[test]
fn a_run_of_a_plan_that_was_killed_is_gone_on_with_only_as_it_was_asked_for() {
    let site = Site::new(1);
    site.start_production();
    let path = site.room.path("site.toml");
    let text =
        fs::read_to_string(&path).expect("a site file").replace("[plan.all]\n", "[plan.all]\nfence = \"graceful\"\n");
    fs::write(&path, text).expect("a site file");
    let process = begins_to_wait(&site, &["plan", "run", "all"]);
    assert!(process.kill());
    let begun = site.room.catalogue().open_work().expect("work").into_iter().find(|work| work.object == "plan/all");
    let begun = begun.and_then(|work| work.session).expect("a session");

    let other = ["--grace", "1s", "--network", "none"];
    for way in [&["plan", "run", "all"][..], &["failover", "--plan", "all"], &["plan", "resume", "all"]] {
        for look in [&[][..], &["-n"]] {
            let refused = site.refused(&[way, &other, look].concat(), "E_STATE");
            let what = refused["what"].as_str().unwrap_or_default();
            assert!(what.contains(&format!("session {begun} was told --grace 10m")), "{refused}");
            assert!(refused["do"].as_str().is_some_and(|help| help.contains("--cancel")), "{refused}");
        }
    }
    let other = ["--grace", GRACE, "--network", "none", "--to", "latest~1"];
    site.refused(&[&["plan", "run", "all"][..], &other].concat(), "E_STATE");

    let same = ["plan", "run", "all", "--grace", GRACE, "--network", "none"];
    let foreseen = site.json(&[&same[..], &["-n"]].concat());
    assert_eq!((foreseen.code, foreseen.one("goes_on")["session"].as_i64()), (0, Some(begun.0)), "{}", foreseen.stdout);
    // Who says only that it goes on need not say how; a machine that has ended is waited for no more.
    let foreseen = site.json(&["plan", "resume", "all", "-n"]);
    assert_eq!((foreseen.code, foreseen.one("goes_on")["session"].as_i64()), (0, Some(begun.0)), "{}", foreseen.stdout);
    Qemu.power_off(&site.running("prod").expect("it runs")).expect("it ends");
    let done = site.json(&same);
    assert_eq!((done.code, done.one("plan")["state"].as_str()), (1, Some("completed")), "{}", done.stdout);
    assert!(done.kind("warning").iter().any(|warning| warning["code"] == "W_RESUMED"), "{}", done.stdout);
    assert!(site.running("dr").is_some());
}

#[test]
fn a_way_home_that_was_killed_is_taken_back_from_where_it_is() {
    let site = Site::new(1);
    site.start_production();
    site.does(&["failover", REPLICA, "--no-start"]);
    let process = begins_to_wait(&site, &["failback", REPLICA, "--switch", "now", "--yes"]);
    assert!(process.kill());
    let begun = session_of(&site);
    let undo = ["undo", REPLICA, "--network", "none"];
    let foreseen = site.json(&[&undo[..], &["-n"]].concat());
    let plan = foreseen.one("plan");
    assert_eq!((plan["from"].as_str(), plan["to"].as_str()), (Some("failover"), Some("failover")), "{plan}");
    assert!(plan["loss"].is_null() && foreseen.kind("goes_on").is_empty(), "{}", foreseen.stdout);
    assert_eq!(site.room.catalogue().session(begun).expect("a session").ended, None, "who only looks changes nothing");

    let undone = site.json(&undo);
    assert!(undone.code <= 1, "{}", undone.stdout);
    assert_eq!(undone.one("replica")["state"], "failover");
    assert!(site.running("prod").is_some(), "nobody has waited for its guest, or turned it off");
    let session = site.room.catalogue().session(begun).expect("a session");
    assert!(session.ended.is_some() && session.result == SessionResult::Cancelled, "{session:?}");
    assert!(site.room.catalogue().open_operations().expect("operations").is_empty());
    assert_eq!(site.does(&["undo", REPLICA, "--yes"])["state"], "ready", "the takeover is a step of its own");
}

#[test]
fn an_undo_that_was_killed_takes_the_word_that_was_missing() {
    let site = Site::new(1);
    site.does(&["failover", REPLICA]);
    let running = site.running("dr").expect("it runs");
    let pid = Pid::from_raw(i32::try_from(running.process.pid).expect("a number")).expect("a process");
    // It hears nothing: whoever turns it off waits.
    kill_process(pid, Signal::STOP).expect("a signal");
    let open = |site: &Site| site.room.catalogue().open_operations().expect("operations").len();
    let undo = ["-c", "site.toml", "undo", REPLICA, "--yes", "--network", "none"];
    let process = Process::start(site.room.command(undo));
    wait("it has begun", || open(&site) > 0);
    assert!(process.kill());
    let begun = session_of(&site);
    let force = ["undo", REPLICA, "--force", "--yes", "--network", "none"];
    let foreseen = site.json(&[&force[..], &["-n"]].concat());
    assert_eq!((foreseen.code, foreseen.one("goes_on")["session"].as_i64()), (0, Some(begun.0)), "{}", foreseen.stdout);
    let done = site.json(&force);
    assert!(done.code <= 1, "{}", done.stdout);
    assert_eq!(done.one("replica")["state"], "ready");
    assert!(site.record().needs_resync, "it was taken: its machine may have gone on");
}
