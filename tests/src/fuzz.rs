//! Fuzz targets as plain functions: one per parser, each taking any bytes at all.
//!
//! The same functions run under libFuzzer (`fuzz/`) and, for a few seconds over mutated seeds, in
//! `tests/it/fuzz_smoke.rs`. They may only panic where the parser broke a promise.

use std::sync::Arc;

use aquifer_formats::{
    Codec, Content, Layer,
    codec::{self, Tail},
    probe::{Format, probe},
    qcow2::{BitmapTrust, Qcow2},
    storage::MemoryStorage,
};

use crate::{mend, rng::Rng};

/// Most blocks that are decoded of one input; one hostile table can name the same one a thousand times.
const UNPACKS_MAX: usize = 64;

/// Any bytes as a stored block: the first says how it is encoded, the next two how it is asked for.
pub fn codec(data: &[u8]) {
    let Some((&[how, need, size], stored)) = data.split_first_chunk::<3>() else { return };
    let codec = [Codec::Raw, Codec::Lz4, Codec::Zstd, Codec::Deflate][usize::from(how & 3)];
    let tail = if how & 4 == 0 { Tail::Exact } else { Tail::Ignored };
    let raw_len = 256 << (size % 13);
    let need = raw_len * usize::from(need) / 255;
    let mut out = b"what another tenant left".to_vec();
    match codec::decode(codec, stored, raw_len, need, tail, &mut out) {
        Ok(()) => assert!(out.len() >= need && out.len() <= raw_len, "{} for {need} of {raw_len}", out.len()),
        Err(_) => assert!(out.is_empty(), "bytes left of a block that failed"),
    }
    assert!(out.capacity() <= 2 * raw_len.max(64), "{} allocated for {raw_len}", out.capacity());
    assert_ne!(probe(&MemoryStorage::new("fuzz", data.to_vec())).expect("memory reads"), Some(Format::Raw));
}

/// Any bytes as a qcow2 image: header, snapshots, bitmaps, maps, blocks.
pub fn qcow2(data: &[u8]) {
    let Ok(image) = Qcow2::open(Arc::new(MemoryStorage::new("fuzz", data.to_vec()))) else { return };
    let info = image.info();
    assert_eq!(info.backing.is_some(), image.backing().is_some());
    for bitmap in image.bitmaps().unwrap_or_default() {
        let mut last = 0;
        let told = image.dirty_ranges(&bitmap, &mut |at, len| {
            assert!(at >= last && len > 0 && at + len <= info.size_bytes, "range {at}+{len} behind {last}");
            last = at + len;
        });
        assert!(told.is_err() || bitmap.trust == BitmapTrust::Consistent);
    }
    for snapshot in image.snapshots().unwrap_or_default().iter().take(8) {
        if let Ok(layer) = image.snapshot(&snapshot.id) {
            walk_layer(&layer, 16);
        }
    }
    let external = image
        .data_file()
        .map(|_| -> Arc<dyn aquifer_formats::Storage> { Arc::new(MemoryStorage::new("fuzz data", vec![7; 1 << 20])) });
    if let Ok(layer) = image.active(external) {
        walk_layer(&layer, UNPACKS_MAX);
    }
}

/// Any bytes as a native layer: as they are, and with every checksum on the way made right, because no
/// mutation would get past one otherwise. Opened, walked, verified, salvaged.
pub fn aql(data: &[u8]) {
    native(data);
    native(&mend::layer(data));
}

fn native(data: &[u8]) {
    use aquifer_formats::aql::{Depth, Reader, Resolver, Unseen, salvage, verify};
    let storage = || Arc::new(MemoryStorage::new("fuzz", data.to_vec()));
    if let Ok(reader) = Reader::open(storage(), Resolver::none()) {
        walk_layer(&reader, UNPACKS_MAX);
        let damage: usize = verify(&reader, Depth::Deep(None)).take(64).map(|found| found.damage.len()).sum();
        assert!(damage <= 64 * 256 + 16);
        let _ = reader.check_layers();
    }
    for unseen in [Unseen::Error, Unseen::Parent] {
        if let Ok(found) = salvage(storage(), None, Resolver::none(), unseen) {
            assert!(found.frames_end <= data.len() as u64);
            walk_layer(&found.reader, 16);
        }
    }
}

/// Any bytes as a record of a repository; the first byte says which.
pub fn record(data: &[u8]) {
    use aquifer_formats::repo::record as r;
    let Some((which, data)) = data.split_first() else { return };
    match which % 7 {
        0 => drop(r::decode::<r::PointRecord>("fuzz", data)),
        1 => drop(r::decode::<r::ManifestRecord>("fuzz", data)),
        2 => drop(r::decode::<r::RepositoryRecord>("fuzz", data)),
        3 => drop(r::decode::<r::LeaseRecord>("fuzz", data)),
        4 => drop(r::decode::<r::BeginRecord>("fuzz", data)),
        5 => drop(r::decode::<r::MachineRecord>("fuzz", data)),
        _ => drop(r::decode::<r::OwnerRecord>("fuzz", data)),
    }
}

/// Looks all over a layer and checks what the trait promises of each answer.
fn walk_layer(layer: &dyn Layer, unpacks: usize) {
    let size = layer.size();
    let mut told = Vec::new();
    let mut last = 0;
    let _ = layer.scan(0, size, &mut |at, len, content| {
        assert!(at >= last && len > 0 && at + len <= size && content != Content::Absent, "scan told {at}+{len}");
        last = at + len;
        if told.len() < 4 * unpacks {
            told.push((at, len, content));
        }
    });
    let mut out = Vec::new();
    for (number, (at, len, content)) in told.iter().enumerate() {
        assert_eq!(layer.lookup(*at, *len).expect("what scan told"), (*content, *len));
        match content {
            Content::Plain { file, offset } => {
                let mut bytes = vec![0; usize::try_from((*len).min(4096)).expect("small")];
                // A cluster that the map names lies in the file, at least its first byte.
                layer.file(*file).expect("the file it names").read_at(*offset, &mut bytes[..1]).expect("reads");
                let _ = layer.file(*file).expect("the file it names").read_at(*offset, &mut bytes);
            }
            Content::Packed { block, skip } if number < unpacks => {
                let raw_len = block.raw_len as usize;
                assert!(u64::from(*skip) + len <= u64::from(block.raw_len), "past its block");
                for need in [1, raw_len] {
                    match layer.unpack(block, need, &mut out) {
                        Ok(()) => assert!(out.len() >= need && out.len() <= raw_len, "{} for {need}", out.len()),
                        Err(_) => assert!(out.is_empty(), "bytes left of a block that failed"),
                    }
                }
            }
            _ => {}
        }
    }
    let mut rng = Rng::new(size);
    for _ in 0..32 {
        let at = rng.below(size.max(1));
        let max = 1 + rng.below(1 << 20);
        if let Ok((_, len)) = layer.lookup(at, max) {
            assert!(len >= 1 && len <= max && at + len <= size, "lookup {at}+{max} answered for {len}");
        }
    }
    for at in [size, u64::MAX] {
        assert!(layer.lookup(at, 1).is_err(), "past the end");
    }
    let _ = layer.fingerprint();
}
