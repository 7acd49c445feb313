//! A client that writes and flushes beside one that floods, straight on a disk's overlay with no door between, and beside it
//! what the disk below allows: the same on two plain files that share nothing but the device.
//!
//! `victim FOLDER [SECONDS [FLOOD]]` prints, for each flood, percentiles of the victim's writes and flushes in microseconds and how much the flood
//! got through. The folder has to be on the file system that is to be measured.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a measuring program")]

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use aquifer_vdisk::{Disk, Overlay, OverlayOf, OverlayOptions};

const SIZE: u64 = 2 << 30;
const MIB: usize = 1 << 20;
/// Time between two of the victim's writes.
const PACE: Duration = Duration::from_millis(10);

/// What the flood writes at a time, and whether in order.
#[derive(Clone, Copy)]
struct Flood {
    name: &'static str,
    bytes: usize,
    in_order: bool,
    /// For plain files: written between two syncs.
    synced: usize,
    threads: usize,
    flushes: bool,
}

const FLOODS: [Flood; 4] = [
    Flood { name: "nobody", bytes: 0, in_order: true, synced: 0, threads: 0, flushes: false },
    Flood { name: "1 MiB in order", bytes: MIB, in_order: true, synced: MIB, threads: 1, flushes: false },
    Flood { name: "4 KiB at random", bytes: 4096, in_order: false, synced: MIB, threads: 1, flushes: false },
    Flood { name: "4 flushers", bytes: 4096, in_order: false, synced: 4096, threads: 4, flushes: true },
];

struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Something with two halves: the victim's and the flood's.
trait Target: Sync {
    fn write(&self, offset: u64, bytes: &[u8]);
    fn flush(&self);
    fn write_of_flood(&self, offset: u64, bytes: &[u8], flush: bool);
}

impl Target for Disk {
    fn write(&self, offset: u64, bytes: &[u8]) {
        Disk::write(self, offset, bytes).unwrap();
    }

    fn flush(&self) {
        Disk::flush(self).unwrap();
    }

    fn write_of_flood(&self, offset: u64, bytes: &[u8], flush: bool) {
        Disk::write(self, SIZE / 2 + offset, bytes).unwrap();
        if flush {
            Disk::flush(self).unwrap();
        }
    }
}

/// The victim's file is laid out beforehand, as a journal is; the flood syncs its own.
struct Plain {
    victim: File,
    flood: File,
    synced: u64,
    open: AtomicU64,
}

impl Target for Plain {
    fn write(&self, offset: u64, bytes: &[u8]) {
        self.victim.write_all_at(bytes, offset % (32 << 20)).unwrap();
    }

    fn flush(&self) {
        self.victim.sync_data().unwrap();
    }

    fn write_of_flood(&self, offset: u64, bytes: &[u8], _: bool) {
        self.flood.write_all_at(bytes, offset).unwrap();
        if self.open.fetch_add(bytes.len() as u64, Ordering::Relaxed) + bytes.len() as u64 >= self.synced {
            self.open.store(0, Ordering::Relaxed);
            self.flood.sync_data().unwrap();
        }
    }
}

fn flood(target: &dyn Target, flood: Flood, seed: u64, stop: &AtomicBool, done: &AtomicU64) {
    let mut dice = Dice(seed);
    let bytes: Vec<u8> = (0..flood.bytes).map(|_| u8::try_from(dice.below(256)).unwrap()).collect();
    let places = SIZE / 2 / flood.bytes as u64;
    let mut next = 0;
    while !stop.load(Ordering::Relaxed) {
        let place = if flood.in_order { next % places } else { dice.below(places) };
        next += 1;
        target.write_of_flood(place * flood.bytes as u64, &bytes, flood.flushes);
        done.fetch_add(flood.bytes as u64, Ordering::Relaxed);
    }
}

fn victim(target: &dyn Target, seconds: u64) -> (Vec<u128>, Vec<u128>) {
    let (mut writes, mut flushes) = (Vec::new(), Vec::new());
    let mut dice = Dice(77);
    let begun = Instant::now();
    let mut due = begun;
    while begun.elapsed().as_secs() < seconds {
        let bytes = [u8::try_from(dice.below(256)).unwrap(); 4096];
        let at = dice.below(SIZE / 2 / 4096) * 4096;
        let start = Instant::now();
        target.write(at, &bytes);
        let written = start.elapsed();
        target.flush();
        writes.push(written.as_micros());
        flushes.push((start.elapsed() - written).as_micros());
        due += PACE;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        due = due.max(Instant::now() - PACE);
    }
    writes.sort_unstable();
    flushes.sort_unstable();
    (writes, flushes)
}

fn at(sorted: &[u128], per_mille: usize) -> u128 {
    sorted[(sorted.len() - 1) * per_mille / 1000]
}

fn measure(name: &str, target: &dyn Target, of: Flood, seconds: u64) {
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for seed in 0..of.threads {
            let (stop, done) = (&stop, &done);
            scope.spawn(move || flood(target, of, seed as u64 + 5, stop, done));
        }
        thread::sleep(Duration::from_millis(if of.threads == 0 { 0 } else { 1500 }));
        let before = done.load(Ordering::Relaxed);
        let (writes, flushes) = victim(target, seconds);
        let through = (done.load(Ordering::Relaxed) - before) as f64 / seconds as f64 / 1e6;
        stop.store(true, Ordering::Relaxed);
        println!(
            "{name:8} {:16} writes {:6} {:6} {:6}  flushes {:6} {:6} {:6} {:6}  of {:4}, flood {through:6.1} MB/s",
            of.name,
            at(&writes, 500),
            at(&writes, 940),
            at(&writes, 990),
            at(&flushes, 500),
            at(&flushes, 900),
            at(&flushes, 940),
            at(&flushes, 990),
            flushes.len(),
        );
    });
}

/// A disk without a chain, with every byte local.
fn disk(folder: &Path) -> Disk {
    let of = OverlayOf { size: SIZE, chain: [0; 32] };
    let overlay = Overlay::create(folder, of, OverlayOptions::default()).unwrap();
    let disk = Disk::awaiting("victim", overlay);
    for at in (0..SIZE).step_by(MIB) {
        disk.write(at, &[1; MIB]).unwrap();
    }
    disk.flush().unwrap();
    disk
}

fn plain(folder: &Path, synced: usize) -> Plain {
    let file = |name: &str, len: u64| {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(folder.join(name)).unwrap();
        (0..len).step_by(MIB).for_each(|at| file.write_all_at(&[1; MIB], at).unwrap());
        file.sync_all().unwrap();
        file
    };
    Plain {
        victim: file("victim", 32 << 20),
        flood: file("flood", SIZE / 2),
        synced: synced as u64,
        open: AtomicU64::new(0),
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let folder = Path::new(&args[1]);
    let seconds = args.get(2).map_or(5, |text| text.parse().unwrap());
    println!("percentiles 50, 94, 99 of writes and 50, 90, 94, 99 of flushes, us");
    for of in FLOODS.into_iter().filter(|of| args.get(3).is_none_or(|name| of.name.contains(name.as_str()))) {
        let room = folder.join("overlay");
        fs::create_dir(&room).unwrap();
        let disk = disk(&room);
        measure("overlay", &disk, of, seconds);
        drop(disk);
        fs::remove_dir_all(&room).unwrap();
        fs::create_dir(&room).unwrap();
        let files = plain(&room, of.synced);
        measure("plain", &files, of, seconds);
        drop(files);
        fs::remove_dir_all(&room).unwrap();
    }
}
