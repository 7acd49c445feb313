//! L1 and L2 tables: where they lie, how entries read.
//!
//! Invariants
//! - An L2 table belongs to one L1 entry: a second entry naming it is damage. So walking a whole
//!   disk costs at most the file's own length, whatever sizes the header claims.
//!
//! L2 tables are read and cached ([`crate::tables`]) in pieces of at most [`PIECE_BYTES_MAX`]. Merged
//! maps scan tables without caching them.

use super::{L1_BYTES_MAX, header::Header};
use crate::{Error, Result, tables::TableFile};

/// Largest piece of an L2 table that is read at once, in bytes.
pub(super) const PIECE_BYTES_MAX: u64 = 64 << 10;

/// Bits 9 to 55: an offset in every kind of table.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: reference count is one. Of no meaning to a reader, except beside an external data file.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const READS_AS_ZERO: u64 = 1;

/// In place of an L1 entry that names the table of an earlier one; a reserved bit, so never genuine.
const DUPLICATE: u64 = 1;

/// Sizes that follow from the header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) cluster_bits: u32,
    /// Log2 of the bytes of an L2 entry: 3, or 4 when extended.
    pub(super) entry_bits: u32,
    pub(super) version: u32,
    /// Whether the guest's bytes lie in another file, at the offsets the guest sees.
    pub(super) external: bool,
}

/// What an L2 entry says about its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    Absent,
    Zero,
    Plain { host: u64 },
    Compressed { host: u64, span: u64 },
    Parts { host: u64, allocated: u32, zero: u32 },
}

impl Geometry {
    pub(super) fn of(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            entry_bits: if header.extended_l2 { 4 } else { 3 },
            version: header.version,
            external: header.data_file.is_some(),
        }
    }

    pub(super) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn is_extended(&self) -> bool {
        self.entry_bits == 4
    }

    /// Log2 of the bytes of disk that one L2 table maps.
    pub(super) fn table_bits(&self) -> u32 {
        2 * self.cluster_bits - self.entry_bits
    }

    pub(super) fn piece_bytes(&self) -> u64 {
        self.cluster_bytes().min(PIECE_BYTES_MAX)
    }

    /// Bytes of disk that one piece of an L2 table maps.
    pub(super) fn piece_span(&self) -> u64 {
        self.piece_bytes() >> self.entry_bits << self.cluster_bits
    }

    /// Interprets one entry; `bitmap` is its second word, 0 unless extended.
    /// `Err` names the broken rule.
    pub(super) fn cluster(&self, entry: u64, bitmap: u64) -> Result<Cluster, String> {
        let broken = |rule: &str| Err(format!("L2 entry {entry:#018x}: {rule}"));
        if entry & COMPRESSED != 0 {
            let offset_bits = 62 - (self.cluster_bits - 8);
            let host = entry & ((1 << offset_bits) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
            let span = (sectors + 1) * 512 - (host & 511);
            return match () {
                () if self.external => broken("a compressed cluster beside an external data file"),
                () if host < self.cluster_bytes() => broken("points into the header"),
                () => Ok(Cluster::Compressed { host, span }),
            };
        }
        let host = entry & OFFSET_MASK;
        let reads_as_zero = entry & READS_AS_ZERO != 0;
        if entry & !(OFFSET_MASK | COPIED | READS_AS_ZERO) != 0 || (reads_as_zero && self.is_extended()) {
            return broken("reserved bits are set");
        }
        if host & (self.cluster_bytes() - 1) != 0 {
            return broken("the offset is not cluster aligned");
        }
        if reads_as_zero {
            return if self.version < 3 { broken("a zero cluster in version 2") } else { Ok(Cluster::Zero) };
        }
        // Beside a data file offset 0 is as good as any; the copied bit tells it from "nothing here".
        let has_host = host != 0 || (self.external && entry & COPIED != 0);
        if has_host && !self.external && host < self.cluster_bytes() {
            return broken("points into the header");
        }
        if !self.is_extended() {
            return Ok(if has_host { Cluster::Plain { host } } else { Cluster::Absent });
        }
        let halves = (u32::try_from(bitmap & u64::from(u32::MAX)), u32::try_from(bitmap >> 32));
        let (Ok(allocated), Ok(zero)) = halves else { return broken("bitmap") };
        match () {
            () if allocated & zero != 0 => broken("a part is both stored and zero"),
            () if allocated != 0 && !has_host => broken("parts are stored nowhere"),
            () => Ok(Cluster::Parts { host, allocated, zero }),
        }
    }
}

/// An L1 table in memory.
#[derive(Debug)]
pub(super) struct Table {
    entries: Vec<u64>,
    offset: u64,
    /// Size of the disk it maps, in bytes.
    pub(super) size: u64,
}

impl Table {
    /// Reads the `count` entries at `offset`, of which only those that `size` needs are kept.
    pub(super) fn read(file: &TableFile, header: &Header, offset: u64, count: u32, size: u64) -> Result<Self> {
        let geometry = Geometry::of(header);
        let corrupt = |what: String| Error::corrupt(file.label(), offset, what);
        if u64::from(count) * 8 > L1_BYTES_MAX || offset & (geometry.cluster_bytes() - 1) != 0 {
            return Err(corrupt(format!("an L1 table of {count} entries at {offset}")));
        }
        let needed = match size {
            0 => 0,
            _ => ((size - 1) >> geometry.table_bits()) + 1,
        };
        if needed > u64::from(count) {
            return Err(corrupt(format!("an L1 table of {count} entries, but a disk of {size} bytes needs {needed}")));
        }
        if needed > 0 && offset < geometry.cluster_bytes() {
            return Err(corrupt("the L1 table lies over the header".into()));
        }
        let bytes = file.read(offset, needed * 8, "L1 table")?;
        let (words, _) = bytes.as_chunks::<8>();
        let mut entries: Vec<u64> = words.iter().map(|word| u64::from_be_bytes(*word)).collect();
        mark_duplicates(&mut entries);
        Ok(Self { entries, offset, size })
    }

    /// Where the L2 table of the L1 entry `index` lies; `None` if there is none.
    pub(super) fn l2_offset(&self, index: u64, file: &TableFile, geometry: &Geometry) -> Result<Option<u64>> {
        let entry = usize::try_from(index).ok().and_then(|i| self.entries.get(i)).copied().unwrap_or_default();
        if entry == 0 {
            return Ok(None);
        }
        let corrupt = |rule: &str| {
            let at = self.offset.saturating_add(index.saturating_mul(8));
            Err(Error::corrupt(file.label(), at, format!("L1 entry {entry:#018x}: {rule}")))
        };
        let offset = entry & OFFSET_MASK;
        if entry == DUPLICATE {
            return corrupt("its L2 table belongs to another entry");
        }
        if entry & !(OFFSET_MASK | COPIED) != 0 {
            return corrupt("reserved bits are set");
        }
        if offset & (geometry.cluster_bytes() - 1) != 0 {
            return corrupt("the offset is not cluster aligned");
        }
        if offset == 0 {
            return Ok(None);
        }
        file.check_inside(offset, geometry.cluster_bytes(), "L2 table")?;
        Ok(Some(offset))
    }

    /// Feeds what a fingerprint has to cover.
    pub(super) fn entries(&self) -> &[u64] {
        &self.entries
    }
}

/// The later of two entries with one L2 table becomes [`DUPLICATE`].
fn mark_duplicates(entries: &mut [u64]) {
    let mut places: Vec<(u64, usize)> =
        entries.iter().enumerate().map(|(i, e)| (e & OFFSET_MASK, i)).filter(|(offset, _)| *offset != 0).collect();
    places.sort_unstable();
    for pair in places.windows(2) {
        if let [(first, _), (second, index)] = pair
            && first == second
            && let Some(entry) = entries.get_mut(*index)
        {
            *entry = DUPLICATE;
        }
    }
}
