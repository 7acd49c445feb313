//! Loop devices on files of the FUSE door, so that `fdisk`, `mount` and `fsck` work on a restore point.
//!
//! Invariants
//! - A device is cleared by the kernel itself once its last user and this process have gone, however
//!   this process ends.
//! - A read-only disk gives a read-only device; the kernel is told so, not only the file.
//! - Direct I/O: the device keeps its own pages, the file below keeps none beside them.
//!
//! Partitions get nodes of their own (`/dev/loop0p1`) where the kernel's or udev's `/dev` makes them, and
//! are made here where nobody does, as in containers. Where even that is not allowed, no nodes are needed:
//! `fdisk -l` reads the device or the file, and `mount -o loop,offset=` takes the file itself (while no
//! device of ours is on it). A kernel without parsers for partition tables is told of them by `partx -a`.
//!
//! The program that serves the file must not be the only thread that attaches it: the kernel reads the
//! partition table while it attaches. [`crate::fuse::FuseDoor`] answers on threads of its own.
//!
//! Not here: mounting file systems.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

/// Result of anything in this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

const LOOP_CLR_FD: u32 = 0x4C01;
const LOOP_CONFIGURE: u32 = 0x4C0A;
const LOOP_CTL_GET_FREE: u32 = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_PARTSCAN: u32 = 8;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const LOOP_MAJOR: u32 = 7;

/// Others look for free devices too; each loss of the race costs one try.
const TRIES: usize = 64;

/// Why a device could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call on a device or on the file.
    #[error("{path}: {action}: {source}")]
    Io {
        /// Device, control node or file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Every free device found was taken by somebody else meanwhile.
    #[error("/dev/loop-control: no free loop device in {TRIES} tries")]
    NoneFree,
}

impl Error {
    fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io { path: path.display().to_string(), action, source }
    }
}

/// Whether the device can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoopAccess {
    /// No.
    ReadOnly,
    /// Yes; the file is opened for writing.
    ReadWrite,
}

/// Size of a device's sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SectorSize {
    /// 512 bytes, as most disks say of themselves.
    #[default]
    B512,
    /// 4096 bytes: partition tables of such disks count in these.
    B4096,
}

impl SectorSize {
    fn bytes(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }
}

/// A loop device on a file. Dropping it gives it up; users that still have it open keep it until they close it.
#[derive(Debug)]
pub struct LoopDevice {
    /// `None` once given up.
    device: Option<File>,
    path: PathBuf,
    made: Vec<PathBuf>,
}

/// A partition the kernel found on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1.
    pub number: u32,
    /// Start on the device in bytes, for `mount -o offset=`.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Its node, whether or not it is there.
    pub path: PathBuf,
    device: (u32, u32),
}

/// What became of a device that was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detached {
    /// It is free again.
    Gone,
    /// Somebody has it open or mounted; the kernel frees it when the last user goes.
    InUse,
}

/// `struct loop_info64` and `struct loop_config` of `linux/loop.h`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo>() == 232 && size_of::<LoopConfig>() == 304);

impl LoopDevice {
    /// Attaches the first free device to `file`.
    ///
    /// # Errors
    /// [`Error::Io`], among them `PermissionDenied` without the privilege and `NotFound` without loop
    /// devices in this kernel or container; [`Error::NoneFree`].
    pub fn attach(file: &Path, access: LoopAccess, sectors: SectorSize) -> Result<Self> {
        let writes = access == LoopAccess::ReadWrite;
        let below = OpenOptions::new().read(true).write(writes).custom_flags(libc::O_CLOEXEC).open(file);
        let below = below.map_err(|e| Error::io(file, "open", e))?;
        let control_path = Path::new("/dev/loop-control");
        let control = OpenOptions::new().read(true).write(true).open(control_path);
        let control = control.map_err(|e| Error::io(control_path, "open", e))?;
        for _ in 0..TRIES {
            let free = request(&control, LOOP_CTL_GET_FREE, 0);
            let number = free.map_err(|e| Error::io(control_path, "find a free device", e))?;
            if let Some(device) = Self::take(number, &below, file, access, sectors)? {
                return Ok(device);
            }
        }
        Err(Error::NoneFree)
    }

    /// Configures device `number`; `None` if somebody was faster.
    fn take(number: u32, below: &File, file: &Path, access: LoopAccess, sectors: SectorSize) -> Result<Option<Self>> {
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let mut made = Vec::new();
        if make_node(&path, (LOOP_MAJOR, number))? {
            made.push(path.clone());
        }
        let writes = access == LoopAccess::ReadWrite;
        let device = OpenOptions::new().read(true).write(writes).custom_flags(libc::O_CLOEXEC).open(&path);
        let device = device.map_err(|e| Error::io(&path, "open", e))?;
        let read_only = if writes { 0 } else { LO_FLAGS_READ_ONLY };
        let flags = read_only | LO_FLAGS_AUTOCLEAR | LO_FLAGS_PARTSCAN | LO_FLAGS_DIRECT_IO;
        match configure(&device, below, flags, sectors.bytes(), &shown_name(file)) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(None),
            Err(e) => return Err(Error::io(&path, "attach", e)),
        }
        let mut out = Self { device: Some(device), path, made };
        for partition in out.partitions()? {
            if make_node(&partition.path, partition.device)? {
                out.made.push(partition.path);
            }
        }
        Ok(Some(out))
    }

    /// The device: `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The partitions the kernel found, by number.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn partitions(&self) -> Result<Vec<Partition>> {
        let name = self.path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let block = Path::new("/sys/block").join(name);
        let failed = |e| Error::io(&block, "list", e);
        let mut out = Vec::new();
        for entry in fs::read_dir(&block).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let child = entry.file_name();
            let number = child.to_str().and_then(|c| c.strip_prefix(name)?.strip_prefix('p')?.parse().ok());
            if let Some(number) = number
                && let Some(partition) = read_partition(&entry.path(), number, &self.path)
            {
                out.push(partition);
            }
        }
        out.sort_by_key(|p: &Partition| p.number);
        Ok(out)
    }

    /// Gives the device up.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn detach(mut self) -> Result<Detached> {
        self.give_up()
    }

    fn give_up(&mut self) -> Result<Detached> {
        let Some(device) = self.device.take() else { return Ok(Detached::Gone) };
        // With users left this only marks the device to be cleared by the last of them.
        let cleared = request(&device, LOOP_CLR_FD, 0);
        drop(device);
        let name = self.path.file_name().unwrap_or_default();
        let in_use = Path::new("/sys/block").join(name).join("loop/backing_file").exists();
        if !in_use {
            for node in self.made.drain(..) {
                let _ = fs::remove_file(node);
            }
        }
        match cleared {
            Ok(_) if in_use => Ok(Detached::InUse),
            Ok(_) => Ok(Detached::Gone),
            // The kernel had cleared it before us.
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(Detached::Gone),
            Err(e) => Err(Error::io(&self.path, "detach", e)),
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(error) = self.give_up() {
            tracing::warn!(%error, "a loop device was not given up");
        }
    }
}

/// What `losetup` shows, cut where the field ends.
fn shown_name(file: &Path) -> [u8; 64] {
    let mut out = [0; 64];
    let name = file.as_os_str().as_encoded_bytes();
    for (to, from) in out.iter_mut().take(63).zip(name) {
        *to = *from;
    }
    out
}

fn read_partition(dir: &Path, number: u32, device: &Path) -> Option<Partition> {
    let value = |name: &str| fs::read_to_string(dir.join(name)).ok();
    // Always in units of 512 bytes, whatever the sector size.
    let units = |name: &str| value(name)?.trim().parse::<u64>().ok()?.checked_mul(512);
    let numbers = value("dev")?;
    let (major, minor) = numbers.trim().split_once(':')?;
    Some(Partition {
        number,
        offset: units("start")?,
        len: units("size")?,
        path: PathBuf::from(format!("{}p{number}", device.display())),
        device: (major.parse().ok()?, minor.parse().ok()?),
    })
}

/// Makes a node that nobody else made; whether it did. A container that forbids it is no error here:
/// whoever opens the node says that it is missing.
fn make_node(path: &Path, (major, minor): (u32, u32)) -> Result<bool> {
    match fs::metadata(path) {
        Ok(meta) if meta.file_type().is_block_device() => return Ok(false),
        Ok(meta) => {
            let what = format!("not a block device but mode {:o}", meta.mode());
            return Err(Error::io(path, "use", io::Error::other(what)));
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(path, "use", e)),
    }
    let mode = Mode::RUSR | Mode::WUSR;
    Ok(mknodat(CWD, path, FileType::BlockDevice, mode, makedev(major, minor)).is_ok())
}

fn configure(device: &File, below: &File, flags: u32, block_size: u32, name: &[u8; 64]) -> io::Result<()> {
    let info = LoopInfo {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags,
        file_name: *name,
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let fd = u32::try_from(below.as_raw_fd()).map_err(io::Error::other)?;
    let config = LoopConfig { fd, block_size, info, reserved: [0; 8] };
    request(device, LOOP_CONFIGURE, std::ptr::from_ref(&config) as usize).map(|_| ())
}

#[expect(unsafe_code, reason = "ioctl has no safe wrapper for loop devices")]
fn request(on: &File, code: u32, argument: usize) -> io::Result<u32> {
    // SAFETY: the argument is 0, or for LOOP_CONFIGURE the address of a whole `LoopConfig` that outlives
    // the call; the kernel only reads it.
    let result = unsafe { libc::ioctl(on.as_raw_fd(), code.into(), argument) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}
