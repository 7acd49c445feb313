//! Files made by hand: what no tool here writes. Disks that QEMU writes, and differencing ones of our own
//! writer, are compared in `tests/it/foreign/hyperv.rs`.

#![expect(clippy::cast_possible_truncation, reason = "test disks are small")]

use super::{header::checksum, *};
use crate::{
    Content, Layer,
    made::{Image, Order, is_corrupt, is_truncated, is_unsupported},
    storage::MemoryStorage,
};

const MIB: usize = 1 << 20;
const LOG: usize = MIB;
const METADATA: usize = 2 * MIB;
const BAT: usize = 3 * MIB;
const BLOCK: u64 = 1 << 20;

/// A disk of 4 MiB in blocks of 1 MiB: block 0 is stored at 4 MiB, 1 is zero, the rest is not present.
type Made = Image<Vhdx>;

fn stored(guid: &str) -> [u8; 16] {
    uuid::Uuid::parse_str(guid).expect("a guid").to_bytes_le()
}

impl Made {
    fn new() -> Self {
        let mut made = Self::blank(5 * MIB, Order::Little);
        made.put(0, b"vhdxfile");
        made.header(0x1_0000, 1);
        made.header(0x2_0000, 2);
        made.put(0x3_0000, b"regi");
        made.u32(0x3_0008, 2);
        made.region(0x3_0010, "2dc27766-f623-4200-9d64-115e9bfd4a08", BAT);
        made.region(0x3_0030, "8b7ca206-4790-4b9a-b8fe-575f050f886e", METADATA);
        made.put(METADATA, b"metadata");
        made.put(METADATA + 10, &3u16.to_le_bytes());
        made.item(0, "caa16737-fa36-4d43-b3b6-33f0aa44e76b", 0, 8);
        made.item(1, "2fa54224-cd1b-4876-b211-5dbed83bf4b8", 8, 8);
        made.item(2, "8141bf1d-a96f-4709-ba47-f233a8faab5f", 16, 4);
        made.u32(METADATA + 0x1_0000, 1 << 20);
        made.u64(METADATA + 0x1_0008, 4 << 20);
        made.u32(METADATA + 0x1_0010, 512);
        made.entry(0, 4 << 20 | 6);
        made.entry(1, 2);
        made.bytes[4 * MIB..].fill(0xab);
        made.seal();
        made
    }

    fn header(&mut self, at: usize, sequence: u64) {
        self.put(at, b"head");
        self.u64(at + 8, sequence);
        self.put(at + 32, &[7; 16]);
        self.put(at + 66, &1u16.to_le_bytes());
        self.u32(at + 68, 1 << 20);
        self.u64(at + 72, LOG as u64);
    }

    fn region(&mut self, at: usize, guid: &str, offset: usize) {
        self.put(at, &stored(guid));
        self.u64(at + 16, offset as u64);
        self.u32(at + 24, 1 << 20);
    }

    fn item(&mut self, number: usize, guid: &str, offset: u32, len: u32) {
        let at = METADATA + 32 + 32 * number;
        self.put(at, &stored(guid));
        self.u32(at + 16, 0x1_0000 + offset);
        self.u32(at + 20, len);
    }

    fn entry(&mut self, index: usize, value: u64) {
        self.u64(BAT + 8 * index, value);
    }

    /// Makes the checksums right.
    fn seal(&mut self) {
        for (at, len) in [(0x1_0000, 4096), (0x2_0000, 4096), (0x3_0000, 0x1_0000)] {
            let sum = checksum(&self.bytes[at..at + len], 4);
            self.u32(at + 4, sum);
        }
    }

    /// Puts an entry of the log at `at`: pages to be replaced, and ranges to be zeroed.
    fn log_entry(&mut self, at: usize, sequence: u64, tail: usize, pages: &[(u64, u8)], zeros: &[(u64, u64)]) {
        let len = 4096 * (1 + pages.len());
        let file_len = self.bytes.len() as u64;
        let mut entry = vec![0; len];
        entry[..4].copy_from_slice(b"loge");
        entry[8..12].copy_from_slice(&(len as u32).to_le_bytes());
        entry[12..16].copy_from_slice(&(tail as u32).to_le_bytes());
        entry[16..24].copy_from_slice(&sequence.to_le_bytes());
        entry[24..28].copy_from_slice(&((pages.len() + zeros.len()) as u32).to_le_bytes());
        entry[32..48].copy_from_slice(&[9; 16]);
        entry[48..56].copy_from_slice(&file_len.to_le_bytes());
        entry[56..64].copy_from_slice(&file_len.to_le_bytes());
        let mut place = 64;
        for (offset, len) in zeros {
            entry[place..place + 4].copy_from_slice(b"zero");
            entry[place + 8..place + 16].copy_from_slice(&len.to_le_bytes());
            entry[place + 16..place + 24].copy_from_slice(&offset.to_le_bytes());
            entry[place + 24..place + 32].copy_from_slice(&sequence.to_le_bytes());
            place += 32;
        }
        for (number, (offset, byte)) in pages.iter().enumerate() {
            entry[place..place + 4].copy_from_slice(b"desc");
            entry[place + 4..place + 8].fill(*byte);
            entry[place + 8..place + 16].fill(*byte);
            entry[place + 16..place + 24].copy_from_slice(&offset.to_le_bytes());
            entry[place + 24..place + 32].copy_from_slice(&sequence.to_le_bytes());
            place += 32;
            let data = &mut entry[4096 * (1 + number)..4096 * (2 + number)];
            data.fill(*byte);
            data[..4].copy_from_slice(b"data");
            data[4..8].copy_from_slice(&((sequence >> 32) as u32).to_le_bytes());
            data[4092..].copy_from_slice(&(sequence as u32).to_le_bytes());
        }
        let sum = checksum(&entry, 4);
        entry[4..8].copy_from_slice(&sum.to_le_bytes());
        for (number, sector) in entry.chunks(4096).enumerate() {
            self.put(LOG + (at + 4096 * number) % MIB, sector);
        }
    }

    fn with_log(mut self) -> Self {
        self.put(0x2_0030, &[9; 16]);
        self.seal();
        self
    }

    fn open(&self) -> Result<Vhdx> {
        Vhdx::open(Arc::new(MemoryStorage::new("made.vhdx", self.bytes.clone())))
    }

    fn layer(&self) -> Result<VhdxLayer> {
        self.open()?.layer()
    }

    fn page(&self, offset: u64) -> Result<[u8; 4096]> {
        let mut page = [0; 4096];
        let layer = self.layer()?;
        match layer.lookup(offset, 4096)? {
            (Content::Plain { offset, .. }, 4096) => layer.file(0)?.read_at(offset, &mut page).expect("reads"),
            other => panic!("{other:?}"),
        }
        Ok(page)
    }
}

#[test]
fn the_made_disk_reads() {
    let layer = Made::new().layer().expect("opens");
    assert_eq!((layer.size(), layer.grain()), (4 << 20, BLOCK));
    let plain = |offset| Content::Plain { file: 0, offset };
    assert_eq!(layer.lookup(5, u64::MAX).expect("plain"), (plain(4 * BLOCK + 5), BLOCK - 5));
    assert_eq!(layer.lookup(BLOCK, u64::MAX).expect("zero"), (Content::Zero, BLOCK));
    assert_eq!(layer.lookup(2 * BLOCK, u64::MAX).expect("absent"), (Content::Absent, 2 * BLOCK));
}

#[test]
fn hostile_structures_are_refused() {
    type Verdict = fn(Result<VhdxLayer>) -> bool;
    type Change = fn(&mut Made);
    let cases: [(&str, Change, Verdict); 16] = [
        ("signature", |m| m.put(0, b"x"), is_corrupt),
        ("version", |m| [0x1_0000, 0x2_0000].iter().for_each(|at| m.bytes[at + 66] = 2), is_unsupported),
        ("region count", |m| m.u32(0x3_0008, 2048), is_corrupt),
        ("no metadata", |m| m.u32(0x3_0008, 1), is_corrupt),
        (
            "unknown required region",
            |m| {
                m.region(0x3_0010, "00000000-0000-0000-0000-000000000001", BAT);
                m.u32(0x3_0010 + 28, 1);
            },
            is_unsupported,
        ),
        ("region over the headers", |m| m.u64(0x3_0020, 0), is_corrupt),
        ("region not aligned", |m| m.u64(0x3_0020, 3 << 20 | 4096), is_corrupt),
        ("region past the end", |m| m.u64(0x3_0020, 1 << 40), is_truncated),
        ("block table too short", |m| m.u32(0x3_0028, 8), is_corrupt),
        ("metadata count", |m| m.put(METADATA + 10, &[0xff, 0xff]), is_corrupt),
        ("item outside", |m| m.u32(METADATA + 48, u32::MAX), is_corrupt),
        (
            "unknown required item",
            |m| {
                m.put(METADATA + 10, &[4]);
                m.item(3, "00000000-0000-0000-0000-000000000001", 0, 4);
                m.u32(METADATA + 32 + 96 + 24, 4);
            },
            is_unsupported,
        ),
        ("block size", |m| m.u32(METADATA + 0x1_0000, 3 << 20), is_corrupt),
        ("sector size", |m| m.u32(METADATA + 0x1_0010, 1024), is_corrupt),
        ("disk size", |m| m.u64(METADATA + 0x1_0008, u64::MAX), is_corrupt),
        ("a parent that is not said", |m| m.u32(METADATA + 0x1_0004, 2), is_corrupt),
    ];
    for (name, change, verdict) in cases {
        let mut made = Made::new();
        change(&mut made);
        made.seal();
        let done = made.layer();
        let shown = done.as_ref().err().map(ToString::to_string);
        assert!(verdict(done), "{name}: {shown:?}");
    }
    for len in [0, 7, 0x1_0000, 0x2_1000, 0x4_0000, METADATA, BAT] {
        let mut made = Made::new();
        made.bytes.truncate(len);
        assert!(made.layer().is_err(), "a file of {len} bytes");
    }
}

#[test]
fn one_valid_header_and_one_region_table_are_enough() {
    for broken in [0x1_0000, 0x2_0000] {
        let mut made = Made::new();
        made.bytes[broken + 100] ^= 1;
        assert!(made.layer().is_ok());
    }
    let mut made = Made::new();
    let table = made.bytes[0x3_0000..0x4_0000].to_vec();
    made.put(0x4_0000, &table);
    made.bytes[0x3_0000 + 5000] ^= 1;
    assert!(made.layer().is_ok());
    made.bytes[0x4_0000 + 5000] ^= 1;
    assert!(is_corrupt(made.layer()));
    let mut made = Made::new();
    made.bytes[0x1_0000 + 100] ^= 1;
    made.bytes[0x2_0000 + 100] ^= 1;
    assert!(is_corrupt(made.layer()));
}

#[test]
fn hostile_entries_spoil_only_their_block() {
    type Verdict = fn(Result<(Content, u64)>) -> bool;
    let cases: [(&str, u64, Verdict); 6] = [
        ("state 4", 4, is_corrupt),
        ("in part without a parent", 4 << 20 | 7, is_corrupt),
        ("into the headers", 6, is_corrupt),
        ("past the end", 5 << 20 | 6, is_truncated),
        ("far past the end", u64::MAX << 20 | 6, is_truncated),
        ("reserved bits", 4 << 20 | 8 | 6, is_corrupt),
    ];
    for (name, entry, verdict) in cases {
        let mut made = Made::new();
        made.entry(2, entry);
        let layer = made.layer().expect("opens");
        assert!(verdict(layer.lookup(2 * BLOCK, 1)), "{name}");
        assert!(layer.lookup(0, u64::MAX).is_ok() && layer.lookup(3 * BLOCK, 1).is_ok(), "{name}");
    }
}

#[test]
fn a_log_is_replayed_over_the_file() {
    let made = |entries: &dyn Fn(&mut Made)| {
        let mut made = Made::new();
        entries(&mut made);
        made.with_log()
    };
    let bat = BAT as u64;
    let block = 4 * BLOCK;
    // Without a valid entry nothing was under way.
    assert_eq!(made(&|_| {}).page(0).expect("opens"), [0xab; 4096]);
    let one = made(&|m| m.log_entry(0, 5, 0, &[(block, 0x11)], &[]));
    assert_eq!((one.page(0).expect("opens"), one.page(4096).expect("opens")), ([0x11; 4096], [0xab; 4096]));
    // Without the mark in the header the log is old.
    let mut old = Made::new();
    old.log_entry(0, 5, 0, &[(block, 0x11)], &[]);
    assert_eq!(old.page(0).expect("opens"), [0xab; 4096]);
    // Later entries lie over earlier ones, around the end of the log.
    let wrapped = made(&|m| {
        m.log_entry(MIB - 8192, 7, MIB - 8192, &[(block, 1), (block + 4096, 2)], &[]);
        m.log_entry(4096, 8, MIB - 8192, &[(block, 3)], &[(block + 4096, 8192)]);
    });
    assert_eq!((wrapped.page(0).expect("opens"), wrapped.page(4096).expect("opens")), ([3; 4096], [0; 4096]));
    assert_eq!(wrapped.page(12288).expect("opens"), [0xab; 4096]);
    // Part of a zeroed range written again.
    let over = made(&|m| {
        m.log_entry(0, 1, 0, &[], &[(block, 1 << 20)]);
        m.log_entry(4096, 2, 0, &[(block + 8192, 4)], &[]);
    });
    let pages: Vec<u8> = (0..4).map(|i| over.page(4096 * i).expect("opens")[77]).collect();
    assert_eq!(pages, [0, 0, 4, 0]);
    // The block table itself, which is what logs are for.
    let table = made(&|m| m.log_entry(0, 1, 0, &[], &[(bat, 4096)]));
    assert_eq!(table.layer().expect("opens").lookup(0, 1).expect("absent").0, Content::Absent);
}

#[test]
fn only_a_complete_sequence_is_replayed() {
    let made = |entries: &dyn Fn(&mut Made)| {
        let mut made = Made::new();
        entries(&mut made);
        made.with_log()
    };
    let block = 4 * BLOCK;
    let torn = made(&|m| {
        m.log_entry(0, 1, 0, &[(block, 1)], &[]);
        m.log_entry(8192, 2, 0, &[(block, 2)], &[]);
        m.bytes[LOG + 8192 + 5000] ^= 1;
    });
    assert_eq!(torn.page(0).expect("opens"), [1; 4096], "as if the torn entry had never been written");
    let gap = made(&|m| {
        m.log_entry(0, 1, 0, &[(block, 1)], &[]);
        m.log_entry(8192, 3, 0, &[(block, 3)], &[]);
    });
    assert_eq!(gap.page(0).expect("opens"), [1; 4096], "the newest does not reach its tail, the one before does");
    let tail = made(&|m| m.log_entry(8192, 3, 0, &[(block, 3)], &[]));
    assert!(is_corrupt(tail.layer()), "a tail that is nowhere");
    let short = made(&|m| {
        m.bytes.resize(6 * MIB, 0);
        m.log_entry(0, 1, 0, &[(block, 1)], &[]);
        m.bytes.truncate(5 * MIB);
    });
    assert!(is_truncated(short.layer()), "the file was longer when that was written");
    let odd = made(&|m| m.log_entry(0, 1, 0, &[(block + 8, 1)], &[]));
    assert!(is_corrupt(odd.layer()), "a page that is none");
    let huge = made(&|m| m.log_entry(0, 1, 0, &[], &[(block, u64::MAX - 4095 - block)]));
    assert!(huge.layer().is_ok_and(|layer| layer.lookup(0, 1).is_ok()), "a long range costs nothing");
}

#[test]
fn logs_that_cannot_be_are_refused() {
    for (at, value, verdict) in [
        (0x2_0000 + 68, 0u64, is_corrupt as fn(Result<VhdxLayer>) -> bool),
        (0x2_0000 + 68, 4096, is_corrupt),
        (0x2_0000 + 68, 128 << 20, is_unsupported),
    ] {
        let mut made = Made::new();
        made.u32(at, value as u32);
        assert!(verdict(made.with_log().layer()), "{value}");
    }
    let mut made = Made::new();
    made.u64(0x2_0000 + 72, 1 << 40);
    assert!(is_truncated(made.with_log().layer()));
}

#[test]
fn paths_of_another_computer_become_names() {
    assert_eq!(names(Some(".\\base.vhdx"), Some("D:\\vm\\base.vhdx")), ["base.vhdx", "./base.vhdx"]);
    assert_eq!(names(Some("..\\x\\a.vhdx"), Some("D:\\b.vhdx")), ["a.vhdx", "../x/a.vhdx", "b.vhdx"]);
    assert!(names(None, Some("")).is_empty());
}
