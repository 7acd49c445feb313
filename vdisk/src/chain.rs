//! Restore points stacked into one read-only disk, newest layer first.
//!
//! Invariants
//! - A chain is immutable; a change builds a new one.
//! - A layer shorter than the chain reads as zero past its end and stops the walk there.
//!
//! Not here: writing, retries, how layers were found.

use std::sync::Arc;

use aquifer_formats::{CHAIN_LAYERS_MAX, Content, Layer};

use crate::{BlockCache, Error, Extent, ExtentKind, Result};

/// One read-only disk made of layers.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Arc<dyn Layer>>,
    cache: Arc<BlockCache>,
    size: u64,
}

impl Chain {
    /// Stacks `layers`, newest first. The size is the newest layer's.
    ///
    /// # Errors
    /// No layer, or more than [`CHAIN_LAYERS_MAX`].
    pub fn new(layers: Vec<Arc<dyn Layer>>, cache: Arc<BlockCache>) -> Result<Self> {
        let size = match layers.first() {
            Some(top) if layers.len() <= CHAIN_LAYERS_MAX => top.size(),
            _ => {
                let what = format!("a chain of {} layers (1 to {CHAIN_LAYERS_MAX} are possible)", layers.len());
                return Err(aquifer_formats::Error::unsupported("chain", what).into());
            }
        };
        Ok(Self { layers, cache, size })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The layers, newest first.
    pub fn layers(&self) -> &[Arc<dyn Layer>] {
        &self.layers
    }

    /// The shared cache.
    pub fn cache(&self) -> &Arc<BlockCache> {
        &self.cache
    }

    /// Which layer answers at `offset`, with what, for how many bytes of `1..=len_max`.
    /// `Absent` means no layer says anything: a hole.
    pub fn resolve(&self, offset: u64, len_max: u64) -> Result<(usize, Content, u64)> {
        let mut len = len_max.min(self.size.saturating_sub(offset));
        for (index, layer) in self.layers.iter().enumerate() {
            if offset >= layer.size() {
                return Ok((index, Content::Zero, len));
            }
            let (content, n) = layer.lookup(offset, len.min(layer.size() - offset))?;
            len = len.min(n);
            if content != Content::Absent {
                return Ok((index, content, len));
            }
        }
        Ok((self.layers.len(), Content::Absent, len))
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; whatever the layer that holds the range reports.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let size = self.size;
        let len = buf.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::OutOfRange { disk: "chain".into(), offset, len, size });
        }
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (index, content, n) = self.resolve(at, rest.len() as u64)?;
            let (part, tail) = rest.split_at_mut(usize::try_from(n).unwrap_or(usize::MAX).min(rest.len()));
            self.read_content(index, content, part)?;
            at += part.len() as u64;
            rest = tail;
        }
        Ok(())
    }

    fn read_content(&self, index: usize, content: Content, part: &mut [u8]) -> Result<()> {
        let layer = self.layers.get(index);
        match (content, layer) {
            (Content::Plain { file, offset }, Some(layer)) => {
                let storage = layer.file(file)?;
                let failed = |e| aquifer_formats::Error::io(storage.label(), "read", offset, e);
                storage.read_at(offset, part).map_err(failed)?;
            }
            (Content::Packed { block, skip }, Some(layer)) => {
                let mut out = Vec::new();
                let skip = usize::try_from(skip).unwrap_or(usize::MAX);
                let end = skip.saturating_add(part.len());
                layer.unpack(&block, end, &mut out)?;
                let short = || aquifer_formats::Error::corrupt(layer.label(), block.offset, "block decodes short");
                part.copy_from_slice(out.get(skip..end).ok_or_else(short)?);
            }
            _ => part.fill(0),
        }
        Ok(())
    }

    /// What `offset..offset + len` holds, appended to `out` in order, merged. Reads no data.
    pub fn extents(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        let end = offset.saturating_add(len).min(self.size);
        let mut at = offset;
        while at < end {
            let (_, content, n) = self.resolve(at, end - at)?;
            let kind = match content {
                Content::Absent => ExtentKind::Hole,
                Content::Zero => ExtentKind::Zero,
                Content::Plain { .. } | Content::Packed { .. } => ExtentKind::Data,
            };
            Extent::push(out, Extent { offset: at, len: n, kind });
            at += n;
        }
        Ok(())
    }
}
