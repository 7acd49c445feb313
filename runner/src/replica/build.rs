//! One disk of one restore point: what differs from the replica's newest state becomes a layer on it.
//!
//! Invariants
//! - Where nothing proves that a block is equal it is read and its digest compared; where digests are coarser than a
//!   cluster, the cluster itself. Only what differs is written.
//! - An interrupted disk goes on from its last mark, into the same file. Content of the source read twice is the only
//!   cost; what was marked was durable. Notes that do not prove themselves are not gone on from, and what was written
//!   before the interruption is read back before the layer counts.
//! - The finished layer, read through what it stands on, is the source's disk, byte for byte.
//!
//! Not here: which restore point, which candidates, the catalogue.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use aquifer_formats::{
    Storage,
    qcow2::{BackingName, CLUSTER_BYTES, Checkpoint, NewQcow2},
    storage::{Access, FileStorage},
};
use aquifer_vdisk::{BlockCache, Chain, Delta, Disk};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{
    digests::{BLOCK_MAX, Digests, Sum, each_block, put_file, sum_of},
    layers::{self, beside, name_it, part_of, remove},
    model::Carried,
    trust::Seal,
};
use crate::{
    copy::{Piece, each_data_range, is_zero_bytes, sweep},
    fail::{Code, Fail, Result},
    tasks::{Stage, is_gone},
};

/// Bytes looked at between two marks, at most.
pub const MARK_BYTES: u64 = 256 << 20;

/// Time between two marks, about.
const MARK_EVERY: Duration = Duration::from_secs(1);

/// Bytes of the first stride.
const STRIDE_MIN: u64 = 4 << 20;

/// What is told on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// So many bytes are going to be looked at.
    Ahead(u64),
    /// Bytes were read.
    Read(u64),
    /// Bytes are known to be zero and were not read.
    Zeros(u64),
    /// Bytes of the replica's own disks were looked at, to learn or to prove what they hold.
    Checked(u64),
    /// Bytes were written.
    Written(u64),
    /// Bytes of the replica's own layers were written anew on its host: none of them came from anywhere else.
    Merged(u64),
    /// Blocks were found equal.
    Equal(u64),
    /// A thread was busy for so long.
    Took(Stage, Duration),
}

impl Moved {
    /// Bytes that were looked at.
    pub fn looked_at(self) -> u64 {
        match self {
            Self::Read(bytes) | Self::Zeros(bytes) | Self::Checked(bytes) => bytes,
            Self::Ahead(_) | Self::Written(_) | Self::Merged(_) | Self::Equal(_) | Self::Took(..) => 0,
        }
    }
}

/// Told what moves; may hold the work back, or end it.
pub type Pace<'a> = &'a (dyn Fn(Moved) -> Result<()> + Sync);

/// What a disk's layer is made of.
#[derive(Clone, Debug)]
pub struct DiskBuild {
    /// What the disk is to hold.
    pub source: Arc<Chain>,
    /// The replica's newest state of it, with the name a layer on it uses.
    pub base: Option<(Arc<Chain>, BackingName)>,
    /// Digests of that state.
    pub digests: Option<Digests>,
    /// Where source and base can differ; everywhere, where that is not known.
    pub candidates: Option<Delta>,
    /// The new layer.
    pub path: PathBuf,
    /// What is being copied: a mark of anything else is not gone on from.
    pub key: String,
    /// Bytes of a block of new digests.
    pub block: u64,
    /// Bytes between marks.
    pub mark_bytes: u64,
    /// Who builds. What somebody else has begun is gone on from only if that one is known to have ended: it may wake up
    /// with the file open.
    pub owner: String,
}

/// A finished layer.
#[derive(Clone, Debug)]
pub struct Built {
    /// Digests of the disk.
    pub digests: Digests,
    /// What was moved.
    pub carried: Carried,
    /// The file it was written into.
    seal: Seal,
}

/// Where an interrupted disk stands.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Mark {
    key: String,
    owner: String,
    done_until: u64,
    clusters: u64,
    map_bytes: u64,
    sums_bytes: u64,
    carried: Carried,
    /// BLAKE3 of the first `map_bytes` of the map, and of the first `sums_bytes` of the digests.
    #[serde(default)]
    notes: [String; 2],
    /// BLAKE3 of this mark without it.
    #[serde(default)]
    proof: String,
}

impl Mark {
    fn proof(&self) -> Result<String> {
        let bare = Self { proof: String::new(), ..self.clone() };
        let text = serde_json::to_vec(&bare).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
        Ok(blake3::hash(&text).to_hex().to_string())
    }
}

/// A layer that is begun, or gone on with.
struct Begun {
    image: NewQcow2,
    mark: Mark,
    /// Over the map and the digests as they were marked.
    notes: [blake3::Hasher; 2],
    /// Blocks that were written before an interruption.
    earlier: Delta,
    /// The file that is written.
    file: fs::File,
}

/// The bytes of one changed digest in the file beside a layer.
const SUM_ENTRY: usize = 40;

struct Files {
    part: PathBuf,
    mark: PathBuf,
    map: PathBuf,
    sums: PathBuf,
}

impl Files {
    fn of(path: &Path) -> Self {
        Self { part: part_of(path), mark: beside(path, "mark"), map: beside(path, "map"), sums: beside(path, "sums") }
    }

    fn clear(&self) -> Result<()> {
        // The mark first: without it the others mean nothing.
        [&self.mark, &self.map, &self.sums, &self.part].into_iter().try_for_each(|path| remove(path))
    }
}

/// Takes back whatever of a layer was written.
///
/// # Errors
/// I/O.
pub fn discard(path: &Path) -> Result<()> {
    forget(path)?;
    remove(path)
}

/// The same, of one that has not got its name yet.
///
/// # Errors
/// I/O.
pub fn forget(path: &Path) -> Result<()> {
    Files::of(path).clear()
}

impl DiskBuild {
    /// Where anything has to be looked at, in whole blocks of the digests.
    fn ranges(&self) -> Delta {
        let size = self.source.size();
        let mut ranges = match (&self.candidates, &self.base) {
            (Some(candidates), Some(_)) => candidates.clone(),
            _ => Delta::full(size),
        };
        if let Some((base, _)) = self.base.as_ref().filter(|(base, _)| base.size() != size) {
            ranges.insert(base.size().min(size).saturating_sub(1)..size);
        }
        ranges.round_out(self.block()).clip(0..size)
    }

    fn block(&self) -> u64 {
        self.digests.as_ref().map_or_else(|| Digests::zero(0, self.block).block(), Digests::block)
    }

    /// Bytes that will be read, at most: reads the source's map, no data.
    ///
    /// # Errors
    /// The source's.
    pub fn estimate(&self) -> Result<u64> {
        let mut data = Delta::new();
        each_data_range(&Disk::read_only("source", self.source.clone()), |extent| {
            data.insert(extent.offset..extent.offset.saturating_add(extent.len));
            Ok(())
        })?;
        let size = self.source.size();
        Ok(self.ranges().intersect(&data.round_out(self.block()).clip(0..size)).bytes())
    }

    /// Makes the layer, or goes on making it. The finished file still has its temporary name: see [`DiskBuild::settle`].
    ///
    /// # Errors
    /// The source's, the file system's, and what `pace` says: what was marked stays and is gone on from.
    pub fn run(&self, pace: Pace<'_>) -> Result<Built> {
        let size = self.source.size();
        let mut digests = match (&self.digests, &self.base) {
            (Some(digests), _) => digests.clone(),
            (None, None) => Digests::zero(size, self.block),
            (None, Some((base, _))) => Digests::of(&Disk::read_only("base", base.clone()), self.block, pace)?,
        };
        digests.resize(size);
        let block = digests.block();
        let files = Files::of(&self.path);
        let before = digests.clone();
        let Begun { image, mut mark, mut notes, earlier, file } = self.begin(&files, &mut digests)?;
        let work = Work {
            build: self,
            image,
            digests: Mutex::new(digests),
            changed: Mutex::new(Vec::new()),
            written: AtomicU64::new(0),
            equal: AtomicU64::new(0),
            storing: AtomicU64::new(0),
            pace,
        };
        let source = Disk::read_only("source", self.source.clone());
        let mut rest = self.ranges().clip(mark.done_until..u64::MAX);
        pace(Moved::Ahead(rest.bytes()))?;
        let mut strides = Strides::new(self.mark_bytes);
        while !rest.is_empty() {
            let part = first(&rest, strides.bytes);
            rest = rest.clip(part.end()..u64::MAX);
            let began = Instant::now();
            let read = sweep(&source, &part, block, &|offset, piece| work.take(offset, piece))?;
            mark.carried.bytes_read += read.read;
            pace(Moved::Took(Stage::Source, read.reading))?;
            pace(Moved::Took(Stage::Target, Duration::from_nanos(work.storing.swap(0, Ordering::Relaxed))))?;
            mark.carried.bytes_written += work.written.swap(0, Ordering::Relaxed);
            mark.carried.blocks_equal += work.equal.swap(0, Ordering::Relaxed);
            mark.done_until = part.end();
            // Behind the last stride comes the end itself.
            if strides.walked(read.read, began.elapsed()) && !rest.is_empty() {
                work.mark(&files, &mut mark, &mut notes)?;
            }
        }
        work.image.finish()?;
        let digests = work.digests.into_inner();
        // Of what was written before the interruption only the place was noted.
        if !earlier.is_empty() && !reads_back(&files.part, &digests, &earlier) {
            files.clear()?;
            return Self { digests: Some(before), ..self.clone() }.run(pace);
        }
        Ok(Built { digests, carried: mark.carried, seal: Seal::of_open(&file, &files.part)? })
    }

    /// Gives the finished layer its name and drops the marks; `enter` is told the file just before. Whoever finds that
    /// somebody else has begun the layer anew leaves it alone.
    ///
    /// # Errors
    /// [`Code::Fenced`]; those of `enter`; I/O.
    pub fn settle(&self, built: &Built, enter: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let files = Files::of(&self.path);
        if Seal::of(&files.part)? != Some(built.seal) {
            let what = "another worker has begun this layer anew";
            return Err(Fail::new(Code::Fenced, what).at(files.part.display()));
        }
        enter(&files.part)?;
        name_it(&files.part, &self.path)?;
        files.clear()
    }

    fn begin(&self, files: &Files, digests: &mut Digests) -> Result<Begun> {
        let backing = self.base.as_ref().map(|(_, name)| name.clone());
        if let Some(found) = self.found(files, digests, backing.clone())? {
            return Ok(found);
        }
        files.clear()?;
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder).map_err(|e| Fail::io(folder.display(), "create", &e))?;
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(&files.part, Access::CreateNew)?);
        Ok(Begun {
            image: NewQcow2::create(storage, self.source.size(), backing)?,
            mark: Mark { key: self.key.clone(), owner: self.owner.clone(), ..Mark::default() },
            notes: Default::default(),
            earlier: Delta::new(),
            file: fs::File::open(&files.part).map_err(|e| Fail::io(files.part.display(), "open", &e))?,
        })
    }

    /// What an earlier run has left, if it can be gone on from.
    fn found(&self, files: &Files, digests: &mut Digests, backing: Option<BackingName>) -> Result<Option<Begun>> {
        let Some(Noted { mark, map, sums }) = self.noted(files)? else { return Ok(None) };
        let (entries, []) = sums.as_chunks::<SUM_ENTRY>() else { return Ok(None) };
        let Ok(storage) = FileStorage::open(&files.part, Access::ReadWrite) else { return Ok(None) };
        let Ok(file) = fs::File::open(&files.part) else { return Ok(None) };
        let at = Checkpoint { clusters: mark.clusters };
        let Ok(image) = NewQcow2::resume(Arc::new(storage), self.source.size(), backing, at, &map) else {
            return Ok(None);
        };
        let (mut earlier, block) = (Delta::new(), digests.block());
        for entry in entries {
            let (index, sum) = entry.split_at(8);
            if let (Ok(index), Ok(sum)) = (index.try_into(), sum.try_into()) {
                let index = u64::from_le_bytes(index);
                digests.set(index, sum);
                earlier.insert(index.saturating_mul(block)..index.saturating_add(1).saturating_mul(block));
            }
        }
        // What lies behind the mark was written for it and is written again.
        for (path, len) in [(&files.map, mark.map_bytes), (&files.sums, mark.sums_bytes)] {
            let cut = fs::OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(len));
            cut.map_err(|e| Fail::io(path.display(), "cut", &e))?;
        }
        let notes = [&map, &sums].map(|bytes| {
            let mut hash = blake3::Hasher::new();
            hash.update(bytes);
            hash
        });
        let earlier = earlier.clip(0..self.source.size());
        Ok(Some(Begun { image, mark: Mark { owner: self.owner.clone(), ..mark }, notes, earlier, file }))
    }

    /// The notes of an earlier run of this very copy, if they prove themselves.
    fn noted(&self, files: &Files) -> Result<Option<Noted>> {
        let read = |path: &Path, len: u64| {
            let bytes = fs::read(path).ok()?;
            bytes.get(..usize::try_from(len).ok()?).map(<[u8]>::to_vec)
        };
        let mark = fs::read(&files.mark).ok().and_then(|bytes| serde_json::from_slice::<Mark>(&bytes).ok());
        let ours = |mark: &Mark| mark.key == self.key && (mark.owner == self.owner || is_gone(&mark.owner));
        let Some(mark) = mark.filter(ours) else { return Ok(None) };
        let (Some(map), Some(sums)) = (read(&files.map, mark.map_bytes), read(&files.sums, mark.sums_bytes)) else {
            return Ok(None);
        };
        let found = [&map, &sums].map(|bytes| blake3::hash(bytes).to_hex().to_string());
        let whole = mark.proof == mark.proof()? && mark.notes == found;
        Ok(whole.then_some(Noted { mark, map, sums }))
    }
}

/// Notes of an interrupted disk.
struct Noted {
    mark: Mark,
    map: Vec<u8>,
    sums: Vec<u8>,
}

/// Whether a finished layer holds in `ranges` what the digests say.
fn reads_back(part: &Path, digests: &Digests, ranges: &Delta) -> bool {
    let cache = Arc::new(BlockCache::new(BLOCK_MAX * 8));
    let mut found = digests.clone();
    let read = layers::disk(part, &cache).and_then(|disk| found.refresh(&disk, ranges));
    read.is_ok() && found == *digests
}

struct Work<'a> {
    build: &'a DiskBuild,
    image: NewQcow2,
    digests: Mutex<Digests>,
    changed: Mutex<Vec<(u64, Sum)>>,
    written: AtomicU64,
    equal: AtomicU64,
    /// Nanoseconds that storing took.
    storing: AtomicU64,
    pace: Pace<'a>,
}

impl Work<'_> {
    fn take(&self, offset: u64, piece: Piece<'_>) -> Result<()> {
        let (block, size) = (self.digests.lock().block(), self.build.source.size());
        (self.pace)(match piece {
            Piece::Bytes(bytes) => Moved::Read(bytes.len() as u64),
            Piece::Zeros(len) => Moved::Zeros(len),
        })?;
        let (mut equal, mut written) = (0, 0);
        each_block(offset, piece, block, &mut |index, bytes| {
            let new = bytes.map(sum_of);
            let (old, new) = {
                let digests = self.digests.lock();
                (digests.sum(index).copied(), new.unwrap_or_else(|| digests.zero_at(index)))
            };
            if old == Some(new) {
                equal += 1;
                return Ok(());
            }
            let at = index * block;
            let began = Instant::now();
            let stored = self.store(at, bytes, block.min(size - at))?;
            let nanos = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.storing.fetch_add(nanos, Ordering::Relaxed);
            written += stored;
            self.digests.lock().set(index, new);
            self.changed.lock().push((index, new));
            Ok(())
        })?;
        self.equal.fetch_add(equal, Ordering::Relaxed);
        self.written.fetch_add(written, Ordering::Relaxed);
        (self.pace)(Moved::Equal(equal))?;
        (self.pace)(Moved::Written(written))
    }

    /// Stores the clusters of a block that differ from the base; answers how many bytes those have.
    fn store(&self, at: u64, bytes: Option<&[u8]>, len: u64) -> Result<u64> {
        let (mut base, mut written) = (Vec::new(), 0);
        let step = usize::try_from(CLUSTER_BYTES).unwrap_or(usize::MAX);
        for start in (at..at + len).step_by(step) {
            let len = CLUSTER_BYTES.min(at + len - start);
            let count = usize::try_from(len).unwrap_or_default();
            let from = usize::try_from(start - at).unwrap_or_default();
            let new = bytes.and_then(|bytes| bytes.get(from..from + count)).filter(|new| !is_zero_bytes(new));
            base.clear();
            base.resize(count, 0);
            if let Some((chain, _)) = &self.build.base {
                let there = usize::try_from(chain.size().saturating_sub(start)).unwrap_or(usize::MAX).min(count);
                if let Some(part) = base.get_mut(..there).filter(|part| !part.is_empty()) {
                    chain.read(start, part)?;
                }
            }
            let base_is_zero = is_zero_bytes(&base);
            match new {
                Some(new) if new != base => {
                    self.image.write(start, new)?;
                    written += len;
                }
                None if !base_is_zero => self.image.write_zeros(start, len)?,
                _ => {}
            }
        }
        Ok(written)
    }

    fn mark(&self, files: &Files, mark: &mut Mark, notes: &mut [blake3::Hasher; 2]) -> Result<()> {
        // Whoever has lost the work leaves the files to whoever has it now.
        (self.pace)(Moved::Ahead(0))?;
        let (at, map) = self.image.checkpoint()?;
        let changed = std::mem::take(&mut *self.changed.lock());
        let sums: Vec<u8> =
            changed.iter().flat_map(|(index, sum)| index.to_le_bytes().into_iter().chain(*sum)).collect();
        // The first mark makes the files.
        let is_first = mark.proof.is_empty();
        for (path, bytes) in [(&files.map, &map), (&files.sums, &sums)] {
            if is_first || !bytes.is_empty() {
                append(path, bytes)?;
            }
        }
        mark.clusters = at.clusters;
        mark.map_bytes += map.len() as u64;
        mark.sums_bytes += sums.len() as u64;
        for (note, bytes) in notes.iter_mut().zip([&map, &sums]) {
            note.update(bytes);
        }
        mark.notes = notes.each_ref().map(|note| note.finalize().to_hex().to_string());
        mark.proof = mark.proof()?;
        let text = serde_json::to_vec(mark).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
        put_file(&files.mark, &text)
    }
}

fn append(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = fs::OpenOptions::new().create(true).append(true).open(path);
    let written = file.and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_data()));
    written.map_err(|e| Fail::io(path.display(), "write", &e))
}

/// How much is looked at in one go, and when that is marked: often enough that little is read twice, seldom enough that
/// making it durable costs little. Zeros are no reason for a mark: what was not read is not read twice.
struct Strides {
    bytes: u64,
    most: u64,
    since_mark: u64,
    time_since_mark: Duration,
}

impl Strides {
    fn new(most: u64) -> Self {
        let most = most.max(BLOCK_MAX);
        Self { bytes: most.min(STRIDE_MIN), most, since_mark: 0, time_since_mark: Duration::ZERO }
    }

    /// Counts a stride of which so many bytes were read; whether it is time for a mark.
    fn walked(&mut self, read: u64, took: Duration) -> bool {
        self.since_mark += read;
        self.time_since_mark += took;
        if took < MARK_EVERY / 8 {
            self.bytes = (self.bytes * 2).min(self.most);
        } else if took > MARK_EVERY {
            self.bytes = (self.bytes / 2).max(BLOCK_MAX);
        }
        let is_time = self.since_mark >= self.most || self.time_since_mark >= MARK_EVERY;
        if is_time {
            (self.since_mark, self.time_since_mark) = (0, Duration::ZERO);
        }
        is_time
    }
}

/// About the first `bytes` of ranges, cut at a multiple of the largest block of digests.
fn first(ranges: &Delta, bytes: u64) -> Delta {
    let (mut part, mut room) = (Delta::new(), bytes);
    for range in ranges.iter() {
        let end = range.start.saturating_add(room).next_multiple_of(BLOCK_MAX).min(range.end);
        part.insert(range.start..end);
        room = room.saturating_sub(end - range.start);
        if room == 0 || end < range.end {
            break;
        }
    }
    part
}
