//! Lying storage: every byte flipped, blocks swapped, old files put back, ends cut off.
//!
//! The promise: a read gives the right bytes or an error that names file and offset, for just the range
//! that the damage touches.

use std::ops::Range;

use super::*;
use crate::Error;

const GRAIN: usize = 16 << 10;

/// Three points over two leaves, with zeros, shared blocks and every codec; small files.
struct World {
    chain: Chain,
    names: Vec<String>,
    bytes: Vec<Vec<u8>>,
    /// Blocks that are not zeros.
    data: Vec<Vec<usize>>,
}

fn world() -> World {
    let mut chain = Chain::new();
    let mut bytes = vec![0; GRAIN * 258];
    for (block, seed) in [(0, 1), (1, 2), (100, 1), (257, 4)] {
        bytes[block * GRAIN..][..GRAIN].copy_from_slice(&words(seed));
    }
    blake3::Hasher::new().finalize_xof().fill(&mut bytes[5 * GRAIN..6 * GRAIN]);
    let full = chain.full(&bytes, WriterOptions { waymark_bytes: 40_000, ..options() });
    let mut all = vec![bytes.clone()];
    bytes[GRAIN + 7] ^= 0x55;
    let second = chain.increment(&full, &bytes, WriterOptions { compression: Compression::Lz4, ..options() });
    all.push(bytes.clone());
    bytes[257 * GRAIN..].copy_from_slice(&words(9));
    bytes[100 * GRAIN..101 * GRAIN].fill(0);
    let third = chain.increment(&second, &bytes, options());
    all.push(bytes);
    let data_of = |bytes: &Vec<u8>| {
        let blocks = bytes.chunks(GRAIN).enumerate().filter(|(_, b)| b.iter().any(|b| *b != 0));
        blocks.map(|(block, _)| block).collect()
    };
    let data = all.iter().map(data_of).collect();
    World { data, names: vec![full.label().into(), second.label().into(), third.label().into()], chain, bytes: all }
}

/// A block that compresses well.
fn words(seed: u8) -> Vec<u8> {
    (0..GRAIN).map(|i| (i / 64).to_le_bytes()[0] ^ seed).collect()
}

impl World {
    /// Reads all of one point. Returns the blocks that failed; panics on any wrong byte.
    fn failures(&self, point: usize, context: &str) -> Result<Vec<(usize, Error)>, Error> {
        let reader = self.chain.open(&self.names[point])?;
        let bytes = &self.bytes[point];
        let data = &self.data[point];
        let mut failed = Vec::new();
        let mut out = Vec::new();
        let (mut block, blocks) = (0, bytes.len() / GRAIN);
        while block < blocks {
            let range = block * GRAIN..(block + 1) * GRAIN;
            let found = reader.lookup(range.start as u64, (bytes.len() - range.start) as u64);
            let n = found.as_ref().map_or(1, |(_, n)| usize::try_from(*n).expect("small").div_ceil(GRAIN));
            let read = found.and_then(|(content, _)| match content {
                Content::Packed { block, .. } => reader.unpack(&block, GRAIN, &mut out).map(|()| false),
                _ => Ok(true),
            });
            match read {
                Ok(true) => {
                    let hidden = data.iter().find(|b| (block..block + n).contains(b));
                    assert_eq!(hidden, None, "{context}: point {point}: zeros for data");
                }
                Ok(false) => assert!(out == bytes[range], "{context}: point {point}, block {block}: other bytes"),
                Err(e) => failed.push((block, e)),
            }
            block += n;
        }
        Ok(failed)
    }

    fn storage(&self, point: usize) -> Arc<dyn Storage> {
        self.chain.storage(&self.names[point])
    }

    /// Where only the file's own point reads.
    fn root(&self, point: usize) -> u64 {
        self.chain.open(&self.names[point]).map_or(0, |reader| reader.seal_info().root_a)
    }

    fn len(&self, point: usize) -> u64 {
        self.storage(point).len().expect("length")
    }

    fn copy(&self, point: usize, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).expect("small")];
        self.storage(point).read_at(range.start, &mut bytes).expect("read");
        bytes
    }
}

/// The error names one of the chain's files.
fn named(error: &Error, names: &[String]) -> bool {
    let text = error.to_string();
    names.iter().any(|name| text.contains(name.as_str())) && (text.contains("offset") || text.contains("ends at"))
        || matches!(error, Error::ChainBroken { .. })
}

#[test]
fn one_flipped_byte_anywhere_is_an_error_for_its_range_or_changes_nothing() {
    let one = world();
    let total: u64 = (0..3).map(|k| one.len(k)).sum();
    assert!(total < 150_000, "{total} bytes: small enough to flip every one");
    let caught: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|file| scope.spawn(move || flip_every_byte(&world(), file))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e))).sum()
    });
    assert!(caught > 30_000 && caught < total, "{caught} of {total} bytes matter to these points");
}

/// Counts the bytes whose damage a read notices.
fn flip_every_byte(world: &World, file: usize) -> u64 {
    let storage = world.storage(file);
    let root = world.root(file);
    let mut caught = 0;
    for offset in 0..world.len(file) {
        let mut byte = [0];
        storage.read_at(offset, &mut byte).expect("read");
        storage.write_at(offset, &[byte[0] ^ flip(offset)]).expect("flip");
        let context = format!("file {file}, offset {offset}");
        // The newest point draws from all files; only the file's own point reads its root.
        let mut hit = false;
        let own = offset >= root && file < 2;
        for point in [2, file].into_iter().take(1 + usize::from(own)) {
            let failed = world.failures(point, &context).unwrap_or_else(|e| panic!("{context}: not opened: {e}"));
            hit |= !failed.is_empty();
            for (block, error) in &failed {
                assert!(error.is_damage() && named(error, &world.names), "{context}: block {block}: {error}");
            }
            let leaves: std::collections::BTreeSet<_> = failed.iter().map(|(block, _)| block / 256).collect();
            assert!(leaves.len() <= 1, "{context}: damage of one byte reaches {failed:?}");
        }
        caught += u64::from(hit);
        storage.write_at(offset, &byte).expect("restore");
    }
    caught
}

/// Another bit, or several, at each offset.
fn flip(offset: u64) -> u8 {
    match offset % 10 {
        8 => 0xFF,
        9 => 0x81,
        bit => 1 << bit,
    }
}

#[test]
fn verify_finds_every_flipped_byte_that_anything_reads() {
    let world = world();
    for file in 0..3 {
        let storage = world.storage(file);
        let own = world.chain.open(&world.names[file]).expect("open");
        let used = own.seal_info().data_end;
        let step = 29;
        for offset in (0..world.len(file)).step_by(step) {
            let mut byte = [0];
            storage.read_at(offset, &mut byte).expect("read");
            storage.write_at(offset, &[byte[0] ^ 0x10]).expect("flip");
            let failed = world.failures(file, "verify").expect("opens");
            let found = match world.chain.open(&world.names[file]) {
                Ok(reader) => verify(&reader, Depth::Deep(Some(key()))).flat_map(|f| f.damage).count(),
                Err(_) => 1,
            };
            assert!(found > 0 || failed.is_empty(), "file {file}, offset {offset}: a read fails and verify is content");
            let metadata =
                offset < 4096 || offset >= world.len(file) - 8192 || offset >= own.seal_info().root_a && offset < used;
            assert!(found > 0 || !metadata, "file {file}, offset {offset}: damaged metadata goes unnoticed");
            storage.write_at(offset, &byte).expect("restore");
        }
    }
}

#[test]
fn a_whole_block_in_the_wrong_place_is_an_error() {
    let world = world();
    let reader = world.chain.open(&world.names[0]).expect("open");
    let stored = |reader: &Reader, block: usize| match reader.lookup((block * GRAIN) as u64, 1).expect("lookup").0 {
        Content::Packed { block, .. } => block.offset..block.offset + 64 + u64::from(block.stored_len),
        other => panic!("{other:?}"),
    };
    // Another block of the same file.
    let (to, from) = (stored(&reader, 0), stored(&reader, 1));
    let (original, other) = (world.copy(0, to.clone()), world.copy(0, from));
    world.storage(0).write_at(to.start, &other[..original.len().min(other.len())]).expect("misdirect");
    let failed: Vec<usize> = world.failures(0, "misdirected").expect("open").iter().map(|(b, _)| *b).collect();
    assert!(failed.contains(&0) && failed.iter().all(|b| *b == 0 || *b == 100 || *b == 1), "{failed:?}");
    world.storage(0).write_at(to.start, &original).expect("restore");
    // The same logical block of another layer.
    let newer = world.chain.open(&world.names[1]).expect("open");
    let (to, from) = (stored(&reader, 1), stored(&newer, 1));
    let (original, other) = (world.copy(0, to.clone()), world.copy(1, from));
    world.storage(0).write_at(to.start, &other[..original.len().min(other.len())]).expect("misdirect");
    let failed: Vec<usize> = world.failures(0, "other layer").expect("open").iter().map(|(b, _)| *b).collect();
    assert!(failed.contains(&1), "{failed:?}");
}

/// Every 4 KiB page of every file, replaced by every other page of the chain's files.
#[test]
fn swapped_pages_are_errors_or_change_nothing() {
    let world = world();
    let pages: Vec<Vec<u8>> = (0..3)
        .flat_map(|k| (0..world.len(k) / 4096).map(move |p| (k, p)))
        .map(|(k, p)| world.copy(k, p * 4096..(p + 1) * 4096))
        .collect();
    for file in 0..3 {
        for page in 0..world.len(file) / 4096 {
            let range = page * 4096..(page + 1) * 4096;
            let original = world.copy(file, range.clone());
            for (k, other) in pages.iter().enumerate() {
                world.storage(file).write_at(range.start, other).expect("swap");
                let context = format!("page {page} of file {file} replaced by page {k}");
                match world.failures(2, &context) {
                    Ok(failed) => failed.iter().for_each(|(_, e)| assert!(e.is_damage(), "{context}: {e}")),
                    Err(e) => assert!(e.is_damage(), "{context}: {e}"),
                }
            }
            world.storage(file).write_at(range.start, &original).expect("restore");
        }
    }
}

#[test]
fn a_tail_cut_off_at_any_sector_is_an_error() {
    let world = world();
    for file in 0..3 {
        let original = world.copy(file, 0..world.len(file));
        let storage = world.storage(file);
        for len in (0..original.len() as u64).step_by(512) {
            storage.set_len(len).expect("cut");
            match world.failures(2, "cut") {
                Ok(failed) => assert!(file < 2 && !failed.is_empty(), "file {file} cut to {len} goes unnoticed"),
                Err(e) => assert!(e.is_damage(), "{e}"),
            }
            assert!(world.failures(file, "cut").is_err_and(|e| e.is_damage()), "file {file} cut to {len}");
        }
        storage.set_len(0).expect("empty");
        storage.write_at(0, &original).expect("restore");
    }
    assert!(world.failures(2, "restored").expect("open").is_empty());
}

#[test]
fn holes_full_of_zeros_are_errors() {
    let world = world();
    for file in 0..3 {
        for page in 0..world.len(file) / 4096 {
            let original = world.copy(file, page * 4096..(page + 1) * 4096);
            world.storage(file).write_at(page * 4096, &[0; 4096]).expect("lose");
            match world.failures(2, &format!("page {page} of file {file} lost")) {
                Ok(failed) => failed.iter().for_each(|(_, e)| assert!(e.is_damage(), "{e}")),
                Err(e) => assert!(e.is_damage(), "{e}"),
            }
            world.storage(file).write_at(page * 4096, &original).expect("restore");
        }
    }
}

#[test]
fn another_ancestor_is_refused_by_identity_whatever_its_name() {
    let mut world = world();
    let full = world.chain.full(&world.bytes[0].clone(), options());
    let mut files = world.chain.files.lock().expect("lock");
    let other = Arc::clone(&files[full.label()]);
    let true_one = files.insert(world.names[0].clone(), other).expect("there");
    drop(files);
    let reader = world.chain.open(&world.names[2]).expect("open");
    let error = reader.check_layers().expect_err("another layer of equal contents");
    assert!(matches!(&error, Error::ChainBroken { .. }), "{error}");
    let failed = world.failures(2, "wrong ancestor").expect("open");
    assert!(failed.iter().all(|(_, e)| matches!(e, Error::ChainBroken { .. })) && !failed.is_empty());
    world.chain.files.lock().expect("lock").insert(world.names[0].clone(), true_one);
    assert!(world.failures(2, "restored").expect("open").is_empty());
}

#[test]
fn features_of_later_versions_are_refused_by_name() {
    let world = world();
    let len = world.len(0);
    for (offset, byte, text) in [
        (16u64, layout::INCOMPAT_ENCRYPTED.to_le_bytes()[0], "encryption"),
        (23, 0x40, "features 0x4000000000000000"),
        (8, 2, "version 2.0"),
    ] {
        // In both copies of the seal, with their hashes made right again.
        let mut pages = world.copy(0, len - 8192..len);
        let original = pages.clone();
        for copy in 0..2usize {
            let page = &mut pages[copy * 4096..(copy + 1) * 4096];
            let head = std::mem::offset_of!(layout::SealPage, head) + usize::try_from(offset).expect("small");
            page[head] = byte;
            let mut plain = page.to_vec();
            plain[8..12].fill(0);
            let hash = *blake3::hash(&plain[..layout::HASHED_BYTES]).as_bytes();
            page[layout::HASHED_BYTES..].copy_from_slice(&hash);
        }
        world.storage(0).write_at(len - 8192, &pages).expect("write");
        let error = world.chain.open(&world.names[0]).expect_err("refused");
        assert!(matches!(&error, Error::Unsupported { what, .. } if what.contains(text)), "{error}");
        world.storage(0).write_at(len - 8192, &original).expect("restore");
    }
}
