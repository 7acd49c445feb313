//! What an interrupted check has done: kept in the state folder until the check has reached its end.
//!
//! Invariants
//! - Only what is provably unchanged is not checked again; sources that prove nothing are checked anew.
//! - Damage that was found before is reported again.
//! - A memory that is lost or unreadable costs time, nothing else; a check never fails because of it.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder},
    io::Write as _,
    ops::Range,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::Lost;
use crate::{
    context::Context,
    fail::{At, Code, Fail, Result},
    source::files::FileState,
};

/// How often a check under way is written down.
const KEEP_EVERY: Duration = Duration::from_secs(5);

/// The memory of one command line.
#[derive(Debug)]
pub(super) struct Memory {
    path: PathBuf,
    known: Known,
}

/// As it is stored.
#[derive(Debug, Serialize, Deserialize)]
struct Known {
    began: Timestamp,
    disks: Vec<Done>,
}

/// How far a disk was checked.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Done {
    source: String,
    disk: String,
    files: Vec<FileState>,
    /// Steps done, from the first one without a gap.
    pub(super) steps: u64,
    /// Everything of the disk below this was checked, bytes.
    pub(super) below: u64,
    /// Bytes read for it.
    pub(super) bytes: u64,
    damage: Vec<Kept>,
}

/// Damage, as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Kept {
    code: String,
    what: String,
    path: String,
    offset: Option<u64>,
    cause: Option<String>,
    ranges: Vec<Range<u64>>,
}

impl Memory {
    /// What an earlier run of the same command has left; `target` says what is checked and how.
    pub(super) fn open(context: &Context, target: &str, afresh: bool) -> Result<Self> {
        let key = blake3::hash(target.as_bytes()).to_hex();
        let path = context.home()?.join("verify").join(format!("{}.json", &key[..32]));
        let read = || serde_json::from_slice(&fs::read(&path).ok()?).ok();
        let known = if afresh { None } else { read() };
        Ok(Self { path, known: known.unwrap_or_else(|| Known { began: Timestamp::now(), disks: Vec::new() }) })
    }

    /// When the check began that this one goes on with.
    pub(super) fn began(&self) -> Timestamp {
        self.known.began
    }

    /// What was done of a disk whose files look like this.
    pub(super) fn of(&self, source: &str, disk: &str, files: Option<&[FileState]>) -> Option<Done> {
        let same = |done: &&Done| done.source == source && done.disk == disk && Some(done.files.as_slice()) == files;
        self.known.disks.iter().find(same).cloned()
    }

    /// Takes down what is done of a disk, and writes it. Without `files` there is nothing to go by later.
    pub(super) fn keep(&mut self, source: &str, disk: &str, files: Option<&[FileState]>, done: &Done, found: &[Lost]) {
        let Some(files) = files else { return };
        self.known.disks.retain(|known| known.source != source || known.disk != disk);
        self.known.disks.push(Done {
            source: source.to_owned(),
            disk: disk.to_owned(),
            files: files.to_vec(),
            damage: found.iter().map(Kept::of).collect(),
            ..done.clone()
        });
        // The next run begins at the beginning where this cannot be written.
        let _ = self.write();
    }

    fn write(&self) -> std::io::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let temporary = self.path.with_extension(format!("{}.new", std::process::id()));
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(&serde_json::to_vec(&self.known)?)?;
        fs::rename(&temporary, &self.path)
    }

    /// The check has reached its end: the next one is a new one.
    pub(super) fn end(self) {
        // A memory that stays is of files as they were; at worst a check is done in less time than it should.
        let _ = fs::remove_file(&self.path);
    }
}

impl Done {
    /// What was found damaged.
    pub(super) fn damage(&self) -> Vec<Lost> {
        self.damage.iter().map(Kept::lost).collect()
    }
}

impl Kept {
    fn of(lost: &Lost) -> Self {
        let at = lost.fail.at.clone().unwrap_or_default();
        Self {
            code: lost.fail.code.name().to_owned(),
            what: lost.fail.what.clone(),
            path: at.path,
            offset: at.offset,
            cause: at.cause,
            ranges: lost.ranges.clone(),
        }
    }

    fn lost(&self) -> Lost {
        let code = Code::find(&self.code).unwrap_or(Code::Corrupt);
        let at = At { path: self.path.clone(), offset: self.offset, cause: self.cause.clone() };
        Lost { fail: Fail { at: Some(at), ..Fail::new(code, self.what.clone()) }, ranges: self.ranges.clone() }
    }
}

/// Steps that several threads do, and up to where there is no gap.
#[derive(Debug)]
pub(super) struct Front {
    state: Mutex<FrontState>,
}

#[derive(Debug)]
struct FrontState {
    done: Done,
    /// Steps done ahead of one that is not: their ends on the disk and bytes read.
    ahead: BTreeMap<u64, (u64, u64)>,
    kept: Instant,
}

impl Front {
    /// Goes on from what is done.
    pub(super) fn from(done: Done) -> Self {
        Self { state: Mutex::new(FrontState { done, ahead: BTreeMap::new(), kept: Instant::now() }) }
    }

    /// A step is done: everything before `end` that belongs to it is checked, for which `bytes` were read.
    pub(super) fn done(&self, step: u64, end: u64, bytes: u64) {
        let state = &mut *self.state.lock();
        state.ahead.insert(step, (end, bytes));
        while let Some((end, bytes)) = state.ahead.remove(&state.done.steps) {
            state.done.steps += 1;
            state.done.below = state.done.below.max(end);
            state.done.bytes += bytes;
        }
    }

    /// What is done without a gap.
    pub(super) fn now(&self) -> Done {
        self.state.lock().done.clone()
    }

    /// Whether it is time to write it down.
    pub(super) fn is_due(&self) -> bool {
        let state = &mut *self.state.lock();
        let due = state.kept.elapsed() >= KEEP_EVERY;
        if due {
            state.kept = Instant::now();
        }
        due
    }
}

/// What was found below an offset: the rest will be found again.
pub(super) fn below(found: &[Lost], offset: u64) -> Vec<Lost> {
    let cut = |lost: &Lost| {
        let ranges = lost.ranges.iter().filter(|r| r.start < offset).map(|r| r.start..r.end.min(offset));
        let ranges: Vec<Range<u64>> = ranges.collect();
        (!ranges.is_empty()).then(|| Lost { fail: lost.fail.clone(), ranges })
    };
    found.iter().filter_map(cut).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_done_ahead_count_when_the_gap_closes() {
        let front = Front::from(Done { steps: 3, below: 300, bytes: 30, ..Done::default() });
        front.done(5, 600, 10);
        front.done(4, 500, 10);
        assert_eq!((front.now().steps, front.now().below, front.now().bytes), (3, 300, 30));
        front.done(3, 400, 10);
        assert_eq!((front.now().steps, front.now().below, front.now().bytes), (6, 600, 60));
    }

    #[test]
    fn damage_above_the_front_is_left_to_be_found_again() {
        let lost = |ranges| Lost { fail: Fail::new(Code::Corrupt, "x"), ranges };
        let kept = below(&[lost(vec![0..10, 90..110, 200..210]), lost(vec![100..120, 130..140])], 100);
        assert_eq!(kept.len(), 1);
        assert_eq!(kept[0].ranges, [0..10, 90..100]);
    }
}
