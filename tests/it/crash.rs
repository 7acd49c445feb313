//! Promise D1 and D2: whatever a flush acknowledged is found after any crash, what was not flushed is old
//! or new for each sector, and every block the guest changed is reported as dirty.
//!
//! Every crash point of a random history; there all subsets of the unsynced writes (up to 12, else random
//! ones), whole or torn at 512 bytes; lives that go on after a crash; crashes during recovery.

#![allow(clippy::cast_possible_truncation, reason = "numbers of a small disk")]

use std::time::Instant;

use aquifer_tests::{
    faults::{CrashPoint, Image, World},
    guest::{Act, Guest},
    oracle::cases,
    rig::{Rig, perform, read_all},
    rng::Rng,
};
use aquifer_vdisk::Disk;

/// What happened in one life, with what the guest knew at each point.
struct Life {
    base: Vec<Image>,
    told: Vec<aquifer_tests::faults::Told>,
    steps: Vec<Step>,
}

struct Step {
    /// How much had been told when the act ended.
    ends: usize,
    /// What the guest knew while it ran, and once it had ended.
    during: Guest,
    after: Guest,
    act: Act,
}

/// One life on a world; whoever calls drops the disk as if killed.
fn live(rig: &Rig, world: &World, disk: &Disk, guest: &mut Guest, acts: &[Act]) -> Vec<Step> {
    let (mut steps, mut drained) = (Vec::new(), false);
    for act in acts.iter().copied() {
        let bytes = guest.begin(act);
        let during = guest.clone();
        perform(disk, act, &bytes).unwrap_or_else(|e| panic!("{act:?}: {e}"));
        let whole = act == Act::Drain && disk.local().expect("local").absent == 0;
        if act == Act::Flush || whole {
            guest.flushed();
        }
        drained |= whole;
        if drained {
            let mut raw = vec![0; rig.size() as usize];
            world.now()[0].read(0, &mut raw);
            guest.judge_live(&raw);
        }
        steps.push(Step { ends: world.told_len(), during, after: guest.clone(), act });
    }
    guest.judge_live(&read_all(disk));
    steps
}

/// Opens a crashed world and compares; returns the disk as found.
fn check(rig: &Rig, files: Vec<Image>, guest: &Guest) -> Result<Vec<u8>, String> {
    let world = World::new(files);
    let disk = rig.open(&world).map_err(|e| format!("does not open: {e}"))?;
    let found = read_all(&disk);
    let dirty = disk.dirty().expect("dirty");
    guest.judge(&found, &|at| dirty.contains(at))?;
    Ok(found)
}

/// Every crash point of a life. Returns how many states were looked at.
fn crash_everywhere(rig: &Rig, life: &Life, seed: u64, dice: &mut Rng) -> u64 {
    let mut point = CrashPoint::new(life.base.clone());
    let mut states = 0;
    for at in 0..=life.told.len() {
        // Between two acts the stricter knowledge holds: the first of them was acknowledged.
        let ended = life.steps.iter().rev().find(|s| s.ends == at).map(|s| &s.after);
        let running = || life.steps.iter().find(|s| s.ends > at).map(|s| &s.during);
        if let Some(guest) = ended.or_else(running) {
            states += crash_here(rig, &point, guest, dice).unwrap_or_else(|(mask, torn, what)| {
                let trace: Vec<_> = life.steps.iter().map(|s| (s.ends, s.act)).collect();
                panic!("seed {seed}, point {at}, mask {mask:x}, torn {torn:x}: {what}\n{trace:?}")
            });
        }
        if let Some(told) = life.told.get(at) {
            point.pass(told);
        }
    }
    states
}

fn crash_here(rig: &Rig, point: &CrashPoint, guest: &Guest, dice: &mut Rng) -> Result<u64, (u64, u64, String)> {
    let open = point.open() as u32;
    let all = if open < 64 { (1u64 << open) - 1 } else { u64::MAX };
    let mut masks: Vec<(u64, u64)> = Vec::new();
    if open <= 4 {
        masks.extend((0..=all).map(|mask| (mask, 0)));
    } else {
        // All subsets of many writes would be spent on one point; a sample of them is spent on more.
        masks.extend((0..24).map(|_| (dice.next_u64() & all, 0)));
        masks.extend([(0, 0), (all, 0)]);
    }
    for _ in 0..open.min(6) {
        masks.push((dice.next_u64() & all, dice.next_u64() & dice.next_u64() & all));
    }
    let states = masks.len() as u64;
    for (mask, torn) in masks {
        let files = point.crash(mask, torn, dice);
        check(rig, files, guest).map_err(|what| (mask, torn, what))?;
    }
    Ok(states)
}

/// Crashes during recovery, and what the next recovery finds.
fn crash_recovery(rig: &Rig, files: Vec<Image>, guest: &Guest, seed: u64, dice: &mut Rng) -> u64 {
    let world = World::new(files.clone());
    drop(rig.open(&world).expect("opens"));
    let mut point = CrashPoint::new(files);
    let mut states = 0;
    for told in world.told() {
        states += crash_here(rig, &point, guest, dice)
            .unwrap_or_else(|(mask, torn, what)| panic!("seed {seed}, in recovery, {mask:x} {torn:x}: {what}"));
        point.pass(&told);
    }
    states
}

/// Several lives with a crash between each two.
fn lives(seed: u64) -> u64 {
    let mut dice = Rng::new(seed);
    // Some disks end inside a block.
    let sectors = 8 * (4 + dice.below(28)) as usize - if dice.once_in(3) { dice.below(8) as usize } else { 0 };
    let origin: Vec<u64> = (0..sectors as u64).map(|at| if at / 16 % 3 == 1 { 0 } else { at + 1 }).collect();
    let mut guest = Guest::new(origin.clone());
    let rig = Rig::any(&origin, &mut dice);
    let world = World::new(vec![Image::default(); 3]);
    drop(rig.create(&world));
    let (mut files, mut states) = (world.now(), 0);
    for _ in 0..1 + dice.below(3) {
        let world = World::new(files.clone());
        let disk = rig.open(&world).expect("opens");
        let acts: Vec<Act> = (0..4 + dice.below(20)).map(|_| Act::any(&mut dice, sectors)).collect();
        let steps = live(&rig, &world, &disk, &mut guest, &acts);
        drop(disk);
        // Opening is part of the life: what it wrote may be lost like anything else.
        let life = Life { base: files, told: world.told(), steps };
        states += crash_everywhere(&rig, &life, seed, &mut dice);
        let mut point = CrashPoint::new(life.base);
        life.told.iter().for_each(|told| point.pass(told));
        files = point.crash(dice.next_u64(), dice.next_u64() & dice.next_u64(), &mut dice);
        states += crash_recovery(&rig, files.clone(), &guest, seed, &mut dice);
        let found = check(&rig, files.clone(), &guest).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        guest.accept(&found);
    }
    states
}

/// One life of given acts, on a journal whose halves hold four records of one block.
fn scripted(acts: &[Act]) -> u64 {
    let mut dice = Rng::new(1);
    let origin: Vec<u64> = (1..=128).collect();
    let mut guest = Guest::new(origin.clone());
    let mut rig = Rig::any(&origin, &mut dice);
    rig.options.journal_bytes = 4096 * 17;
    rig.options.spill_bytes = 1 << 20;
    let world = World::new(vec![Image::default(); 3]);
    drop(rig.create(&world));
    let base = world.now();
    let world = World::new(base.clone());
    let disk = rig.open(&world).expect("opens");
    let steps = live(&rig, &world, &disk, &mut guest, acts);
    drop(disk);
    crash_everywhere(&rig, &Life { base, told: world.told(), steps }, 0, &mut dice)
}

fn flushed_writes(blocks: std::ops::Range<usize>) -> Vec<Act> {
    blocks.flat_map(|b| [Act::Write { first: 8 * b, count: 8 }, Act::Flush]).collect()
}

/// A block is hydrated, written and flushed, then trimmed without a flush; the half of the journal that
/// has its bytes is freed before the trim is durable. It must not be found as it was hydrated.
#[test]
fn a_trim_meets_its_older_record() {
    let mut acts = vec![Act::Hydrate { first: 0, count: 128 }, Act::Seal];
    acts.extend(flushed_writes(0..6));
    acts.extend([Act::Zero { first: 0, count: 8, keep: false }, Act::Seal]);
    assert!(scripted(&acts) > 50);
}

/// Bytes in a record, then newer ones stored in place and flushed: replay must not bring the older back.
#[test]
fn bytes_in_place_outlive_an_older_record() {
    let mut acts = flushed_writes(0..2);
    acts.push(Act::Hydrate { first: 0, count: 128 });
    acts.push(Act::Drain);
    acts.extend(flushed_writes(0..2));
    assert!(scripted(&acts) > 30);
}

#[test]
fn no_crash_loses_a_flush_or_forgets_a_change() {
    let (started, mut states) = (Instant::now(), 0);
    let first = std::env::var("AQUIFER_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    for seed in first..first + u64::from(cases(400)) {
        states += lives(seed);
    }
    println!("{states} crash states in {:?}", started.elapsed());
    assert!(states > 20_000, "only {states} states: the histories have become too short to prove anything");
}
