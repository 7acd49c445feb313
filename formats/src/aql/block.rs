//! Encoding of stored payloads, and decoding of metadata. Blocks are decoded by [`crate::codec`].
//!
//! Invariants
//! - A compressed payload is at least one part in 64 smaller than what it holds; else it is stored raw.
//! - Decoded metadata has exactly its declared length, which the caller has bounded.

use zstd_safe::{
    CCtx, CParameter, DCtx, InBuffer, OutBuffer, ResetDirective, get_error_name, zstd_sys::ZSTD_EndDirective,
};

use super::layout::FLUSH_BYTES;
use crate::Codec;

/// How blocks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// zstd at a level from -7 to 19; 1 is the default.
    Zstd(i32),
    /// LZ4: decodes three times as fast, stores about 14 % more.
    Lz4,
    /// Stored as they are.
    Raw,
}

impl Default for Compression {
    fn default() -> Self {
        Self::Zstd(1)
    }
}

impl Compression {
    pub(crate) fn codec(self) -> Codec {
        match self {
            Self::Zstd(_) => Codec::Zstd,
            Self::Lz4 => Codec::Lz4,
            Self::Raw => Codec::Raw,
        }
    }
}

/// The native numbers of codecs; others are not part of this format.
pub(crate) fn codec_from(number: u8) -> Option<Codec> {
    [Codec::Raw, Codec::Lz4, Codec::Zstd].into_iter().find(|c| *c as u8 == number)
}

/// A thread's compressor.
pub(crate) struct Encoder {
    zstd: Option<CCtx<'static>>,
    how: Compression,
}

impl Encoder {
    pub(crate) fn new(how: Compression) -> Self {
        Self { zstd: None, how }
    }

    /// Appends `raw` to `out`, compressed where that saves at least one part in 64 (less is not worth
    /// the decoding), and says how.
    pub(crate) fn encode(&mut self, raw: &[u8], out: &mut Vec<u8>) -> Codec {
        let start = out.len();
        let room = raw.len() - raw.len() / 64;
        out.resize(start + room, 0);
        let target = out.get_mut(start..).unwrap_or_default();
        let stored = match self.how {
            Compression::Raw => None,
            Compression::Lz4 => lz4_flex::block::compress_into(raw, target).ok().filter(|len| *len < room),
            Compression::Zstd(level) => self.zstd_into(level, raw, target),
        };
        match stored {
            Some(len) => {
                out.truncate(start + len);
                self.how.codec()
            }
            None => {
                out.truncate(start);
                out.extend_from_slice(raw);
                Codec::Raw
            }
        }
    }

    /// One frame, flushed so that a decoder can stop every [`FLUSH_BYTES`]. `None`: it does not fit.
    fn zstd_into(&mut self, level: i32, raw: &[u8], target: &mut [u8]) -> Option<usize> {
        let context = self.zstd.get_or_insert_with(|| {
            let mut context = CCtx::create();
            // A refused parameter leaves zstd's own default, which any reader decodes as well.
            let _ = context.set_parameter(CParameter::CompressionLevel(level));
            let _ = context.set_parameter(CParameter::ChecksumFlag(false));
            context
        });
        context.reset(ResetDirective::SessionOnly).ok()?;
        context.set_pledged_src_size(Some(raw.len() as u64)).ok()?;
        let mut output = OutBuffer::around(target);
        let mut pieces = raw.chunks(FLUSH_BYTES).peekable();
        while let Some(piece) = pieces.next() {
            let end =
                if pieces.peek().is_some() { ZSTD_EndDirective::ZSTD_e_flush } else { ZSTD_EndDirective::ZSTD_e_end };
            let mut input = InBuffer::around(piece);
            if context.compress_stream2(&mut output, &mut input, end).ok()? > 0 {
                return None;
            }
        }
        Some(output.pos())
    }
}

/// Decodes metadata whole, of which the caller has bounded the size. The text says what is wrong.
pub(crate) fn decode_meta(codec: Codec, stored: &[u8], raw_bytes: usize, out: &mut Vec<u8>) -> Result<(), String> {
    out.clear();
    let got = match codec {
        Codec::Raw => {
            out.extend_from_slice(stored);
            stored.len()
        }
        Codec::Zstd => {
            out.resize(raw_bytes, 0);
            let decoded = DCtx::create().decompress(out.as_mut_slice(), stored);
            decoded.map_err(|code| format!("decode: {}", get_error_name(code)))?
        }
        Codec::Lz4 | Codec::Deflate => return Err(format!("decode: metadata is never stored as {codec:?}")),
    };
    if got == raw_bytes { Ok(()) } else { Err(format!("decode: {got} bytes instead of {raw_bytes}")) }
}
