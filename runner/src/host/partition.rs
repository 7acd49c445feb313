//! Partition tables, as far as the choice of firmware needs them: which kinds of partition a disk has.
//!
//! Invariants
//! - Everything read is a guest's work and not trusted: tables are bounded before they are read, checksums are
//!   checked, a chain of extended partitions is walked forwards only and for at most [`LOGICAL_MAX`] steps.
//! - A damaged table is reported as damaged ([`Table::Damaged`]), never as an empty one.
//!
//! Not here: file systems, writing, what the firmware rule makes of it ([`super::firmware`]).

use aquifer_vdisk::{Disk, Result};

/// Most entries of a GPT that are looked at. The standard's minimum is 128, tools write no more.
const GPT_ENTRIES_MAX: u32 = 1024;

/// Largest GPT entry that is believed, in bytes; the standard's own is 128.
const GPT_ENTRY_BYTES_MAX: u32 = 4096;

/// Longest chain of logical partitions that is walked.
const LOGICAL_MAX: usize = 128;

/// EFI system partition, as its bytes lie on disk.
const TYPE_ESP: [u8; 16] =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];

/// BIOS boot partition, as its bytes lie on disk.
const TYPE_BIOS_BOOT: [u8; 16] = *b"Hah!IdontNeedEFI";

const MBR_PROTECTIVE: u8 = 0xee;
const MBR_ESP: u8 = 0xef;
const MBR_EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// What a disk's first sectors say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// No partition table: empty, or a file system on the whole disk.
    None,
    /// A master boot record.
    Mbr(Kinds),
    /// A GUID partition table.
    Gpt(Kinds),
    /// There is a table, but neither it nor its copy can be read; the word says which.
    Damaged(&'static str),
}

/// Kinds of partition that matter to firmware.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kinds {
    /// An EFI system partition.
    pub esp: bool,
    /// A BIOS boot partition, where GRUB keeps its core on a GPT disk.
    pub bios_boot: bool,
    /// Partitions of any kind.
    pub count: u32,
}

impl Table {
    /// Reads the table of `disk`.
    ///
    /// # Errors
    /// What the disk's source reports. A disk that is too small for a table has none.
    pub fn read(disk: &Disk) -> Result<Self> {
        let Some(mbr) = read_exact::<512>(disk, 0)? else { return Ok(Self::None) };
        let signed = mbr.ends_with(&[0x55, 0xaa]);
        let protective = signed && mbr_entries(&mbr).any(|entry| entry.kind == MBR_PROTECTIVE);
        // Disks with sectors of 4096 bytes keep the header there; it carries a signature and a checksum either way.
        for sector in [512, 4096] {
            match read_gpt(disk, sector)? {
                Found::Good(kinds) => return Ok(Self::Gpt(kinds)),
                // A header without the protective record is a leftover of an earlier life of the disk.
                Found::Bad if protective => return Ok(Self::Damaged("gpt")),
                Found::Bad | Found::Nothing => {}
            }
        }
        if protective {
            return Ok(Self::Damaged("gpt"));
        }
        if !signed {
            return Ok(Self::None);
        }
        read_mbr(disk, &mbr)
    }
}

enum Found {
    Good(Kinds),
    Bad,
    Nothing,
}

struct MbrEntry {
    kind: u8,
    start: u32,
    sectors: u32,
}

fn mbr_entries(sector: &[u8; 512]) -> impl Iterator<Item = MbrEntry> {
    let (entries, _) = sector.get(446..510).unwrap_or_default().as_chunks::<16>();
    entries.iter().filter_map(|e| {
        let [_, _, _, _, kind, _, _, _, start @ .., s0, s1, s2, s3] = *e;
        let (start, sectors) = (u32::from_le_bytes(start), u32::from_le_bytes([s0, s1, s2, s3]));
        (kind != 0 && sectors != 0).then_some(MbrEntry { kind, start, sectors })
    })
}

/// A boot sector of a file system ends in the same signature: only entries that lie on the disk make a table.
fn read_mbr(disk: &Disk, mbr: &[u8; 512]) -> Result<Table> {
    let mut kinds = Kinds::default();
    let states = mbr.get(446..510).unwrap_or_default().iter().step_by(16);
    if states.copied().any(|state| state & 0x7f != 0) {
        return Ok(Table::None);
    }
    for entry in mbr_entries(mbr) {
        if u64::from(entry.start) * 512 >= disk.size() {
            return Ok(Table::Damaged("mbr"));
        }
        kinds.count += 1;
        kinds.esp |= entry.kind == MBR_ESP;
        if MBR_EXTENDED.contains(&entry.kind) {
            read_logical(disk, entry.start, entry.sectors, &mut kinds)?;
        }
    }
    Ok(if kinds.count == 0 { Table::None } else { Table::Mbr(kinds) })
}

/// Walks the logical partitions of an extended one. Each link must lie behind the last, so a loop ends by itself.
fn read_logical(disk: &Disk, base: u32, sectors: u32, kinds: &mut Kinds) -> Result<()> {
    let mut at = base;
    for _ in 0..LOGICAL_MAX {
        let Some(record) = read_exact::<512>(disk, u64::from(at) * 512)? else { return Ok(()) };
        if !record.ends_with(&[0x55, 0xaa]) {
            return Ok(());
        }
        let mut next = None;
        for entry in mbr_entries(&record).take(2) {
            if MBR_EXTENDED.contains(&entry.kind) {
                next = (entry.start < sectors).then(|| base.checked_add(entry.start)).flatten();
            } else {
                kinds.count += 1;
                kinds.esp |= entry.kind == MBR_ESP;
            }
        }
        match next {
            Some(next) if next > at => at = next,
            _ => return Ok(()),
        }
    }
    Ok(())
}

/// The primary table, else the copy at the end of the disk.
fn read_gpt(disk: &Disk, sector: u64) -> Result<Found> {
    let first = read_gpt_at(disk, sector, sector)?;
    let last = disk.size().checked_div(sector).and_then(|n| n.checked_sub(1));
    match (first, last) {
        (Found::Bad, Some(last)) if last > 1 => match read_gpt_at(disk, last.saturating_mul(sector), sector)? {
            Found::Good(kinds) => Ok(Found::Good(kinds)),
            Found::Bad | Found::Nothing => Ok(Found::Bad),
        },
        // A wiped first MiB with the copy still there: sgdisk would offer to repair it, firmware would not boot it.
        (found, _) => Ok(found),
    }
}

fn read_gpt_at(disk: &Disk, offset: u64, sector: u64) -> Result<Found> {
    let Some(header) = read_exact::<92>(disk, offset)? else { return Ok(Found::Nothing) };
    if !header.starts_with(b"EFI PART") {
        return Ok(Found::Nothing);
    }
    let Some(header) = GptHeader::parse(&header) else { return Ok(Found::Bad) };
    let Some(at) = header.entries_lba.checked_mul(sector) else { return Ok(Found::Bad) };
    let Some(len) = usize::try_from(u64::from(header.entry_count) * u64::from(header.entry_bytes)).ok() else {
        return Ok(Found::Bad);
    };
    // The bounds of `parse` keep this under 4 MiB.
    let mut table = vec![0; len];
    if at.checked_add(len as u64).is_none_or(|end| end > disk.size()) {
        return Ok(Found::Bad);
    }
    disk.read(at, &mut table)?;
    if crc32(&table) != header.entries_crc {
        return Ok(Found::Bad);
    }
    let mut kinds = Kinds::default();
    for entry in table.chunks_exact(usize::try_from(header.entry_bytes).unwrap_or(usize::MAX)) {
        let kind = entry.get(..16).unwrap_or_default();
        if kind.iter().any(|b| *b != 0) {
            kinds.count += 1;
            kinds.esp |= kind == TYPE_ESP;
            kinds.bios_boot |= kind == TYPE_BIOS_BOOT;
        }
    }
    Ok(Found::Good(kinds))
}

/// The fields of a GPT header that lead to its entries.
struct GptHeader {
    entries_lba: u64,
    entry_count: u32,
    entry_bytes: u32,
    entries_crc: u32,
}

impl GptHeader {
    /// `None` for a checksum that does not match, or sizes nobody writes.
    fn parse(bytes: &[u8; 92]) -> Option<Self> {
        let u32_at = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
        let u64_at = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
        // A longer header would put bytes we have not read under the checksum; nobody writes one.
        if u32_at(12)? != 92 {
            return None;
        }
        let mut checked = *bytes;
        checked.get_mut(16..20)?.fill(0);
        if crc32(&checked) != u32_at(16)? {
            return None;
        }
        let header = Self {
            entries_lba: u64_at(72)?,
            entry_count: u32_at(80)?,
            entry_bytes: u32_at(84)?,
            entries_crc: u32_at(88)?,
        };
        let sound = header.entry_count <= GPT_ENTRIES_MAX
            && (128..=GPT_ENTRY_BYTES_MAX).contains(&header.entry_bytes)
            && header.entry_bytes.is_power_of_two();
        sound.then_some(header)
    }
}

/// CRC-32 (IEEE), as GPT uses it: a few kilobytes once per recovery, so a table would only be in the way.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// `N` bytes from `offset`, or `None` where the disk ends before.
fn read_exact<const N: usize>(disk: &Disk, offset: u64) -> Result<Option<[u8; N]>> {
    let mut buf = [0; N];
    if offset.checked_add(N as u64).is_none_or(|end| end > disk.size()) {
        return Ok(None);
    }
    disk.read(offset, &mut buf)?;
    Ok(Some(buf))
}

#[cfg(test)]
pub(in crate::host) mod tests;
