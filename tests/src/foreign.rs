//! Disks of other products: writers for what no tool here makes, and a comparison with an oracle that
//! does not take a disk's whole size in memory.

pub mod benji;
pub mod deep;
pub mod hyperv;
pub mod longhorn;
pub mod pbs;
pub mod peers;
pub mod pypi;
pub mod vbk;
pub mod virtnbd;
pub mod vma;
pub mod vmdk;
pub mod xo;
pub mod xva;

use std::{path::Path, sync::Arc};

use aquifer_formats::{
    Content, Layer, Storage,
    storage::{Access, FileStorage},
};
use aquifer_vdisk::Chain;

use crate::rng::Rng;

/// Most bytes that are compared at once.
const STEP: u64 = 1 << 20;

/// Compares the whole disk with the raw image at `truth`: what either of them stores is read from both,
/// what neither stores is known to be zeros. Returns how many bytes were read.
///
/// # Panics
/// They differ.
pub fn assert_same(chain: &Chain, truth: &Path, what: &str) -> u64 {
    let truth = FileStorage::open(truth, Access::ReadOnly).expect("the oracle's image");
    assert_eq!(chain.size(), truth.len().expect("a length"), "{what}: size");
    let (mut at, mut compared) = (0, 0);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    while at < chain.size() {
        let (_, content, len) = chain.resolve(at, chain.size() - at).unwrap_or_else(|e| panic!("{what}: at {at}: {e}"));
        let (stored, theirs_len) = truth.allocated(at, len).expect("a map");
        let mut len = len.min(theirs_len);
        if stored || !matches!(content, Content::Absent | Content::Zero) {
            len = len.min(STEP);
            ours.resize(len as usize, 0xee);
            theirs.resize(len as usize, 0);
            chain.read(at, &mut ours).unwrap_or_else(|e| panic!("{what}: at {at}: {e}"));
            truth.read_at(at, &mut theirs).expect("the oracle's image");
            if let Some(first) = ours.iter().zip(&theirs).position(|(a, b)| a != b) {
                let end = (first + 16).min(ours.len());
                let place = at + first as u64;
                panic!("{what}: at {place} ours {:x?}, the oracle's {:x?}", &ours[first..end], &theirs[first..end]);
            }
            compared += len;
        }
        at += len;
    }
    compared
}

/// Reads of any length at any place give what one read of everything gives; scans tell what lookups do.
///
/// # Panics
/// They do not.
pub fn check_reads(chain: &Chain, rng: &mut Rng) {
    for _ in 0..60 {
        let at = rng.below(chain.size());
        let len = (1 + rng.below(200_000)).min(chain.size() - at);
        let mut once = vec![0xee; len as usize];
        chain.read(at, &mut once).expect("a good chain");
        let mut parts = vec![0xdd; len as usize];
        for (number, part) in parts.chunks_mut(7001).enumerate() {
            chain.read(at + 7001 * number as u64, part).expect("a good chain");
        }
        assert!(once == parts, "{at}+{len}");
    }
    for layer in chain.layers() {
        check_scan(layer.as_ref(), rng);
    }
}

/// `scan` tells what `lookup` tells, from any place.
fn check_scan(layer: &dyn Layer, rng: &mut Rng) {
    let size = layer.size();
    let (from, mut told) = (rng.below(size), Vec::new());
    layer.scan(from, size, &mut |at, len, what| told.push((at, len, what))).expect("scan");
    let (mut at, mut looked) = (from, Vec::new());
    while at < size {
        let (content, len) = layer.lookup(at, size - at).expect("lookup");
        if content != Content::Absent {
            looked.push((at, len, content));
        }
        at += len;
    }
    assert_eq!(told, looked, "{} from {from}", layer.label());
}

/// Reads every page of a chain: its layers, how often they were asked by the first read, and by all others.
///
/// # Panics
/// The chain cannot be read.
pub fn asked(chain: &Chain) -> (u64, u64, u64) {
    let asked = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted =
        chain.layers().iter().map(|layer| -> Arc<dyn Layer> { Arc::new(Counted::new(layer.clone(), asked.clone())) });
    let chain = Chain::new(counted.collect(), Arc::new(aquifer_vdisk::BlockCache::new(1 << 20))).expect("a chain");
    let mut page = vec![0; 4096];
    chain.read(0, &mut page).expect("a good chain");
    let first = asked.swap(0, std::sync::atomic::Ordering::Relaxed);
    for at in (0..chain.size()).step_by(4096) {
        let len = page.len().min((chain.size() - at) as usize);
        chain.read(at, &mut page[..len]).expect("a good chain");
    }
    (chain.layers().len() as u64, first, asked.load(std::sync::atomic::Ordering::Relaxed))
}

/// A layer that counts what it is asked.
#[derive(Debug)]
pub struct Counted {
    inner: Arc<dyn Layer>,
    asked: Arc<std::sync::atomic::AtomicU64>,
}

impl Counted {
    /// Counts every question to `inner` in `asked`.
    pub fn new(inner: Arc<dyn Layer>, asked: Arc<std::sync::atomic::AtomicU64>) -> Self {
        Self { inner, asked }
    }

    fn count(&self) -> &dyn Layer {
        self.asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.inner.as_ref()
    }
}

impl Layer for Counted {
    fn label(&self) -> &str {
        self.inner.label()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn grain(&self) -> u64 {
        self.inner.grain()
    }

    fn lookup(&self, offset: u64, len_max: u64) -> aquifer_formats::Result<(Content, u64)> {
        self.count().lookup(offset, len_max)
    }

    fn scan(&self, offset: u64, len: u64, each: &mut dyn FnMut(u64, u64, Content)) -> aquifer_formats::Result<()> {
        self.count().scan(offset, len, each)
    }

    fn file(&self, slot: aquifer_formats::FileSlot) -> aquifer_formats::Result<&Arc<dyn Storage>> {
        self.inner.file(slot)
    }

    fn file_id(&self, slot: aquifer_formats::FileSlot) -> u64 {
        self.inner.file_id(slot)
    }

    fn fingerprint(&self) -> aquifer_formats::Result<[u8; 32]> {
        self.inner.fingerprint()
    }

    fn unpack(&self, block: &aquifer_formats::BlockRef, need: usize, out: &mut Vec<u8>) -> aquifer_formats::Result<()> {
        self.count().unpack(block, need, out)
    }
}
