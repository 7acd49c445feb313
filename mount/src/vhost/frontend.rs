//! What a hypervisor says over a door's socket, and what becomes of it: memory, rings, features.
//!
//! Invariants
//! - Messages are decoded and bounded by the `vhost` crate; every number in them is checked here before it is used.
//! - A ring that cannot be started is an error of the connection, never a ring that is half there.
//! - When a connection ends, so do all its queues, before the next connection is served.
//!
//! Source: the vhost-user protocol of QEMU.

use std::{
    fs::File,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use vhost::vhost_user::{
    Error, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
    message::{
        VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
        VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion,
        VhostUserVringAddrFlags, VhostUserVringState,
    },
};

use super::{
    config::{self, Caching, QUEUES_MAX, WRITEBACK_AT, feature},
    device::Device,
    inflight::Inflight,
    memory::{Memory, RegionSpec},
    queue::{Queue, Signals, State},
    ring::{Addresses, Ring, SIZE_MAX, Wakeups},
};
use crate::nbd::server::pool::LaneId;

/// Numbers for lanes, over all doors of a process.
static LANES: AtomicU64 = AtomicU64::new(0);

/// One ring as far as the hypervisor has told of it.
#[derive(Debug, Default)]
struct Vring {
    size: u32,
    addresses: Option<Addresses>,
    base: u16,
    kick: Option<OwnedFd>,
    signals: Signals,
    enabled: bool,
    running: Option<Arc<Queue>>,
}

impl Vring {
    fn stop(&mut self) {
        if let Some(queue) = self.running.take() {
            self.base = queue.stop();
        }
    }
}

/// One connection's view of a device.
#[derive(Debug)]
pub(super) struct Frontend {
    device: Arc<Device>,
    memory: Arc<Memory>,
    vrings: Vec<Vring>,
    inflight: Option<Arc<Inflight>>,
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(std::io::Error::other(error))
}

impl Frontend {
    pub(super) fn new(device: Arc<Device>) -> Self {
        device.set_features(0);
        device.choose_caching(Caching::WriteBack);
        let vrings = (0..QUEUES_MAX).map(|_| Vring::default()).collect();
        Self { device, memory: Arc::default(), vrings, inflight: None }
    }

    /// Stops everything.
    pub(super) fn stop(&mut self) {
        self.vrings.iter_mut().for_each(Vring::stop);
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let found = usize::try_from(index).ok().and_then(|index| self.vrings.get_mut(index));
        found.ok_or(Error::InvalidParam)
    }

    /// Starts a ring that has all it needs.
    fn start(&mut self, index: u32) -> Result<()> {
        let (device, memory, inflight) = (Arc::clone(&self.device), Arc::clone(&self.memory), self.inflight.clone());
        let vring = self.vring(index)?;
        let (Some(addresses), true, true) = (vring.addresses, vring.enabled, vring.running.is_none()) else {
            return Ok(());
        };
        let Some(kick) = &vring.kick else { return Ok(()) };
        let kick = kick.try_clone().map_err(Error::ReqHandlerError)?;
        let by_index = device.features() & feature::RING_EVENT_IDX != 0;
        let wakeups = if by_index { Wakeups::ByIndex } else { Wakeups::ByFlag };
        let number = u16::try_from(index).map_err(|_| Error::InvalidParam)?;
        let ring = Ring::new(memory, addresses, vring.size, wakeups, vring.base).map_err(refused)?;
        let state = State::new(ring, inflight, number).map_err(refused)?;
        let lane = LaneId(LANES.fetch_add(1, Ordering::Relaxed));
        let queue = Queue::start(&device, (number, lane), state, vring.signals.clone(), kick);
        vring.running = Some(queue.map_err(Error::ReqHandlerError)?);
        Ok(())
    }
}

impl Drop for Frontend {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What this device does not do.
fn never<T>() -> Result<T> {
    Err(Error::InvalidOperation("not something this device does"))
}

impl VhostUserBackendReqHandlerMut for Frontend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        never()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config::features(self.device.disk.is_writable()))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !config::features(self.device.disk.is_writable()) != 0 {
            return Err(Error::InvalidParam);
        }
        self.device.set_features(features);
        if features & feature::PROTOCOL == 0 {
            // Such a hypervisor knows no message to enable rings with.
            self.vrings.iter_mut().for_each(|vring| vring.enabled = true);
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let spec = |region: &VhostUserMemoryRegion| RegionSpec {
            guest: region.guest_phys_addr,
            user: region.user_addr,
            len: region.memory_size,
            file_offset: region.mmap_offset,
        };
        let memory = Memory::map(regions.iter().map(spec).zip(files).collect()).map_err(refused)?;
        self.memory = Arc::new(memory);
        for queue in self.vrings.iter().filter_map(|vring| vring.running.as_ref()) {
            queue.remap(&self.memory).map_err(refused)?;
        }
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.vring(index)?.size = num;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        if !flags.is_empty() {
            // A log of what is written, for a migration: not offered.
            return never();
        }
        let vring = self.vring(index)?;
        vring.stop();
        vring.addresses = Some(Addresses { descriptors, available, used });
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        let vring = self.vring(index)?;
        vring.stop();
        vring.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(index)?;
        vring.stop();
        vring.kick = None;
        Ok(VhostUserVringState::new(index, vring.base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let vring = self.vring(index.into())?;
        vring.stop();
        // Without a descriptor a ring would have to be looked at all the time.
        vring.kick = Some(fd.ok_or(Error::InvalidParam)?.into());
        self.start(index.into())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        *self.vring(index.into())?.signals.call.lock() = fd;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        *self.vring(index.into())?.signals.error.lock() = fd;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        type F = VhostUserProtocolFeatures;
        Ok(F::MQ | F::CONFIG | F::INFLIGHT_SHMFD)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(QUEUES_MAX.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let vring = self.vring(index)?;
        vring.enabled = enable;
        if enable {
            return self.start(index);
        }
        vring.stop();
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let space = config::space(self.device.rules().size, self.device.caching_chosen());
        let (offset, size) = (offset as usize, size as usize);
        // What a newer hypervisor knows beyond our fields is zero.
        let bytes = space.iter().copied().chain(std::iter::repeat(0));
        Ok(bytes.skip(offset).take(size.min(4096)).collect())
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        match (offset, bytes, self.device.disk.is_writable()) {
            (WRITEBACK_AT, [wanted @ 0..=1], true) => {
                let caching = if *wanted == 1 { Caching::WriteBack } else { Caching::WriteThrough };
                self.device.choose_caching(caching);
                if let Some(inflight) = &self.inflight {
                    inflight.keep_caching(caching).map_err(refused)?;
                }
                // What was acknowledged before is to be durable as well.
                self.device.disk.flush().map_err(refused)
            }
            _ => Err(Error::InvalidParam),
        }
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        if queues > QUEUES_MAX || size > SIZE_MAX {
            return Err(Error::InvalidParam);
        }
        let (inflight, file, len) =
            Inflight::create(&self.device.dir, (queues, size), self.device.identity).map_err(refused)?;
        inflight.keep_caching(self.device.caching_chosen()).map_err(refused)?;
        self.inflight = Some(Arc::new(inflight));
        Ok((VhostUserInflight::new(len, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *given;
        if num_queues > QUEUES_MAX || queue_size > SIZE_MAX {
            return Err(Error::InvalidParam);
        }
        let place = (file, mmap_offset, mmap_size);
        let inflight = Inflight::open(place, num_queues, queue_size, self.device.identity).map_err(refused)?;
        self.device.choose_caching(inflight.caching().map_err(refused)?);
        self.inflight = Some(Arc::new(inflight));
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: vhost::vhost_user::GpuBackend) -> Result<()> {
        never()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        never()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        never()
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        never()
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        never()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        never()
    }

    fn check_device_state(&mut self) -> Result<()> {
        never()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        never()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        never()
    }
}
