//! Files of virtnbdbackup, read-only: fulls and increments of libvirt machines as one stream each, not compressed.
//!
//! ```text
//! meta 0000000000000000 LENGTH \r\n   JSON   \r\n        which disk, which checkpoint, on which one it stands
//! data START            LENGTH \r\n   bytes  \r\n        numbers are 16 hexadecimal digits
//! zero START            LENGTH \r\n
//! stop 0000000000000000 0000000000000000 \r\n
//! ```
//!
//! Invariants
//! - One pass over the 40 bytes before each piece tells where a disk's bytes are; no data is read for it.
//! - A file without its end is refused: its backup never ended. Pieces never overlap.
//! - What a full does not mention is zeros, what an increment does not mention is the point's below.
//!
//! Not here: compressed streams, which are refused by name; which file holds the point below
//! (`aquifer_vdisk::open`). Data has no checksum.

use std::sync::Arc;

use serde::Deserialize;

use crate::{BlockRef, Content, Error, FileSlot, Layer, Result, Storage, runs, tables::TableFile};

/// Bytes of a header.
const HEAD_BYTES: u64 = 40;
/// Longest description, in bytes.
const META_BYTES_MAX: u64 = 1 << 20;
/// Most pieces of a file: a GiB of memory would be three times as many.
const PIECES_MAX: usize = 1 << 24;
/// Stands for no place in the file.
const ZEROS: u64 = u64::MAX;

/// What a file says of itself.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Meta {
    virtual_size: u64,
    disk_name: String,
    #[serde(default)]
    checkpoint_name: Option<String>,
    /// `false`, or a name.
    #[serde(default)]
    parent_checkpoint: serde_json::Value,
    #[serde(default)]
    incremental: bool,
    /// `false`, `true`, or a level.
    #[serde(default)]
    compressed: serde_json::Value,
}

/// One piece: where on the disk, how long, where in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Piece {
    start: u64,
    len: u64,
    at: u64,
}

/// One file as a layer.
#[derive(Debug)]
pub struct VirtnbdLayer {
    file: TableFile,
    meta: Meta,
    /// By start; they do not overlap.
    pieces: Vec<Piece>,
}

/// A header: four letters and two numbers.
fn header(bytes: &[u8]) -> Option<([u8; 4], u64, u64)> {
    let kind = *bytes.first_chunk::<4>()?;
    let number = |at: usize| u64::from_str_radix(str::from_utf8(bytes.get(at..at + 16)?).ok()?, 16).ok();
    let is_framed = bytes.get(4) == Some(&b' ') && bytes.get(21) == Some(&b' ') && bytes.get(38..40) == Some(b"\r\n");
    is_framed.then_some((kind, number(5)?, number(22)?))
}

impl VirtnbdLayer {
    /// Reads the description and walks the headers. No other file is opened.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Truncated`], [`Error::Unsupported`] (compressed), [`Error::Io`].
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let (file, meta, start) = described(storage)?;
        let is_plain = matches!(meta.compressed, serde_json::Value::Null | serde_json::Value::Bool(false));
        if !is_plain {
            return Err(Error::unsupported(file.label(), "a compressed stream"));
        }
        let pieces = pieces(&file, start, meta.virtual_size)?;
        Ok(Self { file, meta, pieces })
    }

    /// The names of a file's disk and checkpoint, from its description alone.
    ///
    /// # Errors
    /// As [`VirtnbdLayer::open`].
    pub fn names(storage: Arc<dyn Storage>) -> Result<(String, Option<String>)> {
        let (_, meta, _) = described(storage)?;
        Ok((meta.disk_name, meta.checkpoint_name))
    }

    /// The disk's name.
    pub fn disk(&self) -> &str {
        &self.meta.disk_name
    }

    /// The checkpoint that this one stands on; `None` for a full one.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] for an increment that names none.
    pub fn below(&self) -> Result<Option<&str>> {
        match (&self.meta.parent_checkpoint, self.meta.incremental) {
            (serde_json::Value::String(name), true) => Ok(Some(name)),
            (_, false) => Ok(None),
            (_, true) => {
                let what = "an increment that does not say on which checkpoint it stands".into();
                Err(Error::ChainBroken { path: self.file.label().into(), what })
            }
        }
    }

    fn piece(&self, at: u64, end: u64) -> Result<(Content, u64)> {
        let unsaid = if self.meta.incremental { Content::Absent } else { Content::Zero };
        let next = self.pieces.partition_point(|piece| piece.start + piece.len <= at);
        Ok(match self.pieces.get(next) {
            Some(piece) if piece.start <= at => {
                let len = (piece.start + piece.len).min(end) - at;
                match piece.at {
                    ZEROS => (Content::Zero, len),
                    place => (Content::Plain { file: 0, offset: place + (at - piece.start) }, len),
                }
            }
            Some(piece) => (unsaid, piece.start.min(end) - at),
            None => (unsaid, end - at),
        })
    }
}

/// The file, its description, and where the first piece begins.
fn described(storage: Arc<dyn Storage>) -> Result<(TableFile, Meta, u64)> {
    let file = TableFile::open(storage)?;
    let bad = |what: String| Error::corrupt(file.label(), 0, format!("description: {what}"));
    let head = file.read(0, HEAD_BYTES, "the first header")?;
    let Some((_, _, len)) = header(&head).filter(|(kind, ..)| kind == b"meta") else {
        return Err(bad("the file does not begin with one".into()));
    };
    if len > META_BYTES_MAX {
        return Err(bad(format!("{len} bytes")));
    }
    let text = file.read(HEAD_BYTES, len + 2, "the description")?;
    let text = text.strip_suffix(b"\r\n").ok_or_else(|| bad("it does not end where it should".into()))?;
    let meta: Meta = serde_json::from_slice(text).map_err(|e| bad(e.to_string()))?;
    if meta.virtual_size == 0 || i64::try_from(meta.virtual_size).is_err() {
        return Err(bad(format!("a disk of {} bytes", meta.virtual_size)));
    }
    Ok((file, meta, HEAD_BYTES + len + 2))
}

fn pieces(file: &TableFile, start: u64, size: u64) -> Result<Vec<Piece>> {
    let (mut at, mut pieces) = (start, Vec::new());
    loop {
        let head = file.read(at, HEAD_BYTES, "a header, or the end of the backup,")?;
        let bad = |what: String| Error::corrupt(file.label(), at, what);
        let Some((kind, start, len)) = header(&head) else { return Err(bad("no header of a piece".into())) };
        let data = at + HEAD_BYTES;
        let (place, next) = match &kind {
            b"stop" => break,
            b"zero" => (ZEROS, data),
            b"data" => {
                file.check_inside(data, len.saturating_add(2), "a piece")?;
                (data, data + len + 2)
            }
            _ => return Err(bad(format!("a piece of kind {:?}", String::from_utf8_lossy(&kind)))),
        };
        if start.checked_add(len).is_none_or(|end| end > size) {
            return Err(bad(format!("the piece {start}+{len} leaves the disk of {size} bytes")));
        }
        if pieces.len() == PIECES_MAX {
            return Err(Error::unsupported(file.label(), format!("more than {PIECES_MAX} pieces")));
        }
        if len > 0 {
            pieces.push(Piece { start, len, at: place });
        }
        at = next;
    }
    pieces.sort_unstable();
    let over = pieces.windows(2).find(|pair| matches!(pair, [a, b] if a.start + a.len > b.start));
    if let Some([first, ..]) = over {
        return Err(Error::corrupt(file.label(), 0, format!("two pieces lie over each other at {}", first.start)));
    }
    Ok(pieces)
}

impl Layer for VirtnbdLayer {
    fn label(&self) -> &str {
        self.file.label()
    }

    fn size(&self) -> u64 {
        self.meta.virtual_size
    }

    fn grain(&self) -> u64 {
        4096
    }

    fn lookup(&self, offset: u64, len_max: u64) -> Result<(Content, u64)> {
        runs::lookup(self.label(), self.size(), offset, len_max, |at, end| self.piece(at, end))
    }

    fn scan(&self, offset: u64, len: u64, each: &mut dyn FnMut(u64, u64, Content)) -> Result<()> {
        runs::scan(self.size(), offset, len, each, |at, end| self.piece(at, end))
    }

    fn file(&self, slot: FileSlot) -> Result<&Arc<dyn Storage>> {
        self.file.only(slot)
    }

    fn file_id(&self, _slot: FileSlot) -> u64 {
        self.file.id
    }

    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = self.file.fingerprint("virtnbdbackup", self.size());
        hash.update(self.meta.checkpoint_name.as_deref().unwrap_or_default().as_bytes());
        for piece in &self.pieces {
            hash.update(&piece.start.to_le_bytes()).update(&piece.len.to_le_bytes()).update(&piece.at.to_le_bytes());
        }
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        Err(Error::corrupt(self.label(), block.offset, "a stream that is not compressed has no packed blocks"))
    }
}

#[cfg(test)]
mod tests;
