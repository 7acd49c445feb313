//! Chains of a hundred disks of other products, and of one: what depth costs is seen by comparing them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use super::{
    hyperv::{Sectors, VhdxChild, vhdx_content_id},
    vmdk::{Extent, Grain, descriptor},
};
use crate::{qemu, rng::Rng};

const MIB: u64 = 1 << 20;

/// VMware disks `0.vmdk` to the newest, each with a few grains of its own; the newest.
///
/// # Panics
/// A file cannot be written.
pub fn vmdk(folder: &Path, depth: u32, size: u64) -> PathBuf {
    let sectors = size / 512;
    let mut rng = Rng::new(10);
    for number in 0..depth {
        let count = if number == 0 { size / 65536 } else { 4 };
        let grains: BTreeMap<u64, Grain> = (0..count)
            .map(|_| (rng.below(sectors / 128), Grain::Data(vec![1 + (number % 250) as u8; 65536])))
            .collect();
        let extent = Extent { capacity: sectors, grain: 128, grains };
        let below = format!("{}.vmdk", number.wrapping_sub(1));
        let parent = (number > 0).then(|| (number - 1, below.as_str()));
        let line = format!("RW {sectors} SPARSE \"{number}.vmdk\"");
        let text = descriptor("monolithicSparse", number, parent, &[line]);
        fs::write(folder.join(format!("{number}.vmdk")), extent.hosted(&text)).expect("write");
    }
    folder.join(format!("{}.vmdk", depth - 1))
}

/// Hyper-V disks `d0.vhdx` to the newest, each with a few pages of its own, as checkpoints write them; the newest, and
/// what it reads as.
///
/// # Panics
/// `qemu-img` does not run, or a file cannot be written.
pub fn vhdx(folder: &Path, depth: u8, size: u64) -> (PathBuf, Vec<u8>) {
    let mut rng = Rng::new(12);
    let base = folder.join("d0.vhdx");
    qemu::img(&["create", "-q", "-f", "vhdx", "-o", "block_size=1M", qemu::text(&base), &size.to_string()]);
    qemu::io(&base, "vhdx", &[format!("write -P 255 0 {}", size / 2)]);
    let mut truth = vec![0; size as usize];
    truth[..size as usize / 2].fill(255);
    let mut parent = vhdx_content_id(&fs::read(&base).expect("read"));
    for number in 1..depth {
        let pages: Vec<u64> = (0..6).map(|_| rng.below(size / 4096)).collect();
        let all: Sectors = pages.iter().flat_map(|page| page * 8..page * 8 + 8).map(|s| (s, [number; 512])).collect();
        let below = format!(".\\d{}.vhdx", number - 1);
        let paths = [("relative_path", below.as_str())];
        let id = [number; 16];
        let child = VhdxChild { id, parent, paths: &paths, size, block: MIB, sectors: &all, zero_blocks: &[] };
        fs::write(folder.join(format!("d{number}.vhdx")), child.bytes()).expect("write");
        for (sector, bytes) in &all {
            truth[*sector as usize * 512..][..512].copy_from_slice(bytes);
        }
        parent = id;
    }
    (folder.join(format!("d{}.vhdx", depth - 1)), truth)
}
