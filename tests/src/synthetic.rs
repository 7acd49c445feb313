//! A layer made of whatever a test wants: any grain, runs of every content, blocks that decode
//! slowly, damage in a block or in the table, a source that is away for a while.
//!
//! It is no mock of a format: it is a layer by the letter of the trait, and answers as awkwardly as
//! the trait allows (runs cut short, prefixes no longer than asked for).

use std::{
    collections::BTreeSet,
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use aquifer_formats::{
    BlockRef, Codec, Content, Error, FileSlot, Layer, Result, Storage, raw::next_file_id, scan_by_lookup,
    storage::MemoryStorage,
};
use parking_lot::Mutex;

use crate::oracle::Oracle;

/// What a write leaves in the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Verbatim bytes.
    Plain,
    /// Encoded blocks.
    Packed,
    /// Zeros that hide what is below.
    Zero,
}

/// One write; ranges are rounded out to whole units of the layer.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// Start in bytes; taken modulo the layer's size.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// How it is stored.
    pub kind: Kind,
}

/// How a layer is made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Virtual size in bytes.
    pub size: u64,
    /// Granularity, as a power of two.
    pub grain_log2: u32,
    /// Size of encoded blocks in grains, as a power of two.
    pub block_grains_log2: u32,
    /// Whether block references carry a checksum, which merged maps have no room for.
    pub checked: bool,
    /// Longest run a lookup answers for, in grains.
    pub run_grains_max: u64,
    /// What the layer holds.
    pub writes: Vec<Write>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grain {
    Absent,
    Zero,
    Plain,
    Packed,
}

/// A layer made to order.
#[derive(Debug)]
pub struct Synthetic {
    label: String,
    plan: Plan,
    grains: Vec<Grain>,
    /// Bytes of the disk as this layer would have them, at equal offsets, encoded or not.
    bytes: Arc<dyn Storage>,
    file_id: u64,
    unpacks: AtomicU64,
    scans: AtomicU64,
    takes: Duration,
    bad_blocks: BTreeSet<u64>,
    bad_table: Vec<Range<u64>>,
    wrong_pointer: Option<u64>,
    away: Mutex<u32>,
}

impl Synthetic {
    /// Builds the layer and brings `disk`, the bytes below, to what the layer makes of them.
    /// `salt` makes its bytes differ from every other layer's.
    pub fn build(plan: Plan, salt: u64, disk: &mut Oracle) -> Self {
        let size = usize::try_from(plan.size).expect("a small disk");
        disk.resize(size);
        let grain = 1u64 << plan.grain_log2;
        let mut grains = vec![Grain::Absent; usize::try_from(plan.size.div_ceil(grain)).expect("a small disk")];
        let mut own = vec![0; size];
        for write in &plan.writes {
            let unit = if write.kind == Kind::Packed { grain << plan.block_grains_log2 } else { grain };
            let start = write.offset % plan.size.max(1) / unit * unit;
            let end = (start + write.len.max(1)).next_multiple_of(unit).min(plan.size);
            for index in start / grain..end.div_ceil(grain) {
                grains[usize::try_from(index).expect("small")] = match write.kind {
                    Kind::Plain => Grain::Plain,
                    Kind::Packed => Grain::Packed,
                    Kind::Zero => Grain::Zero,
                };
            }
            for at in start..end {
                own[usize::try_from(at).expect("small")] = byte(salt, at);
            }
        }
        for (index, state) in grains.iter().enumerate() {
            let start = index << plan.grain_log2;
            let end = (start + (1 << plan.grain_log2)).min(size);
            match state {
                Grain::Absent => {}
                Grain::Zero => disk.zero(start, end - start),
                Grain::Plain | Grain::Packed => disk.write(start, &own[start..end]),
            }
        }
        // Blocks decode to whole blocks, past the end of the disk too.
        own.resize(size.next_multiple_of(1 << (plan.grain_log2 + plan.block_grains_log2)), 0xEE);
        let label = format!("layer-{salt}");
        let bytes = Arc::new(MemoryStorage::new(label.clone(), own));
        Self {
            label,
            plan,
            grains,
            bytes,
            file_id: next_file_id(),
            unpacks: AtomicU64::new(0),
            scans: AtomicU64::new(0),
            takes: Duration::ZERO,
            bad_blocks: BTreeSet::new(),
            bad_table: Vec::new(),
            wrong_pointer: None,
            away: Mutex::new(0),
        }
    }

    /// Makes each decode and each scan last at least this long.
    #[must_use]
    pub fn slow(mut self, takes: Duration) -> Self {
        self.takes = takes;
        self
    }

    /// Damages the encoded block that holds `offset`.
    #[must_use]
    pub fn with_bad_block(mut self, offset: u64) -> Self {
        self.bad_blocks.insert(offset / self.block_bytes());
        self
    }

    /// Damages the table for a range: lookups there are errors.
    #[must_use]
    pub fn with_bad_table(mut self, range: Range<u64>) -> Self {
        self.bad_table.push(range);
        self
    }

    /// Points the encoded block that holds `offset` to the stored bytes of block 0.
    #[must_use]
    pub fn with_wrong_pointer(mut self, offset: u64) -> Self {
        self.wrong_pointer = Some(offset / self.block_bytes());
        self
    }

    /// Makes the next `lookups` lookups fail as if the source were away.
    pub fn leave_for(&self, lookups: u32) {
        *self.away.lock() = lookups;
    }

    /// How often a block was decoded.
    pub fn unpacks(&self) -> u64 {
        self.unpacks.load(SeqCst)
    }

    /// How often the table was read for a map.
    pub fn scans(&self) -> u64 {
        self.scans.load(SeqCst)
    }

    /// Size of encoded blocks in bytes.
    pub fn block_bytes(&self) -> u64 {
        1 << (self.plan.grain_log2 + self.plan.block_grains_log2)
    }

    fn state(&self, index: u64) -> Grain {
        self.grains[usize::try_from(index).expect("small")]
    }

    fn content(&self, offset: u64, state: Grain) -> Content {
        let block = self.block_bytes();
        match state {
            Grain::Absent => Content::Absent,
            Grain::Zero => Content::Zero,
            Grain::Plain => Content::Plain { file: 0, offset },
            Grain::Packed => Content::Packed {
                block: BlockRef {
                    offset: if self.wrong_pointer == Some(offset / block) { 0 } else { offset / block * block },
                    logical: offset / block,
                    stored_len: u32::try_from(block).expect("small"),
                    raw_len: u32::try_from(block).expect("small"),
                    check: u32::from(self.plan.checked),
                    file: 0,
                    codec: Codec::Zstd,
                },
                skip: u32::try_from(offset % block).expect("small"),
            },
        }
    }
}

/// The byte a layer has at a place: never zero, and different from layer to layer.
fn byte(salt: u64, at: u64) -> u8 {
    let mixed = (salt.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (at / 7)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    u8::try_from(mixed >> 56).expect("eight bits") | 1
}

impl Layer for Synthetic {
    fn label(&self) -> &str {
        &self.label
    }

    fn size(&self) -> u64 {
        self.plan.size
    }

    fn grain(&self) -> u64 {
        1 << self.plan.grain_log2
    }

    fn lookup(&self, offset: u64, len_max: u64) -> Result<(Content, u64)> {
        assert!(offset < self.plan.size, "the caller's mistake: {offset} of {}", self.plan.size);
        assert!(len_max > 0, "the caller's mistake: nothing asked");
        let mut away = self.away.lock();
        if *away > 0 {
            *away -= 1;
            return Err(Error::io(&self.label, "map", offset, io::ErrorKind::TimedOut.into()));
        }
        drop(away);
        if self.bad_table.iter().any(|bad| bad.contains(&offset)) {
            return Err(Error::corrupt(&self.label, offset, "a bad table"));
        }
        let grain = self.grain();
        let first = offset / grain;
        let state = self.state(first);
        let mut end = first + 1;
        while end < first + self.plan.run_grains_max
            && end < self.grains.len() as u64
            && self.state(end) == state
            && !self.bad_table.iter().any(|bad| bad.contains(&(end * grain)))
        {
            end += 1;
        }
        let mut len = (end * grain).min(self.plan.size) - offset;
        if let Some(bad) = self.bad_table.iter().map(|b| b.start).filter(|b| *b > offset).min() {
            len = len.min(bad - offset);
        }
        if state == Grain::Packed {
            len = len.min(self.block_bytes() - offset % self.block_bytes());
        }
        Ok((self.content(offset, state), len.min(len_max)))
    }

    fn scan(&self, offset: u64, len: u64, each: &mut dyn FnMut(u64, u64, Content)) -> Result<()> {
        self.scans.fetch_add(1, SeqCst);
        std::thread::sleep(self.takes);
        scan_by_lookup(self, offset, len, each)
    }

    fn file(&self, slot: FileSlot) -> Result<&Arc<dyn Storage>> {
        if slot == 0 { Ok(&self.bytes) } else { Err(Error::corrupt(&self.label, 0, "no such file")) }
    }

    fn file_id(&self, _slot: FileSlot) -> u64 {
        self.file_id
    }

    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut print = [0; 32];
        print[..8].copy_from_slice(&self.file_id.to_le_bytes());
        Ok(print)
    }

    fn unpack(&self, block: &BlockRef, need: usize, out: &mut Vec<u8>) -> Result<()> {
        self.unpacks.fetch_add(1, SeqCst);
        std::thread::sleep(self.takes);
        out.clear();
        let damage = |what: &str| Error::BadBlock {
            path: self.label.clone(),
            offset: block.offset,
            len: block.stored_len.into(),
            what: what.into(),
        };
        if self.bad_blocks.contains(&block.logical) {
            return Err(damage("checksum"));
        }
        if block.logical * self.block_bytes() != block.offset {
            return Err(damage("identity"));
        }
        assert!(need <= usize::try_from(block.raw_len).expect("small"), "the caller's mistake: {need} wanted");
        out.resize(need, 0);
        self.bytes.read_at(block.offset, out).map_err(|e| Error::io(&self.label, "read", block.offset, e))
    }
}
