//! What every door and every job reads and writes: a chain, and perhaps a writable overlay on it.
//!
//! Invariants
//! - All methods take `&self` and may be called from any number of threads.
//! - Exactly one source is read per block: overlay or chain.
//! - `flush` covers everything acknowledged before it on any connection (NBD multi-conn).
//!
//! Not here: wire formats, queues, threads.

mod fetched;
mod source;
mod touched;

use std::{
    cell::RefCell,
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use aquifer_formats::Storage;
use arc_swap::ArcSwapOption;

pub use self::source::Parked;
pub use self::touched::TOUCHED_NAME;
pub(crate) use self::touched::UNIT_BYTES;
use self::{
    fetched::Fetched,
    source::Patience,
    touched::{Touch, Touched},
};
use crate::{
    Chain, Delta, DemandStats, Error, Extent, ExtentKind, LocalProgress, Overlay, Result, Trace,
    chain::Effort,
    hydrate::demand::Demand,
    overlay::Run,
    sync::Mutex,
    unflushed::{Boot, Operation, Unflushed},
    unused::{self, Unused},
};

/// One virtual disk.
#[derive(Debug)]
pub struct Disk {
    name: String,
    size: u64,
    /// `None` once everything is local and the source has been let go, or while it is awaited.
    chain: ArcSwapOption<Chain>,
    /// There is no chain yet, and one is needed: what wants it waits.
    awaited: AtomicBool,
    /// Where absent blocks were read, if that is known from the beginning.
    touched: Option<Touched>,
    fetched: Fetched,
    overlay: Option<Overlay>,
    /// Acknowledged writes for the next process, where that is wanted.
    unflushed: Option<Unflushed>,
    demand: Arc<Demand>,
    /// Held while hydration stores: a file takes one writer at a time, and the others decode meanwhile
    /// instead of spinning for it. Taken before any lock of the overlay.
    turn: Mutex<()>,
    patience: Patience,
}

/// How long a guest's read waits for a source that is away, unless [`Disk::set_patience`] says otherwise.
const PATIENCE: Duration = Duration::from_secs(300);

/// How much is let go of under one hold of readers.
const FORGET_BYTES: u64 = 4 << 30;

/// What a zeroing request allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// Space may be given back.
    MayTrim,
    /// Space must stay reserved (`NBD_CMD_FLAG_NO_HOLE`).
    KeepSpace,
}

impl Disk {
    /// A read-only disk.
    pub fn read_only(name: impl Into<String>, chain: Arc<Chain>) -> Self {
        let size = chain.size();
        Self::new(name.into(), size, Some(chain), None)
    }

    /// A disk that takes writes into `overlay`.
    ///
    /// # Errors
    /// [`Error::WrongOverlay`] if the sizes differ.
    pub fn writable(name: impl Into<String>, chain: Arc<Chain>, overlay: Overlay) -> Result<Self> {
        let (name, size) = (name.into(), chain.size());
        if overlay.size() != size {
            let what = format!("the overlay has {} bytes, the chain {size}", overlay.size());
            return Err(Error::WrongOverlay { path: name, what });
        }
        Ok(Self::new(name, size, Some(chain), Some(overlay)))
    }

    /// A disk whose overlay holds everything already: no source is needed.
    ///
    /// # Errors
    /// [`Error::WrongOverlay`] if anything is absent.
    pub fn detached(name: impl Into<String>, overlay: Overlay) -> Result<Self> {
        let (name, absent) = (name.into(), overlay.local().absent);
        if absent > 0 {
            let what = format!("{absent} bytes are not local yet, the source is still needed");
            return Err(Error::WrongOverlay { path: name, what });
        }
        let size = overlay.size();
        Ok(Self::new(name, size, None, Some(overlay)))
    }

    /// A disk whose source is away: what is local is served, what is not waits for [`Disk::renew_chain`].
    pub fn awaiting(name: impl Into<String>, overlay: Overlay) -> Self {
        let disk = Self::new(name.into(), overlay.size(), None, Some(overlay));
        disk.awaited.store(true, Ordering::Release);
        disk
    }

    fn new(name: String, size: u64, chain: Option<Arc<Chain>>, overlay: Option<Overlay>) -> Self {
        let patience = Patience::new(if overlay.is_some() { PATIENCE } else { Duration::ZERO });
        let demand = Arc::new(Demand::new(size));
        let awaited = AtomicBool::new(false);
        let fetched = Fetched::default();
        if let Some(chain) = &chain {
            fetched.add(chain);
        }
        Self {
            name,
            size,
            chain: ArcSwapOption::new(chain),
            awaited,
            touched: None,
            fetched,
            overlay,
            unflushed: None,
            demand,
            turn: Mutex::new(()),
            patience,
        }
    }

    /// Keeps acknowledged writes where the next process finds them, flushed or not, in two files in `dir`, the
    /// overlay's folder; first brings back what an earlier process of this `boot` of the machine left there. For disks
    /// whose user may outlive this process: to it the disk never stopped.
    ///
    /// # Errors
    /// [`Error::ReadOnly`] without an overlay; as [`Disk::write`] and [`Disk::flush`].
    pub fn surviving(mut self, dir: &Path, boot: Boot) -> Result<Self> {
        if self.overlay()?.is_handed_over() {
            // Each write is in the page cache of `disk.raw` already, and a double could be older than what others wrote.
            return Ok(self);
        }
        let unflushed = Unflushed::open(dir, boot, &mut |operation| self.apply(operation).map(drop))?;
        self.flush()?;
        unflushed.replayed()?;
        self.unflushed = Some(unflushed);
        Ok(self)
    }

    /// Remembers in `dir`, the overlay's folder, where absent blocks are read, so that hydration may leave out what no
    /// file system uses. Without effect for an overlay that was read before without being watched.
    ///
    /// # Errors
    /// [`Error::ReadOnly`] without an overlay; I/O.
    pub fn watching(mut self, dir: &Path) -> Result<Self> {
        let local = self.overlay()?.local();
        if local.absent > 0 {
            self.touched = Touched::open(dir, self.size, local.local() == 0)?;
        }
        Ok(self)
    }

    /// As [`Disk::watching`], in a file that somebody else opened, empty for a new overlay.
    ///
    /// # Errors
    /// As [`Disk::watching`].
    pub fn watching_on(mut self, file: Arc<dyn Storage>) -> Result<Self> {
        if self.overlay()?.local().absent > 0 {
            let is_new = file.len().is_ok_and(|len| len == 0) && self.overlay()?.local().local() == 0;
            self.touched = Touched::on(file, self.size, is_new)?;
        }
        Ok(self)
    }

    /// Name, as exports and messages give it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether writes are possible.
    pub fn is_writable(&self) -> bool {
        self.overlay.is_some()
    }

    /// Fills `buf` from `offset`; may decode, and may wait for a slow source.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; damage found by a layer, at once; [`Error::SourceAway`] if the source
    /// did not answer for as long as [`Disk::set_patience`] says.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let Some(overlay) = &self.overlay else { return self.read_chain(offset, buf) };
        let started = self.demand.is_timed().then(Instant::now);
        self.read_parts(overlay, offset, buf)?;
        if let Some(started) = started {
            self.demand.note_read(started.elapsed());
        }
        Ok(())
    }

    fn read_parts(&self, overlay: &Overlay, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (kind, len) = overlay.part(at, rest);
            if kind == Run::Absent && self.touched.as_ref().is_some_and(|t| t.touch(at, len as u64) == Touch::New) {
                // It may have become zeros before that was known.
                continue;
            }
            let (front, tail) = rest.split_at_mut(len);
            match kind {
                Run::Pages => {}
                // Zeros that are not durable yet may become the chain's bytes again.
                Run::Trimmed => _ = self.touched.as_ref().map(Touched::wait_settled),
                Run::Local => {
                    let failed = |e| aquifer_formats::Error::io(overlay.raw().label(), "read", at, e);
                    overlay.raw().read_at(at, front).map_err(failed)?;
                    self.demand.record(at, len as u64);
                    self.demand.note_hit(at, len as u64);
                }
                Run::Absent => {
                    self.demand.record(at, len as u64);
                    self.read_absent(at, front)?;
                }
            }
            at += len as u64;
            rest = tail;
        }
        Ok(())
    }

    /// A guest's read of what is not local yet.
    fn read_absent(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        self.demand.note_fault(offset, len);
        if self.chain_now(Effort::Copy, offset, buf)? {
            return Ok(());
        }
        let began = Instant::now();
        self.read_chain(offset, buf)?;
        // A hole is known at once when it is looked at again.
        if self.chain().is_some_and(|chain| chain.has_data(offset, len)) {
            self.demand.note_miss(len, began.elapsed());
        }
        Ok(())
    }

    /// As [`Disk::read`], but only if that needs no decode and no slow source (cached, zero or local
    /// ranges). `Ok(false)` leaves `buf` in any state: hand the read to a thread that may wait.
    ///
    /// # Errors
    /// As [`Disk::read`], as far as it comes.
    pub fn read_now(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        self.read_without_wait(Effort::Copy, offset, buf)
    }

    /// As [`Disk::read_now`], and small blocks whose stored bytes are in memory are decoded (see
    /// [`Chain::read_soon`]).
    ///
    /// # Errors
    /// As [`Disk::read_now`].
    pub fn read_soon(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        let began = Instant::now();
        if self.read_without_wait(Effort::Copy, offset, buf)? {
            return Ok(true);
        }
        let ready = self.read_without_wait(Effort::Decode, offset, buf)?;
        if ready && self.overlay.is_some() {
            // The guest has waited for the source, though on this thread.
            self.demand.note_miss(buf.len() as u64, began.elapsed());
            self.demand.note_read(began.elapsed());
        }
        Ok(ready)
    }

    fn read_without_wait(&self, effort: Effort, offset: u64, buf: &mut [u8]) -> Result<bool> {
        self.check_range(offset, buf.len() as u64)?;
        let Some(overlay) = &self.overlay else { return self.chain_now(effort, offset, buf) };
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (kind, len) = overlay.part(at, rest);
            match (kind, &self.touched) {
                (Run::Absent, Some(touched)) => match touched.touch_now(at, len as u64) {
                    Touch::Known => {}
                    Touch::New => continue,
                    Touch::Later => return Ok(false),
                },
                (Run::Trimmed, Some(touched)) if touched.is_settling() => return Ok(false),
                _ => {}
            }
            let (front, tail) = rest.split_at_mut(len);
            let ready = match kind {
                Run::Pages | Run::Trimmed => true,
                Run::Local => {
                    let failed = |e| aquifer_formats::Error::io(overlay.raw().label(), "read", at, e);
                    let ready = overlay.raw().read_now(at, front).map_err(failed)?;
                    if ready {
                        self.demand.record(at, len as u64);
                        self.demand.note_hit(at, len as u64);
                    }
                    ready
                }
                Run::Absent => {
                    let ready = self.chain_now(effort, at, front)?;
                    if ready {
                        self.demand.record(at, len as u64);
                        self.demand.note_fault(at, len as u64);
                    }
                    ready
                }
            };
            if !ready {
                return Ok(false);
            }
            at += len as u64;
            rest = tail;
        }
        if self.demand.is_timed() {
            self.demand.note_read(Duration::ZERO);
        }
        Ok(true)
    }

    /// Writes `bytes` at `offset`. Durable after the next [`Disk::flush`]. May wait for memory or, where
    /// it covers part of an absent block, for the source.
    ///
    /// # Errors
    /// [`Error::NoSpace`]: nothing acknowledged is lost, the write may be tried again;
    /// [`Error::SyncFailed`] after any failed sync; [`Error::ReadOnly`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.perform(Operation::Write(offset, bytes))
    }

    /// Whether a write of `len` bytes would be durable before it is acknowledged, and so wait for the device: a door that has
    /// other requests to answer hands such a one off. May be otherwise at the next moment.
    pub fn pays(&self, len: u64) -> bool {
        self.overlay.as_ref().is_some_and(|overlay| overlay.pays(len))
    }

    /// Makes a range read as zeros, exactly; durable after the next [`Disk::flush`].
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn write_zeroes(&self, offset: u64, len: u64, zeroing: Zeroing) -> Result<()> {
        self.perform(Operation::Zero(offset, len, zeroing))
    }

    fn perform(&self, operation: Operation<'_>) -> Result<()> {
        let bases = self.apply(operation)?;
        // With what it was merged with: the next process may have to do it again while the source is away.
        bases.iter().try_for_each(|(offset, bytes)| self.record(Operation::Base(*offset, bytes)))?;
        self.record(operation)
    }

    /// Does it; returns the chain's blocks that were read for it, if they are of use.
    fn apply(&self, operation: Operation<'_>) -> Result<Vec<(u64, Vec<u8>)>> {
        let bases = RefCell::new(Vec::new());
        let below = |at: u64, buf: &mut [u8]| {
            self.read_chain(at, buf)?;
            if self.unflushed.is_some() {
                bases.borrow_mut().push((at, buf.to_vec()));
            }
            Ok(())
        };
        match operation {
            Operation::Write(offset, bytes) => {
                self.check_range(offset, bytes.len() as u64)?;
                self.overlay()?.write(offset, bytes, &below)?;
            }
            Operation::Zero(offset, len, zeroing) => {
                self.check_range(offset, len)?;
                self.overlay()?.zero(offset, len, zeroing, &below)?;
            }
            Operation::Base(offset, bytes) => {
                self.check_range(offset, bytes.len() as u64)?;
                self.overlay()?.fill(offset, bytes)?;
            }
        }
        Ok(bases.into_inner())
    }

    fn record(&self, operation: Operation<'_>) -> Result<()> {
        let Some(unflushed) = &self.unflushed else { return Ok(()) };
        while !unflushed.record(operation)? {
            // Nobody has asked for it.
            self.flush_by(Overlay::flush_for_room)?;
        }
        Ok(())
    }

    /// Gives a range back; it reads as zeros afterwards.
    pub fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, Zeroing::MayTrim)
    }

    /// Makes everything acknowledged so far, on any thread, durable. Flushes that arrive while one is
    /// on its way share the next sync. A read-only disk has nothing to do.
    ///
    /// # Errors
    /// [`Error::SyncFailed`], from then on always; [`Error::NoSpace`].
    pub fn flush(&self) -> Result<()> {
        self.flush_by(Overlay::flush)
    }

    fn flush_by(&self, flush: impl Fn(&Overlay) -> Result<()>) -> Result<()> {
        let Some(overlay) = &self.overlay else { return Ok(()) };
        _ = self.touched.as_ref().map(Touched::sync);
        let Some(unflushed) = &self.unflushed else { return flush(overlay) };
        let turned = unflushed.turn()?;
        flush(overlay)?;
        unflushed.flushed(&turned)
    }

    /// Reads a range into the cache, so that later reads are quick. A hint: errors are dropped.
    pub fn prefetch(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        let mut at = offset;
        while at < end {
            let (kind, n) = self.overlay.as_ref().map_or((Run::Absent, end - at), |o| o.run(at, end - at));
            if let (Run::Absent, Some(chain)) = (kind, self.chain.load().as_ref()) {
                chain.prefetch(at, n);
            }
            at += n;
        }
    }

    /// What a range holds, appended to `out` in order and merged. Reads no data.
    pub fn extents(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        let end = offset.saturating_add(len).min(self.size);
        let mut at = offset;
        while at < end {
            let (kind, len) = self.overlay.as_ref().map_or((Run::Absent, end - at), |o| o.run(at, end - at));
            match kind {
                Run::Absent => match self.chain.load().as_ref() {
                    Some(chain) => chain.extents(at, len, out)?,
                    // Nobody knows, and data is what a range may always be said to be.
                    None if self.is_awaited() => Extent::push(out, Extent { offset: at, len, kind: ExtentKind::Data }),
                    None => return Err(self.not_local(len)),
                },
                Run::Trimmed => {
                    _ = self.touched.as_ref().map(Touched::wait_settled);
                    Extent::push(out, Extent { offset: at, len, kind: ExtentKind::Zero });
                }
                Run::Pages => Extent::push(out, Extent { offset: at, len, kind: ExtentKind::Data }),
                Run::Local => self.local_extents(at, len, out)?,
            }
            at += len;
        }
        Ok(())
    }

    /// As [`Disk::extents`], if that needs neither the source nor a table that was not looked at before; `false`
    /// leaves `out` in any state.
    ///
    /// # Errors
    /// A local file that cannot be asked.
    pub fn extents_now(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<bool> {
        let end = offset.saturating_add(len).min(self.size);
        let mut at = offset;
        while at < end {
            let (kind, len) = self.overlay.as_ref().map_or((Run::Absent, end - at), |o| o.run(at, end - at));
            let known = match kind {
                Run::Absent => self.chain.load().as_ref().is_some_and(|chain| chain.extents_now(at, len, out)),
                Run::Trimmed => {
                    Extent::push(out, Extent { offset: at, len, kind: ExtentKind::Zero });
                    true
                }
                Run::Pages => {
                    Extent::push(out, Extent { offset: at, len, kind: ExtentKind::Data });
                    true
                }
                Run::Local => self.local_extents(at, len, out).map(|()| true)?,
            };
            if !known {
                return Ok(false);
            }
            at += len;
        }
        Ok(true)
    }

    /// Local ranges that are holes of `disk.raw` read as zeros.
    fn local_extents(&self, offset: u64, len: u64, out: &mut Vec<Extent>) -> Result<()> {
        let raw = self.overlay()?.raw();
        let mut at = offset;
        while at < offset + len {
            let map = |e| aquifer_formats::Error::io(raw.label(), "map", at, e);
            let (stored, n) = raw.allocated(at, offset + len - at).map_err(map)?;
            let kind = if stored { ExtentKind::Data } else { ExtentKind::Zero };
            Extent::push(out, Extent { offset: at, len: n, kind });
            at += n;
        }
        Ok(())
    }

    /// What the guest has changed since the overlay was created, in whole overlay blocks. May name too
    /// much, never too little.
    ///
    /// # Errors
    /// [`Error::ReadOnly`] without an overlay.
    pub fn dirty(&self) -> Result<Delta> {
        Ok(self.overlay()?.dirty())
    }

    /// What is not local yet, in whole overlay blocks.
    ///
    /// # Errors
    /// [`Error::ReadOnly`] without an overlay.
    pub fn absent(&self) -> Result<Delta> {
        Ok(self.overlay()?.absent())
    }

    /// How much is local.
    ///
    /// # Errors
    /// [`Error::ReadOnly`] without an overlay.
    pub fn local(&self) -> Result<LocalProgress> {
        Ok(self.overlay()?.local())
    }

    /// Brings `disk.raw` up to date and keeps it so: on return it alone is the whole, durable truth of
    /// the disk, and every later write reaches it before it is acknowledged. For the pivot.
    ///
    /// # Errors
    /// [`Error::NotLocal`] while anything is absent; as [`Disk::flush`].
    pub fn drain(&self) -> Result<()> {
        let absent = self.local()?.absent;
        if absent > 0 {
            return Err(self.not_local(absent));
        }
        self.overlay()?.drain()?;
        // Every write is in the page cache of `disk.raw` before it is acknowledged from here on, and soon others write there.
        self.unflushed.as_ref().map_or(Ok(()), Unflushed::close)
    }

    /// Records durably that somebody else (the hypervisor, after the pivot) writes `disk.raw` from now
    /// on. From then on, and in whatever process opens the overlay later, the file alone is the disk: reads
    /// and writes go straight to it, so that it does not matter who serves the guest. All of it counts as dirty.
    ///
    /// # Errors
    /// As [`Disk::drain`].
    pub fn hand_over(&self) -> Result<()> {
        self.drain()?;
        self.overlay()?.hand_over()
    }

    /// Lets the source go once nothing is absent; `false` while something is.
    pub fn detach_chain(&self) -> Result<bool> {
        let done = self.local()?.absent == 0;
        if done {
            self.awaited.store(false, Ordering::Release);
            self.chain.store(None);
        }
        Ok(done)
    }

    /// Reads the same restore point through another chain from now on: one that was opened anew after the
    /// source had been away. Reads that wait try it next. Nothing happens where the source was let go.
    ///
    /// # Errors
    /// [`Error::WrongOverlay`] if the sizes differ; that the contents are the same is the caller's to know.
    pub fn renew_chain(&self, chain: &Arc<Chain>) -> Result<()> {
        if chain.size() != self.size {
            let what = format!("the disk has {} bytes, the chain opened anew {}", self.size, chain.size());
            return Err(Error::WrongOverlay { path: self.name.clone(), what });
        }
        self.fetched.add(chain);
        if self.is_awaited() {
            self.chain.store(Some(Arc::clone(chain)));
            self.awaited.store(false, Ordering::Release);
        } else {
            self.chain.rcu(|old| old.as_ref().map(|_| Arc::clone(chain)));
        }
        self.patience.retry();
        Ok(())
    }

    /// Bytes of data fetched from the source since the disk was opened; see [`Chain::fetched`].
    pub fn fetched(&self) -> u64 {
        self.fetched.bytes()
    }

    /// Bytes of guest writes that are only in memory and journal; 0 without an overlay.
    pub fn memory_bytes(&self) -> u64 {
        self.overlay.as_ref().map_or(0, Overlay::memory_bytes)
    }

    /// Records what is read first from now on, going on from `earlier`. Recording ends by itself.
    pub fn record_trace(&self, earlier: Trace) {
        self.demand.record_from(earlier);
    }

    /// What has been recorded, if that is more than `known` bytes or recording has ended.
    pub fn recorded_trace(&self, known: u64) -> Option<Trace> {
        self.demand.recorded(known)
    }

    /// What readers of absent ranges had to wait for, and how long reads take while the disk is hydrated.
    pub fn demand_stats(&self) -> DemandStats {
        self.demand.stats()
    }

    /// How long reads of a source that fails with I/O errors are tried again before they fail with
    /// [`Error::SourceAway`]. Unless set 300 s, and zero without an overlay. Damage fails at once. Zero also
    /// lets go of all reads that wait now, for an orderly stop.
    pub fn set_patience(&self, patience: Duration) {
        self.patience.set(patience);
    }

    /// Reads that have been waiting for the source for half a second or more.
    pub fn parked(&self) -> Vec<Parked> {
        self.patience.parked()
    }

    /// After a failed sync: the ranges whose acknowledged-but-unflushed or half-written bytes are in
    /// doubt. Empty while all is well.
    pub fn doubtful(&self) -> Delta {
        self.overlay.as_ref().map(Overlay::doubt).unwrap_or_default()
    }

    fn read_chain(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.patience.with(offset, buf.len() as u64, || match self.chain() {
            // Asked for anew at each attempt: it may have been renewed meanwhile.
            Some(chain) => chain.read(offset, buf),
            None => self.read_detached(offset, buf),
        })
    }

    /// What was absent when it was looked at may be local by now, and the chain gone since.
    fn read_detached(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let overlay = self.overlay()?;
        if overlay.run(offset, buf.len() as u64).0 == Run::Absent {
            if self.is_awaited() {
                return Err(self.not_open(offset));
            }
            return Err(self.not_local(buf.len() as u64));
        }
        self.read_parts(overlay, offset, buf)
    }

    fn chain_now(&self, effort: Effort, offset: u64, buf: &mut [u8]) -> Result<bool> {
        self.chain.load().as_ref().map_or(Ok(false), |chain| chain.read_without_wait(effort, offset, buf))
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.size) {
            return Ok(());
        }
        Err(Error::OutOfRange { disk: self.name.clone(), offset, len, size: self.size })
    }

    /// The chain that is read below the overlay, unless it was let go.
    pub fn chain(&self) -> Option<Arc<Chain>> {
        self.chain.load_full()
    }

    /// Looks for what no file system on the restore point uses. `None` without a source, or where that is of no use: what
    /// was read of it is not known.
    ///
    /// # Errors
    /// A read that may succeed later.
    pub(crate) fn find_unused(&self) -> Result<Option<Unused>> {
        let Some(chain) = self.source()?.filter(|_| self.is_watched()) else { return Ok(None) };
        unused::find(self.size, &|at, buf| chain.read(at, buf)).map(Some)
    }

    /// Whether it is known where absent blocks were read.
    pub(crate) fn is_watched(&self) -> bool {
        self.touched.is_some()
    }

    /// Whether the block at `offset`, which is absent, has to be copied although nothing uses it: somebody read there.
    pub(crate) fn is_touched(&self, offset: u64) -> bool {
        self.touched.as_ref().is_none_or(|touched| touched.contains(offset))
    }

    /// Lets go of what is absent, unused and was never read: it reads as zeros from now on, durably, and counts as
    /// changed. Whoever reads there meanwhile waits.
    pub(crate) fn forget(&self, unused: &Delta) -> Result<u64> {
        let (Some(touched), overlay) = (&self.touched, self.overlay()?) else { return Ok(0) };
        let (mut at, mut forgotten) = (0, 0);
        while at < self.size {
            let end = at.saturating_add(FORGET_BYTES).min(self.size);
            let part = unused.clip(at..end);
            if !part.is_empty() {
                let done = touched.settle(|| -> Result<u64> {
                    let mut sum = 0;
                    for range in part.iter() {
                        sum += forget_untouched(overlay, touched, range)?;
                    }
                    overlay.flush_for_room()?;
                    Ok(sum)
                });
                forgotten += done.transpose()?.unwrap_or(0);
            }
            at = end;
        }
        Ok(forgotten)
    }

    /// The chain, as long as it is needed.
    ///
    /// # Errors
    /// An I/O error that may pass, while it is awaited.
    pub(crate) fn source(&self) -> Result<Option<Arc<Chain>>> {
        match self.chain() {
            None if self.is_awaited() => Err(self.not_open(0)),
            chain => Ok(chain),
        }
    }

    fn is_awaited(&self) -> bool {
        self.awaited.load(Ordering::Acquire)
    }

    fn not_open(&self, offset: u64) -> Error {
        let cause = std::io::Error::new(std::io::ErrorKind::NotConnected, "the source is not open yet");
        aquifer_formats::Error::io(&self.name, "read", offset, cause).into()
    }

    /// Whose turn it is to store what was hydrated.
    pub(crate) fn turn(&self) -> &Mutex<()> {
        &self.turn
    }

    /// What the guest waits for.
    pub(crate) fn demand(&self) -> Arc<Demand> {
        Arc::clone(&self.demand)
    }

    /// The first byte from `from` on that is absent.
    pub(crate) fn next_absent(&self, from: u64) -> Option<u64> {
        self.overlay.as_ref()?.next_absent(from)
    }

    pub(crate) fn overlay(&self) -> Result<&Overlay> {
        self.overlay.as_ref().ok_or_else(|| Error::ReadOnly { disk: self.name.clone() })
    }

    fn not_local(&self, absent: u64) -> Error {
        Error::NotLocal { disk: self.name.clone(), absent }
    }
}

/// Lets go of the parts of a range that nobody has read.
fn forget_untouched(overlay: &Overlay, touched: &Touched, range: Range<u64>) -> Result<u64> {
    let (mut at, mut sum) = (range.start, 0);
    while at < range.end {
        let end = (at - at % UNIT_BYTES + UNIT_BYTES).min(range.end);
        if !touched.contains(at) {
            sum += overlay.forget(at, end - at)?;
        }
        at = end;
    }
    Ok(sum)
}
