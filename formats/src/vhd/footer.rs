//! The footer, and the dynamic header of disks that have a block table.
//!
//! Invariants
//! - A [`Footer`] and a [`Dynamic`] exist only if their checksum and every rule below held.
//! - The footer at the end counts; the copy at the start stands in where that one is damaged.

use std::ffi::OsString;

use zerocopy::{
    FromBytes, Immutable, KnownLayout, Unaligned,
    byteorder::big_endian::{U16, U32, U64},
};

use crate::{Error, Result, SECTOR_BYTES, tables::TableFile};

const FOOTER_BYTES: u64 = 512;
/// Virtual PC before 2004 wrote one byte less.
const OLD_FOOTER_BYTES: u64 = 511;
const DYNAMIC_BYTES: u64 = 1024;
const VERSION: u32 = 0x1_0000;
/// Longest name of a parent, in bytes.
const NAME_BYTES_MAX: u32 = 64 << 10;
/// Largest disk: a block table has 32-bit sectors.
const SIZE_MAX: u64 = (1 << 32) * SECTOR_BYTES;
/// Cylinders, heads and sectors of any disk of 127 GiB or more.
const CHS_MAX: u64 = 65_535 * 16 * 255 * SECTOR_BYTES;

/// Writers whose size is the current size.
const BY_SIZE: [&[u8; 4]; 7] = [b"win ", b"d2v ", b"tap\0", b"qem2", b"CTXS", b"wa\0\0", b"xo  "];
/// Writers whose size is what cylinders, heads and sectors make.
const BY_CHS: [&[u8; 4]; 3] = [b"vpc ", b"vs  ", b"qemu"];

/// How a disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Byte for byte.
    Fixed,
    /// Blocks that were written, found by a table.
    Dynamic,
    /// Sectors that differ from a parent.
    Differencing,
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFooter {
    cookie: [u8; 8],
    features: U32,
    version: U32,
    data_offset: U64,
    timestamp: U32,
    creator: [u8; 4],
    creator_version: U32,
    creator_os: [u8; 4],
    original_size: U64,
    current_size: U64,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    kind: U32,
    checksum: U32,
    id: [u8; 16],
    saved: u8,
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Locator {
    code: [u8; 4],
    space: U32,
    len: U32,
    reserved: U32,
    offset: U64,
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDynamic {
    cookie: [u8; 8],
    data_offset: U64,
    table_offset: U64,
    version: U32,
    entries: U32,
    block_bytes: U32,
    checksum: U32,
    parent_id: [u8; 16],
    parent_timestamp: U32,
    reserved: U32,
    parent_name: [u8; 512],
    locators: [Locator; 8],
}

const _: () = assert!(size_of::<RawDynamic>() == 768);

/// What a footer says.
#[derive(Clone, Debug)]
pub(crate) struct Footer {
    pub(crate) kind: Kind,
    pub(crate) size: u64,
    pub(crate) id: [u8; 16],
    dynamic_at: u64,
}

/// Ones' complement of the sum of all bytes but the four at `at`.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = |part: &[u8]| part.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    let own = bytes.get(at..at.saturating_add(4)).unwrap_or_default();
    !sum(bytes).wrapping_sub(sum(own))
}

impl Footer {
    pub(crate) fn read(file: &TableFile) -> Result<Self> {
        let mut places = vec![(file.len.saturating_sub(FOOTER_BYTES), FOOTER_BYTES)];
        places.push((file.len.saturating_sub(OLD_FOOTER_BYTES), OLD_FOOTER_BYTES));
        places.push((0, FOOTER_BYTES));
        for (at, len) in places {
            if file.len < len {
                continue;
            }
            let bytes = file.read(at, len, "the footer")?;
            if let Some(footer) = Self::parse(&bytes, file.label(), at)? {
                // The copy is no proof that a fixed disk is one: a guest could have written it.
                if at == 0 && footer.kind == Kind::Fixed {
                    continue;
                }
                return Ok(footer);
            }
        }
        let at = file.len.saturating_sub(FOOTER_BYTES);
        Err(Error::corrupt(file.label(), at, "no valid VHD footer, and no copy of it at the start"))
    }

    /// The footer that `bytes` are; `None` where they are none, or its checksum does not hold.
    pub(crate) fn parse(bytes: &[u8], label: &str, at: u64) -> Result<Option<Self>> {
        let Ok((raw, _)) = RawFooter::read_from_prefix(bytes) else { return Ok(None) };
        if raw.cookie != *b"conectix" || raw.checksum.get() != checksum(bytes, 64) {
            return Ok(None);
        }
        Self::of(&raw, label, at).map(Some)
    }

    fn of(raw: &RawFooter, label: &str, at: u64) -> Result<Self> {
        if raw.version.get() != VERSION {
            return Err(Error::unsupported(label, format!("VHD version {:#x}", raw.version)));
        }
        let kind = match raw.kind.get() {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => Kind::Differencing,
            other => return Err(Error::unsupported(label, format!("VHD disk type {other}"))),
        };
        let size = size_of_disk(raw, label)?;
        if size == 0 || size > SIZE_MAX || !size.is_multiple_of(SECTOR_BYTES) {
            return Err(Error::corrupt(label, at + 48, format!("a disk of {size} bytes")));
        }
        Ok(Self { kind, size, id: raw.id, dynamic_at: raw.data_offset.get() })
    }
}

/// Which of the two sizes counts.
fn size_of_disk(raw: &RawFooter, label: &str) -> Result<u64> {
    let current = raw.current_size.get();
    let sectors = u64::from(raw.cylinders.get()) * u64::from(raw.heads) * u64::from(raw.sectors);
    let chs = sectors * SECTOR_BYTES;
    if chs == current || chs == CHS_MAX || BY_SIZE.contains(&&raw.creator) {
        return Ok(current);
    }
    if BY_CHS.contains(&&raw.creator) {
        return Ok(chs);
    }
    let creator = String::from_utf8_lossy(&raw.creator).into_owned();
    let what = format!("a VHD by {creator:?} with two sizes, {current} and {chs} bytes: which one counts is not known");
    Err(Error::unsupported(label, what))
}

/// The file a disk falls back to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    names: Vec<OsString>,
    pub(crate) id: [u8; 16],
}

impl Parent {
    /// Names to try, in order: beside the disk first, then as the disk spells them.
    pub fn names(&self) -> &[OsString] {
        &self.names
    }
}

/// What a dynamic header says.
#[derive(Clone, Debug)]
pub(crate) struct Dynamic {
    pub(crate) table_at: u64,
    pub(crate) entries: u64,
    pub(crate) block_bytes: u64,
    pub(crate) parent: Option<Parent>,
}

impl Dynamic {
    pub(crate) fn read(file: &TableFile, footer: &Footer, kind: Kind) -> Result<Self> {
        let bytes = file.read(footer.dynamic_at, DYNAMIC_BYTES, "the dynamic header")?;
        let dynamic = Self::parse(&bytes, file.label(), footer, kind, |raw| names(raw, file))?;
        file.check_inside(dynamic.table_at, dynamic.entries * 4, "the block table")?;
        Ok(dynamic)
    }

    /// The header that `bytes` are; what a parent is called is asked of `names`.
    fn parse(
        bytes: &[u8],
        label: &str,
        footer: &Footer,
        kind: Kind,
        names: impl FnOnce(&RawDynamic) -> Result<Vec<OsString>>,
    ) -> Result<Self> {
        let bad = |what: String| Error::corrupt(label, footer.dynamic_at, format!("dynamic header: {what}"));
        let (raw, _) = RawDynamic::read_from_prefix(bytes).map_err(|_| bad("cut".into()))?;
        if raw.cookie != *b"cxsparse" || raw.checksum.get() != checksum(bytes, 36) {
            return Err(bad("no signature, or its checksum is wrong".into()));
        }
        if raw.version.get() != VERSION {
            return Err(Error::unsupported(label, format!("dynamic header version {:#x}", raw.version)));
        }
        let (entries, block_bytes) = (u64::from(raw.entries.get()), u64::from(raw.block_bytes.get()));
        if !block_bytes.is_power_of_two() || !(4096..=256 << 20).contains(&block_bytes) {
            return Err(bad(format!("blocks of {block_bytes} bytes")));
        }
        if entries < footer.size.div_ceil(block_bytes) {
            return Err(bad(format!("{entries} blocks of {block_bytes} bytes for a disk of {}", footer.size)));
        }
        let parent = match kind {
            Kind::Differencing => Some(Parent { names: names(&raw)?, id: raw.parent_id }),
            Kind::Fixed | Kind::Dynamic => None,
        };
        let entries = footer.size.div_ceil(block_bytes);
        Ok(Self { table_at: raw.table_offset.get(), entries, block_bytes, parent })
    }

    /// The header of a disk whose parts are files: its parent is only what the header itself calls it.
    pub(crate) fn alone(bytes: &[u8], label: &str, footer: &Footer, kind: Kind) -> Result<Self> {
        Self::parse(bytes, label, footer, kind, |raw| Ok(crate::vhdx::names(None, Some(&plain_name(raw)))))
    }
}

/// What the header itself calls the parent.
fn plain_name(raw: &RawDynamic) -> String {
    let (units, _) = raw.parent_name.as_chunks::<2>();
    text(units.iter().map(|unit| u16::from_be_bytes(*unit)))
}

/// What the parent is called, by the locators and by the header.
fn names(raw: &RawDynamic, file: &TableFile) -> Result<Vec<OsString>> {
    let (mut relative, mut absolute) = (None, None);
    for locator in &raw.locators {
        let place = match &locator.code {
            b"W2ru" => &mut relative,
            b"W2ku" => &mut absolute,
            _ => continue,
        };
        let len = locator.len.get();
        if len > NAME_BYTES_MAX {
            return Err(Error::corrupt(file.label(), locator.offset.get(), format!("a parent's name of {len} bytes")));
        }
        let bytes = file.read(locator.offset.get(), len.into(), "a parent's name")?;
        let (units, _) = bytes.as_chunks::<2>();
        *place = Some(text(units.iter().map(|unit| u16::from_le_bytes(*unit))));
    }
    let mut names = crate::vhdx::names(relative.as_deref(), absolute.as_deref());
    for name in crate::vhdx::names(None, Some(&plain_name(raw))) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

/// UTF-16 up to its first zero.
fn text(units: impl Iterator<Item = u16>) -> String {
    let units = units.take_while(|unit| *unit != 0);
    char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}
