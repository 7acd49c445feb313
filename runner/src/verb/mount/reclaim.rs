//! Memory of a process that serves disks to its own computer.
//!
//! What is written to a loop device waits in memory until this process has taken it. If the kernel makes
//! this process wait for such memory, both wait for ever. `PR_SET_IO_FLUSHER` tells it not to, and needs
//! CAP_SYS_RESOURCE; memory cgroups of version 2 never make anybody wait like that.
//!
//! Invariants
//! - A writable loop device is refused where its writes could come to wait for themselves.
//!
//! Not here: sessions, whose processes see to it themselves.

use std::fs;

use crate::fail::{Code, Fail, Result};

/// Whether this process shares its memory limit with whoever writes to its disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Read-only, or as files that are written without waiting in memory.
    Harmless,
    /// A writable loop device on this one.
    WritesHere,
}

/// Spares this thread, and all it makes later, the wait for its own writes.
///
/// # Errors
/// [`Code::Refused`] where that is not allowed and such a wait is possible.
pub(super) fn spare(what: Use) -> Result<()> {
    let spared = rustix::process::configure_io_flusher_behavior(true).is_ok();
    if spared || what == Use::Harmless || !limited_by_version_one() {
        return Ok(());
    }
    let what = "writes to a loop device could wait for themselves: this process has a memory limit of a version 1 \
                cgroup and lacks CAP_SYS_RESOURCE";
    Err(Fail::new(Code::Refused, what).help("aquifer mount SOURCE --writable    # over NBD; or outside of the cgroup"))
}

/// Whether a memory cgroup of version 1 limits this process.
fn limited_by_version_one() -> bool {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(group) = memory_group(&groups) else { return false };
    // Inside a container the group is mounted as the root of what it sees.
    let places = [format!("/sys/fs/cgroup/memory{group}/memory.stat"), "/sys/fs/cgroup/memory/memory.stat".to_owned()];
    let stat = places.iter().find_map(|path| fs::read_to_string(path).ok()).unwrap_or_default();
    limit_in(&stat).is_some_and(|limit| limit < UNLIMITED)
}

/// Limits from here on are none: the kernel rounds the largest number down to pages.
const UNLIMITED: u64 = 1 << 62;

/// The version 1 memory group in `/proc/self/cgroup`.
fn memory_group(groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, group) = rest.split_once(':')?;
        controllers.split(',').any(|c| c == "memory").then_some(group)
    })
}

/// The limit that `memory.stat` names, of the group and all above it.
fn limit_in(stat: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix("hierarchical_memory_limit ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_group_and_its_limit_are_found() {
        assert_eq!(memory_group("12:cpu,cpuacct:/a\n4:memory:/b/c\n0::/unified\n"), Some("/b/c"));
        assert_eq!(memory_group("0::/user.slice\n"), None, "version 2 alone");
        assert_eq!(limit_in("cache 1\nhierarchical_memory_limit 67108864\n"), Some(67_108_864));
        assert!(limit_in("hierarchical_memory_limit 9223372036854771712\n").is_some_and(|limit| limit >= UNLIMITED));
    }
}
