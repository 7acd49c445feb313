//! Checking a layer and every older file it draws from.
//!
//! Invariants
//! - Damage is listed, never repaired, and never ends the check.
//! - `Deep` reads and decodes every block of the disk and compares its content id with the map's.

use std::ops::Range;

use super::{
    entry::{Entry, IdPage, LeafRef, MapPage},
    frame::FrameKind,
    key::ContentKey,
    layout::LEAF_ENTRIES,
    reader::{Reader, read_root_copy},
    seal::{read_seal_copy, read_superblock},
};
use crate::{BlockRef, Content, Error, Layer, Result};

/// How much is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Seals, superblock, roots, leaves, id pages, and that every older file is there.
    Metadata,
    /// And every block: stored bytes, decoding, content id (recomputed where the key is given).
    Deep(Option<ContentKey>),
}

/// One thing that is wrong.
#[derive(Debug)]
pub struct Damage {
    /// The bytes of the disk that cannot be read because of it; empty where a second copy serves.
    pub disk: Range<u64>,
    /// What is wrong, with file and offset.
    pub error: Error,
}

/// What one step of a check covered.
#[derive(Debug)]
pub struct Finding {
    /// The bytes of the disk that were checked; empty for the parts that belong to all of it.
    pub disk: Range<u64>,
    /// Blocks read and decoded.
    pub blocks_read: u64,
    /// What is wrong there.
    pub damage: Vec<Damage>,
}

/// The steps of a check: first what belongs to the whole file, then leaf after leaf.
#[derive(Debug)]
pub struct Verify<'a> {
    reader: &'a Reader,
    depth: Depth,
    next_leaf: Option<u64>,
}

/// Checks `reader` step by step. Steps are independent: [`Verify::leaf`] lets several threads share them.
pub fn verify(reader: &Reader, depth: Depth) -> Verify<'_> {
    Verify { reader, depth, next_leaf: None }
}

impl Iterator for Verify<'_> {
    type Item = Finding;

    fn next(&mut self) -> Option<Finding> {
        let Some(leaf) = self.next_leaf else {
            self.next_leaf = Some(0);
            return Some(self.whole());
        };
        if leaf >= self.leaves() {
            return None;
        }
        self.next_leaf = Some(leaf + 1);
        Some(self.leaf(leaf))
    }
}

impl Verify<'_> {
    /// Steps after the first.
    pub fn leaves(&self) -> u64 {
        self.reader.identity().leaves()
    }

    /// The first step: superblock, both seals, both roots, and the older files.
    pub fn whole(&self) -> Finding {
        let (reader, storage) = (self.reader, self.reader.own_storage().as_ref());
        let all = 0..reader.size();
        let mut damage = Vec::new();
        let mut note = |result: Result<()>, disk: &Range<u64>| {
            if let Err(error) = result {
                damage.push(Damage { disk: disk.clone(), error });
            }
        };
        if reader.overrides().is_none() {
            let none = 0..0;
            let same = |identity: super::seal::Identity| {
                let other = Error::corrupt(storage.label(), 0, "superblock and seal disagree");
                if identity == *reader.identity() { Ok(()) } else { Err(other) }
            };
            note(read_superblock(storage).and_then(same), &none);
            for copy in 0..2 {
                note(read_seal_copy(storage, copy).map(|_| ()), &none);
                note(read_root_copy(storage, reader.seal_info(), copy.into()).map(|_| ()), &none);
            }
        }
        for (slot, record) in &reader.root().layers {
            if record.foreign.is_none() {
                note(reader.storage(*slot).map(|_| ()), &all);
            }
        }
        Finding { disk: 0..0, blocks_read: 0, damage }
    }

    /// One leaf: its pages, and with [`Depth::Deep`] its blocks.
    pub fn leaf(&self, leaf: u64) -> Finding {
        let reader = self.reader;
        let grain = reader.grain();
        let first = leaf * LEAF_ENTRIES as u64;
        let blocks = first..(first + LEAF_ENTRIES as u64).min(reader.blocks());
        let disk = blocks.start * grain..(blocks.end * grain).min(reader.size());
        let mut finding = Finding { disk: disk.clone(), blocks_read: 0, damage: Vec::new() };
        match self.pages(leaf) {
            Ok(true) => {}
            Ok(false) => return finding,
            Err(error) => {
                finding.damage.push(Damage { disk, error });
                return finding;
            }
        }
        for block in blocks {
            let disk = block * grain..((block + 1) * grain).min(reader.size());
            match self.block(block, &disk) {
                Ok(read) => finding.blocks_read += u64::from(read),
                Err(error) => finding.damage.push(Damage { disk, error }),
            }
        }
        finding
    }

    /// Both pages of a leaf, from storage, not from memory. `false`: there is nothing in it to check.
    fn pages(&self, leaf: u64) -> Result<bool> {
        let reader = self.reader;
        let at = reader.seal_info().root_a;
        match reader.root().leaf_ref(leaf).map_err(|what| Error::corrupt(reader.label(), at, what))? {
            LeafRef::Zero => Ok(reader.overrides().is_some()),
            LeafRef::Pages(p) => {
                reader.page(FrameKind::Map, leaf, p.map, p.map_check, MapPage::from_bytes)?;
                reader.page(FrameKind::Ids, leaf, p.ids, p.ids_check, IdPage::from_bytes)?;
                Ok(true)
            }
        }
    }

    /// `true` if the block was read.
    fn block(&self, block: u64, disk: &Range<u64>) -> Result<bool> {
        let reader = self.reader;
        if let Entry::Foreign { .. } = reader.entry(block)? {
            return self.linked(block);
        }
        let (content, _) = reader.lookup(disk.start, disk.end - disk.start)?;
        let (Depth::Deep(key), Content::Packed { block: stored, .. }) = (&self.depth, content) else {
            return Ok(false);
        };
        self.deep(block, &stored, key.as_ref()).map(|()| true)
    }

    /// A block in the disk of another product: read where that is at hand, and compared with the id it had when
    /// somebody read it first.
    fn linked(&self, block: u64) -> Result<bool> {
        let Depth::Deep(key) = &self.depth else { return Ok(false) };
        let mut bytes = Vec::new();
        self.reader.read_linked(block, &mut bytes)?;
        let (known, computed) = (self.reader.content_id(block)?, key.as_ref().map(|key| key.id(&bytes)));
        match (known, computed) {
            (Some(known), Some(computed)) if known != computed => Err(Error::BadBlock {
                path: self.reader.label().into(),
                offset: block * self.reader.grain(),
                len: self.reader.grain(),
                what: format!(
                    "content id of this part of the disk it stands on: map {}, bytes {}; that disk was changed",
                    hex(&known),
                    hex(&computed)
                ),
            }),
            _ => Ok(true),
        }
    }

    fn deep(&self, block: u64, stored: &BlockRef, key: Option<&ContentKey>) -> Result<()> {
        let reader = self.reader;
        let mut bytes = Vec::new();
        let raw = usize::try_from(stored.raw_len).unwrap_or(usize::MAX);
        let found = reader.read_block(stored, raw, &mut bytes)?;
        let mapped = reader.content_id(block)?.unwrap_or_default();
        let computed = key.map_or(found, |key| key.id(&bytes));
        if found == mapped && computed == mapped {
            return Ok(());
        }
        Err(Error::BadBlock {
            path: reader.file(stored.file)?.label().into(),
            offset: stored.offset,
            len: u64::from(stored.stored_len),
            what: format!("content id: map {}, frame {}, bytes {}", hex(&mapped), hex(&found), hex(&computed)),
        })
    }
}

fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}
