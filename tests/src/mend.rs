//! Makes the checksums of a damaged native layer right again, from the blocks up to the seal, so that a
//! fuzzer reaches what lies behind them.
//!
//! Follows the layout only (`aquifer_formats::aql::layout`), with none of the reader's code.

use std::{collections::HashMap, mem::offset_of};

use aquifer_formats::aql::layout::{
    FRAME_HEADER_BYTES, FRAME_IDENTITY_BYTES, FRAME_MAGIC, FrameHeader, HASHED_BYTES, LeafRefBytes, PAGE_LEN,
    RootHeader, SealPage,
};

const OFFSET_MASK: u64 = (1 << 48) - 1;

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn put(bytes: &mut [u8], at: usize, with: &[u8]) {
    if let Some(to) = bytes.get_mut(at..at + with.len()) {
        to.copy_from_slice(with);
    }
}

/// Kind and payload of the frame at `at`, if its lengths fit the file.
fn frame(bytes: &[u8], at: usize) -> Option<(u8, std::ops::Range<usize>)> {
    let stored = half(bytes, at + offset_of!(FrameHeader, stored_bytes))? as usize;
    let start = at + FRAME_HEADER_BYTES;
    let end = start.checked_add(stored).filter(|end| *end <= bytes.len())?;
    Some((*bytes.get(at + offset_of!(FrameHeader, kind))?, start..end))
}

fn mend_frame(bytes: &mut [u8], at: usize) -> Option<u32> {
    let (_, payload) = frame(bytes, at)?;
    let check = crc32c::crc32c_append(crc32c::crc32c(&bytes[payload]), &bytes[at..at + FRAME_IDENTITY_BYTES]);
    put(bytes, at + offset_of!(FrameHeader, check), &check.to_le_bytes());
    let guard = offset_of!(FrameHeader, header_check);
    let header = crc32c::crc32c(&bytes[at..at + guard]);
    put(bytes, at + guard, &header.to_le_bytes());
    Some(check)
}

/// The same bytes with checksums and hashes that fit, as far as the structures can be followed.
pub fn layer(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    let starts: Vec<usize> =
        bytes.windows(4).enumerate().filter(|(_, w)| *w == FRAME_MAGIC).map(|(at, _)| at).collect();
    let mut checks: HashMap<u64, u32> = HashMap::new();
    // Blocks and waymarks, then pages of entries, then the roots: pointers after what they point to.
    for kinds in [&[1u8, 4][..], &[2, 3], &[5]] {
        for at in &starts {
            let Some((kind, payload)) = frame(&bytes, *at).filter(|(kind, _)| kinds.contains(kind)) else { continue };
            match kind {
                2 => mend_entries(&mut bytes, payload, &checks),
                5 => mend_root(&mut bytes, payload, &checks),
                _ => {}
            }
            if let Some(check) = mend_frame(&mut bytes, *at) {
                checks.insert(*at as u64, check);
            }
        }
    }
    mend_ends(&mut bytes);
    bytes
}

fn mend_entries(bytes: &mut [u8], page: std::ops::Range<usize>, checks: &HashMap<u64, u32>) {
    for at in page.step_by(16) {
        let place = word(bytes, at).unwrap_or(0);
        if place >> 60 == 2
            && let Some(check) = checks.get(&(place & OFFSET_MASK))
        {
            put(bytes, at + 12, &check.to_le_bytes());
        }
    }
}

/// Only a root that is stored raw: small ones are.
fn mend_root(bytes: &mut [u8], root: std::ops::Range<usize>, checks: &HashMap<u64, u32>) {
    let leaves = half(bytes, root.start + offset_of!(RootHeader, leaves)).unwrap_or(0) as usize;
    let first = root.start + size_of::<RootHeader>();
    let refs = (first..root.end).step_by(size_of::<LeafRefBytes>()).take(leaves);
    for at in refs {
        for (place, check) in [
            (offset_of!(LeafRefBytes, map), offset_of!(LeafRefBytes, map_check)),
            (offset_of!(LeafRefBytes, ids), offset_of!(LeafRefBytes, ids_check)),
        ] {
            let offset = word(bytes, at + place).unwrap_or(0) & OFFSET_MASK;
            if let Some(found) = checks.get(&offset) {
                put(bytes, at + check, &found.to_le_bytes());
            }
        }
    }
}

fn mend_ends(bytes: &mut [u8]) {
    let len = bytes.len();
    if len < 3 * PAGE_LEN {
        return;
    }
    let first = blake3::hash(&bytes[..HASHED_BYTES]);
    put(bytes, HASHED_BYTES, first.as_bytes());
    for copy in 0..2u32 {
        let page = len - 2 * PAGE_LEN + copy as usize * PAGE_LEN;
        put(bytes, page + offset_of!(SealPage, file_bytes), &(len as u64).to_le_bytes());
        let root = word(bytes, page + offset_of!(SealPage, root_a)).and_then(|at| usize::try_from(at).ok());
        if let Some((_, payload)) = root.filter(|at| *at < len).and_then(|at| frame(bytes, at)) {
            let hash = blake3::hash(&bytes[payload]);
            put(bytes, page + offset_of!(SealPage, root_hash), hash.as_bytes());
        }
        put(bytes, page + offset_of!(SealPage, copy), &[0; 4]);
        let hash = blake3::hash(&bytes[page..page + HASHED_BYTES]);
        put(bytes, page + HASHED_BYTES, hash.as_bytes());
        put(bytes, page + offset_of!(SealPage, copy), &copy.to_le_bytes());
    }
}

/// A Hyper-V disk of either generation with its checksums made right: headers, region tables, the log's
/// first entry; footers and the dynamic header.
pub fn hyperv(data: &[u8]) -> Vec<u8> {
    let mut out = data.to_vec();
    let word =
        |out: &[u8], at: usize| out.get(at..at + 4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")));
    let entry = word(&out, (1 << 20) + 8).map_or(4096, |len| len as usize);
    let areas = [(0x1_0000, 4096), (0x2_0000, 4096), (0x3_0000, 0x1_0000), (0x4_0000, 0x1_0000), (1 << 20, entry)];
    for (at, len) in areas {
        if len < 8 || out.len() < at + len {
            continue;
        }
        out[at + 4..at + 8].fill(0);
        let sum = crc32c::crc32c(&out[at..at + len]);
        out[at + 4..at + 8].copy_from_slice(&sum.to_le_bytes());
    }
    let end = out.len().saturating_sub(512);
    for (at, len, place) in [(0, 512, 64), (end, 512, 64), (512, 1024, 36)] {
        let is_vhd = out.get(at..at + 8).is_some_and(|head| head == b"conectix" || head == b"cxsparse");
        if is_vhd && out.len() >= at + len {
            out[at + place..at + place + 4].fill(0);
            let sum = !out[at..at + len].iter().fold(0u32, |sum, byte| sum + u32::from(*byte));
            out[at + place..at + place + 4].copy_from_slice(&sum.to_be_bytes());
        }
    }
    out
}

/// A backup file of Veeam's with the checksums of its slots and their banks made right.
pub fn vbk(data: &[u8]) -> Vec<u8> {
    let mut out = data.to_vec();
    let mut at = 0x1000;
    for _ in 0..2 {
        let (Some(places), Some(count)) = (half(&out, at + 0x74), half(&out, at + 0x78)) else { break };
        let covered = 4 + 0x6c + 8 + 16 * places as usize;
        if places > 0x7f00 || out.len() < at + 4 + covered {
            break;
        }
        for bank in 0..count.min(places) as usize {
            let place = at + 0x7c + 16 * bank;
            let (Some(start), Some(len)) = (word(&out, place + 4), half(&out, place + 12)) else { continue };
            let start = usize::try_from(start).unwrap_or(usize::MAX);
            let bytes = start.checked_add(len as usize).and_then(|end| out.get(start..end));
            if let Some(sum) = bytes.map(crc32c::crc32c) {
                put(&mut out, place, &sum.to_le_bytes());
            }
        }
        let sum = crc32c::crc32c(&out[at + 4..at + 4 + covered]);
        put(&mut out, at, &sum.to_le_bytes());
        at += (0x74 + 16 * places as usize).next_multiple_of(4096);
    }
    out
}

/// Makes the checksums of a disk's GPT and of its copy right, where they lie with sectors of 512 bytes.
pub fn gpt(disk: &mut [u8]) {
    let sum = |bytes: &[u8]| {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        crc.sum().to_le_bytes()
    };
    for at in [512, disk.len().saturating_sub(512)] {
        if disk.get(at..at + 92).is_none_or(|head| !head.starts_with(b"EFI PART")) {
            continue;
        }
        let entries = word(disk, at + 72).and_then(|lba| usize::try_from(lba.checked_mul(512)?).ok());
        let len = half(disk, at + 80).zip(half(disk, at + 84)).map(|(count, each)| count as usize * each as usize);
        let table = entries.zip(len).and_then(|(start, len)| disk.get(start..start.checked_add(len)?));
        if let Some(crc) = table.map(sum) {
            put(disk, at + 88, &crc);
        }
        put(disk, at + 16, &[0; 4]);
        let crc = sum(&disk[at..at + 92]);
        put(disk, at + 16, &crc);
    }
}

#[cfg(test)]
mod tests {
    //! A mended layer opens: else the fuzzer would never get past the first check.

    use std::sync::Arc;

    use aquifer_formats::{
        Layer, Storage,
        aql::{ContentKey, NewLayer, Reader, Resolver, Writer, WriterOptions},
        storage::MemoryStorage,
    };

    #[test]
    fn damage_before_checksums_is_reached_after_mending() {
        let storage = Arc::new(MemoryStorage::new("m", Vec::new()));
        let options = WriterOptions { threads: 0, block_log2: 14, ..WriterOptions::default() };
        let mut writer =
            Writer::create(storage.clone(), NewLayer::full(40_000, ContentKey::new([1; 32])), options).expect("create");
        writer.put(0, &[5; 40_000]).expect("put");
        writer.finish().expect("finish");
        let mut bytes = storage.to_vec();
        let page = bytes.windows(5).position(|w| w == b"AQF1\x02").expect("a map page");
        // State 7 in the first entry, and another virtual size in the seal.
        bytes[page + 64 + 7] = 0x70;
        let open = |bytes: Vec<u8>| Reader::open(Arc::new(MemoryStorage::new("m", bytes)), Resolver::none());
        let plain = open(bytes.clone()).expect("open").lookup(0, 1).expect_err("checksum");
        assert!(plain.to_string().contains("checksum"), "{plain}");
        let mended = open(super::layer(&bytes)).expect("open").lookup(0, 1).expect_err("state");
        assert!(mended.to_string().contains("no valid state"), "{mended}");
        assert_eq!(super::layer(&storage.to_vec()), storage.to_vec(), "nothing to mend");
        assert_eq!(storage.len().expect("length") % 4096, 0);
    }
}
