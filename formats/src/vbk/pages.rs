//! Pages of 4 KiB in banks, and the vectors that are made of them.
//!
//! Invariants
//! - A bank's CRC is checked when it is first touched; its pages are read from the file as they are needed.
//! - All banks together are no longer than the file, so that checking them is bounded work.
//! - A vector has as many pages as its count needs, each inside its bank: neither cycles nor counts
//!   that no file could hold lead anywhere.

use std::sync::OnceLock;

use super::slot::{BankPlace, Header, Slot, u16_at, u32_at, u64_at};
use crate::{
    Error, Result,
    tables::{TableFile, duplicates},
};

pub(super) const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;
/// No page.
pub(super) const NONE: u64 = u64::MAX;
/// Longest bank, in bytes.
const BANK_BYTES_MAX: u64 = 64 << 20;
/// Words in a page of a vector's table.
const WORDS: u64 = 512;

/// What a bank turned out to be: its pages, or why it cannot be used.
#[derive(Clone, Debug)]
enum Checked {
    Pages(u64),
    Encrypted,
    Damaged(String),
}

#[derive(Debug)]
struct Bank {
    place: BankPlace,
    checked: OnceLock<Checked>,
}

/// The pages of a file.
#[derive(Debug)]
pub(super) struct Pages {
    pub(super) file: TableFile,
    pub(super) header: Header,
    banks: Vec<Bank>,
    /// Pages of all banks, at most.
    total: u64,
}

impl Pages {
    pub(super) fn new(file: TableFile, header: &Header, slot: &Slot) -> Result<Self> {
        let mut sum = 0u64;
        for place in &slot.banks {
            let bad = |what: String| Error::corrupt(file.label(), place.offset, format!("bank: {what}"));
            if !(2 * PAGE..=BANK_BYTES_MAX).contains(&place.len) || place.offset < PAGE {
                return Err(bad(format!("{} bytes", place.len)));
            }
            file.check_inside(place.offset, place.len, "a bank")?;
            sum += place.len;
            if sum > file.len {
                return Err(bad("the banks are longer than the file".into()));
            }
        }
        let banks = slot.banks.iter().map(|place| Bank { place: *place, checked: OnceLock::new() }).collect();
        Ok(Self { file, header: *header, banks, total: sum / PAGE })
    }

    /// Where the page `id` lies in the file, inside a bank that was checked.
    pub(super) fn address(&self, id: u64) -> Result<u64> {
        let (number, page) = (id >> 32, id & 0xffff_ffff);
        let bad = |what: String| Error::corrupt(self.file.label(), 0, format!("page {page} of bank {number}: {what}"));
        let bank = usize::try_from(number).ok().and_then(|i| self.banks.get(i));
        let bank = bank.ok_or_else(|| bad(format!("there are {} banks", self.banks.len())))?;
        let checked = match bank.checked.get() {
            Some(checked) => checked,
            None => {
                let checked = self.check(bank.place)?;
                bank.checked.get_or_init(|| checked)
            }
        };
        match checked {
            Checked::Pages(count) if page < *count => Ok(bank.place.offset + PAGE + page * PAGE),
            Checked::Pages(count) => Err(bad(format!("the bank has {count} pages"))),
            Checked::Encrypted => {
                Err(Error::Key { path: self.file.label().into(), what: "the backup is encrypted".into() })
            }
            Checked::Damaged(what) => Err(Error::corrupt(self.file.label(), bank.place.offset, what.clone())),
        }
    }

    fn check(&self, place: BankPlace) -> Result<Checked> {
        let (mut sum, mut at, end) = (0, place.offset, place.offset + place.len);
        let head = self.file.read(at, PAGE, "a bank")?;
        while at < end {
            let part = self.file.read(at, (end - at).min(1 << 20), "a bank")?;
            sum = self.header.sum(sum, &part);
            at += part.len() as u64;
        }
        let count = u64::from(u16_at(&head, 0));
        let key = head.get(0xc04..0xc14).unwrap_or_default();
        Ok(if sum != place.crc {
            Checked::Damaged("bank: its checksum is wrong".into())
        } else if key.iter().any(|byte| *byte != 0) && u32_at(&head, 0xc14) != 0 {
            Checked::Encrypted
        } else if (count + 1) * PAGE > place.len {
            Checked::Damaged(format!("bank: {count} pages in {} bytes", place.len))
        } else {
            Checked::Pages(count)
        })
    }

    /// Hands the page `id` to `work`, with its offset in the file.
    pub(super) fn with<R>(&self, id: u64, work: impl FnOnce(u64, &[u8]) -> R) -> Result<R> {
        let at = self.address(id)?;
        self.file.with_table(at, PAGE_LEN, |bytes| Ok(work(at, bytes)))
    }
}

/// A list of items of one length.
#[derive(Debug)]
pub(super) struct Vector {
    /// Offsets in the file.
    pages: Box<[u64]>,
    item_bytes: usize,
    per_page: u64,
    /// Bytes before the first item of a page.
    skip: usize,
    count: u64,
}

impl Vector {
    /// The vector of `count` items with the root page `root`; its pages are found now.
    pub(super) fn open(pages: &Pages, root: u64, item_bytes: usize, count: u64) -> Result<Self> {
        let has_tables = pages.header.has_tables();
        let skip = if has_tables { 0 } else { 8 };
        let per_page = (PAGE - skip) / item_bytes as u64;
        let needed = count.div_ceil(per_page);
        if needed > pages.total {
            let what = format!("a list of {count} entries, where all banks have {} pages", pages.total);
            return Err(Error::corrupt(pages.file.label(), 0, what));
        }
        let found = match has_tables {
            _ if needed == 0 => Vec::new(),
            true => tabled(pages, root, needed)?,
            false => linked(pages, root, needed)?,
        };
        // No writer names a page twice, and it would let a small file describe any amount of work.
        if !duplicates(found.iter().map(|at| Some(*at))).is_empty() {
            return Err(Error::corrupt(pages.file.label(), 0, format!("a list of {count} entries has a page twice")));
        }
        Ok(Self { pages: found.into(), item_bytes, per_page, skip: if has_tables { 0 } else { 8 }, count })
    }

    /// Hands item `index` to `work`, with its offset in the file.
    pub(super) fn with<R>(&self, pages: &Pages, index: u64, work: impl FnOnce(u64, &[u8]) -> R) -> Result<R> {
        let missing =
            || Error::corrupt(pages.file.label(), 0, format!("entry {index} of a list that has {}", self.count));
        let page = usize::try_from(index / self.per_page).ok().and_then(|i| self.pages.get(i));
        let at = *page.filter(|_| index < self.count).ok_or_else(missing)?;
        let start = self.skip + usize::try_from(index % self.per_page).unwrap_or(usize::MAX) * self.item_bytes;
        pages.file.with_table(at, PAGE_LEN, |bytes| {
            let item = bytes.get(start..start + self.item_bytes).ok_or_else(missing)?;
            Ok(work(at + start as u64, item))
        })
    }
}

/// Pages that each name the next one.
fn linked(pages: &Pages, root: u64, needed: u64) -> Result<Vec<u64>> {
    let mut found = Vec::new();
    let mut next = root;
    for number in 0..needed {
        if next == NONE {
            return Err(Error::corrupt(pages.file.label(), 0, format!("a list of {needed} pages ends after {number}")));
        }
        next = pages.with(next, |at, bytes| {
            found.push(at);
            u64_at(bytes, 0)
        })?;
    }
    Ok(found)
}

/// Pages that a table names, whose own pages are linked.
fn tabled(pages: &Pages, root: u64, needed: u64) -> Result<Vec<u64>> {
    let table_pages = word_of(needed - 1) / WORDS + 1;
    let table = linked(pages, root, table_pages)?;
    let mut found = Vec::new();
    for number in 0..needed {
        let word = word_of(number);
        let missing = || Error::corrupt(pages.file.label(), 0, format!("a list whose table lacks page {number}"));
        let at = usize::try_from(word / WORDS).ok().and_then(|i| table.get(i)).ok_or_else(missing)?;
        let place = usize::try_from(word % WORDS * 8).unwrap_or(usize::MAX);
        let id = pages.file.with_table(*at, PAGE_LEN, |bytes| Ok(u64_at(bytes, place)))?;
        found.push(pages.address(id)?);
    }
    Ok(found)
}

/// Which word of a table, its pages one behind the other, names page `number` of the vector. Tables grow by
/// 1, 3, 12, 48 ... pages; each begins with its link, and the first of each such group also lists its others.
pub(super) fn word_of(number: u64) -> u64 {
    let mut listed = 1;
    while number + 1 > 510 * listed {
        listed *= 4;
    }
    let place = listed + number;
    512 * (place / 511) + place % 511 + 1
}
