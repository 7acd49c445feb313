//! Promise D1, D2 and R-IR-10 under controlled schedules: filling, writing, trimming, flushing and
//! sealing meet on one block and on neighbours in every order a scheduler can think of.
//!
//! Needs the feature `schedule`. One test plants the bug others had (look at a block, unlock, store) and
//! passes only if it is found.

#![allow(clippy::cast_possible_truncation, reason = "numbers of a small disk")]

use std::sync::{Arc, Mutex};

use aquifer_formats::Storage;
use aquifer_tests::{
    faults::{CrashPoint, World},
    guest::{SECTOR, sector},
    oracle::cases,
    rig::Rig,
    rng::Rng,
};
use aquifer_vdisk::{Disk, Overlay, OverlayFiles, Settling, Zeroing};
use shuttle::thread;

const BLOCKS: usize = 6;
const BLOCK: usize = 4096;

/// A storage at whose every call another thread may come first.
#[derive(Debug)]
struct Yielding(Arc<dyn Storage>);

impl Storage for Yielding {
    fn label(&self) -> &str {
        self.0.label()
    }

    fn identity(&self) -> Option<u64> {
        self.0.identity()
    }

    fn len(&self) -> std::io::Result<u64> {
        self.0.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        thread::yield_now();
        self.0.read_at(offset, buf)
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<bool> {
        self.0.read_now(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> std::io::Result<()> {
        thread::yield_now();
        self.0.write_at(offset, buf)
    }

    fn allocated(&self, offset: u64, len_max: u64) -> std::io::Result<(bool, u64)> {
        self.0.allocated(offset, len_max)
    }

    fn punch(&self, offset: u64, len: u64) -> std::io::Result<()> {
        thread::yield_now();
        self.0.punch(offset, len)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.0.set_len(len)
    }

    fn reserve(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.0.reserve(offset, len)
    }

    fn start_writeback(&self, _offset: u64, _len: u64) -> std::io::Result<()> {
        Ok(())
    }

    fn forget_cached(&self, _offset: u64, _len: u64) -> std::io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> std::io::Result<()> {
        // What is written while a sync runs may not be covered by it.
        thread::yield_now();
        self.0.sync()
    }
}

/// One block, as the one thread that writes it knows it: everything it ever held, and from when on
/// (things told to the files) at least which of it was flushed, by whomever.
#[derive(Clone, Debug)]
struct Known {
    held: Vec<[u64; BLOCK / SECTOR]>,
    /// Which of it was acknowledged last.
    acknowledged: usize,
    flushed: Vec<(usize, usize)>,
}

struct Play {
    rig: Rig,
    base: Vec<aquifer_tests::faults::Image>,
    world: World,
    disk: Arc<Disk>,
    known: Arc<Mutex<Vec<Known>>>,
}

impl Play {
    fn new(seed: u64) -> Self {
        let mut dice = Rng::new(seed);
        let origin: Vec<u64> = (1..=(BLOCKS * BLOCK / SECTOR) as u64).collect();
        let mut rig = Rig::any(&origin, &mut dice);
        rig.options.settling = Settling::Callers;
        rig.options.spill_bytes = dice.pick(&[0, 1 << 20]);
        let world = Rig::world();
        drop(rig.create(&world));
        let base = world.now();
        let world = World::new(base.clone());
        let OverlayFiles { raw, map, journal } = Rig::files(&world);
        let yielding = |inner| -> Arc<dyn Storage> { Arc::new(Yielding(inner)) };
        let files = OverlayFiles { raw: yielding(raw), map: yielding(map), journal: yielding(journal) };
        let overlay = Overlay::open_on(files, rig.of(), rig.options).expect("opens");
        let disk = Arc::new(Disk::writable("d", Arc::clone(&rig.chain), overlay).expect("a disk"));
        let known = origin
            .chunks_exact(BLOCK / SECTOR)
            .map(|held| Known { held: vec![held.try_into().expect("a block")], acknowledged: 0, flushed: vec![(0, 0)] })
            .collect();
        Self { rig, base, world, disk, known: Arc::new(Mutex::new(known)) }
    }

    /// A thread that does `steps` random things to one block, and flushes after one in `flush_in` of them.
    fn writer(&self, block: usize, seed: u64, steps: u64, flush_in: u64) -> thread::JoinHandle<()> {
        let (disk, world, known) = (Arc::clone(&self.disk), self.world.clone(), Arc::clone(&self.known));
        thread::spawn(move || {
            let mut dice = Rng::new(seed);
            let at = (block * BLOCK) as u64;
            for step in 0..steps {
                let mut now = *known.lock().expect("known")[block].held.last().expect("held");
                let number = 1000 * (block as u64 + 1) + step;
                match dice.below(5) {
                    0 => now = [0; BLOCK / SECTOR],
                    1 | 2 => now = [number; BLOCK / SECTOR],
                    _ => now[3] = number,
                }
                let partial = now.iter().filter(|n| **n == number).count() == 1;
                // Known before it begins: a crash may find it at once.
                known.lock().expect("known")[block].held.push(now);
                if now == [0; BLOCK / SECTOR] {
                    disk.write_zeroes(at, BLOCK as u64, Zeroing::MayTrim).expect("zero");
                } else if partial {
                    disk.write(at + 3 * SECTOR as u64, &sector(number)).expect("write");
                } else {
                    disk.write(at, &sector(number).repeat(BLOCK / SECTOR)).expect("write");
                }
                {
                    let own = &mut known.lock().expect("known")[block];
                    own.acknowledged = own.held.len() - 1;
                }
                let mut found = vec![0; BLOCK];
                disk.read(at, &mut found).expect("read");
                assert_eq!(numbers(&found), now, "block {block}: read what was written");
                if dice.once_in(flush_in) {
                    // It covers what was acknowledged to anybody before it began.
                    let covered: Vec<usize> =
                        known.lock().expect("known").iter().map(|known| known.acknowledged).collect();
                    disk.flush().expect("flush");
                    let told = world.told_len();
                    for (known, held) in known.lock().expect("known").iter_mut().zip(covered) {
                        known.flushed.push((told, held));
                    }
                }
            }
        })
    }

    fn hydrator(&self, seed: u64) -> thread::JoinHandle<()> {
        let disk = Arc::clone(&self.disk);
        thread::spawn(move || {
            let mut dice = Rng::new(seed);
            for _ in 0..2 {
                let first = dice.below(BLOCKS as u64);
                disk.hydrate(first * BLOCK as u64, 3 * BLOCK as u64).expect("hydrate");
                if dice.once_in(2) {
                    disk.seal().expect("seal");
                }
            }
            disk.hydrate(0, disk.size()).expect("hydrate");
        })
    }

    /// Everything is as its writer left it, and dirty where it differs from the chain.
    fn judge_end(&self) {
        let known = self.known.lock().expect("known");
        let dirty = self.disk.dirty().expect("dirty");
        for (block, known) in known.iter().enumerate() {
            let mut found = vec![0; BLOCK];
            self.disk.read((block * BLOCK) as u64, &mut found).expect("read");
            let last = known.held.last().expect("held");
            assert_eq!(numbers(&found), *last, "block {block}");
            let changed = *last != known.held[0];
            assert!(!changed || dirty.contains((block * BLOCK) as u64), "block {block} is not dirty");
        }
    }

    /// As it is after a crash somewhere in the history.
    fn judge_crash(&self, dice: &mut Rng) {
        let told = self.world.told();
        let at = dice.below(told.len() as u64 + 1) as usize;
        let mut point = CrashPoint::new(self.base.clone());
        told[..at].iter().for_each(|t| point.pass(t));
        let files = point.crash(dice.next_u64(), dice.next_u64() & dice.next_u64() & dice.next_u64(), dice);
        let disk = self.rig.open(&World::new(files)).expect("opens");
        let dirty = disk.dirty().expect("dirty");
        for (block, known) in self.known.lock().expect("known").iter().enumerate() {
            let mut found = vec![0; BLOCK];
            disk.read((block * BLOCK) as u64, &mut found).expect("read");
            let from = known.flushed.iter().filter(|(told, _)| *told <= at).map(|(_, held)| *held).max().unwrap_or(0);
            for (sector, number) in numbers(&found).iter().enumerate() {
                let allowed: Vec<u64> = known.held[from..].iter().map(|held| held[sector]).collect();
                assert!(allowed.contains(number), "block {block}, sector {sector}: {number}, allowed {allowed:?}");
                let same = *number == known.held[0][sector];
                assert!(same || dirty.contains((block * BLOCK) as u64), "block {block} changed and is not dirty");
            }
        }
    }
}

fn numbers(block: &[u8]) -> [u64; BLOCK / SECTOR] {
    let mut out = [0; BLOCK / SECTOR];
    for (number, sector) in out.iter_mut().zip(block.chunks_exact(SECTOR)) {
        *number = aquifer_tests::guest::number(sector).expect("a whole sector");
    }
    out
}

fn play() {
    // Scheduled by shuttle too: each schedule has its own history.
    let seed = shuttle::rand::Rng::r#gen::<u64>(&mut shuttle::rand::thread_rng());
    let play = Play::new(seed);
    let mut threads = vec![play.hydrator(seed)];
    threads.extend([1, 2].map(|block| play.writer(block, seed ^ block as u64, 3, 2)));
    for thread in threads {
        thread.join().expect("a thread");
    }
    play.judge_end();
    let mut dice = Rng::new(seed);
    for _ in 0..4 {
        play.judge_crash(&mut dice);
    }
}

#[test]
fn no_schedule_lets_hydration_win_or_a_flush_be_lost() {
    shuttle::check_random(play, cases(4000) as usize);
    shuttle::check_pct(play, cases(4000) as usize, 3);
}

/// Flushes fill one half of the journal after the other while hydration makes its marks durable.
fn turn_halves() {
    let seed = shuttle::rand::Rng::r#gen::<u64>(&mut shuttle::rand::thread_rng());
    let play = Play::new(seed);
    let disk = Arc::clone(&play.disk);
    let sealer = thread::spawn(move || (0..6).for_each(|_| disk.seal().expect("seal")));
    let mut threads = vec![sealer];
    threads.extend([1, 2].map(|block| play.writer(block, seed ^ block as u64, 12, 1)));
    for thread in threads {
        thread.join().expect("a thread");
    }
    play.judge_end();
    let mut dice = Rng::new(seed);
    for _ in 0..8 {
        play.judge_crash(&mut dice);
    }
}

#[test]
fn no_schedule_reuses_a_half_of_the_journal_too_early() {
    shuttle::check_random(turn_halves, cases(1000) as usize);
    shuttle::check_pct(turn_halves, cases(2000) as usize, 3);
}

#[test]
fn looking_and_storing_under_two_locks_is_found() {
    let found = std::panic::catch_unwind(|| {
        aquifer_vdisk::plant(true);
        shuttle::check_random(play, 20_000);
    });
    aquifer_vdisk::plant(false);
    assert!(found.is_err(), "20,000 schedules did not show the planted bug");
}
