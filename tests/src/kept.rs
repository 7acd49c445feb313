//! Writes that were acknowledged and not flushed, from one process to the next: kept within a boot of the machine, in
//! order, whole, and not for longer than they are needed.
//!
//! A process that dies is an overlay that is dropped: dropping flushes nothing.

use std::{fs, path::Path, sync::Arc};

use aquifer_vdisk::{Disk, Overlay, OverlayOptions, Settling};
use tempfile::TempDir;

use crate::rig::Rig;

const BOOT: [u8; 16] = [1; 16];
const OTHER_BOOT: [u8; 16] = [2; 16];
const FILE: &str = "unflushed.0";
/// Where a file's first record ends, of one block.
const RECORD_END: usize = 32 + 40 + 4096;

struct Bench {
    rig: Rig,
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        let mut rig = Rig::new(&(1..=512).collect::<Vec<u64>>());
        rig.options = OverlayOptions { journal_bytes: 1 << 20, settling: Settling::Callers, ..rig.options };
        let dir = tempfile::tempdir().expect("a folder");
        drop(Overlay::create(dir.path(), rig.of(), rig.options).expect("create"));
        Self { rig, dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn open(&self, boot: [u8; 16]) -> Result<Disk, String> {
        let overlay = Overlay::open(self.path(), self.rig.of(), self.rig.options).map_err(|e| e.to_string())?;
        let disk = Disk::writable("d", Arc::clone(&self.rig.chain), overlay).map_err(|e| e.to_string())?;
        disk.surviving(self.path(), boot).map_err(|e| e.to_string())
    }

    fn copy(&self) -> Vec<u8> {
        fs::read(self.path().join(FILE)).expect("the file")
    }

    fn put(&self, bytes: &[u8]) {
        fs::write(self.path().join(FILE), bytes).expect("the file");
    }
}

fn write(disk: &Disk, block: u64, byte: u8) -> Result<(), String> {
    disk.write(block * 4096, &[byte; 4096]).map_err(|e| e.to_string())
}

fn flush(disk: &Disk) -> Result<(), String> {
    disk.flush().map_err(|e| e.to_string())
}

fn holds(disk: &Disk, block: u64, byte: u8) -> Result<(), String> {
    let mut out = [0; 4096];
    disk.read(block * 4096, &mut out).map_err(|e| e.to_string())?;
    if out == [byte; 4096] { Ok(()) } else { Err(format!("block {block} holds {}, not {byte}", out[0])) }
}

/// All of it.
///
/// # Errors
/// What is not kept, or should not have been.
pub fn all() -> Result<(), String> {
    kept_over_a_kill().map_err(|e| format!("over a kill: {e}"))?;
    newest_wins().map_err(|e| format!("two files: {e}"))?;
    other_boot_is_forgotten().map_err(|e| format!("another boot: {e}"))?;
    torn_is_not_replayed().map_err(|e| format!("a torn record: {e}"))?;
    earlier_life_is_not_replayed().map_err(|e| format!("an earlier life: {e}"))
}

fn kept_over_a_kill() -> Result<(), String> {
    let bench = Bench::new();
    let disk = bench.open(BOOT)?;
    write(&disk, 0, 1)?;
    flush(&disk)?;
    write(&disk, 1, 2)?;
    drop(disk);
    let disk = bench.open(BOOT)?;
    holds(&disk, 0, 1)?;
    holds(&disk, 1, 2)
}

/// A kill between a flush and the emptying of its file leaves both files full.
fn newest_wins() -> Result<(), String> {
    let bench = Bench::new();
    let disk = bench.open(BOOT)?;
    write(&disk, 0, 1)?;
    let before = bench.copy();
    flush(&disk)?;
    write(&disk, 0, 2)?;
    drop(disk);
    bench.put(&before);
    holds(&bench.open(BOOT)?, 0, 2)
}

/// After a loss of power the file may be older than what the overlay holds.
fn other_boot_is_forgotten() -> Result<(), String> {
    let bench = Bench::new();
    let disk = bench.open(BOOT)?;
    write(&disk, 0, 1)?;
    let before = bench.copy();
    write(&disk, 0, 2)?;
    flush(&disk)?;
    drop(disk);
    bench.put(&before);
    holds(&bench.open(OTHER_BOOT)?, 0, 2)
}

/// A record whose bytes a kill has cut was never acknowledged.
fn torn_is_not_replayed() -> Result<(), String> {
    let bench = Bench::new();
    let disk = bench.open(BOOT)?;
    write(&disk, 0, 1)?;
    flush(&disk)?;
    drop(disk);
    let disk = bench.open(BOOT)?;
    write(&disk, 0, 2)?;
    drop(disk);
    let mut torn = bench.copy();
    torn[RECORD_END - 512..RECORD_END].fill(9);
    bench.put(&torn);
    holds(&bench.open(BOOT)?, 0, 1)
}

/// Behind the records of this life lie those of earlier ones.
fn earlier_life_is_not_replayed() -> Result<(), String> {
    let bench = Bench::new();
    let disk = bench.open(BOOT)?;
    write(&disk, 0, 1)?;
    write(&disk, 1, 1)?;
    flush(&disk)?;
    // In the other file now.
    write(&disk, 1, 5)?;
    flush(&disk)?;
    // In the first one again, over the first of its two records.
    write(&disk, 2, 7)?;
    drop(disk);
    let disk = bench.open(BOOT)?;
    holds(&disk, 2, 7)?;
    holds(&disk, 1, 5)
}
