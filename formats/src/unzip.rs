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
