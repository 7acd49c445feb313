//! The root: one reference per leaf, and the files of the lineage this layer draws from.
//!
//! Invariants
//! - A decoded root has exactly the leaves its disk needs, and every slot its references name is its own
//!   or in the layer table.
//! - Live counts are exact: a file whose counts are zero is not in the table, so retention may let it go.

use std::collections::BTreeMap;

use uuid::Uuid;
use zerocopy::{
    FromBytes, IntoBytes,
    little_endian::{U16, U32, U64},
};

use super::{
    entry::LeafRef,
    layout::{HINT_BYTES_MAX, IDENTITY_BYTES_MAX, LayerRecordBytes, LeafRefBytes, ROOT_MAGIC, RootHeader, SLOTS_MAX},
    seal::Identity,
};

/// A slot for a layer on top of one with this root: the next one that nothing of the disk lies in.
/// `None` if all are in use.
pub(crate) fn free_slot(parent: u16, root: &Root) -> Option<u16> {
    let from_next = (parent + 1..SLOTS_MAX).chain(0..parent);
    from_next.into_iter().find(|slot| !root.layers.contains_key(slot))
}

/// How much of a disk lies in one file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Live {
    pub(crate) blocks: u64,
    pub(crate) bytes: u64,
    pub(crate) pages: u64,
}

impl Live {
    pub(crate) fn is_empty(self) -> bool {
        self.blocks == 0 && self.pages == 0
    }
}

/// An older file of the lineage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerRecord {
    pub(crate) layer: Uuid,
    pub(crate) seal: [u8; 32],
    pub(crate) tag: u64,
    pub(crate) data_end: u64,
    pub(crate) virtual_size: u64,
    pub(crate) live: Live,
    /// Relative path to look at first.
    pub(crate) hint: String,
    /// Format number and identity of a foreign file.
    pub(crate) foreign: Option<(u8, Vec<u8>)>,
}

/// The decoded root.
#[derive(Clone, Debug)]
pub(crate) struct Root {
    pub(crate) refs: Vec<LeafRefBytes>,
    pub(crate) own: Live,
    pub(crate) layers: BTreeMap<u16, LayerRecord>,
}

impl Root {
    pub(crate) fn leaf_ref(&self, leaf: u64) -> Result<LeafRef, String> {
        let bytes = usize::try_from(leaf).ok().and_then(|i| self.refs.get(i));
        LeafRef::unpack(bytes.ok_or_else(|| format!("leaf {leaf} lies outside the map"))?)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let header = RootHeader {
            magic: ROOT_MAGIC,
            leaves: U32::new(u32::try_from(self.refs.len()).unwrap_or(u32::MAX)),
            layers: U32::new(u32::try_from(self.layers.len()).unwrap_or(u32::MAX)),
            reserved: U32::ZERO,
            own_blocks: U64::new(self.own.blocks),
            own_bytes: U64::new(self.own.bytes),
            own_pages: U64::new(self.own.pages),
            reserved_2: U64::ZERO,
        };
        let mut out = header.as_bytes().to_vec();
        out.extend_from_slice(self.refs.as_bytes());
        for (slot, record) in &self.layers {
            let identity = record.foreign.as_ref().map(|(_, identity)| identity.as_slice()).unwrap_or_default();
            let fixed = LayerRecordBytes {
                layer: record.layer.into_bytes(),
                seal: record.seal,
                tag: U64::new(record.tag),
                data_end: U64::new(record.data_end),
                virtual_size: U64::new(record.virtual_size),
                live_blocks: U64::new(record.live.blocks),
                live_bytes: U64::new(record.live.bytes),
                live_pages: U64::new(record.live.pages),
                slot: U16::new(*slot),
                kind: u8::from(record.foreign.is_some()),
                foreign: record.foreign.as_ref().map_or(0, |(format, _)| *format),
                hint_bytes: U16::new(u16::try_from(record.hint.len()).unwrap_or(u16::MAX)),
                identity_bytes: U16::new(u16::try_from(identity.len()).unwrap_or(u16::MAX)),
            };
            out.extend_from_slice(fixed.as_bytes());
            out.extend_from_slice(record.hint.as_bytes());
            out.extend_from_slice(identity);
        }
        out
    }

    /// Strict decoding; the text says which rule is broken.
    pub(crate) fn decode(bytes: &[u8], identity: &Identity) -> Result<Self, String> {
        let (header, rest) = RootHeader::read_from_prefix(bytes).map_err(|_| "root cut short".to_owned())?;
        if header.magic != ROOT_MAGIC {
            return Err("root has no magic number".into());
        }
        if u64::from(header.leaves.get()) != identity.leaves() || header.layers.get() > u32::from(SLOTS_MAX) {
            return Err(format!("root of {} leaves, {} layers", header.leaves.get(), header.layers.get()));
        }
        let leaves = usize::try_from(header.leaves.get()).unwrap_or(usize::MAX);
        let (refs, mut rest) = <[LeafRefBytes]>::ref_from_prefix_with_elems(rest, leaves)
            .map_err(|_| "leaf references cut short".to_owned())?;
        let mut layers = BTreeMap::new();
        for _ in 0..header.layers.get() {
            let (slot, record, tail) = decode_record(rest)?;
            if slot == identity.slot || slot >= SLOTS_MAX || layers.insert(slot, record).is_some() {
                return Err(format!("layer record for slot {slot} in a file of slot {}", identity.slot));
            }
            rest = tail;
        }
        if layers.values().filter(|record: &&LayerRecord| record.foreign.is_some()).count() > 1 {
            return Err("more than one disk of another product".into());
        }
        if !rest.is_empty() {
            return Err(format!("{} stray bytes after the root", rest.len()));
        }
        let own =
            Live { blocks: header.own_blocks.get(), bytes: header.own_bytes.get(), pages: header.own_pages.get() };
        let root = Self { refs: refs.to_vec(), own, layers };
        root.check_slots(identity.slot)?;
        Ok(root)
    }

    fn check_slots(&self, own: u16) -> Result<(), String> {
        let mut known = vec![false; usize::from(SLOTS_MAX)];
        // Pages are only in files of this format.
        let native = self.layers.iter().filter(|(_, record)| record.foreign.is_none()).map(|(slot, _)| slot);
        for slot in native.chain([&own]) {
            if let Some(known) = known.get_mut(usize::from(*slot)) {
                *known = true;
            }
        }
        for (leaf, bytes) in self.refs.iter().enumerate() {
            if let LeafRef::Pages(pages) = LeafRef::unpack(bytes)? {
                for slot in [pages.map.slot, pages.ids.slot] {
                    if known.get(usize::from(slot)) != Some(&true) {
                        return Err(format!("leaf {leaf} lies in slot {slot}, which is not in the layer table"));
                    }
                }
            }
        }
        Ok(())
    }
}

fn decode_record(bytes: &[u8]) -> Result<(u16, LayerRecord, &[u8]), String> {
    let cut = || "layer record cut short".to_owned();
    let (fixed, rest) = LayerRecordBytes::read_from_prefix(bytes).map_err(|_| cut())?;
    let (hint_len, identity_len) = (usize::from(fixed.hint_bytes.get()), usize::from(fixed.identity_bytes.get()));
    if hint_len > HINT_BYTES_MAX || identity_len > IDENTITY_BYTES_MAX {
        return Err(format!("layer record with a hint of {hint_len} and an identity of {identity_len} bytes"));
    }
    let (hint, rest) = rest.split_at_checked(hint_len).ok_or_else(cut)?;
    let (identity, rest) = rest.split_at_checked(identity_len).ok_or_else(cut)?;
    let hint = std::str::from_utf8(hint).map_err(|_| "layer hint is not UTF-8".to_owned())?;
    let foreign = match (fixed.kind, fixed.foreign) {
        (0, 0) if identity.is_empty() => None,
        (1, format) => Some((format, identity.to_vec())),
        (kind, format) => return Err(format!("layer record of kind {kind}, format {format}")),
    };
    let live = Live { blocks: fixed.live_blocks.get(), bytes: fixed.live_bytes.get(), pages: fixed.live_pages.get() };
    let record = LayerRecord {
        layer: Uuid::from_bytes(fixed.layer),
        seal: fixed.seal,
        tag: fixed.tag.get(),
        data_end: fixed.data_end.get(),
        virtual_size: fixed.virtual_size.get(),
        live,
        hint: hint.to_owned(),
        foreign,
    };
    Ok((fixed.slot.get(), record, rest))
}
