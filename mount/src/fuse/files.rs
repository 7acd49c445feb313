//! One flat folder with a file per disk, as the kernel asks for it.
//!
//! Invariants
//! - Offsets and lengths are cut to the disk before anything is read or written; a disk never grows.
//! - A request that names an inode that is not there is answered with an error.

use std::{
    cell::RefCell,
    ffi::OsStr,
    fs::File,
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use aquifer_vdisk::{Disk, Extent, ExtentKind, Zeroing};
use fuser::{
    AccessFlags, BackingId, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;

use super::{FuseFile, pool::Pool};

/// Names and attributes never change while a door is open.
const TTL: Duration = Duration::from_secs(24 * 3600);

/// Largest request; the kernel's default limit is the same, so no more would come.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Longest read that is decoded on the thread that took it, in bytes.
const DECODE_INLINE_MAX: u64 = 64 << 10;

/// Asynchronous requests the kernel keeps in flight. Its default of 16 starves deep queues.
const BACKGROUND_MAX: u16 = 256;

/// Threads for what may wait for the source: enough to keep a slow one busy.
const SOURCE_THREADS: usize = 16;

/// Threads for what waits for our own disk. Flushes that meet share a sync anyway.
const LOCAL_THREADS: usize = 4;

/// How far one step of a search for data or a hole looks, in bytes.
const SEEK_STEP: u64 = 1 << 30;

const FIRST_FILE: u64 = 2;

/// A disk and how its file is opened.
#[derive(Debug)]
pub(super) struct Entry {
    disk: Arc<Disk>,
    passing: Mutex<Passing>,
}

/// Whether opens are passed through to `disk.raw`. Once the first one is, all are: the kernel refuses a mix.
#[derive(Debug)]
enum Passing {
    Never,
    Once(File),
    Now(BackingId),
}

impl Entry {
    pub(super) fn new(file: FuseFile) -> Self {
        let passing = file.raw.map_or(Passing::Never, Passing::Once);
        Self { disk: file.disk, passing: Mutex::new(passing) }
    }

    pub(super) fn disk(&self) -> &Disk {
        &self.disk
    }

    fn open(&self, wants_write: bool, fh: FileHandle, reply: ReplyOpen) {
        if !self.disk.is_writable() {
            return reply.opened(fh, FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
        }
        let direct = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        let mut passing = self.passing.lock();
        // Readers only: a writer's open alone is no reason to give up the journal.
        if let Passing::Once(raw) = &*passing
            && !wants_write
            && self.disk.local().is_ok_and(|l| l.absent == 0)
            && self.disk.drain().is_ok()
        {
            *passing = match reply.open_backing(raw) {
                Ok(id) => Passing::Now(id),
                // No privilege, or a file system that is stacked too deep: it will not change.
                Err(error) => {
                    tracing::debug!(%error, "no passthrough");
                    Passing::Never
                }
            };
        }
        match &*passing {
            // Both flags: the open counts as passed through, but its reads and writes come to us.
            Passing::Now(id) if wants_write => reply.opened_passthrough(fh, direct, id),
            Passing::Now(id) => reply.opened_passthrough(fh, FopenFlags::FOPEN_NOFLUSH, id),
            Passing::Never | Passing::Once(_) => reply.opened(fh, direct),
        }
    }
}

/// What the loops and the pools work on.
#[derive(Debug)]
pub(super) struct Shared {
    entries: Vec<Arc<Entry>>,
    source: Pool,
    local: Pool,
    /// A thread that takes requests is at a decode.
    decoding: AtomicBool,
    open_files: Arc<AtomicUsize>,
    born: SystemTime,
    owner: (u32, u32),
}

impl Shared {
    pub(super) fn new(entries: Vec<Entry>) -> io::Result<Self> {
        Ok(Self {
            entries: entries.into_iter().map(Arc::new).collect(),
            source: Pool::new("fuse-source", SOURCE_THREADS)?,
            local: Pool::new("fuse-local", LOCAL_THREADS)?,
            decoding: AtomicBool::new(false),
            open_files: Arc::new(AtomicUsize::new(0)),
            born: SystemTime::now(),
            owner: (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
        })
    }

    pub(super) fn open_files(&self) -> usize {
        self.open_files.load(Ordering::Relaxed)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.source.pending() + self.local.pending()
    }

    fn entry(&self, ino: INodeNo) -> Option<&Arc<Entry>> {
        self.entries.get(usize::try_from(ino.0.checked_sub(FIRST_FILE)?).ok()?)
    }

    fn disk(&self, ino: INodeNo) -> Option<&Arc<Disk>> {
        self.entry(ino).map(|e| &e.disk)
    }

    fn attr(&self, ino: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size, nlink) = match self.disk(ino) {
            Some(disk) if disk.is_writable() => (FileType::RegularFile, 0o600, disk.size(), 1),
            Some(disk) => (FileType::RegularFile, 0o400, disk.size(), 1),
            None if ino == INodeNo::ROOT => (FileType::Directory, 0o500, 0, 2),
            None => return None,
        };
        // One block less than the size: copiers look for holes only in files that occupy less than they are long.
        let blocks = (size / 512).saturating_sub(8);
        let (uid, gid) = self.owner;
        let (atime, mtime, ctime, crtime) = (self.born, self.born, self.born, self.born);
        let blksize = 4096;
        Some(FileAttr {
            ino,
            size,
            blocks,
            atime,
            mtime,
            ctime,
            crtime,
            kind,
            perm,
            nlink,
            uid,
            gid,
            rdev: 0,
            blksize,
            flags: 0,
        })
    }

    /// What is at hand; and of a lone request also what takes no more than a decode, which is less work than the
    /// way to another thread. With others behind it a decode here would hold them up, and one core would do it all.
    fn read_here(&self, disk: &Disk, offset: u64, part: &mut [u8]) -> aquifer_vdisk::Result<bool> {
        let may = part.len() as u64 <= DECODE_INLINE_MAX && self.source.pending() == 0;
        if !may || self.decoding.swap(true, Ordering::Relaxed) {
            return disk.read_now(offset, part);
        }
        let read = disk.read_soon(offset, part);
        self.decoding.store(false, Ordering::Relaxed);
        read
    }
}

/// The file system; empty until it is told what to serve.
#[derive(Debug)]
pub(super) struct Files {
    shared: Arc<OnceLock<Shared>>,
}

impl Files {
    pub(super) fn new(shared: Arc<OnceLock<Shared>>) -> Self {
        Self { shared }
    }

    fn shared(&self) -> Result<&Shared, Errno> {
        self.shared.get().ok_or(Errno::EIO)
    }

    fn disk(&self, ino: INodeNo) -> Result<(&Shared, &Arc<Disk>), Errno> {
        let shared = self.shared()?;
        Ok((shared, shared.disk(ino).ok_or(Errno::ENOENT)?))
    }
}

/// Tells of a disk's error where it can be seen, and what the kernel is told of it.
fn errno(error: &aquifer_vdisk::Error) -> Errno {
    tracing::warn!(%error, "request failed");
    Errno::from_i32(crate::errno::Errno::from(error).raw_os_error())
}

fn answer(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

/// How many of `len` bytes at `offset` lie on the disk.
fn clip(disk: &Disk, offset: u64, len: u64) -> u64 {
    len.min(disk.size().saturating_sub(offset))
}

/// A buffer of exactly `len` bytes; what is in it does not matter.
fn sized(buffer: &mut Vec<u8>, len: u64) -> &mut [u8] {
    let len = usize::try_from(len).unwrap_or(0);
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    buffer.get_mut(..len).unwrap_or_default()
}

thread_local! {
    /// Where a loop reads hits into.
    static HITS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Filesystem for Files {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // All of them are wishes: an older kernel serves without.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS);
        if config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok() {
            let _ = config.set_max_stack_depth(2);
        }
        let _ = config.set_max_write(REQUEST_BYTES_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let find = || {
            let shared = self.shared.get().filter(|_| parent == INodeNo::ROOT)?;
            let index = shared.entries.iter().position(|e| OsStr::new(e.disk.name()) == name)?;
            shared.attr(INodeNo(FIRST_FILE + index as u64))
        };
        match find() {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.shared.get().and_then(|s| s.attr(ino)) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        // Times are taken and forgotten, as programs set them in passing. A disk keeps its size and owner.
        match self.shared.get().and_then(|s| s.attr(ino)) {
            None => reply.error(Errno::ENOENT),
            Some(attr) if size.is_some_and(|s| s != attr.size) => reply.error(Errno::EPERM),
            Some(_) if mode.is_some() || uid.is_some() || gid.is_some() => reply.error(Errno::EPERM),
            Some(attr) => reply.attr(&TTL, &attr),
        }
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks permissions itself.
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let entries = self.shared.get().map_or(&[][..], |s| &s.entries);
        let blocks = entries.iter().fold(0u64, |sum, e| sum.saturating_add(e.disk.size().div_ceil(4096)));
        reply.statfs(blocks, 0, 0, entries.len() as u64, 0, 4096, 255, 4096);
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let Some(shared) = self.shared.get().filter(|_| ino == INodeNo::ROOT) else {
            return reply.error(Errno::ENOTDIR);
        };
        let dots = [(INodeNo::ROOT, FileType::Directory, "."), (INodeNo::ROOT, FileType::Directory, "..")];
        let files = shared.entries.iter().zip(FIRST_FILE..);
        let files = files.map(|(e, ino)| (INodeNo(ino), FileType::RegularFile, e.disk.name()));
        for ((ino, kind, name), next) in dots.into_iter().chain(files).zip(1..) {
            if next > offset && reply.add(ino, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let Some((shared, entry)) = self.shared.get().and_then(|s| Some((s, s.entry(ino)?))) else {
            return reply.error(Errno::ENOENT);
        };
        let wants_write = flags.acc_mode() != OpenAccMode::O_RDONLY;
        if wants_write && !entry.disk.is_writable() {
            return reply.error(Errno::EROFS);
        }
        shared.open_files.fetch_add(1, Ordering::Relaxed);
        let fh = FileHandle(u64::from(wants_write));
        if entry.disk.is_writable() {
            // Going over to passthrough empties the journal, which takes a while.
            let entry = entry.clone();
            shared.local.run(move |_| entry.open(wants_write, fh, reply));
        } else {
            entry.open(wants_write, fh, reply);
        }
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if let Some(shared) = self.shared.get() {
            shared.open_files.fetch_sub(1, Ordering::Relaxed);
        }
        reply.ok();
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (shared, disk) = match self.disk(ino) {
            Ok(found) => found,
            Err(e) => return reply.error(e),
        };
        let len = clip(disk, offset, u64::from(size.min(REQUEST_BYTES_MAX)));
        let missed = HITS.with_borrow_mut(|hits| {
            let part = sized(hits, len);
            match shared.read_here(disk, offset, part) {
                Ok(true) => {
                    reply.data(part);
                    None
                }
                Ok(false) => Some(reply),
                Err(e) => {
                    reply.error(errno(&e));
                    None
                }
            }
        });
        if let Some(reply) = missed {
            let disk = disk.clone();
            shared.source.run(move |buffer| {
                let part = sized(buffer, len);
                match disk.read(offset, part) {
                    Ok(()) => reply.data(part),
                    Err(e) => reply.error(errno(&e)),
                }
            });
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (shared, disk) = match self.disk(ino) {
            Ok(found) => found,
            Err(e) => return reply.error(e),
        };
        let len = clip(disk, offset, data.len() as u64);
        let data = data.get(..usize::try_from(len).unwrap_or(0)).unwrap_or_default();
        if data.is_empty() {
            // As a block device says at its end.
            return reply.error(Errno::ENOSPC);
        }
        let finish = move |result: aquifer_vdisk::Result<()>, reply: ReplyWrite| match result {
            Ok(()) => reply.written(u32::try_from(len).unwrap_or(0)),
            Err(e) => reply.error(errno(&e)),
        };
        if may_wait_for_source(disk, offset, len) {
            let (disk, data) = (disk.clone(), data.to_vec());
            shared.source.run(move |_| finish(disk.write(offset, &data), reply));
        } else {
            finish(disk.write(offset, data), reply);
        }
    }

    fn flush(&self, _req: &Request, ino: INodeNo, fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        // Sent at every close; only a writer has something to make durable.
        if fh.0 == 0 {
            return reply.ok();
        }
        self.sync(ino, reply);
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.sync(ino, reply);
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (shared, disk) = match self.disk(ino) {
            Ok(found) => found,
            Err(e) => return reply.error(e),
        };
        let len = clip(disk, offset, length);
        let keeps_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let beyond = len < length && !keeps_size;
        let disk = disk.clone();
        // The ends of the range may lie inside blocks that are still at the source.
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            _ if beyond => reply.error(Errno::EPERM),
            libc::FALLOC_FL_PUNCH_HOLE => shared.source.run(move |_| {
                answer(reply, disk.trim(offset, len).map_err(|e| errno(&e)));
            }),
            libc::FALLOC_FL_ZERO_RANGE => shared.source.run(move |_| {
                answer(reply, disk.write_zeroes(offset, len, Zeroing::KeepSpace).map_err(|e| errno(&e)));
            }),
            _ => reply.error(Errno::EOPNOTSUPP),
        }
    }

    fn lseek(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let (shared, disk) = match self.disk(ino) {
            Ok(found) => found,
            Err(e) => return reply.error(e),
        };
        let wanted = match whence {
            libc::SEEK_DATA => Wanted::Data,
            libc::SEEK_HOLE => Wanted::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Some(offset) = u64::try_from(offset).ok().filter(|o| *o < disk.size()) else {
            return reply.error(Errno::ENXIO);
        };
        let disk = disk.clone();
        shared.source.run(move |_| match seek(&disk, offset, wanted) {
            Ok(Some(found)) => reply.offset(i64::try_from(found).unwrap_or(i64::MAX)),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(e) => reply.error(errno(&e)),
        });
    }
}

impl Files {
    fn sync(&self, ino: INodeNo, reply: ReplyEmpty) {
        match self.disk(ino) {
            Ok((_, disk)) if !disk.is_writable() => reply.ok(),
            Ok((shared, disk)) => {
                let disk = disk.clone();
                shared.local.run(move |_| answer(reply, disk.flush().map_err(|e| errno(&e))));
            }
            // The folder itself has nothing to sync.
            Err(_) => reply.ok(),
        }
    }
}

/// Whether a write may have to read around it from the source first: it ends inside a block that is
/// not at hand. A wrong guess costs a wait, never a wrong byte.
fn may_wait_for_source(disk: &Disk, offset: u64, len: u64) -> bool {
    let block = aquifer_vdisk::overlay::OVERLAY_BLOCK_BYTES;
    let end = offset + len;
    let inside = |at: u64| !at.is_multiple_of(block) && at < disk.size();
    let away = |at: u64| !disk.read_now(at, &mut [0]).unwrap_or(false);
    (inside(offset) && away(offset)) || (inside(end) && away(end))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Data,
    Hole,
}

/// First place at or after `offset` that is data, or a hole. The end of the disk is a hole.
fn seek(disk: &Disk, offset: u64, wanted: Wanted) -> aquifer_vdisk::Result<Option<u64>> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = offset;
    while at < disk.size() {
        let len = SEEK_STEP.min(disk.size() - at);
        extents.clear();
        disk.extents(at, len, &mut extents)?;
        let fits = |e: &&Extent| (e.kind == ExtentKind::Data) == (wanted == Wanted::Data);
        if let Some(found) = extents.iter().find(fits) {
            return Ok(Some(found.offset.max(at)));
        }
        at += len;
    }
    Ok((wanted == Wanted::Hole).then_some(disk.size()))
}
