//! VMware disks as VMware's products lay them out, where `qemu-img` does it otherwise or not at all.

use std::collections::BTreeMap;

const SECTOR: usize = 512;

/// A grain as it is written.
#[derive(Clone, Debug)]
pub enum Grain {
    /// Its bytes, as many as a grain has.
    Data(Vec<u8>),
    /// Zeros that hide what is below.
    Zero,
    /// Unmapped by the guest (seSparse only).
    Unmapped,
}

/// What a sparse extent holds, by index of the grain.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Sectors of disk.
    pub capacity: u64,
    /// Sectors of a grain.
    pub grain: u64,
    /// What is stored.
    pub grains: BTreeMap<u64, Grain>,
}

/// The text of a descriptor.
pub fn descriptor(kind: &str, cid: u32, parent: Option<(u32, &str)>, extents: &[String]) -> String {
    let (parent_cid, hint) = match parent {
        Some((cid, name)) => (cid, format!("parentFileNameHint=\"{name}\"\n")),
        None => (u32::MAX, String::new()),
    };
    format!(
        "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID={cid:08x}\nparentCID={parent_cid:08x}\n\
         createType=\"{kind}\"\n{hint}\n# Extent description\n{}\n\n# The Disk Data Base\n#DDB\n\n\
         ddb.adapterType = \"lsilogic\"\nddb.virtualHWVersion = \"14\"\n",
        extents.join("\n")
    )
}

/// A file that grows by sectors.
#[derive(Default)]
struct File {
    bytes: Vec<u8>,
}

impl File {
    fn sectors(&self) -> u32 {
        (self.bytes.len() / SECTOR) as u32
    }

    fn reserve(&mut self, sectors: usize) -> u32 {
        let at = self.sectors();
        self.bytes.resize(self.bytes.len() + sectors * SECTOR, 0);
        at
    }

    fn append(&mut self, bytes: &[u8]) -> u32 {
        let at = self.sectors();
        self.bytes.extend_from_slice(bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(SECTOR), 0);
        at
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    fn u64(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_le_bytes());
    }
}

/// The header of a hosted extent, at any place of its file.
struct Header {
    flags: u32,
    directory: u64,
    descriptor_sectors: u64,
    overhead: u64,
    compression: u16,
}

impl Extent {
    fn hosted_header(&self, header: &Header) -> Vec<u8> {
        let mut file = File::default();
        file.reserve(1);
        file.put(0, b"KDMV");
        file.u32(4, 1);
        file.u32(8, header.flags);
        file.u64(12, self.capacity);
        file.u64(20, self.grain);
        file.u64(28, u64::from(header.descriptor_sectors > 0));
        file.u64(36, header.descriptor_sectors);
        file.u32(44, 512);
        file.u64(56, header.directory);
        file.u64(64, header.overhead);
        file.put(73, b"\n \r\n");
        file.put(77, &header.compression.to_le_bytes());
        file.bytes
    }

    /// `KDMV` with plain grains; `text` is its own descriptor, empty where that is another file.
    pub fn hosted(&self, text: &str) -> Vec<u8> {
        let tables = self.capacity.div_ceil(self.grain * 512) as usize;
        let mut file = File::default();
        file.reserve(1);
        let descriptor_sectors = if text.is_empty() { 0 } else { 20 };
        let at = file.reserve(descriptor_sectors) as usize * SECTOR;
        file.put(at, text.as_bytes());
        let directory = file.reserve((tables * 4).div_ceil(SECTOR));
        let places: Vec<u32> = (0..tables).map(|_| file.reserve(4)).collect();
        for (index, place) in places.iter().enumerate() {
            file.u32(directory as usize * SECTOR + 4 * index, *place);
        }
        for (index, grain) in &self.grains {
            let entry = match grain {
                Grain::Data(bytes) => file.append(bytes),
                Grain::Zero => 1,
                Grain::Unmapped => 0,
            };
            let table = places[(index / 512) as usize] as usize;
            file.u32(table * SECTOR + 4 * (index % 512) as usize, entry);
        }
        let header = Header {
            flags: 0b101,
            directory: directory.into(),
            descriptor_sectors: descriptor_sectors as u64,
            overhead: 128,
            compression: 0,
        };
        file.put(0, &self.hosted_header(&header));
        file.bytes
    }

    /// As VMware's products export it: grains, each table behind those it maps, then directory, footer and end.
    pub fn stream(&self, text: &str) -> Vec<u8> {
        let header =
            |directory| Header { flags: 0x3_0001, directory, descriptor_sectors: 20, overhead: 128, compression: 1 };
        let mut file = File::default();
        file.append(&self.hosted_header(&header(u64::MAX)));
        let at = file.reserve(127) as usize * SECTOR;
        file.put(at, text.as_bytes());
        let tables = self.capacity.div_ceil(self.grain * 512);
        let mut directory = vec![0u32; tables as usize];
        for (number, place) in directory.iter_mut().enumerate() {
            let mut table = vec![0u8; 4 * SECTOR];
            for (index, grain) in self.grains.range(number as u64 * 512..(number as u64 + 1) * 512) {
                let Grain::Data(bytes) = grain else { continue };
                let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::new(6));
                std::io::Write::write_all(&mut encoder, bytes).expect("memory");
                let data = encoder.finish().expect("memory");
                let marker =
                    [&(index * self.grain).to_le_bytes()[..], &(data.len() as u32).to_le_bytes(), &data].concat();
                let entry = file.append(&marker);
                table[4 * (index % 512) as usize..][..4].copy_from_slice(&entry.to_le_bytes());
            }
            if table.iter().any(|byte| *byte != 0) {
                file.append(&marker(4, 1));
                *place = file.append(&table);
            }
        }
        let directory: Vec<u8> = directory.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        file.append(&marker(directory.len().div_ceil(SECTOR) as u64, 2));
        let at = file.append(&directory);
        file.append(&marker(1, 3));
        file.append(&self.hosted_header(&header(at.into())));
        file.append(&marker(0, 0));
        file.bytes
    }

    /// A delta of older VMFS versions.
    pub fn cowd(&self) -> Vec<u8> {
        let tables = self.capacity.div_ceil(self.grain * 4096) as usize;
        let mut file = File::default();
        file.reserve(4);
        let directory = file.reserve((tables * 4).div_ceil(SECTOR));
        let mut places = vec![0u32; tables];
        for (index, grain) in &self.grains {
            let Grain::Data(bytes) = grain else { continue };
            let number = (index / 4096) as usize;
            if places[number] == 0 {
                places[number] = file.reserve(32);
                file.u32(directory as usize * SECTOR + 4 * number, places[number]);
            }
            let entry = file.append(bytes);
            file.u32(places[number] as usize * SECTOR + 4 * (index % 4096) as usize, entry);
        }
        let free = file.sectors();
        file.put(0, b"COWD");
        for (at, value) in [
            (4, 1),
            (8, 3),
            (12, self.capacity as u32),
            (16, self.grain as u32),
            (20, directory),
            (24, tables as u32),
            (28, free),
        ] {
            file.u32(at, value);
        }
        file.bytes
    }

    /// A delta of newer VMFS versions; its grains are 8 sectors.
    pub fn sesparse(&self) -> Vec<u8> {
        assert_eq!(self.grain, 8, "the only grain there is");
        let tables = self.capacity.div_ceil(8 * 4096) as usize;
        let mut file = File::default();
        file.reserve(4);
        let directory_sectors = (tables * 8).div_ceil(SECTOR);
        let directory = file.reserve(directory_sectors);
        let table_area = file.reserve(tables * 64);
        let grains = file.sectors();
        let mut known: Vec<u64> = Vec::new();
        for (index, grain) in &self.grains {
            let table = index / 4096;
            let number = known.iter().position(|t| *t == table).unwrap_or_else(|| {
                known.push(table);
                known.len() - 1
            });
            file.u64(directory as usize * SECTOR + 8 * table as usize, 0x1000_0000 << 32 | number as u64);
            let entry = match grain {
                Grain::Data(bytes) => {
                    let at = u64::from(file.append(bytes) - grains) / 8;
                    3 << 60 | (at & 0xfff) << 48 | at >> 12
                }
                Grain::Zero => 2 << 60,
                Grain::Unmapped => 1 << 60,
            };
            let at = (table_area as usize + 64 * number) * SECTOR + 8 * (index % 4096) as usize;
            file.u64(at, entry);
        }
        let areas = [(1, 1), (2, 1), (3, 1), (directory.into(), directory_sectors as u64)];
        let tables = (table_area.into(), tables as u64 * 64);
        let end = u64::from(file.sectors());
        for (at, value) in [0xcafe_babe, 0x2_0000_0001, self.capacity, 8, 64].into_iter().enumerate() {
            file.u64(8 * at, value);
        }
        let areas = areas.into_iter().chain([tables, (end, 0), (end, 0), (grains.into(), end - u64::from(grains))]);
        for (number, (at, sectors)) in areas.enumerate() {
            file.u64(80 + 16 * number, at);
            file.u64(88 + 16 * number, sectors);
        }
        file.u64(SECTOR, 0xcafe_cafe);
        file.bytes
    }
}

fn marker(sectors: u64, kind: u32) -> Vec<u8> {
    let mut bytes = vec![0; SECTOR];
    bytes[..8].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..16].copy_from_slice(&kind.to_le_bytes());
    bytes
}
