//! Promise: whoever carries a takeover or a way home out may be killed at any moment, and so may the machines: the same
//! command typed again leads to its end, no replica is left in a state without a way out, no restore point is lost, and
//! disks are what they must be.
//!
//! Rounds: [`rounds`], of each operation.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant, SystemTime},
};

use aquifer_runner::{
    catalogue::WorkState,
    replica::state::State,
    verb::demo::guest::{AWAY_SECTORS, FIRST_LBA, SECTOR_BYTES, SECTORS},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    carrier::{Carrier, Process, is_at_work, kill_all, processes},
    ledger::Ledger,
    storm::{Dice, moment, rounds},
    takeover::{REPLICA, Site},
};

/// Restore points that stay where nobody says how many.
const KEPT: usize = 7;

/// Rounds on one site: each way home adds a restore point.
const ROUNDS_PER_SITE: u32 = 8;

/// Who is killed.
#[derive(Clone, Copy, Debug)]
enum Victim {
    /// Who carries it out.
    Carrier(Carrier),
    /// Every machine.
    Machines,
}

impl Victim {
    fn any(dice: &mut Dice) -> Self {
        match dice.below(4) {
            0 => Self::Machines,
            other => Self::Carrier(Carrier::ALL[other - 1]),
        }
    }
}

struct Storm {
    site: Site,
    dice: Dice,
    /// Restore points, each with what its disk holds, oldest first.
    points: Vec<(String, Vec<u8>)>,
    takes: BTreeMap<&'static str, Duration>,
    kills: BTreeMap<&'static str, u64>,
}

impl Storm {
    fn new(seed: u64) -> Self {
        let mut storm = Self {
            site: Site::new(1),
            dice: Dice(seed),
            points: Vec::new(),
            takes: BTreeMap::new(),
            kills: BTreeMap::new(),
        };
        storm.judge();
        storm
    }

    /// A new site; what is known of times stays.
    fn afresh(&mut self) {
        self.site = Site::new(1);
        self.points.clear();
        self.judge();
    }

    fn listed(&self) -> Vec<Value> {
        let listed = self.site.json(&["replicas", REPLICA]);
        assert_eq!(listed.code, 0, "{}", listed.stdout);
        listed.kind("point")
    }

    /// Every restore point is there and what it was; a new one is what production is now, but for what its guest has
    /// written itself.
    fn judge(&mut self) {
        let listed = self.listed();
        for point in &listed {
            let id = point["id"].as_str().expect("an id").to_owned();
            let bytes = raw(&self.replicas(point["disks"][0]["file"].as_str().expect("a file")));
            if let Some((_, oracle)) = self.points.iter().find(|(known, _)| *known == id) {
                assert!(*oracle == bytes, "{point} is another");
                continue;
            }
            let production = raw(Path::new(&self.site.production()));
            assert!(without_own(production) == without_own(bytes.clone()), "{point} is not production");
            self.points.push((id, bytes));
        }
        // A run that brings it up to date gives up the oldest of too many.
        let given_up = self.points.len() - listed.len();
        assert!(given_up == 0 || listed.len() >= KEPT, "a restore point is lost: {listed:?}");
        self.points.drain(..given_up);
        let still = |(id, _): &(String, Vec<u8>)| listed.iter().any(|point| point["id"] == id.as_str());
        assert!(self.points.iter().all(still), "a restore point is lost: {listed:?}");
    }

    fn replicas(&self, file: &str) -> std::path::PathBuf {
        self.site.room.path("dr").join(REPLICA).join(file)
    }

    fn top(&self) -> String {
        self.site.record().failover.expect("a takeover").tops[0].file.clone()
    }

    /// Changes what the replica serves, whether its machine runs or not.
    fn write(&mut self) {
        let (pattern, at) = (1 + self.dice.below(250), format!("{}M", 15 + self.dice.below(4)));
        if self.site.running("dr").is_some() {
            self.site.write("dr", u8::try_from(pattern).expect("small"), &at, "256k");
        } else {
            // Who was killed a moment ago may not be gone yet; nobody else runs that is not known.
            let until = Instant::now() + Duration::from_secs(20);
            while !processes(&self.site.room, "qemu-system").is_empty() {
                assert!(Instant::now() < until, "a machine runs that nobody knows of: {:?}", self.site.record());
                thread::sleep(Duration::from_millis(10));
            }
            let top = self.replicas(&self.top()).display().to_string();
            tool("qemu-io", &["-f", "qcow2", "-c", &format!("write -P {pattern} {at} 256k"), &top]);
        }
    }

    /// Begins a command, kills somebody at some moment, and types it again until the replica is in `wanted`.
    fn in_spite_of_kills(&mut self, op: &'static str, args: &[&str], wanted: State) {
        let victim = Victim::any(&mut self.dice);
        let more: &[&str] = match args.first() {
            Some(&"undo") => &["--network", "none"],
            Some(&"commit" | &"permanent") => &[],
            _ => &["--grace", "0s", "--network", "none"],
        };
        let all: Vec<&str> = ["-c", "site.toml"].iter().chain(args).chain(more).copied().collect();
        let takes = self.takes.get(op).copied().unwrap_or(Duration::from_millis(700));
        let after = moment(&mut self.dice, takes * 5 / 4);
        let killed = match victim {
            Victim::Carrier(Carrier::Command) => {
                let mut child = Process::start(self.site.room.command(&all));
                if let Some(took) = child.ends_within(after) {
                    self.takes.insert(op, took);
                }
                child.kill()
            }
            Victim::Carrier(carrier) => self.hand_over(carrier, &all, after),
            Victim::Machines => {
                let mut child = Process::start(self.site.room.command(&all));
                if let Some(took) = child.ends_within(after) {
                    self.takes.insert(op, took);
                }
                let killed = kill_all(&self.site.room, "qemu-system");
                child.ends();
                killed > 0
            }
        };
        let count = match victim {
            Victim::Carrier(Carrier::Command) => "commands killed",
            Victim::Carrier(Carrier::Worker) => "workers killed",
            Victim::Carrier(Carrier::Serve) => "services killed",
            Victim::Machines => "machines killed",
        };
        *self.kills.entry(count).or_default() += u64::from(killed);
        *self.kills.entry(op).or_default() += 1;
        let state = self.site.record().state;
        let what = format!("{args:?}, {victim:?} killed after {after:?}");
        // Either something can be done, or what was cut short is known and is gone on with.
        let known = || !self.site.room.catalogue().open_operations().expect("operations").is_empty();
        let way_out = !state.allowed().is_empty() || state == wanted || known();
        assert!(way_out, "{what} left {state}, which has no way out");
        if let Victim::Carrier(carrier @ (Carrier::Worker | Carrier::Serve)) = victim
            && is_at_work(&self.site.room)
        {
            carrier.finishes(&self.site.room);
        }
        self.typed_again(&all, wanted, &what);
    }

    /// Kills a way home, and takes it back from where it is.
    fn on_the_way_home(&mut self) {
        let mut args = vec!["-c", "site.toml", "failback", REPLICA, "--yes", "--grace", "0s", "--network", "none"];
        if self.dice.below(2) == 0 {
            args.extend(["--switch", "now", "--no-start"]);
        }
        let takes = self.takes.get("failback").copied().unwrap_or(Duration::from_millis(700));
        let after = moment(&mut self.dice, takes * 2);
        let child = Process::start(self.site.room.command(&args));
        thread::sleep(after);
        let killed = child.kill();
        *self.kills.entry("commands killed").or_default() += u64::from(killed);
        let open = || self.site.room.catalogue().open_operations().expect("operations");
        if self.site.record().state == State::Failover && open().is_empty() && !is_at_work(&self.site.room) {
            return;
        }
        let undone = self.site.room.json(["-c", "site.toml", "undo", REPLICA, "--yes", "--network", "none"]);
        let what = format!("{args:?} killed after {after:?}: {}{}", undone.stdout, undone.stderr);
        assert!(undone.code <= 1 && open().is_empty() && !is_at_work(&self.site.room), "{what}");
        assert_eq!(self.site.record().state, State::Failover, "{what}");
        assert!(self.site.running("prod").is_none(), "{what}");
        let there = fs::read_dir(self.site.room.path("prod/db01")).expect("production").flatten();
        let left: Vec<_> = there.map(|e| e.file_name()).filter(|n| n.to_string_lossy().contains(".pass")).collect();
        assert!(left.is_empty(), "{left:?} after {what}");
        *self.kills.entry("ways home taken back").or_default() += 1;
        // Where the sides were changed, what came home is a restore point.
        self.judge();
    }

    /// Types a command until the replica is where it leads.
    fn typed_again(&self, all: &[&str], wanted: State, what: &str) {
        for _ in 0..6 {
            // Whoever was killed had brought it to its end; one more `undo` would take back one more step.
            if self.site.record().state == wanted && !is_at_work(&self.site.room) {
                return;
            }
            let said = self.site.room.json(all);
            if said.code <= 1 {
                break;
            }
            // Who was killed had brought it to its end already.
            let error = said.one("error");
            let state = self.site.record().state;
            let ended = error["code"] == "E_STATE" && state == wanted;
            if error["code"] == "E_STATE" && state == State::FailedFailover && all.contains(&"--planned") {
                // The machine was killed while it was started. What is planned begins at a replica that does not serve.
                let undone = self.site.room.json(["-c", "site.toml", "undo", REPLICA, "--yes"]);
                assert!(undone.code <= 1, "{what}: {}{}", undone.stdout, undone.stderr);
                assert_eq!(self.site.record().state, State::Ready, "{what}");
                continue;
            }
            assert!(ended || error["retryable"] == true || error["code"] == "E_FAILED", "{what}: {error}");
            if ended {
                break;
            }
            thread::sleep(Duration::from_millis(200));
        }
        assert_eq!(self.site.record().state, wanted, "{what}");
    }

    /// Lets a command put its work into the queue, and others do it: whoever does is killed after that time.
    fn hand_over(&self, carrier: Carrier, all: &[&str], after: Duration) -> bool {
        let mut child = Process::start(self.site.room.command(all));
        let catalogue = self.site.room.catalogue();
        let begun = || {
            let open = catalogue.open_work().expect("work");
            open.iter().any(|work| work.kind == "operation" && work.state == WorkState::Running)
        };
        while child.runs() && !begun() {
            thread::sleep(Duration::from_millis(2));
        }
        child.kill();
        let hand = carrier.hand(&self.site.room);
        thread::sleep(after);
        hand.kill() && is_at_work(&self.site.room)
    }

    /// Tells what was counted: who was killed in time, and in how many rounds of what.
    fn tell(&self, ledger: &Ledger, seed: u64) {
        let named = |what: &str| if what.ends_with("killed") { what.to_owned() } else { format!("rounds of {what}") };
        let named: Vec<(String, u64)> = self.kills.iter().map(|(what, count)| (named(what), *count)).collect();
        let counts: Vec<(&str, u64)> = named.iter().map(|(what, count)| (what.as_str(), *count)).collect();
        ledger.tell(&seed.to_string(), &counts);
    }

    fn kill_machine(&self, side: &str) {
        let Some(running) = self.site.running(side) else { return };
        let pid = i32::try_from(running.process.pid).ok().and_then(Pid::from_raw).expect("a process");
        kill_process(pid, Signal::KILL).expect("kill");
        assert!(running.process.wait_gone(Duration::from_secs(5)));
    }
}

/// The same disk without what its guest writes itself, at any moment.
fn without_own(mut disk: Vec<u8>) -> Vec<u8> {
    let first = usize::try_from(FIRST_LBA + AWAY_SECTORS).expect("small") * SECTOR_BYTES;
    disk[first..first + SECTORS as usize * SECTOR_BYTES].fill(0);
    disk
}

/// What an image holds, by QEMU's own tool.
fn raw(file: &Path) -> Vec<u8> {
    let out = tempfile::NamedTempFile::new().expect("a file");
    let (from, to) = (file.display().to_string(), out.path().display().to_string());
    tool("qemu-img", &["convert", "-U", "-f", "qcow2", "-O", "raw", &from, &to]);
    fs::read(out.path()).expect("read")
}

fn tool(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect("the tool is installed");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}");
}

#[expect(clippy::print_stdout, reason = "whoever makes a failure again needs its seed")]
fn seed() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("time");
    let seed = std::env::var("AQUIFER_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(now.subsec_nanos()));
    println!("seed {seed}");
    seed
}

#[test]
fn kills_at_any_moment_leave_a_way_on_and_the_right_disks() {
    let ledger = Ledger::begin("kills of takeovers and ways home");
    let seed = seed();
    let mut storm = Storm::new(seed);
    let rounds = if rounds(1) == 1 { 2 } else { 2 * rounds(1) };
    for round in 0..rounds {
        if round > 0 && round % ROUNDS_PER_SITE == 0 {
            storm.afresh();
        }
        // Every other one is planned, and of two one is taken back.
        let (planned, committed) = (round % 2 == 1, round / 2 % 2 == 0);
        let started = storm.dice.below(2) == 0;
        let mut args = vec!["failover", REPLICA];
        args.extend(planned.then_some("--planned"));
        args.extend((!started).then_some("--no-start"));
        if planned && storm.dice.below(2) == 0 {
            storm.site.start_production();
            storm.site.write("prod", 0x31, "15M", "200k");
        }
        storm.in_spite_of_kills(if planned { "planned failover" } else { "failover" }, &args, State::Failover);
        assert!(storm.site.running("prod").is_none());
        let top = storm.top();
        if planned && !started {
            storm.site.assert_same(&top);
        }
        // With the points that brought it up to date.
        storm.judge();
        storm.write();
        if storm.dice.below(2) == 0 {
            storm.kill_machine("dr");
        }
        storm.on_the_way_home();
        storm.in_spite_of_kills("failback", &["failback", REPLICA, "--yes"], State::ReadyToSwitch);
        storm.write();
        let switch = ["failback", REPLICA, "--switch", "now", "--no-start", "--yes"];
        storm.in_spite_of_kills("switchover", &switch, State::Failback);
        assert!(storm.site.running("dr").is_none() && storm.site.running("prod").is_none());
        let top = storm.top();
        storm.site.assert_same(&top);
        if committed {
            storm.in_spite_of_kills("commit", &["commit", REPLICA, "--force", "--yes"], State::Ready);
        } else {
            storm.in_spite_of_kills("undo", &["undo", REPLICA, "--yes"], State::Failover);
            storm.kill_machine("dr");
            storm.in_spite_of_kills("undo", &["undo", REPLICA, "--yes"], State::Ready);
        }
        storm.judge();
    }
    storm.tell(&ledger, seed);
}

#[test]
fn kills_while_a_takeover_is_made_final_leave_a_machine_with_the_right_disk() {
    let ledger = Ledger::begin("kills of takeovers made final");
    let seed = seed();
    let mut storm = Storm::new(seed);
    for round in 0..rounds(2) {
        if round > 0 {
            storm.afresh();
        }
        let started = storm.dice.below(2) == 0;
        let start: &[&str] = if started { &[] } else { &["--no-start"] };
        storm.site.does(&[&["failover", REPLICA], start].concat());
        storm.write();
        let top = storm.replicas(&storm.top());
        let oracle = raw(&top);
        storm.in_spite_of_kills("permanent", &["permanent", REPLICA, "--yes"], State::PermanentFailover);
        let folder = storm.site.room.path("dr").join(REPLICA).join("vda");
        let left: Vec<_> = fs::read_dir(folder).expect("disk").flatten().map(|entry| entry.path()).collect();
        assert_eq!(left.len(), 1, "one image, and no file of ours: {left:?}");
        assert!(without_own(raw(&left[0])) == without_own(oracle), "round {round}: the disk is another");
    }
    storm.tell(&ledger, seed);
}
