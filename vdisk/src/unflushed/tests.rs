//! A process dies, the machine it served goes on: everything acknowledged is there for the next process.

use std::sync::Arc;

use aquifer_formats::{raw::RawLayer, storage::MemoryStorage};
use proptest::prelude::*;

use super::*;
use crate::{BlockCache, Chain, Disk, Overlay, OverlayOf, OverlayOptions};

const SIZE: usize = 1 << 20;
const BOOT: Boot = [7; 16];

fn chain() -> Arc<Chain> {
    let bytes = (0..SIZE / 512).flat_map(|n| [u8::try_from(n % 251).expect("small"); 512]).collect::<Vec<u8>>();
    let layer = RawLayer::open(Arc::new(MemoryStorage::new("base", bytes))).expect("layer");
    Arc::new(Chain::new(vec![Arc::new(layer)], Arc::new(BlockCache::new(1 << 20))).expect("chain"))
}

fn of() -> OverlayOf {
    OverlayOf { size: SIZE as u64, chain: [0; 32] }
}

fn options() -> OverlayOptions {
    OverlayOptions { journal_bytes: 2 << 20, spill_bytes: 64 << 10, ..OverlayOptions::default() }
}

/// Opens what is in `dir` as a process does. Dropping the disk is its death: nothing is flushed by that.
fn life(dir: &Path, boot: Boot) -> Disk {
    let overlay = match dir.join("map").exists() {
        true => Overlay::open(dir, of(), options()),
        false => Overlay::create(dir, of(), options()),
    };
    let disk = Disk::writable("d", chain(), overlay.expect("overlay")).expect("disk");
    disk.surviving(dir, boot).expect("survives")
}

fn content(disk: &Disk) -> Vec<u8> {
    let mut out = vec![0; SIZE];
    disk.read(0, &mut out).expect("read");
    out
}

#[test]
fn without_a_flush_nothing_is_lost_by_a_death() {
    let dir = tempfile::tempdir().expect("folder");
    let disk = life(dir.path(), BOOT);
    let mut expected = content(&disk);
    disk.write(5000, &[1; 3000]).expect("small");
    expected[5000..8000].fill(1);
    disk.write(65536, &[2; 200_000]).expect("large, in place");
    expected[65536..265_536].fill(2);
    disk.trim(70_000, 5000).expect("trim");
    expected[70_000..75_000].fill(0);
    drop(disk);
    assert!(content(&life(dir.path(), BOOT)) == expected);
    assert!(content(&life(dir.path(), BOOT)) == expected, "nor by the next one");
}

#[test]
fn after_a_power_failure_only_the_overlay_counts() {
    let dir = tempfile::tempdir().expect("folder");
    let disk = life(dir.path(), BOOT);
    disk.write(0, &[1; 4096]).expect("write");
    disk.flush().expect("flush");
    disk.write(0, &[2; 4096]).expect("write");
    drop(disk);
    assert_eq!(content(&life(dir.path(), [8; 16]))[0], 1, "the flushed one: not older, and not from the double");
}

#[test]
fn what_a_flush_covered_is_not_replayed_over_newer_bytes() {
    let dir = tempfile::tempdir().expect("folder");
    let disk = life(dir.path(), BOOT);
    for round in 1..=5 {
        disk.write(8192, &[round; 4096]).expect("write");
        disk.flush().expect("flush");
    }
    // Behind the back of the double, as the hypervisor does after a pivot.
    drop(disk);
    let mut replayed = 0;
    Unflushed::open(dir.path(), BOOT, &mut |_| {
        replayed += 1;
        Ok(())
    })
    .expect("open");
    assert_eq!(replayed, 0);
}

#[test]
fn a_drained_disk_leaves_nothing_to_replay() {
    let dir = tempfile::tempdir().expect("folder");
    let disk = life(dir.path(), BOOT);
    for start in (0..SIZE).step_by(65536) {
        disk.write(start as u64, &[3; 65536]).expect("everything becomes local");
    }
    disk.drain().expect("drain");
    disk.write(4096, &[4; 4096]).expect("write through");
    drop(disk);
    // Others write the file now.
    let raw = Overlay::raw_path(dir.path());
    let mut bytes = std::fs::read(&raw).expect("raw");
    assert_eq!(bytes[4096], 4, "it reached the file before it was acknowledged");
    bytes[4096..8192].fill(5);
    std::fs::write(&raw, bytes).expect("write");
    assert_eq!(content(&life(dir.path(), BOOT))[4096], 5);
}

/// Two blocks in one file, the second of them flushed anew later: its first version lies behind the first record.
fn leave_an_old_record(disk: &Disk) {
    disk.write(0, &[1; 4096]).expect("write");
    disk.write(4096, &[1; 4096]).expect("write");
    disk.flush().expect("flush");
    disk.write(4096, &[2; 4096]).expect("write");
    disk.flush().expect("flush");
}

#[test]
fn records_of_an_earlier_boot_never_count_again() {
    let dir = tempfile::tempdir().expect("folder");
    leave_an_old_record(&life(dir.path(), BOOT));
    // The power fails, the machine starts again, the session is resumed; then its process is killed.
    life(dir.path(), [8; 16]).write(0, &[3; 4096]).expect("write");
    let now = content(&life(dir.path(), [8; 16]));
    assert_eq!((now[0], now[4096]), (3, 2), "a flushed write stays");
}

#[test]
fn records_from_before_a_drain_never_count_again() {
    let dir = tempfile::tempdir().expect("folder");
    let disk = life(dir.path(), BOOT);
    leave_an_old_record(&disk);
    disk.hydrate(0, SIZE as u64).expect("hydrate");
    disk.drain().expect("drain");
    drop(disk);
    life(dir.path(), BOOT).write(0, &[3; 4096]).expect("write");
    let now = content(&life(dir.path(), BOOT));
    assert_eq!((now[0], now[4096]), (3, 2), "a flushed write stays");
}

#[test]
fn a_drained_disk_keeps_what_is_written_over_trimmed_blocks() {
    let dir = tempfile::tempdir().expect("folder");
    let disk = life(dir.path(), BOOT);
    disk.hydrate(0, SIZE as u64).expect("hydrate");
    disk.trim(0, 65536).expect("trim");
    disk.drain().expect("drain");
    disk.write(4096, &[4; 4096]).expect("write through");
    disk.trim(131_072, 65536).expect("trim");
    disk.write(135_168, &[5; 512]).expect("write through");
    assert_eq!(disk.dirty().expect("dirty").bytes(), 2 * 65536);
    let expected = content(&disk);
    drop(disk);
    let disk = life(dir.path(), BOOT);
    assert!(content(&disk) == expected, "acknowledged, and the process died");
    assert!(disk.dirty().expect("dirty").contains(4096));
}

#[test]
fn the_older_file_is_emptied_first() {
    let dir = tempfile::tempdir().expect("folder");
    let log = Unflushed::open(dir.path(), BOOT, &mut |_| Ok(())).expect("open");
    log.replayed().expect("begin");
    assert!(log.record(Operation::Write(0, &[1; 512])).expect("record"));
    let _cut_off = log.turn().expect("turn");
    assert!(log.record(Operation::Write(0, &[2; 512])).expect("record"));
    drop(log);
    // The first file is the older one, and cannot be emptied: what counts of the second must stay.
    let refuse = |log: &mut Unflushed| {
        let path = dir.path().join(NAMES[0]);
        log.files[0] = FileStorage::open(&path, Access::ReadOnly).expect("file");
    };
    for end in [Unflushed::replayed, Unflushed::close] {
        let mut log = Unflushed::open(dir.path(), BOOT, &mut |_| Ok(())).expect("open");
        refuse(&mut log);
        end(&log).expect_err("it cannot be written");
        let mut last = 0;
        Unflushed::open(dir.path(), BOOT, &mut |operation| {
            if let Operation::Write(_, bytes) = operation {
                last = bytes[0];
            }
            Ok(())
        })
        .expect("open");
        assert_eq!(last, 2, "the older write alone would undo the newer");
    }
}

#[test]
fn a_torn_record_ends_the_replay() {
    let dir = tempfile::tempdir().expect("folder");
    let disk = life(dir.path(), BOOT);
    for n in 0..4u8 {
        disk.write(u64::from(n) * 4096, &[n + 1; 4096]).expect("write");
    }
    drop(disk);
    // The third record of whichever file is in use.
    let third = START + 2 * (RECORD_HEADER_BYTES as u64 + 4096) + RECORD_HEADER_BYTES as u64 + 100;
    for name in NAMES {
        let path = dir.path().join(name);
        let file = FileStorage::open(&path, Access::ReadWrite).expect("file");
        if epoch_of(&file, BOOT).expect("epoch") > 0 {
            file.write_at(third, &[0xaa]).expect("damage");
        }
    }
    let now = content(&life(dir.path(), BOOT));
    let before = content(&Disk::read_only("base", chain()));
    assert_eq!((now[0], now[4096]), (1, 2), "records before it count");
    assert_eq!(now[8192..16384], before[8192..16384], "it and what follows do not");
}

#[test]
fn a_full_file_waits_for_a_flush() {
    let dir = tempfile::tempdir().expect("folder");
    let log = Unflushed::open(dir.path(), BOOT, &mut |_| Ok(())).expect("open");
    log.replayed().expect("begin");
    let bytes = vec![1; 1 << 20];
    let mut taken = 0;
    while log.record(Operation::Write(0, &bytes)).expect("record") {
        taken += 1;
        assert!(taken < 100, "the file is bounded");
    }
    assert_eq!(taken, 31, "32 MiB less the headers");
    let turned = log.turn().expect("turn");
    assert!(log.record(Operation::Write(0, &bytes)).expect("the other file"));
    let again = log.turn().expect("while the first flush is on its way");
    log.flushed(&again).expect("it covers the first file as well");
    log.flushed(&turned).expect("late, and harmless");
    let mut kept = 0;
    Unflushed::open(dir.path(), BOOT, &mut |_| {
        kept += 1;
        Ok(())
    })
    .expect("open");
    assert_eq!(kept, 1, "only what came after the turn");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any writes, trims and flushes, and deaths in between: the disk is always what was acknowledged.
    #[test]
    fn deaths_are_not_noticed(steps in prop::collection::vec((0u8..10, 0usize..SIZE, 1usize..90_000, any::<u8>()), 1..40)) {
        let dir = tempfile::tempdir().expect("folder");
        let mut disk = life(dir.path(), BOOT);
        let mut expected = content(&disk);
        for (what, at, len, value) in steps {
            let len = len.min(SIZE - at);
            match what {
                0..=4 => {
                    disk.write(at as u64, &vec![value; len]).expect("write");
                    expected[at..at + len].fill(value);
                }
                5 => {
                    disk.trim(at as u64, len as u64).expect("trim");
                    expected[at..at + len].fill(0);
                }
                6 => disk.flush().expect("flush"),
                _ => {
                    drop(disk);
                    disk = life(dir.path(), BOOT);
                    prop_assert!(content(&disk) == expected);
                }
            }
        }
        drop(disk);
        prop_assert!(content(&life(dir.path(), BOOT)) == expected);
    }
}
