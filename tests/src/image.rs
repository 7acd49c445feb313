//! Contents of a file in memory, as cheap to copy, change and compare as millions of crash states need.
//!
//! Invariants
//! - Copies share pages until one of them changes; holes take nothing.
//! - A page that came whole with a write is shared by every copy that was given that write.
//!
//! Not here: what is durable (`faults`).

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Numbers that are folded side by side: one after the other each would wait for the one before.
const LANES: usize = 8;

/// A page of a file, and a digest of it once somebody has asked for one.
#[derive(Clone, Debug)]
struct Sheet {
    bytes: [u8; PAGE],
    digest: OnceLock<u64>,
}

fn mix(sum: u64, number: u64) -> u64 {
    (sum ^ number).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(31)
}

impl Sheet {
    fn new() -> Self {
        Self { bytes: [0; PAGE], digest: OnceLock::new() }
    }

    fn digest(&self) -> u64 {
        *self.digest.get_or_init(|| {
            let mut lanes = [1, 2, 3, 4, 5, 6, 7, LANES as u64];
            for words in self.bytes.chunks_exact(8 * LANES) {
                for (lane, word) in lanes.iter_mut().zip(words.chunks_exact(8)) {
                    let word = u64::from_le_bytes(word.try_into().unwrap());
                    *lane = (*lane ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
                }
            }
            lanes.into_iter().fold(1, mix)
        })
    }
}

/// Bytes on their way into a page.
#[derive(Clone, Debug)]
struct Part {
    page: u64,
    from: usize,
    until: usize,
    /// The bytes at their place; zeros around them.
    sheet: Arc<Sheet>,
}

impl Part {
    fn start(&self) -> u64 {
        self.page * PAGE as u64 + self.from as u64
    }

    fn bytes(&self) -> &[u8] {
        &self.sheet.bytes[self.from..self.until]
    }
}

/// Bytes that are written together.
#[derive(Clone, Debug)]
pub struct Written {
    parts: Arc<[Part]>,
    offset: u64,
    len: u64,
}

impl Written {
    /// These bytes at `offset`.
    pub fn new(offset: u64, bytes: &[u8]) -> Self {
        let (mut parts, mut at, mut rest) = (Vec::new(), offset, bytes);
        while !rest.is_empty() {
            let from = at as usize % PAGE;
            let (now, later) = rest.split_at((PAGE - from).min(rest.len()));
            let mut sheet = Arc::new(Sheet::new());
            Arc::make_mut(&mut sheet).bytes[from..from + now.len()].copy_from_slice(now);
            parts.push(Part { page: at / PAGE as u64, from, until: from + now.len(), sheet });
            at += now.len() as u64;
            rest = later;
        }
        Self { parts: parts.into(), offset, len: bytes.len() as u64 }
    }

    /// Where they go.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How many they are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True for none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes, page by page, each with its place.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.parts.iter().map(|part| (part.start(), part.bytes()))
    }
}

#[derive(Clone, Debug, Default)]
struct Pages {
    by_number: BTreeMap<u64, Arc<Sheet>>,
    digest: OnceLock<u64>,
}

/// Contents of a file.
#[derive(Clone, Debug, Default)]
pub struct Image {
    len: u64,
    pages: Arc<Pages>,
}

impl Image {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True for a file of no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether a page is stored at this place.
    pub fn is_stored(&self, offset: u64) -> bool {
        self.pages.by_number.contains_key(&(offset / PAGE as u64))
    }

    /// Makes the file at least this long.
    pub fn extend(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    /// Fills `buf` from `offset`; holes and what lies past the end are zeros.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let skip = at as usize % PAGE;
            let n = (PAGE - skip).min(rest.len());
            let (part, tail) = rest.split_at_mut(n);
            match self.pages.by_number.get(&(at / PAGE as u64)) {
                Some(page) => part.copy_from_slice(&page.bytes[skip..skip + n]),
                None => part.fill(0),
            }
            at += n as u64;
            rest = tail;
        }
    }

    fn pages_mut(&mut self) -> &mut BTreeMap<u64, Arc<Sheet>> {
        let pages = Arc::make_mut(&mut self.pages);
        pages.digest = OnceLock::new();
        &mut pages.by_number
    }

    /// Writes what somebody has prepared, growing where needed.
    pub fn put(&mut self, written: &Written) {
        self.extend(written.offset + written.len);
        let pages = self.pages_mut();
        for part in &*written.parts {
            if part.from == 0 && part.until == PAGE {
                pages.insert(part.page, Arc::clone(&part.sheet));
                continue;
            }
            let page = Arc::make_mut(pages.entry(part.page).or_insert_with(|| Arc::new(Sheet::new())));
            page.bytes[part.from..part.until].copy_from_slice(part.bytes());
            page.digest = OnceLock::new();
        }
    }

    /// Writes `bytes`, growing where needed.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.put(&Written::new(offset, bytes));
    }

    /// Cuts the end off, as only damage does.
    pub fn cut(&mut self, len: u64) {
        self.punch(len, self.len.saturating_sub(len));
        self.len = self.len.min(len);
    }

    /// Equal for equal images (of 2^64 numbers); what has not changed is not looked at twice. A hole and a page of
    /// zeros differ, as they do to whoever asks what is allocated.
    pub fn digest(&self) -> u64 {
        let pages = &self.pages;
        let sum = *pages.digest.get_or_init(|| {
            // A sum, so that no page waits for the one before.
            pages.by_number.iter().fold(0, |sum, (at, page)| sum.wrapping_add(mix(page.digest(), mix(7, *at))))
        });
        mix(sum, self.len)
    }

    /// Zeros a range, as far as the file goes.
    pub fn punch(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        let mut at = offset;
        while at < end {
            let next = (at - at % PAGE as u64 + PAGE as u64).min(end);
            if next - at == PAGE as u64 {
                self.pages_mut().remove(&(at / PAGE as u64));
            } else if self.is_stored(at) {
                self.write(at, &vec![0; (next - at) as usize]);
            }
            at = next;
        }
    }
}
