//! Tables that real tools write, damage, and whatever else a guest may have written.

use std::{io::Write, process::Stdio, sync::Arc};

use aquifer_formats::{raw::RawLayer, storage::MemoryStorage};
use aquifer_vdisk::{BlockCache, Chain};
use proptest::prelude::*;

use super::*;

/// A disk over bytes.
pub(in crate::host) fn disk(name: &str, bytes: Vec<u8>) -> Disk {
    let layer = RawLayer::open(Arc::new(MemoryStorage::new(name, bytes))).expect("layer");
    Disk::read_only(
        name,
        Arc::new(Chain::new(vec![Arc::new(layer)], Arc::new(BlockCache::new(1 << 20))).expect("chain")),
    )
}

/// What a partitioning tool makes of a script on an empty image.
fn partitioned(mib: usize, tool: &str, options: &[&str], script: &str) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().expect("file");
    file.as_file().set_len((mib as u64) << 20).expect("size");
    let mut tool = std::process::Command::new(tool)
        .args(options)
        .arg(file.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("the tool is installed");
    tool.stdin.take().expect("stdin").write_all(script.as_bytes()).expect("script");
    assert!(tool.wait().expect("tool").success());
    std::fs::read(file.path()).expect("image")
}

pub(in crate::host) fn sfdisk(mib: usize, script: &str) -> Vec<u8> {
    partitioned(mib, "sfdisk", &["--quiet", "--no-tell-kernel"], script)
}

pub(in crate::host) const ESP: &str = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";
pub(in crate::host) const BIOS_BOOT: &str = "21686148-6449-6E6F-744E-656564454649";
const LINUX: &str = "0FC63DAF-8483-4772-8E79-3D69D8477DE4";

fn table(bytes: Vec<u8>) -> Table {
    Table::read(&disk("d", bytes)).expect("read")
}

#[test]
fn tables_that_sfdisk_writes() {
    let gpt = |types: &[&str]| {
        let parts: String = types.iter().map(|t| format!("size=2MiB, type={t}\n")).collect();
        table(sfdisk(32, &format!("label: gpt\n{parts}")))
    };
    let kinds = |esp, bios_boot, count| Kinds { esp, bios_boot, count };
    assert_eq!(gpt(&[LINUX]), Table::Gpt(kinds(false, false, 1)));
    assert_eq!(gpt(&[LINUX, ESP]), Table::Gpt(kinds(true, false, 2)));
    assert_eq!(gpt(&[BIOS_BOOT, LINUX]), Table::Gpt(kinds(false, true, 2)));
    assert_eq!(gpt(&[BIOS_BOOT, ESP, LINUX]), Table::Gpt(kinds(true, true, 3)));
    assert_eq!(gpt(&[]), Table::Gpt(kinds(false, false, 0)));

    let mbr = |script: &str| table(sfdisk(32, &format!("label: dos\n{script}")));
    assert_eq!(mbr("type=83"), Table::Mbr(kinds(false, false, 1)));
    assert_eq!(mbr("size=4MiB, type=ef\ntype=83"), Table::Mbr(kinds(true, false, 2)));
    let logical =
        "size=4MiB, type=83\nsize=20MiB, type=5\nstart=6MiB, size=4MiB, type=83\nstart=12MiB, size=4MiB, type=ef\n";
    assert_eq!(mbr(logical), Table::Mbr(kinds(true, false, 4)), "an ESP among the logical partitions");
}

#[test]
fn disks_without_a_table() {
    assert_eq!(table(vec![0; 1 << 20]), Table::None);
    assert_eq!(table(vec![0; 100]), Table::None, "shorter than a sector");
    let mut boot = vec![0; 1 << 20];
    boot[510..512].copy_from_slice(&[0x55, 0xaa]);
    assert_eq!(table(boot.clone()), Table::None, "only the signature");
    // A file system's boot sector: text where the partition table would be.
    boot[446..510].copy_from_slice(&[b'x'; 64]);
    assert_eq!(table(boot), Table::None);
}

#[test]
fn sectors_of_4096_bytes() {
    let small = partitioned(32, "fdisk", &["--sector-size", "4096"], "g\nn\n\n\n+2M\nt\n1\nw\n");
    assert_eq!(&small[4096..4104], b"EFI PART", "sfdisk made what is tested");
    assert!(matches!(table(small), Table::Gpt(Kinds { esp: true, .. })));
}

#[test]
fn the_copy_at_the_end_serves_when_the_first_is_damaged() {
    let good = sfdisk(32, &format!("label: gpt\nsize=2MiB, type={ESP}\n"));
    for at in [512 + 16, 512 + 72, 1024, 1024 + 60] {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        assert!(matches!(table(bad.clone()), Table::Gpt(Kinds { esp: true, .. })), "flip at {at}");
        let last = bad.len() - 512;
        bad[last + 20] ^= 1;
        bad[last + 16] ^= 1;
        assert_eq!(table(bad), Table::Damaged("gpt"), "both, flip at {at}");
    }
    let mut gone = good;
    gone[512..1024].fill(0);
    assert_eq!(table(gone), Table::Damaged("gpt"), "a protective record over nothing");
}

#[test]
fn a_leftover_gpt_header_does_not_outvote_the_mbr_when_damaged() {
    let mut bytes = sfdisk(32, "label: dos\ntype=83");
    bytes[512..520].copy_from_slice(b"EFI PART");
    assert!(matches!(table(bytes), Table::Mbr(_)));
}

#[test]
fn a_loop_of_logical_partitions_ends() {
    let mut bytes =
        sfdisk(32, "label: dos\nsize=28MiB, type=5\nstart=2MiB, size=4MiB, type=83\nstart=8MiB, size=4MiB, type=83\n");
    let start = u32::from_le_bytes(bytes[446 + 8..446 + 12].try_into().expect("4"));
    let first = start as usize * 512;
    assert_eq!(bytes[first + 446 + 16 + 4], 5, "a link");
    for back in [0u32, 1, u32::MAX] {
        bytes[first + 446 + 16 + 8..first + 446 + 16 + 12].copy_from_slice(&back.to_le_bytes());
        assert!(matches!(table(bytes.clone()), Table::Mbr(_)));
    }
}

proptest! {
    /// Whatever a guest wrote there: an answer, in bounded time and memory.
    #[test]
    fn any_bytes_give_an_answer(flips in prop::collection::vec((0usize..0x4400, any::<u8>()), 0..40), fix in any::<bool>()) {
        static IMAGE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let image = IMAGE.get_or_init(|| {
            let logical = format!("label: gpt\nsize=2MiB, type={ESP}\nsize=2MiB, type={LINUX}\n");
            sfdisk(8, &logical)
        });
        let mut bytes = image.clone();
        for (at, value) in flips {
            bytes[at] = value;
        }
        if fix {
            // With the header's checksum right, its fields are what protects us.
            bytes[512 + 16..512 + 20].fill(0);
            let crc = crc32(&bytes[512..512 + 92]);
            bytes[512 + 16..512 + 20].copy_from_slice(&crc.to_le_bytes());
        }
        let _ = table(bytes);
    }
}
