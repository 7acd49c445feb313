//! Promises D3, D6 and the overlay's manners: a failed sync is final and names what is in doubt; a full
//! disk reaches the guest and loses nothing; one owner; nothing that is not ours is opened; writes of
//! whole blocks leave the source alone.

#![allow(clippy::cast_possible_truncation, reason = "numbers of a small disk")]

use std::{collections::BTreeSet, path::Path, process::Command, sync::Arc, time::Duration};

use aquifer_tests::{
    damage, failing,
    faults::{CrashPoint, Failing, World},
    guest::{Act, Guest},
    kept,
    ledger::Ledger,
    oracle::cases,
    rig::{Rig, perform, read_all},
    rng::Rng,
};
use aquifer_vdisk::{Disk, Error, ExtentKind, Overlay, OverlayOf, OverlayOptions, Zeroing};

fn numbers(sectors: u64) -> Vec<u64> {
    (1..=sectors).collect()
}

#[test]
fn whichever_call_fails_nothing_acknowledged_is_lost() {
    let ledger = Ledger::begin("calls failed in memory");
    let (seeds, mut failed) = (1..=u64::from(cases(12)), 0);
    let mut sites = BTreeSet::new();
    for seed in seeds.clone() {
        for failing in [Failing::Io, Failing::NoSpace, Failing::Interrupted, Failing::Short] {
            let calls = failing::each_call(seed, failing, &mut sites).unwrap_or_else(|what| panic!("{what}"));
            assert!(calls > 50, "seed {seed}: the scenario makes only {calls} calls");
            failed += calls;
        }
    }
    let wanted = failing::sync_lines();
    let missed: Vec<_> = wanted.difference(&sites).collect();
    assert!(wanted.len() >= 8 && missed.is_empty(), "syncs that never failed: {missed:?}");
    ledger.tell(
        &format!("{seeds:?}"),
        &[("calls failed", failed), ("lines that sync, each failed", wanted.len() as u64)],
    );
}

#[test]
fn a_write_of_whole_blocks_reads_nothing_from_the_source() {
    let rig = Rig::new(&numbers(512));
    let disk = rig.create(&Rig::world());
    let before = rig.source.calls();
    disk.write(8192, &[1; 3 * 4096]).expect("write");
    disk.write_zeroes(65536, 16384, Zeroing::MayTrim).expect("zero");
    disk.flush().expect("flush");
    let mut out = [0; 3 * 4096];
    disk.read(8192, &mut out).expect("read");
    assert_eq!((out, rig.source.calls()), ([1; 3 * 4096], before), "and reading them back neither");
    disk.write(100, &[2]).expect("write");
    assert!(rig.source.calls() > before, "part of a block needs the rest of it");
}

#[test]
fn a_failed_sync_is_final_even_if_later_ones_would_work() {
    let rig = Rig::new(&numbers(512));
    let world = Rig::world();
    let disk = rig.create(&world);
    disk.write(0, &[1; 4096]).expect("write");
    disk.flush().expect("flush");
    disk.write(8192, &[2; 4096]).expect("write");
    // The flush writes a record, then syncs.
    world.fail_at(world.calls() + 2, Failing::Io);
    assert!(matches!(disk.flush(), Err(Error::SyncFailed { .. })));
    world.heal();
    for _ in 0..3 {
        assert!(matches!(disk.flush(), Err(Error::SyncFailed { .. })));
    }
    assert!(matches!(disk.write(0, &[3; 4096]), Err(Error::SyncFailed { .. })));
    let doubt = disk.doubtful();
    assert!(doubt.contains(8192) && !doubt.contains(0), "{doubt:?}");
    let mut out = [0; 4096];
    disk.read(8192, &mut out).expect("reads go on");
    assert_eq!(out, [2; 4096]);
    drop(disk);
    let disk = rig.open(&world).expect("opens again");
    disk.flush().expect("and flushes again");
    disk.read(0, &mut out).expect("read");
    assert_eq!(out, [1; 4096]);
}

/// An act of a guest that must not be parted from what it knows.
fn attempt(disk: &Disk, guest: &mut Guest, act: Act) -> aquifer_vdisk::Result<()> {
    let bytes = guest.begin(act);
    perform(disk, act, &bytes)?;
    if act == Act::Flush {
        guest.flushed();
    }
    Ok(())
}

/// What may be found once the power is lost now.
fn judge_without_power(rig: &Rig, base: &World, world: &World, guest: &Guest, dice: &mut Rng) {
    let mut point = CrashPoint::new(base.now());
    world.told().iter().for_each(|told| point.pass(told));
    let some = (dice.next_u64(), dice.next_u64());
    for files in [point.crash(0, 0, dice), point.crash(some.0, some.1, dice)] {
        let disk = rig.open(&World::new(files)).expect("opens after a loss of power");
        let dirty = disk.dirty().expect("dirty");
        guest.judge(&read_all(&disk), &|at| dirty.contains(at)).unwrap_or_else(|what| panic!("{what}"));
    }
}

/// One flush of several records, on a journal whose halves turn meanwhile: whichever write of it fails, it is not
/// acknowledged, what was flushed before survives a loss of power, and the next flush saves all.
#[test]
fn a_failed_journal_write_acknowledges_nothing_and_loses_nothing() {
    let mut failed = 0;
    for failing in [Failing::Io, Failing::NoSpace, Failing::Short] {
        for call in 1.. {
            let mut rig = Rig::new(&numbers(512));
            rig.options.journal_bytes = 4096 * 17;
            let (base, mut guest, mut dice) = (Rig::world(), Guest::new(numbers(512)), Rng::new(call));
            drop(rig.create(&base));
            let world = World::new(base.now());
            let disk = rig.open(&world).expect("opens");
            for act in [Act::Write { first: 0, count: 8 }, Act::Flush] {
                attempt(&disk, &mut guest, act).expect("works");
            }
            for block in 0..24 {
                attempt(&disk, &mut guest, Act::Write { first: 16 * block, count: 8 }).expect("waits in memory");
            }
            let last = world.calls() + call;
            world.fail_at(last, failing);
            let flushed = attempt(&disk, &mut guest, Act::Flush);
            world.heal();
            match flushed {
                // It makes fewer calls than that.
                Ok(()) if world.calls() < last => break,
                Ok(()) => panic!("call {call}, {failing:?}: acknowledged"),
                // That is final, and another test's.
                Err(Error::SyncFailed { .. }) => continue,
                Err(_) => failed += 1,
            }
            judge_without_power(&rig, &base, &world, &guest, &mut dice);
            guest.judge_live(&read_all(&disk));
            attempt(&disk, &mut guest, Act::Flush).expect("the next one works");
            judge_without_power(&rig, &base, &world, &guest, &mut dice);
        }
    }
    assert!(failed > 12, "only {failed} writes failed");
}

#[test]
fn another_chain_size_or_version_is_refused() {
    damage::strangers().unwrap_or_else(|what| panic!("{what}"));
}

/// A bit in every byte of headers, marks and records: the right disk, or an error.
#[test]
fn damage_is_found_not_read() {
    let ledger = Ledger::begin("damages of an overlay");
    let (tried, refused) = damage::flips(97).unwrap_or_else(|what| panic!("{what}"));
    assert!(refused > 20, "only {refused} damages were refused");
    damage::cuts().unwrap_or_else(|what| panic!("{what}"));
    ledger.tell("none", &[("bits flipped", tried), ("refused", refused)]);
}

#[test]
fn a_folder_has_one_owner() {
    let dir = tempfile::tempdir().expect("a folder");
    let of = OverlayOf { size: 1 << 20, chain: [1; 32] };
    let options = OverlayOptions { journal_bytes: 1 << 20, ..OverlayOptions::default() };
    let overlay = Overlay::create(dir.path(), of, options).expect("create");
    match Overlay::open(dir.path(), of, options) {
        Err(Error::Busy { holder, .. }) => assert_eq!(holder, std::process::id().to_string()),
        other => panic!("{other:?}"),
    }
    drop(overlay);
    drop(Overlay::open(dir.path(), of, options).expect("free again"));
    assert!(Overlay::create(dir.path(), of, options).is_err(), "what exists is never made anew");
    assert_eq!(std::fs::metadata(Overlay::raw_path(dir.path())).expect("stat").len(), 1 << 20);
}

#[test]
fn after_a_hand_over_everything_counts_as_dirty() {
    damage::pivot().unwrap_or_else(|what| panic!("{what}"));
}

#[test]
fn a_write_is_kept_for_the_next_process_of_this_boot_only() {
    kept::all().unwrap_or_else(|what| panic!("{what}"));
}

/// The guest may be moved onto the file at any moment after the hand over, or not yet, and doors may die meanwhile:
/// the file is the whole truth for all of them.
#[test]
fn after_a_hand_over_every_process_serves_the_file_itself() {
    let rig = Rig::new(&numbers(2048));
    let world = Rig::world();
    let disk = rig.create(&world);
    disk.hydrate(0, disk.size()).expect("hydrate");
    disk.trim(32768, 65536).expect("trim");
    disk.write(131_072, &[1; 700]).expect("write");
    disk.hand_over().expect("hand over");
    drop(disk);
    let raw = Rig::files(&world).raw;
    let file = |offset: u64, len: usize| {
        let mut out = vec![0; len];
        raw.read_at(offset, &mut out).expect("read");
        out
    };
    assert_eq!(file(131_072, 700), [1; 700]);
    for life in 2..6u8 {
        let disk = rig.open(&world).expect("opens");
        assert_eq!(disk.local().expect("local").absent, 0);
        assert!(disk.absent().expect("absent").is_empty());
        // Through the door: in the file before it is acknowledged, over written, hydrated and trimmed blocks alike.
        for at in [131_072 + 100, 200_000, 32768 + 512] {
            disk.write(at, &[life; 300]).expect("write");
            assert_eq!(file(at, 300), [life; 300], "life {life}, at {at}");
        }
        disk.trim(300_001, 20_000).expect("trim");
        assert_eq!(file(300_001, 20_000), [0; 20_000]);
        // Beside the door: found at once, and never undone.
        raw.write_at(40_000, &[life + 100; 500]).expect("write");
        raw.write_at(300_500, &[life + 100; 500]).expect("write");
        disk.flush().expect("flush");
        disk.hydrate(0, disk.size()).expect("nothing to do");
        disk.seal().expect("seal");
        disk.drain().expect("drain");
        disk.hand_over().expect("once more");
        let mut out = vec![0; 500];
        for at in [40_000, 300_500] {
            disk.read(at, &mut out).expect("read");
            assert_eq!(out, [life + 100; 500], "life {life}, at {at}");
        }
        drop(disk);
        assert_eq!(file(40_000, 500), [life + 100; 500], "life {life}");
    }
}

#[test]
fn extents_tell_what_is_there() {
    let mut origin = numbers(2048);
    origin[..1024].fill(0);
    let rig = Rig::new(&origin);
    let disk = rig.create(&Rig::world());
    disk.write(4096, &[1; 4096]).expect("write");
    disk.write_zeroes(1 << 19, 65536, Zeroing::MayTrim).expect("zero");
    disk.hydrate(0, disk.size()).expect("hydrate");
    disk.flush().expect("flush");
    let (mut out, mut at) = (Vec::new(), 0);
    disk.extents(0, disk.size(), &mut out).expect("extents");
    let all = read_all(&disk);
    for extent in &out {
        assert_eq!(extent.offset, at, "{out:?}");
        at += extent.len;
        let bytes = &all[extent.offset as usize..(extent.offset + extent.len) as usize];
        assert!(extent.kind == ExtentKind::Data || bytes.iter().all(|b| *b == 0), "{extent:?} is not zero");
    }
    assert_eq!(at, disk.size());
    let data: u64 = out.iter().filter(|e| e.kind == ExtentKind::Data).map(|e| e.len).sum();
    assert!(data <= 4096 + (1 << 19) - 65536, "{data} bytes of data are claimed");
}

#[test]
fn memory_stays_within_its_bound_without_any_flush() {
    let rig = Rig {
        options: OverlayOptions { memory_bytes: 1 << 20, spill_bytes: 256 << 10, ..OverlayOptions::default() },
        ..Rig::new(&numbers(65536))
    };
    let overlay = Overlay::create_on(Rig::files(&Rig::world()), rig.of(), rig.options).expect("create");
    let disk = Disk::writable("d", Arc::clone(&rig.chain), overlay).expect("a disk");
    // Hydrated blocks are the ones whose bytes have to wait in memory.
    disk.hydrate(0, disk.size()).expect("hydrate");
    disk.seal().expect("seal");
    let mut dice = Rng::new(5);
    for _ in 0..8192 {
        disk.write(dice.below(8192) * 4096, &[7; 4096]).expect("write");
        assert!(disk.memory_bytes() <= (1 << 20) + 4096, "{}", disk.memory_bytes());
    }
}

/// A file system of a few MiB, for as long as it lives.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(bytes: u64) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        mount(&["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"], dir.path());
        Self(dir)
    }

    fn resize(&self, bytes: u64) {
        mount(&["-o", &format!("remount,size={bytes}")], self.0.path());
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _status = Command::new("umount").arg(self.0.path()).status();
    }
}

fn mount(args: &[&str], dir: &Path) {
    let status = Command::new("mount").args(args).arg(dir).status().expect("mount");
    assert!(status.success(), "mount {args:?}");
}

#[test]
fn a_full_disk_reaches_the_guest_and_the_session_lives() {
    let tmpfs = Tmpfs::new(12 << 20);
    let options = OverlayOptions { journal_bytes: 2 << 20, memory_bytes: 1 << 20, ..OverlayOptions::default() };
    let rig = Rig { options, ..Rig::new(&numbers(65536)) };
    let overlay = Overlay::create(tmpfs.0.path(), rig.of(), options).expect("create");
    let disk = Disk::writable("d", Arc::clone(&rig.chain), overlay).expect("a disk");
    let mut guest = Guest::new(numbers(65536));
    let mut dice = Rng::new(11);
    let (mut full, mut flushed) = (0, 0);
    for round in 0..4000 {
        let act = match dice.below(8) {
            0 => Act::Flush,
            1 => Act::Hydrate { first: 8 * dice.below(8000) as usize, count: 64 },
            _ => Act::Write { first: 8 * dice.below(8160) as usize, count: 64 },
        };
        let bytes = guest.begin(act);
        match perform(&disk, act, &bytes) {
            Ok(()) if act == Act::Flush => (flushed, ()) = (flushed + 1, guest.flushed()),
            Ok(()) => {}
            Err(Error::NoSpace { .. }) => {
                full += 1;
                guest.unsure(&read_all(&disk));
            }
            Err(e) => panic!("round {round}: {e}"),
        }
        if full > 50 {
            break;
        }
    }
    assert!(full > 50 && flushed > 5, "{full} times full, {flushed} flushes");
    guest.judge_live(&read_all(&disk));
    // There is no space to replay the journal either: that is said, and nothing is lost by it.
    drop(disk);
    let reopened = Overlay::open(tmpfs.0.path(), rig.of(), options);
    if let Err(e) = &reopened {
        assert!(matches!(e, Error::NoSpace { .. }), "{e}");
    }
    drop(reopened);
    tmpfs.resize(64 << 20);
    let overlay = Overlay::open(tmpfs.0.path(), rig.of(), options).expect("opens with space");
    let disk = Disk::writable("d", Arc::clone(&rig.chain), overlay).expect("a disk");
    let dirty = disk.dirty().expect("dirty");
    guest.judge(&read_all(&disk), &|at| dirty.contains(at)).expect("nothing acknowledged is lost");
    disk.hydrate(0, disk.size()).expect("and it goes on");
    disk.drain().expect("to the end");
}

#[test]
fn there_is_no_overlay_without_space_for_map_and_journal() {
    let tmpfs = Tmpfs::new(3 << 20);
    let of = OverlayOf { size: 1 << 30, chain: [0; 32] };
    let result = Overlay::create(tmpfs.0.path(), of, OverlayOptions::default());
    assert!(matches!(result, Err(Error::NoSpace { .. })), "{result:?}");
}

/// Many threads write, flush and trim their own blocks beside a hydrating one; then the power is cut.
#[test]
fn threads_share_flushes_and_lose_nothing() {
    const THREADS: usize = 8;
    const BLOCKS: usize = 64;
    let dir = tempfile::tempdir().expect("a folder");
    let sectors = (THREADS * BLOCKS * 8) as u64;
    let options = OverlayOptions { journal_bytes: 1 << 20, memory_bytes: 1 << 20, ..OverlayOptions::default() };
    let rig = Rig { options, ..Rig::new(&numbers(sectors)) };
    let overlay = Overlay::create(dir.path(), rig.of(), options).expect("create");
    let disk = Arc::new(Disk::writable("d", Arc::clone(&rig.chain), overlay).expect("a disk"));
    let hydrating = {
        let disk = Arc::clone(&disk);
        std::thread::spawn(move || {
            for at in (0..disk.size()).step_by(65536) {
                disk.hydrate(at, 65536).expect("hydrate");
                disk.seal().expect("seal");
                std::thread::sleep(Duration::from_millis(1));
            }
        })
    };
    let writers: Vec<_> = (0..THREADS)
        .map(|thread| {
            let disk = Arc::clone(&disk);
            std::thread::spawn(move || {
                let mut dice = Rng::new(thread as u64);
                let mut written = BTreeSet::new();
                // Blocks of all threads lie next to one another.
                let place = |block: usize| ((block * THREADS + thread) * 4096) as u64;
                for round in 0..400 {
                    let block = dice.below(BLOCKS as u64) as usize;
                    disk.write(place(block), &[round as u8 | 1; 4096]).expect("write");
                    let mut out = [0; 4096];
                    disk.read(place(block), &mut out).expect("read");
                    assert_eq!(out, [round as u8 | 1; 4096], "read what was written");
                    written.insert(block);
                    if dice.once_in(4) {
                        disk.flush().expect("flush");
                    }
                    if dice.once_in(16) {
                        disk.trim(place(block), 4096).expect("trim");
                    }
                }
                disk.flush().expect("flush");
                let mine: Vec<_> = (0..BLOCKS)
                    .map(|block| {
                        let mut out = vec![0; 4096];
                        disk.read(place(block), &mut out).expect("read");
                        (place(block), out, written.contains(&block))
                    })
                    .collect();
                mine
            })
        })
        .collect();
    let known: Vec<_> = writers.into_iter().flat_map(|w| w.join().expect("a writer")).collect();
    hydrating.join().expect("hydration");
    drop(disk);
    let overlay = Overlay::open(dir.path(), rig.of(), options).expect("opens");
    let disk = Disk::writable("d", Arc::clone(&rig.chain), overlay).expect("a disk");
    let dirty = disk.dirty().expect("dirty");
    for (at, bytes, written) in known {
        let mut out = vec![0; 4096];
        disk.read(at, &mut out).expect("read");
        assert!(out == bytes, "block at {at}");
        assert_eq!(dirty.contains(at), written, "block at {at}");
    }
}
