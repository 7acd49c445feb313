//! A world of layers in memory, and readers over it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use super::*;
use crate::Error;

/// Layers in memory, found by name.
#[derive(Clone, Default)]
pub(super) struct Chain {
    pub(super) files: Arc<Mutex<BTreeMap<String, Arc<dyn Storage>>>>,
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
        let make = || Arc::new(MemoryStorage::new(name, Vec::new())) as Arc<dyn Storage>;
        Arc::clone(files.entry(name.to_owned()).or_insert_with(make))
    }

    pub(super) fn resolver(&self) -> Resolver {
        let files = Arc::clone(&self.files);
        Resolver::custom("memory", move |name| {
            let files = files.lock().expect("lock");
            let missing = || Error::ChainBroken { path: name.hint.into(), what: "missing".into() };
            files.get(name.hint).cloned().ok_or_else(missing)
        })
    }

    pub(super) fn open(&self, name: &str) -> crate::Result<Reader> {
        Reader::open(self.storage(name), self.resolver())
    }

    pub(super) fn next_name(&self) -> String {
        format!("{:04}.aql", self.files.lock().expect("lock").len())
    }

    pub(super) fn full(&mut self, bytes: &[u8], options: WriterOptions) -> Arc<Reader> {
        let name = self.next_name();
        let new = NewLayer::full(bytes.len() as u64, key());
        let mut writer = Writer::create(self.storage(&name), new, options).expect("create");
        writer.put(0, bytes).expect("put");
        writer.finish().expect("finish");
        Arc::new(self.open(&name).expect("open"))
    }

    /// An increment on the newest file of `parent`, given whole.
    pub(super) fn increment(&mut self, parent: &Arc<Reader>, bytes: &[u8], options: WriterOptions) -> Arc<Reader> {
        let name = self.next_name();
        let mut new = NewLayer::increment(Arc::clone(parent), parent.label(), key());
        new.virtual_size = bytes.len() as u64;
        let mut writer = Writer::create(self.storage(&name), new, options).expect("create");
        writer.put(0, bytes).expect("put");
        writer.finish().expect("finish");
        Arc::new(self.open(&name).expect("open"))
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
