//! Promise: retention gives up and merges points from under machines that run on them, while they are read on demand and
//! copied in the background: every read stays right, no job waits, and what is copied is the point.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aquifer_runner::host::qmp::Qmp;
use aquifer_tests::{
    boot_sector,
    rng::Rng,
    site::{Guest, Site, eventually},
};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
/// Bytes of the disk that are read here; the guest's own sectors are in its first 4 MiB.
const SIZE: usize = 24 * MIB;
/// Behind them: bytes that do not compress, so that points hold more than their tables.
const NOISE: usize = 8 * MIB;
const OURS: usize = 4 * MIB;
/// Bytes that are all the same, others in each unit and version.
const UNIT: usize = 4096;
const WAIT: Duration = Duration::from_secs(20);

fn pattern(version: usize, unit: usize) -> u8 {
    u8::try_from(1 + (unit * 31 + version * 101) % 250).expect("small")
}

/// Production, and which version each unit of its disk is of.
struct Production {
    site: Site,
    disk: Vec<u8>,
    versions: Vec<usize>,
}

impl Production {
    fn new() -> Self {
        let site = Site::new();
        let text = format!(
            "version = 1\ncache = \"1MiB\"\n[repository]\nnas = {{ url = \"{0}\", default = true }}\n[machine]\n\
             db01 = {{ disks = {{ vda = \"raw:{1}\" }} }}\n[job.b]\nkind = \"backup\"\nmachines = [\"db01\"]\nto = \"nas\"\n\
             keep = {{ last = 2 }}\n",
            site.word("repo"),
            site.word("disk.raw")
        );
        fs::write(site.path("site.toml"), text).expect("a site file");
        site.json(&["init"]);
        let mut production =
            Self { site, disk: boot_sector::disk((SIZE + NOISE) / MIB, 0), versions: vec![0; SIZE / UNIT] };
        production.stir(1, NOISE);
        production
    }

    /// Other noise in the first `len` bytes of it; it is written with the next version.
    fn stir(&mut self, seed: u64, len: usize) {
        let mut dice = Rng::new(seed);
        self.disk[SIZE..SIZE + len].chunks_mut(8).for_each(|word| word.copy_from_slice(&dice.next_u64().to_le_bytes()));
    }

    fn write(&mut self, version: usize, at: usize, len: usize) {
        for unit in at / UNIT..(at + len) / UNIT {
            self.versions[unit] = version;
            self.disk[unit * UNIT..(unit + 1) * UNIT].fill(pattern(version, unit));
        }
        fs::write(self.site.path("disk.raw"), &self.disk).expect("disk");
    }

    /// Backs up, with retention; what that reported.
    fn back_up(&self) -> Value {
        self.site.json(&["-c", &self.site.word("site.toml"), "run", "b"]).record("retained")
    }

    /// Ids of the points that are listed.
    fn points(&self) -> Vec<Value> {
        self.site.json(&["points", "db01"]).records("point").into_iter().map(|point| point["point"].clone()).collect()
    }

    /// Runs the newest point, copied slowly, and reads its disk again and again through QEMU.
    fn recover(&self, name: &str) -> Running {
        let into = self.site.word(name);
        let site_file = self.site.word("site.toml");
        let small = ["--memory", "64MiB", "--network", "none", "--rate", "256KiB/s"];
        let args = ["-c", &site_file, "recover", "db01@latest", "--name", name, "--into", &into];
        self.site.json(&[&args[..], &small].concat());
        let session = self.site.session(name);
        let guest = Guest::of(&session);
        eventually("the guest speaks", || (guest.starts() == 1).then_some(()));
        // The sockets of a machine lie together.
        let console = PathBuf::from(session["machine"]["console"].as_str().expect("a console"));
        let (stop, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let reader = Reader {
            monitor: console.with_file_name("qmp.sock"),
            versions: self.versions.clone(),
            stop: stop.clone(),
            reads: reads.clone(),
        };
        let thread = thread::spawn(move || reader.reads_on());
        Running { name: name.to_owned(), guest, oracle: self.disk.clone(), stop, reads, thread: Some(thread) }
    }
}

/// Reads a machine's disk as its guest would: what is not there yet is fetched.
struct Reader {
    monitor: PathBuf,
    versions: Vec<usize>,
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
}

impl Reader {
    fn reads_on(&self) {
        let mut dice = Rng::new(7);
        while !self.stop.load(Ordering::SeqCst) {
            // The monitor talks to one at a time: others want to ask it, too.
            let Ok(mut qmp) = Qmp::connect(&self.monitor, WAIT) else { continue };
            for _ in 0..16 {
                let unit = OURS / UNIT + dice.below(((SIZE - OURS) / UNIT) as u64) as usize;
                let wanted = pattern(self.versions[unit], unit);
                let order = format!("read -P {wanted} {} {UNIT}", unit * UNIT);
                let line = format!("qemu-io -d /machine/peripheral/dev0/virtio-backend \"{order}\"");
                let said = qmp.execute("human-monitor-command", json!({ "command-line": line }), WAIT).expect("a read");
                assert!(said.as_str().is_some_and(|said| said.trim().is_empty()), "unit {unit}: {said}");
                self.reads.fetch_add(1, Ordering::SeqCst);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

struct Running {
    name: String,
    guest: Guest,
    oracle: Vec<u8>,
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Running {
    fn absent(&self, site: &Site) -> u64 {
        let session = site.session(&self.name);
        session["disks"].as_array().expect("disks").iter().filter_map(|d| d["overlay"]["absent"].as_u64()).sum()
    }

    fn reads(&self) -> u64 {
        self.reads.load(Ordering::SeqCst)
    }

    /// Everything becomes local, and is what it was.
    fn ends_well(mut self, site: &Site) {
        let before = self.reads();
        eventually("it reads once more", || (self.reads() > before + 16).then_some(()));
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().expect("a reader").join().expect("every read was right");
        site.json(&["session", "set", &self.name, "--rate", "none"]);
        self.guest.whole_round();
        let kept = site.json(&["finalize", &self.name, "--keep", "--timeout", "60s"]);
        let path = kept.record("disk")["path"].as_str().expect("a path").to_owned();
        self.guest.whole_round();
        self.guest.turn_off();
        let wanted = boot_sector::after_a_round(&self.oracle);
        eventually("the disk is at rest", || (fs::read(&path).expect("disk") == wanted).then_some(()));
    }
}

#[test]
fn machines_run_on_while_their_points_are_given_up_and_merged() {
    let mut production = Production::new();
    production.write(1, OURS, SIZE - OURS);
    production.site.json(&["-c", &production.site.word("site.toml"), "run", "b"]);
    let first = production.recover("first");
    // Stands on the first for an eighth of it: worth writing anew when the first is given up.
    production.stir(2, NOISE / 8 * 7);
    production.write(2, OURS, (SIZE - OURS) / 8 * 7);
    production.back_up();
    let second = production.recover("second");
    let before = production.points();
    let (mut merged, mut longest) = (0, Duration::ZERO);
    let absent = (first.absent(&production.site), second.absent(&production.site));
    for version in 3..8 {
        production.write(version, OURS + version * MIB, 64 << 10);
        let began = Instant::now();
        let retained = production.back_up();
        longest = longest.max(began.elapsed());
        merged += retained["rebased"].as_object().map_or(0, serde_json::Map::len);
        assert_eq!(production.points().len(), 2);
    }
    assert!(merged > 0, "nothing was merged");
    assert!(longest < Duration::from_secs(20), "a job waited: {longest:?}");
    let now = production.points();
    assert!(before.iter().all(|id| !now.contains(id)), "both points that machines run on are gone from the list");
    // All of that was under way while they were copied.
    let after = (first.absent(&production.site), second.absent(&production.site));
    assert!(after.0 > 0 && after.1 > 0, "they were local before: {after:?}");
    assert!(after.0 < absent.0 && after.1 < absent.1, "nothing was copied meanwhile: {absent:?} to {after:?}");
    let reads = (first.reads(), second.reads());
    assert!(reads.0 > 16 && reads.1 > 16, "{reads:?}");
    first.ends_well(&production.site);
    second.ends_well(&production.site);
    // Now nobody holds the files, and the next run deletes them.
    production.write(9, OURS, 64 << 10);
    let last = production.back_up();
    assert!(last["bytes_freed"].as_u64() > Some(0), "{last}");
}
