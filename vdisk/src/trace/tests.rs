//! Traces of boots: recorded, written, read back, refused where damaged.

use std::time::{Duration, Instant};

use super::*;

const MIB: u64 = 1 << 20;

fn step(start: u64, end: u64, after_ms: u32) -> Step {
    Step { range: start..end, after_ms }
}

fn trace() -> Trace {
    Trace { size: 10 * MIB + 512, complete: true, steps: vec![step(8192, 16384, 0), step(10 * MIB, 10 * MIB + 512, 7)] }
}

/// A file whose bytes were changed and whose checksum was made right again.
fn mended(change: impl FnOnce(&mut Vec<u8>)) -> Result<Trace> {
    let mut bytes = trace().encode();
    change(&mut bytes);
    bytes[12..16].fill(0);
    let crc = crc32c::crc32c(&bytes).to_le_bytes();
    bytes[12..16].copy_from_slice(&crc);
    Trace::decode("t", &bytes)
}

#[test]
fn it_reads_back() {
    let bytes = trace().encode();
    assert_eq!(bytes.len(), 64 + 2 * 16);
    assert_eq!(Trace::decode("t", &bytes).expect("own file"), trace());
    assert_eq!(trace().bytes(), 8192 + 512);
}

#[test]
fn every_flipped_bit_and_every_cut_is_seen() {
    let good = trace().encode();
    for at in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[at / 8] ^= 1 << (at % 8);
        assert!(Trace::decode("t", &bad).is_err(), "bit {at}");
    }
    for len in 0..good.len() {
        assert!(Trace::decode("t", &good[..len]).is_err(), "{len} bytes");
    }
    assert!(Trace::decode("t", &[&good[..], &[0]].concat()).is_err(), "longer than it says");
}

#[test]
fn no_step_leaves_the_disk_or_the_bounds() {
    let put = |at: usize, value: u64, width: usize| {
        move |bytes: &mut Vec<u8>| bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width])
    };
    assert!(mended(|_| {}).is_ok());
    for (what, change) in [
        ("begins behind the disk", put(64, 2561, 8)),
        ("overflows", put(64, u64::MAX / 4096, 8)),
        ("is empty", put(72, 0, 4)),
        ("ends behind the disk", put(72, u64::from(u32::MAX), 4)),
        ("goes back in time", put(76, 8, 4)),
        ("is too late", put(92, u64::from(RECORD_MS) + 1, 4)),
        ("has a disk of nothing", put(16, 0, 8)),
        ("has a disk of too much", put(16, 1 << 63, 8)),
        ("is of another version", put(8, 2, 4)),
        ("has more steps than bytes", put(24, 3, 4)),
    ] {
        assert!(mended(change).is_err(), "a trace that {what}");
    }
    let large = Trace { size: 1 << 40, complete: false, steps: vec![step(0, BYTES_MAX + 4096, 0)] };
    assert!(Trace::decode("t", &large.encode()).is_err(), "too many bytes");
}

#[test]
fn each_block_is_recorded_once_in_order() {
    let start = Instant::now();
    let at = |ms: u64| start + Duration::from_millis(ms);
    let mut recorder = Recorder::new(Trace::default(), 10 * MIB + 512);
    assert!(recorder.note(5 * MIB + 10, 100, at(0)));
    assert!(recorder.note(5 * MIB + 4096, 8192, at(1)), "it goes on where the last ended");
    assert!(recorder.note(5 * MIB, 16384, at(500)), "one new block at the end");
    assert!(recorder.note(10 * MIB - 1, 513, at(600)));
    assert!(recorder.note(0, 0, at(700)));
    let expected = vec![
        step(5 * MIB, 5 * MIB + 12288, 0),
        step(5 * MIB + 12288, 5 * MIB + 16384, 500),
        step(10 * MIB - 4096, 10 * MIB + 512, 600),
    ];
    assert_eq!(recorder.trace().steps, expected);
    assert_eq!(recorder.bytes(), 16384 + 4096 + 512);

    // Another process of the same recovery goes on.
    let mut second = Recorder::new(recorder.trace().clone(), 10 * MIB + 512);
    assert!(second.note(5 * MIB, 4096, at(9000)), "known");
    assert!(second.note(0, 512, at(9001)));
    assert_eq!(second.trace().steps[3], step(0, 4096, 601));
    assert!(!second.note(MIB, 512, at(9000 + u64::from(RECORD_MS))), "too late");
    assert!(second.trace().complete && second.trace().steps.len() == 4);
    assert_eq!(Trace::decode("t", &second.trace().encode()).expect("it reads back"), *second.trace());
}

#[test]
fn recording_ends_when_it_is_full() {
    let now = Instant::now();
    let mut recorder = Recorder::new(Trace::default(), 1 << 40);
    let mut reads = 0u64;
    while recorder.note(reads * MIB, 512, now) {
        reads += 1;
    }
    assert_eq!((reads, recorder.trace().steps.len()), (STEPS_MAX as u64, STEPS_MAX));
    let mut recorder = Recorder::new(Trace::default(), 1 << 40);
    assert!(!recorder.note(0, 2 * BYTES_MAX, now));
    assert_eq!(recorder.bytes(), BYTES_MAX);
    assert!(Trace::decode("t", &recorder.trace().encode()).is_ok());
}

#[test]
fn fetches_keep_the_order_and_join_neighbours() {
    let steps = vec![step(MIB, MIB + 4096, 0), step(0, 4096, 1), step(MIB + 8192, MIB + 12288, 2)];
    let trace = Trace { size: 4 * MIB, complete: true, steps };
    assert_eq!(trace.fetches(4 * MIB), [0..4096, MIB..MIB + 12288]);
    assert_eq!(trace.fetches(MIB + 100), [0..4096, MIB..MIB + 100], "a disk that has become shorter");
    // What was read much later is fetched later, wherever it lies.
    let mut steps: Vec<Step> = (0..3).map(|i| step((6 - 2 * i) * MIB, (8 - 2 * i) * MIB, 0)).collect();
    steps.push(step(0, 4096, 9));
    let fetches = Trace { size: 8 * MIB, complete: true, steps }.fetches(8 * MIB);
    assert!(fetches.iter().all(|f| f.end - f.start <= 256 << 10));
    assert_eq!(fetches.first().map(|f| f.start), Some(6 * MIB));
    assert_eq!(fetches.last(), Some(&(0..4096)));
    assert_eq!(fetches.iter().map(|f| f.end - f.start).sum::<u64>(), 6 * MIB + 4096);
}
