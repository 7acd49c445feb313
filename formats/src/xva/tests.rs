//! Exports made by hand. Whole disks of our own writer are compared in `tests/it/foreign/archive.rs`.

use super::{xxhash::xxh64, *};
use crate::{Layer, storage::MemoryStorage};

fn member(name: &str, data: &[u8]) -> Vec<u8> {
    let mut header = vec![0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
    header[156] = b'0';
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
    let sum = format!("{:016x}", xxh64(&block));
    let parts = |sum: &str| {
        vec![
            member("ova.xml", &described(3 << 20)),
            member("Ref:7/00000001", &block),
            member("Ref:7/00000001.xxhash", sum.as_bytes()),
            member("Ref:7/00000002", b""),
        ]
    };
    let xva = open(&parts(&sum)).expect("opens");
    assert_eq!(xva.disks(), ["xvda"]);
    let disk = xva.disk("xvda").expect("the disk");
    assert_eq!(disk.lookup(0, 1 << 30).expect("lookup"), (crate::Content::Zero, 1 << 20));
    let (crate::Content::Packed { block: at, skip }, len) = disk.lookup((1 << 20) + 9, 1 << 30).expect("lookup") else {
        panic!("a block")
    };
    assert_eq!((skip, len), (9, (1 << 20) - 9));
    let mut out = Vec::new();
    disk.unpack(&at, 1, &mut out).expect("unpack");
    assert_eq!(out, block);
    assert_eq!(disk.lookup(2 << 20, 1 << 30).expect("lookup"), (crate::Content::Zero, 1 << 20));

    let wrong = open(&parts("0")).expect("opens").disk("xvda").expect("the disk");
    assert!(matches!(wrong.unpack(&at, 1, &mut out), Err(Error::BadBlock { .. })));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let block = || member("Ref:7/00000000", &[1; 512]);
    let with = |parts: &[Vec<u8>]| open(parts).and_then(|xva| xva.disk("xvda").map(drop));
    assert!(with(&[member("ova.xml", &described(512)), block()]).is_ok());
    let cases: &[(&str, Vec<Vec<u8>>)] = &[
        ("twice", vec![member("ova.xml", &described(512)), block(), block()]),
        ("without ova.xml", vec![block()]),
        ("does not fit", vec![member("ova.xml", &described(1 << 20)), block()]),
        ("does not fit", vec![member("ova.xml", &described(512)), member("Ref:7/00000009", &[1; 512])]),
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
