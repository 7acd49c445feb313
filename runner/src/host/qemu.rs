//! QEMU itself, started and steered without anything between: the embedded default.
//!
//! Each disk is three named nodes: the device sits on `disk<n>`, a `raw` node that never changes, and that on
//! `door<n>`, our NBD export. The pivot adds `local<n>`, the file, and changes what `disk<n>` stands on.
//!
//! Invariants
//! - The process is a session of its own: it outlives whoever started it. It runs in QEMU's sandbox, with sockets
//!   only its user can reach and every format named.
//! - Of one folder at most one process runs: it is found again by its number in `qemu.pid`, which QEMU itself locks.
//! - A failed request stops the machine (`rerror=stop,werror=stop`); an error never reaches the guest.
//! - A machine is let go only after its block nodes were seen to be what was asked for.
//!
//! Not here: doors, sessions, what is in the files.

mod accel;
mod alone;
mod board;
mod command;
mod firmware_files;
mod layers;
mod nodes;

use std::{
    fs,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{
    Attachment, Bus, Error, Happening, Host, Pivot, Places, Power, Process, Result, Running, Shape,
    firmware::Firmware,
    qmp::{self, Qmp},
};
pub use accel::Accel;
pub(crate) use alone::is_machine_in;
use firmware_files::FirmwareFiles;
use nodes::Nodes;

/// The program.
const PROGRAM: &str = "qemu-system-x86_64";

/// What it says, in the machine's folder.
const LOG: &str = "qemu.log";

/// Oldest version whose `blockdev-reopen` moves a child, as (major, minor).
const VERSION_MIN: (u32, u32) = (6, 1);

/// How long a machine may take until its monitor answers. Opening the doors is in it.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long an order may take.
const ORDER_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is looked whether a guest that was asked to turn itself off is still waited for.
const PATIENCE_LOOK: Duration = Duration::from_millis(50);

/// How long the change of a disk may take: requests in flight are finished first.
const PIVOT_TIMEOUT: Duration = Duration::from_secs(60);

/// How often a stopped machine is let go before it is said to be stuck.
const RESUME_TRIES: u32 = 5;

/// How long it has to run to count as running.
const RESUME_PROOF: Duration = Duration::from_millis(200);

/// PCI devices a machine may have in all, disks and cards together; the board has 32 places and uses some itself.
const PCI_DEVICES_MAX: usize = 24;

/// Ports of a SATA controller.
const SATA_PORTS: usize = 6;

/// Places on the old board's IDE controller.
const IDE_PLACES: usize = 4;

/// The host `qemu`.
#[derive(Debug, Default)]
pub struct Qemu;

impl Qemu {
    fn orders(running: &Running) -> Result<Qmp> {
        Ok(Qmp::connect(&running.orders, ORDER_TIMEOUT)?)
    }
}

impl Host for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn check(&self, shape: &Shape) -> Result<Vec<String>> {
        check_limits(shape)?;
        let (major, minor) = version()?;
        if (major, minor) < VERSION_MIN {
            let expected = format!("{}.{} or newer", VERSION_MIN.0, VERSION_MIN.1);
            return Err(Error::Observed { what: PROGRAM.into(), expected, found: format!("{major}.{minor}") });
        }
        if shape.firmware == Firmware::Uefi {
            FirmwareFiles::find(shape.variables)?;
        }
        Ok(board::named(shape.machine_type.as_deref()).note.into_iter().collect())
    }

    fn variables(&self, dir: &Path) -> PathBuf {
        dir.join("nvram.fd")
    }

    fn logs(&self, dir: &Path) -> Vec<PathBuf> {
        vec![dir.join(LOG), dir.join(command::CONSOLE_LOG)]
    }

    fn start(&self, shape: &Shape, disks: &[Attachment], places: &Places) -> Result<Running> {
        self.check(shape)?;
        let accel = accel::probe();
        let command = command::Line::new(shape, disks, places, accel)?;
        // Whoever starts it at the same moment waits, and then finds it.
        let _alone = alone::lock(&places.dir)?;
        if let Some(process) = alone::running_in(&places.dir) {
            return adopt(command.running(process, places.dir.join(LOG)), disks);
        }
        command.prepare()?;
        let mut attempt = Attempt::launch(&command)?;
        let mut orders = attempt.await_monitor()?;
        Nodes::query(&mut orders)?.check(disks)?;
        orders.execute("cont", json!({}), ORDER_TIMEOUT)?;
        let power = status(&mut orders)?;
        if power != Power::Running {
            return Err(Error::Power { have: power });
        }
        attempt.succeed()
    }

    fn keep(&self, shape: &Shape, disks: &[Attachment], places: &Places) -> Result<()> {
        command::Line::new(shape, disks, places, accel::probe())?.keep()
    }

    fn find(&self, places: &Places) -> Option<Running> {
        let monitor = socket(places, "qmp.sock");
        let process = alone::running_in(&places.dir).or_else(|| alone::listening_at(&monitor))?;
        Some(command::running(process, places, accel::probe(), places.dir.join(LOG)))
    }

    fn layer(&self, running: &Running, index: usize, layer: &Path) -> Result<()> {
        layers::add(&mut Self::orders(running)?, index, layer)
    }

    fn merge(&self, running: &Running, index: usize, base: &Path, size: u64) -> Result<()> {
        layers::merge(&mut Self::orders(running)?, index, base, size)
    }

    fn power(&self, running: &Running) -> Result<Power> {
        if !running.process.is_alive() {
            return Ok(Power::Off);
        }
        match Self::orders(running).and_then(|mut orders| status(&mut orders)) {
            Err(Error::Monitor(qmp::Error::Closed { .. } | qmp::Error::Io { .. }))
                if running.process.wait_gone(Duration::from_secs(2)) =>
            {
                Ok(Power::Off)
            }
            other => other,
        }
    }

    fn resume(&self, running: &Running) -> Result<()> {
        let mut orders = Self::orders(running)?;
        let mut have = Power::Paused;
        // The first request after a lost connection only begins a new one, and fails: the machine stops again at once.
        for _ in 0..RESUME_TRIES {
            orders.execute("cont", json!({}), ORDER_TIMEOUT)?;
            std::thread::sleep(RESUME_PROOF);
            have = status(&mut orders)?;
            if have == Power::Running {
                return Ok(());
            }
        }
        Err(Error::Power { have })
    }

    fn pivot(&self, running: &Running, index: usize, local: &Path) -> Result<Pivot> {
        let mut orders = Self::orders(running)?;
        nodes::pivot(&mut orders, index, local, PIVOT_TIMEOUT)
    }

    fn ask_off(&self, running: &Running, grace: Duration, goes_on: &dyn Fn() -> bool) -> Result<bool> {
        if !running.process.is_alive() {
            return Ok(true);
        }
        // Not held while it is waited: others have orders for it too.
        Self::orders(running)?.execute("system_powerdown", json!({}), ORDER_TIMEOUT)?;
        let until = Instant::now() + grace;
        while goes_on() {
            let left = until.saturating_duration_since(Instant::now());
            if running.process.wait_gone(left.min(PATIENCE_LOOK)) {
                return Ok(true);
            }
            if left.is_zero() {
                break;
            }
        }
        Ok(!running.process.is_alive())
    }

    fn power_off(&self, running: &Running) -> Result<()> {
        if !running.process.is_alive() {
            return Ok(());
        }
        if let Ok(mut orders) = Self::orders(running) {
            // An orderly end: QEMU finishes and flushes what its disks have in flight. Its answer may be cut off.
            let _ = orders.execute("quit", json!({}), ORDER_TIMEOUT);
            if running.process.wait_gone(ORDER_TIMEOUT) {
                return Ok(());
            }
        }
        running.process.signal(Signal::KILL).map_err(|e| Error::io(&running.log, "end the process", e))?;
        if running.process.wait_gone(ORDER_TIMEOUT) { Ok(()) } else { Err(Error::Power { have: Power::Paused }) }
    }

    fn follow(&self, running: &Running, tick: Duration, tell: &mut dyn FnMut(Option<Happening>) -> bool) -> Result<()> {
        let mut monitor = None;
        while running.process.is_alive() {
            let Some(events) = &mut monitor else {
                match Qmp::connect(&running.events, ORDER_TIMEOUT) {
                    Ok(qmp) => monitor = Some(qmp),
                    Err(_) if !running.process.wait_gone(tick) => {
                        if !tell(None) {
                            return Ok(());
                        }
                    }
                    Err(_) => {}
                }
                continue;
            };
            let happening = match events.event(tick) {
                Ok(Some(event)) => match happening(&event) {
                    Some(happening) => Some(happening),
                    None => continue,
                },
                Ok(None) => None,
                // Closed by its end, or by whatever broke the line: looked at above.
                Err(_) => {
                    monitor = None;
                    running.process.wait_gone(tick);
                    continue;
                }
            };
            if !tell(happening) {
                return Ok(());
            }
        }
        tell(Some(Happening::Gone));
        Ok(())
    }
}

/// Takes over a machine that somebody started and could not record any more.
fn adopt(running: Running, disks: &[Attachment]) -> Result<Running> {
    let mut orders = Qemu::orders(&running)?;
    // Never let go: it stands where it was put, and nowhere else yet.
    if orders.execute("query-status", json!({}), ORDER_TIMEOUT)?.get("status") == Some(&json!("prelaunch")) {
        Nodes::query(&mut orders)?.check(disks)?;
        orders.execute("cont", json!({}), ORDER_TIMEOUT)?;
        return Ok(running);
    }
    // It may have been moved since: from a door to a file of its own, or to one more layer.
    for (index, disk) in disks.iter().enumerate() {
        if let Attachment::File { path, .. } = disk {
            layers::stands_on(&mut orders, index, path)?;
        }
    }
    Ok(running)
}

fn happening(event: &qmp::Event) -> Option<Happening> {
    Some(match event.name.as_str() {
        "BLOCK_IO_ERROR" => Happening::IoError,
        "STOP" => Happening::Stopped,
        "RESUME" => Happening::Resumed,
        "RESET" => Happening::Reset,
        "GUEST_PANICKED" => Happening::Crashed,
        "SHUTDOWN" if event.data.get("guest").and_then(Value::as_bool) == Some(true) => Happening::PoweredOff,
        _ => return None,
    })
}

fn status(orders: &mut Qmp) -> Result<Power> {
    let answer = orders.execute("query-status", json!({}), ORDER_TIMEOUT)?;
    Ok(match answer.get("status").and_then(Value::as_str) {
        Some("running") => Power::Running,
        Some("io-error") => Power::IoError,
        Some("guest-panicked" | "internal-error") => Power::Crashed,
        Some("shutdown") => Power::Off,
        _ => Power::Paused,
    })
}

/// Version of the installed program.
fn version() -> Result<(u32, u32)> {
    let missing = || Error::Missing { what: "QEMU", looked: format!("{PROGRAM} in the path") };
    let out = Command::new(PROGRAM).arg("--version").stdin(Stdio::null()).output().map_err(|_| missing())?;
    let text = String::from_utf8_lossy(&out.stdout);
    let number = text.split_ascii_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    let mut parts = number.unwrap_or_default().split('.').map_while(|part| part.parse().ok());
    parts.next().zip(parts.next()).ok_or_else(missing)
}

fn check_limits(shape: &Shape) -> Result<()> {
    let refuse = |what: String| Err(Error::Shape { what });
    let pci = shape.disks.iter().filter(|d| matches!(d.bus, Bus::Virtio | Bus::Nvme)).count() + shape.nics.len();
    if pci > PCI_DEVICES_MAX {
        return refuse(format!("{pci} PCI disks and network cards; the qemu host attaches {PCI_DEVICES_MAX}"));
    }
    let sata = shape.disks.iter().filter(|d| d.bus == Bus::Sata).count();
    if sata > SATA_PORTS {
        return refuse(format!("{sata} SATA disks; the board has {SATA_PORTS} ports"));
    }
    let ide = shape.disks.iter().filter(|d| d.bus == Bus::Ide).count();
    if ide > IDE_PLACES {
        return refuse(format!("{ide} IDE disks; the board has {IDE_PLACES} places"));
    }
    if shape.memory < 1 << 20 || !shape.memory.is_multiple_of(1 << 20) {
        return refuse(format!("{} bytes of memory; whole MiB are possible", shape.memory));
    }
    if shape.cpus == 0 || shape.cpus > 255 {
        return refuse(format!("{} processors; 1 to 255 are possible", shape.cpus));
    }
    Ok(())
}

/// A machine on its way up; dropped before it succeeded, it is taken down again.
struct Attempt {
    child: Option<Child>,
    running: Running,
    places: Places,
    log_start: u64,
}

impl Attempt {
    fn launch(command: &command::Line) -> Result<Self> {
        let log = command.places().dir.join(LOG);
        let mut out = fs::OpenOptions::new().create(true).append(true).open(&log);
        let log_start = out.as_mut().ok().and_then(|f| f.seek(SeekFrom::End(0)).ok()).unwrap_or(0);
        let out = out.map_err(|e| Error::io(&log, "open", e))?;
        let mut program = Command::new(PROGRAM);
        program.args(command.args()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(out).current_dir("/");
        command::leave_terminal(&mut program);
        let mut child = program.spawn().map_err(|e| Error::io(Path::new(PROGRAM), "start", e))?;
        let Some(process) = Process::of(child.id()) else {
            // It ended before it could be looked at.
            let status = child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
            command::forget_sockets(command.places());
            return Err(Error::Start { program: PROGRAM.into(), status, said: said(&log, log_start) });
        };
        let running = command.running(process, log);
        let places = command.places().clone();
        Ok(Self { child: Some(child), running, places, log_start })
    }

    /// Waits for the monitor, or for the process to end.
    fn await_monitor(&mut self) -> Result<Qmp> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match Qmp::connect(&self.running.orders, left.max(Duration::from_millis(1))) {
                Ok(qmp) => return Ok(qmp),
                Err(error) => {
                    let status = self.child.as_mut().and_then(|c| c.try_wait().ok()).flatten();
                    if let Some(status) = status {
                        let said = said(&self.running.log, self.log_start);
                        return Err(Error::Start { program: PROGRAM.into(), status: status.to_string(), said });
                    }
                    if left.is_zero() {
                        return Err(error.into());
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
    }

    fn succeed(mut self) -> Result<Running> {
        if let Some(mut child) = self.child.take() {
            // Whoever lives on beside the machine must not keep it as a zombie.
            std::thread::spawn(move || child.wait());
        }
        Ok(self.running.clone())
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let _ = child.kill();
        let _ = child.wait();
        command::forget_sockets(&self.places);
    }
}

/// The end of what the program said since `from`, in one line.
fn said(log: &Path, from: u64) -> String {
    const TAIL: u64 = 2000;
    let mut text = String::new();
    if let Ok(mut file) = fs::File::open(log) {
        let end = file.seek(SeekFrom::End(0)).unwrap_or(0);
        let _ = file.seek(SeekFrom::Start(from.max(end.saturating_sub(TAIL))));
        let _ = file.take(TAIL).read_to_string(&mut text);
    }
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    if lines.is_empty() { "it said nothing".to_owned() } else { lines.join("; ") }
}

/// Where a machine's sockets lie.
fn socket(places: &Places, name: &str) -> PathBuf {
    places.runtime_dir.join(name)
}

#[cfg(test)]
mod tests;
