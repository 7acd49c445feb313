//! The `map` file: which state each block is in, as recovery will find it.
//!
//! ```text
//! 0        8K     12K        12K + 255 x 4K
//! | header | list | images   | pages: one for 63 MiB of disk, 64 bytes of head + 63 lines of 64 bytes |
//!   twice
//! ```
//!
//! Invariants
//! - Pages are stored images first, sync, then in place, sync: a page torn by a crash is repaired from
//!   its image, so a page that is neither whole nor repaired is damage and never read as `Absent`.
//! - A page of zeros was never written: all its blocks are absent.
//! - Each batch of images has a sequence that none before it had, finished or not: images that an interrupted batch
//!   left never pass for those of a later one.
//! - The caller has synced `disk.raw` before a page that speaks of its bytes is stored.
//!
//! Not here: what the marks mean.

use std::{collections::BTreeMap, sync::Arc};

use aquifer_formats::{
    Error as FormatError, Storage,
    planted::{Bug, planted},
};
use zerocopy::{
    FromBytes, FromZeros, IntoBytes,
    little_endian::{U32, U64},
};

use super::{
    OverlayOf,
    failure::{io_failed, wrong},
    layout::{
        FLAG_HANDED_OVER, MAP_IMAGES_MAX, MAP_LIST_MAGIC, MAP_MAGIC, MAP_PAGE_MAGIC, MapHeader, MapList, MapPageHead,
        OVERLAY_VERSION, SEQUENCE_END,
    },
    region::{LINE_BYTES, Line, Page, REGION_BYTES},
};
use crate::Result;

const PAGE: u64 = 4096;
const LIST_AT: u64 = 2 * PAGE;
const IMAGES_AT: u64 = LIST_AT + PAGE;
const PAGES_AT: u64 = IMAGES_AT + MAP_IMAGES_MAX as u64 * PAGE;
const HEAD_BYTES: usize = size_of::<MapPageHead>();
const CRC_AT_PAGE: usize = 36;

/// Regions whose lines share a page.
pub(super) const PAGE_REGIONS: u32 = 63;

/// The file, open and checked.
#[derive(Debug)]
pub(super) struct MapFile {
    storage: Arc<dyn Storage>,
    header: MapHeader,
    regions: u32,
    /// Highest sequence of a page or list so far.
    sequence: u64,
}

fn header_crc(header: &MapHeader) -> u32 {
    let bare = MapHeader { crc: U32::ZERO, ..*header };
    crc32c::crc32c(bare.as_bytes())
}

fn list_crc(list: &MapList) -> u32 {
    let bare = MapList { crc: U32::ZERO, ..*list };
    crc32c::crc32c(bare.as_bytes())
}

fn page_crc(page: &Page) -> u32 {
    let mut bare = *page;
    if let Some(crc) = bare.get_mut(CRC_AT_PAGE..CRC_AT_PAGE + 4) {
        crc.fill(0);
    }
    crc32c::crc32c(&bare)
}

/// Number of the page that holds a region's line.
pub(super) fn page_of(region: u32) -> u32 {
    region / PAGE_REGIONS
}

impl MapFile {
    fn pages(&self) -> u32 {
        self.regions.div_ceil(PAGE_REGIONS)
    }

    /// Length of the file for a disk of `regions` regions.
    fn len(regions: u32) -> u64 {
        PAGES_AT + u64::from(regions.div_ceil(PAGE_REGIONS)) * PAGE
    }

    /// Lays out a new file, reserves its space and syncs it.
    pub(super) fn create(storage: Arc<dyn Storage>, of: &OverlayOf, id: [u8; 16]) -> Result<Self> {
        let regions = regions_of(&*storage, of.size)?;
        let len = Self::len(regions);
        storage.set_len(len).map_err(|e| io_failed(&*storage, "extend", len, e))?;
        storage.reserve(0, len).map_err(|e| io_failed(&*storage, "reserve", len, e))?;
        let mut header = MapHeader::new_zeroed();
        header.magic = MAP_MAGIC;
        header.version = U32::new(OVERLAY_VERSION);
        header.id = id;
        header.size = U64::new(of.size);
        header.chain = of.chain;
        header.floor = U64::new(1);
        let mut map = Self { storage, header, regions, sequence: 0 };
        map.store_header()?;
        Ok(map)
    }

    /// Opens a file and checks that it belongs to `of`.
    pub(super) fn open(storage: Arc<dyn Storage>, of: &OverlayOf) -> Result<Self> {
        let regions = regions_of(&*storage, of.size)?;
        let mut best: Option<MapHeader> = None;
        for at in [0, PAGE] {
            let mut page = [0; size_of::<MapHeader>()];
            storage.read_at(at, &mut page).map_err(|e| io_failed(&*storage, "read", at, e))?;
            let Ok(header) = MapHeader::read_from_bytes(&page) else { continue };
            let counted = header.sequence.get().max(header.floor.get()) < SEQUENCE_END;
            let whole = header.magic == MAP_MAGIC && header.crc.get() == header_crc(&header) && counted;
            if whole && best.is_none_or(|b| b.sequence.get() < header.sequence.get()) {
                best = Some(header);
            }
        }
        let Some(header) = best else {
            return Err(FormatError::corrupt(storage.label(), 0, "neither copy of the map's header is whole").into());
        };
        check_header(&*storage, &header, of)?;
        Ok(Self { storage, header, regions, sequence: 0 })
    }

    /// The overlay's random identity.
    pub(super) fn id(&self) -> [u8; 16] {
        self.header.id
    }

    /// Whether somebody else has been writing `disk.raw`.
    pub(super) fn handed_over(&self) -> bool {
        self.header.flags.get() & FLAG_HANDED_OVER != 0
    }

    /// Sets that flag for good, durably.
    pub(super) fn hand_over(&mut self) -> Result<()> {
        if planted(Bug::HandOverNotRecorded) {
            return Ok(());
        }
        self.header.flags = U32::new(self.header.flags.get() | FLAG_HANDED_OVER);
        self.store_header()
    }

    /// Writes both copies of the header, one after the other is durable.
    fn store_header(&mut self) -> Result<()> {
        for _ in 0..2 {
            self.write_header()?;
            self.sync()?;
        }
        Ok(())
    }

    /// Writes the older copy of the header anew.
    fn write_header(&mut self) -> Result<()> {
        self.header.sequence = U64::new(self.header.sequence.get() + 1);
        self.header.crc = U32::new(header_crc(&self.header));
        self.write(self.header.sequence.get() % 2 * PAGE, self.header.as_bytes())
    }

    /// The first journal record that is not in the marks yet.
    pub(super) fn floor(&self) -> u64 {
        self.header.floor.get()
    }

    fn sync(&self) -> Result<()> {
        self.storage.sync().map_err(|e| io_failed(&*self.storage, "sync", 0, e))
    }

    /// Tells `each` the line of every region that is not all absent. Pages that had to be repaired are
    /// appended to `repaired`: they are to be stored again.
    pub(super) fn load(&mut self, repaired: &mut Vec<u32>, each: &mut dyn FnMut(u32, Line)) -> Result<()> {
        let images = self.load_images()?;
        let highest = self.highest_image()?;
        for (index, image) in &images {
            let at = self.place(*index);
            let (mut page, mut head) = ([0; 4096], None);
            self.storage.read_at(at, &mut page).map_err(|e| io_failed(&*self.storage, "read", at, e))?;
            if page != [0; 4096] {
                head = self.page_head(*index, &page);
            }
            if head.is_none_or(|h| h.sequence.get() < self.sequence) && !planted(Bug::ImageNotUsed) {
                repaired.push(*index);
                self.tell(*index, image, each);
            }
        }
        let end = Self::len(self.regions);
        let mut at = PAGES_AT;
        while at < end {
            let map = |e| io_failed(&*self.storage, "map", at, e);
            let (stored, len) = self.storage.allocated(at, end - at).map_err(map)?;
            if !stored && len >= PAGE {
                at += len / PAGE * PAGE;
                continue;
            }
            let until = (at + len.next_multiple_of(PAGE)).min(end);
            while at < until {
                self.load_page(at, repaired, each)?;
                at += PAGE;
            }
        }
        self.sequence = self.sequence.max(highest);
        Ok(())
    }

    /// Highest sequence that any image says it has, whole or not.
    fn highest_image(&self) -> Result<u64> {
        // A batch has no more images than the map has pages.
        let slots = usize::try_from(self.pages()).unwrap_or(usize::MAX).min(MAP_IMAGES_MAX);
        let mut images = vec![0; slots * 4096];
        self.storage.read_at(IMAGES_AT, &mut images).map_err(|e| io_failed(&*self.storage, "read", IMAGES_AT, e))?;
        let heads = images.chunks_exact(4096).filter_map(|image| MapPageHead::read_from_prefix(image).ok());
        let ours = heads.filter(|(head, _)| head.magic == MAP_PAGE_MAGIC && head.id == self.header.id);
        let counts = ours.map(|(head, _)| head.sequence.get()).filter(|sequence| *sequence < SEQUENCE_END);
        Ok(counts.max().unwrap_or(0))
    }

    fn load_page(&mut self, at: u64, repaired: &[u32], each: &mut dyn FnMut(u32, Line)) -> Result<()> {
        let mut page = [0; 4096];
        self.storage.read_at(at, &mut page).map_err(|e| io_failed(&*self.storage, "read", at, e))?;
        let index = u32::try_from((at - PAGES_AT) / PAGE).unwrap_or(u32::MAX);
        if page == [0; 4096] || repaired.contains(&index) {
            return Ok(());
        }
        let Some(head) = self.page_head(index, &page) else {
            let from = u64::from(index) * u64::from(PAGE_REGIONS) * REGION_BYTES;
            let what = format!("map page {index}, for 63 MiB of disk from {from}, is damaged");
            return Err(FormatError::corrupt(self.storage.label(), at, what).into());
        };
        self.sequence = self.sequence.max(head.sequence.get());
        self.tell(index, &page, each);
        Ok(())
    }

    /// The head of a whole page.
    fn page_head(&self, index: u32, page: &Page) -> Option<MapPageHead> {
        let (head, _) = MapPageHead::read_from_prefix(page).ok()?;
        let ours = head.magic == MAP_PAGE_MAGIC && head.id == self.header.id && head.index.get() == index;
        let ours = ours && head.sequence.get() < SEQUENCE_END;
        (ours && (head.crc.get() == page_crc(page) || planted(Bug::MapPageUnchecked))).then_some(head)
    }

    fn tell(&self, index: u32, page: &Page, each: &mut dyn FnMut(u32, Line)) {
        let lines = page.get(HEAD_BYTES..).unwrap_or_default().chunks_exact(LINE_BYTES);
        for (region, line) in (index * PAGE_REGIONS..self.regions).zip(lines) {
            if line.iter().any(|b| *b != 0) {
                each(region, Line::from_bytes(line));
            }
        }
    }

    /// The images of the last batch, if all of it was written; their sequence becomes ours.
    fn load_images(&mut self) -> Result<BTreeMap<u32, Page>> {
        let mut bytes = [0; 4096];
        self.storage.read_at(LIST_AT, &mut bytes).map_err(|e| io_failed(&*self.storage, "read", LIST_AT, e))?;
        let Ok(list) = MapList::read_from_bytes(&bytes) else { return Ok(BTreeMap::new()) };
        let ours = list.magic == MAP_LIST_MAGIC && list.id == self.header.id && list.crc.get() == list_crc(&list);
        if !ours || list.sequence.get() >= SEQUENCE_END {
            return Ok(BTreeMap::new());
        }
        let mut images = BTreeMap::new();
        let count = usize::try_from(list.count.get()).unwrap_or(usize::MAX);
        for (slot, index) in list.pages.iter().take(count).enumerate() {
            let at = IMAGES_AT + slot as u64 * PAGE;
            let mut page = [0; 4096];
            self.storage.read_at(at, &mut page).map_err(|e| io_failed(&*self.storage, "read", at, e))?;
            let whole = self.page_head(index.get(), &page).filter(|h| h.sequence == list.sequence);
            if whole.is_none() || index.get() >= self.pages() {
                // Torn while the images were written: no page had been touched in place yet.
                return Ok(BTreeMap::new());
            }
            images.insert(index.get(), page);
        }
        self.sequence = list.sequence.get();
        Ok(images)
    }

    fn place(&self, index: u32) -> u64 {
        PAGES_AT + u64::from(index) * PAGE
    }

    /// Stores pages, and that all journal records before `floor` are in them, durably; `lines` tells the
    /// line of a region.
    ///
    /// # Errors
    /// Of a write or a sync; either way nothing may be concluded about any of the pages, and nothing
    /// more may be stored.
    pub(super) fn store(&mut self, floor: u64, pages: &[u32], lines: &mut dyn FnMut(u32) -> Line) -> Result<()> {
        let floor = floor.max(self.floor());
        let mut batches = pages.chunks(MAP_IMAGES_MAX).peekable();
        while let Some(batch) = batches.next() {
            self.sequence += 1;
            let mut list = MapList::new_zeroed();
            list.magic = MAP_LIST_MAGIC;
            list.id = self.header.id;
            list.sequence = U64::new(self.sequence);
            list.count = U32::new(u32::try_from(batch.len()).unwrap_or(0));
            let mut images = Vec::with_capacity((batch.len() + 1) * 4096);
            images.extend_from_slice(&[0; 4096]);
            for (index, slot) in batch.iter().zip(list.pages.iter_mut()) {
                *slot = U32::new(*index);
                images.extend_from_slice(&self.build_page(*index, lines));
            }
            list.crc = U32::new(list_crc(&list));
            if let Some(first) = images.get_mut(..4096) {
                first.copy_from_slice(list.as_bytes());
            }
            self.write(LIST_AT, &images)?;
            if !planted(Bug::ImagesNotSynced) {
                self.sync()?;
            }
            for (index, page) in batch.iter().zip(images.chunks_exact(4096).skip(1)) {
                self.write(self.place(*index), page)?;
            }
            // The images of the last batch are durable, so the header may overtake its pages.
            if batches.peek().is_none() {
                self.header.floor = U64::new(floor);
                self.write_header()?;
            }
            if !planted(Bug::MapNotSynced) {
                self.sync()?;
            }
        }
        if pages.is_empty() && self.floor() != floor {
            self.header.floor = U64::new(floor);
            self.write_header()?;
            self.sync()?;
        }
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.storage.write_at(at, bytes).map_err(|e| io_failed(&*self.storage, "write", at, e))
    }

    fn build_page(&self, index: u32, lines: &mut dyn FnMut(u32) -> Line) -> Page {
        let mut page: Page = [0; 4096];
        let mut head = MapPageHead::new_zeroed();
        head.magic = MAP_PAGE_MAGIC;
        head.id = self.header.id;
        head.sequence = U64::new(self.sequence);
        head.index = U32::new(index);
        let (front, back) = page.split_at_mut(HEAD_BYTES);
        front.copy_from_slice(head.as_bytes());
        let regions = index * PAGE_REGIONS..self.regions;
        for (region, line) in regions.zip(back.chunks_exact_mut(LINE_BYTES)) {
            line.copy_from_slice(&lines(region).to_bytes());
        }
        let crc = page_crc(&page).to_le_bytes();
        if let Some(field) = page.get_mut(CRC_AT_PAGE..CRC_AT_PAGE + 4) {
            field.copy_from_slice(&crc);
        }
        page
    }
}

fn regions_of(storage: &dyn Storage, size: u64) -> Result<u32> {
    let regions = u32::try_from(size.div_ceil(REGION_BYTES)).ok().filter(|r| *r < u32::MAX / 2);
    regions.ok_or_else(|| FormatError::unsupported(storage.label(), format!("an overlay of {size} bytes")).into())
}

fn check_header(storage: &dyn Storage, header: &MapHeader, of: &OverlayOf) -> Result<()> {
    if header.version.get() != OVERLAY_VERSION {
        let found = header.version.get();
        return Err(wrong(storage, format!("format version {found}, this build knows {OVERLAY_VERSION}")));
    }
    if header.features_required.get() != 0 {
        let bits = header.features_required.get();
        return Err(wrong(storage, format!("needs features {bits:#x} that this build does not know")));
    }
    if header.size.get() != of.size {
        let found = header.size.get();
        return Err(wrong(storage, format!("belongs to a disk of {found} bytes, not {}", of.size)));
    }
    if header.chain != of.chain && !planted(Bug::WrongChainAccepted) {
        return Err(wrong(storage, "belongs to another chain".to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
