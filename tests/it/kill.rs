//! Promise D1 and D2 against `kill -9`: a process that writes, flushes and hydrates is killed at random
//! moments, again and again, on one and the same overlay. What it said it had flushed is found; nothing
//! else is; every change is dirty; what was sealed is not copied again.
//!
//! The process tells through a pipe what it is about to do, so the log outlives it.

#![allow(clippy::cast_possible_truncation, reason = "numbers of a small disk")]

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use aquifer_formats::{
    raw::RawLayer,
    storage::{Access, FileStorage},
};
use aquifer_tests::{
    guest::{Act, Guest, sector},
    oracle::cases,
    rig::{perform, read_all},
    rng::Rng,
};
use aquifer_vdisk::{BlockCache, Chain, Disk, Hydrator, Overlay, OverlayOf, OverlayOptions, Pace};

const SECTORS: u64 = 24 << 11;
const FOLDER: &str = "AQUIFER_KILL_FOLDER";
const LIFE: &str = "AQUIFER_KILL_LIFE";
const LAST: &str = "AQUIFER_KILL_LAST";

fn origin() -> Vec<u64> {
    (0..SECTORS).map(|at| if at / 256 % 4 == 3 { 0 } else { at + 1 }).collect()
}

fn disk(dir: &Path) -> Arc<Disk> {
    let storage = FileStorage::open(&dir.join("origin.raw"), Access::ReadOnly).expect("the source");
    let layer = RawLayer::open(Arc::new(storage)).expect("a layer");
    let chain = Chain::new(vec![Arc::new(layer)], Arc::new(BlockCache::new(1 << 20))).expect("a chain");
    let of = OverlayOf { size: chain.size(), chain: [3; 32] };
    // Short halves, little memory: everything happens between two kills.
    let options = OverlayOptions {
        journal_bytes: 400 << 10,
        memory_bytes: 256 << 10,
        spill_bytes: 64 << 10,
        ..OverlayOptions::default()
    };
    let overlay = Overlay::open(&dir.join("overlay"), of, options).expect("open");
    Arc::new(Disk::writable("d", Arc::new(chain), overlay).expect("a disk"))
}

/// What the process of one life does, until it is killed.
#[test]
#[ignore = "run by the test below, in a process of its own"]
fn child() {
    let Ok(dir) = std::env::var(FOLDER) else { return };
    let number = |name| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok()).expect("a number");
    let disk = disk(Path::new(&dir));
    let mut guest = Guest::new(origin()).counting_from(number(LAST));
    let mut dice = Rng::new(number(LIFE));
    let pace = Pace { rate_bytes: Some(20 << 20), latency_target: None, ..Pace::default() };
    let _hydrator = Hydrator::start(Arc::clone(&disk), pace).expect("hydrate");
    // Whole lines, each by one write: a kill cannot cut them.
    let say = |line: String| std::io::stderr().write_all(line.as_bytes()).expect("tell");
    say("ready\n".into());
    for step in 0u64.. {
        let act = match Act::any(&mut dice, guest.sectors()) {
            Act::Hydrate { .. } => Act::Flush,
            act => act,
        };
        say(format!("begin {step}\n"));
        let local = disk.local().expect("local").local();
        let bytes = guest.begin(act);
        perform(&disk, act, &bytes).expect("works");
        match act {
            Act::Flush => say(format!("flushed {step}\n")),
            Act::Seal => say(format!("sealed {local}\n")),
            _ => {}
        }
    }
}

fn start(dir: &Path, life: u64, last: u64) -> Child {
    Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "kill::child", "--ignored", "--nocapture"])
        .env(FOLDER, dir)
        .env(LIFE, life.to_string())
        .env(LAST, last.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("spawn")
}

/// Kills a life after a while; returns all it said.
fn live_and_die(dir: &Path, life: u64, last: u64, millis: u64) -> Vec<String> {
    let mut child = start(dir, life, last);
    let said = Arc::new(Mutex::new(Vec::new()));
    let reader = {
        let (said, pipe) = (Arc::clone(&said), child.stderr.take().expect("a pipe"));
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                said.lock().expect("said").push(line);
            }
        })
    };
    while !said.lock().expect("said").iter().any(|l| l == "ready") {
        assert!(child.try_wait().expect("wait").is_none(), "{:?}", said.lock().expect("said"));
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(millis));
    child.kill().expect("kill");
    child.wait().expect("wait");
    reader.join().expect("a reader");
    let said = std::mem::take(&mut *said.lock().expect("said"));
    assert!(!said.iter().any(|l| l.contains("panicked")), "{said:?}");
    said
}

#[test]
fn a_storm_of_kills_loses_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().to_path_buf();
    let bytes: Vec<u8> = origin().iter().flat_map(|n| sector(*n)).collect();
    std::fs::write(path.join("origin.raw"), &bytes).expect("write the source");
    std::fs::create_dir(path.join("overlay")).expect("a folder");
    let of = OverlayOf { size: bytes.len() as u64, chain: [3; 32] };
    let options = OverlayOptions { journal_bytes: 400 << 10, ..OverlayOptions::default() };
    drop(Overlay::create(&path.join("overlay"), of, options).expect("create"));
    let mut guest = Guest::new(origin());
    let (mut flushes, mut acts) = (0, 0);
    let mut dice = Rng::new(2);
    for life in 0..u64::from(cases(20)) {
        let said = live_and_die(&path, life, guest.last(), 1 + dice.below(150));
        let mut replayed = Rng::new(life);
        let mut sealed = 0;
        for line in said.iter().filter_map(|l| l.split_once(' ')) {
            match line {
                ("begin", _) => {
                    let act = Act::any(&mut replayed, guest.sectors());
                    guest.begin(if matches!(act, Act::Hydrate { .. }) { Act::Flush } else { act });
                    acts += 1;
                }
                ("flushed", _) => (flushes, ()) = (flushes + 1, guest.flushed()),
                ("sealed", local) => sealed = local.parse().expect("a number"),
                _ => {}
            }
        }
        let disk = disk(&path);
        let found = read_all(&disk);
        let dirty = disk.dirty().expect("dirty");
        guest.judge(&found, &|at| dirty.contains(at)).unwrap_or_else(|e| panic!("life {life}: {e}"));
        let local = disk.local().expect("local").local();
        assert!(local >= sealed, "life {life}: {local} bytes are local, {sealed} were sealed");
        guest.accept(&found);
    }
    assert!(flushes > 100, "only {flushes} flushes in {acts} acts");
    println!("{acts} acts, {flushes} flushes");
}
