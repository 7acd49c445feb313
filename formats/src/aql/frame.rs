//! Frames: a header of 64 bytes and a payload.
//!
//! Invariants
//! - `check` covers the payload and then the header's first 56 bytes, so it fails for damaged bytes and
//!   for a whole frame that stands in the wrong place.
//! - `header_check` lets a scan trust a header without reading the payload; only a payload whose `check`
//!   holds counts as salvaged.

use zerocopy::{
    FromBytes, IntoBytes,
    little_endian::{U16, U32, U64},
};

use super::{
    block::codec_from,
    key::ContentId,
    layout::{FRAME_HEADER_BYTES, FRAME_IDENTITY_BYTES, FRAME_MAGIC, FrameHeader},
};
use crate::{
    Codec, Error, Result, Storage,
    codec::with_stored,
    planted::{Bug, planted},
};

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum FrameKind {
    Block = 1,
    Map = 2,
    Ids = 3,
    Waymark = 4,
    Root = 5,
}

impl FrameKind {
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        [Self::Block, Self::Map, Self::Ids, Self::Waymark, Self::Root].into_iter().find(|k| *k as u8 == number)
    }
}

/// What a frame says about itself, apart from its checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameInfo {
    pub(crate) kind: FrameKind,
    pub(crate) codec: Codec,
    pub(crate) logical: u64,
    pub(crate) raw_bytes: u32,
    pub(crate) stored_bytes: u32,
    pub(crate) sequence: u64,
    pub(crate) tag: u64,
    pub(crate) id: ContentId,
}

impl FrameInfo {
    /// The header, given the CRC-32C of the stored payload. The second value is `check`, for the pointer.
    pub(crate) fn header(&self, payload_crc: u32) -> ([u8; FRAME_HEADER_BYTES], u32) {
        let mut header = FrameHeader {
            magic: FRAME_MAGIC,
            kind: self.kind as u8,
            codec: self.codec as u8,
            flags: U16::ZERO,
            logical: U64::new(self.logical),
            raw_bytes: U32::new(self.raw_bytes),
            stored_bytes: U32::new(self.stored_bytes),
            sequence: U64::new(self.sequence),
            tag: U64::new(self.tag),
            id: self.id,
            check: U32::ZERO,
            header_check: U32::ZERO,
        };
        let check = crc32c::crc32c_append(payload_crc, identity(header.as_bytes()));
        header.check = U32::new(check);
        header.header_check = U32::new(crc32c::crc32c(guarded(header.as_bytes())));
        let mut bytes = [0; FRAME_HEADER_BYTES];
        bytes.copy_from_slice(header.as_bytes());
        (bytes, check)
    }

    /// Appends header and payload to `out` and returns `check`.
    pub(crate) fn append(&self, payload: &[u8], out: &mut Vec<u8>) -> u32 {
        let (header, check) = self.header(crc32c::crc32c(payload));
        out.extend_from_slice(&header);
        out.extend_from_slice(payload);
        check
    }

    /// Bytes of the whole frame.
    pub(crate) fn frame_bytes(&self) -> u64 {
        FRAME_HEADER_BYTES as u64 + u64::from(self.stored_bytes)
    }
}

fn identity(header: &[u8]) -> &[u8] {
    header.get(..FRAME_IDENTITY_BYTES).unwrap_or_default()
}

fn guarded(header: &[u8]) -> &[u8] {
    header.get(..FRAME_HEADER_BYTES - 4).unwrap_or_default()
}

/// Reads a header on its own word: magic, kind, codec and `header_check` hold. Returns `check` with it.
pub(crate) fn parse_header(bytes: &[u8]) -> Result<(FrameInfo, u32), String> {
    let (header, _) = FrameHeader::read_from_prefix(bytes).map_err(|_| "frame header cut short".to_owned())?;
    if header.magic != FRAME_MAGIC {
        return Err("identity: no frame begins here".into());
    }
    if crc32c::crc32c(guarded(bytes)) != header.header_check.get() {
        return Err("checksum of the frame header".into());
    }
    let kind = FrameKind::from_number(header.kind).ok_or_else(|| format!("frame kind {}", header.kind))?;
    let codec = codec_from(header.codec).ok_or_else(|| format!("frame codec {}", header.codec))?;
    let info = FrameInfo {
        kind,
        codec,
        logical: header.logical.get(),
        raw_bytes: header.raw_bytes.get(),
        stored_bytes: header.stored_bytes.get(),
        sequence: header.sequence.get(),
        tag: header.tag.get(),
        id: header.id,
    };
    Ok((info, header.check.get()))
}

/// The payload of a whole frame, if it has the `check` of its own header.
pub(crate) fn checked_payload(frame: &[u8]) -> Result<&[u8], String> {
    let (_, said) = parse_header(frame)?;
    let (header, payload) = frame.split_at_checked(FRAME_HEADER_BYTES).unwrap_or_default();
    let check = crc32c::crc32c_append(crc32c::crc32c(payload), identity(header));
    if check == said { Ok(payload) } else { Err(format!("checksum is {check:08x}, the header says {said:08x}")) }
}

/// What a pointer expects of the frame it names.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    pub(crate) kind: FrameKind,
    pub(crate) codec: Codec,
    /// `None` where the frame may have been written for another block.
    pub(crate) logical: Option<u64>,
    pub(crate) raw_bytes: u32,
    pub(crate) stored_bytes: u32,
    pub(crate) tag: u64,
    pub(crate) check: u32,
}

/// Reads a frame whole and hands its payload to `work`, only if it is the frame the pointer means.
pub(crate) fn read<R>(
    storage: &dyn Storage,
    offset: u64,
    expected: &Expected,
    work: impl FnOnce(&[u8], &FrameInfo) -> Result<R>,
) -> Result<R> {
    let stored = usize::try_from(expected.stored_bytes).unwrap_or(usize::MAX);
    let len = FRAME_HEADER_BYTES.saturating_add(stored);
    let done = with_stored(storage, offset, len, |bytes| {
        let (header, payload) = bytes.split_at(FRAME_HEADER_BYTES.min(bytes.len()));
        let info = expected.confirm(header, payload).map_err(|what| bad_frame(storage, offset, bytes, what))?;
        work(payload, &info)
    });
    done.map_err(|e| match e {
        Error::Io { source, action: "read", .. } => read_error(storage, offset, len as u64, source),
        other => other,
    })
}

/// The payload of a frame that was read with others, only if it is the frame the pointer means.
pub(crate) fn confirm<'a>(
    storage: &dyn Storage,
    offset: u64,
    expected: &Expected,
    bytes: &'a [u8],
) -> Result<&'a [u8]> {
    let (header, payload) = bytes.split_at(FRAME_HEADER_BYTES.min(bytes.len()));
    expected.confirm(header, payload).map_err(|what| bad_frame(storage, offset, bytes, what))?;
    Ok(payload)
}

fn bad_frame(storage: &dyn Storage, offset: u64, bytes: &[u8], what: String) -> Error {
    Error::BadBlock { path: storage.label().into(), offset, len: bytes.len() as u64, what }
}

impl Expected {
    /// Whether these bytes are the frame that is meant.
    fn confirm(&self, header: &[u8], payload: &[u8]) -> Result<FrameInfo, String> {
        let check = crc32c::crc32c_append(crc32c::crc32c(payload), identity(header));
        if check != self.check && !planted(Bug::BlockUnchecked) && !planted(Bug::BlockMisplaced) {
            return Err(format!("checksum is {check:08x}, the pointer says {:08x}", self.check));
        }
        let (info, _) = parse_header(header)?;
        let same = info.kind == self.kind
            && info.codec == self.codec
            && self.logical.is_none_or(|logical| logical == info.logical || planted(Bug::BlockMisplaced))
            && info.raw_bytes == self.raw_bytes
            && info.stored_bytes == self.stored_bytes
            && info.tag == self.tag;
        if same { Ok(info) } else { Err(format!("identity: the frame is {info:?}")) }
    }
}

/// A short read is the file's fault, anything else the world's.
pub(crate) fn read_error(storage: &dyn Storage, offset: u64, need: u64, source: std::io::Error) -> Error {
    if source.kind() == std::io::ErrorKind::UnexpectedEof {
        let len = storage.len().unwrap_or(0);
        let what = format!("the frame at {offset}");
        return Error::Truncated { path: storage.label().into(), len, need: offset.saturating_add(need), what };
    }
    Error::io(storage.label(), "read", offset, source)
}
