//! The catalogue keeps what it answered, hands a piece of work to one worker at a time, and lets a worker that lost its
//! lease change nothing: the same tests on SQLite and on PostgreSQL.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use aquifer_runner::catalogue::{
    Asked, Catalogue, Change, End, Error, Event, EventFilter, Fence, Need, NewRun, NewSession, NewWork, Outcome,
    PlanRun, PointRow, Progress, Retries, SessionFilter, SessionResult, SessionState, Stored, Trigger, Url, Wish, Work,
    WorkState,
};
use aquifer_tests::postgres::Database;
use jiff::Timestamp;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A lease that runs out while a test waits for it.
const SHORT: Duration = Duration::from_millis(400);

/// Where a test keeps its catalogue; taken away with it.
struct Place {
    url: Url,
    _dir: TempDir,
}

impl Place {
    fn sqlite() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        Self { url: Url::Sqlite(dir.path().join("state/catalogue.db")), _dir: dir }
    }

    fn postgres() -> Self {
        Self { url: Database::make().url(), _dir: tempfile::tempdir().expect("a folder") }
    }

    fn open(&self) -> Catalogue {
        Catalogue::open(&self.url).expect("the catalogue opens")
    }

    fn open_short(&self) -> Catalogue {
        Catalogue::open_with_lease(&self.url, SHORT).expect("the catalogue opens")
    }
}

/// The same promise on both databases.
macro_rules! on_both {
    ($($name:ident)*) => {
        mod sqlite { $(#[test] fn $name() { super::$name(&super::Place::sqlite()); })* }
        mod postgres { $(#[test] fn $name() { super::$name(&super::Place::postgres()); })* }
    };
}

on_both! {
    work_is_done_once_by_many
    a_lost_lease_is_taken_over_and_fenced
    a_lost_object_is_fenced_before_it_is_given_away
    failed_work_is_tried_again_and_ends_its_session
    one_run_of_a_job_at_a_time
    one_work_on_an_object_at_a_time
    slots_are_never_exceeded
    a_session_is_paused_and_cancelled
    events_have_no_gap_and_one_order
    a_replica_is_written_by_comparison
    operations_are_journalled_and_adopted
    what_belongs_to_a_step_is_there_with_it_or_not_at_all
    what_kills_its_workers_fails
    plans_and_marks
    opening_at_once_makes_one_catalogue
}

fn work(kind: &str, object: &str) -> NewWork {
    NewWork {
        kind: kind.into(),
        object: object.into(),
        job: None,
        session: None,
        priority: 300,
        run_at: Timestamp::UNIX_EPOCH,
        needs: Vec::new(),
        retries: Retries::default(),
        spec: json!({ "object": object }),
    }
}

fn session(kind: &str) -> NewSession {
    NewSession { kind: kind.into(), job: None, initiator: "test".into(), reason: None, retry_of: None }
}

fn claim(catalogue: &Catalogue, owner: &str) -> Option<(Work, Fence)> {
    catalogue.claim(owner, &[], Timestamp::now()).expect("claim")
}

fn claimed(catalogue: &Catalogue, owner: &str) -> (Work, Fence) {
    claim(catalogue, owner).expect("something to do")
}

fn done() -> Outcome {
    Outcome::Success(Value::Null)
}

fn failed(passing: bool) -> Outcome {
    Outcome::Failed { why: "the link is down".into(), code: "E_NET".into(), passing, help: None }
}

fn work_is_done_once_by_many(place: &Place) {
    let catalogue = place.open();
    let count = 60;
    for i in 0..count {
        catalogue.enqueue(&work("probe", &format!("machine/{}", i % 7))).expect("enqueue");
    }
    let in_hand: Vec<AtomicU32> = (0..7).map(|_| AtomicU32::new(0)).collect();
    let finished = AtomicU32::new(0);
    thread::scope(|scope| {
        for worker in 0..3 {
            let (in_hand, finished) = (&in_hand, &finished);
            scope.spawn(move || {
                // Each as its own process would: its own connections.
                let catalogue = place.open();
                let owner = format!("w{worker}");
                while finished.load(Ordering::SeqCst) < count {
                    let Some((work, fence)) = claim(&catalogue, &owner) else {
                        thread::sleep(Duration::from_millis(2));
                        continue;
                    };
                    let object: usize = work.object.trim_start_matches("machine/").parse().expect("a number");
                    assert_eq!(in_hand[object].fetch_add(1, Ordering::SeqCst), 0, "{} is in two hands", work.object);
                    assert_eq!(work.attempts, 1);
                    in_hand[object].fetch_sub(1, Ordering::SeqCst);
                    catalogue.finish(&fence, &done(), None).expect("finish");
                    finished.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
    });
    assert_eq!(finished.load(Ordering::SeqCst), count);
    assert!(catalogue.open_work().expect("open work").is_empty());
}

fn a_lost_lease_is_taken_over_and_fenced(place: &Place) {
    let catalogue = place.open_short();
    let run =
        NewRun { trigger: Trigger::Hand, session: session("backup"), work: vec![work("backup", "chain/nas/db01")] };
    let id = catalogue.begin_run("nightly", &run).expect("begin");
    let (mine, stale) = claimed(&catalogue, "a");
    let replica = Stored {
        name: "r".into(),
        revision: 0,
        state: "Ready".into(),
        source: "db01".into(),
        job: None,
        record: json!({ "by": "a" }),
    };
    let stored = catalogue.put_replica(&stale, &replica).expect("while the lease is held");
    let operation = catalogue.begin_operation(&stale, "replica/r", "replicate", &json!({ "n": 1 })).expect("begin");
    assert!(claim(&catalogue, "b").is_none(), "the lease holds");
    thread::sleep(SHORT + Duration::from_millis(150));
    let (taken, fence) = claimed(&catalogue, "b");
    assert_eq!((taken.id, taken.attempts), (mine.id, 2));
    assert!(taken.epoch > mine.epoch);

    // Whoever lost the lease wakes up and tries everything.
    let before = catalogue.last_event().expect("events");
    let point = PointRow { id: "p".into(), revision: 0, taken_at: 0, state: "Complete".into(), record: Value::Null };
    let refusals = [
        catalogue.beat(&stale, None).map(drop),
        catalogue.finish(&stale, &done(), None),
        catalogue.finish(&stale, &failed(true), None),
        catalogue.put_replica(&stale, &stored).map(drop),
        catalogue.drop_replica(&stale, "r", stored.revision),
        catalogue.put_point(&stale, "r", &point).map(drop),
        catalogue.drop_point(&stale, "r", "p"),
        catalogue.begin_operation(&stale, "replica/other", "replicate", &Value::Null).map(drop),
        catalogue.step(&stale, operation, 7, &Value::Null, &[]),
        catalogue.end_operation(&stale, operation, &End::Done, &[]),
        catalogue.still_ours(&stale),
        catalogue.adopt_operation(&stale, operation).map(drop),
        catalogue.more_slots(&stale, &Need { resource: "x".into(), limit: 9 }, 1).map(drop),
        catalogue.event_of(&stale, &Event::default()),
    ];
    for (i, refusal) in refusals.into_iter().enumerate() {
        assert!(matches!(refusal, Err(Error::Fenced { .. })), "{i}: {refusal:?}");
    }
    assert_eq!(catalogue.last_event().expect("events"), before, "a stale fence left an event");
    assert_eq!(catalogue.replica::<Value>("r").expect("read"), Some(stored), "a stale fence changed the replica");
    let still = catalogue.work(taken.id).expect("work");
    assert_eq!((still.state, still.owner.as_deref()), (WorkState::Running, Some("b")));

    // The new holder goes on with the same operation.
    let again = catalogue.begin_operation(&fence, "replica/r", "replicate", &json!({ "n": 2 })).expect("goes on");
    assert_eq!(again, operation);
    assert_eq!(catalogue.operation(operation).expect("read").intent, json!({ "n": 1 }));
    catalogue.end_operation(&fence, operation, &End::Done, &[]).expect("end");
    catalogue.finish(&fence, &done(), None).expect("finish");
    catalogue.finish(&fence, &done(), None).expect("saying it twice is saying it once");
    assert!(matches!(catalogue.finish(&fence, &failed(false), None), Err(Error::Fenced { .. })));
    assert_eq!(catalogue.session(id).expect("session").result, SessionResult::Success);
}

/// A worker that lost its lease is fenced also where other work on the same object is begun before its own is.
fn a_lost_object_is_fenced_before_it_is_given_away(place: &Place) {
    let catalogue = place.open_short();
    catalogue.enqueue(&work("replication", "replica/r")).expect("enqueue");
    let (_, stale) = claimed(&catalogue, "a");
    catalogue.enqueue(&NewWork { priority: 800, ..work("failover", "replica/r") }).expect("enqueue");
    thread::sleep(SHORT + Duration::from_millis(150));
    let (urgent, fence) = claimed(&catalogue, "b");
    assert_eq!(urgent.kind, "failover");
    assert!(matches!(catalogue.beat(&stale, None), Err(Error::Fenced { .. })), "two hold one object");
    assert!(claim(&catalogue, "a").is_none(), "the first waits its turn");
    catalogue.finish(&fence, &done(), None).expect("finish");
    assert_eq!(claimed(&catalogue, "a").0.kind, "replication");
}

fn failed_work_is_tried_again_and_ends_its_session(place: &Place) {
    let catalogue = place.open();
    let retries = Retries { count: 2, interval_ms: 30 };
    let machines = ["a", "b"].map(|m| NewWork { retries, ..work("backup", m) });
    let id = catalogue
        .begin_run("nightly", &NewRun { trigger: Trigger::Hand, session: session("backup"), work: machines.to_vec() })
        .expect("run");
    assert_eq!(catalogue.session(id).expect("session").state, SessionState::Waiting);
    let mut attempts: BTreeMap<String, u32> = BTreeMap::new();
    let mut last = Timestamp::now();
    while catalogue.session(id).expect("session").ended.is_none() {
        let Some((work, fence)) = claim(&catalogue, "w") else {
            thread::sleep(Duration::from_millis(5));
            continue;
        };
        *attempts.entry(work.object.clone()).or_default() += 1;
        if work.object == "b" {
            assert!(work.attempts == 1 || work.run_at >= last, "the interval was not waited for");
            last = Timestamp::now();
        }
        let outcome = if work.object == "a" { done() } else { failed(true) };
        let progress = Progress { bytes_read: 10, ..Progress::default() };
        catalogue.finish(&fence, &outcome, Some(&progress)).expect("finish");
    }
    assert_eq!(attempts, BTreeMap::from([("a".into(), 1), ("b".into(), 3)]), "failed machines only");
    let ended = catalogue.session(id).expect("session");
    assert_eq!((ended.state, ended.result), (SessionState::Stopped, SessionResult::Failed));
    assert_eq!(ended.reason.as_deref(), Some("b: the link is down"));
    assert_eq!(ended.progress.bytes_read, 20);
    let job = catalogue.job("nightly").expect("job");
    assert_eq!((job.open_session, job.last_session, job.last_result), (None, Some(id), Some(SessionResult::Failed)));
    let ops: Vec<String> = catalogue
        .events(0, &EventFilter { object: Some("work/2".into()), ..EventFilter::default() })
        .expect("events")
        .into_iter()
        .map(|e| e.event.op)
        .collect();
    assert_eq!(ops, ["enqueue", "claim", "retry", "claim", "retry", "claim", "finish"]);

    // What does not pass by itself is not tried again.
    let once = NewWork { retries, ..work("backup", "c") };
    let id = catalogue
        .begin_run("once", &NewRun { trigger: Trigger::Hand, session: session("backup"), work: vec![once] })
        .expect("run");
    let (_, fence) = claimed(&catalogue, "w");
    catalogue.finish(&fence, &failed(false), None).expect("finish");
    assert_eq!(catalogue.session(id).expect("session").result, SessionResult::Failed);
}

fn one_run_of_a_job_at_a_time(place: &Place) {
    let catalogue = place.open();
    let run = NewRun { trigger: Trigger::Hand, session: session("backup"), work: vec![work("backup", "m")] };
    let begun: Vec<_> = thread::scope(|scope| {
        let starters: Vec<_> = (0..4)
            .map(|_| {
                let (catalogue, run) = (catalogue.clone(), &run);
                scope.spawn(move || catalogue.begin_run("nightly", run))
            })
            .collect();
        starters.into_iter().map(|s| s.join().expect("a starter")).collect()
    });
    let first: Vec<_> = begun.iter().filter_map(|b| b.as_ref().ok()).collect();
    assert_eq!(first.len(), 1, "{begun:?}");
    for refused in begun.iter().filter_map(|b| b.as_ref().err()) {
        let Error::Busy { holder, .. } = refused else { panic!("{refused:?}") };
        assert_eq!(*holder, format!("session {}", first[0]));
    }
    let (_, fence) = claimed(&catalogue, "w");
    catalogue.finish(&fence, &done(), None).expect("finish");
    let second = catalogue.begin_run("nightly", &run).expect("the first has ended");
    let open = SessionFilter { open: true, ..SessionFilter::default() };
    let ids: Vec<_> = catalogue.sessions(&open).expect("sessions").into_iter().map(|s| s.id).collect();
    assert_eq!(ids, [second]);
    let nothing = NewRun { trigger: Trigger::Hand, session: session("backup"), work: Vec::new() };
    let id = catalogue.begin_run("empty", &nothing).expect("a run without work");
    assert_eq!(catalogue.session(id).expect("session").result, SessionResult::Success);
}

fn one_work_on_an_object_at_a_time(place: &Place) {
    let catalogue = place.open();
    let order = [("replica/a", 300), ("replica/a", 800), ("replica/b", 100), ("", 100), ("", 100)];
    for (object, priority) in order {
        catalogue.enqueue(&NewWork { priority, ..work("probe", object) }).expect("enqueue");
    }
    let (first, fence) = claimed(&catalogue, "w");
    assert_eq!((first.object.as_str(), first.priority), ("replica/a", 800), "priority decides");
    let others: Vec<String> = std::iter::from_fn(|| claim(&catalogue, "w")).map(|(work, _)| work.object).collect();
    assert_eq!(others, ["replica/b", "", ""], "the second work on replica/a waits");
    catalogue.finish(&fence, &done(), None).expect("finish");
    assert_eq!(claimed(&catalogue, "w").0.object, "replica/a");
    catalogue.enqueue(&NewWork { kind: "other".into(), ..work("probe", "c") }).expect("enqueue");
    let later = Timestamp::now() + Duration::from_secs(60);
    catalogue.enqueue(&NewWork { run_at: later, ..work("probe", "d") }).expect("enqueue");
    assert!(catalogue.claim("w", &["probe"], Timestamp::now()).expect("claim").is_none(), "not of this kind, not due");
    assert_eq!(catalogue.claim("w", &["probe"], later).expect("claim").expect("due").0.object, "d");
}

fn slots_are_never_exceeded(place: &Place) {
    let catalogue = place.open_short();
    let need = Need { resource: "repository/nas".into(), limit: 4 };
    for i in 0..6 {
        catalogue.enqueue(&NewWork { needs: vec![need.clone()], ..work("probe", &format!("m{i}")) }).expect("enqueue");
    }
    let mut held: Vec<Fence> = std::iter::from_fn(|| claim(&catalogue, "w")).map(|(_, fence)| fence).collect();
    assert_eq!(held.len(), 4);
    assert_eq!(catalogue.slots().expect("slots"), BTreeMap::from([("repository/nas".to_owned(), 4)]));
    let first = held.remove(0);
    catalogue.finish(&first, &done(), None).expect("finish");
    let wide = &held[0];
    assert_eq!(catalogue.more_slots(wide, &need, 3).expect("slots"), 1, "one was free");
    assert!(claim(&catalogue, "w").is_none());
    // A worker that is gone gives its slots back with its lease.
    thread::sleep(SHORT + Duration::from_millis(150));
    let again: Vec<Fence> = std::iter::from_fn(|| claim(&catalogue, "v")).map(|(_, fence)| fence).collect();
    assert_eq!(again.len(), 4);
    assert_eq!(catalogue.slots().expect("slots"), BTreeMap::from([("repository/nas".to_owned(), 4)]));
}

fn a_session_is_paused_and_cancelled(place: &Place) {
    let catalogue = place.open_short();
    let works = vec![work("backup", "a"), work("backup", "b"), work("backup", "c")];
    let id = catalogue
        .begin_run("nightly", &NewRun { trigger: Trigger::Hand, session: session("backup"), work: works })
        .expect("run");
    let (first, fence) = claimed(&catalogue, "w");
    assert_eq!(catalogue.beat(&fence, None).expect("beat"), Asked::Nothing);
    catalogue.wish(id, Wish::Pause, "me", Some("too slow")).expect("pause");
    assert!(claim(&catalogue, "w").is_none(), "nothing is begun while it pauses");
    assert_eq!(catalogue.beat(&fence, None).expect("beat"), Asked::Pause);
    catalogue.finish(&fence, &Outcome::GivenBack("paused".into()), None).expect("give back");
    assert_eq!(catalogue.work(first.id).expect("work").state, WorkState::Ready);
    catalogue.wish(id, Wish::Run, "me", None).expect("resume");
    let (again, fence) = claimed(&catalogue, "w");
    assert_eq!((again.id, again.retries), (first.id, first.retries));
    catalogue.wish(id, Wish::Cancel, "me", None).expect("cancel");
    assert!(matches!(catalogue.wish(id, Wish::Run, "me", None), Err(Error::State { .. })));
    let states: Vec<WorkState> = catalogue.work_of(id).expect("work").into_iter().map(|w| w.state).collect();
    assert_eq!(states, [WorkState::Running, WorkState::Cancelled, WorkState::Cancelled]);
    assert_eq!(catalogue.beat(&fence, None).expect("beat"), Asked::Cancel);
    // Its worker dies before it could say so: the session must end all the same.
    thread::sleep(SHORT + Duration::from_millis(150));
    assert!(claim(&catalogue, "v").is_none());
    let ended = catalogue.session(id).expect("session");
    assert_eq!((ended.state, ended.result), (SessionState::Stopped, SessionResult::Cancelled));
    assert!(matches!(catalogue.wish(id, Wish::Pause, "me", None), Err(Error::State { .. })));
}

fn events_have_no_gap_and_one_order(place: &Place) {
    let catalogue = place.open();
    thread::scope(|scope| {
        for writer in 0..4 {
            let catalogue = catalogue.clone();
            scope.spawn(move || {
                for n in 0..15 {
                    let event = Event { object: format!("writer/{writer}"), op: n.to_string(), ..Event::default() };
                    catalogue.event(&event).expect("event");
                }
            });
        }
        // A reader who only ever asks for what is above the last it saw misses nothing.
        let mut seen = 0;
        while seen < 60 {
            for record in catalogue.events(seen, &EventFilter::default()).expect("events") {
                assert_eq!(record.seq, seen + 1);
                seen = record.seq;
            }
        }
    });
    let of = |object: &str| {
        let filter = EventFilter { object: Some(object.into()), ..EventFilter::default() };
        catalogue.events(0, &filter).expect("events")
    };
    let ops: Vec<String> = of("writer/2").into_iter().map(|e| e.event.op).collect();
    assert_eq!(ops, (0..15).map(|n| n.to_string()).collect::<Vec<_>>());
    assert_eq!(of("writer/").len(), 60);
    assert_eq!(of("write").len(), 0);
    let limit = EventFilter { limit: Some(3), ..EventFilter::default() };
    assert_eq!(catalogue.events(50, &limit).expect("events").len(), 3);
}

fn a_replica_is_written_by_comparison(place: &Place) {
    let catalogue = place.open();
    catalogue.enqueue(&work("replication", "replica/r")).expect("enqueue");
    let (_, fence) = claimed(&catalogue, "w");
    let new = Stored {
        name: "r".into(),
        revision: 0,
        state: "Processing".into(),
        source: "db01".into(),
        job: Some("dr".into()),
        record: json!({ "n": 1 }),
    };
    let first = catalogue.put_replica(&fence, &new).expect("first");
    assert_eq!(first.revision, 1);
    assert!(matches!(catalogue.put_replica(&fence, &new), Err(Error::Stale { have: 0, now: 1, .. })));
    let changed = Stored { state: "Ready".into(), record: json!({ "n": 2 }), ..first.clone() };
    let second = catalogue.put_replica(&fence, &changed).expect("second");
    assert!(matches!(catalogue.put_replica(&fence, &first), Err(Error::Stale { have: 1, now: 2, .. })));
    assert_eq!(catalogue.replica("r").expect("read"), Some(second.clone()));
    assert_eq!(catalogue.replicas::<Value>().expect("list").len(), 1);
    let point = |id: &str, at: i64| PointRow {
        id: id.into(),
        revision: 0,
        taken_at: at,
        state: "Complete".into(),
        record: json!({ "id": id }),
    };
    for (id, at) in [("b", 20), ("a", 10), ("c", 30)] {
        catalogue.put_point(&fence, "r", &point(id, at)).expect("point");
    }
    catalogue.drop_point(&fence, "r", "b").expect("drop");
    let ids: Vec<String> = catalogue.points_of::<Value>("r").expect("points").into_iter().map(|p| p.id).collect();
    assert_eq!(ids, ["a", "c"]);
    assert!(matches!(catalogue.drop_replica(&fence, "r", 1), Err(Error::Stale { now: 2, .. })));
    catalogue.drop_replica(&fence, "r", second.revision).expect("drop");
    assert!(catalogue.points_of::<Value>("r").expect("points").is_empty());
    let of = EventFilter { object: Some("replica/r".into()), ..EventFilter::default() };
    let steps: Vec<_> =
        catalogue.events(0, &of).expect("events").into_iter().map(|e| (e.event.from, e.event.to)).collect();
    let some = |s: &str| Some(s.to_owned());
    assert_eq!(
        steps,
        [(None, some("Processing")), (some("Processing"), some("Ready")), (None, some("Removed"))],
        "each transition once"
    );
}

fn operations_are_journalled_and_adopted(place: &Place) {
    let catalogue = place.open();
    catalogue.enqueue(&work("failover", "replica/r")).expect("enqueue");
    catalogue.enqueue(&work("other", "plan/p")).expect("enqueue");
    let (_, fence) = claimed(&catalogue, "w");
    let (_, other) = claimed(&catalogue, "v");
    let id = catalogue.begin_operation(&fence, "replica/r", "failover", &json!({ "point": "p1" })).expect("begin");
    let refused = catalogue.begin_operation(&other, "replica/r", "undo", &Value::Null);
    let Err(Error::Busy { holder, .. }) = refused else { panic!("{refused:?}") };
    assert!(holder.contains("(failover)"), "{holder}");
    catalogue.step(&fence, id, 3, &json!({ "overlay": "x" }), &[]).expect("step");
    assert!(
        matches!(catalogue.step(&other, id, 4, &Value::Null, &[]), Err(Error::State { .. })),
        "not their operation"
    );
    assert!(matches!(catalogue.adopt_operation(&other, id), Err(Error::Busy { .. })), "its work is in hand");
    catalogue.finish(&fence, &failed(false), None).expect("its work ends, the operation stays open");
    let open = catalogue.open_operations().expect("open");
    assert_eq!(open.iter().map(|o| (o.id, o.step)).collect::<Vec<_>>(), [(id, 3)]);
    let adopted = catalogue.adopt_operation(&other, id).expect("adopt");
    assert_eq!((adopted.step, adopted.data), (3, json!({ "overlay": "x" })));
    catalogue.end_operation(&other, id, &End::Undone("taken back".into()), &[]).expect("end");
    assert!(catalogue.open_operations().expect("open").is_empty());
    assert!(matches!(catalogue.end_operation(&other, id, &End::Done, &[]), Err(Error::State { .. })));
    let next = catalogue.begin_operation(&other, "replica/r", "undo", &Value::Null).expect("the object is free");
    assert!(next > id);
}

fn what_belongs_to_a_step_is_there_with_it_or_not_at_all(place: &Place) {
    let catalogue = place.open();
    catalogue.enqueue(&work("replication", "replica/r")).expect("enqueue");
    let (_, fence) = claimed(&catalogue, "w");
    let row = |revision: i64, state: &str| Stored {
        name: "r".into(),
        revision,
        state: state.into(),
        source: "db01".into(),
        job: None,
        record: json!({ "state": state }),
    };
    let point = |id: &str, n: i64| PointRow {
        id: id.into(),
        revision: 0,
        taken_at: n,
        state: "complete".into(),
        record: json!(n),
    };
    let points = || {
        let rows = catalogue.points_of::<Value>("r").expect("points").into_iter();
        rows.map(|row| (row.id, row.taken_at)).collect::<Vec<_>>()
    };
    catalogue.put_replica(&fence, &row(0, "Ready")).expect("stored");
    catalogue.put_point(&fence, "r", &point("a", 1)).expect("stored");
    let id = catalogue.begin_operation(&fence, "replica/r", "replicate", &Value::Null).expect("begin");
    let told = Event { object: "replica/r".into(), op: "tell".into(), ..Event::default() };
    let all = |revision: i64| {
        [
            Change::Point("r".into(), point("a", 9)),
            Change::Point("r".into(), point("b", 2)),
            Change::NoPoint("r".into(), "a".into()),
            Change::Told(told.clone()),
            Change::Replica(row(revision, "Processing")),
        ]
    };
    // The last of them is refused: nothing of it is there, and the step is not reached.
    let (before, events) = (catalogue.replica::<Value>("r").expect("read"), catalogue.last_event().expect("events"));
    let refused = catalogue.step(&fence, id, 1, &Value::Null, &all(7));
    assert!(matches!(refused, Err(Error::Stale { have: 7, now: 1, .. })), "{refused:?}");
    let refused = catalogue.end_operation(&fence, id, &End::Done, &all(7));
    assert!(matches!(refused, Err(Error::Stale { .. })), "{refused:?}");
    assert_eq!((catalogue.replica::<Value>("r").expect("read"), points()), (before, vec![("a".to_owned(), 1)]));
    assert_eq!((catalogue.operation(id).expect("read").step, catalogue.last_event().expect("events")), (0, events));

    catalogue.step(&fence, id, 1, &Value::Null, &all(1)[..2]).expect("step");
    assert_eq!(points(), [("a".to_owned(), 1), ("b".to_owned(), 2)], "a point that is known stays as it is");
    catalogue.end_operation(&fence, id, &End::Done, &all(1)[2..]).expect("end");
    assert_eq!(points(), [("b".to_owned(), 2)]);
    let now = catalogue.replica::<Value>("r").expect("read").expect("it is there");
    assert_eq!((now.revision, now.state.as_str()), (2, "Processing"));
    let ops: Vec<String> =
        catalogue.events(events, &EventFilter::default()).expect("events").into_iter().map(|e| e.event.op).collect();
    assert_eq!(ops, ["tell", "replication", "replicate done"], "in their order");
}

fn what_kills_its_workers_fails(place: &Place) {
    let lease = Duration::from_millis(40);
    let catalogue = Catalogue::open_with_lease(&place.url, lease).expect("open");
    let run = NewRun { trigger: Trigger::Hand, session: session("backup"), work: vec![work("backup", "m")] };
    let id = catalogue.begin_run("deadly", &run).expect("run");
    let mut claims = 0;
    while catalogue.session(id).expect("session").ended.is_none() {
        claims += u32::from(claim(&catalogue, &format!("w{claims}")).is_some());
        assert!(claims <= 5, "handed out for ever");
        thread::sleep(lease + Duration::from_millis(30));
    }
    let ended = catalogue.session(id).expect("session");
    assert_eq!((claims, ended.result), (5, SessionResult::Failed));
    assert!(ended.reason.as_deref().unwrap_or_default().contains("5 workers in a row"), "{:?}", ended.reason);
}

fn plans_and_marks(place: &Place) {
    let catalogue = place.open();
    catalogue.enqueue(&work("plan", "plan/site")).expect("enqueue");
    let (_, fence) = claimed(&catalogue, "w");
    let run = PlanRun {
        id: 0,
        plan: "site".into(),
        revision: 0,
        state: "InProgress".into(),
        record: json!([1]),
        begun: Timestamp::UNIX_EPOCH,
    };
    let first = catalogue.put_plan_run(&fence, &run).expect("first");
    let second =
        catalogue.put_plan_run(&fence, &PlanRun { state: "Completed".into(), ..first.clone() }).expect("second");
    assert!(matches!(catalogue.put_plan_run(&fence, &first), Err(Error::Stale { .. })));
    assert_eq!(catalogue.plan_runs("site").expect("runs"), [second]);
    catalogue.set_mark("nightly", &Value::Null, &json!({ "seen": 4 })).expect("mark");
    assert!(matches!(catalogue.set_mark("nightly", &Value::Null, &json!(5)), Err(Error::Stale { .. })));
    let next = Timestamp::from_second(1_800_000_000).expect("a time");
    catalogue.set_next_run("nightly", Some(next)).expect("next");
    catalogue.pause_job("nightly", true, "me").expect("pause");
    let job = catalogue.job("nightly").expect("job");
    assert_eq!((job.mark, job.next_run, job.paused), (json!({ "seen": 4 }), Some(next), true));
    assert_eq!(catalogue.jobs().expect("jobs").len(), 1);
}

fn opening_at_once_makes_one_catalogue(place: &Place) {
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| place.open().begin_session(&session("probe")).expect("a session"));
        }
    });
    let ids: Vec<i64> =
        place.open().sessions(&SessionFilter::default()).expect("sessions").into_iter().map(|s| s.id.0).collect();
    assert_eq!(ids, [1, 2, 3, 4]);
}
