//! Promise A2, as far as order goes: whoever floods a disk pays for it itself. No clock is looked at here; how long a
//! victim's requests take is measured by `scripts/bench/aggressors.py`.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use aquifer_formats::{Storage, storage::MemoryStorage};
use aquifer_mount::{
    nbd::{Address, Client, ClientOptions, Export, Server},
    vhost::{VhostDisk, VhostDoor},
};
use aquifer_tests::{
    door::{self, HeldStorage},
    faults::{Told, World},
    machine::{Machine, header},
    rig::{Rig, read_all},
};
use aquifer_vdisk::{Disk, Overlay, OverlayFiles, OverlayOf, OverlayOptions};
use rustix::event::Timespec;

const SMALL: usize = 64 << 10;
const LARGE: usize = 1 << 20;
const RAW: usize = 0;
const JOURNAL: usize = 2;

/// Bytes of a file that each of its syncs found, and what none has covered yet.
fn found_by_syncs(told: &[Told], of: usize) -> (Vec<u64>, u64) {
    let (mut found, mut open) = (Vec::new(), 0);
    for told in told {
        match told {
            Told::Write { file, bytes, .. } if *file == of => open += bytes.len(),
            Told::Sync { file, .. } if *file == of => found.push(std::mem::take(&mut open)),
            _ => {}
        }
    }
    (found, open)
}

fn flood(disk: &Disk, bytes: usize, pieces: std::ops::Range<usize>) {
    let content = vec![7; bytes];
    for piece in pieces {
        disk.write((piece * bytes) as u64, &content).expect("write");
    }
}

/// A disk of 64 MiB that nobody floods by record: what the journal keeps is bounded elsewhere.
fn rig() -> Rig {
    let base = Rig::new(&vec![0; 64 << 11]);
    Rig { options: OverlayOptions { spill_bytes: 0, ..base.options }, ..base }
}

#[test]
fn a_flush_never_finds_what_a_flood_of_large_writes_has_left() {
    let world: World = Rig::world();
    let disk = rig().create(&world);
    let made = world.told_len();
    flood(&disk, LARGE, 0..24);
    let (found, open) = found_by_syncs(&world.told()[made..], RAW);
    assert!(found.is_empty() && open == 24 * LARGE as u64, "nobody flushes, so nobody waits: {found:?}");

    // The victim flushes once; from then on what a large write has stored is durable when it is acknowledged.
    disk.flush().expect("flush");
    let flushed = world.told_len();
    for round in 0..40 {
        flood(&disk, LARGE, 24 + round % 40..25 + round % 40);
        let (found, open) = found_by_syncs(&world.told()[flushed..], RAW);
        assert_eq!((found.len(), open), (round + 1, 0), "each syncs its own");
    }
    let before = world.told_len();
    disk.write(0, &[9; 4096]).expect("write");
    disk.flush().expect("flush");
    let told = world.told();
    assert!(
        found_by_syncs(&told[before..], RAW).0.is_empty(),
        "the victim's flush does not look at what others stored"
    );
    let (found, _) = found_by_syncs(&told[before..], JOURNAL);
    assert!(found.len() == 1 && found[0] <= 64 << 10, "marks and one block: {found:?}");

    // Nobody has flushed for long: the flood is let go again.
    (0..4).for_each(|_| flood(&disk, LARGE, 24..64));
    let (_, open) = found_by_syncs(&world.told()[flushed..], RAW);
    assert!(open >= 16 * LARGE as u64, "{open}");
    let bytes = read_all(&disk);
    assert!(bytes[..4096].iter().all(|b| *b == 9) && bytes[4096..64 << 20].iter().all(|b| *b == 7));
}

#[test]
fn a_flush_finds_little_of_a_flood_of_small_writes() {
    let rig = rig();
    let world: World = Rig::world();
    let disk = rig.create(&world);
    disk.flush().expect("flush");
    flood(&disk, SMALL, 0..1);
    disk.flush().expect("flush");
    let flushed = world.told_len();
    flood(&disk, SMALL, 1..400);
    let told = world.told();
    // By record, of which each is at most the allowance, a write and its own entries; nothing is left in place for a flush to sync.
    let most = rig.options.ahead_bytes + 2 * SMALL as u64;
    let (found, open) = found_by_syncs(&told[flushed..], JOURNAL);
    assert!(found.len() >= 20 && found.iter().all(|bytes| *bytes <= most) && open == 0, "{found:?} {open}");
    let before = told.len();
    disk.flush().expect("flush");
    let told = world.told();
    let (found, _) = found_by_syncs(&told[before..], JOURNAL);
    assert!(found.iter().sum::<u64>() <= most, "{found:?}");
    assert!(found_by_syncs(&told[before..], RAW).0.is_empty(), "nothing of it is in place");
    let bytes = read_all(&disk);
    assert!(bytes[..400 * SMALL].iter().all(|b| *b == 7) && bytes[400 * SMALL..64 << 20].iter().all(|b| *b == 0));
}

/// A disk over sevens, and the file whose syncs can be held up.
fn held_disk(name: &str, options: OverlayOptions) -> (Arc<HeldStorage>, Arc<Disk>) {
    let raw = HeldStorage::new(Vec::new());
    let below = Arc::new(MemoryStorage::new("below", vec![7; 64 << 20]));
    let disk = disk_of(name, below, Arc::clone(&raw) as _, options);
    (raw, disk)
}

/// A disk over sevens, which can be held up.
fn disk_over_held(name: &str, options: OverlayOptions) -> (Arc<HeldStorage>, Arc<Disk>) {
    let below = HeldStorage::new(vec![7; 64 << 20]);
    let disk = disk_of(name, Arc::clone(&below) as _, Arc::new(MemoryStorage::new("raw", Vec::new())), options);
    (below, disk)
}

fn disk_of(name: &str, below: Arc<dyn Storage>, raw: Arc<dyn Storage>, options: OverlayOptions) -> Arc<Disk> {
    let chain = door::chain(below);
    let of = OverlayOf { size: chain.size(), chain: chain.fingerprint().expect("fingerprint") };
    let empty = |name| Arc::new(MemoryStorage::new(name, Vec::new()));
    let overlay = Overlay::create_on(OverlayFiles { raw, map: empty("map"), journal: empty("journal") }, of, options);
    Arc::new(Disk::writable(name, chain, overlay.expect("overlay")).expect("disk"))
}

#[test]
fn a_connection_is_answered_while_a_large_write_of_its_own_waits_for_the_device() {
    let (raw, disk) = held_disk("vda", OverlayOptions::default());
    let folder = tempfile::tempdir().expect("folder");
    let server = Server::builder().export(Export::new("vda", disk)).build().expect("server");
    let address = server.listen_unix(&folder.path().join("s")).expect("listen");
    let client = Client::connect(&address, &ClientOptions { connections: 1, ..ClientOptions::default() });
    let client = client.expect("a connection");
    client.write(0, &[9; 4096]).and_then(|()| client.flush()).expect("flushes are asked for");

    raw.hold_syncs();
    thread::scope(|scope| {
        let large = scope.spawn(|| client.write(1 << 20, &[8; LARGE]));
        while raw.waiting() == 0 {
            thread::sleep(Duration::from_millis(1));
            assert!(!large.is_finished(), "it is acknowledged before it is durable");
        }
        let mut bytes = [0; 4096];
        client.read(0, &mut bytes).expect("a read beside it");
        client.write(8192, &bytes).expect("a small write beside it");
        assert_eq!((bytes, raw.waiting()), ([9; 4096], 1), "neither waited for the device");
        raw.release();
        large.join().expect("a thread").expect("a write");
    });
    assert!(server.stop());
}

/// Waits until so many large writes of parts of blocks wait for their source, or could have come to it.
fn wait_for_the_source(below: &HeldStorage, writes: u64) {
    let until = Instant::now() + Duration::from_secs(5);
    while below.waiting() < writes && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
    }
}

/// Large writes of parts of blocks: more than a disk has threads for those of whole blocks.
const TORN: usize = 8;

#[test]
fn a_large_write_of_whole_blocks_does_not_wait_for_a_source_that_is_away() {
    let (below, disk) = disk_over_held("vda", OverlayOptions::default());
    let folder = tempfile::tempdir().expect("folder");
    let server = Server::builder().export(Export::new("vda", disk)).build().expect("server");
    let address = server.listen_unix(&folder.path().join("s")).expect("listen");
    let client = Client::connect(&address, &ClientOptions { connections: 1, ..ClientOptions::default() });
    let client = client.expect("a connection");
    client.write(0, &[9; 4096]).and_then(|()| client.flush()).expect("flushes are asked for");

    below.hold();
    thread::scope(|scope| {
        let client = &client;
        let torn = |n: usize| scope.spawn(move || client.write(((1 + 2 * n as u64) << 20) + 512, &[8; LARGE]));
        let torn: Vec<_> = (0..TORN).map(torn).collect();
        wait_for_the_source(&below, TORN as u64);
        let whole = scope.spawn(|| client.write(60 << 20, &[8; LARGE]));
        let ended = (0..500).any(|_| {
            thread::sleep(Duration::from_millis(10));
            whole.is_finished()
        });
        let waiting = below.waiting();
        below.release();
        assert!(ended, "it waited for what it does not need");
        assert_eq!(waiting, TORN as u64, "the others wait for their source");
        whole.join().expect("a thread").expect("a write");
        torn.into_iter().for_each(|write| write.join().expect("a thread").expect("a write"));
    });
    assert!(server.stop());
}

#[test]
fn a_guests_large_write_of_whole_blocks_does_not_wait_for_a_source_that_is_away() {
    const OUT: u32 = 1;
    const FLUSH: u32 = 4;
    // A quarter of it is what a guest of the test can write at once.
    let options = OverlayOptions { ahead_bytes: 256 << 10, ..OverlayOptions::default() };
    let (below, disk) = disk_over_held("vda", options);
    let folder = tempfile::tempdir().expect("folder");
    let disk = VhostDisk { disk, identity: [1; 16] };
    let door = VhostDoor::open(&folder.path().join("door"), vec![disk]).expect("door");
    let mut machine = Machine::plug(door.path("vda").expect("a socket"), 2, u64::MAX).expect("plugged in");
    machine.submit(0, header(OUT, 0), &[9; 4096], 0);
    assert_eq!(machine.answer(0).status, Some(0));
    machine.submit(0, header(FLUSH, 0), &[], 0);
    assert_eq!(machine.answer(0).status, Some(0), "flushes are asked for");

    below.hold();
    for n in 0..TORN {
        machine.submit(0, header(OUT, 2048 * (1 + n as u64) + 1), &[8; SMALL], 0);
    }
    wait_for_the_source(&below, TORN as u64);
    machine.submit(1, header(OUT, 2048 * 60), &[8; SMALL], 0);
    let answer = machine.answer_within(1, Timespec { tv_sec: 5, tv_nsec: 0 });
    let waiting = below.waiting();
    below.release();
    assert_eq!(answer.expect("it waited for what it does not need").status, Some(0));
    assert_eq!(waiting, TORN as u64, "the others wait for their source");
    for _ in 0..TORN {
        assert_eq!(machine.answer(0).status, Some(0));
    }
    drop(machine);
    assert!(door.stop());
}

/// Large writes of one disk that wait: more than a door has threads for all its disks.
const WAITING: usize = 24;
/// Long enough for each of them to be taken for one that waits for a source, and to be given a thread.
const TAKEN: Duration = Duration::from_millis(800);

fn wait_for_a_sync(raw: &HeldStorage) {
    while raw.waiting() == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(TAKEN);
    assert_eq!(raw.waiting(), 1, "a disk syncs one of them at a time");
}

#[test]
fn large_writes_of_one_disk_do_not_wait_for_those_of_another() {
    let (raw, flooded) = held_disk("vda", OverlayOptions::default());
    let (_, other) = held_disk("vdb", OverlayOptions::default());
    let folder = tempfile::tempdir().expect("folder");
    let server = Server::builder().export(Export::new("vda", flooded)).export(Export::new("vdb", other));
    let server = server.build().expect("server");
    let address = server.listen_unix(&folder.path().join("s")).expect("listen");
    let connect = |export: &str| {
        let address = Address { export: export.to_owned(), ..address.clone() };
        let client = Client::connect(&address, &ClientOptions { connections: 1, ..ClientOptions::default() });
        let client = client.expect("a connection");
        client.write(0, &[9; 4096]).and_then(|()| client.flush()).expect("flushes are asked for");
        client
    };
    let (flood, victim) = (connect("vda"), connect("vdb"));
    raw.hold_syncs();
    thread::scope(|scope| {
        let flood = &flood;
        let waiting = (0..WAITING).map(|n| scope.spawn(move || flood.write((1 + n as u64) << 20, &[8; LARGE])));
        let waiting: Vec<_> = waiting.collect();
        wait_for_a_sync(&raw);
        let large = scope.spawn(|| victim.write(1 << 20, &[8; LARGE]));
        let ended = (0..500).any(|_| {
            thread::sleep(Duration::from_millis(10));
            large.is_finished()
        });
        raw.release();
        assert!(ended, "it waited for the device of another");
        large.join().expect("a thread").expect("a write");
        waiting.into_iter().for_each(|write| write.join().expect("a thread").expect("a write"));
    });
    assert!(server.stop());
}

#[test]
fn large_writes_of_one_guest_do_not_wait_for_those_of_another() {
    const OUT: u32 = 1;
    const FLUSH: u32 = 4;
    // A quarter of it is what a guest of the test can write at once.
    let options = OverlayOptions { ahead_bytes: 256 << 10, ..OverlayOptions::default() };
    let (raw, flooded) = held_disk("vda", options);
    let (_, other) = held_disk("vdb", options);
    let folder = tempfile::tempdir().expect("folder");
    let disk = |disk, identity| VhostDisk { disk, identity: [identity; 16] };
    let door = VhostDoor::open(&folder.path().join("door"), vec![disk(flooded, 1), disk(other, 2)]).expect("door");
    let plug = |name| {
        let mut machine = Machine::plug(door.path(name).expect("a socket"), 2, u64::MAX).expect("plugged in");
        machine.submit(0, header(OUT, 0), &[9; 4096], 0);
        assert_eq!(machine.answer(0).status, Some(0));
        machine.submit(0, header(FLUSH, 0), &[], 0);
        assert_eq!(machine.answer(0).status, Some(0), "flushes are asked for");
        machine
    };
    let (mut flood, mut victim) = (plug("vda"), plug("vdb"));
    raw.hold_syncs();
    for n in 0..WAITING {
        flood.submit(n % 2, header(OUT, 2048 * (1 + n as u64)), &[8; SMALL], 0);
    }
    wait_for_a_sync(&raw);
    victim.submit(0, header(OUT, 2048), &[8; SMALL], 0);
    let answer = victim.answer_within(0, Timespec { tv_sec: 5, tv_nsec: 0 });
    raw.release();
    assert_eq!(answer.expect("it waited for the device of another").status, Some(0));
    for n in 0..WAITING {
        assert_eq!(flood.answer(n % 2).status, Some(0));
    }
    drop((flood, victim));
    assert!(door.stop());
}
