//! Old, mixed and cut manifests are detected by whoever has seen a newer one.

use super::{record::Hash, *};

/// A machine with `n` generations, each of which renames it.
fn renamed(path: &Path, n: u64) -> (Repository, Machine, Vec<Seen>) {
    let repo = init(path);
    let machine = repo.machine_or_new("m").expect("machine");
    let mut seen = Vec::new();
    for k in 0..n {
        repo.rename(&machine, &format!("m{k}")).expect("rename");
        seen.push(repo.freshness(&machine, None).expect("fresh").0.expect("a generation"));
    }
    (repo, machine, seen)
}

#[test]
fn every_older_generation_put_back_is_detected_by_a_reader_with_memory() {
    let dir = tempfile::tempdir().expect("dir");
    let n = 12;
    let (repo, machine, seen) = renamed(dir.path(), n);
    let file = |g: u64| dir.path().join(name::generation(machine.id, g));
    for newest in (1..=n).rev() {
        for (generation, memory) in (1..).zip(&seen) {
            let fresh = repo.freshness(&machine, Some(*memory));
            if generation <= newest {
                assert_eq!(fresh.expect("fresh").1, Freshness::AsSeenOrNewer, "{generation} of {newest}");
            } else {
                assert!(matches!(fresh, Err(Error::RolledBack { .. })), "{generation} of {newest}");
            }
        }
        assert_eq!(repo.freshness(&machine, None).expect("read").1, Freshness::Unknown);
        std::fs::remove_file(file(newest)).expect("cut");
    }
    assert!(matches!(repo.freshness(&machine, Some(seen[0])), Err(Error::RolledBack { .. })));
}

#[test]
fn a_generation_of_another_history_is_detected() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine, seen) = renamed(dir.path(), 6);
    for swapped in 1..=6u64 {
        let file = dir.path().join(name::generation(machine.id, swapped));
        let original = std::fs::read_to_string(&file).expect("read");
        std::fs::write(&file, original.replace(&format!("\"m{}\"", swapped - 1), "\"evil\"")).expect("write");
        let fresh = repo.freshness(&machine, Some(seen[0]));
        if swapped == 6 {
            assert!(fresh.is_ok(), "the newest alone cannot be told from a true one by an older memory");
            assert!(matches!(repo.freshness(&machine, Some(seen[5])), Err(Error::RolledBack { .. })));
        } else {
            assert!(matches!(fresh, Err(Error::RolledBack { .. })), "{swapped}");
        }
        std::fs::write(&file, original).expect("restore");
    }
    assert!(repo.freshness(&machine, Some(seen[0])).is_ok());
    let mut other = seen[3];
    other.hash = Hash::of(b"other");
    assert!(matches!(repo.freshness(&machine, Some(other)), Err(Error::RolledBack { .. })));
}

#[test]
fn a_damaged_newest_generation_is_an_error_not_an_older_list() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 3);
    let file = dir.path().join(name::generation(machine.id, 3));
    let mut damaged = std::fs::read(&file).expect("read");
    let middle = damaged.len() / 2;
    damaged.truncate(middle);
    std::fs::write(&file, damaged).expect("write");
    assert!(repo.points(&machine).is_err());
}

#[test]
fn a_record_that_was_exchanged_is_corrupted() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 2);
    let points = repo.points(&machine).expect("points");
    let file = |k: usize| dir.path().join(name::point(machine.id, points[k].id));
    std::fs::copy(file(0), file(1)).expect("exchange");
    let states: Vec<_> = repo.points(&machine).expect("points").iter().map(|p| p.state.name()).collect();
    assert_eq!(states, ["complete", "corrupted"]);
}

#[test]
fn changes_from_many_threads_all_arrive_in_one_chain() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 1);
    let point = repo.points(&machine).expect("points")[0].id;
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for k in 0..5 {
                    keeper::pin(&repo, &machine, point, k % 2 == 0).expect("pin");
                }
            });
        }
    });
    let (seen, _) = repo.freshness(&machine, None).expect("fresh");
    assert_eq!(seen.expect("a generation").generation, 31);
    let first = manifest_seen(dir.path(), &machine, 1);
    assert_eq!(repo.freshness(&machine, Some(first)).expect("chain").1, Freshness::AsSeenOrNewer);
}

fn manifest_seen(path: &Path, machine: &Machine, generation: u64) -> Seen {
    let bytes = std::fs::read(path.join(name::generation(machine.id, generation))).expect("read");
    Seen { generation, hash: Hash::of(&bytes) }
}
