//! Three workers on one catalogue doing real backups: one is killed, one stands still past its lease and wakes up.
//! Every machine has exactly one point, and each holds what its disk holds, also where a worker dies after its point and
//! before its word of it.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use aquifer_runner::catalogue::{Catalogue, Event, EventFilter, SessionId, SessionResult, Url, Work, WorkState};
use aquifer_tests::{postgres::Database, rng::Rng, site::Site};
use rustix::process::{Pid, Signal, kill_process};

const LEASE: Duration = Duration::from_secs(2);
const MACHINES: usize = 5;
/// More than one piece that is read at once, so that the rate is felt in the middle.
const BYTES: usize = 6 << 20;

struct Worker(Child);

impl Worker {
    fn start(site: &Site, name: &str) -> Self {
        let args = ["-c", &site.word("site.toml"), "worker", "--until-idle", "--tasks", "1", "--lease", "2s"];
        let mut command = site.command(&args);
        let said = fs::File::create(site.path(name)).expect("a file");
        Self(command.stdout(Stdio::null()).stderr(said).spawn().expect("a worker"))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).expect("a signal");
    }

    /// Stops it, not in the middle of a write: whoever is stopped there holds up a whole SQLite file.
    fn pause(&self, catalogue: &Catalogue) {
        self.signal(Signal::STOP);
        while catalogue.event(&Event { object: "test".into(), op: "probe".into(), ..Event::default() }).is_err() {
            self.signal(Signal::CONT);
            thread::sleep(Duration::from_millis(7));
            self.signal(Signal::STOP);
        }
    }

    /// The piece of work it has in hand.
    fn has(&self, catalogue: &Catalogue) -> Option<Work> {
        let mine = format!(":{}:", self.0.id());
        let work = catalogue.open_work().expect("work").into_iter();
        work.filter(|w| w.state == WorkState::Running).find(|w| w.owner.as_ref().is_some_and(|o| o.contains(&mine)))
    }

    fn ends(&mut self) -> std::process::ExitStatus {
        let until = Instant::now() + Duration::from_secs(90);
        loop {
            if let Some(status) = self.0.try_wait().expect("a status") {
                return status;
            }
            assert!(Instant::now() < until, "the worker does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A site with images of some machines, and a job that backs all of them up, slowly.
fn site(url: &Url) -> Site {
    let site = Site::new();
    let (mut machines, mut names) = (String::new(), Vec::new());
    for number in 0..MACHINES {
        let mut dice = Rng::new(number as u64);
        let bytes: Vec<u8> = (0..BYTES / 8).flat_map(|_| dice.next_u64().to_le_bytes()).collect();
        fs::write(site.path(&format!("m{number}.raw")), bytes).expect("an image");
        machines +=
            &format!("m{number} = {{ disks = {{ vda = \"raw:{}\" }} }}\n", site.word(&format!("m{number}.raw")));
        names.push(format!("\"m{number}\""));
    }
    let text = format!(
        "version = 1\n[catalogue]\nurl = \"{url}\"\n[repository]\nnas = {{ url = \"{}\", max_tasks = 6 }}\n[machine]\n{machines}\
         [job.all]\nkind = \"backup\"\nmachines = [{}]\nto = \"nas\"\nlimits = {{ read = \"2MiB/s\" }}\n",
        site.word("repo"),
        names.join(", ")
    );
    fs::write(site.path("site.toml"), text).expect("a site file");
    site.json(&["init"]);
    site
}

fn backups_go_on_when_a_worker_is_killed_and_one_stands_still(url: &Url) {
    let site = site(url);
    let begun = site.json(&["-c", &site.word("site.toml"), "run", "all", "--no-wait"]).record("session");
    let session = SessionId(begun["id"].as_i64().expect("a number"));
    let catalogue = Catalogue::open_with_lease(url, LEASE).expect("open");
    let mut workers = ["killed", "paused", "steady"].map(|name| Worker::start(&site, name));
    let until = Instant::now() + Duration::from_secs(60);
    while !workers.iter().all(|worker| worker.has(&catalogue).is_some()) {
        assert!(Instant::now() < until, "not all of them are at work: {:?}", catalogue.open_work());
        thread::sleep(Duration::from_millis(10));
    }
    let [killed, paused, steady] = &mut workers;
    killed.signal(Signal::KILL);
    killed.ends();
    let lost = loop {
        paused.pause(&catalogue);
        if let Some(work) = paused.has(&catalogue) {
            break work;
        }
        // Between two pieces of work.
        assert!(Instant::now() < until, "it has no work: {:?}", catalogue.open_work());
        paused.signal(Signal::CONT);
        thread::sleep(Duration::from_millis(20));
    };
    // Somebody else has it, in the end, while the one that stands still holds its files open.
    let until = Instant::now() + Duration::from_secs(60);
    while catalogue.work(lost.id).expect("work").epoch == lost.epoch {
        assert!(Instant::now() < until, "nobody takes over");
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(Duration::from_millis(500));
    paused.signal(Signal::CONT);
    for (worker, name) in [(steady, "steady"), (paused, "paused")] {
        let ended = worker.ends();
        assert!(
            ended.code().is_some_and(|code| code <= 1),
            "{name}: {ended}: {}",
            fs::read_to_string(site.path(name)).expect("text")
        );
    }
    let ended = catalogue.session(session).expect("session");
    assert_eq!(ended.result, SessionResult::Success, "{ended:?} {:?}", catalogue.work_of(session));
    for work in catalogue.work_of(session).expect("work") {
        assert_eq!(work.state, WorkState::Success, "{work:?}");
    }
    let events = catalogue.events(0, &EventFilter::default()).expect("events");
    let takeovers = events.iter().filter(|record| record.event.op == "takeover").count();
    assert!(takeovers >= 2, "of the one that was killed, and of the one that stood still: {takeovers}");
    for number in 0..MACHINES {
        let name = format!("m{number}");
        let points = site.json(&["points", &name]).records("point");
        let states: Vec<&str> = points.iter().filter_map(|point| point["state"].as_str()).collect();
        assert_eq!(states, ["complete"], "{name}: {points:?}");
        let out = site.word("out.raw");
        let _ = fs::remove_file(&out);
        site.json(&["export", &format!("{name}@latest:vda"), &out]);
        let same = fs::read(&out).expect("read") == fs::read(site.path(&format!("{name}.raw"))).expect("read");
        assert!(same, "{name} is another");
    }
    // What the one that stood still had written goes with the next run's clearing, and stands in nobody's way.
    let again = site.run(&["-c", &site.word("site.toml"), "run", "all"]);
    assert_eq!(again.code, 0, "{again:#?}");
}

/// Kills whoever has just made the point, before it can say so.
fn a_worker_that_dies_before_its_word_makes_no_second_point(url: &Url) {
    let site = site(url);
    let post = site.path("post");
    // The worker is the program's parent; the first time only.
    fs::write(&post, "#!/bin/sh\nmkdir \"$0.$AQUIFER_MACHINE\" 2>/dev/null && kill -9 $PPID\nexit 0\n")
        .expect("a program");
    fs::set_permissions(&post, fs::Permissions::from_mode(0o755)).expect("a program");
    let text = fs::read_to_string(site.path("site.toml")).expect("the site file");
    fs::write(site.path("site.toml"), format!("{text}scripts = {{ post = \"{}\" }}\n", site.word("post")))
        .expect("the site file");
    let text = fs::read_to_string(site.path("site.toml")).expect("the site file");
    fs::write(site.path("site.toml"), text.replace("limits = { read = \"2MiB/s\" }\n", "")).expect("the site file");
    let begun = site.json(&["-c", &site.word("site.toml"), "run", "all", "--no-wait"]).record("session");
    let session = SessionId(begun["id"].as_i64().expect("a number"));
    let mut killed = 0;
    while Worker::start(&site, "worker").ends().signal() == Some(9) {
        killed += 1;
    }
    assert_eq!(killed, MACHINES, "{:?}", fs::read_to_string(site.path("worker")));
    let catalogue = Catalogue::open_with_lease(url, LEASE).expect("open");
    let ended = catalogue.session(session).expect("session");
    assert!(matches!(ended.result, SessionResult::Success | SessionResult::Warning), "{ended:?}");
    for number in 0..MACHINES {
        let points = site.json(&["points", &format!("m{number}")]).records("point");
        assert_eq!(points.len(), 1, "m{number}: {points:?}");
        assert_eq!(points[0]["state"], "complete", "m{number}");
    }
    // Other work makes another point.
    let again = site.run(&["-c", &site.word("site.toml"), "run", "all"]);
    assert_eq!(again.code, 0, "{again:#?}");
    assert_eq!(site.json(&["points", "m0"]).records("point").len(), 2);
}

#[test]
fn whoever_dies_before_its_word_on_sqlite() {
    let dir = tempfile::tempdir().expect("a folder");
    a_worker_that_dies_before_its_word_makes_no_second_point(&Url::Sqlite(dir.path().join("catalogue.db")));
}

#[test]
fn whoever_dies_before_its_word_on_postgres() {
    a_worker_that_dies_before_its_word_makes_no_second_point(&Database::make().url());
}

#[test]
fn on_sqlite() {
    let dir = tempfile::tempdir().expect("a folder");
    backups_go_on_when_a_worker_is_killed_and_one_stands_still(&Url::Sqlite(dir.path().join("catalogue.db")));
}

#[test]
fn on_postgres() {
    backups_go_on_when_a_worker_is_killed_and_one_stands_still(&Database::make().url());
}
