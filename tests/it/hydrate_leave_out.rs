//! Promise: what hydration leaves out nobody misses. A real file system whose free blocks hold old bytes, hydrated to its end: `e2fsck` finds it clean, every used block is
//! the restore point's, what was read keeps its bytes, and the rest is zeros. Loss of power included.

use std::{fs, path::Path, process::Command, sync::Arc, time::Duration};

use aquifer_formats::{raw::RawLayer, storage::MemoryStorage};
use aquifer_tests::{
    faults::{CrashPoint, Image, World},
    rig::Rig,
    rng::Rng,
};
use aquifer_vdisk::{
    BlockCache, Blocks, Chain, Delta, Disk, Error, HydrateState, Hydrator, Overlay, OverlayOf, OverlayOptions, Pace,
    disk::TOUCHED_NAME, unused,
};

const MIB: u64 = 1 << 20;
const SIZE: usize = 48 << 20;

fn tool(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect("the tool is installed");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stdout));
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("folder")
}

/// A disk of old bytes with a file system made over them that wrote only what it needed.
fn point(dir: &Path) -> Vec<u8> {
    let path = dir.join("fs");
    let word = path.to_str().expect("text");
    let tree = dir.join("tree");
    fs::create_dir(&tree).expect("tree");
    (0..30usize).for_each(|n| fs::write(tree.join(format!("{n}")), vec![3; n * 30_011]).expect("file"));
    fs::write(&path, vec![0xa5; SIZE]).expect("image");
    let tree = tree.to_str().expect("text");
    tool("mkfs.ext4", &["-q", "-F", "-b", "4096", "-E", "nodiscard,lazy_itable_init=0", "-d", tree, word]);
    fs::read(&path).expect("image")
}

fn chain(bytes: &[u8]) -> Arc<Chain> {
    let layer = RawLayer::open(Arc::new(MemoryStorage::new("point", bytes.to_vec()))).expect("layer");
    Arc::new(Chain::new(vec![Arc::new(layer)], Arc::new(BlockCache::new(1 << 20))).expect("chain"))
}

fn disk(dir: &Path, bytes: &[u8]) -> Arc<Disk> {
    let of = OverlayOf { size: bytes.len() as u64, chain: [1; 32] };
    let options = OverlayOptions { journal_bytes: 1 << 20, ..OverlayOptions::default() };
    let made = dir.join("map").exists();
    let overlay = loop {
        match if made { Overlay::open(dir, of, options) } else { Overlay::create(dir, of, options) } {
            // A tool that another test is starting right now still has all our files.
            Err(Error::Busy { .. }) => std::thread::sleep(Duration::from_millis(5)),
            other => break other,
        }
    };
    let disk = Disk::writable("d", chain(bytes), overlay.expect("overlay")).expect("disk");
    Arc::new(disk.watching(dir).expect("watched"))
}

fn read(disk: &Disk, at: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    disk.read(at, &mut out).expect("read");
    out
}

/// Some unused ranges of a MiB or more, as the hydrator will find them.
fn free_of(bytes: &[u8]) -> Delta {
    let disk = Disk::read_only("d", chain(bytes));
    let found = unused::find(bytes.len() as u64, &|at, buf| disk.read(at, buf)).expect("find");
    assert!(found.ranges.bytes() > 20 * MIB, "{found:?}");
    found.ranges
}

fn done(hydrator: &Hydrator) {
    assert_eq!(hydrator.wait(Some(Duration::from_secs(120))), HydrateState::Done, "{:?}", hydrator.progress());
}

#[test]
fn what_nobody_uses_and_nobody_read_is_left_out() {
    let dir = folder();
    let bytes = point(dir.path());
    let unused = free_of(&bytes);
    let mut free = unused.iter().filter(|r| r.end - r.start > 5 * MIB);
    let big = free.next().expect("a large unused range");
    let at = big.start.next_multiple_of(MIB);
    let own = dir.path().join("disk");
    fs::create_dir(&own).expect("folder");
    let first = disk(&own, &bytes);
    let here = usize::try_from(at).expect("small");
    // Before anything is known of the file system.
    assert_eq!(read(&first, at + 5000, 100), bytes[here + 5000..here + 5100]);
    drop(first);
    // Another process: what was read is remembered.
    let disk = disk(&own, &bytes);
    disk.write(at + 3 * MIB, &[0x5a; 6000]).expect("write");
    let hydrator = Hydrator::start(Arc::clone(&disk), Pace::default()).expect("start");
    done(&hydrator);
    let progress = hydrator.progress();
    assert!(progress.copied < SIZE as u64 - 15 * MIB, "{progress:?}");
    assert_eq!((progress.left_out, progress.local), (0, SIZE as u64));
    disk.drain().expect("drain");
    let raw = fs::read(own.join("disk.raw")).expect("raw");
    assert!(raw == read(&disk, 0, SIZE), "disk.raw alone is the disk");

    let mut zeros = 0;
    for block in (0..SIZE).step_by(4096) {
        let offset = block as u64;
        let found = &raw[block..block + 4096];
        let written = (at + 3 * MIB..at + 3 * MIB + 8192).contains(&offset);
        let touched = (at..at + MIB).contains(&offset);
        if written {
            continue;
        } else if unused.contains(offset) && !touched && found != &bytes[block..block + 4096] {
            assert!(found.iter().all(|b| *b == 0), "block at {block} is neither the point's nor zeros");
            assert!(disk.dirty().expect("dirty").contains(offset), "it is not what the chain has");
            zeros += 1;
        } else {
            assert!(found == &bytes[block..block + 4096], "block at {block} changed");
        }
    }
    assert!(zeros * 4096 > 15 << 20, "{zeros} blocks were left out");
    assert_eq!(raw[here + 3 * MIB as usize..][..6000], [0x5a; 6000]);
    // The rest of the block the guest wrote a part of is the restore point's.
    assert_eq!(raw[here + 3 * MIB as usize + 6000], 0xa5);
    tool("e2fsck", &["-fn", own.join("disk.raw").to_str().expect("text")]);
}

#[test]
fn all_blocks_means_all_and_an_unwatched_disk_leaves_nothing_out() {
    let dir = folder();
    let bytes = point(dir.path());
    for (name, blocks, unwatched) in [("all", Blocks::All, false), ("unwatched", Blocks::Used, true)] {
        let own = dir.path().join(name);
        fs::create_dir(&own).expect("folder");
        let first = disk(&own, &bytes);
        if unwatched {
            first.hydrate(0, MIB).expect("hydrate");
            first.seal().expect("seal");
            drop(first);
            fs::remove_file(own.join(TOUCHED_NAME)).expect("remove");
        } else {
            drop(first);
        }
        let disk = disk(&own, &bytes);
        let hydrator = Hydrator::start(Arc::clone(&disk), Pace { blocks, ..Pace::default() }).expect("start");
        done(&hydrator);
        assert!(read(&disk, 0, SIZE) == bytes, "{name}");
        assert!(disk.dirty().expect("dirty").is_empty());
    }
}

/// A reader beside the end of hydration: whatever it saw first, it sees for ever.
#[test]
fn what_was_seen_once_stays() {
    let dir = folder();
    let bytes = point(dir.path());
    let unused = free_of(&bytes);
    for round in 0..6u64 {
        let own = dir.path().join(format!("r{round}"));
        fs::create_dir(&own).expect("folder");
        let disk = disk(&own, &bytes);
        let hydrator = Hydrator::start(Arc::clone(&disk), Pace { latency_target: None, ..Pace::default() });
        let hydrator = hydrator.expect("start");
        let mut seen = Vec::new();
        let places: Vec<u64> = unused.iter().flat_map(|r| (r.start..r.end).step_by(512 << 10)).collect();
        let mut at = usize::try_from(round * 7).expect("small");
        while hydrator.wait(Some(Duration::ZERO)) != HydrateState::Done {
            let place = places[at % places.len()];
            seen.push((place, read(&disk, place, 512)));
            at += 11;
            std::thread::sleep(Duration::from_micros(300 * round));
        }
        for (place, first) in &seen {
            assert!(read(&disk, *place, 512) == *first, "round {round}: {place} changed");
        }
    }
}

/// What a machine made of bytes it read may be durable once it has flushed; so is, then, that they were read.
#[test]
fn a_loss_of_power_forgets_no_read_that_a_flush_may_depend_on() {
    const TOUCHED: usize = 3;
    let bytes: Vec<u64> = (1..=8 << 11).collect();
    let rig = Rig::new(&bytes);
    let world = World::new(vec![Image::default(); TOUCHED + 1]);
    let made = rig.create(&world);
    let disk = made.watching_on(world.file(TOUCHED, TOUCHED_NAME)).expect("watched");
    let mut dice = Rng::new(3);
    let mut buf = [0; 4096];
    // Which units were read when a flush ended, and how much had been told by then.
    let (mut read, mut promises) = (0u8, vec![(0, 0u8)]);
    for round in 0..80 {
        let unit = dice.below(8);
        match dice.below(3) {
            0 => {
                disk.flush().expect("flush");
                promises.push((world.told_len(), read));
            }
            1 => disk.write((unit << 20) + dice.below(200) * 4096, &[round; 4096]).expect("write"),
            _ => {
                disk.read((unit << 20) + (201 + dice.below(50)) * 4096, &mut buf).expect("read");
                read |= 1 << unit;
            }
        }
    }
    drop(disk);
    let told = world.told();
    let (mut point, mut states, mut held) = (CrashPoint::new(vec![Image::default(); TOUCHED + 1]), 0, 0);
    for (at, event) in told.iter().enumerate() {
        point.pass(event);
        let (_, promised) = promises.iter().rev().find(|(told, _)| *told <= at + 1).expect("the first");
        for _ in 0..8 {
            let files = point.crash(dice.next_u64(), dice.next_u64() & dice.next_u64(), &mut dice);
            let mut found = [0];
            files[TOUCHED].read(0, &mut found);
            assert_eq!(found[0] & promised, *promised, "after {at} of {}: a read is forgotten", told.len());
            states += 1;
            held += promised.count_ones();
        }
    }
    assert!(states > 400 && held > 1000 && read.count_ones() > 5, "{states} states, {held} bits held");
}
