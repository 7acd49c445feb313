//! Decoded blocks under one byte budget, shared by all exports of a process.

/// Cache of decoded blocks.
#[derive(Debug)]
pub struct BlockCache {
    bytes_max: u64,
}

impl BlockCache {
    /// A cache that keeps at most `bytes_max` bytes of decoded blocks.
    pub fn new(bytes_max: u64) -> Self {
        Self { bytes_max }
    }

    /// The budget in bytes.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }
}
