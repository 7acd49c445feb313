//! Prefixes, garbage tails, bombs and damage, for every encoding.

use std::io::Write;

use super::*;
use crate::storage::MemoryStorage;

const RAW: usize = 64 << 10;

/// Half text, half noise, so that every encoding has both matches and literals.
fn sample(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..len)
        .map(|i| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if i / 256 % 2 == 0 { b"a layered rock that wells draw from "[i % 36] } else { (state >> 56) as u8 }
        })
        .collect()
}

/// As the native format writes it: one frame, flushed every 16 KiB.
fn flushed_zstd(raw: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).expect("encoder");
    encoder.set_pledged_src_size(Some(raw.len() as u64)).expect("pledge");
    encoder.include_contentsize(true).expect("content size");
    for part in raw.chunks(16 << 10) {
        encoder.write_all(part).expect("memory");
        encoder.flush().expect("memory");
    }
    encoder.finish().expect("memory")
}

fn deflated(raw: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(raw).expect("memory");
    encoder.finish().expect("memory")
}

fn encodings(raw: &[u8]) -> Vec<(Codec, Vec<u8>)> {
    let mut unsized_frame = zstd::stream::write::Encoder::new(Vec::new(), 3).expect("encoder");
    unsized_frame.include_checksum(true).expect("checksum");
    unsized_frame.write_all(raw).expect("memory");
    vec![
        (Codec::Raw, raw.to_vec()),
        (Codec::Lz4, lz4_flex::block::compress(raw)),
        (Codec::Zstd, flushed_zstd(raw)),
        (Codec::Zstd, zstd::bulk::compress(raw, 1).expect("memory")),
        (Codec::Zstd, unsized_frame.finish().expect("memory")),
        (Codec::Deflate, deflated(raw)),
    ]
}

#[test]
fn every_need_gives_the_right_prefix() {
    let raw = sample(RAW);
    for (codec, stored) in encodings(&raw) {
        for need in [0, 1, 4096, 16 << 10, (16 << 10) + 1, 40_000, RAW - 1, RAW, RAW + 1] {
            let mut out = b"left over from another tenant".to_vec();
            decode(codec, &stored, RAW, need, Tail::Exact, &mut out).expect("decodes");
            assert!(out.len() >= need.min(RAW) && out.len() <= RAW, "{codec:?} need {need} gave {}", out.len());
            assert_eq!(out, raw[..out.len()], "{codec:?} need {need}");
        }
    }
}

#[test]
fn a_prefix_stops_at_the_flush_that_covers_it() {
    let raw = sample(RAW);
    let stored = flushed_zstd(&raw);
    for (need, most) in [(4096, 16 << 10), (16 << 10, 16 << 10), ((16 << 10) + 1, 32 << 10)] {
        let mut out = Vec::new();
        decode(Codec::Zstd, &stored, RAW, need, Tail::Exact, &mut out).expect("decodes");
        assert!(out.len() <= most, "need {need} decoded {}", out.len());
    }
}

#[test]
fn garbage_behind_the_block_is_ignored_only_where_that_is_allowed() {
    let raw = sample(RAW);
    for (codec, mut stored) in encodings(&raw) {
        stored.extend_from_slice(&[0x5a; 300]);
        let mut out = Vec::new();
        if codec != Codec::Lz4 {
            decode(codec, &stored, RAW, RAW, Tail::Ignored, &mut out).expect("tail ignored");
            assert_eq!(out, raw, "{codec:?}");
        }
        decode(codec, &stored, RAW, RAW, Tail::Exact, &mut out).expect_err("tail is damage");
        assert!(out.is_empty(), "nothing may be left in the buffer");
    }
}

#[test]
fn several_frames_make_one_block() {
    let raw = sample(RAW);
    let mut stored = zstd::bulk::compress(&raw[..10_000], 3).expect("memory");
    stored.extend(zstd::bulk::compress(&raw[10_000..], 3).expect("memory"));
    for need in [5_000, 10_001, RAW] {
        let mut out = Vec::new();
        decode(Codec::Zstd, &stored, RAW, need, Tail::Exact, &mut out).expect("decodes");
        assert_eq!(out, raw[..out.len()]);
        assert!(out.len() >= need);
    }
}

#[test]
fn longer_and_shorter_than_declared_are_errors() {
    let raw = sample(RAW);
    for (codec, stored) in encodings(&raw) {
        for declared in [RAW - 1, RAW + 1] {
            for tail in [Tail::Exact, Tail::Ignored] {
                let mut out = Vec::new();
                let done = decode(codec, &stored, declared, declared, tail, &mut out);
                // Verbatim bytes have no end of their own: what follows is the ignored tail.
                let fits = codec == Codec::Raw && declared < RAW && tail == Tail::Ignored;
                assert_eq!(done.is_ok(), fits, "{codec:?} declared {declared} {tail:?}: {done:?}");
            }
        }
    }
}

#[test]
fn bombs_stop_at_the_declared_size() {
    let zeros = vec![0; 64 << 20];
    for (codec, stored) in [
        (Codec::Zstd, zstd::bulk::compress(&zeros, 3).expect("memory")),
        (Codec::Deflate, deflated(&zeros)),
        (Codec::Lz4, lz4_flex::block::compress(&zeros)),
    ] {
        let mut out = Vec::new();
        decode(codec, &stored, RAW, RAW, Tail::Ignored, &mut out).expect_err("bomb");
        assert!(out.capacity() <= 2 * RAW, "{codec:?} allocated {}", out.capacity());
        let _ = decode(codec, &stored, RAW, 4096, Tail::Ignored, &mut out);
        assert!(out.len() <= RAW, "a prefix of a bomb is bounded too");
    }
    let mut out = Vec::new();
    let done = decode(Codec::Raw, &zeros, zeros.len(), 1, Tail::Exact, &mut out);
    assert_eq!(done, Err(DecodeError::Limit { len: zeros.len(), max: BLOCK_BYTES_MAX }));
}

#[test]
fn any_cut_and_any_flip_is_an_error_or_other_bytes_but_never_a_panic() {
    let raw = sample(8 << 10);
    for (codec, stored) in encodings(&raw) {
        for cut in 0..stored.len() {
            let mut out = Vec::new();
            let done = decode(codec, &stored[..cut], raw.len(), raw.len(), Tail::Exact, &mut out);
            assert!(done.is_err(), "{codec:?} cut to {cut}");
            let _ = decode(codec, &stored[..cut], raw.len(), 100, Tail::Exact, &mut out);
        }
        for at in 0..stored.len() {
            let mut bad = stored.clone();
            bad[at] ^= 1 << (at % 8);
            let mut out = Vec::new();
            let _ = decode(codec, &bad, raw.len(), raw.len(), Tail::Ignored, &mut out);
            assert!(out.len() <= raw.len());
        }
    }
}

#[test]
fn stored_bytes_come_from_a_buffer_that_survives_nesting() {
    let storage = crate::storage::MemoryStorage::new("m", sample(1000));
    let sum = with_stored(&storage, 10, 100, |outer| {
        let inner = with_stored(&storage, 500, 50, |inner| Ok(inner.to_vec()))?;
        Ok((outer.to_vec(), inner))
    });
    let (outer, inner) = sum.expect("reads");
    assert_eq!((outer, inner), (sample(1000)[10..110].to_vec(), sample(1000)[500..550].to_vec()));
    assert!(with_stored(&storage, 990, 100, |_| Ok(())).is_err(), "past the end");
    assert!(with_stored(&storage, 0, STORED_BYTES_MAX + 1, |_| Ok(())).is_err(), "over the limit");
}

/// Bytes that have to be waited for.
#[derive(Debug)]
struct Away(MemoryStorage);

impl Storage for Away {
    fn label(&self) -> &str {
        self.0.label()
    }

    fn identity(&self) -> Option<u64> {
        self.0.identity()
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn read_now(&self, _offset: u64, _buf: &mut [u8]) -> io::Result<bool> {
        Ok(false)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, buf)
    }

    fn allocated(&self, offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
        self.0.allocated(offset, len_max)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.reserve(offset, len)
    }

    fn start_writeback(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.start_writeback(offset, len)
    }

    fn forget_cached(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.forget_cached(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

#[test]
fn kept_to_memory_what_lies_elsewhere_is_left_and_nothing_stays_behind() {
    let here = MemoryStorage::new("here", vec![7; 100]);
    let away = Away(MemoryStorage::new("away", vec![7; 100]));
    let first = |storage: &dyn Storage| with_stored(storage, 10, 50, |bytes| Ok(bytes[0]));
    assert!(matches!(in_memory_only(|| first(&here)), Ok(7)));
    let left = in_memory_only(|| first(&away));
    assert!(matches!(left, Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock));
    assert!(matches!(first(&away), Ok(7)), "only inside");
    let caught = std::panic::catch_unwind(|| in_memory_only(|| panic!("as planned")));
    assert!(caught.is_err() && first(&away).is_ok(), "not even after a panic");
}
