//! Small streams of gzip and Brotli, decoded whole: what lies inside objects that programs of other languages wrote.
//!
//! Invariants
//! - No more than the bytes that the caller allows come out or are allocated for.
//! - On an error nothing is left in the output.

use std::io::Read;

/// First bytes of a gzip stream with the one method there is.
pub(crate) const GZIP_MAGIC: [u8; 3] = [0x1f, 0x8b, 8];

/// Decodes members of gzip (RFC 1952) into `out` (cleared first): at most `bytes_max` bytes, their CRCs checked.
///
/// # Errors
/// What is wrong, in words.
pub(crate) fn gzip(stored: &[u8], bytes_max: usize, out: &mut Vec<u8>) -> Result<(), String> {
    bounded(flate2::bufread::MultiGzDecoder::new(stored), bytes_max, out)
}

/// Buffer for the input of Brotli, in bytes.
const BROTLI_BUFFER: usize = 64 << 10;
/// How a Brotli stream begins that asks for a window of up to a gigabyte, which is beyond RFC 7932.
const BROTLI_LARGE_WINDOW: u8 = 0x11;

/// Decodes one Brotli stream (RFC 7932) into `out` (cleared first): at most `bytes_max` bytes. It has no checksum.
///
/// # Errors
/// What is wrong, in words.
pub(crate) fn brotli(stored: &[u8], bytes_max: usize, out: &mut Vec<u8>) -> Result<(), String> {
    if stored.first().is_some_and(|first| first & 0x7f == BROTLI_LARGE_WINDOW) {
        out.clear();
        return Err("a stream with a large window".into());
    }
    bounded(brotli_decompressor::Decompressor::new(stored, BROTLI_BUFFER), bytes_max, out)
}

fn bounded(from: impl Read, bytes_max: usize, out: &mut Vec<u8>) -> Result<(), String> {
    out.clear();
    let read = from.take(bytes_max as u64 + 1).read_to_end(out);
    let done = match read {
        Ok(len) if len > bytes_max => Err(format!("more than {bytes_max} bytes come out")),
        Ok(_) => Ok(()),
        Err(e) => Err(e.to_string()),
    };
    if done.is_err() {
        out.clear();
    }
    done
}
