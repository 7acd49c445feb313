//! A world of layers in memory, and readers over it.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use super::*;
use crate::Error;

/// Layers in memory, found by name.
#[derive(Clone, Default)]
pub(super) struct Chain {
    pub(super) files: Arc<Mutex<BTreeMap<String, Arc<dyn Storage>>>>,
    named: Arc<AtomicU64>,
    opened: Arc<AtomicU64>,
    reads: Arc<AtomicU64>,
}

/// Counts reads; writes and syncs fail once there have been too many.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) inner: MemoryStorage,
    pub(super) reads: Arc<AtomicU64>,
    /// Writes and syncs that still succeed.
    pub(super) left: AtomicI64,
}

impl Counted {
    pub(super) fn failing_after(writes: i64) -> Self {
        let inner = MemoryStorage::new("failing.aql", Vec::new());
        Self { inner, reads: Arc::default(), left: AtomicI64::new(writes) }
    }

    fn spend(&self) -> io::Result<()> {
        let left = self.left.fetch_sub(1, Ordering::SeqCst);
        if left > 0 { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
    }
}

impl Storage for Counted {
    fn label(&self) -> &str {
        self.inner.label()
    }

    fn identity(&self) -> Option<u64> {
        self.inner.identity()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.read_at(offset, buf)
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.inner.read_now(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.spend()?;
        self.inner.write_at(offset, buf)
    }

    fn allocated(&self, offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
        self.inner.allocated(offset, len_max)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.punch(offset, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.reserve(offset, len)
    }

    fn start_writeback(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.start_writeback(offset, len)
    }

    fn forget_cached(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.forget_cached(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.spend()?;
        self.inner.sync()
    }
}

pub(super) fn key() -> ContentKey {
    ContentKey::new([7; 32])
}

/// Small blocks, no threads.
pub(super) fn options() -> WriterOptions {
    WriterOptions { block_log2: 14, threads: 0, dedupe_bytes: 1 << 20, ..WriterOptions::default() }
}

/// Bytes that compress somewhat and differ by seed; a third of the blocks repeat, some are zero.
pub(super) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(len + 4096);
    while out.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let kind = state >> 60;
        let run = 4096;
        match kind {
            0..=2 => out.resize(out.len() + run, 0),
            3..=5 => out.resize(out.len() + run, kind as u8),
            6..=9 => out.extend((0..run as u64).map(|i| (i.wrapping_mul(state >> 40) & 0x1F).to_le_bytes()[0])),
            _ => {
                for _ in 0..run / 8 {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    out.extend_from_slice(&state.to_le_bytes());
                }
            }
        }
    }
    out.truncate(len);
    out
}

impl Chain {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn storage(&self, name: &str) -> Arc<dyn Storage> {
        let mut files = self.files.lock().expect("lock");
        let make = || -> Arc<dyn Storage> {
            let inner = MemoryStorage::new(name, Vec::new());
            Arc::new(Counted { inner, reads: Arc::clone(&self.reads), left: AtomicI64::new(i64::MAX) })
        };
        Arc::clone(files.entry(name.to_owned()).or_insert_with(make))
    }

    pub(super) fn resolver(&self) -> Resolver {
        let (files, opened) = (Arc::clone(&self.files), Arc::clone(&self.opened));
        Resolver::custom("memory", move |name| {
            opened.fetch_add(1, Ordering::Relaxed);
            let files = files.lock().expect("lock");
            let missing = || Error::ChainBroken { path: name.hint.into(), what: "missing".into() };
            files.get(name.hint).cloned().ok_or_else(missing)
        })
    }

    pub(super) fn open(&self, name: &str) -> crate::Result<Reader> {
        Reader::open(self.storage(name), self.resolver())
    }

    pub(super) fn next_name(&self) -> String {
        format!("{:04}.aql", self.named.fetch_add(1, Ordering::Relaxed))
    }

    /// Reads and opened files while `f` runs.
    pub(super) fn count(&self, f: impl FnOnce()) -> (u64, u64) {
        let now = || (self.reads.load(Ordering::Relaxed), self.opened.load(Ordering::Relaxed));
        let before = now();
        f();
        (now().0 - before.0, now().1 - before.1)
    }

    /// Writes a point into the next file.
    pub(super) fn point(
        &mut self,
        new: NewLayer,
        options: WriterOptions,
        give: impl FnOnce(&mut Writer),
    ) -> Arc<Reader> {
        let name = self.next_name();
        let mut writer = Writer::create(self.storage(&name), new, options).expect("create");
        give(&mut writer);
        writer.finish().expect("finish");
        Arc::new(self.open(&name).expect("open"))
    }

    pub(super) fn full(&mut self, bytes: &[u8], options: WriterOptions) -> Arc<Reader> {
        let new = NewLayer::full(bytes.len() as u64, key());
        self.point(new, options, |writer| writer.put(0, bytes).expect("put"))
    }

    /// An increment on `parent`, given whole.
    pub(super) fn increment(&mut self, parent: &Arc<Reader>, bytes: &[u8], options: WriterOptions) -> Arc<Reader> {
        let mut new = NewLayer::increment(Arc::clone(parent), parent.label(), key());
        new.virtual_size = bytes.len() as u64;
        self.point(new, options, |writer| writer.put(0, bytes).expect("put"))
    }
}

/// The whole disk, as a chain would read it.
pub(super) fn read_all(reader: &Reader) -> Vec<u8> {
    let mut out = vec![0; usize::try_from(reader.size()).expect("small")];
    read_into(reader, 0, &mut out).expect("read");
    out
}

pub(super) fn read_into(reader: &Reader, offset: u64, out: &mut [u8]) -> crate::Result<()> {
    let mut at = 0;
    let mut block_bytes = Vec::new();
    while at < out.len() {
        let (content, n) = reader.lookup(offset + at as u64, (out.len() - at) as u64)?;
        let n = usize::try_from(n).expect("small");
        let part = &mut out[at..at + n];
        match content {
            Content::Zero => part.fill(0),
            Content::Packed { block, skip } => {
                let skip = skip as usize;
                reader.unpack(&block, skip + n, &mut block_bytes)?;
                part.copy_from_slice(&block_bytes[skip..skip + n]);
            }
            other => panic!("{other:?}"),
        }
        at += n;
    }
    Ok(())
}
