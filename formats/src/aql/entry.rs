//! Entries of a leaf, pages of 256, and the root's references to them.
//!
//! Invariants
//! - Decoding is strict: state 0, unknown states, codecs and flags, and stray bits in fields a state does
//!   not use are damage.
//! - A `Zero` entry has an all-zero content id; `Bad` ones have the id that equals nothing, and so
//!   have `Foreign` ones that nobody has read yet.

use zerocopy::{
    FromBytes, IntoBytes,
    little_endian::{U32, U64},
};

use super::{
    block::codec_from,
    key::ContentId,
    layout::{EntryBytes, LEAF_BYTES, LEAF_ENTRIES, LeafRefBytes, SLOTS_MAX},
};
use crate::Codec;

const STATE_ZERO: u64 = 1;
const STATE_DATA: u64 = 2;
const STATE_FOREIGN: u64 = 3;
const STATE_BAD: u64 = 4;
const OFFSET_BITS: u32 = 48;
const OFFSET_MASK: u64 = (1 << OFFSET_BITS) - 1;
const FLAG_SHARED: u32 = 1;

/// Where a frame lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) slot: u16,
    pub(crate) offset: u64,
}

impl Place {
    fn pack(self, state: u64) -> U64 {
        debug_assert!(self.slot < SLOTS_MAX && self.offset <= OFFSET_MASK);
        U64::new(state << 60 | u64::from(self.slot) << OFFSET_BITS | self.offset & OFFSET_MASK)
    }

    fn unpack(bits: u64) -> (u64, Self) {
        let slot = u16::try_from(bits >> OFFSET_BITS & 0xFFF).unwrap_or_default();
        (bits >> 60, Self { slot, offset: bits & OFFSET_MASK })
    }
}

/// A stored block, as its pointer knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) place: Place,
    pub(crate) stored_bytes: u32,
    pub(crate) codec: Codec,
    /// The frame was written for another block of equal content.
    pub(crate) shared: bool,
    pub(crate) check: u32,
}

/// What the map says of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Zero,
    Data(Stored),
    /// Ask the foreign file behind the slot for this block.
    Foreign {
        slot: u16,
    },
    /// Known to be lost: reading it is an error.
    Bad,
}

impl Entry {
    pub(crate) fn pack(self) -> EntryBytes {
        let plain = |state: u64, slot: u16| EntryBytes {
            place: Place { slot, offset: 0 }.pack(state),
            form: U32::ZERO,
            check: U32::ZERO,
        };
        match self {
            Self::Zero => plain(STATE_ZERO, 0),
            Self::Bad => plain(STATE_BAD, 0),
            Self::Foreign { slot } => plain(STATE_FOREIGN, slot),
            Self::Data(at) => EntryBytes {
                place: at.place.pack(STATE_DATA),
                form: U32::new(at.stored_bytes << 8 | u32::from(at.codec as u8) << 4 | u32::from(at.shared)),
                check: U32::new(at.check),
            },
        }
    }

    /// Strict decoding; the text says which rule is broken.
    pub(crate) fn unpack(bytes: &EntryBytes, block_bytes: u32) -> Result<Self, String> {
        let (state, place) = Place::unpack(bytes.place.get());
        let (form, check) = (bytes.form.get(), bytes.check.get());
        let bare = form == 0 && check == 0 && place.offset == 0;
        match state {
            STATE_ZERO if bare && place.slot == 0 => Ok(Self::Zero),
            STATE_BAD if bare && place.slot == 0 => Ok(Self::Bad),
            STATE_FOREIGN if bare => Ok(Self::Foreign { slot: place.slot }),
            STATE_DATA => {
                let stored_bytes = form >> 8;
                let codec = codec_from(u8::try_from(form >> 4 & 0xF).unwrap_or(u8::MAX));
                let flags = form & 0xF;
                let fits = match codec {
                    Some(Codec::Raw) => stored_bytes == block_bytes,
                    _ => stored_bytes > 0 && stored_bytes < block_bytes,
                };
                match codec {
                    Some(codec) if fits && flags & !FLAG_SHARED == 0 => {
                        Ok(Self::Data(Stored { place, stored_bytes, codec, shared: flags & FLAG_SHARED != 0, check }))
                    }
                    _ => Err(format!("entry form {form:#010x} is not valid for blocks of {block_bytes} bytes")),
                }
            }
            _ => Err(format!("entry {:#018x} {form:#010x} {check:#010x} has no valid state", bytes.place.get())),
        }
    }
}

/// The 256 entries of a leaf.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct MapPage(Box<[EntryBytes; LEAF_ENTRIES]>);

impl MapPage {
    pub(crate) fn zero() -> Self {
        Self(Box::new([Entry::Zero.pack(); LEAF_ENTRIES]))
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        <[EntryBytes; LEAF_ENTRIES]>::read_from_bytes(bytes).ok().map(|page| Self(Box::new(page)))
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    pub(crate) fn get(&self, index: usize, block_bytes: u32) -> Result<Entry, String> {
        match self.0.get(index) {
            Some(bytes) => Entry::unpack(bytes, block_bytes),
            None => Err(format!("a leaf has no entry {index}")),
        }
    }

    pub(crate) fn set(&mut self, index: usize, entry: Entry) {
        if let Some(bytes) = self.0.get_mut(index) {
            *bytes = entry.pack();
        }
    }

    pub(crate) fn is_all_zero(&self) -> bool {
        let zero = Entry::Zero.pack();
        self.0.iter().all(|entry| *entry == zero)
    }
}

impl std::fmt::Debug for MapPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MapPage(..)")
    }
}

/// The 256 content ids of a leaf.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct IdPage(Box<[ContentId; LEAF_ENTRIES]>);

impl IdPage {
    pub(crate) fn zero() -> Self {
        Self(Box::new([[0; 16]; LEAF_ENTRIES]))
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        <[ContentId; LEAF_ENTRIES]>::read_from_bytes(bytes).ok().map(|page| Self(Box::new(page)))
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    pub(crate) fn get(&self, index: usize) -> ContentId {
        self.0.get(index).copied().unwrap_or_default()
    }

    pub(crate) fn set(&mut self, index: usize, id: ContentId) {
        if let Some(slot) = self.0.get_mut(index) {
            *slot = id;
        }
    }
}

impl std::fmt::Debug for IdPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IdPage(..)")
    }
}

/// Where the two pages of a leaf lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LeafPages {
    pub(crate) map: Place,
    pub(crate) map_check: u32,
    pub(crate) ids: Place,
    pub(crate) ids_check: u32,
}

/// What the root says of one leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeafRef {
    Zero,
    Pages(LeafPages),
}

impl LeafRef {
    pub(crate) fn pack(self) -> LeafRefBytes {
        match self {
            Self::Zero => LeafRefBytes {
                map: Place { slot: 0, offset: 0 }.pack(STATE_ZERO),
                ids: U64::ZERO,
                map_check: U32::ZERO,
                ids_check: U32::ZERO,
            },
            Self::Pages(pages) => LeafRefBytes {
                map: pages.map.pack(STATE_DATA),
                ids: pages.ids.pack(STATE_DATA),
                map_check: U32::new(pages.map_check),
                ids_check: U32::new(pages.ids_check),
            },
        }
    }

    pub(crate) fn unpack(bytes: &LeafRefBytes) -> Result<Self, String> {
        let (map_state, map) = Place::unpack(bytes.map.get());
        let (ids_state, ids) = Place::unpack(bytes.ids.get());
        if *bytes == Self::Zero.pack() {
            return Ok(Self::Zero);
        }
        if map_state != STATE_DATA || ids_state != STATE_DATA {
            return Err(format!(
                "leaf reference {:#018x} {:#018x} has no valid state",
                bytes.map.get(),
                bytes.ids.get()
            ));
        }
        let (map_check, ids_check) = (bytes.map_check.get(), bytes.ids_check.get());
        Ok(Self::Pages(LeafPages { map, map_check, ids, ids_check }))
    }
}

const _: () = assert!(size_of::<[EntryBytes; LEAF_ENTRIES]>() == LEAF_BYTES as usize);
const _: () = assert!(size_of::<[ContentId; LEAF_ENTRIES]>() == LEAF_BYTES as usize);
