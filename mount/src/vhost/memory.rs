//! A guest's memory, as its hypervisor shares it: the only place where a guest's addresses become ours.
//!
//! Invariants
//! - Every access is checked against the regions, whose files were found long enough before they were mapped.
//! - Guest memory is only ever copied from and to, never borrowed as a slice: the guest may change it at any time.
//!
//! Not here: a hypervisor that shortens a file it has shared. That ends the door (`SIGBUS`), and the hypervisor
//! could as well have ended the machine; its guest cannot do it.

use std::{fs::File, sync::atomic::Ordering};

use vm_memory::{AtomicInteger, FileOffset, MmapRegion, VolatileMemory};

use super::request::Span;

/// Regions a hypervisor may share.
pub const REGIONS_MAX: usize = 64;

/// Part of a guest's memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Where the guest has it.
    pub guest: u64,
    /// Where the hypervisor has it: rings are named by these addresses.
    pub user: u64,
    /// How long it is.
    pub len: u64,
    /// Where it begins in its file.
    pub file_offset: u64,
}

/// Why memory cannot be mapped, or an access failed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region is empty, overlaps another, or does not fit the address space.
    #[error("guest memory: region at {0:#x} is empty, overlaps or does not fit")]
    Region(u64),
    /// Too many regions.
    #[error("guest memory: {0} regions")]
    Count(usize),
    /// A file is shorter than its region says.
    #[error("guest memory: the file of the region at {0:#x} ends inside it")]
    Short(u64),
    /// Mapping failed.
    #[error("guest memory: mapping the region at {0:#x} failed: {1}")]
    Map(u64, String),
    /// An address outside the regions, or not aligned.
    #[error("guest memory: nothing at {0:#x}")]
    Outside(u64),
}

struct Region {
    spec: RegionSpec,
    map: MmapRegion<()>,
}

/// The memory of one guest.
#[derive(Default)]
pub struct Memory {
    regions: Vec<Region>,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.regions.iter().map(|region| region.spec)).finish()
    }
}

/// A place that was found: its region and the offset in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At {
    region: usize,
    offset: usize,
}

impl At {
    /// `bytes` further on.
    pub(super) fn plus(self, bytes: usize) -> Self {
        Self { offset: self.offset.saturating_add(bytes), ..self }
    }
}

impl Memory {
    /// Maps what a hypervisor shares.
    ///
    /// # Errors
    /// [`MemoryError`], with nothing mapped.
    pub fn map(shared: Vec<(RegionSpec, File)>) -> Result<Self, MemoryError> {
        if shared.len() > REGIONS_MAX {
            return Err(MemoryError::Count(shared.len()));
        }
        let mut regions: Vec<Region> = Vec::with_capacity(shared.len());
        for (spec, file) in shared {
            let bad = MemoryError::Region(spec.guest);
            let overlaps = |a: u64, b: u64, len: u64| a < b.saturating_add(len) && b < a.saturating_add(spec.len);
            let fits = spec.len > 0
                && spec.guest.checked_add(spec.len).is_some()
                && spec.user.checked_add(spec.len).is_some()
                && isize::try_from(spec.len).is_ok();
            let clash = regions.iter().map(|region| region.spec).any(|other| {
                overlaps(spec.guest, other.guest, other.len) || overlaps(spec.user, other.user, other.len)
            });
            if !fits || clash {
                return Err(bad);
            }
            let end = spec.file_offset.checked_add(spec.len).ok_or(bad)?;
            let failed = |e: std::io::Error| MemoryError::Map(spec.guest, e.to_string());
            if file.metadata().map_err(failed)?.len() < end {
                return Err(MemoryError::Short(spec.guest));
            }
            let len = usize::try_from(spec.len).map_err(|_| MemoryError::Region(spec.guest))?;
            let map = MmapRegion::from_file(FileOffset::new(file, spec.file_offset), len)
                .map_err(|e| MemoryError::Map(spec.guest, e.to_string()))?;
            regions.push(Region { spec, map });
        }
        Ok(Self { regions })
    }

    /// The first byte of the first region.
    pub(super) fn first() -> At {
        At { region: 0, offset: 0 }
    }

    /// What the hypervisor has at `user`, if `len` bytes from there are in one region.
    pub(super) fn at_user(&self, user: u64, len: u64) -> Result<At, MemoryError> {
        self.find(user, len, |spec| spec.user)
    }

    /// What the guest has at `addr`, if `len` bytes from there are in one region.
    pub(super) fn at_guest(&self, addr: u64, len: u64) -> Result<At, MemoryError> {
        self.find(addr, len, |spec| spec.guest)
    }

    fn find(&self, addr: u64, len: u64, base: fn(&RegionSpec) -> u64) -> Result<At, MemoryError> {
        let inside = |region: &Region| {
            let offset = addr.checked_sub(base(&region.spec))?;
            let end = offset.checked_add(len)?;
            if end <= region.spec.len { usize::try_from(offset).ok() } else { None }
        };
        let found = self.regions.iter().enumerate();
        let mut found = found.filter_map(|(region, r)| Some(At { region, offset: inside(r)? }));
        found.next().ok_or(MemoryError::Outside(addr))
    }

    /// Loads an integer that the guest may be storing just now.
    pub(super) fn load<T: AtomicInteger>(&self, at: At, order: Ordering) -> Result<T::V, MemoryError> {
        Ok(self.atomic::<T>(at)?.load(order))
    }

    /// Stores an integer that the guest may be loading just now.
    pub(super) fn store<T: AtomicInteger>(&self, at: At, value: T::V, order: Ordering) -> Result<(), MemoryError> {
        self.atomic::<T>(at)?.store(value, order);
        Ok(())
    }

    fn atomic<T: AtomicInteger>(&self, at: At) -> Result<&T, MemoryError> {
        let outside = || MemoryError::Outside(at.offset as u64);
        let region = self.regions.get(at.region).ok_or_else(outside)?;
        region.map.get_atomic_ref::<T>(at.offset).map_err(|_| outside())
    }

    /// Copies bytes out.
    pub(super) fn read_at(&self, at: At, buf: &mut [u8]) -> Result<(), MemoryError> {
        let outside = || MemoryError::Outside(at.offset as u64);
        let region = self.regions.get(at.region).ok_or_else(outside)?;
        let slice = region.map.get_slice(at.offset, buf.len()).map_err(|_| outside())?;
        slice.copy_to(buf);
        Ok(())
    }

    /// Copies bytes in.
    pub(super) fn write_at(&self, at: At, bytes: &[u8]) -> Result<(), MemoryError> {
        let outside = || MemoryError::Outside(at.offset as u64);
        let region = self.regions.get(at.region).ok_or_else(outside)?;
        region.map.get_slice(at.offset, bytes.len()).map_err(|_| outside())?.copy_from(bytes);
        Ok(())
    }

    /// Whether every byte of `spans` is there.
    pub(super) fn check(&self, spans: &[Span]) -> Result<(), MemoryError> {
        spans.iter().try_for_each(|span| self.pieces(*span, |_, _, _| Ok(())))
    }

    /// The parts of a span: it may go on in the region that follows. Calls with where, the offset in the span, and how
    /// many bytes.
    fn pieces(
        &self,
        span: Span,
        mut each: impl FnMut(At, usize, usize) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let (mut addr, mut left, mut done) = (span.addr, u64::from(span.len), 0usize);
        while left > 0 {
            let at = self.at_guest(addr, 1)?;
            let rest = self.regions.get(at.region).map_or(0, |region| region.map.len().saturating_sub(at.offset));
            let n = left.min(rest as u64);
            let len = usize::try_from(n).map_err(|_| MemoryError::Outside(addr))?;
            each(at, done, len)?;
            addr = addr.checked_add(n).ok_or(MemoryError::Outside(addr))?;
            done += len;
            left -= n;
        }
        Ok(())
    }

    /// Copies bytes `skip..skip + buf.len()` of `spans` out.
    ///
    /// # Errors
    /// [`MemoryError::Outside`]; also where `spans` are shorter.
    pub fn gather(&self, spans: &[Span], skip: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut rest = buf;
        self.parts(spans, skip, rest.len(), |span| {
            let len = span.len as usize;
            let (front, tail) =
                std::mem::take(&mut rest).split_at_mut_checked(len).ok_or(MemoryError::Outside(span.addr))?;
            self.pieces(span, |at, from, n| {
                self.read_at(at, front.get_mut(from..from + n).ok_or(MemoryError::Outside(span.addr))?)
            })?;
            rest = tail;
            Ok(())
        })
    }

    /// Copies `bytes` into bytes `skip..` of `spans`.
    ///
    /// # Errors
    /// [`MemoryError::Outside`]; also where `spans` are shorter.
    pub fn scatter(&self, spans: &[Span], skip: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let mut rest = bytes;
        self.parts(spans, skip, rest.len(), |span| {
            let len = span.len as usize;
            let (front, tail) = rest.split_at_checked(len).ok_or(MemoryError::Outside(span.addr))?;
            self.pieces(span, |at, from, n| {
                self.write_at(at, front.get(from..from + n).ok_or(MemoryError::Outside(span.addr))?)
            })?;
            rest = tail;
            Ok(())
        })
    }

    /// The parts of `spans` that hold their bytes `skip..skip + len`.
    fn parts(
        &self,
        spans: &[Span],
        skip: u64,
        len: usize,
        mut each: impl FnMut(Span) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let (mut skip, mut left) = (skip, len);
        for span in spans {
            if left == 0 {
                break;
            }
            let passed = u32::try_from(skip).unwrap_or(u32::MAX).min(span.len);
            skip -= u64::from(passed);
            let n = u32::try_from(left).unwrap_or(u32::MAX).min(span.len - passed);
            if n > 0 {
                let addr = span.addr.checked_add(u64::from(passed)).ok_or(MemoryError::Outside(span.addr))?;
                each(Span { addr, len: n })?;
                left -= n as usize;
            }
        }
        if left == 0 { Ok(()) } else { Err(MemoryError::Outside(0)) }
    }
}
