//! The disk of another product that a native layer stands on without having copied it.
//!
//! Invariants
//! - A layer names at most one such disk, by a digest over what identifies its files. A path is not in the layer: where
//!   the files lie is told by whoever a person told it (a repository's record), so that no layer file opens others.
//! - Without that disk at hand, blocks that lie in it are errors, never zeros.
//! - Content ids of such blocks are the ones that equal nothing until somebody has read the block; from then on the
//!   layer holds them, and comparing reads that block no more.
//!
//! Not here: opening the files and telling whether they have changed (`aquifer-vdisk`, the repository's record).

use std::{fmt, sync::Arc};

use crate::{Layer, Result};

/// Fills a buffer from a byte offset of the disk.
pub type ReadBelow = Arc<dyn Fn(u64, &mut [u8]) -> Result<()> + Send + Sync>;

/// What a layer says of the disk it stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkedDisk {
    /// Number of its format, as `docs/formats/aql.md` lists them.
    pub format: u8,
    /// Digest over what identifies its files.
    pub identity: [u8; 32],
    /// Its size in bytes.
    pub size: u64,
    /// Blocks of this layer's disk that lie in it.
    pub live_blocks: u64,
}

/// That disk, opened.
#[derive(Clone)]
pub struct Below {
    identity: [u8; 32],
    layers: Vec<Arc<dyn Layer>>,
    read: ReadBelow,
}

impl Below {
    /// `layers`, newest first, are the disk; `read` reads it, with whatever cache its owner has. `identity` is what was
    /// found of its files just now.
    pub fn new(identity: [u8; 32], layers: Vec<Arc<dyn Layer>>, read: ReadBelow) -> Self {
        Self { identity, layers, read }
    }

    /// The disk's layers, newest first.
    pub fn layers(&self) -> &[Arc<dyn Layer>] {
        &self.layers
    }

    pub(crate) fn identity(&self) -> [u8; 32] {
        self.identity
    }

    /// Fills `buf` from `offset`; past the end of the disk with zeros.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let size = self.layers.first().map_or(0, |top| top.size());
        let inside = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        let (inside, beyond) = buf.split_at_mut(inside);
        beyond.fill(0);
        if inside.is_empty() { Ok(()) } else { (self.read)(offset, inside) }
    }
}

impl fmt::Debug for Below {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Below").field("layers", &self.layers).finish_non_exhaustive()
    }
}
