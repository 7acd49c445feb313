//! One LZ4 frame, decoded whole: what lies inside compressed pieces of virtnbdbackup and the blocks of Longhorn.
//!
//! Invariants
//! - Exactly the bytes that the caller expects come out, or it is an error; nothing more is allocated.
//! - Checksums of blocks and of the content are checked where the frame has them.
//!
//! Not here: dictionaries and skippable frames, which those programs never write.

/// First bytes of a frame.
const MAGIC: u32 = 0x184D_2204;
/// How far a block may refer back into the ones before it.
const WINDOW: usize = 64 << 10;
const BLOCK_MAX: usize = 4 << 20;

const P1: u32 = 0x9E37_79B1;
const P2: u32 = 0x85EB_CA77;
const P3: u32 = 0xC2B2_AE3D;
const P4: u32 = 0x27D4_EB2F;
const P5: u32 = 0x1656_67B1;

/// XXH32 with seed 0.
pub(crate) fn xxh32(bytes: &[u8]) -> u32 {
    let round = |sum: u32, lane: u32| sum.wrapping_add(lane.wrapping_mul(P2)).rotate_left(13).wrapping_mul(P1);
    let (stripes, rest) = bytes.as_chunks::<16>();
    let mut hash = P5;
    if !stripes.is_empty() {
        let mut sums = [P1.wrapping_add(P2), P2, 0, 0u32.wrapping_sub(P1)];
        for stripe in stripes {
            for (sum, lane) in sums.iter_mut().zip(stripe.as_chunks::<4>().0) {
                *sum = round(*sum, u32::from_le_bytes(*lane));
            }
        }
        let turns = [1, 7, 12, 18];
        hash = sums.iter().zip(turns).fold(0, |all: u32, (sum, turn)| all.wrapping_add(sum.rotate_left(turn)));
    }
    // The length counts modulo 2^32.
    hash = hash.wrapping_add(u32::try_from(bytes.len() as u64 & 0xFFFF_FFFF).unwrap_or_default());
    let (lanes, rest) = rest.as_chunks::<4>();
    for lane in lanes {
        hash = hash.wrapping_add(u32::from_le_bytes(*lane).wrapping_mul(P3)).rotate_left(17).wrapping_mul(P4);
    }
    for byte in rest {
        hash = hash.wrapping_add(u32::from(*byte).wrapping_mul(P5)).rotate_left(11).wrapping_mul(P1);
    }
    hash = (hash ^ (hash >> 15)).wrapping_mul(P2);
    hash = (hash ^ (hash >> 13)).wrapping_mul(P3);
    hash ^ (hash >> 16)
}

/// What a frame's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    is_linked: bool,
    has_block_sums: bool,
    has_sum: bool,
    /// Bytes that come out of it, where it says so.
    pub(crate) content: Option<u64>,
}

fn take<'a>(from: &mut &'a [u8], len: usize) -> Result<&'a [u8], String> {
    let (head, rest) = from.split_at_checked(len).ok_or("the frame ends early")?;
    *from = rest;
    Ok(head)
}

fn number(from: &mut &[u8]) -> Result<u32, String> {
    let bytes = take(from, 4)?;
    Ok(bytes.first_chunk::<4>().map_or(0, |bytes| u32::from_le_bytes(*bytes)))
}

/// First bytes of a frame, as they lie there.
pub(crate) const MAGIC_BYTES: [u8; 4] = MAGIC.to_le_bytes();
/// Longest header, in bytes.
pub(crate) const HEAD_BYTES_MAX: u64 = 19;

impl Head {
    /// Reads the header at the beginning of `bytes`, and steps over it.
    pub(crate) fn take(bytes: &mut &[u8]) -> Result<Self, String> {
        if number(bytes)? != MAGIC {
            return Err("no frame of LZ4 begins here".into());
        }
        let from = *bytes;
        let flags = take(bytes, 2)?.first().copied().unwrap_or_default();
        if flags >> 6 != 1 {
            return Err(format!("frame of version {}", flags >> 6));
        }
        let content = match flags & 8 {
            0 => None,
            _ => take(bytes, 8)?.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes)),
        };
        if flags & 1 != 0 {
            return Err("a frame that needs a dictionary".into());
        }
        let said = from.get(..from.len() - bytes.len()).unwrap_or_default();
        let sum = take(bytes, 1)?.first().copied().unwrap_or_default();
        if u32::from(sum) != xxh32(said) >> 8 & 0xFF {
            return Err("the frame's header does not match its checksum".into());
        }
        let (is_linked, has_block_sums, has_sum) = (flags & 0x20 == 0, flags & 0x10 != 0, flags & 4 != 0);
        Ok(Self { is_linked, has_block_sums, has_sum, content })
    }
}

/// Decodes the frame that `bytes` are into `out` (cleared first); exactly `len` bytes come out.
pub(crate) fn decode(mut bytes: &[u8], len: usize, out: &mut Vec<u8>) -> Result<(), String> {
    out.clear();
    let head = Head::take(&mut bytes)?;
    if head.content.is_some_and(|content| content != len as u64) {
        return Err(format!("the frame says that {} bytes come out, not {len}", head.content.unwrap_or_default()));
    }
    out.resize(len, 0);
    let mut at = 0;
    loop {
        let size = number(&mut bytes)?;
        if size == 0 {
            break;
        }
        let stored = usize::try_from(size & 0x7FFF_FFFF).unwrap_or(usize::MAX);
        if stored > BLOCK_MAX {
            return Err(format!("a block of {stored} bytes"));
        }
        let block = take(&mut bytes, stored)?;
        if head.has_block_sums && number(&mut bytes)? != xxh32(block) {
            return Err("a block does not match its checksum".into());
        }
        let (before, after) = out.split_at_mut(at);
        if size >> 31 == 1 {
            let to = after.get_mut(..block.len()).ok_or("more comes out than it should")?;
            to.copy_from_slice(block);
            at += block.len();
            continue;
        }
        let room = after.len().min(BLOCK_MAX);
        let to = after.get_mut(..room).unwrap_or_default();
        let window = if head.is_linked { before.get(before.len().saturating_sub(WINDOW)..) } else { None };
        let n = lz4_flex::block::decompress_into_with_dict(block, to, window.unwrap_or_default());
        at += n.map_err(|e| format!("a block does not decode: {e}"))?;
    }
    if at != len {
        return Err(format!("{at} bytes come out instead of {len}"));
    }
    if head.has_sum && number(&mut bytes)? != xxh32(out) {
        return Err("the content does not match its checksum".into());
    }
    if bytes.is_empty() { Ok(()) } else { Err(format!("{} bytes behind the frame", bytes.len())) }
}
