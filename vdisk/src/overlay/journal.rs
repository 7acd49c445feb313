//! The `journal` file: bytes and marks that are durable but not settled in `disk.raw` and `map` yet.
//!
//! ```text
//! 0        4K                       4K + half                 4K + 2 x half
//! | header | record record record ..| record record ...       |
//! ```
//! Records have consecutive sequences. One that does not fit begins the other half, which must have been
//! settled by then. Space is reserved and zero-written, so that a sync is one write and one device
//! flush and never a commit of the file system.
//!
//! Invariants
//! - A record is written only after all records before it in other groups are durable; those of one
//!   group lie in one half and are made durable by one sync.
//! - After a write that failed, the next record goes to the same place under the same sequence.
//! - Scanning stops at the first record that is not whole or not in sequence. If a whole record beyond
//!   says that the broken one had been durable, that is damage, not the end.
//!
//! Not here: what the entries do.

use std::sync::Arc;

use aquifer_formats::{
    Error as FormatError, Storage,
    planted::{Bug, planted},
};
use zerocopy::{
    FromBytes, FromZeros, IntoBytes,
    little_endian::{U32, U64},
};

use super::{
    failure::{io_failed, wrong},
    layout::{
        ENTRY_DATA, JOURNAL_MAGIC, JournalHeader, OVERLAY_VERSION, RECORD_MAGIC, RecordEntry, RecordHead, SEQUENCE_END,
    },
    region::Page,
};
use crate::{Error, Result};

const PAGE: u64 = 4096;
const HEAD_BYTES: usize = size_of::<RecordHead>();
const ENTRY_BYTES: usize = size_of::<RecordEntry>();
const CRC_AT: usize = HEAD_BYTES - 4;
/// Longest record in pages: bounds what a reader allocates and how long one write takes.
const RECORD_PAGES_MAX: u64 = 512;
/// Shortest half that is accepted, in pages.
const HALF_PAGES_MIN: u64 = 8;

/// The file, open, with the place of the next record.
#[derive(Debug)]
pub(super) struct Journal {
    storage: Arc<dyn Storage>,
    id: [u8; 16],
    half_bytes: u64,
    active: usize,
    /// Offset in the active half where the next record goes.
    at: u64,
    next: u64,
    /// Highest record that is durable and whose blocks are known to whoever settles.
    synced: u64,
    /// Sequence of the first record of each half.
    first: [u64; 2],
    settled: [bool; 2],
}

/// A record in the making.
#[derive(Debug)]
pub(super) struct Draft {
    entries: Vec<RecordEntry>,
    pages: Vec<Arc<Page>>,
    pages_max: u64,
}

impl Draft {
    /// Pages the record takes with `entries` and `data` more.
    fn pages(&self, entries: usize, data: usize) -> u64 {
        let head = HEAD_BYTES + (self.entries.len() + entries) * ENTRY_BYTES;
        (head as u64).div_ceil(PAGE) + (self.pages.len() + data) as u64
    }

    /// Whether a run of marks still fits.
    pub(super) fn fits_mark(&self) -> bool {
        self.pages(1, 0) <= self.pages_max
    }

    /// Whether a block with its bytes still fits.
    pub(super) fn fits_page(&self) -> bool {
        self.pages(1, 1) <= self.pages_max
    }

    /// Adds a mark for a run of blocks; a run that continues the last one is joined to it.
    pub(super) fn mark(&mut self, kind: u8, block: u64, count: u32) {
        if let Some(last) = self.entries.last_mut()
            && last.kind() == kind
            && last.block() + u64::from(last.count.get()) == block
            && let Some(sum) = last.count.get().checked_add(count)
        {
            last.count = U32::new(sum);
            return;
        }
        self.entries.push(RecordEntry::new(kind, block, count, 0));
    }

    /// Adds a block with its bytes.
    pub(super) fn page(&mut self, block: u64, page: Arc<Page>) {
        self.entries.push(RecordEntry::new(ENTRY_DATA, block, 1, crc32c::crc32c(&*page)));
        self.pages.push(page);
    }
}

/// A whole record, as found.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) sequence: u64,
    /// Entries, each with the offset of its page in the file (0 for marks).
    pub(super) entries: Vec<(RecordEntry, u64)>,
    len: u64,
}

impl Journal {
    /// Lays out a new file of about `bytes`, reserved and zero-written, and makes it durable with an
    /// empty first record: a journal without any is damaged, not new.
    pub(super) fn create(storage: Arc<dyn Storage>, id: [u8; 16], bytes: u64) -> Result<Self> {
        let half_bytes = (bytes.saturating_sub(PAGE) / 2 / PAGE).max(HALF_PAGES_MIN) * PAGE;
        let len = PAGE + 2 * half_bytes;
        storage.reserve(0, len).map_err(|e| io_failed(&*storage, "reserve", len, e))?;
        let zeros = vec![0; 1 << 20];
        let mut at = 0;
        while at < len {
            let n = usize::try_from(len - at).unwrap_or(usize::MAX).min(zeros.len());
            let part = zeros.get(..n).unwrap_or_default();
            storage.write_at(at, part).map_err(|e| io_failed(&*storage, "write", at, e))?;
            at += n as u64;
        }
        let mut header = JournalHeader::new_zeroed();
        header.magic = JOURNAL_MAGIC;
        header.version = U32::new(OVERLAY_VERSION);
        header.id = id;
        header.half = U64::new(half_bytes);
        header.crc = U32::new(crc32c::crc32c(header.as_bytes()));
        storage.write_at(0, header.as_bytes()).map_err(|e| io_failed(&*storage, "write", 0, e))?;
        let mut journal = Self {
            storage,
            id,
            half_bytes,
            active: 0,
            at: 0,
            next: 1,
            synced: 0,
            first: [1, 0],
            settled: [false, true],
        };
        let empty = journal.draft();
        journal.append(&empty)?;
        journal.storage.sync().map_err(|e| io_failed(&*journal.storage, "sync", 0, e))?;
        journal.mark_synced();
        Ok(journal)
    }

    /// The journal of an overlay that has been handed over: nothing is read from it and nothing is appended.
    pub(super) fn closed(storage: Arc<dyn Storage>, id: [u8; 16]) -> Self {
        let (first, settled) = ([0, 0], [true, true]);
        Self { storage, id, half_bytes: 0, active: 0, at: 0, next: 0, synced: 0, first, settled }
    }

    /// Opens a file, and tells `replay` in order its records from `floor` on, the first one that is not
    /// settled. The caller settles them and then calls [`Journal::restart`] before anything is appended.
    ///
    /// # Errors
    /// The file belongs to another overlay; damage.
    pub(super) fn open(
        storage: Arc<dyn Storage>,
        id: [u8; 16],
        floor: u64,
        replay: &mut dyn FnMut(&Record) -> Result<()>,
    ) -> Result<Self> {
        let half_bytes = open_header(&*storage, id)?;
        let mut journal = Self {
            storage,
            id,
            half_bytes,
            active: 0,
            at: 0,
            next: 0,
            synced: 0,
            first: [0, 0],
            settled: [true, true],
        };
        let mut first = [None, None];
        for (half, first) in first.iter_mut().enumerate() {
            *first = journal.read_record(half, 0)?.map(|r| r.sequence);
        }
        let (low, high) = match first {
            [None, None] => return Err(journal.damaged(PAGE, "neither half begins with a whole record")),
            [Some(_), None] => (0, None),
            [None, Some(_)] => (1, None),
            [Some(a), Some(b)] if a < b => (0, Some(1)),
            [Some(_), Some(_)] => (1, Some(0)),
        };
        let mut records = Vec::new();
        let mut end = journal.scan(low, &mut records)?;
        journal.active = low;
        if let Some(high) = high {
            end = journal.join(high, floor, &mut records)?;
            journal.active = high;
        }
        let begins = records.first().map_or(0, |r| r.sequence);
        if begins > floor {
            let what = format!("record {floor} is not settled, but the first whole one is {begins}");
            return Err(journal.damaged(PAGE, what));
        }
        journal.look_beyond(journal.active, end, &records)?;
        journal.next = records.last().map_or(0, |r| r.sequence + 1);
        if planted(Bug::ReplayOneShort) {
            records.pop();
        }
        let floor = floor + u64::from(planted(Bug::ReplayOneLate));
        for record in records.iter().filter(|r| r.sequence >= floor) {
            replay(record)?;
        }
        Ok(journal)
    }

    /// Begins the other half, after everything before has been settled durably.
    pub(super) fn restart(&mut self) {
        self.settled = [true, true];
        self.switch();
        self.synced = self.next.saturating_sub(1);
    }

    /// Whether the active half has as little room left as it has records.
    pub(super) fn is_half_full(&self) -> bool {
        self.at >= self.half_bytes / 2
    }

    /// The first record that is not settled once the inactive half is.
    pub(super) fn floor_of_active(&self) -> u64 {
        self.first.get(self.active).copied().unwrap_or(0)
    }

    /// The first record of which nobody has been told that it is durable.
    pub(super) fn floor_of_all(&self) -> u64 {
        self.synced + 1
    }

    /// All records of the half that begins with `high` follow those found so far; what the lower half
    /// repeats of them is an attempt that failed.
    fn join(&self, high: usize, floor: u64, records: &mut Vec<Record>) -> Result<u64> {
        let mut upper = Vec::new();
        let end = self.scan(high, &mut upper)?;
        let begins = upper.first().map_or(0, |r| r.sequence);
        records.retain(|r| r.sequence < begins);
        let have = records.last().map_or(0, |r| r.sequence + 1);
        if have < begins {
            if floor < begins {
                let what = format!("record {have} is broken, but {begins} and later ones are whole");
                return Err(self.damaged(PAGE + (1 - high as u64) * self.half_bytes, what));
            }
            records.clear();
        }
        records.append(&mut upper);
        Ok(end)
    }

    /// Reads the consecutive records of a half; returns where they end.
    fn scan(&self, half: usize, out: &mut Vec<Record>) -> Result<u64> {
        let mut at = 0;
        let mut expect = None;
        while let Some(record) = self.read_record(half, at)? {
            if expect.is_some_and(|e| e != record.sequence) {
                break;
            }
            expect = Some(record.sequence + 1);
            at += record.len;
            out.push(record);
        }
        Ok(at)
    }

    /// Beyond the end of the records of `half` nothing may claim that what is missing was durable.
    fn look_beyond(&self, half: usize, end: u64, records: &[Record]) -> Result<()> {
        let next = records.last().map_or(0, |r| r.sequence + 1);
        let mut at = end;
        while at < self.half_bytes && !planted(Bug::BrokenRecordEndsJournal) {
            if let Some(head) = self.read_head(half, at)?
                && head.0.sequence.get() > next
                && head.0.synced.get() >= next
            {
                let found = head.0.sequence.get();
                let what = format!("record {next} is broken, but {found} says it had been durable");
                return Err(self.damaged(self.offset(half, end), what));
            }
            at += PAGE;
        }
        Ok(())
    }

    fn damaged(&self, at: u64, what: impl Into<String>) -> Error {
        FormatError::corrupt(self.storage.label(), at, what).into()
    }

    fn offset(&self, half: usize, at: u64) -> u64 {
        PAGE + half as u64 * self.half_bytes + at
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.storage.read_at(at, buf).map_err(|e| io_failed(&*self.storage, "read", at, e))
    }

    /// Head and entries at a place, if they are whole and ours.
    fn read_head(&self, half: usize, at: u64) -> Result<Option<(RecordHead, Vec<RecordEntry>)>> {
        if at + PAGE > self.half_bytes {
            return Ok(None);
        }
        let mut bytes = vec![0; 4096];
        self.read(self.offset(half, at), &mut bytes)?;
        let Ok((head, _)) = RecordHead::read_from_prefix(&bytes) else { return Ok(None) };
        let counted = head.sequence.get().max(head.synced.get()) < SEQUENCE_END;
        if head.magic != RECORD_MAGIC || head.id != self.id || !counted {
            return Ok(None);
        }
        let entries = u64::from(head.entries.get());
        let front = (HEAD_BYTES as u64 + entries * ENTRY_BYTES as u64).next_multiple_of(PAGE);
        let len = front + u64::from(head.pages.get()) * PAGE;
        if len > self.record_bytes_max() || at + len > self.half_bytes {
            return Ok(None);
        }
        bytes.resize(usize::try_from(front).unwrap_or(0), 0);
        if let Some(more) = bytes.get_mut(4096..) {
            self.read(self.offset(half, at) + PAGE, more)?;
        }
        let crc = head.crc.get();
        if let Some(field) = bytes.get_mut(CRC_AT..CRC_AT + 4) {
            field.fill(0);
        }
        if crc32c::crc32c(&bytes) != crc && !planted(Bug::RecordHeadUnchecked) {
            return Ok(None);
        }
        let list = bytes.get(HEAD_BYTES..).unwrap_or_default().chunks_exact(ENTRY_BYTES);
        let count = usize::try_from(entries).unwrap_or(0);
        Ok(Some((head, list.take(count).filter_map(|b| RecordEntry::read_from_bytes(b).ok()).collect())))
    }

    /// The record at a place, if all of it is whole.
    fn read_record(&self, half: usize, at: u64) -> Result<Option<Record>> {
        let Some((head, list)) = self.read_head(half, at)? else { return Ok(None) };
        let front = (HEAD_BYTES + list.len() * ENTRY_BYTES).next_multiple_of(4096) as u64;
        let data = list.iter().filter(|e| e.kind() == ENTRY_DATA).count() as u64;
        if data != u64::from(head.pages.get()) {
            return Ok(None);
        }
        let mut page_at = self.offset(half, at) + front;
        let mut entries = Vec::with_capacity(list.len());
        let mut page = [0; 4096];
        for entry in list {
            if entry.kind() != ENTRY_DATA {
                entries.push((entry, 0));
                continue;
            }
            self.read(page_at, &mut page)?;
            if crc32c::crc32c(&page) != entry.crc.get() && !planted(Bug::RecordBytesUnchecked) {
                return Ok(None);
            }
            entries.push((entry, page_at));
            page_at += PAGE;
        }
        let len = front + data * PAGE;
        Ok(Some(Record { sequence: head.sequence.get(), entries, len }))
    }

    fn record_bytes_max(&self) -> u64 {
        self.half_bytes.min(RECORD_PAGES_MAX * PAGE)
    }

    /// The bytes of a block in a record that was found whole.
    pub(super) fn read_page(&self, at: u64, page: &mut Page) -> Result<()> {
        self.read(at, page)
    }

    /// A record to fill.
    pub(super) fn draft(&self) -> Draft {
        Draft { entries: Vec::new(), pages: Vec::new(), pages_max: self.record_bytes_max() / PAGE }
    }

    /// Whether the record fits behind the last one.
    pub(super) fn fits(&self, draft: &Draft) -> bool {
        self.at + draft.pages(0, 0) * PAGE <= self.half_bytes
    }

    /// The half that takes records now.
    pub(super) fn active(&self) -> usize {
        self.active
    }

    /// Whether nothing in a half is needed any more.
    pub(super) fn is_settled(&self, half: usize) -> bool {
        self.settled.get(half).copied().unwrap_or(false)
    }

    /// Notes, after it is true, that `disk.raw` and `map` hold durably what the inactive half says.
    pub(super) fn settle_inactive(&mut self) {
        if let Some(settled) = self.settled.get_mut(1 - self.active) {
            *settled = true;
        }
    }

    /// Begins the other half, which is settled.
    pub(super) fn switch(&mut self) {
        self.active = 1 - self.active;
        self.at = 0;
        if let (Some(first), Some(settled)) = (self.first.get_mut(self.active), self.settled.get_mut(self.active)) {
            *first = self.next;
            *settled = false;
        }
    }

    /// Writes a record that fits, without making it durable.
    pub(super) fn append(&mut self, draft: &Draft) -> Result<()> {
        let mut head = RecordHead::new_zeroed();
        head.magic = RECORD_MAGIC;
        head.id = self.id;
        head.sequence = U64::new(self.next);
        head.synced = U64::new(self.synced);
        head.entries = U32::new(u32::try_from(draft.entries.len()).unwrap_or(u32::MAX));
        head.pages = U32::new(u32::try_from(draft.pages.len()).unwrap_or(u32::MAX));
        let front = (HEAD_BYTES + draft.entries.len() * ENTRY_BYTES).next_multiple_of(4096);
        let mut bytes = Vec::with_capacity(front + draft.pages.len() * 4096);
        bytes.extend_from_slice(head.as_bytes());
        bytes.extend_from_slice(draft.entries.as_slice().as_bytes());
        bytes.resize(front, 0);
        let crc = crc32c::crc32c(&bytes).to_le_bytes();
        if let Some(field) = bytes.get_mut(CRC_AT..CRC_AT + 4) {
            field.copy_from_slice(&crc);
        }
        for page in &draft.pages {
            bytes.extend_from_slice(&**page);
        }
        let at = self.offset(self.active, self.at);
        self.storage.write_at(at, &bytes).map_err(|e| io_failed(&*self.storage, "write", at, e))?;
        self.at += bytes.len() as u64;
        self.next += u64::from(!planted(Bug::SequenceNotRaised));
        Ok(())
    }

    /// The file, for a sync while the journal itself is not locked.
    pub(super) fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.storage)
    }

    /// Whether every record so far is durable; one of a flush that failed later on may not be.
    pub(super) fn is_synced(&self) -> bool {
        self.synced + 1 == self.next
    }

    /// Notes that every record so far is durable, and that its blocks are known to whoever settles.
    pub(super) fn mark_synced(&mut self) {
        self.synced = self.next.saturating_sub(1);
    }
}

fn open_header(storage: &dyn Storage, id: [u8; 16]) -> Result<u64> {
    let mut bytes = [0; size_of::<JournalHeader>()];
    storage.read_at(0, &mut bytes).map_err(|e| io_failed(storage, "read", 0, e))?;
    let damaged = |what: &str| -> Error { FormatError::corrupt(storage.label(), 0, what).into() };
    let header = JournalHeader::read_from_bytes(&bytes).map_err(|_| damaged("no journal header"))?;
    let bare = JournalHeader { crc: U32::ZERO, ..header };
    if header.magic != JOURNAL_MAGIC || header.crc.get() != crc32c::crc32c(bare.as_bytes()) {
        return Err(damaged("the journal's header is damaged"));
    }
    if header.version.get() != OVERLAY_VERSION {
        let found = header.version.get();
        return Err(wrong(storage, format!("format version {found}, this build knows {OVERLAY_VERSION}")));
    }
    if header.id != id && !planted(Bug::WrongJournalAccepted) {
        return Err(wrong(storage, "belongs to another overlay".to_owned()));
    }
    let len = storage.len().map_err(|e| io_failed(storage, "stat", 0, e))?;
    let half = header.half.get();
    let fits = half.checked_mul(2).and_then(|both| both.checked_add(PAGE)).is_some_and(|need| need <= len);
    if !fits || half % PAGE != 0 || half < HALF_PAGES_MIN * PAGE {
        return Err(damaged("the journal is shorter than its header says"));
    }
    Ok(half)
}
