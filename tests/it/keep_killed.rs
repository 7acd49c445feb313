//! Promises D1 and I3 at the end of a recovery: `finalize --keep` is killed at random moments, or the machine, its door or
//! its supervisor under it. Done again it ends on ordinary disks that hold what the machine wrote, and nothing else is left.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aquifer_tests::{
    boot_sector,
    ledger::Ledger,
    oracle::{cases, first_seed},
    rng::Rng,
    site::{Guest, Site, eventually},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const DISKS: [&str; 2] = ["vda", "vdb"];

/// Who dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Command,
    Machine,
    Door,
    Supervisor,
}

/// A machine of two disks that runs on local disks, and whose guest has written all it ever writes.
struct Recovered<'s> {
    site: &'s Site,
    name: String,
    guest: Guest,
    session: Value,
}

impl<'s> Recovered<'s> {
    fn new(site: &'s Site, name: String) -> Self {
        let disks = DISKS.map(|disk| format!("{disk}=raw:{}", site.word(&format!("{disk}.raw"))));
        let small = ["--memory", "64MiB", "--network", "none"];
        let [one, two] = &disks;
        site.json(&[&["recover", "--into", &site.word(&name), "--disk", one, "--disk", two], &small[..]].concat());
        let session = site.session(&name);
        let guest = Guest::of(&session);
        guest.whole_round();
        site.json(&["wait", &name, "--for", "local", "--timeout", "60s"]);
        Self { site, name, guest, session }
    }

    fn pid(&self, victim: Victim) -> Option<Pid> {
        let at = match victim {
            Victim::Command => return None,
            Victim::Machine => "/machine/pid",
            Victim::Door => "/door/pid",
            Victim::Supervisor => "/door/supervisor",
        };
        Pid::from_raw(i32::try_from(self.session.pointer(at)?.as_i64()?).ok()?)
    }

    /// Runs the command, and kills after `delay`; answers how long the command took.
    fn keep_and_kill(&self, victim: Option<Victim>, delay: Duration) -> Duration {
        let clock = Instant::now();
        let mut keep = self.site.command(&["finalize", &self.name, "--keep", "--timeout", "60s"]);
        let mut keep =
            keep.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().expect("keep");
        if let Some(victim) = victim {
            std::thread::sleep(delay);
            match self.pid(victim) {
                // It may have ended in order already.
                Some(pid) => drop(kill_process(pid, Signal::KILL)),
                None => keep.kill().expect("kill"),
            }
        }
        keep.wait().expect("it ends");
        clock.elapsed()
    }

    /// Does it again until it is done, as the errors advise.
    fn keep_in_the_end(&self) {
        let mut said = Vec::new();
        for _ in 0..4 {
            if self.site.sessions().iter().all(|session| session["name"] != self.name.as_str()) {
                return;
            }
            let keep = self.site.run(&["finalize", &self.name, "--keep", "--timeout", "60s"]);
            let done = keep.code == 0;
            said.push(keep);
            if done {
                return;
            }
            said.push(self.site.run(&["session", "resume", &self.name]));
        }
        panic!("{} cannot be kept: {said:#?}", self.name);
    }

    fn runs(&self) -> bool {
        let pid = self.pid(Victim::Machine).expect("a machine");
        let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        !line.is_empty()
    }

    /// The disks are whole, and nothing of a recovery is left beside them.
    fn judge(&self, expected: &[Vec<u8>; 2]) {
        let starts = self.guest.starts();
        // A machine that was started again is another process; one that was not started again is off.
        if self.runs() || starts > 1 {
            self.guest.goes_on(1);
            self.guest.turn_off();
        }
        for (disk, expected) in DISKS.iter().zip(expected) {
            let file = find(&self.site.path(&self.name), disk);
            eventually("nobody holds the disk", || open_for_change(&file).then_some(()));
            assert!(fs::read(&file).expect("disk") == *expected, "{}: wrong bytes", file.display());
            let beside = fs::read_dir(file.parent().expect("folder")).expect("list").flatten();
            let beside: Vec<_> = beside.map(|entry| entry.file_name()).collect();
            assert_eq!(beside, ["disk.raw"], "{}", self.name);
        }
    }
}

/// The file of a disk in a machine's folder.
fn find(folder: &Path, disk: &str) -> PathBuf {
    let inside = fs::read_dir(folder).expect("folder").flatten().map(|entry| entry.path());
    let mut inside: Vec<PathBuf> = inside.filter(|path| path.is_dir()).collect();
    inside.extend(
        inside.clone().iter().flat_map(|path| fs::read_dir(path).into_iter().flatten().flatten()).map(|e| e.path()),
    );
    let named = |path: &&PathBuf| path.file_name().is_some_and(|name| name == disk) && path.join("disk.raw").exists();
    inside.iter().find(named).unwrap_or_else(|| panic!("no {disk} in {}", folder.display())).join("disk.raw")
}

/// Whether no QEMU has the file: its lock would be in the way.
fn open_for_change(file: &Path) -> bool {
    let info = std::process::Command::new("qemu-img").args(["info", "-f", "raw"]).arg(file).output().expect("qemu-img");
    info.status.success()
}

#[test]
fn keep_survives_the_death_of_everybody() {
    let ledger = Ledger::begin("kills while a recovery is kept");
    let site = Site::new();
    let first = boot_sector::disk(12, 10);
    let mut second = vec![0x5a; 6 << 20];
    second[2 << 20..3 << 20].fill(0);
    fs::write(site.path("vda.raw"), &first).expect("disk");
    fs::write(site.path("vdb.raw"), &second).expect("disk");
    let expected = [boot_sector::after_a_round(&first), second];
    let unharmed = Recovered::new(&site, "whole".into());
    let whole = unharmed.keep_and_kill(None, Duration::ZERO);
    unharmed.judge(&expected);
    let (from, rounds) = (first_seed(), u64::from(cases(6)));
    let mut tally = [0u64; 4];
    for seed in from..from + rounds {
        let mut rng = Rng::new(seed);
        let victims = [Victim::Command, Victim::Command, Victim::Machine, Victim::Door, Victim::Supervisor];
        let victim = rng.pick(&victims);
        let span = u64::try_from(whole.as_micros()).expect("short");
        let delay = Duration::from_micros(rng.below(span.max(1)));
        let recovered = Recovered::new(&site, format!("m{seed}"));
        recovered.keep_and_kill(Some(victim), delay);
        recovered.keep_in_the_end();
        recovered.judge(&expected);
        tally[victim as usize] += 1;
        fs::remove_dir_all(site.path(&recovered.name)).expect("gone");
    }
    assert!(site.sessions().is_empty(), "{:?}", site.sessions());
    let [command, machine, door, supervisor] = tally;
    let counts =
        [("kills", rounds), ("commands", command), ("machines", machine), ("doors", door), ("supervisors", supervisor)];
    ledger.tell(&format!("{from}..{}", from + rounds), &counts);
}
