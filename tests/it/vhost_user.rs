//! Promise: through the vhost-user door a guest reads and writes its disk, byte for byte; whatever a guest or a
//! hypervisor says, the door answers with an error and goes on; and a door that dies is taken over by the next one with
//! every request answered exactly once.

use std::{collections::HashMap, path::Path, sync::Arc};

use aquifer_formats::{Storage, storage::MemoryStorage};
use aquifer_mount::{
    confine::{Jail, enter},
    vhost::{VhostDisk, VhostDoor},
};
use aquifer_tests::{
    door::{self, HeldStorage, pattern},
    machine::{Answer, DATA_MAX, Machine, RING, descriptor, feature, header, range},
    oracle::{Oracle, cases},
    rng::Rng,
};
use aquifer_vdisk::{Disk, Overlay, OverlayOf, OverlayOptions};
use rustix::event::Timespec;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const SIZE: usize = 8 << 20;
const ALL: u64 = u64::MAX;

fn serve(dir: &Path, disk: &Arc<Disk>, identity: u8) -> VhostDoor {
    let disk = VhostDisk { disk: Arc::clone(disk), identity: [identity; 16] };
    VhostDoor::open(&dir.join("door"), vec![disk]).expect("door")
}

fn plug(door: &VhostDoor, queues: u16, features: u64) -> Machine {
    Machine::plug(door.path("vda").expect("a socket"), queues, features).expect("plugged in")
}

/// A request on the first ring, and its answer.
fn ask(machine: &mut Machine, kind: u32, sector: u64, output: &[u8], input: usize) -> Answer {
    machine.submit(0, header(kind, sector), output, input);
    machine.answer(0)
}

/// A disk over `source` whose overlay is in `dir`.
fn over(dir: &Path, source: Arc<dyn Storage>) -> Arc<Disk> {
    let overlay = dir.join("overlay");
    std::fs::create_dir(&overlay).expect("folder");
    door::writable("vda", source, &overlay)
}

fn writable(dir: &Path, bytes: Vec<u8>) -> Arc<Disk> {
    over(dir, Arc::new(MemoryStorage::new("source", bytes)))
}

/// What a request does, with the place it takes.
struct Wish {
    header: [u8; 16],
    output: Vec<u8>,
    input: usize,
    at: usize,
    len: usize,
}

fn wish(dice: &mut Rng, number: u64) -> Wish {
    let sectors = 1 + dice.below((DATA_MAX / 512) as u64);
    let (sector, sectors) = match dice.below(3) {
        // Whole pages, a single sector, anything.
        0 => (dice.below((SIZE / 4096) as u64 - 30) * 8, sectors.div_ceil(8).min(29) * 8),
        1 => (dice.below((SIZE / 512) as u64 - 1), 1),
        _ => (dice.below((SIZE / 512 - DATA_MAX / 512) as u64), sectors),
    };
    let (at, len) = (sector as usize * 512, sectors as usize * 512);
    let zeroes =
        |kind, flags| Wish { header: header(kind, 0), output: range(sector, sectors as u32, flags), input: 0, at, len };
    match dice.below(8) {
        0..=2 => Wish { header: header(IN, sector), output: Vec::new(), input: len, at, len },
        3..=5 => Wish { header: header(OUT, sector), output: pattern(len, number), input: 0, at, len },
        6 => zeroes(DISCARD, 0),
        _ => zeroes(WRITE_ZEROES, dice.below(2) as u32),
    }
}

/// Rounds of requests that do not meet, on all rings at once, against the plain truth.
fn agrees_with_the_oracle(queues: u16, features: u64, seed: u64, rounds: u32) {
    let dir = tempfile::tempdir().expect("folder");
    let bytes = pattern(SIZE, seed);
    let disk = writable(dir.path(), bytes.clone());
    let mut oracle = Oracle::from_bytes(bytes);
    let door = serve(dir.path(), &disk, 1);
    let mut machine = plug(&door, queues, features);
    let mut dice = Rng::new(seed);
    for round in 0..rounds {
        let mut taken: Vec<(usize, usize)> = Vec::new();
        let mut wishes: HashMap<(usize, u16), Wish> = HashMap::new();
        for number in 0..1 + dice.below(12 * u64::from(queues)) {
            let ring = dice.below(queues.into()) as usize;
            let wish = wish(&mut dice, (u64::from(round) << 16) + number);
            let meets = |(at, len): &(usize, usize)| wish.at < at + len && *at < wish.at + wish.len;
            if taken.iter().any(meets) || !machine.has_room(ring) {
                continue;
            }
            taken.push((wish.at, wish.len));
            let slot = machine.submit(ring, wish.header, &wish.output, wish.input);
            wishes.insert((ring, slot), wish);
        }
        for ring in 0..usize::from(queues) {
            for _ in 0..wishes.keys().filter(|(of, _)| *of == ring).count() {
                let answer = machine.answer(ring);
                let wish = &wishes[&(ring, answer.slot)];
                assert_eq!(answer.status, Some(0), "round {round}: {:?}", wish.header);
                if wish.input > 0 {
                    assert_eq!(answer.written as usize, wish.input + 1);
                    assert!(answer.data == oracle.read(wish.at, wish.len), "round {round}: wrong bytes at {}", wish.at);
                }
            }
        }
        for wish in wishes.values().filter(|wish| !wish.output.is_empty()) {
            match wish.header[0] {
                1 => oracle.write(wish.at, &wish.output),
                _ => oracle.zero(wish.at, wish.len),
            }
        }
        if dice.once_in(8) {
            assert_eq!(ask(&mut machine, FLUSH, 0, &[], 0).status, Some(0));
        }
        if dice.once_in(16) {
            // Firmware does this while a machine runs.
            machine.share_memory().expect("memory");
        }
    }
    drop(machine);
    let mut found = vec![0; SIZE];
    disk.read(0, &mut found).expect("read");
    assert!(found == oracle.bytes(), "seed {seed}");
    assert_eq!(door.stats().refused, 0);
}

#[test]
fn what_a_guest_wrote_it_reads() {
    for seed in 0..u64::from(cases(1)) {
        agrees_with_the_oracle(1, ALL, seed * 4 + 1, 60);
        agrees_with_the_oracle(3, ALL, seed * 4 + 2, 40);
        agrees_with_the_oracle(2, ALL & !feature::EVENT_IDX, seed * 4 + 3, 40);
        agrees_with_the_oracle(1, ALL & !feature::INDIRECT & !feature::EVENT_IDX, seed * 4 + 4, 40);
    }
}

#[test]
fn what_is_offered_is_what_is_done() {
    let dir = tempfile::tempdir().expect("folder");
    let disk = writable(dir.path(), pattern(SIZE, 1));
    let door = serve(dir.path(), &disk, 1);
    let mut machine = plug(&door, 1, ALL);
    let offered = machine.offered();
    for bit in [2, 6, 9, 10, 11, 12, 13, 14, 28, 29, 30, 32] {
        assert!(offered & 1 << bit != 0, "bit {bit} of {offered:#x}");
    }
    assert_eq!(offered & feature::RO, 0);
    let config = machine.config(0, 60);
    let number = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().expect("four"));
    assert_eq!(u64::from_le_bytes(config[..8].try_into().expect("eight")), SIZE as u64 / 512);
    assert_eq!((number(12), number(20), config[24], config[32]), (126, 512, 3, 1));
    assert_eq!(machine.config(56, 16), [&[1][..], &[0; 15]].concat(), "what is not known is zero");

    let id = ask(&mut machine, GET_ID, 0, &[], 20);
    assert_eq!((id.status, id.written, &id.data[..4]), (Some(0), 21, &b"vda\0"[..]));
    let end = SIZE as u64 / 512;
    assert_eq!(ask(&mut machine, IN, end - 1, &[], 512).status, Some(0));
    assert_eq!(ask(&mut machine, IN, 0, &[], 0).status, Some(0), "nothing is read");
    let refused = [
        (IN, end - 1, 0, 1024, 1),
        (IN, end, 0, 512, 1),
        (IN, u64::MAX, 0, 512, 1),
        (IN, u64::MAX / 512, 0, 512, 1),
        (IN, 0, 0, 511, 1),
        (OUT, end, 512, 0, 1),
        (OUT, 0, 100, 0, 1),
        (DISCARD, 0, 0, 0, 1),
        (DISCARD, 0, 15, 0, 1),
        (WRITE_ZEROES, 0, 33 * 16, 0, 1),
        (2, 0, 0, 0, 2),
        (14, 0, 16, 0, 2),
        (u32::MAX, 0, 0, 0, 2),
    ];
    for (kind, sector, output, input, status) in refused {
        let answer = ask(&mut machine, kind, sector, &vec![0; output], input);
        assert_eq!((answer.status, answer.written), (Some(status), 1), "{kind} at {sector}, {output} out, {input} in");
    }
    for (kind, output, status) in [
        (DISCARD, range(0, 8, 1), 2),
        (DISCARD, range(0, 8, 2), 2),
        (WRITE_ZEROES, range(0, 8, 2), 2),
        (DISCARD, range(end, 1, 0), 1),
        (DISCARD, range(u64::MAX, u32::MAX, 0), 1),
        (WRITE_ZEROES, range(0, u32::MAX, 0), 1),
        (DISCARD, [range(0, 8, 0), range(end, 8, 0)].concat(), 1),
        (DISCARD, [range(0, 8, 0), range(80, 0, 0), range(90, 7, 0)].concat(), 0),
    ] {
        assert_eq!(ask(&mut machine, kind, 0, &output, 0).status, Some(status), "{kind} {output:?}");
    }
    assert!(machine.set_config(0, &[1]).is_err(), "the size is not the guest's to choose");
}

#[test]
fn a_disk_that_takes_no_writes_says_so() {
    let dir = tempfile::tempdir().expect("folder");
    let bytes = pattern(SIZE, 3);
    let disk = door::read_only("vda", bytes.clone());
    let door = serve(dir.path(), &disk, 1);
    let mut machine = plug(&door, 1, ALL);
    let offered = machine.offered();
    assert!(offered & feature::RO != 0);
    assert_eq!(offered & (feature::DISCARD | feature::WRITE_ZEROES | feature::CONFIG_WCE), 0);
    let read = ask(&mut machine, IN, 8, &[], 64 << 10);
    assert!(read.status == Some(0) && read.data == bytes[4096..4096 + (64 << 10)]);
    assert_eq!(ask(&mut machine, OUT, 0, &[1; 512], 0).status, Some(1));
    assert_eq!(ask(&mut machine, DISCARD, 0, &range(0, 8, 0), 0).status, Some(1));
    assert_eq!(ask(&mut machine, FLUSH, 0, &[], 0).status, Some(0));
    assert!(machine.set_config(32, &[0]).is_err());
    assert!(door::pattern(SIZE, 3) == bytes);
    let odd = VhostDisk { disk: door::read_only("odd", vec![0; 1000]), identity: [0; 16] };
    let refused = VhostDoor::open(&dir.path().join("other"), vec![odd]).expect_err("no size for a virtio disk");
    assert!(refused.to_string().contains("512"), "{refused}");
}

/// Offers a chain that makes no sense; the device gives it back without a byte written.
fn is_given_back(machine: &mut Machine, what: &str, put: impl FnOnce(&mut Machine, u16)) {
    let slot = machine.slot(0);
    put(machine, slot);
    let answer = machine.answer(0);
    assert_eq!((answer.slot, answer.written), (slot, 0), "{what}");
    let good = ask(machine, IN, 0, &[], 4096);
    assert_eq!((good.status, good.written), (Some(0), 4097), "after {what}");
}

#[test]
fn chains_that_make_no_sense_harm_nobody() {
    let dir = tempfile::tempdir().expect("folder");
    let disk = writable(dir.path(), pattern(SIZE, 4));
    let door = serve(dir.path(), &disk, 1);
    let mut machine = plug(&door, 1, ALL);
    let (ring, far) = (Machine::ring_at(0), Machine::memory_len());
    let put = |machine: &mut Machine, slot: u16, descriptors: &[Vec<u8>]| {
        machine.poke(ring + 64 * u64::from(slot), &descriptors.concat());
        machine.offer(0, slot * 4);
    };
    let here = |slot: u16| Machine::slot_at(0, slot);
    type Shape = fn(u64, u16, u64) -> Vec<Vec<u8>>;
    let shapes: [(&str, Shape); 12] = [
        ("a loop", |at, head, _| vec![descriptor(at, 16, 1, head)]),
        ("a loop of two", |at, head, _| vec![descriptor(at, 16, 1, head + 1), descriptor(at, 1, 3, head)]),
        ("beyond the table", |at, _, _| vec![descriptor(at, 16, 1, 64)]),
        ("no status", |at, _, _| vec![descriptor(at, 16, 0, 0)]),
        ("half a header", |at, head, _| vec![descriptor(at, 8, 1, head + 1), descriptor(at + 64, 1, 2, 0)]),
        ("the wrong order", |at, head, _| vec![descriptor(at, 16, 3, head + 1), descriptor(at, 16, 0, 0)]),
        ("a header nowhere", |at, head, far| vec![descriptor(far - 8, 16, 1, head + 1), descriptor(at, 1, 2, 0)]),
        ("a status nowhere", |at, head, far| vec![descriptor(at, 16, 1, head + 1), descriptor(far, 1, 2, 0)]),
        ("the end of all addresses", |at, head, _| {
            vec![descriptor(at, 16, 1, head + 1), descriptor(u64::MAX - 2, 10, 2, 0)]
        }),
        ("a table of no size", |at, _, _| vec![descriptor(at, 24, 4, 0)]),
        ("a table nowhere", |_, _, far| vec![descriptor(far, 32, 4, 0)]),
        ("a table with a tail", |at, head, _| vec![descriptor(at, 32, 5, head + 1), descriptor(at, 1, 2, 0)]),
    ];
    for (what, shape) in shapes {
        is_given_back(&mut machine, what, |machine, slot| put(machine, slot, &shape(here(slot), slot * 4, far)));
    }
    is_given_back(&mut machine, "a table in itself", |machine, slot| {
        machine.poke(here(slot) + 512, &descriptor(here(slot) + 512, 16, 4, 0));
        put(machine, slot, &[descriptor(here(slot) + 512, 16, 4, 0)]);
    });
    is_given_back(&mut machine, "a table that loops", |machine, slot| {
        machine.poke(here(slot) + 512, &[descriptor(here(slot), 16, 1, 1), descriptor(here(slot), 16, 1, 0)].concat());
        put(machine, slot, &[descriptor(here(slot) + 512, 32, 4, 0)]);
    });
    // With a place for the status the guest is told.
    let slot = machine.slot(0);
    machine.poke(here(slot), &header(IN, 0));
    machine.offer_pieces(0, slot, &[(here(slot), 16, false), (far - 512, 1024, true), (here(slot) + 64, 1, true)]);
    assert_eq!(machine.answer(0).status, Some(1), "data nowhere");
    assert!(door.stats().refused >= 15, "{:?}", door.stats());
}

#[test]
fn a_ring_that_makes_no_sense_ends_alone() {
    let dir = tempfile::tempdir().expect("folder");
    let disk = writable(dir.path(), pattern(SIZE, 5));
    let door = serve(dir.path(), &disk, 1);
    let mut machine = plug(&door, 3, ALL);
    machine.poke(Machine::ring_at(0) + 0x1002, &(RING + 1).to_le_bytes());
    machine.kick(0);
    assert!(machine.is_broken(0), "more requests than places");
    machine.offer(1, RING);
    assert!(machine.is_broken(1), "a descriptor beyond the table");
    machine.submit(2, header(IN, 0), &[], 512);
    assert_eq!(machine.answer(2).status, Some(0), "the others go on");
    assert_eq!(machine.stop_ring(2), 1);
}

#[test]
fn a_write_without_flushes_is_durable_when_it_is_answered() {
    for (features, kept) in [(ALL & !feature::FLUSH & !feature::CONFIG_WCE, true), (ALL, true), (ALL, false)] {
        let dir = tempfile::tempdir().expect("folder");
        let disk = writable(dir.path(), vec![0; SIZE]);
        let door = serve(dir.path(), &disk, 1);
        let mut machine = plug(&door, 1, features);
        if features == ALL && kept {
            machine.set_config(32, &[0]).expect("write through");
            assert_eq!(machine.config(32, 1), [0]);
            // No hypervisor says it again.
            machine.reconnect(door.path("vda").expect("a socket")).expect("connected again");
            assert_eq!(machine.config(32, 1), [0]);
        }
        assert_eq!(ask(&mut machine, OUT, 8, &[7; 4096], 0).status, Some(0));
        drop(machine);
        assert!(door.stop());
        drop(door);
        // A process that dies is an overlay that is dropped: dropping flushes nothing.
        let chain = door::chain(Arc::new(MemoryStorage::new("source", vec![0; SIZE])));
        drop(disk);
        let of = OverlayOf { size: SIZE as u64, chain: chain.fingerprint().expect("fingerprint") };
        let overlay = Overlay::open(&dir.path().join("overlay"), of, OverlayOptions::default()).expect("overlay");
        let mut found = [0; 4096];
        Disk::writable("vda", chain, overlay).expect("disk").read(4096, &mut found).expect("read");
        assert_eq!(found == [7; 4096], kept, "features {features:#x}");
    }
}

/// A machine whose reads wait for a source that is held up, and what each is to find.
fn with_reads_in_the_air(door: &VhostDoor, bytes: &[u8]) -> (Machine, HashMap<u16, Vec<u8>>) {
    let mut machine = plug(door, 1, ALL);
    let mut wanted = HashMap::new();
    for number in 0..6u64 {
        let at = number * (1 << 20);
        let slot = machine.submit(0, header(IN, at / 512), &[], 8192);
        wanted.insert(slot, bytes[at as usize..at as usize + 8192].to_vec());
    }
    (machine, wanted)
}

#[test]
fn a_door_that_dies_is_taken_over() {
    let dir = tempfile::tempdir().expect("folder");
    let bytes = pattern(SIZE, 6);
    let source = HeldStorage::new(bytes.clone());
    let disk = over(dir.path(), source.clone());
    let first = serve(dir.path(), &disk, 1);
    let path = first.path("vda").expect("a socket").to_owned();
    source.hold();
    let (mut machine, mut wanted) = with_reads_in_the_air(&first, &bytes);
    // Answered before those that were taken first: nobody could tell which by counting.
    let slot = machine.submit(0, header(OUT, 16), &[9; 4096], 0);
    let answer = machine.answer(0);
    assert_eq!((answer.slot, answer.status), (slot, Some(0)));
    assert!(machine.answer_now(0).is_none(), "the source is held up");
    first.stop();
    drop(first);
    source.release();
    // Offered while there is no door.
    let late = machine.submit(0, header(IN, 16), &[], 4096);
    wanted.insert(late, vec![9; 4096]);

    let second = serve(dir.path(), &disk, 1);
    machine.reconnect(&path).expect("the next door");
    for _ in 0..wanted.len() {
        let answer = machine.answer(0);
        assert_eq!(answer.status, Some(0));
        assert!(wanted.remove(&answer.slot).expect("once each") == answer.data, "slot {}", answer.slot);
    }
    let more = machine.answer_within(0, Timespec { tv_sec: 0, tv_nsec: 50_000_000 });
    assert_eq!(more, None, "nothing is answered twice");
    assert_eq!(ask(&mut machine, FLUSH, 0, &[], 0).status, Some(0));
    assert_eq!(second.stats().requests, 8);
}

#[test]
fn a_stopped_ring_goes_on_where_it_was() {
    let dir = tempfile::tempdir().expect("folder");
    let bytes = pattern(SIZE, 7);
    let source = HeldStorage::new(bytes.clone());
    let disk = over(dir.path(), source.clone());
    let door = serve(dir.path(), &disk, 1);
    source.hold();
    let (mut machine, mut wanted) = with_reads_in_the_air(&door, &bytes);
    machine.stop_ring(0);
    // The memory is the guest's alone now, whatever the source brings.
    let before = machine.peek(Machine::slot_at(0, 0), 8 << 10);
    source.release();
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(machine.peek(Machine::slot_at(0, 0), 8 << 10) == before && machine.answer_now(0).is_none());
    machine.start_again(0).expect("started");
    while !wanted.is_empty() {
        let answer = machine.answer(0);
        assert!(wanted.remove(&answer.slot).expect("once each") == answer.data);
    }
}

#[test]
fn another_disk_turns_a_machine_away() {
    let dir = tempfile::tempdir().expect("folder");
    let disk = writable(dir.path(), pattern(SIZE, 8));
    let first = serve(dir.path(), &disk, 1);
    let path = first.path("vda").expect("a socket").to_owned();
    let mut machine = plug(&first, 1, ALL);
    assert_eq!(ask(&mut machine, OUT, 0, &[1; 512], 0).status, Some(0));
    drop(first);
    let _second = serve(dir.path(), &disk, 2);
    machine.reconnect(&path).expect_err("it ran from another disk");
    Machine::plug(&path, 1, ALL).expect("a machine that was just started is welcome");
}

#[test]
fn one_machine_at_a_time() {
    let dir = tempfile::tempdir().expect("folder");
    let disk = writable(dir.path(), pattern(SIZE, 9));
    let door = serve(dir.path(), &disk, 1);
    let path = door.path("vda").expect("a socket").to_owned();
    let mut machine = plug(&door, 1, ALL);
    Machine::plug(&path, 1, ALL).expect_err("another one has it");
    assert_eq!(ask(&mut machine, IN, 0, &[], 512).status, Some(0));
    drop(machine);
    plug(&door, 1, ALL);
}

#[test]
fn messages_that_make_no_sense_end_their_connection() {
    use aquifer_tests::machine::message;
    let dir = tempfile::tempdir().expect("folder");
    let disk = writable(dir.path(), pattern(SIZE, 10));
    let door = serve(dir.path(), &disk, 1);
    let state = |index: u32, n: u32| [index.to_le_bytes(), n.to_le_bytes()].concat();
    let ring = |index: u32, at: u64| [state(index, 0), [at; 4].map(u64::to_le_bytes).concat()].concat();
    let bad: Vec<(u32, Vec<u8>)> = vec![
        (message::SET_VRING_NUM, state(16, 64)),
        (message::SET_VRING_NUM, state(u32::MAX, 64)),
        (message::SET_VRING_BASE, state(0, 1 << 16)),
        (message::SET_VRING_ADDR, ring(99, 0)),
        (message::SET_FEATURES, u64::MAX.to_le_bytes().to_vec()),
        (message::SET_VRING_ENABLE, state(0, 7)),
        (message::SET_MEM_TABLE, vec![0; 8]),
        (message::SET_VRING_KICK, 0x100u64.to_le_bytes().to_vec()),
        (99, vec![0; 8]),
    ];
    for (what, body) in bad {
        let mut machine = plug(&door, 1, ALL);
        machine.tell(what, &body, &[]).expect_err("refused");
        drop(machine);
    }
    // A ring outside the memory, of a size that is none, and not aligned.
    for (num, at) in [(64, 1 << 60), (63, 0x10_0000_0000), (0, 0x10_0000_0000), (64, 0x10_0000_0001)] {
        let mut machine = plug(&door, 1, ALL);
        machine.tell(message::SET_VRING_NUM, &state(0, num), &[]).expect("believed for now");
        let told = machine.tell(message::SET_VRING_ADDR, &ring(0, at), &[]);
        let enabled = told.and_then(|()| machine.tell(message::SET_VRING_ENABLE, &state(0, 1), &[]));
        enabled.expect_err("refused");
    }
    assert_eq!(ask(&mut plug(&door, 1, ALL), IN, 0, &[], 512).status, Some(0), "the next one is served");
}

#[test]
fn a_door_in_its_jail_maps_memory_and_serves() {
    let dir = tempfile::tempdir().expect("folder");
    let disk = writable(dir.path(), pattern(SIZE, 11));
    let jail = Jail { read_write: vec![dir.path().to_owned()], read_only: Vec::new() };
    let door = std::thread::scope(|scope| {
        let jailed = || {
            let confinement = enter(&jail);
            assert!(confinement.seccomp, "{confinement:?}");
            serve(dir.path(), &disk, 1)
        };
        scope.spawn(jailed).join().expect("a door")
    });
    let mut machine = plug(&door, 2, ALL);
    assert_eq!(ask(&mut machine, OUT, 1, &[5; 1024], 0).status, Some(0));
    assert_eq!(ask(&mut machine, FLUSH, 0, &[], 0).status, Some(0));
    assert!(ask(&mut machine, IN, 1, &[], 1024).data == [5; 1024]);
}
