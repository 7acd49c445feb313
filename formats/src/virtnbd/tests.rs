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
    for (from, to) in
        [("incremental", "incremenTal"), ("65536", "0"), ("65536", "18446744073709551615"), ("\"sda\"", "5"), ("}", "")]
    {
        assert!(is_corrupt(open(stream(&META.replace(from, to), &[end]))), "{to}");
    }
    for compressed in ["true", "4"] {
        let meta = META.replace("\"compressed\":false", &format!("\"compressed\":{compressed}"));
        assert!(is_corrupt(open(stream(&meta, &[end]))), "no list of stored lengths");
        let other = meta.replace('}', ",\"compressionMethod\":\"zstd\"}");
        assert!(is_unsupported(open(stream(&other, &[end]))));
    }
    let mut long = stream(META, &[end]);
    long[22..38].copy_from_slice(b"00000000ffffffff");
    assert!(is_corrupt(open(long)));
    let good = stream(META, &[("data", 0, 512), end]);
    for len in 0..good.len() {
        assert!(open(good[..len].to_vec()).is_err(), "cut at {len}");
    }
}

/// A frame of LZ4 with all checksums: blocks of `block` bytes, each packed where that is shorter.
fn frame(bytes: &[u8], block: usize) -> Vec<u8> {
    let mut head = vec![0x40 | 0x20 | 0x10 | 8 | 4, 0x70];
    head.extend((bytes.len() as u64).to_le_bytes());
    let sum = lz4_frame::xxh32(&head).to_le_bytes()[1];
    let mut out = [&0x184D_2204u32.to_le_bytes()[..], &head, &[sum]].concat();
    for part in bytes.chunks(block) {
        let packed = lz4_flex::block::compress(part);
        let (size, body) = match u32::try_from(packed.len()).expect("small") {
            n if packed.len() < part.len() => (n, packed.as_slice()),
            _ => (u32::try_from(part.len()).expect("small") | 1 << 31, part),
        };
        out.extend(size.to_le_bytes());
        out.extend(body);
        out.extend(lz4_frame::xxh32(body).to_le_bytes());
    }
    out.extend([0; 4]);
    out.extend(lz4_frame::xxh32(bytes).to_le_bytes());
    out
}

fn packed(list: &str, frames: &[&[u8]], len: u64) -> Vec<u8> {
    let meta = META.replace("\"compressed\":false", "\"compressed\":true");
    let mut out = stream(&meta, &[]);
    out.extend(head("data", 4096, len).bytes());
    out.extend(frames.concat());
    out.extend(b"\r\n");
    out.extend(head("stop", 0, 0).bytes());
    out.extend(list.bytes());
    out.extend(b"\r\n");
    out.extend(head("comp", 0, list.len() as u64).bytes());
    out
}

#[test]
fn xxh32_gives_its_published_values() {
    assert_eq!(lz4_frame::xxh32(b""), 0x02CC_5D05);
    assert_eq!(lz4_frame::xxh32(b"a"), 0x550D_7456);
    assert_eq!(lz4_frame::xxh32(b"abc"), 0x32D1_53FF);
    assert_eq!(lz4_frame::xxh32(b"Nobody inspects the spammish repetition"), 0xE229_3B2F);
}

#[test]
fn compressed_pieces_are_decoded_and_checked() {
    let bytes: Vec<u8> = (0..30_000u32).map(|i| (i * i / 700).to_le_bytes()[0]).collect();
    let (one, two) = (frame(&bytes[..20_000], 7000), frame(&bytes[20_000..], 100));
    let whole = frame(&bytes, 4096);
    let several = format!("[{{\"30000\": [{}, {}]}}]", one.len(), two.len());
    let single = format!("[{}]", whole.len());
    for file in [packed(&several, &[&one, &two], 30_000), packed(&single, &[&whole], 30_000)] {
        let layer = open(file.clone()).expect("opens");
        let (mut out, mut at) = (Vec::new(), 4096);
        let mut found: Vec<u8> = Vec::new();
        while at < 34_096 {
            let (Content::Packed { block, skip: 0 }, len) = layer.lookup(at, 1 << 20).expect("lookup") else {
                panic!()
            };
            layer.unpack(&block, 1, &mut out).expect("decodes");
            found.extend(&out);
            at += len;
        }
        assert!(found == bytes);
        assert_eq!(layer.lookup(at, 1 << 20).expect("lookup").0, Content::Zero);
        // Any flipped byte of a frame is noticed.
        let start = file.windows(4).position(|four| four == 0x184D_2204u32.to_le_bytes()).expect("a frame");
        for flip in (start..start + one.len()).step_by(97) {
            let mut torn = file.clone();
            torn[flip] ^= 0x10;
            let Ok(layer) = open(torn) else { continue };
            let Ok((Content::Packed { block, .. }, _)) = layer.lookup(4096, 1 << 20) else { continue };
            assert!(layer.unpack(&block, 1, &mut out).is_err(), "{flip}");
        }
    }
    for list in ["[]", "[1]", "[{\"1\": []}]", "[99999999]", "{", "[\"x\"]"] {
        assert!(open(packed(list, &[&whole], 30_000)).is_err(), "{list}");
    }
    assert!(
        open(packed(&single, &[&whole], 30_001)).expect("its length is the stream's word").piece(4096, 9000).is_ok()
    );
}
