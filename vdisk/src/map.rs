//! All layers of a chain merged into one map, lazily: a window of the disk at a time, on first touch.
//!
//! A window is 8192 grains, newest layer first; filling stops as soon as nothing is open any more.
//! After that a lookup is one load, at any depth. 64 KiB a window, unless it is the same all over; a
//! TiB of 64 KiB grains that is written and touched all over takes 128 MiB.
//!
//! Invariants
//! - The map answers what a walk over the layers would answer, byte for byte. The grain is only a
//!   matter of speed: a grain that is not uniform, or whose answer does not fit its eight bytes, is
//!   kept as "ask layer n", and n is the first layer that says anything about it.
//! - Past the end of a shorter layer the map says `Zero`, whatever lies below. `Zero` and `Absent`
//!   (a hole) are never the same entry.
//! - One thread fills a window, others that need it wait; a filled window never changes.
//! - A damaged table of one layer makes only its own grains "ask": errors come from exactly the
//!   ranges that need it. After an I/O error nothing is kept and the next touch tries again.
//!
//! Not here: data. Filling reads the layers' tables only.

mod entry;

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, Ordering},
};

use aquifer_formats::{
    Content, Layer, Result,
    planted::{Bug, planted},
};
use parking_lot::Mutex;

pub(crate) use self::entry::Found;
use self::entry::{Entry, Packing};

/// Grains in a window.
const WINDOW_GRAINS: u64 = 8192;
const WINDOW_LOG2: u32 = WINDOW_GRAINS.trailing_zeros();
/// Windows for which there is a place (24 MiB of places at most): 512 TiB at 64 KiB grains. Beyond,
/// lookups walk the layers.
const WINDOWS_MAX: u64 = 1 << 20;
/// Grains finer than this are not worth their memory in the lowest layer, which has nothing below it
/// to be merged with: asking it again costs one lookup at any depth.
const LOWEST_GRAIN_MIN: u64 = 64 * 1024;
const GRAIN_MAX: u64 = 4 * 1024 * 1024;
/// Locks for filling; two windows that share one merely wait for each other.
const FILL_LOCKS: usize = 16;

/// What is known about a window.
#[derive(Debug)]
enum Window {
    /// The same all over: nothing, or zeros. Most windows of a large disk are.
    Uniform(Entry),
    /// One entry for each grain.
    Grains(Box<[Entry]>),
}

/// The merged map of one chain.
#[derive(Debug)]
pub(crate) struct WindowMap {
    windows: Box<[OnceLock<Window>]>,
    packings: Box<[OnceLock<Packing>]>,
    /// Each guards the filling of the windows whose number leaves its index as remainder.
    filling: [Mutex<()>; FILL_LOCKS],
    filled: AtomicU64,
    grain_log2: u32,
    size: u64,
}

impl WindowMap {
    /// An empty map over `layers`, newest first.
    pub(crate) fn new(layers: &[Arc<dyn Layer>]) -> Self {
        let size = layers.first().map_or(0, |l| l.size());
        let grain_log2 = grain(layers).trailing_zeros();
        let count = (size.div_ceil(1 << grain_log2)).div_ceil(WINDOW_GRAINS).min(WINDOWS_MAX);
        Self {
            windows: (0..count).map(|_| OnceLock::new()).collect(),
            packings: layers.iter().map(|_| OnceLock::new()).collect(),
            filling: Default::default(),
            filled: AtomicU64::new(0),
            grain_log2,
            size,
        }
    }

    /// Granularity in bytes.
    pub(crate) fn grain(&self) -> u64 {
        1 << self.grain_log2
    }

    /// Bytes that filled windows take.
    pub(crate) fn resident_bytes(&self) -> u64 {
        self.filled.load(Ordering::Relaxed) * size_of::<Entry>() as u64
    }

    /// What is at `offset`, and for how many bytes of `1..=len_max` that holds; fills the window
    /// first where nobody has. `offset < size`.
    pub(crate) fn lookup(&self, layers: &[Arc<dyn Layer>], offset: u64, len_max: u64) -> (Found, u64) {
        if let Some(answer) = self.lookup_filled(offset, len_max) {
            return answer;
        }
        let index = self.window_index(offset);
        let Some(place) = usize::try_from(index).ok().and_then(|i| self.windows.get(i)) else {
            return (Found::Ask(0), len_max);
        };
        let stripe = usize::try_from(index % FILL_LOCKS as u64).unwrap_or(0);
        let _alone = self.filling.get(stripe).map(|lock| lock.lock());
        if place.get().is_none() {
            match self.fill(layers, index) {
                Ok(window) => {
                    if let Window::Grains(entries) = &window {
                        self.filled.fetch_add(entries.len() as u64, Ordering::Relaxed);
                    }
                    let _ = place.set(window);
                }
                // The source may come back. Ranges that do not need it work meanwhile, the walk says which.
                Err(_) => return (Found::Ask(0), len_max.min(self.window_end(index) - offset)),
            }
        }
        self.lookup_filled(offset, len_max).unwrap_or((Found::Ask(0), len_max))
    }

    /// As [`WindowMap::lookup`], if the window is filled.
    pub(crate) fn lookup_filled(&self, offset: u64, len_max: u64) -> Option<(Found, u64)> {
        let grain = self.grain();
        let index = self.window_index(offset);
        let window = match self.windows.get(usize::try_from(index).ok()?)?.get()? {
            Window::Grains(entries) => entries,
            Window::Uniform(entry) => {
                let left = self.window_end(index).checked_sub(offset).filter(|left| *left > 0)?;
                return Some((entry.decode(offset, 0, &self.packings), left.min(len_max)));
            }
        };
        let first = usize::try_from(offset >> self.grain_log2 & (WINDOW_GRAINS - 1)).ok()?;
        let (into, mut entry) = (offset & (grain - 1), *window.get(first)?);
        let found = entry.decode(offset, into, &self.packings);
        let mut len = grain - into;
        let mut rest = window.get(first + 1..)?.iter();
        while len < len_max {
            match rest.next() {
                Some(next) if entry.continues(*next, grain) => (entry, len) = (*next, len + grain),
                _ => break,
            }
        }
        if let Found::At(_, Content::Packed { block, skip }) = found {
            // Grains of one block look alike; so do those of another block at the same place of its file.
            len = len.min(u64::from(block.raw_len - skip));
        }
        Some((found, len.min(len_max)))
    }

    fn window_index(&self, offset: u64) -> u64 {
        offset >> self.grain_log2 >> WINDOW_LOG2
    }

    fn window_end(&self, index: u64) -> u64 {
        ((index + 1) << WINDOW_LOG2).saturating_mul(self.grain()).min(self.size)
    }

    fn fill(&self, layers: &[Arc<dyn Layer>], index: u64) -> Result<Window> {
        let start = (index << WINDOW_LOG2) << self.grain_log2;
        let mut filling = Filling::new(start, self.window_end(index), self.grain_log2);
        // Where a layer ends, everything below it ends too.
        let mut visible = filling.end;
        for (number, (layer, packing)) in layers.iter().zip(&self.packings).enumerate() {
            if filling.open == 0 || visible <= start {
                break;
            }
            visible = if planted(Bug::ShortLayerIsAbsent) { filling.end } else { visible }.min(layer.size());
            if start < visible {
                let mut each = |offset, len, content| filling.run(number, offset, len, content, packing);
                match layer.scan(start, visible - start, &mut each) {
                    Ok(()) => {}
                    Err(error) if error.is_damage() => filling.ask_open(number),
                    Err(error) => return Err(error),
                }
            }
            if !planted(Bug::ShortLayerIsAbsent) {
                filling.end_of_layer(number, visible);
            }
        }
        Ok(filling.done())
    }
}

/// The finest grain of the layers that hide something, and for the lowest not below a useful size.
fn grain(layers: &[Arc<dyn Layer>]) -> u64 {
    let lowest = layers.last().map_or(GRAIN_MAX, |l| l.grain().max(LOWEST_GRAIN_MIN));
    let finest = layers.iter().rev().skip(1).map(|l| l.grain()).fold(lowest, u64::min);
    let finest = finest.clamp(aquifer_formats::SECTOR_BYTES, GRAIN_MAX);
    if finest.is_power_of_two() { finest } else { finest.next_power_of_two() / 2 }
}

/// A window while it is filled. Open grains are holes so far.
struct Filling {
    entries: Box<[Entry]>,
    open: usize,
    start: u64,
    end: u64,
    grain_log2: u32,
}

impl Filling {
    fn new(start: u64, end: u64, grain_log2: u32) -> Self {
        let count = usize::try_from((end - start).div_ceil(1 << grain_log2)).unwrap_or(0);
        Self { entries: vec![Entry::HOLE; count].into(), open: count, start, end, grain_log2 }
    }

    fn grain_at(&self, offset: u64) -> usize {
        usize::try_from((offset - self.start) >> self.grain_log2).unwrap_or(usize::MAX)
    }

    /// Takes what `layer` says about `offset..offset + len` for the grains that are still open.
    fn run(&mut self, layer: usize, offset: u64, len: u64, content: Content, packing: &OnceLock<Packing>) {
        let (from, to) = (offset.max(self.start), offset.saturating_add(len).min(self.end));
        if from >= to || content == Content::Absent {
            return;
        }
        let (first, last) = (self.grain_at(from), self.grain_at(to - 1));
        let mut at = from >> self.grain_log2 << self.grain_log2;
        for entry in self.entries.iter_mut().take(last.saturating_add(1)).skip(first) {
            let end = (at + (1 << self.grain_log2)).min(self.end);
            if *entry == Entry::HOLE {
                let uniform = from <= at && end <= to;
                *entry = match uniform.then(|| forward(content, at - offset)).flatten() {
                    Some(content) => Entry::encode(layer, content, at, packing),
                    None => Entry::ask(layer),
                };
                self.open -= 1;
            }
            at = end;
        }
    }

    /// Past the end of a layer there are zeros; the grain its end falls into is part this, part that.
    fn end_of_layer(&mut self, layer: usize, size: u64) {
        if size >= self.end {
            return;
        }
        let size = size.max(self.start);
        let straddles = size & ((1 << self.grain_log2) - 1) != 0;
        let first = self.grain_at(size);
        for (number, entry) in self.entries.iter_mut().enumerate().skip(first) {
            if *entry == Entry::HOLE {
                *entry = if straddles && number == first { Entry::ask(layer) } else { Entry::ZERO };
                self.open -= 1;
            }
        }
    }

    fn done(self) -> Window {
        match self.entries.first() {
            Some(first)
                if (*first == Entry::HOLE || *first == Entry::ZERO) && self.entries.iter().all(|e| e == first) =>
            {
                Window::Uniform(*first)
            }
            _ => Window::Grains(self.entries),
        }
    }

    /// Leaves every open grain to a walk from `layer` on.
    fn ask_open(&mut self, layer: usize) {
        for entry in self.entries.iter_mut().filter(|e| **e == Entry::HOLE) {
            *entry = Entry::ask(layer);
        }
        self.open = 0;
    }
}

/// The same content, `by` bytes further on; `None` where that leaves the numbers.
fn forward(content: Content, by: u64) -> Option<Content> {
    Some(match content {
        Content::Absent | Content::Zero => content,
        Content::Plain { file, offset } => Content::Plain { file, offset: offset.checked_add(by)? },
        Content::Packed { block, skip } => Content::Packed { block, skip: skip.checked_add(u32::try_from(by).ok()?)? },
    })
}
