//! A disk under test: an overlay in a world that can fail, over a raw image.

use std::sync::Arc;

use aquifer_formats::raw::RawLayer;
use aquifer_vdisk::{BlockCache, Chain, Disk, Overlay, OverlayFiles, OverlayOf, OverlayOptions, Settling, Zeroing};

use crate::{
    faults::{Image, World},
    guest::{Act, SECTOR, sector},
    rng::Rng,
};

const FILES: [&str; 3] = ["disk.raw", "map", "journal"];

/// One disk under test: the chain below never changes.
pub struct Rig {
    /// What lies below.
    pub chain: Arc<Chain>,
    /// The files of what lies below, to make it fail.
    pub source: World,
    /// How the overlay is opened.
    pub options: OverlayOptions,
}

impl Rig {
    /// A chain of one raw image of these sectors, with the usual options.
    pub fn new(origin: &[u64]) -> Self {
        let mut image = Image::default();
        for (at, number) in origin.iter().enumerate().filter(|(_, n)| **n != 0) {
            image.write((at * SECTOR) as u64, &sector(*number));
        }
        let source = World::new(vec![image]);
        let below = source.file(0, "origin");
        below.set_len((origin.len() * SECTOR) as u64).expect("a length");
        let layer = RawLayer::open(below).expect("a raw layer");
        let chain = Chain::new(vec![Arc::new(layer)], Arc::new(BlockCache::new(1 << 20))).expect("a chain");
        let options = OverlayOptions { settling: Settling::Callers, ..OverlayOptions::default() };
        Self { chain: Arc::new(chain), source, options }
    }

    /// The same so small that halves of the journal switch, pages spill and memory runs out within a
    /// short history.
    pub fn any(origin: &[u64], dice: &mut Rng) -> Self {
        let mut rig = Self::new(origin);
        rig.options.journal_bytes = 4096 + 2 * 4096 * (8 + dice.below(12));
        rig.options.memory_bytes = 64 << 10;
        rig.options.spill_bytes = dice.pick(&[0, 8 << 10, 32 << 10, 1 << 20]);
        rig.options.ahead_bytes = dice.pick(&[rig.options.spill_bytes.max(8 << 10), u64::MAX]);
        rig
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.chain.size()
    }

    /// Empty files of an overlay.
    pub fn world() -> World {
        World::new(vec![Image::default(); FILES.len()])
    }

    /// What the overlay belongs to.
    pub fn of(&self) -> OverlayOf {
        OverlayOf { size: self.chain.size(), chain: [7; 32] }
    }

    /// The files of an overlay in a world.
    pub fn files(world: &World) -> OverlayFiles {
        let [raw, map, journal] = FILES;
        OverlayFiles { raw: world.file(0, raw), map: world.file(1, map), journal: world.file(2, journal) }
    }

    /// Makes a new overlay.
    pub fn create(&self, world: &World) -> Disk {
        self.try_create(world).expect("create")
    }

    /// Makes a new overlay in a world that may fail.
    pub fn try_create(&self, world: &World) -> aquifer_vdisk::Result<Disk> {
        let overlay = Overlay::create_on(Self::files(world), self.of(), self.options)?;
        Disk::writable("d", Arc::clone(&self.chain), overlay)
    }

    /// Opens the overlay of a world.
    pub fn open(&self, world: &World) -> aquifer_vdisk::Result<Disk> {
        let overlay = Overlay::open_on(Self::files(world), self.of(), self.options)?;
        Disk::writable("d", Arc::clone(&self.chain), overlay)
    }
}

/// Does an act; a drain of a disk that is not local yet is no error.
pub fn perform(disk: &Disk, act: Act, bytes: &[u8]) -> aquifer_vdisk::Result<()> {
    let place = |first: usize, count: usize| ((first * SECTOR) as u64, (count * SECTOR) as u64);
    match act {
        Act::Write { first, .. } => disk.write((first * SECTOR) as u64, bytes),
        Act::Zero { first, count, keep } => {
            let (offset, len) = place(first, count);
            disk.write_zeroes(offset, len, if keep { Zeroing::KeepSpace } else { Zeroing::MayTrim })
        }
        Act::Flush => disk.flush(),
        Act::Hydrate { first, count } => {
            let (offset, len) = place(first, count);
            disk.hydrate(offset, len).map(|_| ())
        }
        Act::Seal => disk.seal(),
        Act::Drain => match disk.drain() {
            Err(aquifer_vdisk::Error::NotLocal { .. }) => Ok(()),
            other => other,
        },
    }
}

/// Everything a guest can read.
pub fn read_all(disk: &Disk) -> Vec<u8> {
    let mut out = vec![0; disk.size() as usize];
    disk.read(0, &mut out).expect("read everything");
    out
}
