//! What is stored below an overlay: native blocks that are damaged or out of place, and random chains against the
//! oracle. Right bytes, or an error.

use std::sync::Arc;

use aquifer_formats::{
    Layer,
    aql::{Compression, ContentKey, NewLayer, Reader, Resolver, Unseen, Writer, WriterOptions, salvage},
    storage::MemoryStorage,
};
use aquifer_vdisk::{BlockCache, Chain};

use crate::{
    oracle::Oracle,
    rng::Rng,
    synthetic::{Kind, Plan, Synthetic, Write},
};

const BLOCK: usize = 16 << 10;
const BLOCKS: usize = 12;
/// A stored block with its header.
const FRAME: usize = BLOCK + 64;

/// A sealed layer of raw blocks, in memory, and its disk; those of other numbers are laid out alike.
fn layer(number: u64) -> (Vec<u8>, Vec<u8>) {
    let mut dice = Rng::new(number);
    let disk: Vec<u8> = (0..BLOCK * BLOCKS).map(|_| dice.below(256) as u8).collect();
    let options = WriterOptions { block_log2: 14, compression: Compression::Raw, threads: 0, ..Default::default() };
    let storage = Arc::new(MemoryStorage::new("layer", Vec::new()));
    let new = NewLayer::full(disk.len() as u64, ContentKey::new([7; 32]));
    let mut writer = Writer::create(storage.clone(), new, options).expect("a writer");
    writer.put(0, &disk).expect("put");
    writer.finish().expect("finish");
    let mut file = vec![0; aquifer_formats::Storage::len(&*storage).expect("len") as usize];
    aquifer_formats::Storage::read_at(&*storage, 0, &mut file).expect("read");
    (file, disk)
}

/// Reads a layer block by block; `true` if some could not be read.
fn read(file: Vec<u8>, disk: &[u8]) -> Result<bool, String> {
    let Ok(reader) = Reader::open(Arc::new(MemoryStorage::new("damaged", file)), Resolver::none()) else {
        return Ok(true);
    };
    let chain = Chain::of_point(Arc::new(reader), Arc::new(BlockCache::new(1 << 20)));
    let mut refused = false;
    for (number, block) in disk.chunks(BLOCK).enumerate() {
        let mut out = vec![0; block.len()];
        match chain.read((number * BLOCK) as u64, &mut out) {
            Ok(()) if out != block => return Err(format!("block {number} has wrong bytes")),
            Ok(()) => {}
            Err(_) => refused = true,
        }
    }
    Ok(refused)
}

/// Flips one bit in every `step` bytes of a sealed native layer. Returns how many, and how many were refused.
///
/// # Errors
/// Wrong bytes.
pub fn flips(step: usize) -> Result<(u64, u64), String> {
    let (file, disk) = layer(3);
    let (mut tried, mut refused) = (0, 0);
    for at in (0..file.len()).step_by(step) {
        let mut damaged = file.clone();
        damaged[at] ^= 1 << (at % 8);
        tried += 1;
        refused += u64::from(read(damaged, &disk).map_err(|e| format!("bit {} of byte {at}: {e}", at % 8))?);
    }
    Ok((tried, refused))
}

/// Puts each whole block in the place of each other one.
///
/// # Errors
/// Wrong bytes, or no error.
pub fn swaps() -> Result<u64, String> {
    let (file, disk) = layer(3);
    let (frames, mut tried) = (frames(&file), 0);
    for (from, to) in frames.iter().flat_map(|from| frames.iter().map(move |to| (*from, *to))).filter(|(a, b)| a != b) {
        let mut damaged = file.clone();
        damaged.copy_within(from..from + FRAME, to);
        if !read(damaged, &disk).map_err(|e| format!("frame {from} at {to}: {e}"))? {
            return Err(format!("frame {from} is accepted at {to}"));
        }
        tried += 1;
    }
    Ok(tried)
}

/// Where the frames of the blocks of [`layer`] are, all of them of [`FRAME`] bytes.
fn frames(file: &[u8]) -> Vec<usize> {
    (0..file.len() - FRAME).filter(|at| file[*at..].starts_with(b"AQF1")).take(BLOCKS).collect()
}

/// Puts blocks of an older layer back where those of the newer one are, each alone and all of them; then the older layer
/// as a whole under an increment that stands on the newer one.
///
/// # Errors
/// Wrong bytes, or no error.
pub fn stale() -> Result<u64, String> {
    let ((old, _), (new, disk)) = (layer(4), layer(3));
    let places = frames(&new);
    if frames(&old) != places || places.len() != BLOCKS {
        return Err("two layers of one form are not laid out alike".into());
    }
    let mut tried = 0;
    for put_back in places.chunks(1).chain([&places[..]]) {
        let mut damaged = new.clone();
        put_back.iter().for_each(|at| damaged[*at..at + FRAME].copy_from_slice(&old[*at..at + FRAME]));
        if !read(damaged, &disk).map_err(|e| format!("old frames at {put_back:?}: {e}"))? {
            return Err(format!("old frames are accepted at {put_back:?}"));
        }
        tried += 1;
    }
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let (below, above) = (folder.path().join("below.aql"), folder.path().join("above.aql"));
    let put = |bytes: &[u8]| std::fs::write(&below, bytes).map_err(|e| e.to_string());
    put(&new)?;
    let parent = Arc::new(Reader::open_path(&below).map_err(|e| e.to_string())?);
    let options = WriterOptions { block_log2: 14, threads: 0, ..Default::default() };
    let child = NewLayer::increment(parent, "below.aql", ContentKey::new([7; 32]));
    let mut writer = Writer::create_file(&above, child, options).map_err(|e| e.to_string())?;
    writer.put(0, &[1; BLOCK]).map_err(|e| e.to_string())?;
    writer.finish().map_err(|e| e.to_string())?;
    let open = || crate::chains::open(&crate::chains::image(&above), &Arc::new(BlockCache::new(1 << 20)));
    let mut block = [0; BLOCK];
    let read = |block: &mut [u8]| open().and_then(|chain| chain.read(BLOCK as u64, block));
    read(&mut block).map_err(|e| format!("an increment on the right layer: {e}"))?;
    put(&old)?;
    match read(&mut block) {
        Ok(()) => Err("an increment accepts another layer below it".into()),
        Err(_) => Ok(tried + 1),
    }
}

/// Cuts the end of a sealed layer off in steps, and makes zeros of it in the same steps. Returns how many, and of those
/// that no longer open how many salvage gave back in part.
///
/// # Errors
/// Wrong bytes, from the layer or from what was salvaged of it; an end that is gone and not missed.
pub fn tails(step: usize) -> Result<(u64, u64), String> {
    let (file, disk) = layer(3);
    let (mut tried, mut salvaged) = (0, 0);
    for end in (0..file.len()).step_by(step) {
        let (cut, mut blank) = (file[..end].to_vec(), file.clone());
        blank[end..].fill(0);
        for damaged in [cut, blank] {
            tried += 1;
            let same = damaged == file;
            let refused = read(damaged.clone(), &disk).map_err(|e| format!("without its end from {end}: {e}"))?;
            if !refused && !same && end < file.len() - 2 * 4096 {
                return Err(format!("its end from {end} is gone, and is not missed"));
            }
            let storage = Arc::new(MemoryStorage::new("damaged", damaged));
            let Ok(found) = salvage(storage, None, Resolver::none(), Unseen::Error) else { continue };
            let chain = Chain::of_point(Arc::new(found.reader), Arc::new(BlockCache::new(1 << 20)));
            let mut some = false;
            for (number, block) in disk.chunks(BLOCK).enumerate() {
                let mut out = vec![0; block.len()];
                match chain.read((number * BLOCK) as u64, &mut out) {
                    Ok(()) if out != block => return Err(format!("cut at {end}: block {number} is salvaged wrongly")),
                    read => some |= read.is_ok(),
                }
            }
            salvaged += u64::from(some);
        }
    }
    Ok((tried, salvaged))
}

/// Two chains of random layers, laid out alike and of different bytes, under one cache, read in random pieces.
///
/// # Errors
/// Bytes that are not the oracle's.
pub fn random_chains(seed: u64) -> Result<(), String> {
    let cache = Arc::new(BlockCache::new(1 << 20));
    let disks: Vec<_> = (0..2).map(|disk| random_chain(seed, disk, &cache)).collect();
    let mut dice = Rng::new(seed);
    for round in 0..80 {
        let (chain, oracle) = &disks[round % 2];
        let at = dice.below(chain.size());
        let len = (1 + dice.below(20_000)).min(chain.size() - at) as usize;
        let mut out = vec![0; len];
        chain.read(at, &mut out).map_err(|e| e.to_string())?;
        if out != oracle.read(at as usize, len) {
            return Err(format!("seed {seed}, disk {}: {at}+{len} differs", round % 2));
        }
    }
    Ok(())
}

fn random_chain(seed: u64, disk: u64, cache: &Arc<BlockCache>) -> (Chain, Oracle) {
    let mut dice = Rng::new(seed);
    let (mut oracle, mut layers): (Oracle, Vec<Arc<dyn Layer>>) = (Oracle::default(), Vec::new());
    for number in 0..2 + dice.below(4) {
        let size = 4096 * (16 + dice.below(48)) + 512 * dice.below(8);
        let writes = (0..1 + dice.below(6)).map(|_| Write {
            offset: dice.below(size),
            len: 1 + dice.below(size / 3),
            kind: dice.pick(&[Kind::Plain, Kind::Packed, Kind::Packed, Kind::Zero]),
        });
        let writes = writes.collect();
        let plan = Plan { size, grain_log2: 12, block_grains_log2: 2, checked: false, run_grains_max: 9, writes };
        layers.insert(0, Arc::new(Synthetic::build(plan, 1 + number * 2 + disk, &mut oracle)));
    }
    (Chain::new(layers, Arc::clone(cache)).expect("a chain"), oracle)
}
