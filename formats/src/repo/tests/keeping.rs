//! Forgetting and sweeping: nothing that is needed or held ever goes.

use super::*;

fn sweep(repo: &Repository, machine: &Machine, tell: Liveness) -> keeper::Swept {
    keeper::sweep(repo, machine, &mut LeaseObserver::new(), Instant::now(), &|_| tell).expect("sweep")
}

fn forget(repo: &Repository, machine: &Machine, points: &[&Point]) -> Result<()> {
    let ids: Vec<Uuid> = points.iter().map(|p| p.id).collect();
    keeper::forget(repo, machine, &ids, keeper::LastPoint::Stays).map(|_| ())
}

#[test]
fn files_of_forgotten_points_stay_while_retained_points_need_them() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 8);
    let points = repo.points(&machine).expect("points");
    forget(&repo, &machine, &[&points[0], &points[1], &points[2]]).expect("forget");
    assert_eq!(repo.points(&machine).expect("points").len(), 5);
    let swept = sweep(&repo, &machine, Liveness::Unknown);
    for (k, point) in (3..).zip(repo.points(&machine).expect("points")) {
        assert_eq!(read_point(&repo, &point), bytes(k), "point {k}");
    }
    // Blocks of point 0 that nobody wrote since, and of points 1 and 2 until 6 and 7 wrote them again.
    assert_eq!(swept.needed.len() + swept.deleted.len(), 3, "{swept:?}");
    assert!(swept.needed.contains(&points[0].id));
    forget(&repo, &machine, &[&points[3], &points[4], &points[5], &points[6]]).expect("forget");
    let swept = sweep(&repo, &machine, Liveness::Unknown);
    assert_eq!(read_point(&repo, &repo.points(&machine).expect("points")[0]), bytes(7));
    assert!(swept.deleted.iter().any(|(path, len)| path.contains(&points[2].id.to_string()) && *len > 0), "{swept:?}");
    assert_eq!(sweep(&repo, &machine, Liveness::Unknown).deleted, vec![], "a second sweep finds nothing");
}

#[test]
fn a_mounted_point_never_blocks_forgetting_and_never_changes() {
    let dir = tempfile::tempdir().expect("dir");
    let repo = init(dir.path());
    let machine = repo.machine_or_new("db01").expect("machine");
    back_up(&repo, &machine, &bytes(0), "2026-01-01T00:00:00Z").expect("full");
    let mut tx = repo.begin(&machine, None, holder()).expect("begin");
    write_disk(&mut tx, &vda(), &bytes(1)).expect("a second full");
    tx.commit(new_point("2026-01-02T00:00:00Z")).expect("commit");
    let points = repo.points(&machine).expect("points");
    let lease = repo.lease_read(&machine, &points[0], holder()).expect("lease");
    forget(&repo, &machine, &[&points[0]]).expect("not blocked");
    let swept = sweep(&repo, &machine, Liveness::Unknown);
    assert_eq!((swept.deleted.len(), swept.leased.as_slice()), (0, &[points[0].id][..]));
    assert_eq!(read_point(&repo, &points[0]), bytes(0), "opened anew, long after");
    lease.release().expect("release");
    assert_eq!(sweep(&repo, &machine, Liveness::Unknown).deleted.len(), 1);
    assert!(!dir.path().join(name::point_folder(machine.id, points[0].id)).exists());
    assert_eq!(repo.points(&machine).expect("points").len(), 1);
    let late = repo.lease_read(&machine, &points[0], holder());
    assert!(matches!(late, Err(Error::NotFound { .. })));
    assert_eq!(repo.leases().expect("leases").len(), 0, "a refused lease leaves nothing");
}

#[test]
fn a_dead_holders_lease_is_reclaimed_and_its_beat_says_so() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 2);
    let point = repo.points(&machine).expect("points").remove(0);
    let mut lease = repo.lease_read(&machine, &point, holder()).expect("lease");
    sweep(&repo, &machine, Liveness::Alive);
    lease.beat().expect("held");
    sweep(&repo, &machine, Liveness::Dead);
    assert!(matches!(lease.beat(), Err(Error::NotFound { .. })));
}

#[test]
fn a_backup_whose_lease_was_reclaimed_adds_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 2);
    let parent = repo.resolve(&machine, &PointQuery::Latest(0)).expect("latest");
    let mut tx = repo.begin(&machine, Some(&parent), holder()).expect("begin");
    write_disk(&mut tx, &vda(), &bytes(2)).expect("vda");
    sweep(&repo, &machine, Liveness::Dead);
    assert!(matches!(tx.commit(new_point("2026-01-03T00:00:00Z")), Err(Error::NotFound { .. })));
    assert_eq!(repo.points(&machine).expect("points").len(), 2);
}

#[test]
fn the_parent_of_a_running_backup_may_be_forgotten_and_its_files_stay() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 2);
    let points = repo.points(&machine).expect("points");
    let mut tx = repo.begin(&machine, Some(&points[0]), holder()).expect("begin");
    forget(&repo, &machine, &[&points[0]]).expect("forget");
    forget(&repo, &machine, &[&points[1]]).expect_err("the last complete one stays");
    keeper::forget(&repo, &machine, &[points[1].id], keeper::LastPoint::MayGo).expect("unless somebody says so");
    let swept = sweep(&repo, &machine, Liveness::Alive);
    assert_eq!(swept.deleted.len(), 1, "point 1 is needed by nobody: {swept:?}");
    write_disk(&mut tx, &vda(), &bytes(3)).expect("vda");
    tx.commit(new_point("2026-01-03T00:00:00Z")).expect("commit");
    let latest = repo.resolve(&machine, &PointQuery::Latest(0)).expect("latest");
    assert_eq!(read_point(&repo, &latest), bytes(3));
    sweep(&repo, &machine, Liveness::Dead);
    assert_eq!(read_point(&repo, &latest), bytes(3));
}

#[test]
fn a_backup_that_commits_while_a_sweep_looks_keeps_what_it_needs() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 2);
    let points = repo.points(&machine).expect("points");
    let parent = &points[1];
    let mut tx = repo.begin(&machine, Some(parent), holder()).expect("begin");
    let ids = [points[0].id, parent.id];
    keeper::forget(&repo, &machine, &ids, keeper::LastPoint::MayGo).expect("forget");
    write_disk(&mut tx, &vda(), &bytes(3)).expect("vda");
    // The sweep has found the lease and looks for its holder, who ends just now, having committed.
    let tx = std::sync::Mutex::new(Some(tx));
    let tell = |_: &Holder| {
        if let Some(tx) = tx.lock().expect("lock").take() {
            tx.commit(new_point("2026-01-03T00:00:00Z")).expect("commit");
        }
        Liveness::Dead
    };
    keeper::sweep(&repo, &machine, &mut LeaseObserver::new(), Instant::now(), &tell).expect("sweep");
    let latest = repo.resolve(&machine, &PointQuery::Latest(0)).expect("latest");
    assert_eq!(read_point(&repo, &latest), bytes(3));
}

#[test]
fn two_who_forget_at_once_leave_the_last_point() {
    for _ in 0..10 {
        let dir = tempfile::tempdir().expect("dir");
        let (repo, machine) = with_points(dir.path(), 2);
        let points = repo.points(&machine).expect("points");
        let start = std::sync::Barrier::new(2);
        let one = |point: &Point| {
            start.wait();
            forget(&repo, &machine, &[point]).is_ok()
        };
        let one = &one;
        let forgotten = std::thread::scope(|scope| {
            let threads: Vec<_> = points.iter().map(|point| scope.spawn(move || one(point))).collect();
            threads.into_iter().map(|thread| thread.join().expect("thread")).filter(|done| *done).count()
        });
        assert_eq!((forgotten, repo.points(&machine).expect("points").len()), (1, 1));
    }
}

#[test]
fn pinned_points_cannot_be_forgotten() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 3);
    let points = repo.points(&machine).expect("points");
    keeper::pin(&repo, &machine, points[0].id, true).expect("pin");
    assert!(forget(&repo, &machine, &[&points[1], &points[0]]).is_err());
    assert_eq!(repo.points(&machine).expect("points").len(), 3, "all or nothing");
    keeper::pin(&repo, &machine, points[0].id, false).expect("unpin");
    forget(&repo, &machine, &[&points[0]]).expect("forget");
}

#[test]
fn a_damaged_point_is_listed_as_such_and_not_resolved() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 3);
    let points = repo.points(&machine).expect("points");
    keeper::mark_damaged(&repo, &machine, points[2].id, Some("block 3".into())).expect("mark");
    assert_eq!(repo.resolve(&machine, &PointQuery::Latest(0)).expect("latest").id, points[1].id);
    let state = repo.points(&machine).expect("points")[2].state.clone();
    assert_eq!(state, PointState::Corrupted { why: "block 3".into() });
    keeper::mark_damaged(&repo, &machine, points[2].id, None).expect("whole again");
    assert_eq!(repo.resolve(&machine, &PointQuery::Latest(0)).expect("latest").id, points[2].id);
}

#[test]
fn a_retained_point_without_record_and_readable_files_stops_the_sweep() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 3);
    let points = repo.points(&machine).expect("points");
    forget(&repo, &machine, &[&points[0]]).expect("forget");
    std::fs::remove_file(dir.path().join(name::point(machine.id, points[2].id))).expect("lose the record");
    let swept = sweep(&repo, &machine, Liveness::Unknown);
    assert_eq!(swept.deleted, vec![], "its own file tells what it needs");
    let file = dir.path().join(name::layer(machine.id, points[2].id, &vda()));
    let len = std::fs::metadata(&file).expect("stat").len();
    std::fs::OpenOptions::new().write(true).open(&file).and_then(|f| f.set_len(len - 9000)).expect("tear");
    let stopped = keeper::sweep(&repo, &machine, &mut LeaseObserver::new(), Instant::now(), &|_| Liveness::Unknown);
    assert!(stopped.is_err(), "nobody knows what it needs");
}

#[test]
fn a_point_that_lost_its_record_is_told_and_its_files_stay_while_others_stand_on_them() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 3);
    let points = repo.points(&machine).expect("points");
    let lose = |point: &Point| std::fs::remove_file(dir.path().join(name::point(machine.id, point.id))).expect("lose");
    lose(&points[1]);
    let now = repo.points(&machine).expect("points");
    assert_eq!(now.iter().map(|point| point.state.name()).collect::<Vec<_>>(), ["complete", "missing", "complete"]);
    assert!(now[1].state.why().is_some_and(|why| why.contains("point.json is gone")), "{:?}", now[1].state);
    assert_eq!(repo.interrupted(&machine).expect("interrupted"), vec![], "it was complete once");
    let begun = as_begun(&repo, &points[1], Some(points[0].id));
    assert_eq!(repo.interrupted(&machine).expect("interrupted"), vec![], "others stand on it");
    keeper::discard(&repo, &machine, &begun, holder()).expect_err("another point stands on it");
    assert_eq!(read_point(&repo, &now[2]), bytes(2));
    keeper::forget(&repo, &machine, &[points[1].id], keeper::LastPoint::Stays).expect("given up");
    sweep(&repo, &machine, Liveness::Dead);
    assert_eq!(read_point(&repo, &now[2]), bytes(2));

    // The newest: whoever asks for it is told that it is older bytes they get.
    lose(&points[2]);
    let answer = repo.answer(&machine, &PointQuery::Latest(0)).expect("answer");
    assert_eq!(answer.point.map(|point| point.id), Some(points[0].id));
    assert_eq!(answer.passed_over.iter().map(|point| point.id).collect::<Vec<_>>(), [points[2].id]);
    // What was received a moment ago, and whose writer is there or was cut short just now, is no damage.
    let lease = LeaseRecord {
        id: Uuid::new_v4(),
        kind: LeaseKind::Append,
        machine: machine.id,
        point: None,
        generation: points[2].receipt - 1,
        holder: holder(),
        since: "2026-01-01T00:00:00Z".parse().expect("a time"),
        beat: 0,
    };
    repo.store().create(&name::lease(lease.id), &encode(&lease).expect("encode")).expect("lease");
    assert_eq!(repo.points(&machine).expect("points")[1].state, PointState::Incomplete);
}

#[test]
fn a_newest_point_that_lost_its_record_is_none_that_was_cut_short() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 3);
    let newest = repo.points(&machine).expect("points").remove(2);
    std::fs::remove_file(dir.path().join(name::point(machine.id, newest.id))).expect("lose");
    assert_eq!(repo.interrupted(&machine).expect("interrupted"), vec![], "it was complete");
    let state = repo.points(&machine).expect("points").remove(2).state;
    assert!(matches!(&state, PointState::Missing { why } if why.ends_with("point.json is gone")), "{state:?}");

    // What says that it was begun stays where a commit was cut just before its end, or an earlier version made the point:
    // the next one takes it away while the record is there.
    let second = repo.points(&machine).expect("points").remove(1);
    as_begun(&repo, &second, None);
    repo.begin(&machine, None, holder()).expect("begin").interrupt().expect("release");
    assert_eq!(repo.store().len(&name::begin(machine.id, second.id)).expect("look"), None);
    std::fs::remove_file(dir.path().join(name::point(machine.id, second.id))).expect("lose");
    let left = repo.interrupted(&machine).expect("interrupted");
    assert_eq!(left.len(), 1, "the one that was begun just now");
    assert!(left.iter().all(|what| what.record.id != second.id));
}

#[test]
fn emptying_never_reaches_the_copies_of_a_repository() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 1);
    let mut tx = repo.begin(&machine, None, holder()).expect("begin");
    let second = DiskName::new("vdb").expect("a name");
    write_disk(&mut tx, &vda(), &bytes(1)).expect("vda");
    write_disk(&mut tx, &second, &bytes(2)).expect("vdb");
    let id = tx.id();
    tx.interrupt().expect("interrupt");
    let [copied, alone] = [vda(), second].map(|disk| dir.path().join(name::layer(machine.id, id, &disk)));
    let (copy, before) = (dir.path().join("copy"), std::fs::read(&copied).expect("a layer"));
    let lone = std::fs::metadata(&alone).expect("stat").len();
    std::fs::hard_link(&copied, &copy).expect("as a copy by hard links has it");
    assert_eq!(keeper::empty(&repo, &machine, id).expect("emptied"), lone);
    assert_eq!(std::fs::metadata(&alone).expect("stat").len(), 0);
    assert!(std::fs::read(&copy).expect("a copy") == before);
}

#[test]
fn a_sweep_cut_at_any_step_leaves_retained_points_whole() {
    let dir = tempfile::tempdir().expect("dir");
    for steps in 0..60 {
        let path = dir.path().join(format!("{steps}"));
        std::fs::create_dir(&path).expect("folder");
        let (repo, machine) = with_points(&path, 1);
        let mut tx = repo.begin(&machine, None, holder()).expect("begin");
        write_disk(&mut tx, &vda(), &bytes(1)).expect("vda");
        tx.commit(new_point("2026-01-02T00:00:00Z")).expect("commit");
        let points = repo.points(&machine).expect("points");
        forget(&repo, &machine, &[&points[0]]).expect("forget");
        let Store::Directory(directory) = repo.store();
        directory.fuse.set(steps);
        let done = keeper::sweep(&repo, &machine, &mut LeaseObserver::new(), Instant::now(), &|_| Liveness::Dead);
        directory.fuse.set(i64::MAX);
        assert_eq!(read_point(&repo, &repo.resolve(&machine, &PointQuery::Latest(0)).expect("latest")), bytes(1));
        sweep(&repo, &machine, Liveness::Dead);
        assert!(!path.join(name::point_folder(machine.id, points[0].id)).exists());
        if done.is_ok() {
            assert!(steps > 3, "the sweep has steps to cut");
            return;
        }
    }
    panic!("the sweep never ended");
}

#[test]
fn a_killed_backups_lease_is_reclaimed_by_sight_or_by_its_silence() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 1);
    let leave = || std::mem::forget(repo.begin(&machine, None, holder()).expect("begin"));
    let reclaim = |observer: &mut LeaseObserver, tell| {
        keeper::reclaim(&repo, &machine, observer, &move |_| tell, Duration::ZERO).expect("reclaim").len()
    };
    leave();
    let mut observer = LeaseObserver::new();
    assert_eq!(reclaim(&mut observer, Liveness::Alive), 0);
    assert_eq!(reclaim(&mut observer, Liveness::Unknown), 0, "seen for the first time");
    assert!(matches!(repo.begin(&machine, None, holder()), Err(Error::Locked { .. })));
    assert_eq!(reclaim(&mut observer, Liveness::Dead), 1);
    leave();
    // Another process, long after, remembers the first one's look.
    let boot = Duration::from_secs(1000);
    let now = Instant::now();
    let mut first = LeaseObserver::new();
    first.observe(&repo, now, &|_| Liveness::Unknown).expect("observe");
    let memory = first.remember("boot", (now, boot));
    let later = |seconds| (Instant::now(), boot + Duration::from_secs(seconds));
    assert_eq!(reclaim(&mut LeaseObserver::recall(&memory, "boot", later(30)), Liveness::Unknown), 0);
    assert_eq!(reclaim(&mut LeaseObserver::recall(&memory, "another boot", later(90)), Liveness::Unknown), 0);
    assert_eq!(reclaim(&mut LeaseObserver::recall(&memory, "boot", later(90)), Liveness::Unknown), 1);
    repo.begin(&machine, None, holder()).expect("free").interrupt().expect("release");
}

#[test]
fn a_backup_that_was_only_running_is_not_gone_on_with_once_it_is_committed() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 1);
    let mut tx = repo.begin(&machine, None, holder()).expect("begin");
    let seen = repo.interrupted(&machine).expect("interrupted");
    assert_eq!(seen.len(), 1, "running or interrupted: that cannot be told");
    write_disk(&mut tx, &vda(), &bytes(1)).expect("vda");
    tx.commit(new_point("2026-01-02T00:00:00Z")).expect("commit");
    assert!(matches!(repo.resume(&machine, &seen[0], holder()), Err(Error::Exists { .. })));
    assert_eq!(repo.leases().expect("leases").len(), 0, "a refused lease leaves nothing");
    let points = repo.points(&machine).expect("points");
    assert_eq!(points.iter().filter(|p| p.state == PointState::Complete).count(), 2, "{points:?}");
    // And one that was given up meanwhile.
    repo.begin(&machine, None, holder()).expect("begin").interrupt().expect("release");
    let seen = repo.interrupted(&machine).expect("interrupted");
    keeper::discard(&repo, &machine, &seen[0], holder()).expect("discard");
    assert!(matches!(repo.resume(&machine, &seen[0], holder()), Err(Error::NotFound { .. })));
}

#[test]
fn of_backups_that_begin_at_the_same_moment_one_goes_on() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 1);
    for _ in 0..5 {
        let begun = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| repo.begin(&machine, None, holder()))).collect();
            let all: Vec<_> = threads.into_iter().map(|t| t.join().expect("thread")).collect();
            all.into_iter().filter_map(|begun| begun.ok()).collect::<Vec<_>>()
        });
        assert_eq!(begun.len(), 1);
        begun.into_iter().for_each(|tx| tx.interrupt().expect("interrupt"));
    }
}

#[test]
fn of_several_attempts_at_one_piece_of_work_one_makes_a_point() {
    let dir = tempfile::tempdir().expect("dir");
    let repo = init(dir.path());
    let machine = repo.machine_or_new("db01").expect("machine");
    let holder = |work: &str| Holder { work: Some(work.into()), ..holder() };
    let attempt = |work: &str| {
        let mut tx = repo.begin(&machine, None, holder(work)).expect("begin");
        write_disk(&mut tx, &vda(), &bytes(1)).expect("vda");
        tx
    };
    let made = attempt("7@1").commit(new_point("2026-01-01T00:00:00Z")).expect("the first");
    assert_eq!(made.work.as_deref(), Some("7@1"));
    let again = attempt("7@1").commit(new_point("2026-01-01T00:00:00Z"));
    assert!(matches!(again, Err(Error::Exists { .. })), "{again:?}");
    let lease = repo.leases().expect("leases").remove(0);
    keeper::withdraw(repo.store(), lease.id).expect("withdraw");
    attempt("8@1").commit(new_point("2026-01-02T00:00:00Z")).expect("other work");
    assert_eq!(repo.points(&machine).expect("points").len(), 2);

    // One that was received and not completed when another attempt overtook it, and is completed then.
    let file = dir.path().join(name::point(machine.id, made.id));
    let record = std::fs::read(&file).expect("record");
    as_begun(&repo, &repo.points(&machine).expect("points")[0], None);
    std::fs::remove_file(&file).expect("not yet");
    let other = attempt("7@1").commit(new_point("2026-01-01T00:00:00Z")).expect("overtakes");
    std::fs::write(&file, record).expect("wakes up");
    let points = repo.points(&machine).expect("points");
    let of_it = points.iter().filter(|p| p.record.as_ref().is_some_and(|r| r.work.as_deref() == Some("7@1")));
    assert_eq!(of_it.map(|p| p.id).collect::<Vec<_>>(), [other.id]);
    assert!(points.iter().all(|point| point.state == PointState::Complete), "{points:?}");
    // Damage of what was made is no reason to do without.
    keeper::mark_damaged(&repo, &machine, other.id, Some("a test".into())).expect("mark");
    attempt("7@1").commit(new_point("2026-01-01T00:00:00Z")).expect("another one");
}
