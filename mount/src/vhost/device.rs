//! One disk as a virtio block device: what all its queues share.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use aquifer_vdisk::Disk;

use super::{
    Stats,
    config::{Caching, feature},
    inflight::Identity,
    request::{ID_LEN, Rules, SECTOR},
};
use crate::nbd::server::pool::Pool;

/// Threads for what may wait, of all disks of a door.
#[derive(Debug)]
pub(super) struct Pools {
    /// Decodes, slow reads, long changes.
    pub(super) slow: Pool,
    /// Syncs: those that come together share one.
    pub(super) sync: Pool,
}

/// Counters, see [`Stats`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) connected: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_written: AtomicU64,
}

impl Counters {
    pub(super) fn add_to(&self, stats: &mut Stats) {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        stats.open += of(&self.connected);
        stats.requests += of(&self.requests);
        stats.refused += of(&self.refused);
        stats.errors += of(&self.errors);
        stats.bytes_read += of(&self.bytes_read);
        stats.bytes_written += of(&self.bytes_written);
    }
}

/// A device.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) disk: Arc<Disk>,
    pub(super) identity: Identity,
    /// The folder of its socket.
    pub(super) dir: PathBuf,
    /// What `VIRTIO_BLK_T_GET_ID` answers.
    pub(super) id: [u8; ID_LEN],
    pub(super) pools: Arc<Pools>,
    /// Writes of whole blocks that pay for themselves: a disk takes one at a time, and those of another are not to wait
    /// for it.
    pub(super) large: Pool,
    pub(super) stats: Counters,
    features: AtomicU64,
    /// What the guest wants, where it may choose.
    writeback: AtomicBool,
}

impl Device {
    pub(super) fn new(disk: Arc<Disk>, identity: Identity, dir: PathBuf, pools: Arc<Pools>) -> Self {
        let mut id = [0; ID_LEN];
        for (place, byte) in id.iter_mut().zip(disk.name().bytes()) {
            *place = byte;
        }
        Self {
            disk,
            identity,
            dir,
            id,
            pools,
            large: Pool::for_large_writes("vhost-large"),
            stats: Counters::default(),
            features: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
        }
    }

    pub(super) fn rules(&self) -> Rules {
        Rules { size: self.disk.size() / SECTOR * SECTOR, writable: self.disk.is_writable() }
    }

    pub(super) fn features(&self) -> u64 {
        self.features.load(Ordering::Relaxed)
    }

    pub(super) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
    }

    pub(super) fn choose_caching(&self, caching: Caching) {
        self.writeback.store(caching == Caching::WriteBack, Ordering::Relaxed);
    }

    /// What the configuration space says, which a guest reads before it says what it knows.
    pub(super) fn caching_chosen(&self) -> Caching {
        if self.writeback.load(Ordering::Relaxed) { Caching::WriteBack } else { Caching::WriteThrough }
    }

    /// Whether writes may wait for a flush: a guest that does not know of flushes gets none that matter.
    pub(super) fn caching(&self) -> Caching {
        let features = self.features();
        let back = if features & feature::CONFIG_WCE != 0 {
            self.writeback.load(Ordering::Relaxed)
        } else {
            features & feature::FLUSH != 0
        };
        if back { Caching::WriteBack } else { Caching::WriteThrough }
    }
}
