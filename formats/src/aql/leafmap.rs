//! The map of a layer being written: the parent's leaves, and changed ones over them.
//!
//! Invariants
//! - A leaf is changed in memory only; flushing writes it once, to the end of the file, and refers to it
//!   from then on. Pages of older files are never touched.
//! - Live counts follow every change of an entry and of a page, so they are exact at the end.
//! - Entries past the end of the disk are `Zero`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    append::Tail,
    dedupe::Known,
    entry::{Entry, IdPage, LeafPages, LeafRef, MapPage, Place, Stored},
    frame::{FrameInfo, FrameKind},
    key::{ContentId, ZERO_ID},
    layout::{FRAME_HEADER_BYTES, LEAF_BYTES, LEAF_ENTRIES, LeafRefBytes},
    reader::{Reader, read_leaf_page, split},
    root::{LayerRecord, Live, Root},
    seal::Identity,
};
use crate::{Codec, Error, Result};

/// A leaf in memory.
#[derive(Clone, Debug)]
struct Leaf {
    map: MapPage,
    ids: IdPage,
}

/// The map of a layer being written.
#[derive(Debug)]
pub(crate) struct LeafMap {
    identity: Identity,
    parent: Option<Arc<Reader>>,
    refs: Vec<LeafRefBytes>,
    dirty: BTreeMap<u64, Leaf>,
    changed: BTreeSet<u64>,
    live: BTreeMap<u16, Live>,
    /// The disk of another product that this very layer stands on, and its slot.
    linked: Option<(u16, LayerRecord)>,
}

impl LeafMap {
    /// The parent's map, cut or extended to this layer's size. Blocks beyond a cut are given up.
    pub(crate) fn new(identity: Identity, parent: Option<Arc<Reader>>) -> Result<Self> {
        let leaves = usize::try_from(identity.leaves()).unwrap_or(usize::MAX);
        let mut refs = vec![LeafRef::Zero.pack(); leaves];
        let mut live = BTreeMap::new();
        if let Some(parent) = &parent {
            let root = parent.root();
            refs.iter_mut().zip(&root.refs).for_each(|(to, from)| *to = *from);
            live.insert(parent.identity().slot, root.own);
            live.extend(root.layers.iter().map(|(slot, record)| (*slot, record.live)));
        }
        let mut map =
            Self { identity, parent, refs, dirty: BTreeMap::new(), changed: BTreeSet::new(), live, linked: None };
        map.give_up_beyond_end()?;
        Ok(map)
    }

    /// Has the layer stand on a disk of another product.
    pub(crate) fn link(&mut self, slot: u16, record: LayerRecord) {
        self.linked = Some((slot, record));
    }

    /// The slot of that disk.
    pub(crate) fn linked_slot(&self) -> Option<u16> {
        self.linked.as_ref().map(|(slot, _)| *slot)
    }

    /// Takes what a shrunk disk no longer reaches out of the counts and out of the boundary leaf.
    fn give_up_beyond_end(&mut self) -> Result<()> {
        let Some(parent) = self.parent.clone() else { return Ok(()) };
        let (blocks, before) = (self.identity.blocks(), parent.blocks());
        if blocks >= before {
            return Ok(());
        }
        let leaves = self.identity.leaves();
        for leaf in leaves..parent.identity().leaves() {
            let LeafRef::Pages(pages) = self.parent_ref(&parent, leaf)? else { continue };
            self.count_pages(&pages, |count| *count = count.saturating_sub(1));
            for index in 0..LEAF_ENTRIES {
                self.release(parent.entry(leaf * LEAF_ENTRIES as u64 + index as u64)?);
            }
        }
        for block in blocks..before.min(leaves * LEAF_ENTRIES as u64) {
            self.put(block, Entry::Zero, ZERO_ID, None)?;
        }
        Ok(())
    }

    fn parent_ref(&self, parent: &Reader, leaf: u64) -> Result<LeafRef> {
        let at = parent.seal_info().root_a;
        parent.root().leaf_ref(leaf).map_err(|what| Error::corrupt(crate::Layer::label(parent), at, what))
    }

    fn leaf_ref(&self, leaf: u64) -> LeafRef {
        let bytes = usize::try_from(leaf).ok().and_then(|i| self.refs.get(i));
        bytes.and_then(|b| LeafRef::unpack(b).ok()).unwrap_or(LeafRef::Zero)
    }

    fn set_ref(&mut self, leaf: u64, to: LeafRef) {
        if let LeafRef::Pages(old) = self.leaf_ref(leaf) {
            self.count_pages(&old, |count| *count = count.saturating_sub(1));
        }
        if let LeafRef::Pages(new) = to {
            self.count_pages(&new, |count| *count += 1);
        }
        if let Some(slot) = usize::try_from(leaf).ok().and_then(|i| self.refs.get_mut(i)) {
            *slot = to.pack();
        }
        self.changed.insert(leaf);
    }

    fn count_pages(&mut self, pages: &LeafPages, change: impl Fn(&mut u64)) {
        change(&mut self.live.entry(pages.map.slot).or_default().pages);
        change(&mut self.live.entry(pages.ids.slot).or_default().pages);
    }

    fn release(&mut self, entry: Entry) {
        let Some((slot, bytes)) = self.drawn(entry) else { return };
        let live = self.live.entry(slot).or_default();
        live.blocks = live.blocks.saturating_sub(1);
        live.bytes = live.bytes.saturating_sub(bytes);
    }

    fn take(&mut self, entry: Entry) {
        let Some((slot, bytes)) = self.drawn(entry) else { return };
        let live = self.live.entry(slot).or_default();
        live.blocks += 1;
        live.bytes += bytes;
    }

    /// The file that an entry draws from, and how many stored bytes: of another product's, a whole block.
    fn drawn(&self, entry: Entry) -> Option<(u16, u64)> {
        match entry {
            Entry::Data(at) => Some((at.place.slot, u64::from(at.stored_bytes) + FRAME_HEADER_BYTES as u64)),
            Entry::Foreign { slot } => Some((slot, self.identity.block_bytes().into())),
            Entry::Zero | Entry::Bad => None,
        }
    }

    /// The pages of a leaf as they are on storage.
    fn load(&self, leaf: u64, tail: Option<&Tail>) -> Result<Leaf> {
        let LeafRef::Pages(pages) = self.leaf_ref(leaf) else {
            return Ok(Leaf { map: MapPage::zero(), ids: IdPage::zero() });
        };
        Ok(Leaf {
            map: self.load_page(FrameKind::Map, leaf, pages.map, pages.map_check, MapPage::from_bytes, tail)?,
            ids: self.load_page(FrameKind::Ids, leaf, pages.ids, pages.ids_check, IdPage::from_bytes, tail)?,
        })
    }

    fn load_page<T>(
        &self,
        kind: FrameKind,
        leaf: u64,
        place: Place,
        check: u32,
        parse: impl Fn(&[u8]) -> Option<T>,
        tail: Option<&Tail>,
    ) -> Result<T> {
        match (tail, &self.parent) {
            (Some(tail), _) if place.slot == self.identity.slot => {
                read_leaf_page(tail.storage().as_ref(), kind, leaf, place.offset, self.identity.tag, check, parse)
            }
            (_, Some(parent)) => parent.page(kind, leaf, place, check, parse),
            _ => Err(Error::corrupt("map", place.offset, format!("leaf {leaf} lies in unknown slot {}", place.slot))),
        }
    }

    /// What the map says of a block now, and its content id.
    pub(crate) fn get(&mut self, block: u64, tail: &Tail) -> Result<(Entry, ContentId)> {
        let (leaf, index) = split(block);
        if !self.dirty.contains_key(&leaf) && self.leaf_ref(leaf) == LeafRef::Zero {
            return Ok((Entry::Zero, ZERO_ID));
        }
        let block_bytes = self.identity.block_bytes();
        let leaf = self.leaf(leaf, Some(tail))?;
        let entry = leaf.map.get(index, block_bytes).map_err(|what| Error::corrupt("map", block, what))?;
        Ok((entry, leaf.ids.get(index)))
    }

    /// What the parent says of a block, `None` where there is no parent or it is shorter.
    pub(crate) fn parent_entry(&self, block: u64) -> Result<Option<Entry>> {
        match &self.parent {
            Some(parent) if block < parent.blocks() => parent.entry(block).map(Some),
            _ => Ok(None),
        }
    }

    /// Blocks of a leaf that lie in one of these files, with their ids; `None` if neither they nor the
    /// leaf's own pages do.
    pub(crate) fn blocks_in(
        &self,
        leaf: u64,
        slots: &BTreeSet<u16>,
        tail: &Tail,
    ) -> Result<Option<Vec<(u64, Stored, ContentId)>>> {
        let loaded;
        let (pages, page_there) = match (self.dirty.get(&leaf), self.leaf_ref(leaf)) {
            (Some(pages), _) => (pages, false),
            (None, LeafRef::Zero) => return Ok(None),
            (None, LeafRef::Pages(at)) => {
                loaded = self.load(leaf, Some(tail))?;
                (&loaded, slots.contains(&at.map.slot) || slots.contains(&at.ids.slot))
            }
        };
        let mut blocks = Vec::new();
        for index in 0..LEAF_ENTRIES {
            let block = leaf * LEAF_ENTRIES as u64 + index as u64;
            let entry = pages.map.get(index, self.identity.block_bytes());
            match entry.map_err(|what| Error::corrupt("map", block, what))? {
                Entry::Data(at) if slots.contains(&at.place.slot) => blocks.push((block, at, pages.ids.get(index))),
                _ => {}
            }
        }
        Ok((page_there || !blocks.is_empty()).then_some(blocks))
    }

    /// Has a leaf written anew, changed or not.
    pub(crate) fn rewrite(&mut self, leaf: u64, tail: &Tail) -> Result<()> {
        self.leaf(leaf, Some(tail))?;
        self.changed.insert(leaf);
        Ok(())
    }

    /// Puts the leaf into memory, where it may be changed.
    fn leaf(&mut self, leaf: u64, tail: Option<&Tail>) -> Result<&mut Leaf> {
        if !self.dirty.contains_key(&leaf) {
            let loaded = self.load(leaf, tail)?;
            self.dirty.insert(leaf, loaded);
        }
        self.dirty.get_mut(&leaf).ok_or_else(|| Error::corrupt("map", leaf, "leaf lost"))
    }

    /// Changes one entry.
    pub(crate) fn put(&mut self, block: u64, entry: Entry, id: ContentId, tail: Option<&Tail>) -> Result<()> {
        let (leaf_index, index) = split(block);
        let block_bytes = self.identity.block_bytes();
        let leaf = self.leaf(leaf_index, tail)?;
        let old = leaf.map.get(index, block_bytes).map_err(|what| Error::corrupt("map", block, what))?;
        leaf.map.set(index, entry);
        leaf.ids.set(index, id);
        self.release(old);
        self.take(entry);
        self.changed.insert(leaf_index);
        Ok(())
    }

    /// Changes a run of blocks to zeros; leaves that are zero already cost nothing. Returns how many changed.
    pub(crate) fn zero(&mut self, mut block: u64, end: u64, tail: &Tail) -> Result<u64> {
        let mut changed = 0;
        while block < end {
            let (leaf, index) = split(block);
            let leaf_end = ((leaf + 1) * LEAF_ENTRIES as u64).min(end);
            if self.dirty.contains_key(&leaf) || self.leaf_ref(leaf) != LeafRef::Zero {
                for (at, _) in (block..leaf_end).zip(index..) {
                    if self.get(at, tail)?.0 != Entry::Zero {
                        self.put(at, Entry::Zero, ZERO_ID, Some(tail))?;
                        changed += 1;
                    }
                }
            }
            block = leaf_end;
        }
        Ok(changed)
    }

    /// Leaves in memory.
    pub(crate) fn leaves_in_memory(&self) -> usize {
        self.dirty.len()
    }

    /// Writes changed leaves to the end of the file and forgets all leaves in memory: map pages first,
    /// then id pages, so that each kind lies together.
    pub(crate) fn flush(&mut self, tail: &mut Tail) -> Result<()> {
        let dirty = std::mem::take(&mut self.dirty);
        let changed: Vec<(u64, Leaf)> = dirty.into_iter().filter(|(leaf, _)| self.changed.contains(leaf)).collect();
        let mut bytes = Vec::new();
        let mut maps = Vec::new();
        for (leaf, pages) in changed.iter().filter(|(_, pages)| !pages.map.is_all_zero()) {
            maps.push(self.page_frame(FrameKind::Map, *leaf, pages.map.as_bytes(), tail, &mut bytes));
        }
        let mut ids = Vec::new();
        for (leaf, pages) in changed.iter().filter(|(_, pages)| !pages.map.is_all_zero()) {
            ids.push(self.page_frame(FrameKind::Ids, *leaf, pages.ids.as_bytes(), tail, &mut bytes));
        }
        tail.append(&bytes)?;
        let mut places = maps.into_iter().zip(ids);
        for (leaf, pages) in &changed {
            if pages.map.is_all_zero() {
                self.set_ref(*leaf, LeafRef::Zero);
            } else if let Some(((map, map_check), (ids, ids_check))) = places.next() {
                self.set_ref(*leaf, LeafRef::Pages(LeafPages { map, map_check, ids, ids_check }));
            }
        }
        Ok(())
    }

    fn page_frame(
        &self,
        kind: FrameKind,
        leaf: u64,
        page: &[u8],
        tail: &mut Tail,
        bytes: &mut Vec<u8>,
    ) -> (Place, u32) {
        let place = Place { slot: self.identity.slot, offset: tail.offset() + bytes.len() as u64 };
        let info = FrameInfo {
            kind,
            codec: Codec::Raw,
            logical: leaf,
            raw_bytes: LEAF_BYTES,
            stored_bytes: LEAF_BYTES,
            sequence: tail.next_sequence(),
            tag: self.identity.tag,
            id: [0; 16],
        };
        let check = info.append(page, bytes);
        (place, check)
    }

    /// Leaves whose references changed since the last call.
    pub(crate) fn take_changed(&mut self) -> Vec<(u64, LeafRefBytes)> {
        let changed = std::mem::take(&mut self.changed);
        changed.into_iter().map(|leaf| (leaf, self.leaf_ref(leaf).pack())).collect()
    }

    /// Takes a reference found in the file when resuming, counting what it changes.
    pub(crate) fn adopt(&mut self, leaf: u64, to: LeafRef, tail: &Tail) -> Result<()> {
        let block_bytes = self.identity.block_bytes();
        // A leaf that lost what lies beyond the end of a shrunk disk is in memory and counted like that: what was
        // found in the file takes its place, else later blocks of it would be put over the parent's.
        let before = match self.dirty.remove(&leaf) {
            Some(shortened) => shortened,
            None => self.load(leaf, Some(tail))?,
        };
        self.set_ref(leaf, to);
        let after = self.load(leaf, Some(tail))?;
        for index in 0..LEAF_ENTRIES {
            let entry = |page: &MapPage| page.get(index, block_bytes).map_err(|what| Error::corrupt("map", leaf, what));
            self.release(entry(&before.map)?);
            self.take(entry(&after.map)?);
        }
        Ok(())
    }

    /// Names leaves as changed, so that the next waymark lists them.
    pub(crate) fn mark_all_changed(&mut self, leaves: impl Iterator<Item = u64>) {
        self.changed.extend(leaves);
    }

    /// Shows `each` the blocks of a leaf that lie in this very file.
    pub(crate) fn own_blocks(&self, leaf: u64, tail: &Tail, mut each: impl FnMut(Known)) -> Result<()> {
        let pages = self.load(leaf, Some(tail))?;
        for index in 0..LEAF_ENTRIES {
            if let Ok(Entry::Data(at)) = pages.map.get(index, self.identity.block_bytes())
                && at.place.slot == self.identity.slot
            {
                let block = leaf * LEAF_ENTRIES as u64 + index as u64;
                each(Known { id: pages.ids.get(index), at, logical: if at.shared { u64::MAX } else { block } });
            }
        }
        Ok(())
    }

    /// The leaves in memory, for a reader that serves them without their being written.
    pub(crate) fn take_leaves(&mut self) -> BTreeMap<u64, (Arc<MapPage>, Arc<IdPage>)> {
        let dirty = std::mem::take(&mut self.dirty);
        dirty.into_iter().map(|(leaf, pages)| (leaf, (Arc::new(pages.map), Arc::new(pages.ids)))).collect()
    }

    /// The root as it stands. All leaves must have been flushed.
    pub(crate) fn root(&self, parent_hint: &str) -> Root {
        debug_assert!(self.dirty.is_empty(), "leaves are flushed before the root");
        let own = self.live.get(&self.identity.slot).copied().unwrap_or_default();
        let mut layers = BTreeMap::new();
        if let Some(parent) = &self.parent {
            for (slot, live) in self.live.iter().filter(|(slot, live)| **slot != self.identity.slot && !live.is_empty())
            {
                if let Some(record) = self.record(parent, *slot, parent_hint) {
                    layers.insert(*slot, LayerRecord { live: *live, ..record });
                }
            }
        }
        if let Some((slot, record)) = &self.linked {
            let live = self.live.get(slot).copied().unwrap_or_default();
            layers.insert(*slot, LayerRecord { live, ..record.clone() });
        }
        Root { refs: self.refs.clone(), own, layers }
    }

    fn record(&self, parent: &Reader, slot: u16, parent_hint: &str) -> Option<LayerRecord> {
        let identity = parent.identity();
        if slot == identity.slot {
            return Some(LayerRecord {
                layer: identity.layer,
                seal: parent.seal_hash(),
                tag: identity.tag,
                data_end: parent.seal_info().data_end,
                virtual_size: identity.virtual_size,
                live: Live::default(),
                hint: parent_hint.to_owned(),
                foreign: None,
            });
        }
        let record = parent.root().layers.get(&slot)?;
        if record.foreign.is_some() {
            return Some(record.clone());
        }
        Some(LayerRecord { hint: super::resolve::chain_hint(parent_hint, &record.hint), ..record.clone() })
    }

    /// Blocks of the disk that hold data.
    pub(crate) fn data_blocks(&self) -> u64 {
        self.live.values().map(|live| live.blocks).sum()
    }
}
