//! Every crash of a small overlay: lives of random acts, cut at every point, with any subset of what was not synced
//! lost or torn; each cut disk is opened by the real recovery and judged by what the guest knew at that point.
//!
//! Invariants
//! - A state is a set of files; it is recovered once however many cuts lead to it, and counted once.
//! - It is judged for every cut that leads to it: what the guest may find differs from point to point.
//! - The same seed gives the same acts, cuts and counts.
//!
//! Not here: calls that fail (`failing`), real files.

use std::{
    collections::{HashMap, HashSet},
    ops::AddAssign,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use aquifer_vdisk::Disk;

use crate::{
    faults::{CrashPoint, Image, Told, World},
    guest::{Act, Found, Guest},
    rig::{Rig, perform, read_all},
    rng::Rng,
};

/// How many of the cuts that are possible at one point are looked at.
#[derive(Clone, Copy, Debug)]
pub struct Depth {
    /// Up to this many open writes every subset of them, else a sample.
    pub subsets_of: u32,
    /// Size of the sample.
    pub sample: u32,
    /// Cuts with torn writes, for each open write.
    pub torn: u32,
}

impl Default for Depth {
    fn default() -> Self {
        Self { subsets_of: 8, sample: 200, torn: 24 }
    }
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Points at which the power was cut.
    pub points: u64,
    /// Cuts that were judged.
    pub judged: u64,
    /// Different states of the files, each of them recovered.
    pub states: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.points += other.points;
        self.judged += other.judged;
        self.states += other.states;
    }
}

/// What happened in one life, with what the guest knew at each point.
struct Life {
    base: Vec<Image>,
    told: Vec<Told>,
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

/// Recovers states of one disk, each of them once.
struct Explorer<'a> {
    rig: &'a Rig,
    depth: Depth,
    dice: Rng,
    tally: Tally,
    /// What was found in each state; many states are found alike.
    states: HashMap<u64, Arc<Found>>,
    found: HashSet<Arc<Found>>,
}

/// One life on a world; whoever calls drops the disk as if killed.
fn live(rig: &Rig, world: &World, disk: &Disk, guest: &mut Guest, acts: &[Act]) -> Result<Vec<Step>, String> {
    let (mut steps, mut drained) = (Vec::new(), false);
    for act in acts.iter().copied() {
        let bytes = guest.begin(act);
        let during = guest.clone();
        perform(disk, act, &bytes).map_err(|e| format!("{act:?}: {e}"))?;
        let whole = act == Act::Drain && disk.local().map_err(|e| e.to_string())?.absent == 0;
        if act == Act::Flush || whole {
            guest.flushed();
        }
        drained |= whole;
        if drained {
            let mut raw = vec![0; rig.size() as usize];
            world.now()[0].read(0, &mut raw);
            guest.agrees(&raw).map_err(|what| format!("drained, after {act:?}: {what}"))?;
        }
        steps.push(Step { ends: world.told_len(), during, after: guest.clone(), act });
    }
    guest.agrees(&read_all(disk)).map_err(|what| format!("alive: {what}"))?;
    Ok(steps)
}

/// Bytes that are looked at in one go: they stay near the processor.
const LOOK_BYTES: usize = 16 << 10;

/// Opens files as the next process does, and looks at all of the disk.
fn recover(rig: &Rig, files: Vec<Image>) -> Result<(Found, Disk), String> {
    let disk = rig.open(&World::forgetful(files)).map_err(|e| format!("does not open: {e}"))?;
    let dirty = disk.dirty().map_err(|e| e.to_string())?;
    let local = disk.local().map_err(|e| e.to_string())?;
    if local.total() != disk.size() || dirty.bytes() != local.written + local.trimmed {
        return Err(format!("counts of {} bytes differ: {local:?}, {} dirty", disk.size(), dirty.bytes()));
    }
    let (mut found, mut bytes) = (Found::default(), [0; LOOK_BYTES]);
    for at in (0..disk.size()).step_by(LOOK_BYTES) {
        let bytes = &mut bytes[..(disk.size() - at).min(LOOK_BYTES as u64) as usize];
        disk.read(at, bytes).map_err(|e| format!("cannot be read: {e}"))?;
        found.more(bytes, &|at| dirty.contains(at));
    }
    Ok((found, disk))
}

impl<'a> Explorer<'a> {
    fn new(rig: &'a Rig, depth: Depth, dice: Rng) -> Self {
        let (states, found) = (HashMap::new(), HashSet::new());
        Self { rig, depth, dice, tally: Tally::default(), states, found }
    }

    fn found_in(&mut self, files: Vec<Image>) -> Result<Arc<Found>, String> {
        let digest =
            files.iter().fold(0u64, |sum, f| sum.rotate_left(7) ^ f.digest().wrapping_mul(0x94d0_49bb_1331_11eb));
        if let Some(found) = self.states.get(&digest) {
            return Ok(Arc::clone(found));
        }
        let (found, _) = recover(self.rig, files)?;
        let found = match self.found.get(&found) {
            Some(known) => Arc::clone(known),
            None => Arc::new(found),
        };
        self.found.insert(Arc::clone(&found));
        self.states.insert(digest, Arc::clone(&found));
        self.tally.states += 1;
        Ok(found)
    }

    /// Cuts the power at one point.
    fn crash_here(&mut self, point: &CrashPoint, guest: &Guest) -> Result<(), String> {
        let open = point.open() as u32;
        let all = if open < 64 { (1u64 << open) - 1 } else { u64::MAX };
        let mut cuts: Vec<(u64, u64)> = Vec::new();
        if open <= self.depth.subsets_of {
            cuts.extend((0..=all).map(|kept| (kept, 0)));
        } else {
            cuts.extend([(0, 0), (all, 0)]);
            cuts.extend((0..self.depth.sample).map(|_| (self.dice.next_u64() & all, 0)));
        }
        for _ in 0..open.min(8) * self.depth.torn {
            cuts.push((self.dice.next_u64() & all, self.dice.next_u64() & self.dice.next_u64() & all));
        }
        let mut fine: HashSet<*const Found> = HashSet::new();
        self.tally.points += 1;
        for (kept, torn) in cuts {
            let files = point.crash(kept, torn, &mut self.dice);
            let wrong = |what: String| format!("kept {kept:x}, torn {torn:x} of {open}: {what}");
            let found = self.found_in(files).map_err(wrong)?;
            self.tally.judged += 1;
            if fine.insert(Arc::as_ptr(&found)) {
                guest.judge_found(&found).map_err(wrong)?;
            }
        }
        Ok(())
    }

    /// Every point of a life.
    fn crash_everywhere(&mut self, life: &Life) -> Result<(), String> {
        let mut point = CrashPoint::new(life.base.clone());
        for at in 0..=life.told.len() {
            // Between two acts the stricter knowledge holds: the first of them was acknowledged.
            let ended = life.steps.iter().rev().find(|s| s.ends == at).map(|s| &s.after);
            let running = || life.steps.iter().find(|s| s.ends > at).map(|s| &s.during);
            if let Some(guest) = ended.or_else(running) {
                self.crash_here(&point, guest).map_err(|what| {
                    let trace: Vec<_> = life.steps.iter().map(|s| (s.ends, s.act)).collect();
                    format!("point {at}, {what}\n{trace:?}")
                })?;
            }
            if let Some(told) = life.told.get(at) {
                point.pass(told);
            }
        }
        Ok(())
    }

    /// Crashes during recovery, and what the next recovery finds.
    fn crash_recovery(&mut self, files: Vec<Image>, guest: &Guest) -> Result<(), String> {
        let world = World::new(files.clone());
        drop(self.rig.open(&world).map_err(|e| format!("does not open: {e}"))?);
        let mut point = CrashPoint::new(files);
        for (at, told) in world.told().iter().enumerate() {
            self.crash_here(&point, guest).map_err(|what| format!("in recovery, at {at}, {what}"))?;
            point.pass(told);
        }
        Ok(())
    }
}

/// Up to three lives of random acts on one disk, with a crash between each two.
///
/// # Errors
/// What was lost, forgotten or made up.
pub fn lives(seed: u64, depth: Depth) -> Result<Tally, String> {
    let mut dice = Rng::new(seed);
    // Most are small, so that acts meet. Some end inside a block.
    let most = dice.pick(&[8, 8, 28]);
    let blocks = 4 + dice.below(most);
    let sectors = 8 * blocks as usize - if dice.once_in(3) { dice.below(8) as usize } else { 0 };
    let origin: Vec<u64> = (0..sectors as u64).map(|at| if at / 16 % 3 == 1 { 0 } else { at + 1 }).collect();
    let mut guest = Guest::new(origin.clone());
    let rig = Rig::any(&origin, &mut dice);
    let world = World::new(vec![Image::default(); 3]);
    drop(rig.create(&world));
    let mut explorer = Explorer::new(&rig, depth, Rng::new(seed ^ 0x00C0_FFEE));
    let mut files = world.now();
    for life in 0..1 + dice.below(3) {
        let wrong = |what: String| format!("seed {seed}, life {life}: {what}");
        let world = World::new(files.clone());
        let disk = rig.open(&world).map_err(|e| wrong(format!("does not open: {e}")))?;
        // Some lives begin where hydration ends, some of those where the pivot is near.
        let whole = [Act::Hydrate { first: 0, count: sectors }, dice.pick(&[Act::Seal, Act::Drain, Act::Flush])];
        let whole = &whole[..if dice.once_in(4) { 2 } else { 0 }];
        let any = (0..4 + dice.below(20)).map(|_| Act::any(&mut dice, sectors));
        let acts: Vec<Act> = whole.iter().copied().chain(any).collect();
        let steps = live(&rig, &world, &disk, &mut guest, &acts).map_err(wrong)?;
        drop(disk);
        // Opening is part of the life: what it wrote may be lost like anything else.
        let life = Life { base: files, told: world.told(), steps };
        explorer.crash_everywhere(&life).map_err(wrong)?;
        let mut point = CrashPoint::new(life.base);
        life.told.iter().for_each(|told| point.pass(told));
        files = point.crash(dice.next_u64(), dice.next_u64() & dice.next_u64(), &mut dice);
        explorer.crash_recovery(files.clone(), &guest).map_err(wrong)?;
        let (found, disk) = recover(&rig, files.clone()).map_err(wrong)?;
        guest.judge_found(&found).map_err(wrong)?;
        guest.accept(&read_all(&disk));
    }
    Ok(explorer.tally)
}

/// One life of given acts, on a journal whose halves hold four records of one block.
///
/// # Errors
/// As [`lives`].
pub fn scripted(acts: &[Act], depth: Depth) -> Result<Tally, String> {
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
    let disk = rig.open(&world).map_err(|e| format!("does not open: {e}"))?;
    let steps = live(&rig, &world, &disk, &mut guest, acts)?;
    drop(disk);
    let mut explorer = Explorer::new(&rig, depth, dice);
    explorer.crash_everywhere(&Life { base, told: world.told(), steps })?;
    Ok(explorer.tally)
}

/// [`lives`] of many seeds on all processors.
///
/// # Errors
/// The first of them found.
pub fn many(seeds: std::ops::Range<u64>, depth: Depth) -> Result<Tally, String> {
    let next = AtomicU64::new(seeds.start);
    let work = || -> Result<Tally, String> {
        let mut sum = Tally::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return Ok(sum);
            }
            sum += lives(seed, depth).inspect_err(|_| next.store(seeds.end, Ordering::Relaxed))?;
        }
    };
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut sum = Tally::default();
        for thread in threads {
            sum += thread.join().unwrap_or_else(|_| Err("a thread panicked".into()))?;
        }
        Ok(sum)
    })
}
