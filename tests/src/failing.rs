//! Calls that fail under a small overlay: the first, the second, and so on until the whole history passes untouched.
//!
//! Invariants
//! - After a failed sync no flush is acknowledged; what `doubtful` does not name is as safe as after a flush.
//! - Whatever failed, the next process finds what was acknowledged, after a loss of power too.
//!
//! Not here: real files (`strace` makes those fail).

use std::{collections::BTreeSet, fs, path::Path};

use aquifer_vdisk::{Disk, Error};

use crate::{
    faults::{CrashPoint, Failing, Told, World},
    guest::{Act, Guest},
    rig::{Rig, perform, read_all},
    rng::Rng,
};

const SECTORS: usize = 160;

/// Fails each call of a history, one in each of its runs; returns how many there were. Who asked for the syncs that
/// failed is added to `sites`.
///
/// # Errors
/// What was lost, forgotten or made up, or acknowledged when it must not be.
pub fn each_call(seed: u64, failing: Failing, sites: &mut BTreeSet<String>) -> Result<u64, String> {
    let mut call = 1;
    while scenario(seed, call, failing, sites).map_err(|e| format!("seed {seed}, call {call}, {failing:?}: {e}"))? {
        call += 1;
    }
    Ok(call - 1)
}

/// Lines of the overlay's source that ask for a sync, as `file.rs:line`.
pub fn sync_lines() -> BTreeSet<String> {
    let vdisk = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vdisk/src");
    let folder = fs::read_dir(vdisk.join("overlay")).unwrap().map(|e| e.unwrap().path());
    let mut out = BTreeSet::new();
    for path in folder.filter(|path| path.is_file()).chain([vdisk.join("overlay.rs")]) {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        for (at, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            if line.contains(".sync()") && !line.trim_start().starts_with("//") {
                out.insert(format!("{name}:{}", at + 1));
            }
        }
    }
    out
}

/// From the making of an overlay to the pivot, with one call failing; `false` once there are fewer calls.
fn scenario(seed: u64, call: u64, failing: Failing, sites: &mut BTreeSet<String>) -> Result<bool, String> {
    let mut dice = Rng::new(seed);
    let origin: Vec<u64> = (1..=SECTORS as u64).collect();
    let rig = Rig::any(&origin, &mut dice);
    let world = Rig::world();
    world.fail_at(call, failing);
    if failing == Failing::Io {
        world.note_sites();
    }
    let mut guest = Guest::new(origin);
    let mut now = world.now();
    let mut told = 0;
    let made = rig.try_create(&world);
    let made = made.and_then(|disk| {
        drop(disk);
        (now, told) = (world.now(), world.told_len());
        rig.open(&world)
    });
    let existed = told > 0;
    if let Ok(disk) = made {
        // More than a record of the shortest journals takes, then anything.
        let first = [Act::Write { first: 0, count: 96 }, Act::Flush];
        for act in first.into_iter().chain((0..50).map(|_| Act::any(&mut dice, SECTORS))) {
            attempt(&disk, &world, &mut guest, act)?;
        }
        let pivoted = disk.hydrate(0, disk.size()).and_then(|_| disk.hand_over());
        match pivoted {
            Ok(()) => guest.flushed(),
            // Which of its parts came to pass is not known.
            Err(_) => guest.unsure(&read_twice(&disk)),
        }
        if sync_failed(&world) {
            if !matches!(disk.flush(), Err(Error::SyncFailed { .. })) {
                return Err("a flush after a failed sync".into());
            }
            let doubt = disk.doubtful();
            // What is not named is safe: it has to be found as it was read last.
            guest.sure_of(&|at| !doubt.contains(at));
        }
    }
    sites.extend(world.sites());
    let touched = world.calls() >= call;
    world.heal();
    if !existed {
        return Ok(touched);
    }
    // Once as the next process finds it, and as it may be after a loss of power.
    let mut point = CrashPoint::new(now);
    world.told().iter().skip(told).for_each(|told| point.pass(told));
    let mut found = vec![world.now()];
    found.extend((0..3).map(|_| point.crash(dice.next_u64(), dice.next_u64() & dice.next_u64(), &mut dice)));
    for files in found {
        let disk = rig.open(&World::new(files)).map_err(|e| format!("does not open: {e}"))?;
        let dirty = disk.dirty().map_err(|e| e.to_string())?;
        guest.judge(&read_all(&disk), &|at| dirty.contains(at))?;
    }
    Ok(touched)
}

fn sync_failed(world: &World) -> bool {
    world.told().iter().any(|t| matches!(t, Told::Sync { ok: false, .. }))
}

/// All of a disk; the failing call may be this read, and it fails once.
fn read_twice(disk: &Disk) -> Vec<u8> {
    let mut now = vec![0; disk.size() as usize];
    if disk.read(0, &mut now).is_err() {
        disk.read(0, &mut now).expect("read again");
    }
    now
}

/// One act that may fail; what may be found afterwards is kept in step.
fn attempt(disk: &Disk, world: &World, guest: &mut Guest, act: Act) -> Result<(), String> {
    let failed_sync = sync_failed(world);
    let bytes = guest.begin(act);
    let whole = disk.local().map_err(|e| e.to_string())?.absent == 0;
    match perform(disk, act, &bytes) {
        Ok(()) if act == Act::Flush || act == Act::Drain && whole => {
            if failed_sync {
                return Err(format!("{act:?} was acknowledged after a failed sync"));
            }
            guest.flushed();
        }
        Ok(()) => {}
        // The guest is told, so old or new are both right from here on.
        Err(_) => guest.unsure(&read_twice(disk)),
    }
    Ok(())
}
