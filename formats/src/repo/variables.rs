//! UEFI variables of a machine, as they travel with its restore point: boot entries, secure boot keys, whatever the
//! firmware remembers between two starts.
//!
//! Invariants
//! - Only a firmware volume is taken, and what comes back has the length and the hash it was stored with.
//! - Nothing is allocated on the word of a record beyond [`VARIABLES_BYTES_MAX`].
//!
//! Not here: what is in them, which firmware reads them.

use serde::{Deserialize, Serialize};

use super::{Result, record::Hash};
use crate::Error;

/// Longest store that is taken, bytes; OVMF's own have 128 KiB or 528 KiB.
pub const VARIABLES_BYTES_MAX: u32 = 4 << 20;

/// Where a firmware volume says that it is one.
const SIGNATURE_AT: usize = 40;
const SIGNATURE: &[u8] = b"_FVH";

/// The store, compressed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UefiVariables {
    /// Bytes it has.
    pub bytes: u32,
    /// BLAKE3 of them.
    pub hash: Hash,
    /// A zstd frame with them, as hexadecimal digits: most of a store is empty.
    pub zstd: String,
}

impl UefiVariables {
    /// Packs the content of a file of a hypervisor; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for what is no raw firmware volume.
    pub fn of(path: &str, content: &[u8]) -> Result<Self> {
        let odd = |what: String| Error::unsupported(path, what);
        if content.get(SIGNATURE_AT..SIGNATURE_AT + SIGNATURE.len()) != Some(SIGNATURE) {
            return Err(odd("it holds no UEFI variables in raw form".to_owned()).into());
        }
        let bytes = u32::try_from(content.len()).ok().filter(|bytes| *bytes <= VARIABLES_BYTES_MAX);
        let bytes = bytes.ok_or_else(|| odd(format!("UEFI variables have at most {VARIABLES_BYTES_MAX} bytes")))?;
        let packed = zstd::bulk::compress(content, 3).map_err(|e| odd(format!("cannot be compressed: {e}")))?;
        let zstd = packed.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { bytes, hash: Hash::of(content), zstd })
    }

    /// The content of the file; `path` is where the record was read, for messages.
    ///
    /// # Errors
    /// [`Error::Corrupt`].
    pub fn content(&self, path: &str) -> Result<Vec<u8>> {
        let bad = |what: &str| Error::corrupt(path, 0, format!("the machine's UEFI variables: {what}"));
        if self.bytes > VARIABLES_BYTES_MAX {
            return Err(bad("more than there can be").into());
        }
        let digits = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        let packed: Option<Vec<u8>> = self.zstd.as_bytes().chunks(2).map(digits).collect();
        let packed = packed.ok_or_else(|| bad("not hexadecimal digits"))?;
        let len = usize::try_from(self.bytes).unwrap_or(usize::MAX);
        let content = zstd::bulk::decompress(&packed, len).map_err(|e| bad(&format!("no zstd frame: {e}")))?;
        if content.len() != len || Hash::of(&content) != self.hash {
            return Err(bad("not what was stored").into());
        }
        Ok(content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> Vec<u8> {
        let mut bytes = vec![0xff; 540_672];
        bytes[SIGNATURE_AT..SIGNATURE_AT + 4].copy_from_slice(SIGNATURE);
        bytes[1000..3000].fill(7);
        bytes
    }

    #[test]
    fn they_come_back_as_they_were() {
        let packed = UefiVariables::of("vars", &volume()).expect("pack");
        assert!(packed.zstd.len() < 2000, "{}", packed.zstd.len());
        assert_eq!(packed.content("point.json").expect("unpack"), volume());
    }

    #[test]
    fn what_is_none_and_what_was_changed_is_refused() {
        assert!(UefiVariables::of("disk", &[0; 4096]).is_err());
        assert!(UefiVariables::of("empty", &[]).is_err());
        let mut large = volume();
        large.resize(VARIABLES_BYTES_MAX as usize + 1, 0);
        assert!(UefiVariables::of("large", &large).is_err());
        let good = UefiVariables::of("vars", &volume()).expect("pack");
        let text = |zstd: &str| UefiVariables { zstd: zstd.to_owned(), ..good.clone() };
        let digits = good.zstd.clone();
        for bad in [
            text("xyz"),
            text(""),
            text(&digits[..digits.len() - 2]),
            UefiVariables { bytes: 540_671, ..good.clone() },
            UefiVariables { bytes: u32::MAX, ..good.clone() },
            UefiVariables { hash: Hash([0; 32]), ..good.clone() },
        ] {
            let error = bad.content("point.json").expect_err("bad");
            assert!(error.to_string().contains("point.json"), "{error}");
        }
    }
}
