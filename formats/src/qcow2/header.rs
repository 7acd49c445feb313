//! The header cluster: fixed fields, feature bits, header extensions, names.
//!
//! Invariants
//! - A [`Header`] exists only if every rule below held; nobody else interprets header bytes.
//! - Names stay bytes: they are not text until somebody shows them.
//!
//! Not here: what a name leads to.

use std::{ffi::OsString, fmt, os::unix::ffi::OsStringExt};

use serde::Serialize;
use zerocopy::{
    FromBytes, Immutable, KnownLayout, Unaligned,
    byteorder::big_endian::{U32, U64},
};

use super::L1_BYTES_MAX;
use crate::{Codec, Error, Result, Storage};

const MAGIC: u32 = 0x5146_49fb;
const BACKING_NAME_MAX: u32 = 1023;
const SNAPSHOTS_MAX: u32 = 65_536;
const V2_LENGTH: u32 = 72;
const V3_LENGTH: u32 = 104;

const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = (1 << 5) - 1;
const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// The fixed fields as they lie in the file; version 2 ends after `snapshots_offset`.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U32,
    backing_offset: U64,
    backing_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_entries: U32,
    l1_offset: U64,
    refcount_offset: U64,
    refcount_clusters: U32,
    snapshot_count: U32,
    snapshots_offset: U64,
    incompatible: U64,
    compatible: U64,
    autoclear: U64,
    refcount_order: U32,
    header_length: U32,
    compression: u8,
    padding: [u8; 7],
}

const _: () = assert!(size_of::<RawHeader>() == 112);

/// A file that an image reads through to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// As the image spells it; never to be opened but through the gate.
    pub name: OsString,
    /// Format by QEMU's name, where the image says it. Without one nobody may guess from a file that
    /// a guest could write.
    pub format: Option<String>,
}

/// A file that holds the guest's bytes in place of the image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// As the image spells it; never to be opened but through the gate. `None`: the image does not
    /// say, and its user has to.
    pub name: Option<OsString>,
    /// Whether the file alone is promised to be a valid raw image of the disk.
    pub is_raw: bool,
}

/// Encoding of compressed clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

impl Compression {
    pub(super) fn codec(self) -> Codec {
        match self {
            Compression::Zlib => Codec::Deflate,
            Compression::Zstd => Codec::Zstd,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        })
    }
}

/// What a header says, for people and programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Info {
    /// 2 or 3.
    pub version: u32,
    /// Size of the active disk in bytes.
    pub size_bytes: u64,
    /// Cluster size in bytes.
    pub cluster_bytes: u64,
    /// Encoding of compressed clusters, if there are any.
    pub compression: Compression,
    /// Whether clusters are mapped in 32 parts each.
    pub extended_l2: bool,
    /// Whether reference counts may be stale (the last writer did not close the image).
    pub dirty: bool,
    /// Backing file as spelled, shown lossily.
    pub backing: Option<String>,
    /// Format of the backing file as spelled.
    pub backing_format: Option<String>,
    /// External data file as spelled, shown lossily.
    pub data_file: Option<String>,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Number of persistent dirty bitmaps, trusted or not.
    pub bitmaps: u32,
}

/// Where the bitmap directory lies.
#[derive(Clone, Debug)]
pub(super) struct BitmapDirectory {
    pub(super) count: u32,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Whether the last writer knew bitmaps and kept them up.
    pub(super) kept_up: bool,
}

/// A checked header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) size: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    pub(super) snapshot_count: u32,
    pub(super) snapshots_offset: u64,
    pub(super) compression: Compression,
    pub(super) extended_l2: bool,
    pub(super) backing: Option<Backing>,
    pub(super) data_file: Option<DataFile>,
    pub(super) bitmaps: Option<BitmapDirectory>,
    dirty: bool,
}

impl Header {
    pub(super) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn info(&self) -> Info {
        let shown = |name: &OsString| name.to_string_lossy().into_owned();
        Info {
            version: self.version,
            size_bytes: self.size,
            cluster_bytes: self.cluster_bytes(),
            compression: self.compression,
            extended_l2: self.extended_l2,
            dirty: self.dirty,
            backing: self.backing.as_ref().map(|b| shown(&b.name)),
            backing_format: self.backing.as_ref().and_then(|b| b.format.clone()),
            data_file: self.data_file.as_ref().and_then(|d| d.name.as_ref()).map(shown),
            snapshots: self.snapshot_count,
            bitmaps: self.bitmaps.as_ref().map_or(0, |b| b.count),
        }
    }

    /// Reads the header of a file of `len` bytes.
    pub(super) fn read(storage: &dyn Storage, len: u64) -> Result<Self> {
        let path = storage.label();
        let mut head = [0u8; size_of::<RawHeader>()];
        let present = usize::try_from(len).unwrap_or(usize::MAX).min(head.len());
        let part = head.get_mut(..present).unwrap_or_default();
        storage.read_at(0, part).map_err(|e| Error::io(path, "read", 0, e))?;
        let bad = |offset: u64, what: String| Error::corrupt(path, offset, what);
        let short = |need: u32| Error::Truncated { path: path.into(), len, need: need.into(), what: "header".into() };

        let (raw, _) = RawHeader::read_from_prefix(&head).map_err(|_| short(V2_LENGTH))?;
        if raw.magic.get() != MAGIC {
            return Err(bad(0, "no qcow2 magic number".into()));
        }
        let version = raw.version.get();
        let length = match version {
            2 => V2_LENGTH,
            3 => raw.header_length.get(),
            _ => return Err(Error::unsupported(path, format!("qcow2 version {version}"))),
        };
        if len < u64::from(length) {
            return Err(short(length));
        }
        let cluster_bits = raw.cluster_bits.get();
        if !(9..=21).contains(&cluster_bits) {
            return Err(bad(20, format!("cluster_bits is {cluster_bits}, not within 9 to 21")));
        }
        if version == 3 && (length < V3_LENGTH || !length.is_multiple_of(8) || length >> cluster_bits != 0) {
            return Err(bad(100, format!("header_length is {length}")));
        }
        let fields = Fields { raw: &raw, version, length, path };
        let features = fields.features()?;
        fields.places()?;
        let extensions = Extensions::read(storage, len, &fields)?;
        let backing = fields.backing(storage, &extensions)?;
        Ok(Self {
            version,
            cluster_bits,
            size: raw.size.get(),
            l1_offset: raw.l1_offset.get(),
            l1_entries: raw.l1_entries.get(),
            snapshot_count: raw.snapshot_count.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            compression: features.compression,
            extended_l2: features.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0,
            dirty: features.incompatible & INCOMPATIBLE_DIRTY != 0,
            backing,
            data_file: (features.incompatible & INCOMPATIBLE_DATA_FILE != 0).then(|| DataFile {
                name: extensions.data_file.map(OsString::from_vec),
                is_raw: features.autoclear & AUTOCLEAR_RAW_DATA != 0,
            }),
            bitmaps: extensions
                .bitmaps
                .map(|b| BitmapDirectory { kept_up: features.autoclear & AUTOCLEAR_BITMAPS != 0, ..b }),
        })
    }
}

/// Header fields on their way to be checked.
struct Fields<'a> {
    raw: &'a RawHeader,
    version: u32,
    length: u32,
    path: &'a str,
}

struct Features {
    incompatible: u64,
    autoclear: u64,
    compression: Compression,
}

impl Fields<'_> {
    fn bad(&self, offset: u64, what: impl Into<String>) -> Error {
        Error::corrupt(self.path, offset, what)
    }

    fn features(&self) -> Result<Features> {
        let raw = self.raw;
        let (incompatible, autoclear) =
            if self.version == 2 { (0, 0) } else { (raw.incompatible.get(), raw.autoclear.get()) };
        let unknown = incompatible & !INCOMPATIBLE_KNOWN;
        if unknown != 0 {
            let what = format!("unknown incompatible qcow2 feature, bit {}", unknown.trailing_zeros());
            return Err(Error::unsupported(self.path, what));
        }
        if incompatible & INCOMPATIBLE_CORRUPT != 0 {
            return Err(self.bad(72, "the image is marked corrupt by the program that wrote it"));
        }
        match raw.crypt_method.get() {
            0 => {}
            1 => return Err(Error::unsupported(self.path, "AES encryption of qcow2")),
            2 => return Err(Error::unsupported(self.path, "LUKS encryption of qcow2")),
            other => return Err(self.bad(32, format!("crypt_method is {other}"))),
        }
        let stored = if self.length > V3_LENGTH { raw.compression } else { 0 };
        let compression = match (stored, incompatible & INCOMPATIBLE_COMPRESSION != 0) {
            (0, false) => Compression::Zlib,
            (1, true) => Compression::Zstd,
            (0 | 1, _) => return Err(self.bad(104, "compression type and its feature bit contradict each other")),
            (other, _) => return Err(Error::unsupported(self.path, format!("qcow2 compression type {other}"))),
        };
        if incompatible & INCOMPATIBLE_EXTENDED_L2 != 0 && raw.cluster_bits.get() < 14 {
            return Err(self.bad(20, "extended L2 entries need clusters of 16 KiB or more"));
        }
        Ok(Features { incompatible, autoclear, compression })
    }

    /// Sizes and offsets that lead out of the header.
    fn places(&self) -> Result<()> {
        let raw = self.raw;
        let cluster_mask = (1u64 << raw.cluster_bits.get()) - 1;
        if raw.size.get() > i64::MAX.cast_unsigned() {
            return Err(self.bad(24, format!("the disk's size is {}", raw.size)));
        }
        if u64::from(raw.l1_entries.get()) * 8 > L1_BYTES_MAX {
            return Err(self.bad(36, format!("an L1 table of {} entries", raw.l1_entries)));
        }
        if raw.l1_offset.get() & cluster_mask != 0 {
            return Err(self.bad(40, format!("the L1 table's offset {} is not cluster aligned", raw.l1_offset)));
        }
        if raw.snapshot_count.get() > SNAPSHOTS_MAX {
            return Err(self.bad(60, format!("{} snapshots", raw.snapshot_count)));
        }
        if raw.snapshot_count.get() > 0 && raw.snapshots_offset.get() & cluster_mask != 0 {
            return Err(self.bad(64, format!("the snapshot table's offset {} is not aligned", raw.snapshots_offset)));
        }
        Ok(())
    }

    /// Where the header extensions have to end: at the backing file's name, or with the cluster.
    fn extensions_end(&self) -> u64 {
        match self.raw.backing_offset.get() {
            0 => 1 << self.raw.cluster_bits.get(),
            name => name.min(1 << self.raw.cluster_bits.get()),
        }
    }

    fn backing(&self, storage: &dyn Storage, extensions: &Extensions) -> Result<Option<Backing>> {
        let (offset, size) = (self.raw.backing_offset.get(), self.raw.backing_size.get());
        if offset == 0 || size == 0 {
            return Ok(None);
        }
        let cluster = 1u64 << self.raw.cluster_bits.get();
        let inside = offset.checked_add(size.into()).is_some_and(|end| end <= cluster);
        if size > BACKING_NAME_MAX || offset < self.length.into() || !inside {
            return Err(self.bad(8, format!("a backing file name of {size} bytes at {offset}")));
        }
        let mut name = vec![0; usize::try_from(size).unwrap_or_default()];
        storage.read_at(offset, &mut name).map_err(|e| Error::io(self.path, "read", offset, e))?;
        let format = extensions.backing_format.as_ref().map(|f| String::from_utf8_lossy(f).into_owned());
        Ok(Some(Backing { name: OsString::from_vec(name), format }))
    }
}

/// The header extensions that matter for reading.
#[derive(Default)]
struct Extensions {
    backing_format: Option<Vec<u8>>,
    data_file: Option<Vec<u8>>,
    bitmaps: Option<BitmapDirectory>,
}

impl Extensions {
    /// Every turn of the loop moves on by at least the eight bytes of an extension's head.
    fn read(storage: &dyn Storage, len: u64, fields: &Fields<'_>) -> Result<Self> {
        let start = u64::from(fields.length);
        let end = fields.extensions_end().min(len);
        let mut area = vec![0; usize::try_from(end.saturating_sub(start)).unwrap_or_default()];
        storage.read_at(start, &mut area).map_err(|e| Error::io(fields.path, "read", start, e))?;
        let mut found = Self::default();
        let mut rest = area.as_slice();
        while let Some((kind, size, body)) = split_head(rest) {
            if kind == EXTENSION_END {
                break;
            }
            let at = start + (area.len() - rest.len()) as u64;
            let bad = |what: String| fields.bad(at, format!("header extension {kind:#x}: {what}"));
            let size = usize::try_from(size).unwrap_or(usize::MAX);
            let data = body.get(..size).ok_or_else(|| bad(format!("{size} bytes reach past its area")))?;
            let again = match kind {
                EXTENSION_BACKING_FORMAT => found.backing_format.replace(data.to_vec()).is_some(),
                EXTENSION_DATA_FILE => found.data_file.replace(data.to_vec()).is_some(),
                EXTENSION_BITMAPS => {
                    let directory = directory(data).ok_or_else(|| bad(format!("{size} bytes, or no bitmaps")))?;
                    found.bitmaps.replace(directory).is_some()
                }
                _ => false,
            };
            if again {
                return Err(bad("given twice".into()));
            }
            rest = body.get(size.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(found)
    }
}

/// Kind, length and what follows.
fn split_head(bytes: &[u8]) -> Option<(u32, u32, &[u8])> {
    let (kind, rest) = U32::read_from_prefix(bytes).ok()?;
    let (size, rest) = U32::read_from_prefix(rest).ok()?;
    Some((kind.get(), size.get(), rest))
}

fn directory(data: &[u8]) -> Option<BitmapDirectory> {
    #[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
    #[repr(C)]
    struct Raw {
        count: U32,
        reserved: U32,
        len: U64,
        offset: U64,
    }
    let raw = Raw::read_from_bytes(data).ok()?;
    (raw.count.get() > 0).then(|| BitmapDirectory {
        count: raw.count.get(),
        offset: raw.offset.get(),
        len: raw.len.get(),
        kept_up: false,
    })
}
