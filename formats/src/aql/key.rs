//! The key under which content ids are made.
//!
//! Invariants
//! - Ids of one key say nothing about equality to anybody without it, so no outsider can ask a
//!   repository whether it holds a known block.
//! - The key itself is written to no layer file; a file names it by a digest, so that ids of different
//!   keys are never compared.

use std::fmt;

use crate::{Error, Result};

/// Content id of a block: the first 16 bytes of keyed BLAKE3 over its decoded bytes.
pub(crate) type ContentId = [u8; 16];

/// Id of a block of zeros, which is never hashed.
pub(crate) const ZERO_ID: ContentId = [0; 16];
/// Id of a block that is known to be lost, or lies in a foreign file and was never read: equal to nothing, not even itself.
pub(crate) const LOST_ID: ContentId = [0xFF; 16];

/// A repository's secret for content ids.
#[derive(Clone, PartialEq, Eq)]
pub struct ContentKey([u8; 32]);

impl ContentKey {
    /// Takes the 32 bytes as the key.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// A new random key.
    pub fn generate() -> Self {
        // Two random UUIDs hold 244 random bits from the operating system; hashing spreads them.
        let mut hash = blake3::Hasher::new_derive_key("aquifer 2026 content key");
        hash.update(uuid::Uuid::new_v4().as_bytes()).update(uuid::Uuid::new_v4().as_bytes());
        hash.update(uuid::Uuid::new_v4().as_bytes());
        Self(*hash.finalize().as_bytes())
    }

    /// As 64 hexadecimal digits.
    pub fn to_hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    /// From 64 hexadecimal digits; `path` is where they were read, for the message.
    ///
    /// # Errors
    /// [`Error::Key`] for anything else.
    pub fn from_hex(path: &str, text: &str) -> Result<Self> {
        let hash = blake3::Hash::from_hex(text).map_err(|e| Error::Key {
            path: path.into(),
            what: format!("the content key is not 64 hex digits: {e}"),
        })?;
        Ok(Self(*hash.as_bytes()))
    }

    /// What a file says about its key.
    pub fn domain(&self) -> [u8; 16] {
        let mut hash = blake3::Hasher::new_derive_key("aquifer 2026 content id domain");
        hash.update(&self.0);
        first_16(&hash.finalize())
    }

    pub(crate) fn id(&self, bytes: &[u8]) -> ContentId {
        first_16(&blake3::keyed_hash(&self.0, bytes))
    }
}

fn first_16(hash: &blake3::Hash) -> [u8; 16] {
    let mut out = [0; 16];
    out.iter_mut().zip(hash.as_bytes()).for_each(|(to, from)| *to = *from);
    out
}

impl fmt::Debug for ContentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ContentKey(..)")
    }
}
