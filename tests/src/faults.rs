//! Files of a computer that can lose power, run full and fail: a [`Storage`] under real code.
//!
//! Invariants
//! - What was written and not synced before a crash survives or not, each write on its own, and torn at
//!   512 bytes; what a sync covered survives.
//! - After a sync of a file has failed, nothing written to it before is ever covered by a later sync.
//! - Every call that could fail counts, so "fail the n-th call" means the same in each run.
//!
//! Not here: folders and names.

use std::{
    backtrace::Backtrace,
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, MutexGuard},
};

use aquifer_formats::Storage;

pub use crate::image::Image;
use crate::{
    image::{PAGE, Written},
    rng::Rng,
};

const SECTOR: usize = 512;

/// Something a file was told.
#[derive(Clone, Debug)]
pub enum Told {
    /// Bytes were written.
    Write {
        /// Which file.
        file: usize,
        /// What, and where.
        bytes: Written,
    },
    /// A range was zeroed.
    Punch {
        /// Which file.
        file: usize,
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// A file was synced, or the sync failed.
    Sync {
        /// Which file.
        file: usize,
        /// Whether it said so.
        ok: bool,
    },
}

impl Told {
    fn file(&self) -> usize {
        match self {
            Self::Write { file, .. } | Self::Punch { file, .. } | Self::Sync { file, .. } => *file,
        }
    }

    fn apply(&self, image: &mut Image) {
        match self {
            Self::Write { bytes, .. } => image.put(bytes),
            Self::Punch { offset, len, .. } => image.punch(*offset, *len),
            Self::Sync { .. } => {}
        }
    }

    /// Applies only the sectors (of 512 bytes) that `keep` says.
    fn apply_torn(&self, image: &mut Image, keep: &mut dyn FnMut() -> bool) {
        match self {
            Self::Write { bytes, .. } => {
                for (start, piece) in bytes.pieces() {
                    for (at, end) in sectors(start, piece.len() as u64) {
                        if keep() {
                            image.write(at, &piece[(at - start) as usize..(end - start) as usize]);
                        }
                    }
                }
            }
            Self::Punch { offset, len, .. } => {
                sectors(*offset, *len).filter(|_| keep()).for_each(|(at, end)| image.punch(at, end - at));
            }
            Self::Sync { .. } => {}
        }
    }
}

/// A range cut at multiples of 512, as starts and ends.
fn sectors(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let (mut at, end) = (offset, offset + len);
    std::iter::from_fn(move || {
        let start = at;
        at = (at - at % SECTOR as u64 + SECTOR as u64).min(end);
        (start < end).then_some((start, at))
    })
}

/// How the n-th call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failing {
    /// `EIO`, nothing done.
    Io,
    /// `ENOSPC`, nothing done; a sync fails with `EIO`.
    NoSpace,
    /// `EINTR`, nothing done: a storage tries again by itself, so what still reaches its user is a failure.
    Interrupted,
    /// Half of a write is done, in whole sectors, then `ENOSPC`.
    Short,
}

#[derive(Debug, Default)]
struct State {
    files: Vec<Image>,
    told: Vec<Told>,
    calls: u64,
    fail_at: Option<(u64, Failing)>,
    /// Fail every call from `fail_at` on, for as long as it is set.
    for_good: bool,
    /// Nobody will ask what was told.
    forgets: bool,
    /// Who asked for a sync that was made to fail, as `file.rs:line`, callers included; only if asked for.
    sites: Option<BTreeSet<String>>,
}

/// A set of files that live and die together.
#[derive(Clone, Debug, Default)]
pub struct World(Arc<Mutex<State>>);

impl World {
    /// A world of these files, all of it durable.
    pub fn new(files: Vec<Image>) -> Self {
        Self(Arc::new(Mutex::new(State { files, ..State::default() })))
    }

    /// The same, for somebody who only wants to see what is read: what is told is not kept.
    pub fn forgetful(files: Vec<Image>) -> Self {
        Self(Arc::new(Mutex::new(State { files, forgets: true, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// The file with this number.
    pub fn file(&self, file: usize, label: &str) -> Arc<dyn Storage> {
        Arc::new(FaultStorage { world: self.clone(), file, label: label.to_owned() })
    }

    /// How much has been told so far.
    pub fn told_len(&self) -> usize {
        self.state().told.len()
    }

    /// Everything that was told.
    pub fn told(&self) -> Vec<Told> {
        self.state().told.clone()
    }

    /// What readers see now: everything written, durable or not.
    pub fn now(&self) -> Vec<Image> {
        self.state().files.clone()
    }

    /// Calls that could have failed so far.
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// Makes the n-th call from the start (the first is 1) fail.
    pub fn fail_at(&self, call: u64, failing: Failing) {
        let mut state = self.state();
        state.fail_at = Some((call, failing));
        state.for_good = false;
    }

    /// Notes from now on who asks for a sync that is made to fail.
    pub fn note_sites(&self) {
        self.state().sites = Some(BTreeSet::new());
    }

    /// Lines of the source, as `file.rs:line`, that such a sync went through.
    pub fn sites(&self) -> BTreeSet<String> {
        self.state().sites.clone().unwrap_or_default()
    }

    /// Makes every call fail from now on.
    pub fn fail_from_now(&self, failing: Failing) {
        let mut state = self.state();
        state.fail_at = Some((state.calls + 1, failing));
        state.for_good = true;
    }

    /// Ends all failing.
    pub fn heal(&self) {
        let mut state = self.state();
        (state.fail_at, state.for_good) = (None, false);
    }
}

impl State {
    fn call(&mut self) -> Option<Failing> {
        self.calls += 1;
        let (at, failing) = self.fail_at?;
        (self.calls == at || self.for_good && self.calls > at).then_some(failing)
    }

    fn tell(&mut self, told: Told) {
        if !self.forgets {
            self.told.push(told);
        }
    }
}

/// One file of a [`World`].
#[derive(Debug)]
struct FaultStorage {
    world: World,
    file: usize,
    label: String,
}

/// The places in a backtrace, as `file.rs:line`.
fn places(trace: &str) -> impl Iterator<Item = String> {
    trace.lines().filter_map(|line| {
        let mut parts = line.trim().strip_prefix("at ")?.rsplit('/').next()?.split(':');
        Some(format!("{}:{}", parts.next()?, parts.next()?))
    })
}

fn error(failing: Failing) -> io::Error {
    match failing {
        Failing::Io => io::Error::from_raw_os_error(libc::EIO),
        Failing::Interrupted => io::Error::from_raw_os_error(libc::EINTR),
        Failing::NoSpace | Failing::Short => io::Error::from_raw_os_error(libc::ENOSPC),
    }
}

impl Storage for FaultStorage {
    fn label(&self) -> &str {
        &self.label
    }

    fn identity(&self) -> Option<u64> {
        None
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.world.state().files[self.file].len())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut state = self.world.state();
        if state.call().is_some() {
            return Err(error(Failing::Io));
        }
        let image = &state.files[self.file];
        if offset + buf.len() as u64 > image.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        image.read(offset, buf);
        Ok(())
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, buf).map(|()| true)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut state = self.world.state();
        let failing = state.call();
        let done = match failing {
            None => buf,
            Some(Failing::Short) => &buf[..buf.len() / 2 / SECTOR * SECTOR],
            Some(_) => &[],
        };
        if !done.is_empty() {
            let bytes = Written::new(offset, done);
            state.files[self.file].put(&bytes);
            state.tell(Told::Write { file: self.file, bytes });
        }
        failing.map_or(Ok(()), |f| Err(error(f)))
    }

    fn allocated(&self, offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
        let state = self.world.state();
        let image = &state.files[self.file];
        let (stored, end) = (image.is_stored(offset), offset + len_max);
        let mut next = offset - offset % PAGE as u64 + PAGE as u64;
        while next < end && image.is_stored(next) == stored {
            next += PAGE as u64;
        }
        Ok((stored, next.min(end) - offset))
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.world.state();
        if let Some(failing) = state.call() {
            return Err(error(failing));
        }
        state.files[self.file].punch(offset, len);
        state.tell(Told::Punch { file: self.file, offset, len });
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.world.state();
        let image = &mut state.files[self.file];
        // Only files that begin are given a length, before anything can be lost.
        assert!(len >= image.len(), "{} was shortened from {} to {len}", self.label, image.len());
        image.extend(len);
        Ok(())
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.world.state();
        if let Some(failing) = state.call() {
            return Err(error(failing));
        }
        let image = &mut state.files[self.file];
        image.extend(offset + len);
        Ok(())
    }

    fn start_writeback(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn forget_cached(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.world.state();
        let failing = state.call();
        state.tell(Told::Sync { file: self.file, ok: failing.is_none() });
        if let (Some(_), Some(sites)) = (failing, &mut state.sites) {
            sites.extend(places(&Backtrace::force_capture().to_string()));
        }
        failing.map_or(Ok(()), |_| Err(error(Failing::Io)))
    }
}

/// The state of all files at one point of a history: what is durable, and what may or may not be.
#[derive(Clone, Debug)]
pub struct CrashPoint {
    durable: Vec<Image>,
    unsynced: Vec<Told>,
    /// Writes that a failed sync has let go of: no sync covers them any more.
    lost: Vec<Told>,
}

impl CrashPoint {
    /// The start of a history.
    pub fn new(durable: Vec<Image>) -> Self {
        Self { durable, unsynced: Vec::new(), lost: Vec::new() }
    }

    /// Moves past one thing that was told.
    pub fn pass(&mut self, told: &Told) {
        let Told::Sync { file, ok } = told else { return self.unsynced.push(told.clone()) };
        let (of_file, rest): (Vec<_>, Vec<_>) = self.unsynced.drain(..).partition(|t| t.file() == *file);
        self.unsynced = rest;
        if *ok {
            for told in of_file {
                told.apply(&mut self.durable[*file]);
            }
        } else {
            self.lost.extend(of_file);
        }
    }

    /// How many writes may or may not survive.
    pub fn open(&self) -> usize {
        self.unsynced.len() + self.lost.len()
    }

    /// The files after a crash in which the open writes that `mask` has a bit for survive, in order; of
    /// those that `torn` has a bit for only some sectors.
    pub fn crash(&self, mask: u64, torn: u64, dice: &mut Rng) -> Vec<Image> {
        let mut files = self.durable.clone();
        for (index, told) in self.lost.iter().chain(&self.unsynced).enumerate() {
            let bit = 1u64 << (index % 64);
            if torn & bit != 0 {
                // Half of the tears are a cut, half are any sectors.
                let (mut left, mixed) = (dice.below(8), dice.once_in(2));
                told.apply_torn(&mut files[told.file()], &mut || {
                    if mixed {
                        dice.once_in(2)
                    } else {
                        left = left.saturating_sub(1);
                        left > 0
                    }
                });
            } else if mask & bit != 0 {
                told.apply(&mut files[told.file()]);
            }
        }
        files
    }
}
