//! One disk of a snapshot as a layer: an index over the datastore's chunks.
//!
//! Every snapshot is whole, so a chain has this one layer.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use sha2::{Digest as _, Sha256};

use super::{
    CHUNKS,
    blob::{self, Failure, Sealing},
    datastore_of,
    index::{Digest, HEAD_BYTES, Index},
    key::Key,
};
use crate::{
    BlockRef, Codec, Content, Error, Layer, Result, Storage, codec,
    objects::{Folder, hexadecimal},
    storage::FileStorage,
};

/// One disk.
#[derive(Debug)]
pub struct PbsLayer {
    pub(super) index: Index,
    key: Option<Arc<Key>>,
    /// The folder of chunks.
    chunks: Folder,
    /// What a chunk of zeros is named, open and sealed; made when first asked for.
    zeros: OnceLock<Vec<Digest>>,
}

impl PbsLayer {
    /// The disk whose index is `storage`, which lies at `path` inside its datastore. Encrypted chunks need `key`.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] outside a datastore; [`Error::Corrupt`], [`Error::Truncated`],
    /// [`Error::Unsupported`], [`Error::Io`].
    pub fn open(storage: Arc<dyn Storage>, path: &Path, key: Option<Arc<Key>>) -> Result<Self> {
        let index = Index::open(storage)?;
        let broken = || Error::ChainBroken {
            path: index.file.label().into(),
            what: format!("it lies in no datastore: no folder above it has a {CHUNKS}"),
        };
        let chunks = Folder::open(&datastore_of(path).ok_or_else(broken)?.join(CHUNKS))?;
        Ok(Self { index, key, chunks, zeros: OnceLock::new() })
    }

    /// Whether a chunk of this name is nothing but zeros.
    pub(super) fn is_zeros(&self, digest: &Digest) -> bool {
        let zeros = self.zeros.get_or_init(|| {
            let mut hash = Sha256::new();
            (0..self.index.chunk_bytes / 4096).for_each(|_| hash.update([0; 4096]));
            let open = hash.clone();
            let sealed = self.key.iter().map(|key| hash.clone().chain_update(key.id_key()));
            std::iter::once(open).chain(sealed).map(|hash| hash.finalize().into()).collect()
        });
        zeros.contains(digest)
    }

    fn piece(&self, at: u64, end: u64) -> Result<(Content, u64)> {
        let chunk_bytes = self.index.chunk_bytes;
        let (logical, skip) = (at / chunk_bytes, at % chunk_bytes);
        let len = (chunk_bytes - skip).min(end - at);
        let digest = self.digest(logical)?;
        if self.is_zeros(digest) {
            return Ok((Content::Zero, len));
        }
        let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let block = BlockRef {
            offset: HEAD_BYTES + 32 * logical,
            logical,
            // What is stored is known only when the chunk is opened; it is at most this, or little more.
            stored_len: small(chunk_bytes),
            raw_len: small(chunk_bytes),
            check: digest.first_chunk().map_or(0, |first| u32::from_le_bytes(*first)),
            file: 0,
            codec: Codec::Zstd,
        };
        Ok((Content::Packed { block, skip: small(skip) }, len))
    }

    fn digest(&self, logical: u64) -> Result<&Digest> {
        let found = usize::try_from(logical).ok().and_then(|i| self.index.digests.get(i));
        found.ok_or_else(|| Error::corrupt(self.label(), 0, format!("the disk has no chunk {logical}")))
    }

    /// Opens a chunk by its name.
    fn chunk(&self, digest: &Digest) -> Result<FileStorage> {
        let name = hexadecimal(digest);
        let name = format!("{}/{name}", name.get(..4).unwrap_or_default());
        let missing = || Error::ChainBroken {
            path: format!("{}/{name}", self.chunks.label()),
            what: format!("this chunk of {} is missing", self.label()),
        };
        self.chunks.find(&name)?.ok_or_else(missing)
    }
}

impl Layer for PbsLayer {
    fn label(&self) -> &str {
        self.index.file.label()
    }

    fn size(&self) -> u64 {
        self.index.size
    }

    fn grain(&self) -> u64 {
        self.index.chunk_bytes
    }

    crate::runs::layer_in_pieces!(index.file);

    /// The index names every byte of the disk by its digest.
    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = self.index.file.fingerprint("pbs", self.index.size);
        hash.update(&self.index.sum);
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        let digest = self.digest(block.logical)?;
        let chunk = self.chunk(digest)?;
        let stored = chunk.len().map_err(|e| Error::io(chunk.label(), "stat", 0, e))?;
        let damaged = |what: String| Error::BadBlock { path: chunk.label().into(), offset: 0, len: stored, what };
        let whole = usize::try_from(self.index.chunk_bytes).unwrap_or(usize::MAX);
        if stored == 0 {
            let what = format!("this chunk of {} is an empty file: the server keeps it elsewhere", self.label());
            return Err(Error::ChainBroken { path: chunk.label().into(), what });
        }
        if stored > blob::longest(whole) {
            return Err(damaged(format!("{stored} bytes for a chunk of {whole}")));
        }
        let place = usize::try_from(stored).unwrap_or(usize::MAX);
        let sealing = codec::with_stored(&chunk, 0, place, |bytes| {
            let needed = |what: &str| Error::Key { path: chunk.label().into(), what: what.into() };
            blob::decode(bytes, whole, self.key.as_deref(), out).map_err(|failure| match failure {
                Failure::Damaged(what) => damaged(what),
                Failure::Encrypted => needed("the snapshot is encrypted"),
                Failure::OtherKey => needed("the snapshot is encrypted with another key"),
            })
        })?;
        // The last chunk may be as short as the disk's end, or filled up.
        let left = self.index.size.saturating_sub(block.logical.saturating_mul(self.index.chunk_bytes));
        let due = usize::try_from(left).unwrap_or(usize::MAX).min(whole);
        let mut hash = Sha256::new_with_prefix(&out[..]);
        if let (Sealing::Sealed, Some(key)) = (sealing, &self.key) {
            hash.update(key.id_key());
        }
        let found: Digest = hash.finalize().into();
        if found != *digest || (out.len() != due && out.len() != whole) {
            let what = match found == *digest {
                true => format!("{} bytes, where {due} belong", out.len()),
                false => "its digest is not its name".to_owned(),
            };
            out.clear();
            return Err(damaged(what));
        }
        out.resize(whole, 0);
        Ok(())
    }
}
