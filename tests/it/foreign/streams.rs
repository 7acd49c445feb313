//! Streams of virtnbdbackup: a full and increments of our own writer.

use std::fs;

use aquifer_formats::Error as FormatError;
use aquifer_tests::foreign::virtnbd::Point;
use aquifer_vdisk::Error;

use super::{Lab, MIB, Sample, archive::content};

pub(super) const SAMPLES: [Sample; 2] = [
    Sample {
        format: "virtnbdbackup",
        what: "a full and three increments of two disks, one grown, own writer",
        oracle: "the source",
        compare: chain,
    },
    Sample {
        format: "virtnbdbackup",
        what: "the same in frames of LZ4, packed by `lz4`, plain and compressed files mixed",
        oracle: "the source",
        compare: compressed,
    },
];

fn states(lab: &Lab, seed: u64) -> Vec<Vec<u8>> {
    let mut states = vec![content(lab, 5 * MIB as usize, seed)];
    for point in 1..4u8 {
        let mut next = states.last().expect("one").clone();
        if point == 2 {
            next.resize(6 * MIB as usize + 512, 0);
        }
        let at = usize::from(point) * 700_000;
        next[at..at + 200_000].fill(point);
        next[at + 300_000..at + 500_000].fill(0);
        states.push(next);
    }
    states
}

fn write(lab: &Lab, disk: &str, states: &[Vec<u8>], made: fn(usize, &Point<'_>) -> Vec<u8>) -> Vec<std::path::PathBuf> {
    let checkpoint = |point: usize| format!("virtnbdbackup.{point}");
    let mut paths = Vec::new();
    for (point, bytes) in states.iter().enumerate() {
        let (name, parent) = (checkpoint(point), checkpoint(point.wrapping_sub(1)));
        let below = (point > 0).then(|| (parent.as_str(), states[point - 1].as_slice()));
        let file = made(point, &Point { disk, checkpoint: &name, below, bytes });
        let kind = if point == 0 { "full".into() } else { format!("inc.{name}") };
        paths.push(lab.write(&format!("{disk}.{kind}.data"), file));
    }
    paths
}

fn plain(_: usize, point: &Point<'_>) -> Vec<u8> {
    point.file()
}

fn mixed(number: usize, point: &Point<'_>) -> Vec<u8> {
    if number == 2 { point.file() } else { point.compressed() }
}

fn chain(lab: &Lab) -> u32 {
    both(lab, plain)
}

fn compressed(lab: &Lab) -> u32 {
    both(lab, mixed)
}

fn both(lab: &Lab, made: fn(usize, &Point<'_>) -> Vec<u8>) -> u32 {
    for (disk, seed) in [("sda", 3), ("vdb", 4)] {
        let states = states(lab, seed);
        write(lab, disk, &states, made);
    }
    for (disk, seed) in [("sda", 3), ("vdb", 4)] {
        let states = states(lab, seed);
        for (state, path) in states.iter().zip(write(lab, disk, &states, made)) {
            let raw = lab.write("truth.raw", state);
            lab.compare_with(&path, &raw, disk);
        }
    }
    4
}

#[test]
fn a_stream_without_the_one_below_is_refused() {
    let lab = Lab::new();
    let paths = write(&lab, "sda", &states(&lab, 3), plain);
    fs::remove_file(&paths[1]).expect("remove");
    let error = lab.open(&paths[3]).expect_err("a checkpoint is gone");
    assert!(matches!(&error, Error::Format(FormatError::ChainBroken { .. })), "{error}");
    assert!(error.to_string().contains("virtnbdbackup.1"), "{error}");
    lab.open(&paths[0]).expect("the full one stands alone");
}
