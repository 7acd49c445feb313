//! Who a worker is, in leases and events: `ROLE@COMPUTER:PROCESS:PLACE-START`.
//!
//! Invariants
//! - No two processes ever have the same name: a number that is given again has another start.
//! - Somebody is gone only where that is proven: same computer, same boot, same space of processes, and no such
//!   process. Everybody else keeps what it has until its lease ends.
//!
//! Not here: leases (`catalogue`).

use std::{fs, process};

use crate::repository::{host_exactly, host_name};

/// Who this process is in that role.
pub fn owner(role: &str) -> String {
    let number = process::id();
    let start = started(number).unwrap_or_default();
    format!("{role}@{}:{number}:{}-{start:x}", host_name(), place())
}

/// Whether a worker is known to have ended without giving its work back.
pub fn is_gone(owner: &str) -> bool {
    let Some((name, word)) = owner.rsplit_once(':') else { return false };
    let Some((who, number)) = name.rsplit_once(':') else { return false };
    let Some((there, start)) = word.split_once('-') else { return false };
    let (Ok(number), Ok(start)) = (number.parse(), u64::from_str_radix(start, 16)) else { return false };
    let here = who.split_once('@').is_some_and(|(_, host)| host == host_name()) && there == place();
    here && started(number) != Some(start)
}

/// This boot of this computer, and its space of processes.
fn place() -> String {
    let hash = blake3::hash(host_exactly().as_bytes()).to_hex();
    hash.as_str().get(..8).unwrap_or_default().to_owned()
}

/// When a living process was started, in ticks since the boot.
fn started(number: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
    // The name before it may hold anything, also brackets.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let alive = fields.next().is_some_and(|state| !["Z", "X"].contains(&state));
    alive.then(|| fields.nth(18))??.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_what_is_proven_to_be_gone_is_gone() {
        let ours = owner("run");
        assert!(!is_gone(&ours), "{ours}");
        let mut child = Command::new("sleep").arg("100").spawn().expect("sleep");
        let number = child.id();
        let start = started(number).expect("it lives");
        let theirs = format!("worker@{}:{number}:{}-{start:x}", host_name(), place());
        assert!(!is_gone(&theirs), "{theirs}");
        // Another process under the same number.
        assert!(is_gone(&format!("worker@{}:{number}:{}-{:x}", host_name(), place(), start + 1)));
        // Another computer, another boot: nobody can tell.
        assert!(!is_gone(&format!("worker@elsewhere:{number}:{}-{:x}", place(), start + 1)));
        assert!(!is_gone(&format!("worker@{}:{number}:00000000-{:x}", host_name(), start + 1)));
        for other in ["", "w1", "a:b", "a:1:b", "worker@x:1:2"] {
            assert!(!is_gone(other), "{other}");
        }
        child.kill().expect("kill");
        // One that nobody has waited for does nothing any more.
        while started(number).is_some() {
            std::thread::yield_now();
        }
        assert!(is_gone(&theirs), "{theirs}");
        child.wait().expect("wait");
        assert!(is_gone(&theirs), "{theirs}");
    }
}
