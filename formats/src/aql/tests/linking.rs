//! Layers that stand on a disk of another product.

use super::*;
use crate::{Error, raw::RawLayer};

const GRAIN: usize = 16 << 10;

/// That disk, and how often it was read.
struct Other {
    bytes: Vec<u8>,
    reads: Arc<std::sync::atomic::AtomicU64>,
}

impl Other {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, reads: Arc::default() }
    }

    fn named(&self) -> LinkedDisk {
        let identity = *blake3::hash(&self.bytes).as_bytes();
        LinkedDisk { format: 2, identity, size: self.bytes.len() as u64, live_blocks: 0 }
    }

    fn below(&self) -> Below {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("other.raw", self.bytes.clone()));
        let layer: Arc<dyn Layer> = Arc::new(RawLayer::open(storage.clone()).expect("raw"));
        let reads = self.reads.clone();
        let read = move |at: u64, buf: &mut [u8]| {
            reads.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            storage.read_at(at, buf).map_err(|e| Error::io("other.raw", "read", at, e))
        };
        Below::new(self.named().identity, vec![layer], Arc::new(read))
    }

    fn reads(&self) -> u64 {
        self.reads.swap(0, std::sync::atomic::Ordering::Relaxed)
    }

    /// A layer that leaves every block that is not zeros where it is.
    fn link(&self, chain: &Chain) -> Arc<Reader> {
        let name = chain.next_name();
        let new = NewLayer::full(self.bytes.len() as u64, key());
        let mut writer = Writer::link(chain.storage(&name), new, self.named(), options()).expect("link");
        for (block, bytes) in (0..).zip(self.bytes.chunks(GRAIN)) {
            if bytes.iter().any(|b| *b != 0) {
                writer.linked(block..block + 1).expect("linked");
            }
        }
        writer.finish().expect("finish");
        Arc::new(chain.open(&name).expect("open").over(self.below()).expect("the same disk"))
    }

    fn increment(&self, chain: &mut Chain, parent: &Arc<Reader>, bytes: &[u8]) -> Arc<Reader> {
        let point = chain.increment(parent, bytes, options());
        if point.linked().is_none() {
            return point;
        }
        let name = point.label().to_owned();
        Arc::new(chain.open(&name).expect("open").over(self.below()).expect("the same disk"))
    }
}

/// The disk as a chain would read it.
fn read(reader: &Reader, other: &Other) -> Vec<u8> {
    let mut out = Vec::new();
    while (out.len() as u64) < reader.size() {
        let at = out.len();
        let (content, n) = reader.lookup(at as u64, reader.size()).expect("lookup");
        let n = usize::try_from(n).expect("small");
        if content == Content::Absent {
            let end = (at + n).min(other.bytes.len());
            out.extend_from_slice(&other.bytes[at.min(end)..end]);
            out.resize(at + n, 0);
        } else {
            out.resize(at + n, 0);
            read_into(reader, at as u64, &mut out[at..]).expect("read");
        }
    }
    out
}

#[test]
fn a_point_on_another_disk_copies_nothing_and_the_next_stores_only_what_differs() {
    let mut chain = Chain::new();
    let other = Other::new(pattern(3, 700 * GRAIN + 512));
    let link = other.link(&chain);
    assert_eq!(link.stats().blocks_written, 0);
    assert!(link.file_bytes() < 64 << 10, "{}", link.file_bytes());
    assert_eq!(read(&link, &other), other.bytes);
    assert_eq!(other.reads(), 0);

    let mut bytes = other.bytes.clone();
    bytes[5 * GRAIN + 7] ^= 1;
    bytes[9 * GRAIN..11 * GRAIN].fill(0);
    let first = other.increment(&mut chain, &link, &bytes);
    assert_eq!(first.stats().blocks_written, 1, "{:?}", first.stats());
    assert_eq!(read(&first, &other), bytes);
    assert!(other.reads() > 0, "what nobody had read is compared by its bytes");
    let changed: u64 = delta(&link, &first).expect("delta").iter().map(|range| range.end - range.start).sum();
    assert!(changed <= 3 * GRAIN as u64, "{changed}");

    bytes[20 * GRAIN] ^= 1;
    let second = other.increment(&mut chain, &first, &bytes);
    assert_eq!((second.stats().blocks_written, other.reads()), (1, 0), "by content ids now");
    assert_eq!(read(&second, &other), bytes);
    let place = 20 * GRAIN as u64;
    assert_eq!(delta(&first, &second).expect("delta"), vec![place..place + GRAIN as u64]);
    let findings = verify(&second, Depth::Deep(Some(key()))).collect::<Vec<_>>();
    assert!(findings.iter().all(|found| found.damage.is_empty()), "{findings:?}");

    // Merged: what was left in the other disk is stored, and it is needed no more.
    let mut new = NewLayer::increment(second.clone(), second.label(), key());
    new.virtual_size = bytes.len() as u64;
    let whole = chain.point(new, options(), |writer| writer.take_over_linked().expect("take over"));
    assert_eq!(whole.linked(), None);
    assert_eq!(read_all(&whole), bytes);
    assert_eq!(delta(&second, &whole).expect("delta"), vec![]);
}

#[test]
fn without_the_other_disk_or_over_a_changed_one_nothing_is_read_as_zeros() {
    let chain = Chain::new();
    let other = Other::new(pattern(5, 40 * GRAIN));
    let name = other.link(&chain).label().to_owned();
    let alone = chain.open(&name).expect("open");
    let mut buf = [0; 512];
    let error = read_into(&alone, 0, &mut buf).expect_err("nothing is at hand");
    assert!(error.to_string().contains("another product"), "{error}");
    let mut changed = Other::new(other.bytes.clone());
    changed.bytes[0] ^= 1;
    let error = alone.over(changed.below()).expect_err("another disk");
    assert!(matches!(error, Error::ChainBroken { .. }), "{error}");
}

#[test]
fn verify_finds_a_changed_byte_of_the_other_disk_once_its_block_was_read() {
    let mut chain = Chain::new();
    let mut other = Other::new(pattern(9, 40 * GRAIN));
    let link = other.link(&chain);
    let bytes = other.bytes.clone();
    let name = other.increment(&mut chain, &link, &bytes).label().to_owned();
    let identity = other.named().identity;
    let place = other.bytes.iter().position(|b| *b != 0).expect("data");
    other.bytes[place] ^= 4;
    let below = other.below_as(identity);
    let point = chain.open(&name).expect("open").over(below).expect("it claims to be the same");
    let damage = verify(&point, Depth::Deep(Some(key()))).flat_map(|found| found.damage).collect::<Vec<_>>();
    assert_eq!(damage.len(), 1, "{damage:?}");
}

impl Other {
    fn below_as(&self, identity: [u8; 32]) -> Below {
        let below = self.below();
        let layers = below.layers().to_vec();
        let storage = layers[0].file(0).expect("its file").clone();
        let read =
            move |at: u64, buf: &mut [u8]| storage.read_at(at, buf).map_err(|e| Error::io("other.raw", "read", at, e));
        Below::new(identity, layers, Arc::new(read))
    }
}

#[test]
fn random_increments_of_changing_sizes_read_as_a_vec() {
    for seed in 1..=u64::from(12 * scale()) {
        let mut chain = Chain::new();
        let mut state = seed;
        let mut roll = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from((state >> 33) % below).expect("small")
        };
        let other = Other::new(pattern(seed, GRAIN * (1 + roll(300)) + 512 * roll(32)));
        let mut points = vec![(other.link(&chain), other.bytes.clone())];
        for _ in 0..4 {
            let (parent, mut bytes) = points.last().expect("one").clone();
            if roll(3) == 0 {
                bytes.resize((bytes.len() / 512 + 1).saturating_sub(roll(200)).max(1) * 512 + 512 * roll(200), 0);
            }
            for _ in 0..roll(6) {
                let at = roll(bytes.len() as u64);
                let end = (at + 1 + roll(3 * GRAIN as u64)).min(bytes.len());
                let with = u8::try_from(roll(3)).expect("small");
                bytes[at..end].fill(with);
            }
            let point = other.increment(&mut chain, &parent, &bytes);
            assert!(read(&point, &other) == bytes, "seed {seed}");
            for (old, was) in &points {
                let found = delta(old, &point).expect("delta");
                for (at, byte) in bytes.iter().enumerate() {
                    if *byte != was.get(at).copied().unwrap_or(0) {
                        let at = at as u64;
                        assert!(found.iter().any(|range| range.contains(&at)), "seed {seed}: {at} was missed");
                    }
                }
            }
            points.push((point, bytes));
        }
        let (last, bytes) = points.last().expect("one").clone();
        let mut new = NewLayer::increment(last.clone(), last.label(), key());
        new.virtual_size = bytes.len() as u64;
        let whole = chain.point(new, options(), |writer| writer.take_over_linked().expect("take over"));
        assert!(whole.linked().is_none() && read_all(&whole) == bytes, "seed {seed}");
    }
}

#[test]
fn an_interrupted_link_is_known_and_not_gone_on_with() {
    let chain = Chain::new();
    let other = Other::new(pattern(3, 40 * GRAIN));
    let new = NewLayer::full(other.bytes.len() as u64, key());
    let mut writer = Writer::link(chain.storage("torn"), new, other.named(), options()).expect("link");
    writer.linked(0..3).expect("linked");
    writer.mark().expect("mark");
    drop(writer);
    assert!(is_link(chain.storage("torn").as_ref()).expect("look"));
    assert!(Writer::resume(chain.storage("torn"), None, key(), options()).is_err());
    let full = chain.storage("full");
    drop(Writer::create(full.clone(), NewLayer::full(4096, key()), options()).expect("create"));
    assert!(!is_link(full.as_ref()).expect("look"));
}
