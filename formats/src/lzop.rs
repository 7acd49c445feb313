//! Streams of `lzop`: blocks of LZO1X, each with its lengths and checksums, read from beginning to end.
//!
//! ```text
//! 89 "LZO" 00 0d 0a 1a 0a   versions, method, flags, times, name   checksum
//! decoded length   stored length   checksums   bytes              again and again; a length of 0 ends it
//! ```
//!
//! Invariants
//! - A block decodes to exactly the length it says, at most 64 MiB, and matches every checksum it has, or the read fails.
//! - A stream without its end is an error, never a short file.
//!
//! Not here: filters and several files in one stream, which are refused.

mod lzo1x;

use std::io::{self, Read};

pub use lzo1x::decode;

/// First bytes of a stream.
pub const MAGIC: [u8; 9] = [0x89, b'L', b'Z', b'O', 0, 0x0d, 0x0a, 0x1a, 0x0a];

/// Longest block, decoded: what the tool itself allows.
const BLOCK_BYTES_MAX: u32 = 64 << 20;
/// From this version of the tool on the header says more.
const VERSION_LONG: u16 = 0x0940;

const FLAG_ADLER_DECODED: u32 = 1;
const FLAG_ADLER_STORED: u32 = 2;
const FLAG_EXTRA: u32 = 0x40;
const FLAG_CRC_DECODED: u32 = 0x100;
const FLAG_CRC_STORED: u32 = 0x200;
const FLAG_SEVERAL: u32 = 0x400;
const FLAG_FILTER: u32 = 0x800;
const FLAG_CRC_HEADER: u32 = 0x1000;

fn odd(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Adler-32, as in zlib.
pub fn adler32(bytes: &[u8]) -> u32 {
    const MODULUS: u32 = 65_521;
    let (mut a, mut b) = (1u32, 0u32);
    // So many sums of bytes fit 32 bits.
    for part in bytes.chunks(5552) {
        for byte in part {
            a += u32::from(*byte);
            b += a;
        }
        (a, b) = (a % MODULUS, b % MODULUS);
    }
    b << 16 | a
}

/// The bytes inside a stream.
#[derive(Debug)]
pub struct Lzop<R> {
    from: R,
    flags: u32,
    block: Vec<u8>,
    at: usize,
    is_over: bool,
}

/// Reads numbers and keeps what it has read, for the checksum.
struct Header<'a, R> {
    from: &'a mut R,
    seen: Vec<u8>,
}

impl<R: Read> Header<'_, R> {
    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes)?;
        self.seen.extend(bytes);
        Ok(bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn byte(&mut self) -> io::Result<u8> {
        self.take().map(|[byte]| byte)
    }
}

impl<R: Read> Lzop<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// No such stream, a damaged header, or one that needs what is not read here; those of `from`.
    pub fn new(mut from: R) -> io::Result<Self> {
        let mut magic = [0; MAGIC.len()];
        from.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(odd("no stream of lzop begins here"));
        }
        let mut header = Header { from: &mut from, seen: Vec::new() };
        let version = header.u16()?;
        let is_long = version >= VERSION_LONG;
        header.u16()?;
        if is_long {
            header.u16()?;
        }
        let method = header.byte()?;
        if !(1..=3).contains(&method) {
            return Err(odd(format!("compressed by method {method} of lzop, not by LZO1X")));
        }
        if is_long {
            header.byte()?;
        }
        let flags = header.u32()?;
        if flags & (FLAG_FILTER | FLAG_SEVERAL) != 0 {
            return Err(odd("a stream of lzop with a filter or several parts"));
        }
        // Mode and times.
        header.u32()?;
        header.u32()?;
        if is_long {
            header.u32()?;
        }
        for _ in 0..header.byte()? {
            header.byte()?;
        }
        let sum = if flags & FLAG_CRC_HEADER != 0 { crc32fast::hash(&header.seen) } else { adler32(&header.seen) };
        if header.u32()? != sum {
            return Err(odd("the header does not match its checksum"));
        }
        if flags & FLAG_EXTRA != 0 {
            let len = u64::from(header.u32()?) + 4;
            let passed = io::copy(&mut (&mut from).take(len), &mut io::sink())?;
            if passed != len {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(Self { from, flags, block: Vec::new(), at: 0, is_over: false })
    }

    fn number(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.from.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    /// The number, if the flag says that there is one.
    fn sum(&mut self, flag: u32) -> io::Result<Option<u32>> {
        if self.flags & flag == 0 { Ok(None) } else { self.number().map(Some) }
    }

    fn next_block(&mut self) -> io::Result<()> {
        let decoded = self.number()?;
        if decoded == 0 {
            self.is_over = true;
            return Ok(());
        }
        let stored = self.number()?;
        if decoded > BLOCK_BYTES_MAX || stored > decoded || stored == 0 {
            return Err(odd(format!("a block of {decoded} bytes stored in {stored}")));
        }
        let (adler, crc) = (self.sum(FLAG_ADLER_DECODED)?, self.sum(FLAG_CRC_DECODED)?);
        let is_packed = stored < decoded;
        let stored_sums =
            if is_packed { (self.sum(FLAG_ADLER_STORED)?, self.sum(FLAG_CRC_STORED)?) } else { (None, None) };
        // Grows as it is read: a length alone allocates nothing.
        let mut bytes = Vec::new();
        (&mut self.from).take(stored.into()).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != u64::from(stored) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let holds = |bytes: &[u8], (adler, crc): (Option<u32>, Option<u32>)| {
            adler.is_none_or(|sum| sum == adler32(bytes)) && crc.is_none_or(|sum| sum == crc32fast::hash(bytes))
        };
        if !holds(&bytes, stored_sums) {
            return Err(odd("a block does not match its checksum"));
        }
        if is_packed {
            let len = usize::try_from(decoded).unwrap_or(usize::MAX);
            decode(&bytes, len, &mut self.block).map_err(odd)?;
        } else {
            self.block = bytes;
        }
        self.at = 0;
        if holds(&self.block, (adler, crc)) { Ok(()) } else { Err(odd("a decoded block does not match its checksum")) }
    }
}

impl<R: Read> Read for Lzop<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.at >= self.block.len() && !self.is_over {
            self.block.clear();
            self.next_block()?;
        }
        let rest = self.block.get(self.at..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..len), rest.get(..len)) {
            to.copy_from_slice(from);
        }
        self.at += len;
        Ok(len)
    }
}

#[cfg(test)]
mod tests;
