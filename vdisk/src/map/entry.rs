//! One grain of a merged map in eight bytes.
//!
//! ```text
//!  63                                        15 14 13 12        3 2   0
//! +--------------------------------------------+-----+-----------+-----+
//! | Plain:  byte offset in the file / 512      | file|   layer   | tag |
//! | Packed: byte offset of the block | sectors - 1   |   layer   | tag |
//! | Ask, Zero, Hole: 0                               |   layer   | tag |
//! +--------------------------------------------------+-----------+-----+
//! ```
//! A packed block's decoded length, codec and file are the same all over a layer in every format
//! that is merged, so they are kept once for each layer ([`Packing`]); its index on the disk follows
//! from where the entry lies.
//!
//! Invariants
//! - What decodes is exactly what was encoded; what does not fit is encoded as `Ask`, which is
//!   always right and only slower.
//! - A filled entry is never 0 unless it is a hole, so a window under construction needs no second map.

use std::sync::OnceLock;

use aquifer_formats::{BlockRef, CHAIN_LAYERS_MAX, Codec, Content, FileSlot, SECTOR_BYTES};

const TAG_BITS: u32 = 3;
const LAYER_BITS: u32 = 10;
const FILE_BITS: u32 = 2;
const HEAD_BITS: u32 = TAG_BITS + LAYER_BITS;
const TAG_MASK: u64 = (1 << TAG_BITS) - 1;
const LAYER_MASK: u64 = (1 << LAYER_BITS) - 1;
const FILE_MASK: u64 = (1 << FILE_BITS) - 1;
const _: () = assert!(CHAIN_LAYERS_MAX as u64 - 1 <= LAYER_MASK, "a layer's index fits");

const HOLE: u64 = 0;
const ZERO: u64 = 1;
const PLAIN: u64 = 2;
const PACKED: u64 = 3;
const ASK: u64 = 4;

/// What the packed blocks of one layer have in common. Learned from the first one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packing {
    raw_log2: u32,
    file: FileSlot,
    codec: Codec,
}

impl Packing {
    /// Bits of the sector count: what qcow2 itself reserves for it, so that its entries always fit.
    fn span_bits(self) -> u32 {
        self.raw_log2.saturating_sub(8).max(1)
    }
}

/// A decoded entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// No layer says anything.
    Hole,
    /// Zeros.
    Zero,
    /// This layer answers, with this content.
    At(usize, Content),
    /// Walk the layers from this one on.
    Ask(usize),
}

/// One grain, encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Entry(u64);

impl Entry {
    pub(super) const HOLE: Self = Self(HOLE);
    pub(super) const ZERO: Self = Self(ZERO);

    pub(super) fn ask(layer: usize) -> Self {
        Self(ASK | (layer as u64) << TAG_BITS)
    }

    /// Encodes what `layer` says about the grain at `offset` on the disk.
    pub(super) fn encode(layer: usize, content: Content, offset: u64, packing: &OnceLock<Packing>) -> Self {
        let head = (layer as u64) << TAG_BITS;
        let fitting = match content {
            Content::Absent => Some(HOLE),
            Content::Zero => Some(ZERO),
            Content::Plain { file, offset } => plain(file, offset).map(|rest| rest | head | PLAIN),
            Content::Packed { block, skip } => packed(&block, skip, offset, packing).map(|rest| rest | head | PACKED),
        };
        fitting.map_or(Self::ask(layer), Self)
    }

    fn layer(self) -> usize {
        usize::try_from(self.0 >> TAG_BITS & LAYER_MASK).unwrap_or(usize::MAX)
    }

    /// Decodes the entry of the grain that holds `offset`, which lies `into` bytes behind its start.
    pub(super) fn decode(self, offset: u64, into: u64, packings: &[OnceLock<Packing>]) -> Found {
        let layer = self.layer();
        match self.0 & TAG_MASK {
            HOLE => Found::Hole,
            ZERO => Found::Zero,
            PLAIN => {
                let file = FileSlot::try_from(self.0 >> HEAD_BITS & FILE_MASK).unwrap_or(FileSlot::MAX);
                let at = (self.0 >> (HEAD_BITS + FILE_BITS)) * SECTOR_BYTES + into;
                Found::At(layer, Content::Plain { file, offset: at })
            }
            PACKED => match packings.get(layer).and_then(OnceLock::get) {
                Some(packing) => unpack_entry(self.0 >> HEAD_BITS, offset, *packing)
                    .map_or(Found::Ask(layer), |content| Found::At(layer, content)),
                None => Found::Ask(layer),
            },
            _ => Found::Ask(layer),
        }
    }

    /// Whether `next`, the entry of the following grain, goes on where this one ends.
    pub(super) fn continues(self, next: Self, grain: u64) -> bool {
        match self.0 & TAG_MASK {
            PLAIN => next.0 == self.0 + ((grain / SECTOR_BYTES) << (HEAD_BITS + FILE_BITS)),
            _ => next == self,
        }
    }
}

fn plain(file: FileSlot, offset: u64) -> Option<u64> {
    let sector = offset / SECTOR_BYTES;
    let fits = offset.is_multiple_of(SECTOR_BYTES)
        && u64::from(file) <= FILE_MASK
        && sector < 1 << (64 - HEAD_BITS - FILE_BITS);
    fits.then(|| sector << (HEAD_BITS + FILE_BITS) | u64::from(file) << HEAD_BITS)
}

fn packed(block: &BlockRef, skip: u32, offset: u64, packing: &OnceLock<Packing>) -> Option<u64> {
    let raw = u64::from(block.raw_len);
    if !raw.is_power_of_two() || raw < SECTOR_BYTES || block.check != 0 {
        return None;
    }
    let own = Packing { raw_log2: raw.trailing_zeros(), file: block.file, codec: block.codec };
    let span_bits = own.span_bits();
    let end = block.offset.checked_add(u64::from(block.stored_len))?;
    let sectors = (end / SECTOR_BYTES).checked_sub(block.offset / SECTOR_BYTES)?.checked_sub(1)?;
    let derivable =
        end.is_multiple_of(SECTOR_BYTES) && block.logical == offset / raw && u64::from(skip) == offset % raw;
    let fits = sectors < 1 << span_bits && block.offset < 1 << (64 - HEAD_BITS - span_bits);
    if !derivable || !fits || *packing.get_or_init(|| own) != own {
        return None;
    }
    Some((block.offset << span_bits | sectors) << HEAD_BITS)
}

fn unpack_entry(bits: u64, offset: u64, packing: Packing) -> Option<Content> {
    let span_bits = packing.span_bits();
    let at = bits >> span_bits;
    let sectors = (bits & ((1 << span_bits) - 1)) + 1;
    let end = (at / SECTOR_BYTES + sectors) * SECTOR_BYTES;
    let raw = 1u64 << packing.raw_log2;
    let block = BlockRef {
        offset: at,
        logical: offset >> packing.raw_log2,
        stored_len: u32::try_from(end - at).ok()?,
        raw_len: u32::try_from(raw).ok()?,
        check: 0,
        file: packing.file,
        codec: packing.codec,
    };
    Some(Content::Packed { block, skip: u32::try_from(offset & (raw - 1)).ok()? })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(offset: u64, stored_len: u32, raw_log2: u32, logical: u64) -> BlockRef {
        BlockRef { offset, logical, stored_len, raw_len: 1 << raw_log2, check: 0, file: 0, codec: Codec::Zstd }
    }

    proptest! {
        #[test]
        fn what_decodes_is_what_was_encoded(
            layer in 0..CHAIN_LAYERS_MAX, at in 0..1u64 << 60, align in 0..2u64, file in 0..6u16,
            stored in 1..200_000u32, whole_sectors in any::<bool>(), raw_log2 in 9..22u32, grain_log2 in 9..22u32,
            grain in 0..1u64 << 36, check in 0..2u32, into in 0..1u64 << 21, plain in any::<bool>(),
        ) {
            let offset = grain << grain_log2;
            let into = into & ((1 << grain_log2) - 1);
            let stored = if whole_sectors { stored.next_multiple_of(512) - u32::try_from(at % 512).expect("small") } else { stored };
            let raw = 1u64 << raw_log2;
            let content = if plain {
                Content::Plain { file, offset: at >> 9 << 9 | align }
            } else {
                let block = BlockRef { check, file, ..block(at >> 8, stored.max(1), raw_log2, offset / raw) };
                Content::Packed { block, skip: u32::try_from(offset % raw).expect("small") }
            };
            let packings: Vec<OnceLock<Packing>> = (0..CHAIN_LAYERS_MAX).map(|_| OnceLock::new()).collect();
            let entry = Entry::encode(layer, content, offset, &packings[layer]);
            let wanted = match content {
                Content::Plain { file, offset } => Content::Plain { file, offset: offset + into },
                Content::Packed { block, .. } => {
                    let at = offset + into;
                    let block = BlockRef { logical: at / raw, ..block };
                    Content::Packed { block, skip: u32::try_from(at % raw).expect("small") }
                }
                other => other,
            };
            match entry.decode(offset + into, into, &packings) {
                Found::Ask(l) => prop_assert_eq!(l, layer),
                found => prop_assert_eq!(found, Found::At(layer, wanted)),
            }
        }
    }

    #[test]
    fn a_usual_qcow2_cluster_fits_and_a_checked_block_does_not() {
        let packing = OnceLock::new();
        let content = |b: BlockRef| Content::Packed { block: b, skip: 0 };
        let zstd = block(5 * 65536 + 700, 30_720 - 700 % 512, 16, 3);
        let entry = Entry::encode(1023, content(zstd), 3 << 16, &packing);
        assert_ne!(entry, Entry::ask(1023));
        let checked = BlockRef { check: 7, ..zstd };
        assert_eq!(Entry::encode(1, content(checked), 3 << 16, &packing), Entry::ask(1));
        let other_codec = BlockRef { codec: Codec::Deflate, ..zstd };
        assert_eq!(Entry::encode(1, content(other_codec), 3 << 16, &packing), Entry::ask(1), "one packing a layer");
    }

    #[test]
    fn plain_grains_continue_only_where_the_file_does() {
        let at = |offset| Entry::encode(2, Content::Plain { file: 0, offset }, 0, &OnceLock::new());
        assert!(at(65536).continues(at(131_072), 65536));
        assert!(!at(65536).continues(at(65536), 65536));
        assert!(!at(65536).continues(Entry::ZERO, 65536));
        assert!(!Entry::HOLE.continues(Entry::ZERO, 65536));
    }
}
