//! Tests by promise, one module each, in one binary.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are known to fit")]

mod aggressor;
mod backups;
mod catalogue;
mod chain;
mod chain_files;
mod confine;
mod crash;
mod doors_agree;
mod filesystems;
mod first_minutes;
mod foreign;
mod fuse;
mod fuzz_smoke;
mod host;
mod host_files;
mod hydrate;
mod hydrate_leave_out;
mod hydrate_trace;
mod hydrate_unused;
mod in_guest;
mod keep_killed;
mod kill;
mod licences;
mod loopdev;
mod mistakes;
mod nbd;
mod nbd_hostile;
mod nbd_liars;
mod outage;
mod overlay;
mod qcow2;
mod recover;
mod recover_merged;
mod repository;
mod requirements;
mod same_bytes;
mod session;
mod space;
mod stored;
mod tidy;
mod vhost_user;
mod workers;
mod workers_backup;

mod skeleton {
    use std::sync::Arc;

    use aquifer_formats::{raw::RawLayer, storage::MemoryStorage};
    use aquifer_vdisk::{BlockCache, Chain, Disk};

    #[test]
    fn a_raw_image_reads_back() {
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let layer = RawLayer::open(Arc::new(MemoryStorage::new("m", bytes.clone()))).expect("open");
        let chain = Chain::new(vec![Arc::new(layer)], Arc::new(BlockCache::new(1 << 20))).expect("chain");
        let disk = Disk::read_only("d", Arc::new(chain));
        let mut out = vec![0; 5000];
        disk.read(7_777, &mut out).expect("read");
        assert_eq!(out, bytes[7_777..12_777]);
        assert!(disk.read(99_000, &mut out).is_err(), "past the end");
    }
}
