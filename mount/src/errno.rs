//! The only table of error numbers: what a disk's error is to a door.
//!
//! Invariants
//! - Damage is `EIO`, never zeros and never success.
//! - Every number here is one NBD can carry; FUSE uses the same.

use aquifer_formats as formats;
use aquifer_vdisk as vdisk;

/// An error number as both NBD and the kernel know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Not allowed.
    Perm = 1,
    /// Input or output failed, or stored bytes are damaged.
    Io = 5,
    /// Not enough memory.
    NoMem = 12,
    /// The request makes no sense.
    Invalid = 22,
    /// No space, or past the end.
    NoSpace = 28,
    /// An answer does not fit.
    Overflow = 75,
    /// Not supported.
    NotSup = 95,
    /// The server is stopping.
    Shutdown = 108,
}

impl Errno {
    /// The number.
    pub fn number(self) -> u32 {
        self as u32
    }

    /// The number as the kernel's calls carry it.
    pub fn raw_os_error(self) -> i32 {
        i32::try_from(self.number()).unwrap_or(libc::EIO)
    }
}

impl From<&vdisk::Error> for Errno {
    fn from(error: &vdisk::Error) -> Self {
        use vdisk::Error as E;
        match error {
            E::Format(error) => Self::from(error),
            E::ReadOnly { .. } => Self::Perm,
            E::OutOfRange { .. } => Self::Invalid,
            E::NoSpace { .. } => Self::NoSpace,
            _ => Self::Io,
        }
    }
}

impl From<&formats::Error> for Errno {
    fn from(error: &formats::Error) -> Self {
        use formats::Error as E;
        match error {
            E::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Self::NoSpace,
                std::io::ErrorKind::OutOfMemory => Self::NoMem,
                _ => Self::Io,
            },
            E::OutOfRange { .. } => Self::Invalid,
            E::Key { .. } => Self::Perm,
            _ => Self::Io,
        }
    }
}
