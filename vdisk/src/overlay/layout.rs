//! What lies in the files of an overlay (`docs/formats/overlay.md` draws them).
//!
//! Invariants
//! - All integers are little endian; every struct has alignment 1 and no hidden padding.
//! - Every structure carries the overlay's random id, so that bytes of another overlay, or bytes a
//!   guest made up, never pass for one of ours.
//! - Each checksum is CRC-32C over the structure with the checksum field zeroed.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

/// The tail catches a copy in text mode and a cut at a zero byte.
pub(super) const MAP_MAGIC: [u8; 8] = *b"AQMAP\r\n\x1A";
pub(super) const MAP_LIST_MAGIC: [u8; 8] = *b"AQMLS\r\n\x1A";
pub(super) const MAP_PAGE_MAGIC: [u8; 8] = *b"AQMPG\r\n\x1A";
pub(super) const JOURNAL_MAGIC: [u8; 8] = *b"AQJNL\r\n\x1A";
pub(super) const RECORD_MAGIC: [u8; 8] = *b"AQREC\r\n\x1A";

/// Version of map and journal.
pub(super) const OVERLAY_VERSION: u32 = 1;

/// Sequences and floors stay below this: at a million a second it takes 146,000 years to get there. What claims to be
/// beyond is damage, whatever its checksum says, and counting on from it could overflow.
pub(super) const SEQUENCE_END: u64 = 1 << 62;

/// Flag of [`MapHeader::flags`]: somebody else writes `disk.raw`, the marks no longer tell what is dirty.
pub(super) const FLAG_HANDED_OVER: u32 = 1;

/// First two pages of `map`: the same header twice, the higher sequence counts.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct MapHeader {
    pub(super) magic: [u8; 8],
    pub(super) version: U32,
    /// Bits a reader must know to open the file at all.
    pub(super) features_required: U32,
    /// Bits a reader may ignore.
    pub(super) features_optional: U32,
    pub(super) flags: U32,
    pub(super) id: [u8; 16],
    /// Size of the disk in bytes.
    pub(super) size: U64,
    pub(super) sequence: U64,
    /// Digest of the chain below.
    pub(super) chain: [u8; 32],
    /// All journal records before this one are in `disk.raw` and in the marks.
    pub(super) floor: U64,
    pub(super) reserved: [u8; 28],
    pub(super) crc: U32,
}

/// Third page of `map`: which pages the images behind it belong to.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct MapList {
    pub(super) magic: [u8; 8],
    pub(super) id: [u8; 16],
    pub(super) sequence: U64,
    pub(super) count: U32,
    pub(super) crc: U32,
    pub(super) pages: [U32; MAP_IMAGES_MAX],
    pub(super) reserved: [u8; 4096 - 40 - 4 * MAP_IMAGES_MAX],
}

/// Most page images written before they go to their places.
pub(super) const MAP_IMAGES_MAX: usize = 255;

/// Head of a page of marks; 63 lines of 64 bytes follow, one for each MiB of the disk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct MapPageHead {
    pub(super) magic: [u8; 8],
    pub(super) id: [u8; 16],
    /// Number of the checkpoint that wrote it.
    pub(super) sequence: U64,
    pub(super) index: U32,
    pub(super) crc: U32,
    pub(super) reserved: [u8; 24],
}

/// First page of `journal`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct JournalHeader {
    pub(super) magic: [u8; 8],
    pub(super) version: U32,
    pub(super) crc: U32,
    pub(super) id: [u8; 16],
    /// Bytes of each of the two halves that follow this page.
    pub(super) half: U64,
}

/// Head of a record; its entries follow, the whole rounded up to 4 KiB with zeros, then one page of
/// bytes for each `Data` entry, in their order.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RecordHead {
    pub(super) magic: [u8; 8],
    pub(super) id: [u8; 16],
    pub(super) sequence: U64,
    /// Highest record that was known to be durable when this one was written.
    pub(super) synced: U64,
    pub(super) entries: U32,
    /// Pages of bytes behind the entries.
    pub(super) pages: U32,
    pub(super) reserved: [u8; 12],
    /// Over the head and the entries.
    pub(super) crc: U32,
}

/// What a record says of a run of blocks. Within a journal the last entry for a block counts.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RecordEntry {
    /// First block in the low 56 bits, kind in the high 8.
    pub(super) place: U64,
    pub(super) count: U32,
    /// Checksum of the page of a `Data` entry, else 0.
    pub(super) crc: U32,
}

/// The page that follows holds the block; `count` is 1.
pub(super) const ENTRY_DATA: u8 = 1;
/// The bytes were durable in `disk.raw` before this record was written.
pub(super) const ENTRY_IN_PLACE: u8 = 2;
/// The blocks read as zeros.
pub(super) const ENTRY_TRIMMED: u8 = 3;

const _: () = assert!(size_of::<MapHeader>() == 128);
const _: () = assert!(size_of::<MapList>() == 4096);
const _: () = assert!(size_of::<MapPageHead>() == 64);
const _: () = assert!(size_of::<JournalHeader>() == 40);
const _: () = assert!(size_of::<RecordHead>() == 64);
const _: () = assert!(size_of::<RecordEntry>() == 16);

impl RecordEntry {
    pub(super) fn new(kind: u8, block: u64, count: u32, crc: u32) -> Self {
        Self { place: U64::new(u64::from(kind) << 56 | block), count: U32::new(count), crc: U32::new(crc) }
    }

    pub(super) fn kind(&self) -> u8 {
        self.place.get().to_be_bytes()[0]
    }

    pub(super) fn block(&self) -> u64 {
        self.place.get() & 0x00FF_FFFF_FFFF_FFFF
    }
}
