//! One disk of an archive as a layer.
//!
//! Invariants
//! - A cluster is in the archive once; a second one is damage.
//! - Memory is bounded by the archive's length: 16 bytes for each cluster that a header lists.

use super::{Device, sum_holds, u32_at, u64_at};
use crate::{BlockRef, Content, Error, Layer, Result, tables::TableFile};

const CLUSTER: u64 = 64 << 10;
const BLOCK: u64 = 4096;
const EXTENT_HEAD: u64 = 512;
const INFOS: usize = 59;

/// Where the stored blocks of a cluster begin, and which they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cluster {
    index: u32,
    /// Byte offset, shifted left by 16, and the mask.
    packed: u64,
}

impl Cluster {
    fn offset(self) -> u64 {
        self.packed >> 16
    }

    fn mask(self) -> u64 {
        self.packed & 0xffff
    }
}

/// One disk.
#[derive(Debug)]
pub struct VmaLayer {
    file: TableFile,
    label: String,
    size: u64,
    /// By index.
    clusters: Vec<Cluster>,
    uuid: [u8; 16],
}

impl VmaLayer {
    pub(super) fn new(file: TableFile, uuid: &[u8; 16], start: u64, device: &Device) -> Result<Self> {
        let mut clusters = Vec::new();
        let mut at = start;
        while at < file.len {
            let mut head = file.read(at, EXTENT_HEAD, "an extent's header")?;
            let bad = |what: String| Error::corrupt(file.label(), at, format!("extent: {what}"));
            if !head.starts_with(b"VMAE") || head.get(8..24) != Some(uuid) || !sum_holds(&mut head, 24) {
                return Err(bad("no extent of this archive, or its checksum is wrong".into()));
            }
            let blocks = u64::from(u32_at(&head, 4) & 0xffff);
            let (mut stored, data) = (0, at + EXTENT_HEAD);
            for number in 0..INFOS {
                let info = u64_at(&head, 40 + 8 * number);
                let (mask, id, index) = (info >> 48, info >> 32 & 0xff, u32::try_from(info & 0xffff_ffff).unwrap_or(0));
                if id == 0 {
                    continue;
                }
                if id == u64::from(device.id) {
                    if u64::from(index) >= device.size.div_ceil(CLUSTER) {
                        return Err(bad(format!("cluster {index} lies past the end of {:?}", device.name)));
                    }
                    clusters.push(Cluster { index, packed: (data + stored * BLOCK) << 16 | mask });
                }
                stored += u64::from(mask.count_ones());
            }
            if stored != blocks {
                return Err(bad(format!("{blocks} blocks, but its clusters have {stored}")));
            }
            file.check_inside(data, blocks * BLOCK, "an extent")?;
            at = data + blocks * BLOCK;
        }
        clusters.sort_unstable();
        let twice = clusters.windows(2).find_map(|pair| match pair {
            [a, b] if a.index == b.index => Some(*b),
            _ => None,
        });
        if let Some(twice) = twice {
            let what = format!("cluster {} of {:?} is in the archive twice", twice.index, device.name);
            return Err(Error::corrupt(file.label(), twice.offset(), what));
        }
        let label = format!("{} ({})", file.label(), device.name);
        Ok(Self { file, label, size: device.size, clusters, uuid: *uuid })
    }

    fn piece(&self, at: u64, end: u64) -> Result<(Content, u64)> {
        let index = at / CLUSTER;
        let found = self.clusters.binary_search_by_key(&index, |cluster| cluster.index.into());
        let cluster = found.ok().and_then(|place| self.clusters.get(place)).ok_or_else(|| Error::ChainBroken {
            path: self.label.clone(),
            what: format!("cluster {index} (disk offset {}) is missing in the archive", index * CLUSTER),
        })?;
        let start = index * CLUSTER;
        let end = end.min(start.saturating_add(CLUSTER));
        let mask = cluster.mask();
        let is_stored = |at: u64| mask >> ((at - start) / BLOCK) & 1 == 1;
        let stored = is_stored(at);
        let mut to = at;
        while to < end && is_stored(to) == stored {
            to = (to - to % BLOCK + BLOCK).min(end);
        }
        if !stored {
            return Ok((Content::Zero, to - at));
        }
        let before = (mask & ((1 << ((at - start) / BLOCK)) - 1)).count_ones();
        let offset = cluster.offset() + u64::from(before) * BLOCK + at % BLOCK;
        Ok((Content::Plain { file: 0, offset }, to - at))
    }
}

impl Layer for VmaLayer {
    fn label(&self) -> &str {
        &self.label
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn grain(&self) -> u64 {
        BLOCK
    }

    crate::runs::layer_in_pieces!(file);

    fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = self.file.fingerprint("vma", self.size);
        hash.update(&self.uuid);
        for cluster in &self.clusters {
            hash.update(&cluster.index.to_le_bytes()).update(&cluster.packed.to_le_bytes());
        }
        Ok(*hash.finalize().as_bytes())
    }

    fn unpack(&self, block: &BlockRef, _need: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        Err(Error::corrupt(&self.label, block.offset, "an archive that is not compressed has no packed blocks"))
    }
}
