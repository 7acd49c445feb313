//! Encoding and decoding of one stored payload.
//!
//! Invariants
//! - A decoded payload has exactly its declared length, or at least the part that was asked for; no
//!   byte of `out` comes from anywhere but this payload.
//! - Nothing is allocated beyond the declared length, which the caller has bounded.

use std::cell::RefCell;

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

thread_local! {
    static DECODER: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

/// Decodes at least `need` of `raw_bytes` into `out`, which is cleared first. The text says what is wrong.
pub(crate) fn decode(
    codec: Codec,
    stored: &[u8],
    raw_bytes: usize,
    need: usize,
    out: &mut Vec<u8>,
) -> Result<(), String> {
    out.clear();
    match codec {
        Codec::Raw if stored.len() == raw_bytes => {
            out.extend_from_slice(stored);
            Ok(())
        }
        Codec::Raw => Err(format!("decode: {} raw bytes stored for {raw_bytes}", stored.len())),
        Codec::Lz4 => {
            out.resize(raw_bytes, 0);
            match lz4_flex::block::decompress_into(stored, out) {
                Ok(len) if len == raw_bytes => Ok(()),
                Ok(len) => Err(format!("decode: lz4 block holds {len} bytes instead of {raw_bytes}")),
                Err(e) => Err(format!("decode: {e}")),
            }
        }
        Codec::Zstd => {
            let need = need.min(raw_bytes).next_multiple_of(FLUSH_BYTES).min(raw_bytes);
            out.resize(need, 0);
            DECODER.with_borrow_mut(|context| zstd_out_of(context, stored, raw_bytes, out))
        }
        Codec::Deflate => Err("decode: deflate is not a codec of this format".into()),
    }
}

fn zstd_out_of(context: &mut DCtx<'_>, stored: &[u8], raw_bytes: usize, out: &mut Vec<u8>) -> Result<(), String> {
    let named = |code| format!("decode: {}", get_error_name(code));
    let want = out.len();
    if want == raw_bytes {
        return match context.decompress(out.as_mut_slice(), stored) {
            Ok(len) if len == want => Ok(()),
            Ok(len) => Err(format!("decode: zstd frame holds {len} bytes instead of {want}")),
            Err(code) => Err(named(code)),
        };
    }
    context.reset(ResetDirective::SessionOnly).map_err(named)?;
    let mut input = InBuffer::around(stored);
    let mut output = OutBuffer::around(out.as_mut_slice());
    loop {
        let (before_in, before_out) = (input.pos(), output.pos());
        let hint = context.decompress_stream(&mut output, &mut input).map_err(named)?;
        if output.pos() == want {
            return Ok(());
        }
        if hint == 0 || (input.pos(), output.pos()) == (before_in, before_out) {
            return Err(format!("decode: zstd frame ends after {} bytes of {want}", output.pos()));
        }
    }
}
