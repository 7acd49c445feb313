//! Promise: what gets stuck, is overtaken or has no room ends in a state with a way on, and leaves nothing half made; a
//! catalogue that lost a replica learns of it again.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::Duration,
};

use aquifer_runner::{
    catalogue::{NewWork, Outcome},
    fail::{Code, Fail},
    failback::{Changed, check_home, commit, failback, give_back, pass::working_of, switchover},
    failover::{failover, start_again, undo},
    replica::{
        build::Moved,
        desk::Desk,
        layers,
        model::{Home, HomeKind, MadeFile, ReplicaRecord, Switch},
        recall::{drop_foreign, take_back},
        recover::{Told, recover_as},
        run::replicate,
        state::{Op, State},
    },
    source::PointRef,
};
use jiff::Timestamp;

use crate::stage::{Dice, Disks, REPLICA, Stage, img, scribble, write_over};

const MIB: usize = 1 << 20;
const LATEST: PointRef = PointRef::Latest(0);

fn at(hour: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + hour * 3600).expect("a time")
}

/// A replica of one disk with a point; what that holds.
fn replica(stage: &Stage, dice: &mut Dice) -> Disks {
    let mut disk = vec![0; 3 * MIB];
    disk.chunks_mut(4096).step_by(2).for_each(|grain| grain.fill_with(|| dice.roll() as u8));
    let disks = vec![("vda".into(), disk)];
    stage.back_up("r1", &disks, true, at(0));
    stage.made();
    disks
}

fn record(stage: &Stage) -> ReplicaRecord {
    stage.at(|desk| desk.load(REPLICA)).expect("load").record
}

/// Production with one disk.
fn home_of(stage: &Stage, disk: Vec<u8>) -> Home {
    stage.put_production(&vec![("vda".into(), disk), ("vdb".into(), vec![0; 4096])]);
    let mut home = stage.home(HomeKind::Original);
    home.disks.truncate(1);
    home
}

/// A machine that serves from a replica, after its first pass home: what it holds, where it goes, where it serves.
fn halfway_home(stage: &Stage, dice: &mut Dice) -> (Disks, Home, PathBuf) {
    let mut serving = replica(stage, dice);
    let home = home_of(stage, vec![1; 2 * MIB]);
    stage.at(|desk| failover(desk, REPLICA, &LATEST, None, true)).expect("failover");
    let folder = record(stage).folder;
    goes_home(stage, &home).expect("pass 1");
    stage.guest_writes(&folder, &mut serving, 3, dice);
    (serving, home, folder)
}

fn goes_home(stage: &Stage, home: &Home) -> Result<(), Code> {
    let back = |desk: &Desk<'_>| failback(desk, REPLICA, home.clone(), Switch::Manual, Changed::default());
    stage.at(back).map(drop).map_err(|fail| fail.code)
}

/// A program that has an image open.
struct Held(Child);

impl Held {
    fn open(image: &Path) -> Self {
        let socket = image.with_extension("held");
        let door = Command::new("qemu-nbd").args(["-t", "-f", "qcow2", "-k"]).arg(&socket).arg(image).spawn();
        let held = Self(door.expect("qemu-nbd"));
        // It listens before it has the image open: until others are refused the image.
        let free = || Command::new("qemu-img").arg("info").arg(image).output().expect("qemu-img").status.success();
        while !socket.exists() || free() {
            std::thread::sleep(Duration::from_millis(5));
        }
        fs::remove_file(socket).expect("remove");
        held
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_change_of_sides_that_got_stuck_is_taken_back_and_made_again() {
    let stage = Stage::new();
    let mut dice = Dice::new(50);
    let (mut serving, home, folder) = halfway_home(&stage, &mut dice);
    // Somebody opens production's image after it was looked at, and before it is written to.
    let held: parking_lot::Mutex<Option<Held>> = parking_lot::Mutex::default();
    let opens = |moved: Moved| {
        if matches!(moved, Moved::Read(_)) {
            held.lock().get_or_insert_with(|| Held::open(&home.disks[0].path));
        }
        Ok(())
    };
    let switch = |desk: &Desk<'_>| switchover(&Desk { pace: &opens, ..*desk }, REPLICA, true, Duration::ZERO);
    assert_eq!(stage.at(switch).expect_err("it is open").code, Code::Tool);
    assert_eq!(record(&stage).state, State::ReadyToSwitch);
    assert!(stage.points().iter().all(|point| point.number == 1), "no point of a machine that may go on");
    drop(held.lock().take());

    // Its own way back did not start it, or its guest has ended.
    stage.host.power_off_all();
    stage.at(|desk| give_back(desk, REPLICA, false)).expect("taken back");
    assert_eq!(record(&stage).state, State::Failover);
    let told: Vec<_> = stage.warnings.lock().drain(..).map(|(_, what)| what).collect();
    assert!(told.iter().any(|what| what.contains(&format!("replicas {REPLICA} --start"))), "{told:?}");
    let left = fs::read_dir(&home.folder).expect("list").flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().contains(".pass")).collect();
    assert!(left.is_empty(), "{left:?}");
    stage.at(|desk| start_again(desk, REPLICA)).expect("it serves again");
    stage.guest_writes(&folder, &mut serving, 2, &mut dice);
    stage.assert_point(&stage.points()[0], &replica_of(&stage));
    goes_home(&stage, &home).expect("pass 1 again");
    stage.at(|desk| switchover(desk, REPLICA, true, Duration::ZERO)).expect("pass 2 again");
    stage.assert_home(&home, &serving, "home");
    let variables = folder.join("nvram.fd");
    fs::write(&variables, "of the takeover").expect("write");
    stage.at(|desk| commit(desk, REPLICA, false)).expect("commit");
    assert!(!variables.exists(), "the next takeover begins with its point's");
}

#[test]
fn a_change_of_sides_that_got_stuck_is_tried_again_with_what_production_has_by_then() {
    let stage = Stage::new();
    let mut dice = Dice::new(61);
    let mut disks = vec![("vda".to_owned(), vec![0; MIB]), ("vdb".to_owned(), vec![0; MIB])];
    disks.iter_mut().for_each(|(_, bytes)| {
        scribble(bytes, 9, &mut dice);
    });
    stage.back_up("r1", &disks, true, at(0));
    stage.made();
    stage.put_production(&vec![("vda".into(), vec![1; 2 * MIB]), ("vdb".into(), vec![1; MIB])]);
    let mut home = stage.home(HomeKind::Original);
    let second = home.folder.join("vdb.qcow2");
    img(&["create", "-q", "-f", "qcow2", &second.to_string_lossy(), "2M"]);
    (home.disks[1].path, home.disks[1].format) = (second, home.disks[0].format);
    stage.at(|desk| failover(desk, REPLICA, &LATEST, None, true)).expect("failover");
    let folder = record(&stage).folder;
    goes_home(&stage, &home).expect("pass 1");
    let mut serving = disks.clone();
    stage.guest_writes(&folder, &mut serving, 5, &mut dice);
    // The first disk comes home, the second one does not.
    let held: parking_lot::Mutex<Option<Held>> = parking_lot::Mutex::default();
    let opens = |moved: Moved| {
        if matches!(moved, Moved::Read(_)) {
            held.lock().get_or_insert_with(|| Held::open(&home.disks[1].path));
        }
        Ok(())
    };
    let switch = |desk: &Desk<'_>| switchover(desk, REPLICA, true, Duration::ZERO);
    stage.at(|desk| switch(&Desk { pace: &opens, ..*desk })).expect_err("it is open");
    drop(held.lock().take());
    stage.assert_home(&home, &serving[..1].to_vec(), "half of it");

    // The guest takes back what it wrote.
    stage.at(|desk| start_again(desk, REPLICA)).expect("it serves again");
    let files = stage.host.files(&folder).expect("it is on");
    for (file, ((_, is), (_, was))) in files.iter().zip(serving.iter().zip(&disks)) {
        write_over(file, is, was);
    }
    stage.at(switch).expect("pass 2 again");
    stage.assert_home(&home, &disks, "home");
    stage.assert_point(&stage.points()[1], &disks);
}

/// A way home whose second disk is made there, after its first pass; where that disk is.
fn makes_a_disk(stage: &Stage) -> PathBuf {
    let mut dice = Dice::new(59);
    let mut disks = vec![("vda".to_owned(), vec![0; MIB]), ("vdb".to_owned(), vec![0; MIB])];
    disks.iter_mut().for_each(|(_, bytes)| {
        scribble(bytes, 9, &mut dice);
    });
    stage.back_up("r1", &disks, true, at(0));
    stage.made();
    stage.put_production(&vec![disks[0].clone(), ("vdb".into(), vec![0; 4096])]);
    let mut home = stage.home(HomeKind::Original);
    let made = home.folder.join("vdb-2.qcow2");
    (home.disks[1].path, home.disks[1].format) = (made.clone(), home.disks[0].format);
    home.made = vec!["vdb".into()];
    stage.at(|desk| failover(desk, REPLICA, &LATEST, None, true)).expect("failover");
    goes_home(stage, &home).expect("pass 1");
    stage.assert_home(&home, &disks, "home");
    made
}

/// Changes what the record says of the file that was made for `vdb`.
fn noted(stage: &Stage, change: impl FnOnce(&mut MadeFile)) {
    stage.at(|desk| {
        let mut row = desk.load(REPLICA).expect("load");
        let home = &mut row.record.failback.as_mut().expect("a way home").home;
        change(home.made_files.get_mut("vdb").expect("it was noted"));
        desk.store(row).expect("store");
    });
}

#[test]
fn an_image_that_was_made_is_removed_alone_and_only_while_it_is_that_one() {
    for is_ours in [true, false] {
        let stage = Stage::new();
        let made = makes_a_disk(&stage);
        let theirs = ["part", "mark", "map", "sums"].map(|ending| made.with_extension(format!("qcow2.{ending}")));
        theirs.iter().for_each(|path| fs::write(path, "somebody's").expect("write"));
        if !is_ours {
            // As it is where somebody's file has got the inode.
            noted(&stage, |file| file.born = at(0));
        }
        stage.warned();
        stage.at(|desk| give_back(desk, REPLICA, false)).expect("undo");
        assert_eq!(made.exists(), !is_ours);
        assert_eq!(stage.warned().contains(&Code::WarnHost), !is_ours);
        theirs.iter().for_each(|path| assert!(path.exists(), "{}", path.display()));
    }
}

#[test]
fn an_image_that_was_made_and_is_open_stays_where_undo_is_forced() {
    let stage = Stage::new();
    let made = makes_a_disk(&stage);
    let _held = Held::open(&made);
    assert_eq!(stage.at(|desk| give_back(desk, REPLICA, false)).expect_err("it is open").code, Code::Busy);
    stage.warned();
    stage.at(|desk| give_back(desk, REPLICA, true)).expect("undo");
    assert!(made.exists() && stage.warned().contains(&Code::WarnHost));
    assert_eq!(record(&stage).state, State::Failover);
}

#[test]
fn a_file_that_has_both_its_names_loses_the_first() {
    let dir = tempfile::tempdir().expect("folder");
    let [part, path, link] = ["part", "path", "link"].map(|name| dir.path().join(name));
    fs::write(&part, "ours").expect("write");
    std::os::unix::fs::symlink(&part, &link).expect("link");
    assert_eq!(layers::name_new(&part, &link).expect_err("it leads to it only").code, Code::Exists);
    fs::hard_link(&part, &path).expect("link");
    layers::can_be_named(&part, &path).expect("it has it");
    layers::name_new(&part, &path).expect("goes on");
    assert_eq!((part.exists(), fs::read_to_string(&path).expect("read").as_str()), (false, "ours"));
    fs::write(&part, "again").expect("write");
    assert_eq!(layers::can_be_named(&part, &path).expect_err("another's").code, Code::Exists);
    assert_eq!(layers::name_new(&part, &path).expect_err("another's").code, Code::Exists);
    assert!(part.exists(), "nothing is lost");
}

#[test]
fn a_stamp_that_cannot_be_put_publishes_no_point() {
    let stage = Stage::new();
    let mut dice = Dice::new(57);
    let (serving, home, folder) = halfway_home(&stage, &mut dice);
    // A folder in its place: nothing can be renamed over it.
    let (stamp, kept) = (folder.join("replica.json"), folder.join("kept.json"));
    let turns = |moved: Moved| {
        if matches!(moved, Moved::Read(_)) && !kept.exists() {
            fs::rename(&stamp, &kept).expect("rename");
            fs::create_dir(&stamp).expect("folder");
            fs::write(stamp.join("full"), "").expect("write");
        }
        Ok(())
    };
    let switch = |desk: &Desk<'_>| switchover(&Desk { pace: &turns, ..*desk }, REPLICA, true, Duration::ZERO);
    stage.at(switch).expect_err("no stamp can be put");
    assert!(stage.points().iter().all(|point| point.number == 1), "a point of a machine that may go on");
    fs::remove_dir_all(&stamp).expect("remove");
    fs::rename(&kept, &stamp).expect("rename");
    // What was cut short behind the point of no return is brought to its end.
    let refused = stage.at(|desk| start_again(desk, REPLICA)).expect_err("its sides have changed");
    assert_eq!((refused.code, record(&stage).state), (Code::State, State::Failback));
    stage.assert_home(&home, &serving, "home");
    let protective = stage.points().pop().expect("a point");
    assert!(protective.number > 1);
    stage.assert_point(&protective, &serving);
}

#[test]
fn a_replica_that_is_not_there_is_not_up_to_date() {
    let stage = Stage::new();
    let mut dice = Dice::new(58);
    replica(&stage, &mut dice);
    let folder = record(&stage).folder;
    let away = folder.with_extension("away");
    let again = || stage.at(|desk| replicate(desk, &stage.spec())).map(drop).map_err(|fail| fail.code);
    assert_eq!(again(), Ok(()));
    fs::rename(&folder, &away).expect("rename");
    assert_eq!(again(), Err(Code::RepoOffline));
    fs::create_dir(&folder).expect("what is left of a mount");
    assert_eq!(again(), Err(Code::RepoOffline));
    fs::remove_dir(&folder).expect("remove");
    fs::rename(&away, &folder).expect("rename");
    let layer = folder.join(ReplicaRecord::layer_name("vda", 1));
    fs::rename(&layer, away.with_extension("layer")).expect("rename");
    again().expect_err("a layer is gone");
    fs::rename(away.with_extension("layer"), &layer).expect("rename");
    assert_eq!(again(), Ok(()));
}

#[test]
fn a_takeover_repeated_without_its_ledger_keeps_what_the_machine_wrote() {
    let stage = Stage::new();
    let mut dice = Dice::new(59);
    let mut serving = replica(&stage, &mut dice);
    stage.at(|desk| failover(desk, REPLICA, &LATEST, None, true)).expect("failover");
    let folder = record(&stage).folder;
    stage.guest_writes(&folder, &mut serving, 3, &mut dice);
    stage
        .at(|desk| {
            let mut row = desk.load(REPLICA)?;
            row.record.state = State::FailedFailover;
            desk.store(row).map(drop)
        })
        .expect("as if its host had failed");
    fs::remove_file(folder.join("layers.json")).expect("remove");
    stage.at(|desk| failover(desk, REPLICA, &LATEST, None, true)).expect("failover again");
    let home = home_of(&stage, vec![1; 2 * MIB]);
    goes_home(&stage, &home).expect("pass 1");
    stage.at(|desk| switchover(desk, REPLICA, true, Duration::ZERO)).expect("pass 2");
    stage.assert_home(&home, &serving, "home");
}

/// What the only backup holds.
fn replica_of(stage: &Stage) -> Disks {
    let repo = stage.repository("r1");
    let machine = repo.machine("db01").expect("machine");
    let point = repo.points(&machine).expect("points").pop().expect("a point");
    let name = aquifer_formats::repo::DiskName::new("vda").expect("name");
    let disk = repo.open_disk(&point, &name).expect("disk");
    let chain = aquifer_vdisk::Chain::of_point(disk, stage.cache.clone());
    let mut bytes = vec![0; 3 * MIB];
    chain.read(0, &mut bytes).expect("read");
    vec![("vda".into(), bytes)]
}

/// A file system of its own, gone with the test.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&at).expect("folder");
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&at).status();
        assert!(done.expect("mount").success(), "this test needs root");
        Self(at)
    }

    fn grow(&self, options: &str) {
        let done = Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.0).status();
        assert!(done.expect("mount").success());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_home_without_room_is_left_as_it_was() {
    // Room for what is sent but not for writing it down; not even for that.
    for size in ["size=5m", "size=2m"] {
        let stage = Stage::new();
        let mut dice = Dice::new(51);
        let disks = replica(&stage, &mut dice);
        let small = Small::mount(stage.path("prod").join("db01"), size);
        let production = vec![("vda".to_owned(), vec![0; 3 * MIB])];
        let home = home_of(&stage, production[0].1.clone());
        let names = || {
            let mut all: Vec<_> = fs::read_dir(&home.folder).expect("list").flatten().map(|e| e.file_name()).collect();
            all.sort();
            all
        };
        let before = names();
        stage.at(|desk| failover(desk, REPLICA, &LATEST, None, true)).expect("failover");
        assert_eq!(goes_home(&stage, &home), Err(Code::Capacity), "{size}");
        assert_eq!((record(&stage).state, names()), (State::Failover, before));
        stage.assert_home(&home, &production, "as it was");
        small.grow("size=32m");
        goes_home(&stage, &home).expect("there is room now");
        stage.assert_home(&home, &disks, "home");
    }
}

/// A first pass whose worker dies after so many looks at its journal once its layer is there.
fn first_pass_dies(stage: &Stage, home: &Home, after: u32, when_there: impl Fn() + Sync) {
    let working = working_of(&home.disks[0].path, 1);
    let looks = AtomicU32::new(0);
    let alive = || {
        if looks.load(Ordering::Relaxed) == 0 && !working.exists() {
            return Ok(());
        }
        match looks.fetch_add(1, Ordering::Relaxed) {
            0 => when_there(),
            look if look >= after => return Err(Fail::new(Code::Terminated, "killed")),
            _ => {}
        }
        Ok(())
    };
    let back = |desk: &Desk<'_>| failback(desk, REPLICA, home.clone(), Switch::Manual, Changed::default());
    let dead = stage.at(|desk| back(&Desk { alive: &alive, ..*desk })).expect_err("it dies");
    assert_eq!(dead.code, Code::Terminated, "{dead}");
    assert_eq!(stage.catalogue.open_operations().expect("operations").len(), 1);
}

#[test]
fn what_was_half_written_for_want_of_room_is_written_by_whoever_goes_on() {
    let stage = Stage::new();
    let disks = replica(&stage, &mut Dice::new(62));
    let _small = Small::mount(stage.path("prod").join("db01"), "size=16m");
    let home = home_of(&stage, vec![0; 3 * MIB]);
    let filler = home.folder.join("filler");
    let fills = || {
        let stat = rustix::fs::statvfs(&home.folder).expect("statvfs");
        let room = stat.f_bavail * stat.f_frsize;
        fs::write(&filler, vec![1; usize::try_from(room).expect("small") - MIB]).expect("write");
    };
    stage.at(|desk| failover(desk, REPLICA, &LATEST, None, true)).expect("failover");
    // It fails with a part of it written, and dies before the journal has that.
    first_pass_dies(&stage, &home, 2, fills);
    fs::remove_file(&filler).expect("there is room again");
    stage.at(|desk| recover_as(desk, REPLICA, Op::Failback, Told::default())).expect("it goes on");
    assert_eq!(record(&stage).state, State::ReadyToSwitch);
    stage.assert_home(&home, &disks, "home");
}

#[test]
fn a_first_pass_that_gets_stuck_where_it_is_taken_back_says_so() {
    let stage = Stage::new();
    let disks = replica(&stage, &mut Dice::new(63));
    let home = home_of(&stage, vec![1; 2 * MIB]);
    stage.at(|desk| failover(desk, REPLICA, &LATEST, None, true)).expect("failover");
    first_pass_dies(&stage, &home, 1, || ());
    let held = Held::open(&home.disks[0].path);
    let back = Told { force: false, back: true };
    let stuck = stage.at(|desk| recover_as(desk, REPLICA, Op::Undo, back)).expect_err("it is open");
    assert!(stuck.what.contains("half written"), "{stuck}");
    assert!(stuck.do_.is_some_and(|help| help.to_string().contains("aquifer failback")));
    assert_eq!(record(&stage).state, State::Failover);
    drop(held);
    goes_home(&stage, &home).expect("pass 1 again");
    stage.assert_home(&home, &disks, "home");
}

#[test]
fn a_new_home_needs_no_room_for_zeros() {
    let stage = Stage::new();
    replica(&stage, &mut Dice::new(64));
    stage.at(|desk| failover(desk, REPLICA, &LATEST, None, true)).expect("failover");
    let folder = record(&stage).folder;
    let files = stage.host.files(&folder).expect("it is on");
    let zeros = Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -q -P 0 0 3M"]).arg(&files[0]).status();
    assert!(zeros.expect("qemu-io").success());
    let _small = Small::mount(stage.path("prod").join("db01"), "size=1m");
    let mut home = stage.home(HomeKind::New);
    home.disks.truncate(1);
    let doubts = check_home(&record(&stage), &home, false, &stage.cache).expect("it may fit");
    assert_eq!(doubts.len(), 1, "{doubts:?}");
    goes_home(&stage, &home).expect("it fits");
    stage.assert_home(&home, &vec![("vda".into(), vec![0; 3 * MIB])], "home");
}

#[test]
fn a_worker_that_wakes_up_writes_into_nothing_that_counts() {
    let stage = Stage::new();
    let mut dice = Dice::new(52);
    let mut disks = replica(&stage, &mut dice);
    scribble(&mut disks[0].1, 6, &mut dice);
    stage.back_up("r1", &disks, false, at(1));
    let asleep = AtomicBool::new(false);
    let sleeps = |moved: Moved| {
        if !matches!(moved, Moved::Written(1..)) || asleep.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        // Its lease runs out; another worker takes the work over and brings it to its end.
        stage.catalogue.finish(&stage.fence, &Outcome::Cancelled, None).expect("finish");
        let new = NewWork::new("second", "", 300, serde_json::Value::Null);
        stage.catalogue.enqueue(&new).expect("enqueue");
        let (_, fence) = stage.catalogue.claim("second", &["second"], Timestamp::now()).expect("claim").expect("work");
        stage.at(|desk| replicate(&Desk { fence: &fence, ..*desk }, &stage.spec())).expect("the other's run");
        stage.assert_point(stage.points().last().expect("a point"), &disks);
        Ok(())
    };
    let fail = stage.at(|desk| replicate(&Desk { pace: &sleeps, ..*desk }, &stage.spec())).expect_err("it is late");
    assert!(matches!(fail.code, Code::Fenced | Code::State), "{fail}");
    let points = stage.points();
    assert_eq!(points.len(), 2);
    stage.assert_point(&points[1], &disks);
    let names: Vec<_> = fs::read_dir(stage.file("vda")).expect("list").flatten().map(|e| e.file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

/// The catalogue forgets a replica.
fn empty(stage: &Stage) {
    stage
        .at(|desk| {
            desk.points(REPLICA)?.iter().try_for_each(|point| desk.drop_point(REPLICA, point.number))?;
            let row = desk.load(REPLICA)?;
            Ok::<_, aquifer_runner::fail::Fail>(desk.catalogue.drop_replica(desk.fence, REPLICA, row.revision)?)
        })
        .expect("forgotten");
}

#[test]
fn a_catalogue_that_lost_a_replica_learns_of_it_again() {
    let stage = Stage::new();
    let mut dice = Dice::new(53);
    let mut disks = replica(&stage, &mut dice);
    let (before, points) = (record(&stage), stage.points());
    empty(&stage);
    let fail = stage.replicate().expect_err("its folder is not empty");
    assert_eq!(fail.code, Code::Exists);
    assert!(fail.do_.is_some_and(|help| help.to_string().contains("--take-back")));
    stage.at(|desk| take_back(desk, &stage.spec())).expect("take back");
    assert_eq!(stage.points(), points);
    assert_eq!(record(&stage), ReplicaRecord { epoch: before.epoch + 1, ..before.clone() });
    assert_eq!(stage.at(|desk| take_back(desk, &stage.spec())).expect_err("it is known").code, Code::Exists);
    scribble(&mut disks[0].1, 1, &mut dice);
    stage.back_up("r1", &disks, false, at(1));
    assert!(stage.made()[0].carried.bytes_read < MIB as u64, "it goes on where it was");
    // The same while it serves.
    stage.at(|desk| failover(desk, REPLICA, &LATEST, None, true)).expect("failover");
    let mut serving = disks.clone();
    stage.guest_writes(&before.folder, &mut serving, 2, &mut dice);
    empty(&stage);
    stage.at(|desk| take_back(desk, &stage.spec())).expect("take back");
    assert_eq!(record(&stage).state, State::Failover);
    let files = stage.host.files(&before.folder).expect("it never stopped");
    stage.assert_file(&files[0], aquifer_formats::probe::Format::Qcow2, &serving[0].1, "what it serves");
    stage.at(|desk| undo(desk, REPLICA, false)).expect("undo");
    stage.assert_point(stage.points().last().expect("a point"), &disks);
}

#[test]
fn a_replica_that_is_somebody_elses_is_dropped_and_its_folder_left_alone() {
    let stage = Stage::new();
    let mut dice = Dice::new(54);
    let disks = replica(&stage, &mut dice);
    assert_eq!(stage.at(|desk| drop_foreign(desk, REPLICA)).expect_err("it is ours").code, Code::State);
    let stamp = stage.file("replica.json");
    let text = fs::read_to_string(&stamp).expect("stamp");
    let theirs = text
        .replace("\"epoch\": 1", "\"epoch\": 4")
        .replace(&stage.me.id.to_string(), "01890000-0000-7000-8000-000000000001");
    fs::write(&stamp, &theirs).expect("write");
    let fail = stage.at(|desk| failover(desk, REPLICA, &LATEST, None, true)).expect_err("it is theirs");
    assert_eq!(fail.code, Code::ForeignOwner);
    let points = stage.points();
    stage.at(|desk| drop_foreign(desk, REPLICA)).expect("drop");
    assert_eq!((record(&stage).state, stage.points().len()), (State::Removed, 0));
    assert_eq!(fs::read_to_string(&stamp).expect("stamp"), theirs);
    stage.assert_point(&points[0], &disks);
    assert_eq!(stage.at(|desk| take_back(desk, &stage.spec())).expect_err("theirs").code, Code::ForeignOwner);
}

/// Dies after so many looks at its journal. Answers whether it did.
fn dies(stage: &Stage, after: u32, act: impl FnOnce(&Desk<'_>) -> bool) -> bool {
    *stage.dies_after.lock() = Some(after);
    let done = stage.at(act);
    *stage.dies_after.lock() = None;
    !done
}

fn goes_on(stage: &Stage, told: Told) -> State {
    stage.at(|desk| recover_as(desk, REPLICA, Op::Undo, told)).expect("it is brought to its end");
    assert!(stage.catalogue.open_operations().expect("operations").is_empty());
    record(stage).state
}

#[test]
fn an_undo_that_died_without_force_goes_on_with_it() {
    let stage = Stage::new();
    let mut dice = Dice::new(58);
    let (_, _, _) = halfway_home(&stage, &mut dice);
    stage.at(|desk| switchover(desk, REPLICA, true, Duration::ZERO)).expect("pass 2");
    let force = Told { force: true, back: false };
    assert!(dies(&stage, 0, |desk| give_back(desk, REPLICA, false).is_ok()));
    stage.host.refuses_off.store(true, Ordering::Relaxed);
    assert_eq!(goes_on(&stage, Told::default()), State::Failback, "production cannot be turned off");
    assert!(dies(&stage, 0, |desk| give_back(desk, REPLICA, false).is_ok()));
    assert_eq!(goes_on(&stage, force), State::Failover);

    assert!(dies(&stage, 0, |desk| undo(desk, REPLICA, false).is_ok()));
    assert_eq!(goes_on(&stage, Told::default()), State::Failover, "nor can the replica");
    assert!(dies(&stage, 0, |desk| undo(desk, REPLICA, false).is_ok()));
    assert_eq!(goes_on(&stage, force), State::Ready);
    assert!(record(&stage).needs_resync, "its machine may write still");
}

#[test]
fn a_change_of_sides_that_died_is_taken_back_without_a_start_of_production() {
    let back = Told { force: false, back: true };
    for after in 0.. {
        let stage = Stage::new();
        let (_, home, _) = halfway_home(&stage, &mut Dice::new(59));
        if !dies(&stage, after, |desk| switchover(desk, REPLICA, true, Duration::ZERO).is_ok()) {
            assert!(after > 6, "it dies at each of its steps");
            return;
        }
        let was_on = stage.host.files(&home.folder).is_some();
        let state = goes_on(&stage, back);
        assert!(matches!(state, State::ReadyToSwitch | State::Failback), "{after}: {state}");
        assert_eq!(stage.host.files(&home.folder).is_some(), was_on, "{after}: started to be turned off");
        stage.at(|desk| give_back(desk, REPLICA, false)).expect("taken back");
        assert_eq!(record(&stage).state, State::Failover, "{after}");
        assert!(stage.host.files(&home.folder).is_none() && stage.host.count() == 1, "{after}: the replica serves");
    }
}
