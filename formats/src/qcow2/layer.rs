//! One disk of an image as a layer: the walk over its tables.
//!
//! Invariants
//! - `lookup` and `scan` see the same walk; the first keeps the tables it reads, the second does not.
//! - A broken entry spoils only its own range: a run that reaches it ends before it.
//! - What is told as stored lies inside its file, as far as the disk goes.
//!
//! Not here: tables and entries (`table`), which file a name leads to.

use std::{ops::ControlFlow, sync::Arc};

use super::{
    header::Header,
    table::{Cluster, Geometry, Table},
};
use crate::{
    BlockRef, Codec, Content, Error, FileSlot, Layer, Result, Storage,
    codec::{self, DecodeError, Tail},
    raw::file_id,
    storage::View,
    tables::{PieceCache, TableFile},
};

/// Slot of the image file, and of the external data file.
const IMAGE: FileSlot = 0;
const DATA: FileSlot = 1;

/// How many L2 tables a fingerprint samples, and how much of each, in bytes.
const SAMPLES: usize = 8;
const SAMPLE_BYTES: u64 = 4096;

/// The file that holds uncompressed clusters.
#[derive(Debug)]
struct Data {
    /// Filled up to whole clusters.
    storage: Arc<dyn Storage>,
    /// Length before that, in bytes.
    len: u64,
    id: u64,
    slot: FileSlot,
}

/// One disk of a qcow2 image: the active one, or an internal snapshot's.
#[derive(Debug)]
pub struct Qcow2Layer {
    file: TableFile,
    data: Data,
    table: Table,
    geometry: Geometry,
    codec: Codec,
    label: String,
}

impl Qcow2Layer {
    pub(super) fn new(
        file: TableFile,
        header: &Header,
        table: Table,
        data: Option<Arc<dyn Storage>>,
        label: String,
    ) -> Result<Self> {
        let geometry = Geometry::of(header);
        let (storage, len, id, slot) = match data {
            None => (file.storage.clone(), file.len, file.id, IMAGE),
            Some(storage) => {
                let len = storage.len().map_err(|e| Error::io(storage.label(), "stat", 0, e))?;
                let id = file_id(&*storage);
                (storage, len, id, DATA)
            }
        };
        if header.data_file.as_ref().is_some_and(|data| data.is_raw) && len < table.size {
            let (path, what) = (storage.label().to_owned(), "the disk, which a raw data file holds whole".into());
            return Err(Error::Truncated { path, len, need: table.size, what });
        }
        // The last cluster need not be there past the end of the disk. What of it is inside has to: `check_stored`.
        let storage: Arc<dyn Storage> = match len.checked_next_multiple_of(geometry.cluster_bytes()) {
            Some(whole) if whole > len => Arc::new(View::extended(storage, len, whole)),
            _ => storage,
        };
        let data = Data { storage, len, id, slot };
        Ok(Self { file, data, table, geometry, codec: header.compression.codec(), label })
    }

    /// Walks `from..to` and tells `each` the pieces in order, until it breaks off. Pieces of one
    /// kind are not merged here, except within what one step covers.
    fn walk<F>(&self, from: u64, to: u64, keep: Keep, each: &mut F) -> Result<()>
    where
        F: FnMut(u64, u64, Content) -> ControlFlow<()>,
    {
        let bits = self.geometry.table_bits();
        let mut at = from;
        while at < to {
            let index = at >> bits;
            let table_end = (index + 1).checked_mul(1 << bits).unwrap_or(to).min(to);
            let Some(l2) = self.table.l2_offset(index, &self.file, &self.geometry)? else {
                if each(at, table_end - at, Content::Absent).is_break() {
                    return Ok(());
                }
                at = table_end;
                continue;
            };
            let span = self.geometry.piece_span();
            let number = (at & ((1 << bits) - 1)) >> span.trailing_zeros();
            let piece_end = floor(at, span).saturating_add(span).min(table_end);
            let offset = l2 + number * self.geometry.piece_bytes();
            let flow = self.with_piece(offset, keep, |bytes| self.walk_piece(bytes, at, piece_end, offset, each))?;
            if flow.is_break() {
                return Ok(());
            }
            at = piece_end;
        }
        Ok(())
    }

    /// Hands the piece of an L2 table at `offset` to `work`.
    fn with_piece<R>(&self, offset: u64, keep: Keep, work: impl FnOnce(&[u8]) -> Result<R>) -> Result<R> {
        let (cache, key) = (PieceCache::shared(), (self.file.tables, offset));
        if let Some(bytes) = cache.get(key) {
            return work(&bytes);
        }
        let len = usize::try_from(self.geometry.piece_bytes()).unwrap_or(usize::MAX);
        codec::with_stored(self.file.storage.as_ref(), offset, len, |bytes| {
            if keep == Keep::Tables {
                cache.put(key, &Arc::from(bytes));
            }
            work(bytes)
        })
    }

    /// The entries of one piece that map `from..to`.
    fn walk_piece<F>(&self, bytes: &[u8], from: u64, to: u64, place: u64, each: &mut F) -> Result<ControlFlow<()>>
    where
        F: FnMut(u64, u64, Content) -> ControlFlow<()>,
    {
        let Geometry { cluster_bits, entry_bits, .. } = self.geometry;
        let cluster = self.geometry.cluster_bytes();
        let base = floor(from, self.geometry.piece_span());
        let entries = ((to - base - 1) >> cluster_bits) + 1;
        let bytes = bytes.get(..usize::try_from(entries << entry_bits).unwrap_or(usize::MAX)).unwrap_or(bytes);
        let mut at = from;
        while at < to {
            let index = usize::try_from((at - base) >> cluster_bits).unwrap_or(usize::MAX);
            let byte = index << entry_bits;
            let bad = |what| Error::corrupt(self.file.label(), place + byte as u64, what);
            let word = |at: usize| bytes.get(at..).and_then(|b| b.first_chunk::<8>()).map(|b| u64::from_be_bytes(*b));
            let entry = word(byte).ok_or_else(|| bad("L2 entry past its table".into()))?;
            let bitmap = if entry_bits == 4 { word(byte + 8).unwrap_or_default() } else { 0 };
            if entry == 0 && bitmap == 0 {
                let zeros = (zero_bytes(bytes.get(byte..).unwrap_or_default()) >> entry_bits).max(1);
                let end = floor(at, cluster).saturating_add((zeros as u64) << cluster_bits).min(to);
                if each(at, end - at, Content::Absent).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                at = end;
                continue;
            }
            let what = self.geometry.cluster(entry, bitmap).map_err(bad)?;
            let end = floor(at, cluster).saturating_add(cluster).min(to);
            if self.tell_cluster(what, at, end, each)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            at = end;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// What the cluster around `from..to`, which lies inside it, has for that range.
    fn tell_cluster<F>(&self, what: Cluster, from: u64, to: u64, each: &mut F) -> Result<ControlFlow<()>>
    where
        F: FnMut(u64, u64, Content) -> ControlFlow<()>,
    {
        let skip = from - floor(from, self.geometry.cluster_bytes());
        Ok(match what {
            Cluster::Absent => each(from, to - from, Content::Absent),
            Cluster::Zero => each(from, to - from, Content::Zero),
            Cluster::Plain { host } => {
                self.check_host(host, from - skip)?;
                self.check_stored(host, from - skip, self.geometry.cluster_bytes())?;
                each(from, to - from, self.plain(host, skip))
            }
            Cluster::Compressed { host, span } => each(from, to - from, self.packed(host, span, from)?),
            Cluster::Parts { host, allocated, zero } => {
                if allocated != 0 {
                    self.check_host(host, from - skip)?;
                }
                let part_bytes = self.geometry.cluster_bytes() / 32;
                let start = from - skip;
                let mut at = from;
                while at < to {
                    let skip = at - start;
                    let end = (floor(at, part_bytes) + part_bytes).min(to);
                    let bit = 1u32 << (skip >> part_bytes.trailing_zeros());
                    let content = match () {
                        () if zero & bit != 0 => Content::Zero,
                        () if allocated & bit != 0 => {
                            self.check_stored(host, start, floor(skip, part_bytes) + part_bytes)?;
                            self.plain(host, skip)
                        }
                        () => Content::Absent,
                    };
                    if each(at, end - at, content).is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                    at = end;
                }
                ControlFlow::Continue(())
            }
        })
    }

    fn plain(&self, host: u64, skip: u64) -> Content {
        Content::Plain { file: self.data.slot, offset: host + skip }
    }

    /// Beside a data file a stored cluster has to lie where the guest sees it.
    fn check_host(&self, host: u64, guest: u64) -> Result<()> {
        if self.geometry.external && host != guest {
            let what = format!("cluster of disk offset {guest} is mapped to data file offset {host}");
            return Err(Error::corrupt(self.file.label(), host, what));
        }
        Ok(())
    }

    /// The first `len` bytes of a stored cluster have to be in the file, as far as they lie inside the disk: QEMU writes
    /// them all, so a file that ends before them was cut.
    fn check_stored(&self, host: u64, guest: u64, len: u64) -> Result<()> {
        let need = host.saturating_add(len.min(self.table.size.saturating_sub(guest)));
        if need > self.data.len {
            let what = format!("the cluster of disk offset {guest}");
            return Err(Error::Truncated {
                path: self.data.storage.label().to_owned(),
                len: self.data.len,
                need,
                what,
            });
        }
        Ok(())
    }

    fn packed(&self, host: u64, span: u64, at: u64) -> Result<Content> {
        let cluster = self.geometry.cluster_bytes();
        // The span is counted in sectors, so the last one may reach past the end of the file.
        let stored = span.min(self.file.len.saturating_sub(host));
        if stored == 0 {
            let what = format!("the compressed cluster of disk offset {}", floor(at, cluster));
            let (path, len) = (self.file.label().into(), self.file.len);
            return Err(Error::Truncated { path, len, need: host.saturating_add(span), what });
        }
        let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let block = BlockRef {
            offset: host,
            logical: at >> self.geometry.cluster_bits,
            stored_len: narrow(stored),
            raw_len: narrow(cluster),
            check: 0,
            file: IMAGE,
            codec: self.codec,
        };
        Ok(Content::Packed { block, skip: narrow(at - floor(at, cluster)) })
    }

    fn out_of_range(&self, offset: u64, len: u64) -> Error {
        Error::OutOfRange { path: self.label.clone(), offset, len, size: self.table.size }
    }
}

/// Whether L2 tables that had to be read are kept for later lookups.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    Tables,
    Nothing,
}

/// `at`, rounded down to a multiple of `unit`, a power of two. Divisions would be half of a scan's time.
fn floor(at: u64, unit: u64) -> u64 {
    at & !(unit - 1)
}

/// How many bytes `bytes` begins with that are zero, counted in whole lines of 64: most of a table of
/// a sparse disk.
fn zero_bytes(bytes: &[u8]) -> usize {
    let (lines, _) = bytes.as_chunks::<64>();
    // Folding instead of comparing keeps this free of calls, several times as fast.
    lines.iter().take_while(|line| line.iter().fold(0, |all, byte| all | byte) == 0).count() * 64
}

/// Whether `next`, which lies right behind `len` bytes of `run`, goes on with it.
fn continues(run: Content, len: u64, next: Content) -> bool {
    match (run, next) {
        (Content::Absent, Content::Absent) | (Content::Zero, Content::Zero) => true,
        (Content::Plain { file: a, offset }, Content::Plain { file: b, offset: next }) => {
            a == b && offset.checked_add(len) == Some(next)
        }
        _ => false,
    }
}

impl Layer for Qcow2Layer {
    fn label(&self) -> &str {
        &self.label
    }

    fn size(&self) -> u64 {
        self.table.size
    }

    fn grain(&self) -> u64 {
        if self.geometry.is_extended() { self.geometry.cluster_bytes() / 32 } else { self.geometry.cluster_bytes() }
    }

    fn lookup(&self, offset: u64, len_max: u64) -> Result<(Content, u64)> {
        let left = self.table.size.checked_sub(offset).filter(|left| *left > 0 && len_max > 0);
        let end = offset + left.ok_or_else(|| self.out_of_range(offset, len_max))?.min(len_max);
        let mut run: Option<(Content, u64)> = None;
        let walked = self.walk(offset, end, Keep::Tables, &mut |_, len, content| {
            match &mut run {
                None => run = Some((content, len)),
                Some((first, so_far)) if continues(*first, *so_far, content) => *so_far += len,
                Some(_) => return ControlFlow::Break(()),
            }
            ControlFlow::Continue(())
        });
        match (run, walked) {
            (Some(run), _) => Ok(run),
            (None, Err(e)) => Err(e),
            (None, Ok(())) => Err(self.out_of_range(offset, len_max)),
        }
    }

    fn scan(&self, offset: u64, len: u64, each: &mut dyn FnMut(u64, u64, Content)) -> Result<()> {
        let end = offset.saturating_add(len).min(self.table.size);
        let mut run: Option<(u64, u64, Content)> = None;
        let walked = self.walk(offset, end, Keep::Nothing, &mut |at, len, content| {
            match &mut run {
                Some((_, so_far, first)) if continues(*first, *so_far, content) => *so_far += len,
                _ => {
                    if let Some((start, len, content)) = run.take().filter(|(_, _, c)| *c != Content::Absent) {
                        each(start, len, content);
                    }
                    run = Some((at, len, content));
                }
            }
            ControlFlow::Continue(())
        });
        if let Some((start, len, content)) = run.filter(|(_, _, c)| *c != Content::Absent) {
            each(start, len, content);
        }
        walked
    }

    fn file(&self, slot: FileSlot) -> Result<&Arc<dyn Storage>> {
        if slot == self.data.slot {
            Ok(&self.data.storage)
        } else if slot == IMAGE {
            Ok(&self.file.storage)
        } else {
            Err(Error::corrupt(&self.label, 0, format!("qcow2 image has no file {slot}")))
        }
    }

    fn file_id(&self, slot: FileSlot) -> u64 {
        if slot == self.data.slot { self.data.id } else { self.file.id }
    }

    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = blake3::Hasher::new();
        hash.update(b"qcow2").update(&self.table.size.to_le_bytes()).update(&self.file.len.to_le_bytes());
        let head = self.geometry.cluster_bytes().min(self.file.len).min(SAMPLE_BYTES);
        hash.update(&self.file.read(0, head, "header")?);
        self.table.entries().iter().for_each(|entry| {
            hash.update(&entry.to_le_bytes());
        });
        let used: Vec<u64> = (0u64..).zip(self.table.entries()).filter(|(_, e)| **e != 0).map(|(i, _)| i).collect();
        for index in used.iter().step_by((used.len() / SAMPLES).max(1)) {
            // A damaged table must not keep the rest from being used; it has its say when it is read.
            if let Ok(Some(l2)) = self.table.l2_offset(*index, &self.file, &self.geometry) {
                hash.update(&self.file.read(l2, SAMPLE_BYTES.min(self.geometry.cluster_bytes()), "L2 table")?);
            }
        }
        if self.geometry.external {
            hash.update(&self.data.len.to_le_bytes());
        }
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, need: usize, out: &mut Vec<u8>) -> Result<()> {
        let stored_len = usize::try_from(block.stored_len).unwrap_or(usize::MAX);
        let raw_len = usize::try_from(block.raw_len).unwrap_or(usize::MAX);
        codec::with_stored(self.file.storage.as_ref(), block.offset, stored_len, |stored| {
            codec::decode(block.codec, stored, raw_len, need, Tail::Ignored, out).map_err(|e| {
                let end = block.offset.saturating_add(block.stored_len.into());
                match e {
                    DecodeError::Short { .. } if end >= self.file.len => Error::Truncated {
                        path: self.label.clone(),
                        len: self.file.len,
                        need: end.saturating_add(1),
                        what: format!("the compressed cluster at {}", block.offset),
                    },
                    other => other.at(&self.label, block),
                }
            })
        })
    }
}
