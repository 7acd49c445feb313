//! Chains of files made at random: qcow2 by QEMU's own tools, native points by the writer. Grown and
//! shrunk, with compressed, zeroed and discarded clusters, in every layout of either format.

#![expect(clippy::cast_possible_truncation, reason = "test disks are small")]

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::Error as FormatError;
use aquifer_formats::aql::{Compression, ContentKey, NewLayer, Reader, Writer, WriterOptions};
use aquifer_vdisk::{BlockCache, Chain, ChainSpec, Result, open_chain};

use crate::{
    oracle::Oracle,
    qemu::{img, io, text},
    rng::Rng,
};

const KIB: u64 = 1024;
const MIB: u64 = 1 << 20;

/// Opens a chain of files.
pub fn open(spec: &ChainSpec, cache: &Arc<BlockCache>) -> Result<Chain> {
    open_chain(spec, cache.clone(), &|uri| Err(FormatError::unsupported(uri, "no network in this test")))
}

/// A file and what it stands on, with its format probed.
pub fn image(path: &Path) -> ChainSpec {
    ChainSpec::Image { path: path.into(), format: None, allow_backing: Vec::new(), snapshot: None }
}

/// The size of the next point: mostly that of the last, sometimes grown or shrunk, at least a MiB.
pub fn next_size(size: u64, rng: &mut Rng) -> u64 {
    match rng.below(5) {
        0 => size + 512 * rng.below(3000),
        1 => (size / 2 + 512 * rng.below(size / 2048)).max(MIB) / 512 * 512,
        _ => size,
    }
}

/// One image on `below`, of a random kind, with random writes of every sort.
pub fn qcow2_layer(dir: &Path, number: u64, below: Option<&Path>, size: u64, rng: &mut Rng) -> PathBuf {
    let path = dir.join(format!("{number}.qcow2"));
    let cluster = [64 * KIB, 64 * KIB, 64 * KIB, 4 * KIB, 512, 256 * KIB][rng.below(6) as usize];
    let mut options = format!("cluster_size={cluster}");
    match rng.below(4) {
        0 => options += ",compat=0.10",
        1 => options += ",compression_type=zstd",
        2 if cluster >= 16 * KIB => options += ",extended_l2=on",
        _ => {}
    }
    let v2 = options.contains("compat");
    let size_text = size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    if let Some(below) = below {
        let format = if below.extension().is_some_and(|e| e == "raw") { "raw" } else { "qcow2" };
        args.extend(["-F", format, "-b", below.file_name().and_then(|n| n.to_str()).expect("a name")]);
    }
    args.extend([text(&path), &size_text]);
    img(&args);
    let whole = cluster.max(4 * KIB);
    // Compressed writes come first: they need clusters that are not allocated yet.
    let packed: BTreeSet<u64> = (0..rng.below(4)).map(|_| rng.below(size / whole) * whole).collect();
    let mut writes: Vec<String> =
        packed.iter().map(|at| format!("write -c -P {} {at} {cluster}", 1 + rng.below(255))).collect();
    writes.extend((0..1 + rng.below(4)).map(|_| {
        let at = rng.below(size / whole) * whole;
        let len = ((1 + rng.below(4)) * whole).min(size - at) / 512 * 512;
        let pattern = 1 + rng.below(255);
        match rng.below(6) {
            0 => format!("write -z {at} {len}"),
            1 if !v2 => format!("write -z -u {at} {len}"),
            2 => format!("discard {at} {len}"),
            // Parts of clusters, for subclusters and copies on write.
            3 => format!("write -P {pattern} {} 512", at + 1024.min(len - 512)),
            _ => format!("write -P {pattern} {at} {len}"),
        }
    }));
    io(&path, "qcow2", &writes);
    path
}

/// Points of a native chain as a repository lays them out, with the bytes of each.
pub fn native_points(dir: &Path, count: u64, compression: Compression, rng: &mut Rng) -> Vec<(PathBuf, Vec<u8>)> {
    let (key, mut size) = (ContentKey::generate(), 3 * MIB + 700);
    let mut disk = Oracle::new(size as usize);
    let mut points: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    for number in 0..count {
        std::fs::create_dir(dir.join(number.to_string())).expect("a folder");
        let path = dir.join(format!("{number}/disk.aql"));
        let mut new = match points.last() {
            None => NewLayer::full(size, key.clone()),
            Some((parent, _)) => {
                let parent = Arc::new(Reader::open_path(parent).expect("the parent"));
                NewLayer::increment(parent, format!("../{}/disk.aql", number - 1), key.clone())
            }
        };
        size = match rng.below(4) {
            0 => size + rng.below(MIB),
            1 if size > 2 * MIB => size - rng.below(MIB),
            _ => size,
        };
        new.virtual_size = size;
        disk.resize(size as usize);
        let options = WriterOptions { compression, threads: 0, ..WriterOptions::default() };
        let mut writer = Writer::create_file(&path, new, options).expect("a new layer");
        let block = writer.block_bytes();
        for _ in 0..1 + rng.below(12) {
            let first = rng.below(writer.blocks());
            let at = first as usize * block;
            let len = block.min(disk.size() - at);
            let seed = rng.below(3);
            let bytes: Vec<u8> = match seed {
                0 => (0..len).map(|_| rng.below(256) as u8).collect(),
                1 => vec![rng.below(5) as u8; len],
                _ => (0..len).map(|i| (i / 100) as u8).collect(),
            };
            disk.write(at, &bytes);
            writer.put(first, &bytes).expect("a block");
        }
        writer.finish().expect("a sealed layer");
        points.push((path, disk.bytes().to_vec()));
    }
    points
}
