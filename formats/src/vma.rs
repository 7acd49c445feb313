//! VMA, read-only: Proxmox VE's backup archives (`vzdump`).
//!
//! An archive holds a machine's configuration and all its disks, cut into clusters of 64 KiB that lie in
//! the order they were read. One pass over the extents' headers, 512 bytes for each 3.7 MiB, tells where
//! a disk's clusters are: [`VmaLayer`] keeps 16 bytes for each of them.
//!
//! Invariants
//! - Nothing of a header is used before its MD5 held; every extent belongs to this archive (its UUID).
//! - A cluster that is not in the archive is an error for its range, never zeros: the writer stores all,
//!   and marks zeros as such.
//! - An archive that ends within an extent is refused: it is a part of a backup.
//!
//! Not here: reading in a compressed archive, which has no random access: [`Wrapping`] makes a plain one of it, and
//! whoever calls says where; the configuration's meaning.

mod layer;
mod unwrap;

pub use layer::VmaLayer;
pub use unwrap::Wrapping;

use std::sync::Arc;

use md5::{Digest, Md5};

use crate::{Error, Result, Storage, tables::TableFile};

const MAGIC: &[u8] = b"VMA\0";
/// Fixed part of the header, in bytes; blobs follow.
const FIXED_BYTES: u64 = 12_288;
/// Longest header, in bytes.
const HEADER_BYTES_MAX: u64 = 16 << 20;
const DEVICES_AT: usize = 4096;
/// The device that holds a running machine's memory.
const MEMORY: &str = "vmstate";

/// One device of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Device {
    id: u8,
    name: String,
    size: u64,
}

/// An archive, opened for reading.
#[derive(Debug)]
pub struct Vma {
    file: TableFile,
    uuid: [u8; 16],
    header_bytes: u64,
    devices: Vec<Device>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_be_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_be_bytes(*b))
}

/// It guards against accidents, not against people: the archive's headers carry it.
fn md5(bytes: &[u8]) -> [u8; 16] {
    Md5::digest(bytes).into()
}

/// Whether the MD5 at `at` is that of `bytes` with its own place zeroed.
fn sum_holds(bytes: &mut [u8], at: usize) -> bool {
    let Some(place) = bytes.get_mut(at..).and_then(|b| b.first_chunk_mut::<16>()) else { return false };
    let stored = std::mem::take(place);
    md5(bytes) == stored
}

impl Vma {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Truncated`], [`Error::Unsupported`], [`Error::Io`].
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let file = TableFile::open(storage)?;
        let bad = |offset: u64, what: String| Error::corrupt(file.label(), offset, what);
        let fixed = file.read(0, FIXED_BYTES, "the header")?;
        if !fixed.starts_with(MAGIC) {
            return Err(bad(0, "no VMA magic number".into()));
        }
        if u32_at(&fixed, 4) != 1 {
            return Err(Error::unsupported(file.label(), format!("VMA version {}", u32_at(&fixed, 4))));
        }
        let header_bytes = u64::from(u32_at(&fixed, 56));
        if !(FIXED_BYTES..=HEADER_BYTES_MAX).contains(&header_bytes) || !header_bytes.is_multiple_of(512) {
            return Err(bad(56, format!("a header of {header_bytes} bytes")));
        }
        let mut header = file.read(0, header_bytes, "the header")?;
        if !sum_holds(&mut header, 32) {
            return Err(bad(32, "the header's checksum is wrong".into()));
        }
        let uuid = header.get(8..).and_then(|b| b.first_chunk()).copied().unwrap_or_default();
        let devices = devices(&header).map_err(|(offset, what)| bad(offset, what))?;
        Ok(Self { file, uuid, header_bytes, devices })
    }

    /// Names of the disks, in the archive's order. A machine's saved memory is none.
    pub fn disks(&self) -> Vec<&str> {
        self.devices.iter().map(|device| device.name.as_str()).filter(|name| *name != MEMORY).collect()
    }

    /// The disk `name`; reads the header of every extent.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] if there is none; [`Error::Corrupt`], [`Error::Truncated`], [`Error::Io`].
    pub fn disk(&self, name: &str) -> Result<VmaLayer> {
        let device = self.devices.iter().find(|device| device.name == name && name != MEMORY);
        let what = || Error::ChainBroken { path: self.file.label().into(), what: format!("has no disk {name:?}") };
        VmaLayer::new(self.file.clone(), &self.uuid, self.header_bytes, device.ok_or_else(what)?)
    }
}

/// The devices of a checked header. `Err` says where a rule is broken, and which.
fn devices(header: &[u8]) -> Result<Vec<Device>, (u64, String)> {
    let (blobs, blobs_len) = (u32_at(header, 48) as usize, u32_at(header, 52) as usize);
    let blobs = blobs.checked_add(blobs_len).and_then(|end| header.get(blobs..end));
    let blobs = blobs.ok_or_else(|| (48, format!("names of {blobs_len} bytes outside the header")))?;
    let mut found: Vec<Device> = Vec::new();
    for id in 1..=255u8 {
        let at = DEVICES_AT + 32 * usize::from(id);
        let (name_at, size) = (u32_at(header, at) as usize, u64_at(header, at + 8));
        if name_at == 0 {
            continue;
        }
        let bad = |what: String| (at as u64, format!("device {id}: {what}"));
        // Lengths of blobs are the other way round than everything else.
        let len = blobs.get(name_at..).and_then(|b| b.first_chunk()).map(|b| usize::from(u16::from_le_bytes(*b)));
        let bytes = len.and_then(|len| blobs.get(name_at + 2..name_at + 2 + len));
        let bytes = bytes.ok_or_else(|| bad(format!("a name at {name_at}, outside the names")))?;
        let name = String::from_utf8_lossy(bytes.split(|b| *b == 0).next().unwrap_or_default()).into_owned();
        if name.is_empty() || found.iter().any(|device| device.name == name) {
            return Err(bad(format!("its name is {name:?}, which is empty or another one's")));
        }
        if i64::try_from(size).is_err() || !size.is_multiple_of(512) {
            return Err(bad(format!("a size of {size} bytes")));
        }
        found.push(Device { id, name, size });
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
