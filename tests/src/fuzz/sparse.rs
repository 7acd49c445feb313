//! Files of megabytes that are nearly all zeros, as the few sectors that are not: what mutates them hits what matters.
//!
//! A list of sectors, each behind its number (two bytes, little-endian). All else is zeros; the last one ends the file.

use std::collections::BTreeMap;

const SECTOR: usize = 512;
/// Sectors of the longest file, 8 MiB.
const SECTORS_MAX: usize = 1 << 14;
const ITEM: usize = 2 + SECTOR;

/// The file that `list` says. What is left of a cut item is zeros.
pub(super) fn unpack(list: &[u8]) -> Vec<u8> {
    let mut sectors = BTreeMap::new();
    for item in list.chunks(ITEM) {
        let Some((number, bytes)) = item.split_first_chunk::<2>() else { break };
        sectors.insert(usize::from(u16::from_le_bytes(*number)) % SECTORS_MAX, bytes);
    }
    let end = sectors.last_key_value().map_or(0, |(number, _)| (number + 1) * SECTOR);
    let mut file = vec![0; end];
    for (number, bytes) in sectors {
        file[number * SECTOR..][..bytes.len()].copy_from_slice(bytes);
    }
    file
}

/// The list that says `file`. Sectors of one byte, which writers fill gaps with, become zeros, but for the last.
///
/// # Panics
/// The file is longer than a list can say, or no whole sectors.
pub(super) fn pack(file: &[u8]) -> Vec<u8> {
    let (sectors, rest) = file.as_chunks::<SECTOR>();
    assert!(rest.is_empty() && sectors.len() <= SECTORS_MAX, "{} bytes", file.len());
    let mut list = Vec::new();
    for (number, sector) in sectors.iter().enumerate() {
        if *sector != [sector[0]; SECTOR] || number + 1 == sectors.len() {
            list.extend(u16::try_from(number).expect("few sectors").to_le_bytes());
            list.extend(sector);
        }
    }
    list
}
