//! Where a disk's partitions lie: GPT, MBR with logical partitions, or none.
//!
//! Invariants
//! - Partitions that overlap, leave the disk, or come from a table that contradicts itself are a doubt about all of them.
//! - A table is bounded before it is read; logical partitions are walked forwards only.
//!
//! Not here: what is in them.

use std::ops::Range;

use super::source::{Source, Stop, ensure, le32, le64};

const GPT_ENTRIES_MAX: u32 = 1024;
const GPT_ENTRY_BYTES_MAX: u32 = 4096;
const LOGICAL_MAX: usize = 128;
const PROTECTIVE: u8 = 0xee;
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// The partitions, in order of the disk; the whole disk where it has no table.
pub(super) fn partitions(source: &mut Source<'_>) -> Result<Vec<Range<u64>>, Stop> {
    let size = source.size();
    let mbr = source.bytes::<512>(0)?;
    let signed = mbr.ends_with(&[0x55, 0xaa]);
    let entries = if signed { entries(&mbr) } else { Vec::new() };
    let bare = || -> Range<u64> { 0..size };
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
    found.sort_unstable_by_key(|p| (p.start, p.end));
    ensure(found.iter().all(|p| p.start < p.end && p.end <= size), "a partition leaves the disk")?;
    let apart = found.iter().zip(found.iter().skip(1)).all(|(a, b)| a.end <= b.start);
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

fn bytes(start: u64, sectors: u64) -> Range<u64> {
    // Sectors have 32 bits.
    start * 512..(start + sectors) * 512
}

fn mbr_partitions(source: &mut Source<'_>, entries: &[Entry]) -> Result<Vec<Range<u64>>, Stop> {
    let mut found = Vec::new();
    for entry in entries {
        if EXTENDED.contains(&entry.kind) {
            logical(source, entry, &mut found)?;
        } else {
            found.push(bytes(entry.start, entry.sectors));
        }
    }
    Ok(found)
}

fn logical(source: &mut Source<'_>, extended: &Entry, found: &mut Vec<Range<u64>>) -> Result<(), Stop> {
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
                let partition = at + entry.start..at + entry.start + entry.sectors;
                ensure(partition.end <= end, "a logical partition leaves its extended one")?;
                found.push(partition.start * 512..partition.end * 512);
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

fn gpt(source: &mut Source<'_>) -> Result<Vec<Range<u64>>, Stop> {
    for sector in [512, 4096] {
        let header = source.bytes::<92>(sector)?;
        if header.starts_with(b"EFI PART") {
            return gpt_at(source, &header, sector);
        }
    }
    Err(Stop::Doubt("a GPT whose header is gone"))
}

fn gpt_at(source: &mut Source<'_>, header: &[u8; 92], sector: u64) -> Result<Vec<Range<u64>>, Stop> {
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
        found.push(first..end);
    }
    Ok(found)
}

/// CRC-32 (IEEE): a few kilobytes once, so a table would only be in the way.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}
