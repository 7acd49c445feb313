//! A disk's extents in a row, as one layer.
//!
//! Invariants
//! - The extents cover the disk without gap or overlap, in the order of the descriptor.
//! - A compressed grain says for which place of the disk it was written, and is refused for another.

use std::sync::Arc;

use super::{
    descriptor::{Extent, Kind},
    sparse::Sparse,
};
use crate::{
    BlockRef, Content, Error, FileSlot, Layer, Result, SECTOR_BYTES, Storage, codec, raw::RawLayer, tables::TableFile,
};

/// Bytes of a grain's marker before its data: first sector of the grain, length of the data.
const MARKER_BYTES: usize = 12;

/// Finest granularity that is told, in bytes: deltas with grains of a sector are mostly written in pages.
const GRAIN_MIN: u64 = 4096;

/// How many tables of an extent a fingerprint samples.
const SAMPLES: usize = 8;

/// What lies behind an extent.
#[derive(Debug)]
enum Body {
    Zero,
    /// A file and the byte where the extent begins in it.
    Flat {
        raw: RawLayer,
        offset: u64,
    },
    Sparse(Box<Sparse>),
}

/// One extent and the first byte of the disk that it holds.
#[derive(Debug)]
struct Part {
    start: u64,
    len: u64,
    body: Body,
}

/// One VMware disk without its parent.
#[derive(Debug)]
pub struct VmdkLayer {
    label: String,
    parts: Vec<Part>,
    size: u64,
    grain: u64,
    /// Digest over the descriptor.
    text: [u8; 32],
}

impl VmdkLayer {
    pub(super) fn new(label: &str, text: [u8; 32]) -> Self {
        Self { label: label.into(), parts: Vec::new(), size: 0, grain: 1 << 30, text }
    }

    /// Appends an extent; `storage` is its file, `None` for zeros.
    pub(super) fn push(&mut self, extent: &Extent, storage: Option<Arc<dyn Storage>>) -> Result<()> {
        let file = || {
            let missing = || Error::corrupt(&self.label, 0, "an extent without its file");
            TableFile::open(storage.clone().ok_or_else(missing)?)
        };
        let sparse = |sparse: Sparse| {
            if sparse.capacity < extent.len {
                let what = format!("holds {} bytes, but the descriptor says {}", sparse.capacity, extent.len);
                return Err(Error::corrupt(sparse.file.label(), 0, what));
            }
            if sparse.is_compressed() && !self.size.is_multiple_of(sparse.grain) {
                let what = "a compressed extent that begins within a grain of the disk";
                return Err(Error::unsupported(sparse.file.label(), what));
            }
            Ok((sparse.grain, Body::Sparse(Box::new(sparse))))
        };
        let (grain, body) = match extent.kind {
            Kind::Zero => (1 << 30, Body::Zero),
            Kind::Flat { offset } => {
                let file = file()?;
                file.check_inside(offset, extent.len, "a flat extent")?;
                let raw = RawLayer::open(file.storage)?;
                (raw.grain().min(lowest_bit(offset)), Body::Flat { raw, offset })
            }
            Kind::Hosted => sparse(Sparse::hosted(file()?)?)?,
            Kind::Cowd => sparse(Sparse::cowd(file()?)?)?,
            Kind::SeSparse => sparse(Sparse::sesparse(file()?)?)?,
        };
        self.grain = self.grain.min(grain).min(lowest_bit(self.size)).max(SECTOR_BYTES);
        self.parts.push(Part { start: self.size, len: extent.len, body });
        self.size = self.size.saturating_add(extent.len);
        Ok(())
    }

    fn part(&self, at: u64) -> Result<(usize, &Part)> {
        let index = self.parts.partition_point(|part| part.start <= at).wrapping_sub(1);
        let none = || Error::corrupt(&self.label, at, "no extent holds this place of the disk");
        self.parts.get(index).map(|part| (index, part)).ok_or_else(none)
    }

    fn piece(&self, at: u64, end: u64) -> Result<(Content, u64)> {
        let (index, part) = self.part(at)?;
        let (from, to) = (at - part.start, end.min(part.start.saturating_add(part.len)) - part.start);
        let slot = FileSlot::try_from(index).unwrap_or(FileSlot::MAX);
        match &part.body {
            Body::Zero => Ok((Content::Zero, to - from)),
            Body::Flat { raw, offset } => {
                let (content, len) = raw.lookup(offset + from, to - from)?;
                let content = match content {
                    Content::Plain { offset, .. } => Content::Plain { file: slot, offset },
                    other => other,
                };
                Ok((content, len))
            }
            Body::Sparse(sparse) => sparse.piece(from, to, part.start, slot),
        }
    }

    fn sparse(&self, slot: FileSlot) -> Result<&Sparse> {
        match self.parts.get(usize::from(slot)).map(|part| &part.body) {
            Some(Body::Sparse(sparse)) => Ok(sparse),
            _ => Err(Error::corrupt(&self.label, 0, format!("extent {slot} has no grains"))),
        }
    }

    fn no_file(&self, slot: FileSlot) -> Error {
        Error::corrupt(&self.label, 0, format!("the disk has no file {slot}"))
    }
}

/// The largest power of two that divides `at`, far above any grain for 0.
fn lowest_bit(at: u64) -> u64 {
    1 << at.trailing_zeros().min(30)
}

impl Layer for VmdkLayer {
    fn label(&self) -> &str {
        &self.label
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn grain(&self) -> u64 {
        self.grain.max(GRAIN_MIN)
    }

    crate::runs::layer_in_pieces!();

    fn file(&self, slot: FileSlot) -> Result<&Arc<dyn Storage>> {
        match self.parts.get(usize::from(slot)).map(|part| &part.body) {
            Some(Body::Flat { raw, .. }) => raw.file(0),
            Some(Body::Sparse(sparse)) => Ok(&sparse.file.storage),
            _ => Err(self.no_file(slot)),
        }
    }

    fn file_id(&self, slot: FileSlot) -> u64 {
        match self.parts.get(usize::from(slot)).map(|part| &part.body) {
            Some(Body::Flat { raw, .. }) => raw.file_id(0),
            Some(Body::Sparse(sparse)) => sparse.file.id,
            _ => 0,
        }
    }

    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = blake3::Hasher::new();
        hash.update(b"vmdk").update(&self.size.to_le_bytes()).update(&self.text);
        for part in &self.parts {
            hash.update(&part.len.to_le_bytes());
            match &part.body {
                Body::Zero => hash.update(b"zero"),
                Body::Flat { raw, .. } => hash.update(&raw.fingerprint()?),
                Body::Sparse(sparse) => {
                    hash.update(&sparse.file.len.to_le_bytes());
                    for entry in &sparse.directory {
                        hash.update(&entry.to_le_bytes());
                    }
                    for sample in sparse.samples(SAMPLES) {
                        hash.update(&sample);
                    }
                    &mut hash
                }
            };
        }
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        let sparse = self.sparse(block.file)?;
        let raw_len = usize::try_from(block.raw_len).unwrap_or(usize::MAX);
        let (storage, path) = (sparse.file.storage.as_ref(), sparse.file.label());
        let damaged = |what: String| Error::BadBlock {
            path: path.into(),
            offset: block.offset,
            len: block.stored_len.into(),
            what,
        };
        let mut marker = [0u8; MARKER_BYTES];
        storage.read_at(block.offset, &mut marker).map_err(|e| Error::io(path, "read", block.offset, e))?;
        let [sector @ .., a, b, c, d] = marker;
        let (sector, len) = (u64::from_le_bytes(sector), u32::from_le_bytes([a, b, c, d]));
        let start = self.parts.get(usize::from(block.file)).map_or(0, |part| part.start);
        let place = block.logical.saturating_mul(block.raw_len.into()).saturating_sub(start);
        if sector.checked_mul(SECTOR_BYTES) != Some(place) {
            return Err(damaged(format!("it was written for sector {sector}, not for {}", place / SECTOR_BYTES)));
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len == 0 || len > 2 * raw_len + 1024 {
            return Err(damaged(format!("a grain of {raw_len} bytes stored in {len}")));
        }
        let at = block.offset + MARKER_BYTES as u64;
        sparse.file.check_inside(at, len as u64, "a compressed grain")?;
        codec::with_stored(storage, at, len, |stored| {
            codec::zlib(stored, raw_len, out).map_err(|e| damaged(e.to_string()))
        })?;
        // Only the grain in which the extent ends may be short.
        let needed = sparse.capacity.saturating_sub(place).min(raw_len as u64);
        if (out.len() as u64) < needed {
            let got = out.len();
            out.clear();
            return Err(damaged(format!("decodes to {got} of {needed} bytes")));
        }
        out.resize(raw_len, 0);
        Ok(())
    }
}
