//! Where a disk's partitions lie: GPT, MBR with logical partitions, or none.
//!
//! Invariants
//! - Partitions that overlap, leave the disk, or come from a table that contradicts itself are a doubt about all of them.
//! - A table is bounded before it is read; logical partitions are walked forwards only.
//!
//! Not here: what is in them.

use std::ops::Range;

use super::source::{Source, Stop, ensure, le16, le32, le64};

const GPT_ENTRIES_MAX: u32 = 1024;
const GPT_ENTRY_BYTES_MAX: u32 = 4096;
const LOGICAL_MAX: usize = 128;
const PROTECTIVE: u8 = 0xee;
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
const LINUX: u8 = 0x83;

/// Types of partitions that hold a file system of Linux, first fields as numbers: any, root (x86-64, x86, ARM64, ARM,
/// RISC-V 64), /usr (x86-64), /home, /srv, /var.
const LINUX_TYPES: [(u32, u16, u16, u64); 10] = [
    (0x0fc6_3daf, 0x8483, 0x4772, 0x8e79_3d69_d847_7de4),
    (0x4f68_bce3, 0xe8cd, 0x4db1, 0x96e7_fbca_f984_b709),
    (0x4447_9540, 0xf297, 0x41b2, 0x9af7_d131_d5f0_458a),
    (0xb921_b045, 0x1df0, 0x41c3, 0xaf44_4c6f_280d_3fae),
    (0x69da_d710, 0x2ce4, 0x4e3c, 0xb16c_21a1_d49a_bed3),
    (0x72ec_70a6, 0xcf74, 0x40e6, 0xbd49_4bda_08e8_f224),
    (0x8484_680c, 0x9521, 0x48c6, 0x9c11_b072_0656_f69e),
    (0x933a_c7e1, 0x2eb4, 0x4f13, 0xb844_0e14_e2ae_f915),
    (0x3b8f_8425, 0x20e0, 0x4f3b, 0x907f_1a25_a76f_98e8),
    (0x4d21_b016, 0xb534, 0x45c2, 0xa9fb_5c16_e091_fd2d),
];

/// What a table says of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    /// Where it lies on the disk, in bytes.
    pub(super) range: Range<u64>,
    pub(super) owner: Owner,
}

/// Who the table says uses a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// Nobody says: the disk has no table.
    Unsaid,
    /// A file system of Linux.
    Linux,
    /// Something else: RAID, LVM, swap, another system, a type that is not known here.
    Other,
}

/// The partitions, in order of the disk; the whole disk where it has no table.
pub(super) fn partitions(source: &mut Source<'_>) -> Result<Vec<Partition>, Stop> {
    let size = source.size();
    let mbr = source.bytes::<512>(0)?;
    let signed = mbr.ends_with(&[0x55, 0xaa]);
    let entries = if signed { entries(&mbr) } else { Vec::new() };
    let bare = || Partition { range: 0..size, owner: Owner::Unsaid };
    let protective = entries.iter().any(|e| e.kind == PROTECTIVE);
    let mut found = if protective {
        gpt(source)?
    } else if entries.is_empty() {
        // A GPT without its protective record is no table any more, and yet somebody's: nothing is skipped.
        for sector in [512, 4096] {
            ensure(source.bytes::<8>(sector)? != *b"EFI PART", "a GPT without its protective record")?;
        }
        return Ok(vec![bare()]);
    } else {
        // A file system's own boot sector may look like a table.
        ensure(source.bytes::<2>(1080)? != [0x53, 0xef], "a partition table and a file system in one place")?;
        mbr_partitions(source, &entries)?
    };
    found.sort_unstable_by_key(|p| (p.range.start, p.range.end));
    let ranges = || found.iter().map(|p| &p.range);
    ensure(ranges().all(|p| p.start < p.end && p.end <= size), "a partition leaves the disk")?;
    let apart = ranges().zip(ranges().skip(1)).all(|(a, b)| a.end <= b.start);
    ensure(apart, "partitions overlap")?;
    Ok(found)
}

struct Entry {
    kind: u8,
    start: u64,
    sectors: u64,
}

fn entries(sector: &[u8; 512]) -> Vec<Entry> {
    let (entries, _) = sector.get(446..510).unwrap_or_default().as_chunks::<16>();
    let entry = |e: &[u8; 16]| {
        let [_, _, _, _, kind, ..] = *e;
        Entry { kind, start: le32(e, 8).into(), sectors: le32(e, 12).into() }
    };
    entries.iter().map(entry).filter(|e| e.kind != 0 && e.sectors != 0).collect()
}

/// A partition of an MBR that begins at sector `start`.
fn of_kind(kind: u8, start: u64, sectors: u64) -> Partition {
    // Sectors have 32 bits.
    let range = start * 512..(start + sectors) * 512;
    Partition { range, owner: if kind == LINUX { Owner::Linux } else { Owner::Other } }
}

/// A doubt about a partition that is a whole disk itself: that of a nested machine, or one that was put there later. An MBR is
/// one sector, and a GPT of large sectors lies apart, so both leave an old superblock behind them.
pub(super) fn none_inside(source: &mut Source<'_>, volume: &Range<u64>) -> Result<(), Stop> {
    let sectors = (volume.end - volume.start) / 512;
    let head = source.bytes::<512>(volume.start)?;
    // A file system's own boot code is hardly ever taken for one. Where an entry ends counts for nothing: that of a disk that
    // was made smaller, or that is larger than this, ends behind the volume.
    let (slots, _) = head.get(446..510).unwrap_or_default().as_chunks::<16>();
    let is_entry = |slot: &[u8; 16]| {
        let [flag, _, _, _, kind, ..] = *slot;
        let inside = kind == PROTECTIVE || (1..sectors).contains(&le32(slot, 8).into());
        matches!(flag, 0 | 0x80) && kind != 0 && inside
    };
    let is_table = head.ends_with(&[0x55, 0xaa]) && slots.iter().any(is_entry);
    ensure(!is_table, "it has a partition table of its own")?;
    for sector in [512, 4096] {
        let at = volume.start.saturating_add(sector);
        if at.saturating_add(8) <= volume.end {
            ensure(source.bytes::<8>(at)? != *b"EFI PART", "it has a partition table of its own")?;
        }
    }
    Ok(())
}

fn mbr_partitions(source: &mut Source<'_>, entries: &[Entry]) -> Result<Vec<Partition>, Stop> {
    let mut found = Vec::new();
    for entry in entries {
        if EXTENDED.contains(&entry.kind) {
            logical(source, entry, &mut found)?;
        } else {
            found.push(of_kind(entry.kind, entry.start, entry.sectors));
        }
    }
    Ok(found)
}

fn logical(source: &mut Source<'_>, extended: &Entry, found: &mut Vec<Partition>) -> Result<(), Stop> {
    let (base, end) = (extended.start, extended.start + extended.sectors);
    let mut at = base;
    for _ in 0..LOGICAL_MAX {
        let record = source.bytes::<512>(at * 512)?;
        ensure(record.ends_with(&[0x55, 0xaa]), "a logical partition without its record")?;
        let mut next = None;
        for entry in entries(&record).into_iter().take(2) {
            if EXTENDED.contains(&entry.kind) {
                next = Some(base + entry.start);
            } else {
                let start = at + entry.start;
                ensure(start + entry.sectors <= end, "a logical partition leaves its extended one")?;
                found.push(of_kind(entry.kind, start, entry.sectors));
            }
        }
        match next {
            None => return Ok(()),
            Some(next) => ensure(next > at && next < end, "logical partitions lead nowhere")?,
        }
        at = next.unwrap_or(end);
    }
    Err(Stop::Doubt("too many logical partitions"))
}

fn gpt(source: &mut Source<'_>) -> Result<Vec<Partition>, Stop> {
    for sector in [512, 4096] {
        let header = source.bytes::<92>(sector)?;
        if header.starts_with(b"EFI PART") {
            return gpt_at(source, &header, sector);
        }
    }
    Err(Stop::Doubt("a GPT whose header is gone"))
}

fn gpt_at(source: &mut Source<'_>, header: &[u8; 92], sector: u64) -> Result<Vec<Partition>, Stop> {
    ensure(le32(header, 12) == 92, "a GPT header of another length")?;
    let mut checked = *header;
    if let Some(field) = checked.get_mut(16..20) {
        field.fill(0);
    }
    ensure(crc32(&checked) == le32(header, 16), "a GPT header with another checksum")?;
    let (count, each) = (le32(header, 80), le32(header, 84));
    let sound = count <= GPT_ENTRIES_MAX && (128..=GPT_ENTRY_BYTES_MAX).contains(&each) && each.is_power_of_two();
    ensure(sound, "a GPT of sizes nobody writes")?;
    let at = le64(header, 72).checked_mul(sector).ok_or(Stop::Doubt("a GPT that leaves the disk"))?;
    let len = usize::try_from(u64::from(count) * u64::from(each)).unwrap_or(usize::MAX);
    let table = source.vec(at, len)?;
    ensure(crc32(&table) == le32(header, 88), "a GPT with another checksum")?;
    let mut found = Vec::new();
    for entry in table.chunks_exact(usize::try_from(each).unwrap_or(usize::MAX)) {
        if entry.iter().take(16).all(|b| *b == 0) {
            continue;
        }
        let first = le64(entry, 32).checked_mul(sector);
        let end = le64(entry, 40).checked_add(1).and_then(|end| end.checked_mul(sector));
        let (first, end) = first.zip(end).ok_or(Stop::Doubt("a partition leaves the disk"))?;
        let kind = (le32(entry, 0), le16(entry, 4), le16(entry, 6), le64(entry, 8).swap_bytes());
        let owner = if LINUX_TYPES.contains(&kind) { Owner::Linux } else { Owner::Other };
        found.push(Partition { range: first..end, owner });
    }
    Ok(found)
}

/// CRC-32 (IEEE): a few kilobytes once, so a table would only be in the way.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}
