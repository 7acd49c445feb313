//! Promise A1 and R-IR-9 to 12: hydration ends with a plain local disk, the guest's write always wins,
//! what is local is never copied again after a restart, and a source that goes away is waited for.

#![allow(clippy::cast_possible_truncation, reason = "numbers of a small disk")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use aquifer_tests::{
    faults::{Failing, World},
    guest::{Act, Guest},
    rig::{Rig, perform, read_all},
    rng::Rng,
};
use aquifer_vdisk::{Disk, Error, HydrateState, Hydrator, Overlay, OverlayOptions, Pace, Settling, Trace, trace::Step};

const LONG: Option<Duration> = Some(Duration::from_secs(60));

/// Some MiB: data, one hole in three 64 KiB.
fn origin(mib: u64) -> Vec<u64> {
    (0..mib * 2048).map(|at| if at / 128 % 3 == 2 { 0 } else { at + 1 }).collect()
}

fn rig(mib: u64) -> Rig {
    let options = OverlayOptions { settling: Settling::Thread, journal_bytes: 1 << 20, ..OverlayOptions::default() };
    Rig { options, ..Rig::new(&origin(mib)) }
}

fn disk(rig: &Rig, world: &World) -> Arc<Disk> {
    let overlay = Overlay::create_on(Rig::files(world), rig.of(), rig.options).expect("create");
    Arc::new(Disk::writable("d", Arc::clone(&rig.chain), overlay).expect("a disk"))
}

fn slow() -> Pace {
    Pace { workers: 1, rate_bytes: Some(2 << 20), ..Pace::default() }
}

#[test]
fn it_ends_with_a_plain_local_disk_and_lets_the_source_go() {
    let (rig, world) = (rig(24), Rig::world());
    let disk = disk(&rig, &world);
    disk.write(5 << 20, &[9; 70_000]).expect("write");
    disk.flush().expect("flush");
    let expected = read_all(&disk);
    let hydrator = Hydrator::start(Arc::clone(&disk), Pace::default()).expect("start");
    assert_eq!(hydrator.wait(LONG), HydrateState::Done);
    let progress = hydrator.progress();
    assert_eq!((progress.local, progress.total), (24 << 20, 24 << 20));
    assert_eq!(progress.used, Some(16 << 20));
    assert_eq!(progress.used_local, progress.used);
    assert!(progress.copied <= (16 << 20) && progress.copied > 15 << 20, "holes are not copied: {progress:?}");
    // The source may be gone for good now.
    rig.source.fail_from_now(Failing::Io);
    assert_eq!(read_all(&disk), expected);
    disk.drain().expect("drain");
    let mut raw = vec![0; expected.len()];
    world.now()[0].read(0, &mut raw);
    assert!(raw == expected, "disk.raw alone is the disk");
    assert_eq!(disk.dirty().expect("dirty").bytes(), 17 * 4096 + 4096, "only the guest's write is dirty");
}

#[test]
fn what_is_still_on_its_way_when_the_source_is_let_go_is_counted() {
    let (rig, world) = (rig(4), Rig::world());
    let disk = disk(&rig, &world);
    let hydrator = Hydrator::start(Arc::clone(&disk), Pace::default()).expect("start");
    assert_eq!(hydrator.wait(LONG), HydrateState::Done);
    let before = disk.fetched();
    // Whoever reads through the chain has it until its read has ended.
    rig.chain.read(0, &mut [0; 4096]).expect("read");
    assert_eq!(disk.fetched(), before + 4096);
}

#[test]
fn the_guests_write_wins_against_every_copy() {
    for seed in 0..4 {
        let (rig, world) = (rig(8), Rig::world());
        let disk = disk(&rig, &world);
        let mut guest = Guest::new(origin(8));
        let pace = Pace { workers: 3, latency_target: None, ..Pace::default() };
        let hydrator = Hydrator::start(Arc::clone(&disk), pace).expect("start");
        let mut dice = Rng::new(seed);
        let started = Instant::now();
        let mut acts = 0;
        while hydrator.wait(Some(Duration::ZERO)) != HydrateState::Done || acts < 2000 {
            let act = match Act::any(&mut dice, guest.sectors()) {
                Act::Drain | Act::Hydrate { .. } | Act::Seal => Act::Flush,
                act => act,
            };
            let bytes = guest.begin(act);
            perform(&disk, act, &bytes).expect("works");
            acts += 1;
            assert!(started.elapsed() < Duration::from_secs(60), "{:?}", hydrator.progress());
        }
        let found = read_all(&disk);
        guest.judge_live(&found);
        let dirty = disk.dirty().expect("dirty");
        guest.flushed();
        guest.judge(&found, &|at| dirty.contains(at)).expect("every change is dirty");
    }
}

#[test]
fn a_restart_goes_on_where_it_was_and_copies_nothing_twice() {
    let (rig, world) = (rig(32), Rig::world());
    let first = disk(&rig, &world);
    let hydrator =
        Hydrator::start(Arc::clone(&first), Pace { rate_bytes: Some(40 << 20), ..Pace::default() }).expect("start");
    while first.local().expect("local").hydrated < 16 << 20 {
        std::thread::sleep(Duration::from_millis(2));
    }
    hydrator.stop();
    let local = first.local().expect("local");
    assert!(local.absent > 0, "it is stopped before its end");
    drop((hydrator, first));
    let reads = rig.source.calls();
    let overlay = Overlay::open_on(Rig::files(&world), rig.of(), rig.options).expect("open");
    let disk = Arc::new(Disk::writable("d", Arc::clone(&rig.chain), overlay).expect("a disk"));
    assert_eq!(disk.local().expect("local"), local, "the same percentage");
    let copied_before = rig.source.calls() - reads;
    assert_eq!(copied_before, 0, "opening reads nothing from the source");
    let hydrator = Hydrator::start(Arc::clone(&disk), Pace::default()).expect("start");
    assert_eq!(hydrator.wait(LONG), HydrateState::Done);
    assert!(
        hydrator.progress().copied <= local.absent,
        "{} copied, {} were missing",
        hydrator.progress().copied,
        local.absent
    );
}

#[test]
fn pause_holds_and_a_rate_slows() {
    let (rig, world) = (rig(16), Rig::world());
    let disk = disk(&rig, &world);
    let hydrator =
        Hydrator::start(Arc::clone(&disk), Pace { workers: 2, rate_bytes: Some(8 << 20), ..Pace::default() })
            .expect("start");
    let started = Instant::now();
    while hydrator.progress().copied < 3 << 20 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(started.elapsed() > Duration::from_millis(150), "3 MiB at 8 MiB/s, one saved up and one on its way");
    hydrator.pause();
    std::thread::sleep(Duration::from_millis(50));
    let held = hydrator.progress();
    assert_eq!(held.state, HydrateState::Paused);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(hydrator.progress().copied, held.copied);
    hydrator.set_rate(None);
    hydrator.resume();
    assert_eq!(hydrator.wait(LONG), HydrateState::Done);
}

/// Set in the process of a test that looks at what all of it uses.
const ALONE: &str = "AQUIFER_TEST_ALONE";

/// Processor time of this process so far.
fn used() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("what it used");
    let fields = stat.rsplit(')').next().expect("fields").split_whitespace().skip(11);
    Duration::from_millis(fields.take(2).map(|ticks| ticks.parse::<u64>().expect("ticks") * 10).sum())
}

#[test]
fn what_may_not_be_copied_keeps_nobody_awake() {
    const REST: Duration = Duration::from_millis(600);
    if std::env::var_os(ALONE).is_none() {
        let mut command = std::process::Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "hydrate::what_may_not_be_copied_keeps_nobody_awake"]).env(ALONE, "1");
        let done = command.output().expect("run");
        let said = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    for paused in [true, false] {
        let (rig, world) = (rig(16), Rig::world());
        let disk = disk(&rig, &world);
        let hydrator = Hydrator::start(Arc::clone(&disk), Pace { rate_bytes: Some(1), ..Pace::default() });
        let hydrator = hydrator.expect("start");
        if paused {
            hydrator.pause();
            // What was on its way when it was paused ends first.
            std::thread::sleep(Duration::from_millis(100));
        } else {
            rig.source.fail_from_now(Failing::Io);
        }
        let waiting: Vec<std::thread::JoinHandle<_>> = [9u64, 11, 13]
            .map(|at| {
                let disk = Arc::clone(&disk);
                std::thread::spawn(move || disk.read(at << 20, &mut [0; 4096]))
            })
            .into();
        let started = Instant::now();
        let known = || {
            // Whoever waits for nothing has told what it read before it ends.
            let told = || waiting.iter().all(std::thread::JoinHandle::is_finished);
            if paused { told() } else { hydrator.progress().state == HydrateState::SourceAway }
        };
        while !known() {
            assert!(started.elapsed() < Duration::from_secs(10), "{:?}", hydrator.progress());
            std::thread::sleep(Duration::from_millis(1));
        }
        let before = used();
        std::thread::sleep(REST);
        let used = used() - before;
        assert!(used < REST / 4, "paused: {paused}, used {used:?} of {REST:?}");
        rig.source.heal();
        hydrator.resume();
        waiting.into_iter().for_each(|read| read.join().expect("a reader").expect("a read"));
    }
}

#[test]
fn what_the_guest_waits_for_comes_first() {
    let (rig, world) = (rig(64), Rig::world());
    let disk = disk(&rig, &world);
    let hydrator = Hydrator::start(Arc::clone(&disk), slow()).expect("start");
    let mut out = [0; 4096];
    disk.read(50 << 20, &mut out).expect("read");
    let started = Instant::now();
    let near = |at: u64| !disk.absent().expect("absent").contains(at);
    while !near((50 << 20) + 100_000) {
        assert!(started.elapsed() < Duration::from_secs(5), "neighbours of a fault are not local yet");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(near(50 << 20));
    assert!(disk.local().expect("local").hydrated < 40 << 20, "long before the bulk copy came by");
    let steps = vec![Step { range: 30 << 20..32 << 20, after_ms: 0 }];
    hydrator.replay(&Trace { size: 64 << 20, complete: true, steps });
    while !near(30 << 20) {
        assert!(started.elapsed() < Duration::from_secs(5), "the trace is not replayed");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_source_that_goes_away_is_waited_for() {
    const PARKED: u64 = (8 << 20) + 65_536;
    let (rig, world) = (rig(16), Rig::world());
    let disk = disk(&rig, &world);
    disk.hydrate(0, 4 << 20).expect("hydrate");
    rig.source.fail_from_now(Failing::Io);
    let hydrator = Hydrator::start(Arc::clone(&disk), Pace::default()).expect("start");
    let reader = {
        let disk = Arc::clone(&disk);
        std::thread::spawn(move || {
            let mut out = [0; 4096];
            disk.read(PARKED, &mut out).map(|()| out)
        })
    };
    let started = Instant::now();
    while disk.parked().is_empty() || hydrator.progress().state != HydrateState::SourceAway {
        assert!(started.elapsed() < Duration::from_secs(5), "{:?} {:?}", disk.parked(), hydrator.progress());
        std::thread::sleep(Duration::from_millis(1));
    }
    let parked = disk.parked();
    assert_eq!((parked[0].offset, parked[0].len), (PARKED, 4096));
    let mut out = vec![0; 4096];
    disk.read(1 << 20, &mut out).expect("local ranges go on");
    disk.write(9 << 20, &out).expect("and writes of whole blocks");
    disk.flush().expect("and flushes");
    rig.source.heal();
    assert!(reader.join().expect("a reader").is_ok(), "the parked read ends well by itself");
    assert_eq!(hydrator.wait(LONG), HydrateState::Done);
    assert!(disk.parked().is_empty());
}

#[test]
fn patience_has_an_end_and_can_be_taken_away() {
    let (rig, world) = (rig(2), Rig::world());
    let disk = disk(&rig, &world);
    rig.source.fail_from_now(Failing::Io);
    disk.set_patience(Duration::from_millis(100));
    let started = Instant::now();
    assert!(matches!(disk.read(0, &mut [0; 512]), Err(Error::SourceAway { .. })));
    assert!((100..2000).contains(&started.elapsed().as_millis()));
    disk.set_patience(Duration::from_secs(300));
    let reader = {
        let disk = Arc::clone(&disk);
        std::thread::spawn(move || disk.read(0, &mut [0; 512]))
    };
    while disk.parked().is_empty() {
        std::thread::sleep(Duration::from_millis(1));
    }
    disk.set_patience(Duration::ZERO);
    assert!(matches!(reader.join().expect("a reader"), Err(Error::SourceAway { .. })));
}

#[test]
fn a_full_disk_holds_hydration_until_there_is_space() {
    let (rig, world) = (rig(8), Rig::world());
    let disk = disk(&rig, &world);
    world.fail_from_now(Failing::NoSpace);
    let hydrator = Hydrator::start(Arc::clone(&disk), Pace::default()).expect("start");
    let started = Instant::now();
    while hydrator.progress().state != HydrateState::NoSpace {
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", hydrator.progress());
        std::thread::sleep(Duration::from_millis(1));
    }
    world.heal();
    assert_eq!(hydrator.wait(LONG), HydrateState::Done);
}

/// What is kept for the machine's own writes is not taken by the copy.
#[test]
fn the_copy_stops_where_its_room_ends_and_goes_on_with_more() {
    let (rig, world) = (rig(24), Rig::world());
    let disk = disk(&rig, &world);
    let hydrator = Hydrator::start(Arc::clone(&disk), slow()).expect("start");
    hydrator.set_room(Some(3 << 20));
    let started = Instant::now();
    while hydrator.progress().state != HydrateState::NoSpace {
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", hydrator.progress());
        std::thread::sleep(Duration::from_millis(1));
    }
    // One step may have been on its way before there was a limit, and one when it was reached.
    let stopped = hydrator.progress();
    assert!((3 << 20..=6 << 20).contains(&stopped.copied), "{stopped:?}");
    assert!(stopped.error.as_ref().is_some_and(|why| why.contains("kept")), "{stopped:?}");
    let expected = read_all(&disk);
    disk.write(20 << 20, &[7; 4096]).expect("a machine goes on");
    disk.flush().expect("flush");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(hydrator.progress().copied, stopped.copied, "what was read is not kept either");
    hydrator.set_room(None);
    hydrator.set_pace(Pace::default());
    assert_eq!(hydrator.wait(LONG), HydrateState::Done);
    assert!(hydrator.progress().error.is_none());
    let found = read_all(&disk);
    let at = 20 << 20;
    assert!(
        found[..at] == expected[..at]
            && found[at..at + 4096] == [7; 4096]
            && found[at + 4096..] == expected[at + 4096..]
    );
}

/// Progress never goes back, and never claims what is not there.
#[test]
fn progress_is_monotonic_and_true() {
    let (rig, world) = (rig(16), Rig::world());
    let disk = disk(&rig, &world);
    let hydrator =
        Hydrator::start(Arc::clone(&disk), Pace { rate_bytes: Some(30 << 20), ..Pace::default() }).expect("start");
    let (mut last, mut seen) = (0, 0);
    while !hydrator.progress().state.is_final() {
        let progress = hydrator.progress();
        assert!(progress.local >= last && progress.local <= progress.total, "{progress:?}");
        if let (Some(used), Some(used_local)) = (progress.used, progress.used_local) {
            assert!(used_local <= used && used <= progress.total, "{progress:?}");
        }
        assert!(progress.eta.is_none(), "nothing is known under ten seconds");
        (last, seen) = (progress.local, seen + 1);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(seen > 10, "only looked {seen} times");
    assert_eq!(hydrator.progress().state, HydrateState::Done);
}
