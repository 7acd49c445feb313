//! The native layer: one append-only `.aql` file per disk per restore point.
//!
//! A file is a superblock, then frames (stored blocks, map leaves, id pages, waymarks, the root), then
//! two copies of the seal. The map is a copy-on-write radix tree of two steps: the root names a leaf of
//! 256 blocks, the leaf names the stored block, and either may lie in the file of an older point. A read
//! therefore costs the same at any depth. `docs/formats/aql.md` draws the layout from the structs in
//! [`layout`] and says why each choice was made.
//!
//! Invariants
//! - A sealed file never changes. A file without a valid seal is read by nobody but [`salvage`] and
//!   [`Writer::resume`].
//! - Every pointer holds a CRC-32C over the *identity* of what it points to (layer, logical block,
//!   sequence, lengths, codec, content id) and over its stored bytes, and every read checks it: damaged
//!   bytes, and whole bytes in the wrong place, are errors that name file and offset.
//! - Entry state 0 is illegal: a map that was never written cannot read as zeros.
//! - Bytes of a block past the end of the disk are zeros, so growing a disk never shows old data.
//! - Slots number the files a disk draws from. A layer takes one in which nothing of its disk lies, so a
//!   leaf means the same in every descendant that refers to it.
//!
//! Not here: where files lie and which point is newest (the repository); caches of decoded blocks,
//! merged chains of other formats (`aquifer-vdisk`); encryption, which has its feature bit and no code.

mod append;
mod below;
mod block;
mod dedupe;
mod delta;
mod entry;
mod frame;
mod key;
pub mod layout;
mod leafmap;
mod pipeline;
mod reader;
mod resolve;
mod root;
mod salvage;
mod seal;
mod verify;
mod writer;

pub use below::{Below, LinkedDisk, ReadBelow};
pub use block::Compression;
pub use delta::delta;
pub use key::ContentKey;
pub use layout::{BLOCK_LOG2_DEFAULT, BLOCK_LOG2_MAX, BLOCK_LOG2_MIN, LEAF_ENTRIES, SLOTS_MAX};
pub use reader::{NeededLayer, Reader};
pub use resolve::{LayerName, Resolver};
pub use salvage::{Salvaged, Unseen, confirm_sealed, salvage};
pub use seal::{Sealed, Stats, is_link, is_sealed};
pub use verify::{Damage, Depth, Finding, Verify, verify};
pub use writer::{NewLayer, Writer, WriterOptions};

#[cfg(test)]
mod tests;
