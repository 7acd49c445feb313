//! The file's header and its two slots: where the banks of pages lie.
//!
//! Each slot has a CRC over itself, a number that grows with each commit, and its own copies of all banks;
//! a writer that stops half way leaves the other one whole.

use crate::{Error, Result, tables::TableFile};

const FIRST_SLOT: u64 = 0x1000;
/// Bytes of a slot before its list of banks.
const FIXED_BYTES: u64 = 0x7c;
/// Most banks a slot has place for.
const BANKS_MAX: u64 = 0x7f00;
/// Lengths of a slot with room for 248, 2976 and 32512 banks.
const USUAL_LENS: [u64; 3] = [0x1000, 0xc000, 0x8_0000];
/// A version that some products write, laid out as the old ones are.
const ODD_VERSION: u32 = 0x1_0008;

/// What a file is, from its first page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    slot_format: u32,
    /// Bytes of a block where a file is longer than one.
    pub(super) block_bytes: u32,
}

/// Where a bank lies, as its slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BankPlace {
    pub(super) crc: u32,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// The newer valid slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Grows with each commit.
    pub(super) number: u64,
    /// Bytes of the file that belong to this commit.
    end: u64,
    /// Over the slot, and by the banks' own CRCs over all that they hold.
    pub(super) crc: u32,
    /// Root page and count of entries of the root folder.
    pub(super) directory: (u64, u64),
    /// Root page and count of entries of the block store.
    pub(super) store: (u64, u64),
    pub(super) banks: Vec<BankPlace>,
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

impl Header {
    pub(super) fn read(file: &TableFile) -> Result<Self> {
        let page = file.read(0, FIRST_SLOT, "the header")?;
        let bad = |at: u64, what: String| Error::corrupt(file.label(), at, what);
        let version = u32_at(&page, 0);
        if page.get(4..16) != Some(b"\x01\0\0\0\x03\0\0\0md5\0") {
            return Err(bad(4, "no header of a backup file, or one that was never finished".into()));
        }
        // Version 8 has no ids of keys in its lists; nobody has seen one.
        if !matches!(version, 7 | 9..=13 | ODD_VERSION) {
            return Err(Error::unsupported(file.label(), format!("version {version} of backup files")));
        }
        let block_bytes = u32_at(&page, 0x10b);
        if !block_bytes.is_power_of_two() || block_bytes < 4096 {
            return Err(bad(0x10b, format!("blocks of {block_bytes} bytes")));
        }
        Ok(Self { version, slot_format: u32_at(&page, 0x107), block_bytes })
    }

    /// Whether vectors have tables of their pages; older ones link page to page.
    pub(super) fn has_tables(&self) -> bool {
        self.version >= 12 && self.version != ODD_VERSION
    }

    /// The checksum over slots and banks.
    pub(super) fn sum(&self, so_far: u32, bytes: &[u8]) -> u32 {
        if self.slot_format > 5 {
            crc32c::crc32c_append(so_far, bytes)
        } else {
            let mut sum = crc32fast::Hasher::new_with_initial(so_far);
            sum.update(bytes);
            sum.finalize()
        }
    }

    fn banks_max(&self) -> u64 {
        if self.slot_format == 0 { 0xf8 } else { BANKS_MAX }
    }
}

impl Slot {
    /// The valid slot with the higher number.
    pub(super) fn newest(file: &TableFile, header: &Header) -> Result<Self> {
        let (first, len) = Self::read(file, header, FIRST_SLOT);
        // The second slot lies behind the first, whose length only the first tells; where that is damaged, the
        // lengths that writers use are tried.
        let lens = len.map_or(USUAL_LENS.to_vec(), |len| vec![len]);
        let mut found = vec![first];
        found.extend(lens.into_iter().map(|len| Self::read(file, header, FIRST_SLOT + len).0));
        let mut newest: Option<Self> = None;
        let mut wrong = None;
        for slot in found {
            match slot {
                Ok(slot) if newest.as_ref().is_none_or(|so_far| so_far.number < slot.number) => newest = Some(slot),
                Ok(_) => {}
                Err(error) => wrong = wrong.or(Some(error)),
            }
        }
        let nothing = || Error::corrupt(file.label(), FIRST_SLOT, "no slot is valid");
        let newest = newest.ok_or_else(|| wrong.unwrap_or_else(nothing))?;
        file.check_inside(0, newest.end, "the backup")?;
        Ok(newest)
    }

    /// The slot at `at`, and how many bytes it takes if it says.
    fn read(file: &TableFile, header: &Header, at: u64) -> (Result<Self>, Option<u64>) {
        let fixed = match file.read(at, FIXED_BYTES, "a slot") {
            Ok(fixed) => fixed,
            Err(error) => return (Err(error), None),
        };
        let bad = |what: String| Error::corrupt(file.label(), at, format!("slot: {what}"));
        let place = u64::from(u32_at(&fixed, 0x74));
        if !(1..=header.banks_max()).contains(&place) {
            return (Err(bad(format!("room for {place} banks"))), None);
        }
        let len = (0x74 + 16 * place).next_multiple_of(4096);
        (Self::checked(file, header, at, &fixed, place), Some(len))
    }

    fn checked(file: &TableFile, header: &Header, at: u64, fixed: &[u8], place: u64) -> Result<Self> {
        let bad = |what: String| Error::corrupt(file.label(), at, format!("slot: {what}"));
        let crc = u32_at(fixed, 0);
        let covered = file.read(at + 4, 4 + 0x6c + 8 + 16 * place, "a slot")?;
        if header.sum(0, &covered) != crc {
            return Err(bad("its checksum is wrong".into()));
        }
        if u32_at(fixed, 4) != 1 {
            return Err(bad("it was never committed".into()));
        }
        let count = u64::from(u32_at(fixed, 0x78));
        if count > place {
            return Err(bad(format!("{count} banks where {place} have room")));
        }
        let listed = covered.get(0x78..).unwrap_or_default().chunks_exact(16);
        let banks = listed.take(usize::try_from(count).unwrap_or(usize::MAX)).map(|entry| BankPlace {
            crc: u32_at(entry, 0),
            offset: u64_at(entry, 4),
            len: u32_at(entry, 12).into(),
        });
        Ok(Self {
            number: u64_at(fixed, 8),
            end: u64_at(fixed, 0x10),
            crc,
            directory: (u64_at(fixed, 0x1c), u64_at(fixed, 0x24)),
            store: (u64_at(fixed, 0x2c), u64_at(fixed, 0x34)),
            banks: banks.collect(),
        })
    }
}
