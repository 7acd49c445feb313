//! Taking the compression off an archive: a single stream has no random access, so it is decoded once, from its
//! beginning to its end, into a plain archive that has.
//!
//! Invariants
//! - What comes out is no longer than an archive of the devices in its header can be, so that a few bytes cannot
//!   fill a file system.
//! - Nothing is written for a stream that does not begin as an archive.

use std::io::{self, Read, Write};

use super::{DEVICES_AT, FIXED_BYTES, HEADER_BYTES_MAX, MAGIC, u32_at, u64_at};
use crate::{Error, Result, lzop::Lzop};

/// Largest window of zstd that is allocated, as a power of two (128 MiB): what the tool itself allows.
const WINDOW_LOG_MAX: u32 = 27;
/// A cluster alone in its extent.
const CLUSTER_BYTES_MAX: u64 = (64 << 10) + 512;

/// How an archive is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrapping {
    /// `.vma.zst`.
    Zstd,
    /// `.vma.gz`.
    Gzip,
    /// `.vma.lzo`.
    Lzop,
}

impl Wrapping {
    /// The wrapping that `program` takes off, as [`crate::probe::wrapping`] names it.
    pub fn of_program(program: &str) -> Option<Self> {
        match program {
            "zstd" => Some(Self::Zstd),
            "gzip" => Some(Self::Gzip),
            "lzop" => Some(Self::Lzop),
            _ => None,
        }
    }

    /// Decodes the archive `from`, called `label`, into `to`; answers its length in bytes. `each` is told how many
    /// bytes have come out so far, now and then, and ends the work where it fails.
    ///
    /// # Errors
    /// [`Error::Refused`] for a stream that holds no archive; [`Error::Corrupt`] for one that is damaged, ends early,
    /// or goes on for longer than an archive of its devices can be; [`Error::Io`] of `to`; those of `each`.
    pub fn take_off<E: From<Error>>(
        self,
        label: &str,
        from: impl Read,
        to: &mut impl Write,
        mut each: impl FnMut(u64) -> Result<(), E>,
    ) -> Result<u64, E> {
        let unreadable = |e| Error::io(label, "read", 0, e);
        let damaged = |at: u64, e: io::Error| {
            Error::corrupt(
                label,
                at,
                format!("the compressed stream is damaged or ends early, there in what comes out: {e}"),
            )
        };
        let mut stream: Box<dyn Read> = match self {
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(from).map_err(unreadable)?;
                decoder.window_log_max(WINDOW_LOG_MAX).map_err(unreadable)?;
                Box::new(decoder)
            }
            Self::Gzip => Box::new(flate2::read::MultiGzDecoder::new(from)),
            Self::Lzop => Box::new(Lzop::new(from).map_err(|e| damaged(0, e))?),
        };
        let mut head = vec![0; usize::try_from(FIXED_BYTES).unwrap_or_default()];
        let first = stream.read_exact(&mut head);
        if !head.starts_with(MAGIC) {
            first.map_err(|e| damaged(0, e))?;
            let what = "it is compressed, and what is inside is no archive of Proxmox VE: decompress it first".into();
            return Err(Error::Refused { path: label.into(), what }.into());
        }
        first.map_err(|e| damaged(0, e))?;
        let most = longest(&head);
        let failed = |at, e| Error::io(label, "write what comes out of it", at, e);
        to.write_all(&head).map_err(|e| failed(0, e))?;
        let (mut at, mut part) = (FIXED_BYTES, vec![0; 1 << 20]);
        loop {
            let n = match stream.read(&mut part) {
                Ok(0) => return Ok(at),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(damaged(at, e).into()),
            };
            let bytes = part.get(..n).unwrap_or_default();
            if at + n as u64 > most {
                let what = format!("more than the {most} bytes that an archive of its devices can have come out of it");
                return Err(Error::corrupt(label, at, what).into());
            }
            to.write_all(bytes).map_err(|e| failed(at, e))?;
            at += n as u64;
            each(at)?;
        }
    }
}

/// Bytes of the longest archive that can begin with this fixed part of a header.
fn longest(head: &[u8]) -> u64 {
    let header = u64::from(u32_at(head, 56)).min(HEADER_BYTES_MAX);
    let clusters = |id: usize| u64_at(head, DEVICES_AT + 32 * id + 8).div_ceil(64 << 10);
    let clusters = (1..256).map(clusters).fold(0u64, u64::saturating_add);
    clusters.saturating_mul(CLUSTER_BYTES_MAX).saturating_add(header.max(FIXED_BYTES))
}
