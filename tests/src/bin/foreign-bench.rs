//! Reads disks of other products and says how fast, for `scripts/bench`:
//!
//! ```text
//! foreign-bench make FOLDER           makes the disks, and chains of a hundred (300 MB)
//! foreign-bench random FOLDER WHAT    4 KiB reads a second at random places
//! foreign-bench through FOLDER WHAT   MB a second from beginning to end
//! ```
//!
//! WHAT is `vbk`, `vma`, `pbs`, `checked`, or `chunks`: the chunks of `pbs` by nothing but the file system, zstd and, for
//! `checked`, SHA-256: a chunk's name is its digest, and Proxmox's own reader checks it as well.

#![allow(clippy::print_stdout, reason = "a figure is its answer")]

use std::{
    env, fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use aquifer_tests::{
    foreign::{
        deep, pbs,
        vbk::{Body, Encoding, File, Machine},
        vma,
    },
    qemu,
    rng::Rng,
};
use sha2::{Digest, Sha256};

use aquifer_vdisk::{BlockCache, Chain, ChainSpec, open_chain};

const MIB: usize = 1 << 20;
const SIZE: usize = 256 * MIB;
const CHUNK: usize = 4 * MIB;
/// How long random reads go on.
const WHILE: Duration = Duration::from_secs(2);

fn main() {
    let args: Vec<String> = env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["make", folder] => make(Path::new(folder)),
        ["random", folder, what] => println!("{:.0}", random(&mut reader(Path::new(folder), what))),
        ["through", folder, what] => println!("{:.1}", through(&mut reader(Path::new(folder), what))),
        other => panic!("{other:?}"),
    }
}

/// Half of it compresses.
fn content() -> Vec<u8> {
    let mut rng = Rng::new(4);
    (0..SIZE as u64 / 8).flat_map(|i| if i / 512 % 2 == 0 { rng.next_u64() } else { i / 64 }.to_le_bytes()).collect()
}

fn make(folder: &Path) {
    let hundred = folder.join("hundred");
    fs::create_dir_all(&hundred).expect("a folder");
    // Depth 1 holds the very same bytes: zeros cost less than data.
    let newest = deep::vmdk(&hundred, 100, 32 << 20);
    let one = folder.join("one");
    fs::create_dir_all(&one).expect("a folder");
    qemu::img(&["convert", "-O", "vmdk", qemu::text(&newest), qemu::text(&one.join("0.vmdk"))]);
    let (_, truth) = deep::vhdx(&hundred, 100, 32 << 20);
    let raw = one.join("truth.raw");
    fs::write(&raw, truth).expect("write");
    let options = ["convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M"];
    qemu::img(&[&options[..], &[qemu::text(&raw), qemu::text(&one.join("d0.vhdx"))]].concat());
    let bytes = content();
    let machines = vec![Machine {
        folder: "db01",
        name: "db01",
        id: 1,
        below: 0,
        files: vec![("DEV__dev_sda", Body::Whole(&bytes))],
    }];
    let file = File { version: 13, block: MIB, encodings: &[Encoding::Lz4], machines };
    fs::write(folder.join("a.vbk"), file.bytes()).expect("write");
    fs::write(folder.join("a.vma"), vma::archive(&[("drive-scsi0", &bytes)], &mut Rng::new(5))).expect("write");
    pbs::snapshot(&folder.join("store"), "2026-11-01T00:00:00Z", 9, CHUNK, &[("d", &bytes)]);
}

/// Reads at an offset.
type Reader = Box<dyn FnMut(u64, &mut [u8])>;

struct Disk {
    size: u64,
    read: Reader,
}

fn reader(folder: &Path, what: &str) -> Disk {
    let member = |path: &str, member: &str| ChainSpec::Member { path: folder.join(path), member: member.into() };
    let index = || folder.join("store/vm/100/2026-11-01T00:00:00Z/d.img.fidx");
    let spec = match what {
        "vbk" => member("a.vbk", "DEV__dev_sda"),
        "vma" => member("a.vma", "drive-scsi0"),
        "pbs" => ChainSpec::Snapshot { path: index(), key: None },
        "chunks" => return chunks(folder, &index(), false),
        "checked" => return chunks(folder, &index(), true),
        other => panic!("{other}"),
    };
    // So small that decoded blocks seldom come from it.
    let nobody = |uri: &str| panic!("{uri}");
    let chain: Chain = open_chain(&spec, Arc::new(BlockCache::new(32 * MIB as u64)), &nobody).expect("a good disk");
    Disk { size: chain.size(), read: Box::new(move |at, buf| chain.read(at, buf).expect("it reads")) }
}

/// Each read opens the chunk, decodes it and takes its part, unless it is that of the read before.
fn chunks(folder: &Path, index: &Path, is_checked: bool) -> Disk {
    let index = fs::read(index).expect("an index");
    let digests: Vec<String> =
        index[4096..].chunks(32).map(|d| d.iter().map(|b| format!("{b:02x}")).collect()).collect();
    let place: PathBuf = folder.join("store/.chunks");
    let mut kept: (usize, Vec<u8>) = (usize::MAX, Vec::new());
    let read = move |at: u64, buf: &mut [u8]| {
        let (mut at, mut done) = (usize::try_from(at).expect("small"), 0);
        while done < buf.len() {
            let number = at / CHUNK;
            if kept.0 != number {
                let name = &digests[number];
                let stored = fs::read(place.join(&name[..4]).join(name)).expect("a chunk");
                let is_packed = stored[0] == 0x31;
                let body = &stored[12..];
                let plain = if is_packed { zstd::bulk::decompress(body, CHUNK).expect("zstd") } else { body.to_vec() };
                if is_checked {
                    let sum: String = Sha256::digest(&plain).iter().map(|b| format!("{b:02x}")).collect();
                    assert_eq!(sum, *name, "the chunk is good");
                }
                kept = (number, plain);
            }
            let skip = at % CHUNK;
            let len = (CHUNK - skip).min(buf.len() - done);
            buf[done..done + len].copy_from_slice(&kept.1[skip..skip + len]);
            (at, done) = (at + len, done + len);
        }
    };
    Disk { size: SIZE as u64, read: Box::new(read) }
}

fn random(disk: &mut Disk) -> f64 {
    let (mut rng, mut page, mut reads) = (Rng::new(1), vec![0; 4096], 0u64);
    for at in (0..disk.size).step_by(MIB) {
        (disk.read)(at, &mut page);
    }
    let start = Instant::now();
    while start.elapsed() < WHILE {
        for _ in 0..16 {
            (disk.read)(rng.below(disk.size / 4096) * 4096, &mut page);
            reads += 1;
        }
    }
    reads as f64 / start.elapsed().as_secs_f64()
}

fn through(disk: &mut Disk) -> f64 {
    let mut part = vec![0; MIB];
    let start = Instant::now();
    for at in (0..disk.size).step_by(MIB) {
        let len = MIB.min(usize::try_from(disk.size - at).expect("small"));
        (disk.read)(at, &mut part[..len]);
    }
    disk.size as f64 / 1e6 / start.elapsed().as_secs_f64()
}
