//! Images made by hand, byte by byte: what no `qemu-img` would write. What it does write is compared
//! with it in `tests/it/qcow2.rs`.

use std::ops::Range;

use super::*;
use crate::{
    BlockRef, Codec, Content, Layer,
    made::{Image, Order, is_corrupt, is_truncated, is_unsupported},
    storage::MemoryStorage,
};

const CLUSTER: usize = 64 << 10;

/// A version 3 image of 1 MiB: header, L1 in cluster 1, L2 in cluster 2, data from cluster 3 on.
/// Guest cluster 0 is stored in cluster 3, 1 reads as zero, the rest is absent.
type Made = Image<Qcow2>;

impl Made {
    fn new() -> Self {
        let mut made = Self::blank(4 * CLUSTER, Order::Big);
        made.put(0, &0x5146_49fbu32.to_be_bytes());
        made.u32(4, 3);
        made.u32(20, 16);
        made.u64(24, 1 << 20);
        made.u32(36, 1);
        made.u64(40, CLUSTER as u64);
        made.u32(96, 4);
        made.u32(100, 104);
        made.u64(CLUSTER, (2 * CLUSTER as u64) | (1 << 63));
        made.u64(2 * CLUSTER, (3 * CLUSTER as u64) | (1 << 63));
        made.u64(2 * CLUSTER + 8, 1);
        made.bytes[3 * CLUSTER..].fill(0xab);
        made
    }

    /// Sets the L2 entry of a guest cluster.
    fn entry(&mut self, cluster: usize, value: u64) {
        self.u64(2 * CLUSTER + 8 * cluster, value);
    }

    fn open(&self) -> Result<Qcow2> {
        Qcow2::open(Arc::new(MemoryStorage::new("made.qcow2", self.bytes.clone())))
    }

    fn layer(&self) -> Result<Qcow2Layer> {
        self.open()?.active(None)
    }

    fn lookup(&self, cluster: u64) -> Result<(Content, u64)> {
        self.layer()?.lookup(cluster * CLUSTER as u64, u64::MAX)
    }
}

#[test]
fn the_made_image_reads() {
    let made = Made::new();
    let layer = made.layer().expect("opens");
    let cluster = CLUSTER as u64;
    let plain = |offset| Content::Plain { file: 0, offset };
    assert_eq!(layer.size(), 1 << 20);
    assert_eq!(layer.lookup(0, u64::MAX).expect("plain"), (plain(3 * cluster), cluster));
    assert_eq!(layer.lookup(100, 50).expect("plain, part"), (plain(3 * cluster + 100), 50));
    assert_eq!(layer.lookup(cluster, u64::MAX).expect("zero"), (Content::Zero, cluster));
    assert_eq!(layer.lookup(2 * cluster + 1, u64::MAX).expect("absent"), (Content::Absent, 14 * cluster - 1));
    let mut told = Vec::new();
    layer.scan(10, u64::MAX, &mut |at, len, what| told.push((at, len, what))).expect("scan");
    assert_eq!(told, [(10, cluster - 10, plain(3 * cluster + 10)), (cluster, cluster, Content::Zero)]);
    for (offset, len) in [(1 << 20, 1), (u64::MAX, 1), (0, 0)] {
        assert!(matches!(layer.lookup(offset, len), Err(Error::OutOfRange { .. })), "{offset}+{len}");
    }
}

/// Offset, width and value of a field, and what opening the active disk has to say about it.
type Hostile = (&'static str, usize, usize, u64, fn(Result<Qcow2Layer>) -> bool);

#[test]
fn hostile_headers_are_refused() {
    let table: &[Hostile] = &[
        ("magic", 0, 4, 0x5146_49fa, is_corrupt),
        ("version 1", 4, 4, 1, is_unsupported),
        ("version 4", 4, 4, 4, is_unsupported),
        ("cluster_bits 8", 20, 4, 8, is_corrupt),
        ("cluster_bits 22", 20, 4, 22, is_corrupt),
        ("cluster_bits 64", 20, 4, 64, is_corrupt),
        ("cluster_bits max", 20, 4, 0xffff_ffff, is_corrupt),
        ("negative size", 24, 8, 1 << 63, is_corrupt),
        ("petabytes", 24, 8, 1 << 50, is_corrupt),
        ("largest size", 24, 8, (1 << 63) - 1, is_corrupt),
        ("AES", 32, 4, 1, is_unsupported),
        ("LUKS", 32, 4, 2, is_unsupported),
        ("unknown cipher", 32, 4, 3, is_corrupt),
        ("no L1", 36, 4, 0, is_corrupt),
        ("huge L1", 36, 4, 0xffff_ffff, is_corrupt),
        ("L1 not aligned", 40, 8, CLUSTER as u64 + 8, is_corrupt),
        ("L1 over the header", 40, 8, 0, is_corrupt),
        ("L1 past the end", 40, 8, 1 << 40, is_truncated),
        ("L1 wraps", 40, 8, 0xffff_ffff_ffff_0000, is_truncated),
        ("snapshot count", 60, 4, 65_537, is_corrupt),
        ("corrupt bit", 72, 8, 2, is_corrupt),
        ("unknown incompatible bit", 72, 8, 1 << 5, is_unsupported),
        ("unknown incompatible bit 63", 72, 8, 1 << 63, is_unsupported),
        ("compression bit without a type", 72, 8, 1 << 3, is_corrupt),
        ("header_length short", 100, 4, 96, is_corrupt),
        ("header_length odd", 100, 4, 105, is_corrupt),
        ("header_length past its cluster", 100, 4, 1 << 16, is_corrupt),
        ("header_length max", 100, 4, 0xffff_fff8, is_truncated),
    ];
    for (name, at, width, value, expected) in table {
        let mut made = Made::new();
        made.put(*at, &value.to_be_bytes()[8 - width..]);
        let done = made.layer();
        let shown = format!("{done:?}");
        assert!(expected(done), "{name}: {shown}");
    }
    for len in 0..104 {
        let mut made = Made::new();
        made.bytes.truncate(len);
        assert!(made.open().is_err(), "a file of {len} bytes");
    }
}

#[test]
fn harmless_marks_do_not_refuse() {
    for (name, at, value) in
        [("dirty", 72, 1), ("unknown compatible", 80, u64::MAX), ("unknown autoclear", 88, 1 << 40)]
    {
        let mut made = Made::new();
        made.u64(at, value);
        assert!(made.layer().is_ok(), "{name}");
    }
    let mut made = Made::new();
    made.u64(72, 1);
    assert!(made.open().expect("opens").info().dirty);
}

#[test]
fn version_2_knows_no_feature_words() {
    let mut made = Made::new();
    made.u32(4, 2);
    made.bytes[72..112].fill(0);
    assert!(matches!(made.lookup(0), Ok((Content::Plain { .. }, _))));
    // Zero clusters came with version 3, so the bit is a reserved one here.
    assert!(is_corrupt(made.lookup(1)));
    // What would be feature bits are header extensions already: kind 0 ends them.
    made.u64(72, 0x2);
    assert!(made.open().is_ok());
}

#[test]
fn names_have_to_lie_inside_the_header_cluster() {
    let name = b"base.qcow2";
    let at = 512;
    let with = |offset: u64, size: u32| {
        let mut made = Made::new();
        made.put(at, name);
        made.u64(8, offset);
        made.u32(16, size);
        made.open()
    };
    let opened = with(at as u64, 10).expect("opens");
    assert_eq!(opened.backing().map(|b| b.name.clone()), Some("base.qcow2".into()));
    for (offset, size) in [
        (at as u64, 1024),
        (CLUSTER as u64 - 4, 10),
        (CLUSTER as u64, 10),
        (u64::MAX - 4, 10),
        (50, 10),
        (at as u64, u32::MAX),
    ] {
        assert!(is_corrupt(with(offset, size)), "name of {size} at {offset}");
    }
    assert!(with(at as u64, 0).expect("opens").backing().is_none(), "an empty name is no backing file");
}

fn extension(kind: u32, len: u32, data: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &len.to_be_bytes()[..], data].concat()
}

#[test]
fn header_extensions_end_loop_free() {
    const FORMAT: u32 = 0xe279_2aca;
    let with = |area: &[u8]| {
        let mut made = Made::new();
        made.put(1024, b"base");
        made.u64(8, 1024);
        made.u32(16, 4);
        made.put(104, area);
        made.open()
    };
    let format = |done: Result<Qcow2>| done.expect("opens").backing().and_then(|b| b.format.clone());
    assert_eq!(format(with(&extension(FORMAT, 3, b"raw\0\0\0\0\0"))), Some("raw".into()));
    let unknown_first = [extension(77, 5, b"12345\0\0\0"), extension(FORMAT, 5, b"qcow2")].concat();
    assert_eq!(format(with(&unknown_first)), Some("qcow2".into()));
    let ended = [extension(0, 0, b""), extension(FORMAT, 3, b"raw")].concat();
    assert_eq!(format(with(&ended)), None, "nothing counts behind the end mark");
    assert!(is_corrupt(with(&extension(FORMAT, u32::MAX, b""))), "wraps");
    assert!(is_corrupt(with(&extension(77, 1000, b""))), "reaches into the backing file's name");
    assert!(is_corrupt(with(&[extension(FORMAT, 3, b"raw\0\0\0\0\0"), extension(FORMAT, 3, b"raw")].concat())));
    assert!(is_corrupt(with(&extension(0x2385_2875, 16, &[0; 16]))), "a bitmap extension of another size");
    // Empty extensions of an unknown kind up to the end of the area: a long loop that still ends.
    let crowd: Vec<u8> = (0..100).flat_map(|_| extension(77, 0, b"")).collect();
    assert_eq!(format(with(&crowd)), None);
}

/// What a lookup has to say about a table entry.
type Verdict = fn(Result<(Content, u64)>) -> bool;

#[test]
fn hostile_tables_spoil_their_own_range_only() {
    let l1_flaws: [(&str, u64, Verdict); 4] = [
        ("past the end", 1 << 40, is_truncated),
        ("wraps", 0x00ff_ffff_ffff_0000, is_truncated),
        ("not aligned", 2 * CLUSTER as u64 + 512, is_corrupt),
        ("reserved bit", (2 * CLUSTER as u64) | (1 << 56), is_corrupt),
    ];
    for (name, value, expected) in l1_flaws {
        let mut made = Made::new();
        made.u64(CLUSTER, value);
        assert!(expected(made.lookup(0)), "L1 {name}");
    }
    let flaws: [(&str, u64, Verdict); 9] = [
        ("past the end", 4 * CLUSTER as u64, is_truncated),
        ("far past the end", 0x00ff_ffff_ffff_0000, is_truncated),
        ("not aligned", 3 * CLUSTER as u64 + 512, is_corrupt),
        ("reserved bit 1", (3 * CLUSTER as u64) | 2, is_corrupt),
        ("reserved bit 61", (3 * CLUSTER as u64) | (1 << 61), is_corrupt),
        ("reserved bits alone", 0x100, is_corrupt),
        ("compressed past the end", (1 << 62) | (4 * CLUSTER as u64), is_truncated),
        ("compressed wraps", u64::MAX, is_truncated),
        ("compressed in the header", (1 << 62) | 5, is_corrupt),
    ];
    for (name, value, expected) in flaws {
        let mut made = Made::new();
        made.entry(3, value);
        let done = made.lookup(3);
        let shown = format!("{done:?}");
        assert!(expected(done), "L2 {name}: {shown}");
        assert_eq!(made.lookup(2).expect("before it"), (Content::Absent, CLUSTER as u64), "{name}");
        assert!(made.lookup(4).is_ok(), "behind it: {name}");
        let mut told = Vec::new();
        let done = made.layer().expect("opens").scan(0, u64::MAX, &mut |at, _, _| told.push(at));
        assert!(done.is_err() && told == [0, CLUSTER as u64], "{name}: scan told {told:?}");
    }
}

#[test]
fn one_l2_table_serves_one_l1_entry() {
    let mut made = Made::new();
    made.u64(24, 3 << 29);
    made.u32(36, 3);
    made.u64(CLUSTER + 16, 2 * CLUSTER as u64);
    let layer = made.layer().expect("opens");
    assert!(layer.lookup(0, 1).is_ok());
    assert!(layer.lookup(1 << 29, 1).is_ok());
    assert!(is_corrupt(layer.lookup(2 << 29, 1)));
}

/// QEMU writes all of a cluster that lies inside the disk. A file that ends before that was cut, and zeros would be a lie.
#[test]
fn a_last_cluster_may_be_short_only_past_the_end_of_the_disk() {
    let plain = Content::Plain { file: 0, offset: 3 * CLUSTER as u64 };
    for cut in [1, 512, 4096, CLUSTER - 1, CLUSTER] {
        let mut made = Made::new();
        made.bytes.truncate(4 * CLUSTER - cut);
        assert!(is_truncated(made.lookup(0)), "cut by {cut}");
        assert!(is_truncated(made.layer().expect("opens").lookup(0, 1)), "cut by {cut}, its first byte");
        assert_eq!(made.lookup(1).expect("behind it"), (Content::Zero, CLUSTER as u64), "cut by {cut}");
        assert!(made.layer().expect("opens").scan(0, u64::MAX, &mut |_, _, _| ()).is_err(), "cut by {cut}");
    }
    let mut made = Made::new();
    made.bytes.truncate(3 * CLUSTER + 700);
    made.u64(24, 700);
    let layer = made.layer().expect("opens");
    assert_eq!(layer.lookup(0, u64::MAX).expect("all there is of the disk"), (plain, 700));
    let mut out = [1; 16];
    layer.file(0).expect("file 0").read_at(4 * CLUSTER as u64 - 16, &mut out).expect("past the disk's end");
    assert_eq!(out, [0; 16]);
    made.u64(24, 701);
    assert!(is_truncated(made.lookup(0)), "one byte of the disk is gone");
}

#[test]
fn parts_of_a_short_cluster_are_judged_one_by_one() {
    let mut made = Made::new();
    made.u64(72, 1 << 4);
    made.bytes[2 * CLUSTER..3 * CLUSTER].fill(0);
    made.u64(2 * CLUSTER, 3 * CLUSTER as u64);
    made.u64(2 * CLUSTER + 8, 0b11);
    made.bytes.truncate(3 * CLUSTER + 2 * 2048);
    let plain = Content::Plain { file: 0, offset: 3 * CLUSTER as u64 };
    assert_eq!(made.lookup(0).expect("what is stored is there"), (plain, 2 * 2048));
    made.bytes.truncate(3 * CLUSTER + 2 * 2048 - 1);
    assert_eq!(made.lookup(0).expect("the first part"), (plain, 2048));
    let layer = made.layer().expect("opens");
    assert!(is_truncated(layer.lookup(2048, 1)));
    assert_eq!(layer.lookup(4096, 10).expect("what was never stored"), (Content::Absent, 10));
}

/// A compressed cluster at `3 * CLUSTER + 100` for guest cluster 2, `sectors` as its descriptor counts them.
fn with_compressed(codec: Codec, sectors: u64, file_end: impl Fn(usize) -> usize) -> (Made, Vec<u8>) {
    let raw: Vec<u8> = (0..=250u8).flat_map(|b| [b; 7]).cycle().take(CLUSTER).collect();
    let stored = match codec {
        Codec::Zstd => zstd::bulk::compress(&raw, 3).expect("memory"),
        _ => {
            let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::new(6));
            std::io::Write::write_all(&mut encoder, &raw).expect("memory");
            encoder.finish().expect("memory")
        }
    };
    let mut made = Made::new();
    if codec == Codec::Zstd {
        made.u64(72, 1 << 3);
        made.u32(100, 112);
        made.put(104, &[1]);
    }
    let at = 3 * CLUSTER + 100;
    made.bytes.resize(at, 0);
    made.bytes.extend_from_slice(&stored);
    made.bytes.extend_from_slice(&[0x77; 2000]);
    made.bytes.truncate(file_end(at + stored.len()));
    let sectors = if sectors == 0 { (stored.len() as u64 + 100).div_ceil(512) } else { sectors };
    made.entry(2, (1 << 62) | ((sectors - 1) << 54) | at as u64);
    (made, raw)
}

fn packed(layer: &Qcow2Layer) -> Result<BlockRef> {
    match layer.lookup(2 * CLUSTER as u64 + 300, u64::MAX)? {
        (Content::Packed { block, skip: 300 }, len) if len == CLUSTER as u64 - 300 => Ok(block),
        other => panic!("expected the packed cluster, got {other:?}"),
    }
}

#[test]
fn compressed_clusters_unpack_whatever_follows_them() {
    for codec in [Codec::Deflate, Codec::Zstd] {
        for file_end in [|end: usize| end + 2000, |end: usize| end] {
            let (made, raw) = with_compressed(codec, 0, file_end);
            let layer = made.layer().expect("opens");
            let block = packed(&layer).expect("packed");
            for need in [1, 5000, CLUSTER] {
                let mut out = Vec::new();
                layer.unpack(&block, need, &mut out).expect("unpacks");
                assert!(out.len() >= need && out == raw[..out.len()], "{codec:?}");
            }
        }
    }
}

#[test]
fn cut_or_short_compressed_clusters_are_errors() {
    for codec in [Codec::Deflate, Codec::Zstd] {
        let (made, _) = with_compressed(codec, 0, |end| end - 40);
        let layer = made.layer().expect("opens");
        let mut out = Vec::new();
        let done = layer.unpack(&packed(&layer).expect("packed"), CLUSTER, &mut out);
        assert!(is_truncated(done), "{codec:?}: the file ends inside");
        assert!(out.is_empty());
        let (made, _) = with_compressed(codec, 1, |end| end + 2000);
        let layer = made.layer().expect("opens");
        let done = layer.unpack(&packed(&layer).expect("packed"), CLUSTER, &mut out);
        assert!(matches!(done, Err(Error::BadBlock { .. })), "{codec:?}: the descriptor is too short");
    }
}

#[test]
fn extended_entries_are_told_part_by_part() {
    let mut made = Made::new();
    made.u64(72, 1 << 4);
    made.bytes[2 * CLUSTER..3 * CLUSTER].fill(0);
    let entry = |made: &mut Made, cluster: usize, word: u64, zero: u32, allocated: u32| {
        made.u64(2 * CLUSTER + 16 * cluster, word);
        made.u64(2 * CLUSTER + 16 * cluster + 8, (u64::from(zero) << 32) | u64::from(allocated));
    };
    let host = 3 * CLUSTER as u64;
    entry(&mut made, 0, host, 0xf0, 0x0f);
    entry(&mut made, 1, 0, 0x8000_0000, 0);
    entry(&mut made, 2, host, 1, 1);
    entry(&mut made, 3, 0, 0, 1);
    entry(&mut made, 4, host | 1, 0, 0);
    let layer = made.layer().expect("opens");
    let (part, cluster) = (2048, CLUSTER as u64);
    assert_eq!(layer.grain(), part);
    let all = |range: Range<u64>| {
        let (mut at, mut found) = (range.start, Vec::new());
        while at < range.end {
            let (content, len) = layer.lookup(at, range.end - at).expect("lookup");
            found.push((at, len, content));
            at += len;
        }
        found
    };
    let expected = [
        (1000, 4 * part - 1000, Content::Plain { file: 0, offset: host + 1000 }),
        (4 * part, 4 * part, Content::Zero),
        (8 * part, cluster + 23 * part, Content::Absent),
        (cluster + 31 * part, part, Content::Zero),
    ];
    assert_eq!(all(1000..2 * cluster), expected);
    for bad in 2..5 {
        assert!(is_corrupt(layer.lookup(bad * cluster, 1)), "cluster {bad}");
    }
}

#[test]
fn hostile_snapshot_tables() {
    let at = 3 * CLUSTER;
    let with = |change: &dyn Fn(&mut Made)| {
        let mut made = Made::new();
        made.u32(60, 1);
        made.u64(64, at as u64);
        made.bytes[at..].fill(0);
        made.u64(at, CLUSTER as u64);
        made.u32(at + 8, 1);
        made.put(at + 12, &[0, 1, 0, 4]);
        made.u32(at + 36, 16);
        made.u64(at + 48, 1 << 20);
        made.put(at + 56, b"7name");
        change(&mut made);
        made.open().expect("opens")
    };
    let image = with(&|_| {});
    let snapshots = image.snapshots().expect("reads");
    assert_eq!((snapshots[0].id.as_str(), snapshots[0].name.as_str(), snapshots[0].size), ("7", "name", 1 << 20));
    for by in ["7", "name"] {
        assert!(image.snapshot(by).expect("opens").lookup(0, 1).is_ok());
    }
    assert!(matches!(image.snapshot("other"), Err(Error::ChainBroken { .. })));
    assert!(is_corrupt(with(&|m| m.u32(60, 65_536)).snapshots()), "more than there are");
    assert!(is_truncated(with(&|m| m.u64(64, 1 << 50)).snapshots()));
    assert!(is_corrupt(with(&|m| m.u64(64, 0)).snapshots()), "over the header");
    assert!(is_corrupt(with(&|m| m.u32(at + 36, 4096)).snapshots()), "extra data");
    assert!(is_corrupt(with(&|m| m.u32(at + 36, 8)).snapshots()), "no size in version 3");
    assert!(is_corrupt(with(&|m| m.u64(at + 48, u64::MAX)).snapshots()), "size");
    assert!(is_corrupt(with(&|m| m.u64(at + 48, 1 << 40)).snapshot("7")), "larger than its L1 table");
    assert!(is_corrupt(with(&|m| m.u32(at + 8, u32::MAX)).snapshot("7")), "L1 size");
}

#[test]
fn hostile_bitmap_directories() {
    let directory = 3 * CLUSTER;
    let with = |change: &dyn Fn(&mut Made)| {
        let mut made = Made::new();
        made.u64(88, 1);
        let (len, at) = (32u64.to_be_bytes(), (directory as u64).to_be_bytes());
        let data = [&1u32.to_be_bytes()[..], &[0; 4], &len, &at].concat();
        made.put(104, &extension(0x2385_2875, 24, &data));
        // 64 KiB granularity: one cluster of bits covers 32 GiB.
        made.bytes.resize(6 * CLUSTER, 0);
        made.bytes[directory..].fill(0);
        made.u64(directory, 4 * CLUSTER as u64);
        made.u32(directory + 8, 1);
        made.put(directory + 16, &[1, 16, 0, 1]);
        made.put(directory + 24, b"b");
        made.u64(4 * CLUSTER, 5 * CLUSTER as u64);
        made.put(5 * CLUSTER, &[0b1000_0110, 0xff]);
        change(&mut made);
        made.open().expect("opens")
    };
    let dirty = |image: &Qcow2| {
        let bitmap = image.bitmaps()?.remove(0);
        let mut ranges = Vec::new();
        image.dirty_ranges(&bitmap, &mut |at, len| ranges.push((at >> 16, len >> 16)))?;
        Ok(ranges)
    };
    assert_eq!(dirty(&with(&|_| {})).expect("reads"), [(1, 2), (7, 9)]);
    assert_eq!(dirty(&with(&|m| m.u64(4 * CLUSTER, 1))).expect("all ones"), [(0, 16)], "cut at the disk's end");
    assert_eq!(dirty(&with(&|m| m.u64(4 * CLUSTER, 0))).expect("all zeros"), []);
    type Change = fn(&mut Made);
    let refused: [(&str, Change, BitmapTrust); 4] = [
        ("in use", |m| m.u32(3 * CLUSTER + 12, 1), BitmapTrust::InUse),
        ("not kept up", |m| m.u64(88, 0), BitmapTrust::NotKeptUp),
        ("unknown kind", |m| m.put(3 * CLUSTER + 16, &[2]), BitmapTrust::NotUnderstood),
        ("unknown flag", |m| m.u32(3 * CLUSTER + 12, 8), BitmapTrust::NotUnderstood),
    ];
    for (name, change, trust) in refused {
        let image = with(&change);
        assert_eq!(image.bitmaps().expect("is listed")[0].trust, trust, "{name}");
        assert!(matches!(dirty(&image), Err(Error::Refused { .. })), "{name}");
    }
    let broken: [(&str, Change); 9] = [
        ("granularity", |m| m.put(3 * CLUSTER + 17, &[64])),
        ("name length", |m| m.put(3 * CLUSTER + 18, &[0xff, 0xff])),
        ("extra data", |m| m.u32(3 * CLUSTER + 20, u32::MAX)),
        ("table too small", |m| m.u32(3 * CLUSTER + 8, 0)),
        ("table past the end", |m| m.u64(3 * CLUSTER, 1 << 48)),
        ("bits past the end", |m| m.u64(4 * CLUSTER, 1 << 40)),
        ("reserved bit", |m| m.u64(4 * CLUSTER, 2)),
        ("count", |m| m.u32(112, 65_535)),
        ("directory length", |m| m.u64(120, u64::MAX)),
    ];
    for (name, change) in broken {
        let done = dirty(&with(&change));
        assert!(matches!(done, Err(Error::Corrupt { .. } | Error::Truncated { .. })), "{name}: {done:?}");
    }
}

#[test]
fn bitmap_entries_that_share_clusters_end_with_the_file() {
    let mut made = Made::new();
    // 2 TiB at 512 bytes a bit: 8,192 entries, all of them naming one cluster.
    made.u64(24, 2 << 40);
    made.u64(88, 1);
    let data = [&1u32.to_be_bytes()[..], &[0; 4], &32u64.to_be_bytes(), &(3 * CLUSTER as u64).to_be_bytes()].concat();
    made.put(104, &extension(0x2385_2875, 24, &data));
    made.bytes[3 * CLUSTER..].fill(0);
    made.bytes.resize(6 * CLUSTER, 0);
    made.u64(3 * CLUSTER, 4 * CLUSTER as u64);
    made.u32(3 * CLUSTER + 8, 8192);
    made.put(3 * CLUSTER + 16, &[1, 9, 0, 1]);
    (0..8192).for_each(|i| made.u64(4 * CLUSTER + 8 * i, 5 * CLUSTER as u64));
    let image = made.open().expect("opens");
    let bitmap = image.bitmaps().expect("lists").remove(0);
    assert_eq!(bitmap.trust, BitmapTrust::Consistent);
    assert!(is_corrupt(image.dirty_ranges(&bitmap, &mut |_, _| {})));
}

#[test]
fn data_files_are_needed_exactly_where_named() {
    let mut made = Made::new();
    assert!(matches!(
        made.open().expect("opens").active(Some(Arc::new(MemoryStorage::new("d", vec![])))),
        Err(Error::ChainBroken { .. })
    ));
    made.u64(72, 1 << 2);
    assert!(matches!(made.layer(), Err(Error::ChainBroken { .. })));
    let data = Arc::new(MemoryStorage::new("data", vec![7; 2 * CLUSTER + 100]));
    made.entry(0, 1 << 63);
    made.entry(1, CLUSTER as u64);
    made.entry(2, 3 * CLUSTER as u64);
    made.entry(3, 3 * CLUSTER as u64);
    made.entry(4, (1 << 62) | (4 * CLUSTER as u64));
    let layer = made.open().expect("opens").active(Some(data)).expect("with its data file");
    let at = |cluster: u64| layer.lookup(cluster * CLUSTER as u64, u64::MAX);
    assert_eq!(at(0).expect("plain"), (Content::Plain { file: 1, offset: 0 }, 2 * CLUSTER as u64));
    assert!(is_corrupt(at(2)), "not at the guest's offset");
    assert!(is_truncated(at(3)), "past the data file");
    assert!(is_corrupt(at(4)), "compressed");
    assert_ne!(layer.file_id(0), layer.file_id(1));
    assert!(layer.file(0).is_ok() && layer.file(1).is_ok() && layer.file(2).is_err());
}

#[test]
fn a_raw_data_file_holds_all_of_the_disk() {
    let mut made = Made::new();
    made.u64(72, 1 << 2);
    made.u64(88, 1 << 1);
    made.u64(2 * CLUSTER, 0);
    let open = |made: &Made, len: usize| made.open()?.active(Some(Arc::new(MemoryStorage::new("data", vec![7; len]))));
    for len in [0, 1, CLUSTER, (1 << 20) - 1] {
        assert!(is_truncated(open(&made, len)), "{len}");
    }
    assert!(open(&made, 1 << 20).is_ok());
    assert!(open(&made, (1 << 20) + CLUSTER).is_ok(), "longer than the disk");
    made.u64(88, 0);
    assert!(open(&made, 1).is_ok(), "without the mark only what is mapped counts");
    made.u64(2 * CLUSTER + 8, CLUSTER as u64);
    assert!(is_truncated(open(&made, 2 * CLUSTER - 1).and_then(|layer| layer.lookup(CLUSTER as u64, 1))));
}

#[test]
fn fingerprints_tell_images_apart() {
    let print = |made: &Made| made.layer().expect("opens").fingerprint().expect("reads");
    let made = Made::new();
    assert_eq!(print(&made), print(&Made::new()));
    let changes: [fn(&mut Made); 3] = [|m| m.entry(5, 1), |m| m.u64(24, 1 << 19), |m| m.bytes.push(0)];
    for change in changes {
        let mut other = Made::new();
        change(&mut other);
        assert_ne!(print(&made), print(&other));
    }
}

#[test]
fn the_piece_cache_keeps_to_its_budget() {
    use crate::tables::PieceCache;
    let cache = PieceCache::new(16 * 4096);
    let piece: Arc<[u8]> = Arc::from(vec![1; 1024]);
    for i in 0..1000 {
        cache.put((1, i << 16), &piece);
        // Looked at on every turn, so the clock hand passes it by.
        cache.get((1, 0));
    }
    assert!(cache.bytes() <= 16 * 4096, "{} bytes", cache.bytes());
    assert!(cache.bytes() > 8 * 4096, "and uses it");
    assert!(cache.get((1, 0)).is_some(), "what is used stays");
    cache.put((2, 0), &Arc::from(vec![0; 5000]));
    assert!(cache.get((2, 0)).is_none(), "larger than a shard's share");
}
