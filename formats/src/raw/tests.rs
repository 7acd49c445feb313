//! Holes by the grain, on files that map in smaller units than that.

use std::io;

use super::*;
use crate::storage::MemoryStorage;

/// Bytes in memory of which only some ranges count as stored.
#[derive(Debug)]
struct Sparse {
    inner: MemoryStorage,
    stored: Vec<(u64, u64)>,
}

impl Storage for Sparse {
    fn label(&self) -> &str {
        "sparse"
    }

    fn identity(&self) -> Option<u64> {
        self.inner.identity()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(offset, buf)
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.inner.read_now(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.inner.write_at(offset, buf)
    }

    fn allocated(&self, offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
        let until = |to: u64| (to - offset).min(len_max);
        for (from, to) in &self.stored {
            if offset < *from {
                return Ok((false, until(*from)));
            }
            if offset < *to {
                return Ok((true, until(*to)));
            }
        }
        Ok((false, len_max))
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.punch(offset, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn reserve(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn start_writeback(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn forget_cached(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

fn layer(size: usize, stored: &[(u64, u64)]) -> RawLayer {
    let inner = MemoryStorage::new("m", vec![0; size]);
    RawLayer::open(Arc::new(Sparse { inner, stored: stored.to_vec() })).expect("opens")
}

fn runs(layer: &RawLayer, mut at: u64) -> Vec<(u64, u64, bool)> {
    let mut runs = Vec::new();
    while at < layer.size() {
        let (content, len) = layer.lookup(at, u64::MAX).expect("lookup");
        runs.push((at, len, content != Content::Zero));
        at += len;
    }
    runs
}

#[test]
fn a_grain_with_any_byte_in_it_is_stored() {
    let k = 1024;
    let layer = layer(41_000, &[(5 * k, 6 * k), (7 * k, 9 * k), (20 * k, 24 * k), (40_960, 41_000)]);
    let all = [(0, 4096, false), (4096, 8192, true), (12_288, 8192, false), (20_480, 4096, true)];
    let tail = [(24_576, 16_384, false), (40_960, 40, true)];
    assert_eq!(runs(&layer, 0).iter().filter(|r| !r.2).count(), 3);
    let mut told = Vec::new();
    layer.scan(0, u64::MAX, &mut |at, len, what| told.push((at, len, what != Content::Zero))).expect("scan");
    // Runs may be told in parts; joined they are these.
    let mut joined: Vec<(u64, u64, bool)> = Vec::new();
    for (at, len, stored) in told {
        match joined.last_mut() {
            Some(last) if last.2 == stored && last.0 + last.1 == at => last.1 += len,
            _ => joined.push((at, len, stored)),
        }
    }
    assert_eq!(joined, [&all[..], &tail[..]].concat());
}

#[test]
fn answers_are_the_same_from_inside_a_grain() {
    let layer = layer(16_384, &[(5000, 5100)]);
    for at in [4096, 4999, 5000, 5099, 5100, 8191] {
        let (content, len) = layer.lookup(at, u64::MAX).expect("lookup");
        assert_eq!((content, len), (Content::Plain { file: 0, offset: at }, 8192 - at), "at {at}");
    }
    assert_eq!(layer.lookup(4095, 1).expect("lookup"), (Content::Zero, 1));
    assert_eq!(layer.lookup(4096, 10).expect("lookup"), (Content::Plain { file: 0, offset: 4096 }, 10));
    assert_eq!(layer.lookup(8192, 10).expect("lookup"), (Content::Zero, 10));
    assert!(layer.lookup(16_384, 1).is_err());
    assert!(layer.lookup(0, 0).is_err());
}
