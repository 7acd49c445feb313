//! Veeam's backup files, fulls and increments, laid out from the format's facts with none of the reader's code.

use std::collections::HashMap;

use md5::{Digest, Md5};

const PAGE: usize = 4096;
const BANK_PAGES: usize = 32;
const NONE: u64 = u64::MAX;
const SLOT_PLACES: usize = 40;

/// How blocks are encoded; the numbers are the format's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As they are.
    Plain = 0xff,
    /// zlib, with its header.
    Zlib = 4,
    /// LZ4 behind a header of its own.
    Lz4 = 7,
    /// zstd.
    Zstd = 8,
}

/// What a file of a backup holds.
#[derive(Clone, Debug)]
pub enum Body<'a> {
    /// All its bytes.
    Whole(&'a [u8]),
    /// Only these blocks, by index; an empty one is zeros.
    Changed {
        /// Length of the whole file.
        len: u64,
        /// Index and bytes.
        blocks: Vec<(u64, &'a [u8])>,
    },
}

/// The blocks that differ between two states of a file, as an increment has them.
pub fn changes<'a>(old: &[u8], new: &'a [u8], block: usize) -> Body<'a> {
    let blocks = new.chunks(block).enumerate().filter(|(i, bytes)| old.chunks(block).nth(*i) != Some(bytes));
    let zeros = |bytes: &[u8]| bytes.iter().all(|b| *b == 0);
    let blocks = blocks.map(|(i, bytes)| (i as u64, if zeros(bytes) { &[][..] } else { bytes })).collect();
    Body::Changed { len: new.len() as u64, blocks }
}

/// One machine at one point in time.
#[derive(Clone, Debug)]
pub struct Machine<'a> {
    /// Name of its folder in the file.
    pub folder: &'a str,
    /// The machine's name.
    pub name: &'a str,
    /// Id of the point.
    pub id: u128,
    /// Id of the point below; 0 for a full one.
    pub below: u128,
    /// Files by name.
    pub files: Vec<(&'a str, Body<'a>)>,
}

/// A whole file.
#[derive(Clone, Debug)]
pub struct File<'a> {
    /// 9 and 13 are seen in the field.
    pub version: u32,
    /// Bytes of a block.
    pub block: usize,
    /// Encodings, taken in turn.
    pub encodings: &'a [Encoding],
    /// The machines in it.
    pub machines: Vec<Machine<'a>>,
}

struct Writer {
    tables: bool,
    block: usize,
    encodings: Vec<Encoding>,
    /// The file so far: blocks behind the place for header and slots.
    out: Vec<u8>,
    pages: Vec<Vec<u8>>,
    store: Vec<Vec<u8>>,
    known: HashMap<[u8; 16], u64>,
}

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    bytes[at..at + part.len()].copy_from_slice(part);
}

fn uuid(id: u128) -> String {
    uuid::Uuid::from_u128(id).to_string()
}

impl Writer {
    fn page(&mut self) -> u64 {
        let number = self.pages.len();
        self.pages.push(vec![0; PAGE]);
        (((number / BANK_PAGES) << 32) | (number % BANK_PAGES)) as u64
    }

    fn at(&mut self, id: u64) -> &mut Vec<u8> {
        &mut self.pages[(id >> 32) as usize * BANK_PAGES + (id & 0xffff_ffff) as usize]
    }

    /// Writes a list; answers its root page.
    fn vector(&mut self, items: &[Vec<u8>]) -> u64 {
        let Some(first) = items.first() else { return NONE };
        let head = if self.tables { 0 } else { 8 };
        let per_page = (PAGE - head) / first.len();
        let pages: Vec<u64> = items.chunks(per_page).map(|part| self.data_page(head, part)).collect();
        if self.tables {
            return self.table(&pages);
        }
        for (number, page) in pages.iter().enumerate() {
            let next = pages.get(number + 1).copied().unwrap_or(NONE);
            put(self.at(*page), 0, &next.to_le_bytes());
        }
        pages[0]
    }

    fn data_page(&mut self, head: usize, items: &[Vec<u8>]) -> u64 {
        let page = self.page();
        let bytes: Vec<u8> = items.concat();
        put(self.at(page), head, &bytes);
        page
    }

    /// The table over the pages of a list: groups of 1, 3, 12, 48 pages are set aside together, each page begins
    /// with a link to the next one, and the first of a group goes on with the ids of the whole group.
    fn table(&mut self, data: &[u64]) -> u64 {
        let (mut left, mut group, mut all) = (data, 1, Vec::new());
        while !left.is_empty() {
            let ids: Vec<u64> = (0..group).map(|_| self.page()).collect();
            for (number, id) in ids.iter().enumerate() {
                let mut words = vec![NONE];
                if number == 0 {
                    words.extend(&ids);
                }
                let room = (512 - words.len()).min(left.len());
                words.extend(&left[..room]);
                left = &left[room..];
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                put(self.at(*id), 0, &bytes);
                all.push(*id);
            }
            group = if group == 1 { 3 } else { group * 4 };
        }
        for pair in all.windows(2) {
            put(self.at(pair[0]), 0, &pair[1].to_le_bytes());
        }
        all[0]
    }

    /// Stores a block once; its id.
    fn store(&mut self, bytes: &[u8], digest: [u8; 16]) -> u64 {
        if let Some(id) = self.known.get(&digest) {
            return *id;
        }
        let mut encoding = self.encodings[self.store.len() % self.encodings.len()];
        let mut stored = encoded(encoding, bytes);
        if stored.len() >= bytes.len() {
            (encoding, stored) = (Encoding::Plain, bytes.to_vec());
        }
        let offset = self.out.len();
        let room = stored.len().next_multiple_of(PAGE);
        self.out.extend(&stored);
        self.out.resize(offset + room, 0xee);
        let mut entry = vec![0; 60];
        put(&mut entry, 0, &[4]);
        put(&mut entry, 1, &1u32.to_le_bytes());
        put(&mut entry, 5, &(offset as u64).to_le_bytes());
        put(&mut entry, 13, &(room as u32).to_le_bytes());
        put(&mut entry, 18, &digest);
        put(&mut entry, 34, &[encoding as u8]);
        put(&mut entry, 36, &(stored.len() as u32).to_le_bytes());
        put(&mut entry, 40, &(bytes.len() as u32).to_le_bytes());
        self.store.push(entry);
        self.known.insert(digest, self.store.len() as u64 - 1);
        self.store.len() as u64 - 1
    }

    /// The head that entries of both kinds of list share; empty or zero bytes are not stored.
    fn listed(&mut self, bytes: &[u8], len: usize) -> Vec<u8> {
        let sparse = bytes.iter().all(|b| *b == 0);
        let digest: [u8; 16] = if sparse { Md5::digest(vec![0; len]).into() } else { Md5::digest(bytes).into() };
        let id = if sparse { NONE } else { self.store(bytes, digest) };
        let mut entry = Vec::new();
        entry.extend((len as u32).to_le_bytes());
        entry.push(u8::from(sparse));
        entry.extend(digest);
        entry.extend(id.to_le_bytes());
        entry
    }

    /// An entry of a folder.
    fn file(&mut self, name: &str, body: &Body<'_>) -> Vec<u8> {
        let (kind, root, count, len) = match body {
            Body::Whole(bytes) => {
                let block = self.block.min(bytes.len());
                let mut tables = Vec::new();
                for table in bytes.chunks(block * 0x440) {
                    let sparse = table.iter().all(|b| *b == 0) && table.len() == block * 0x440;
                    let blocks: Vec<Vec<u8>> = match sparse {
                        true => Vec::new(),
                        false => table
                            .chunks(block)
                            .map(|bytes| [&self.listed(bytes, bytes.len())[..], &[0; 17]].concat())
                            .collect(),
                    };
                    let root = self.vector(&blocks);
                    let words = [root, block as u64, blocks.len() as u64];
                    tables.push(words.iter().flat_map(|word| word.to_le_bytes()).collect());
                }
                (3u32, self.vector(&tables), bytes.len().div_ceil(block) as u64, bytes.len() as u64)
            }
            Body::Changed { len, blocks } => {
                let mut entries = Vec::new();
                for (index, bytes) in blocks {
                    let due = (*len - index * self.block as u64).min(self.block as u64);
                    let head = self.listed(bytes, due as usize);
                    entries.push([&head[..], &index.to_le_bytes(), &[0; 16]].concat());
                }
                (5, self.vector(&entries), blocks.len() as u64, *len)
            }
        };
        let mut item = item(kind, name);
        put(&mut item, 0x98, &root.to_le_bytes());
        put(&mut item, 0xa0, &count.to_le_bytes());
        put(&mut item, 0xa8, &len.to_le_bytes());
        put(&mut item, 0xb0, &NONE.to_le_bytes());
        item
    }

    fn machine(&mut self, machine: &Machine<'_>) -> Vec<u8> {
        let summary = summary(machine);
        let mut items: Vec<Vec<u8>> = machine.files.iter().map(|(name, body)| self.file(name, body)).collect();
        items.push(self.file("summary.xml", &Body::Whole(summary.as_bytes())));
        let root = self.vector(&items);
        let mut folder = item(1, machine.folder);
        put(&mut folder, 0x94, &root.to_le_bytes());
        put(&mut folder, 0x9c, &(items.len() as u32).to_le_bytes());
        folder
    }

    /// Adds a copy of all banks; CRC, offset and length of each.
    fn banks(&mut self) -> Vec<(u32, u64, u32)> {
        let mut placed = Vec::new();
        for pages in self.pages.chunks(BANK_PAGES) {
            let mut bank = vec![0; PAGE];
            put(&mut bank, 0, &(BANK_PAGES as u16).to_le_bytes());
            bank[4 + pages.len()..4 + BANK_PAGES].fill(1);
            bank.extend(pages.concat());
            bank.resize((BANK_PAGES + 2) * PAGE, 0);
            placed.push((crc32c::crc32c(&bank), self.out.len() as u64, bank.len() as u32));
            self.out.extend(bank);
        }
        placed
    }
}

fn item(kind: u32, name: &str) -> Vec<u8> {
    let mut item = vec![0; 0xc0];
    put(&mut item, 0, &kind.to_le_bytes());
    put(&mut item, 4, &(name.len() as u32).to_le_bytes());
    put(&mut item, 8, name.as_bytes());
    put(&mut item, 0x88, &NONE.to_le_bytes());
    item
}

fn encoded(encoding: Encoding, bytes: &[u8]) -> Vec<u8> {
    match encoding {
        Encoding::Plain => bytes.to_vec(),
        Encoding::Zlib => {
            let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
            std::io::Write::write_all(&mut zlib, bytes).expect("memory");
            zlib.finish().expect("memory")
        }
        Encoding::Zstd => zstd::bulk::compress(bytes, 3).expect("memory"),
        Encoding::Lz4 => {
            let mut out = Vec::new();
            out.extend(0xf800_000fu32.to_le_bytes());
            out.extend(crc32c::crc32c(bytes).to_le_bytes());
            out.extend((bytes.len() as u32).to_le_bytes());
            out.extend(lz4_flex::block::compress(bytes));
            out
        }
    }
}

fn summary(machine: &Machine<'_>) -> String {
    let (id, below) = (uuid(machine.id), uuid(machine.below));
    format!(
        "<OibSummary><Backup Id=\"{id}\" /><Point Id=\"{id}\" LinkId=\"{below}\" Num=\"0\" Type=\"{kind}\" />\
        <OIB Id=\"{{{id}}}\" LinkId=\"{{{below}}}\" InsideDir=\"/{}\" IsConsistent=\"true\" IsCorrupted=\"false\" \
        CreationTimeUtc=\"11/{:02}/2026 22:00:00\" VmName=\"{}\" AuxData=\"&lt;x&gt;\">&lt;GuestInfo&gt;</OIB></OibSummary>",
        machine.folder,
        1 + machine.id % 28,
        machine.name,
        kind = u32::from(machine.below != 0),
    )
}

impl File<'_> {
    /// The bytes of the file.
    pub fn bytes(&self) -> Vec<u8> {
        let slot_len = (0x74 + 16 * SLOT_PLACES).next_multiple_of(PAGE);
        let mut writer = Writer {
            tables: self.version >= 12,
            block: self.block,
            encodings: self.encodings.to_vec(),
            out: vec![0; PAGE + 2 * slot_len],
            pages: Vec::new(),
            // A place that was given back.
            store: vec![{
                let mut free = vec![0; 60];
                put(&mut free, 5, &[0, 0x40]);
                free
            }],
            known: HashMap::new(),
        };
        let folders: Vec<Vec<u8>> = self.machines.iter().map(|machine| writer.machine(machine)).collect();
        let root = writer.vector(&folders);
        let store: Vec<Vec<u8>> = std::mem::take(&mut writer.store);
        let store_root = writer.vector(&store);
        let banks = [writer.banks(), writer.banks()];
        let end = writer.out.len() as u64;
        for (number, banks) in banks.iter().enumerate() {
            let mut slot = vec![0; slot_len];
            put(&mut slot, 4, &1u32.to_le_bytes());
            put(&mut slot, 8, &(7 + number as u64).to_le_bytes());
            put(&mut slot, 0x10, &end.to_le_bytes());
            put(&mut slot, 0x18, &(banks.len() as u32).to_le_bytes());
            put(&mut slot, 0x1c, &root.to_le_bytes());
            put(&mut slot, 0x24, &(folders.len() as u64).to_le_bytes());
            put(&mut slot, 0x2c, &store_root.to_le_bytes());
            put(&mut slot, 0x34, &(store.len() as u64).to_le_bytes());
            slot[0x3c..0x6c].fill(0xff);
            put(&mut slot, 0x74, &(SLOT_PLACES as u32).to_le_bytes());
            put(&mut slot, 0x78, &(banks.len() as u32).to_le_bytes());
            for (place, (crc, offset, len)) in banks.iter().enumerate() {
                put(&mut slot, 0x7c + 16 * place, &crc.to_le_bytes());
                put(&mut slot, 0x80 + 16 * place, &offset.to_le_bytes());
                put(&mut slot, 0x88 + 16 * place, &len.to_le_bytes());
            }
            let sum = crc32c::crc32c(&slot[4..4 + 4 + 0x6c + 8 + 16 * SLOT_PLACES]);
            put(&mut slot, 0, &sum.to_le_bytes());
            put(&mut writer.out, PAGE + number * slot_len, &slot);
        }
        let out = &mut writer.out;
        put(out, 0, &self.version.to_le_bytes());
        put(out, 4, &1u32.to_le_bytes());
        put(out, 8, &3u32.to_le_bytes());
        put(out, 12, b"md5");
        put(out, 0x107, &9u32.to_le_bytes());
        put(out, 0x10b, &(self.block as u32).to_le_bytes());
        out[0x10f] = 3;
        writer.out
    }
}
