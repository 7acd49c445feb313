//! Which format a file has, told by its first bytes.
//!
//! Invariants
//! - [`Format::Raw`] is never an answer: any bytes are a valid raw image, so `raw` is only what
//!   somebody named. An unknown file stays unknown.
//! - Only the head of the file is looked at. A trailer (a fixed VHD's footer) lies where a guest can
//!   write and proves nothing.
//! - Nothing else is opened.
//!
//! Not here: whether probing is allowed. A disk that a guest could write must never be probed
//! (its owner could forge a header); callers take the format from their own record instead.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{Error, Result, Storage};

/// A disk image or backup file format, by the name people type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Byte for byte; never probed.
    Raw,
    /// QEMU copy-on-write, versions 2 and 3.
    Qcow2,
    /// The native layer.
    Aql,
    /// VMware disk, sparse extent or descriptor.
    Vmdk,
    /// Hyper-V disk, second generation.
    Vhdx,
    /// Virtual PC and Hyper-V disk, first generation (`vpc` to QEMU).
    Vhd,
    /// VirtualBox disk.
    Vdi,
    /// Machine export: a tar file of VMDKs and their description.
    Ova,
    /// Proxmox VE backup archive.
    Vma,
    /// Proxmox Backup Server fixed index.
    Fidx,
    /// Veeam backup file: a full (`.vbk`) or an increment (`.vib`).
    Vbk,
    /// Stream of virtnbdbackup.
    Virtnbdbackup,
    /// Machine export of XenServer and XCP-ng.
    Xva,
    /// Point of a Xen Orchestra remote, or a disk of it: a VHD whose parts are files of a folder.
    Xo,
    /// Backup in a backup store of Longhorn.
    Longhorn,
    /// Version in a storage of Benji, or an export of versions.
    Benji,
}

/// Longest head any magic below needs, in bytes.
const HEAD_BYTES: usize = 512;

/// First eight bytes of a native layer: a high bit, the name, a line ending that text transfers
/// would damage, an end-of-file mark.
pub const AQL_MAGIC: [u8; 8] = *b"\x89AQL\r\n\x1a\n";

/// A magic number: format, offset in the head, bytes.
static MAGICS: [(Format, usize, &[u8]); 16] = [
    (Format::Aql, 0, &AQL_MAGIC),
    (Format::Qcow2, 0, b"QFI\xfb\0\0\0\x02"),
    (Format::Qcow2, 0, b"QFI\xfb\0\0\0\x03"),
    (Format::Vmdk, 0, b"KDMV"),
    (Format::Vmdk, 0, b"COWD"),
    (Format::Vmdk, 0, b"# Disk DescriptorFile"),
    (Format::Vmdk, 0, b"\xbe\xba\xfe\xca\0\0\0\0"),
    (Format::Vhdx, 0, b"vhdxfile"),
    (Format::Vhd, 0, b"conectix"),
    (Format::Vdi, 64, b"\x7f\x10\xda\xbe"),
    // A tar file as well: this one first.
    (Format::Xva, 0, b"ova.xml\0"),
    (Format::Ova, 257, b"ustar"),
    (Format::Vma, 0, b"VMA\0"),
    (Format::Fidx, 0, b"\x2f\x7f\x41\xed\x91\xfd\x0f\xcd"),
    (Format::Vbk, 4, b"\x01\0\0\0\x03\0\0\0md5\0"),
    (Format::Virtnbdbackup, 0, b"meta 0000000000000000 "),
];

impl Format {
    /// Every format, in the order messages list them.
    pub const ALL: [Format; 16] = [
        Format::Raw,
        Format::Qcow2,
        Format::Aql,
        Format::Vmdk,
        Format::Vhdx,
        Format::Vhd,
        Format::Vdi,
        Format::Ova,
        Format::Vma,
        Format::Fidx,
        Format::Vbk,
        Format::Virtnbdbackup,
        Format::Xva,
        Format::Xo,
        Format::Longhorn,
        Format::Benji,
    ];

    /// The name people type.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Aql => "aql",
            Format::Vmdk => "vmdk",
            Format::Vhdx => "vhdx",
            Format::Vhd => "vhd",
            Format::Vdi => "vdi",
            Format::Ova => "ova",
            Format::Vma => "vma",
            Format::Fidx => "fidx",
            Format::Vbk => "vbk",
            Format::Virtnbdbackup => "virtnbdbackup",
            Format::Xva => "xva",
            Format::Xo => "xo",
            Format::Longhorn => "longhorn",
            Format::Benji => "benji",
        }
    }

    /// The format whose magic number starts `head`, if any. Never [`Format::Raw`].
    pub fn of_head(head: &[u8]) -> Option<Format> {
        let starts = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|tail| tail.starts_with(magic));
        let known = MAGICS.iter().find(|(_, at, magic)| starts(*at, magic)).map(|(format, _, _)| *format);
        known.or_else(|| of_text(head))
    }
}

/// Documents have no magic number, but their writers put the same words first.
fn of_text(head: &[u8]) -> Option<Format> {
    let says = |word: &str| head.windows(word.len()).any(|part| part == word.as_bytes());
    if head.starts_with(b"{\"Name\":") && says("\"VolumeName\":") {
        return Some(Format::Longhorn);
    }
    if head.starts_with(b"{\"metadata_version\":") && says("\"versions\":[") {
        return Some(Format::Benji);
    }
    if head.starts_with(b"{") && (says("\"isVhdDifferencing\":") || says("\"jobId\":") && says("\"mode\":")) {
        return Some(Format::Xo);
    }
    // The path of a folder, shorter than any head.
    let path = head.trim_ascii_end();
    let is_plain = |byte: &u8| byte.is_ascii_graphic() || *byte == b' ';
    (head.len() < HEAD_BYTES && path.ends_with(b".vhd") && path.iter().all(is_plain)).then_some(Format::Xo)
}

/// The program that takes off the wrapping which `head` begins with, where it is a known one. A wrapped
/// file has no random access, whatever is inside.
pub fn wrapping(head: &[u8]) -> Option<&'static str> {
    let known: [(&[u8], &str); 5] = [
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x1f\x8b", "gzip"),
        (&crate::lzop::MAGIC, "lzop"),
        (b"\xfd7zXZ\0", "xz"),
        (b"BZh", "bzip2"),
    ];
    known.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, program)| *program)
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A word that names no format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown disk format {0:?}")]
pub struct UnknownFormat(pub String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(word: &str) -> Result<Self, UnknownFormat> {
        let known = if word == "vpc" { "vhd" } else { word };
        Format::ALL.into_iter().find(|f| f.name() == known).ok_or_else(|| UnknownFormat(word.into()))
    }
}

/// Looks at the head of `storage`. `None` means no format this crate knows by name, which may well
/// be a raw image, but nobody may conclude that from here.
///
/// # Errors
/// [`Error::Io`] if the head cannot be read.
pub fn probe(storage: &dyn Storage) -> Result<Option<Format>> {
    Ok(Format::of_head(&head(storage)?))
}

/// The first bytes of `storage`, as many as any magic number needs.
///
/// # Errors
/// [`Error::Io`] if they cannot be read.
pub fn head(storage: &dyn Storage) -> Result<Vec<u8>> {
    let failed = |e| Error::io(storage.label(), "read", 0, e);
    let len = usize::try_from(storage.len().map_err(failed)?).unwrap_or(HEAD_BYTES);
    let mut head = vec![0; len.min(HEAD_BYTES)];
    storage.read_at(0, &mut head).map_err(failed)?;
    Ok(head)
}

#[cfg(test)]
mod tests;
