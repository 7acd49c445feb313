//! Promise: a qcow2 chain reads byte for byte as QEMU reads it, whatever of the format it uses, and
//! what QEMU's authors would refuse, or what a careful site must, is refused.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::{
    Content, Error, Format, Gate, Layer, Result,
    qcow2::{BitmapTrust, Qcow2},
    raw::RawLayer,
    storage::{Access, FileStorage},
};
use aquifer_tests::{oracle::cases, qemu, rng::Rng};
use aquifer_vdisk::{BlockCache, Chain};

const MIB: u64 = 1 << 20;

/// Opens an image and what it stands on, through the gate, by the formats the images record.
fn open_layers(top: &Path, allow: &[PathBuf]) -> Result<Vec<Arc<dyn Layer>>> {
    let gate = Gate::new(allow)?;
    let mut layers: Vec<Arc<dyn Layer>> = Vec::new();
    let mut at = gate.enter(top)?;
    let mut format = Format::Qcow2;
    loop {
        if format == Format::Raw {
            layers.push(Arc::new(RawLayer::open(at.storage())?));
            return Ok(layers);
        }
        let image = Qcow2::open(at.storage())?;
        layers.push(Arc::new(image.active_through(&gate, &at)?));
        let Some(backing) = image.backing() else { return Ok(layers) };
        format = backing.format.as_deref().and_then(|f| f.parse().ok()).expect("a recorded backing format");
        at = gate.follow(&at, &backing.name)?;
    }
}

fn chain_of(layers: Vec<Arc<dyn Layer>>) -> Chain {
    Chain::new(layers, Arc::new(BlockCache::new(4 << 20))).expect("a chain")
}

/// Reads all through the plain walk: newest layer first, one lookup after the other.
fn read_by_walk(layers: &[Arc<dyn Layer>]) -> Vec<u8> {
    let size = layers[0].size();
    let mut out = Vec::new();
    while (out.len() as u64) < size {
        let at = out.len() as u64;
        let (mut len, mut answer) = (size - at, None);
        for layer in layers {
            if at >= layer.size() {
                break;
            }
            let (content, n) = layer.lookup(at, len.min(layer.size() - at)).expect("lookup");
            assert!(n >= 1 && n <= len, "{}: lookup of {at}+{len} answered for {n}", layer.label());
            len = n;
            if content != Content::Absent {
                answer = Some((layer, content));
                break;
            }
        }
        let len = usize::try_from(len).expect("small");
        let start = out.len();
        out.resize(start + len, 0);
        match answer {
            Some((layer, Content::Plain { file, offset })) => {
                layer.file(file).expect("a file").read_at(offset, &mut out[start..]).expect("reads");
            }
            Some((layer, Content::Packed { block, skip })) => {
                let skip = skip as usize;
                let mut raw = Vec::new();
                layer.unpack(&block, skip + len, &mut raw).expect("unpacks");
                out[start..].copy_from_slice(&raw[skip..skip + len]);
            }
            _ => {}
        }
    }
    out
}

/// `scan` tells what `lookup` tells, and lookups from any place agree with those from the start.
fn check_scan(layer: &dyn Layer, rng: &mut Rng) {
    let size = layer.size();
    let (from, mut told) = (rng.below(size), Vec::new());
    layer.scan(from, size, &mut |at, len, what| told.push((at, len, what))).expect("scan");
    let (mut at, mut looked) = (from, Vec::new());
    while at < size {
        let (content, len) = layer.lookup(at, size - at).expect("lookup");
        if content != Content::Absent {
            looked.push((at, len, content));
        }
        at += len;
    }
    assert_eq!(told, looked, "{} from {from}", layer.label());
}

/// The first difference, without printing megabytes.
fn assert_same(ours: &[u8], truth: &[u8], what: &str) {
    assert_eq!(ours.len(), truth.len(), "{what}: size");
    if let Some(at) = ours.iter().zip(truth).position(|(a, b)| a != b) {
        let end = (at + 16).min(truth.len());
        panic!("{what}: at {at} ours {:x?}, QEMU's {:x?}", &ours[at..end], &truth[at..end]);
    }
}

/// Compares every byte of `top` with QEMU's reading of it: by the plain walk, and through a chain.
fn compare(top: &Path, what: &str) {
    compare_allowing(top, &[], what);
}

fn compare_allowing(top: &Path, allow: &[PathBuf], what: &str) {
    let truth = qemu::contents(top, "qcow2");
    let layers = open_layers(top, allow).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_same(&read_by_walk(&layers), &truth, what);
    let mut rng = Rng::new(truth.len() as u64);
    for layer in &layers {
        check_scan(layer.as_ref(), &mut rng);
    }
    let chain = chain_of(layers);
    let mut ours = vec![0xee; truth.len()];
    let mut at = 0;
    while at < ours.len() {
        let len = usize::try_from(1 + rng.below(300_000)).expect("small").min(ours.len() - at);
        chain.read(at as u64, &mut ours[at..at + len]).expect("chain reads");
        at += len;
    }
    assert_same(&ours, &truth, what);
}

/// A folder with images and a file of patterned bytes for `qemu-io write -s`.
struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let lab = Self { dir: tempfile::tempdir().expect("temporary folder") };
        let mut rng = Rng::new(1);
        // Half text, half noise: compressible, and not alike anywhere.
        let pattern: Vec<u8> = (0..MIB / 8)
            .flat_map(|i| if i / 32 % 2 == 0 { i.to_le_bytes() } else { rng.next_u64().to_le_bytes() })
            .collect();
        fs::write(lab.path("pattern"), pattern).expect("write");
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes an image with `qemu-img create -o options`.
    fn create(&self, name: &str, options: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        let size = size.to_string();
        args.extend([qemu::text(&path), &size]);
        qemu::img(&args);
        path
    }

    /// An image on another one, named as `backing`.
    fn overlay(&self, name: &str, backing: &str, format: &str, options: &str, size: Option<u64>) -> PathBuf {
        let path = self.path(name);
        let mut args = vec!["create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        let size = size.map(|s| s.to_string());
        args.push(qemu::text(&path));
        args.extend(size.as_deref());
        qemu::img(&args);
        path
    }

    /// Random writes of every kind that `kinds` allows.
    fn scribble(&self, path: &Path, size: u64, count: u64, kinds: Kinds, rng: &mut Rng) {
        let mut commands: Vec<String> = (0..count).map(|_| command(&self.path("pattern"), size, kinds, rng)).collect();
        commands.push("flush".into());
        qemu::io_where_possible(path, "qcow2", &commands);
    }
}

/// What of writing an image's format allows.
#[derive(Clone, Copy)]
struct Kinds {
    cluster: u64,
    compressed: bool,
    zeros: bool,
}

/// One random `qemu-io` command inside `size` bytes.
fn command(pattern: &Path, size: u64, kinds: Kinds, rng: &mut Rng) -> String {
    let sectors = size / 512;
    let at = rng.below(sectors);
    let most = rng.pick(&[8, 64, 512]);
    let len = (1 + rng.below(most)).min(sectors - at);
    let (at, len) = (at * 512, len * 512);
    let clusters = size / kinds.cluster;
    let first = rng.below(clusters.max(1)) * kinds.cluster;
    let some = (1 + rng.below(3)).min((size - first) / kinds.cluster) * kinds.cluster;
    match rng.below(8) {
        0 if kinds.compressed && some > 0 => {
            format!("write -c -s {} {first} {}", pattern.display(), some.min(kinds.cluster))
        }
        1 if kinds.compressed && some > 0 => format!("write -c -P {} {first} {some}", rng.below(256)),
        2 if kinds.zeros => format!("write -z {at} {len}"),
        3 if kinds.zeros => format!("write -z -u {at} {len}"),
        4 if some > 0 => format!("discard {first} {some}"),
        5 => format!("write -P {} {at} {len}", rng.below(256)),
        _ => format!("write -s {} {at} {len}", pattern.display()),
    }
}

fn both(cluster: u64) -> Kinds {
    Kinds { cluster, compressed: true, zeros: true }
}

#[test]
fn every_kind_of_image_reads_as_qemu_reads_it() {
    let lab = Lab::new();
    let variants = [
        "compat=0.10",
        "compat=1.1",
        "compat=1.1,compression_type=zstd",
        "compat=1.1,lazy_refcounts=on,refcount_bits=1",
        "extended_l2=on",
        "extended_l2=on,compression_type=zstd,cluster_size=16k",
        "extended_l2=on,cluster_size=2M",
        "preallocation=metadata",
        "preallocation=falloc,extended_l2=on",
    ];
    for round in 0..cases(2).into() {
        for options in variants {
            let mut rng = Rng::new(round);
            let size = 3 * MIB + 512 * rng.below(3000);
            let path = lab.create("one.qcow2", options, size);
            let cluster = Qcow2::open(Arc::new(FileStorage::open(&path, Access::ReadOnly).expect("open")))
                .and_then(|image| image.active(None))
                .map(|layer| if options.contains("extended") { layer.grain() * 32 } else { layer.grain() });
            lab.scribble(&path, size, 40, both(cluster.expect("a cluster size")), &mut rng);
            compare(&path, &format!("{options}, round {round}"));
        }
    }
}

#[test]
fn every_cluster_size() {
    let lab = Lab::new();
    let mut rng = Rng::new(7);
    for bits in 9..=21 {
        let cluster = 1 << bits;
        let method = ["zlib", "zstd"][usize::from(bits % 2 == 0)];
        let size = (cluster * 3).max(MIB) + 512 * rng.below(100);
        let options = format!("cluster_size={cluster},compression_type={method}");
        let path = lab.create("one.qcow2", &options, size);
        // QEMU 10.0 itself damages images of this size when compressed and other writes mix: it lets a
        // compressed cluster overlap an L2 table and then marks the image corrupt.
        let kinds = Kinds { cluster, compressed: cluster > 512, zeros: true };
        lab.scribble(&path, size, 40, kinds, &mut rng);
        compare(&path, &options);
    }
}

#[test]
fn whole_images_compressed_by_qemu() {
    let lab = Lab::new();
    let pattern = fs::read(lab.path("pattern")).expect("pattern");
    let mut raw = [pattern.clone(), vec![0; 300_000], pattern].concat();
    raw.truncate(2_300_000 / 512 * 512);
    fs::write(lab.path("raw"), &raw).expect("write");
    for options in [
        "compression_type=zlib",
        "compression_type=zstd",
        "compression_type=zstd,cluster_size=4k",
        "cluster_size=512",
        "cluster_size=2M",
    ] {
        let path = lab.path("packed.qcow2");
        qemu::img(&["convert", "-c", "-O", "qcow2", "-o", options, qemu::text(&lab.path("raw")), qemu::text(&path)]);
        compare(&path, options);
        let layers = open_layers(&path, &[]).expect("opens");
        assert_eq!(read_by_walk(&layers), raw, "{options}: what went in comes out");
    }
}

#[test]
fn external_data_files() {
    let lab = Lab::new();
    for (round, options) in ["", ",data_file_raw=on", ",extended_l2=on", ",preallocation=metadata"].iter().enumerate() {
        let mut rng = Rng::new(round as u64);
        let data = lab.path(&format!("data{round}"));
        let path = lab.create("ext.qcow2", &format!("data_file={}{options}", qemu::text(&data)), 2 * MIB);
        let kinds = Kinds { cluster: 65536, compressed: false, zeros: true };
        lab.scribble(&path, 2 * MIB, 40, kinds, &mut rng);
        compare(&path, &format!("data file{options}"));
        let image = Qcow2::open(Arc::new(FileStorage::open(&path, Access::ReadOnly).expect("open"))).expect("opens");
        let file = image.data_file().expect("a data file");
        assert_eq!(file.is_raw, options.contains("raw"));
        if file.is_raw {
            let layers = open_layers(&path, &[]).expect("opens");
            assert_eq!(fs::read(&data).expect("data file"), read_by_walk(&layers), "alone it is the disk");
        }
        fs::remove_file(&data).expect("remove");
        assert!(matches!(open_layers(&path, &[]), Err(Error::ChainBroken { .. })), "its data file is gone");
    }
}

/// Snapshots of several states and sizes, all of them read beside the active disk.
#[test]
fn internal_snapshots_read_by_name_and_by_id() {
    let lab = Lab::new();
    for options in ["compat=1.1", "compat=1.1,compression_type=zstd", "extended_l2=on", "cluster_size=4k"] {
        let mut rng = Rng::new(3);
        let base = lab.create("base.qcow2", "", 2 * MIB);
        lab.scribble(&base, 2 * MIB, 20, both(65536), &mut rng);
        let path = lab.overlay("snap.qcow2", "base.qcow2", "qcow2", options, Some(3 * MIB));
        let mut truths = Vec::new();
        for (number, size) in [3 * MIB, 3 * MIB, 5 * MIB, MIB].into_iter().enumerate() {
            let name = format!("state {number}");
            qemu::img(&["resize", "-q", "--shrink", "-f", "qcow2", qemu::text(&path), &size.to_string()]);
            lab.scribble(&path, size, 15, both(65536), &mut rng);
            qemu::img(&["snapshot", "-c", &name, qemu::text(&path)]);
            truths.push((name.clone(), qemu::snapshot_contents(&path, &name)));
        }
        lab.scribble(&path, MIB, 15, both(65536), &mut rng);
        compare(&path, options);

        let image = Qcow2::open(Arc::new(FileStorage::open(&path, Access::ReadOnly).expect("open"))).expect("opens");
        let listed = image.snapshots().expect("snapshots");
        assert_eq!(
            listed.iter().map(|s| &s.name).collect::<Vec<_>>(),
            truths.iter().map(|(n, _)| n).collect::<Vec<_>>()
        );
        for (snapshot, (name, truth)) in listed.iter().zip(&truths) {
            assert_eq!(snapshot.size, truth.len() as u64, "{name}");
            for word in [name, &snapshot.id] {
                let mut layers = open_layers(&path, &[]).expect("opens");
                layers[0] = Arc::new(image.snapshot(word).expect("a snapshot"));
                assert_same(&read_by_walk(&layers), truth, &format!("{options}, {name} as {word}"));
                check_scan(layers[0].as_ref(), &mut rng);
            }
        }
        assert!(image.snapshot("no such").is_err());
    }
}

/// A short layer in the middle reads as zeros past its end: what lies deeper must not shine through.
#[test]
fn layers_of_any_size_on_each_other() {
    let lab = Lab::new();
    let sizes = [2 * MIB, 3 * MIB, MIB, 3 * MIB / 2, 4 * MIB + 512 * 77, 512 * 3];
    let mut rng = Rng::new(11);
    for round in 0..u64::from(cases(6)) {
        let base_size = rng.pick(&sizes[..5]);
        let raw_base = round % 2 == 0;
        let mut below = ("base".to_owned(), if raw_base { "raw" } else { "qcow2" });
        if raw_base {
            let pattern = fs::read(lab.path("pattern")).expect("pattern").repeat(5);
            fs::write(lab.path("base"), &pattern[..usize::try_from(base_size).expect("small")]).expect("write");
        } else {
            let path = lab.create("base", "", base_size);
            lab.scribble(&path, base_size, 40, both(65536), &mut rng);
        }
        for depth in 0..4 {
            let size = rng.pick(&sizes);
            let name = format!("over{depth}");
            let options = rng.pick(&["", "extended_l2=on", "cluster_size=4k", "compat=0.10"]);
            let path = lab.overlay(&name, &below.0, below.1, options, Some(size));
            let cluster = if options.contains("4k") { 4096 } else { 65536 };
            lab.scribble(&path, size, 12, both(cluster), &mut rng);
            compare(&path, &format!("round {round}, depth {depth}, {options}, {size} bytes"));
            below = (name, "qcow2");
        }
    }
}

#[test]
fn thirty_two_layers() {
    let lab = Lab::new();
    let mut rng = Rng::new(5);
    let base = lab.create("0.qcow2", "", 4 * MIB);
    lab.scribble(&base, 4 * MIB, 60, both(65536), &mut rng);
    let mut top = base;
    for depth in 1..32 {
        let options = if depth % 3 == 0 { "compression_type=zstd" } else { "" };
        top = lab.overlay(&format!("{depth}.qcow2"), &format!("{}.qcow2", depth - 1), "qcow2", options, Some(4 * MIB));
        lab.scribble(&top, 4 * MIB, 4, both(65536), &mut rng);
    }
    compare(&top, "32 layers");
}

/// Random commands on a chain of three, against a vector that knows nothing of layers.
#[test]
fn random_histories_match_a_plain_vector() {
    let lab = Lab::new();
    let pattern = fs::read(lab.path("pattern")).expect("pattern");
    for seed in 0..u64::from(cases(12)) {
        let mut rng = Rng::new(1000 + seed);
        let mut truth: Vec<u8> = Vec::new();
        let mut below = None;
        for depth in 0..3 {
            let size = MIB / 2 + 512 * rng.below(3000);
            let options = ["", "extended_l2=on", "cluster_size=512", "compression_type=zstd,cluster_size=8k"];
            let options = rng.pick(&options);
            let name = format!("{depth}.qcow2");
            let path = match below.replace(name.clone()) {
                None => lab.create(&name, options, size),
                Some(backing) => lab.overlay(&name, &backing, "qcow2", options, Some(size)),
            };
            truth.resize(usize::try_from(size).expect("small"), 0);
            let mut commands = Vec::new();
            for _ in 0..12 {
                let at = 512 * rng.below(size / 512);
                let len = (512 * (1 + rng.below(200))).min(size - at);
                let (from, to) = (usize::try_from(at).expect("small"), usize::try_from(at + len).expect("small"));
                let range = &mut truth[from..to];
                match rng.below(4) {
                    0 => {
                        range.fill(0);
                        let unmap = rng.pick(&["", "-u "]);
                        commands.push(format!("write -z {unmap}{at} {len}"));
                    }
                    1 => {
                        let byte = u8::try_from(rng.below(256)).expect("a byte");
                        range.fill(byte);
                        commands.push(format!("write -P {byte} {at} {len}"));
                    }
                    _ => {
                        range.copy_from_slice(&pattern[..range.len()]);
                        commands.push(format!("write -s {} {at} {len}", lab.path("pattern").display()));
                    }
                }
            }
            qemu::io(&path, "qcow2", &commands);
            let layers = open_layers(&path, &[]).expect("opens");
            assert_same(&read_by_walk(&layers), &truth, &format!("seed {seed}, depth {depth}, {options}"));
            let mut ours = vec![1; truth.len()];
            chain_of(layers).read(0, &mut ours).expect("chain reads");
            assert_same(&ours, &truth, &format!("seed {seed}, depth {depth}, {options}, chain"));
        }
    }
}

#[test]
fn a_disk_that_ends_within_a_sector() {
    let lab = Lab::new();
    let path = lab.create("odd.qcow2", "", MIB);
    qemu::io(&path, "qcow2", &["write -P 9 1000k 24k".into(), "write -P 8 0 512".into()]);
    let mut bytes = fs::read(&path).expect("read");
    bytes[24..32].copy_from_slice(&(MIB - 100).to_be_bytes());
    fs::write(&path, bytes).expect("write");
    let layers = open_layers(&path, &[]).expect("opens");
    let ours = read_by_walk(&layers);
    assert_eq!(ours.len() as u64, MIB - 100);
    assert_eq!((ours[0], ours[512], ours[ours.len() - 1]), (8, 0, 9));
    assert!(layers[0].lookup(MIB - 100, 1).is_err());
}

/// A bitmap's name, whether it may be trusted, and its dirty ranges if so.
type Listed = (String, BitmapTrust, Vec<(u64, u64)>);

/// The bitmaps of an image.
fn bitmaps(path: &Path) -> Vec<Listed> {
    let image = Qcow2::open(Arc::new(FileStorage::open(path, Access::ReadOnly).expect("open"))).expect("opens");
    let listed = image.bitmaps().expect("bitmaps");
    listed
        .into_iter()
        .map(|bitmap| {
            let mut ranges = Vec::new();
            let told = image.dirty_ranges(&bitmap, &mut |at, len| ranges.push((at, len)));
            assert_eq!(told.is_ok(), bitmap.trust == BitmapTrust::Consistent, "{told:?}");
            (bitmap.name, bitmap.trust, ranges)
        })
        .collect()
}

#[test]
fn dirty_bitmaps_tell_the_writes_since() {
    let lab = Lab::new();
    let path = lab.create("b.qcow2", "", 64 * MIB);
    let add = |name: &str, granularity: &str| {
        qemu::img(&["bitmap", "--add", "-g", granularity, qemu::text(&path), name]);
    };
    qemu::io(&path, "qcow2", &["write -P 1 0 1M".into()]);
    add("coarse", "64k");
    qemu::io(&path, "qcow2", &["write -P 2 1M 64k".into(), "write -z 2M 100k".into()]);
    add("fine", "4k");
    qemu::io(&path, "qcow2", &["write -P 3 10000k 5k".into(), "write -P 3 65535k 1k".into()]);
    let k = 1024;
    let late = [(9984 * k, 64 * k), (65472 * k, 64 * k)];
    let coarse = [&[(1024 * k, 64 * k), (2048 * k, 128 * k)], &late[..]].concat();
    let fine = vec![(10000 * k, 8 * k), (65532 * k, 4 * k)];
    let trusted = BitmapTrust::Consistent;
    assert_eq!(bitmaps(&path), [("coarse".into(), trusted, coarse.clone()), ("fine".into(), trusted, fine.clone())]);

    // In an image whose clusters are small the bits of one bitmap fill many clusters.
    let small = lab.create("s.qcow2", "cluster_size=512", 32 * MIB);
    qemu::img(&["bitmap", "--add", "-g", "512", qemu::text(&small), "all"]);
    let writes: Vec<String> = (0..60).map(|i| format!("write -P 1 {}k 512", i * 500)).collect();
    qemu::io(&small, "qcow2", &writes);
    let expected: Vec<_> = (0..60).map(|i| (i * 500 * k, 512)).collect();
    assert_eq!(bitmaps(&small), [("all".into(), trusted, expected)]);

    // Disabled bitmaps stay as they were, cleared ones are empty.
    qemu::img(&["bitmap", "--disable", qemu::text(&path), "fine"]);
    qemu::img(&["bitmap", "--clear", qemu::text(&path), "coarse"]);
    qemu::io(&path, "qcow2", &["write -P 3 0 1k".into()]);
    assert_eq!(bitmaps(&path), [("coarse".into(), trusted, vec![(0, 64 * k)]), ("fine".into(), trusted, fine)]);
}

#[test]
fn bitmaps_that_may_miss_a_write_are_not_trusted() {
    let lab = Lab::new();
    let path = lab.create("b.qcow2", "", 4 * MIB);
    qemu::img(&["bitmap", "--add", qemu::text(&path), "b"]);
    assert_eq!(bitmaps(&path)[0].1, BitmapTrust::Consistent);
    // A writer that dies leaves the bitmap marked: qemu-io is stopped in the middle of its work.
    let mut child = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", qemu::text(&path), "-c", "write -P 1 0 64k", "-c", "sleep 60000"])
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("qemu-io runs");
    let marked = (0..200).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(20));
        bitmaps(&path)[0].1 == BitmapTrust::InUse
    });
    child.kill().expect("kill");
    child.wait().expect("gone");
    assert!(marked, "an image being written to");
    assert_eq!(bitmaps(&path)[0].1, BitmapTrust::InUse, "and after its writer died");
    // A writer that knows no bitmaps clears the autoclear bit.
    let mut bytes = fs::read(&path).expect("read");
    bytes[88..96].fill(0);
    fs::write(&path, bytes).expect("write");
    assert_eq!(bitmaps(&path)[0].1, BitmapTrust::NotKeptUp);
}

#[test]
fn encrypted_images_are_refused_not_served_as_ciphertext() {
    let lab = Lab::new();
    for (options, name) in [
        ("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", "LUKS"),
        ("encrypt.format=aes,encrypt.key-secret=s", "AES"),
    ] {
        let path = lab.path("secret.qcow2");
        qemu::img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "--object",
            "secret,id=s,data=x",
            "-o",
            options,
            qemu::text(&path),
            "1M",
        ]);
        let done = open_layers(&path, &[]);
        assert!(matches!(&done, Err(Error::Unsupported { what, .. }) if what.contains(name)), "{done:?}");
    }
}

#[test]
fn marks_that_forbid_reading() {
    let lab = Lab::new();
    let with_incompatible = |bits: u64| {
        let path = lab.create("m.qcow2", "", MIB);
        let mut bytes = fs::read(&path).expect("read");
        bytes[72..80].copy_from_slice(&bits.to_be_bytes());
        fs::write(&path, bytes).expect("write");
        open_layers(&path, &[])
    };
    assert!(with_incompatible(1).is_ok(), "dirty is about reference counts");
    assert!(matches!(with_incompatible(2), Err(Error::Corrupt { what, .. }) if what.contains("corrupt")));
    assert!(matches!(with_incompatible(1 << 5), Err(Error::Unsupported { what, .. }) if what.contains("bit 5")));
}

#[test]
fn backing_names_are_confined() {
    let lab = Lab::new();
    for folder in ["vm/sub", "elsewhere"] {
        fs::create_dir_all(lab.path(folder)).expect("mkdir");
    }
    let mut rng = Rng::new(2);
    for name in ["vm/base.qcow2", "elsewhere/base.qcow2"] {
        let path = lab.create(name, "", MIB);
        lab.scribble(&path, MIB, 10, both(65536), &mut rng);
    }
    // Relative to the image that names it, not to where the reader stands.
    let mid = lab.overlay("vm/sub/mid.qcow2", "../base.qcow2", "qcow2", "", Some(MIB));
    lab.scribble(&mid, MIB, 5, both(65536), &mut rng);
    let top = lab.overlay("vm/top.qcow2", "sub/mid.qcow2", "qcow2", "", Some(MIB));
    lab.scribble(&top, MIB, 5, both(65536), &mut rng);
    compare(&top, "relative, in a folder below");

    let refused = |name: &str, allow: &[PathBuf]| {
        let path = lab.overlay("vm/x.qcow2", name, "qcow2", "", Some(MIB));
        match open_layers(&path, allow) {
            Err(Error::Refused { .. }) => true,
            Ok(_) => false,
            Err(other) => panic!("{name}: {other}"),
        }
    };
    let outside = lab.path("elsewhere/base.qcow2");
    let json = format!(
        "json:{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}}}}",
        outside.display()
    );
    let uri = format!("file:{}", outside.display());
    for name in ["../elsewhere/base.qcow2", qemu::text(&outside), &json, &uri, "nbd://127.0.0.1/x", "/etc/passwd"] {
        assert!(refused(name, &[]), "{name}");
    }
    let allow = [lab.path("elsewhere")];
    for name in ["../elsewhere/base.qcow2", qemu::text(&outside)] {
        assert!(!refused(name, &allow), "{name} is allowed");
        compare_allowing(&lab.path("vm/x.qcow2"), &allow, name);
    }
    assert!(refused(&json, &allow));
    // A data file is named by the image too.
    let ext = lab.create("vm/ext.qcow2", &format!("data_file={}", lab.path("elsewhere/data").display()), MIB);
    assert!(matches!(open_layers(&ext, &[]), Err(Error::Refused { .. })));
    compare_allowing(&ext, &allow, "an allowed data file");
}

#[test]
fn chains_that_bite_their_own_tail() {
    let lab = Lab::new();
    lab.overlay("a.qcow2", "b.qcow2", "qcow2", "", Some(MIB));
    let b = lab.overlay("b.qcow2", "./c.qcow2", "qcow2", "", Some(MIB));
    lab.overlay("c.qcow2", "../self/a.qcow2", "qcow2", "", Some(MIB));
    let here = lab.dir.path().canonicalize().expect("a path");
    qemu::img(&[
        "rebase",
        "-u",
        "-F",
        "qcow2",
        "-b",
        qemu::text(&here.join("a.qcow2")),
        qemu::text(&lab.path("c.qcow2")),
    ]);
    for top in ["a.qcow2", "b.qcow2"] {
        let done = open_layers(&lab.path(top), &[]);
        assert!(matches!(&done, Err(Error::ChainBroken { what, .. }) if what.contains("cycle")), "{top}: {done:?}");
    }
    let own = lab.overlay("own.qcow2", "own.qcow2", "qcow2", "", Some(MIB));
    assert!(matches!(open_layers(&own, &[]), Err(Error::ChainBroken { .. })));
    let gate = Gate::default();
    let gone = gate.enter(&b).and_then(|from| gate.follow(&from, OsStr::new("gone.qcow2")));
    assert!(matches!(gone, Err(Error::ChainBroken { .. })));
}
