//! An NBD export as a layer of a chain, read-only.
//!
//! Invariants
//! - A grain is `Zero` only if the server said that all of it reads as zeros; anything else is `Plain`.
//! - The server's answers are kept, at most [`KNOWN_MAX`] runs of them; the export is taken to be immutable, as
//!   a layer is.
//!
//! Not here: writing, dirty contexts ([`Client::dirty`]).

use std::{collections::BTreeMap, io, sync::Arc};

use aquifer_formats::{
    BlockRef, Content, Error as FormatError, FileSlot, Layer, Result as FormatResult, Storage, layer::scan_by_lookup,
    raw::next_file_id,
};
use parking_lot::RwLock;

use super::{Client, Error};
use crate::nbd::wire;

/// Granularity of the map in bytes.
const GRAIN: u64 = 4096;
/// Most bytes asked about at once.
const WINDOW: u64 = 1 << 30;
/// Most runs of the server's map kept.
const KNOWN_MAX: usize = 1 << 18;
/// Places the fingerprint looks at.
const SAMPLES: u64 = 64;

/// An export as a layer.
#[derive(Debug)]
pub struct NbdLayer {
    client: Arc<Client>,
    storage: Arc<dyn Storage>,
    id: u64,
    /// Start of a run of whole grains: its end, and whether it is zeros.
    known: RwLock<BTreeMap<u64, (u64, bool)>>,
}

impl NbdLayer {
    /// Takes the export a client is connected to.
    pub fn new(client: Arc<Client>) -> Self {
        let storage = Arc::new(NbdStorage { client: Arc::clone(&client) });
        Self { client, storage, id: next_file_id(), known: RwLock::default() }
    }

    fn find(&self, offset: u64) -> Option<(u64, bool)> {
        let known = self.known.read();
        let (_, (end, zero)) = known.range(..=offset).next_back()?;
        (offset < *end).then_some((*end, *zero))
    }

    /// Asks the server about what lies from the grain of `offset` on, and keeps the answer.
    fn ask(&self, offset: u64) -> FormatResult<(u64, bool)> {
        let size = self.client.size();
        let start = offset - offset % GRAIN;
        let extents = self
            .client
            .status(wire::CONTEXT_ALLOCATION, start, WINDOW.min(size - start))
            .map_err(|e| FormatError::io(self.client.shown(), "map", offset, io::Error::other(e)))?;
        let runs = whole_grains(
            start,
            size,
            extents.iter().map(|extent| (extent.offset + extent.len, extent.state & u64::from(wire::state::ZERO) != 0)),
        );
        let mut known = self.known.write();
        if known.len() + runs.len() > KNOWN_MAX {
            known.clear();
        }
        let mut at = start;
        let mut found = None;
        for (end, zero) in runs {
            if (at..end).contains(&offset) {
                found = Some((end, zero));
            }
            known.insert(at, (end, zero));
            at = end;
        }
        Ok(found.unwrap_or(((start + GRAIN).min(size), false)))
    }
}

/// Runs (end, zeros) from `start` on, widened to whole grains: a grain with any data in it is data. The last
/// grain counts only if the answer covers it, or the disk ends in it.
fn whole_grains(start: u64, size: u64, extents: impl Iterator<Item = (u64, bool)>) -> Vec<(u64, bool)> {
    let mut runs: Vec<(u64, bool)> = Vec::new();
    let mut at = start;
    let push = |runs: &mut Vec<(u64, bool)>, end: u64, zero: bool| match runs.last_mut() {
        Some((last, same)) if *same == zero => *last = end,
        _ => runs.push((end, zero)),
    };
    let mut mixed = false;
    for (end, zero) in extents {
        // The grain in which an earlier run ended.
        let tail = !at.is_multiple_of(GRAIN);
        if tail {
            let grain_end = at.next_multiple_of(GRAIN);
            mixed |= !zero;
            if end < grain_end && end < size {
                at = end;
                continue;
            }
            push(&mut runs, grain_end.min(size), !mixed);
            at = grain_end.min(size);
            if at >= end {
                continue;
            }
        }
        let whole = if end >= size { size } else { end - end % GRAIN };
        if whole > at {
            push(&mut runs, whole, zero);
        }
        mixed = !zero;
        at = end;
    }
    runs
}

impl Layer for NbdLayer {
    fn label(&self) -> &str {
        self.client.shown()
    }

    fn size(&self) -> u64 {
        self.client.size()
    }

    fn grain(&self) -> u64 {
        GRAIN
    }

    fn lookup(&self, offset: u64, len_max: u64) -> FormatResult<(Content, u64)> {
        let size = self.client.size();
        if offset >= size {
            return Err(FormatError::OutOfRange { path: self.label().into(), offset, len: len_max, size });
        }
        let (end, zero) = if self.client.has_context(wire::CONTEXT_ALLOCATION) {
            match self.find(offset) {
                Some(known) => known,
                None => self.ask(offset)?,
            }
        } else {
            (size, false)
        };
        let content = if zero { Content::Zero } else { Content::Plain { file: 0, offset } };
        Ok((content, len_max.min(end - offset)))
    }

    fn scan(&self, offset: u64, len: u64, each: &mut dyn FnMut(u64, u64, Content)) -> FormatResult<()> {
        scan_by_lookup(self, offset, len, each)
    }

    fn file(&self, slot: FileSlot) -> FormatResult<&Arc<dyn Storage>> {
        if slot == 0 {
            Ok(&self.storage)
        } else {
            Err(FormatError::corrupt(self.label(), 0, format!("an NBD export has no file {slot}")))
        }
    }

    fn file_id(&self, _slot: FileSlot) -> u64 {
        self.id
    }

    fn fingerprint(&self) -> FormatResult<[u8; 32]> {
        let size = self.client.size();
        let mut hash = blake3::Hasher::new();
        hash.update(b"nbd").update(&size.to_le_bytes());
        let mut page = [0u8; 4096];
        for i in 0..SAMPLES {
            let offset = size / SAMPLES * i;
            let len = usize::try_from(size - offset).unwrap_or(usize::MAX).min(page.len());
            let part = page.get_mut(..len).unwrap_or_default();
            self.storage.read_at(offset, part).map_err(|e| FormatError::io(self.label(), "read", offset, e))?;
            hash.update(part);
        }
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, _out: &mut Vec<u8>) -> FormatResult<()> {
        Err(FormatError::corrupt(self.label(), block.offset, "an NBD export has no packed blocks"))
    }
}

/// An export as bytes at rest, read-only.
#[derive(Debug)]
struct NbdStorage {
    client: Arc<Client>,
}

fn as_io(error: Error) -> io::Error {
    match error {
        Error::Io { source, .. } => source,
        Error::Impossible { .. } => io::Error::new(io::ErrorKind::UnexpectedEof, error),
        other => io::Error::other(other),
    }
}

impl Storage for NbdStorage {
    fn label(&self) -> &str {
        self.client.shown()
    }

    fn identity(&self) -> Option<u64> {
        None
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.client.size())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.client.read(offset, buf).map_err(as_io)
    }

    fn read_now(&self, _offset: u64, _buf: &mut [u8]) -> io::Result<bool> {
        Ok(false)
    }

    fn allocated(&self, _offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
        Ok((true, len_max))
    }

    aquifer_formats::storage_is_read_only!();
}
