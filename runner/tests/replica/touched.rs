//! Promise: what lies in a replica's folder is built on only where it is what was settled there: changed layers, damaged
//! notes, files of strangers, a catalogue or a stamp of another time.

use std::{
    fs,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use aquifer_formats::probe::Format;
use aquifer_runner::{
    fail::Code,
    failback::{Changed, failback, give_back, switchover},
    failover::{Manner, failover_as, permanent, start_again, undo},
    host::placed::Placed,
    replica::{
        build::Moved,
        desk::Desk,
        model::{HomeKind, ReplicaRecord, Switch},
        recover::recover,
        run::replicate,
        state::State,
        trust::{self, Holds, Proof},
    },
    source::PointRef,
};
use jiff::Timestamp;

use crate::stage::{Dice, Disks, REPLICA, Stage, img, scribble};

const MIB: usize = 1 << 20;
const LATEST: PointRef = PointRef::Latest(0);

fn at(hour: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + hour * 3600).expect("a time")
}

fn machine(dice: &mut Dice) -> Disks {
    let mut disk = vec![0; 3 * MIB];
    disk.chunks_mut(4096).step_by(2).for_each(|grain| grain.fill_with(|| dice.roll() as u8));
    vec![("vda".into(), disk)]
}

/// A replica with so many points, each a little different; what they hold.
fn replica_of(stage: &Stage, points: i64, dice: &mut Dice) -> Vec<Disks> {
    let mut disks = machine(dice);
    let mut expected = Vec::new();
    for hour in 0..points {
        if hour > 0 {
            // Behind the first megabyte: that one stays in the first layer.
            scribble(&mut disks[0].1[MIB..], 2, dice);
        }
        stage.back_up("r1", &disks, hour == 0, at(hour));
        stage.made();
        expected.push(disks.clone());
    }
    assert!(stage.warned().is_empty());
    expected
}

fn record(stage: &Stage) -> ReplicaRecord {
    stage.at(|desk| desk.load(REPLICA)).expect("load").record
}

fn qemu_writes(stage: &Stage, file: &str, what: &str) {
    let done = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", what])
        .arg(stage.file(file))
        .output()
        .expect("qemu-io");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

fn takes_over(stage: &Stage, point: &PointRef, force: bool) -> Result<(), Code> {
    let manner = Manner { start: true, force };
    stage.at(|desk| failover_as(desk, REPLICA, point, None, manner)).map(drop).map_err(|fail| fail.code)
}

#[test]
fn a_layer_that_was_changed_is_not_built_on() {
    let stage = Stage::new();
    let mut dice = Dice::new(21);
    let mut expected = replica_of(&stage, 2, &mut dice);
    qemu_writes(&stage, "vda/1.qcow2", "write -P 0x5a 128k 64k");

    assert_eq!(takes_over(&stage, &LATEST, false), Err(Code::BlockCorrupt));
    assert_eq!((record(&stage).state, stage.host.count()), (State::Ready, 0));
    takes_over(&stage, &LATEST, true).expect("whoever wants it all the same");
    assert!(stage.warned().contains(&Code::WarnResync) && record(&stage).needs_resync);
    stage.at(|desk| undo(desk, REPLICA, false)).expect("undo");

    // The next run reads the replica's own disk, and sends what was changed there as well.
    let mut disks = expected[1].clone();
    scribble(&mut disks[0].1[2 * MIB..], 1, &mut dice);
    stage.back_up("r1", &disks, false, at(5));
    let made = stage.made().remove(0);
    assert!(stage.warned().contains(&Code::WarnResync));
    stage.assert_point(&made, &disks);
    expected.push(disks.clone());
    // It is known from then on: nothing is read again, and older points stay what they are.
    scribble(&mut disks[0].1[2 * MIB..], 1, &mut dice);
    stage.back_up("r1", &disks, false, at(6));
    let made = stage.made().remove(0);
    assert!(stage.warned().is_empty());
    assert!(made.carried.bytes_read < MIB as u64, "{:?}", made.carried);
    stage.assert_point(&made, &disks);
    assert_eq!(takes_over(&stage, &PointRef::Latest(3), false), Err(Code::BlockCorrupt), "the oldest point");
    takes_over(&stage, &PointRef::Latest(1), false).expect("a point of after it");
    assert!(stage.warned().is_empty());
}

#[test]
fn a_merge_that_was_killed_before_its_layer_had_a_name_is_no_change_from_outside() {
    let stage = Stage::new();
    let mut dice = Dice::new(27);
    let expected = replica_of(&stage, 2, &mut dice);
    let (record, point) = (record(&stage), stage.points().remove(1));
    let looks = || trust::look(&record, &point).expect("look");
    let (layer, part) = (stage.file("vda/2.qcow2"), stage.file("vda/2.qcow2.merged.1.part"));
    fs::copy(&layer, &part).expect("what says the same");
    trust::replace(&record, "vda/2.qcow2", &part, (Holds::Point(point.id), 0)).expect("enter");
    assert_eq!(looks(), [], "killed before the name was given");
    fs::rename(&part, &layer).expect("the name");
    assert_eq!(looks(), [], "and afterwards");
    stage.assert_point(&point, &expected[1]);
    fs::copy(stage.file("vda/1.qcow2"), &part).expect("another file");
    fs::rename(&part, &layer).expect("the name");
    assert_eq!(looks().len(), 1, "what is neither was changed");
    let refused = trust::replace(&record, "vda/2.qcow2", &stage.file("vda/1.qcow2"), (Holds::Point(point.id), 0));
    assert_eq!(refused.map_err(|fail| fail.code), Err(Code::State), "and is not merged as if it were not");
}

#[test]
fn a_layer_that_was_only_touched_costs_a_look() {
    let stage = Stage::new();
    let mut dice = Dice::new(22);
    let expected = replica_of(&stage, 2, &mut dice);
    let file = fs::File::options().write(true).open(stage.file("vda/1.qcow2")).expect("layer");
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).expect("touch");
    takes_over(&stage, &LATEST, false).expect("it holds what it held");
    assert_eq!(stage.warned(), [Code::WarnResync]);
    stage.at(|desk| undo(desk, REPLICA, false)).expect("undo");
    takes_over(&stage, &LATEST, false).expect("again");
    assert!(stage.warned().is_empty(), "it was looked at once");
    stage.at(|desk| undo(desk, REPLICA, false)).expect("undo");
    // The ledger itself is lost, and with it the proof that nothing was touched.
    fs::remove_file(stage.file("layers.json")).expect("remove");
    takes_over(&stage, &LATEST, false).expect("the digests say the same");
    assert_eq!(stage.warned(), [Code::WarnResync]);
    stage.at(|desk| undo(desk, REPLICA, false)).expect("undo");
    stage.points().iter().zip(&expected).for_each(|(point, disks)| stage.assert_point(point, disks));
}

#[test]
fn an_older_point_is_proven_once_for_as_long_as_it_looks_the_same() {
    let stage = Stage::new();
    let mut dice = Dice::new(43);
    replica_of(&stage, 3, &mut dice);
    let touch = |seconds| {
        let file = fs::File::options().write(true).open(stage.file("vda/1.qcow2")).expect("layer");
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).expect("touch");
    };
    let prove = |number: usize| {
        let (ahead, checked) = (AtomicU64::new(0), AtomicU64::new(0));
        let pace = |moved: Moved| {
            match moved {
                Moved::Ahead(bytes) => ahead.fetch_add(bytes, Ordering::Relaxed),
                Moved::Checked(bytes) => checked.fetch_add(bytes, Ordering::Relaxed),
                other => panic!("{other:?}"),
            };
            Ok(())
        };
        let (record, points) = (record(&stage), stage.points());
        let proof = stage.at(|desk| trust::prove(&Desk { pace: &pace, ..*desk }, &record, &points[number]));
        assert_eq!(ahead.load(Ordering::Relaxed), checked.load(Ordering::Relaxed), "how far it is, is told");
        (proof.expect("it is read"), checked.into_inner())
    };
    let whole = 3 * MIB as u64;
    touch(1);
    assert_eq!(prove(0), (Proof::Same, whole));
    assert_eq!(prove(0), (Proof::Untouched, 0), "it is remembered");
    assert_eq!(prove(1), (Proof::Same, whole), "each point of its own");
    takes_over(&stage, &LATEST, false).expect("failover");
    stage.at(|desk| undo(desk, REPLICA, false)).expect("undo");
    assert_eq!(prove(0), (Proof::Untouched, 0), "over other operations");
    touch(2);
    assert_eq!(prove(0), (Proof::Same, whole), "it looks otherwise");
    qemu_writes(&stage, "vda/1.qcow2", "write -P 0x5a 128k 64k");
    touch(2);
    assert_eq!(prove(0).0, Proof::Differs("vda".into()), "the time that was put back proves nothing");
}

/// A way home of a replica whose layers were changed while it served.
#[test]
fn a_layer_that_was_changed_does_not_come_home_as_it_was() {
    let stage = Stage::new();
    let mut dice = Dice::new(23);
    let mut serving = replica_of(&stage, 2, &mut dice).remove(1);
    stage.put_production(&vec![serving[0].clone(), ("vdb".into(), vec![0; 4096])]);
    let mut home = stage.home(HomeKind::Original);
    home.disks.truncate(1);
    takes_over(&stage, &LATEST, false).expect("failover");
    qemu_writes(&stage, "vda/1.qcow2", "write -P 0x5a 128k 64k");
    serving[0].1[128 << 10..192 << 10].fill(0x5a);
    let back = |desk: &Desk<'_>| failback(desk, REPLICA, home.clone(), Switch::Manual, Changed::default());
    stage.at(back).expect("pass 1");
    assert!(stage.warned().contains(&Code::WarnResync));
    stage.assert_home(&home, &serving, "what its machine reads");
    // What was sent already is changed once more: the second pass would not know.
    let sent = record(&stage).failback.expect("a way home").sent[0].file.clone();
    qemu_writes(&stage, &sent, "write -P 0x5b 256k 64k");
    let fail = stage.at(|desk| switchover(desk, REPLICA, true, Duration::ZERO)).expect_err("it was changed");
    assert_eq!(fail.code, Code::State);
    serving[0].1[256 << 10..320 << 10].fill(0x5b);
    stage.at(|desk| give_back(desk, REPLICA, false)).expect("undo");
    stage.at(back).expect("pass 1");
    stage.at(|desk| switchover(desk, REPLICA, true, Duration::ZERO)).expect("pass 2");
    stage.assert_home(&home, &serving, "the second time");
}

/// What is done to the notes of an interrupted run.
type Damage = fn(&Stage);

fn swap_places(stage: &Stage) {
    let path = stage.file("vda/1.qcow2.map");
    let mut map = fs::read(&path).expect("map");
    // Two clusters of the disk change places in the file.
    for at in 8..16 {
        map.swap(at, at + 16);
    }
    fs::write(path, map).expect("map");
}

fn other_sums(stage: &Stage) {
    let path = stage.file("vda/1.qcow2.sums");
    let mut sums = fs::read(&path).expect("sums");
    sums[20] ^= 1;
    fs::write(path, sums).expect("sums");
}

fn other_bytes(stage: &Stage) {
    let part = fs::File::options().write(true).open(stage.file("vda/1.qcow2.part")).expect("part");
    part.write_all_at(&[0xee; 4096], 65_536 * 3).expect("write");
}

fn further_on(stage: &Stage) {
    let path = stage.file("vda/1.qcow2.mark");
    let text = fs::read_to_string(&path).expect("mark");
    let mark: serde_json::Value = serde_json::from_str(&text).expect("json");
    let done = mark["done_until"].as_u64().expect("a number");
    assert!(done > 0, "it was marked");
    fs::write(&path, text.replace(&format!("\"done_until\":{done}"), &format!("\"done_until\":{}", done + 65_536)))
        .expect("mark");
}

#[test]
fn damaged_notes_of_an_interrupted_run_are_not_believed() {
    for (number, damage) in [swap_places as Damage, other_sums, other_bytes, further_on].into_iter().enumerate() {
        let mut stage = Stage::new();
        stage.options.parallel = 1;
        let mut dice = Dice::new(30 + number as u64);
        let disks = machine(&mut dice);
        stage.back_up("r1", &disks, true, at(0));
        *stage.drops_after.lock() = Some(2 * MIB as u64 + 1);
        assert_eq!(stage.replicate().expect_err("it drops").code, Code::Net);
        *stage.drops_after.lock() = None;
        damage(&stage);
        let made = stage.made();
        stage.assert_point(&made[0], &disks);
        // Its digests are right as well: a run that finds nothing new moves nothing.
        stage.back_up("r2", &disks, true, at(1));
        assert_eq!(stage.made()[0].carried.bytes_written, 0, "damage {number}");
    }
}

#[test]
fn a_stranger_with_the_name_of_a_layer_is_set_aside() {
    let stage = Stage::new();
    let mut dice = Dice::new(24);
    let mut disks = replica_of(&stage, 1, &mut dice).remove(0);
    let stray = |file: &str| {
        let path = stage.file(file);
        img(&["create", "-q", "-f", "qcow2", &path.to_string_lossy(), "3M"]);
        qemu_writes(&stage, file, "write -P 0x77 0 1M");
    };
    stray("vda/2.qcow2");
    scribble(&mut disks[0].1, 2, &mut dice);
    stage.back_up("r1", &disks, false, at(1));
    let made = stage.made().remove(0);
    assert_eq!((made.disks[0].file.as_str(), stage.warned()), ("vda/2.qcow2", vec![Code::WarnSkipped]));
    stage.assert_point(&made, &disks);

    stray("vda/3.qcow2");
    takes_over(&stage, &LATEST, false).expect("failover");
    let folder = record(&stage).folder;
    let files = stage.host.files(&folder).expect("it is on");
    stage.assert_file(&files[0], Format::Qcow2, &disks[0].1, "what it serves from");
    stage.at(|desk| undo(desk, REPLICA, false)).expect("undo");
    let names: Vec<_> = fs::read_dir(stage.file("vda")).expect("list").flatten().map(|e| e.file_name()).collect();
    let strays = names.iter().filter(|name| name.to_string_lossy().contains(".stray-")).count();
    assert_eq!((strays, names.len()), (2, 4), "both are kept: {names:?}");
}

#[test]
fn a_catalogue_of_before_a_takeover_does_not_publish_its_layer() {
    let stage = Stage::new();
    let mut dice = Dice::new(25);
    let mut disks = replica_of(&stage, 1, &mut dice).remove(0);
    let before = record(&stage);
    takes_over(&stage, &LATEST, false).expect("failover");
    let mut serving = disks.clone();
    stage.guest_writes(&before.folder, &mut serving, 3, &mut dice);
    let layer = record(&stage).failover.expect("a takeover").tops[0].file.clone();
    // The catalogue is brought back from a backup: it knows of no takeover.
    stage
        .at(|desk| {
            let row = desk.load(REPLICA)?;
            desk.store(aquifer_runner::catalogue::Stored { record: before.clone(), ..row })
        })
        .expect("store");
    scribble(&mut disks[0].1, 2, &mut dice);
    stage.back_up("r1", &disks, false, at(1));
    assert_eq!(stage.replicate().expect_err("it is older than the folder").code, Code::ForeignOwner);
    assert_eq!(takes_over(&stage, &LATEST, false), Err(Code::ForeignOwner));
    assert_eq!(stage.points().len(), 1);
    stage.assert_file(&stage.file(&layer), Format::Qcow2, &serving[0].1, "what it serves from");
}

#[test]
fn whoever_goes_on_with_an_operation_looks_at_the_stamp_first() {
    let stage = Stage::new();
    let mut dice = Dice::new(26);
    replica_of(&stage, 1, &mut dice);
    *stage.dies_after.lock() = Some(3);
    takes_over(&stage, &LATEST, false).expect_err("it dies");
    *stage.dies_after.lock() = None;
    let stamp = stage.file("replica.json");
    let text = fs::read_to_string(&stamp).expect("stamp");
    let theirs = text
        .replace(&stage.me.id.to_string(), &uuid::Uuid::new_v4().to_string())
        .replace("\"epoch\": 1", "\"epoch\": 2");
    fs::write(&stamp, &theirs).expect("another owner");
    let files = || {
        let mut all: Vec<_> = fs::read_dir(stage.file("vda")).expect("list").flatten().map(|e| e.file_name()).collect();
        all.sort();
        all
    };
    let before = files();
    let fail = stage.at(|desk| recover(desk, REPLICA)).expect_err("it is theirs");
    assert_eq!(fail.code, Code::ForeignOwner);
    assert_eq!((fs::read_to_string(&stamp).expect("stamp"), files()), (theirs, before), "nothing was touched");
    fs::write(&stamp, text).expect("ours again");
    stage.at(|desk| recover(desk, REPLICA)).expect("it goes on");
    takes_over(&stage, &LATEST, false).expect("failover");
}

#[test]
fn a_takeover_made_final_at_the_second_try_keeps_its_machine() {
    let stage = Stage::new();
    let mut dice = Dice::new(27);
    replica_of(&stage, 1, &mut dice);
    takes_over(&stage, &LATEST, false).expect("failover");
    stage.host.refuses_merge.store(true, Ordering::Relaxed);
    stage.at(|desk| permanent(desk, REPLICA)).expect_err("it does not want to");
    assert!(stage.points().is_empty(), "it has begun");
    let fail = stage.at(|desk| undo(desk, REPLICA, false)).expect_err("too late");
    assert_eq!(fail.code, Code::State);
    assert!(stage.file("vda/1.qcow2").exists(), "and every layer is there still");
    stage.at(|desk| permanent(desk, REPLICA)).expect("the second try");
    let placed = Placed::read(&record(&stage).folder).expect("a machine");
    let described = placed.described;
    assert_eq!((described.memory, described.cpus), (Some(192 << 20), Some(3)));
    assert!(described.firmware.is_some());
}

#[test]
fn a_disk_that_shrank_is_shorter_wherever_it_ends() {
    for is_on in [true, false] {
        let stage = Stage::new();
        let mut dice = Dice::new(28);
        let mut disks = machine(&mut dice);
        disks[0].1.resize(4 * MIB, 0xaa);
        // Large, small, and larger again: what was behind the end does not come back.
        for (hour, size) in [4 * MIB, 2 * MIB, 3 * MIB].into_iter().enumerate() {
            disks[0].1.resize(size, 0);
            stage.back_up("r1", &disks, hour == 0, at(hour as i64));
            stage.made();
        }
        let folder = record(&stage).folder;
        let manner = Manner { start: is_on, force: false };
        stage.at(|desk| failover_as(desk, REPLICA, &LATEST, None, manner)).expect("failover");
        let mut home = stage.home(HomeKind::Original);
        stage.put_production(&vec![("vda".into(), vec![0xbb; 5 * MIB]), ("vdb".into(), vec![0; 4096])]);
        home.disks.truncate(1);
        stage.at(|desk| failback(desk, REPLICA, home.clone(), Switch::Manual, Changed::default())).expect("pass 1");
        stage.assert_home(&home, &disks, "home");
        stage.at(|desk| give_back(desk, REPLICA, false)).expect("undo");
        stage.at(|desk| permanent(desk, REPLICA)).expect("permanent");
        let file = Placed::read(&folder).expect("a machine").disks[0].path.clone();
        stage.assert_file(&file, Format::Qcow2, &disks[0].1, "permanent");
    }
}

#[test]
fn a_machine_that_ended_while_it_serves_is_started_again() {
    let stage = Stage::new();
    let mut dice = Dice::new(29);
    let disks = replica_of(&stage, 1, &mut dice).remove(0);
    let fail = stage.at(|desk| start_again(desk, REPLICA)).expect_err("it does not serve");
    assert_eq!(fail.code, Code::State);
    takes_over(&stage, &LATEST, false).expect("failover");
    let folder = record(&stage).folder;
    let mut serving = disks.clone();
    stage.guest_writes(&folder, &mut serving, 2, &mut dice);
    stage.host.power_off_all();
    stage.at(|desk| start_again(desk, REPLICA)).expect("start");
    let files = stage.host.files(&folder).expect("it is on");
    stage.assert_file(&files[0], Format::Qcow2, &serving[0].1, "what it wrote before is there");
    assert_eq!(record(&stage).state, State::Failover);
}

#[test]
fn what_a_verification_refused_is_made_anew() {
    let mut stage = Stage::new();
    stage.options.verify = true;
    let mut dice = Dice::new(40);
    let mut disks = replica_of(&stage, 1, &mut dice).remove(0);
    scribble(&mut disks[0].1, 3, &mut dice);
    stage.back_up("r1", &disks, false, at(1));
    let part = stage.file("vda/2.qcow2.part");
    // A disk that does not keep what it was given.
    let evil = |moved: Moved| {
        if let (Moved::Written(1..), Ok(part)) = (moved, fs::File::options().write(true).open(&part)) {
            part.write_all_at(&[0xee; 4096], 65_536).expect("write");
        }
        Ok(())
    };
    let fail =
        stage.at(|desk| replicate(&Desk { pace: &evil, ..*desk }, &stage.spec())).expect_err("it reads back wrong");
    assert_eq!(fail.code, Code::BlockCorrupt, "{fail}");
    assert_eq!((stage.points().len(), stage.file("vda/2.qcow2").exists()), (1, false));
    let made = stage.made();
    stage.assert_point(made.last().expect("a point"), &disks);
}

#[test]
fn a_run_whose_base_is_changed_meanwhile_makes_no_point() {
    let stage = Stage::new();
    let mut dice = Dice::new(41);
    let mut disks = replica_of(&stage, 1, &mut dice).remove(0);
    scribble(&mut disks[0].1[MIB..], 3, &mut dice);
    // Of the other repository: digests decide, and all of the disk is read.
    stage.back_up("r2", &disks, true, at(1));
    *stage.drops_after.lock() = Some(MIB as u64 + 1);
    assert_eq!(stage.replicate().expect_err("it drops").code, Code::Net);
    *stage.drops_after.lock() = None;
    qemu_writes(&stage, "vda/1.qcow2", "write -P 0x5a 128k 64k");
    let made = stage.at(|desk| replicate(desk, &stage.spec())).expect("a run");
    assert!(stage.warned().contains(&Code::WarnResync), "{made:?}");
    stage.assert_point(stage.points().last().expect("a point"), &disks);
}

#[test]
fn a_stamp_that_was_lost_is_proven_by_the_ledger() {
    let stage = Stage::new();
    let mut dice = Dice::new(42);
    let disks = replica_of(&stage, 1, &mut dice).remove(0);
    let stamp = stage.file("replica.json");
    fs::remove_file(&stamp).expect("remove");
    takes_over(&stage, &LATEST, false).expect("failover");
    assert!(stage.warned().contains(&Code::WarnHost) && stamp.exists());
    stage.at(|desk| undo(desk, REPLICA, false)).expect("undo");
    let copy = trust::recall(&record(&stage).folder).expect("read").expect("a copy");
    assert_eq!((copy.record, copy.points), (record(&stage), stage.points()));
    // Both are lost: nothing proves it.
    fs::remove_file(&stamp).expect("remove");
    fs::remove_file(stage.file("layers.json")).expect("remove");
    assert_eq!(takes_over(&stage, &LATEST, false), Err(Code::ForeignOwner));
    stage.points().iter().for_each(|point| stage.assert_point(point, &disks));
}
