//! Writing points anew: given-up files go, readers of the old point read on, and a cut anywhere loses nothing.

use std::collections::BTreeSet;

use super::{
    rebase::{burdens, rebase},
    *,
};

fn forget(repo: &Repository, machine: &Machine, point: &Point) {
    keeper::forget(repo, machine, &[point.id], keeper::LastPoint::Stays).expect("forget");
}

fn sweep(repo: &Repository, machine: &Machine) -> keeper::Swept {
    keeper::sweep(repo, machine, &mut LeaseObserver::new(), Instant::now(), &|_| Liveness::Alive).expect("sweep")
}

/// Gives up point 1 of four, and frees what it holds.
fn free(repo: &Repository, machine: &Machine) -> Result<()> {
    let without: BTreeSet<Uuid> = burdens(repo, machine)?.iter().map(|burden| burden.point).collect();
    for point in repo.points(machine)? {
        let draws = |needed: &record::NeededFile| without.contains(&needed.point);
        if point.record.iter().flat_map(|r| &r.disks).flat_map(|d| &d.needs).any(draws) {
            rebase(repo, machine, &point, &without, options(), holder())?;
        }
    }
    Ok(())
}

#[test]
fn a_point_in_the_middle_goes_while_its_child_is_read() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 4);
    let before = repo.points(&machine).expect("points");
    let child = &before[2];
    let lease = repo.lease_read(&machine, child, holder()).expect("lease");
    let reader = repo.open_disk(child, &vda()).expect("open");
    forget(&repo, &machine, &before[1]);
    let found = burdens(&repo, &machine).expect("burdens");
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].point, before[1].id);
    assert_eq!(found[0].drawn.len(), 2, "points 2 and 3 draw from it");
    assert!(found[0].cost() > 0);
    free(&repo, &machine).expect("written anew");
    assert_eq!(burdens(&repo, &machine).expect("burdens").iter().filter(|b| b.point == before[1].id).count(), 0);
    let swept = sweep(&repo, &machine);
    assert!(swept.leased.contains(&before[1].id), "{swept:?}");
    // The old child reads as ever, also opened anew; so do those that took the places.
    assert_eq!(read_all(&reader), bytes(2));
    assert_eq!(read_point(&repo, child), bytes(2));
    let after = repo.points(&machine).expect("points");
    assert_eq!(after.len(), 3);
    for (k, point) in [0, 2, 3].into_iter().zip(&after) {
        assert_eq!(point.state, PointState::Complete);
        assert_eq!(read_point(&repo, point), bytes(k), "point {k}");
        let was = &before[usize::from(k)];
        assert_eq!((point.receipt, point.created()), (was.receipt, was.created()));
        assert_eq!(point.identity(&repo), was.identity(&repo));
        // It is found under its old id, too.
        assert_eq!(repo.resolve(&machine, &PointQuery::Id(was.id.to_string())).expect("found").id, point.id);
    }
    lease.release().expect("release");
    let swept = sweep(&repo, &machine);
    assert!(swept.deleted.iter().any(|(path, _)| path.contains(&before[1].id.to_string())), "{swept:?}");
    assert!(!dir.path().join(name::point_folder(machine.id, before[1].id)).exists());
    for (k, point) in [0, 2, 3].into_iter().zip(&repo.points(&machine).expect("points")) {
        assert_eq!(read_point(&repo, point), bytes(k), "point {k} after the sweep");
    }
    // The next backup stands on what was written anew.
    back_up(&repo, &machine, &bytes(4), "2026-01-01T04:00:00Z").expect("backup");
    assert_eq!(read_point(&repo, &repo.resolve(&machine, &PointQuery::Latest(0)).expect("latest")), bytes(4));
}

#[test]
fn cut_at_any_step_either_the_old_chain_or_the_new_one_is_whole() {
    let dir = tempfile::tempdir().expect("dir");
    let base = dir.path().join("base");
    std::fs::create_dir(&base).expect("folder");
    let (repo, machine) = with_points(&base, 4);
    let second = repo.points(&machine).expect("points").remove(1);
    forget(&repo, &machine, &second);
    drop(repo);
    let mut died = 0;
    for steps in 0.. {
        let path = dir.path().join(format!("{steps}"));
        copy(&base, &path);
        let (repo, fuse) = fused(&path);
        fuse.set(steps);
        let done = free(&repo, &machine);
        drop(repo);
        let repo = Repository::open(&path, me()).expect("open");
        let whole = || {
            let points = repo.points(&machine).expect("points");
            assert_eq!(points.len(), 3);
            for (k, point) in [0, 2, 3].into_iter().zip(&points) {
                assert_eq!(point.state, PointState::Complete, "point {k} after {steps} steps");
                assert_eq!(read_point(&repo, point), bytes(k), "point {k} after {steps} steps");
            }
        };
        whole();
        // Whoever comes next: the lease of the dead goes, what it left is cleared, and it is done again.
        keeper::sweep(&repo, &machine, &mut LeaseObserver::new(), Instant::now(), &|_| Liveness::Dead).expect("sweep");
        for left in repo.interrupted(&machine).expect("interrupted") {
            keeper::discard(&repo, &machine, &left, holder()).expect("discard");
        }
        keeper::clear(&repo, &machine, holder()).expect("clear");
        whole();
        free(&repo, &machine).expect("done again");
        sweep(&repo, &machine);
        whole();
        assert!(!path.join(name::point_folder(machine.id, second.id)).exists(), "after {steps} steps");
        let folders = std::fs::read_dir(path.join(name::points(machine.id))).expect("list").count();
        assert!(folders <= 5, "{folders} folders for three points after {steps} steps");
        std::fs::remove_dir_all(&path).expect("clean");
        if done.is_ok() {
            break;
        }
        died += 1;
    }
    assert!(died > 20, "{died} steps were cut");
}
