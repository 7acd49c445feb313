//! Promise D1 with real file systems on both sides of an overlay: a guest's ext4, XFS or Btrfs on it, whose synced files
//! must be there after any loss of power, and a host's under it, which has its own ideas of what is durable.
//! Our recovery runs, then theirs; their own checker is content.

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
    filesystems::{ALL, FileSystem, Mounted, copy, quick_folder},
    guest::{Act, Guest, sector},
    ledger::Ledger,
    oracle::{cases, first_seed},
    rig::{Rig, perform, read_all},
    rng::Rng,
    writelog::{Logged, lose_power},
};
use aquifer_vdisk::{BlockCache, Chain, Disk, ExtentKind, Overlay, OverlayOptions, Settling};

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
        ahead_bytes: 64 << 10,
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
    let image = dir.join(format!("crashed-{}", uuid::Uuid::new_v4()));
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
    fs::remove_file(&image).map_err(|e| e.to_string())?;
    Ok(seen)
}

/// Crashes of one file system; how many images there were, and how many synced files were found in them.
fn crash_images(system: FileSystem, seed: u64) -> (u64, usize) {
    let dir = quick_folder();
    let mut dice = Rng::new(seed);
    let run = guest_run(system, dir.path(), &mut dice, 60);
    let syncs: Vec<usize> = (0..run.told.len()).filter(|at| matches!(run.told[*at], Told::Sync { .. })).collect();
    assert!(syncs.len() > 60, "{system:?}: only {} syncs", syncs.len());
    let (images, mut files) = (u64::from(cases(34)), 0);
    for image in 0..images {
        // Just behind a sync, or anywhere.
        let at = if image % 2 == 0 { dice.pick(&syncs) + 1 } else { dice.below(run.told.len() as u64) as usize };
        files += guest_crash(system, &run, at, dir.path(), &mut dice)
            .unwrap_or_else(|what| panic!("{system:?}, seed {seed}, image {image}, at {at}: {what}"));
    }
    (images, files)
}

#[test]
fn a_guests_file_system_keeps_what_it_synced() {
    let ledger = Ledger::begin("crash images of a guest's file system");
    let first = first_seed();
    let (images, files) = std::thread::scope(|scope| {
        let systems =
            ALL.into_iter().zip(first..).map(|(system, seed)| scope.spawn(move || crash_images(system, seed)));
        let systems: Vec<_> = systems.collect();
        systems.into_iter().map(|one| one.join().expect("no violation")).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1))
    });
    assert!(images >= 100 && files > 200, "only {files} files were known to be there in {images} images");
    ledger.tell(&format!("{first}..={}", first + 2), &[("images", images), ("synced files found", files as u64)]);
}

/// Acts on an overlay in a logged file system: what the guest knew, and how far the log had come then.
fn host_run(dir: &Path, rig: &Rig, logged: &Logged, guest: &mut Guest, dice: &mut Rng) -> Vec<(u64, Guest)> {
    let overlay = Overlay::open(dir, rig.of(), rig.options).expect("opens");
    let disk = Disk::writable("d", Arc::clone(&rig.chain), overlay).expect("a disk");
    let mut steps = vec![(0, guest.clone())];
    for _ in 0..120 {
        let act = Act::any(dice, guest.sectors());
        let bytes = guest.begin(act);
        steps.push((logged.position(), guest.clone()));
        perform(&disk, act, &bytes).expect("works");
        if act == Act::Flush {
            guest.flushed();
            steps.push((logged.position(), guest.clone()));
        }
    }
    steps
}

/// What the next process finds of an overlay on a host's file system that has lost its power.
fn host_crash(system: FileSystem, rig: &Rig, image: &Path, dir: &Path, guest: &Guest) -> Result<(), String> {
    fs::create_dir_all(dir.join("after")).map_err(|e| e.to_string())?;
    let mounted = Mounted::image(image, &dir.join("after"))?;
    let overlay = Overlay::open(&mounted.path().join("o"), rig.of(), rig.options).map_err(|e| e.to_string())?;
    let disk = Disk::writable("d", Arc::clone(&rig.chain), overlay).map_err(|e| e.to_string())?;
    let dirty = disk.dirty().map_err(|e| e.to_string())?;
    guest.judge(&read_all(&disk), &|at| dirty.contains(at))?;
    drop(disk);
    drop(mounted);
    system.check(image)
}

/// Crashes of one host's file system; how many images there were.
fn host_images(system: FileSystem, seed: u64) -> u64 {
    let tmp = quick_folder();
    let (dir, mut dice) = (tmp.path(), Rng::new(seed));
    let (image, base) = (dir.join("image"), dir.join("base"));
    let origin: Vec<u64> = (1..=2048).collect();
    fs::write(dir.join("origin"), origin.iter().flat_map(|n| sector(*n)).collect::<Vec<u8>>()).expect("write");
    let (rig, mut guest) = (rig_over(&dir.join("origin")), Guest::new(origin));
    let (making, live) = (dir.join("making"), dir.join("live"));
    system.make(&making);
    fs::create_dir(&live).expect("a folder");
    let mounted = Mounted::image(&making, &live).unwrap_or_else(|e| panic!("{e}"));
    fs::create_dir(mounted.path().join("o")).expect("a folder");
    drop(Overlay::create(&mounted.path().join("o"), rig.of(), rig.options).expect("create"));
    drop(mounted);
    copy(&making, &base).and_then(|()| copy(&base, &image)).unwrap_or_else(|e| panic!("{e}"));
    let logged = Logged::start(dir, &image);
    let device = LoopDevice::attach(logged.path(), LoopAccess::ReadWrite, SectorSize::B4096).expect("attach");
    let mounted = Mounted::device(device.path(), &live).unwrap_or_else(|e| panic!("{e}"));
    let steps = host_run(&mounted.path().join("o"), &rig, &logged, &mut guest, &mut dice);
    drop(mounted);
    device.detach().expect("detach");
    let log = logged.stop(&base);
    let flushes: Vec<usize> = (0..log.len()).filter(|at| log[*at].flush).collect();
    assert!(flushes.len() > 20, "{system:?}: only {} flushes in {} entries", flushes.len(), log.len());
    let images = u64::from(cases(10));
    for number in 0..images {
        let upto = if number % 2 == 0 { dice.pick(&flushes) + 1 } else { dice.below(log.len() as u64 + 1) as usize };
        let crashed = dir.join(format!("crashed-{number}"));
        copy(&base, &crashed).unwrap_or_else(|e| panic!("{e}"));
        lose_power(&crashed, &log, upto, &mut dice).expect("replay");
        // What was known when the log was this long: acts are noted before they begin, flushes once they are acknowledged.
        let at = upto.checked_sub(1).map_or(0, |last| log[last].ends);
        let knew = steps.iter().rev().find(|(position, _)| *position <= at).map_or(&steps[0].1, |(_, guest)| guest);
        host_crash(system, &rig, &crashed, dir, knew)
            .unwrap_or_else(|what| panic!("{system:?}, seed {seed}, image {number}, {upto} of {}: {what}", log.len()));
        fs::remove_file(&crashed).expect("remove");
    }
    images
}

#[test]
fn a_hosts_file_system_keeps_an_overlay() {
    let ledger = Ledger::begin("crash images of a host's file system");
    let first = first_seed();
    let images: u64 = ALL.into_iter().zip(first..).map(|(system, seed)| host_images(system, seed)).sum();
    ledger.tell(&format!("{first}..={}", first + 2), &[("images", images)]);
}
