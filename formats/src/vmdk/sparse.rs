//! A sparse extent of any kind: its header, its directory in memory, its tables a piece at a time.
//!
//! | kind | magic | directory entry | table | grain |
//! |---|---|---|---|---|
//! | hosted | `KDMV` | u32 sector | up to 512 x u32 sector | 4 KiB and more, plain or zlib |
//! | VMFS delta | `COWD` | u32 sector | 4096 x u32 sector | 512 bytes and more |
//! | seSparse | `be ba fe ca 0 0 0 0` | u64 index | 4096 x u64 index | 4 KiB |
//!
//! Invariants
//! - A table belongs to one directory entry, so walking an extent costs at most its file's length.
//! - A grain lies in the file as a whole, or its range is an error; it never begins in the header.
//!
//! Not here: where the extent lies on the disk, which file it is.

use std::ops::Range;

use zerocopy::{
    FromBytes, Immutable, KnownLayout, Unaligned,
    byteorder::little_endian::{U16, U32, U64},
};

use crate::{
    BlockRef, Codec, Content, Error, FileSlot, Result, SECTOR_BYTES,
    tables::{TableFile, duplicates},
};

pub(super) const HOSTED_MAGIC: u32 = u32::from_le_bytes(*b"KDMV");
pub(super) const COWD_MAGIC: u32 = u32::from_le_bytes(*b"COWD");
pub(super) const SESPARSE_MAGIC: u64 = 0xcafe_babe;

/// Longest directory, in bytes of its file.
const DIRECTORY_BYTES_MAX: u64 = 64 << 20;
/// Largest grain, in bytes.
const GRAIN_BYTES_MAX: u64 = 4 << 20;

const FLAG_NEWLINES: u32 = 1 << 0;
const FLAG_ZERO_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
const FLAG_MARKERS: u32 = 1 << 17;
/// Directory offset of a file that was written in one go: the footer has it.
const AT_END: u64 = u64::MAX;

/// Header of a hosted extent as it lies in the file; the same again in the footer.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct HostedHeader {
    magic: U32,
    version: U32,
    flags: U32,
    capacity: U64,
    grain: U64,
    pub(super) descriptor_offset: U64,
    pub(super) descriptor_sectors: U64,
    table_entries: U32,
    redundant_directory: U64,
    directory: U64,
    overhead: U64,
    unclean: u8,
    newlines: [u8; 4],
    compression: U16,
}

const _: () = assert!(size_of::<HostedHeader>() == 79);

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct CowdHeader {
    magic: U32,
    version: U32,
    flags: U32,
    sectors: U32,
    grain: U32,
    directory: U32,
    directory_entries: U32,
    free_sector: U32,
}

/// An area of a seSparse file, in sectors.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Area {
    offset: U64,
    sectors: U64,
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SeSparseHeader {
    magic: U64,
    version: U64,
    capacity: U64,
    grain: U64,
    table_sectors: U64,
    flags: U64,
    reserved: [U64; 4],
    volatile: Area,
    journal_header: Area,
    journal: Area,
    directory: Area,
    tables: Area,
    free_bitmap: Area,
    back_map: Area,
    grains: Area,
}

const _: () = assert!(size_of::<SeSparseHeader>() == 208);

const SESPARSE_VERSION: u64 = 0x2_0000_0001;
const SESPARSE_VOLATILE_MAGIC: u64 = 0xcafe_cafe;

/// How entries are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Coding {
    Hosted { zero_grains: bool },
    Stream { zero_grains: bool },
    Cowd,
    SeSparse { tables: u64, tables_end: u64, grains: u64 },
}

/// What a table entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grain {
    Absent,
    Zero,
    At(u64),
}

/// Entry `number` of the table that lies at `place`.
#[derive(Clone, Copy)]
struct Entry<'a> {
    table: &'a [u8],
    number: u64,
    place: u64,
}

/// One sparse extent, opened.
#[derive(Debug)]
pub(super) struct Sparse {
    pub(super) file: TableFile,
    coding: Coding,
    /// Bytes of disk it can hold.
    pub(super) capacity: u64,
    pub(super) grain: u64,
    table_entries: u64,
    /// Entries as they are stored, and where the first one lies.
    pub(super) directory: Vec<u64>,
    directory_at: u64,
    /// Indices whose table belongs to an earlier entry.
    again: Vec<usize>,
    /// First byte where a grain may lie.
    floor: u64,
}

/// The fixed part of a structure at `offset`.
fn read_struct<T: FromBytes>(file: &TableFile, offset: u64, what: &str) -> Result<T> {
    let bytes = file.read(offset, size_of::<T>() as u64, what)?;
    T::read_from_bytes(&bytes).map_err(|_| Error::corrupt(file.label(), offset, what))
}

/// The header of a hosted extent, its magic, version and line endings checked.
pub(super) fn hosted_header(file: &TableFile, offset: u64) -> Result<HostedHeader> {
    let header: HostedHeader = read_struct(file, offset, "the header of a sparse extent")?;
    if header.magic.get() != HOSTED_MAGIC {
        return Err(Error::corrupt(file.label(), offset, "no magic number of a sparse extent"));
    }
    if !(1..=3).contains(&header.version.get()) {
        return Err(Error::unsupported(file.label(), format!("sparse extent version {}", header.version)));
    }
    if header.flags.get() & FLAG_NEWLINES != 0 && header.newlines != *b"\n \r\n" {
        return Err(Error::corrupt(
            file.label(),
            offset + 73,
            "line endings were changed: it went through a text transfer",
        ));
    }
    Ok(header)
}

fn sectors(file: &TableFile, at: u64, what: &str, count: u64) -> Result<u64> {
    let bytes = count.checked_mul(SECTOR_BYTES).filter(|bytes| i64::try_from(*bytes).is_ok());
    bytes.ok_or_else(|| Error::corrupt(file.label(), at, format!("{what} is {count} sectors")))
}

fn grain_bytes(file: &TableFile, at: u64, count: u64, sectors_min: u64) -> Result<u64> {
    let bytes = sectors(file, at, "the grain", count)?;
    if count.is_power_of_two() && count >= sectors_min && bytes <= GRAIN_BYTES_MAX {
        Ok(bytes)
    } else {
        Err(Error::corrupt(file.label(), at, format!("a grain of {count} sectors")))
    }
}

/// Where a directory lies and how it is read.
struct Plan {
    coding: Coding,
    capacity: u64,
    grain: u64,
    table_entries: u64,
    directory_at: u64,
    floor: u64,
}

impl Sparse {
    /// Opens a hosted extent.
    pub(super) fn hosted(file: TableFile) -> Result<Self> {
        let mut header = hosted_header(&file, 0)?;
        let mut at = 0;
        if header.directory.get() == AT_END {
            at = file.len.checked_sub(1024).filter(|at| *at >= 512 && at.is_multiple_of(512)).unwrap_or(file.len);
            header = hosted_header(&file, at).map_err(|_| Error::Truncated {
                path: file.label().into(),
                len: file.len,
                need: file.len.saturating_add(1024),
                what: "the footer of a stream-optimized extent, without which its directory is not known,".into(),
            })?;
            if header.directory.get() == AT_END {
                return Err(Error::corrupt(file.label(), at + 56, "the footer does not say where the directory is"));
            }
        }
        let flags = header.flags.get();
        let zero_grains = flags & FLAG_ZERO_GRAINS != 0;
        let coding = match (flags & FLAG_COMPRESSED != 0, flags & FLAG_MARKERS != 0, header.compression.get()) {
            (false, _, _) => Coding::Hosted { zero_grains },
            (true, true, 1) => Coding::Stream { zero_grains },
            (true, false, _) => return Err(Error::unsupported(file.label(), "compressed grains without markers")),
            (true, true, other) => {
                return Err(Error::unsupported(file.label(), format!("compression {other} of a sparse extent")));
            }
        };
        let table_entries = u64::from(header.table_entries.get());
        if !table_entries.is_power_of_two() || table_entries > 512 {
            return Err(Error::corrupt(file.label(), at + 44, format!("tables of {table_entries} entries")));
        }
        let plan = Plan {
            coding,
            capacity: sectors(&file, at + 12, "the capacity", header.capacity.get())?,
            grain: grain_bytes(&file, at + 20, header.grain.get(), 8)?,
            table_entries,
            directory_at: sectors(&file, at + 56, "the directory's offset", header.directory.get())?,
            floor: SECTOR_BYTES.max(match header.descriptor_offset.get() {
                0 => 0,
                start => sectors(
                    &file,
                    at + 28,
                    "the descriptor's end",
                    start.saturating_add(header.descriptor_sectors.get()),
                )?,
            }),
        };
        Self::with_directory(file, plan)
    }

    /// Opens a VMFS delta.
    pub(super) fn cowd(file: TableFile) -> Result<Self> {
        let header: CowdHeader = read_struct(&file, 0, "the header of a VMFS delta")?;
        if header.magic.get() != COWD_MAGIC {
            return Err(Error::corrupt(file.label(), 0, "no magic number of a VMFS delta"));
        }
        if header.version.get() != 1 {
            return Err(Error::unsupported(file.label(), format!("VMFS delta version {}", header.version)));
        }
        let plan = Plan {
            coding: Coding::Cowd,
            capacity: u64::from(header.sectors.get()) * SECTOR_BYTES,
            grain: grain_bytes(&file, 16, header.grain.get().into(), 1)?,
            table_entries: 4096,
            directory_at: u64::from(header.directory.get()) * SECTOR_BYTES,
            floor: SECTOR_BYTES,
        };
        let needed = plan.capacity.div_ceil(plan.grain * plan.table_entries);
        if u64::from(header.directory_entries.get()) < needed {
            let what = format!("a directory of {} entries, but {needed} are needed", header.directory_entries);
            return Err(Error::corrupt(file.label(), 24, what));
        }
        Self::with_directory(file, plan)
    }

    /// Opens a seSparse extent.
    pub(super) fn sesparse(file: TableFile) -> Result<Self> {
        let header: SeSparseHeader = read_struct(&file, 0, "the header of a seSparse extent")?;
        if header.magic.get() != SESPARSE_MAGIC {
            return Err(Error::corrupt(file.label(), 0, "no magic number of a seSparse extent"));
        }
        let unknown = |what: String| Err(Error::unsupported(file.label(), what));
        match (header.version.get(), header.grain.get(), header.table_sectors.get(), header.flags.get()) {
            (SESPARSE_VERSION, 8, 64, 0) => {}
            (SESPARSE_VERSION, 8, 64, flags) => return unknown(format!("seSparse flags {flags:#x}")),
            (SESPARSE_VERSION, grain, table, _) => {
                return unknown(format!("seSparse grains of {grain} sectors with tables of {table}"));
            }
            (version, ..) => return unknown(format!("seSparse version {version:#x}")),
        }
        let volatile_at = sectors(&file, 80, "the volatile header's offset", header.volatile.offset.get())?;
        let volatile: [U64; 4] = read_struct(&file, volatile_at, "the volatile header of a seSparse extent")?;
        match volatile.map(U64::get) {
            [SESPARSE_VOLATILE_MAGIC, _, _, 0] => {}
            [SESPARSE_VOLATILE_MAGIC, ..] => {
                return unknown(
                    "a seSparse journal that was not replayed (open the disk once where it was made)".into(),
                );
            }
            _ => return Err(Error::corrupt(file.label(), volatile_at, "no magic number of a volatile header")),
        }
        let tables = sectors(&file, 144, "the tables' offset", header.tables.offset.get())?;
        let tables_len = sectors(&file, 152, "the tables' length", header.tables.sectors.get())?;
        let grains = sectors(&file, 192, "the grains' offset", header.grains.offset.get())?;
        let plan = Plan {
            coding: Coding::SeSparse { tables, tables_end: tables.saturating_add(tables_len), grains },
            capacity: sectors(&file, 16, "the capacity", header.capacity.get())?,
            grain: 8 * SECTOR_BYTES,
            table_entries: 4096,
            directory_at: sectors(&file, 128, "the directory's offset", header.directory.offset.get())?,
            floor: grains.max(SECTOR_BYTES),
        };
        let needed = plan.capacity.div_ceil(plan.grain * plan.table_entries);
        if header.directory.sectors.get().saturating_mul(SECTOR_BYTES / 8) < needed {
            let what = format!("a directory of {} sectors, but {needed} entries are needed", header.directory.sectors);
            return Err(Error::corrupt(file.label(), 136, what));
        }
        Self::with_directory(file, plan)
    }

    fn with_directory(file: TableFile, plan: Plan) -> Result<Self> {
        let Plan { coding, capacity, grain, table_entries, directory_at, floor } = plan;
        let count = capacity.div_ceil(grain * table_entries);
        let width = coding.entry_bytes();
        let bytes = count.saturating_mul(width);
        if bytes > DIRECTORY_BYTES_MAX {
            let what = format!("a directory of {count} entries for {capacity} bytes of disk");
            return Err(Error::corrupt(file.label(), directory_at, what));
        }
        if bytes > 0 && directory_at < SECTOR_BYTES {
            return Err(Error::corrupt(file.label(), directory_at, "the directory lies over the header"));
        }
        let bytes = file.read(directory_at, bytes, "the directory")?;
        let directory: Vec<u64> =
            (0..usize::try_from(count).unwrap_or(usize::MAX)).map(|i| coding.entry(&bytes, i)).collect();
        let again = duplicates(directory.iter().map(|entry| Some(*entry).filter(|e| *e != 0)));
        Ok(Self { file, coding, capacity, grain, table_entries, directory, directory_at, again, floor })
    }

    /// Bytes of disk that a table maps.
    fn table_span(&self) -> u64 {
        self.grain * self.table_entries
    }

    /// Where the table of directory entry `index` lies; `None` if there is none.
    fn table_at(&self, index: usize) -> Result<Option<u64>> {
        let entry = self.directory.get(index).copied().unwrap_or_default();
        let place = self.directory_at.saturating_add(index as u64 * self.coding.entry_bytes());
        let corrupt =
            |rule: &str| Error::corrupt(self.file.label(), place, format!("directory entry {entry:#x}: {rule}"));
        if entry == 0 {
            return Ok(None);
        }
        if self.again.binary_search(&index).is_ok() {
            return Err(corrupt("its table belongs to an earlier entry"));
        }
        let bytes = self.table_entries * self.coding.entry_bytes();
        let at = match self.coding {
            Coding::SeSparse { tables, tables_end, .. } => {
                if entry >> 32 != 0x1000_0000 {
                    return Err(corrupt("its upper half is not the mark of a table"));
                }
                let at = tables.saturating_add((entry & u64::from(u32::MAX)) * bytes);
                if at.saturating_add(bytes) > tables_end {
                    return Err(corrupt("its table lies outside the tables' area"));
                }
                at
            }
            _ => entry * SECTOR_BYTES,
        };
        self.file.check_inside(at, bytes, "a table")?;
        Ok(Some(at))
    }

    /// Whether its grains are zlib streams behind markers.
    pub(super) fn is_compressed(&self) -> bool {
        matches!(self.coding, Coding::Stream { .. })
    }

    /// The heads of up to about `count` tables, for a fingerprint. A damaged one must not keep the rest
    /// from being used; it has its say when it is read.
    pub(super) fn samples(&self, count: usize) -> Vec<Vec<u8>> {
        let used: Vec<usize> = self.directory.iter().enumerate().filter(|(_, e)| **e != 0).map(|(i, _)| i).collect();
        let bytes = (self.table_entries * self.coding.entry_bytes()).min(4096);
        let places = used.iter().step_by((used.len() / count).max(1));
        places.filter_map(|i| self.file.read(self.table_at(*i).ok()??, bytes, "a table").ok()).collect()
    }

    /// What the extent, which begins at `start` of the disk, says at `at`, and for how many bytes of
    /// `at..end`; both count from its start.
    pub(super) fn piece(&self, at: u64, end: u64, start: u64, slot: FileSlot) -> Result<(Content, u64)> {
        let span = self.table_span();
        let index = at / span;
        let table_end = (index + 1).saturating_mul(span).min(end);
        let place = match self.table_at(usize::try_from(index).unwrap_or(usize::MAX))? {
            Some(place) => place,
            None => return Ok((Content::Absent, table_end - at)),
        };
        let bytes = usize::try_from(self.table_entries * self.coding.entry_bytes()).unwrap_or(usize::MAX);
        self.file.with_table(place, bytes, |table| {
            let mut told: Option<(Content, u64)> = None;
            let mut from = at;
            while from < table_end {
                let number = from % span / self.grain;
                let next = (from - from % self.grain).saturating_add(self.grain).min(table_end);
                let content = self.grain_content(Entry { table, number, place }, from..next, start, slot);
                match (&mut told, content) {
                    (None, content) => told = Some((content?, next - from)),
                    (Some((first, len)), Ok(content)) if crate::runs::continues(*first, *len, content) => {
                        *len += next - from
                    }
                    _ => break,
                }
                from = next;
            }
            told.ok_or_else(|| Error::corrupt(self.file.label(), place, "a table that maps nothing"))
        })
    }

    /// The part `range` of one grain, which `entry` maps.
    fn grain_content(&self, entry: Entry<'_>, range: Range<u64>, start: u64, slot: FileSlot) -> Result<Content> {
        let (from, to) = (range.start, range.end);
        let Entry { table, number, place } = entry;
        let entry = self.coding.entry(table, usize::try_from(number).unwrap_or(usize::MAX));
        let corrupt =
            |what: String| Error::corrupt(self.file.label(), place + number * self.coding.entry_bytes(), what);
        let bad = |rule: &str| corrupt(format!("table entry {entry:#x}: {rule}"));
        let host = match self.coding.grain(entry).map_err(bad)? {
            Grain::Absent => return Ok(Content::Absent),
            Grain::Zero => return Ok(Content::Zero),
            Grain::At(sector) => sector.checked_mul(SECTOR_BYTES).ok_or_else(|| bad("beyond any file"))?,
        };
        let host = match self.coding {
            Coding::SeSparse { grains, .. } => grains.checked_add(host).ok_or_else(|| bad("beyond any file"))?,
            _ => host,
        };
        if host < self.floor {
            return Err(bad("points into the header"));
        }
        let skip = from % self.grain;
        if let Coding::Stream { .. } = self.coding {
            // The marker says how long the grain is; it is read when the grain is.
            self.file.check_inside(host, SECTOR_BYTES, "the marker of a compressed grain")?;
            let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
            let block = BlockRef {
                offset: host,
                logical: (start + from) / self.grain,
                stored_len: narrow(SECTOR_BYTES),
                raw_len: narrow(self.grain),
                check: 0,
                file: slot,
                codec: Codec::Deflate,
            };
            return Ok(Content::Packed { block, skip: narrow(skip) });
        }
        // The last grain of the extent need not be whole.
        let stored = self.grain.min(self.capacity.saturating_sub(from - skip)).max(to - (from - skip));
        self.file.check_inside(host, stored, "a grain")?;
        Ok(Content::Plain { file: slot, offset: host + skip })
    }
}

impl Coding {
    fn entry_bytes(self) -> u64 {
        if matches!(self, Coding::SeSparse { .. }) { 8 } else { 4 }
    }

    /// Entry `index` of a directory or table; 0 past its end.
    fn entry(self, bytes: &[u8], index: usize) -> u64 {
        let tail = |width: usize| index.checked_mul(width).and_then(|at| bytes.get(at..));
        match self {
            Coding::SeSparse { .. } => tail(8).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b)),
            _ => tail(4).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b).into()),
        }
    }

    /// Interprets an entry of a table. `Err` names the broken rule.
    fn grain(self, entry: u64) -> Result<Grain, &'static str> {
        match self {
            _ if entry == 0 => Ok(Grain::Absent),
            Coding::Hosted { zero_grains } | Coding::Stream { zero_grains } => match (entry, zero_grains) {
                (1, true) => Ok(Grain::Zero),
                (1, false) => Err("a zero grain, which the header does not announce"),
                (sector, _) => Ok(Grain::At(sector)),
            },
            Coding::Cowd => Ok(Grain::At(entry)),
            Coding::SeSparse { .. } => match entry >> 60 {
                // Unmapped by the guest: zeros, as QEMU reads it. What lay below was given up and must not
                // come back.
                1 | 2 => Ok(Grain::Zero),
                3 => Ok(Grain::At((((entry >> 48) & 0xfff) | ((entry & 0xffff_ffff_ffff) << 12)).saturating_mul(8))),
                _ => Err("a kind of grain that is not known"),
            },
        }
    }
}
