//! The table of internal snapshots.
//!
//! The table gives no length, only a count; it is read in one forward pass that never leaves the
//! file and stops at [`TABLE_BYTES_MAX`].

use serde::Serialize;
use zerocopy::{
    FromBytes, Immutable, KnownLayout, Unaligned,
    byteorder::big_endian::{U16, U32, U64},
};

use super::{header::Header, table::Geometry};
use crate::{Error, Result, tables::TableFile};

const TABLE_BYTES_MAX: u64 = 64 << 20;
const EXTRA_BYTES_MAX: u32 = 1024;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Unique id within the image, as text.
    pub id: String,
    /// Name, not necessarily unique.
    pub name: String,
    /// Size of the disk then, in bytes.
    pub size: u64,
    /// When it was taken: seconds since 1970, UTC, by the host's clock.
    pub seconds: u32,
    /// Nanoseconds on top of that.
    pub nanoseconds: u32,
    /// Bytes of saved machine memory; 0 for a snapshot of the disk alone.
    pub vm_state_bytes: u64,
    #[serde(skip)]
    pub(super) l1_offset: u64,
    #[serde(skip)]
    pub(super) l1_entries: u32,
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    l1_offset: U64,
    l1_entries: U32,
    id_len: U16,
    name_len: U16,
    seconds: U32,
    nanoseconds: U32,
    vm_clock: U64,
    vm_state_bytes: U32,
    extra_len: U32,
}

const ENTRY_BYTES: u64 = size_of::<RawEntry>() as u64;
const _: () = assert!(ENTRY_BYTES == 40);

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtra {
    vm_state_bytes: U64,
    size: U64,
}

pub(super) fn read_all(file: &TableFile, header: &Header) -> Result<Vec<Snapshot>> {
    let start = header.snapshots_offset;
    if header.snapshot_count > 0 && start < Geometry::of(header).cluster_bytes() {
        return Err(Error::corrupt(file.label(), 64, "the snapshot table lies over the header"));
    }
    let mut all = Vec::new();
    let mut at = start;
    for number in 0..header.snapshot_count {
        let (snapshot, next) = read_one(file, header, at, number)?;
        if next - start > TABLE_BYTES_MAX {
            return Err(Error::corrupt(file.label(), at, format!("a snapshot table over {TABLE_BYTES_MAX} bytes")));
        }
        all.push(snapshot);
        at = next;
    }
    Ok(all)
}

/// The entry at `at`, and where the next one starts.
fn read_one(file: &TableFile, header: &Header, at: u64, number: u32) -> Result<(Snapshot, u64)> {
    let what = format!("snapshot table entry {number}");
    let corrupt = |rule: String| Error::corrupt(file.label(), at, format!("{what}: {rule}"));
    let fixed = file.read(at, ENTRY_BYTES, &what)?;
    let raw = RawEntry::read_from_bytes(&fixed).map_err(|_| corrupt("too short".into()))?;
    let extra_len = raw.extra_len.get();
    if extra_len > EXTRA_BYTES_MAX {
        return Err(corrupt(format!("{extra_len} bytes of extra data")));
    }
    let extra_len = u64::from(extra_len);
    let text_at = at + ENTRY_BYTES + extra_len;
    let rest = extra_len + u64::from(raw.id_len.get()) + u64::from(raw.name_len.get());
    let bytes = file.read(at + ENTRY_BYTES, rest, &what)?;
    let (extra, text) = bytes.split_at_checked(usize::try_from(extra_len).unwrap_or_default()).unwrap_or_default();
    let (id, name) = text.split_at_checked(usize::from(raw.id_len.get())).unwrap_or_default();
    let known = RawExtra::read_from_prefix(extra).ok().map(|(known, _)| known);
    if known.is_none() && header.version >= 3 {
        return Err(corrupt(format!("{extra_len} bytes of extra data, 16 at least in version 3")));
    }
    let size = known.as_ref().map_or(header.size, |k| k.size.get());
    if size > i64::MAX.cast_unsigned() {
        return Err(corrupt(format!("a disk of {size} bytes")));
    }
    let end = text_at + u64::from(raw.id_len.get()) + u64::from(raw.name_len.get());
    let snapshot = Snapshot {
        id: String::from_utf8_lossy(id).into_owned(),
        name: String::from_utf8_lossy(name).into_owned(),
        size,
        seconds: raw.seconds.get(),
        nanoseconds: raw.nanoseconds.get(),
        vm_state_bytes: known.map_or(raw.vm_state_bytes.get().into(), |k| k.vm_state_bytes.get()),
        l1_offset: raw.l1_offset.get(),
        l1_entries: raw.l1_entries.get(),
    };
    Ok((snapshot, end.next_multiple_of(8)))
}
