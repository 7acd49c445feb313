//! Any bytes as the map and the journal of an overlay.
//!
//! An input is a list of pages, each behind its file (0 the map, 1 the journal) and its number; all else is zeros.

use std::sync::OnceLock;

use crate::{
    faults::{Image, World},
    guest::{Act, Guest},
    rig::{Rig, perform, read_all},
    rng::Rng,
};

const SECTORS: usize = 256;
const JOURNAL_PAGES: u64 = 17;
const MAP_PAGES: u64 = 3 + 255 + 1;
const PAGE: usize = 4096;
const ITEM: usize = 2 + PAGE;

/// Everything that the numbers of pages in an input can name.
fn rig() -> &'static Rig {
    static RIG: OnceLock<Rig> = OnceLock::new();
    RIG.get_or_init(|| {
        let mut rig = Rig::new(&(1..=SECTORS as u64).collect::<Vec<_>>());
        rig.options.journal_bytes = JOURNAL_PAGES * PAGE as u64;
        rig
    })
}

/// Number of a page in its file: the map's marks lie behind the images, which are seldom many.
fn place(file: u8, number: u8) -> u64 {
    match (file, number) {
        (0, 255) => MAP_PAGES - 1,
        (0, number) => u64::from(number) % MAP_PAGES,
        (_, number) => u64::from(number) % JOURNAL_PAGES,
    }
}

/// Opens the files; what is opened must read and take a write. As they are, and with checksums made right: what was made
/// up so carefully may be believed, but must not break anything.
pub fn overlay(data: &[u8]) {
    let pages = |data: &[u8]| -> Vec<Image> {
        let mut files = vec![Image::default(); 3];
        for (file, pages) in [(0, SECTORS as u64 / 8), (1, MAP_PAGES), (2, JOURNAL_PAGES)] {
            files[file].write(pages * PAGE as u64 - 1, &[0]);
        }
        for item in data.chunks_exact(ITEM) {
            files[1 + usize::from(item[0] & 1)].write(place(item[0] & 1, item[1]) * PAGE as u64, &item[2..]);
        }
        files
    };
    open(pages(data));
    let mut files = pages(data);
    mend(&mut files[1]);
    mend(&mut files[2]);
    open(files);
}

fn open(files: Vec<Image>) {
    let world = World::new(files);
    let Ok(disk) = rig().open(&world) else { return };
    assert_eq!(read_all(&disk).len() as u64, disk.size());
    assert_eq!(disk.local().expect("local").total(), disk.size());
    disk.write(4096, &[7; 4096]).expect("a write");
    disk.flush().expect("a flush");
    let mut out = [0; 4096];
    disk.read(4096, &mut out).expect("read");
    assert_eq!(out, [7; 4096]);
    drop(disk);
    drop(rig().open(&world));
}

/// Makes every checksum of a file right, as far as its pages tell where there is one.
fn mend(file: &mut Image) {
    let mut page = [0; PAGE];
    for at in (0..file.len()).step_by(PAGE) {
        file.read(at, &mut page);
        let (len, field) = match &page[..5] {
            b"AQMAP" => (128, 124),
            b"AQMLS" | b"AQMPG" => (PAGE, 36),
            b"AQJNL" => (40, 12),
            b"AQREC" => {
                mend_entries(file, at, &mut page);
                (PAGE, 60)
            }
            _ => continue,
        };
        page[field..field + 4].fill(0);
        let crc = crc32c::crc32c(&page[..len]);
        page[field..field + 4].copy_from_slice(&crc.to_le_bytes());
        file.write(at, &page);
    }
}

/// The checksums of the pages behind a record's entries, where those take one page.
fn mend_entries(file: &Image, at: u64, head: &mut [u8; PAGE]) {
    let count = u32::from_le_bytes(head[40..44].try_into().expect("four bytes"));
    let mut next = at + PAGE as u64;
    for entry in head[64..].chunks_exact_mut(16).take(count as usize) {
        if entry[7] == 1 {
            let mut bytes = [0; PAGE];
            file.read(next, &mut bytes);
            entry[12..16].copy_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
            next += PAGE as u64;
        }
    }
}

/// Files of overlays with something in them, as inputs.
pub(super) fn overlay_seeds() -> Vec<Vec<u8>> {
    (1..6).map(seed).collect()
}

fn seed(number: u64) -> Vec<u8> {
    let (world, mut dice) = (Rig::world(), Rng::new(number));
    let disk = rig().create(&world);
    let mut guest = Guest::new((1..=SECTORS as u64).collect());
    for act in (0..6 * number).map(|_| Act::any(&mut dice, SECTORS)).chain([Act::Flush]) {
        let bytes = guest.begin(act);
        perform(&disk, act, &bytes).expect("works");
    }
    drop(disk);
    let (files, mut out, mut page) = (world.now(), Vec::new(), [0; PAGE]);
    for (file, image) in [(0u8, &files[1]), (1, &files[2])] {
        for at in (0..image.len() / PAGE as u64).filter(|at| *at < 40 || *at == MAP_PAGES - 1) {
            image.read(at * PAGE as u64, &mut page);
            if page != [0; PAGE] {
                out.extend([file, u8::try_from(at).unwrap_or(255)]);
                out.extend(page);
            }
        }
    }
    out
}
