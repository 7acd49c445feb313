//! Archives made by hand. Larger ones of our own writer are compared in `tests/it/foreign/archive.rs`.

#![expect(clippy::cast_possible_truncation, reason = "test archives are small")]

use std::io;

use super::*;
use crate::{Content, Layer, storage::MemoryStorage};

const CLUSTER: u64 = 64 << 10;

/// Two disks of 3 and 1 clusters and a memory; one extent with all of the first and nothing of the second.
struct Made {
    header: Vec<u8>,
    extents: Vec<Vec<u8>>,
}

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    bytes[at..at + part.len()].copy_from_slice(part);
}

/// An extent: mask, device and cluster of each entry; the stored blocks count up.
fn extent(infos: &[(u16, u8, u32)]) -> Vec<u8> {
    let mut head = vec![0; 512];
    put(&mut head, 0, b"VMAE");
    put(&mut head, 8, &[5; 16]);
    let mut blocks = 0u16;
    for (number, (mask, id, index)) in infos.iter().enumerate() {
        let info = u64::from(*mask) << 48 | u64::from(*id) << 32 | u64::from(*index);
        put(&mut head, 40 + 8 * number, &info.to_be_bytes());
        blocks += mask.count_ones() as u16;
    }
    put(&mut head, 6, &blocks.to_be_bytes());
    seal(&mut head, 24);
    for block in 0..blocks {
        head.extend([block as u8 + 1; 4096]);
    }
    head
}

fn seal(bytes: &mut [u8], at: usize) {
    put(bytes, at, &[0; 16]);
    let sum = md5(&bytes[..bytes.len().min(if at == 24 { 512 } else { usize::MAX })]);
    put(bytes, at, &sum);
}

impl Made {
    fn new() -> Self {
        let mut header = vec![0; 12_288 + 512];
        put(&mut header, 0, b"VMA\0\0\0\0\x01");
        put(&mut header, 8, &[5; 16]);
        put(&mut header, 48, &12_288u32.to_be_bytes());
        put(&mut header, 52, &453u32.to_be_bytes());
        put(&mut header, 56, &12_800u32.to_be_bytes());
        let names = [("drive-scsi0\0", 1, 3 * CLUSTER), ("drive-scsi1\0", 2, CLUSTER), ("vmstate\0", 3, CLUSTER)];
        let mut at = 1;
        for (name, id, size) in names {
            put(&mut header, 4096 + 32 * id, &(at as u32).to_be_bytes());
            put(&mut header, 4096 + 32 * id + 8, &size.to_be_bytes());
            put(&mut header, 12_288 + at, &(name.len() as u16).to_le_bytes());
            put(&mut header, 12_288 + at + 2, name.as_bytes());
            at += 2 + name.len();
        }
        seal(&mut header, 32);
        Self { header, extents: vec![extent(&[(0b101, 1, 2), (0xffff, 3, 0), (0, 1, 0), (1, 1, 1)])] }
    }

    fn open(&self) -> Result<Vma> {
        let bytes = [&self.header[..], &self.extents.concat()].concat();
        Vma::open(Arc::new(MemoryStorage::new("made.vma", bytes)))
    }
}

fn is_corrupt<T>(done: Result<T>) -> bool {
    matches!(done, Err(Error::Corrupt { .. }))
}

fn is_truncated<T>(done: Result<T>) -> bool {
    matches!(done, Err(Error::Truncated { .. }))
}

#[test]
fn clusters_are_found_wherever_they_lie() {
    let vma = Made::new().open().expect("opens");
    assert_eq!(vma.disks(), ["drive-scsi0", "drive-scsi1"]);
    assert!(vma.disk("vmstate").is_err() && vma.disk("x").is_err());
    let layer = vma.disk("drive-scsi0").expect("a disk");
    let data = 12_800 + 512;
    let plain = |block: u64, skip: u64| Content::Plain { file: 0, offset: data + 4096 * block + skip };
    assert_eq!(layer.lookup(5, u64::MAX).expect("all zeros"), (Content::Zero, CLUSTER - 5));
    assert_eq!(layer.lookup(CLUSTER + 7, u64::MAX).expect("one block"), (plain(18, 7), 4089));
    assert_eq!(layer.lookup(CLUSTER + 4096, CLUSTER).expect("zeros"), (Content::Zero, 15 * 4096));
    assert_eq!(layer.lookup(2 * CLUSTER, u64::MAX).expect("block 0"), (plain(0, 0), 4096));
    assert_eq!(layer.lookup(2 * CLUSTER + 4096, u64::MAX).expect("a gap"), (Content::Zero, 4096));
    assert_eq!(layer.lookup(2 * CLUSTER + 8200, u64::MAX).expect("block 2"), (plain(1, 8), 4088));
}

/// Bytes of the made archive with `extra` zeros behind it.
fn made_bytes(extra: usize) -> Vec<u8> {
    let made = Made::new();
    [&made.header[..], &made.extents.concat(), &vec![0; extra]].concat()
}

#[test]
fn a_wrapped_archive_comes_out_as_it_went_in_or_not_at_all() {
    let zstd = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).expect("memory");
    let gzip = |bytes: &[u8]| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        io::Write::write_all(&mut out, bytes).expect("memory");
        out.finish().expect("memory")
    };
    let take_off = |wrapping: Wrapping, packed: &[u8]| {
        let mut out = Vec::new();
        wrapping.take_off::<Error>("made", packed, &mut out, |_| Ok(())).map(|len| (len, out))
    };
    let plain = made_bytes(0);
    for (wrapping, packed) in [(Wrapping::Zstd, zstd(&plain)), (Wrapping::Gzip, gzip(&plain))] {
        let (len, out) = take_off(wrapping, &packed).expect("unwraps");
        assert!(len == plain.len() as u64 && out == plain);
        for cut in [1, packed.len() / 2, packed.len() - 1] {
            assert!(is_corrupt(take_off(wrapping, &packed[..cut])), "cut at {cut}");
        }
    }
    // A bomb: 64 MiB of zeros behind an archive of less than one.
    let bomb = zstd(&made_bytes(64 << 20));
    assert!(bomb.len() < 100_000 && is_corrupt(take_off(Wrapping::Zstd, &bomb)));
    let other = take_off(Wrapping::Gzip, &gzip(&vec![1; 20_000]));
    assert!(matches!(other, Err(Error::Refused { .. })), "no archive");
    let stopped: Result<u64> = Wrapping::Zstd
        .take_off("made", &zstd(&plain)[..], &mut Vec::new(), |_| Err(Error::unsupported("made", "stopped")));
    assert!(stopped.is_err());
}

/// The writer stores every cluster; one that is not there was lost.
#[test]
fn a_missing_cluster_is_an_error_and_never_zeros() {
    let layer = Made::new().open().expect("opens").disk("drive-scsi1").expect("a disk");
    assert!(matches!(layer.lookup(0, 1), Err(Error::ChainBroken { .. })));
    assert!(layer.scan(0, u64::MAX, &mut |at, _, _| panic!("told {at}")).is_err());
}

#[test]
fn hostile_archives_are_refused() {
    let with = |change: &dyn Fn(&mut Made)| {
        let mut made = Made::new();
        change(&mut made);
        made
    };
    let header = |change: &dyn Fn(&mut Vec<u8>)| {
        with(&|made| {
            change(&mut made.header);
            seal(&mut made.header, 32);
        })
        .open()
    };
    assert!(is_corrupt(with(&|made| made.header[9000] ^= 1).open()), "the checksum");
    assert!(is_corrupt(header(&|h| h[0] = 0)));
    assert!(matches!(header(&|h| h[7] = 2), Err(Error::Unsupported { .. })));
    assert!(is_corrupt(header(&|h| put(h, 56, &100u32.to_be_bytes()))));
    assert!(is_corrupt(header(&|h| put(h, 56, &u32::MAX.to_be_bytes()))));
    assert!(is_corrupt(header(&|h| put(h, 48, &u32::MAX.to_be_bytes()))), "names outside");
    assert!(is_corrupt(header(&|h| put(h, 4096 + 32, &452u32.to_be_bytes()))), "a name outside the names");
    assert!(is_corrupt(header(&|h| put(h, 4096 + 64, &1u32.to_be_bytes()))), "two of one name");
    assert!(is_corrupt(header(&|h| put(h, 4096 + 40, &u64::MAX.to_be_bytes()))), "a size");
    let disk = |change: &dyn Fn(&mut Made)| with(change).open().expect("opens").disk("drive-scsi0");
    assert!(disk(&|_| {}).is_ok());
    assert!(is_corrupt(disk(&|made| made.extents[0][100] ^= 1)), "an extent's checksum");
    assert!(is_corrupt(disk(&|made| made.extents.push(extent(&[(0, 1, 0)])))), "a cluster twice");
    assert!(is_corrupt(disk(&|made| made.extents.push(extent(&[(0, 1, 3)])))), "past the end");
    assert!(is_truncated(disk(&|made| made.extents[0].truncate(5000))), "cut within an extent");
    assert!(is_truncated(disk(&|made| made.extents.push(vec![b'V'; 100]))), "cut within a header");
    let foreign = |made: &mut Made| {
        made.extents[0][8] = 6;
        let head = &mut made.extents[0][..512];
        seal(head, 24);
    };
    assert!(is_corrupt(disk(&foreign)), "another archive's extent");
    let miscounted = |made: &mut Made| {
        made.extents[0][7] += 1;
        seal(&mut made.extents[0][..512], 24);
    };
    assert!(is_corrupt(disk(&miscounted)));
    for len in 0..200 {
        assert!(with(&|made| made.header.truncate(len * 64)).open().is_err());
    }
}
