//! Promise A2, as far as order goes: whoever floods a disk pays for it itself. No clock is looked at here; how long a
//! victim's requests take is measured by `scripts/bench/aggressors.py`.

use aquifer_tests::{
    faults::{Told, World},
    rig::{Rig, read_all},
};
use aquifer_vdisk::{Disk, OverlayOptions};

const SMALL: usize = 64 << 10;
const LARGE: usize = 1 << 20;
const RAW: usize = 0;
const JOURNAL: usize = 2;

/// Bytes of a file that each of its syncs found, and what none has covered yet.
fn found_by_syncs(told: &[Told], of: usize) -> (Vec<u64>, u64) {
    let (mut found, mut open) = (Vec::new(), 0);
    for told in told {
        match told {
            Told::Write { file, bytes, .. } if *file == of => open += bytes.len(),
            Told::Sync { file, .. } if *file == of => found.push(std::mem::take(&mut open)),
            _ => {}
        }
    }
    (found, open)
}

fn flood(disk: &Disk, bytes: usize, pieces: std::ops::Range<usize>) {
    let content = vec![7; bytes];
    for piece in pieces {
        disk.write((piece * bytes) as u64, &content).expect("write");
    }
}

/// A disk of 64 MiB that nobody floods by record: what the journal keeps is bounded elsewhere.
fn rig() -> Rig {
    let base = Rig::new(&vec![0; 64 << 11]);
    Rig { options: OverlayOptions { spill_bytes: 0, ..base.options }, ..base }
}

#[test]
fn a_flush_never_finds_what_a_flood_of_large_writes_has_left() {
    let world: World = Rig::world();
    let disk = rig().create(&world);
    let made = world.told_len();
    flood(&disk, LARGE, 0..24);
    let (found, open) = found_by_syncs(&world.told()[made..], RAW);
    assert!(found.is_empty() && open == 24 * LARGE as u64, "nobody flushes, so nobody waits: {found:?}");

    // The victim flushes once; from then on what a large write has stored is durable when it is acknowledged.
    disk.flush().expect("flush");
    let flushed = world.told_len();
    for round in 0..40 {
        flood(&disk, LARGE, 24 + round % 40..25 + round % 40);
        let (found, open) = found_by_syncs(&world.told()[flushed..], RAW);
        assert_eq!((found.len(), open), (round + 1, 0), "each syncs its own");
    }
    let before = world.told_len();
    disk.write(0, &[9; 4096]).expect("write");
    disk.flush().expect("flush");
    let told = world.told();
    assert!(
        found_by_syncs(&told[before..], RAW).0.is_empty(),
        "the victim's flush does not look at what others stored"
    );
    let (found, _) = found_by_syncs(&told[before..], JOURNAL);
    assert!(found.len() == 1 && found[0] <= 64 << 10, "marks and one block: {found:?}");

    // Nobody has flushed for long: the flood is let go again.
    (0..4).for_each(|_| flood(&disk, LARGE, 24..64));
    let (_, open) = found_by_syncs(&world.told()[flushed..], RAW);
    assert!(open >= 16 * LARGE as u64, "{open}");
    let bytes = read_all(&disk);
    assert!(bytes[..4096].iter().all(|b| *b == 9) && bytes[4096..64 << 20].iter().all(|b| *b == 7));
}

#[test]
fn a_flush_finds_little_of_a_flood_of_small_writes() {
    let rig = rig();
    let world: World = Rig::world();
    let disk = rig.create(&world);
    disk.flush().expect("flush");
    flood(&disk, SMALL, 0..1);
    disk.flush().expect("flush");
    let flushed = world.told_len();
    flood(&disk, SMALL, 1..400);
    let told = world.told();
    // By record, of which each is at most the allowance, a write and its own entries; nothing is left in place for a flush to sync.
    let most = rig.options.ahead_bytes + 2 * SMALL as u64;
    let (found, open) = found_by_syncs(&told[flushed..], JOURNAL);
    assert!(found.len() >= 20 && found.iter().all(|bytes| *bytes <= most) && open == 0, "{found:?} {open}");
    let before = told.len();
    disk.flush().expect("flush");
    let told = world.told();
    let (found, _) = found_by_syncs(&told[before..], JOURNAL);
    assert!(found.iter().sum::<u64>() <= most, "{found:?}");
    assert!(found_by_syncs(&told[before..], RAW).0.is_empty(), "nothing of it is in place");
    let bytes = read_all(&disk);
    assert!(bytes[..400 * SMALL].iter().all(|b| *b == 7) && bytes[400 * SMALL..64 << 20].iter().all(|b| *b == 0));
}
