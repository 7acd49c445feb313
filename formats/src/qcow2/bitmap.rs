//! Persistent dirty bitmaps: which ranges changed since a point in time.
//!
//! Invariants
//! - A bitmap is told from only if the last writer of the image kept bitmaps up *and* closed this one
//!   properly. Everything else is listed with the reason and refused: a delta that misses a range
//!   would silently lose data.
//!
//! Not here: what a delta is used for.

use serde::Serialize;
use zerocopy::{
    FromBytes, Immutable, KnownLayout, Unaligned,
    byteorder::big_endian::{U16, U32, U64},
};

use super::header::Header;
use crate::{Error, Result, tables::TableFile};

const BITMAPS_MAX: u32 = 65_535;
const DIRECTORY_BYTES_MAX: u64 = 64 << 20;
const TABLE_BYTES_MAX: u64 = 64 << 20;
const NAME_BYTES_MAX: u16 = 1023;
const KIND_DIRTY: u8 = 1;
const FLAG_IN_USE: u32 = 1;
const FLAG_AUTO: u32 = 2;
const FLAG_EXTRA_COMPATIBLE: u32 = 4;
const FLAGS_KNOWN: u32 = 7;

/// A table entry's data offset: bits 9 to 55. Without one, bit 0 says what all the bits are.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const ALL_ONES: u64 = 1;

/// Whether a bitmap may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BitmapTrust {
    /// Complete.
    Consistent,
    /// Its writer died or is still at it: writes may be missing.
    InUse,
    /// The image was last written by a program that does not know bitmaps: writes may be missing.
    NotKeptUp,
    /// Carries data this build does not understand and must not ignore, or is no dirty bitmap.
    NotUnderstood,
}

/// A persistent dirty bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bitmap {
    /// Name, unique in the image.
    pub name: String,
    /// Bytes of disk that one bit stands for.
    pub granularity_bytes: u64,
    /// Whether new writes are still to be recorded in it.
    pub recording: bool,
    /// Whether it may be used.
    pub trust: BitmapTrust,
    #[serde(skip)]
    table_offset: u64,
    #[serde(skip)]
    table_entries: u32,
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    table_offset: U64,
    table_entries: U32,
    flags: U32,
    kind: u8,
    granularity_bits: u8,
    name_len: U16,
    extra_len: U32,
}

const _: () = assert!(size_of::<RawEntry>() == 24);

pub(super) fn read_directory(file: &TableFile, header: &Header) -> Result<Vec<Bitmap>> {
    let Some(directory) = &header.bitmaps else { return Ok(Vec::new()) };
    let corrupt = |what: String| Error::corrupt(file.label(), directory.offset, what);
    if directory.count > BITMAPS_MAX || directory.len > DIRECTORY_BYTES_MAX {
        return Err(corrupt(format!("a directory of {} bitmaps in {} bytes", directory.count, directory.len)));
    }
    if directory.offset < header.cluster_bytes() || directory.offset & (header.cluster_bytes() - 1) != 0 {
        return Err(corrupt("the bitmap directory's offset is not that of a cluster".into()));
    }
    let bytes = file.read(directory.offset, directory.len, "bitmap directory")?;
    let mut rest = bytes.as_slice();
    let mut all = Vec::new();
    for number in 0..directory.count {
        let at = directory.offset + (bytes.len() - rest.len()) as u64;
        let broken = |what: &str| Error::corrupt(file.label(), at, format!("bitmap {number}: {what}"));
        let (raw, tail) = RawEntry::read_from_prefix(rest).map_err(|_| broken("past its directory"))?;
        let extra_len = usize::try_from(raw.extra_len.get()).unwrap_or(usize::MAX);
        let tail = tail.get(extra_len..).ok_or_else(|| broken("extra data past its directory"))?;
        let name = tail.get(..usize::from(raw.name_len.get())).ok_or_else(|| broken("name past its directory"))?;
        if raw.name_len.get() > NAME_BYTES_MAX || !(9..=31).contains(&raw.granularity_bits) {
            return Err(broken("name length or granularity"));
        }
        let flags = raw.flags.get();
        let not_understood = raw.kind != KIND_DIRTY
            || flags & !FLAGS_KNOWN != 0
            || (extra_len > 0 && flags & FLAG_EXTRA_COMPATIBLE == 0);
        let trust = match () {
            () if !directory.kept_up => BitmapTrust::NotKeptUp,
            () if flags & FLAG_IN_USE != 0 => BitmapTrust::InUse,
            () if not_understood => BitmapTrust::NotUnderstood,
            () => BitmapTrust::Consistent,
        };
        all.push(Bitmap {
            name: String::from_utf8_lossy(name).into_owned(),
            granularity_bytes: 1 << raw.granularity_bits,
            recording: flags & FLAG_AUTO != 0,
            trust,
            table_offset: raw.table_offset.get(),
            table_entries: raw.table_entries.get(),
        });
        let used = bytes.len() - tail.len() + name.len();
        rest = bytes.get(used.next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(all)
}

pub(super) fn dirty_ranges(
    file: &TableFile,
    header: &Header,
    bitmap: &Bitmap,
    each: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let reason = match bitmap.trust {
        BitmapTrust::Consistent => None,
        BitmapTrust::InUse => Some("its writer did not close it"),
        BitmapTrust::NotKeptUp => Some("a later writer of the image did not keep it up"),
        BitmapTrust::NotUnderstood => Some("it is of an unknown kind"),
    };
    if let Some(reason) = reason {
        let what = format!("bitmap {:?} is not to be trusted: {reason}", bitmap.name);
        return Err(Error::Refused { path: file.label().into(), what });
    }
    let corrupt = |at: u64, what: String| Error::corrupt(file.label(), at, what);
    let cluster = header.cluster_bytes();
    // Bytes of disk that one cluster of bits stands for.
    let reach = cluster.saturating_mul(8).saturating_mul(bitmap.granularity_bytes);
    let needed = header.size.div_ceil(reach);
    let start = bitmap.table_offset;
    if needed > u64::from(bitmap.table_entries) || needed * 8 > TABLE_BYTES_MAX || start & (cluster - 1) != 0 {
        let what = format!("bitmap {:?}: a table of {} entries", bitmap.name, bitmap.table_entries);
        return Err(corrupt(start, what));
    }
    let table = file.read(start, needed * 8, "bitmap table")?;
    let mut ranges = Ranges { size: header.size, open: None, each };
    // Entries that share clusters could make a small file cost any number of reads.
    let mut left = file.len;
    for ((number, word), at) in (0u64..).zip(table.as_chunks::<8>().0).zip((start..).step_by(8)) {
        let entry = u64::from_be_bytes(*word);
        let data = entry & OFFSET_MASK;
        let from = number * reach;
        if entry & !(OFFSET_MASK | ALL_ONES) != 0 || (data != 0 && (entry & ALL_ONES != 0 || data & (cluster - 1) != 0))
        {
            return Err(corrupt(at, format!("bitmap table entry {entry:#018x}")));
        }
        match (data, entry & ALL_ONES) {
            (0, 0) => {}
            (0, _) => ranges.add(from, reach),
            (data, _) => {
                let shared = || corrupt(at, format!("bitmap {:?}: entries share clusters", bitmap.name));
                left = left.checked_sub(cluster).ok_or_else(shared)?;
                let bits = file.read(data, cluster, "bitmap data")?;
                ranges.add_bits(from, bitmap.granularity_bytes, &bits);
            }
        }
    }
    ranges.finish();
    Ok(())
}

/// Joins ranges that touch, and cuts them at the end of the disk.
struct Ranges<'a> {
    size: u64,
    /// Start and end of the range that may still grow.
    open: Option<(u64, u64)>,
    each: &'a mut dyn FnMut(u64, u64),
}

impl Ranges<'_> {
    fn add(&mut self, from: u64, len: u64) {
        let to = from.saturating_add(len).min(self.size);
        if from >= to {
            return;
        }
        match &mut self.open {
            Some((_, end)) if *end == from => *end = to,
            _ => {
                self.finish();
                self.open = Some((from, to));
            }
        }
    }

    /// Bit `i` stands for `granularity` bytes at `from + i * granularity`, lowest bit of a byte first.
    fn add_bits(&mut self, from: u64, granularity: u64, bits: &[u8]) {
        for (number, byte) in (0u64..).zip(bits) {
            let base = from.saturating_add(number.saturating_mul(8 * granularity));
            match *byte {
                0 => {}
                0xff => self.add(base, 8 * granularity),
                byte => (0..8).filter(|bit| byte >> bit & 1 != 0).for_each(|bit| {
                    self.add(base.saturating_add(bit * granularity), granularity);
                }),
            }
        }
    }

    fn finish(&mut self) {
        if let Some((from, to)) = self.open.take() {
            (self.each)(from, to - from);
        }
    }
}
