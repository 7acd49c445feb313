//! Tests of the repository: life of points, crashes at every step, races, old manifests put back.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    record::{
        BeginRecord, Consistency, Defaults, Found, Holder, LeaseKind, LeaseRecord, MachineDescription, Owner,
        PointRecord, encode,
    },
    *,
};
use crate::{
    Layer,
    aql::{Reader, WriterOptions},
};

mod crash;
mod fuse;
mod generations;
mod keeping;
mod rebasing;

pub(super) use fuse::Fuse;

fn me() -> Owner {
    Owner { id: Uuid::from_u128(1), name: "here".into() }
}

fn holder() -> Holder {
    Holder { name: "test".into(), host: "h".into(), process: 1, session: None, work: None }
}

fn options() -> WriterOptions {
    WriterOptions { block_log2: 14, threads: 0, ..WriterOptions::default() }
}

/// Puts back what said that a point was begun, as earlier versions left it beside the point.
fn as_begun(repo: &Repository, point: &Point, parent: Option<Uuid>) -> Interrupted {
    let record = BeginRecord { id: point.id, begun: Timestamp::UNIX_EPOCH, parent, holder: holder() };
    let file = name::begin(point.machine, point.id);
    repo.store().create(&file, &encode(&record).expect("encode")).expect("as it was begun");
    Interrupted { record }
}

fn vda() -> DiskName {
    DiskName::new("vda").expect("a name")
}

fn init(path: &Path) -> Repository {
    Repository::init(path, me(), Defaults { block_bytes: 16 << 10, ..Defaults::default() }).expect("init")
}

/// The bytes of point `n`: a few blocks, of which each point changes one.
fn bytes(n: u8) -> Vec<u8> {
    let mut bytes = vec![9; 5 * (16 << 10) + 100];
    for k in 1..=n {
        let at = usize::from(k % 5) * (16 << 10);
        bytes[at..at + 50].fill(k);
    }
    bytes
}

fn plan(size: usize) -> DiskPlan {
    DiskPlan { size: size as u64, sector_bytes: 512, full: false, options: options() }
}

fn new_point(created: &str) -> NewPoint {
    NewPoint {
        origin: None,
        created: created.parse().expect("a time"),
        consistency: Consistency::Crash,
        machine: MachineDescription { name: "db01".into(), ..MachineDescription::default() },
    }
}

fn write_disk(tx: &mut Transaction<'_>, disk: &DiskName, bytes: &[u8]) -> Result<()> {
    match tx.disk(disk, plan(bytes.len()))? {
        DiskWork::Write(mut writer) => {
            writer.put(0, bytes)?;
            writer.finish()?;
        }
        DiskWork::Sealed => {}
    }
    tx.sealed(disk, Found::Comparison, "raw")?;
    Ok(())
}

fn back_up(repo: &Repository, machine: &Machine, bytes: &[u8], created: &str) -> Result<PointRecord> {
    let parent = repo.resolve(machine, &PointQuery::Latest(0)).ok();
    let mut tx = repo.begin(machine, parent.as_ref(), holder())?;
    write_disk(&mut tx, &vda(), bytes)?;
    tx.commit(new_point(created))
}

fn read_all(reader: &Reader) -> Vec<u8> {
    let mut out = Vec::new();
    let mut block = Vec::new();
    while (out.len() as u64) < reader.size() {
        let (content, n) = reader.lookup(out.len() as u64, reader.size()).expect("lookup");
        let n = usize::try_from(n).expect("small");
        match content {
            crate::Content::Packed { block: at, .. } => {
                reader.unpack(&at, n, &mut block).expect("unpack");
                out.extend_from_slice(&block[..n]);
            }
            _ => out.resize(out.len() + n, 0),
        }
    }
    out
}

fn read_point(repo: &Repository, point: &Point) -> Vec<u8> {
    read_all(&repo.open_disk(point, &vda()).expect("open"))
}

/// A repository with `n` points of one machine, an hour apart.
fn with_points(folder: &Path, n: u8) -> (Repository, Machine) {
    let repo = init(folder);
    let machine = repo.machine_or_new("db01").expect("machine");
    for k in 0..n {
        back_up(&repo, &machine, &bytes(k), &format!("2026-01-01T{k:02}:00:00Z")).expect("backup");
    }
    (repo, machine)
}

#[test]
fn points_read_back_in_order_of_receipt() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 6);
    let points = repo.points(&machine).expect("points");
    assert_eq!(points.len(), 6);
    for (k, point) in (0..).zip(&points) {
        assert_eq!(point.state, PointState::Complete);
        assert_eq!(read_point(&repo, point), bytes(k));
    }
    assert!(points.windows(2).all(|w| w[0].receipt < w[1].receipt));
    let stored: Vec<u64> = points.iter().map(|p| p.record.as_ref().expect("record").disks[0].file_bytes).collect();
    assert!(stored[5] < stored[0] * 3, "an increment holds one block and its leaf, not the disk: {stored:?}");
}

#[test]
fn points_are_found_by_place_time_and_id() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 4);
    let points = repo.points(&machine).expect("points");
    let find = |text: &str| repo.resolve(&machine, &text.parse::<PointQuery>().expect(text)).map(|p| p.id);
    assert_eq!(find("latest").expect("found"), points[3].id);
    assert_eq!(find("latest~3").expect("found"), points[0].id);
    assert!(matches!(find("latest~4"), Err(Error::NotFound { .. })));
    assert_eq!(find("2026-01-01T02:30:00+00:00").expect("found"), points[2].id);
    assert_eq!(find("2026-01-01T02:00:00Z").expect("found"), points[2].id);
    assert!(matches!(find("2025-12-31T23:59:59Z"), Err(Error::NotFound { .. })));
    assert_eq!(find(&points[1].id.to_string()).expect("found"), points[1].id);
    assert_eq!(find(&points[1].id.simple().to_string()[..30]).expect("found"), points[1].id);
    assert!(matches!(find(&points[1].id.to_string()[..6]), Err(Error::Ambiguous { .. })), "same minute");
    for wrong in ["", "new", "latest~", "latest~x", "abc", "2026-01-01T00:00:00", "../.."] {
        assert!(wrong.parse::<PointQuery>().is_err(), "{wrong}");
    }
}

#[test]
fn a_clock_that_went_back_does_not_reorder_points() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 2);
    let late = back_up(&repo, &machine, &bytes(2), "2020-01-01T00:00:00Z").expect("backup");
    assert_eq!(repo.resolve(&machine, &PointQuery::Latest(0)).expect("found").id, late.id);
    let at: Timestamp = "2026-01-01T00:30:00Z".parse().expect("time");
    assert_eq!(repo.resolve(&machine, &PointQuery::At(at)).expect("found").id, late.id, "received last, not after");
}

#[test]
fn a_missing_file_breaks_exactly_the_points_that_need_it() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 4);
    let points = repo.points(&machine).expect("points");
    let file = |k: usize| dir.path().join(name::layer(machine.id, points[k].id, &vda()));
    let hidden = dir.path().join("hidden");
    std::fs::rename(file(1), &hidden).expect("hide");
    let states: Vec<_> = repo.points(&machine).expect("points").into_iter().map(|p| p.state.name()).collect();
    assert_eq!(states, ["complete", "missing", "missing", "missing"], "block 1 was written by point 1");
    assert!(matches!(repo.resolve(&machine, &PointQuery::Latest(0)), Ok(p) if p.id == points[0].id));
    let passed_over = |query: &str| {
        let answer = repo.answer(&machine, &query.parse().expect("a query")).expect("an answer");
        (answer.point.map(|p| p.id), answer.passed_over.iter().map(|p| p.id).collect::<Vec<_>>())
    };
    let (first, others) = (Some(points[0].id), [points[3].id, points[2].id, points[1].id]);
    assert_eq!(passed_over("latest"), (first, others.to_vec()));
    assert_eq!(passed_over("latest~1"), (None, others.to_vec()), "whole ones are counted");
    assert_eq!(passed_over("2026-01-01T02:30:00Z"), (first, others[1..].to_vec()), "the newest is later than that");
    assert_eq!(passed_over("2026-01-01T00:30:00Z"), (first, Vec::new()));
    assert_eq!(passed_over(&points[2].id.to_string()), (Some(points[2].id), Vec::new()));
    let broken = repo.open_disk(&points[3], &vda()).expect_err("its file is gone");
    assert!(broken.to_string().contains(&points[1].id.to_string()), "{broken}");
    std::fs::rename(&hidden, file(1)).expect("back");
    std::fs::OpenOptions::new().append(true).open(file(3)).and_then(|f| f.set_len(5000)).expect("cut");
    let states: Vec<_> = repo.points(&machine).expect("points").into_iter().map(|p| p.state.name()).collect();
    assert_eq!(states, ["complete", "complete", "complete", "corrupted"]);
}

#[test]
fn another_owner_reads_until_it_takes_over() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 1);
    let other = Owner { id: Uuid::from_u128(2), name: "there".into() };
    let theirs = Repository::open(dir.path(), other.clone()).expect("open");
    assert_eq!(theirs.access().expect("access"), Access::ReadOnly { owner: me() });
    assert!(matches!(back_up(&theirs, &machine, &bytes(1), "2026-01-02T00:00:00Z"), Err(Error::ForeignOwner { .. })));
    assert_eq!(read_point(&theirs, &theirs.points(&machine).expect("points")[0]), bytes(0));
    theirs.take_over().expect("take over");
    back_up(&theirs, &machine, &bytes(1), "2026-01-02T00:00:00Z").expect("now it may");
    let refused = back_up(&repo, &machine, &bytes(2), "2026-01-03T00:00:00Z");
    assert!(matches!(refused, Err(Error::ForeignOwner { .. })), "looked up at the change, not at the start");
}

#[test]
fn a_folder_without_a_repository_is_told_apart_from_damage() {
    let dir = tempfile::tempdir().expect("dir");
    assert!(matches!(Repository::open(dir.path(), me()), Err(Error::NoRepository { .. })));
    assert!(matches!(Repository::open(&dir.path().join("no"), me()), Err(Error::NoRepository { .. })));
    init(dir.path());
    assert!(matches!(Repository::init(dir.path(), me(), Defaults::default()), Err(Error::Exists { .. })));
    let file = dir.path().join("aquifer.json");
    let text = std::fs::read_to_string(&file).expect("text");
    std::fs::write(&file, text.replace("repository.v1", "repository.v9")).expect("write");
    let later = Repository::open(dir.path(), me()).expect_err("another version");
    assert!(matches!(later, Error::Format(crate::Error::Unsupported { .. })), "{later}");
    std::fs::write(&file, "{").expect("write");
    assert!(Repository::open(dir.path(), me()).is_err());
}

#[test]
fn a_repository_can_be_moved() {
    let dir = tempfile::tempdir().expect("dir");
    let (old, new) = (dir.path().join("a"), dir.path().join("b/c"));
    std::fs::create_dir_all(&old).expect("folder");
    std::fs::create_dir_all(new.parent().expect("above")).expect("folder");
    let (repo, machine) = with_points(&old, 3);
    drop(repo);
    std::fs::rename(&old, &new).expect("move");
    let repo = Repository::open(&new, me()).expect("open");
    for (k, point) in (0..).zip(repo.points(&machine).expect("points")) {
        assert_eq!(read_point(&repo, &point), bytes(k));
    }
}

#[test]
fn links_in_a_repository_lead_nowhere() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 1);
    let point = &repo.points(&machine).expect("points")[0];
    let file = dir.path().join(name::layer(machine.id, point.id, &vda()));
    let outside = dir.path().join("outside");
    std::fs::rename(&file, &outside).expect("move");
    std::os::unix::fs::symlink(&outside, &file).expect("link");
    assert!(repo.open_disk(point, &vda()).is_err());
    let record = dir.path().join(name::point(machine.id, point.id));
    std::fs::rename(&record, &outside).expect("move");
    std::os::unix::fs::symlink(&outside, &record).expect("link");
    assert_eq!(repo.points(&machine).expect("points")[0].state.name(), "missing");
}

#[test]
fn machines_answer_to_names_aliases_and_ids() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 1);
    let other = repo.machine_or_new("web").expect("machine");
    assert_eq!(repo.machine_or_new("web").expect("the same").id, other.id);
    let renamed = repo.rename(&machine, "database").expect("rename");
    assert_eq!((renamed.name.as_str(), renamed.aliases.as_slice()), ("database", &["db01".to_owned()][..]));
    for wanted in ["database", "db01", &machine.id.to_string()] {
        assert_eq!(repo.machine(wanted).expect(wanted).id, machine.id);
    }
    assert!(matches!(repo.machine("nobody"), Err(Error::NotFound { .. })));
    assert_eq!(repo.machines().expect("machines").len(), 2);
}

#[test]
fn disk_names_that_are_not_plain_words_are_refused() {
    for wrong in ["", ".", "..", "a/b", "a:b", "-x", ".hidden", "ä", "a\0", &"x".repeat(65)] {
        assert!(DiskName::new(wrong).is_err(), "{wrong:?}");
    }
    for right in ["vda", "0", "scsi0-0", "disk.1_b", &"x".repeat(64)] {
        assert!(DiskName::new(right).is_ok(), "{right:?}");
    }
}

#[test]
fn creating_one_name_from_many_threads_succeeds_once() {
    let dir = tempfile::tempdir().expect("dir");
    let store = Store::directory(dir.path()).expect("store");
    for round in 0..20 {
        let name = format!("a/b/{round}");
        let won: usize = std::thread::scope(|scope| {
            let race = |k: u8| {
                let (store, name) = (store.clone(), name.clone());
                scope.spawn(move || match store.create(&name, &vec![k; 10_000]) {
                    Ok(()) => 1,
                    Err(Error::Exists { .. }) => 0,
                    Err(e) => panic!("{e}"),
                })
            };
            let threads: Vec<_> = (0..8).map(race).collect();
            threads.into_iter().map(|t| t.join().expect("thread")).sum()
        });
        assert_eq!(won, 1);
        let found = store.get(&name).expect("get").expect("there");
        assert!(found.len() == 10_000 && found.iter().all(|b| *b == found[0]), "whole, and of one writer");
    }
}

#[test]
fn a_machine_named_by_several_at_once_is_one_machine() {
    for _ in 0..10 {
        let dir = tempfile::tempdir().expect("a folder");
        init(dir.path());
        let start = std::sync::Barrier::new(4);
        let name = || {
            let repo = Repository::open(dir.path(), me()).expect("open");
            start.wait();
            repo.machine_or_new("db01").expect("a machine").id
        };
        let ids: Vec<Uuid> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(name)).collect();
            threads.into_iter().map(|thread| thread.join().expect("a thread")).collect()
        });
        let repo = Repository::open(dir.path(), me()).expect("open");
        let one = repo.machine("db01").expect("not ambiguous");
        assert_eq!(ids, vec![one.id; 4]);
    }
}

#[test]
fn two_backups_of_one_machine_do_not_run_at_once() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 1);
    let first = repo.begin(&machine, None, holder()).expect("begin");
    let second = repo.begin(&machine, None, holder()).expect_err("held");
    assert!(matches!(&second, Error::Locked { holder, .. } if holder.contains("process 1 on h")), "{second}");
    first.interrupt().expect("release");
    repo.begin(&machine, None, holder()).expect("free").interrupt().expect("release");
}

#[test]
fn one_layer_file_has_one_writer_whatever_leases_say() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 1);
    let mut tx = repo.begin(&machine, None, holder()).expect("begin");
    let DiskWork::Write(mut writer) = tx.disk(&vda(), plan(100_000)).expect("disk") else { panic!("new") };
    writer.put(0, &[1; 16 << 10]).expect("put");
    // Somebody believes the holder dead and goes on with the same backup.
    keeper::sweep(&repo, &machine, &mut LeaseObserver::new(), Instant::now(), &|_| Liveness::Dead).expect("sweep");
    let begun = repo.interrupted(&machine).expect("interrupted").remove(0);
    let mut other = repo.resume(&machine, &begun, holder()).expect("resume");
    assert!(matches!(other.disk(&vda(), plan(100_000)), Err(Error::Locked { .. })));
    drop(writer);
    assert!(matches!(other.disk(&vda(), plan(100_000)), Ok(DiskWork::Write(_))));
}

#[test]
fn a_lease_stands_as_long_as_it_beats_by_the_observers_time() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 1);
    let point = repo.points(&machine).expect("points").remove(0);
    let mut lease = repo.lease_read(&machine, &point, holder()).expect("lease");
    let mut observer = LeaseObserver::new();
    let start = Instant::now();
    let unknown: &dyn Fn(&Holder) -> Liveness = &|_| Liveness::Unknown;
    let mut live = |at: u64, tell| {
        let (live, dead) = observer.observe(&repo, start + Duration::from_secs(at), tell).expect("observe");
        (live.len(), dead.len())
    };
    assert_eq!(live(0, unknown), (1, 0));
    assert_eq!(live(59, unknown), (1, 0));
    lease.beat().expect("beat");
    assert_eq!(live(61, unknown), (1, 0), "it beat meanwhile");
    assert_eq!(live(120, unknown), (1, 0));
    assert_eq!(live(121, unknown), (0, 1));
    assert_eq!(live(500, &|_| Liveness::Alive), (1, 0), "its process was seen");
    assert_eq!(live(500, &|_| Liveness::Dead), (0, 1));
    let fresh = LeaseObserver::new().observe(&repo, start, unknown).expect("observe");
    assert_eq!(fresh.0.len(), 1, "who has seen nothing judges nobody");
    lease.release().expect("release");
    assert_eq!(repo.leases().expect("leases").len(), 0);
}

#[test]
fn a_layer_opened_through_the_store_is_the_shared_reader() {
    let dir = tempfile::tempdir().expect("dir");
    let (repo, machine) = with_points(dir.path(), 3);
    let points = repo.points(&machine).expect("points");
    let a: Arc<Reader> = repo.open_disk(&points[1], &vda()).expect("open");
    let b: Arc<Reader> = repo.open_disk(&points[2], &vda()).expect("open");
    let slot_of = |reader: &Reader| match reader.lookup(4 * (16 << 10), 1).expect("lookup").0 {
        crate::Content::Packed { block, .. } => (reader.file_id(block.file), block.offset),
        other => panic!("{other:?}"),
    };
    assert_eq!(slot_of(&a), slot_of(&b), "one block of one file has one name in the cache");
}

/// Copies a folder with all in it.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("folder");
    for entry in std::fs::read_dir(from).expect("list") {
        let entry = entry.expect("entry");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target)
        } else {
            std::fs::copy(entry.path(), target).map(|_| ()).expect("copy")
        }
    }
}

/// A repository whose calls can be made to fail.
fn fused(path: &Path) -> (Repository, Fuse) {
    let store = Store::directory(path).expect("store");
    let Store::Directory(directory) = &store;
    let fuse = directory.fuse.clone();
    (Repository::open_store(store, me()).expect("open"), fuse)
}
