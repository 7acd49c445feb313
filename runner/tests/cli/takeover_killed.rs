//! Promise: whoever carries a takeover or a way home out may be killed at any moment, and so may the machines: the same
//! command typed again leads to its end, no replica is left in a state without a way out, and disks are what they must be.

use std::{
    process::Stdio,
    thread,
    time::{Duration, SystemTime},
};

use aquifer_runner::replica::state::State;
use rustix::process::{Pid, Signal, kill_process};

use crate::takeover::{REPLICA, Site};

/// Moments at which something is killed; printed, so that a failure can be made again.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn scale() -> u64 {
    std::env::var("AQUIFER_TEST_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Begins a command, kills its process at some moment, and types it again until the replica is in `wanted`.
fn in_spite_of_kills(site: &Site, dice: &mut Dice, args: &[&str], wanted: State) {
    let more = ["--grace", "0s", "--network", "none"];
    let all: Vec<&str> = ["-c", "site.toml"].iter().chain(args).chain(&more).copied().collect();
    let mut child = site.room.command(&all).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary");
    let moment = Duration::from_millis(dice.below(1500));
    thread::sleep(moment);
    let _ = child.kill();
    child.wait().expect("reap");
    let state = site.record().state;
    assert!(!state.allowed().is_empty(), "{args:?} killed after {moment:?} left {state}, which has no way out");
    for _ in 0..4 {
        let said = site.room.json(&all);
        if said.code <= 1 {
            break;
        }
        // Who was killed had brought it to its end already.
        let error = said.one("error");
        let ended = error["code"] == "E_STATE" && site.record().state == wanted;
        assert!(
            ended || error["retryable"] == true || error["code"] == "E_FAILED",
            "{args:?} after {moment:?}: {error}"
        );
        if ended {
            break;
        }
        thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(site.record().state, wanted, "{args:?} killed after {moment:?}");
}

fn kill_machine(site: &Site, side: &str) {
    let Some(running) = site.running(side) else { return };
    let pid = i32::try_from(running.process.pid).ok().and_then(Pid::from_raw).expect("a process");
    kill_process(pid, Signal::KILL).expect("kill");
    assert!(running.process.wait_gone(Duration::from_secs(5)));
}

#[test]
fn kills_at_any_moment_leave_a_way_on_and_the_right_disks() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("time");
    let seed = u64::from(now.subsec_nanos()) | 1;
    println!("seed {seed}");
    let mut dice = Dice(seed);
    let site = Site::new(1);
    for round in 0..scale() {
        in_spite_of_kills(&site, &mut dice, &["failover", REPLICA], State::Failover);
        assert!(site.running("prod").is_none());
        if site.running("dr").is_some() {
            site.write("dr", 0x50 + u8::try_from(round % 64).unwrap_or(0), "16M", "256k");
        }
        if dice.below(2) == 0 {
            kill_machine(&site, "dr");
        }
        in_spite_of_kills(&site, &mut dice, &["failback", REPLICA, "--yes"], State::ReadyToSwitch);
        in_spite_of_kills(
            &site,
            &mut dice,
            &["failback", REPLICA, "--switch", "now", "--no-start", "--yes"],
            State::Failback,
        );
        assert!(site.running("dr").is_none() && site.running("prod").is_none());
        let top = site.record().failover.expect("a takeover").tops[0].file.clone();
        site.assert_same(&top);
        if round % 2 == 0 {
            in_spite_of_kills(&site, &mut dice, &["commit", REPLICA, "--force", "--yes"], State::Ready);
        } else {
            in_spite_of_kills(&site, &mut dice, &["undo", REPLICA, "--yes"], State::Failover);
            kill_machine(&site, "dr");
            in_spite_of_kills(&site, &mut dice, &["undo", REPLICA, "--yes"], State::Ready);
        }
    }
}
