//! Disks made by hand: what no `qemu-img` would write. What it does write is compared with it in
//! `tests/it/vmdk.rs`.

use super::*;
use crate::{
    Content, Layer,
    made::{Image, Order, is_corrupt, is_truncated, is_unsupported},
    storage::MemoryStorage,
};

const GRAIN: u64 = 64 << 10;
const SECTOR: usize = 512;

/// A monolithic sparse disk of 1 MiB: descriptor in sector 1, directory in 3, table in 4, grains from
/// byte 8192. Grain 0 is stored, 1 is zero, the rest is absent.
type Made = Image<Vmdk>;

const TEXT: &str = "# Disk DescriptorFile\nversion=1\nCID=0000000a\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW 2048 SPARSE \"made.vmdk\"\n";

impl Made {
    fn new() -> Self {
        let mut made = Self::blank(8192 + 2 * usize::try_from(GRAIN).expect("small"), Order::Little);
        made.put(0, b"KDMV");
        made.u32(4, 1);
        made.u32(8, 0b101);
        made.u64(12, 2048);
        made.u64(20, 128);
        made.u64(28, 1);
        made.u64(36, 2);
        made.u32(44, 512);
        made.u64(56, 3);
        made.u64(64, 16);
        made.put(73, b"\n \r\n");
        made.put(SECTOR, TEXT.as_bytes());
        made.u32(3 * SECTOR, 4);
        made.u32(4 * SECTOR, 16);
        made.u32(4 * SECTOR + 4, 1);
        made.bytes[8192..].fill(0xab);
        made
    }

    fn text(&mut self, text: &str) {
        self.bytes[SECTOR..3 * SECTOR].fill(0);
        self.put(SECTOR, text.as_bytes());
    }

    fn open(&self) -> Result<Vmdk> {
        Vmdk::open(memory(self.bytes.clone()))
    }

    fn layer(&self) -> Result<VmdkLayer> {
        self.open()?.layer(|name| panic!("it names {name:?}, and is that itself"))
    }
}

fn memory(bytes: Vec<u8>) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::new("made.vmdk", bytes))
}

#[test]
fn the_made_disk_reads() {
    let layer = Made::new().layer().expect("opens");
    let plain = |offset| Content::Plain { file: 0, offset };
    assert_eq!((layer.size(), layer.grain()), (1 << 20, GRAIN));
    assert_eq!(layer.lookup(0, u64::MAX).expect("plain"), (plain(8192), GRAIN));
    assert_eq!(layer.lookup(100, 50).expect("plain, part"), (plain(8292), 50));
    assert_eq!(layer.lookup(GRAIN, u64::MAX).expect("zero"), (Content::Zero, GRAIN));
    assert_eq!(layer.lookup(2 * GRAIN + 1, u64::MAX).expect("absent"), (Content::Absent, 14 * GRAIN - 1));
    let mut told = Vec::new();
    layer.scan(10, u64::MAX, &mut |at, len, what| told.push((at, len, what))).expect("scan");
    assert_eq!(told, [(10, GRAIN - 10, plain(8202)), (GRAIN, GRAIN, Content::Zero)]);
    assert!(layer.lookup(1 << 20, 1).is_err() && layer.file(1).is_err() && layer.file(0).is_ok());
}

/// Offset, width and value of a field, and what opening the disk has to say about it.
type Hostile = (&'static str, usize, usize, u64, fn(Result<VmdkLayer>) -> bool);

#[test]
fn hostile_headers_are_refused() {
    let table: &[Hostile] = &[
        ("magic", 0, 4, 0, is_corrupt),
        ("version 4", 4, 4, 4, is_unsupported),
        ("compressed without markers", 8, 4, 0x1_0005, is_unsupported),
        ("unknown compression", 8, 4, 0x3_0005, is_unsupported),
        ("capacity wraps", 12, 8, u64::MAX, is_corrupt),
        ("exabytes", 12, 8, 1 << 50, is_corrupt),
        ("capacity below the descriptor's", 12, 8, 2047, is_corrupt),
        ("grain 0", 20, 8, 0, is_corrupt),
        ("grain of 3 sectors", 20, 8, 3, is_corrupt),
        ("grain of 4 sectors", 20, 8, 4, is_corrupt),
        ("grain of 8 MiB", 20, 8, 1 << 14, is_corrupt),
        ("no descriptor", 28, 8, 0, is_unsupported),
        ("descriptor past the end", 28, 8, 1 << 40, is_truncated),
        ("descriptor wraps", 28, 8, u64::MAX, is_corrupt),
        ("huge descriptor", 36, 8, 1 << 30, is_corrupt),
        ("tables of no entry", 44, 4, 0, is_corrupt),
        ("tables of 1024 entries", 44, 4, 1024, is_corrupt),
        ("directory over the header", 56, 8, 0, is_corrupt),
        ("directory past the end", 56, 8, 1 << 40, is_truncated),
        ("directory in a footer that is not there", 56, 8, u64::MAX, is_truncated),
        ("text transfer", 73, 1, 13, is_corrupt),
    ];
    for (name, at, width, value, expected) in table {
        let mut made = Made::new();
        made.put(*at, &value.to_le_bytes()[..*width]);
        let done = made.layer();
        let shown = format!("{done:?}");
        assert!(expected(done), "{name}: {shown}");
    }
    for len in 0..1540 {
        let mut made = Made::new();
        made.bytes.truncate(len);
        assert!(made.layer().is_err(), "a file of {len} bytes");
    }
}

#[test]
fn hostile_tables_spoil_only_their_range() {
    type Verdict = fn(Result<(Content, u64)>) -> bool;
    let cases: [(&str, u32, Verdict); 4] = [
        ("past the end", 1 << 20, is_truncated),
        ("reaches past the end", 16 + 129, is_truncated),
        ("over the descriptor", 2, is_corrupt),
        ("largest", u32::MAX, is_truncated),
    ];
    for (name, entry, verdict) in cases {
        let mut made = Made::new();
        made.u32(4 * SECTOR + 8, entry);
        let layer = made.layer().expect("opens");
        assert!(verdict(layer.lookup(2 * GRAIN, 1)), "{name}");
        assert!(layer.lookup(0, u64::MAX).is_ok() && layer.lookup(3 * GRAIN, 1).is_ok(), "{name}");
        let mut last = 0;
        let told = layer.scan(0, u64::MAX, &mut |at, len, _| last = at + len);
        assert!(told.is_err() && last == 2 * GRAIN, "{name}: what lies before it is told");
    }
    let mut made = Made::new();
    made.u32(8, 0b001);
    assert!(is_corrupt(made.layer().expect("opens").lookup(GRAIN, 1)), "a zero grain that is not announced");
    let mut made = Made::new();
    made.u32(3 * SECTOR, 1 << 30);
    assert!(is_truncated(made.layer().expect("opens").lookup(0, 1)), "a table past the end");
}

/// A table that two directory entries share would make a small file describe any amount of work.
#[test]
fn a_shared_table_belongs_to_its_first_entry() {
    let mut made = Made::new();
    made.u64(12, 2 * 512 * 128);
    made.u32(3 * SECTOR + 4, 4);
    made.text(&TEXT.replace("2048", "131072"));
    let layer = made.layer().expect("opens");
    assert!(layer.lookup(0, 1).is_ok());
    assert!(is_corrupt(layer.lookup(512 * GRAIN, 1)));
}

#[test]
fn hostile_descriptors_are_refused() {
    type Verdict = fn(Result<Vmdk>) -> bool;
    let cases: [(&str, &str, &str, Verdict); 16] = [
        ("no content id", "CID=0000000a\n", "", is_corrupt),
        ("content id", "=0000000a", "=ghost", is_corrupt),
        ("content id twice", "version=1", "CID=1", is_corrupt),
        ("unknown type", "monolithicSparse", "partitionedDevice", is_unsupported),
        ("no type", "createType", "creatorType", is_unsupported),
        ("no extents", "RW 2048", "#", is_corrupt),
        ("no length", "RW 2048", "RW x", is_corrupt),
        ("length 0", "RW 2048", "RW 0", is_corrupt),
        ("length wraps", "RW 2048", "RW 36028797018963969", is_corrupt),
        ("largest length", "RW 2048", "RW 36028797018963967", is_corrupt),
        ("no access", "RW 2048", "NOACCESS 2048", is_unsupported),
        ("a device", "SPARSE", "VMFSRDM", is_unsupported),
        ("no name", "\"made.vmdk\"", "\"\"", is_corrupt),
        ("a name without end", "made.vmdk\"", "made.vmdk", is_corrupt),
        ("a word alone", "version=1", "version", is_corrupt),
        ("a parent without a name", "ffffffff", "00000001", is_corrupt),
    ];
    for (name, from, to, verdict) in cases {
        let text = TEXT.replace(from, to);
        assert_ne!(text, TEXT, "{name}");
        let done = Vmdk::open(memory(text.into_bytes()));
        let shown = format!("{done:?}");
        assert!(verdict(done), "{name}: {shown}");
    }
    let many = format!("{TEXT}{}", "RW 8 SPARSE \"x\"\n".repeat(2048));
    assert!(is_unsupported(Vmdk::open(memory(many.into_bytes()))), "a file handle for each extent");
    let long = format!("{TEXT}{}", "#\n".repeat(1 << 19));
    assert!(is_unsupported(Vmdk::open(memory(long.into_bytes()))), "too long");
    let mut made = Made::new();
    made.text(&format!("{TEXT}RW 8 FLAT \"/etc/shadow\" 0\n"));
    assert!(is_unsupported(made.open()), "a descriptor inside an extent that names another");
}

#[test]
fn lone_extents_are_no_disks() {
    for magic in [&b"COWD"[..], b"\xbe\xba\xfe\xca\0\0\0\0"] {
        let mut bytes = vec![0; 4096];
        bytes[..magic.len()].copy_from_slice(magic);
        assert!(is_unsupported(Vmdk::open(memory(bytes))));
    }
    assert!(is_corrupt(Vmdk::open(memory(vec![0; 4096]))));
    assert!(is_corrupt(Vmdk::open(memory(vec![]))));
}

#[test]
fn parents_are_named_and_known_by_their_content() {
    let child = |hint: &str, cid: &str| {
        let text = TEXT.replace("ffffffff", cid) + &format!("parentFileNameHint=\"{hint}\"\n");
        Vmdk::open(memory(text.into_bytes())).expect("opens")
    };
    let names = |hint: &str| child(hint, "1").parent().expect("a parent").names();
    assert_eq!(names("base.vmdk"), ["base.vmdk"]);
    assert_eq!(names("/vmfs/volumes/1/vm/base.vmdk"), ["base.vmdk", "/vmfs/volumes/1/vm/base.vmdk"]);
    assert_eq!(names("C:\\vm\\base.vmdk"), ["base.vmdk", "C:\\vm\\base.vmdk"]);
    let base = Vmdk::open(memory(TEXT.into())).expect("opens");
    assert!(child("b", "0000000A").check_parent(&base).is_ok());
    assert!(matches!(child("b", "b").check_parent(&base), Err(Error::ChainBroken { .. })));
    assert!(matches!(base.check_parent(&base), Err(Error::ChainBroken { .. })), "has no parent");
    assert!(base.parent().is_none());
}

/// The header, its descriptor, and one compressed grain as `marker` and `data` make it.
fn stream(sector: u64, len: Option<u32>, data: &[u8]) -> VmdkLayer {
    let mut made = Made::new();
    made.u32(8, 0x3_0001);
    made.put(77, &1u16.to_le_bytes());
    made.u64(8192, sector);
    made.u32(8200, len.unwrap_or(u32::try_from(data.len()).expect("small")));
    made.put(8204, data);
    made.layer().expect("opens")
}

fn zlib(raw: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::new(6));
    std::io::Write::write_all(&mut encoder, raw).expect("memory");
    encoder.finish().expect("memory")
}

#[test]
fn compressed_grains_are_checked_whole() {
    let raw: Vec<u8> = (0..GRAIN).map(|i| (i / 7).to_le_bytes()[0]).collect();
    let unpack = |layer: &VmdkLayer| {
        let (content, len) = layer.lookup(300, u64::MAX)?;
        let Content::Packed { block, skip: 300 } = content else { panic!("expected a packed grain, got {content:?}") };
        assert_eq!(len, GRAIN - 300);
        let mut out = vec![1];
        layer.unpack(&block, 1, &mut out).map(|()| out)
    };
    assert_eq!(unpack(&stream(0, None, &zlib(&raw))).expect("unpacks"), raw);
    let is_bad = |layer: &VmdkLayer| matches!(unpack(layer), Err(Error::BadBlock { .. }));
    assert!(is_bad(&stream(128, None, &zlib(&raw))), "another place's grain");
    assert!(is_bad(&stream(u64::MAX, None, &zlib(&raw))), "no place at all");
    assert!(is_bad(&stream(0, Some(0), &zlib(&raw))), "empty");
    assert!(is_bad(&stream(0, Some(u32::MAX), &zlib(&raw))), "longer than it can be");
    assert!(is_bad(&stream(0, None, &zlib(&raw[1..]))), "short");
    assert!(is_bad(&stream(0, None, &zlib(&[&raw[..], &[0]].concat()))), "a byte too much");
    assert!(is_bad(&stream(0, None, &zlib(&vec![0; 1 << 22]))), "a bomb");
    let mut flipped = zlib(&raw);
    let last = flipped.len() - 1;
    flipped[last] ^= 1;
    assert!(is_bad(&stream(0, None, &flipped)), "its checksum");
    assert!(is_bad(&stream(0, None, &zlib(&raw)[..100])), "cut");
}

#[test]
fn fingerprints_tell_disks_apart() {
    let print = |made: &Made| made.layer().expect("opens").fingerprint().expect("reads");
    let made = Made::new();
    assert_eq!(print(&made), print(&Made::new()));
    let changes: [fn(&mut Made); 3] =
        [|m| m.u32(4 * SECTOR + 8, 17), |m| m.text(&TEXT.replace("=0000000a", "=0000000b")), |m| m.bytes.push(0)];
    for change in changes {
        let mut other = Made::new();
        change(&mut other);
        assert_ne!(print(&made), print(&other));
    }
}
