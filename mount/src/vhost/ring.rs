//! A split virtqueue in a guest's memory, from the device's side.
//!
//! Invariants
//! - Nothing in the ring is believed: indices are bounded by the ring's size, tables and buffers by the memory, chains by
//!   a count, so that no guest can make the device loop, look elsewhere or allocate without bound.
//! - An answer is stored whole before the index that shows it.
//! - After an access that failed the ring is not used any more.
//!
//! Not here: what requests mean (`request`), who waits for kicks (`queue`).
//!
//! Source: Virtual I/O Device (VIRTIO) Version 1.2, section 2.7.

use std::{
    num::Wrapping,
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence},
    },
};

use super::{
    memory::{At, Memory, MemoryError},
    request::Descriptor,
};

/// Places of a ring at most.
pub const SIZE_MAX: u16 = 1024;
/// Descriptors of one request at most, those of its indirect table included.
pub const CHAIN_MAX: usize = 1024 + 2;

const DESCRIPTOR_LEN: usize = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// The guest wants no interrupts.
const NO_INTERRUPT: u16 = 1;
/// The device wants no kicks.
const NO_NOTIFY: u16 = 1;

/// Why a ring or a chain is not usable.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// Not in the guest's memory, or not aligned.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A size that is no power of two up to [`SIZE_MAX`].
    #[error("ring of {0} places")]
    Size(u32),
    /// The guest claims more requests than the ring has places, or a descriptor beyond the table.
    #[error("ring index {0} is out of range")]
    Index(u16),
}

/// Why the chain of one request cannot be walked. The ring goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChain {
    /// It loops, or is longer than [`CHAIN_MAX`].
    #[error("chain without an end")]
    Endless,
    /// A descriptor beyond its table.
    #[error("descriptor beyond its table")]
    Index,
    /// A table in a table, with a tail, of an odd length, or outside the memory.
    #[error("indirect table that is none")]
    Table,
}

/// Where a ring is: a hypervisor's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The descriptor table.
    pub descriptors: u64,
    /// What the guest offers.
    pub available: u64,
    /// What the device has answered.
    pub used: u64,
}

/// Whether both sides name the index they want to be woken at (`VIRTIO_F_RING_EVENT_IDX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wakeups {
    /// They do.
    ByIndex,
    /// They raise flags.
    ByFlag,
}

/// A ring.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<Memory>,
    addresses: Addresses,
    size: u16,
    wakeups: Wakeups,
    descriptors: At,
    available: At,
    used: At,
    /// The next request to take.
    next: Wrapping<u16>,
    /// The next answer to give.
    answered: Wrapping<u16>,
    /// `answered` when the guest was last asked whether it wants to know.
    told: Wrapping<u16>,
}

impl Ring {
    /// A ring of `size` places. Goes on where its own index of answers stands; the next request is `next`.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn new(
        memory: Arc<Memory>,
        addresses: Addresses,
        size: u32,
        wakeups: Wakeups,
        next: u16,
    ) -> Result<Self, RingError> {
        let places = u16::try_from(size).ok().filter(|n| n.is_power_of_two() && *n <= SIZE_MAX);
        let places = places.ok_or(RingError::Size(size))?;
        let (descriptors, available, used) = find(&memory, addresses, places)?;
        let mut ring = Self {
            memory,
            addresses,
            size: places,
            wakeups,
            descriptors,
            available,
            used,
            next: Wrapping(next),
            answered: Wrapping(0),
            told: Wrapping(0),
        };
        ring.answered = Wrapping(u16::from_le(ring.memory.load::<AtomicU16>(used.plus(2), Ordering::Acquire)?));
        ring.told = ring.answered;
        Ok(ring)
    }

    /// Uses other memory from now on, in which the ring has the same addresses.
    ///
    /// # Errors
    /// [`RingError`], with nothing changed.
    pub fn remap(&mut self, memory: Arc<Memory>) -> Result<(), RingError> {
        (self.descriptors, self.available, self.used) = find(&memory, self.addresses, self.size)?;
        self.memory = memory;
        Ok(())
    }

    /// The memory it is in.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Places.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Index of the next request.
    pub fn next_index(&self) -> u16 {
        self.next.0
    }

    /// Index of the next answer.
    pub fn answered_index(&self) -> u16 {
        self.answered.0
    }

    /// Takes up the next request at `next` instead.
    pub fn set_next(&mut self, next: u16) {
        self.next = Wrapping(next);
    }

    /// How many requests are there.
    ///
    /// # Errors
    /// [`RingError`], where the guest's index makes no sense.
    pub fn pending(&self) -> Result<u16, RingError> {
        let index = u16::from_le(self.memory.load::<AtomicU16>(self.available.plus(2), Ordering::Acquire)?);
        let pending = (Wrapping(index) - self.next).0;
        if pending <= self.size { Ok(pending) } else { Err(RingError::Index(index)) }
    }

    /// Takes the next request: the index of its first descriptor.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn take(&mut self) -> Result<Option<u16>, RingError> {
        if self.pending()? == 0 {
            return Ok(None);
        }
        let place = usize::from(self.next.0 % self.size);
        let at = self.available.plus(4 + 2 * place);
        let head = u16::from_le(self.memory.load::<AtomicU16>(at, Ordering::Relaxed)?);
        if head >= self.size {
            return Err(RingError::Index(head));
        }
        self.next += 1;
        Ok(Some(head))
    }

    /// The descriptors of the request at `head`, into `out`.
    ///
    /// # Errors
    /// [`BadChain`]; `out` then holds any part of it.
    pub fn chain(&self, head: u16, out: &mut Vec<Descriptor>) -> Result<(), BadChain> {
        out.clear();
        let mut index = head;
        loop {
            if index >= self.size {
                return Err(BadChain::Index);
            }
            let at = self.descriptors.plus(DESCRIPTOR_LEN * usize::from(index));
            let (found, flags, next) = self.descriptor(at).map_err(|_| BadChain::Index)?;
            if flags & INDIRECT != 0 {
                // A table ends a chain.
                return if flags & NEXT == 0 { self.table(found, out) } else { Err(BadChain::Table) };
            }
            out.push(found);
            if flags & NEXT == 0 {
                return Ok(());
            }
            if out.len() >= usize::from(self.size) {
                return Err(BadChain::Endless);
            }
            index = next;
        }
    }

    fn table(&self, table: Descriptor, out: &mut Vec<Descriptor>) -> Result<(), BadChain> {
        let len = usize::try_from(table.len).map_err(|_| BadChain::Table)?;
        if len == 0 || !len.is_multiple_of(DESCRIPTOR_LEN) {
            return Err(BadChain::Table);
        }
        let start = self.memory.at_guest(table.addr, u64::from(table.len)).map_err(|_| BadChain::Table)?;
        let (mut index, count, before) = (0, len / DESCRIPTOR_LEN, out.len());
        loop {
            if index >= count {
                return Err(BadChain::Index);
            }
            let at = start.plus(DESCRIPTOR_LEN * index);
            let (found, flags, next) = self.descriptor(at).map_err(|_| BadChain::Table)?;
            if flags & INDIRECT != 0 {
                return Err(BadChain::Table);
            }
            out.push(found);
            if flags & NEXT == 0 {
                return Ok(());
            }
            if out.len() - before >= count || out.len() >= CHAIN_MAX {
                return Err(BadChain::Endless);
            }
            index = usize::from(next);
        }
    }

    /// `le64 address, le32 length, le16 flags, le16 next`, copied once.
    fn descriptor(&self, at: At) -> Result<(Descriptor, u16, u16), MemoryError> {
        let mut bytes = [0; DESCRIPTOR_LEN];
        self.memory.read_at(at, &mut bytes)?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        let flags = u16::from_le_bytes([f0, f1]);
        let descriptor = Descriptor {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            writable: flags & WRITE != 0,
        };
        Ok((descriptor, flags, u16::from_le_bytes([n0, n1])))
    }

    /// Answers the request at `head`, of whose buffers `written` bytes were written.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn answer(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        let place = usize::from(self.answered.0 % self.size);
        let at = self.used.plus(4 + 8 * place);
        self.memory.store::<AtomicU32>(at, u32::from(head).to_le(), Ordering::Relaxed)?;
        self.memory.store::<AtomicU32>(at.plus(4), written.to_le(), Ordering::Relaxed)?;
        self.answered += 1;
        self.memory.store::<AtomicU16>(self.used.plus(2), self.answered.0.to_le(), Ordering::Release)?;
        Ok(())
    }

    /// Whether the guest wants to hear of the answers since this was last asked.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn wants_interrupt(&mut self) -> Result<bool, RingError> {
        let before = std::mem::replace(&mut self.told, self.answered);
        if before == self.answered {
            return Ok(false);
        }
        // What the guest has said must be read after the answers are there for it to see.
        fence(Ordering::SeqCst);
        Ok(match self.wakeups {
            Wakeups::ByFlag => {
                let flags = u16::from_le(self.memory.load::<AtomicU16>(self.available, Ordering::Relaxed)?);
                flags & NO_INTERRUPT == 0
            }
            Wakeups::ByIndex => {
                let at = self.available.plus(4 + 2 * usize::from(self.size));
                let event = Wrapping(u16::from_le(self.memory.load::<AtomicU16>(at, Ordering::Relaxed)?));
                self.answered - event - Wrapping(1) < self.answered - before
            }
        })
    }

    /// Asks the guest for a kick with its next request. Returns whether one is there already.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn want_kicks(&self) -> Result<bool, RingError> {
        match self.wakeups {
            Wakeups::ByFlag => self.memory.store::<AtomicU16>(self.used, 0, Ordering::Relaxed)?,
            Wakeups::ByIndex => {
                let at = self.used.plus(4 + 8 * usize::from(self.size));
                self.memory.store::<AtomicU16>(at, self.next.0.to_le(), Ordering::Relaxed)?;
            }
        }
        // The guest must see the wish before what it offered is looked at once more.
        fence(Ordering::SeqCst);
        Ok(self.pending()? > 0)
    }

    /// Tells the guest that it need not kick. Only flags can say so; an index that was passed says it by itself.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn want_no_kicks(&self) -> Result<(), RingError> {
        if self.wakeups == Wakeups::ByFlag {
            self.memory.store::<AtomicU16>(self.used, NO_NOTIFY.to_le(), Ordering::Relaxed)?;
        }
        Ok(())
    }
}

/// The three parts, whole and aligned.
fn find(memory: &Memory, addresses: Addresses, size: u16) -> Result<(At, At, At), RingError> {
    let Addresses { descriptors, available, used } = addresses;
    for (addr, align) in [(descriptors, 16), (available, 2), (used, 4)] {
        if !addr.is_multiple_of(align) {
            return Err(MemoryError::Outside(addr).into());
        }
    }
    let size = u64::from(size);
    let descriptors = memory.at_user(descriptors, size * DESCRIPTOR_LEN as u64)?;
    let available = memory.at_user(available, 4 + 2 * size + 2)?;
    let used = memory.at_user(used, 4 + 8 * size + 2)?;
    // Their parts are loaded and stored as integers.
    memory.load::<AtomicU64>(descriptors, Ordering::Relaxed)?;
    memory.load::<AtomicU16>(available, Ordering::Relaxed)?;
    memory.load::<AtomicU32>(used, Ordering::Relaxed)?;
    Ok((descriptors, available, used))
}
