//! Exports made by hand. Whole disks of our own writer are compared in `tests/it/foreign/archive.rs`.

use super::{xxhash::xxh64, *};
use crate::{Layer, storage::MemoryStorage};

fn member(name: &str, data: &[u8]) -> Vec<u8> {
    of_kind(b'0', name, data)
}

fn of_kind(kind: u8, name: &str, data: &[u8]) -> Vec<u8> {
    let mut header = vec![0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
    header[156] = kind;
    header[257..263].copy_from_slice(b"ustar\0");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header.extend(data);
    header.resize(header.len().next_multiple_of(512), 0);
    header
}

fn described(size: u64) -> Vec<u8> {
    let field = |name: &str, value: &str| format!("<member><name>{name}</name><value>{value}</value></member>");
    let object = |class: &str, id: &str, fields: &str| {
        let snapshot = field("snapshot", &format!("<struct>{fields}</struct>"));
        format!("<value><struct>{}{}{snapshot}</struct></value>", field("class", class), field("id", id))
    };
    let vdi = object("VDI", "Ref:7", &field("virtual_size", &size.to_string()));
    let vbd = object("VBD", "Ref:6", &(field("VDI", "Ref:7") + &field("device", "xvda")));
    let objects = field("objects", &format!("<array><data>{vdi}{vbd}</data></array>"));
    format!("<?xml version=\"1.0\"?>\n<value><struct>{objects}</struct></value>").into_bytes()
}

fn open(parts: &[Vec<u8>]) -> Result<Xva> {
    Xva::open(Arc::new(MemoryStorage::new("made.xva", [&parts.concat()[..], &[0; 1024]].concat())))
}

#[test]
fn xxh64_gives_its_published_values() {
    assert_eq!(xxh64(b""), 0xEF46_DB37_51D8_E999);
    assert_eq!(xxh64(b"a"), 0xD24E_C4F1_A98C_6E5B);
    assert_eq!(xxh64(b"abc"), 0x44BC_2CF5_AD77_0999);
    assert_eq!(xxh64(b"Nobody inspects the spammish repetition"), 0xFBCE_A83C_8A37_8BF1);
}

#[test]
fn blocks_are_checked_and_what_is_not_there_is_zeros() {
    let block = vec![5u8; 1 << 20];
    let sum_of = |bytes: &[u8]| format!("{:016X}", xxh64(bytes));
    let sum = sum_of(&block);
    let (zeros, last) = (vec![0; 1 << 20], vec![7u8; 512]);
    let parts = |sum: &str| {
        vec![
            member("ova.xml", &described((4 << 20) + 512)),
            member("Ref:7/00000000", &zeros),
            member("Ref:7/00000000.xxhash", sum_of(&zeros).as_bytes()),
            // Nothing for five seconds, twice: what follows bears later numbers.
            member("Ref:7/00000001", b""),
            member("Ref:7/00000001.xxhash", b"EF46DB3751D8E999"),
            member("Ref:7/00000002", &block),
            member("Ref:7/00000002.xxhash", sum.as_bytes()),
            member("Ref:7/00000004", b""),
            member("Ref:7/00000006", &last),
            member("Ref:7/00000006.xxhash", sum_of(&last).as_bytes()),
        ]
    };
    let xva = open(&parts(&sum)).expect("opens");
    assert_eq!(xva.disks(), ["xvda"]);
    let disk = xva.disk("xvda").expect("the disk");
    assert!(matches!(disk.lookup(0, 1 << 30), Ok((crate::Content::Packed { .. }, n)) if n == 1 << 20));
    let (crate::Content::Packed { block: at, skip }, len) = disk.lookup((1 << 20) + 9, 1 << 30).expect("lookup") else {
        panic!("a block")
    };
    assert_eq!((skip, len), (9, (1 << 20) - 9));
    let mut out = Vec::new();
    disk.unpack(&at, 1, &mut out).expect("unpack");
    assert_eq!(out, block);
    assert_eq!(disk.lookup(2 << 20, 1 << 30).expect("lookup"), (crate::Content::Zero, 2 << 20));
    assert!(matches!(disk.lookup(4 << 20, 1 << 30), Ok((crate::Content::Packed { .. }, 512))));

    let wrong = open(&parts("0")).expect("opens").disk("xvda").expect("the disk");
    assert!(matches!(wrong.unpack(&at, 1, &mut out), Err(Error::BadBlock { .. })));
}

/// What says that a member is sparse, in the extended header before it.
const SPARSE: &[u8] = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n";

#[test]
fn what_makes_no_sense_is_refused() {
    let block = || member("Ref:7/00000000", &[1; 512]);
    let block_of = |number: u32| member(&format!("Ref:7/{number:08}"), &[1; 1 << 20]);
    let empty = |number: u32| member(&format!("Ref:7/{number:08}"), b"");
    let with = |parts: &[Vec<u8>]| open(parts).and_then(|xva| xva.disk("xvda").map(drop));
    assert!(with(&[member("ova.xml", &described(512)), block()]).is_ok());
    let cases: &[(&str, Vec<Vec<u8>>)] = &[
        ("twice", vec![member("ova.xml", &described(512)), block(), block()]),
        ("twice", vec![member("ova.xml", &described(512)), block(), member("Ref:7/00000000", b"")]),
        ("twice", vec![member("ova.xml", &described(512)), block(), empty(1), empty(1)]),
        ("without ova.xml", vec![block()]),
        ("does not fit", vec![member("ova.xml", &described(1 << 20)), block()]),
        ("does not fit", vec![member("ova.xml", &described(512)), block(), member("Ref:7/00000009", &[1; 512])]),
        ("first and last", vec![member("ova.xml", &described(512)), empty(0)]),
        ("first and last", vec![member("ova.xml", &described(1 << 20)), empty(1), block_of(2)]),
        ("first and last", vec![member("ova.xml", &described(3 << 20)), block_of(0), empty(1), block_of(2)]),
        ("first and last", vec![member("ova.xml", &described(2 << 20)), block_of(0)]),
        ("first and last", vec![member("ova.xml", &described(2 << 20)), block_of(1)]),
        ("first and last", vec![member("ova.xml", &described(2 << 20))]),
        (
            "no checksum",
            vec![
                member("ova.xml", &described(2 << 20)),
                block_of(0),
                member("Ref:7/00000000.xxhash", b"1"),
                block_of(1),
            ],
        ),
        // As `tar` packs a folder again: sparse, or with one file for blocks that are alike.
        ("sparse", vec![member("ova.xml", &described(512)), of_kind(b'x', "x", SPARSE), block()]),
        ("kind 'S'", vec![member("ova.xml", &described(512)), of_kind(b'S', "Ref:7/00000000", &[1; 512])]),
        ("link", vec![member("ova.xml", &described(512)), block(), of_kind(b'1', "Ref:7/00000001", b"")]),
        ("link", vec![member("ova.xml", &described(512)), block(), of_kind(b'2', "Ref:7/00000001", b"")]),
        ("no number", vec![member("ova.xml", &described(512)), member("Ref:7/x", &[1; 512])]),
        ("no size", vec![member("ova.xml", &described(0))]),
        ("without disks", vec![member("ova.xml", b"<value/>")]),
        ("ova.xml", vec![member("ova.xml", b"<!DOCTYPE a [<!ENTITY b \"c\">]><a>&b;</a>")]),
    ];
    for (text, parts) in cases {
        let error = with(parts).expect_err(text);
        assert!(error.to_string().contains(text), "{text}: {error}");
    }
}

#[test]
fn an_archive_that_was_cut_or_lost_its_rest_is_refused() {
    let parts = [
        member("ova.xml", &described(3 << 20)),
        member("Ref:7/00000000", &[1; 1 << 20]),
        member("Ref:7/00000001", &[2; 1 << 20]),
        member("Ref:7/00000002", &[3; 1 << 20]),
    ];
    let whole = [&parts.concat()[..], &[0; 1024]].concat();
    let open =
        |bytes: Vec<u8>| Xva::open(Arc::new(MemoryStorage::new("made.xva", bytes))).and_then(|xva| xva.disk("xvda"));
    open(whole.clone()).expect("whole");
    let cut: usize = parts[..3].iter().map(Vec::len).sum();
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        open(bytes)
    };
    assert!(matches!(with(&|bytes| bytes.truncate(cut)), Err(Error::Truncated { .. })), "cut between two members");
    assert!(matches!(with(&|bytes| bytes.truncate(whole.len() - 1024)), Err(Error::Truncated { .. })), "no end");
    assert!(with(&|bytes| bytes[cut..].fill(0)).is_err(), "its rest is zeros");
    assert!(matches!(with(&|bytes| bytes[cut..cut + 512].fill(0)), Err(Error::Corrupt { .. })), "a sector was lost");
}
