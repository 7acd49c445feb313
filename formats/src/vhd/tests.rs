//! Files made by hand: what no tool here writes. Disks that QEMU writes, and differencing ones of our own
//! writer, are compared in `tests/it/foreign/hyperv.rs`.

#![expect(clippy::cast_possible_truncation, reason = "test disks are small")]

use super::*;
use crate::{
    Content, Layer,
    made::{Image, Order, is_corrupt, is_truncated, is_unsupported},
    storage::MemoryStorage,
};

const BLOCK: u64 = 4096;

/// A dynamic disk of 64 KiB in blocks of 4096 bytes: block 0 is stored, its sector 1 marked as not written.
type Made = Image<Vhd>;

fn sum(bytes: &[u8], at: usize) -> u32 {
    let all: u32 =
        bytes.iter().enumerate().filter(|(i, _)| !(at..at + 4).contains(i)).map(|(_, b)| u32::from(*b)).sum();
    !all
}

impl Made {
    fn new(kind: u32) -> Self {
        let mut made = Self::blank(512 + 1024 + 512 + 512 + 4096 + 512, Order::Big);
        made.put(0, b"conectix");
        made.u32(12, 0x1_0000);
        made.u64(16, 512);
        made.put(28, b"win ");
        made.u64(48, 64 << 10);
        made.u32(60, kind);
        made.put(68, &[5; 16]);
        made.put(512, b"cxsparse");
        made.u64(512 + 16, 1536);
        made.u32(512 + 24, 0x1_0000);
        made.u32(512 + 28, 16);
        made.u32(512 + 32, BLOCK as u32);
        made.put(512 + 40, &[6; 16]);
        made.bytes[1536..2048].fill(0xff);
        made.u32(1536, 4);
        made.put(2048, &[0b1011_1111]);
        made.bytes[2560..2560 + 4096].fill(0xab);
        made.seal();
        made
    }

    /// Makes checksums right, and the footer the same as its copy.
    fn seal(&mut self) {
        let footer = sum(&self.bytes[..512], 64);
        self.u32(64, footer);
        let header = sum(&self.bytes[512..1536], 36);
        self.u32(512 + 36, header);
        let copy = self.bytes[..512].to_vec();
        let end = self.bytes.len() - 512;
        self.put(end, &copy);
    }

    fn open(&self) -> Result<Vhd> {
        Vhd::open(Arc::new(MemoryStorage::new("made.vhd", self.bytes.clone())))
    }

    fn layer(&self) -> Result<VhdLayer> {
        self.open()?.layer()
    }
}

#[test]
fn bitmaps_say_which_sectors_are_here() {
    for (kind, clear) in [(3, Content::Zero), (4, Content::Absent)] {
        let layer = Made::new(kind).layer().expect("opens");
        let plain = |offset| Content::Plain { file: 0, offset };
        assert_eq!(layer.lookup(7, u64::MAX).expect("sector 0"), (plain(2567), 505));
        assert_eq!(layer.lookup(512, u64::MAX).expect("sector 1"), (clear, 512));
        assert_eq!(layer.lookup(1024, u64::MAX).expect("the rest"), (plain(3584), 3072));
        assert_eq!(layer.lookup(BLOCK, u64::MAX).expect("no block"), (Content::Absent, 15 * BLOCK));
    }
}

#[test]
fn a_damaged_footer_has_a_copy() {
    let mut made = Made::new(3);
    let end = made.bytes.len() - 400;
    made.bytes[end] ^= 1;
    assert!(made.layer().is_ok());
    made.bytes[100] ^= 1;
    assert!(is_corrupt(made.layer()));
    let mut old = Made::new(3);
    old.bytes.pop();
    let at = old.bytes.len() - 511;
    let footer = [&b"conectix"[..], &old.bytes[8..511]].concat();
    old.put(at, &footer);
    assert!(old.layer().is_ok(), "one byte less");
    let mut fixed = vec![0; 1024];
    fixed[..512].copy_from_slice(&Made::new(2).bytes[..512]);
    assert!(Vhd::open(Arc::new(MemoryStorage::new("forged", fixed))).is_err(), "a guest's forgery at the start");
}

#[test]
fn hostile_structures_are_refused() {
    type Verdict = fn(Result<VhdLayer>) -> bool;
    type Change = fn(&mut Made);
    let cases: [(&str, Change, Verdict); 13] = [
        ("version", |m| m.u32(12, 2), is_unsupported),
        ("type", |m| m.u32(60, 5), is_unsupported),
        ("an unknown writer with two sizes", |m| m.put(28, b"????"), is_unsupported),
        ("size 0", |m| m.u64(48, 0), is_corrupt),
        ("size within a sector", |m| m.u64(48, 1000), is_corrupt),
        ("largest size", |m| m.u64(48, u64::MAX), is_corrupt),
        ("more than the table", |m| m.u64(48, 65 << 10), is_corrupt),
        ("header past the end", |m| m.u64(16, 1 << 40), is_truncated),
        ("header wraps", |m| m.u64(16, u64::MAX), is_truncated),
        ("header version", |m| m.u32(512 + 24, 1), is_unsupported),
        ("block size", |m| m.u32(512 + 32, 5000), is_corrupt),
        ("table past the end", |m| m.u64(512 + 16, 1 << 40), is_truncated),
        ("no signature", |m| m.put(512, b"x"), is_corrupt),
    ];
    for (name, change, verdict) in cases {
        let mut made = Made::new(3);
        change(&mut made);
        made.seal();
        let done = made.layer();
        let shown = format!("{done:?}");
        assert!(verdict(done), "{name}: {shown}");
    }
    for len in 0..512 {
        assert!(Vhd::open(Arc::new(MemoryStorage::new("cut", Made::new(3).bytes[..len].to_vec()))).is_err());
    }
    for (entry, verdict) in
        [(0, is_corrupt as fn(Result<(Content, u64)>) -> bool), (6, is_truncated), (0xffff_fffe, is_truncated)]
    {
        let mut made = Made::new(3);
        made.u32(1540, entry);
        let layer = made.layer().expect("opens");
        assert!(verdict(layer.lookup(BLOCK, 1)), "{entry}");
        assert!(layer.lookup(0, 1).is_ok() && layer.lookup(2 * BLOCK, 1).is_ok());
    }
}

#[test]
fn the_writer_says_which_size_counts() {
    let size = |creator: &[u8; 4], chs: [u8; 4]| {
        let mut made = Made::new(3);
        made.put(28, creator);
        made.put(56, &chs);
        made.seal();
        made.open().map(|vhd| vhd.size())
    };
    let chs = [0, 3, 4, 10];
    assert_eq!(size(b"win ", chs).expect("opens"), 64 << 10);
    assert_eq!(size(b"qem2", chs).expect("opens"), 64 << 10);
    assert_eq!(size(b"qemu", chs).expect("opens"), 3 * 4 * 10 * 512);
    assert_eq!(size(b"vpc ", chs).expect("opens"), 3 * 4 * 10 * 512);
    assert_eq!(size(b"vpc ", [0xff, 0xff, 16, 255]).expect("opens"), 64 << 10, "as far as it goes");
    assert_eq!(size(b"xxxx", [0, 4, 4, 8]).expect("opens"), 64 << 10, "both sizes are the same");
    assert!(is_unsupported(size(b"xxxx", chs)));
}

#[test]
fn a_parent_is_known_by_its_id() {
    let mut made = Made::new(4);
    let name: Vec<u8> = "C:\\vm\\Base.vhd".encode_utf16().flat_map(u16::to_be_bytes).collect();
    made.put(512 + 64, &name);
    made.seal();
    let child = made.open().expect("opens");
    assert_eq!(child.parent().expect("a parent").names(), ["Base.vhd"]);
    let mut parent = Made::new(3);
    assert!(matches!(child.check_parent(&parent.open().expect("opens")), Err(Error::ChainBroken { .. })));
    parent.put(68, &[6; 16]);
    parent.seal();
    assert!(child.check_parent(&parent.open().expect("opens")).is_ok());
    made.put(512 + 576, b"W2ru");
    made.u32(512 + 576 + 8, u32::MAX);
    made.seal();
    assert!(is_corrupt(made.open()), "a name of four GiB");
}
