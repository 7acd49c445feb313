//! What only a hypervisor can do: start a machine on disks we serve, tell how it fares, move a running one from
//! our door to its own local file, stop it.
//!
//! Invariants
//! - Nothing is reported as done that was not observed on the host afterwards.
//! - What a guest could write is opened with an explicit format, never probed.
//! - A [`Running`] record is enough to find the machine again from another process; it is never trusted to mean a
//!   live process without a look.
//!
//! Not here: sessions, doors, what a recovery does in which order (`recover`).

pub mod error;
pub mod firmware;
pub mod in_use;
pub mod partition;
pub mod placed;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod rooms;
pub mod shape;

use std::{
    fmt::Debug,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

pub use error::{Error, Result};
pub use process::Process;
pub use rooms::Rooms;
pub use shape::{Bus, Disk, Network, Nic, Shape};

/// A disk as the machine gets it at its start: an export of an NBD server on a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Door {
    /// The server's socket.
    pub socket: PathBuf,
    /// Name of the export.
    pub export: String,
    /// How long requests wait for a server that went away before the guest is stopped, seconds.
    pub reconnect_s: u32,
}

/// What a disk of a machine stands on at its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// An export of a server.
    Door(Door),
    /// A local image; what it stands on in turn it names itself, with its format.
    File {
        /// The image.
        path: PathBuf,
        /// What it is.
        format: ImageFormat,
    },
}

impl From<Door> for Attachment {
    fn from(door: Door) -> Self {
        Self::Door(door)
    }
}

/// Formats of local images that a machine writes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// Bytes of the disk and nothing else.
    Raw,
    /// QEMU's own.
    Qcow2,
}

impl ImageFormat {
    /// As images and hypervisors name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Where a machine's files go.
#[derive(Clone, Debug)]
pub struct Places {
    /// Logs, firmware variables, the command line: they stay.
    pub dir: PathBuf,
    /// Sockets: gone after a reboot, 0700, short.
    pub runtime_dir: PathBuf,
}

/// A started machine, as the session's record keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Its process.
    pub process: Process,
    /// How instructions are run: `kvm` or `tcg`.
    pub accel: String,
    /// Socket of the monitor for orders.
    pub orders: PathBuf,
    /// Socket of the monitor that is followed for events.
    pub events: PathBuf,
    /// Socket of the serial console.
    pub console: PathBuf,
    /// Everything the serial console ever said.
    pub console_log: PathBuf,
    /// Socket of the screen (VNC), where the hypervisor has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub screen: Option<PathBuf>,
    /// What the hypervisor's process said.
    pub log: PathBuf,
}

/// How a machine fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// Its processors run.
    Running,
    /// Stopped by somebody through the monitor, or not yet let go.
    Paused,
    /// Stopped because a disk could not be read or written; nothing is lost, it can go on.
    IoError,
    /// The guest crashed and its hypervisor waits.
    Crashed,
    /// There is no such process any more.
    Off,
}

impl Power {
    /// In a sentence.
    pub fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::IoError => "stopped because a disk could not be read or written",
            Self::Crashed => "crashed",
            Self::Off => "off",
        }
    }
}

/// Something that happened to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening {
    /// A disk failed a request; the machine is stopped or will be.
    IoError,
    /// Its processors stopped.
    Stopped,
    /// Its processors go on.
    Resumed,
    /// The guest turned itself off.
    PoweredOff,
    /// The hypervisor's process has ended.
    Gone,
    /// A reset.
    Reset,
    /// The guest crashed.
    Crashed,
}

/// What a pivot took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pivot {
    /// Microseconds during which no request of the guest could be served.
    pub pause_us: u64,
}

/// A hypervisor.
pub trait Host: Debug + Send + Sync {
    /// Its name after `--host`.
    fn name(&self) -> &'static str;

    /// Whether a machine of this shape could be started: programs, firmware, limits. Starts and changes nothing.
    /// What it gets otherwise than described is told, in sentences without a full stop.
    ///
    /// # Errors
    /// Whatever [`Host::start`] would refuse for.
    fn check(&self, shape: &Shape) -> Result<Vec<String>>;

    /// The file that holds the UEFI variables of a machine whose folder is `dir`.
    fn variables(&self, dir: &Path) -> PathBuf;

    /// Files in which a machine whose folder is `dir` leaves what it has said.
    fn logs(&self, dir: &Path) -> Vec<PathBuf>;

    /// Starts a machine with one attachment for each of its disks, in order, and lets it go once its disks were seen to
    /// be those. One that runs in that folder already is answered as it is, if it stands on the same. On an error nothing
    /// that was started is left running, and no socket is left behind.
    ///
    /// # Errors
    /// [`Error`]; the hypervisor's own words are in it.
    fn start(&self, shape: &Shape, disks: &[Attachment], places: &Places) -> Result<Running>;

    /// Leaves in the machine's folder how it is started by hand on files of its own. Starts nothing.
    ///
    /// # Errors
    /// I/O; programs or firmware that are missing.
    fn keep(&self, shape: &Shape, disks: &[Attachment], places: &Places) -> Result<()>;

    /// The machine that runs in a folder, if one does, whoever started it there.
    fn find(&self, places: &Places) -> Option<Running>;

    /// Lets a living machine write disk number `index` to `layer` from now on: an empty image on what the disk stands
    /// on now, which nobody writes to any more. A disk that is there already is left alone.
    ///
    /// # Errors
    /// The machine goes on where it was.
    fn layer(&self, running: &Running, index: usize, layer: &Path) -> Result<()>;

    /// Writes all layers of disk number `index` of a living machine down into the lowest one and moves the disk onto
    /// it; where that one is longer than the disk's `size` in bytes, its end is cut off. It may take as long as it takes;
    /// a call that was cut short is made again.
    ///
    /// # Errors
    /// The machine goes on where it was.
    fn merge(&self, running: &Running, index: usize, base: &Path, size: u64) -> Result<()>;

    /// How it fares now.
    ///
    /// # Errors
    /// The process lives but does not answer.
    fn power(&self, running: &Running) -> Result<Power>;

    /// Lets a stopped machine go on, and sees that it does.
    ///
    /// # Errors
    /// It is off, or stops again at once.
    fn resume(&self, running: &Running) -> Result<()>;

    /// Moves disk number `index` of a living machine from its door to `local`, a raw file with the same content,
    /// and sees that it was moved. The caller has seen to it that every byte the door has acknowledged is in that file.
    /// A disk that is there already is left alone.
    ///
    /// # Errors
    /// The machine goes on with the door, unless the error says that the outcome is unknown.
    fn pivot(&self, running: &Running, index: usize, local: &Path) -> Result<Pivot>;

    /// Asks the guest to turn itself off, and waits for it up to `grace` and for as long as `goes_on` says so. Whether it
    /// is off now: a guest that does not listen goes on.
    ///
    /// # Errors
    /// The process lives but does not answer.
    fn ask_off(&self, running: &Running, grace: Duration, goes_on: &dyn Fn() -> bool) -> Result<bool>;

    /// Turns the machine off at once. What its disks have in flight is finished first.
    ///
    /// # Errors
    /// The process is still there.
    fn power_off(&self, running: &Running) -> Result<()>;

    /// Tells `tell` what happens to the machine until it is gone or `tell` says `false`. `tell` is also called every
    /// `tick` with `None`.
    ///
    /// # Errors
    /// The monitor cannot be used though the process lives.
    fn follow(&self, running: &Running, tick: Duration, tell: &mut dyn FnMut(Option<Happening>) -> bool) -> Result<()>;
}
