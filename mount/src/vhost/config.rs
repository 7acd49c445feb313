//! What a guest is offered: the features and the configuration space of a virtio block device.
//!
//! Invariant: what is offered is what `request` and `queue` do, with the same limits.
//!
//! Source: Virtual I/O Device (VIRTIO) Version 1.2, sections 5.2.3 and 5.2.4.

use super::request::{RANGE_SECTORS_MAX, RANGES_MAX, SECTOR};

/// Numbers of feature bits.
pub(super) mod feature {
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const CONFIG_WCE: u64 = 1 << 11;
    pub(crate) const MQ: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
    pub(crate) const RING_INDIRECT: u64 = 1 << 28;
    pub(crate) const RING_EVENT_IDX: u64 = 1 << 29;
    /// Of the vhost-user protocol, not of virtio.
    pub(crate) const PROTOCOL: u64 = 1 << 30;
    pub(crate) const VERSION_1: u64 = 1 << 32;
}

/// Queues of a device at most.
pub const QUEUES_MAX: u16 = 16;
/// Data buffers of one request at most. A ring of 128 places, the smallest that is usual, takes that with header and status.
const SEGMENTS_MAX: u32 = 126;
/// Bytes of the configuration space.
const LEN: usize = 60;
/// Offset of the one byte that a guest may change: whether writes may wait for a flush.
pub(super) const WRITEBACK_AT: u32 = 32;
/// Sectors of a page: no write of whole pages reads the source.
const PAGE_SECTORS: u16 = 8;

/// The features of a disk.
pub(super) fn features(writable: bool) -> u64 {
    let always = feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::MQ
        | feature::RING_INDIRECT
        | feature::RING_EVENT_IDX
        | feature::PROTOCOL
        | feature::VERSION_1;
    let more = if writable { feature::CONFIG_WCE | feature::DISCARD | feature::WRITE_ZEROES } else { feature::RO };
    always | more
}

/// Whether writes are acknowledged before they are durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caching {
    /// They are; a flush makes them durable.
    WriteBack,
    /// Each is durable when it is acknowledged.
    WriteThrough,
}

/// The configuration space of a disk of `size` bytes.
pub(super) fn space(size: u64, caching: Caching) -> [u8; LEN] {
    let mut out = [0; LEN];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = out.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, &(size / SECTOR).to_le_bytes());
    put(12, &SEGMENTS_MAX.to_le_bytes());
    put(20, &512u32.to_le_bytes());
    // Physical blocks of 2^3 sectors, none of them shifted; pages at least, 64 KiB at best.
    put(24, &[3, 0]);
    put(26, &PAGE_SECTORS.to_le_bytes());
    put(28, &128u32.to_le_bytes());
    put(32, &[u8::from(caching == Caching::WriteBack)]);
    put(34, &QUEUES_MAX.to_le_bytes());
    put(36, &RANGE_SECTORS_MAX.to_le_bytes());
    put(40, &RANGES_MAX.to_le_bytes());
    put(44, &u32::from(PAGE_SECTORS).to_le_bytes());
    put(48, &RANGE_SECTORS_MAX.to_le_bytes());
    put(52, &RANGES_MAX.to_le_bytes());
    put(56, &[1]);
    out
}
