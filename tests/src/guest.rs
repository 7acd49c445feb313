//! A guest on a small disk, and what it may find after a crash.
//!
//! Invariants
//! - Every sector (512 bytes) a guest writes carries a number of its own, so whatever is read tells where
//!   it came from.
//! - `allowed` holds, for each sector, the number of the last flushed write and of every later one.
//!
//! Not here: the disk under test.

use crate::rng::Rng;

/// Bytes that survive or are lost as one.
pub const SECTOR: usize = 512;

/// One sector full of a number; 0 is a sector of zeros.
pub fn sector(number: u64) -> [u8; SECTOR] {
    let mut out = [0; SECTOR];
    for part in out.chunks_exact_mut(8) {
        part.copy_from_slice(&number.to_le_bytes());
    }
    out
}

/// The number a sector is full of, if it is full of one.
pub fn number(sector: &[u8]) -> Option<u64> {
    let word = |part: &[u8]| u64::from_le_bytes(part.try_into().unwrap());
    let first = word(&sector[..8]);
    // All of it, without looking whether to stop: that is faster.
    let differs = sector.chunks_exact(8).fold(0, |sum, part| sum | (word(part) ^ first));
    (differs == 0).then_some(first)
}

fn below(dice: &mut Rng, end: usize) -> usize {
    usize::try_from(dice.below(end as u64)).unwrap()
}

/// What a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Writes sectors `first..first + count`.
    Write {
        /// First sector.
        first: usize,
        /// How many.
        count: usize,
    },
    /// Makes sectors zero, with space kept or not.
    Zero {
        /// First sector.
        first: usize,
        /// How many.
        count: usize,
        /// Whether the space is to stay reserved.
        keep: bool,
    },
    /// Flushes.
    Flush,
    /// Not the guest's: hydration copies whole blocks.
    Hydrate {
        /// First sector.
        first: usize,
        /// How many.
        count: usize,
    },
    /// Not the guest's: hydrated marks are made durable.
    Seal,
    /// Not the guest's: the overlay is drained for a pivot.
    Drain,
}

impl Act {
    /// Any act on a disk of `sectors` sectors, half of them on its first few blocks, so that they meet.
    pub fn any(dice: &mut Rng, sectors: usize) -> Self {
        let place = if dice.once_in(2) { sectors } else { sectors.min(48) };
        let mut range = |longest: usize| {
            let first = below(dice, place);
            (first, (1 + below(dice, longest)).min(sectors - first))
        };
        let ((first, count), (few_first, few)) = (range(40), range(10));
        let block = first - first % 8;
        let blocks = count.next_multiple_of(8).min(sectors - block);
        match dice.below(20) {
            0..=3 => Self::Write { first: few_first, count: few },
            4..=6 => Self::Write { first: block, count: blocks.min(16) },
            // Long enough, once in a while, for marks to go ahead of the bytes.
            7 if dice.once_in(4) => Self::Write { first: 0, count: sectors.min(256) },
            7 => Self::Write { first, count },
            8 => Self::Zero { first: block, count: blocks, keep: dice.once_in(3) },
            9 => Self::Zero { first: few_first, count: few, keep: dice.once_in(3) },
            10..=13 => Self::Hydrate { first: block, count: blocks },
            14 => Self::Seal,
            15 if dice.once_in(6) => Self::Drain,
            _ => Self::Flush,
        }
    }
}

/// A disk as it was found: the number of each sector, if it is full of one, and which are dirty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// [`TORN`] for a sector of several.
    numbers: Vec<u64>,
    /// For each block of 4096 bytes: nothing smaller is ever marked.
    dirty: Vec<bool>,
    digest: u64,
}

/// Stands for what no guest writes.
const TORN: u64 = u64::MAX;
const BLOCK_SECTORS: usize = 8;

impl std::hash::Hash for Found {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write_u64(self.digest);
    }
}

impl Found {
    /// The disk of these bytes; `dirty` tells of places in bytes.
    pub fn of(disk: &[u8], dirty: &dyn Fn(u64) -> bool) -> Self {
        let mut found = Self::default();
        found.more(disk, dirty);
        found
    }

    /// Adds the bytes that follow, whole blocks but for the last ones.
    pub fn more(&mut self, bytes: &[u8], dirty: &dyn Fn(u64) -> bool) {
        let fold = |sum: u64, word: u64| (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        for block in bytes.chunks(BLOCK_SECTORS * SECTOR) {
            let is_dirty = dirty((self.numbers.len() * SECTOR) as u64);
            self.dirty.push(is_dirty);
            self.digest = fold(self.digest, u64::from(is_dirty));
            for sector in block.chunks_exact(SECTOR) {
                let number = number(sector).unwrap_or(TORN);
                self.numbers.push(number);
                self.digest = fold(self.digest, number);
            }
        }
    }

    fn sectors(&self) -> impl Iterator<Item = (u64, bool)> {
        self.numbers.iter().enumerate().map(|(at, number)| (*number, self.dirty[at / BLOCK_SECTORS]))
    }
}

/// What the guest knows.
#[derive(Clone, Debug)]
pub struct Guest {
    origin: Vec<u64>,
    live: Vec<u64>,
    allowed: Vec<Vec<u64>>,
    next: u64,
}

impl Guest {
    /// A guest on a disk of these sectors.
    pub fn new(origin: Vec<u64>) -> Self {
        Self { allowed: origin.iter().map(|n| vec![*n]).collect(), live: origin.clone(), origin, next: 1 << 32 }
    }

    /// The same guest, whose next write takes the number after `last`.
    #[must_use]
    pub fn counting_from(mut self, last: u64) -> Self {
        self.next = last;
        self
    }

    /// Number of the last sector written.
    pub fn last(&self) -> u64 {
        self.next
    }

    /// The numbers of the disk below.
    pub fn origin(&self) -> &[u64] {
        &self.origin
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> usize {
        self.live.len()
    }

    /// What each sector holds now.
    pub fn live(&self) -> &[u64] {
        &self.live
    }

    /// Begins an act: from here on a crash may leave what it writes. Returns the bytes of a write.
    pub fn begin(&mut self, act: Act) -> Vec<u8> {
        let mut bytes = Vec::new();
        match act {
            Act::Write { first, count } => {
                for at in first..first + count {
                    self.next += 1;
                    bytes.extend_from_slice(&sector(self.next));
                    self.put(at, self.next);
                }
            }
            Act::Zero { first, count, .. } => (first..first + count).for_each(|at| self.put(at, 0)),
            Act::Flush | Act::Hydrate { .. } | Act::Seal | Act::Drain => {}
        }
        bytes
    }

    fn put(&mut self, at: usize, number: u64) {
        self.live[at] = number;
        if !self.allowed[at].contains(&number) {
            self.allowed[at].push(number);
        }
    }

    /// Notes that a flush was acknowledged: only what is there now may be found.
    pub fn flushed(&mut self) {
        for (allowed, live) in self.allowed.iter_mut().zip(&self.live) {
            allowed.clear();
            allowed.push(*live);
        }
    }

    /// Notes that a write failed: its sectors may hold old or new from now on.
    pub fn unsure(&mut self, disk: &[u8]) {
        for (at, live) in self.live.iter_mut().enumerate() {
            *live = number(&disk[at * SECTOR..(at + 1) * SECTOR]).unwrap_or(u64::MAX);
        }
    }

    /// Whether a disk found after a crash is one the guest may find, and `dirty` (in bytes) names every
    /// sector that differs from the disk below. Returns what is wrong.
    pub fn judge(&self, disk: &[u8], dirty: &dyn Fn(u64) -> bool) -> Result<(), String> {
        self.judge_found(&Found::of(disk, dirty))
    }

    /// As [`Guest::judge`].
    pub fn judge_found(&self, found: &Found) -> Result<(), String> {
        if found.numbers.len() != self.allowed.len() {
            return Err(format!("a disk of {} sectors, not {}", found.numbers.len(), self.allowed.len()));
        }
        for (at, (allowed, (found, dirty))) in self.allowed.iter().zip(found.sectors()).enumerate() {
            if found == TORN || !allowed.contains(&found) {
                return Err(format!("sector {at} holds {found:x}, allowed are {allowed:x?}"));
            }
            if found != self.origin[at] && !dirty {
                return Err(format!("sector {at} holds {found:x}, not {:x}, and is not dirty", self.origin[at]));
            }
        }
        Ok(())
    }

    /// Compares with a disk read without any crash: exactly what was written last.
    pub fn judge_live(&self, disk: &[u8]) {
        self.agrees(disk).unwrap_or_else(|what| panic!("{what}"));
    }

    /// As [`Guest::judge_live`]. Returns what is wrong.
    pub fn agrees(&self, disk: &[u8]) -> Result<(), String> {
        for (at, live) in self.live.iter().enumerate() {
            let found = number(&disk[at * SECTOR..(at + 1) * SECTOR]);
            if found != Some(*live) {
                return Err(format!("sector {at} holds {found:x?}, not {live:x}"));
            }
        }
        Ok(())
    }

    /// Notes that certain places (in bytes) are as safe as after a flush.
    pub fn sure_of(&mut self, safe: &dyn Fn(u64) -> bool) {
        for (at, (allowed, live)) in self.allowed.iter_mut().zip(&self.live).enumerate() {
            if safe((at * SECTOR) as u64) {
                allowed.clear();
                allowed.push(*live);
            }
        }
    }

    /// Goes on with a disk as it was found: that is what is there now.
    pub fn accept(&mut self, disk: &[u8]) {
        self.unsure(disk);
        self.flushed();
    }
}
