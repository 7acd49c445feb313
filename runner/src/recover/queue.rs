//! Several machines at once, under a limit of what may run.
//!
//! Invariants
//! - Machines start in the order they were named; one that does not fit holds back those behind it, so that a large
//!   one is not passed by small ones for ever.
//! - What a machine holds is given back when it is off, whoever turned it off.
//! - A machine that alone exceeds the limit starts when nothing else of this command runs.

use std::time::Duration;

use crate::{
    fail::{Code, Fail, Result},
    host::Shape,
};

/// How often a waiting machine looks whether it fits now.
pub const TICK: Duration = Duration::from_millis(500);

/// What the machines of one command may use together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Bytes of memory.
    pub memory: u64,
    /// Processors.
    pub cpus: u32,
}

impl Limit {
    /// What this host can give: its available memory, and four virtual processors for each real one.
    ///
    /// # Errors
    /// `/proc/meminfo` cannot be read.
    pub fn of_this_host() -> Result<Self> {
        let path = "/proc/meminfo";
        let text = std::fs::read_to_string(path).map_err(|e| Fail::io(path, "read", &e))?;
        let kib =
            text.lines().find_map(|l| l.strip_prefix("MemAvailable:")?.split_ascii_whitespace().next()?.parse().ok());
        let kib: u64 = kib.ok_or_else(|| Fail::new(Code::Failed, "MemAvailable is not said").at(path))?;
        let real = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
        Ok(Self { memory: kib << 10, cpus: real.saturating_mul(4) })
    }

    /// Whether `next` may start beside `running`.
    pub fn admits(&self, running: &[Shape], next: &Shape) -> bool {
        if running.is_empty() {
            return true;
        }
        let memory = running.iter().map(|s| s.memory).fold(next.memory, u64::saturating_add);
        let cpus = running.iter().map(|s| s.cpus).fold(next.cpus, u32::saturating_add);
        memory <= self.memory && cpus <= self.cpus
    }

    /// Whether `shape` alone stays within it.
    pub fn holds(&self, shape: &Shape) -> bool {
        shape.memory <= self.memory && shape.cpus <= self.cpus
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        machine::Described,
        recover::shape::{Wishes, shape},
    };

    fn machine(gib: u64, cpus: u32) -> Shape {
        let wishes = Wishes { memory: Some(gib << 30), cpus: Some(cpus), ..Wishes::default() };
        shape("m", &["vda".into()], &Described::default(), &wishes).shape
    }

    #[test]
    fn memory_and_processors_both_hold_back() {
        let limit = Limit { memory: 8 << 30, cpus: 4 };
        assert!(limit.admits(&[], &machine(64, 64)), "alone, anything starts");
        assert!(limit.admits(&[machine(4, 2)], &machine(4, 2)));
        assert!(!limit.admits(&[machine(4, 2)], &machine(5, 1)), "memory");
        assert!(!limit.admits(&[machine(1, 3)], &machine(1, 2)), "processors");
        assert!(limit.holds(&machine(8, 4)) && !limit.holds(&machine(9, 1)) && !limit.holds(&machine(1, 5)));
    }

    #[test]
    fn this_host_has_something_to_give() {
        let limit = Limit::of_this_host().expect("meminfo");
        assert!(limit.memory > 64 << 20 && limit.cpus >= 4, "{limit:?}");
    }
}
