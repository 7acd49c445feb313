//! Stores whose disks lie in many objects: remotes of Xen Orchestra, backup stores of Longhorn, storages of Benji.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use aquifer_formats::{Error as FormatError, probe::Format};
use aquifer_tests::{
    chains::open,
    foreign::{
        longhorn,
        peers::{Benji, VhdLib},
        xo::{self, Filter},
    },
    rng::Rng,
};
use aquifer_vdisk::{ChainSpec, Error, members};

use super::{Lab, MIB, Sample, packed};

pub(super) const REMOTES: [Sample; 3] = [
    Sample {
        format: "xo",
        what: "a full and three increments in parts, plain, gzip and Brotli, own writer",
        oracle: "the source",
        compare: own_remotes,
    },
    Sample {
        format: "xo",
        what: "a full and two increments in Brotli, by vhd-lib from npm",
        oracle: "vhd-lib and the source",
        compare: remote_of_vhd_lib,
    },
    Sample {
        format: "xo",
        what: "increments in parts on a VHD file by qemu-img, own writer",
        oracle: "qemu-img and the source",
        compare: parts_on_a_file,
    },
];

pub(super) const BACKUPS: [Sample; 2] = [
    Sample {
        format: "longhorn",
        what: "three backups that share blocks in gzip, LZ4 and plain, packed by `gzip` and `lz4`",
        oracle: RESTORED,
        compare: longhorn_backups,
    },
    Sample { format: "longhorn", what: "a backup in blocks of 16 MiB", oracle: RESTORED, compare: longhorn_large },
];

/// No reader but the product itself is to be had for it.
const RESTORED: &str = "own restore in Python, by hashlib, `gzip` and `lz4`, and the source";

pub(super) const VERSIONS: [Sample; 1] = [Sample {
    format: "benji",
    what: "two versions by Benji from PyPI, in zstd",
    oracle: "`benji restore`",
    compare: benji_versions,
}];

/// What a disk is at some points: it ends within a block, and parts of it become zeros.
fn states(size: u64, count: usize, seed: u64) -> Vec<Vec<u8>> {
    let mut rng = Rng::new(seed);
    let mut disk = vec![0; size as usize];
    (0..count)
        .map(|_| {
            for _ in 0..6 {
                let at = rng.below(size / 512) * 512;
                let len = (512 * (1 + rng.below(1500))).min(size - at);
                let part = &mut disk[at as usize..(at + len) as usize];
                match rng.below(4) {
                    0 => part.fill(0),
                    1 => part.fill(rng.next_u64().to_le_bytes()[0]),
                    _ => {
                        part.chunks_mut(8).for_each(|to| to.copy_from_slice(&rng.next_u64().to_le_bytes()[..to.len()]))
                    }
                }
            }
            disk.clone()
        })
        .collect()
}

/// The only disk of the point at `path`.
fn point(path: &Path) -> ChainSpec {
    let names = members(path).expect("names");
    let [name] = names.as_slice() else { panic!("one disk: {names:?}") };
    ChainSpec::Member { path: path.into(), member: name.clone() }
}

fn compare_with(lab: &Lab, spec: &ChainSpec, truth: &[u8], what: &str) {
    let raw = lab.write("truth.raw", truth);
    // Room for all of a disk: blocks are large, and small reads would decode them again and again.
    let cache = std::sync::Arc::new(aquifer_vdisk::BlockCache::new(128 * MIB));
    let chain = open(spec, &cache).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(aquifer_tests::foreign::assert_same(&chain, &raw, what) > 0, "{what}: there is something to compare");
    aquifer_tests::foreign::check_reads(&chain, &mut Rng::new(chain.size()));
}

fn slices(states: &[Vec<u8>]) -> Vec<&[u8]> {
    states.iter().map(Vec::as_slice).collect()
}

fn own_remotes(lab: &Lab) -> u32 {
    let states = states(9 * MIB + 512 * 7, 4, 11);
    for (name, filter) in [("none", Filter::Unsaid), ("gzip", Filter::Gzip), ("brotli", Filter::Brotli)] {
        let points = xo::chain(&lab.path(name), &slices(&states), filter);
        for (path, state) in points.iter().zip(&states) {
            assert_eq!(aquifer_vdisk::format_of(path).expect("reads"), Some(Format::Xo));
            compare_with(lab, &point(path), state, name);
        }
        // An alias is a source of its own, and so is a folder of parts that stands on nothing.
        let folder = xo::machine(&lab.path(name)).join("vdis/job/xvda");
        compare_with(lab, &aquifer_tests::chains::image(&folder.join(xo::alias(3))), &states[2], "an alias");
        let footer = ChainSpec::Image {
            path: folder.join("data/1.vhd/footer"),
            format: Some(Format::Xo),
            allow_backing: Vec::new(),
            snapshot: None,
        };
        compare_with(lab, &footer, &states[0], "a folder");
    }
    4
}

fn remote_of_vhd_lib(lab: &Lab) -> u32 {
    let Some(peer) = VhdLib::get() else { return 0 };
    let states = states(7 * MIB + 512, 3, 12);
    let root = lab.path("remote");
    let folder = format!("xo-vm-backups/{}/vdis/job/xvda", xo::MACHINE);
    fs::create_dir_all(root.join(&folder)).expect("a folder");
    let mut words: Vec<PathBuf> = vec!["write".into(), root.clone(), "brotli".into()];
    for (number, state) in states.iter().enumerate() {
        let alias = xo::alias(number + 1);
        words.extend([PathBuf::from(format!("{folder}/{alias}")), lab.write(&format!("{number}.raw"), state)]);
    }
    peer.run(&words.iter().map(|word| word.as_os_str()).collect::<Vec<_>>());
    for (number, state) in states.iter().enumerate() {
        let alias = xo::alias(number + 1);
        let path = xo::describe(&root, number + 1, &[("xvda", state.len(), &alias)]);
        let read = lab.path("read.raw");
        let alias = format!("{folder}/{alias}");
        peer.run(&["read".as_ref(), root.as_os_str(), OsStr::new(&alias), read.as_os_str()]);
        let theirs = fs::read(&read).expect("what the library read");
        assert!(theirs == *state, "the library reads what it wrote");
        compare_with(lab, &point(&path), &theirs, "of vhd-lib");
    }
    3
}

fn parts_on_a_file(lab: &Lab) -> u32 {
    let states = states(8 * MIB, 3, 13);
    let root = lab.path("remote");
    let points = xo::chain(&root, &slices(&states), Filter::Gzip);
    // The full one becomes a file, with the id that its child has recorded.
    let folder = xo::machine(&root).join("vdis/job/xvda");
    let (raw, file) = (lab.write("full.raw", &states[0]), lab.path("full.vhd"));
    aquifer_tests::qemu::from_raw(&raw, &file, "vpc", "subformat=dynamic,force_size=on");
    let mut bytes = fs::read(&file).expect("read");
    let id = fs::read(folder.join("data/1.vhd/footer")).map(|part| unzipped(&part)[68..84].to_vec()).expect("read");
    let end = bytes.len() - 512;
    for at in [0, end] {
        bytes[at + 68..at + 84].copy_from_slice(&id);
        bytes[at + 64..at + 68].fill(0);
        let sum: u32 = bytes[at..at + 512].iter().map(|byte| u32::from(*byte)).sum();
        bytes[at + 64..at + 68].copy_from_slice(&(!sum).to_be_bytes());
    }
    fs::remove_file(folder.join(xo::alias(1))).expect("remove");
    fs::write(folder.join(xo::alias(1)), bytes).expect("write");
    for (path, state) in points.iter().zip(&states) {
        compare_with(lab, &point(path), state, "on a file");
    }
    3
}

fn unzipped(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(bytes), &mut out).expect("gzip");
    out
}

fn longhorn_backups(lab: &Lab) -> u32 {
    let states = states(12 * MIB, 3, 14);
    let store = lab.path("store");
    let mut paths = Vec::new();
    for (number, (method, state)) in ["gzip", "lz4", "none"].into_iter().zip(&states).enumerate() {
        paths.push(longhorn::backup(&store, &format!("b{number}"), number + 1, method, 2 << 20, state));
    }
    for (number, (path, state)) in paths.iter().zip(&states).enumerate() {
        restored(lab, &format!("b{number}"), path, state);
    }
    3
}

/// Compares a backup with what it restores to, and that with what it was made of.
fn restored(lab: &Lab, name: &str, path: &Path, state: &[u8]) {
    let back = lab.path("back.raw");
    longhorn::restore(&lab.path("store"), name, &back);
    let back = fs::read(back).expect("restored");
    assert!(back == state, "{name} restores to what it was made of");
    compare_with(lab, &point(path), &back, name);
}

fn longhorn_large(lab: &Lab) -> u32 {
    let state = &states(20 * MIB, 1, 15)[0];
    let path = longhorn::backup(&lab.path("store"), "b", 1, "lz4", 16 << 20, state);
    restored(lab, "b", &path, state);
    1
}

fn benji_versions(lab: &Lab) -> u32 {
    let Some(peer) = Benji::get() else { return 0 };
    let folder = lab.path("benji");
    peer.begin(&folder, Some("zstd"));
    let states = states(9 * MIB + 512 * 3, 2, 16);
    let mut known: Vec<PathBuf> = Vec::new();
    for state in &states {
        let raw = lab.write("disk.raw", state);
        peer.run(&folder, &["backup", &format!("file:{}", raw.display()), "vol"]);
        let stored = aquifer_formats::benji::versions(&folder.join("data")).expect("lists").expect("a storage");
        let new = stored.into_iter().find(|stored| !known.contains(&stored.path)).expect("one more");
        let [version] = new.versions.as_ref().expect("reads").as_slice() else { panic!("one version") };
        assert_eq!((version.volume(), version.size()), ("vol", state.len() as u64));
        assert_eq!(aquifer_vdisk::format_of(&new.path).expect("reads"), Some(Format::Benji));
        // What is restored is compared at the last point: each run of the program takes its time.
        if known.len() + 1 == states.len() {
            let back = lab.path("back.raw");
            peer.run(&folder, &["restore", "--sparse", version.uid(), &format!("file:{}", back.display())]);
            assert!(fs::read(&back).expect("restored") == *state, "Benji restores what it was given");
        }
        compare_with(lab, &point(&new.path), state, "benji");
        known.push(new.path);
    }
    2
}

#[test]
fn what_a_store_lost_is_an_error_for_its_range_only() {
    let lab = Lab::new();
    let state = &states(8 * MIB, 1, 17)[0];
    let path = longhorn::backup(&lab.path("store"), "b", 1, "gzip", 2 << 20, state);
    let blocks = longhorn::volume_folder(&lab.path("store"), "pvc-1").join("blocks");
    let chain = open(&point(&path), &lab.cache).expect("opens");
    let stored = packed(&chain);
    assert!(stored.len() > 1);
    let (_, lost) = stored[stored.len() - 1];
    // Everything but the first block's file goes.
    let first = fs::read_to_string(&path).expect("read");
    let kept = first.split("BlockChecksum\":\"").nth(1).expect("a block")[..64].to_owned();
    for file in walk(&blocks) {
        if !file.display().to_string().contains(&kept) {
            fs::remove_file(file).expect("remove");
        }
    }
    let chain = open(&point(&path), &std::sync::Arc::new(aquifer_vdisk::BlockCache::new(MIB))).expect("opens");
    let mut page = vec![0xee; 4096];
    let error = chain.read(lost.offset, &mut page).expect_err("it is gone");
    assert!(matches!(&error, Error::Format(FormatError::ChainBroken { .. })), "{error}");
    let (_, first) = stored[0];
    chain.read(first.offset, &mut page).expect("it is still there");
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn a_remote_that_is_being_merged_is_refused() {
    let lab = Lab::new();
    let states = states(4 * MIB, 2, 18);
    let points = xo::chain(&lab.path("remote"), &slices(&states), Filter::Unsaid);
    let folder = xo::machine(&lab.path("remote")).join("vdis/job/xvda");
    let chain = open(&point(&points[0]), &lab.cache).expect("opens");
    let state = folder.join(format!(".{}.merge.json", xo::alias(1)));
    fs::write(&state, "{}").expect("write");
    let error = open(&point(&points[1]), &lab.cache).expect_err("a merge is under way");
    assert!(error.to_string().contains("merging"), "{error}");
    let mut disk = vec![0; 4 << 20];
    assert!(chain.read(0, &mut disk).is_err(), "one that was open notices");
    fs::remove_file(&state).expect("remove");
    chain.read(0, &mut disk).expect("nothing happened");
    assert!(disk == states[0]);
    // The parent is another disk now.
    fs::rename(folder.join("data/1.vhd"), folder.join("data/old")).expect("rename");
    let other = xo::Parts { number: 9, disk: &states[0], parent: None, filter: Filter::Unsaid, block: xo::BLOCK };
    other.write(&folder.join("data/1.vhd"));
    let error = open(&point(&points[1]), &lab.cache).expect_err("it was not made on that");
    assert!(matches!(&error, Error::Format(FormatError::ChainBroken { .. })), "{error}");
}

#[test]
fn names_that_lead_out_of_a_remote_are_refused() {
    let lab = Lab::new();
    let states = states(4 * MIB, 1, 19);
    let points = xo::chain(&lab.path("remote"), &slices(&states), Filter::Unsaid);
    let alias = xo::machine(&lab.path("remote")).join("vdis/job/xvda").join(xo::alias(1));
    let other = xo::Parts { number: 1, disk: &states[0], parent: None, filter: Filter::Unsaid, block: xo::BLOCK };
    other.write(&lab.path("elsewhere.vhd"));
    for target in [lab.path("elsewhere.vhd").display().to_string(), "../../../../../../elsewhere.vhd".into()] {
        fs::write(&alias, target).expect("write");
        let error = open(&point(&points[0]), &lab.cache).expect_err("outside");
        assert!(matches!(&error, Error::Format(FormatError::Refused { .. })), "{error}");
    }
}

#[test]
fn an_encrypted_storage_is_refused_by_name() {
    let lab = Lab::new();
    let Some(peer) = Benji::get() else { return };
    peer.begin(&lab.path("benji"), Some("aes_256_gcm"));
    let raw = lab.write("disk.raw", &states(5 * MIB, 1, 20)[0]);
    peer.run(&lab.path("benji"), &["backup", &format!("file:{}", raw.display()), "vol"]);
    let stored = aquifer_formats::benji::versions(&lab.path("benji/data")).expect("lists").expect("a storage");
    let error = stored[0].versions.as_ref().expect_err("encrypted");
    assert!(matches!(error, FormatError::Unsupported { .. }) && error.to_string().contains("aes_256_gcm"), "{error}");
}
