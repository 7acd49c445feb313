//! What has been acknowledged and not flushed, kept where the next process finds it.
//!
//! A guest outlives the process that serves its disk. It was told that a write is done, and it reads that write back
//! from the disk whenever it likes; that no flush came in between only means that a power failure may undo it. So the
//! overlay's memory has a double in two files, written before each acknowledgement and never synced: the page cache
//! keeps them when a process is killed, and when the power fails they are not wanted.
//!
//! ```text
//! unflushed.0, unflushed.1:   magic 8 | boot 16 | epoch 8 | record | record | ...
//! record:                     magic 4 | crc32c 4 | epoch 8 | offset 8 | len 8 | kind 4 | zero 4 | bytes, of a write or base
//! ```
//!
//! Invariants
//! - An operation is applied first, recorded second, acknowledged third. A flush turns to the other file before it
//!   begins; when it has succeeded, everything in the file that was left is durable, and that file is emptied.
//! - What counts in a file are the records of the epoch its header names; one write of the header empties it.
//! - No epoch is ever used twice, in this or any other life: each life begins at one that is drawn by lot. Behind the
//!   last record of a file lie records of earlier epochs, whole and of the same lengths; they must never count again.
//! - Files are emptied in the order they were written in: the older alone would undo what the newer holds.
//! - Files of another boot are never replayed: after a power failure the overlay alone is the truth, and a record
//!   here could be older than what it holds.
//! - What a write that covers part of an absent block was merged with is recorded before it: replay needs no source.
//! - A record that was cut by a kill was never acknowledged. It ends its file.
//! - Once closed (the overlay writes through from then on) nothing is recorded and nothing is ever replayed.
//!
//! Not here: durability, and the order of overlapping operations that are in flight together, which no disk has.

use std::{io, path::Path};

use aquifer_formats::{
    Error as FormatError, Storage,
    planted::{Bug, planted},
    storage::{Access, FileStorage},
};

use crate::{Error, Result, Zeroing, sync::Mutex};

/// Length of one file, reserved at its making. What does not fit waits for a flush.
const FILE_BYTES: u64 = 32 << 20;

const FILE_MAGIC: [u8; 8] = *b"AQUNFL01";
const FILE_HEADER_BYTES: usize = 32;
const RECORD_MAGIC: [u8; 4] = *b"UNFL";
const RECORD_HEADER_BYTES: usize = 40;

/// Where the first record lies.
const START: u64 = FILE_HEADER_BYTES as u64;

/// Longest write that is believed in a file; the doors take no longer ones.
const WRITE_BYTES_MAX: u64 = 64 << 20;

const KIND_WRITE: u32 = 1;
const KIND_TRIM: u32 = 2;
const KIND_ZERO: u32 = 3;
const KIND_BASE: u32 = 4;

/// Which boot of the machine this is: the kernel's `boot_id`.
pub type Boot = [u8; 16];

/// An operation, as it is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation<'a> {
    /// Bytes written at an offset.
    Write(u64, &'a [u8]),
    /// A range that reads as zeros.
    Zero(u64, u64, Zeroing),
    /// What the chain holds in a block that the next operation covers in part: whole overlay blocks.
    Base(u64, &'a [u8]),
}

/// The two files.
#[derive(Debug)]
pub(crate) struct Unflushed {
    files: [FileStorage; 2],
    state: Mutex<State>,
    boot: Boot,
}

#[derive(Debug)]
struct State {
    /// The file that is written now, and where.
    active: usize,
    at: u64,
    /// What each header names; 0 for an empty file. Within a life they only grow.
    epochs: [u64; 2],
    newest: u64,
    closed: bool,
}

/// What a flush empties once it has succeeded: a file, as of an epoch.
#[derive(Debug)]
#[must_use = "a file that is never emptied is replayed"]
pub(crate) struct Turned(Option<(usize, u64)>);

impl Unflushed {
    /// Opens or makes the files in `dir` and hands what they hold to `replay`, in order. What was replayed stays in
    /// them until [`Unflushed::replayed`].
    ///
    /// # Errors
    /// I/O, and what `replay` reports.
    pub(crate) fn open(dir: &Path, boot: Boot, replay: &mut dyn FnMut(Operation<'_>) -> Result<()>) -> Result<Self> {
        let files = [open_file(&dir.join(NAMES[0]))?, open_file(&dir.join(NAMES[1]))?];
        let mut epochs = [0, 0];
        for (file, epoch) in files.iter().zip(&mut epochs) {
            *epoch = epoch_of(file, boot)?;
        }
        let mut order = by_age(epochs);
        if planted(Bug::KeptOutOfOrder) {
            order.reverse();
        }
        for index in order {
            if let (Some(file), Some(epoch)) = (files.get(index), epochs.get(index).filter(|e| **e > 0)) {
                replay_file(file, *epoch, replay)?;
            }
        }
        let state = State { active: 0, at: START, epochs, newest: 0, closed: true };
        Ok(Self { files, state: Mutex::new(state), boot })
    }

    /// What was replayed is durable: begins anew.
    ///
    /// # Errors
    /// I/O.
    pub(crate) fn replayed(&self) -> Result<()> {
        let mut state = self.state.lock();
        self.empty(&mut state)?;
        let first = any_epoch();
        self.name_epoch(&mut state, 0, first)?;
        (state.active, state.at, state.newest, state.closed) = (0, START, first, false);
        Ok(())
    }

    /// Records an operation that has been applied. `false`: first flush, then try again.
    ///
    /// # Errors
    /// I/O; the operation must not be acknowledged then.
    pub(crate) fn record(&self, operation: Operation<'_>) -> Result<bool> {
        let (kind, offset, len, bytes) = match operation {
            Operation::Write(offset, bytes) => (KIND_WRITE, offset, bytes.len() as u64, bytes),
            Operation::Zero(offset, len, Zeroing::MayTrim) => (KIND_TRIM, offset, len, &[][..]),
            Operation::Zero(offset, len, Zeroing::KeepSpace) => (KIND_ZERO, offset, len, &[][..]),
            Operation::Base(offset, bytes) => (KIND_BASE, offset, bytes.len() as u64, bytes),
        };
        let mut state = self.state.lock();
        if state.closed {
            return Ok(true);
        }
        let end = state.at + (RECORD_HEADER_BYTES + bytes.len()) as u64;
        // A file takes one record of any length.
        if end > FILE_BYTES && state.at > START {
            return Ok(false);
        }
        let mut header = [0; RECORD_HEADER_BYTES];
        put(&mut header, 0, &RECORD_MAGIC);
        put(&mut header, 8, &state.newest.to_le_bytes());
        put(&mut header, 16, &offset.to_le_bytes());
        put(&mut header, 24, &len.to_le_bytes());
        put(&mut header, 32, &kind.to_le_bytes());
        let crc = checksum(&header, bytes);
        put(&mut header, 4, &crc.to_le_bytes());
        let Some(file) = self.files.get(state.active) else { return Ok(true) };
        // The bytes first: a header is found only where they are whole.
        write(file, state.at + RECORD_HEADER_BYTES as u64, bytes)?;
        if !planted(Bug::WriteNotKept) {
            write(file, state.at, &header)?;
        }
        state.at = end;
        Ok(true)
    }

    /// A flush begins: what is recorded from now on may not be covered by it.
    ///
    /// # Errors
    /// I/O.
    pub(crate) fn turn(&self) -> Result<Turned> {
        let mut state = self.state.lock();
        let (active, other) = (state.active, 1 - state.active);
        if state.closed {
            return Ok(Turned(None));
        }
        if let Some(epoch) = state.epochs.get(other).copied().filter(|epoch| *epoch > 0) {
            // Left by a flush that is still on its way, or that failed: this one covers it as well.
            return Ok(Turned(Some((other, epoch))));
        }
        if state.at == START {
            return Ok(Turned(None));
        }
        let epoch = state.newest;
        self.name_epoch(&mut state, other, epoch + 1)?;
        (state.active, state.at, state.newest) = (other, START, epoch + 1);
        Ok(Turned(Some((active, epoch))))
    }

    /// The flush that began with `turned` has succeeded.
    ///
    /// # Errors
    /// I/O.
    pub(crate) fn flushed(&self, turned: &Turned) -> Result<()> {
        let Some((file, epoch)) = turned.0 else { return Ok(()) };
        let mut state = self.state.lock();
        if state.epochs.get(file) == Some(&epoch) {
            self.name_epoch(&mut state, file, 0)?;
        }
        Ok(())
    }

    /// Everything recorded is durable, and whatever comes now needs no double.
    ///
    /// # Errors
    /// I/O.
    pub(crate) fn close(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.closed = true;
        self.empty(&mut state)
    }

    /// Empties both files, the older one first.
    fn empty(&self, state: &mut State) -> Result<()> {
        by_age(state.epochs).into_iter().try_for_each(|index| self.name_epoch(state, index, 0))
    }

    fn name_epoch(&self, state: &mut State, index: usize, epoch: u64) -> Result<()> {
        let mut header = [0; FILE_HEADER_BYTES];
        put(&mut header, 0, &FILE_MAGIC);
        put(&mut header, 8, &self.boot);
        put(&mut header, 24, &epoch.to_le_bytes());
        if let (Some(file), Some(slot)) = (self.files.get(index), state.epochs.get_mut(index)) {
            write(file, 0, &header)?;
            *slot = epoch;
        }
        Ok(())
    }
}

/// Names of the files.
pub const NAMES: [&str; 2] = ["unflushed.0", "unflushed.1"];

/// Indices of the files, the one written earlier first.
fn by_age(epochs: [u64; 2]) -> [usize; 2] {
    let [first, second] = epochs;
    if first <= second { [0, 1] } else { [1, 0] }
}

/// An epoch nobody has used, with room to count on from it.
fn any_epoch() -> u64 {
    let (lot, _) = uuid::Uuid::new_v4().as_u64_pair();
    (lot >> 1).max(1)
}

fn open_file(path: &Path) -> Result<FileStorage> {
    if path.exists() {
        return Ok(FileStorage::open(path, Access::ReadWrite)?);
    }
    let file = FileStorage::open(path, Access::CreateNew)?;
    file.reserve(0, FILE_BYTES).map_err(|e| failed(&file, "reserve", 0, e))?;
    Ok(file)
}

/// The epoch whose records count; 0 for none.
fn epoch_of(file: &FileStorage, boot: Boot) -> Result<u64> {
    let mut header = [0; FILE_HEADER_BYTES];
    if len(file)? < START {
        return Ok(0);
    }
    read(file, 0, &mut header)?;
    let same_boot = header.get(8..24) == Some(&boot[..]) || planted(Bug::OtherBootReplayed);
    let ours = header.starts_with(&FILE_MAGIC) && same_boot;
    Ok(if ours { field(&header, 24) } else { 0 })
}

fn replay_file(file: &FileStorage, epoch: u64, replay: &mut dyn FnMut(Operation<'_>) -> Result<()>) -> Result<()> {
    let end = len(file)?;
    let mut at = START;
    while at + RECORD_HEADER_BYTES as u64 <= end {
        let mut header = [0; RECORD_HEADER_BYTES];
        read(file, at, &mut header)?;
        let (offset, len, kind) = (field(&header, 16), field(&header, 24), field(&header, 32));
        let stored = if matches!(u32::try_from(kind), Ok(KIND_WRITE | KIND_BASE)) { len } else { 0 };
        at += RECORD_HEADER_BYTES as u64;
        let of_epoch = field(&header, 8) == epoch || planted(Bug::KeptTooLong);
        let known = header.starts_with(&RECORD_MAGIC) && of_epoch;
        if !known || stored > WRITE_BYTES_MAX || stored > end - at {
            return Ok(());
        }
        let mut bytes = vec![0; usize::try_from(stored).unwrap_or(0)];
        read(file, at, &mut bytes)?;
        let crc = header.get(4..8).and_then(|c| c.try_into().ok()).map_or(0, u32::from_le_bytes);
        put(&mut header, 4, &[0; 4]);
        if checksum(&header, &bytes) != crc && !planted(Bug::KeptUnchecked) {
            return Ok(());
        }
        at += stored;
        replay(match u32::try_from(kind) {
            Ok(KIND_WRITE) => Operation::Write(offset, &bytes),
            Ok(KIND_TRIM) => Operation::Zero(offset, len, Zeroing::MayTrim),
            Ok(KIND_ZERO) => Operation::Zero(offset, len, Zeroing::KeepSpace),
            Ok(KIND_BASE) => Operation::Base(offset, &bytes),
            _ => return Ok(()),
        })?;
    }
    Ok(())
}

/// Over the header with its own field zero, and the bytes.
fn checksum(header: &[u8; RECORD_HEADER_BYTES], bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(header), bytes)
}

fn put(header: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(slot) = header.get_mut(at..at + bytes.len()) {
        slot.copy_from_slice(bytes);
    }
}

fn field(header: &[u8], at: usize) -> u64 {
    header.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn len(file: &FileStorage) -> Result<u64> {
    Ok(file.len().map_err(|e| FormatError::io(file.label(), "stat", 0, e))?)
}

fn read(file: &FileStorage, at: u64, bytes: &mut [u8]) -> Result<()> {
    Ok(file.read_at(at, bytes).map_err(|e| FormatError::io(file.label(), "read", at, e))?)
}

fn write(file: &FileStorage, at: u64, bytes: &[u8]) -> Result<()> {
    file.write_at(at, bytes).map_err(|e| failed(file, "write", at, e))
}

fn failed(file: &FileStorage, action: &'static str, at: u64, e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::NoSpace { path: file.label().to_owned(), what: "writes that are not flushed yet".into() }
        }
        _ => FormatError::io(file.label(), action, at, e).into(),
    }
}

#[cfg(test)]
mod tests;
