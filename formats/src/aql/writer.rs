//! Writing a layer: a stream of blocks in, a sealed file out.
//!
//! Invariants
//! - What is not given stays as in the parent (zeros for a full).
//! - A block whose content id equals what the layer already says there is not written.
//! - Nothing is readable before [`Writer::finish`]; a writer that is dropped leaves a file that
//!   [`Writer::resume`] continues.
//!
//! Not here: names and commit order of files, which are the repository's.

use std::{collections::BTreeSet, ops::Range, path::Path, sync::Arc};

use uuid::Uuid;

use super::{
    append::{Appender, Item, Tail},
    below::LinkedDisk,
    block::Compression,
    dedupe::{DedupeTable, Known},
    entry::Entry,
    key::ContentKey,
    layout::{BLOCK_LOG2_DEFAULT, FRAMES_START, LEAF_ENTRIES, SLOTS_MAX},
    leafmap::LeafMap,
    pipeline::{Chunk, Pipeline, PipelineSetup},
    reader::Reader,
    root::{LayerRecord, Live, free_slot},
    salvage,
    seal::{Identity, Sealed, Stats, read_seal, read_superblock, superblock},
};
use crate::{
    Error, Layer, Result, Storage,
    storage::{Access, FileStorage},
};

/// Bytes of blocks that travel together.
const CHUNK_BYTES: usize = 1 << 20;

/// What a new layer is.
#[derive(Clone, Debug)]
pub struct NewLayer {
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// The layer it builds on, and the relative path from the new file to that layer's file.
    pub parent: Option<(Arc<Reader>, String)>,
    /// The repository's key for content ids; must be the parent's.
    pub key: ContentKey,
    /// The layer's id; [`Uuid::now_v7`] for a new one.
    pub layer: Uuid,
    /// Creation time in nanoseconds since 1970, for people.
    pub created: u64,
    /// Sector size of the disk in bytes, 512 or 4096.
    pub sector_bytes: u32,
}

impl NewLayer {
    /// A full of a disk with 512-byte sectors.
    pub fn full(virtual_size: u64, key: ContentKey) -> Self {
        Self { virtual_size, parent: None, key, layer: Uuid::now_v7(), created: 0, sector_bytes: 512 }
    }

    /// An increment on `parent`, of the parent's size; `hint` is the relative path from the new file to
    /// the parent's.
    pub fn increment(parent: Arc<Reader>, hint: impl Into<String>, key: ContentKey) -> Self {
        let (virtual_size, sector_bytes) = (parent.size(), parent.sector_bytes());
        let parent = Some((parent, hint.into()));
        Self { virtual_size, parent, key, layer: Uuid::now_v7(), created: 0, sector_bytes }
    }
}

/// How a layer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriterOptions {
    /// Block size as a power of two; an increment takes its parent's.
    pub block_log2: u8,
    /// How blocks are compressed.
    pub compression: Compression,
    /// Threads that hash and compress; 0 does it on the caller's.
    pub threads: usize,
    /// Memory for finding equal blocks of the chain, in bytes; 0 finds none.
    pub dedupe_bytes: usize,
    /// Stored bytes between two places from which an interrupted writer can go on.
    pub waymark_bytes: u64,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            block_log2: BLOCK_LOG2_DEFAULT,
            compression: Compression::default(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            dedupe_bytes: 64 << 20,
            waymark_bytes: 512 << 20,
        }
    }
}

/// A layer being written.
#[derive(Debug)]
pub struct Writer {
    pipeline: Pipeline,
    label: String,
    block_bytes: usize,
    virtual_size: u64,
    blocks: u64,
    pending: Chunk,
    resume_from: u64,
    parent: Option<Arc<Reader>>,
}

impl Writer {
    /// Begins a layer in an empty storage.
    ///
    /// # Errors
    /// [`Error::Refused`] if the storage is not empty or the parent has another key or block size;
    /// [`Error::Unsupported`] for sizes the format cannot hold, or a lineage that is full; I/O.
    pub fn create(storage: Arc<dyn Storage>, new: NewLayer, options: WriterOptions) -> Result<Self> {
        let label = storage.label().to_owned();
        let len = storage.len().map_err(|e| Error::io(&label, "stat", 0, e))?;
        if len != 0 {
            return Err(Error::Refused {
                path: label,
                what: format!("a new layer needs an empty file, not {len} bytes"),
            });
        }
        let identity = new.identity(&label, options)?;
        storage.write_at(0, &superblock(&identity)).map_err(|e| Error::io(&label, "write", 0, e))?;
        let (parent, hint) = new.parent.unzip();
        let tail = Tail::new(storage, FRAMES_START, 0);
        let map = LeafMap::new(identity.clone(), parent.clone())?;
        let appender = Appender::new(identity, tail, map, options.waymark_bytes, hint.unwrap_or_default());
        let dedupe = new_table(&appender, parent.as_deref(), options)?;
        Self::start(appender, dedupe, parent, new.key, options)
    }

    /// Begins a layer that stands on a disk of another product: its blocks are told by [`Writer::linked`], and nothing
    /// is copied. An interrupted one is begun anew.
    ///
    /// # Errors
    /// As [`Writer::create`]; [`Error::Refused`] where `new` has a parent.
    pub fn link(storage: Arc<dyn Storage>, new: NewLayer, on: LinkedDisk, options: WriterOptions) -> Result<Self> {
        let label = storage.label().to_owned();
        if new.parent.is_some() {
            return Err(Error::Refused {
                path: label,
                what: "only a layer without a parent stands on a linked disk".into(),
            });
        }
        let identity = Identity { linked: true, ..new.identity(&label, options)? };
        storage.write_at(0, &superblock(&identity)).map_err(|e| Error::io(&label, "write", 0, e))?;
        let record = LayerRecord {
            layer: identity.layer,
            seal: on.identity,
            tag: 0,
            data_end: 0,
            virtual_size: on.size,
            live: Live::default(),
            hint: String::new(),
            foreign: Some((on.format, on.identity.to_vec())),
        };
        let mut map = LeafMap::new(identity.clone(), None)?;
        map.link(identity.slot + 1, record);
        let tail = Tail::new(storage, FRAMES_START, 0);
        let appender = Appender::new(identity, tail, map, options.waymark_bytes, String::new());
        let dedupe = new_table(&appender, None, options)?;
        Self::start(appender, dedupe, None, new.key, options)
    }

    /// Begins a layer in a new file.
    ///
    /// # Errors
    /// As [`Writer::create`]; the file exists.
    pub fn create_file(path: &Path, new: NewLayer, options: WriterOptions) -> Result<Self> {
        Self::create(Arc::new(FileStorage::open(path, Access::CreateNew)?), new, options)
    }

    /// Goes on with a file whose writer was interrupted, from what is whole in it; what follows that is
    /// cut off. Blocks given before the interruption stay until given again; [`Writer::resume_from`] says
    /// from where everything has to be given again. `parent` and its hint are those of the first writer.
    ///
    /// # Errors
    /// The file is sealed, or not a native layer, or has another parent; I/O.
    pub fn resume(
        storage: Arc<dyn Storage>,
        parent: Option<(Arc<Reader>, String)>,
        key: ContentKey,
        options: WriterOptions,
    ) -> Result<Self> {
        let label = storage.label().to_owned();
        let refused = |what: &str| Error::Refused { path: label.clone(), what: what.into() };
        if read_seal(storage.as_ref()).is_ok() {
            return Err(refused("the layer is finished"));
        }
        let identity = read_superblock(storage.as_ref())?;
        let (parent, hint) = parent.unzip();
        if identity.parent != parent.as_ref().map(|p| (p.layer_id(), p.seal_hash())) {
            return Err(refused("the interrupted layer was begun on another parent"));
        }
        if identity.id_domain != key.domain() {
            return Err(refused("the interrupted layer was begun with another content key"));
        }
        if identity.linked && parent.is_none() {
            return Err(refused("a layer that links to another disk is begun anew"));
        }
        let found = salvage::scan(storage.as_ref(), &identity)?;
        storage.set_len(found.end).map_err(|e| Error::io(&label, "truncate", found.end, e))?;
        let tail = Tail::new(storage, found.end, found.sequence);
        let map = LeafMap::new(identity.clone(), parent.clone())?;
        let mut appender = Appender::new(identity, tail, map, options.waymark_bytes, hint.unwrap_or_default());
        let mut dedupe = new_table(&appender, parent.as_deref(), options)?;
        appender.adopt(&found, &mut dedupe)?;
        Self::start(appender, dedupe, parent, key, options)
    }

    fn start(
        appender: Appender,
        dedupe: DedupeTable,
        parent: Option<Arc<Reader>>,
        key: ContentKey,
        options: WriterOptions,
    ) -> Result<Self> {
        let identity = appender.identity.clone();
        let label = appender.tail.storage().label().to_owned();
        let block_bytes = usize::try_from(identity.block_bytes()).unwrap_or(usize::MAX);
        let resume_from = appender.cursor;
        let setup = PipelineSetup {
            appender,
            dedupe,
            parent: parent.clone(),
            key,
            how: options.compression,
            threads: options.threads,
        };
        let mut writer = Self {
            pipeline: Pipeline::start(setup),
            label,
            block_bytes,
            virtual_size: identity.virtual_size,
            blocks: identity.blocks(),
            pending: Chunk { first: 0, bytes: Vec::new() },
            resume_from,
            parent: parent.clone(),
        };
        if let Some(parent) = parent {
            writer.cut_boundary(&parent)?;
        }
        Ok(writer)
    }

    /// A disk that ends inside a block of its longer parent: the block's rest must be zeros from now on. Nothing to
    /// do where an interrupted writer was given that block already: it has its own content.
    fn cut_boundary(&mut self, parent: &Reader) -> Result<()> {
        let grain = self.block_bytes as u64;
        let (block, part) = (self.virtual_size / grain, self.virtual_size % grain);
        if part == 0 || self.virtual_size >= parent.size() || block < self.resume_from {
            return Ok(());
        }
        let mut bytes = Vec::new();
        match parent.entry(block)? {
            Entry::Foreign { .. } => parent.read_linked(block, &mut bytes)?,
            _ => self.whole_block(parent, part, &mut bytes)?,
        }
        if bytes.is_empty() {
            return Ok(());
        }
        bytes.truncate(usize::try_from(part).unwrap_or_default());
        self.put(block, &bytes)?;
        self.send_pending()?;
        self.pipeline.drain()?;
        // Nobody has given this block yet.
        let given = self.resume_from;
        self.pipeline.with_appender(|appender| appender.cursor = given);
        Ok(())
    }

    /// The parent's block that the disk now ends in; empty where it is zeros.
    fn whole_block(&self, parent: &Reader, part: u64, bytes: &mut Vec<u8>) -> Result<()> {
        match parent.lookup(self.virtual_size - part, part)? {
            (crate::Content::Packed { block, .. }, _) => parent.unpack(&block, self.block_bytes, bytes),
            _ => Ok(()),
        }
    }

    /// Block size in bytes.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Blocks of the disk; the last may be short.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// After [`Writer::resume`]: every block below was given before the interruption and is kept.
    pub fn resume_from(&self) -> u64 {
        self.resume_from
    }

    /// Takes the blocks from `first` on: whole blocks, and at the end of the disk what is left of the last.
    /// Returns before they are written; an error may be that of earlier blocks.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for bytes that are not whole blocks of this disk; I/O; a damaged parent.
    pub fn put(&mut self, first: u64, bytes: &[u8]) -> Result<()> {
        self.check_range(first, bytes.len() as u64)?;
        let (mut at, mut rest) = (first, bytes);
        while !rest.is_empty() {
            let end = self.pending.first + (self.pending.bytes.len() / self.block_bytes) as u64;
            if self.pending.bytes.len() >= CHUNK_BYTES || (!self.pending.bytes.is_empty() && end != at) {
                self.send_pending()?;
            }
            if self.pending.bytes.is_empty() {
                self.pending = Chunk { first: at, bytes: self.pipeline.buffer() };
                self.pending.bytes.reserve(CHUNK_BYTES.max(self.block_bytes));
            }
            let room = CHUNK_BYTES.saturating_sub(self.pending.bytes.len()).max(self.block_bytes);
            let (part, tail) = rest.split_at(room.min(rest.len()));
            self.pending.bytes.extend_from_slice(part);
            at += part.len().div_ceil(self.block_bytes) as u64;
            rest = tail;
            self.pad_pending();
        }
        if self.pending.bytes.len() >= CHUNK_BYTES { self.send_pending() } else { Ok(()) }
    }

    /// A buffer for [`Writer::put_buffer`]: a used one where there is one, with any contents.
    pub fn buffer(&self) -> Vec<u8> {
        self.pipeline.buffer()
    }

    /// As [`Writer::put`], without a copy: about a MiB of whole blocks is best.
    ///
    /// # Errors
    /// As [`Writer::put`].
    pub fn put_buffer(&mut self, first: u64, bytes: Vec<u8>) -> Result<()> {
        self.check_range(first, bytes.len() as u64)?;
        self.send_pending()?;
        self.pending = Chunk { first, bytes };
        self.pad_pending();
        self.send_pending()
    }

    /// Says that a run of blocks is zeros.
    ///
    /// # Errors
    /// As [`Writer::put`].
    pub fn zero(&mut self, blocks: Range<u64>) -> Result<()> {
        self.pass(blocks, Item::Zero)
    }

    /// Says that a run of blocks lies in the disk that [`Writer::link`] named.
    ///
    /// # Errors
    /// As [`Writer::put`].
    pub fn linked(&mut self, blocks: Range<u64>) -> Result<()> {
        self.pass(blocks, Item::Linked)
    }

    /// Says that a run of blocks is as in the parent. Needed only so that [`Writer::resume_from`] moves on.
    ///
    /// # Errors
    /// As [`Writer::put`].
    pub fn keep(&mut self, blocks: Range<u64>) -> Result<()> {
        self.pass(blocks, Item::Keep)
    }

    fn pass(&mut self, blocks: Range<u64>, item: impl FnOnce(Range<u64>) -> Item) -> Result<()> {
        if blocks.start >= blocks.end {
            return Ok(());
        }
        if blocks.end > self.blocks {
            return Err(self.out_of_range(blocks.start, blocks.end - blocks.start));
        }
        self.send_pending()?;
        self.pipeline.pass(item(blocks))
    }

    /// What has been counted so far; blocks on their way are not in it.
    pub fn stats(&self) -> Stats {
        self.pipeline.with_appender(|appender| appender.stats).unwrap_or_default()
    }

    /// Makes everything given so far durable and resumable.
    ///
    /// # Errors
    /// I/O, also of earlier blocks.
    pub fn mark(&mut self) -> Result<()> {
        self.send_pending()?;
        self.pipeline.drain()?;
        self.pipeline.with_appender(Appender::mark).unwrap_or(Ok(()))
    }

    /// Takes over what the disk still has in its least used older files, until it draws from at most `files`
    /// of them. A chain that does this at every point needs no full, and old files become free to go: one
    /// new file, one old one given up.
    ///
    /// # Errors
    /// I/O; a damaged older file.
    pub fn absorb(&mut self, files: usize) -> Result<()> {
        self.absorb_excess(files)
    }

    /// Takes over what the disk still has in the files of these layers, so that the new one does not draw from them.
    ///
    /// # Errors
    /// As [`Writer::absorb`].
    pub fn absorb_layers(&mut self, layers: &BTreeSet<Uuid>) -> Result<()> {
        let Some(parent) = self.parent.clone() else { return Ok(()) };
        let among = parent.root().layers.iter().filter(|(_, record)| layers.contains(&record.layer));
        let slots: BTreeSet<u16> =
            among.filter(|(_, record)| record.foreign.is_none()).map(|(slot, _)| *slot).collect();
        if slots.is_empty() {
            return Ok(());
        }
        self.send_pending()?;
        self.pipeline.drain()?;
        self.pipeline.with_appender(|appender| appender.absorb(&parent, &slots)).unwrap_or(Ok(()))
    }

    fn absorb_excess(&mut self, files: usize) -> Result<()> {
        let Some(parent) = self.parent.clone() else { return Ok(()) };
        let files_below = parent.root().layers.iter().filter(|(_, record)| record.foreign.is_none());
        let mut older: Vec<(u64, u16)> = files_below.map(|(slot, record)| (record.live.bytes, *slot)).collect();
        // The parent's own file is one of them, and the newest: it stays.
        let excess = (older.len() + 1).saturating_sub(files.max(1));
        if excess == 0 {
            return Ok(());
        }
        older.sort_unstable();
        let slots: BTreeSet<u16> = older.iter().take(excess).map(|(_, slot)| *slot).collect();
        self.send_pending()?;
        self.pipeline.drain()?;
        self.pipeline.with_appender(|appender| appender.absorb(&parent, &slots)).unwrap_or(Ok(()))
    }

    /// Stores what the disk still has in the disk of another product, so that the new layer does not need that.
    ///
    /// # Errors
    /// I/O; that disk cannot be read.
    pub fn take_over_linked(&mut self) -> Result<()> {
        let Some(parent) = self.parent.clone().filter(|parent| parent.linked().is_some()) else { return Ok(()) };
        self.send_pending()?;
        self.pipeline.drain()?;
        self.pipeline.take_over();
        for block in 0..self.blocks.min(parent.blocks()) {
            if !matches!(parent.entry(block)?, Entry::Foreign { .. }) {
                continue;
            }
            let now = self.pipeline.with_appender(|appender| appender.map.get(block, &appender.tail)).transpose()?;
            if matches!(now, Some((Entry::Foreign { .. }, _))) {
                let mut bytes = Vec::new();
                parent.read_linked(block, &mut bytes)?;
                self.put(block, &bytes)?;
            }
        }
        self.send_pending()?;
        self.pipeline.drain()
    }

    /// Completes, syncs and seals the file.
    ///
    /// # Errors
    /// I/O, also of earlier blocks. The file is then unfinished, and can be resumed.
    pub fn finish(mut self) -> Result<Sealed> {
        self.send_pending()?;
        self.pipeline.finish()?.seal()
    }

    fn check_range(&self, first: u64, len: u64) -> Result<()> {
        let grain = self.block_bytes as u64;
        let start = first.checked_mul(grain);
        let end = start.and_then(|start| start.checked_add(len));
        match end {
            Some(end) if end <= self.virtual_size && (end % grain == 0 || end == self.virtual_size) => Ok(()),
            // The last block may also be given whole.
            Some(end) if end == self.blocks * grain => Ok(()),
            _ => Err(self.out_of_range(first, len.div_ceil(grain))),
        }
    }

    fn out_of_range(&self, first: u64, blocks: u64) -> Error {
        let grain = self.block_bytes as u64;
        let (offset, len) = (first.saturating_mul(grain), blocks.saturating_mul(grain));
        Error::OutOfRange { path: self.label.clone(), offset, len, size: self.virtual_size }
    }

    /// Fills the disk's last block up with zeros, also where it was given whole.
    fn pad_pending(&mut self) {
        let len = self.pending.bytes.len();
        let start = self.pending.first * self.block_bytes as u64;
        let inside = usize::try_from(self.virtual_size.saturating_sub(start)).unwrap_or(usize::MAX).min(len);
        self.pending.bytes.truncate(inside);
        self.pending.bytes.resize(inside.next_multiple_of(self.block_bytes), 0);
    }

    fn send_pending(&mut self) -> Result<()> {
        if self.pending.bytes.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut self.pending, Chunk { first: 0, bytes: Vec::new() });
        self.pipeline.encode(chunk)
    }
}

impl NewLayer {
    fn identity(&self, label: &str, options: WriterOptions) -> Result<Identity> {
        let refused = |what: String| Error::Refused { path: label.to_owned(), what };
        let mut identity = Identity {
            layer: self.layer,
            chain: self.layer,
            parent: None,
            virtual_size: self.virtual_size,
            tag: Uuid::new_v4().as_u64_pair().0 ^ Uuid::new_v4().as_u64_pair().1.rotate_left(8),
            created: self.created,
            slot: 0,
            block_log2: options.block_log2,
            sector_log2: u8::try_from(self.sector_bytes.checked_ilog2().unwrap_or(0)).unwrap_or_default(),
            codec: options.compression.codec(),
            id_domain: self.key.domain(),
            linked: false,
        };
        if let Some((parent, _)) = &self.parent {
            let before = parent.identity();
            if before.id_domain != identity.id_domain {
                return Err(refused("the parent was written with another content key".into()));
            }
            let Some(slot) = free_slot(before.slot, parent.root()) else {
                let what = format!("a disk that draws from {SLOTS_MAX} files; take a full");
                return Err(Error::unsupported(label, what));
            };
            identity.chain = before.chain;
            identity.parent = Some((before.layer, parent.seal_hash()));
            identity.slot = slot;
            identity.block_log2 = before.block_log2;
            identity.linked = parent.linked().is_some();
        }
        if u64::from(self.sector_bytes) != 1 << identity.sector_log2 {
            return Err(Error::unsupported(label, format!("sectors of {} bytes", self.sector_bytes)));
        }
        identity.check(label)?;
        Ok(identity)
    }
}

fn new_table(appender: &Appender, parent: Option<&Reader>, options: WriterOptions) -> Result<DedupeTable> {
    let mut dedupe = DedupeTable::new(options.dedupe_bytes, appender.identity.blocks());
    if let Some(parent) = parent {
        preload(&mut dedupe, parent)?;
    }
    Ok(dedupe)
}

/// Remembers the parent's blocks, until half the table is full.
fn preload(dedupe: &mut DedupeTable, parent: &Reader) -> Result<()> {
    for leaf in 0..parent.identity().leaves() {
        if dedupe.len() * 2 >= dedupe.capacity() {
            break;
        }
        let Some(map) = parent.map(leaf)? else { continue };
        let ids = parent.ids(leaf)?;
        for index in 0..LEAF_ENTRIES {
            if let Ok(Entry::Data(at)) = map.get(index, parent.block_bytes()) {
                let block = leaf * LEAF_ENTRIES as u64 + index as u64;
                let logical = if at.shared { u64::MAX } else { block };
                dedupe.insert(Known { id: ids.get(index), at, logical });
            }
        }
    }
    Ok(())
}
