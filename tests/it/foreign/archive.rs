//! What holds a machine's disks: OVA, packed by `tar`, Proxmox VE's VMA, datastores of Proxmox Backup Server.

use std::{fs, path::Path, process::Command};

use aquifer_formats::Error as FormatError;
use aquifer_tests::{
    chains::open,
    foreign::{assert_same, check_reads, pbs, vma},
    qemu,
    rng::Rng,
};
use aquifer_vdisk::{ChainSpec, Error, members};

use super::{Lab, MIB, Sample};

pub(super) const SAMPLES: [Sample; 4] = [
    Sample {
        format: "ova",
        what: "two streamOptimized disks, packed by `tar`",
        oracle: "qemu-img and the source",
        compare: ova,
    },
    Sample {
        format: "vma",
        what: "two disks, clusters mixed and out of order, own writer",
        oracle: "the source",
        compare: vma_plain,
    },
    Sample {
        format: "vma",
        what: "a disk that ends within a cluster, own writer",
        oracle: "the source",
        compare: vma_odd,
    },
    Sample {
        format: "pbs",
        what: "a datastore with three snapshots of two disks, own writer",
        oracle: "the source",
        compare: pbs_snapshots,
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

fn ova(lab: &Lab) -> u32 {
    let disks = [content(lab, 5 * MIB as usize, 1), content(lab, 3 * MIB as usize, 2)];
    for (number, bytes) in disks.iter().enumerate() {
        let raw = lab.write("content.raw", bytes);
        let path = lab.path(&format!("m-disk{number}.vmdk"));
        qemu::img(&[
            "convert",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            "subformat=streamOptimized",
            qemu::text(&raw),
            qemu::text(&path),
        ]);
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
    let path =
        lab.write("m.vma", vma::archive(&[("drive-scsi0", &disks[0]), ("drive-virtio1", &disks[1])], &mut Rng::new(5)));
    assert_eq!(members(&path).expect("an archive"), ["drive-scsi0", "drive-virtio1"]);
    compare(lab, &path, "drive-scsi0", &disks[0]);
    compare(lab, &path, "drive-virtio1", &disks[1]);
    1
}

fn vma_odd(lab: &Lab) -> u32 {
    let disk = content(lab, MIB as usize + 512 * 77, 6);
    let path = lab.write("m.vma", vma::archive(&[("drive-ide0", &disk)], &mut Rng::new(7)));
    compare(lab, &path, "drive-ide0", &disk);
    1
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
    // What one snapshot has lost, the others that share it have lost too; the rest reads on.
    fs::remove_file(pbs::chunk_path(&store, &disks[0][10 * CHUNK..11 * CHUNK])).expect("remove");
    let last = lab.open(&store.join("vm/100/2026-11-03T00:00:00Z/drive-scsi0.img.fidx")).expect("opens");
    let mut buf = vec![0; CHUNK];
    assert!(last.read(10 * CHUNK as u64, &mut buf).is_err(), "missing is an error");
    last.read(9 * CHUNK as u64, &mut buf).expect("beside it");
    assert_eq!(buf, disks[0][9 * CHUNK..10 * CHUNK]);
    3
}
