//! Restore points stacked into one read-only disk, newest layer first.
//!
//! Layers are merged into one map ([`crate::map`]), so that a read asks one layer, not all. A point
//! of the native format brings a map of its own, as quick at any depth; its chain is that one layer.
//!
//! Invariants
//! - A chain is immutable; a change builds a new one.
//! - A layer shorter than the chain reads as zero past its end and stops the walk there.
//! - A read gives the right bytes or an error, and the error comes from just the range that has it.
//! - Large reads push nothing out of the cache: without room to spare their blocks are decoded straight
//!   for the caller.
//!
//! Not here: writing, retries, how layers were found, threads.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use aquifer_formats::{BlockRef, CHAIN_LAYERS_MAX, Content, Error as FormatError, Layer, aql, pbs::PbsLayer};

use crate::{
    BlockCache, Error, Extent, ExtentKind, Result,
    cache::fetched_here,
    map::{Found, WindowMap},
};

/// Reads of this size and more are sequential work (a copy, hydration, a backup) that seldom comes
/// back for the same blocks: whole blocks in them are kept only while nothing has to go for them.
pub const BULK_READ_BYTES: usize = 256 * 1024;

/// Largest block that [`Chain::read_soon`] decodes, in bytes: about 0.1 ms of work.
const DECODE_SOON_MAX: u32 = 128 * 1024;

/// Whether the whole blocks a read decodes are kept for later ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    Always,
    /// While nothing has to go for them.
    WhileRoom,
    Never,
}

/// What a read that must not wait may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effort {
    /// Copy what is at hand.
    Copy,
    /// Decode small blocks as well.
    Decode,
}

/// One read-only disk made of layers.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Arc<dyn Layer>>,
    /// `None` where the only layer maps as quickly itself.
    map: Option<WindowMap>,
    point: Option<Arc<aql::Reader>>,
    snapshot: Option<Arc<PbsLayer>>,
    cache: Arc<BlockCache>,
    size: u64,
    fetched: Arc<AtomicU64>,
    /// The files it is read from, where its layers cannot tell.
    files: Option<Vec<PathBuf>>,
}

impl Chain {
    /// Stacks `layers`, newest first. The size is the newest layer's. Reads nothing.
    ///
    /// # Errors
    /// No layer, or more than [`CHAIN_LAYERS_MAX`].
    pub fn new(layers: Vec<Arc<dyn Layer>>, cache: Arc<BlockCache>) -> Result<Self> {
        let size = match layers.first() {
            Some(top) if layers.len() <= CHAIN_LAYERS_MAX => top.size(),
            _ => {
                let what = format!("a chain of {} layers (1 to {CHAIN_LAYERS_MAX} are possible)", layers.len());
                return Err(FormatError::unsupported("chain", what).into());
            }
        };
        let map = Some(WindowMap::new(&layers));
        Ok(Self { layers, map, point: None, snapshot: None, cache, size, fetched: Arc::default(), files: None })
    }

    /// A native point: one layer, whose own map takes two hops whatever it draws from. What it has left in a disk of
    /// another product is below it, and merged as in any other chain.
    pub fn of_point(point: Arc<aql::Reader>, cache: Arc<BlockCache>) -> Self {
        let size = point.size();
        let fetched = Arc::default();
        let mut layers: Vec<Arc<dyn Layer>> = vec![point.clone()];
        layers.extend(point.below().into_iter().flat_map(|below| below.layers().iter().cloned()));
        let map = (layers.len() > 1).then(|| WindowMap::new(&layers));
        Self { layers, map, point: Some(point), snapshot: None, cache, size, fetched, files: None }
    }

    /// The same, read from these files.
    pub(crate) fn of_files(self, files: Vec<PathBuf>) -> Self {
        Self { files: Some(files), ..self }
    }

    /// The files it is read from, where they are known besides its layers.
    pub fn files(&self) -> Option<&[PathBuf]> {
        self.files.as_deref()
    }

    /// A disk of a snapshot whose index says at once where each part is.
    pub fn of_snapshot(snapshot: Arc<PbsLayer>, cache: Arc<BlockCache>) -> Self {
        let (size, fetched) = (snapshot.size(), Arc::default());
        let layers: Vec<Arc<dyn Layer>> = vec![snapshot.clone()];
        Self { layers, map: None, point: None, snapshot: Some(snapshot), cache, size, fetched, files: None }
    }

    /// The snapshot this chain is, if it is one.
    pub fn snapshot(&self) -> Option<&Arc<PbsLayer>> {
        self.snapshot.as_ref()
    }

    /// The native point this chain is, if it is one.
    pub fn point(&self) -> Option<&Arc<aql::Reader>> {
        self.point.as_ref()
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The layers, newest first.
    pub fn layers(&self) -> &[Arc<dyn Layer>] {
        &self.layers
    }

    /// The shared cache.
    pub fn cache(&self) -> &Arc<BlockCache> {
        &self.cache
    }

    /// Bytes the merged map takes so far. It grows with what has been touched.
    pub fn map_bytes(&self) -> u64 {
        self.map.as_ref().map_or(0, WindowMap::resident_bytes)
    }

    /// Bytes of data read from the layers' files so far, as they are stored there: what a source over a network had to
    /// send, less its maps. Blocks that the cache had are not in it.
    pub fn fetched(&self) -> u64 {
        self.fetched.load(Relaxed)
    }

    /// What [`Chain::fetched`] is told from; it outlives the chain.
    pub(crate) fn count(&self) -> &Arc<AtomicU64> {
        &self.fetched
    }

    /// Digest over all layers, in order: equal for the same files in the same state. A session refuses
    /// to go on over a chain with another one.
    ///
    /// # Errors
    /// A layer that cannot be read.
    pub fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = blake3::Hasher::new();
        hash.update(b"aquifer chain 1").update(&(self.layers.len() as u64).to_le_bytes());
        for layer in &self.layers {
            hash.update(&layer.size().to_le_bytes()).update(&layer.fingerprint()?);
        }
        Ok(*hash.finalize().as_bytes())
    }

    /// Which layer answers at `offset`, with what, for how many bytes of `1..=len_max`. `Absent` means
    /// no layer says anything: a hole. For `Absent` and `Zero` the index is the number of layers.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] at or past the end; a layer whose tables cannot be read there.
    pub fn resolve(&self, offset: u64, len_max: u64) -> Result<(usize, Content, u64)> {
        let len = self.size.checked_sub(offset).map_or(0, |left| left.min(len_max));
        if len == 0 {
            return Err(self.out_of_range(offset, len_max));
        }
        let nobody = self.layers.len();
        let Some(map) = &self.map else { return self.walk(0, offset, len) };
        match map.lookup(&self.layers, offset, len) {
            (Found::Hole, n) => Ok((nobody, Content::Absent, n)),
            (Found::Zero, n) => Ok((nobody, Content::Zero, n)),
            (Found::At(index, content), n) => Ok((index, content, n)),
            (Found::Ask(index), n) => self.walk(index, offset, n),
        }
    }

    /// Asks the layers one by one, from `first` down.
    fn walk(&self, first: usize, offset: u64, len_max: u64) -> Result<(usize, Content, u64)> {
        let mut len = len_max;
        for (index, layer) in self.layers.iter().enumerate().skip(first) {
            let Some(left) = layer.size().checked_sub(offset).filter(|left| *left > 0) else {
                return Ok((self.layers.len(), Content::Zero, len));
            };
            let (content, n) = layer.lookup(offset, len.min(left))?;
            len = len.min(left).min(n);
            if len == 0 {
                return Err(FormatError::corrupt(layer.label(), offset, "the map answers for no bytes").into());
            }
            if content != Content::Absent {
                let index = if content == Content::Zero { self.layers.len() } else { index };
                return Ok((index, content, len));
            }
        }
        Ok((self.layers.len(), Content::Absent, len))
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; whatever the layer that holds the range reports.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let keep = if buf.len() >= BULK_READ_BYTES { Keep::WhileRoom } else { Keep::Always };
        self.read_keeping(keep, offset, buf)
    }

    /// As [`Chain::read`], for bytes that nobody asks this chain for again: what the cache keeps is used, and nothing
    /// has to go for whole blocks that were decoded here.
    ///
    /// # Errors
    /// Those of [`Chain::read`].
    pub fn read_once(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read_keeping(Keep::Never, offset, buf)
    }

    fn read_keeping(&self, keep: Keep, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (index, content, n) = self.resolve(at, rest.len() as u64)?;
            let (part, tail) = rest.split_at_mut(usize::try_from(n).unwrap_or(usize::MAX).min(rest.len()));
            self.read_content(index, content, keep, part)?;
            at += part.len() as u64;
            rest = tail;
        }
        Ok(())
    }

    fn read_content(&self, index: usize, content: Content, keep: Keep, part: &mut [u8]) -> Result<()> {
        match content {
            Content::Absent | Content::Zero => part.fill(0),
            Content::Plain { file, offset } => {
                let storage = self.layer(index)?.file(file)?;
                storage.read_at(offset, part).map_err(|e| FormatError::io(storage.label(), "read", offset, e))?;
                self.fetched.fetch_add(part.len() as u64, Relaxed);
            }
            Content::Packed { block, skip } => {
                let _counted = Counted::begin(self);
                let layer = self.layer(index)?;
                let (start, end) = place(layer, &block, skip, part.len())?;
                let whole = start == 0 && part.len() as u64 == u64::from(block.raw_len);
                let kept = match keep {
                    Keep::Always => true,
                    Keep::WhileRoom => self.cache.has_room(block.raw_len),
                    Keep::Never => false,
                };
                if whole && !kept {
                    let kept = self.cache.peek(layer, &block, end);
                    if !kept.is_some_and(|decoded| decoded.copy_to(0, part)) {
                        self.cache.decode_once(layer, &block, part)?;
                    }
                } else {
                    let decoded = self.cache.get(layer, &block, end)?;
                    if !decoded.copy_to(start, part) {
                        return Err(FormatError::corrupt(layer.label(), block.offset, "a block decodes short").into());
                    }
                }
            }
        }
        Ok(())
    }

    fn layer(&self, index: usize) -> Result<&dyn Layer> {
        let missing = || FormatError::corrupt("chain", 0, format!("layer {index} of {}", self.layers.len()));
        Ok(&**self.layers.get(index).ok_or_else(missing)?)
    }

    /// As [`Chain::read`], if that needs no decode and no wait: kept blocks, zeros, and bytes of files
    /// that are in memory. `Ok(false)` leaves `buf` in any state; the read that may wait reports
    /// whatever is wrong.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn read_now(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        self.read_without_wait(Effort::Copy, offset, buf)
    }

    /// As [`Chain::read_now`], and blocks of up to 128 KiB whose stored bytes are in memory are decoded. For a
    /// thread that nothing else waits for: it spares the way to another thread and back.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn read_soon(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        self.read_without_wait(Effort::Decode, offset, buf)
    }

    pub(crate) fn read_without_wait(&self, effort: Effort, offset: u64, buf: &mut [u8]) -> Result<bool> {
        self.check_range(offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let Some((found, n)) = self.found_now(at, rest.len() as u64) else { return Ok(false) };
            let (part, tail) = rest.split_at_mut(usize::try_from(n).unwrap_or(usize::MAX).min(rest.len()));
            let done = match found {
                Found::Hole | Found::Zero => self.content_now(effort, 0, Content::Zero, part),
                Found::At(index, content) => self.content_now(effort, index, content, part),
                Found::Ask(_) => false,
            };
            if !done {
                return Ok(false);
            }
            at += n;
            rest = tail;
        }
        Ok(true)
    }

    fn content_now(&self, effort: Effort, index: usize, content: Content, part: &mut [u8]) -> bool {
        match content {
            Content::Absent | Content::Zero => {
                part.fill(0);
                true
            }
            Content::Plain { file, offset } => {
                let Ok(storage) = self.layer(index).and_then(|l| Ok(l.file(file)?)) else { return false };
                let done = storage.read_now(offset, part).unwrap_or(false);
                self.fetched.fetch_add(if done { part.len() as u64 } else { 0 }, Relaxed);
                done
            }
            Content::Packed { block, skip } => {
                let Ok(layer) = self.layer(index) else { return false };
                let Ok((start, end)) = place(layer, &block, skip, part.len()) else { return false };
                let decoded = match effort {
                    Effort::Decode if block.raw_len <= DECODE_SOON_MAX => self.cache.get_soon(layer, &block, end),
                    _ => self.cache.peek(layer, &block, end),
                };
                decoded.is_some_and(|decoded| decoded.copy_to(start, part))
            }
        }
    }

    /// Decodes the blocks of a range into the cache, so that later reads are quick. A hint: what is
    /// wrong is left for the read to report, and half the budget is the most one call brings in.
    pub fn prefetch(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        let (mut at, mut left) = (offset, self.cache.bytes_max() / 2);
        let _counted = Counted::begin(self);
        while at < end {
            let Ok((index, content, n)) = self.resolve(at, end - at) else { return };
            if let (Content::Packed { block, .. }, Ok(layer)) = (content, self.layer(index)) {
                let Some(rest) = left.checked_sub(block.raw_len.into()) else { return };
                left = rest;
                let _ = self.cache.get(layer, &block, usize::try_from(block.raw_len).unwrap_or(usize::MAX));
            }
            at += n;
        }
    }

    /// Whether any of a range has to be read; `true` where that cannot be said.
    pub(crate) fn has_data(&self, offset: u64, len: u64) -> bool {
        let (mut at, end) = (offset, offset.saturating_add(len).min(self.size));
        while at < end {
            match self.resolve(at, end - at) {
                Ok((_, Content::Absent | Content::Zero, n)) => at += n.max(1),
                Ok(_) | Err(_) => return true,
            }
        }
        false
    }

    /// What `offset..offset + len` holds, appended to `out` in order, merged. Reads no data.
    ///
    /// # Errors
    /// A layer whose tables cannot be read there.
    pub fn extents(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        let end = offset.saturating_add(len).min(self.size);
        let mut at = offset;
        while at < end {
            let (_, content, n) = self.resolve(at, end - at)?;
            Extent::push(out, Extent { offset: at, len: n, kind: kind_of(content) });
            at += n;
        }
        Ok(())
    }

    /// As [`Chain::extents`], if that needs no table that was not looked at before; `false` leaves `out` in any
    /// state.
    pub(crate) fn extents_now(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> bool {
        let end = offset.saturating_add(len).min(self.size);
        let mut at = offset;
        while at < end {
            let (kind, n) = match self.found_now(at, end - at) {
                Some((Found::Hole, n)) => (ExtentKind::Hole, n),
                Some((Found::Zero, n)) => (ExtentKind::Zero, n),
                Some((Found::At(_, content), n)) => (kind_of(content), n),
                Some((Found::Ask(_), _)) | None => return false,
            };
            Extent::push(out, Extent { offset: at, len: n, kind });
            at += n;
        }
        true
    }

    /// What the map says, if it is at hand.
    fn found_now(&self, offset: u64, len: u64) -> Option<(Found, u64)> {
        match &self.map {
            Some(map) => map.lookup_filled(offset, len),
            None => self.walk(0, offset, len).ok().map(|(index, content, n)| (Found::At(index, content), n)),
        }
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(self.out_of_range(offset, len)),
        }
    }

    fn out_of_range(&self, offset: u64, len: u64) -> Error {
        let disk = self.layers.first().map_or("chain", |l| l.label()).into();
        Error::OutOfRange { disk, offset, len, size: self.size }
    }
}

fn kind_of(content: Content) -> ExtentKind {
    match content {
        Content::Absent => ExtentKind::Hole,
        Content::Zero => ExtentKind::Zero,
        Content::Plain { .. } | Content::Packed { .. } => ExtentKind::Data,
    }
}

/// Counts what is decoded on this thread while it stands.
struct Counted<'a> {
    chain: &'a Chain,
    before: u64,
}

impl<'a> Counted<'a> {
    fn begin(chain: &'a Chain) -> Self {
        Self { chain, before: fetched_here() }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.chain.fetched.fetch_add(fetched_here() - self.before, Relaxed);
    }
}

/// Where a part lies inside its decoded block; an answer that reaches past the block is the layer's damage.
fn place(layer: &dyn Layer, block: &BlockRef, skip: u32, len: usize) -> Result<(usize, usize), FormatError> {
    let start = usize::try_from(skip).unwrap_or(usize::MAX);
    let end = start.checked_add(len).filter(|end| *end as u64 <= u64::from(block.raw_len));
    let what = || format!("{len} bytes from {skip} are mapped to a block of {}", block.raw_len);
    end.map(|end| (start, end)).ok_or_else(|| FormatError::corrupt(layer.label(), block.offset, what()))
}
