//! Streams of virtnbdbackup: a full and increments of our own writer.

use std::fs;

use aquifer_formats::Error as FormatError;
use aquifer_tests::foreign::virtnbd::{DATE, Point};
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
        let file = made(point, &Point { disk, checkpoint: &name, below, bytes, date: DATE });
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

#[test]
fn a_differential_stream_is_nobodys_parent_and_of_two_that_may_be_none_is() {
    let lab = Lab::new();
    let states = states(&lab, 3);
    let paths = write(&lab, "sda", &states, plain);
    // It bears the name of the increment that comes after it, and sorts before.
    let other = vec![9; states[0].len()];
    let diff = Point {
        disk: "sda",
        checkpoint: "virtnbdbackup.1",
        below: Some(("virtnbdbackup.0", &states[0])),
        bytes: &other,
        date: DATE,
    };
    let diff = lab.write("sda.diff.1763719200.data", diff.file());
    for (path, state) in [(&paths[2], &states[2]), (&diff, &other)] {
        let raw = lab.write("truth.raw", state);
        lab.compare_with(path, &raw, "sda");
    }
    lab.write("sda.older.data", fs::read(&paths[1]).expect("read"));
    let error = lab.open(&paths[2]).expect_err("two files hold what is below");
    let said = error.to_string();
    assert!(
        matches!(&error, Error::Format(FormatError::ChainBroken { .. })) && said.contains("sda.older.data"),
        "{said}"
    );
}

/// Dates are of the local clock, which goes back an hour each autumn and by more when a machine gets another time zone.
#[test]
fn a_clock_that_was_set_back_breaks_no_chain() {
    let lab = Lab::new();
    let states = states(&lab, 3);
    let write = |name: &str, point: usize, date: &str| {
        let names = ["virtnbdbackup.0", "virtnbdbackup.1"];
        let below = (point > 0).then(|| (names[0], states[0].as_slice()));
        let made = Point { disk: "sda", checkpoint: names[point], below, bytes: &states[point], date };
        lab.write(name, made.file())
    };
    let raw = lab.write("truth.raw", &states[1]);
    // The second hour from two to three; a clock that was years ahead; a date that is none.
    for (full, later) in [
        ("2026-10-25T02:50:00.000001", "2026-10-25T02:10:00.000001"),
        ("2031-01-01T00:00:00.000001", "2026-10-25T02:10:00.000001"),
        ("yesterday", "2026-10-25T02:10:00.000001"),
    ] {
        write("sda.full.data", 0, full);
        let increment = write("sda.inc.virtnbdbackup.1.data", 1, later);
        lab.compare_with(&increment, &raw, full);
    }
    // Of several, those of a later day are of another chain; within a day nothing tells them apart.
    write("sda.full.data", 0, "2026-10-25T02:50:00.000001");
    let increment = write("sda.inc.virtnbdbackup.1.data", 1, "2026-10-25T02:10:00.000001");
    let again = lab.path("sda.full.again.data");
    let other =
        |date| Point { disk: "sda", checkpoint: "virtnbdbackup.0", below: None, bytes: &states[2], date }.file();
    fs::write(&again, other("2026-11-25T02:50:00.000001")).expect("write");
    lab.compare_with(&increment, &raw, "a later chain beside it");
    for date in ["2026-10-25T03:30:00.000001", "2026-09-25T02:50:00.000001"] {
        fs::write(&again, other(date)).expect("write");
        let error = lab.open(&increment).expect_err("two that may be meant").to_string();
        assert!(error.contains("sda.full.again.data") && error.contains("sda.full.data"), "{error}");
    }
}
