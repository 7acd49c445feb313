//! What no writer of ours makes. Whole files are compared in `tests/it/foreign/veeam.rs`.

use super::*;
use crate::{
    made::{is_corrupt, is_truncated, is_unsupported},
    storage::MemoryStorage,
};

/// A table of a list as its groups are laid out: 1, 3, 12, 48 pages, each with a link, the first of a group with
/// the ids of the whole group.
#[test]
fn words_of_a_table_lie_where_its_groups_leave_room() {
    let (mut group, mut page, mut expected) = (1u64, 0u64, Vec::new());
    while expected.len() < 40_000 {
        for number in 0..group {
            let first = if number == 0 { 1 + group } else { 1 };
            expected.extend((first..512).map(|word| 512 * page + word));
            page += 1;
        }
        group = if group == 1 { 3 } else { 4 * group };
    }
    for (number, word) in (0..).zip(expected) {
        assert_eq!(pages::word_of(number), word, "page {number}");
    }
}

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    bytes[at..at + part.len()].copy_from_slice(part);
}

fn seal(bytes: &mut [u8], at: usize) {
    let places = slot::u32_at(bytes, at + 0x74) as usize;
    let sum = crc32c::crc32c(&bytes[at + 4..at + 4 + 0x78 + 16 * places]);
    put(bytes, at, &sum.to_le_bytes());
}

/// Two slots with room for four banks each and one bank of one page: an empty root folder.
fn made() -> Vec<u8> {
    let mut bytes = vec![0; 0x3000 + 3 * 4096];
    put(&mut bytes, 0, &13u32.to_le_bytes());
    put(&mut bytes, 4, b"\x01\0\0\0\x03\0\0\0md5\0");
    put(&mut bytes, 0x107, &9u32.to_le_bytes());
    put(&mut bytes, 0x10b, &0x10_0000u32.to_le_bytes());
    put(&mut bytes, 0x3000, &1u16.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[0x3000..]);
    let len = bytes.len() as u64;
    for (at, number) in [(0x1000, 5u64), (0x2000, 6)] {
        put(&mut bytes, at + 4, &1u32.to_le_bytes());
        put(&mut bytes, at + 8, &number.to_le_bytes());
        put(&mut bytes, at + 0x10, &len.to_le_bytes());
        put(&mut bytes, at + 0x74, &4u32.to_le_bytes());
        put(&mut bytes, at + 0x78, &1u32.to_le_bytes());
        put(&mut bytes, at + 0x7c, &crc.to_le_bytes());
        put(&mut bytes, at + 0x80, &0x3000u64.to_le_bytes());
        put(&mut bytes, at + 0x88, &(3 * 4096u32).to_le_bytes());
        seal(&mut bytes, at);
    }
    bytes
}

fn open(bytes: Vec<u8>) -> Result<Vbk> {
    Vbk::open(Arc::new(MemoryStorage::new("made.vbk", bytes)))
}

#[test]
fn the_newer_valid_slot_counts() {
    let file = open(made()).expect("opens");
    assert_eq!(file.shared.slot.number, 6);
    assert!(file.backups().expect("an empty folder").is_empty());
    let mut torn = made();
    torn[0x2010] ^= 1;
    assert_eq!(open(torn).expect("opens").shared.slot.number, 5);
    let mut first_gone = made();
    first_gone[0x1000..0x1100].fill(0);
    assert_eq!(open(first_gone).expect("opens").shared.slot.number, 6);
    let mut both = made();
    both[0x1010] ^= 1;
    both[0x2010] ^= 1;
    assert!(is_corrupt(open(both)));
}

#[test]
fn hostile_heads_are_refused() {
    type Verdict = fn(Result<Vec<Backup>>) -> bool;
    let both = |at: usize, part: &[u8]| {
        let mut bytes = made();
        for slot in [0x1000, 0x2000] {
            put(&mut bytes, slot + at, part);
            seal(&mut bytes, slot);
        }
        bytes
    };
    let head = |at: usize, part: &[u8]| {
        let mut bytes = made();
        put(&mut bytes, at, part);
        bytes
    };
    let is_key = |done: Result<Vec<Backup>>| matches!(done, Err(Error::Key { .. }));
    let mut sealed = made();
    put(&mut sealed, 0x3000 + 0xc04, &[1; 16]);
    put(&mut sealed, 0x3000 + 0xc14, &[1]);
    let crc = crc32c::crc32c(&sealed[0x3000..]);
    for slot in [0x1000, 0x2000] {
        put(&mut sealed, slot + 0x7c, &crc.to_le_bytes());
        put(&mut sealed, slot + 0x24, &[1]);
        seal(&mut sealed, slot);
    }
    let cases: [(&str, Vec<u8>, Verdict); 14] = [
        ("never finished", head(4, &[0]), is_corrupt),
        ("version 14", head(0, &[14]), is_unsupported),
        ("version 8", head(0, &[8]), is_unsupported),
        ("blocks of 5000", head(0x10b, &5000u32.to_le_bytes()), is_corrupt),
        ("not committed", both(4, &[0]), is_corrupt),
        ("cut", both(0x10, &u64::MAX.to_le_bytes()), is_truncated),
        ("more banks than room", both(0x78, &[5]), is_corrupt),
        ("a bank outside", both(0x80, &u64::MAX.to_le_bytes()), is_truncated),
        ("a bank of gigabytes", both(0x88, &u32::MAX.to_le_bytes()), is_corrupt),
        ("a bank's checksum", both(0x7c, &[9, 9, 9]), |done| done.is_ok()),
        ("a folder of a billion", both(0x24, &(1u64 << 30).to_le_bytes()), is_unsupported),
        ("a folder with no page", both(0x1c, &[&u64::MAX.to_le_bytes()[..], &[1]].concat()), is_corrupt),
        ("a page past its bank", both(0x1c, &[&7u64.to_le_bytes()[..], &[1]].concat()), is_corrupt),
        ("encrypted", sealed, is_key),
    ];
    for (what, bytes, verdict) in cases {
        let done = open(bytes).and_then(|file| file.backups());
        let said = format!("{done:?}");
        assert!(verdict(done), "{what}: {said}");
    }
    for len in (0..made().len()).step_by(509) {
        assert!(open(made()[..len].to_vec()).is_err(), "cut at {len}");
    }
}

#[test]
fn summaries_say_which_point_they_are() {
    let text = |inner: &str| format!("\u{feff}<OibSummary>{inner}</OibSummary>");
    let one = text(
        "<OIB Id='{336B9628-9715-4509-b8c4-44efc85a31cf}' LinkId='00000000-0000-0000-0000-000000000000' \
         VmName='db01' CreationTimeUtc='02/27/2024 14:54:17' IsCorrupted='True'/>",
    );
    let summary = Summary::parse(one.as_bytes(), "f").expect("a summary");
    assert_eq!(summary.id, "336b9628-9715-4509-b8c4-44efc85a31cf");
    assert_eq!((summary.below, summary.machine.as_str()), (None, "db01"));
    assert_eq!(summary.created.map(|at| at.to_string()).as_deref(), Some("2024-02-27T14:54:17Z"));
    assert!(summary.is_corrupted && !summary.is_inconsistent);
    let two = text(
        "<OIB Id='336b9628-9715-4509-b8c4-44efc85a31c1' InsideDir='/a'/>\
         <OIB Id='336b9628-9715-4509-b8c4-44efc85a31c2' InsideDir='b' LinkId='336b9628-9715-4509-b8c4-44efc85a31c1'/>",
    );
    let summary = Summary::parse(two.as_bytes(), "b").expect("a summary");
    assert_eq!(summary.below.as_deref(), Some("336b9628-9715-4509-b8c4-44efc85a31c1"));
    assert_eq!(summary.machine, "b", "a machine without a name is called as its folder");
    assert!(Summary::parse(two.as_bytes(), "c").is_none(), "which of the two is not known");
}

#[test]
fn hostile_summaries_are_none() {
    let laughs = "<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;'>]><OibSummary>&b;</OibSummary>";
    let deep = format!("<OibSummary>{}", "<a>".repeat(150_000));
    let wide = format!("<OibSummary>{}</OibSummary>", "<a/>".repeat(300_000));
    for text in [laughs, &deep, &wide, "", "<x", "<OibSummary/>", "<OibSummary><OIB Id='x'/></OibSummary>"] {
        assert!(Summary::parse(text.as_bytes(), "f").is_none(), "{}", &text[..text.len().min(40)]);
    }
    assert!(Summary::parse(b"\xff\xfe<\0", "f").is_none());
}
