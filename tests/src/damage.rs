//! Damage of an overlay's files, and files of a stranger: the right disk, or an error.
//!
//! Not here: crashes (`explore`), stored layers (`stored`).

use aquifer_vdisk::{Error, Overlay, OverlayOf};

use crate::{
    faults::{Image, World},
    guest::{Act, Guest},
    rig::{Rig, perform, read_all},
};

fn numbers(sectors: u64) -> Vec<u64> {
    (1..=sectors).collect()
}

/// A disk with something of everything in its files, and what the guest knows of it.
fn written() -> Result<(Rig, Vec<Image>, Guest), String> {
    let mut rig = Rig::new(&numbers(1024));
    rig.options.journal_bytes = 512 << 10;
    let world = Rig::world();
    let mut guest = Guest::new(numbers(1024));
    let disk = rig.create(&world);
    let acts = [
        Act::Hydrate { first: 0, count: 256 },
        Act::Write { first: 16, count: 40 },
        Act::Flush,
        Act::Seal,
        Act::Zero { first: 64, count: 64, keep: false },
        Act::Flush,
        Act::Write { first: 300, count: 100 },
        Act::Flush,
    ];
    for act in acts {
        let bytes = guest.begin(act);
        perform(&disk, act, &bytes).map_err(|e| format!("{act:?}: {e}"))?;
    }
    guest.flushed();
    Ok((rig, world.now(), guest))
}

/// Flips a bit in every byte of what map and journal say, and in every `step`-th of the guest's bytes in the journal.
/// Returns how many, and how many of those were refused outright.
///
/// # Errors
/// A disk that is not the right one.
pub fn flips(step: usize) -> Result<(u64, u64), String> {
    let (rig, whole, guest) = written()?;
    let (mut tried, mut refused) = (0, 0);
    for file in [1, 2] {
        for at in places(&whole[file], step) {
            let mut files = whole.clone();
            let mut byte = [0];
            files[file].read(at, &mut byte);
            files[file].write(at, &[byte[0] ^ 1 << (at % 8)]);
            tried += 1;
            let Ok(disk) = rig.open(&World::new(files)) else {
                refused += 1;
                continue;
            };
            let dirty = disk.dirty().map_err(|e| e.to_string())?;
            let judged = guest.judge(&read_all(&disk), &|at| dirty.contains(at));
            // The end of the journal cannot be told from a record that was never finished.
            if judged.is_err() && !(file == 2 && at >= last_record(&whole[2])) {
                return Err(format!("byte {at} of file {file}: {judged:?}"));
            }
        }
    }
    Ok((tried, refused))
}

/// Every byte of a page of ours up to a bit beyond its last that is not zero; some of every other page.
fn places(image: &Image, step: usize) -> Vec<u64> {
    let mut page = [0; 4096];
    let mut out = Vec::new();
    for start in (0..image.len()).step_by(4096) {
        image.read(start, &mut page);
        let used = page.iter().rposition(|byte| *byte != 0).map_or(0, |last| (last + 8).min(4096));
        let step = if page.starts_with(b"AQ") { 1 } else { step };
        out.extend((0..used as u64).step_by(step).map(|at| start + at));
    }
    out
}

/// Where the record lies that was written last.
fn last_record(journal: &Image) -> u64 {
    let mut last = 0;
    let mut page = [0; 4096];
    for start in (4096..journal.len()).step_by(4096) {
        journal.read(start, &mut page);
        if page.starts_with(b"AQREC") {
            last = start;
        }
    }
    last
}

/// Cuts the end off each file.
///
/// # Errors
/// A file that was opened all the same.
pub fn cuts() -> Result<(), String> {
    let (rig, whole, _) = written()?;
    for (file, keep) in (0..3).flat_map(|file| [(file, 512), (file, 4096), (file, whole[file].len() - 512)]) {
        let mut files = whole.clone();
        files[file].cut(keep);
        if rig.open(&World::new(files)).is_ok() {
            return Err(format!("file {file} of {keep} bytes is accepted"));
        }
    }
    Ok(())
}

/// Opens overlays as what they are not.
///
/// # Errors
/// One that was opened.
pub fn strangers() -> Result<(), String> {
    let rig = Rig::new(&numbers(512));
    let world = Rig::world();
    drop(rig.create(&world));
    let open = |of| Overlay::open_on(Rig::files(&world), of, rig.options).map(|_| ());
    let refused = |what: &str, result| match result {
        Err(Error::WrongOverlay { .. }) => Ok(()),
        other => Err(format!("{what}: {other:?}")),
    };
    refused("another chain", open(OverlayOf { chain: [8; 32], ..rig.of() }))?;
    refused("another size", open(OverlayOf { size: rig.size() + 512, ..rig.of() }))?;
    open(rig.of()).map_err(|e| format!("the right one: {e}"))?;
    // A journal of another overlay, of the same disk even, is not replayed.
    let other = Rig::world();
    drop(rig.create(&other));
    let mut files = Rig::files(&world);
    files.journal = Rig::files(&other).journal;
    refused("another journal", Overlay::open_on(files, rig.of(), rig.options).map(|_| ()))
}

/// Hands a disk over and writes its file as the hypervisor does.
///
/// # Errors
/// What was replayed over it, or is not dirty.
pub fn pivot() -> Result<(), String> {
    let rig = Rig::new(&numbers(512));
    let world = Rig::world();
    let disk = rig.create(&world);
    let said = |e: Error| e.to_string();
    disk.write(8192, &[1; 4096]).map_err(said)?;
    if !matches!(disk.drain(), Err(Error::NotLocal { .. })) {
        return Err("drained what is not local".into());
    }
    disk.hydrate(0, disk.size()).map_err(said)?;
    disk.drain().map_err(said)?;
    let dirty = disk.dirty().map_err(said)?.bytes();
    if dirty != 4096 {
        return Err(format!("{dirty} bytes are dirty, one block was written"));
    }
    // The guest writes through us until it is moved: each write is in the file at once.
    disk.write(16384, &[3; 512]).map_err(said)?;
    disk.trim(32768, 8192).map_err(said)?;
    disk.hand_over().map_err(said)?;
    drop(disk);
    // The hypervisor writes the file itself; nothing of ours may touch it again.
    let raw = Rig::files(&world).raw;
    raw.write_at(16384, &[9; 4096]).map_err(|e| e.to_string())?;
    raw.write_at(8192, &[9; 4096]).map_err(|e| e.to_string())?;
    let disk = rig.open(&world).map_err(said)?;
    let mut out = vec![0; 4096];
    disk.read(8192, &mut out).map_err(said)?;
    if out != [9; 4096] {
        return Err("the journal is replayed over what the hypervisor wrote".into());
    }
    let dirty = disk.dirty().map_err(said)?.bytes();
    if dirty == disk.size() { Ok(()) } else { Err(format!("only {dirty} bytes count as dirty")) }
}
