//! What a device has taken and not yet answered, in memory that outlives its process.
//!
//! The hypervisor keeps the memory while a door is away and gives it to the next one, which takes up again exactly what
//! was taken and not answered: nothing is lost, nothing is answered twice. Without it a door that dies with requests in
//! the air that were answered out of order could not tell which.
//!
//! Invariants
//! - A request is marked before anything is done for it, and unmarked after its answer is in the ring. A death in between
//!   is told by the ring's own index, which is noted behind each answer.
//! - The memory also says which disk it belongs to: a machine that ran from one disk is never given another. And it says
//!   what the guest chose of caching, which no hypervisor says again to the next door.
//! - What is read from it is bounded like any stranger's: at most as many marks as the ring has places.
//!
//! Source: the vhost-user protocol of QEMU, section "Inflight I/O tracking", split rings.

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::Path,
    sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering},
};

use rustix::{
    fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create, open},
    io::Errno,
};

use super::{
    config::Caching,
    memory::{At, Memory, MemoryError, RegionSpec},
};

/// Which disk: the same bytes for the same disk only.
pub type Identity = [u8; 16];

/// Bytes before a queue's marks: features, version, number of places, head of the last answer, index of the ring.
const HEAD_LEN: usize = 16;
/// Bytes of a mark: whether it is taken, the next of a batch, its turn.
const MARK_LEN: usize = 16;
/// Queues begin at multiples of this.
const QUEUE_ALIGN: usize = 64;
/// Layout of marks that is written here.
const VERSION: u16 = 1;

/// The memory of all queues of a device.
#[derive(Debug)]
pub(super) struct Inflight {
    memory: Memory,
    queues: u16,
    size: u16,
}

/// Why such memory is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error("memory for requests in the air: {0}")]
    Memory(#[from] MemoryError),
    #[error("memory for requests in the air: {0}")]
    System(#[from] rustix::io::Errno),
    #[error("memory for requests in the air of {0} queues of {1}")]
    Shape(u16, u16),
    #[error("the machine ran from another disk than this one; stop it, or serve that disk again")]
    OtherDisk,
}

/// A file of `len` bytes: in memory and of fixed length, or, where a jail forbids that, without a name in `dir`.
fn memory_file(dir: &Path, len: u64) -> rustix::io::Result<OwnedFd> {
    let fd = match memfd_create("aquifer-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING) {
        Err(Errno::PERM) => {
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            let fd = open(dir, flags, Mode::RUSR | Mode::WUSR)?;
            ftruncate(&fd, len)?;
            return Ok(fd);
        }
        made => made?,
    };
    ftruncate(&fd, len)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

fn queue_len(size: u16) -> usize {
    (HEAD_LEN + MARK_LEN * usize::from(size)).next_multiple_of(QUEUE_ALIGN)
}

/// Bytes for queues of `size` places, the disk's identity, and the guest's choice of caching: 1 for write-through.
fn total_len(queues: u16, size: u16) -> u64 {
    (queue_len(size) * usize::from(queues) + size_of::<Identity>() + 8) as u64
}

fn place(index: u16, size: u16) -> At {
    Memory::first().plus(queue_len(size) * usize::from(index))
}

impl Inflight {
    /// New memory for a disk, the file that holds it, and its length. In a jail the file is one without a name in `dir`.
    pub(super) fn create(
        dir: &Path,
        (queues, size): (u16, u16),
        identity: Identity,
    ) -> Result<(Self, File, u64), Refused> {
        let len = total_len(queues, size);
        let file = File::from(memory_file(dir, len)?);
        let again = file.try_clone().map_err(|_| Refused::Shape(queues, size))?;
        let this = Self::map(again, 0, len, queues, size)?;
        for index in 0..queues {
            let at = place(index, size);
            this.memory.store::<AtomicU16>(at.plus(8), VERSION, Ordering::Relaxed)?;
            this.memory.store::<AtomicU16>(at.plus(10), size, Ordering::Relaxed)?;
        }
        this.memory.write_at(place(queues, size), &identity)?;
        Ok((this, file, len))
    }

    /// Memory that an earlier door of the same disk left.
    pub(super) fn open(
        (file, offset, len): (File, u64, u64),
        queues: u16,
        size: u16,
        identity: Identity,
    ) -> Result<Self, Refused> {
        if len < total_len(queues, size) {
            return Err(Refused::Shape(queues, size));
        }
        let this = Self::map(file, offset, len, queues, size)?;
        let mut found = Identity::default();
        this.memory.read_at(place(queues, size), &mut found)?;
        if found == identity { Ok(this) } else { Err(Refused::OtherDisk) }
    }

    fn map(file: File, file_offset: u64, len: u64, queues: u16, size: u16) -> Result<Self, Refused> {
        let spec = RegionSpec { guest: 0, user: 0, len, file_offset };
        Ok(Self { memory: Memory::map(vec![(spec, file)])?, queues, size })
    }

    fn caching_at(&self) -> At {
        place(self.queues, self.size).plus(size_of::<Identity>())
    }

    /// Keeps the guest's choice for the next door.
    pub(super) fn keep_caching(&self, caching: Caching) -> Result<(), MemoryError> {
        self.memory.store::<AtomicU8>(self.caching_at(), u8::from(caching == Caching::WriteThrough), Ordering::Release)
    }

    /// The guest's choice, as the door before this one kept it.
    pub(super) fn caching(&self) -> Result<Caching, MemoryError> {
        Ok(match self.memory.load::<AtomicU8>(self.caching_at(), Ordering::Acquire)? {
            0 => Caching::WriteBack,
            _ => Caching::WriteThrough,
        })
    }

    /// Places of each queue.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    fn mark(&self, queue: u16, head: u16) -> Result<At, MemoryError> {
        if queue >= self.queues || head >= self.size {
            return Err(MemoryError::Outside(u64::from(head)));
        }
        Ok(place(queue, self.size).plus(HEAD_LEN + MARK_LEN * usize::from(head)))
    }

    /// Notes that the request at `head` was taken, as number `turn`.
    pub(super) fn taken(&self, queue: u16, head: u16, turn: u64) -> Result<(), MemoryError> {
        let at = self.mark(queue, head)?;
        self.memory.store::<AtomicU64>(at.plus(8), turn, Ordering::Relaxed)?;
        self.memory.store::<AtomicU8>(at, 1, Ordering::Release)
    }

    /// Notes that the answer of `head` is the next to go into the ring.
    pub(super) fn answering(&self, queue: u16, head: u16) -> Result<(), MemoryError> {
        self.memory.store::<AtomicU16>(place(queue, self.size).plus(12), head, Ordering::Release)
    }

    /// Notes that the answer of `head` is in the ring, whose index is now `used`.
    pub(super) fn answered(&self, queue: u16, head: u16, used: u16) -> Result<(), MemoryError> {
        self.memory.store::<AtomicU8>(self.mark(queue, head)?, 0, Ordering::Release)?;
        self.memory.store::<AtomicU16>(place(queue, self.size).plus(14), used, Ordering::Release)
    }

    /// What was taken and not answered, in the order it was taken, with the turn of the last; `used` is the ring's index.
    pub(super) fn recover(&self, queue: u16, used: u16) -> Result<(Vec<u16>, u64), MemoryError> {
        let at = place(queue, self.size);
        if self.memory.load::<AtomicU16>(at.plus(14), Ordering::Acquire)? != used {
            // Its answer went into the ring, and nothing else was done after that.
            let head = self.memory.load::<AtomicU16>(at.plus(12), Ordering::Acquire)?;
            if head < self.size {
                self.memory.store::<AtomicU8>(self.mark(queue, head)?, 0, Ordering::Release)?;
            }
            self.memory.store::<AtomicU16>(at.plus(14), used, Ordering::Release)?;
        }
        let mut found = Vec::new();
        for head in 0..self.size {
            let at = self.mark(queue, head)?;
            if self.memory.load::<AtomicU8>(at, Ordering::Acquire)? == 1 {
                found.push((self.memory.load::<AtomicU64>(at.plus(8), Ordering::Relaxed)?, head));
            }
        }
        found.sort_unstable();
        let last = found.last().map_or(0, |(turn, _)| *turn);
        Ok((found.into_iter().map(|(_, head)| head).collect(), last))
    }
}

#[cfg(test)]
mod tests;
