//! What holds a machine's disks: OVA, packed by `tar`, Proxmox VE's VMA, datastores of Proxmox Backup Server.

use std::{fs, path::Path, process::Command};

use aquifer_formats::Error as FormatError;
use aquifer_tests::{
    chains::open,
    foreign::{assert_same, check_reads, pbs, pypi, vma, xva},
    qemu,
    rng::Rng,
};
use aquifer_vdisk::{ChainSpec, Delta, Error, KeyPlace, delta_between, members};

use super::{Lab, MIB, Sample};

pub(super) const SAMPLES: [Sample; 6] = [
    Sample {
        format: "ova",
        what: "two streamOptimized disks, packed by `tar`",
        oracle: "qemu-img and the source",
        compare: ova,
    },
    Sample {
        format: "vma",
        what: "two disks, clusters mixed and out of order, own writer",
        oracle: "dissect and the source",
        compare: vma_plain,
    },
    Sample {
        format: "vma",
        what: "a disk that ends within a cluster, own writer",
        oracle: "dissect and the source",
        compare: vma_odd,
    },
    Sample {
        format: "xva",
        what: "two disks with checksums, one ends within a block, empty members between, packed by `tar`",
        oracle: "dissect up to each last block, and the source",
        compare: xva_export,
    },
    Sample {
        format: "pbs",
        what: "a datastore with three snapshots of two disks, own writer",
        oracle: "the source",
        compare: pbs_snapshots,
    },
    Sample {
        format: "pbs",
        what: "encrypted snapshots with a key file, own writer",
        oracle: "the source; seals by OpenSSL and Python in the unit tests",
        compare: pbs_encrypted,
    },
];

pub(super) fn member(lab: &Lab, path: &Path, member: &str) -> Result<aquifer_vdisk::Chain, Error> {
    open(&ChainSpec::Member { path: path.into(), member: member.into() }, &lab.cache)
}

pub(super) fn compare(lab: &Lab, path: &Path, name: &str, truth: &[u8]) {
    let raw = lab.write("truth.raw", truth);
    let chain = member(lab, path, name).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(assert_same(&chain, &raw, name) > 0);
    check_reads(&chain, &mut Rng::new(1));
}

pub(super) fn content(lab: &Lab, size: usize, seed: u64) -> Vec<u8> {
    let pattern = fs::read(lab.path("pattern")).expect("pattern");
    let mut rng = Rng::new(seed);
    let mut bytes = vec![0u8; size];
    for _ in 0..12 {
        let at = rng.below(size as u64 / 512) as usize * 512;
        let len = (512 * (1 + rng.below(400)) as usize).min(size - at);
        bytes[at..at + len].copy_from_slice(&pattern[..len]);
    }
    bytes
}

fn xva_export(lab: &Lab) -> u32 {
    let disks = [content(lab, 9 * MIB as usize, 21), content(lab, 3 * MIB as usize + 512 * 5, 22)];
    let path = lab.path("m.xva");
    xva::export(&lab.path("members"), &path, &[("xvda", &disks[0]), ("xvdb", &disks[1])]);
    assert_eq!(members(&path).expect("an archive"), ["xvda", "xvdb"]);
    compare(lab, &path, "xvda", &disks[0]);
    compare(lab, &path, "xvdb", &disks[1]);
    let Some(dissect) = pypi::dissect() else { return 0 };
    for (reference, disk) in ["Ref:10", "Ref:11"].into_iter().zip(&disks) {
        dissect.xva(&path, reference, &lab.path("theirs"));
        let theirs = fs::read(lab.path("theirs")).expect("read");
        // This release of it leaves out the last member of each disk.
        let last = (disk.len() - 1) / MIB as usize * MIB as usize;
        assert!(theirs.len() == disk.len() && theirs[..last] == disk[..last], "{reference}");
    }
    1
}

/// Dissect reads of an archive what it was made of; `None` where it cannot be had.
fn dissected(lab: &Lab, path: &Path, disks: &[(&str, &[u8])]) -> Option<()> {
    let dissect = pypi::dissect()?;
    for (name, disk) in disks {
        dissect.vma(path, name, &lab.path("theirs"));
        assert!(fs::read(lab.path("theirs")).expect("read") == *disk, "{name}");
    }
    Some(())
}

fn ova(lab: &Lab) -> u32 {
    let disks = [content(lab, 5 * MIB as usize, 1), content(lab, 3 * MIB as usize, 2)];
    for (number, bytes) in disks.iter().enumerate() {
        let raw = lab.write("content.raw", bytes);
        let path = lab.path(&format!("m-disk{number}.vmdk"));
        qemu::from_raw(&raw, &path, "vmdk", "subformat=streamOptimized");
    }
    lab.write("m.ovf", "<Envelope/>");
    for format in ["ustar", "gnu", "pax"] {
        let packed = Command::new("tar")
            .current_dir(lab.dir.path())
            .args([&format!("--format={format}"), "-cf", "m.ova", "m.ovf", "m-disk0.vmdk", "m-disk1.vmdk"])
            .status();
        assert!(packed.expect("tar runs").success());
        let path = lab.path("m.ova");
        assert_eq!(members(&path).expect("an archive"), ["m-disk0.vmdk", "m-disk1.vmdk"]);
        for (number, bytes) in disks.iter().enumerate() {
            compare(lab, &path, &format!("m-disk{number}.vmdk"), bytes);
        }
        assert!(lab.open(&path).is_err(), "which disk has to be said");
    }
    // A cut download.
    let bytes = fs::read(lab.path("m.ova")).expect("read");
    let cut = lab.write("cut.ova", &bytes[..bytes.len() / 2]);
    let error = member(lab, &cut, "m-disk0.vmdk").expect_err("torn");
    assert!(matches!(error, Error::Format(FormatError::Truncated { .. })), "{error}");
    1
}

fn vma_plain(lab: &Lab) -> u32 {
    let disks = [content(lab, 20 * MIB as usize, 3), content(lab, 3 * MIB as usize, 4)];
    let named = [("drive-scsi0", &disks[0][..]), ("drive-virtio1", &disks[1])];
    let path = lab.write("m.vma", vma::archive(&named, &mut Rng::new(5)));
    assert_eq!(members(&path).expect("an archive"), ["drive-scsi0", "drive-virtio1"]);
    compare(lab, &path, "drive-scsi0", &disks[0]);
    compare(lab, &path, "drive-virtio1", &disks[1]);
    dissected(lab, &path, &named).map_or(0, |()| 1)
}

fn vma_odd(lab: &Lab) -> u32 {
    let disk = content(lab, MIB as usize + 512 * 77, 6);
    let path = lab.write("m.vma", vma::archive(&[("drive-ide0", &disk)], &mut Rng::new(7)));
    compare(lab, &path, "drive-ide0", &disk);
    dissected(lab, &path, &[("drive-ide0", &disk)]).map_or(0, |()| 1)
}

#[test]
fn a_compressed_archive_is_refused_by_name() {
    let lab = Lab::new();
    let disk = content(&lab, MIB as usize, 8);
    let path = lab.write("m.vma", vma::archive(&[("drive-ide0", &disk)], &mut Rng::new(9)));
    for (tool, name) in [("zstd", "m.vma.zst"), ("gzip", "m.vma.gz")] {
        assert!(Command::new(tool).args(["-q", "-k", "-f"]).arg(&path).status().expect("it runs").success());
        let error = lab.open(&lab.path(name)).expect_err("compressed").to_string();
        assert!(error.contains(tool) && error.contains(name), "{error}");
        assert!(members(&lab.path(name)).expect("no archive").is_empty());
    }
}

fn pbs_snapshots(lab: &Lab) -> u32 {
    const CHUNK: usize = 1 << 20;
    let store = lab.path("datastore");
    let mut disks = [content(lab, 20 * CHUNK, 5), content(lab, 3 * CHUNK + 4096, 6)];
    for point in 0..3u8 {
        let changed = usize::from(point) * 5 * CHUNK;
        disks[0][changed..changed + 70_000].fill(point + 1);
        let time = format!("2026-11-0{}T00:00:00Z", point + 1);
        let named = [("drive-scsi0", &disks[0][..]), ("drive-scsi1", &disks[1][..])];
        let folder = pbs::snapshot(&store, &time, 1_793_500_000 + i64::from(point), CHUNK, &named);
        for (name, bytes) in named {
            let raw = lab.write("truth.raw", bytes);
            let chain = lab.open(&folder.join(format!("{name}.img.fidx"))).expect("opens");
            assert!(assert_same(&chain, &raw, name) > 0);
            check_reads(&chain, &mut Rng::new(1));
        }
    }
    let at = |point: u8| {
        let folder = store.join(format!("vm/100/2026-11-0{point}T00:00:00Z"));
        lab.open(&folder.join("drive-scsi0.img.fidx")).expect("opens")
    };
    let changed: Delta = std::iter::once(10 * MIB..11 * MIB).collect();
    assert_eq!(delta_between(&at(2), &at(3)).expect("compares"), changed, "by the indexes alone");
    // What one snapshot has lost, the others that share it have lost too; the rest reads on.
    fs::remove_file(pbs::chunk_path(&store, &disks[0][10 * CHUNK..11 * CHUNK])).expect("remove");
    let last = lab.open(&store.join("vm/100/2026-11-03T00:00:00Z/drive-scsi0.img.fidx")).expect("opens");
    let mut buf = vec![0; CHUNK];
    assert!(last.read(10 * CHUNK as u64, &mut buf).is_err(), "missing is an error");
    last.read(9 * CHUNK as u64, &mut buf).expect("beside it");
    assert_eq!(buf, disks[0][9 * CHUNK..10 * CHUNK]);
    3
}

fn pbs_encrypted(lab: &Lab) -> u32 {
    const CHUNK: usize = 1 << 20;
    let (store, key) = (lab.path("datastore"), [0x42; 32]);
    let place = KeyPlace { file: lab.write("key", pbs::key_file(&key)), passphrase: None };
    let mut disk = content(lab, 12 * CHUNK + 4096, 5);
    let spec = |folder: &Path, key: Option<&KeyPlace>| ChainSpec::Snapshot {
        path: folder.join("drive-scsi0.img.fidx"),
        key: key.cloned(),
    };
    let mut folders = Vec::new();
    for point in 0..2u8 {
        disk[5 * CHUNK..5 * CHUNK + 70_000].fill(point + 1);
        let time = format!("2026-11-0{}T00:00:00Z", point + 1);
        let named = [("drive-scsi0", &disk[..])];
        let folder = pbs::encrypted(&store, &time, 1_793_500_000 + i64::from(point), CHUNK, &named, &key);
        let raw = lab.write("truth.raw", &disk);
        let chain = open(&spec(&folder, Some(&place)), &lab.cache).expect("opens");
        assert!(assert_same(&chain, &raw, "encrypted") > 0);
        check_reads(&chain, &mut Rng::new(1));
        folders.push(folder);
    }
    let [old, new] = [0, 1].map(|point| open(&spec(&folders[point], Some(&place)), &lab.cache).expect("opens"));
    let changed: Delta = std::iter::once(5 * MIB..6 * MIB).collect();
    assert_eq!(delta_between(&old, &new).expect("compares"), changed, "by the indexes alone");
    // Without the key, and with another one: an error of its own kind, and no bytes.
    let other = KeyPlace { file: lab.write("other", pbs::key_file(&[1; 32])), passphrase: None };
    for key in [None, Some(&other)] {
        let chain = open(&spec(&folders[0], key), &lab.cache).expect("the index is not encrypted");
        let error = chain.read(5 * MIB, &mut [0; 512]).expect_err("sealed");
        assert!(matches!(error, Error::Format(FormatError::Key { .. })), "{error}");
    }
    2
}
