//! VHDX and VHD, made by `qemu-img` and by our own writers, and VDI; read by QEMU and by us.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use aquifer_formats::{
    Error as FormatError, Format,
    storage::{Access, FileStorage},
    vhdx::Vhdx,
};
use aquifer_tests::{
    chains::open,
    foreign::{
        asked, assert_same, deep,
        hyperv::{Sectors, VhdChild, VhdxChild, vhd_id, vhdx_content_id},
    },
    oracle::cases,
    qemu,
    rng::Rng,
};
use aquifer_vdisk::{ChainSpec, Error};

use super::{Lab, MIB, Sample};

pub(super) const SAMPLES: [Sample; 9] = [
    Sample {
        format: "vhdx",
        what: "dynamic, blocks of 1 to 256 MiB, random writes",
        oracle: "qemu-img",
        compare: vhdx_dynamic,
    },
    Sample { format: "vhdx", what: "fixed", oracle: "qemu-img", compare: vhdx_fixed },
    Sample {
        format: "vhdx",
        what: "killed while it was written, log replayed in memory",
        oracle: "qemu-img, on a copy it repaired",
        compare: vhdx_killed,
    },
    Sample {
        format: "vhdx",
        what: "chain of differencing disks with blocks in part, own writer",
        oracle: "the source",
        compare: vhdx_chain,
    },
    Sample {
        format: "vhdx",
        what: "100 differencing disks on each other, own writer",
        oracle: "the source",
        compare: hundred,
    },
    Sample {
        format: "vhd",
        what: "dynamic, by cylinders and by exact size, random writes",
        oracle: "qemu-img",
        compare: vhd_dynamic,
    },
    Sample { format: "vhd", what: "fixed, named `vhd`", oracle: "qemu-img", compare: vhd_fixed },
    Sample { format: "vhd", what: "chain of differencing disks, own writer", oracle: "the source", compare: vhd_chain },
    Sample { format: "vdi", what: "dynamic and fixed, random writes", oracle: "qemu-img", compare: vdi },
];

fn create(lab: &Lab, format: &str, name: &str, options: &str, size: u64) -> PathBuf {
    let path = lab.path(name);
    qemu::img(&["create", "-q", "-f", format, "-o", options, qemu::text(&path), &size.to_string()]);
    path
}

fn vhdx_dynamic(lab: &Lab) -> u32 {
    let mut rng = Rng::new(1);
    for (block, size) in [(1, 5 * MIB), (2, 9 * MIB), (32, 100 * MIB), (256, 300 * MIB), (8, 8 * MIB + 512 * 77)] {
        let options = format!("block_size={}", block * MIB);
        let path = create(lab, "vhdx", "disk.vhdx", &options, size);
        lab.scribble(&path, "vhdx", size, false, &mut rng);
        lab.compare(&path, "vhdx", &options);
    }
    1
}

fn vhdx_fixed(lab: &Lab) -> u32 {
    let path = create(lab, "vhdx", "disk.vhdx", "subformat=fixed", 5 * MIB);
    lab.scribble(&path, "vhdx", 5 * MIB, false, &mut Rng::new(2));
    lab.compare(&path, "vhdx", "fixed");
    1
}

/// Kills `qemu-io` at moments of its writing until its log was in use at some of them, which it is for most of
/// the time. Whatever is in the file then, QEMU's repair of a copy says what the disk holds.
fn vhdx_killed(lab: &Lab) -> u32 {
    let mut with_log = 0;
    let enough = 1 + cases(1);
    for round in 0..40 * u64::from(enough) {
        if with_log >= enough {
            break;
        }
        let path = create(lab, "vhdx", "disk.vhdx", "block_size=1M", 60 * MIB);
        let mut command = Command::new("qemu-io");
        command.args(["-f", "vhdx"]);
        // As arguments: of lines in a pipe it takes one each time the pipe is written to.
        for number in 0..60 {
            command.args(["-c", &format!("write -P {} {}M 64k", 1 + number, (number * 7) % 59)]);
        }
        let mut child = command.arg(&path).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("qemu-io runs");
        std::thread::sleep(Duration::from_millis(25 + round * 11 % 120));
        child.kill().expect("it was not waited for");
        child.wait().expect("it ends");
        let bytes = fs::read(&path).expect("read");
        with_log += u32::from(is_log_in_use(&bytes));
        let repaired = lab.write("repaired.vhdx", &bytes);
        qemu::img(&["check", "-q", "-r", "all", "-f", "vhdx", qemu::text(&repaired)]);
        let truth = lab.path("truth");
        qemu::img(&["convert", "-f", "vhdx", "-O", "raw", qemu::text(&repaired), qemu::text(&truth)]);
        let chain = lab.open(&path).expect("its log is replayed");
        assert_same(&chain, &truth, "the log in memory");
        assert_eq!(fs::read(&path).expect("read"), bytes, "the file is not touched");
    }
    assert!(with_log > 0, "at least one log was in use");
    1
}

fn is_log_in_use(bytes: &[u8]) -> bool {
    [0x1_0030, 0x2_0030].iter().any(|at| bytes[*at..at + 16] != [0; 16])
}

/// Random sectors in runs, and the blocks of a MiB that some of them fill.
fn sectors(size: u64, rng: &mut Rng) -> Sectors {
    let mut all = Sectors::new();
    for _ in 0..25 {
        let first = rng.below(size / 512);
        let most = rng.pick(&[3, 20, 5000]);
        let byte = 1 + rng.below(250) as u8;
        for sector in first..(first + 1 + rng.below(most)).min(size / 512) {
            all.insert(sector, [byte.wrapping_add(sector as u8 | 1).max(1); 512]);
        }
    }
    all
}

fn put(truth: &mut Vec<u8>, size: u64, all: &Sectors) {
    truth.resize(size as usize, 0);
    for (sector, bytes) in all {
        truth[*sector as usize * 512..][..512].copy_from_slice(bytes);
    }
}

fn vhdx_chain(lab: &Lab) -> u32 {
    let mut rng = Rng::new(3);
    let base = create(lab, "vhdx", "0.vhdx", "block_size=8M", 20 * MIB);
    lab.scribble(&base, "vhdx", 20 * MIB, false, &mut rng);
    lab.compare(&base, "vhdx", "the base");
    let mut truth = fs::read(lab.path("truth")).expect("read");
    let mut parent = vhdx_content_id(&fs::read(&base).expect("read"));
    let sizes = [20 * MIB, 20 * MIB, 24 * MIB, 24 * MIB, 24 * MIB];
    for (number, size) in (1..).zip(sizes) {
        let block = rng.pick(&[MIB, 2 * MIB, 32 * MIB]);
        let all = sectors(size, &mut rng);
        let in_block = block / 512;
        let zero_blocks: Vec<u64> = (0..size.div_ceil(block))
            .filter(|block| number % 2 == 0 && !all.keys().any(|sector| sector / in_block == *block))
            .collect();
        let id = [number as u8; 16];
        let below = format!("{}.vhdx", number - 1);
        let (relative, absolute) = (format!(".\\{below}"), format!("C:\\vm\\{below}"));
        let paths = [("relative_path", relative.as_str()), ("absolute_win32_path", absolute.as_str())];
        let paths = if number == 2 { &paths[1..] } else { &paths[..] };
        let child = VhdxChild { id, parent, paths, size, block, sectors: &all, zero_blocks: &zero_blocks };
        let path = lab.write(&format!("{number}.vhdx"), child.bytes());
        put(&mut truth, size, &all);
        for block_number in &zero_blocks {
            let end = ((block_number + 1) * block).min(size) as usize;
            truth[(block_number * block) as usize..end].fill(0);
        }
        let raw = lab.write("truth.raw", &truth);
        lab.compare_with(&path, &raw, &format!("point {number}, blocks of {block}"));
        parent = id;
    }
    6
}

fn hundred(lab: &Lab) -> u32 {
    let (path, truth) = deep::vhdx(lab.dir.path(), 100, 8 * MIB);
    let raw = lab.write("truth.raw", truth);
    lab.compare_with(&path, &raw, "100 layers");
    1
}

/// Depth must not multiply the work of a read, though blocks are there in part.
#[test]
fn a_hundred_checkpoints_cost_a_read_no_more_than_one() {
    let lab = Lab::new();
    let (tip, _) = deep::vhdx(lab.dir.path(), 100, 8 * MIB);
    let (depth, _, later) = asked(&lab.open(&tip).expect("a good chain"));
    assert_eq!((depth, later), (100, 0), "once a window is known nobody is asked");
    let (depth, _, later) = asked(&lab.open(&lab.path("d0.vhdx")).expect("a good disk"));
    assert_eq!((depth, later), (1, 0));
}

fn vhd_dynamic(lab: &Lab) -> u32 {
    let mut rng = Rng::new(4);
    for (options, size) in [("subformat=dynamic", 11 * MIB), ("subformat=dynamic,force_size=on", 7 * MIB + 512 * 3)] {
        let path = create(lab, "vpc", "disk.vhd", options, size);
        lab.scribble(&path, "vpc", 6 * MIB, false, &mut rng);
        lab.compare(&path, "vpc", options);
    }
    1
}

fn vhd_fixed(lab: &Lab) -> u32 {
    for options in ["subformat=fixed", "subformat=fixed,force_size=on"] {
        let path = create(lab, "vpc", "disk.vhd", options, 5 * MIB);
        lab.scribble(&path, "vpc", 4 * MIB, false, &mut Rng::new(5));
        assert!(lab.open(&path).is_err(), "a footer proves nothing: it is not probed");
        let truth = lab.path("truth");
        qemu::img(&["convert", "-f", "vpc", "-O", "raw", qemu::text(&path), qemu::text(&truth)]);
        let spec = ChainSpec::Image { path, format: Some(Format::Vhd), allow_backing: vec![], snapshot: None };
        let chain = open(&spec, &lab.cache).expect("named so");
        assert!(assert_same(&chain, &truth, options) > 0);
    }
    1
}

fn vhd_chain(lab: &Lab) -> u32 {
    let mut rng = Rng::new(6);
    let base = create(lab, "vpc", "0.vhd", "subformat=dynamic,force_size=on", 9 * MIB);
    lab.scribble(&base, "vpc", 9 * MIB, false, &mut rng);
    lab.compare(&base, "vpc", "the base");
    let mut truth = fs::read(lab.path("truth")).expect("read");
    let mut parent = vhd_id(&fs::read(&base).expect("read"));
    for number in 1..5u8 {
        let all = sectors(9 * MIB, &mut rng);
        let relative = format!(".\\{}.vhd", number - 1);
        let child = VhdChild { id: [number; 16], parent, relative: &relative, size: 9 * MIB, sectors: &all };
        let path = lab.write(&format!("{number}.vhd"), child.bytes());
        put(&mut truth, 9 * MIB, &all);
        let raw = lab.write("truth.raw", &truth);
        lab.compare_with(&path, &raw, &format!("point {number}"));
        parent = [number; 16];
    }
    // A fixed disk below: what the child says makes it one.
    let fixed = create(lab, "vpc", "fixed.vhd", "subformat=fixed,force_size=on", 9 * MIB);
    lab.scribble(&fixed, "vpc", 9 * MIB, false, &mut rng);
    let bytes = fs::read(&fixed).expect("read");
    let mut truth = bytes[..9 * MIB as usize].to_vec();
    let all = sectors(9 * MIB, &mut rng);
    let child = VhdChild { id: [9; 16], parent: vhd_id(&bytes), relative: "fixed.vhd", size: 9 * MIB, sectors: &all };
    let path = lab.write("on-fixed.vhd", child.bytes());
    put(&mut truth, 9 * MIB, &all);
    let raw = lab.write("truth.raw", &truth);
    lab.compare_with(&path, &raw, "on a fixed disk");
    6
}

fn vdi(lab: &Lab) -> u32 {
    let mut rng = Rng::new(7);
    for (options, size) in [("static=off", 9 * MIB + 512 * 5), ("static=on", 5 * MIB)] {
        let path = create(lab, "vdi", "disk.vdi", options, size);
        lab.scribble(&path, "vdi", size, true, &mut rng);
        lab.compare(&path, "vdi", options);
    }
    1
}

#[test]
fn parents_are_accepted_by_their_content_only() {
    let lab = Lab::new();
    let base = create(&lab, "vhdx", "base.vhdx", "block_size=1M", MIB);
    let id = vhdx_content_id(&fs::read(&base).expect("read"));
    let all: Sectors = [(3, [7; 512])].into();
    let child = |parent, paths: &[(&str, &str)]| {
        let child = VhdxChild { id: [1; 16], parent, paths, size: MIB, block: MIB, sectors: &all, zero_blocks: &[] };
        lab.write("child.avhdx", child.bytes())
    };
    let refused = |path: &Path| match lab.open(path) {
        Err(Error::Format(error)) => error,
        other => panic!("{}: {other:?}", path.display()),
    };
    assert!(lab.open(&child(id, &[("relative_path", "..\\elsewhere\\base.vhdx")])).is_ok(), "found beside it");
    let other = refused(&child([8; 16], &[("relative_path", "base.vhdx")]));
    assert!(matches!(other, FormatError::ChainBroken { .. }), "{other}");
    assert!(matches!(refused(&child(id, &[("relative_path", "gone.vhdx")])), FormatError::ChainBroken { .. }));
    assert!(matches!(refused(&child(id, &[])), FormatError::ChainBroken { .. }), "no name at all");
    assert!(
        matches!(refused(&child([1; 16], &[("relative_path", "child.avhdx")])), FormatError::ChainBroken { .. }),
        "a cycle"
    );
    let away = refused(&child(id, &[("relative_path", "..\\..\\..\\etc\\hostname")]));
    assert!(matches!(away, FormatError::Refused { .. }), "{away}");

    // A write to the base changes its content id: what stood on it is no longer what it was.
    let before = child(id, &[("relative_path", "base.vhdx")]);
    qemu::io(&base, "vhdx", &["write -P 1 0 64k".into()]);
    let changed = Vhdx::open(std::sync::Arc::new(FileStorage::open(&base, Access::ReadOnly).expect("open")));
    assert!(changed.is_ok());
    assert!(matches!(refused(&before), FormatError::ChainBroken { .. }), "changed under its child");
}
