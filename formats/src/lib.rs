//! What bytes mean: bytes at rest ([`Storage`]), what one layer of a disk says about a range
//! ([`Layer`]), and one module per on-disk format.
//!
//! Invariants
//! - Nothing here trusts a byte it has read: arithmetic is checked, lengths are bounded before
//!   anything is allocated, an unknown incompatible feature refuses the file.
//! - A format maps ranges and decodes single blocks; it never does bulk I/O and knows no chain.
//! - Sources are opened read-only and never written to.
//!
//! Not here: chains, caches, overlays (`aquifer-vdisk`); sockets and mounts (`aquifer-mount`);
//! anything that prints, reads the environment or exits.

pub mod aql;
pub mod benji;
pub mod codec;
mod document;
pub mod error;
pub mod gate;
pub mod layer;
pub mod longhorn;
mod lz4_frame;
pub mod lzop;
#[cfg(test)]
mod made;
mod objects;
pub mod ova;
pub mod pbs;
#[doc(hidden)]
pub mod planted;
pub mod probe;
pub mod qcow2;
pub mod raw;
pub mod repo;
mod runs;
pub mod storage;
mod tables;
mod tar;
mod unzip;
pub mod vbk;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod virtnbd;
pub mod vma;
pub mod vmdk;
pub mod xo;
pub mod xva;

pub use error::{Error, Result};
pub use gate::{Gate, Passage};
pub use layer::{BlockRef, Codec, Content, FileSlot, Layer, scan_by_lookup};
pub use probe::Format;
pub use storage::Storage;

/// Smallest unit any map in this workspace speaks of, in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// Deepest backing chain that is followed, in layers. `qemu-img` builds of that depth exist in the
/// field; deeper ones are almost always a cycle that another check missed.
pub const CHAIN_LAYERS_MAX: usize = 1024;
