//! What a guest asks of a virtio block device: descriptors and bytes in, a checked request out; no I/O.
//!
//! Invariants
//! - Nothing depends on how the guest cut its request into descriptors: the first 16 readable bytes are the header,
//!   the last writable byte is the status, what is between is data.
//! - A header is parsed from bytes that were copied once; it is never looked at again in the guest's memory.
//! - Every range of a [`Request`] lies inside the disk, and its lengths agree with the descriptors.
//!
//! Not here: rings and guest memory (`ring`, `memory`), and doing what is asked (`queue`).
//!
//! Source: Virtual I/O Device (VIRTIO) Version 1.2, section 5.2.6.

use aquifer_vdisk::Zeroing;

/// Bytes of a sector, the unit of every place a guest names.
pub const SECTOR: u64 = 512;
/// Bytes of a request's header.
pub const HEADER_LEN: usize = 16;
/// Bytes of a device's identity, as `VIRTIO_BLK_T_GET_ID` asks for it.
pub const ID_LEN: usize = 20;
/// Bytes of one range of a DISCARD or WRITE_ZEROES.
pub const RANGE_LEN: usize = 16;
/// Ranges of one DISCARD or WRITE_ZEROES at most.
pub const RANGES_MAX: u32 = 32;
/// Sectors of one such range at most: 2 GiB.
pub const RANGE_SECTORS_MAX: u32 = 1 << 22;
/// Bytes of all descriptors of one request at most.
pub const CHAIN_BYTES_MAX: u64 = 1 << 32;

/// One piece of a guest's buffer, as its descriptor has it: guest-physical, in bytes, unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Where it begins.
    pub addr: u64,
    /// How long it is.
    pub len: u32,
    /// Whether the device writes it; else it reads it.
    pub writable: bool,
}

/// A range of guest memory, in bytes; unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where it begins.
    pub addr: u64,
    /// How long it is.
    pub len: u32,
}

/// How a request ended, as the guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed, or made no sense.
    IoError = 1,
    /// Not something this device does.
    Unsupported = 2,
}

/// Why descriptors are no request: there is not even a place for a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Fewer readable bytes than a header has.
    #[error("descriptors without room for a header")]
    NoHeader,
    /// No writable byte for the status.
    #[error("descriptors without a place for the status")]
    NoStatus,
    /// A readable descriptor behind a writable one.
    #[error("readable descriptor behind a writable one")]
    Order,
    /// More than [`CHAIN_BYTES_MAX`] bytes, or a buffer that ends beyond the address space.
    #[error("descriptors of more than 4 GiB, or beyond the address space")]
    TooLong,
}

/// The parts of a request's buffers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// The header, [`HEADER_LEN`] bytes.
    pub header: Vec<Span>,
    /// What the guest sends.
    pub output: Vec<Span>,
    /// Bytes of it.
    pub output_len: u64,
    /// Where the guest wants data.
    pub input: Vec<Span>,
    /// Bytes of it.
    pub input_len: u64,
    /// Where the status byte goes.
    pub status: u64,
}

impl Layout {
    /// Sorts descriptors into parts.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn of(descriptors: &[Descriptor]) -> Result<Self, Malformed> {
        let mut layout = Self::default();
        let (mut total, mut header_left) = (0u64, HEADER_LEN as u64);
        let mut writable_seen = false;
        for descriptor in descriptors.iter().filter(|descriptor| descriptor.len > 0) {
            let Descriptor { addr, len, writable } = *descriptor;
            total += u64::from(len);
            if total > CHAIN_BYTES_MAX || addr.checked_add(u64::from(len)).is_none() {
                return Err(Malformed::TooLong);
            }
            if writable {
                writable_seen = true;
                layout.input.push(Span { addr, len });
                layout.input_len += u64::from(len);
                continue;
            }
            if writable_seen {
                return Err(Malformed::Order);
            }
            let front = u32::try_from(header_left).unwrap_or(0).min(len);
            if front > 0 {
                layout.header.push(Span { addr, len: front });
                header_left -= u64::from(front);
            }
            if len > front {
                layout.output.push(Span { addr: addr + u64::from(front), len: len - front });
                layout.output_len += u64::from(len - front);
            }
        }
        if header_left > 0 {
            return Err(Malformed::NoHeader);
        }
        let Some(last) = layout.input.last_mut() else { return Err(Malformed::NoStatus) };
        last.len -= 1;
        layout.status = last.addr + u64::from(last.len);
        layout.input_len -= 1;
        if last.len == 0 {
            layout.input.pop();
        }
        Ok(layout)
    }
}

/// What the device at hand does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Bytes of the disk, a multiple of [`SECTOR`].
    pub size: u64,
    /// Whether it takes writes.
    pub writable: bool,
}

/// One range to make zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroRange {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Whether its space may be given back.
    pub zeroing: Zeroing,
}

/// A request that makes sense, with places and lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Reads `len` bytes from `offset`.
    Read {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Writes `len` bytes at `offset`.
    Write {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Makes durable what was written.
    Flush,
    /// Gives ranges back; how many the data says, see [`Request::ranges`].
    Discard {
        /// How many ranges follow.
        ranges: u32,
    },
    /// Makes ranges zero.
    WriteZeroes {
        /// How many ranges follow.
        ranges: u32,
    },
    /// Asks who the device is.
    Identity,
}

/// Numbers of requests.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

impl Request {
    /// Parses a header, with the lengths its descriptors left for data.
    ///
    /// # Errors
    /// What the guest is to be told instead.
    pub fn parse(header: [u8; HEADER_LEN], output_len: u64, input_len: u64, rules: Rules) -> Result<Self, Status> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let offset = u64::from_le_bytes(sector).checked_mul(SECTOR);
        let ranged = |len: u64| {
            let offset = offset.ok_or(Status::IoError)?;
            let inside = offset.checked_add(len).is_some_and(|end| end <= rules.size);
            if inside && len.is_multiple_of(SECTOR) { Ok(offset) } else { Err(Status::IoError) }
        };
        let zeroes = || {
            if !rules.writable {
                return Err(Status::IoError);
            }
            let whole = output_len > 0 && output_len.is_multiple_of(RANGE_LEN as u64);
            let ranges = u32::try_from(output_len / RANGE_LEN as u64).unwrap_or(u32::MAX);
            if whole && ranges <= RANGES_MAX { Ok(ranges) } else { Err(Status::IoError) }
        };
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            kind::IN => Ok(Self::Read { offset: ranged(input_len)?, len: input_len }),
            kind::OUT if !rules.writable => Err(Status::IoError),
            kind::OUT => Ok(Self::Write { offset: ranged(output_len)?, len: output_len }),
            kind::FLUSH => Ok(Self::Flush),
            kind::GET_ID => Ok(Self::Identity),
            kind::DISCARD => Ok(Self::Discard { ranges: zeroes()? }),
            kind::WRITE_ZEROES => Ok(Self::WriteZeroes { ranges: zeroes()? }),
            _ => Err(Status::Unsupported),
        }
    }

    /// The ranges of a DISCARD or WRITE_ZEROES; `data` is what the guest sent, copied once. None for other requests.
    ///
    /// # Errors
    /// What the guest is to be told instead.
    pub fn ranges(&self, data: &[u8], rules: Rules) -> Result<Vec<ZeroRange>, Status> {
        let (count, discard) = match self {
            Self::Discard { ranges } => (*ranges, true),
            Self::WriteZeroes { ranges } => (*ranges, false),
            _ => return Ok(Vec::new()),
        };
        let (ranges, rest) = data.as_chunks::<RANGE_LEN>();
        if !rest.is_empty() || u32::try_from(ranges.len()) != Ok(count) {
            return Err(Status::IoError);
        }
        ranges.iter().map(|range| zero_range(range, discard, rules)).collect()
    }
}

/// `le64 sector, le32 sectors, le32 flags`, of which bit 0 lets space go.
fn zero_range(bytes: &[u8; RANGE_LEN], discard: bool, rules: Rules) -> Result<ZeroRange, Status> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = *bytes;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let (sectors, flags) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes([f0, f1, f2, f3]));
    let zeroing = match (discard, flags) {
        (true, 0) | (false, 1) => Zeroing::MayTrim,
        (false, 0) => Zeroing::KeepSpace,
        _ => return Err(Status::Unsupported),
    };
    let len = u64::from(sectors) * SECTOR;
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    let inside = offset.checked_add(len).is_some_and(|end| end <= rules.size);
    if !inside || sectors > RANGE_SECTORS_MAX {
        return Err(Status::IoError);
    }
    Ok(ZeroRange { offset, len, zeroing })
}

#[cfg(test)]
mod tests;
