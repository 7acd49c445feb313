//! The states of blocks in memory, 1 MiB of disk (a region, 256 blocks) at a time.
//!
//! ```text
//! region r  ->  stripe r % 64, one lock each:   uniform[r / 64]   one byte: both states, all 256 blocks alike
//!                                               mixed[r]          a Region: both lines, bits, pages
//! ```
//!
//! Invariants
//! - `ram` is what readers are told. `durable` is what recovery may find: it is changed only after the
//!   record or map page that says so is durable, except for `Hydrated`, which is set just before the
//!   sync that precedes the map page (so a guest write that comes in between is held back in memory).
//! - A block has a page only while its newest bytes may not, or need not yet, be in `disk.raw`.
//! - `pending` holds exactly the blocks whose newest change no journal record carries.
//! - Without pages and bits, a region whose two lines are uniform takes one byte: a disk of 1 TiB
//!   costs 1 MiB when untouched or fully hydrated.
//!
//! Not here: I/O, and who may lock what when.

use std::{collections::HashMap, sync::Arc};

/// Unit of the overlay's map, in bytes.
pub const OVERLAY_BLOCK_BYTES: u64 = 4096;

/// Blocks of a region.
pub(super) const REGION_BLOCKS: u64 = 256;
/// Bytes of a region.
pub(super) const REGION_BYTES: u64 = REGION_BLOCKS * OVERLAY_BLOCK_BYTES;
/// Locks over all regions. Neighbouring regions never share one.
pub(super) const STRIPES: u32 = 64;
const LINE_WORDS: usize = 8;
const MIXED: u8 = 0xFF;

/// Bytes of one block that are not, or not only, in `disk.raw`.
pub(super) type Page = [u8; 4096];

/// State of one block. The numbers are those of the map file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum BlockState {
    /// Nobody has filled or written it: the chain answers.
    Absent = 0,
    /// A copy of the chain's block, in `disk.raw`.
    Hydrated = 1,
    /// The guest's bytes.
    Written = 2,
    /// Zeros, because the guest said so.
    Trimmed = 3,
}

impl BlockState {
    fn from_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Absent,
            1 => Self::Hydrated,
            2 => Self::Written,
            _ => Self::Trimmed,
        }
    }

    /// Index into counters.
    pub(super) fn index(self) -> usize {
        usize::from(self as u8)
    }
}

/// The states of a region's blocks, 2 bits each, as in the map file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line([u64; LINE_WORDS]);

/// Length of a [`Line`] in the map file.
pub(super) const LINE_BYTES: usize = LINE_WORDS * 8;

impl Line {
    pub(super) fn uniform(state: BlockState) -> Self {
        Self([u64::from(state as u8) * 0x5555_5555_5555_5555; LINE_WORDS])
    }

    pub(super) fn get(&self, block: usize) -> BlockState {
        BlockState::from_bits(self.0.get(block / 32).map_or(0, |word| word >> (block % 32 * 2)))
    }

    pub(super) fn set(&mut self, block: usize, state: BlockState) {
        if let Some(word) = self.0.get_mut(block / 32) {
            let shift = block % 32 * 2;
            *word = *word & !(3 << shift) | u64::from(state as u8) << shift;
        }
    }

    pub(super) fn as_uniform(&self) -> Option<BlockState> {
        let state = self.get(0);
        (*self == Self::uniform(state)).then_some(state)
    }

    pub(super) fn to_bytes(self) -> [u8; LINE_BYTES] {
        let mut out = [0; LINE_BYTES];
        for (word, bytes) in self.0.iter().zip(out.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        let mut out = Self([0; LINE_WORDS]);
        for (word, bytes) in out.0.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        }
        out
    }
}

/// One bit for each block of a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bits([u64; 4]);

impl Bits {
    pub(super) fn get(&self, block: usize) -> bool {
        self.0.get(block / 64).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    pub(super) fn insert(&mut self, block: usize) {
        if let Some(word) = self.0.get_mut(block / 64) {
            *word |= 1 << (block % 64);
        }
    }

    pub(super) fn remove(&mut self, block: usize) {
        if let Some(word) = self.0.get_mut(block / 64) {
            *word &= !(1 << (block % 64));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    /// The blocks in the set, in order.
    pub(super) fn iter(self) -> impl Iterator<Item = usize> {
        self.0.into_iter().enumerate().flat_map(|(index, word)| {
            let mut left = word;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
                left &= left - 1;
                Some(index * 64 + bit)
            })
        })
    }

    /// Runs of neighbouring blocks as `(first, count)`.
    pub(super) fn runs(self) -> impl Iterator<Item = (usize, usize)> {
        let mut blocks = self.iter().peekable();
        std::iter::from_fn(move || {
            let first = blocks.next()?;
            let mut count = 1;
            while blocks.next_if_eq(&(first + count)).is_some() {
                count += 1;
            }
            Some((first, count))
        })
    }
}

/// All that is known of a region whose blocks differ.
#[derive(Debug)]
pub(super) struct Region {
    /// What readers are told.
    pub(super) ram: Line,
    /// What recovery may find.
    pub(super) durable: Line,
    /// Blocks whose newest change no journal record carries.
    pub(super) pending: Bits,
    /// Those of them that are in place and known to be durable there; see `paid`.
    pub(super) synced: Bits,
    /// Trimmed blocks of which `disk.raw` may still hold bytes.
    pub(super) unpunched: Bits,
    /// Trimmed blocks whose space is to stay reserved.
    pub(super) keep: Bits,
    /// Number of the write that pays, if nothing has changed since; see `paid`.
    pub(super) paid_by: u64,
    /// Newest bytes of blocks, in order of the block.
    pages: Vec<(u8, Arc<Page>)>,
}

impl Region {
    fn uniform(ram: BlockState, durable: BlockState) -> Self {
        Self {
            ram: Line::uniform(ram),
            durable: Line::uniform(durable),
            pending: Bits::default(),
            synced: Bits::default(),
            unpunched: Bits::default(),
            keep: Bits::default(),
            paid_by: 0,
            pages: Vec::new(),
        }
    }

    fn place(&self, block: usize) -> Result<usize, usize> {
        self.pages.binary_search_by_key(&block, |(at, _)| usize::from(*at))
    }

    pub(super) fn page(&self, block: usize) -> Option<&Arc<Page>> {
        self.pages.get(self.place(block).ok()?).map(|(_, page)| page)
    }

    pub(super) fn page_mut(&mut self, block: usize) -> Option<&mut Arc<Page>> {
        let at = self.place(block).ok()?;
        self.pages.get_mut(at).map(|(_, page)| page)
    }

    /// Adds a page where there was none.
    pub(super) fn insert_page(&mut self, block: usize, page: Arc<Page>) {
        if let (Err(at), Ok(block)) = (self.place(block), u8::try_from(block)) {
            self.pages.insert(at, (block, page));
        }
    }

    /// Takes a page out; `true` if there was one.
    pub(super) fn remove_page(&mut self, block: usize) -> bool {
        self.place(block).map(|at| self.pages.remove(at)).is_ok()
    }

    /// The pages in order of their blocks.
    pub(super) fn pages(&self) -> impl Iterator<Item = (usize, &Arc<Page>)> {
        self.pages.iter().map(|(block, page)| (usize::from(*block), page))
    }

    fn as_uniform(&self) -> Option<u8> {
        let busy = !self.pages.is_empty() || !self.pending.is_empty() || self.paid_by != 0;
        if busy || !self.unpunched.is_empty() || !self.keep.is_empty() {
            return None;
        }
        Some(self.ram.as_uniform()? as u8 | (self.durable.as_uniform()? as u8) << 2)
    }
}

/// A region as a reader sees it.
pub(super) enum View<'a> {
    /// All blocks alike: `ram` and `durable`.
    Uniform(BlockState, BlockState),
    /// Blocks differ.
    Mixed(&'a Region),
}

impl View<'_> {
    /// State of a block as readers are told.
    pub(super) fn ram(&self, block: usize) -> BlockState {
        match self {
            Self::Uniform(ram, _) => *ram,
            Self::Mixed(region) => region.ram.get(block),
        }
    }

    /// States as they are now, and perhaps not later.
    #[cfg(feature = "schedule")]
    pub(super) fn states(&self) -> Line {
        match self {
            Self::Uniform(ram, _) => Line::uniform(*ram),
            Self::Mixed(region) => region.ram,
        }
    }

    /// What recovery may find.
    pub(super) fn durable_line(&self) -> Line {
        match self {
            Self::Uniform(_, durable) => Line::uniform(*durable),
            Self::Mixed(region) => region.durable,
        }
    }
}

/// The regions under one lock.
#[derive(Debug)]
pub(super) struct Stripe {
    uniform: Vec<u8>,
    mixed: HashMap<u32, Box<Region>>,
}

fn slot(region: u32) -> usize {
    (region / STRIPES) as usize
}

impl Stripe {
    /// A stripe that holds every 64th of `regions` regions, all absent.
    pub(super) fn new(regions: u32) -> Self {
        Self { uniform: vec![0; slot(regions) + 1], mixed: HashMap::new() }
    }

    pub(super) fn view(&self, region: u32) -> View<'_> {
        match self.uniform.get(slot(region)).copied().unwrap_or(0) {
            MIXED => match self.mixed.get(&region) {
                Some(region) => View::Mixed(region),
                None => View::Uniform(BlockState::Absent, BlockState::Absent),
            },
            both => View::Uniform(BlockState::from_bits(u64::from(both)), BlockState::from_bits(u64::from(both >> 2))),
        }
    }

    /// The region, spread out to be changed. [`Stripe::fold`] it afterwards.
    pub(super) fn region(&mut self, region: u32) -> &mut Region {
        let (ram, durable) = match self.view(region) {
            View::Uniform(ram, durable) => (ram, durable),
            View::Mixed(_) => (BlockState::Absent, BlockState::Absent),
        };
        if let Some(both) = self.uniform.get_mut(slot(region)) {
            *both = MIXED;
        }
        self.mixed.entry(region).or_insert_with(|| Box::new(Region::uniform(ram, durable)))
    }

    /// The region, if its blocks differ.
    pub(super) fn mixed(&mut self, region: u32) -> Option<&mut Region> {
        self.mixed.get_mut(&region).map(Box::as_mut)
    }

    /// Back to one byte where nothing is lost by it.
    pub(super) fn fold(&mut self, region: u32) {
        if let Some(both) = self.mixed.get(&region).and_then(|r| r.as_uniform())
            && let Some(slot) = self.uniform.get_mut(slot(region))
        {
            *slot = both;
            self.mixed.remove(&region);
        }
    }

    /// Sets both lines of a region, as recovery found them.
    pub(super) fn load(&mut self, region: u32, line: Line) {
        let target = self.region(region);
        (target.ram, target.durable) = (line, line);
        self.fold(region);
    }
}
