//! The block store: where each block's bytes lie, how they are encoded, what their MD5 is.

use md5::{Digest as _, Md5};

use super::{
    pages::{Pages, Vector},
    slot::{u32_at, u64_at},
};
use crate::{
    Codec, Error, Result,
    codec::{self, Tail},
};

/// A block's MD5: against accidents, not against people.
pub(super) type Digest = [u8; 16];

/// Says of LZ4 that it is ours.
const LZ4_MAGIC: u32 = 0xf800_000f;
const LZ4_HEAD: usize = 12;

/// How a block is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Plain,
    Zlib,
    Lz4,
    Zstd,
}

impl Encoding {
    /// What a reference to a block says of it.
    pub(super) fn codec(self) -> Codec {
        match self {
            Self::Plain => Codec::Raw,
            Self::Zlib => Codec::Deflate,
            Self::Lz4 => Codec::Lz4,
            Self::Zstd => Codec::Zstd,
        }
    }
}

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) offset: u64,
    /// Bytes set aside for it.
    pub(super) room: u32,
    pub(super) stored_len: u32,
    pub(super) raw_len: u32,
    pub(super) digest: Digest,
    pub(super) encoding: Encoding,
}

/// The store of a file.
#[derive(Debug)]
pub(super) struct Store {
    entries: Vector,
}

impl Store {
    pub(super) fn open(pages: &Pages, (root, count): (u64, u64)) -> Result<Self> {
        // Every version that is read has ids of keys behind its entries.
        Ok(Self { entries: Vector::open(pages, root, 60, count)? })
    }

    /// The block `id`, which must be in use and lie in the file.
    pub(super) fn block(&self, pages: &Pages, id: u64) -> Result<Stored> {
        self.entries.with(pages, id, |at, bytes| entry(pages, at, bytes))?
    }
}

fn entry(pages: &Pages, at: u64, bytes: &[u8]) -> Result<Stored> {
    let path = pages.file.label();
    let bad = |what: &str| Error::corrupt(path, at, format!("entry of the block store: {what}"));
    if u32_at(bytes, 1) == 0 {
        return Err(bad("nothing uses it, and yet a list names it"));
    }
    if bytes.get(44..60).is_none_or(|key| key.iter().any(|byte| *byte != 0)) {
        return Err(Error::Key { path: path.into(), what: "the backup's blocks are encrypted".into() });
    }
    let encoding = match bytes.get(34).copied().unwrap_or_default() {
        0xff => Encoding::Plain,
        3 | 4 => Encoding::Zlib,
        7 => Encoding::Lz4,
        8 | 9 => Encoding::Zstd,
        2 => return Err(Error::unsupported(path, "blocks encoded by run lengths")),
        other => return Err(Error::unsupported(path, format!("blocks in encoding {other}"))),
    };
    let stored = Stored {
        offset: u64_at(bytes, 5),
        room: u32_at(bytes, 13),
        stored_len: u32_at(bytes, 36),
        raw_len: u32_at(bytes, 40),
        digest: bytes.get(18..34).and_then(|b| b.first_chunk()).copied().unwrap_or_default(),
        encoding,
    };
    if stored.stored_len > stored.room {
        return Err(bad("more bytes than its room has"));
    }
    if stored.stored_len as usize > codec::STORED_BYTES_MAX {
        return Err(Error::unsupported(path, format!("a block stored in {} bytes", stored.stored_len)));
    }
    pages.file.check_inside(stored.offset, stored.stored_len.into(), "a block")?;
    Ok(stored)
}

impl Stored {
    /// Reads the block into `out` (cleared first), whole, and checks it.
    pub(super) fn read(&self, pages: &Pages, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        let damaged = |what: String| Error::BadBlock {
            path: pages.file.label().into(),
            offset: self.offset,
            len: self.stored_len.into(),
            what,
        };
        let (len, raw_len) = (self.stored_len as usize, self.raw_len as usize);
        codec::with_stored(&*pages.file.storage, self.offset, len, |bytes| {
            self.decode(bytes, raw_len, out).map_err(damaged)
        })?;
        let found: Digest = Md5::digest(&out[..]).into();
        if found != self.digest || out.len() != raw_len {
            out.clear();
            return Err(damaged("its MD5 is wrong".into()));
        }
        Ok(())
    }

    fn decode(&self, bytes: &[u8], raw_len: usize, out: &mut Vec<u8>) -> Result<(), String> {
        let decoded = |codec, stored, out: &mut Vec<u8>| {
            codec::decode(codec, stored, raw_len, raw_len, Tail::Exact, out).map_err(|e| e.to_string())
        };
        match self.encoding {
            Encoding::Plain => decoded(Codec::Raw, bytes, out),
            Encoding::Zstd => decoded(Codec::Zstd, bytes, out),
            Encoding::Zlib => match codec::zlib(bytes, raw_len, out).map_err(|e| e.to_string()) {
                Ok(()) if out.len() != raw_len => {
                    let what = format!("decodes to {} of {raw_len} bytes", out.len());
                    out.clear();
                    Err(what)
                }
                done => done,
            },
            Encoding::Lz4 => {
                let (head, body) = bytes.split_at_checked(LZ4_HEAD).ok_or("shorter than the header of LZ4")?;
                if (u32_at(head, 0), u32_at(head, 8)) != (LZ4_MAGIC, self.raw_len) {
                    return Err("its header of LZ4 is wrong".into());
                }
                decoded(Codec::Lz4, body, out)?;
                if crc32c::crc32c(out) == u32_at(head, 4) {
                    return Ok(());
                }
                out.clear();
                Err("its CRC is wrong".into())
            }
        }
    }
}
