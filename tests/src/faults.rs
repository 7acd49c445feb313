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
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
};

use aquifer_formats::Storage;

use crate::rng::Rng;

const SECTOR: usize = 512;
const PAGE: usize = 4096;

/// A page of a file, and a digest of it once somebody has asked for one.
#[derive(Clone, Debug)]
struct Sheet {
    bytes: [u8; PAGE],
    digest: OnceLock<u64>,
}

impl Sheet {
    fn digest(&self) -> u64 {
        let fold = |sum: u64, word: &[u8]| {
            let word = u64::from_le_bytes(word.try_into().unwrap());
            (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
        };
        *self.digest.get_or_init(|| self.bytes.chunks_exact(8).fold(1, fold))
    }
}

/// Contents of a file; cheap to copy, holes take nothing.
#[derive(Clone, Debug, Default)]
pub struct Image {
    len: u64,
    pages: BTreeMap<u64, Arc<Sheet>>,
}

impl Image {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True for a file of no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `buf` from `offset`; holes and what lies past the end are zeros.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let skip = at as usize % PAGE;
            let n = (PAGE - skip).min(rest.len());
            let (part, tail) = rest.split_at_mut(n);
            match self.pages.get(&(at / PAGE as u64)) {
                Some(page) => part.copy_from_slice(&page.bytes[skip..skip + n]),
                None => part.fill(0),
            }
            at += n as u64;
            rest = tail;
        }
    }

    /// Writes `bytes`, growing where needed.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.len = self.len.max(offset + bytes.len() as u64);
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let skip = at as usize % PAGE;
            let n = (PAGE - skip).min(rest.len());
            let blank = || Arc::new(Sheet { bytes: [0; PAGE], digest: OnceLock::new() });
            let page = Arc::make_mut(self.pages.entry(at / PAGE as u64).or_insert_with(blank));
            page.bytes[skip..skip + n].copy_from_slice(&rest[..n]);
            page.digest = OnceLock::new();
            at += n as u64;
            rest = &rest[n..];
        }
    }

    /// Cuts the end off, as only damage does.
    pub fn cut(&mut self, len: u64) {
        self.punch(len, self.len.saturating_sub(len));
        self.len = self.len.min(len);
    }

    /// Equal for equal images (of 2^64 numbers); pages never changed are not looked at twice. A hole and a page of
    /// zeros differ, as they do to whoever asks what is allocated.
    pub fn digest(&self) -> u64 {
        let mix = |sum: u64, number: u64| (sum ^ number).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(31);
        self.pages.iter().fold(self.len, |sum, (at, page)| mix(mix(sum, *at), page.digest()))
    }

    /// Zeros a range, as far as the file goes.
    pub fn punch(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        let mut at = offset;
        while at < end {
            let next = (at - at % PAGE as u64 + PAGE as u64).min(end);
            if next - at == PAGE as u64 {
                self.pages.remove(&(at / PAGE as u64));
            } else if self.pages.contains_key(&(at / PAGE as u64)) {
                self.write(at, &vec![0; (next - at) as usize]);
            }
            at = next;
        }
    }
}

/// Something a file was told.
#[derive(Clone, Debug)]
pub enum Told {
    /// Bytes were written.
    Write {
        /// Which file.
        file: usize,
        /// Where.
        offset: u64,
        /// What.
        bytes: Arc<[u8]>,
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
            Self::Write { offset, bytes, .. } => image.write(*offset, bytes),
            Self::Punch { offset, len, .. } => image.punch(*offset, *len),
            Self::Sync { .. } => {}
        }
    }

    /// Applies only the sectors (of 512 bytes) that `keep` says.
    fn apply_torn(&self, image: &mut Image, keep: &mut dyn FnMut() -> bool) {
        let (offset, len) = match self {
            Self::Write { offset, bytes, .. } => (*offset, bytes.len() as u64),
            Self::Punch { offset, len, .. } => (*offset, *len),
            Self::Sync { .. } => return,
        };
        let mut at = offset;
        while at < offset + len {
            let next = (at - at % SECTOR as u64 + SECTOR as u64).min(offset + len);
            if keep() {
                match self {
                    Self::Write { bytes, .. } => {
                        image.write(at, &bytes[(at - offset) as usize..(next - offset) as usize]);
                    }
                    _ => image.punch(at, next - at),
                }
            }
            at = next;
        }
    }
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
        Ok(self.world.state().files[self.file].len)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut state = self.world.state();
        if state.call().is_some() {
            return Err(error(Failing::Io));
        }
        let image = &state.files[self.file];
        if offset + buf.len() as u64 > image.len {
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
            state.files[self.file].write(offset, done);
            state.told.push(Told::Write { file: self.file, offset, bytes: done.into() });
        }
        failing.map_or(Ok(()), |f| Err(error(f)))
    }

    fn allocated(&self, offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
        let state = self.world.state();
        let pages = &state.files[self.file].pages;
        let (page, end) = (offset / PAGE as u64, offset + len_max);
        let stored = pages.contains_key(&page);
        let mut next = page + 1;
        while next * (PAGE as u64) < end && pages.contains_key(&next) == stored {
            next += 1;
        }
        Ok((stored, (next * PAGE as u64).min(end) - offset))
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.world.state();
        if let Some(failing) = state.call() {
            return Err(error(failing));
        }
        state.files[self.file].punch(offset, len);
        state.told.push(Told::Punch { file: self.file, offset, len });
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.world.state();
        let image = &mut state.files[self.file];
        // Only files that begin are given a length, before anything can be lost.
        assert!(len >= image.len, "{} was shortened from {} to {len}", self.label, image.len);
        image.len = len;
        Ok(())
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.world.state();
        if let Some(failing) = state.call() {
            return Err(error(failing));
        }
        let image = &mut state.files[self.file];
        image.len = image.len.max(offset + len);
        Ok(())
    }

    fn start_writeback(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.world.state();
        let failing = state.call();
        state.told.push(Told::Sync { file: self.file, ok: failing.is_none() });
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
