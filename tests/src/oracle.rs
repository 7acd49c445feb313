//! The plain truth about a disk: its bytes in a vector, changed one obvious way.
//!
//! Not here: anything clever. What is compared with this must not share code with it.

/// A disk as a vector.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Oracle {
    bytes: Vec<u8>,
}

impl Oracle {
    /// A disk of zeros.
    pub fn new(size: usize) -> Self {
        Self { bytes: vec![0; size] }
    }

    /// A disk of these bytes.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Size in bytes.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Cuts, or extends with zeros.
    pub fn resize(&mut self, size: usize) {
        self.bytes.resize(size, 0);
    }

    /// Writes `bytes` at `offset`, as far as the disk goes.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        let end = (offset + bytes.len()).min(self.bytes.len());
        if offset < end {
            self.bytes[offset..end].copy_from_slice(&bytes[..end - offset]);
        }
    }

    /// Makes a range zero, as far as the disk goes.
    pub fn zero(&mut self, offset: usize, len: usize) {
        let end = (offset + len).min(self.bytes.len());
        if offset < end {
            self.bytes[offset..end].fill(0);
        }
    }

    /// The bytes of a range.
    pub fn read(&self, offset: usize, len: usize) -> &[u8] {
        &self.bytes[offset..offset + len]
    }
}

/// Cases of a property test: `default`, times `AQUIFER_TEST_SCALE` for the long form.
pub fn cases(default: u32) -> u32 {
    let scale = std::env::var("AQUIFER_TEST_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    default.saturating_mul(scale)
}

/// The first seed of what is random: 1, or `AQUIFER_TEST_SEED`, so that a long form can be run in parts that differ.
pub fn first_seed() -> u64 {
    std::env::var("AQUIFER_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}
