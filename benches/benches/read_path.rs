//! What one read costs inside the process: the map, the cache, a cold block, opening a deep chain.
//! Doors and peers are measured by `scripts/bench`.
//!
//! Images are made by `qemu-img` and `qemu-io` and by the native writer, once, in the target folder.

use std::{
    hint::black_box,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use aquifer_formats::{
    Error as FormatError,
    aql::{ContentKey, NewLayer, Reader, Writer, WriterOptions},
};
use aquifer_vdisk::{BlockCache, Chain, ChainSpec, delta_between, open_chain};
use criterion::{Criterion, criterion_group, criterion_main};

const MIB: u64 = 1 << 20;
const DISK: u64 = 256 * MIB;
const BLOCK: u64 = 64 << 10;
const DEPTH: u64 = 128;

struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

fn run(program: &str, dir: &Path, args: &[&str], input: &str) {
    let mut child = Command::new(program)
        .current_dir(dir)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("the tool runs");
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("the tool reads");
    assert!(child.wait().expect("the tool ends").success(), "{program} {args:?}");
}

/// Half text, half noise, page by page: about what a file system of programs compresses to.
fn block(dice: &mut Dice) -> Vec<u8> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < BLOCK {
        if dice.below(2) == 0 {
            bytes.extend((0..512).flat_map(|_| (dice.below(u64::MAX) ^ dice.below(u64::MAX) << 31).to_le_bytes()));
        } else {
            let words: String = (0..).map(|_| format!("{:x} ", dice.below(4096))).take(1024).collect();
            bytes.extend(words.into_bytes().into_iter().cycle().take(4096));
        }
    }
    bytes
}

fn chain(path: &Path, cache_bytes: u64) -> Chain {
    let spec = ChainSpec::Image { path: path.into(), format: None, allow_backing: Vec::new(), snapshot: None };
    let none = |uri: &str| Err(FormatError::unsupported(uri, "no network"));
    open_chain(&spec, Arc::new(BlockCache::new(cache_bytes)), &none).expect("a chain")
}

/// A folder that `make` has filled, now or in an earlier run.
fn made(name: &str, make: impl FnOnce(&Path)) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if !dir.join("done").exists() {
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).expect("a folder");
        make(&dir);
        std::fs::write(dir.join("done"), []).expect("a mark");
    }
    dir
}

/// A full of compressed blocks and increments of 24 blocks each, as qcow2 and as native points.
fn corpus(dir: &Path) {
    let mut dice = Dice(1);
    let raw: Vec<u8> = (0..DISK / BLOCK).flat_map(|_| block(&mut dice)).collect();
    std::fs::write(dir.join("disk.raw"), &raw).expect("a raw disk");
    let zstd = ["-o", "compression_type=zstd"];
    run(
        "qemu-img",
        dir,
        &[&["convert", "-f", "raw", "-O", "qcow2", "-c"], &zstd[..], &["disk.raw", "0.qcow2"]].concat(),
        "",
    );
    let (key, writer_options) = (ContentKey::generate(), WriterOptions::default());
    let folder = |n: u64| dir.join(format!("point{n}"));
    std::fs::create_dir(folder(0)).expect("a folder");
    let mut writer =
        Writer::create_file(&folder(0).join("disk.aql"), NewLayer::full(DISK, key.clone()), writer_options)
            .expect("a full");
    writer.put(0, &raw).expect("blocks");
    writer.finish().expect("a full");
    std::fs::write(dir.join("donor"), block(&mut dice)).expect("a donor");
    let donor = std::fs::read(dir.join("donor")).expect("a donor");
    for n in 1..DEPTH {
        let (below, top) = (format!("{}.qcow2", n - 1), format!("{n}.qcow2"));
        let create = [&["create", "-q", "-f", "qcow2"], &zstd[..], &["-F", "qcow2", "-b", &below, &top]].concat();
        run("qemu-img", dir, &create, "");
        let parent = Arc::new(Reader::open_path(&folder(n - 1).join("disk.aql")).expect("the parent"));
        std::fs::create_dir(folder(n)).expect("a folder");
        let new = NewLayer::increment(parent, format!("../point{}/disk.aql", n - 1), key.clone());
        let mut writer = Writer::create_file(&folder(n).join("disk.aql"), new, writer_options).expect("an increment");
        let mut script = String::new();
        for place in std::collections::BTreeSet::from_iter((0..24).map(|_| dice.below(DISK / BLOCK))) {
            script += &format!("write -q -c -s donor {} {BLOCK}\n", place * BLOCK);
            writer.put(place, &donor).expect("a block");
        }
        run("qemu-io", dir, &["-f", "qcow2", &top], &script);
        writer.finish().expect("an increment");
    }
}

fn reads(c: &mut Criterion) {
    let dir = made("read_path-1", corpus);
    let tip = DEPTH - 1;
    let chains = [
        ("qcow2 depth 1", dir.join("0.qcow2")),
        ("qcow2 depth 128", dir.join(format!("{tip}.qcow2"))),
        ("native depth 1", dir.join("point0/disk.aql")),
        ("native depth 128", dir.join(format!("point{tip}/disk.aql"))),
    ];
    for (name, path) in chains {
        let mut group = c.benchmark_group(name);
        let (hot, cold) = (chain(&path, 2 * DISK), chain(&path, 0));
        hot.prefetch(0, DISK);
        let mut page = [0; 4096];
        let mut dice = Dice(5);
        let mut offset = move || dice.below(DISK / 4096) * 4096;
        group.bench_function("resolve", |b| b.iter(|| black_box(hot.resolve(offset(), 4096)).expect("good")));
        group.bench_function("cached 4 KiB", |b| b.iter(|| hot.read_now(offset(), &mut page).expect("good")));
        group.bench_function("cold 4 KiB", |b| b.iter(|| cold.read(offset(), &mut page).expect("good")));
        let mut large = vec![0; 1 << 20];
        let mut at = 0;
        group.bench_function("cold 1 MiB in order", |b| {
            b.iter(|| {
                cold.read(at, &mut large).expect("good");
                at = (at + MIB) % DISK;
            });
        });
        group.finish();
    }
}

/// A TiB in 100 layers, each with one percent of the first window written.
fn wide(dir: &Path) {
    let mut dice = Dice(3);
    for n in 0..100 {
        let (top, below) = (format!("{n}.qcow2"), format!("{}.qcow2", n - 1));
        let backing = if n == 0 { vec![] } else { vec!["-F", "qcow2", "-b", &below] };
        run("qemu-img", dir, &[&["create", "-q", "-f", "qcow2"], &backing[..], &[&top, "1T"]].concat(), "");
        let script: String = (0..82).map(|_| format!("write -q -z {} {BLOCK}\n", dice.below(8192) * BLOCK)).collect();
        run("qemu-io", dir, &["-f", "qcow2", &top], &script);
    }
}

/// A TiB with a full and an increment that has written something everywhere: every table exists.
fn scattered(dir: &Path) {
    run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "0.qcow2", "1T"], "");
    run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "0.qcow2", "1.qcow2"], "");
    let script: String = (0..2048u64).map(|n| format!("write -q -z {} {BLOCK}\n", (n * 8192 + n) * BLOCK)).collect();
    run("qemu-io", dir, &["-f", "qcow2", "1.qcow2"], &script);
}

fn opening(c: &mut Criterion) {
    let tip = made("wide-1", wide).join("99.qcow2");
    let mut group = c.benchmark_group("1 TiB in 100 layers");
    group.bench_function("open", |b| b.iter(|| chain(&tip, 0)));
    group.bench_function("open to first byte", |b| b.iter(|| chain(&tip, 0).read(0, &mut [0; 4096]).expect("good")));
    let opened = chain(&tip, 0);
    group.bench_function("fill one window", |b| {
        b.iter(|| {
            let fresh = Chain::new(opened.layers().to_vec(), opened.cache().clone()).expect("a chain");
            fresh.resolve(0, 4096).expect("good")
        });
    });
    group.bench_function("extents", |b| {
        b.iter(|| {
            let fresh = Chain::new(opened.layers().to_vec(), opened.cache().clone()).expect("a chain");
            let mut extents = Vec::new();
            fresh.extents(0, u64::MAX, &mut extents).expect("good");
            assert!(fresh.map_bytes() <= MIB, "windows that are one hole take nothing");
        });
    });
    group.finish();
    let dir = made("scattered-1", scattered);
    let (old, new) = (chain(&dir.join("0.qcow2"), 0), chain(&dir.join("1.qcow2"), 0));
    c.bench_function("delta of two points of 1 TiB, every table present", |b| {
        b.iter(|| assert_eq!(delta_between(&old, &new).expect("good").bytes(), 2048 * BLOCK));
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_secs(2)).warm_up_time(std::time::Duration::from_millis(500));
    targets = opening, reads
}
criterion_main!(benches);
