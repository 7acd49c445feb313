//! Promise: chains of files read as their points. qcow2 chains that QEMU's own tools made, deep, grown,
//! shrunk and mixed; native chains; and what cannot be read says which file it is about.

#![expect(clippy::cast_possible_truncation, reason = "test disks are small")]

use std::{path::PathBuf, sync::Arc};

use aquifer_formats::{
    Error as FormatError, Format,
    aql::{Compression, ContentKey, NewLayer, Reader, Writer, WriterOptions},
};
use aquifer_tests::{
    chains::{image, native_points, next_size, open, qcow2_layer},
    oracle::{Oracle, cases},
    qemu::{contents, img, io, text},
    rng::Rng,
};
use aquifer_vdisk::{BlockCache, Chain, ChainSpec, Delta, Error, delta_between};

const KIB: u64 = 1024;
const MIB: u64 = 1 << 20;

fn assert_reads_as(chain: &Chain, wanted: &[u8], rng: &mut Rng) {
    assert_eq!(chain.size(), wanted.len() as u64);
    for _ in 0..200 {
        let at = rng.below(chain.size());
        let len = (1 + rng.below(20_000)).min(chain.size() - at);
        let mut part = vec![0xAA; len as usize];
        chain.read(at, &mut part).expect("a good chain");
        assert!(part == wanted[at as usize..(at + len) as usize], "{at}+{len}");
        if chain.read_now(at, &mut part).expect("in range") {
            assert!(part == wanted[at as usize..(at + len) as usize], "now, {at}+{len}");
        }
    }
    let mut all = vec![0xAA; wanted.len()];
    chain.read(0, &mut all).expect("a good chain");
    assert!(all == wanted, "one large read");
}

/// `base + delta == tip`, by bytes.
fn assert_delta_leads(old: &Chain, new: &Chain) -> Delta {
    let read = |chain: &Chain, from: u64, len: u64| {
        let mut bytes = vec![0; len as usize];
        chain.read(from, &mut bytes).expect("a good chain");
        bytes
    };
    let mut replica = Oracle::from_bytes(read(old, 0, old.size()));
    replica.resize(new.size() as usize);
    let delta = delta_between(old, new).expect("good tables");
    for range in &delta {
        replica.write(range.start as usize, &read(new, range.start, range.end - range.start));
    }
    assert!(replica.bytes() == read(new, 0, new.size()));
    delta
}

#[test]
fn qemu_chains_read_as_qemu_reads_them() {
    let cache = Arc::new(BlockCache::new(8 * MIB));
    for seed in 0..u64::from(cases(6)) {
        let (dir, mut rng) = (tempfile::tempdir().expect("a folder"), Rng::new(seed));
        let mut size = MIB + 512 * rng.below(4096);
        let base = dir.path().join("base.raw");
        let bytes: Vec<u8> = (0..size).map(|i| if i / 5000 % 3 == 0 { 0 } else { (i % 251) as u8 }).collect();
        std::fs::write(&base, bytes).expect("a base");
        let mut below = (seed % 2 == 0).then_some(base);
        let mut chains = Vec::new();
        for number in 0..8 {
            size = next_size(size, &mut rng);
            let path = qcow2_layer(dir.path(), number, below.as_deref(), size, &mut rng);
            let chain = open(&image(&path), &cache).expect("a good chain");
            assert_reads_as(&chain, &contents(&path, "qcow2"), &mut rng);
            chains.push(chain);
            below = Some(path);
        }
        for old in &chains {
            for new in &chains {
                assert_delta_leads(old, new);
            }
        }
    }
}

#[test]
fn a_deep_chain_reads_as_qemu_reads_it() {
    let (dir, mut rng) = (tempfile::tempdir().expect("a folder"), Rng::new(7));
    let cache = Arc::new(BlockCache::new(8 * MIB));
    let depth = if cases(1) > 1 { 200 } else { 60 };
    let mut below: Option<PathBuf> = None;
    for number in 0..depth {
        below = Some(qcow2_layer(dir.path(), number, below.as_deref(), 4 * MIB, &mut rng));
    }
    let tip = below.expect("a tip");
    let chain = open(&image(&tip), &cache).expect("a good chain");
    assert_eq!(chain.layers().len() as u64, depth);
    assert_reads_as(&chain, &contents(&tip, "qcow2"), &mut rng);
    let parent = open(&image(&dir.path().join(format!("{}.qcow2", depth - 2))), &cache).expect("a good chain");
    let delta = assert_delta_leads(&parent, &chain);
    assert!(delta.bytes() <= 4 * MIB / 2, "one layer's writes, not the disk: {} bytes", delta.bytes());
}

#[test]
fn chains_on_one_base_share_its_layer_and_blocks() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name);
    img(&["create", "-q", "-f", "qcow2", text(&path("base.qcow2")), "1M"]);
    io(&path("base.qcow2"), "qcow2", &["write -c -P 7 0 64k".into()]);
    for tip in ["a.qcow2", "b.qcow2"] {
        img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", text(&path(tip))]);
    }
    let cache = Arc::new(BlockCache::new(MIB));
    let [a, b] = ["a.qcow2", "b.qcow2"].map(|tip| open(&image(&path(tip)), &cache).expect("a good chain"));
    let mut page = [0; 4096];
    a.read(0, &mut page).expect("a good chain");
    b.read(4096, &mut page).expect("a good chain");
    assert_eq!((page, cache.stats().decodes), ([7; 4096], 1), "decoded once for both");
    assert_eq!(delta_between(&a, &b).expect("good tables"), Delta::new());

    // The file in another state is another layer.
    io(&path("base.qcow2"), "qcow2", &["write -P 9 0 64k".into()]);
    let changed = open(&image(&path("a.qcow2")), &cache).expect("a good chain");
    changed.read(0, &mut page).expect("a good chain");
    assert_eq!(page, [9; 4096]);
    assert_ne!(changed.fingerprint().expect("readable"), a.fingerprint().expect("readable"));
}

#[test]
fn snapshots_raw_and_refusals() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name);
    let cache = Arc::new(BlockCache::new(MIB));
    img(&["create", "-q", "-f", "qcow2", text(&path("s.qcow2")), "1M"]);
    io(&path("s.qcow2"), "qcow2", &["write -P 1 0 64k".into()]);
    img(&["snapshot", "-c", "before", text(&path("s.qcow2"))]);
    io(&path("s.qcow2"), "qcow2", &["write -P 2 0 64k".into()]);
    let spec = |path: PathBuf, format, snapshot: Option<&str>| ChainSpec::Image {
        path,
        format,
        allow_backing: Vec::new(),
        snapshot: snapshot.map(Into::into),
    };
    let first = |spec: &ChainSpec| {
        let mut page = [0; 4096];
        open(spec, &cache).expect("a good chain").read(0, &mut page).expect("a good chain");
        page[100]
    };
    assert_eq!(first(&spec(path("s.qcow2"), None, None)), 2);
    assert_eq!(first(&spec(path("s.qcow2"), None, Some("before"))), 1);
    let raw = open(&spec(path("s.qcow2"), Some(Format::Raw), None), &cache).expect("any file is raw if named so");
    let mut head = [0; 4];
    raw.read(0, &mut head).expect("a good chain");
    assert_eq!(head, *b"QFI\xfb");

    let refused = |spec: &ChainSpec| open(spec, &cache).expect_err("refused").to_string();
    std::fs::write(path("x.img"), [0; 4096]).expect("a file");
    assert!(refused(&spec(path("x.img"), None, None)).contains("x.img"), "raw is never guessed");
    assert!(refused(&spec(path("s.qcow2"), None, Some("none"))).contains("none"));
    assert!(refused(&spec(path("x.img"), Some(Format::Raw), Some("before"))).contains("before"));
    assert!(refused(&spec(path("gone.qcow2"), None, None)).contains("gone.qcow2"));

    img(&["create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", "gone.qcow2", text(&path("t.qcow2")), "1M"]);
    let broken = open(&image(&path("t.qcow2")), &cache).expect_err("a missing file");
    assert!(matches!(broken, Error::Format(FormatError::ChainBroken { .. })), "{broken}");
    img(&["create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", "t.qcow2", text(&path("u.qcow2")), "1M"]);
    img(&["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "u.qcow2", text(&path("t.qcow2"))]);
    assert!(refused(&image(&path("u.qcow2"))).contains("cycle"));
    let mut bytes = std::fs::read(path("t.qcow2")).expect("an image");
    let extension = bytes.windows(4).position(|b| b == [0xE2, 0x79, 0x2A, 0xCA]).expect("its backing format");
    bytes[extension] = 0x12;
    std::fs::write(path("t.qcow2"), bytes).expect("an image that does not say");
    assert!(refused(&image(&path("t.qcow2"))).contains("format"), "not guessed for a backing file either");
}

#[test]
fn snapshots_of_one_image_differ_where_their_tables_do() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("s.qcow2");
    let cache = Arc::new(BlockCache::new(MIB));
    std::fs::write(dir.path().join("base.raw"), vec![5; MIB as usize]).expect("a base");
    for backing in [&[][..], &["-F", "raw", "-b", "base.raw"]] {
        img(&[&["create", "-q", "-f", "qcow2"], backing, &[text(&path), "2M"]].concat());
        io(&path, "qcow2", &["write -P 1 0 256k".into(), "write -c -P 2 1M 64k".into()]);
        img(&["snapshot", "-c", "one", text(&path)]);
        io(&path, "qcow2", &["write -P 3 64k 64k".into(), "write -z 512k 64k".into(), "write -P 4 1500k 1k".into()]);
        img(&["snapshot", "-c", "two", text(&path)]);
        img(&["resize", "-q", "-f", "qcow2", text(&path), "3M"]);
        io(&path, "qcow2", &["write -P 6 2500k 64k".into(), "discard 0 64k".into()]);
        let points: Vec<Chain> = [Some("one"), Some("two"), None]
            .into_iter()
            .map(|name| {
                let snapshot = name.map(str::to_owned);
                let spec = ChainSpec::Image { path: path.clone(), format: None, allow_backing: Vec::new(), snapshot };
                open(&spec, &cache).expect("a good chain")
            })
            .collect();
        for old in &points {
            for new in &points {
                let delta = assert_delta_leads(old, new);
                assert!(delta.bytes() <= 64 * KIB * 5 + MIB, "only where the tables differ: {delta:?}");
            }
        }
        let written = delta_between(&points[0], &points[1]).expect("good tables");
        assert!(written.contains(64 * KIB) && !written.contains(0) && !written.contains(MIB), "{written:?}");
    }
}

#[test]
fn native_points_read_at_any_depth() {
    let cache = Arc::new(BlockCache::new(16 * MIB));
    for (seed, compression) in [Compression::Zstd(1), Compression::Lz4, Compression::Raw].into_iter().enumerate() {
        let (dir, mut rng) = (tempfile::tempdir().expect("a folder"), Rng::new(seed as u64));
        let points = native_points(dir.path(), 12, compression, &mut rng);
        let chains: Vec<Chain> = points
            .iter()
            .map(|(path, _)| open(&ChainSpec::Native { path: path.clone() }, &cache).expect("a good point"))
            .collect();
        for (chain, (path, bytes)) in chains.iter().zip(&points) {
            assert_reads_as(chain, bytes, &mut rng);
            assert_eq!(chain.layers().len(), 1);
            let probed = open(&image(path), &cache).expect("probed");
            assert_eq!(probed.fingerprint().expect("sealed"), chain.fingerprint().expect("sealed"));
        }
        for old in &chains {
            for new in &chains {
                assert_delta_leads(old, new);
            }
        }
    }
}

#[test]
fn native_points_share_the_blocks_of_their_common_file() {
    let (dir, mut rng) = (tempfile::tempdir().expect("a folder"), Rng::new(9));
    let (key, options) = (ContentKey::generate(), WriterOptions { threads: 0, ..WriterOptions::default() });
    let bytes: Vec<u8> = (0..MIB).map(|_| rng.below(16) as u8).collect();
    let path = |name: &str| dir.path().join(name).join("disk.aql");
    let write = |name: &str, new, first, bytes: &[u8]| {
        std::fs::create_dir(dir.path().join(name)).expect("a folder");
        let mut writer = Writer::create_file(&path(name), new, options).expect("a new layer");
        writer.put(first, bytes).expect("blocks");
        writer.finish().expect("a sealed layer");
    };
    write("full", NewLayer::full(MIB, key.clone()), 0, &bytes);
    let parent = Arc::new(Reader::open_path(&path("full")).expect("the parent"));
    write("more", NewLayer::increment(parent, "../full/disk.aql", key), 3, &bytes[7..7 + 65536]);

    let cache = Arc::new(BlockCache::new(16 * MIB));
    let open = |name: &str| open(&ChainSpec::Native { path: path(name) }, &cache).expect("a point");
    open("full").prefetch(0, MIB);
    assert_eq!(cache.stats().decodes, 16);
    open("more").prefetch(0, MIB);
    assert_eq!(cache.stats().decodes, 17, "only the block that differs");
}

#[test]
fn a_native_point_without_its_older_file_does_not_open() {
    let (dir, mut rng) = (tempfile::tempdir().expect("a folder"), Rng::new(4));
    let points = native_points(dir.path(), 3, Compression::Zstd(1), &mut rng);
    std::fs::remove_file(&points[0].0).expect("gone");
    let cache = Arc::new(BlockCache::new(MIB));
    let error = open(&ChainSpec::Native { path: points[2].0.clone() }, &cache).expect_err("incomplete");
    assert!(matches!(error, Error::Format(FormatError::ChainBroken { .. })), "{error}");
}
