//! The log: what was under way when the disk was last used, replayed in memory.
//!
//! A VHDX file that was copied from under a running machine, or whose computer crashed, has changes of its
//! tables in the log only. The file is never written: a [`View`] is the file with those changes over it.
//!
//! Invariants
//! - Only the newest intact sequence of entries is replayed; an entry whose checksum fails ends it, as
//!   if it had never been written.
//! - Memory is bounded by the log's own length, time by a few times that.
//! - A file shorter than it was when the newest entry was written is refused.

use std::{collections::HashMap, sync::Arc};

use super::header::{Guid, Header, REGION_UNIT, checksum};
use crate::{
    Error, Result,
    storage::{Patch, View},
    tables::TableFile,
};

/// Longest log that is replayed, in bytes; Windows and QEMU make 1 MiB.
const LOG_BYTES_MAX: u64 = 64 << 20;
const SECTOR: usize = 4096;
const ENTRY_HEAD: usize = 64;
const DESCRIPTOR: usize = 32;
/// How many of the newest entries are tried as the head of a sequence.
const HEADS_MAX: usize = 64;

/// One entry whose checksum holds.
#[derive(Debug)]
struct Entry {
    /// Where it lies in the log, in bytes.
    at: usize,
    bytes: Vec<u8>,
    sequence: u64,
    tail: usize,
    flushed_len: u64,
    last_len: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

/// `len` bytes of the circular log from `at` on.
fn around(log: &[u8], at: usize, len: usize) -> Option<Vec<u8>> {
    let first = log.get(at..)?;
    let first = first.get(..len).unwrap_or(first);
    let rest = log.get(..len.checked_sub(first.len())?)?;
    Some([first, rest].concat())
}

/// The entry at `at`, if there is a valid one of this log. `budget` pays for the bytes that are summed up.
fn entry(log: &[u8], at: usize, id: &Guid, budget: &mut u64) -> Option<Entry> {
    let head = around(log, at, ENTRY_HEAD)?;
    let len = usize::try_from(u32_at(&head, 8)).ok()?;
    let tail = usize::try_from(u32_at(&head, 12)).ok()?;
    let fits = len >= SECTOR && len.is_multiple_of(SECTOR) && len <= log.len();
    if !head.starts_with(b"loge")
        || head.get(32..48)? != id
        || !fits
        || tail >= log.len()
        || !tail.is_multiple_of(SECTOR)
    {
        return None;
    }
    *budget = budget.checked_sub(len as u64)?;
    let bytes = around(log, at, len)?;
    let sequence = u64_at(&head, 16);
    let valid = sequence > 0 && u32_at(&head, 4) == checksum(&bytes, 4);
    let (flushed_len, last_len) = (u64_at(&head, 48), u64_at(&head, 56));
    valid.then_some(Entry { at, bytes, sequence, tail, flushed_len, last_len })
}

/// All valid entries. What lies inside a valid entry is its data, so it is not looked at again.
fn entries(log: &[u8], id: &Guid) -> Vec<Entry> {
    let mut budget = 8 * log.len() as u64;
    let (mut at, mut found) = (0, Vec::new());
    while at < log.len() {
        match entry(log, at, id, &mut budget) {
            Some(entry) => {
                at += entry.bytes.len();
                found.push(entry);
            }
            None => at += SECTOR,
        }
    }
    found
}

/// The newest run of entries that reaches back to the tail its last one names, oldest first.
fn active<'a>(entries: &'a [Entry], log_len: usize) -> Option<Vec<&'a Entry>> {
    let by_place: HashMap<usize, &Entry> = entries.iter().map(|entry| (entry.at, entry)).collect();
    let mut heads: Vec<&Entry> = entries.iter().collect();
    heads.sort_unstable_by_key(|entry| std::cmp::Reverse(entry.sequence));
    heads.into_iter().take(HEADS_MAX).find_map(|head| {
        let mut run: Vec<&'a Entry> = vec![by_place.get(&head.tail).copied()?];
        while let Some(last) = run.last().copied().filter(|last| last.sequence != head.sequence) {
            let next = by_place.get(&((last.at + last.bytes.len()) % log_len)).copied()?;
            if next.sequence != last.sequence.checked_add(1)? || run.len() > entries.len() {
                return None;
            }
            run.push(next);
        }
        run.last().is_some_and(|last| last.at == head.at).then_some(run)
    })
}

/// `file`, or the file as it is once its log is replayed.
pub(super) fn replay(file: TableFile, header: &Header) -> Result<TableFile> {
    if header.log == [0; 16] {
        return Ok(file);
    }
    let bad = |what: String| Error::corrupt(file.label(), header.log_offset, format!("log: {what}"));
    let Header { log_offset, log_length, .. } = *header;
    if log_length == 0 || !log_length.is_multiple_of(REGION_UNIT) || log_offset < REGION_UNIT {
        return Err(bad(format!("{log_length} bytes at {log_offset}")));
    }
    if log_length > LOG_BYTES_MAX {
        return Err(Error::unsupported(file.label(), format!("a log of {log_length} bytes to replay")));
    }
    let log = file.read(log_offset, log_length, "the log")?;
    let entries = entries(&log, &header.log);
    if entries.is_empty() {
        // Opened for writing, and nothing was under way.
        return Ok(file);
    }
    let run = active(&entries, log.len()).ok_or_else(|| bad("no sequence of entries is complete".into()))?;
    let newest = run.last().ok_or_else(|| bad("no entry".into()))?;
    if file.len < newest.flushed_len {
        return Err(Error::Truncated {
            path: file.label().into(),
            len: file.len,
            need: newest.flushed_len,
            what: "the file as its log knows it".into(),
        });
    }
    let mut replayed = View::extended(file.storage.clone(), file.len, file.len.max(newest.last_len));
    for entry in run {
        apply(entry, &mut replayed).map_err(|what| bad(format!("entry {}: {what}", entry.sequence)))?;
    }
    let len = replayed.size();
    Ok(TableFile { storage: Arc::new(replayed), len, ..file })
}

/// Lays what one entry changed over the file. All it names are multiples of a sector.
fn apply(entry: &Entry, file: &mut View) -> Result<(), String> {
    let bytes = &entry.bytes;
    let count = usize::try_from(u32_at(bytes, 24)).unwrap_or(usize::MAX);
    let area = count.checked_mul(DESCRIPTOR).and_then(|n| n.checked_add(ENTRY_HEAD));
    let area = area.map(|n| n.next_multiple_of(SECTOR)).filter(|n| *n <= bytes.len());
    let mut data_at = area.ok_or_else(|| format!("{count} descriptors"))?;
    for number in 0..count {
        let at = ENTRY_HEAD + number * DESCRIPTOR;
        let descriptor = bytes.get(at..at + DESCRIPTOR).unwrap_or_default();
        let place = u64_at(descriptor, 16);
        if u64_at(descriptor, 24) != entry.sequence || !place.is_multiple_of(SECTOR as u64) {
            return Err(format!("descriptor {number} is of another entry, or for offset {place}"));
        }
        match descriptor.first_chunk() {
            Some(b"zero") => {
                let end = place.checked_add(u64_at(descriptor, 8)).filter(|end| end.is_multiple_of(SECTOR as u64));
                let end = end.ok_or_else(|| format!("descriptor {number} zeroes an impossible range"))?;
                file.put(place..end.max(place), Patch::Zeros);
            }
            Some(b"desc") => {
                let data = bytes.get(data_at..data_at + SECTOR).ok_or_else(|| "its data is missing".to_owned())?;
                data_at += SECTOR;
                let (high, low) = (u32_at(data, 4), u32_at(data, SECTOR - 4));
                if !data.starts_with(b"data") || u64::from(high) << 32 | u64::from(low) != entry.sequence {
                    return Err(format!("the data of descriptor {number} is of another entry"));
                }
                let (leading, trailing) = (descriptor.get(8..16), descriptor.get(4..8));
                let page = [
                    leading.unwrap_or_default(),
                    data.get(8..SECTOR - 4).unwrap_or_default(),
                    trailing.unwrap_or_default(),
                ];
                let end = place.checked_add(SECTOR as u64).ok_or_else(|| format!("a page at {place}"))?;
                file.put(place..end, Patch::Bytes(page.concat().into()));
            }
            _ => return Err(format!("descriptor {number} is of no known kind")),
        }
    }
    Ok(())
}
