//! Disks with the small guest of `aquifer demo`, and what the guest makes of them.

pub use aquifer_runner::verb::demo::guest::{AWAY_SECTORS, FIRST_LBA, SECTOR_BYTES, SECTORS};
use aquifer_runner::verb::demo::guest::{DISK_BYTES_MIN, put_on};

/// A disk of `mib` MiB whose first `data_mib` hold data: filler that compresses, and noise that does not. Its guest
/// says `READY` first.
///
/// # Panics
/// Fewer than 8 MiB.
pub fn disk(mib: usize, data_mib: usize) -> Vec<u8> {
    assert!(mib << 20 >= DISK_BYTES_MIN && data_mib <= mib, "the guest's areas need their room");
    let mut disk = vec![0; mib << 20];
    let mut noise = 0x9e37_79b9_7f4a_7c15u64;
    for (index, word) in disk[..data_mib << 20].chunks_exact_mut(8).enumerate() {
        // Every other 64 KiB compresses, the others do not.
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        let value = if (index >> 13) % 2 == 0 { (index >> 9) as u64 } else { noise };
        word.copy_from_slice(&value.to_le_bytes());
    }
    put_on(&mut disk, "READY\r\n");
    disk
}

/// What `disk` becomes once the guest has copied every sector at least once.
pub fn after_a_round(disk: &[u8]) -> Vec<u8> {
    let mut disk = disk.to_vec();
    let (first, away) = (FIRST_LBA as usize * SECTOR_BYTES, AWAY_SECTORS as usize * SECTOR_BYTES);
    disk.copy_within(first..first + SECTORS as usize * SECTOR_BYTES, first + away);
    disk
}
