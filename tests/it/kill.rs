//! Promise D1 and D2 against `kill -9`: a process is killed at random moments, again and again, on one and the same
//! overlay: while it writes, flushes and hydrates, while it is being opened (also after it was killed while being
//! opened), while it drains and hands over. What it said it had flushed is found; nothing else is; every change is
//! dirty; what was sealed is not copied again.
//!
//! The process tells through a pipe what it is about to do, so the log outlives it.

#![allow(clippy::cast_possible_truncation, reason = "numbers of a small disk")]

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use aquifer_formats::{
    raw::RawLayer,
    storage::{Access, FileStorage},
};
use aquifer_tests::{
    guest::{Act, Guest, sector},
    ledger::Ledger,
    oracle::{cases, first_seed},
    rig::{perform, read_all},
    rng::Rng,
};
use aquifer_vdisk::{BlockCache, Chain, Disk, Hydrator, Overlay, OverlayOf, OverlayOptions, Pace};

const FOLDER: &str = "AQUIFER_KILL_FOLDER";
const LIFE: &str = "AQUIFER_KILL_LIFE";
const LAST: &str = "AQUIFER_KILL_LAST";
const PHASE: &str = "AQUIFER_KILL_PHASE";

/// What a process is doing when it is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Writes beside a hydrator, for as long as it lives.
    Serving,
    /// Hydrates all, drains, writes on, hands over.
    Pivoting,
    /// Only opens what `Serving` left.
    Resuming,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Pivoting => "pivoting",
            Self::Resuming => "resuming",
        }
    }

    /// Sectors of the disk: a pivot has to come within a life.
    fn sectors(self) -> u64 {
        if self == Self::Pivoting { 1 << 11 } else { 24 << 11 }
    }

    /// What it does, in order. The same for the process and for whoever judges.
    fn acts(self, life: u64) -> Box<dyn Iterator<Item = Act>> {
        let sectors = self.sectors() as usize;
        let mut dice = Rng::new(life);
        match self {
            Self::Serving => Box::new(std::iter::repeat_with(move || match Act::any(&mut dice, sectors) {
                Act::Hydrate { .. } => Act::Flush,
                act => act,
            })),
            Self::Resuming => Box::new(std::iter::empty()),
            Self::Pivoting => {
                let mut acts: Vec<Act> = (0..dice.below(30)).map(|_| Act::any(&mut dice, sectors)).collect();
                acts.extend([Act::Hydrate { first: 0, count: sectors }, Act::Drain]);
                acts.extend((0..dice.below(60)).map(|_| Act::any(&mut dice, sectors)));
                Box::new(acts.into_iter())
            }
        }
    }
}

fn origin(phase: Phase) -> Vec<u64> {
    (0..phase.sectors()).map(|at| if at / 256 % 4 == 3 { 0 } else { at + 1 }).collect()
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
        ahead_bytes: 32 << 10,
        ..OverlayOptions::default()
    };
    let mut tries = 0..400;
    let overlay = loop {
        match Overlay::open(&dir.join("overlay"), of, options) {
            // A process that the test beside this one is just starting holds whatever is open here, for a moment.
            Err(aquifer_vdisk::Error::Busy { .. }) if tries.next().is_some() => {
                std::thread::sleep(Duration::from_millis(5));
            }
            done => break done.expect("open"),
        }
    };
    Arc::new(Disk::writable("d", Arc::new(chain), overlay).expect("a disk"))
}

/// What the process of one life does, until it is killed.
#[test]
#[ignore = "run by the tests below, in a process of its own"]
fn child() {
    let Ok(dir) = std::env::var(FOLDER) else { return };
    let number = |name| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok()).expect("a number");
    let name = std::env::var(PHASE).expect("a phase");
    let phases = [Phase::Serving, Phase::Pivoting, Phase::Resuming];
    let phase = phases.into_iter().find(|p| p.name() == name).expect("a phase we know");
    // Whole lines, each by one write: a kill cannot cut them.
    let say = |line: String| std::io::stderr().write_all(line.as_bytes()).expect("tell");
    say("begun 0\n".into());
    let disk = disk(Path::new(&dir));
    let mut guest = Guest::new(origin(phase)).counting_from(number(LAST));
    let pace = Pace { rate_bytes: Some(20 << 20), latency_target: None, ..Pace::default() };
    let _hydrator = (phase == Phase::Serving).then(|| Hydrator::start(Arc::clone(&disk), pace).expect("hydrate"));
    say("ready 0\n".into());
    for (step, act) in phase.acts(number(LIFE)).enumerate() {
        say(format!("begin {step}\n"));
        let local = disk.local().expect("local");
        let bytes = guest.begin(act);
        perform(&disk, act, &bytes).expect("works");
        match act {
            Act::Flush => say(format!("flushed {step}\n")),
            Act::Drain if local.absent == 0 => say(format!("flushed {step}\n")),
            // What the guest wrote since the last flush may still go.
            Act::Seal => say(format!("sealed {}\n", local.hydrated)),
            _ => {}
        }
    }
    if phase == Phase::Pivoting {
        disk.hand_over().expect("hand over");
        say("flushed 0\nhanded 0\n".into());
    }
    std::thread::sleep(Duration::from_secs(60));
}

/// When a life ends.
#[derive(Clone, Copy, Debug)]
enum Ends {
    /// This long after its first word: it may not even be open.
    AfterBegun(Duration),
    /// This long after its disk was open.
    AfterReady(Duration),
}

/// Kills a life after a while; returns all it said.
fn live_and_die(dir: &Path, phase: Phase, life: u64, last: u64, ends: Ends) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "kill::child", "--ignored", "--nocapture"])
        .env(FOLDER, dir)
        .env(LIFE, life.to_string())
        .env(LAST, last.to_string())
        .env(PHASE, phase.name())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("spawn");
    let (first, then) = match ends {
        Ends::AfterBegun(then) => ("begun 0", then),
        Ends::AfterReady(then) => ("ready 0", then),
    };
    let said = Arc::new(Mutex::new(Vec::new()));
    let reader = {
        let (said, pipe) = (Arc::clone(&said), child.stderr.take().expect("a pipe"));
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                said.lock().expect("said").push(line);
            }
        })
    };
    while !said.lock().expect("said").iter().any(|l| l == first) {
        assert!(child.try_wait().expect("wait").is_none(), "{:?}", said.lock().expect("said"));
        std::thread::sleep(Duration::from_micros(200));
    }
    std::thread::sleep(then);
    child.kill().expect("kill");
    child.wait().expect("wait");
    reader.join().expect("a reader");
    let said = std::mem::take(&mut *said.lock().expect("said"));
    assert!(!said.iter().any(|l| l.contains("panicked")), "{said:?}");
    said
}

/// What is counted of a storm.
#[derive(Default)]
struct Storm {
    kills: u64,
    flushes: u64,
    opening: u64,
    handed: u64,
}

/// A folder with a source and a fresh overlay.
fn prepare(path: &Path, phase: Phase) {
    let bytes: Vec<u8> = origin(phase).iter().flat_map(|n| sector(*n)).collect();
    std::fs::write(path.join("origin.raw"), &bytes).expect("write the source");
    std::fs::create_dir(path.join("overlay")).expect("a folder");
    let of = OverlayOf { size: bytes.len() as u64, chain: [3; 32] };
    let options = OverlayOptions { journal_bytes: 400 << 10, ..OverlayOptions::default() };
    drop(Overlay::create(&path.join("overlay"), of, options).expect("create"));
}

/// Brings what the guest knows to where a life was cut; returns how many bytes were sealed.
fn replay(phase: Phase, life: u64, said: &[String], guest: &mut Guest, storm: &mut Storm) -> u64 {
    let (mut acts, mut sealed) = (phase.acts(life), 0);
    for line in said.iter().filter_map(|l| l.split_once(' ')) {
        match line {
            ("begin", _) => {
                guest.begin(acts.next().expect("as many as were begun"));
            }
            ("flushed", _) => {
                storm.flushes += 1;
                guest.flushed();
            }
            ("sealed", local) => sealed = local.parse().expect("a number"),
            ("handed", _) => storm.handed += 1,
            _ => {}
        }
    }
    storm.kills += 1;
    storm.opening += u64::from(!said.iter().any(|l| l == "ready 0"));
    sealed
}

fn judge(path: &Path, life: u64, sealed: u64, guest: &mut Guest) {
    let disk = disk(path);
    let found = read_all(&disk);
    let dirty = disk.dirty().expect("dirty");
    guest.judge(&found, &|at| dirty.contains(at)).unwrap_or_else(|e| panic!("life {life}: {e}"));
    let local = disk.local().expect("local").local();
    assert!(local >= sealed, "life {life}: {local} bytes are local, {sealed} were sealed");
    guest.accept(&found);
}

#[test]
fn a_storm_of_kills_loses_nothing() {
    let ledger = Ledger::begin("kills while serving, hydrating and resuming");
    let dir = tempfile::tempdir().expect("a folder");
    prepare(dir.path(), Phase::Serving);
    let (mut guest, mut storm, mut dice) =
        (Guest::new(origin(Phase::Serving)), Storm::default(), Rng::new(first_seed() + 1));
    let first = (first_seed() - 1) << 20;
    for life in first..first + u64::from(cases(80)) {
        let ends = Ends::AfterReady(Duration::from_millis(1 + dice.below(80)));
        let said = live_and_die(dir.path(), Phase::Serving, life, guest.last(), ends);
        let sealed = replay(Phase::Serving, life, &said, &mut guest, &mut storm);
        // Its journal is full of what is to be replayed now: killed in that, and once more, before anybody looks.
        for _ in 0..dice.below(3) {
            let ends = Ends::AfterBegun(Duration::from_micros(dice.below(4000)));
            let said = live_and_die(dir.path(), Phase::Resuming, life, guest.last(), ends);
            replay(Phase::Resuming, life, &said, &mut guest, &mut storm);
        }
        judge(dir.path(), life, sealed, &mut guest);
    }
    assert!(storm.flushes > 200 && storm.opening > 5, "{} flushes, {} in opening", storm.flushes, storm.opening);
    let counts = [("kills", storm.kills), ("of them while opening", storm.opening), ("flushes", storm.flushes)];
    ledger.tell(&(first_seed() + 1).to_string(), &counts);
}

#[test]
fn a_storm_of_kills_around_the_pivot_loses_nothing() {
    let ledger = Ledger::begin("kills while draining and handing over");
    let (mut storm, mut dice) = (Storm::default(), Rng::new(first_seed() + 2));
    let first = (first_seed() - 1) << 20;
    for overlay in first..first + u64::from(cases(40)) {
        let dir = tempfile::tempdir().expect("a folder");
        prepare(dir.path(), Phase::Pivoting);
        let mut guest = Guest::new(origin(Phase::Pivoting));
        // Twice on each overlay: the second time it is resumed wherever the first was cut.
        for life in [2 * overlay, 2 * overlay + 1] {
            let handed = storm.handed;
            let ends = Ends::AfterReady(Duration::from_micros(500 + dice.below(40_000)));
            let said = live_and_die(dir.path(), Phase::Pivoting, life, guest.last(), ends);
            let sealed = replay(Phase::Pivoting, life, &said, &mut guest, &mut storm);
            judge(dir.path(), life, sealed, &mut guest);
            if storm.handed > handed {
                // Somebody else's from here on.
                break;
            }
        }
    }
    assert!(storm.kills >= 40 && storm.flushes > 40, "{} kills, {} flushes", storm.kills, storm.flushes);
    ledger.tell(
        &(first_seed() + 2).to_string(),
        &[("kills", storm.kills), ("of them after the pivot", storm.handed), ("flushes", storm.flushes)],
    );
}
