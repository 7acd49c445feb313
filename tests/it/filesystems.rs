//! Promise D1 with real file systems: a guest's ext4, XFS or Btrfs on a served overlay; the power is cut at syncs and
//! between, our recovery runs, then theirs: every synced file is there, and their own checker is content.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

use aquifer_formats::{
    raw::RawLayer,
    storage::{Access, FileStorage},
};
use aquifer_mount::{
    fuse::{Audience, FuseDoor, FuseFile, FuseOptions, MountAccess},
    loopdev::{LoopAccess, LoopDevice, SectorSize},
};
use aquifer_tests::{
    door::pattern,
    faults::{CrashPoint, Image, Told, World},
    filesystems::{ALL, FileSystem, Mounted},
    ledger::Ledger,
    oracle::cases,
    rig::Rig,
    rng::Rng,
};
use aquifer_vdisk::{BlockCache, Chain, Disk, ExtentKind, OverlayOptions, Settling};

/// What a file held from one place of the log to another, durably.
struct Known {
    name: String,
    from: usize,
    until: usize,
    /// Seed and length of its bytes.
    seed: u64,
    len: usize,
}

/// A guest's file system on an overlay whose files are in a world.
struct GuestRun {
    rig: Rig,
    base: Vec<Image>,
    told: Vec<Told>,
    known: Vec<Known>,
}

fn rig_over(origin: &Path) -> Rig {
    let storage = FileStorage::open(origin, Access::ReadOnly).expect("the origin");
    let layer = RawLayer::open(Arc::new(storage)).expect("a layer");
    let chain = Chain::new(vec![Arc::new(layer)], Arc::new(BlockCache::new(8 << 20))).expect("a chain");
    // Short halves and little memory: much is settled in a short life.
    let options = OverlayOptions {
        journal_bytes: 1 << 20,
        memory_bytes: 1 << 20,
        spill_bytes: 256 << 10,
        settling: Settling::Callers,
    };
    Rig { chain: Arc::new(chain), source: World::default(), options }
}

/// Writes files on a mounted disk, each synced with its folder, and notes how far the world's log had come.
fn work(dir: &Path, disk: &Disk, world: &World, dice: &mut Rng, rounds: u64) -> Vec<Known> {
    let (mut known, mut open): (Vec<Known>, BTreeMap<String, usize>) = (Vec::new(), BTreeMap::new());
    for round in 0..rounds {
        let name = format!("f{}", dice.below(12));
        let begins = world.told_len();
        if let Some(at) = open.remove(&name) {
            known[at].until = begins;
        }
        let (seed, len) = (1 + round, 1 + dice.below(60_000) as usize);
        let path = dir.join(&name);
        match dice.below(8) {
            0 => {
                let _may_be_missing = fs::remove_file(&path);
                continue;
            }
            1..=4 => {
                let draft = dir.join("draft");
                let mut file = File::create(&draft).expect("a draft");
                file.write_all(&pattern(len, seed)).expect("write");
                file.sync_all().expect("sync");
                fs::rename(&draft, &path).expect("rename");
            }
            _ => {
                let mut file = File::create(&path).expect("a file");
                file.write_all(&pattern(len, seed)).expect("write");
                file.sync_all().expect("sync");
            }
        }
        File::open(dir).and_then(|d| d.sync_all()).expect("sync the folder");
        open.insert(name.clone(), known.len());
        known.push(Known { name, from: world.told_len(), until: usize::MAX, seed, len });
        // Hydration comes in between.
        let at = dice.below(disk.size() >> 16) << 16;
        disk.hydrate(at, (1 << 16).min(disk.size() - at)).expect("hydrate");
        if dice.once_in(5) {
            disk.seal().expect("seal");
        }
    }
    known
}

fn guest_run(system: FileSystem, dir: &Path, dice: &mut Rng, rounds: u64) -> GuestRun {
    let origin = dir.join("origin");
    system.make(&origin);
    let rig = rig_over(&origin);
    let world = Rig::world();
    drop(rig.create(&world));
    let base = world.now();
    let world = World::new(base.clone());
    let disk = Arc::new(rig.open(&world).expect("opens"));
    let options = FuseOptions { audience: Audience::Owner, access: MountAccess::ReadWrite };
    let file = FuseFile { disk: Arc::clone(&disk), raw: None };
    let door = FuseDoor::open(&dir.join("door"), options, vec![file]).expect("a door");
    let device = LoopDevice::attach(&door.path("d"), LoopAccess::ReadWrite, SectorSize::B4096).expect("attach");
    fs::create_dir_all(dir.join("live")).expect("a folder");
    let mounted = Mounted::device(device.path(), &dir.join("live")).unwrap_or_else(|e| panic!("{e}"));
    let known = work(mounted.path(), &disk, &world, dice, rounds);
    // The machine dies here: what follows is not looked at.
    let told = world.told();
    drop(mounted);
    device.detach().expect("detach");
    door.stop().expect("stop");
    GuestRun { rig, base, told, known }
}

/// What a recovered disk reads, as an image of its own.
fn dump(disk: &Disk, path: &Path) {
    let file = File::create(path).expect("an image");
    file.set_len(disk.size()).expect("a length");
    let mut extents = Vec::new();
    disk.extents(0, disk.size(), &mut extents).expect("extents");
    let mut buf = vec![0; 1 << 20];
    for extent in extents.iter().filter(|e| e.kind == ExtentKind::Data) {
        let mut at = extent.offset;
        while at < extent.offset + extent.len {
            let part = &mut buf[..(extent.offset + extent.len - at).min(1 << 20) as usize];
            disk.read(at, part).expect("read");
            if part.iter().any(|b| *b != 0) {
                file.write_all_at(part, at).expect("write");
            }
            at += part.len() as u64;
        }
    }
}

/// Cuts the power at a place of the log, and lets the guest's file system recover on what our recovery finds.
fn guest_crash(system: FileSystem, run: &GuestRun, at: usize, dir: &Path, dice: &mut Rng) -> Result<usize, String> {
    let mut point = CrashPoint::new(run.base.clone());
    run.told[..at].iter().for_each(|told| point.pass(told));
    let files = point.crash(dice.next_u64(), dice.next_u64() & dice.next_u64() & dice.next_u64(), dice);
    let disk = run.rig.open(&World::new(files)).map_err(|e| format!("does not open: {e}"))?;
    let image = dir.join("crashed");
    dump(&disk, &image);
    fs::create_dir_all(dir.join("after")).expect("a folder");
    let mounted = Mounted::image(&image, &dir.join("after"))?;
    let mut seen = 0;
    for known in run.known.iter().filter(|k| k.from <= at && at < k.until) {
        let found = fs::read(mounted.path().join(&known.name)).map_err(|e| format!("{}: {e}", known.name))?;
        if found != pattern(known.len, known.seed) {
            return Err(format!("{} has other bytes", known.name));
        }
        seen += 1;
    }
    drop(mounted);
    system.check(&image)?;
    Ok(seen)
}

#[test]
fn a_guests_file_system_keeps_what_it_synced() {
    let ledger = Ledger::begin("crash images of a guest's file system");
    let (mut images, mut files) = (0, 0);
    for (system, seed) in ALL.into_iter().zip(1..) {
        let dir = tempfile::tempdir().expect("a folder");
        let mut dice = Rng::new(seed);
        let run = guest_run(system, dir.path(), &mut dice, 60);
        let syncs: Vec<usize> = (0..run.told.len()).filter(|at| matches!(run.told[*at], Told::Sync { .. })).collect();
        assert!(syncs.len() > 60, "{system:?}: only {} syncs", syncs.len());
        for image in 0..u64::from(cases(34)) {
            // Just behind a sync, or anywhere.
            let at = if image % 2 == 0 { dice.pick(&syncs) + 1 } else { dice.below(run.told.len() as u64) as usize };
            files += guest_crash(system, &run, at, dir.path(), &mut dice)
                .unwrap_or_else(|what| panic!("{system:?}, seed {seed}, image {image}, at {at}: {what}"));
            images += 1;
        }
    }
    assert!(files > 100, "only {files} files were known to be there");
    ledger.tell("1..=3", &[("images", images), ("synced files found", files as u64)]);
}
