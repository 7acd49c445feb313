//! What the writer stores, shares, refuses and counts.

use super::*;
use crate::Error;

const GRAIN: usize = 16 << 10;

#[test]
fn an_increment_stores_only_what_changed() {
    let mut chain = Chain::new();
    let mut bytes = pattern(1, 1 << 20);
    let first = chain.full(&bytes, options());
    bytes[100_000] ^= 1;
    let second = chain.increment(&first, &bytes, options());
    assert_eq!(read_all(&second), bytes);
    let stats = second.stats();
    assert_eq!((stats.blocks_written, stats.blocks_unchanged + stats.blocks_zero), (1, stats.blocks_given - 1));
    let third = chain.increment(&second, &bytes, options());
    assert_eq!(third.stats().blocks_written, 0);
    assert_eq!(third.file_bytes(), 4096 + 2 * 4096 + 4096, "superblock, root twice, two seals");
    assert_eq!(delta(&second, &third).expect("delta"), vec![]);
    let start = (100_000 / GRAIN * GRAIN) as u64;
    assert_eq!(delta(&first, &third).expect("delta"), vec![start..start + GRAIN as u64]);
}

#[test]
fn equal_blocks_are_stored_once_in_a_chain() {
    let mut chain = Chain::new();
    let block = pattern(11, GRAIN);
    let first = chain.full(&block.repeat(50), options());
    assert_eq!((first.stats().blocks_written, first.stats().blocks_shared), (1, 49));
    let mut bytes = vec![0; GRAIN * 50];
    bytes[GRAIN * 30..GRAIN * 31].copy_from_slice(&block);
    let second = chain.increment(&first, &bytes, options());
    assert_eq!(second.stats().blocks_written, 0);
    assert_eq!(read_all(&second), bytes);
    let off = WriterOptions { dedupe_bytes: 0, ..options() };
    assert_eq!(chain.full(&block.repeat(50), off).stats().blocks_written, 50, "finding none is allowed");
}

#[test]
fn threads_and_chunks_make_the_same_file_contents() {
    let mut chain = Chain::new();
    let bytes = pattern(5, GRAIN * 500 + 77);
    for threads in 0..4 {
        let point = chain.full(&bytes, WriterOptions { threads, ..options() });
        assert_eq!(read_all(&point), bytes);
        assert_eq!(point.stats(), chain.open("0000.aql").expect("open").stats());
    }
    let new = NewLayer::full(bytes.len() as u64, key());
    let point = chain.point(new, WriterOptions { threads: 2, ..options() }, |writer| {
        for (k, part) in bytes.chunks(GRAIN * 3).enumerate() {
            let mut buffer = writer.buffer();
            buffer.clear();
            buffer.extend_from_slice(part);
            writer.put_buffer(k as u64 * 3, buffer).expect("put");
        }
    });
    assert_eq!(read_all(&point), bytes);
}

#[test]
fn incompressible_blocks_are_stored_raw_and_cost_one_header() {
    let mut chain = Chain::new();
    let mut bytes = vec![0; GRAIN * 4];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    for compression in [Compression::Zstd(1), Compression::Lz4, Compression::Raw] {
        let point = chain.full(&bytes, WriterOptions { compression, ..options() });
        assert_eq!(point.stats().bytes_stored, 4 * (GRAIN as u64 + 64));
        let (content, _) = point.lookup(0, 1).expect("lookup");
        assert!(matches!(content, Content::Packed { block, .. } if block.codec == crate::Codec::Raw));
        assert_eq!(read_all(&point), bytes);
    }
}

#[test]
fn a_zstd_block_is_one_standard_frame_that_can_be_cut_short() {
    let mut chain = Chain::new();
    let bytes: Vec<u8> = (0..256 * 1024u32).flat_map(|i| (i / 3).to_le_bytes()).collect();
    let point = chain.full(&bytes, WriterOptions { block_log2: 18, ..options() });
    let Content::Packed { block, .. } = point.lookup(0, 1).expect("lookup").0 else { panic!("packed") };
    let mut frame = vec![0; block.stored_len as usize];
    point.file(block.file).expect("file").read_at(block.offset + 64, &mut frame).expect("read");
    let whole = zstd::stream::decode_all(frame.as_slice()).expect("any zstd reads it");
    assert_eq!(whole, bytes[..1 << 18]);
    let mut out = Vec::new();
    point.unpack(&block, 5000, &mut out).expect("unpack");
    assert!(out.len() >= 5000 && out.len() <= 5000 + 2 * (16 << 10), "{} bytes for the first 5000", out.len());
    assert_eq!(out, bytes[..out.len()]);
}

#[test]
fn growing_a_shrunk_disk_shows_zeros_not_old_data() {
    let mut chain = Chain::new();
    let bytes = vec![7; GRAIN * 300];
    let full = chain.full(&bytes, options());
    let small_size = GRAIN * 2 + 100;
    let mut small = NewLayer::increment(Arc::clone(&full), full.label(), key());
    small.virtual_size = small_size as u64;
    let small = chain.point(small, options(), |_| {});
    assert_eq!(read_all(&small), bytes[..small_size]);
    assert_eq!(small.stats().data_blocks, 3);
    let mut large = NewLayer::increment(Arc::clone(&small), small.label(), key());
    large.virtual_size = bytes.len() as u64;
    let large = chain.point(large, options(), |_| {});
    let mut expected = bytes[..small_size].to_vec();
    expected.resize(bytes.len(), 0);
    assert_eq!(read_all(&large), expected);
}

#[test]
fn a_last_block_given_whole_keeps_zeros_past_the_end() {
    let mut chain = Chain::new();
    let size = GRAIN + 10;
    let first = chain.point(NewLayer::full(size as u64, key()), options(), |writer| {
        writer.put(0, &vec![3; GRAIN * 2]).expect("whole blocks");
    });
    let mut grown = NewLayer::increment(Arc::clone(&first), first.label(), key());
    grown.virtual_size = GRAIN as u64 * 2;
    let grown = chain.point(grown, options(), |_| {});
    let mut expected = vec![3; size];
    expected.resize(GRAIN * 2, 0);
    assert_eq!(read_all(&grown), expected);
}

#[test]
fn what_does_not_fit_the_disk_is_refused() {
    let chain = Chain::new();
    let new = NewLayer::full(GRAIN as u64 * 3 + 5, key());
    let mut writer = Writer::create(chain.storage("a"), new, options()).expect("create");
    assert_eq!((writer.blocks(), writer.block_bytes()), (4, GRAIN));
    for (first, len) in [(0, 5), (3, 4), (3, 6), (4, GRAIN), (u64::MAX, GRAIN), (1, GRAIN * 3 + 1)] {
        assert!(matches!(writer.put(first, &vec![1; len]), Err(Error::OutOfRange { .. })), "{first} {len}");
    }
    assert!(writer.zero(3..5).is_err());
    writer.put(3, &[1; 5]).expect("the short last block");
    writer.finish().expect("finish");
}

#[test]
fn layers_that_do_not_belong_together_are_refused() {
    let mut chain = Chain::new();
    let full = chain.full(&pattern(1, GRAIN * 3), options());
    let other_key = NewLayer::increment(Arc::clone(&full), "x", ContentKey::new([8; 32]));
    assert!(matches!(Writer::create(chain.storage("b"), other_key, options()), Err(Error::Refused { .. })));
    let busy = Writer::create(chain.storage("0000.aql"), NewLayer::full(5, key()), options());
    assert!(matches!(busy, Err(Error::Refused { .. })), "the file is not empty");
    for (size, log2) in [(0, 16), (1 << 63, 16), (1 << 50, 14), (100, 13), (100, 23)] {
        let wrong = WriterOptions { block_log2: log2, ..options() };
        let made = Writer::create(chain.storage("c"), NewLayer::full(size, key()), wrong);
        assert!(matches!(made, Err(Error::Unsupported { .. })), "{size} {log2}");
    }
    let mut sectors = NewLayer::full(100, key());
    sectors.sector_bytes = 4097;
    assert!(Writer::create(chain.storage("c"), sectors, options()).is_err());
    let other = chain.full(&pattern(1, GRAIN * 3), WriterOptions { block_log2: 15, ..options() });
    assert!(matches!(delta(&full, &other), Err(Error::Unsupported { .. })));
}

#[test]
fn a_huge_sparse_disk_costs_what_it_holds() {
    let mut chain = Chain::new();
    let size = 16u64 << 40;
    let options = WriterOptions { block_log2: 16, ..options() };
    let point = chain.point(NewLayer::full(size, key()), options, |writer| {
        writer.put(123_456_789, &vec![5; 65536]).expect("put");
        writer.zero(0..100_000_000).expect("zero");
    });
    assert!(point.file_bytes() < 1 << 20, "{} bytes", point.file_bytes());
    let (content, n) = point.lookup(0, size).expect("lookup");
    assert_eq!((content, n), (Content::Zero, 123_456_789 * 65536));
    assert_eq!(point.stats().data_blocks, 1);
    let next = chain.point(NewLayer::increment(Arc::clone(&point), point.label(), key()), options, |writer| {
        writer.zero(0..200_000_000).expect("zero");
    });
    assert_eq!(next.lookup(0, size).expect("lookup"), (Content::Zero, size));
    assert_eq!(next.needed_layers(), vec![]);
    assert_eq!(delta(&point, &next).expect("delta"), vec![123_456_789 * 65536..123_456_790 * 65536]);
}

#[test]
fn a_chain_stands_on_files_and_hints_alone() {
    let dir = tempfile::tempdir().expect("dir");
    let path = |k: u32| dir.path().join(format!("p{k}/disk.aql"));
    let mut bytes = pattern(3, GRAIN * 20);
    let mut parent: Option<Arc<Reader>> = None;
    for k in 0..4 {
        std::fs::create_dir(dir.path().join(format!("p{k}"))).expect("folder");
        bytes[GRAIN * k as usize..][..10].fill(0xAA);
        let new = match parent {
            None => NewLayer::full(bytes.len() as u64, key()),
            Some(parent) => NewLayer::increment(parent, format!("../p{}/disk.aql", k - 1), key()),
        };
        let mut writer = Writer::create_file(&path(k), new, options()).expect("create");
        writer.put(0, &bytes).expect("put");
        writer.finish().expect("finish");
        parent = Some(Arc::new(Reader::open_path(&path(k)).expect("open")));
    }
    let top = Reader::open_path(&path(3)).expect("open");
    top.check_layers().expect("all there");
    assert_eq!(read_all(&top), bytes);
    let narrow = Reader::open_file(&dir.path().join("p3"), std::path::Path::new("disk.aql")).expect("open");
    assert!(matches!(narrow.check_layers(), Err(Error::Refused { .. })), "its older files lie outside");
    std::fs::remove_file(path(1)).expect("remove");
    let top = Reader::open_path(&path(3)).expect("open");
    let missing = top.check_layers().expect_err("p1 is gone");
    assert!(matches!(&missing, Error::ChainBroken { path, .. } if path.ends_with("p1/disk.aql")), "{missing}");
    std::os::unix::fs::symlink(path(0), path(1)).expect("link");
    let top = Reader::open_path(&path(3)).expect("open");
    assert!(top.check_layers().is_err(), "links are not followed");
}
