//! Veeam's backup files: real ones, and chains and Hyper-V backups of our own writer.

use std::fs;

use aquifer_formats::Error as FormatError;
use aquifer_tests::{
    foreign::{
        assert_same, check_reads, pypi,
        vbk::{Body, Encoding, File, Machine, changes},
    },
    qemu,
    rng::Rng,
};
use aquifer_vdisk::{Error, members};

use super::{
    Lab, MIB, Sample,
    archive::{compare, content, member},
};

pub(super) const SAMPLES: [Sample; 6] = [
    Sample { format: "vbk", what: "version 9, of a Linux agent, from PyPI", oracle: "dissect", compare: real_9 },
    Sample { format: "vbk", what: "version 13, of a Windows agent, from PyPI", oracle: "dissect", compare: real_13 },
    Sample {
        format: "vbk",
        what: "versions 9 and 13 in LZ4, own writer",
        oracle: "dissect and the source",
        compare: both_versions,
    },
    Sample {
        format: "vbk",
        what: "a full and four increments in plain, zlib, LZ4 and zstd, files renamed, own writer",
        oracle: "the source",
        compare: chain,
    },
    Sample {
        format: "vbk",
        what: "two machines in one file, 3,300 blocks of 4 KiB, own writer",
        oracle: "the source",
        compare: many_blocks,
    },
    Sample {
        format: "vbk",
        what: "Hyper-V: a VHDX by qemu-img inside a full and an increment, own writer",
        oracle: "qemu-img",
        compare: hyperv,
    },
];

const EVERY: [Encoding; 4] = [Encoding::Lz4, Encoding::Plain, Encoding::Zlib, Encoding::Zstd];

fn real(lab: &Lab, sample: &str, disk: &str) -> u32 {
    let Some(dissect) = pypi::dissect() else { return 0 };
    let path = lab.path("real.vbk");
    dissect.sample(sample, &path);
    assert_eq!(members(&path).expect("a backup"), [disk]);
    dissect.vbk(&path, disk, &lab.path("theirs"));
    let chain = member(lab, &path, disk).expect("opens");
    assert!(assert_same(&chain, &lab.path("theirs"), sample) > 0);
    check_reads(&chain, &mut Rng::new(1));
    1
}

fn real_9(lab: &Lab) -> u32 {
    real(lab, "test9.vbk.gz", "DEV__dev_nvme1n1")
}

fn real_13(lab: &Lab) -> u32 {
    real(lab, "test13.vbk.gz", "8b14f74c-360d-4d7a-98f7-7f4c5e737eb7")
}

fn full<'a>(name: &'a str, files: Vec<(&'a str, Body<'a>)>) -> Machine<'a> {
    Machine { folder: "6745a759 (a)", name, id: 1, below: 0, files }
}

fn both_versions(lab: &Lab) -> u32 {
    let disk = content(lab, 5 * MIB as usize + 512 * 9, 3);
    for version in [9, 13] {
        let machines = vec![full("db01", vec![("DEV__dev_sda", Body::Whole(&disk))])];
        let file = File { version, block: MIB as usize, encodings: &[Encoding::Lz4], machines };
        let path = lab.write("m.vbk", file.bytes());
        compare(lab, &path, "DEV__dev_sda", &disk);
        let Some(dissect) = pypi::dissect() else { return 0 };
        dissect.vbk(&path, "DEV__dev_sda", &lab.path("theirs"));
        assert_eq!(fs::read(lab.path("theirs")).expect("read"), disk, "version {version}");
    }
    1
}

/// What the states of a disk are, point by point: changed, zeroed, grown.
fn states(lab: &Lab) -> Vec<Vec<u8>> {
    let mut states = vec![content(lab, 6 * MIB as usize, 4)];
    for point in 1..5u64 {
        let mut next = states.last().expect("one").clone();
        if point == 3 {
            next.resize(7 * MIB as usize + 512, 0);
        }
        let mut rng = Rng::new(point);
        for _ in 0..4 {
            let at = rng.below(next.len() as u64 / 512 - 200) as usize * 512;
            next[at..at + 90_000].fill(point as u8);
        }
        let zeroed = rng.below(5) as usize * MIB as usize;
        next[zeroed..zeroed + MIB as usize].fill(0);
        states.push(next);
    }
    states
}

/// Writes the points of a machine under names that tell nothing.
fn write_chain(lab: &Lab, states: &[Vec<u8>], version: u32) -> Vec<std::path::PathBuf> {
    let block = 256 << 10;
    let mut paths = Vec::new();
    for (point, state) in states.iter().enumerate() {
        let body = match point {
            0 => Body::Whole(state),
            _ => changes(&states[point - 1], state, block),
        };
        let id = point as u128 + 1;
        let machine = Machine { id, below: id - 1, ..full("db01", vec![("DEV__dev_sda", body)]) };
        let file = File { version, block, encodings: &EVERY, machines: vec![machine] };
        let name = format!("{}{}.{}", (point * 7) % 5, version, if point == 0 { "vbk" } else { "vib" });
        paths.push(lab.write(&name, file.bytes()));
    }
    paths
}

fn chain(lab: &Lab) -> u32 {
    let states = states(lab);
    for version in [9, 13] {
        let dir = lab.path(&format!("v{version}"));
        fs::create_dir(&dir).expect("a folder");
        for path in write_chain(lab, &states, version) {
            fs::rename(&path, dir.join(path.file_name().expect("a name"))).expect("rename");
        }
        for (point, state) in states.iter().enumerate() {
            let name = format!("{}{version}.{}", (point * 7) % 5, if point == 0 { "vbk" } else { "vib" });
            let chain = member(lab, &dir.join(&name), "DEV__dev_sda").expect("opens");
            assert_eq!(chain.layers().len(), point + 1);
            compare(lab, &dir.join(&name), "DEV__dev_sda", state);
        }
    }
    5
}

/// Enough blocks for several tables, pages and banks.
fn many_blocks(lab: &Lab) -> u32 {
    let mut disk = content(lab, 3300 * 4096, 8);
    for (number, block) in disk.chunks_mut(4096).enumerate().filter(|(number, _)| !(1100..2200).contains(number)) {
        block[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
    }
    let other = content(lab, MIB as usize, 9);
    for version in [9, 13] {
        let machines = vec![
            full("db01", vec![("db01-flat.vmdk", Body::Whole(&disk)), ("db01.vmx", Body::Whole(b"memSize = 1"))]),
            Machine { folder: "b", ..full("web01", vec![("db01-flat.vmdk", Body::Whole(&other))]) },
        ];
        let file = File { version, block: 4096, encodings: &EVERY, machines };
        let path = lab.write("two.vbk", file.bytes());
        assert_eq!(members(&path).expect("a backup"), ["db01/db01-flat.vmdk", "web01/db01-flat.vmdk"]);
        compare(lab, &path, "db01/db01-flat.vmdk", &disk);
        compare(lab, &path, "web01/db01-flat.vmdk", &other);
    }
    1
}

/// The image inside the backup changes from point to point as a file; the disk is what it says at that point.
fn hyperv(lab: &Lab) -> u32 {
    let raw = lab.write("content.raw", content(lab, 12 * MIB as usize, 5));
    let image = lab.path("disk.vhdx");
    qemu::from_raw(&raw, &image, "vhdx", "block_size=1M");
    let before = fs::read(&image).expect("read");
    qemu::img(&["convert", "-f", "vhdx", "-O", "raw", qemu::text(&image), qemu::text(&lab.path("truth0"))]);
    lab.scribble(&image, "vhdx", 12 * MIB, false, &mut Rng::new(6));
    let after = fs::read(&image).expect("read");
    qemu::img(&["convert", "-f", "vhdx", "-O", "raw", qemu::text(&image), qemu::text(&lab.path("truth1"))]);
    let block = MIB as usize;
    let machine = |body| full("hv01", vec![("Disk.vhdx", body)]);
    let file = |machine| File { version: 13, block, encodings: &EVERY, machines: vec![machine] }.bytes();
    let first = lab.write("hv.vbk", file(machine(Body::Whole(&before))));
    let changed = Machine { id: 2, below: 1, ..machine(changes(&before, &after, block)) };
    let second = lab.write("hv.vib", file(changed));
    for (point, path) in [first, second].iter().enumerate() {
        let chain = member(lab, path, "Disk.vhdx").expect("opens");
        assert!(assert_same(&chain, &lab.path(&format!("truth{point}")), "Hyper-V") > 0);
        check_reads(&chain, &mut Rng::new(7));
    }
    2
}

#[test]
fn a_chain_with_a_hole_or_damage_is_an_error_and_never_zeros() {
    let lab = Lab::new();
    let states = states(&lab);
    let paths = write_chain(&lab, &states, 13);
    let away = lab.path("away");
    fs::rename(&paths[2], &away).expect("rename");
    let error = member(&lab, &paths[3], "DEV__dev_sda").expect_err("a point is gone");
    assert!(matches!(&error, Error::Format(FormatError::ChainBroken { .. })), "{error}");
    assert!(error.to_string().contains("00000000-0000-0000-0000-000000000003"), "{error}");
    fs::rename(&away, &paths[2]).expect("rename");
    // A byte of a block: every read says so, beside it all is well.
    let good = fs::read(&paths[0]).expect("read");
    let mut bytes = good.clone();
    bytes[0x1000 + 2 * 0x1000 + 100] ^= 1;
    fs::write(&paths[0], &bytes).expect("write");
    let chain = member(&lab, &paths[0], "DEV__dev_sda").expect("opens");
    let (mut bad, mut buf) = (0, vec![0; 64 << 10]);
    for at in (0..chain.size() - 65_536).step_by(64 << 10) {
        match chain.read(at, &mut buf) {
            Ok(()) => assert_eq!(buf, states[0][at as usize..at as usize + buf.len()]),
            Err(Error::Format(FormatError::BadBlock { .. })) => bad += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!((1..=4).contains(&bad), "{bad} parts of 64 KiB are lost with a block of 256");
}

/// Damage inside a disk that is an image in a backup is damage, not a source that is away.
#[test]
fn damage_below_an_image_keeps_its_kind() {
    let lab = Lab::new();
    let raw = lab.write("content.raw", content(&lab, 4 * MIB as usize, 5));
    let image = lab.path("disk.vhdx");
    qemu::from_raw(&raw, &image, "vhdx", "block_size=1M");
    let vhdx = fs::read(&image).expect("read");
    let machines = vec![full("hv01", vec![("Disk.vhdx", Body::Whole(&vhdx))])];
    let file = File { version: 13, block: 64 << 10, encodings: &[Encoding::Plain], machines };
    let bytes = file.bytes();
    // The last page of the image that is not zeros is the disk's data.
    let needle = vhdx.chunks(4096).rev().find(|page| page.iter().any(|b| *b != 0)).expect("data");
    let at = bytes.windows(4096).position(|part| part == needle).expect("stored plain");
    let mut broken = bytes;
    broken[at] ^= 1;
    let path = lab.write("hv.vbk", broken);
    let chain = member(&lab, &path, "Disk.vhdx").expect("opens");
    let mut buf = vec![0; chain.size() as usize];
    let error = chain.read(0, &mut buf).expect_err("damaged");
    assert!(matches!(&error, Error::Format(inner) if inner.is_damage()), "{error}");
}
