//! Promise A2, as far as order goes: whoever floods a disk pays for it itself. No clock is looked at here; how long a
//! victim's requests take is measured by `scripts/bench/aggressors.py`.

use aquifer_tests::{
    faults::{Told, World},
    rig::{Rig, read_all},
};
use aquifer_vdisk::{Disk, OverlayOptions};

const PIECE: usize = 64 << 10;

/// Bytes that each sync of `disk.raw` found, and what none has covered yet.
fn found_by_syncs(told: &[Told]) -> (Vec<u64>, u64) {
    let (mut found, mut open) = (Vec::new(), 0);
    for told in told {
        match told {
            Told::Write { file: 0, bytes, .. } => open += bytes.len(),
            Told::Sync { file: 0, .. } => found.push(std::mem::take(&mut open)),
            _ => {}
        }
    }
    (found, open)
}

fn flood(disk: &Disk, pieces: std::ops::Range<usize>) {
    for piece in pieces {
        disk.write((piece * PIECE) as u64, &[7; PIECE]).expect("write");
    }
}

#[test]
fn a_flush_never_finds_what_a_flood_has_left() {
    let sectors = 64 << 11;
    let base = Rig::new(&vec![0; sectors]);
    // All of it goes in place: what is kept in the journal is bounded elsewhere.
    let rig = Rig { options: OverlayOptions { spill_bytes: 0, ..base.options }, ..base };
    let world: World = Rig::world();
    let disk = rig.create(&world);
    let made = world.told_len();
    flood(&disk, 0..400);
    let (found, open) = found_by_syncs(&world.told()[made..]);
    assert!(found.is_empty() && open == 400 * PIECE as u64, "nobody flushes, so nobody waits: {found:?}");

    // The victim flushes once; from then on the flood syncs what it writes, and the victim's next flush finds little.
    disk.flush().expect("flush");
    let flushed = world.told_len();
    flood(&disk, 400..600);
    let (found, open) = found_by_syncs(&world.told()[flushed..]);
    let most = rig.options.ahead_bytes + PIECE as u64;
    assert!(found.len() >= 10 && found.iter().all(|bytes| *bytes <= most), "{found:?}");
    assert!(open <= most, "{open} bytes are left to the victim's flush");

    // Nobody has flushed for long: the flood is let go again.
    flood(&disk, 600..1000);
    let (_, open) = found_by_syncs(&world.told()[flushed..]);
    assert!(open > 4 * most, "{open}");
    let bytes = read_all(&disk);
    assert!(bytes[..1000 * PIECE].iter().all(|b| *b == 7) && bytes[1000 * PIECE..].iter().all(|b| *b == 0));
}
