//! Tests of the native layer: writer against reader, with a `Vec<u8>` as the oracle.

use super::*;
use crate::{Content, Layer, Storage, storage::MemoryStorage};

mod support;

use support::{Chain, options, pattern, read_all};

#[test]
fn a_full_reads_back() {
    let mut chain = Chain::new();
    let bytes = pattern(1, 300_000);
    let point = chain.full(&bytes, options());
    assert_eq!(read_all(&point), bytes);
    assert_eq!(point.size(), 300_000);
}

#[test]
fn an_increment_stores_only_what_changed() {
    let mut chain = Chain::new();
    let mut bytes = pattern(1, 1 << 20);
    let first = chain.full(&bytes, options());
    bytes[100_000] ^= 1;
    let second = chain.increment(&first, &bytes, options());
    assert_eq!(read_all(&second), bytes);
    let stats = second.stats();
    assert_eq!((stats.blocks_written, stats.blocks_unchanged), (1, stats.blocks_given - 1));
    let third = chain.increment(&second, &bytes, options());
    assert_eq!(third.stats().blocks_written, 0);
    assert_eq!(read_all(&third), bytes);
    assert_eq!(delta(&second, &third).expect("delta"), vec![]);
    let grain = u64::from(second.block_bytes());
    let start = 100_000 / grain * grain;
    assert_eq!(delta(&first, &third).expect("delta"), vec![start..start + grain]);
}
