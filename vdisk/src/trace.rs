//! Boot traces: which parts of its disk a machine read first, in order, so that the next recovery can fetch them
//! before they are asked for.
//!
//! `docs/formats/trace.md` draws the file. A trace names places and times, never content; it belongs to a machine
//! and a disk, not to a restore point, so it outlives every later increment.
//!
//! Invariants
//! - A trace is a hint. Whatever it says, hydration copies only what the chain holds where the disk is absent: a wrong,
//!   old or hostile one costs time, never bytes.
//! - A trace is bounded in steps, bytes and minutes, when it is recorded and when it is read.
//! - A file that does not decode whole is refused whole.
//!
//! Not here: where traces are kept, and when they are fetched (`hydrate`).

mod record;

use std::ops::Range;

use aquifer_formats::Error as FormatError;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

pub(crate) use self::record::Recorder;
use crate::Result;

/// Most steps of a trace.
pub const STEPS_MAX: usize = 32_768;

/// Most bytes that all steps of a trace name together.
pub const BYTES_MAX: u64 = 1 << 30;

/// How long after its first read a machine's reads are recorded, in milliseconds.
pub const RECORD_MS: u32 = 300_000;

/// Longest file of a trace, in bytes.
pub const FILE_BYTES_MAX: usize = HEAD_BYTES + STEPS_MAX * STEP_BYTES;

/// What places are counted in, in bytes.
const BLOCK_BYTES: u64 = 4096;
const HEAD_BYTES: usize = size_of::<Head>();
const STEP_BYTES: usize = size_of::<StoredStep>();

/// The tail catches a copy in text mode and a cut at a zero byte.
const MAGIC: [u8; 8] = *b"AQTRC\r\n\x1A";
const VERSION: u32 = 1;
/// The machine was watched for as long as a trace may be, or until it was full.
const FLAG_COMPLETE: u32 = 1;

/// First bytes of the file; the steps follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    version: U32,
    /// CRC-32C over the whole file with this field zeroed.
    crc: U32,
    /// Size of the disk it was recorded on, in bytes.
    size: U64,
    steps: U32,
    flags: U32,
    reserved: [u8; 32],
}

/// One step as it is stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StoredStep {
    /// First block of 4 KiB.
    block: U64,
    /// How many, at least 1.
    count: U32,
    /// When it was read first, in milliseconds after the machine's first read.
    after_ms: U32,
}

const _: () = assert!(HEAD_BYTES == 64);
const _: () = assert!(STEP_BYTES == 16);

/// A run of blocks that was read for the first time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Bytes of the disk; the start is a multiple of 4096, the end too unless the disk ends there.
    pub range: Range<u64>,
    /// When, in milliseconds after the machine's first read.
    pub after_ms: u32,
}

/// What a machine read first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Size of the disk it was recorded on, in bytes.
    pub size: u64,
    /// Whether recording has ended.
    pub complete: bool,
    /// In the order in which they were read.
    pub steps: Vec<Step>,
}

/// Fetches look this far ahead in the trace for what lies side by side on the disk.
const GATHER_STEPS: usize = 64;
const GATHER_BYTES: u64 = 2 << 20;
/// A gap this small costs less than a second request.
const GAP_BYTES: u64 = 16 << 10;
/// Longest single fetch: a guest may be waiting behind it.
const FETCH_BYTES_MAX: u64 = 256 << 10;

impl Trace {
    /// Bytes that the steps name.
    pub fn bytes(&self) -> u64 {
        self.steps.iter().map(|s| s.range.end - s.range.start).sum()
    }

    /// The file.
    pub fn encode(&self) -> Vec<u8> {
        let steps = self.steps.get(..self.steps.len().min(STEPS_MAX)).unwrap_or_default();
        let head = Head {
            magic: MAGIC,
            version: U32::new(VERSION),
            crc: U32::ZERO,
            size: U64::new(self.size),
            steps: U32::new(u32::try_from(steps.len()).unwrap_or(0)),
            flags: U32::new(if self.complete { FLAG_COMPLETE } else { 0 }),
            reserved: [0; 32],
        };
        let mut out = Vec::with_capacity(HEAD_BYTES + steps.len() * STEP_BYTES);
        out.extend_from_slice(head.as_bytes());
        for step in steps {
            let blocks = (step.range.end - step.range.start).div_ceil(BLOCK_BYTES);
            let stored = StoredStep {
                block: U64::new(step.range.start / BLOCK_BYTES),
                count: U32::new(u32::try_from(blocks).unwrap_or(u32::MAX)),
                after_ms: U32::new(step.after_ms),
            };
            out.extend_from_slice(stored.as_bytes());
        }
        let crc = crc32c::crc32c(&out).to_le_bytes();
        if let Some(field) = out.get_mut(12..16) {
            field.copy_from_slice(&crc);
        }
        out
    }

    /// Reads a file; `label` names it in messages. The bytes may be anybody's.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`], [`FormatError::Truncated`], [`FormatError::Unsupported`] for another version.
    pub fn decode(label: &str, bytes: &[u8]) -> Result<Self> {
        let (head, rest) = check_head(label, bytes)?;
        let size = head.size.get();
        let mut steps = Vec::with_capacity(rest.len() / STEP_BYTES);
        let (mut total, mut last_ms) = (0u64, 0);
        for (number, stored) in rest.chunks_exact(STEP_BYTES).enumerate() {
            let at = (HEAD_BYTES + number * STEP_BYTES) as u64;
            let bad = |what: &str| FormatError::corrupt(label, at, format!("step {number}: {what}"));
            let stored = StoredStep::read_from_bytes(stored).map_err(|_| bad("cut short"))?;
            let start = stored.block.get().checked_mul(BLOCK_BYTES).filter(|start| *start < size);
            let start = start.ok_or_else(|| bad("it begins behind the disk"))?;
            let len = u64::from(stored.count.get()) * BLOCK_BYTES;
            let end = start.checked_add(len).filter(|end| len > 0 && *end <= size.next_multiple_of(BLOCK_BYTES));
            let end = end.ok_or_else(|| bad("it is empty or ends behind the disk"))?.min(size);
            let after_ms = stored.after_ms.get();
            if after_ms < last_ms || after_ms > RECORD_MS {
                return Err(bad("its time is out of order").into());
            }
            last_ms = after_ms;
            total += end - start;
            if total > BYTES_MAX {
                return Err(bad("the steps name too many bytes").into());
            }
            steps.push(Step { range: start..end, after_ms });
        }
        Ok(Self { size, complete: head.flags.get() & FLAG_COMPLETE != 0, steps })
    }

    /// The steps as fetches for a disk of `size` bytes: in order, except that of steps near in time those that lie
    /// side by side are fetched at once. Each at most 256 KiB.
    pub fn fetches(&self, size: u64) -> Vec<Range<u64>> {
        let mut out = Vec::new();
        let mut rest = self.steps.as_slice();
        while !rest.is_empty() {
            let mut bytes = 0u64;
            let more = |step: &&Step| {
                bytes = bytes.saturating_add(step.range.end - step.range.start);
                bytes <= GATHER_BYTES
            };
            let count = rest.iter().take(GATHER_STEPS).take_while(more).count().max(1);
            let (front, tail) = rest.split_at(count.min(rest.len()));
            gather(front, size, &mut out);
            rest = tail;
        }
        out
    }
}

fn check_head<'a>(label: &str, bytes: &'a [u8]) -> Result<(Head, &'a [u8])> {
    let bad = |offset, what: String| FormatError::corrupt(label, offset, what);
    let Ok((head, rest)) = Head::read_from_prefix(bytes) else {
        let what = "the head of a boot trace".to_owned();
        let (len, need) = (bytes.len() as u64, HEAD_BYTES as u64);
        return Err(FormatError::Truncated { path: label.into(), len, need, what }.into());
    };
    if head.magic != MAGIC {
        return Err(bad(0, "no boot trace: another magic".into()).into());
    }
    if head.version.get() != VERSION {
        let what = format!("version {} of a boot trace; this build reads {VERSION}", head.version.get());
        return Err(FormatError::unsupported(label, what).into());
    }
    let steps = usize::try_from(head.steps.get()).unwrap_or(usize::MAX);
    if steps > STEPS_MAX || rest.len() != steps.saturating_mul(STEP_BYTES) {
        return Err(bad(24, format!("{steps} steps in {} bytes, {STEPS_MAX} are possible", rest.len())).into());
    }
    let bare = Head { crc: U32::ZERO, ..head };
    if crc32c::crc32c_append(crc32c::crc32c(bare.as_bytes()), rest) != head.crc.get() {
        return Err(bad(12, "the checksum does not match".into()).into());
    }
    if head.size.get() == 0 || i64::try_from(head.size.get()).is_err() {
        return Err(bad(16, format!("a disk of {} bytes", head.size.get())).into());
    }
    Ok((head, rest))
}

/// Appends steps, sorted and joined, as fetches.
fn gather(steps: &[Step], size: u64, out: &mut Vec<Range<u64>>) {
    let inside = |step: &Step| step.range.start.min(size)..step.range.end.min(size);
    let mut ranges: Vec<Range<u64>> = steps.iter().map(inside).filter(|r| r.start < r.end).collect();
    ranges.sort_unstable_by_key(|r| r.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end.saturating_add(GAP_BYTES) => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    for range in joined {
        let mut at = range.start;
        while at < range.end {
            let end = (at - at % FETCH_BYTES_MAX).saturating_add(FETCH_BYTES_MAX).min(range.end);
            out.push(at..end);
            at = end;
        }
    }
}

#[cfg(test)]
mod tests;
