//! What moves, and that it is right: replicas of two alternating repositories, resizes, interruptions, takeovers and
//! ways home.

use std::time::Duration;

use aquifer_runner::{
    fail::Code,
    failback::{Changed, commit, failback, give_back, switchover},
    failover::{failover, loss, permanent, planned, undo},
    replica::{
        model::{HomeKind, Origin, Switch},
        run::Ran,
        state::State,
    },
    source::PointRef,
};
use jiff::Timestamp;

use crate::stage::{Dice, Disks, MACHINE, REPLICA, Stage, differing, scribble};

const MIB: usize = 1 << 20;
const HOUR: i64 = 3600;

fn at(hour: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + hour * HOUR).expect("a time")
}

/// A machine whose disks are half empty.
fn machine(dice: &mut Dice) -> Disks {
    let mut disk = |bytes: usize| {
        let mut disk = vec![0; bytes];
        for (_, grain) in disk.chunks_mut(4096).enumerate().filter(|(at, _)| (at / 40).is_multiple_of(2)) {
            grain.fill_with(|| dice.roll() as u8);
        }
        disk
    };
    vec![("vda".into(), disk(3 * MIB)), ("vdb".into(), disk(MIB + 70_000 / 512 * 512))]
}

#[test]
fn points_of_two_repositories_are_followed_and_only_changes_move() {
    let stage = Stage::new();
    let mut dice = Dice::new(1);
    let mut disks = machine(&mut dice);
    let mut expected: Vec<Disks> = Vec::new();

    stage.back_up("r1", &disks, true, at(0));
    let first = stage.made();
    assert_eq!((first.len(), first[0].taken, first[0].origin), (1, at(0), Origin::Job));
    assert_eq!(first[0].carried.bytes_read_production, 0);
    expected.push(disks.clone());
    assert_eq!(stage.replicate().expect("a run"), Ran::NoNewPoint, "nothing newer, nothing done");

    // The other repository's chain has nothing in common: digests decide.
    let before = disks.clone();
    disks.iter_mut().for_each(|(_, bytes)| {
        scribble(bytes, 3, &mut dice);
    });
    stage.back_up("r2", &disks, true, at(24));
    let made = stage.made().remove(0);
    let moved: u64 = before.iter().zip(&disks).map(|((_, a), (_, b))| clusters(a, b)).sum();
    assert_eq!((made.taken, made.carried.bytes_written), (at(24), moved));
    expected.push(disks.clone());

    // Back to the first one: its own tables, with what the replica's layers say, know where to look.
    let before = disks.clone();
    disks.iter_mut().for_each(|(_, bytes)| {
        scribble(bytes, 2, &mut dice);
    });
    stage.back_up("r1", &disks, false, at(48));
    let made = stage.made().remove(0);
    let changed: u64 = before.iter().zip(&disks).map(|((_, a), (_, b))| clusters(a, b)).sum();
    assert_eq!((made.taken, made.carried.bytes_written), (at(48), changed));
    let total: usize = disks.iter().map(|(_, bytes)| bytes.len()).sum();
    assert!(made.carried.bytes_read < total as u64 / 2, "{:?}", made.carried);
    expected.push(disks.clone());

    // A new full point with the same content moves nothing.
    stage.back_up("r1", &disks, true, at(72));
    let made = stage.made().remove(0);
    assert_eq!((made.taken, made.carried.bytes_written), (at(72), 0));
    expected.push(disks.clone());

    // One disk grows, one shrinks, one is new; later one is gone.
    disks[0].1.resize(4 * MIB + 512, 0);
    disks[0].1[3 * MIB + 5000..3 * MIB + 9000].fill(7);
    disks[1].1.truncate(MIB / 2 + 512);
    disks.push(("vdc".into(), vec![9; 100_352]));
    stage.back_up("r2", &disks, false, at(96));
    assert!(stage.made().remove(0).carried.bytes_written <= 6 * 65_536);
    expected.push(disks.clone());
    disks.remove(1);
    disks[0].1.truncate(2 * MIB);
    stage.back_up("r2", &disks, false, at(97));
    stage.made();
    expected.push(disks.clone());

    let points = stage.points();
    assert_eq!(points.len(), expected.len());
    points.iter().zip(&expected).for_each(|(point, disks)| stage.assert_point(point, disks));
    assert!(stage.warned().is_empty());
}

/// Bytes of the clusters in which two disks differ, where the new one is not all zeros.
fn clusters(a: &[u8], b: &[u8]) -> u64 {
    let pairs = a.chunks(65_536).zip(b.chunks(65_536));
    pairs.filter(|(a, b)| a != b && b.iter().any(|x| *x != 0)).map(|(_, b)| b.len() as u64).sum()
}

#[test]
fn a_dropped_connection_goes_on_in_the_same_point() {
    let mut stage = Stage::new();
    stage.options.parallel = 1;
    let mut dice = Dice::new(2);
    let mut disks = machine(&mut dice);
    stage.back_up("r1", &disks, true, at(0));
    *stage.drops_after.lock() = Some(2 * MIB as u64 + 1);
    assert_eq!(stage.replicate().expect_err("it drops").code, Code::Net);
    assert!(stage.points().is_empty());
    // A newer backup appears meanwhile; what was begun is finished first.
    let before = disks.clone();
    disks.iter_mut().for_each(|(_, bytes)| {
        scribble(bytes, 1, &mut dice);
    });
    stage.back_up("r1", &disks, false, at(1));
    *stage.drops_after.lock() = None;
    let made = stage.made();
    assert_eq!(made.iter().map(|point| point.taken).collect::<Vec<_>>(), [at(0), at(1)]);
    stage.assert_point(&made[0], &before);
    stage.assert_point(&made[1], &disks);
    let total: u64 = before.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    assert!(made[0].carried.bytes_read <= total, "what was marked is not read again: {:?}", made[0].carried);
}

#[test]
fn lost_digests_are_made_anew_and_old_points_make_room() {
    let mut stage = Stage::new();
    (stage.options.keep, stage.options.squash_at) = (3, 2);
    let mut dice = Dice::new(3);
    let mut disks = machine(&mut dice);
    let mut expected = Vec::new();
    for hour in 0..9 {
        stage.back_up("r1", &disks, hour == 0, at(hour));
        if hour == 4 {
            std::fs::remove_dir_all(stage.path("meta")).expect("remove");
        }
        stage.made();
        assert_eq!(stage.warned().contains(&Code::WarnResync), hour == 4, "{hour}");
        expected.push(disks.clone());
        disks.iter_mut().for_each(|(_, bytes)| {
            scribble(bytes, 2, &mut dice);
        });
        let points = stage.points();
        assert_eq!(points.len(), expected.len().min(3));
        let stay = &expected[expected.len() - points.len()..];
        points.iter().zip(stay).for_each(|(point, disks)| stage.assert_point(point, disks));
    }
    let layers = std::fs::read_dir(stage.file("vda")).expect("list").count();
    assert!(layers <= 5, "{layers} layers are left");
}

#[test]
fn a_damaged_newest_point_is_told_and_nothing_older_is_taken() {
    let stage = Stage::new();
    let mut dice = Dice::new(4);
    let mut disks = machine(&mut dice);
    stage.back_up("r1", &disks, true, at(0));
    stage.back_up("r1", &disks, false, at(1));
    stage.made();
    disks.iter_mut().for_each(|(_, bytes)| {
        scribble(bytes, 2, &mut dice);
    });
    let id = stage.back_up("r1", &disks, false, at(2));
    let repo = stage.repository("r1");
    let found = repo.machine(MACHINE).expect("machine");
    aquifer_formats::repo::keeper::mark_damaged(&repo, &found, id, Some("a test".into())).expect("mark");
    assert_eq!(stage.replicate().expect("a run"), Ran::NoNewPoint);
    assert_eq!(stage.warned(), [Code::WarnSkipped]);
    assert_eq!(stage.points().len(), 1);
    let other = aquifer_runner::replica::run::ReplicaSpec {
        machine: "nobody".into(),
        name: "x".into(),
        folder: stage.path("dr").join("x"),
        ..stage.spec()
    };
    let fail = stage.at(|desk| aquifer_runner::replica::run::replicate(desk, &other)).expect_err("no backup");
    assert_eq!(fail.code, Code::NotFound);
}

#[test]
fn a_takeover_at_any_point_is_taken_back_or_made_final() {
    let stage = Stage::new();
    let mut dice = Dice::new(5);
    let mut disks = machine(&mut dice);
    let mut expected = Vec::new();
    for hour in 0..3 {
        stage.back_up("r1", &disks, hour == 0, at(hour));
        stage.made();
        expected.push(disks.clone());
        disks.iter_mut().for_each(|(_, bytes)| {
            scribble(bytes, 2, &mut dice);
        });
    }
    let folder = std::fs::canonicalize(stage.file("")).expect("folder");
    let check_points =
        || stage.points().iter().zip(&expected).for_each(|(point, disks)| stage.assert_point(point, disks));

    stage.at(|desk| failover(desk, REPLICA, &PointRef::Latest(2), None, true)).expect("at the oldest");
    let mut serving = expected[0].clone();
    stage.guest_writes(&folder, &mut serving, 3, &mut dice);
    check_points();
    assert_eq!(stage.replicate().expect("held"), Ran::OnHold(State::Failover));
    let fail = stage.at(|desk| failover(desk, REPLICA, &PointRef::Latest(0), None, true)).expect_err("twice");
    assert_eq!(fail.code, Code::State);
    let record = stage.at(|desk| desk.load(REPLICA)).expect("load").record;
    assert!(
        stage
            .at(|desk| loss(desk.cache, &desk.points(REPLICA)?, &record))
            .expect("loss")
            .is_some_and(|loss| loss.bytes > 0)
    );
    stage.at(|desk| undo(desk, REPLICA, false)).expect("undo");
    assert_eq!(stage.host.count(), 0);
    check_points();
    assert_eq!(stage.points().len(), 3);

    // A machine that does not come up keeps its layer, and is tried again.
    stage.host.refuses.store(true, std::sync::atomic::Ordering::Relaxed);
    stage.at(|desk| failover(desk, REPLICA, &PointRef::At(at(1)), None, true)).expect_err("it does not want to");
    assert_eq!(stage.at(|desk| desk.load(REPLICA)).expect("load").record.state, State::FailedFailover);
    stage.at(|desk| failover(desk, REPLICA, &PointRef::Latest(0), None, true)).expect("again");
    let mut serving = expected[1].clone();
    stage.guest_writes(&folder, &mut serving, 3, &mut dice);
    stage.at(|desk| permanent(desk, REPLICA)).expect("permanent");
    let files = stage.host.files(&folder).expect("it runs on");
    for (file, (_, bytes)) in files.iter().zip(&serving) {
        stage.assert_file(file, aquifer_formats::probe::Format::Qcow2, bytes, "permanent");
        assert_eq!(
            std::fs::read_dir(file.parent().expect("folder")).expect("list").count(),
            1,
            "nothing of ours is left"
        );
    }
    assert!(!stage.file("replica.json").exists());
    assert_eq!(stage.replicate().expect("held"), Ran::OnHold(State::PermanentFailover));
}

/// The whole way: a takeover at an older point, production that went its own way, two passes, and what follows.
fn way_home(kind: HomeKind, seed: u64) {
    let stage = Stage::new();
    let mut dice = Dice::new(seed);
    let mut disks = machine(&mut dice);
    stage.back_up("r1", &disks, true, at(0));
    stage.made();
    let old = disks.clone();
    disks.iter_mut().for_each(|(_, bytes)| {
        scribble(bytes, 2, &mut dice);
    });
    stage.back_up("r1", &disks, false, at(1));
    stage.made();
    // Production lives on, then is lost, and comes back with what it had.
    let mut production = disks.clone();
    production.iter_mut().for_each(|(_, bytes)| {
        scribble(bytes, 2, &mut dice);
    });
    if kind != HomeKind::New {
        stage.put_production(&production);
    }
    let home = stage.home(kind);
    let folder = std::fs::canonicalize(stage.file("")).expect("folder");
    stage.at(|desk| failover(desk, REPLICA, &PointRef::Latest(1), None, true)).expect("failover");
    let mut serving = old.clone();
    stage.guest_writes(&folder, &mut serving, 4, &mut dice);

    let different: u64 = production.iter().zip(&serving).map(|((_, a), (_, b))| differing(a, b)).sum();
    let first =
        stage.at(|desk| failback(desk, REPLICA, home.clone(), Switch::Manual, Changed::default())).expect("pass 1");
    if kind != HomeKind::New {
        assert!(first.bytes_written <= different, "{first:?}, {different} differ");
        assert!(first.bytes_written > 0);
        stage.assert_production(&serving, "after the first pass");
    }
    // The replica serves on.
    let changed = stage.guest_writes(&folder, &mut serving, 3, &mut dice);
    let switched = stage.at(|desk| switchover(desk, REPLICA, true, Duration::ZERO)).expect("pass 2");
    assert!(switched.carried.bytes_written as f64 <= 1.05 * changed as f64, "{switched:?}, {changed} changed");
    assert_eq!(switched.carried.bytes_read_production, 0);
    stage.assert_home(&home, &serving, "after the second pass");
    let protective = stage.points().pop().expect("a point");
    assert_eq!(protective.origin, Origin::PreFailback);
    stage.assert_point(&protective, &serving);
    assert!(stage.host.files(&home.folder).is_some() && stage.host.files(&folder).is_none());

    // Taken back once, and gone again.
    stage.at(|desk| give_back(desk, REPLICA, false)).expect("give back");
    assert!(stage.host.files(&home.folder).is_none() && stage.host.files(&folder).is_some());
    stage.guest_writes(&folder, &mut serving, 2, &mut dice);
    let home = aquifer_runner::replica::model::Home {
        kind: if kind == HomeKind::New { HomeKind::Restored } else { kind },
        ..home
    };
    stage.at(|desk| failback(desk, REPLICA, home.clone(), Switch::Manual, Changed::default())).expect("pass 1");
    stage.at(|desk| switchover(desk, REPLICA, true, Duration::ZERO)).expect("pass 2");
    stage.assert_home(&home, &serving, "the second time");
    stage.at(|desk| commit(desk, REPLICA, false)).expect("commit");
    assert_eq!(stage.at(|desk| desk.load(REPLICA)).expect("load").record.state, State::Ready);

    // The next run is incremental against what came home.
    let before = serving.clone();
    serving.iter_mut().for_each(|(_, bytes)| {
        scribble(bytes, 1, &mut dice);
    });
    let later = Timestamp::now().checked_add(jiff::Span::new().hours(1)).expect("a time");
    stage.back_up("r1", &serving, false, later);
    let made = stage.made().remove(0);
    let moved: u64 = before.iter().zip(&serving).map(|((_, a), (_, b))| clusters(a, b)).sum();
    assert_eq!(made.carried.bytes_written, moved);
    stage.assert_point(&made, &serving);
    stage.warned();
}

#[test]
fn the_way_home_to_the_original() {
    way_home(HomeKind::Original, 6);
}

#[test]
fn the_way_home_to_a_machine_restored_elsewhere() {
    way_home(HomeKind::Restored, 7);
}

#[test]
fn the_way_home_to_a_new_machine() {
    way_home(HomeKind::New, 8);
}

#[test]
fn a_planned_takeover_loses_nothing() {
    let stage = Stage::new();
    let mut dice = Dice::new(9);
    let mut disks = machine(&mut dice);
    stage.back_up("r1", &disks, true, at(0));
    stage.made();
    stage.put_production(&disks);
    let home = stage.home(HomeKind::Original);
    stage.at(|desk| {
        use aquifer_runner::host::{Attachment, Host, ImageFormat};
        let disks =
            home.disks.iter().map(|disk| Attachment::File { path: disk.path.clone(), format: ImageFormat::Raw });
        let shape = aquifer_runner::host::placed::Placed::read(&home.folder).expect("placed");
        let shape = shape.shape(MACHINE, &Default::default(), &[]).expect("shape");
        stage.host.start(&shape, &disks.collect::<Vec<_>>(), &desk.places(&home.folder)).expect("start");
    });
    stage.guest_writes(&home.folder, &mut disks, 3, &mut dice);
    stage.back_up("r1", &disks, false, at(1));
    stage.guest_writes(&home.folder, &mut disks, 2, &mut dice);
    let done = stage.at(|desk| planned(desk, &stage.spec(), &home.folder, true, true)).expect("planned");
    assert!(stage.host.files(&home.folder).is_none());
    stage.assert_point(&done.last, &disks);
    assert!(done.last.carried.bytes_read_production > 0);
    assert_eq!(stage.points().len(), 3);
}

#[test]
fn a_replica_that_somebody_else_has_is_not_touched() {
    let stage = Stage::new();
    let mut dice = Dice::new(10);
    let disks = machine(&mut dice);
    stage.back_up("r1", &disks, true, at(0));
    stage.made();
    let stamp = stage.file("replica.json");
    let text = std::fs::read_to_string(&stamp).expect("stamp");
    let record = stage.at(|desk| desk.load(REPLICA)).expect("load").record;
    let ours = stage.me.id.to_string();
    for text in [
        text.replace(&record.lineage.to_string(), &uuid::Uuid::new_v4().to_string()),
        text.replace("\"epoch\": 1", "\"epoch\": 3"),
        text.replace("\"epoch\": 1", "\"epoch\": 2").replace(&ours, &uuid::Uuid::new_v4().to_string()),
    ] {
        std::fs::write(&stamp, text).expect("write");
        let fail = stage.at(|desk| failover(desk, REPLICA, &PointRef::Latest(0), None, true)).expect_err("not ours");
        assert_eq!(fail.code, Code::ForeignOwner);
        assert_eq!(stage.host.count(), 0);
    }
    std::fs::write(&stamp, text).expect("write");
    stage.at(|desk| failover(desk, REPLICA, &PointRef::Latest(0), None, true)).expect("ours again");
}
