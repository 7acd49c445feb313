//! Streams made by hand. Chains are compared in `tests/it/foreign/streams.rs`.

use super::*;
use crate::{
    made::{is_corrupt, is_truncated, is_unsupported},
    storage::MemoryStorage,
};

const META: &str = r#"{"virtualSize":65536,"diskName":"sda","compressed":false,"incremental":false}"#;

fn head(kind: &str, start: u64, len: u64) -> String {
    format!("{kind} {start:016x} {len:016x}\r\n")
}

fn stream(meta: &str, pieces: &[(&str, u64, u64)]) -> Vec<u8> {
    let mut out = format!("{}{meta}\r\n", head("meta", 0, meta.len() as u64)).into_bytes();
    for (kind, start, len) in pieces {
        out.extend(head(kind, *start, *len).bytes());
        if *kind == "data" {
            out.extend((0..*len).map(|i| i.to_le_bytes()[0]));
            out.extend(b"\r\n");
        }
    }
    out
}

fn open(bytes: Vec<u8>) -> Result<VirtnbdLayer> {
    VirtnbdLayer::open(Arc::new(MemoryStorage::new("sda.full.data", bytes)))
}

#[test]
fn pieces_in_any_order_are_found_and_gaps_say_what_the_kind_of_file_says() {
    let pieces = [("data", 8192, 4096), ("zero", 20_480, 4096), ("data", 0, 512), ("stop", 0, 0)];
    let layer = open(stream(META, &pieces)).expect("opens");
    let first = 40 + META.len() as u64 + 2 + 40;
    assert_eq!(layer.lookup(8200, u64::MAX).expect("data"), (Content::Plain { file: 0, offset: first + 8 }, 4088));
    assert_eq!(layer.lookup(600, u64::MAX).expect("a gap"), (Content::Zero, 8192 - 600));
    assert_eq!(layer.below().expect("a full one"), None);
    let meta = META.replace("\"incremental\":false", "\"incremental\":true,\"parentCheckpoint\":\"v.0\"");
    let layer = open(stream(&meta, &pieces)).expect("opens");
    assert_eq!(layer.lookup(600, u64::MAX).expect("a gap"), (Content::Absent, 8192 - 600));
    assert_eq!(layer.lookup(20_480, u64::MAX).expect("zeros"), (Content::Zero, 4096));
    assert_eq!(layer.lookup(24_576, u64::MAX).expect("the rest"), (Content::Absent, 65_536 - 24_576));
    assert_eq!(layer.below().expect("named"), Some("v.0"));
    let orphan = META.replace("\"incremental\":false", "\"incremental\":true");
    let orphan = open(stream(&orphan, &pieces)).expect("opens");
    assert!(matches!(orphan.below(), Err(Error::ChainBroken { .. })));
}

#[test]
fn hostile_streams_are_refused() {
    let end = ("stop", 0, 0);
    assert!(is_truncated(open(stream(META, &[("data", 0, 512)]))), "no end");
    assert!(is_corrupt(open(stream(META, &[("data", 0, 512), ("zero", 511, 1), end]))), "over each other");
    assert!(is_corrupt(open(stream(META, &[("zero", 65_536, 1), end]))), "past the end");
    assert!(is_corrupt(open(stream(META, &[("zero", u64::MAX, 2), end]))), "no such number");
    assert!(is_corrupt(open(stream(META, &[("what", 0, 0), end]))));
    for (from, to) in [("65536", "0"), ("65536", "18446744073709551615"), ("\"sda\"", "5"), ("}", "")] {
        assert!(is_corrupt(open(stream(&META.replace(from, to), &[end]))), "{to}");
    }
    for compressed in ["true", "4"] {
        let meta = META.replace("\"compressed\":false", &format!("\"compressed\":{compressed}"));
        assert!(is_unsupported(open(stream(&meta, &[end]))));
    }
    let mut long = stream(META, &[end]);
    long[22..38].copy_from_slice(b"00000000ffffffff");
    assert!(is_corrupt(open(long)));
    let good = stream(META, &[("data", 0, 512), end]);
    for len in 0..good.len() {
        assert!(open(good[..len].to_vec()).is_err(), "cut at {len}");
    }
}
