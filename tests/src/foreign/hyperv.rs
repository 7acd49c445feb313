//! Differencing disks of Hyper-V and Virtual PC, which no tool here writes.

use std::collections::BTreeMap;

const SECTOR: usize = 512;
const MIB: usize = 1 << 20;

/// What a differencing disk holds: sectors of 512 bytes by their number.
pub type Sectors = BTreeMap<u64, [u8; SECTOR]>;

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    bytes[at..at + part.len()].copy_from_slice(part);
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

fn stored(guid: &str) -> [u8; 16] {
    uuid::Uuid::parse_str(guid).expect("a guid").to_bytes_le()
}

/// The content id of a VHDX file: its newest header's.
///
/// # Panics
/// It is no VHDX file.
pub fn vhdx_content_id(bytes: &[u8]) -> [u8; 16] {
    let sequence = |at: usize| u64::from_le_bytes(bytes[at + 8..at + 16].try_into().expect("eight bytes"));
    let newest = if sequence(0x1_0000) > sequence(0x2_0000) { 0x1_0000 } else { 0x2_0000 };
    assert_eq!(&bytes[newest..newest + 4], b"head");
    bytes[newest + 32..newest + 48].try_into().expect("sixteen bytes")
}

/// A child of a VHDX disk, as Hyper-V makes one for a checkpoint.
#[derive(Debug)]
pub struct VhdxChild<'a> {
    /// Content id of its own.
    pub id: [u8; 16],
    /// The parent's content id.
    pub parent: [u8; 16],
    /// Entries of the parent locator beside the linkage.
    pub paths: &'a [(&'a str, &'a str)],
    /// Size of the disk in bytes.
    pub size: u64,
    /// Size of a block in bytes.
    pub block: u64,
    /// Sectors that are written.
    pub sectors: &'a Sectors,
    /// Blocks that read as zeros.
    pub zero_blocks: &'a [u64],
}

impl VhdxChild<'_> {
    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let (log, metadata, bat) = (MIB, 2 * MIB, 3 * MIB);
        let ratio = (1 << 23) * 512 / self.block;
        let blocks = self.size.div_ceil(self.block);
        let bat_len = (blocks.div_ceil(ratio) * (ratio + 1) * 8).next_multiple_of(MIB as u64) as usize;
        let mut out = vec![0; bat + bat_len];
        put(&mut out, 0, b"vhdxfile");
        for (at, sequence) in [(0x1_0000, 6u64), (0x2_0000, 5)] {
            put(&mut out, at, b"head");
            put(&mut out, at + 8, &sequence.to_le_bytes());
            put(&mut out, at + 32, &self.id);
            put(&mut out, at + 66, &1u16.to_le_bytes());
            put(&mut out, at + 68, &(MIB as u32).to_le_bytes());
            put(&mut out, at + 72, &(log as u64).to_le_bytes());
        }
        put(&mut out, 0x3_0000, b"regi\0\0\0\0\x02");
        let regions = [
            ("2dc27766-f623-4200-9d64-115e9bfd4a08", bat, bat_len),
            ("8b7ca206-4790-4b9a-b8fe-575f050f886e", metadata, MIB),
        ];
        for (number, (guid, at, len)) in regions.into_iter().enumerate() {
            let entry = 0x3_0010 + 32 * number;
            put(&mut out, entry, &stored(guid));
            put(&mut out, entry + 16, &(at as u64).to_le_bytes());
            put(&mut out, entry + 24, &(len as u32).to_le_bytes());
            put(&mut out, entry + 28, &1u32.to_le_bytes());
        }
        for (at, len) in [(0x1_0000, 4096), (0x2_0000, 4096), (0x3_0000, 0x1_0000)] {
            let sum = crc32c::crc32c(&out[at..at + len]);
            put(&mut out, at + 4, &sum.to_le_bytes());
        }
        let table = out[0x3_0000..0x4_0000].to_vec();
        put(&mut out, 0x4_0000, &table);
        self.metadata(&mut out, metadata);
        self.blocks(&mut out, bat, ratio);
        out
    }

    fn metadata(&self, out: &mut [u8], at: usize) {
        let locator = self.locator();
        let items: [(&str, Vec<u8>); 5] = [
            ("a8d35f2d-b30b-454d-abf7-d3d84834ab0c", locator),
            (
                "caa16737-fa36-4d43-b3b6-33f0aa44e76b",
                [self.block as u32, 2].iter().flat_map(|n| n.to_le_bytes()).collect(),
            ),
            ("2fa54224-cd1b-4876-b211-5dbed83bf4b8", self.size.to_le_bytes().into()),
            ("8141bf1d-a96f-4709-ba47-f233a8faab5f", 512u32.to_le_bytes().into()),
            ("beca12ab-b2e6-4523-93ef-c309e000c746", vec![3; 16]),
        ];
        put(out, at, b"metadata\0\0\x05");
        let mut offset = 0x1_0000;
        for (number, (guid, value)) in items.iter().enumerate() {
            let entry = at + 32 + 32 * number;
            put(out, entry, &stored(guid));
            put(out, entry + 16, &(offset as u32).to_le_bytes());
            put(out, entry + 20, &(value.len() as u32).to_le_bytes());
            put(out, entry + 24, &4u32.to_le_bytes());
            put(out, at + offset, value);
            offset += value.len().next_multiple_of(8);
        }
    }

    fn locator(&self) -> Vec<u8> {
        let linkage = format!("{{{}}}", uuid::Uuid::from_bytes_le(self.parent));
        let mut entries = vec![("parent_linkage", linkage.as_str())];
        entries.extend(self.paths);
        let mut out = stored("b04aefb7-d19e-4a81-b789-25b8e9445913").to_vec();
        out.extend([0, 0]);
        out.extend((entries.len() as u16).to_le_bytes());
        let mut texts = Vec::new();
        let start = 20 + 12 * entries.len();
        for (key, value) in entries {
            let (key, value) = (utf16(key), utf16(value));
            out.extend(((start + texts.len()) as u32).to_le_bytes());
            out.extend(((start + texts.len() + key.len()) as u32).to_le_bytes());
            out.extend((key.len() as u16).to_le_bytes());
            out.extend((value.len() as u16).to_le_bytes());
            texts.extend(key);
            texts.extend(value);
        }
        out.extend(texts);
        out
    }

    fn blocks(&self, out: &mut Vec<u8>, bat: usize, ratio: u64) {
        let entry = |out: &mut Vec<u8>, index: u64, place: usize, state: u64| {
            put(out, bat + 8 * index as usize, &((place as u64) | state).to_le_bytes());
        };
        for block in self.zero_blocks {
            entry(out, block + block / ratio, 0, 2);
        }
        let mut bitmaps: BTreeMap<u64, usize> = BTreeMap::new();
        let mut places: BTreeMap<u64, usize> = BTreeMap::new();
        let in_block = self.block / SECTOR as u64;
        for (sector, bytes) in self.sectors {
            let (block, inside) = (sector / in_block, sector % in_block);
            let bitmap = *bitmaps.entry(block / ratio).or_insert_with(|| {
                out.resize(out.len() + MIB, 0);
                out.len() - MIB
            });
            let place = *places.entry(block).or_insert_with(|| {
                // What is stored where no bit is set must never be shown.
                out.resize(out.len() + self.block as usize, 0xdb);
                out.len() - self.block as usize
            });
            put(out, place + SECTOR * inside as usize, bytes);
            let bit = block % ratio * in_block + inside;
            out[bitmap + bit as usize / 8] |= 1 << (bit % 8);
        }
        for (chunk, place) in bitmaps {
            entry(out, chunk * (ratio + 1) + ratio, place, 6);
        }
        for (block, place) in places {
            let whole = (0..in_block).all(|s| self.sectors.contains_key(&(block * in_block + s)));
            entry(out, block + block / ratio, place, if whole { 6 } else { 7 });
        }
    }
}

/// A child of a VHD disk.
#[derive(Debug)]
pub struct VhdChild<'a> {
    /// Its own id.
    pub id: [u8; 16],
    /// The parent's id.
    pub parent: [u8; 16],
    /// Relative path of the parent, as Windows spells it.
    pub relative: &'a str,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Sectors that are written.
    pub sectors: &'a Sectors,
}

/// The id of a VHD file.
pub fn vhd_id(bytes: &[u8]) -> [u8; 16] {
    let footer = &bytes[bytes.len() - 512..];
    assert_eq!(&footer[..8], b"conectix");
    footer[68..84].try_into().expect("sixteen bytes")
}

fn vhd_sum(bytes: &[u8]) -> [u8; 4] {
    (!bytes.iter().map(|b| u32::from(*b)).sum::<u32>()).to_be_bytes()
}

impl VhdChild<'_> {
    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        const BLOCK: usize = 2 << 20;
        let blocks = (self.size as usize).div_ceil(BLOCK);
        let mut footer = vec![0; 512];
        put(&mut footer, 0, b"conectix\0\0\0\x02\0\x01\0\0");
        put(&mut footer, 16, &512u64.to_be_bytes());
        put(&mut footer, 28, b"win \0\x0a\0\0Wi2k");
        put(&mut footer, 40, &self.size.to_be_bytes());
        put(&mut footer, 48, &self.size.to_be_bytes());
        put(&mut footer, 60, &4u32.to_be_bytes());
        put(&mut footer, 68, &self.id);
        let sum = vhd_sum(&footer);
        put(&mut footer, 64, &sum);

        let name = utf16(self.relative);
        let table_at = 512 + 1024 + 512;
        let mut header = vec![0; 1024];
        put(&mut header, 0, b"cxsparse\xff\xff\xff\xff\xff\xff\xff\xff");
        put(&mut header, 16, &(table_at as u64).to_be_bytes());
        put(&mut header, 24, &0x1_0000u32.to_be_bytes());
        put(&mut header, 28, &(blocks as u32).to_be_bytes());
        put(&mut header, 32, &(BLOCK as u32).to_be_bytes());
        put(&mut header, 40, &self.parent);
        put(&mut header, 576, b"W2ru");
        put(&mut header, 580, &1u32.to_be_bytes());
        put(&mut header, 584, &(name.len() as u32).to_be_bytes());
        put(&mut header, 592, &1536u64.to_be_bytes());
        let sum = vhd_sum(&header);
        put(&mut header, 36, &sum);

        let mut out = [&footer[..], &header].concat();
        out.extend(&name);
        out.resize(table_at, 0);
        out.resize(table_at + (blocks * 4).next_multiple_of(512), 0xff);
        let mut places: BTreeMap<u64, usize> = BTreeMap::new();
        for (sector, bytes) in self.sectors {
            let (block, inside) = (sector / 4096, (sector % 4096) as usize);
            let place = *places.entry(block).or_insert_with(|| {
                out.resize(out.len() + 512, 0);
                // What is stored where no bit is set must never be shown.
                out.resize(out.len() + BLOCK, 0xdb);
                out.len() - BLOCK - 512
            });
            out[place + inside / 8] |= 0x80 >> (inside % 8);
            put(&mut out, place + 512 + SECTOR * inside, bytes);
        }
        for (block, place) in places {
            put(&mut out, table_at + 4 * block as usize, &((place / 512) as u32).to_be_bytes());
        }
        out.extend(&footer);
        out
    }
}
