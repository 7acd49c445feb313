//! Files of virtnbdbackup, read-only: fulls and increments of libvirt machines as one stream each, plain or in LZ4.
//!
//! ```text
//! meta 0000000000000000 LENGTH \r\n   JSON   \r\n        which disk, which checkpoint, on which one it stands
//! data START            LENGTH \r\n   bytes  \r\n        numbers are 16 hexadecimal digits
//! zero START            LENGTH \r\n
//! stop 0000000000000000 0000000000000000 \r\n
//! [4711, {"67108864": [815, 99]}] \r\n          only where compressed: stored lengths of the data, a number for each frame
//! comp 0000000000000000 LENGTH \r\n           of that list; the end of the file
//! ```
//!
//! Invariants
//! - One pass over the 40 bytes before each piece tells where a disk's bytes are; no data is read for it.
//! - A file without its end is refused: its backup never ended. Pieces never overlap.
//! - A frame of LZ4 is decoded whole, and its checksums are checked; one of more than 64 MiB is refused.
//! - What a full does not mention is zeros, what an increment does not mention is the point's below.
//!
//! Not here: which file holds the point below (`aquifer_vdisk::open`). Plain data has no checksum.

use std::sync::Arc;

use jiff::{SignedDuration, civil::DateTime};
use serde::Deserialize;

use crate::{BlockRef, Codec, Content, Error, Layer, Result, Storage, lz4_frame, tables::TableFile};

/// Bytes of a header.
const HEAD_BYTES: u64 = 40;
/// Longest description, in bytes.
const META_BYTES_MAX: u64 = 1 << 20;
/// Most pieces of a file: a GiB of memory would be three times as many.
const PIECES_MAX: usize = 1 << 24;
/// Longest list of stored lengths, in bytes.
const LENGTHS_BYTES_MAX: u64 = 16 << 20;
/// Most bytes of one compressed frame, decoded.
const FRAME_BYTES_MAX: u64 = 64 << 20;
/// No two local clocks are further apart, whatever their time zones and seasons.
const CLOCKS_APART: SignedDuration = SignedDuration::from_hours(26);
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
    /// When it was begun, by the local clock: `2026-11-21T10:00:00.123456`.
    #[serde(default)]
    date: Option<String>,
    /// `false`, or a name.
    #[serde(default)]
    parent_checkpoint: serde_json::Value,
    /// Nothing stands in for it: where it were lost, what an increment leaves out would be zeros.
    incremental: bool,
    /// `false`, `true`, or a level.
    #[serde(default)]
    compressed: serde_json::Value,
    #[serde(default)]
    compression_method: Option<String>,
}

impl Meta {
    fn began(&self) -> Option<DateTime> {
        self.date.as_deref()?.parse().ok()
    }
}

/// Whether a file holds what an increment stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Another disk, or another checkpoint.
    No,
    /// It does, as far as the file tells.
    Yes,
    /// It bears the name, and was begun later than a clock that was set back explains: it may be of a later chain. Clocks can
    /// be wrong by more than that, so this only decides between several.
    Younger,
}

/// One piece: where on the disk, how long, where in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Piece {
    start: u64,
    len: u64,
    at: u64,
    /// Bytes there where they are compressed; else 0.
    stored: u32,
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
        let lengths = if is_plain {
            None
        } else {
            let method = meta.compression_method.as_deref().unwrap_or("lz4");
            if method != "lz4" {
                return Err(Error::unsupported(file.label(), format!("a stream compressed by {method:?}")));
            }
            Some(lengths(&file)?)
        };
        let pieces = pieces(&file, start, meta.virtual_size, lengths.as_ref())?;
        Ok(Self { file, meta, pieces })
    }

    /// Whether a file, by its description alone, holds the checkpoint that this increment stands on. A differential one
    /// bears the name of a checkpoint that it does not make: its own name tells it, and it is for the caller to leave out.
    ///
    /// # Errors
    /// As [`VirtnbdLayer::open`].
    pub fn stands_on(&self, storage: Arc<dyn Storage>) -> Result<Fit> {
        let (_, other, _) = described(storage)?;
        let is_meant = other.checkpoint_name.as_deref().is_some_and(|name| self.below().ok().flatten() == Some(name));
        Ok(match (other.began(), self.meta.began()) {
            _ if !is_meant || other.disk_name != self.meta.disk_name => Fit::No,
            (Some(other), Some(own)) if other.duration_since(own) > CLOCKS_APART => Fit::Younger,
            _ => Fit::Yes,
        })
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
                    _ if piece.stored > 0 => (piece.packed(at), len),
                    place => (Content::Plain { file: 0, offset: place + (at - piece.start) }, len),
                }
            }
            Some(piece) => (unsaid, piece.start.min(end) - at),
            None => (unsaid, end - at),
        })
    }
}

impl Piece {
    /// The piece from the byte `at` of the disk on, as a packed block.
    fn packed(&self, at: u64) -> Content {
        let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        let block = BlockRef {
            offset: self.at,
            logical: self.start,
            stored_len: self.stored,
            raw_len: narrow(self.len),
            check: 0,
            file: 0,
            codec: Codec::Lz4,
        };
        Content::Packed { block, skip: narrow(at - self.start) }
    }
}

/// Stored lengths of the frames of a piece of data: one frame, or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stored {
    One(u32),
    Several(std::collections::BTreeMap<String, Vec<u32>>),
}

/// The list of stored lengths, and where it begins.
fn lengths(file: &TableFile) -> Result<(Vec<Stored>, u64)> {
    let at = file.len.saturating_sub(HEAD_BYTES);
    let bad = |what: String| Error::corrupt(file.label(), at, format!("list of stored lengths: {what}"));
    let head = file.read(at, HEAD_BYTES, "the end of a compressed backup,")?;
    let Some((_, _, len)) = header(&head).filter(|(kind, ..)| kind == b"comp") else {
        return Err(bad("the file does not end with one: its backup never ended".into()));
    };
    if len > LENGTHS_BYTES_MAX {
        return Err(bad(format!("{len} bytes")));
    }
    let start = at.checked_sub(len + 2).ok_or_else(|| bad(format!("{len} bytes do not fit the file")))?;
    let text = file.read(start, len, "the list of stored lengths")?;
    let list: Vec<Stored> = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    Ok((list, start))
}

/// The frames of one piece of data at `data`; answers where they end.
fn frames(file: &TableFile, stored: &Stored, piece: Piece, pieces: &mut Vec<Piece>) -> Result<u64> {
    let bad = |at: u64, what: String| Error::corrupt(file.label(), at, what);
    let several: Vec<u32> = match stored {
        Stored::One(stored) => vec![*stored],
        Stored::Several(lists) => lists.values().flatten().copied().collect(),
    };
    let (mut at, mut start, end) = (piece.at, piece.start, piece.start + piece.len);
    for stored in &several {
        file.check_inside(at, u64::from(*stored), "a compressed piece")?;
        let len = match several.as_slice() {
            [_] => piece.len,
            _ => {
                let head = file.read(at, lz4_frame::HEAD_BYTES_MAX.min(file.len - at), "a frame's header")?;
                let content = lz4_frame::Head::take(&mut head.as_slice()).map_err(|what| bad(at, what))?.content;
                content.ok_or_else(|| bad(at, "one of several frames does not say how long it is".into()))?
            }
        };
        if len > FRAME_BYTES_MAX {
            return Err(Error::unsupported(file.label(), format!("a compressed frame of {len} bytes")));
        }
        if *stored == 0 || len == 0 || start.saturating_add(len) > end || pieces.len() == PIECES_MAX {
            return Err(bad(at, format!("a compressed frame of {stored} bytes for {len} at {start}")));
        }
        pieces.push(Piece { start, len, at, stored: *stored });
        at += u64::from(*stored);
        start += len;
    }
    if start != end {
        return Err(bad(at, format!("the frames of {}+{} hold {}", piece.start, piece.len, start - piece.start)));
    }
    Ok(at)
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

fn pieces(file: &TableFile, start: u64, size: u64, packed: Option<&(Vec<Stored>, u64)>) -> Result<Vec<Piece>> {
    let (mut at, mut pieces) = (start, Vec::new());
    let mut lengths = packed.map(|(list, _)| list.iter());
    loop {
        let head = file.read(at, HEAD_BYTES, "a header, or the end of the backup,")?;
        let bad = |what: String| Error::corrupt(file.label(), at, what);
        let Some((kind, start, len)) = header(&head) else { return Err(bad("no header of a piece".into())) };
        let data = at + HEAD_BYTES;
        if start.checked_add(len).is_none_or(|end| end > size) {
            return Err(bad(format!("the piece {start}+{len} leaves the disk of {size} bytes")));
        }
        if let (b"data", Some(lengths)) = (&kind, &mut lengths) {
            let stored = lengths.next().ok_or_else(|| bad("data without a stored length".into()))?;
            at = frames(file, stored, Piece { start, len, at: data, stored: 0 }, &mut pieces)?.saturating_add(2);
            continue;
        }
        let (place, next) = match &kind {
            b"stop" if packed.is_some_and(|(_, list)| *list != data) => {
                return Err(bad("the list of stored lengths does not follow the last piece".into()));
            }
            b"stop" => break,
            b"zero" => (ZEROS, data),
            b"data" => {
                file.check_inside(data, len.saturating_add(2), "a piece")?;
                (data, data + len + 2)
            }
            _ => return Err(bad(format!("a piece of kind {:?}", String::from_utf8_lossy(&kind)))),
        };
        if pieces.len() == PIECES_MAX {
            return Err(Error::unsupported(file.label(), format!("more than {PIECES_MAX} pieces")));
        }
        if len > 0 {
            pieces.push(Piece { start, len, at: place, stored: 0 });
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

    crate::runs::layer_in_pieces!(file);

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
        let bytes = self.file.read(block.offset, block.stored_len.into(), "a compressed piece")?;
        let len = usize::try_from(block.raw_len).unwrap_or(usize::MAX);
        lz4_frame::decode(&bytes, len, out).map_err(|what| {
            out.clear();
            Error::BadBlock { path: self.label().into(), offset: block.offset, len: block.stored_len.into(), what }
        })
    }
}

#[cfg(test)]
mod tests;
