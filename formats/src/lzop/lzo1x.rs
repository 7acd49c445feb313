//! One block of LZO1X.
//!
//! Invariants
//! - Never more than the expected bytes come out, every copy lies in what came out before, and the block ends with its
//!   end mark and nothing behind it; anything else is an error.

/// Distance beyond which the long form of a copy counts, and of the end mark.
const FAR: usize = 16 << 10;
/// Distance beyond which the short copy after literals counts.
const AFTER_LITERALS: usize = 2049;

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> Result<usize, String> {
        let (first, rest) = self.0.split_first().ok_or("the block ends early")?;
        self.0 = rest;
        Ok(usize::from(*first))
    }

    /// Two bytes, the low one first.
    fn pair(&mut self) -> Result<usize, String> {
        Ok(self.byte()? | self.byte()? << 8)
    }

    /// A length that did not fit its bits: 255 for each zero, then the first other byte.
    fn long(&mut self, base: usize) -> Result<usize, String> {
        let mut len = base;
        loop {
            match self.byte()? {
                0 => len = len.checked_add(255).ok_or("an endless length")?,
                more => return len.checked_add(more).ok_or_else(|| "an endless length".into()),
            }
        }
    }
}

/// What comes out, in room for exactly so many bytes.
struct Out<'a> {
    bytes: &'a mut Vec<u8>,
    len: usize,
}

impl Out<'_> {
    fn room(&self, len: usize) -> Result<(), String> {
        if len > self.len - self.bytes.len() { Err("more comes out than it should".into()) } else { Ok(()) }
    }

    fn literals(&mut self, from: &mut Bytes<'_>, len: usize) -> Result<(), String> {
        self.room(len)?;
        let (part, rest) = from.0.split_at_checked(len).ok_or("the block ends early")?;
        self.bytes.extend_from_slice(part);
        from.0 = rest;
        Ok(())
    }

    fn copy(&mut self, distance: usize, len: usize) -> Result<(), String> {
        self.room(len)?;
        let start = self.bytes.len().checked_sub(distance).ok_or("a copy of what lies before the block")?;
        let mut left = len;
        // The source may be what is being written: at most a whole distance at once.
        while left > 0 {
            let part = left.min(self.bytes.len() - start);
            self.bytes.extend_from_within(start..start + part);
            left -= part;
        }
        Ok(())
    }
}

/// Decodes a block into `out` (cleared first); exactly `len` bytes come out.
///
/// # Errors
/// The text says what is wrong with the block.
pub fn decode(block: &[u8], len: usize, out: &mut Vec<u8>) -> Result<(), String> {
    out.clear();
    let (mut from, mut to) = (Bytes(block), Out { bytes: out, len });
    // Literals that the last instruction copied: 0 to 3, or 4 for a run of its own.
    let mut before = 0;
    if let Some(first) = block.first().filter(|first| **first > 17) {
        from.byte()?;
        let literals = usize::from(*first) - 17;
        to.literals(&mut from, literals)?;
        before = literals.min(4);
    }
    loop {
        let code = from.byte()?;
        let (distance, copied, literals) = match code {
            0..16 if before == 0 => {
                let run = if code == 0 { from.long(15)? } else { code };
                to.literals(&mut from, run + 3)?;
                before = 4;
                continue;
            }
            0..16 => {
                let distance = (from.byte()? << 2) + (code >> 2);
                let (distance, copied) = if before == 4 { (distance + AFTER_LITERALS, 3) } else { (distance + 1, 2) };
                (distance, copied, code & 3)
            }
            16..32 => {
                let copied = if code & 7 == 0 { from.long(7)? } else { code & 7 };
                let low = from.pair()?;
                let distance = FAR + ((code & 8) << 11) + (low >> 2);
                if distance == FAR {
                    break;
                }
                (distance, copied + 2, low & 3)
            }
            32..64 => {
                let copied = if code & 31 == 0 { from.long(31)? } else { code & 31 };
                let low = from.pair()?;
                ((low >> 2) + 1, copied + 2, low & 3)
            }
            64..128 => ((from.byte()? << 3) + (code >> 2 & 7) + 1, (code >> 5 & 1) + 3, code & 3),
            _ => ((from.byte()? << 3) + (code >> 2 & 7) + 1, (code >> 5 & 3) + 5, code & 3),
        };
        to.copy(distance, copied)?;
        to.literals(&mut from, literals)?;
        before = literals;
    }
    if !from.0.is_empty() {
        return Err(format!("{} bytes behind the block's end", from.0.len()));
    }
    if to.bytes.len() == len { Ok(()) } else { Err(format!("{} bytes come out instead of {len}", to.bytes.len())) }
}
