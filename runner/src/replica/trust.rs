//! Whether what lies in a replica's folder is what was settled there.
//!
//! ```text
//! <replica>/layers.json   each layer as it was when it was settled, whose it is, and a copy of the catalogue's record
//! ```
//!
//! Invariants
//! - A layer is in the ledger before it has its name: a file that the ledger does not know is not ours, whatever its name
//!   says. It is set aside, never taken and never removed.
//! - Where layers are merged, the ledger knows the file that has the name and the one that gets it, which say the same.
//! - A settled layer that looks otherwise than it was settled (length, time of the last write, inode) is proven by digests
//!   before anything is built on it, or not built on.
//! - Once seen, a change stays known for every restore point that was there before it, until a digest clears the point.
//! - What was proven by digests is not read again for as long as its layers look as they did then: the ledger keeps, for
//!   each restore point, what its layers looked like when they were proven.
//! - A ledger that is lost costs reading the replica's own layers, never a wrong decision: a layer that the catalogue names
//!   as one a machine writes to is entered again, not set aside.
//!
//! Not here: what an operation does about a change; the stamp ([`super::desk`]).

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    desk::Desk,
    digests::{Digests, put_file, sync_folder},
    keep,
    layers::{self, beside},
    model::{PointRecord, ReplicaRecord, Top},
};
use crate::fail::{Code, Fail, Result};

/// Name of the ledger.
pub(super) const LEDGER: &str = "layers.json";

/// Version of the ledger this build writes.
const VERSION: u32 = 1;

/// What is seen of a file without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// Length, bytes.
    len: u64,
    /// Time of the last write, nanoseconds since 1970.
    modified: i64,
    /// Inode: another file under the same name has another one.
    inode: u64,
}

impl Seal {
    /// Of the file under a name; none where there is none.
    ///
    /// # Errors
    /// I/O.
    pub fn of(path: &Path) -> Result<Option<Self>> {
        match fs::metadata(path) {
            Ok(meta) => Ok(Some(Self::seen(&meta))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Fail::io(path.display(), "look at", &error)),
        }
    }

    /// Of a file that is open.
    ///
    /// # Errors
    /// I/O.
    pub fn of_open(file: &fs::File, path: &Path) -> Result<Self> {
        Ok(Self::seen(&file.metadata().map_err(|e| Fail::io(path.display(), "look at", &e))?))
    }

    fn seen(meta: &fs::Metadata) -> Self {
        let modified = meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec());
        Self { len: meta.len(), modified, inode: meta.ino() }
    }
}

/// What a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Holds {
    /// Part of this restore point: never written to again.
    Point(Uuid),
    /// What a machine wrote until it got the next layer: never written to again.
    Frozen,
    /// What a machine writes.
    Writes,
}

/// A layer of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    seal: Seal,
    /// What the file with the same content looked like that this one takes the name of: it may still have it, where
    /// whoever gave the name was killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    was: Option<Seal>,
    holds: Holds,
    /// It was changed from outside: restore points before this number may not hold what they held.
    #[serde(default)]
    doubtful_before: u64,
}

impl Entry {
    fn new(seal: Seal, holds: Holds, doubtful_before: u64) -> Self {
        Self { seal, was: None, holds, doubtful_before }
    }

    /// Whether a file that looks like this is the one that was entered.
    fn is(&self, seen: Option<Seal>) -> bool {
        seen.is_some_and(|seen| seen == self.seal || Some(seen) == self.was)
    }
}

/// What was settled in a folder.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Ledger {
    version: u32,
    lineage: Uuid,
    layers: BTreeMap<String, Entry>,
    /// Restore points that were proven by their digests, with the looks of all their layers before they were read.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    proven: BTreeMap<Uuid, String>,
    /// The catalogue's record and points, as the last operation left them.
    #[serde(default)]
    copy: Option<Copy>,
}

/// What the catalogue knew, for one that has lost it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Copy {
    /// The replica.
    pub record: ReplicaRecord,
    /// Its restore points.
    pub points: Vec<PointRecord>,
}

impl Ledger {
    /// That of a folder; one that is lost, garbled or another chain's knows nothing.
    fn read(folder: &Path, lineage: Uuid) -> Result<Self> {
        let empty = Self { version: VERSION, lineage, ..Self::default() };
        let found = Self::any(folder)?.filter(|ledger| ledger.version == VERSION && ledger.lineage == lineage);
        Ok(found.unwrap_or(empty))
    }

    fn any(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(LEDGER);
        match fs::read(&path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Fail::io(path.display(), "read", &error)),
        }
    }

    fn write(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
        put_file(&folder.join(LEDGER), &text)
    }
}

fn change(record: &ReplicaRecord, how: impl FnOnce(&mut Ledger)) -> Result<()> {
    let mut ledger = Ledger::read(&record.folder, record.lineage)?;
    how(&mut ledger);
    ledger.write(&record.folder)
}

/// Enters a layer as `file`, which `written` is about to become, or is.
///
/// # Errors
/// I/O; [`Code::NotFound`] where there is no such file.
pub fn enter(record: &ReplicaRecord, file: &str, written: &Path, holds: Holds) -> Result<()> {
    let gone = || Fail::new(Code::NotFound, "a layer is gone").at(written.display());
    let seal = Seal::of(written)?.ok_or_else(gone)?;
    change(record, |ledger| {
        ledger.layers.insert(file.to_owned(), Entry::new(seal, holds, 0));
    })
}

/// Enters what is about to take the name of a settled layer and says the same as that one with all below it, of which
/// `clear_from` said so much. Until it has the name, the one that has it is as good.
///
/// # Errors
/// I/O; [`Code::NotFound`] where there is no such file; [`Code::State`] where the one that has the name was changed.
pub fn replace(record: &ReplicaRecord, file: &str, written: &Path, (holds, clear): (Holds, u64)) -> Result<()> {
    let gone = || Fail::new(Code::NotFound, "a layer is gone").at(written.display());
    let (seal, was) = (Seal::of(written)?.ok_or_else(gone)?, Seal::of(&record.folder.join(file))?);
    let mut ledger = Ledger::read(&record.folder, record.lineage)?;
    if !ledger.layers.get(file).is_some_and(|entry| entry.is(was)) {
        return Err(Fail::new(Code::State, format!("the layer {file} was changed while it was merged")));
    }
    ledger.layers.insert(file.to_owned(), Entry { was, ..Entry::new(seal, holds, clear) });
    ledger.write(&record.folder)
}

/// Enters a layer that nobody writes to from now on. One that was settled for a restore point stays it: where it looks
/// otherwise by now, everything that was there before is doubtful.
///
/// # Errors
/// As [`enter`].
pub fn freeze(record: &ReplicaRecord, file: &str) -> Result<()> {
    let path = record.folder.join(file);
    let gone = || Fail::new(Code::NotFound, "a layer is gone").at(path.display());
    let seal = Seal::of(&path)?.ok_or_else(gone)?;
    change(record, |ledger| {
        let entry = match ledger.layers.get(file) {
            Some(entry @ Entry { holds: Holds::Point(_), .. }) if entry.is(Some(seal)) => *entry,
            Some(entry @ Entry { holds: Holds::Point(_), .. }) => {
                Entry::new(seal, Holds::Frozen, entry.doubtful_before.max(record.next_layer))
            }
            Some(entry) => Entry::new(seal, Holds::Frozen, entry.doubtful_before),
            None => Entry::new(seal, Holds::Frozen, 0),
        };
        ledger.layers.insert(file.to_owned(), entry);
    })
}

/// Enters a layer again of which the ledger has lost all knowledge, where the catalogue says that a machine of ours writes
/// to it and it stands on `below`. Answers whether that is so.
///
/// # Errors
/// A file that is no layer; I/O.
pub fn take_as_live(record: &ReplicaRecord, file: &str, below: &Path) -> Result<bool> {
    let path = record.folder.join(file);
    let named = record.failover.as_ref().is_some_and(|failover| failover.tops.iter().any(|top| top.file == file));
    let known = Ledger::read(&record.folder, record.lineage)?.layers.contains_key(file);
    if known || !named || Seal::of(&path)?.is_none() {
        return Ok(false);
    }
    if layers::files(&path)?.get(1).map(PathBuf::as_path) != Some(below) {
        return Ok(false);
    }
    enter(record, file, &path, Holds::Writes)?;
    Ok(true)
}

/// Whether the file under a layer's name is the one that was settled for a restore point.
///
/// # Errors
/// I/O.
pub fn is_settled(record: &ReplicaRecord, file: &str, point: Uuid) -> Result<bool> {
    let entry = Ledger::read(&record.folder, record.lineage)?.layers.get(file).copied();
    let seal = Seal::of(&record.folder.join(file))?;
    Ok(entry.is_some_and(|entry| entry.holds == Holds::Point(point) && entry.is(seal)))
}

/// Whether the file under a layer's name is one that a machine of ours writes to.
///
/// # Errors
/// I/O.
pub fn is_live(record: &ReplicaRecord, file: &str) -> Result<bool> {
    let entry = Ledger::read(&record.folder, record.lineage)?.layers.get(file).copied();
    let seal = Seal::of(&record.folder.join(file))?;
    let same = |entry: Entry| entry.holds == Holds::Writes && seal.is_some_and(|s| s.inode == entry.seal.inode);
    Ok(entry.is_some_and(same))
}

/// Whether a layer that nobody writes to any more is as it was left.
///
/// # Errors
/// I/O.
pub fn is_frozen(record: &ReplicaRecord, file: &str) -> Result<bool> {
    let entry = Ledger::read(&record.folder, record.lineage)?.layers.get(file).copied();
    let seal = Seal::of(&record.folder.join(file))?;
    Ok(entry.is_some_and(|entry| entry.holds != Holds::Writes && entry.is(seal)))
}

/// Gives a layer's name free where somebody else's file has it: that is kept beside it.
///
/// # Errors
/// I/O.
pub fn set_aside(desk: &Desk<'_>, record: &ReplicaRecord, file: &str) -> Result<()> {
    let path = record.folder.join(file);
    if fs::symlink_metadata(&path).is_err() {
        return Ok(());
    }
    let id = Uuid::new_v4().simple().to_string();
    let aside = beside(&path, &format!("stray-{}", id.get(..8).unwrap_or_default()));
    fs::rename(&path, &aside).map_err(|e| Fail::io(path.display(), "set aside", &e))?;
    sync_folder(path.parent().unwrap_or(Path::new("/")))?;
    let what = format!("{} has the name of a layer and is not one of ours: it is now {}", file, aside.display());
    (desk.warn)(Code::WarnSkipped, what);
    Ok(())
}

/// A layer that does not look as it was settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Touched {
    /// Its file, relative to the replica's folder.
    pub file: String,
    /// As it looks now.
    seal: Option<Seal>,
}

/// The layers of a restore point that do not look as they were settled, or were seen to have been changed. Reads no data.
///
/// # Errors
/// A layer that is missing or cannot be read.
pub fn look(record: &ReplicaRecord, point: &PointRecord) -> Result<Vec<Touched>> {
    look_at(record, &point.disks, point.number)
}

/// As [`look`], without what was read since and found to hold what it held. Reads no data.
///
/// # Errors
/// As [`look`].
pub fn doubtful(record: &ReplicaRecord, point: &PointRecord) -> Result<Vec<Touched>> {
    let touched = look(record, point)?;
    let proven = || -> Result<bool> {
        let known = Ledger::read(&record.folder, record.lineage)?.proven.remove(&point.id);
        Ok(known.is_some() && known == Some(looks(record, point)?))
    };
    if touched.is_empty() || proven()? { Ok(Vec::new()) } else { Ok(touched) }
}

pub(super) fn look_at(record: &ReplicaRecord, tops: &[Top], number: u64) -> Result<Vec<Touched>> {
    let ledger = Ledger::read(&record.folder, record.lineage)?;
    let mut touched = Vec::new();
    for path in chain(record, tops)? {
        let file = relative(record, &path);
        let seal = Seal::of(&path)?;
        let good = ledger
            .layers
            .get(&file)
            .is_some_and(|entry| entry.holds != Holds::Writes && entry.is(seal) && number >= entry.doubtful_before);
        if !good {
            touched.push(Touched { file, seal });
        }
    }
    Ok(touched)
}

/// Every file that these layers stand on, with themselves.
fn chain(record: &ReplicaRecord, tops: &[Top]) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for top in tops {
        for file in layers::files(&record.folder.join(&top.file))? {
            if !all.contains(&file) {
                all.push(file);
            }
        }
    }
    Ok(all)
}

fn relative(record: &ReplicaRecord, path: &Path) -> String {
    path.strip_prefix(&record.folder).unwrap_or(path).to_string_lossy().into_owned()
}

/// What a disk's layers look like now, in a word: a copy that was begun on them is not gone on with on others.
///
/// # Errors
/// A layer that is missing or cannot be read.
pub fn print(record: &ReplicaRecord, top: &Top) -> Result<String> {
    let mut hash = blake3::Hasher::new();
    for path in chain(record, std::slice::from_ref(top))? {
        hash.update(format!("{} {:?}\n", relative(record, &path), Seal::of(&path)?).as_bytes());
    }
    let hex = hash.finalize().to_hex();
    Ok(hex.as_str().get(..16).unwrap_or_default().to_owned())
}

/// What reading a restore point said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    /// Nothing of it was touched since it was settled, or proven: nothing was read.
    Untouched,
    /// It was touched, and holds what it held.
    Same,
    /// It was touched, and nothing is left that says what it held.
    Unknown(Vec<Touched>),
    /// This disk of it holds something else.
    Differs(String),
}

/// What all layers of a restore point look like. With the time of the last change of the file itself, which nobody sets:
/// a proof that is not believed costs reading, one that is believed wrongly the content.
fn looks(record: &ReplicaRecord, point: &PointRecord) -> Result<String> {
    let mut hash = blake3::Hasher::new();
    for path in chain(record, &point.disks)? {
        let meta = fs::metadata(&path).map_err(|e| Fail::io(path.display(), "look at", &e))?;
        let (seal, changed) = (Seal::seen(&meta), (meta.ctime(), meta.ctime_nsec()));
        hash.update(format!("{} {seal:?} {changed:?}\n", relative(record, &path)).as_bytes());
    }
    Ok(hash.finalize().to_hex().to_string())
}

/// Proves a restore point: by what its layers look like, where that is not enough by its digests. What they prove is
/// remembered.
///
/// # Errors
/// A layer that cannot be read.
pub fn prove(desk: &Desk<'_>, record: &ReplicaRecord, point: &PointRecord) -> Result<Proof> {
    let touched = look(record, point)?;
    if touched.is_empty() {
        return Ok(Proof::Untouched);
    }
    // What is written while it is read makes it look otherwise afterwards.
    let looks = looks(record, point)?;
    if Ledger::read(&record.folder, record.lineage)?.proven.get(&point.id) == Some(&looks) {
        return Ok(Proof::Untouched);
    }
    for top in &point.disks {
        let disk = layers::disk(&record.folder.join(&top.file), desk.cache)?;
        let Some(known) = Digests::load(&keep::digest_file(record, point, &top.disk), disk.size())? else {
            return Ok(Proof::Unknown(touched));
        };
        if Digests::of(&disk, known.block(), desk.pace)? != known {
            return Ok(Proof::Differs(top.disk.clone()));
        }
    }
    // It took its time: who has lost the work leaves the ledger alone.
    desk.catalogue.still_ours(desk.fence)?;
    // What stands on the newest point shows no more of these layers than it does; another point's may.
    if desk.points(&record.name)?.last().is_some_and(|newest| newest.id == point.id) {
        accept(record, &touched, point.number)?;
    }
    change(record, |ledger| {
        ledger.proven.insert(point.id, looks);
    })?;
    Ok(Proof::Same)
}

/// Takes layers as they look now for the restore points from `number` on; those before stay doubtful.
///
/// # Errors
/// I/O.
pub fn accept(record: &ReplicaRecord, touched: &[Touched], number: u64) -> Result<()> {
    if touched.is_empty() {
        return Ok(());
    }
    change(record, |ledger| {
        for Touched { file, seal } in touched {
            let Some(seal) = *seal else { continue };
            let before = ledger.layers.get(file);
            let holds = before.map_or(Holds::Frozen, |entry| entry.holds);
            let doubtful_before = before.map_or(0, |entry| entry.doubtful_before).max(number);
            ledger.layers.insert(file.clone(), Entry::new(seal, holds, doubtful_before));
        }
    })
}

/// From which restore point on the layers below `top` are as they were settled; none where they do not look like it.
pub(super) fn clear_from(record: &ReplicaRecord, top: &Top) -> Result<Option<(Holds, u64)>> {
    let ledger = Ledger::read(&record.folder, record.lineage)?;
    let mut clear = 0;
    for path in chain(record, std::slice::from_ref(top))? {
        let Some(entry) = ledger.layers.get(&relative(record, &path)) else { return Ok(None) };
        if !entry.is(Seal::of(&path)?) || entry.holds == Holds::Writes {
            return Ok(None);
        }
        clear = clear.max(entry.doubtful_before);
    }
    Ok(ledger.layers.get(&top.file).map(|entry| (entry.holds, clear)))
}

/// The files that were entered as layers.
pub fn known(record: &ReplicaRecord) -> Result<Vec<PathBuf>> {
    let ledger = Ledger::read(&record.folder, record.lineage)?;
    Ok(ledger.layers.keys().map(|file| record.folder.join(file)).collect())
}

/// Forgets layers whose files are gone, and keeps a copy of what the catalogue knows now.
///
/// # Errors
/// I/O; the catalogue's.
pub fn remember(desk: &Desk<'_>, record: &ReplicaRecord) -> Result<()> {
    let points = desk.points(&record.name)?;
    change(record, |ledger| {
        ledger.layers.retain(|file, _| record.folder.join(file).exists());
        for (file, entry) in ledger.layers.iter_mut().filter(|(_, entry)| entry.was.is_some()) {
            // It has its name: the file that had it before is none of ours if it comes back.
            if Seal::of(&record.folder.join(file)).ok().flatten() == Some(entry.seal) {
                entry.was = None;
            }
        }
        ledger.proven.retain(|id, _| points.iter().any(|point| point.id == *id));
        ledger.copy = Some(Copy { record: record.clone(), points });
    })
}

/// The copy of what a catalogue knew of the replica in a folder.
///
/// # Errors
/// I/O.
pub fn recall(folder: &Path) -> Result<Option<Copy>> {
    Ok(Ledger::any(folder)?.filter(|ledger| ledger.version == VERSION).and_then(|ledger| ledger.copy))
}

/// Gives the folder free: stamp and ledger go.
///
/// # Errors
/// I/O.
pub fn forget(folder: &Path) -> Result<()> {
    layers::remove(&folder.join(LEDGER))?;
    layers::remove(&folder.join(super::desk::STAMP))
}
