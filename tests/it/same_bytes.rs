//! Promise: whatever a chain is made of, however deep, every way to it shows the same bytes: the chain
//! itself, NBD and FUSE, judged by QEMU's own reading or by the vector it was written from.

#![expect(clippy::cast_possible_truncation, reason = "test disks are small")]

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::aql::Compression;
use aquifer_mount::{
    fuse::{Audience, FuseDoor, FuseFile, FuseOptions, MountAccess},
    nbd::{Client, ClientOptions, Export, Server},
};
use aquifer_tests::{
    chains::{image, native_points, next_size, open, qcow2_layer},
    oracle::cases,
    qemu::{contents, img, text},
    rng::Rng,
};
use aquifer_vdisk::{BlockCache, Disk};

const MIB: u64 = 1 << 20;

/// Reads pieces of every size, in any order and in order, through every door at once.
fn assert_same(chain_of: &Path, wanted: &[u8], cache: &Arc<BlockCache>, rng: &mut Rng) {
    let folder = tempfile::tempdir().expect("a folder");
    let chain = Arc::new(open(&image(chain_of), cache).expect("a good chain"));
    let disk = Arc::new(Disk::read_only("vda", chain.clone()));
    let server = Server::builder().export(Export::new("vda", disk.clone())).build().expect("a server");
    let address = server.listen_unix(&folder.path().join("s")).expect("a socket");
    let client = Client::connect(&address, &ClientOptions::default()).expect("a connection");
    let options = FuseOptions { audience: Audience::Owner, access: MountAccess::ReadOnly };
    let mount = folder.path().join("m");
    let fuse = FuseDoor::open(&mount, options, vec![FuseFile { disk, raw: None }]).expect("a mount");
    let file = File::open(fuse.path("vda")).expect("a file");

    let size = wanted.len() as u64;
    assert_eq!((chain.size(), client.size(), file.metadata().expect("stat").len()), (size, size, size));
    let mut in_order = 0;
    for turn in 0..120 {
        let longest = if rng.once_in(10) { 700_000 } else { 9000 };
        let offset = if turn % 3 == 0 { in_order } else { rng.below(size) };
        let len = (1 + rng.below(longest)).min(size - offset) as usize;
        in_order = (offset + len as u64) % size;
        let wanted = &wanted[offset as usize..offset as usize + len];
        let mut bytes = vec![0xAA; len];
        chain.read(offset, &mut bytes).expect("the chain");
        assert!(bytes == wanted, "the chain, {offset}+{len}");
        bytes.fill(0xAA);
        client.read(offset, &mut bytes).expect("NBD");
        assert!(bytes == wanted, "NBD, {offset}+{len}");
        bytes.fill(0xAA);
        file.read_exact_at(&mut bytes, offset).expect("FUSE");
        assert!(bytes == wanted, "FUSE, {offset}+{len}");
    }
    // What is said to read as zeros has to.
    for extent in client.status("base:allocation", 0, size).expect("block status") {
        let here = &wanted[extent.offset as usize..(extent.offset + extent.len) as usize];
        assert!(extent.state & 2 == 0 || here.iter().all(|b| *b == 0), "{extent:?}");
    }
    drop(file);
    fuse.stop().expect("unmounted");
    drop(client);
    let uri = address.to_string();
    let raw = folder.path().join("raw");
    std::fs::write(&raw, wanted).expect("a file");
    img(&["compare", "-f", "raw", "-F", "raw", &uri, text(&raw)]);
    assert!(server.stop(), "stops in order");
}

#[test]
fn qcow2_chains() {
    let cache = Arc::new(BlockCache::new(4 * MIB));
    for seed in 0..u64::from(cases(3)) {
        let (dir, mut rng) = (tempfile::tempdir().expect("a folder"), Rng::new(seed ^ 0x5A));
        // Every now and then as deep as a chain may reasonably be.
        let depth = if seed % 10 == 9 { 200 } else { 2 + rng.below(9) };
        let mut size = 2 * MIB + 512 * rng.below(4096);
        let mut files: Vec<PathBuf> = Vec::new();
        for number in 0..depth {
            size = if depth > 20 { size } else { next_size(size, &mut rng) };
            files.push(qcow2_layer(dir.path(), number, files.last().map(PathBuf::as_path), size, &mut rng));
        }
        for point in [files.len() - 1, rng.below(depth) as usize] {
            assert_same(&files[point], &contents(&files[point], "qcow2"), &cache, &mut rng);
        }
    }
}

#[test]
fn native_chains() {
    let cache = Arc::new(BlockCache::new(4 * MIB));
    for seed in 0..u64::from(cases(3)) {
        let (dir, mut rng) = (tempfile::tempdir().expect("a folder"), Rng::new(seed ^ 0xA5));
        let depth = if seed % 10 == 9 { 200 } else { 2 + rng.below(9) };
        let compression = rng.pick(&[Compression::Zstd(1), Compression::Zstd(3), Compression::Lz4, Compression::Raw]);
        let points = native_points(dir.path(), depth, compression, &mut rng);
        for point in [points.len() - 1, rng.below(depth) as usize] {
            let (path, bytes) = &points[point];
            assert_same(path, bytes, &cache, &mut rng);
        }
    }
}
