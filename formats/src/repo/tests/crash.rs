//! A backup cut at every step: the point is there whole or not at all, and can be gone on with.

use super::*;

/// Two points, the second with two disks.
fn run(repo: &Repository) -> Result<()> {
    let machine = repo.machine_or_new("db01")?;
    let parent = repo.resolve(&machine, &PointQuery::Latest(0)).ok();
    let mut tx = repo.begin(&machine, parent.as_ref(), holder())?;
    write_disk(&mut tx, &vda(), &bytes(3))?;
    write_disk(&mut tx, &DiskName::new("vdb").expect("a name"), &bytes(4))?;
    tx.commit(new_point("2026-01-01T09:00:00Z"))?;
    Ok(())
}

/// What anybody sees after a crash: old points whole, the new one complete only if it is whole.
fn check(path: &Path) -> usize {
    let repo = Repository::open(path, me()).expect("open");
    let machine = repo.machine("db01").expect("machine");
    let points = repo.points(&machine).expect("points");
    let complete: Vec<_> = points.iter().filter(|p| p.state == PointState::Complete).collect();
    for (k, point) in complete.iter().enumerate() {
        let expected = if k < 2 { bytes(u8::try_from(k).expect("small")) } else { bytes(3) };
        assert_eq!(read_point(&repo, point), expected);
        if k == 2 {
            let vdb = repo.open_disk(point, &DiskName::new("vdb").expect("a name")).expect("vdb");
            assert_eq!(read_all(&vdb), bytes(4));
        }
    }
    complete.len()
}

#[test]
fn a_backup_cut_at_any_step_leaves_old_points_whole_and_can_be_gone_on_with() {
    let dir = tempfile::tempdir().expect("dir");
    let base = dir.path().join("base");
    std::fs::create_dir(&base).expect("folder");
    with_points(&base, 2);
    let mut died = 0;
    for steps in 0.. {
        let path = dir.path().join(format!("{steps}"));
        copy(&base, &path);
        let (repo, fuse) = fused(&path);
        fuse.set(steps);
        let done = run(&repo);
        drop(repo);
        let complete = check(&path);
        if done.is_ok() {
            assert_eq!(complete, 3);
            break;
        }
        died += 1;
        assert!(complete == 2 || complete == 3, "{complete} after {steps} steps");
        go_on(&path);
        std::fs::remove_dir_all(&path).expect("clean");
    }
    assert!(died > 15, "{died} steps were cut");
}

fn go_on(path: &Path) {
    let repo = Repository::open(path, me()).expect("open");
    let machine = repo.machine("db01").expect("machine");
    // The lease of the dead: its process is gone.
    keeper::sweep(&repo, &machine, &mut LeaseObserver::new(), Instant::now(), &|_| Liveness::Dead).expect("sweep");
    assert_eq!(repo.leases().expect("leases").len(), 0);
    for interrupted in repo.interrupted(&machine).expect("interrupted") {
        let mut tx = repo.resume(&machine, &interrupted, holder()).expect("resume");
        write_disk(&mut tx, &vda(), &bytes(3)).expect("vda");
        write_disk(&mut tx, &DiskName::new("vdb").expect("a name"), &bytes(4)).expect("vdb");
        tx.commit(new_point("2026-01-01T09:00:00Z")).expect("commit");
    }
    if repo.resolve(&machine, &PointQuery::Latest(0)).expect("latest").record.expect("record").disks.len() == 1 {
        run(&repo).expect("from the start: the first try had not even begun");
    }
    assert_eq!(check(path), 3);
    assert_eq!(repo.interrupted(&machine).expect("interrupted"), vec![]);
}

#[test]
fn layers_are_synced_before_the_point_is_received_and_recorded() {
    let dir = tempfile::tempdir().expect("dir");
    with_points(dir.path(), 1);
    let (repo, fuse) = fused(dir.path());
    run(&repo).expect("backup");
    let steps = fuse.steps();
    let last_sync = steps.iter().rposition(|s| s == "sync").expect("a sync");
    let last_write = steps.iter().rposition(|s| s == "write").expect("a write");
    let created: Vec<usize> = (0..steps.len()).filter(|i| steps[*i] == "created").collect();
    let [.., generation, point] = created.as_slice() else { panic!("{steps:?}") };
    assert!(last_write < last_sync && last_sync < *generation && generation < point, "{steps:?}");
}

#[test]
fn discarding_an_interrupted_backup_leaves_nothing_of_it() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 2);
    let mut tx = repo.begin(&machine, None, holder()).expect("begin");
    write_disk(&mut tx, &vda(), &bytes(3)).expect("vda");
    let id = tx.id();
    let running = repo.interrupted(&machine).expect("interrupted").remove(0);
    assert!(matches!(keeper::discard(&repo, &machine, &running, holder()), Err(Error::Locked { .. })));
    tx.interrupt().expect("interrupt");
    keeper::discard(&repo, &machine, &running, holder()).expect("discard");
    assert!(!dir.path().join(name::point_folder(machine.id, id)).exists());
    assert_eq!(check(dir.path()), 2);
}
