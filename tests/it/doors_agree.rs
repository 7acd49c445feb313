//! Promise: a disk is the same through every door, and every map of it says the same: the chain in this process, NBD,
//! FUSE, a loop device, an export and QEMU's own reading; `aquifer map`, `base:allocation`, nbdinfo, qemu-img, holes of
//! the file.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use aquifer_formats::aql::Compression;
use aquifer_mount::nbd::{Client, ClientOptions};
use aquifer_tests::{
    chains::{image, native_points, open, qcow2_layer},
    door::pattern,
    oracle::cases,
    qemu::{contents, img, text},
    rng::Rng,
    site::{Site, eventually},
};
use aquifer_vdisk::{BlockCache, Chain};
use rustix::{
    fs::{SeekFrom, seek},
    process::{Pid, Signal, kill_process},
};
use serde_json::Value;

/// A mount in the background, by all doors at once.
struct Mounted<'s> {
    site: &'s Site,
    pid: Pid,
    uri: String,
    file: PathBuf,
    device: PathBuf,
}

impl<'s> Mounted<'s> {
    fn new(site: &'s Site, source: &str) -> Self {
        let nbd = format!("unix:{}", site.word("ours"));
        let said = site.json(&["mount", source, "--nbd", &nbd, "--fuse", "files", "--loop", "--detach"]);
        let (serving, done) = (said.record("serving"), said.record("done"));
        let text = |key: &str| serving[key].as_str().unwrap_or_else(|| panic!("{key} in {serving}")).to_owned();
        let pid = done["pid"].as_i64().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)).expect("a process");
        Self { site, pid, uri: text("uri"), file: text("path").into(), device: text("device").into() }
    }

    fn client(&self) -> Client {
        Client::connect(&self.uri.parse().expect("an address"), &ClientOptions::default()).expect("a connection")
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = kill_process(self.pid, Signal::TERM);
        eventually("the mount to end", || (!self.site.path("ours").exists() && !self.file.exists()).then_some(()));
    }
}

/// Reads as much as there is.
fn read(from: &File, offset: u64, len: usize) -> Vec<u8> {
    let (mut bytes, mut got) = (vec![0xAA; len], 0);
    while got < len {
        match from.read_at(&mut bytes[got..], offset + got as u64).expect("a read") {
            0 => break,
            more => got += more,
        }
    }
    bytes.truncate(got);
    bytes
}

/// Any place and length, unaligned; every third across the end or behind it.
fn assert_bytes(chain: &Chain, mounted: &Mounted<'_>, wanted: &[u8], rng: &mut Rng) {
    let (client, size) = (mounted.client(), wanted.len() as u64);
    let (file, device) = (File::open(&mounted.file).expect("file"), File::open(&mounted.device).expect("device"));
    // A device has whole sectors only.
    let sectors = &wanted[..wanted.len() / 512 * 512];
    assert_eq!((chain.size(), client.size(), file.metadata().expect("stat").len()), (size, size, size));
    for turn in 0..100 {
        let near_end = size - rng.below(70_000).min(size) + rng.below(40_000);
        let offset = if turn % 3 == 0 { near_end } else { rng.below(size) };
        let len = (1 + rng.below(if turn % 10 == 0 { 900_000 } else { 9_000 })) as usize;
        let part = |of: &[u8]| {
            let start = of.len().min(offset as usize);
            of[start..of.len().min(offset as usize + len)].to_vec()
        };
        let want = part(wanted);
        assert!(read(&file, offset, len) == want, "file, {offset}+{len} of {size}");
        assert!(read(&device, offset, len) == part(sectors), "device, {offset}+{len} of {size}");
        let mut bytes = vec![0xAA; len];
        if want.len() < len {
            assert!(chain.read(offset, &mut bytes).is_err(), "chain, past the end, {offset}+{len} of {size}");
            assert!(client.read(offset, &mut bytes).is_err(), "NBD, past the end, {offset}+{len} of {size}");
        }
        bytes.truncate(want.len());
        if bytes.is_empty() {
            continue;
        }
        chain.read(offset, &mut bytes).expect("the chain");
        assert!(bytes == want, "chain, {offset}+{len} of {size}");
        bytes.fill(0xAA);
        client.read(offset, &mut bytes).expect("NBD");
        assert!(bytes == want, "NBD, {offset}+{len} of {size}");
    }
}

/// Runs of one state, each with its end: 0 data, 2 zeros, 3 a hole, as NBD counts them.
type Map = Vec<(u64, u64)>;

/// Puts runs together that follow each other; they must be without gaps and end with the disk.
fn joined(runs: impl IntoIterator<Item = (u64, u64, u64)>, size: u64, what: &str) -> Map {
    let mut out: Map = Vec::new();
    let mut end = 0;
    for (offset, len, state) in runs {
        assert_eq!(offset, end, "{what}: a gap");
        end += len;
        if offset >= size {
            continue;
        }
        match out.last_mut() {
            Some(last) if last.1 == state => last.0 = end.min(size),
            _ => out.push((end.min(size), state)),
        }
    }
    // QEMU counts in sectors.
    assert!(end == size || what.starts_with("qemu") && end == size.next_multiple_of(512), "{what}: {end} of {size}");
    out
}

fn listed(program: &str, args: &[&str]) -> Vec<Value> {
    let output = Command::new(program).args(args).output().expect(program);
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("a JSON list")
}

fn number(of: &Value, key: &str) -> u64 {
    of[key].as_u64().unwrap_or_else(|| panic!("{key} in {of}"))
}

/// Data and not data, as a file tells it.
fn holes(file: &File, size: u64) -> Map {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => size,
            Err(e) => panic!("SEEK_DATA: {}", io::Error::from(e)),
        };
        let hole = if data < size { seek(file, SeekFrom::Hole(data)).expect("SEEK_HOLE") } else { size };
        runs.extend([(at, data - at, 3), (data, hole - data, 0)].into_iter().filter(|(_, len, _)| *len > 0));
        at = hole;
    }
    joined(runs, size, "file")
}

fn assert_maps(site: &Site, source: &str, mounted: &Mounted<'_>, wanted: &[u8]) {
    let size = wanted.len() as u64;
    let said = site.json(&["map", source]).records("range");
    let ours = joined(
        said.iter().map(|range| {
            let state = match range["kind"].as_str() {
                Some("data") => 0,
                Some("zero") => 2,
                Some("hole") => 3,
                other => panic!("{other:?}"),
            };
            (number(range, "offset"), number(range, "length"), state)
        }),
        size,
        "aquifer map",
    );
    let (client, mut runs) = (mounted.client(), Vec::new());
    let mut at = 0;
    while at < size {
        let told = client.status("base:allocation", at, size - at).expect("block status");
        runs.extend(told.iter().map(|extent| (extent.offset, extent.len, extent.state)));
        at = told.last().map(|extent| extent.offset + extent.len).expect("never nothing");
    }
    assert_eq!(joined(runs, size, "base:allocation"), ours, "base:allocation");

    let theirs = listed("nbdinfo", &["--json", "--map", &mounted.uri]);
    let theirs = theirs.iter().map(|run| (number(run, "offset"), number(run, "length"), number(run, "type")));
    assert_eq!(joined(theirs, size, "nbdinfo"), ours, "nbdinfo --map");

    let theirs = listed("qemu-img", &["map", "--output=json", "-f", "raw", &mounted.uri]);
    let theirs = theirs.iter().map(|run| {
        let state = u64::from(run["zero"] == true) * 2 + u64::from(run["data"] == false);
        (number(run, "start"), number(run, "length"), state)
    });
    assert_eq!(joined(theirs, size, "qemu-img map"), ours, "qemu-img map");

    let file = File::open(&mounted.file).expect("file");
    let mut start = 0;
    let folded = ours.iter().map(|(end, state)| {
        let run = (start, end - start, if *state == 0 { 0 } else { 3 });
        start = *end;
        run
    });
    assert_eq!(holes(&file, size), joined(folded, size, "folded"), "holes of the file");

    let mut start = 0;
    for (end, state) in ours {
        assert!(
            state == 0 || wanted[start..end as usize].iter().all(|b| *b == 0),
            "{start}..{end} is said to be zeros"
        );
        start = end as usize;
    }
}

fn assert_agree(site: &Site, top: &Path, wanted: &[u8], rng: &mut Rng) {
    let source = text(top);
    let cache = Arc::new(BlockCache::new(4 << 20));
    let chain = open(&image(top), &cache).expect("a good chain");
    let mounted = Mounted::new(site, source);
    assert_bytes(&chain, &mounted, wanted, rng);
    assert_maps(site, source, &mounted, wanted);
    for out in ["out.raw", "out.qcow2"] {
        site.json(&["export", source, out]);
    }
    assert!(fs::read(site.path("out.raw")).expect("exported") == wanted, "export to a raw file");
    // A qcow2 disk has whole sectors only.
    let exported = contents(&site.path("out.qcow2"), "qcow2");
    assert!(exported[..wanted.len()] == *wanted, "export to qcow2");
    img(&["compare", "-q", "-f", "raw", "-F", "raw", &mounted.uri, text(&site.path("out.raw"))]);
}

#[test]
fn qcow2_chains() {
    for seed in 0..u64::from(cases(2)) {
        let (site, mut rng) = (Site::new(), Rng::new(seed ^ 0x51));
        let folder = site.path("chain");
        fs::create_dir(&folder).expect("folder");
        let size = (6 << 20) + 512 * rng.below(4096);
        let mut files: Vec<PathBuf> = Vec::new();
        for number in 0..2 + rng.below(5) {
            files.push(qcow2_layer(&folder, number, files.last().map(PathBuf::as_path), size, &mut rng));
        }
        let top = files.last().expect("a chain");
        assert_agree(&site, top, &contents(top, "qcow2"), &mut rng);
    }
}

#[test]
fn native_chains() {
    for seed in 0..u64::from(cases(2)) {
        let (site, mut rng) = (Site::new(), Rng::new(seed ^ 0x15));
        let folder = site.path("chain");
        fs::create_dir(&folder).expect("folder");
        let compression = rng.pick(&[Compression::Zstd(1), Compression::Lz4, Compression::Raw]);
        let points = native_points(&folder, 2 + rng.below(6), compression, &mut rng);
        let (top, wanted) = points.last().expect("a chain");
        assert_agree(&site, top, wanted, &mut rng);
    }
}

/// A disk that ends on no sector: a file and an export have every byte of it, a device whole sectors only.
#[test]
fn a_short_tail() {
    let (site, mut rng) = (Site::new(), Rng::new(9));
    let bytes = pattern(3_000_777, 5);
    let path = site.path("odd.raw");
    fs::write(&path, &bytes).expect("image");
    let source = format!("raw:{}", path.display());
    let mounted = Mounted::new(&site, &source);
    let storage = aquifer_formats::storage::MemoryStorage::new("odd", bytes.clone());
    let layer = aquifer_formats::raw::RawLayer::open(Arc::new(storage)).expect("layer");
    let chain = Chain::new(vec![Arc::new(layer)], Arc::new(BlockCache::new(1 << 20))).expect("chain");
    assert_bytes(&chain, &mounted, &bytes, &mut rng);
}
