//! The fixed areas: headers, region table, metadata.
//!
//! Invariants
//! - Nothing of a structure is used before its checksum held; of the two headers the newer valid one counts.
//! - A region or a piece of metadata that is required and not known refuses the file.
//! - GUIDs stay bytes as they lie in the file; only messages and names spell them.

use std::ffi::OsString;

use zerocopy::{
    FromBytes, Immutable, KnownLayout, Unaligned,
    byteorder::little_endian::{U16, U32, U64},
};

use crate::{Error, Result, tables::TableFile};

/// A GUID as it is stored: the first three parts little-endian.
pub(super) type Guid = [u8; 16];

const HEADER_PLACES: [u64; 2] = [0x1_0000, 0x2_0000];
const REGION_PLACES: [u64; 2] = [0x3_0000, 0x4_0000];
const AREA_BYTES: u64 = 0x1_0000;
const ENTRIES_MAX: u32 = 2047;
/// First byte of a region, and the unit of their offsets.
pub(super) const REGION_UNIT: u64 = 1 << 20;
/// Largest disk of the format, in bytes.
const SIZE_MAX: u64 = 64 << 40;
/// Largest parent locator, in bytes.
const LOCATOR_BYTES_MAX: u32 = 64 << 10;

const BAT: Guid = guid(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
const METADATA: Guid = guid(0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e);
const FILE_PARAMETERS: Guid = guid(0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b);
const DISK_SIZE: Guid = guid(0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8);
const LOGICAL_SECTOR: Guid = guid(0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f);
const PHYSICAL_SECTOR: Guid = guid(0xcda3_48c7_445d_4471_9cc9_e988_5251_c556);
const DISK_ID: Guid = guid(0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746);
const PARENT_LOCATOR: Guid = guid(0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c);
const LOCATOR_TYPE: Guid = guid(0xb04a_efb7_d19e_4a81_b789_25b8_e944_5913);

/// The stored form of a GUID as it is spelled.
const fn guid(spelled: u128) -> Guid {
    let [a, b, c, d, e, f, g, h, rest @ ..] = spelled.to_be_bytes();
    let [i, j, k, l, m, n, o, p] = rest;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

/// `{ff34003b-11ed-4cf8-a166-b2be05e20b80}`, without the braces.
pub(super) fn spelled(guid: &Guid) -> String {
    uuid::Uuid::from_bytes_le(*guid).to_string()
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    signature: [u8; 4],
    checksum: U32,
    sequence: U64,
    file_write: Guid,
    data_write: Guid,
    log: Guid,
    log_version: U16,
    version: U16,
    log_length: U32,
    log_offset: U64,
}

/// What the newest header says.
#[derive(Clone, Debug)]
pub(super) struct Header {
    /// Changes whenever what the disk shows is changed; a child records it.
    pub(super) data_write: Guid,
    /// All zero where the log is empty.
    pub(super) log: Guid,
    pub(super) log_offset: u64,
    pub(super) log_length: u64,
}

/// CRC-32C of `bytes` with the four bytes at `at` taken as zeros.
pub(super) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let head = crc32c::crc32c(bytes.get(..at).unwrap_or_default());
    let head = crc32c::crc32c_append(head, &[0; 4]);
    crc32c::crc32c_append(head, bytes.get(at.saturating_add(4)..).unwrap_or_default())
}

impl Header {
    /// The newer one of the two that are valid.
    pub(super) fn newest(file: &TableFile) -> Result<Self> {
        let mut newest: Option<(u64, Header)> = None;
        let mut refused = None;
        for place in HEADER_PLACES {
            match Self::at(file, place) {
                Ok(Some((sequence, header))) => {
                    if newest.as_ref().is_none_or(|(known, _)| *known < sequence) {
                        newest = Some((sequence, header));
                    }
                }
                Ok(None) => {}
                Err(error @ (Error::Io { .. } | Error::Unsupported { .. })) => refused = Some(error),
                Err(_) => {}
            }
        }
        match (newest, refused) {
            (Some((_, header)), _) => Ok(header),
            (None, Some(error)) => Err(error),
            (None, None) => Err(Error::corrupt(file.label(), HEADER_PLACES[0], "neither header is valid")),
        }
    }

    /// The header at `place`, if its checksum holds.
    fn at(file: &TableFile, place: u64) -> Result<Option<(u64, Self)>> {
        let bytes = file.read(place, 4096, "a header")?;
        let Ok((raw, _)) = RawHeader::read_from_prefix(&bytes) else { return Ok(None) };
        if raw.signature != *b"head" || raw.checksum.get() != checksum(&bytes, 4) {
            return Ok(None);
        }
        if raw.version.get() != 1 || raw.log_version.get() != 0 {
            let what = format!("VHDX version {} with log version {}", raw.version, raw.log_version);
            return Err(Error::unsupported(file.label(), what));
        }
        let header = Self {
            data_write: raw.data_write,
            log: raw.log,
            log_offset: raw.log_offset.get(),
            log_length: raw.log_length.get().into(),
        };
        Ok(Some((raw.sequence.get(), header)))
    }
}

/// Where a region lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// The regions that reading needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Regions {
    pub(super) bat: Region,
    pub(super) metadata: Region,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

fn guid_at(bytes: &[u8], at: usize) -> Guid {
    bytes.get(at..).and_then(|b| b.first_chunk()).copied().unwrap_or_default()
}

impl Regions {
    /// From the first of the two tables whose checksum holds; they say the same.
    pub(super) fn read(file: &TableFile) -> Result<Self> {
        for place in REGION_PLACES {
            let bytes = file.read(place, AREA_BYTES, "a region table")?;
            if bytes.starts_with(b"regi") && u32_at(&bytes, 4) == checksum(&bytes, 4) {
                return Self::parse(file, &bytes, place);
            }
        }
        Err(Error::corrupt(file.label(), REGION_PLACES[0], "neither region table is valid"))
    }

    fn parse(file: &TableFile, bytes: &[u8], place: u64) -> Result<Self> {
        let bad = |what: String| Error::corrupt(file.label(), place, format!("region table: {what}"));
        let count = u32_at(bytes, 8);
        if count > ENTRIES_MAX {
            return Err(bad(format!("{count} entries")));
        }
        let (mut bat, mut metadata) = (None, None);
        for entry in bytes.get(16..).unwrap_or_default().chunks_exact(32).take(usize::try_from(count).unwrap_or(0)) {
            let (id, region) = (guid_at(entry, 0), Region { offset: u64_at(entry, 16), len: u32_at(entry, 24).into() });
            let known = match id {
                BAT => bat.replace(region).is_some(),
                METADATA => metadata.replace(region).is_some(),
                _ if u32_at(entry, 28) & 1 == 0 => continue,
                _ => return Err(Error::unsupported(file.label(), format!("a required region {}", spelled(&id)))),
            };
            if known {
                return Err(bad(format!("region {} is given twice", spelled(&id))));
            }
            if region.offset < REGION_UNIT || !region.offset.is_multiple_of(REGION_UNIT) {
                return Err(bad(format!("region {} at {}", spelled(&id), region.offset)));
            }
        }
        match (bat, metadata) {
            (Some(bat), Some(metadata)) => Ok(Self { bat, metadata }),
            _ => Err(bad("the block table or the metadata is missing".into())),
        }
    }
}

/// The file a disk falls back to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    names: Vec<OsString>,
    pub(super) linkage: Vec<Guid>,
}

impl Parent {
    /// Names to try, in order: the last part of the relative path beside the disk, that path as it
    /// stands, the last part of the absolute one.
    pub fn names(&self) -> &[OsString] {
        &self.names
    }
}

/// The disk's geometry and parent.
#[derive(Clone, Debug)]
pub(super) struct Metadata {
    pub(super) block_bytes: u64,
    pub(super) sector_bytes: u64,
    pub(super) size: u64,
    pub(super) disk_id: Guid,
    pub(super) parent: Option<Parent>,
}

/// The items of a metadata region.
#[derive(Default)]
struct Items {
    parameters: Option<Vec<u8>>,
    size: Option<Vec<u8>>,
    logical: Option<Vec<u8>>,
    disk_id: Option<Vec<u8>>,
    locator: Option<(u64, Vec<u8>)>,
}

impl Metadata {
    pub(super) fn read(file: &TableFile, region: Region) -> Result<Self> {
        let bad = |what: String| Error::corrupt(file.label(), region.offset, format!("metadata: {what}"));
        let items = Items::read(file, region)?;
        let missing = |what: &str| bad(format!("{what} is missing"));
        let parameters = items.parameters.ok_or_else(|| missing("the block size"))?;
        let (block, flags) = (u32_at(&parameters, 0), u32_at(&parameters, 4));
        let sector = u32_at(&items.logical.ok_or_else(|| missing("the sector size"))?, 0);
        let size = u64_at(&items.size.ok_or_else(|| missing("the disk's size"))?, 0);
        if !block.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block) {
            return Err(bad(format!("blocks of {block} bytes")));
        }
        if sector != 512 && sector != 4096 {
            return Err(bad(format!("sectors of {sector} bytes")));
        }
        if size == 0 || size > SIZE_MAX || !size.is_multiple_of(sector.into()) {
            return Err(bad(format!("a disk of {size} bytes")));
        }
        let parent = match (flags & 2 != 0, items.locator) {
            (false, _) => None,
            (true, None) => return Err(missing("the parent's locator")),
            (true, Some((at, locator))) => Some(locate(file, at, &locator)?),
        };
        let disk_id = items.disk_id.map_or([0; 16], |bytes| guid_at(&bytes, 0));
        Ok(Self { block_bytes: block.into(), sector_bytes: sector.into(), size, disk_id, parent })
    }
}

impl Items {
    fn read(file: &TableFile, region: Region) -> Result<Self> {
        let bad = |what: String| Error::corrupt(file.label(), region.offset, format!("metadata: {what}"));
        let table = file.read(region.offset, AREA_BYTES, "the metadata table")?;
        let count = table.get(10..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b));
        if !table.starts_with(b"metadata") || u32::from(count) > ENTRIES_MAX {
            return Err(bad(format!("no signature, or {count} entries")));
        }
        let mut items = Self::default();
        for entry in table.get(32..).unwrap_or_default().chunks_exact(32).take(count.into()) {
            let (id, offset, len, flags) = (guid_at(entry, 0), u32_at(entry, 16), u32_at(entry, 20), u32_at(entry, 24));
            let value = |len_min: u32, len_max: u32| {
                let inside = u64::from(offset) >= AREA_BYTES && u64::from(offset) + u64::from(len) <= region.len;
                if !inside || !(len_min..=len_max).contains(&len) {
                    return Err(bad(format!("item {} of {len} bytes at {offset}", spelled(&id))));
                }
                let at = region.offset.saturating_add(offset.into());
                Ok((at, file.read(at, len.into(), "an item of metadata")?))
            };
            let again = match id {
                FILE_PARAMETERS => items.parameters.replace(value(8, 8)?.1).is_some(),
                DISK_SIZE => items.size.replace(value(8, 8)?.1).is_some(),
                LOGICAL_SECTOR => items.logical.replace(value(4, 4)?.1).is_some(),
                DISK_ID => items.disk_id.replace(value(16, 16)?.1).is_some(),
                PARENT_LOCATOR => items.locator.replace(value(20, LOCATOR_BYTES_MAX)?).is_some(),
                PHYSICAL_SECTOR => false,
                _ if flags & 4 == 0 => false,
                _ => return Err(Error::unsupported(file.label(), format!("required metadata {}", spelled(&id)))),
            };
            if again {
                return Err(bad(format!("item {} is given twice", spelled(&id))));
            }
        }
        Ok(items)
    }
}

/// Reads a parent locator, which lies at `at` of the file.
fn locate(file: &TableFile, at: u64, bytes: &[u8]) -> Result<Parent> {
    let bad = |what: String| Error::corrupt(file.label(), at, format!("parent locator: {what}"));
    let kind = guid_at(bytes, 0);
    if kind != LOCATOR_TYPE {
        return Err(Error::unsupported(file.label(), format!("a parent locator of type {}", spelled(&kind))));
    }
    let u16_at = |at: usize| bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b));
    let count = usize::from(u16_at(18));
    let text = |offset: u32, len: u16| {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let part = bytes.get(start..start.saturating_add(len.into()));
        part.map(utf16).ok_or_else(|| bad(format!("a text of {len} bytes at {offset}")))
    };
    let (mut linkage, mut relative, mut absolute) = (Vec::new(), None, None);
    for number in 0..count {
        let entry = 20 + 12 * number;
        if entry + 12 > bytes.len() {
            return Err(bad(format!("{count} entries in {} bytes", bytes.len())));
        }
        let key = text(u32_at(bytes, entry), u16_at(entry + 8))?;
        let value = text(u32_at(bytes, entry + 4), u16_at(entry + 10))?;
        match key.as_str() {
            "parent_linkage" | "parent_linkage2" => {
                let guid = uuid::Uuid::try_parse(value.trim()).map_err(|_| bad(format!("{key} is {value:?}")))?;
                linkage.push(guid.to_bytes_le());
            }
            "relative_path" => relative = Some(value),
            "absolute_win32_path" => absolute = Some(value),
            _ => {}
        }
    }
    linkage.retain(|guid| *guid != [0; 16]);
    if linkage.is_empty() {
        return Err(bad("it does not say which parent is the right one".into()));
    }
    Ok(Parent { names: names(relative.as_deref(), absolute.as_deref()), linkage })
}

fn utf16(bytes: &[u8]) -> String {
    let (units, _) = bytes.as_chunks::<2>();
    char::decode_utf16(units.iter().map(|unit| u16::from_le_bytes(*unit)))
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .filter(|c| *c != '\0')
        .collect()
}

/// What paths of another computer may be called here.
pub(crate) fn names(relative: Option<&str>, absolute: Option<&str>) -> Vec<OsString> {
    let last = |path: &str| path.rsplit(['\\', '/']).next().unwrap_or_default().to_owned();
    let slashes = |path: &str| path.replace('\\', "/");
    let all = [relative.map(last), relative.map(slashes), absolute.map(last)];
    let mut names: Vec<OsString> = Vec::new();
    for name in all.into_iter().flatten().filter(|name| !name.is_empty()).map(OsString::from) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}
