//! One blob: a chunk, or a small file of a snapshot. A magic number, a CRC-32, perhaps nonce and tag, bytes.

use super::key::Key;
use crate::codec::{self, DecodeError};

const PLAIN: [u8; 8] = [0x42, 0xab, 0x38, 0x07, 0xbe, 0x83, 0x70, 0xa1];
const ZSTD: [u8; 8] = [0x31, 0xb9, 0x58, 0x42, 0x6f, 0xb6, 0xa3, 0x7f];
const SEALED: [u8; 8] = [0x7b, 0x67, 0x85, 0xbe, 0x22, 0x2d, 0x4c, 0xf0];
const SEALED_ZSTD: [u8; 8] = [0xe6, 0x59, 0x1b, 0xbf, 0x0b, 0xbf, 0xd8, 0x0b];

/// Bytes of magic number and checksum.
const HEAD_BYTES: usize = 12;

/// Bytes of nonce and tag behind it in a sealed blob.
const SEAL_BYTES: usize = 32;

/// Whether a blob was sealed with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sealing {
    Open,
    Sealed,
}

/// Why a blob gives nothing.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It was sealed with a key, and none is at hand.
    Encrypted,
    /// It was sealed with another key.
    OtherKey,
    /// It breaks a rule, in words.
    Damaged(String),
}

impl From<DecodeError> for Failure {
    fn from(error: DecodeError) -> Self {
        Self::Damaged(error.to_string())
    }
}

/// The longest blob that can hold `raw_max` bytes: zstd adds little to what it cannot shorten.
pub(super) fn longest(raw_max: usize) -> u64 {
    (raw_max + raw_max / 128 + 4096) as u64
}

/// Decodes `bytes` into `out` (cleared first): at most `raw_max` bytes.
pub(super) fn decode(bytes: &[u8], raw_max: usize, key: Option<&Key>, out: &mut Vec<u8>) -> Result<Sealing, Failure> {
    out.clear();
    let damaged = |what: &str| Failure::Damaged(what.to_owned());
    let (head, body) = bytes.split_at_checked(HEAD_BYTES).ok_or_else(|| damaged("shorter than a blob's header"))?;
    let (magic, sum) = head.split_first_chunk::<8>().ok_or_else(|| damaged("no header"))?;
    let (sealing, compressed) = match *magic {
        PLAIN => (Sealing::Open, false),
        ZSTD => (Sealing::Open, true),
        SEALED => (Sealing::Sealed, false),
        SEALED_ZSTD => (Sealing::Sealed, true),
        _ => return Err(damaged("not a blob: its magic number is unknown")),
    };
    let summed = match sealing {
        Sealing::Open => body,
        Sealing::Sealed => body.get(SEAL_BYTES..).ok_or_else(|| damaged("shorter than its seal"))?,
    };
    if sum != crc32fast::hash(summed).to_le_bytes() {
        return Err(damaged("its CRC is wrong"));
    }
    let mut opened = Vec::new();
    let content = match sealing {
        Sealing::Open => body,
        Sealing::Sealed => {
            // The CRC held, so these are the bytes that were sealed: what does not fit is the key.
            if !key.ok_or(Failure::Encrypted)?.open(body, &mut opened) {
                return Err(Failure::OtherKey);
            }
            &opened
        }
    };
    if compressed {
        codec::zstd_up_to(content, raw_max, out)?;
    } else if content.len() > raw_max {
        return Err(Failure::Damaged(format!("{} bytes, where at most {raw_max} belong", content.len())));
    } else {
        out.extend_from_slice(content);
    }
    Ok(sealing)
}
