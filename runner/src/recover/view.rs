//! How a recovery is shown: three facts (running since, how much is local, time to independence), then the disks.
//!
//! Invariants
//! - Never 100 % while anything is missing; what is not known is said to be unknown.
//! - Every figure was asked of the session or looked up on the host; nothing is remembered.

use std::fmt::Write;

use aquifer_mount::session::{
    Client, Folder, Status,
    status::{DiskStatus, Door, HydrationStatus, Phase, UnusedStatus},
};
use jiff::Timestamp;
use serde::Serialize;

use super::record::Machine;
use crate::{fail::Result, host::Power, units};

/// Cells of a disk's bar.
const BAR_CELLS: u64 = 40;

/// A recovery as it is now. Also the record of `status --json`.
#[derive(Clone, Debug, Serialize)]
pub struct View {
    /// What the session says.
    #[serde(flatten)]
    pub status: Status,
    /// How its machine fares; absent for a session without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineView>,
    /// Share of used data that is local, in per cent, rounded down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local_percent: Option<u64>,
    /// Bytes of used data that are local.
    pub local_bytes: u64,
    /// Bytes of used data in all.
    pub used_bytes: u64,
    /// Seconds until nothing else is needed; absent while unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_to_independence: Option<u64>,
    /// What may be done with it now.
    pub allowed_operations: Vec<&'static str>,
}

/// A machine as it is now.
#[derive(Clone, Debug, Serialize)]
pub struct MachineView {
    /// How it fares; `None` while its hypervisor lives and does not answer, as one does that waits for its door.
    pub power: Option<Power>,
    /// Why that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub silent: Option<String>,
    /// When it was started.
    pub since: Option<Timestamp>,
    /// Seconds since then, while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running_seconds: Option<u64>,
    /// Name of its host.
    pub host: String,
    /// Its firmware and the rule that chose it.
    pub firmware: String,
    /// How instructions are run.
    pub accel: Option<String>,
    /// Socket of the serial console.
    pub console: Option<String>,
    /// Socket of the screen (VNC).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub screen: Option<String>,
    /// Its process.
    pub pid: Option<u32>,
}

impl View {
    /// Looks at a session.
    ///
    /// # Errors
    /// The session's files cannot be read, or its door lives and does not answer.
    pub fn of(folder: &Folder) -> Result<Self> {
        let status = Client::of(folder.clone()).status()?;
        let machine = Machine::of(&folder.load()?)?.map(|m| MachineView::of(&m));
        let (local_bytes, used_bytes) =
            status.disks.iter().map(local_of_used).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        let local_percent = percent(local_bytes, used_bytes, status.is_local());
        let seconds_to_independence = independence(&status);
        let allowed_operations = allowed(&status);
        Ok(Self {
            status,
            machine,
            local_percent,
            local_bytes,
            used_bytes,
            seconds_to_independence,
            allowed_operations,
        })
    }

    /// The screen.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let status = &self.status;
        // Writing into a text cannot fail.
        let _ = write!(out, "{}  {}", status.name, status.state);
        if let Some(machine) = &self.machine {
            let _ = match (machine.power, machine.running_seconds) {
                (Some(Power::Running), Some(seconds)) => write!(out, "  RUNNING for {}", units::seconds(seconds)),
                (Some(power), _) => write!(out, "  machine {}", power.word()),
                (None, _) => write!(out, "  machine silent"),
            };
        }
        let _ = writeln!(out, "  session {}", short_id(&status.id.simple().to_string()));
        if let Some(reason) = &status.reason {
            let _ = writeln!(out, "  why      {reason}");
        }
        let _ = writeln!(out, "  local    {}", self.local_sentence());
        for disk in &status.disks {
            let _ = writeln!(out, "  {}", disk_line(disk));
            for trouble in troubles(disk) {
                let _ = writeln!(out, "           {trouble}");
            }
            for doubt in disk.unused.iter().flat_map(doubts) {
                let _ = writeln!(out, "           copied whole, free space too: {doubt}");
            }
            if let Some(unused) = disk.unused.as_ref().filter(|u| u.left_out > 0) {
                let _ = writeln!(out, "           {} that nothing uses is not copied", units::bytes(unused.left_out));
            }
            for parked in &disk.parked {
                let _ = writeln!(
                    out,
                    "           a read of {}+{} has waited {} s for the source",
                    parked.offset, parked.len, parked.waited_s
                );
            }
        }
        let limit = status.rate.map_or("none".into(), |rate| format!("{}/s", units::bytes(rate)));
        // A copy that rests keeps the rate it last had.
        let copying = |h: &&HydrationStatus| h.phase == Phase::Running;
        let rate: u64 = status.disks.iter().filter_map(|d| d.hydration.as_ref()).filter(copying).map(|h| h.rate).sum();
        if !status.is_local() {
            let _ = writeln!(out, "  rate     {}/s (limit {limit})", units::bytes(rate));
        }
        let _ = write!(out, "{}", reads_line(status));
        match &status.door {
            Door::Running { pid, .. } => drop(writeln!(out, "  door     process {pid}")),
            Door::NotRunning => drop(writeln!(out, "  door     not running; aquifer session resume {}", status.name)),
        }
        if let Some(console) = self.machine.as_ref().and_then(|m| m.console.as_deref()) {
            let _ = writeln!(out, "  console  {}", console_command(console));
        }
        if let Some(why) = self.machine.as_ref().and_then(|machine| machine.silent.as_ref()) {
            let _ = writeln!(out, "  note     {why}");
        }
        for warning in &status.warnings {
            let _ = writeln!(out, "  note     {warning}");
        }
        out
    }

    fn local_sentence(&self) -> String {
        if self.status.is_local() {
            return "everything; nothing else is needed".into();
        }
        let share = self.local_percent.map_or("unknown".into(), |p| format!("{p} %"));
        let sizes = format!("{} of {}", units::bytes(self.local_bytes), units::bytes(self.used_bytes));
        let time = self.seconds_to_independence.map_or("unknown".into(), units::seconds);
        let known = self.status.disks.iter().all(|disk| disk.used.is_some());
        let whole = if known { "used data" } else { "the disks" };
        format!("{share} of {whole} ({sizes})  |  time to independence {time}")
    }
}

impl MachineView {
    fn of(machine: &Machine) -> Self {
        let (power, silent) = match machine.power() {
            Ok(power) => (Some(power), None),
            Err(fail) => (None, Some(fail.what)),
        };
        let alive = power != Some(Power::Off);
        let age = |since: Timestamp| Timestamp::now().duration_since(since).as_secs().max(0).unsigned_abs();
        let path = |path: &std::path::Path| path.display().to_string();
        let running = machine.running.as_ref().filter(|_| alive);
        Self {
            power,
            silent,
            since: machine.since,
            running_seconds: machine.since.filter(|_| alive).map(age),
            host: machine.host.clone(),
            firmware: machine.firmware.to_string(),
            accel: running.map(|r| r.accel.clone()),
            console: running.map(|r| path(&r.console)),
            screen: running.and_then(|r| r.screen.as_deref()).map(path),
            pid: running.map(|r| r.process.pid),
        }
    }
}

/// The command that opens a console.
pub fn console_command(socket: &str) -> String {
    format!("socat -,raw,echo=0,escape=0x1d UNIX-CONNECT:{socket}")
}

/// The part of an id people type: its end, which is random.
pub fn short_id(simple: &str) -> &str {
    simple.get(simple.len().saturating_sub(8)..).unwrap_or(simple)
}

/// Bytes of a disk's used data that are local, and all of them.
fn local_of_used(disk: &DiskStatus) -> (u64, u64) {
    match (&disk.hydration, disk.overlay) {
        (Some(hydration), _) => (hydration.done, hydration.total),
        (None, Some(overlay)) => (overlay.local(), disk.size),
        (None, None) => (0, disk.used.unwrap_or(disk.size)),
    }
}

fn percent(local: u64, used: u64, is_local: bool) -> Option<u64> {
    if is_local {
        return Some(100);
    }
    let share = u128::from(local) * 100 / u128::from(used.max(1));
    Some(u64::try_from(share).unwrap_or(99).min(99))
}

/// The longest of the disks' times; unknown if one of those that copy is.
fn independence(status: &Status) -> Option<u64> {
    let mut longest = 0;
    for disk in &status.disks {
        match &disk.hydration {
            Some(hydration) if hydration.phase == Phase::Done => {}
            Some(hydration) => longest = longest.max(hydration.eta_s?),
            None if disk.overlay.is_some_and(|o| o.absent == 0) => {}
            None => return None,
        }
    }
    Some(longest)
}

fn allowed(status: &Status) -> Vec<&'static str> {
    use aquifer_mount::session::State::{Dismounting, Failed, Interrupted, Migrated, Migrating, Mounted, Stopped};
    let door = matches!(status.door, Door::Running { .. });
    match status.state {
        Stopped => Vec::new(),
        Dismounting => vec!["finalize"],
        Failed => vec!["resume", "discard"],
        _ if !door => vec!["resume", "discard"],
        Migrated => vec!["keep", "discard"],
        Mounted | Migrating | Interrupted => vec!["set", "pause", "resume", "keep", "discard"],
        _ => vec!["discard"],
    }
}

/// `vda  ████▓▓░░░░  12.0 GiB hydrated, 1.2 GiB written, 30.0 GiB waiting`.
fn disk_line(disk: &DiskStatus) -> String {
    let Some(overlay) = disk.overlay else {
        return format!("{:<8} {} read-only", disk.name, units::bytes(disk.size));
    };
    let bar = bar(overlay.hydrated + overlay.trimmed, overlay.written, disk.size);
    let phase = match disk.hydration.as_ref().map(|h| h.phase) {
        Some(Phase::Running) => "copying",
        Some(Phase::Paused) => "paused",
        Some(Phase::Waiting) => "waiting for the source",
        Some(Phase::NoSpace) => "waiting for space",
        Some(Phase::Failed) => "the copy failed",
        Some(Phase::Done) => "local",
        None if overlay.absent == 0 => "local",
        None => "not copied",
    };
    format!(
        "{:<8} {bar} {phase}; {} written, {} missing of {}",
        disk.name,
        units::bytes(overlay.written),
        units::bytes(overlay.absent),
        units::bytes(disk.size)
    )
}

/// `reads    12 waited for the source; p99 2.1 ms; boot trace 80 % fetched; 90 MiB fetched`; nothing where nothing was read.
fn reads_line(status: &Status) -> String {
    let demand = status.disks.iter().filter_map(|d| d.demand);
    let misses: u64 = demand.clone().map(|d| d.misses).sum();
    let p99 = demand.filter_map(|d| d.p99_us).max();
    let replay = status.disks.iter().filter_map(|d| d.hydration.as_ref()?.replay);
    let (done, total) = replay.fold((0, 0), |sum, next| (sum.0 + next.0, sum.1 + next.1));
    let mut parts = Vec::new();
    if misses > 0 {
        parts.push(format!("{misses} waited for the source"));
    }
    if let Some(p99) = p99 {
        let whole = p99 / 1000;
        parts.push(format!("p99 {whole}.{} ms", p99 % 1000 / 100));
    }
    if let Some(percent) = (done * 100).checked_div(total) {
        parts.push(format!("boot trace {percent} % fetched"));
    }
    let fetched: u64 = status.disks.iter().map(|d| d.fetched).sum();
    if fetched > 0 {
        parts.push(format!("{} fetched", units::bytes(fetched)));
    }
    if parts.is_empty() { String::new() } else { format!("  reads    {}\n", parts.join("; ")) }
}

/// What keeps a disk from becoming local or puts bytes in doubt, in sentences.
fn troubles(disk: &DiskStatus) -> Vec<String> {
    let mut out = Vec::new();
    if let Some(why) = &disk.source_away {
        out.push(format!("its source cannot be opened: {why}"));
    }
    if let Some(copy) = disk.hydration.as_ref().filter(|copy| copy.phase != Phase::Done) {
        if let Some((offset, _)) = copy.damaged.first() {
            let bytes = copy.damaged.iter().map(|(_, len)| len).sum();
            out.push(format!("its source is damaged: {} cannot be copied, the first at {offset}", units::bytes(bytes)));
        }
        out.extend(copy.error.as_ref().map(|error| format!("last error: {error}")));
    }
    if let Some((offset, len)) = disk.doubtful.first() {
        let more = disk.doubtful.len() - 1;
        out.push(format!("after a failed sync {len} bytes at {offset} are in doubt, and {more} other ranges"));
    }
    out
}

/// Why free space is copied, for the disk or for parts of it.
fn doubts(unused: &UnusedStatus) -> impl Iterator<Item = &String> {
    unused.doubt.iter().chain(unused.volumes.iter().filter_map(|volume| volume.doubt.as_ref()))
}

/// `█` hydrated, `▓` written by the guest, `░` waiting.
fn bar(hydrated: u64, written: u64, size: u64) -> String {
    let cells = |bytes: u64| {
        let share = u128::from(bytes) * u128::from(BAR_CELLS) / u128::from(size.max(1));
        usize::try_from(share).unwrap_or(0).min(usize::try_from(BAR_CELLS).unwrap_or(0))
    };
    let full = cells(hydrated + written);
    let ours = full.saturating_sub(cells(hydrated));
    let waiting = usize::try_from(BAR_CELLS).unwrap_or(0) - full;
    format!("{}{}{}", "█".repeat(full - ours), "▓".repeat(ours), "░".repeat(waiting))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundred_per_cent_means_all_of_it() {
        assert_eq!(percent(0, 1000, false), Some(0));
        assert_eq!(percent(999, 1000, false), Some(99));
        assert_eq!(percent(1000, 1000, false), Some(99), "something is missing still");
        assert_eq!(percent(1000, 1000, true), Some(100));
        assert_eq!(percent(0, 0, true), Some(100), "an empty disk");
        assert_eq!(percent(u64::MAX, u64::MAX, false), Some(99));
    }

    #[test]
    fn the_bar_has_its_length_whatever_the_figures() {
        for (hydrated, written, size) in
            [(0, 0, 0), (0, 0, 100), (50, 25, 100), (100, 0, 100), (1 << 62, 1 << 61, 1 << 62)]
        {
            assert_eq!(bar(hydrated, written, size).chars().count(), 40, "{hydrated} {written} {size}");
        }
        assert_eq!(bar(50, 25, 100), format!("{}{}{}", "█".repeat(20), "▓".repeat(10), "░".repeat(10)));
    }
}
