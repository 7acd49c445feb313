//! Workers as processes on one catalogue: one that is killed is taken over, one that is paused past its lease wakes up
//! and can change nothing, and a catalogue survives the death of whoever writes into it.
//!
//! A worker here is this test program started once more, with the loop of `aquifer worker` and a body that counts.

use std::{
    collections::BTreeMap,
    env,
    os::unix::process::ExitStatusExt,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use aquifer_runner::{
    catalogue::{
        Catalogue, Event, EventFilter, EventRecord, NewRun, NewSession, NewWork, PointRow, Retries, SessionId,
        SessionResult, Trigger, Url, WorkState,
    },
    cli::Globals,
    context::Context,
    fail::Result,
    stop::Stop,
    tasks::{Done, Hands, Task, Worker},
};
use aquifer_tests::postgres::Database;
use jiff::Timestamp;
use serde_json::{Value, json};

const LEASE: Duration = Duration::from_secs(2);
/// Steps of a piece of work, each a durable effect.
const STEPS: u64 = 12;
const STEP: Duration = Duration::from_millis(60);

/// The worker's process: does nothing when the tests are run.
#[test]
fn process() {
    let Ok(url) = env::var("AQUIFER_TEST_WORKER") else { return };
    let owner = env::var("AQUIFER_TEST_OWNER").expect("an owner");
    let url: Url = url.parse().expect("a url");
    let catalogue = Catalogue::open_with_lease(&url, LEASE).expect("the catalogue");
    let context = Context::new(Globals::default(), "worker");
    let worker = Worker {
        context: &context,
        catalogue: &catalogue,
        owner,
        tasks: 1,
        only: None,
        until_idle: true,
        body: count,
        hands: Hands::default(),
    };
    worker.run(Stop::listen().expect("signals")).expect("the worker");
}

/// Stores a point for each step, and goes on with what an earlier attempt has stored.
fn count(task: &Task<'_>) -> Result<Done> {
    let stored = task.catalogue.points_of::<Value>(&task.work.object)?;
    for step in stored.len() as u64..STEPS {
        task.check()?;
        thread::sleep(STEP);
        let point = PointRow {
            id: format!("{step:03}"),
            revision: 0,
            taken_at: i64::try_from(step).expect("small"),
            state: "Complete".into(),
            record: json!({ "by": task.fence.owner, "epoch": task.fence.epoch }),
        };
        task.catalogue.put_point(task.fence, &task.work.object, &point)?;
        task.counts.done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
    Ok(Done::Success(json!({ "by": task.fence.owner })))
}

/// A worker process; killed when the test ends early.
struct Process(Child);

impl Process {
    fn start(url: &str, owner: &str) -> Self {
        let mut command = Command::new(env::current_exe().expect("this program"));
        command.args(["--exact", "workers::process", "--nocapture", "--test-threads=1"]);
        command.env("AQUIFER_TEST_WORKER", url).env("AQUIFER_TEST_OWNER", owner);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().expect("a worker"))
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let id = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(id, signal).expect("a signal");
    }

    /// Stops it, not in the middle of a write: whoever is stopped there holds up a whole SQLite file.
    fn pause(&self, catalogue: &Catalogue) {
        self.signal(rustix::process::Signal::STOP);
        while catalogue.event(&Event { object: "test".into(), op: "probe".into(), ..Event::default() }).is_err() {
            self.signal(rustix::process::Signal::CONT);
            thread::sleep(Duration::from_millis(7));
            self.signal(rustix::process::Signal::STOP);
        }
    }

    fn ends(&mut self) -> std::process::ExitStatus {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.0.try_wait().expect("a status") {
                return status;
            }
            assert!(Instant::now() < until, "the worker does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn begin(catalogue: &Catalogue, works: u32) -> SessionId {
    let work = (0..works).map(|i| NewWork {
        kind: "count".into(),
        object: format!("counter-{i}"),
        job: None,
        session: None,
        priority: 300,
        run_at: Timestamp::UNIX_EPOCH,
        needs: Vec::new(),
        retries: Retries::default(),
        spec: Value::Null,
    });
    let session =
        NewSession { kind: "count".into(), job: None, initiator: "test".into(), reason: None, retry_of: None };
    let run = NewRun { trigger: Trigger::Hand, session, work: work.collect() };
    catalogue.begin_run("counting", &run).expect("a run")
}

fn points(catalogue: &Catalogue, object: &str) -> usize {
    catalogue.points_of::<Value>(object).expect("points").len()
}

/// Waits until a worker is in the middle of its first piece of work, and says which.
fn in_the_middle(catalogue: &Catalogue, session: SessionId, owner: &str) -> String {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        for work in catalogue.work_of(session).expect("work") {
            let theirs = work.state == WorkState::Running && work.owner.as_deref() == Some(owner);
            if theirs && (2..6).contains(&points(catalogue, &work.object)) {
                return work.object;
            }
        }
        assert!(Instant::now() < until, "{owner} does not begin");
        thread::sleep(Duration::from_millis(5));
    }
}

fn all_events(catalogue: &Catalogue) -> Vec<EventRecord> {
    catalogue.events(0, &EventFilter::default()).expect("events")
}

/// Every piece of work was ended once, and every point of it was stored once, by whoever held it then.
fn judge(catalogue: &Catalogue, session: SessionId, works: usize) {
    let ended = catalogue.session(session).expect("session");
    assert_eq!(ended.result, SessionResult::Success, "{ended:?}");
    let mut finishes: BTreeMap<String, usize> = BTreeMap::new();
    for record in all_events(catalogue).into_iter().filter(|r| r.event.op == "finish") {
        *finishes.entry(record.event.object).or_default() += 1;
    }
    assert_eq!((finishes.len(), finishes.values().copied().max()), (works, Some(1)), "{finishes:?}");
    for work in catalogue.work_of(session).expect("work") {
        let points = catalogue.points_of::<Value>(&work.object).expect("points");
        assert_eq!(points.len() as u64, STEPS, "{}", work.object);
        assert!(points.iter().all(|p| p.revision == 1), "{}: a point was stored twice", work.object);
        let epochs: Vec<i64> = points.iter().filter_map(|p| p.record["epoch"].as_i64()).collect();
        assert!(epochs.is_sorted(), "{}: an older epoch came after a newer one: {epochs:?}", work.object);
    }
}

fn url_of(url: &Url) -> String {
    // As the worker is told it; a test's URL has no password.
    url.to_string()
}

fn a_paused_worker_changes_nothing(url: &Url) {
    let catalogue = Catalogue::open_with_lease(url, LEASE).expect("open");
    let session = begin(&catalogue, 1);
    let mut paused = Process::start(&url_of(url), "paused");
    let object = in_the_middle(&catalogue, session, "paused");
    paused.pause(&catalogue);
    let mut other = Process::start(&url_of(url), "other");
    // The other waits for the lease, then takes over and goes on from what is stored.
    let until = Instant::now() + Duration::from_secs(60);
    while catalogue.work_of(session).expect("work").iter().all(|w| w.owner.as_deref() != Some("other")) {
        assert!(Instant::now() < until, "nobody takes over");
        thread::sleep(Duration::from_millis(5));
    }
    // It wakes while the other is at work, in the middle of its own step.
    paused.signal(rustix::process::Signal::CONT);
    assert!(other.ends().success());
    assert!(paused.ends().success(), "a worker that lost its work goes on with other work");
    judge(&catalogue, session, 1);
    let events = all_events(&catalogue);
    let takeover = events.iter().position(|r| r.event.op == "takeover").expect("a takeover");
    let late = events[takeover..].iter().find(|r| r.event.user == "paused" && r.event.object.starts_with("work/"));
    assert!(late.is_none(), "the paused worker left {late:?}");
    let by: Vec<String> = catalogue
        .points_of::<Value>(&object)
        .expect("points")
        .iter()
        .map(|p| p.record["by"].as_str().unwrap_or_default().to_owned())
        .collect();
    let first_of_other = by.iter().position(|b| b == "other").expect("the other did something");
    assert!(by[first_of_other..].iter().all(|b| b == "other"), "the paused worker wrote after the takeover: {by:?}");
}

fn three_workers_lose_one_and_pause_one(url: &Url) {
    let catalogue = Catalogue::open_with_lease(url, LEASE).expect("open");
    let works = 8;
    let session = begin(&catalogue, works);
    let mut killed = Process::start(&url_of(url), "killed");
    let mut paused = Process::start(&url_of(url), "paused");
    let mut steady = Process::start(&url_of(url), "steady");
    in_the_middle(&catalogue, session, "killed");
    killed.signal(rustix::process::Signal::KILL);
    assert_eq!(killed.ends().signal(), Some(9));
    in_the_middle(&catalogue, session, "paused");
    paused.pause(&catalogue);
    thread::sleep(LEASE + Duration::from_millis(700));
    paused.signal(rustix::process::Signal::CONT);
    assert!(steady.ends().success() && paused.ends().success());
    judge(&catalogue, session, works as usize);
    let takeovers = all_events(&catalogue).into_iter().filter(|r| r.event.op == "takeover").count();
    assert!(takeovers >= 1, "nothing was taken over");
}

fn an_orderly_stop_gives_work_back(url: &Url) {
    let catalogue = Catalogue::open_with_lease(url, LEASE).expect("open");
    let session = begin(&catalogue, 1);
    let mut first = Process::start(&url_of(url), "first");
    let object = in_the_middle(&catalogue, session, "first");
    let began = Instant::now();
    first.signal(rustix::process::Signal::TERM);
    assert!(first.ends().success());
    let work = catalogue.work_of(session).expect("work").remove(0);
    assert_eq!(work.state, WorkState::Ready, "given back, not lost");
    assert!(began.elapsed() < LEASE * 4, "{:?}", began.elapsed());
    let stored = points(&catalogue, &object);
    assert!(stored < STEPS as usize, "it was not in the middle");
    assert!(Process::start(&url_of(url), "second").ends().success());
    judge(&catalogue, session, 1);
    let points = catalogue.points_of::<Value>(&object).expect("points");
    assert_eq!(points.iter().filter(|p| p.record["by"] == "first").count(), stored, "it went on from there");
}

/// Kills whoever writes, again and again at other moments; what was answered is there, and nothing is half there.
fn it_survives_the_death_of_its_writers(url: &Url) {
    let catalogue = Catalogue::open_with_lease(url, LEASE).expect("open");
    let session = begin(&catalogue, 2);
    let scale: u64 = env::var("AQUIFER_TEST_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let mut kills = 0;
    for round in 0..3 * scale {
        let mut worker = Process::start(&url_of(url), &format!("w{round}"));
        // Long enough to begin on a loaded machine, at another place each time.
        thread::sleep(Duration::from_millis(300 + round * 137 % 400));
        worker.signal(rustix::process::Signal::KILL);
        kills += u32::from(worker.ends().signal() == Some(9));
        let opened = Catalogue::open_with_lease(url, LEASE).expect("it opens after each death");
        let events = all_events(&opened);
        assert!(events.iter().zip(1..).all(|(record, seq)| record.seq == seq), "an event is missing");
        for work in opened.work_of(session).expect("work") {
            let points = opened.points_of::<Value>(&work.object).expect("points");
            assert!(points.iter().zip(0..).all(|(p, n)| p.taken_at == n), "{}: a point is missing", work.object);
        }
    }
    assert!(kills > 0);
    let ended = (0..30).any(|_| {
        let _ = Process::start(&url_of(url), "last").ends();
        catalogue.session(session).expect("session").ended.is_some()
    });
    assert!(ended, "it does not come to an end");
    // Whoever is killed five times in a row is given up; three kills are fewer.
    if scale == 1 {
        judge(&catalogue, session, 2);
    }
}

macro_rules! on_both {
    ($($name:ident)*) => {
        mod sqlite { $(#[test] fn $name() {
            let dir = tempfile::tempdir().expect("a folder");
            super::$name(&super::Url::Sqlite(dir.path().join("catalogue.db")));
        })* }
        mod postgres { $(#[test] fn $name() { super::$name(&super::Database::make().url()); })* }
    };
}

on_both! {
    a_paused_worker_changes_nothing
    three_workers_lose_one_and_pause_one
    an_orderly_stop_gives_work_back
    it_survives_the_death_of_its_writers
}
