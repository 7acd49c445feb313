//! VMware's disks, made by `qemu-img` and by our own writers, read by QEMU and by us.

use std::{collections::BTreeMap, fs, path::Path};

use aquifer_formats::Error as FormatError;
use aquifer_tests::{
    foreign::{
        asked, deep,
        vmdk::{Extent, Grain, descriptor},
    },
    oracle::cases,
    qemu,
    rng::Rng,
};
use aquifer_vdisk::{ChainSpec, Error};

use super::{Lab, MIB, Sample, packed};

pub(super) const SAMPLES: [Sample; 10] = [
    Sample {
        format: "vmdk",
        what: "monolithicSparse, `qemu-img create`, random writes",
        oracle: "qemu-img",
        compare: sparse,
    },
    Sample {
        format: "vmdk",
        what: "monolithicSparse with zero grains, compat6",
        oracle: "qemu-img",
        compare: zero_grains,
    },
    Sample { format: "vmdk", what: "monolithicFlat and twoGbMaxExtentFlat", oracle: "qemu-img", compare: flat },
    Sample { format: "vmdk", what: "twoGbMaxExtentSparse of three extents", oracle: "qemu-img", compare: split },
    Sample { format: "vmdk", what: "streamOptimized, `qemu-img convert`", oracle: "qemu-img", compare: stream },
    Sample {
        format: "vmdk",
        what: "streamOptimized in VMware's layout (directory and footer at the end), own writer",
        oracle: "qemu-img and the source",
        compare: stream_at_end,
    },
    Sample {
        format: "vmdk",
        what: "chain of sparse disks on a streamOptimized one, `qemu-img create -b`",
        oracle: "qemu-img",
        compare: chain,
    },
    Sample {
        format: "vmdk",
        what: "VMFS deltas (COWD) on a flat disk, own writer",
        oracle: "qemu-img and the source",
        compare: cowd,
    },
    Sample {
        format: "vmdk",
        what: "seSparse deltas on a flat disk, own writer",
        oracle: "qemu-img and the source",
        compare: sesparse,
    },
    Sample {
        format: "vmdk",
        what: "100 sparse disks on each other, own writer",
        oracle: "qemu-img and the source",
        compare: hundred,
    },
];

fn create(lab: &Lab, name: &str, options: &str, size: u64) -> std::path::PathBuf {
    let path = lab.path(name);
    qemu::img(&["create", "-q", "-f", "vmdk", "-o", options, qemu::text(&path), &size.to_string()]);
    path
}

fn sparse(lab: &Lab) -> u32 {
    for seed in 0..u64::from(cases(2)) {
        let mut rng = Rng::new(seed);
        let size = 3 * MIB + 512 * rng.below(3000);
        let path = create(lab, "disk.vmdk", "subformat=monolithicSparse", size);
        lab.scribble(&path, "vmdk", size, false, &mut rng);
        lab.compare(&path, "vmdk", "monolithicSparse");
    }
    1
}

fn zero_grains(lab: &Lab) -> u32 {
    let mut rng = Rng::new(2);
    for options in ["zeroed_grain=on", "compat6=on"] {
        let path = create(lab, "disk.vmdk", options, 4 * MIB);
        let zeros = options.contains("zeroed");
        lab.scribble(&path, "vmdk", 4 * MIB, zeros, &mut rng);
        if zeros {
            qemu::io(&path, "vmdk", &["write -P 7 1M 256k".into(), "write -z 1M 128k".into()]);
        }
        lab.compare(&path, "vmdk", options);
    }
    1
}

fn flat(lab: &Lab) -> u32 {
    let mut rng = Rng::new(3);
    for subformat in ["monolithicFlat", "twoGbMaxExtentFlat"] {
        let path = create(lab, &format!("{subformat}.vmdk"), &format!("subformat={subformat}"), 3 * MIB + 512);
        lab.scribble(&path, "vmdk", 3 * MIB, false, &mut rng);
        lab.compare(&path, "vmdk", subformat);
    }
    1
}

fn split(lab: &Lab) -> u32 {
    let path = create(lab, "disk.vmdk", "subformat=twoGbMaxExtentSparse", 4200 * MIB);
    let borders = [0, 2047, 2048, 4095, 4096, 4199];
    let writes: Vec<String> = borders.iter().map(|mib| format!("write -P {} {mib}M 1M", 1 + mib % 250)).collect();
    qemu::io(&path, "vmdk", &writes);
    qemu::io(&path, "vmdk", &[format!("write -P 99 {} 128k", 2048 * MIB - 65536)]);
    lab.compare(&path, "vmdk", "twoGbMaxExtentSparse");
    1
}

fn stream(lab: &Lab) -> u32 {
    for size in [MIB * 5, MIB * 5 / 2 + 512 * 3] {
        let raw = content(lab, size, 4);
        let path = lab.path("disk.vmdk");
        qemu::from_raw(&raw, &path, "vmdk", "subformat=streamOptimized");
        lab.compare(&path, "vmdk", "streamOptimized");
        lab.compare_with(&path, &raw, "what went in comes out");
        let chain = lab.open(&path).expect("opens");
        assert!(packed(&chain).len() > 10, "grains are really packed");
    }
    1
}

/// A raw file with noise, text and holes.
fn content(lab: &Lab, size: u64, seed: u64) -> std::path::PathBuf {
    let pattern = fs::read(lab.path("pattern")).expect("pattern");
    let mut rng = Rng::new(seed);
    let mut bytes = vec![0u8; size as usize];
    for _ in 0..12 {
        let at = rng.below(size / 512) as usize * 512;
        let len = (512 * (1 + rng.below(800)) as usize).min(bytes.len() - at);
        bytes[at..at + len].copy_from_slice(&pattern[..len]);
    }
    lab.write("content.raw", bytes)
}

fn grains_of(bytes: &[u8], sectors: u64) -> BTreeMap<u64, Grain> {
    let grain = sectors as usize * 512;
    let padded = |chunk: &[u8]| [chunk, &vec![0; grain - chunk.len()]].concat();
    let all = (0..).zip(bytes.chunks(grain)).filter(|(_, chunk)| chunk.iter().any(|b| *b != 0));
    all.map(|(index, chunk)| (index, Grain::Data(padded(chunk)))).collect()
}

fn stream_at_end(lab: &Lab) -> u32 {
    // More than one table, and an end within a grain.
    let size = 70 * MIB + 512 * 77;
    let raw = content(lab, size, 5);
    let grains = grains_of(&fs::read(&raw).expect("read"), 128);
    let extent = Extent { capacity: size / 512, grain: 128, grains };
    let text = descriptor("streamOptimized", 7, None, &[format!("RW {} SPARSE \"disk.vmdk\"", size / 512)]);
    let bytes = extent.stream(&text);
    let path = lab.write("disk.vmdk", &bytes);
    lab.compare(&path, "vmdk", "VMware's layout, QEMU's reading");
    lab.compare_with(&path, &raw, "VMware's layout");
    // A download that was cut: never zeros, always an error that names the file.
    for cut in [512, 1024, 1536, 4096, bytes.len() / 2] {
        fs::write(&path, &bytes[..bytes.len() - cut]).expect("write");
        let error = lab.open(&path).expect_err("a torn file").to_string();
        assert!(error.contains("disk.vmdk"), "{error}");
    }
    1
}

fn chain(lab: &Lab) -> u32 {
    let mut rng = Rng::new(6);
    let raw = content(lab, 4 * MIB, 6);
    qemu::from_raw(&raw, &lab.path("0.vmdk"), "vmdk", "subformat=streamOptimized");
    lab.compare(&lab.path("0.vmdk"), "vmdk", "the base");
    let depth = 5;
    for number in 1..depth {
        let (path, backing) = (lab.path(&format!("{number}.vmdk")), lab.path(&format!("{}.vmdk", number - 1)));
        let zeros = number % 2 == 0;
        let options = if zeros { "zeroed_grain=on" } else { "subformat=monolithicSparse" };
        qemu::img(&[
            "create",
            "-q",
            "-f",
            "vmdk",
            "-o",
            options,
            "-F",
            "vmdk",
            "-b",
            qemu::text(&backing),
            qemu::text(&path),
        ]);
        lab.scribble(&path, "vmdk", 4 * MIB, zeros, &mut rng);
        lab.compare(&path, "vmdk", &format!("point {number}"));
    }
    depth
}

/// A flat disk, and `count` deltas of `kind` on it; each is compared with QEMU and with the bytes it was
/// made from.
fn deltas(lab: &Lab, kind: &str, grain: u64, count: u32) -> u32 {
    let sectors = 40 * MIB / 512;
    let raw = content(lab, 40 * MIB, 8);
    let mut truth = fs::read(&raw).expect("read");
    lab.write("0-flat.vmdk", &truth);
    lab.write("0.vmdk", descriptor("vmfs", 100, None, &[format!("RW {sectors} VMFS \"0-flat.vmdk\"")]));
    lab.compare_with(&lab.path("0.vmdk"), &raw, "the base");
    let mut rng = Rng::new(9);
    for number in 1..count {
        let bytes = grain as usize * 512;
        let mut grains = BTreeMap::new();
        for _ in 0..60 {
            let first = rng.below(sectors / grain);
            for index in first..(first + 1 + rng.below(9)).min(sectors / grain) {
                let choice = if kind == "SESPARSE" { rng.below(6) } else { 5 };
                let written = match choice {
                    0 => Grain::Zero,
                    1 => Grain::Unmapped,
                    _ => Grain::Data((0..bytes).map(|_| rng.below(256) as u8).collect()),
                };
                grains.insert(index, written);
            }
        }
        for (index, grain) in &grains {
            let at = *index as usize * bytes;
            match grain {
                Grain::Zero | Grain::Unmapped => truth[at..at + bytes].fill(0),
                Grain::Data(data) => truth[at..at + bytes].copy_from_slice(data),
            }
        }
        let extent = Extent { capacity: sectors, grain, grains };
        let (create_type, stored) = match kind {
            "SESPARSE" => ("seSparse", extent.sesparse()),
            _ => ("vmfsSparse", extent.cowd()),
        };
        lab.write(&format!("{number}-delta.vmdk"), stored);
        let parent = format!("/vmfs/volumes/5f/vm/{}.vmdk", number - 1);
        let hint = if kind == "SESPARSE" { format!("{}.vmdk", number - 1) } else { parent };
        let line = format!("RW {sectors} {kind} \"{number}-delta.vmdk\"");
        let text =
            |hint: &str| descriptor(create_type, 100 + number, Some((99 + number, hint)), std::slice::from_ref(&line));
        let path = lab.write(&format!("{number}.vmdk"), text(&hint));
        let raw = lab.write("truth.raw", &truth);
        lab.compare_with(&path, &raw, &format!("{kind}, point {number}"));
        // QEMU follows the hint as it stands only.
        lab.write(&format!("{number}.vmdk"), text(&format!("{}.vmdk", number - 1)));
        lab.compare(&path, "vmdk", &format!("{kind}, point {number}, QEMU's reading"));
    }
    count
}

fn cowd(lab: &Lab) -> u32 {
    deltas(lab, "VMFSSPARSE", 1, 3) + deltas(lab, "VMFSSPARSE", 128, 3)
}

fn sesparse(lab: &Lab) -> u32 {
    deltas(lab, "SESPARSE", 8, 4)
}

/// One table's worth of disk in 100 layers; what each says is known, so the newest is what QEMU reads.
fn hundred(lab: &Lab) -> u32 {
    let path = deep::vmdk(lab.dir.path(), 100, 8 * MIB);
    lab.compare(&path, "vmdk", "100 layers");
    1
}

/// Depth must not multiply the work of a read: once a window is known, no layer is asked any more.
#[test]
fn a_hundred_layers_cost_a_read_no_more_than_one() {
    let lab = Lab::new();
    let tip = deep::vmdk(lab.dir.path(), 100, 8 * MIB);
    let asked_by = |path: &Path| asked(&lab.open(path).expect("a good chain"));
    let (depth, first, later) = asked_by(&tip);
    assert_eq!(depth, 100);
    assert!(first <= depth, "the first touch asks each layer at most once, not {first} times");
    assert_eq!(later, 0, "and nobody is asked afterwards");
    assert_eq!(asked_by(&lab.path("0.vmdk")).2, 0);
}

fn text_of(lab: &Lab, name: &str, text: &str) -> std::path::PathBuf {
    lab.write(name, text)
}

#[test]
fn parents_and_extents_are_held_to_what_is_recorded() {
    let lab = Lab::new();
    let flat = |name: &str| format!("RW 2048 FLAT \"{name}\" 0");
    lab.write("flat", vec![5; MIB as usize]);
    let base = text_of(&lab, "base.vmdk", &descriptor("monolithicFlat", 1, None, &[flat("flat")]));
    let refused = |path: &Path| match lab.open(path) {
        Err(Error::Format(error)) => error,
        other => panic!("{}: {other:?}", path.display()),
    };
    let zero = "RW 2048 ZERO".to_owned();
    let child = |cid: u32, hint: &str| {
        text_of(&lab, "child.vmdk", &descriptor("custom", 2, Some((cid, hint)), std::slice::from_ref(&zero)))
    };
    assert!(lab.open(&child(1, "base.vmdk")).is_ok());
    assert!(lab.open(&child(1, "C:\\disks\\base.vmdk")).is_ok(), "found beside it by its last part");
    let changed = refused(&child(3, "base.vmdk"));
    assert!(matches!(changed, FormatError::ChainBroken { .. }) && changed.to_string().contains("content"), "{changed}");
    assert!(matches!(refused(&child(1, "gone.vmdk")), FormatError::ChainBroken { .. }));
    assert!(matches!(refused(&child(1, "flat")), FormatError::Corrupt { .. }), "a parent is never taken for raw");
    assert!(matches!(refused(&child(2, "child.vmdk")), FormatError::ChainBroken { .. }), "its own parent");

    for name in ["/etc/hostname", "../flat", "nbd:unix:x"] {
        let path = text_of(&lab, "disk.vmdk", &descriptor("monolithicFlat", 1, None, &[flat(name)]));
        assert!(matches!(refused(&path), FormatError::Refused { .. }), "{name}");
    }
    let outside = tempfile::tempdir().expect("a folder");
    fs::copy(lab.path("flat"), outside.path().join("flat")).expect("copy");
    std::os::unix::fs::symlink(outside.path().join("flat"), lab.path("link")).expect("a link");
    let linked = text_of(&lab, "disk.vmdk", &descriptor("monolithicFlat", 1, None, &[flat("link")]));
    assert!(matches!(refused(&linked), FormatError::Refused { .. }), "a link out of the folder");
    let allowed =
        ChainSpec::Image { path: linked, format: None, allow_backing: vec![outside.path().into()], snapshot: None };
    assert!(aquifer_tests::chains::open(&allowed, &lab.cache).is_ok(), "unless that folder is allowed");

    let long = text_of(&lab, "disk.vmdk", &descriptor("monolithicFlat", 1, None, &["RW 2049 FLAT \"flat\" 0".into()]));
    assert!(matches!(refused(&long), FormatError::Truncated { .. }), "a flat extent that ends early");
    let itself =
        text_of(&lab, "disk.vmdk", &descriptor("monolithicFlat", 1, None, &["RW 1 FLAT \"disk.vmdk\" 0".into()]));
    assert!(matches!(refused(&itself), FormatError::ChainBroken { .. }), "a descriptor as its own extent");
    let named = ChainSpec::Image { path: base, format: None, allow_backing: vec![], snapshot: Some("s".into()) };
    assert!(aquifer_tests::chains::open(&named, &lab.cache).is_err(), "there are no internal snapshots");
}

/// Extents of any length in a row: flat ones at an offset in their file, zeros, sparse ones that begin
/// within a grain of the disk.
#[test]
fn extents_follow_each_other_without_gap() {
    let lab = Lab::new();
    let mut rng = Rng::new(12);
    for round in 0..u64::from(cases(6)) {
        let (mut truth, mut lines) = (Vec::new(), Vec::new());
        for number in 0..6 {
            let sectors = 1 + rng.below(1000);
            let bytes: Vec<u8> = (0..sectors * 512).map(|_| rng.below(256) as u8).collect();
            let name = format!("{number}.part");
            match rng.below(3) {
                0 => {
                    lines.push(format!("RW {sectors} ZERO"));
                    truth.extend(vec![0; bytes.len()]);
                    continue;
                }
                1 => {
                    let skip = rng.below(9);
                    lines.push(format!("RW {sectors} FLAT \"{name}\" {skip}"));
                    lab.write(&name, [&vec![9; skip as usize * 512], &bytes[..]].concat());
                }
                _ => {
                    let grain = 8 << rng.below(5);
                    lines.push(format!("RW {sectors} SPARSE \"{name}\""));
                    let extent = Extent { capacity: sectors, grain, grains: grains_of(&bytes, grain) };
                    lab.write(&name, extent.hosted(""));
                }
            }
            truth.extend(bytes);
        }
        if truth.iter().all(|byte| *byte == 0) {
            continue;
        }
        let path = lab.write("disk.vmdk", descriptor("custom", 1, None, &lines));
        let raw = lab.write("truth.raw", &truth);
        lab.compare_with(&path, &raw, &format!("round {round}: {lines:?}"));
    }
}
