//! The superblock, the seal, and the validated facts in them.
//!
//! Invariants
//! - Only [`Identity`] and [`SealInfo`], whose fields have been checked against each other and against the
//!   file's length, leave this module; raw pages do not.
//! - Either copy of the seal is enough, and the superblock is not needed to read.

use uuid::Uuid;
use zerocopy::{
    FromZeros, IntoBytes,
    little_endian::{U16, U32, U64},
};

use super::{
    block::codec_from,
    layout::{
        BLOCK_LOG2_MAX, BLOCK_LOG2_MIN, FRAMES_START, HASHED_BYTES, HEAD_BYTES, Head, INCOMPAT_ENCRYPTED,
        INCOMPAT_FOREIGN, INCOMPAT_KNOWN, LEAF_ENTRIES, LEAVES_MAX, MAGIC, PAGE_BYTES, PAGE_LEN, ROOT_BYTES_MAX,
        SEAL_MAGIC, SLOTS_MAX, SealPage, Superblock, VERSION_MAJOR, VERSION_MINOR,
    },
};
use crate::{Codec, Error, Result, Storage};

/// What a writer counted. Blocks are given to it; each is exactly one of zero, unchanged, shared, written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Blocks given to the writer.
    pub blocks_given: u64,
    /// Of these, all zeros.
    pub blocks_zero: u64,
    /// Of these, equal to the parent's block (or to what this file already had there).
    pub blocks_unchanged: u64,
    /// Of these, already stored somewhere in the chain.
    pub blocks_shared: u64,
    /// Of these, written to this file.
    pub blocks_written: u64,
    /// Blocks taken over from older files, so that those are no longer needed.
    pub blocks_moved: u64,
    /// Decoded bytes written to this file.
    pub bytes_raw: u64,
    /// Stored bytes of those, headers included.
    pub bytes_stored: u64,
    /// Blocks of the whole disk that hold data, in this file or an older one.
    pub data_blocks: u64,
}

/// A finished file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The layer's id.
    pub layer: Uuid,
    /// The seal hash: names exactly these contents.
    pub seal: [u8; 32],
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// What was counted.
    pub stats: Stats,
}

/// Who a layer is. Checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) layer: Uuid,
    pub(crate) chain: Uuid,
    /// Layer and seal hash of the parent.
    pub(crate) parent: Option<(Uuid, [u8; 32])>,
    pub(crate) virtual_size: u64,
    pub(crate) tag: u64,
    pub(crate) created: u64,
    pub(crate) slot: u16,
    pub(crate) block_log2: u8,
    pub(crate) sector_log2: u8,
    pub(crate) codec: Codec,
    pub(crate) id_domain: [u8; 16],
    /// Blocks may lie in files of another product.
    pub(crate) linked: bool,
}

impl Identity {
    pub(crate) fn block_bytes(&self) -> u32 {
        1 << self.block_log2
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.virtual_size.div_ceil(u64::from(self.block_bytes()))
    }

    pub(crate) fn leaves(&self) -> u64 {
        self.blocks().div_ceil(LEAF_ENTRIES as u64)
    }

    pub(crate) fn head(&self) -> Head {
        let (parent, parent_seal) = self.parent.unwrap_or_default();
        Head {
            magic: MAGIC,
            major: U16::new(VERSION_MAJOR),
            minor: U16::new(VERSION_MINOR),
            head_bytes: U32::new(HEAD_BYTES),
            incompat: U64::new(if self.linked { INCOMPAT_FOREIGN } else { 0 }),
            ro_compat: U64::ZERO,
            compat: U64::ZERO,
            layer: self.layer.into_bytes(),
            chain: self.chain.into_bytes(),
            parent: parent.into_bytes(),
            parent_seal,
            virtual_size: U64::new(self.virtual_size),
            tag: U64::new(self.tag),
            created: U64::new(self.created),
            slot: U16::new(self.slot),
            kind: if self.parent.is_some() { 2 } else { 1 },
            block_log2: self.block_log2,
            sector_log2: self.sector_log2,
            codec: self.codec as u8,
            reserved: [0; 2],
            id_domain: self.id_domain,
            reserved_2: [0; 88],
        }
    }

    fn parse(path: &str, at: u64, head: &Head) -> Result<Self> {
        if head.magic != MAGIC {
            return Err(Error::corrupt(path, at, "not a native layer: the magic number is missing"));
        }
        if head.major.get() != VERSION_MAJOR {
            let what = format!("native layer of version {}.{}", head.major.get(), head.minor.get());
            return Err(Error::unsupported(path, what));
        }
        refuse_features(path, head.incompat.get() & !INCOMPAT_KNOWN)?;
        let odd = |what: String| Error::corrupt(path, at, what);
        let parent = match (head.kind, head.parent == [0; 16]) {
            (1, true) => None,
            (2, false) => Some((Uuid::from_bytes(head.parent), head.parent_seal)),
            (kind, _) => return Err(odd(format!("layer kind {kind} does not fit its parent"))),
        };
        let codec = codec_from(head.codec).ok_or_else(|| odd(format!("codec {}", head.codec)))?;
        let identity = Self {
            layer: Uuid::from_bytes(head.layer),
            chain: Uuid::from_bytes(head.chain),
            parent,
            virtual_size: head.virtual_size.get(),
            tag: head.tag.get(),
            created: head.created.get(),
            slot: head.slot.get(),
            block_log2: head.block_log2,
            sector_log2: head.sector_log2,
            codec,
            id_domain: head.id_domain,
            linked: head.incompat.get() & INCOMPAT_FOREIGN != 0,
        };
        identity.check(path)?;
        Ok(identity)
    }

    /// The limits a writer and a reader share.
    pub(crate) fn check(&self, path: &str) -> Result<()> {
        if !(BLOCK_LOG2_MIN..=BLOCK_LOG2_MAX).contains(&self.block_log2) {
            return Err(Error::unsupported(path, format!("blocks of 2^{} bytes", self.block_log2)));
        }
        if self.sector_log2 != 9 && self.sector_log2 != 12 {
            return Err(Error::unsupported(path, format!("sectors of 2^{} bytes", self.sector_log2)));
        }
        if self.virtual_size == 0 || self.virtual_size > 1 << 62 || self.leaves() > LEAVES_MAX {
            let what = format!("a disk of {} bytes with blocks of {} bytes", self.virtual_size, self.block_bytes());
            return Err(Error::unsupported(path, what));
        }
        if self.slot >= SLOTS_MAX || (self.parent.is_none() && self.slot != 0) {
            return Err(Error::unsupported(path, format!("number {} in its lineage", self.slot)));
        }
        Ok(())
    }
}

fn refuse_features(path: &str, unknown: u64) -> Result<()> {
    let mut names = Vec::new();
    if unknown & INCOMPAT_ENCRYPTED != 0 {
        names.push("encryption".to_owned());
    }
    let rest = unknown & !INCOMPAT_ENCRYPTED;
    if rest != 0 {
        names.push(format!("features {rest:#x}"));
    }
    if names.is_empty() { Ok(()) } else { Err(Error::unsupported(path, names.join(", "))) }
}

/// Page 0 of a new file.
pub(crate) fn superblock(identity: &Identity) -> [u8; PAGE_LEN] {
    let mut page = Superblock::new_zeroed();
    page.head = identity.head();
    page.hash = hash_of(page.as_bytes());
    zerocopy::transmute!(page)
}

/// Reads page 0. Needed only where there is no seal.
pub(crate) fn read_superblock(storage: &dyn Storage) -> Result<Identity> {
    let path = storage.label();
    let mut page = [0; PAGE_LEN];
    read_page(storage, 0, &mut page)?;
    let block: Superblock = zerocopy::transmute!(page);
    if block.head.magic != MAGIC {
        return Err(Error::corrupt(path, 0, "not a native layer: the magic number is missing"));
    }
    if hash_of(&page) != block.hash {
        return Err(Error::corrupt(path, 0, "superblock does not match its hash"));
    }
    Identity::parse(path, 0, &block.head)
}

fn read_page(storage: &dyn Storage, offset: u64, page: &mut [u8]) -> Result<()> {
    let need = offset.saturating_add(page.len() as u64);
    let len = storage.len().map_err(|e| Error::io(storage.label(), "stat", 0, e))?;
    if len < need {
        return Err(Error::Truncated { path: storage.label().into(), len, need, what: "a native layer".into() });
    }
    storage.read_at(offset, page).map_err(|e| Error::io(storage.label(), "read", offset, e))
}

fn hash_of(page: &[u8]) -> [u8; 32] {
    *blake3::hash(page.get(..HASHED_BYTES).unwrap_or_default()).as_bytes()
}

/// All a seal says. Checked.
#[derive(Clone, Debug)]
pub(crate) struct SealInfo {
    pub(crate) identity: Identity,
    pub(crate) hash: [u8; 32],
    pub(crate) file_bytes: u64,
    pub(crate) data_end: u64,
    pub(crate) sequence: u64,
    pub(crate) root_codec: Codec,
    pub(crate) root_a: u64,
    pub(crate) root_b: u64,
    pub(crate) root_stored: u32,
    pub(crate) root_raw: u32,
    pub(crate) root_hash: [u8; 32],
    pub(crate) waymark: u64,
    pub(crate) stats: Stats,
}

impl SealInfo {
    /// The two pages for the end of the file, and their common hash.
    pub(crate) fn pages(&self) -> (Vec<u8>, [u8; 32]) {
        let mut page = SealPage::new_zeroed();
        page.magic = SEAL_MAGIC;
        page.root_codec = self.root_codec as u8;
        page.file_bytes = U64::new(self.file_bytes);
        page.data_end = U64::new(self.data_end);
        page.sequence = U64::new(self.sequence);
        page.root_a = U64::new(self.root_a);
        page.root_b = U64::new(self.root_b);
        page.root_stored = U32::new(self.root_stored);
        page.root_raw = U32::new(self.root_raw);
        page.root_hash = self.root_hash;
        page.waymark = U64::new(self.waymark);
        page.blocks_given = U64::new(self.stats.blocks_given);
        page.blocks_zero = U64::new(self.stats.blocks_zero);
        page.blocks_unchanged = U64::new(self.stats.blocks_unchanged);
        page.blocks_shared = U64::new(self.stats.blocks_shared);
        page.blocks_written = U64::new(self.stats.blocks_written);
        page.blocks_moved = U64::new(self.stats.blocks_moved);
        page.bytes_raw = U64::new(self.stats.bytes_raw);
        page.bytes_stored = U64::new(self.stats.bytes_stored);
        page.data_blocks = U64::new(self.stats.data_blocks);
        page.head = self.identity.head();
        page.hash = hash_of(page.as_bytes());
        let hash = page.hash;
        let mut both = page.as_bytes().to_vec();
        page.copy = U32::new(1);
        both.extend_from_slice(page.as_bytes());
        (both, hash)
    }

    fn parse(path: &str, at: u64, file_bytes: u64, copy: u32, bytes: [u8; PAGE_LEN]) -> Result<Self> {
        let page: SealPage = zerocopy::transmute!(bytes);
        let odd = |what: String| Error::corrupt(path, at, what);
        if page.magic != SEAL_MAGIC {
            return Err(odd("no seal: the file was never finished, or its end is cut off".into()));
        }
        let mut plain = page;
        plain.copy = U32::ZERO;
        if hash_of(plain.as_bytes()) != page.hash || page.copy.get() != copy {
            return Err(odd(format!("seal copy {copy} does not match its hash")));
        }
        if page.file_bytes.get() != file_bytes {
            return Err(odd(format!("the seal is for {} bytes, the file has {file_bytes}", page.file_bytes.get())));
        }
        let root_codec = codec_from(page.root_codec).ok_or_else(|| odd(format!("root codec {}", page.root_codec)))?;
        let info = Self {
            identity: Identity::parse(path, at, &page.head)?,
            hash: page.hash,
            file_bytes,
            data_end: page.data_end.get(),
            sequence: page.sequence.get(),
            root_codec,
            root_a: page.root_a.get(),
            root_b: page.root_b.get(),
            root_stored: page.root_stored.get(),
            root_raw: page.root_raw.get(),
            root_hash: page.root_hash,
            waymark: page.waymark.get(),
            stats: Stats {
                blocks_given: page.blocks_given.get(),
                blocks_zero: page.blocks_zero.get(),
                blocks_unchanged: page.blocks_unchanged.get(),
                blocks_shared: page.blocks_shared.get(),
                blocks_written: page.blocks_written.get(),
                blocks_moved: page.blocks_moved.get(),
                bytes_raw: page.bytes_raw.get(),
                bytes_stored: page.bytes_stored.get(),
                data_blocks: page.data_blocks.get(),
            },
        };
        info.check().map_err(odd)?;
        Ok(info)
    }

    fn check(&self) -> Result<(), String> {
        if self.root_raw > ROOT_BYTES_MAX || self.root_stored > ROOT_BYTES_MAX {
            return Err(format!("a root of {} bytes stored for {}", self.root_stored, self.root_raw));
        }
        if self.data_end < FRAMES_START || self.data_end > self.file_bytes.saturating_sub(2 * PAGE_BYTES) {
            return Err(format!("frames end at {} in a file of {} bytes", self.data_end, self.file_bytes));
        }
        for root in [self.root_a, self.root_b] {
            let end = root.checked_add(u64::from(self.root_stored));
            if root < FRAMES_START || end.is_none_or(|end| end > self.data_end) {
                return Err(format!("root at {root} lies outside the frames"));
            }
        }
        Ok(())
    }
}

/// Reads the seal: the first copy that is whole. With neither, the error of the second.
pub(crate) fn read_seal(storage: &dyn Storage) -> Result<SealInfo> {
    read_seal_copy(storage, 0).or_else(|_| read_seal_copy(storage, 1))
}

/// Reads one copy of the seal.
pub(crate) fn read_seal_copy(storage: &dyn Storage, copy: u32) -> Result<SealInfo> {
    let path = storage.label();
    let len = storage.len().map_err(|e| Error::io(path, "stat", 0, e))?;
    let need = FRAMES_START + 2 * PAGE_BYTES;
    if len < need {
        return Err(Error::Truncated { path: path.into(), len, need, what: "a native layer".into() });
    }
    let at = len - 2 * PAGE_BYTES + u64::from(copy) * PAGE_BYTES;
    let mut page = [0; PAGE_LEN];
    storage.read_at(at, &mut page).map_err(|e| Error::io(path, "read", at, e))?;
    SealInfo::parse(path, at, len, copy, page)
}

/// Whether a file, finished or not, was begun by [`super::Writer::link`].
///
/// # Errors
/// I/O.
pub fn is_link(storage: &dyn Storage) -> Result<bool> {
    match read_superblock(storage) {
        Ok(identity) => Ok(identity.linked && identity.parent.is_none()),
        Err(error @ Error::Io { .. }) => Err(error),
        Err(_) => Ok(false),
    }
}

/// Whether a file ends in a valid seal. Anything else that can be read is "no".
///
/// # Errors
/// I/O only.
pub fn is_sealed(storage: &dyn Storage) -> Result<bool> {
    match read_seal(storage) {
        Ok(_) => Ok(true),
        Err(e @ Error::Io { .. }) => Err(e),
        Err(_) => Ok(false),
    }
}
