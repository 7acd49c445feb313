//! A sealed layer as a disk: two hops at any depth.
//!
//! Invariants
//! - One file is one whole disk: whatever older points it draws from is behind [`Layer::lookup`]. It answers
//!   `Absent` only for what lies in the disk of another product, and only where that disk was put below it.
//! - An older file is opened when first needed, checked against the layer id and seal hash that the layer
//!   table holds, and kept open: it may be unlinked under a reader and changes nothing.
//! - Every page and every block is checked against its pointer on every read from storage.
//!
//! Not here: a cache of decoded blocks. Leaves are kept, a bounded number of them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use super::{
    below::{Below, LinkedDisk},
    block::decode_meta,
    entry::{Entry, IdPage, LeafRef, MapPage, Place, Stored},
    frame::{self, Expected, FrameKind},
    key::{ContentId, LOST_ID},
    layout::{LEAF_BYTES, LEAF_ENTRIES},
    resolve::{LayerName, Resolver},
    root::{LayerRecord, Live, Root},
    seal::{Identity, SealInfo, Stats, read_seal},
};
use crate::{
    BlockRef, Codec, Content, Error, FileSlot, Layer, Result, Storage,
    codec::{Tail, decode},
    scan_by_lookup,
    storage::{Access, FileStorage},
};

/// Leaves kept per reader; 4 KiB each.
const LEAVES_KEPT: u64 = 1024;

/// `BlockRef::logical` of a block that was written for another place of equal content.
const LOGICAL_ANY: u64 = u64::MAX;

/// A file this layer draws from, as told to people and to retention.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeededLayer {
    /// The layer.
    pub layer: Uuid,
    /// Its seal hash.
    pub seal: [u8; 32],
    /// Relative path to look at first.
    pub hint: String,
    /// Blocks of this disk stored there.
    pub live_blocks: u64,
    /// Stored bytes of those, headers included.
    pub live_bytes: u64,
}

struct OlderFile {
    record: LayerRecord,
    opened: OnceLock<Arc<dyn Storage>>,
    opening: Mutex<()>,
    id: u64,
}

type KeptLeaf = RwLock<Option<(u64, Arc<MapPage>)>>;

/// One sealed native layer.
pub struct Reader {
    own: Arc<dyn Storage>,
    label: String,
    seal: SealInfo,
    root: Root,
    older: BTreeMap<u16, OlderFile>,
    resolver: Resolver,
    leaves: Vec<KeptLeaf>,
    own_id: u64,
    salvaged: Option<Overrides>,
    below: Option<Below>,
}

/// What salvage knows beyond the pages in the file.
#[derive(Debug, Default)]
pub(crate) struct Overrides {
    pub(crate) leaves: BTreeMap<u64, (Arc<MapPage>, Arc<IdPage>)>,
    /// From this block on only blocks of the file itself count; the others were never seen.
    pub(crate) unseen_from: Option<u64>,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("aql::Reader")
            .field("label", &self.label)
            .field("layer", &self.seal.identity.layer)
            .finish_non_exhaustive()
    }
}

impl Reader {
    /// Opens a sealed file. Reads the seal and the root; older files are opened when first needed.
    ///
    /// # Errors
    /// Not a native layer, not sealed, damaged in both copies of seal or root, or a feature this build
    /// does not read.
    pub fn open(storage: Arc<dyn Storage>, resolver: Resolver) -> Result<Self> {
        let seal = read_seal(storage.as_ref())?;
        let root = read_root(storage.as_ref(), &seal)?;
        Ok(Self::assemble(storage, seal, root, resolver, None))
    }

    /// Opens the file at `root`/`relative`; older files are looked for below `root` only.
    ///
    /// # Errors
    /// As [`Reader::open`], and [`Error::Io`].
    pub fn open_file(root: &Path, relative: &Path) -> Result<Self> {
        let storage = Arc::new(FileStorage::open(&root.join(relative), Access::ReadOnly)?);
        let base = relative.parent().unwrap_or(Path::new("")).to_path_buf();
        Self::open(storage, Resolver::folder(root, base))
    }

    /// Opens the file at `path` outside a repository: older files are looked for in the folder above the
    /// file's own (where sibling points lie), or in its own folder at the top of a file system.
    ///
    /// # Errors
    /// As [`Reader::open_file`].
    pub fn open_path(path: &Path) -> Result<Self> {
        let full = path.canonicalize().map_err(|e| Error::io(path.display().to_string(), "open", 0, e))?;
        let folder = full.parent().map(Path::to_path_buf).unwrap_or_default();
        let root = folder.parent().map_or_else(|| folder.clone(), Path::to_path_buf);
        let relative: PathBuf = full.strip_prefix(&root).map(Path::to_path_buf).unwrap_or_default();
        Self::open_file(&root, &relative)
    }

    pub(crate) fn assemble(
        own: Arc<dyn Storage>,
        seal: SealInfo,
        root: Root,
        resolver: Resolver,
        salvaged: Option<Overrides>,
    ) -> Self {
        let id_of = |hash: &[u8; 32]| file_id(resolver.domain(), hash);
        let older = root
            .layers
            .iter()
            .map(|(slot, record)| {
                let id = id_of(&record.seal);
                (*slot, OlderFile { record: record.clone(), opened: OnceLock::new(), opening: Mutex::new(()), id })
            })
            .collect();
        let kept = seal.identity.leaves().min(LEAVES_KEPT);
        let own_id = id_of(&seal.hash);
        let leaves = (0..kept).map(|_| RwLock::new(None)).collect();
        Self { label: own.label().to_owned(), own, seal, root, older, resolver, leaves, own_id, salvaged, below: None }
    }

    /// The layer's id.
    pub fn layer_id(&self) -> Uuid {
        self.seal.identity.layer
    }

    /// The id shared by all layers that may refer to each other.
    pub fn chain_id(&self) -> Uuid {
        self.seal.identity.chain
    }

    /// Layer id and seal hash of the parent; `None` for a full.
    pub fn parent(&self) -> Option<(Uuid, [u8; 32])> {
        self.seal.identity.parent
    }

    /// The seal hash: names exactly these contents.
    pub fn seal_hash(&self) -> [u8; 32] {
        self.seal.hash
    }

    /// What the writer counted.
    pub fn stats(&self) -> Stats {
        self.seal.stats
    }

    /// Block size in bytes.
    pub fn block_bytes(&self) -> u32 {
        self.seal.identity.block_bytes()
    }

    /// Sector size of the disk in bytes, 512 or 4096.
    pub fn sector_bytes(&self) -> u32 {
        1 << self.seal.identity.sector_log2
    }

    /// Blocks of the disk, the last one possibly short.
    pub fn blocks(&self) -> u64 {
        self.seal.identity.blocks()
    }

    /// Length of the file in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.seal.file_bytes
    }

    /// The older files this layer draws from.
    pub fn needed_layers(&self) -> Vec<NeededLayer> {
        let needed = |record: &LayerRecord| NeededLayer {
            layer: record.layer,
            seal: record.seal,
            hint: record.hint.clone(),
            live_blocks: record.live.blocks,
            live_bytes: record.live.bytes,
        };
        self.root.layers.values().filter(|record| record.foreign.is_none()).map(needed).collect()
    }

    /// Opens and identifies every older file now, so that a missing one is known before anything is served.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] names the first that is missing or is not the expected one.
    pub fn check_layers(&self) -> Result<()> {
        let native = self.older.iter().filter(|(_, older)| older.record.foreign.is_none());
        native.map(|(slot, _)| self.storage(*slot)).try_for_each(|opened| opened.map(|_| ()))
    }

    /// Which key made the content ids; ids of different domains must not be compared.
    pub fn id_domain(&self) -> [u8; 16] {
        self.seal.identity.id_domain
    }

    /// Content id of a block: `None` for zeros, for a block known to be lost, and for one in the disk of another
    /// product that nobody has read yet.
    ///
    /// # Errors
    /// The map or the id page is damaged or cannot be read.
    pub fn content_id(&self, block: u64) -> Result<Option<ContentId>> {
        let (leaf, index) = split(block);
        match self.entry(block)? {
            Entry::Data(_) => Ok(Some(self.ids(leaf)?.get(index))),
            Entry::Foreign { .. } => Ok(Some(self.ids(leaf)?.get(index)).filter(|id| *id != LOST_ID)),
            Entry::Zero | Entry::Bad => Ok(None),
        }
    }

    /// The disk of another product that this one stands on, if it does.
    pub fn linked(&self) -> Option<LinkedDisk> {
        self.root.layers.values().find_map(|record| {
            let (format, identity) = record.foreign.as_ref()?;
            let identity = <[u8; 32]>::try_from(identity.as_slice()).ok()?;
            Some(LinkedDisk { format: *format, identity, size: record.virtual_size, live_blocks: record.live.blocks })
        })
    }

    /// The same layer with that disk at hand.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] where it is not the one this layer was made on, or has changed since.
    pub fn over(self, below: Below) -> Result<Self> {
        let broken = |what: &str| Error::ChainBroken { path: self.label.clone(), what: what.into() };
        let linked = self.linked().ok_or_else(|| broken("it stands on no disk of another product"))?;
        if linked.identity != below.identity() {
            let at = below.layers().first().map_or("nothing", |top| top.label());
            return Err(broken(&format!(
                "it stands on {at} as it was when the first point was linked to it, and that has changed since: what \
                 is stored here cannot be read over it"
            )));
        }
        Ok(Self { below: Some(below), ..self })
    }

    /// That disk, where it is at hand.
    pub fn below(&self) -> Option<&Below> {
        self.below.as_ref()
    }

    /// A whole block that lies in that disk, into `out` (cleared first); zeros past the end of either disk.
    pub(crate) fn read_linked(&self, block: u64, out: &mut Vec<u8>) -> Result<()> {
        let below = self.below.as_ref().ok_or_else(|| self.not_at_hand(block))?;
        let grain = self.grain();
        let offset = block.saturating_mul(grain);
        out.clear();
        out.resize(usize::try_from(grain).unwrap_or_default(), 0);
        let inside = usize::try_from(self.size().saturating_sub(offset).min(grain)).unwrap_or_default();
        below.read(offset, out.get_mut(..inside).unwrap_or_default())
    }

    fn not_at_hand(&self, block: u64) -> Error {
        let what = format!(
            "block {block} lies in files of another product, which this file does not name: read the point through its \
             repository"
        );
        Error::ChainBroken { path: self.label.clone(), what }
    }

    /// Blocks from `block` on, at most until `end`, that lie in that disk.
    fn linked_run(&self, block: u64, end: u64) -> u64 {
        (block..end).take_while(|at| matches!(self.entry(*at), Ok(Entry::Foreign { .. }))).count() as u64
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.seal.identity
    }

    pub(crate) fn seal_info(&self) -> &SealInfo {
        &self.seal
    }

    pub(crate) fn root(&self) -> &Root {
        &self.root
    }

    pub(crate) fn own_storage(&self) -> &Arc<dyn Storage> {
        &self.own
    }

    pub(crate) fn overrides(&self) -> Option<&Overrides> {
        self.salvaged.as_ref()
    }

    /// Layer id and tag behind a slot.
    pub(crate) fn file_of(&self, slot: u16) -> Result<(Uuid, u64)> {
        if slot == self.seal.identity.slot {
            return Ok((self.seal.identity.layer, self.seal.identity.tag));
        }
        let record = self.older.get(&slot).map(|older| &older.record);
        record.map(|r| (r.layer, r.tag)).ok_or_else(|| self.odd(format!("slot {slot} is not in the layer table")))
    }

    fn odd(&self, what: String) -> Error {
        Error::corrupt(&self.label, self.seal.root_a, what)
    }

    /// The file behind a slot, opened and identified.
    pub(crate) fn storage(&self, slot: u16) -> Result<&Arc<dyn Storage>> {
        if slot == self.seal.identity.slot {
            return Ok(&self.own);
        }
        let older = self.older.get(&slot).ok_or_else(|| self.odd(format!("slot {slot} is not in the layer table")))?;
        if let Some(storage) = older.opened.get() {
            return Ok(storage);
        }
        let _one_at_a_time = older.opening.lock();
        if let Some(storage) = older.opened.get() {
            return Ok(storage);
        }
        let storage = self.open_older(&older.record)?;
        Ok(older.opened.get_or_init(|| storage))
    }

    fn open_older(&self, record: &LayerRecord) -> Result<Arc<dyn Storage>> {
        if record.foreign.is_some() {
            return Err(self.odd(format!("layer {} is no file of this format", record.layer)));
        }
        let name = LayerName { hint: &record.hint, layer: record.layer, seal: record.seal };
        let storage = self.resolver.open(&name)?;
        let broken = |what: String| Error::ChainBroken { path: storage.label().into(), what };
        let seal = read_seal(storage.as_ref()).map_err(|e| match e {
            Error::Io { .. } => e,
            other => broken(format!("layer {}, which {} needs, cannot be read: {other}", record.layer, self.label)),
        })?;
        if seal.identity.layer != record.layer || seal.hash != record.seal {
            let what = format!("holds layer {}, but {} was built on {}", seal.identity.layer, self.label, record.layer);
            return Err(broken(what));
        }
        Ok(storage)
    }

    /// The map page of a leaf; `None` for 256 zero blocks.
    pub(crate) fn map(&self, leaf: u64) -> Result<Option<Arc<MapPage>>> {
        if let Some((map, _)) = self.salvaged.as_ref().and_then(|s| s.leaves.get(&leaf)) {
            return Ok(Some(Arc::clone(map)));
        }
        if let Some(page) = self.kept(leaf, Arc::clone) {
            return Ok(Some(page));
        }
        let LeafRef::Pages(pages) = self.root.leaf_ref(leaf).map_err(|what| self.odd(what))? else { return Ok(None) };
        let page = Arc::new(self.page(FrameKind::Map, leaf, pages.map, pages.map_check, MapPage::from_bytes)?);
        if let Some(place) = self.place_of(leaf) {
            *place.write() = Some((leaf, Arc::clone(&page)));
        }
        Ok(Some(page))
    }

    fn place_of(&self, leaf: u64) -> Option<&KeptLeaf> {
        usize::try_from(leaf % LEAVES_KEPT).ok().and_then(|i| self.leaves.get(i))
    }

    /// Looks at a leaf if it is kept, without sharing it: many readers of one leaf do not meet.
    fn kept<T>(&self, leaf: u64, look: impl FnOnce(&Arc<MapPage>) -> T) -> Option<T> {
        match &*self.place_of(leaf)?.read() {
            Some((index, page)) if *index == leaf => Some(look(page)),
            _ => None,
        }
    }

    /// The content ids of a leaf.
    pub(crate) fn ids(&self, leaf: u64) -> Result<Arc<IdPage>> {
        if let Some((_, ids)) = self.salvaged.as_ref().and_then(|s| s.leaves.get(&leaf)) {
            return Ok(Arc::clone(ids));
        }
        match self.root.leaf_ref(leaf).map_err(|what| self.odd(what))? {
            LeafRef::Zero => Ok(Arc::new(IdPage::zero())),
            LeafRef::Pages(p) => self.page(FrameKind::Ids, leaf, p.ids, p.ids_check, IdPage::from_bytes).map(Arc::new),
        }
    }

    pub(crate) fn page<T>(
        &self,
        kind: FrameKind,
        leaf: u64,
        place: Place,
        check: u32,
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<T> {
        let (_, tag) = self.file_of(place.slot)?;
        read_leaf_page(self.storage(place.slot)?.as_ref(), kind, leaf, place.offset, tag, check, parse)
    }

    /// What the map says of a block.
    pub(crate) fn entry(&self, block: u64) -> Result<Entry> {
        let (leaf, index) = split(block);
        let block_bytes = self.block_bytes();
        if self.salvaged.is_none()
            && let Some(entry) = self.kept(leaf, |page| page.get(index, block_bytes))
        {
            return entry.map_err(|what| self.entry_error(leaf, index, what));
        }
        let entry = match self.map(leaf)? {
            None => Entry::Zero,
            Some(page) => page.get(index, block_bytes).map_err(|what| self.entry_error(leaf, index, what))?,
        };
        let own = self.seal.identity.slot;
        match self.salvaged.as_ref().and_then(|s| s.unseen_from) {
            Some(from) if block >= from && !matches!(entry, Entry::Data(at) if at.place.slot == own) => Ok(Entry::Bad),
            _ => Ok(entry),
        }
    }

    fn entry_error(&self, leaf: u64, index: usize, what: String) -> Error {
        let LeafRef::Pages(pages) = self.root.leaf_ref(leaf).unwrap_or(LeafRef::Zero) else { return self.odd(what) };
        let label = self.storage(pages.map.slot).map_or(self.label.as_str(), |s| s.label());
        Error::corrupt(label, pages.map.offset, format!("entry {index} of leaf {leaf}: {what}"))
    }

    /// Zero blocks from `block` on, at most until `end`. Stops before whatever cannot be read.
    fn zero_run(&self, block: u64, end: u64) -> u64 {
        let mut at = block;
        while at < end {
            let (leaf, index) = split(at);
            let page = match self.map(leaf) {
                Ok(page) => page,
                Err(_) => break,
            };
            let leaf_end = ((leaf + 1) * LEAF_ENTRIES as u64).min(end);
            let unseen = self.salvaged.as_ref().and_then(|s| s.unseen_from).unwrap_or(u64::MAX);
            let Some(page) = page else {
                if unseen < leaf_end {
                    return unseen.max(at) - block;
                }
                at = leaf_end;
                continue;
            };
            let mut i = index;
            while at < leaf_end.min(unseen) && page.get(i, self.block_bytes()) == Ok(Entry::Zero) {
                at += 1;
                i += 1;
            }
            if at < leaf_end {
                break;
            }
        }
        at - block
    }

    fn block_ref(&self, block: u64, at: &Stored) -> BlockRef {
        BlockRef {
            offset: at.place.offset,
            logical: if at.shared { LOGICAL_ANY } else { block },
            stored_len: at.stored_bytes,
            raw_len: self.block_bytes(),
            check: at.check,
            file: self.file_slot(at.place.slot),
            codec: at.codec,
        }
    }

    /// Slot of the lineage -> number for the outside, where 0 is the layer's own file.
    fn file_slot(&self, slot: u16) -> FileSlot {
        if slot == self.seal.identity.slot { 0 } else { slot + 1 }
    }

    fn lineage_slot(&self, file: FileSlot) -> u16 {
        if file == 0 { self.seal.identity.slot } else { file - 1 }
    }

    /// Reads and checks a stored block, and appends its payload as it is to `out`.
    pub(crate) fn stored_payload(&self, at: &Stored, out: &mut Vec<u8>) -> Result<()> {
        let (_, tag) = self.file_of(at.place.slot)?;
        let expected = Expected {
            kind: FrameKind::Block,
            codec: at.codec,
            logical: None,
            raw_bytes: self.block_bytes(),
            stored_bytes: at.stored_bytes,
            tag,
            check: at.check,
        };
        frame::read(self.storage(at.place.slot)?.as_ref(), at.place.offset, &expected, |payload, _| {
            out.extend_from_slice(payload);
            Ok(())
        })
    }

    /// Reads and checks one block's stored bytes, decodes at least `need` of it, and returns its content id.
    pub(crate) fn read_block(&self, block: &BlockRef, need: usize, out: &mut Vec<u8>) -> Result<ContentId> {
        out.clear();
        if block.raw_len != self.block_bytes() || block.stored_len > block.raw_len {
            return Err(self.odd(format!("block of {} bytes stored in {}", block.raw_len, block.stored_len)));
        }
        let slot = self.lineage_slot(block.file);
        let (_, tag) = self.file_of(slot)?;
        let storage = self.storage(slot)?;
        let expected = Expected {
            kind: FrameKind::Block,
            codec: block.codec,
            logical: (block.logical != LOGICAL_ANY).then_some(block.logical),
            raw_bytes: block.raw_len,
            stored_bytes: block.stored_len,
            tag,
            check: block.check,
        };
        let raw = usize::try_from(block.raw_len).unwrap_or(usize::MAX);
        frame::read(storage.as_ref(), block.offset, &expected, |payload, info| {
            decode(block.codec, payload, raw, need, Tail::Exact, out).map_err(|e| e.at(storage.label(), block))?;
            Ok(info.id)
        })
    }
}

/// Leaf of a block, and its place in it.
pub(crate) fn split(block: u64) -> (u64, usize) {
    let entries = LEAF_ENTRIES as u64;
    (block / entries, usize::try_from(block % entries).unwrap_or_default())
}

fn file_id(domain: &str, seal: &[u8; 32]) -> u64 {
    let mut hash = blake3::Hasher::new_derive_key("aquifer 2026 file id");
    hash.update(seal).update(domain.as_bytes());
    let mut id = [0; 8];
    hash.finalize_xof().fill(&mut id);
    u64::from_le_bytes(id)
}

pub(crate) fn read_leaf_page<T>(
    storage: &dyn Storage,
    kind: FrameKind,
    leaf: u64,
    offset: u64,
    tag: u64,
    check: u32,
    parse: impl Fn(&[u8]) -> Option<T>,
) -> Result<T> {
    frame::read(storage, offset, &leaf_page_expected(kind, leaf, tag, check), |payload, _| {
        parse(payload).ok_or_else(|| Error::corrupt(storage.label(), offset, "leaf page of the wrong size"))
    })
}

/// What a reference to a map or id page expects of its frame.
pub(crate) fn leaf_page_expected(kind: FrameKind, leaf: u64, tag: u64, check: u32) -> Expected {
    let bytes = LEAF_BYTES;
    Expected { kind, codec: Codec::Raw, logical: Some(leaf), raw_bytes: bytes, stored_bytes: bytes, tag, check }
}

/// The root, from its first copy that is whole.
fn read_root(storage: &dyn Storage, seal: &SealInfo) -> Result<Root> {
    read_root_copy(storage, seal, 0).or_else(|_| read_root_copy(storage, seal, 1))
}

pub(crate) fn read_root_copy(storage: &dyn Storage, seal: &SealInfo, copy: u64) -> Result<Root> {
    let offset = if copy == 0 { seal.root_a } else { seal.root_b };
    let mut scratch = vec![0; frame_bytes(seal.root_stored)];
    storage.read_at(offset, &mut scratch).map_err(|e| frame::read_error(storage, offset, scratch.len() as u64, e))?;
    let odd = |what: String| Error::corrupt(storage.label(), offset, format!("root copy {copy}: {what}"));
    let (info, _) = frame::parse_header(&scratch).map_err(odd)?;
    let fits = info.kind == FrameKind::Root
        && info.logical == copy
        && info.tag == seal.identity.tag
        && info.codec == seal.root_codec
        && info.stored_bytes == seal.root_stored
        && info.raw_bytes == seal.root_raw;
    if !fits {
        return Err(odd(format!("the frame is {info:?}")));
    }
    let payload = frame::checked_payload(&scratch).map_err(odd)?;
    let raw = usize::try_from(seal.root_raw).unwrap_or(usize::MAX);
    let mut out = Vec::new();
    decode_meta(seal.root_codec, payload, raw, &mut out).map_err(odd)?;
    if *blake3::hash(&out).as_bytes() != seal.root_hash {
        return Err(odd("does not match the hash in the seal".into()));
    }
    Root::decode(&out, &seal.identity).map_err(odd)
}

fn frame_bytes(stored: u32) -> usize {
    super::layout::FRAME_HEADER_BYTES.saturating_add(usize::try_from(stored).unwrap_or(usize::MAX))
}

impl Layer for Reader {
    fn label(&self) -> &str {
        &self.label
    }

    fn size(&self) -> u64 {
        self.seal.identity.virtual_size
    }

    fn grain(&self) -> u64 {
        u64::from(self.block_bytes())
    }

    fn lookup(&self, offset: u64, len_max: u64) -> Result<(Content, u64)> {
        let size = self.size();
        let left = size
            .checked_sub(offset)
            .filter(|left| *left > 0 && len_max > 0)
            .ok_or_else(|| Error::OutOfRange { path: self.label.clone(), offset, len: len_max, size })?;
        let len_max = len_max.min(left);
        let grain = self.grain();
        let (block, skip) = (offset / grain, offset % grain);
        let lost = |what: &str| {
            Err(Error::BadBlock { path: self.label.clone(), offset: block * grain, len: grain, what: what.into() })
        };
        match self.entry(block)? {
            Entry::Data(at) => {
                self.file_of(at.place.slot)?;
                let skip32 = u32::try_from(skip).unwrap_or(u32::MAX);
                Ok((Content::Packed { block: self.block_ref(block, &at), skip: skip32 }, len_max.min(grain - skip)))
            }
            Entry::Zero => {
                let end = (offset + len_max).div_ceil(grain);
                let run = 1 + self.zero_run(block + 1, end);
                Ok((Content::Zero, len_max.min(run * grain - skip)))
            }
            Entry::Bad => lost("this disk block is marked as lost, offset is on the disk"),
            Entry::Foreign { slot } => {
                if self.below.is_none() {
                    return Err(self.not_at_hand(block));
                }
                if self.root.layers.get(&slot).is_none_or(|record| record.foreign.is_none()) {
                    return Err(self.odd(format!("block {block} lies in slot {slot}, which is no foreign disk")));
                }
                let run = 1 + self.linked_run(block + 1, (offset + len_max).div_ceil(grain));
                Ok((Content::Absent, len_max.min(run * grain - skip)))
            }
        }
    }

    fn scan(&self, offset: u64, len: u64, each: &mut dyn FnMut(u64, u64, Content)) -> Result<()> {
        scan_by_lookup(self, offset, len, each)
    }

    fn file(&self, slot: FileSlot) -> Result<&Arc<dyn Storage>> {
        self.storage(self.lineage_slot(slot))
    }

    fn file_id(&self, slot: FileSlot) -> u64 {
        let slot = self.lineage_slot(slot);
        self.older.get(&slot).map_or(self.own_id, |older| older.id)
    }

    fn fingerprint(&self) -> Result<[u8; 32]> {
        Ok(self.seal.hash)
    }

    fn unpack(&self, block: &BlockRef, need: usize, out: &mut Vec<u8>) -> Result<()> {
        self.read_block(block, need, out).map(|_| ())
    }
}

/// Blocks and bytes of a disk in one file, for those who add them up.
impl std::ops::AddAssign for Live {
    fn add_assign(&mut self, other: Self) {
        self.blocks += other.blocks;
        self.bytes += other.bytes;
        self.pages += other.pages;
    }
}
