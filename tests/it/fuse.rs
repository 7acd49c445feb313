//! Promise: a disk served as a file is that disk. Bytes, holes, errors and durability are the disk's
//! own, a source that is away holds up only what needs it, and a stop never hangs.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use aquifer_formats::storage::MemoryStorage;
use aquifer_mount::fuse::{Audience, Error, FuseDoor, FuseFile, FuseOptions, MountAccess};
use aquifer_tests::{
    door::{HeldStorage, pattern, read_only, scale, writable},
    rng::Rng,
};
use aquifer_vdisk::{Disk, ExtentKind};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

const OPTIONS: FuseOptions = FuseOptions { audience: Audience::Owner, access: MountAccess::ReadWrite };

fn door(dir: &Path, disks: &[Arc<Disk>]) -> FuseDoor {
    let files = disks.iter().map(|disk| FuseFile { disk: disk.clone(), raw: None }).collect();
    FuseDoor::open(dir, OPTIONS, files).expect("mount")
}

fn open_for(path: &Path, write: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
}

#[test]
fn reads_are_the_disks() {
    let tmp = tempfile::tempdir().expect("tempdir");
    // Neither end on a page nor on a sector.
    let bytes = pattern(3_000_777, 1);
    let door = door(tmp.path(), &[read_only("vda", bytes.clone()), read_only("b", vec![7; 512])]);
    let mut names: Vec<_> = fs::read_dir(tmp.path()).expect("list").map(|e| e.expect("entry").file_name()).collect();
    names.sort();
    assert_eq!(names, ["b", "vda"]);
    let path = door.path("vda");
    let meta = fs::metadata(&path).expect("stat");
    assert_eq!((meta.len(), meta.mode() & 0o7777, meta.nlink()), (3_000_777, 0o400, 1));
    assert_eq!(fs::read(&path).expect("read"), bytes);
    assert_eq!(fs::read(door.path("b")).expect("read"), vec![7; 512]);
    let mut numbers = Rng::new(2);
    for flags in [0, libc::O_DIRECT] {
        let file = open_for(&path, false, flags).expect("open");
        for _ in 0..300 * scale() {
            let unit = if flags == 0 { 1 } else { 512 };
            let offset = numbers.below(3_100_000) / unit * unit;
            let len = usize::try_from((1 + numbers.below(200_000)).next_multiple_of(unit)).expect("small");
            let mut buf = Aligned::new(len);
            let got = file.read_at(buf.part(len), offset).expect("read");
            let want = bytes.get(usize::try_from(offset).expect("small")..).unwrap_or_default();
            let want = &want[..want.len().min(len)];
            // A direct read may end early only at the end of the file.
            assert_eq!(got, want.len(), "at {offset}+{len}");
            assert_eq!(&buf.part(len)[..got], want, "at {offset}+{len}");
        }
    }
    door.stop().expect("stop");
    assert_eq!(fs::read_dir(tmp.path()).expect("list").count(), 0, "unmounted");
}

/// A buffer that direct I/O takes.
struct Aligned(Vec<u8>, usize);

impl Aligned {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self(bytes, start)
    }

    fn part(&mut self, len: usize) -> &mut [u8] {
        &mut self.0[self.1..self.1 + len]
    }
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let tmp = tempfile::tempdir().expect("tempdir");
    let door = door(tmp.path(), &[read_only("vda", pattern(1 << 20, 1))]);
    let path = door.path("vda");
    let refused = open_for(&path, true, 0).expect_err("read-only");
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS), "{refused}");
    assert!(fs::remove_file(&path).is_err());
    assert!(fs::rename(&path, tmp.path().join("x")).is_err());
    assert!(File::create(tmp.path().join("new")).is_err());
    assert!(fs::create_dir(tmp.path().join("new")).is_err());
    assert_eq!(fs::metadata(tmp.path().join("nothing")).expect_err("missing").kind(), io::ErrorKind::NotFound);
    door.stop().expect("stop");
}

/// Random operations on the file, mirrored in memory; after them the disk holds the same.
#[test]
fn writes_are_the_disks() {
    let (tmp, over) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
    let size = 1_000_448usize;
    let mut model = pattern(size, 3);
    let disk = writable("vda", Arc::new(MemoryStorage::new("m", model.clone())), over.path());
    let door = door(tmp.path(), std::slice::from_ref(&disk));
    let file = open_for(&door.path("vda"), true, 0).expect("open");
    let mut numbers = Rng::new(4);
    for round in 0..400 * scale() {
        let at = usize::try_from(numbers.below(size as u64)).expect("small");
        let len = usize::try_from(1 + numbers.below(60_000)).expect("small").min(size - at);
        match numbers.below(6) {
            0 | 1 => {
                let bytes = pattern(len, round + 10);
                file.write_all_at(&bytes, at as u64).expect("write");
                model[at..at + len].copy_from_slice(&bytes);
            }
            2 => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&file, flags, at as u64, len as u64).expect("punch");
                model[at..at + len].fill(0);
            }
            3 => {
                fallocate(&file, FallocateFlags::ZERO_RANGE, at as u64, len as u64).expect("zero");
                model[at..at + len].fill(0);
            }
            4 => file.sync_data().expect("sync"),
            _ => {
                let mut got = vec![0; len];
                file.read_exact_at(&mut got, at as u64).expect("read");
                assert!(got == model[at..at + len], "round {round} at {at}+{len}");
            }
        }
    }
    let mut got = vec![0; size];
    disk.read(0, &mut got).expect("read");
    assert!(got == model, "the disk itself");
    drop(file);
    door.stop().expect("stop");
}

#[test]
fn a_disk_keeps_its_size() {
    let (tmp, over) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
    let bytes = pattern(10_240, 5);
    let disk = writable("vda", Arc::new(MemoryStorage::new("m", bytes.clone())), over.path());
    let door = door(tmp.path(), &[disk]);
    let path = door.path("vda");
    let file = open_for(&path, true, 0).expect("open");
    assert_eq!(file.set_len(5).expect_err("cut").raw_os_error(), Some(libc::EPERM));
    file.set_len(10_240).expect("as it is");
    assert!(File::create(&path).is_err(), "O_TRUNC");
    assert_eq!(file.write_at(&[1; 100], 10_200).expect("cut at the end"), 40);
    let past = file.write_at(&[1], 10_240).expect_err("past the end");
    assert_eq!(past.raw_os_error(), Some(libc::ENOSPC), "{past}");
    let grown = fallocate(&file, FallocateFlags::ZERO_RANGE, 10_000, 1000).expect_err("grow");
    assert_eq!(grown.raw_os_error(), libc::EPERM);
    let reserve = fallocate(&file, FallocateFlags::empty(), 0, 1000).expect_err("reserve");
    assert_eq!(reserve.raw_os_error(), libc::EOPNOTSUPP);
    assert_eq!(fs::metadata(&path).expect("stat").len(), 10_240);
    assert_eq!(file.read_at(&mut [0; 10], 10_240).expect("end"), 0);
    let mut want = bytes;
    want[10_200..].fill(1);
    assert_eq!(fs::read(&path).expect("read"), want);
    drop(file);
    door.stop().expect("stop");
}

/// What `SEEK_DATA` and `SEEK_HOLE` walk is what the disk says it holds.
#[test]
fn holes_are_the_disks() {
    let (tmp, under) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
    let image = under.path().join("image");
    let file = File::create(&image).expect("create");
    file.set_len(64 << 20).expect("sparse");
    let mut numbers = Rng::new(6);
    for _ in 0..40 {
        let at = numbers.below(16_000) * 4096;
        file.write_all_at(&pattern(4096 * (1 + usize::try_from(numbers.below(9)).expect("small")), 7), at)
            .expect("write");
    }
    let storage = aquifer_formats::storage::FileStorage::open(&image, aquifer_formats::storage::Access::ReadOnly);
    let disk = Arc::new(Disk::read_only("vda", aquifer_tests::door::chain(Arc::new(storage.expect("open")))));
    let door = door(tmp.path(), std::slice::from_ref(&disk));
    let mut extents = Vec::new();
    disk.extents(0, disk.size(), &mut extents).expect("extents");
    let mut want: Vec<(u64, u64)> = Vec::new();
    for e in extents.iter().filter(|e| e.kind == ExtentKind::Data) {
        match want.last_mut() {
            Some(last) if last.1 == e.offset => last.1 += e.len,
            _ => want.push((e.offset, e.offset + e.len)),
        }
    }
    assert!(want.len() > 20, "worth walking: {}", want.len());
    let file = File::open(door.path("vda")).expect("open");
    let (mut got, mut at) = (Vec::new(), 0);
    while let Ok(data) = seek(&file, SeekFrom::Data(at)) {
        at = seek(&file, SeekFrom::Hole(data)).expect("a hole follows");
        got.push((data, at));
    }
    assert_eq!(got, want);
    assert_eq!(seek(&file, SeekFrom::Data(disk.size())).expect_err("end"), rustix::io::Errno::NXIO);
    // Inside an extent both stay where they are.
    let (start, end) = want[3];
    assert_eq!(seek(&file, SeekFrom::Data(start + 1)).expect("data"), start + 1);
    assert_eq!(seek(&file, SeekFrom::Hole(start + 1)).expect("hole"), end);
    drop(file);
    door.stop().expect("stop");
}

/// With more reads waiting for a source that is away than there are threads, what is local goes on.
#[test]
fn a_source_that_is_away_holds_up_only_what_needs_it() {
    let (tmp, over) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
    let bytes = pattern(4 << 20, 8);
    let source = HeldStorage::new(bytes.clone());
    let disk = writable("vda", source.clone(), over.path());
    let door = door(tmp.path(), &[disk]);
    let path = door.path("vda");
    let file = open_for(&path, true, 0).expect("open");
    file.write_all_at(&[9; 8192], 0).expect("local from now on");
    source.hold();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (1..=40u64)
            .map(|i| {
                let (file, bytes) = (&file, &bytes);
                scope.spawn(move || {
                    let (offset, mut buf) = (i * 65_536, vec![0; 4096]);
                    file.read_exact_at(&mut buf, offset).expect("read");
                    let at = usize::try_from(offset).expect("small");
                    assert!(buf == bytes[at..at + 4096], "at {offset}");
                })
            })
            .collect();
        let start = Instant::now();
        while source.waiting() < 16 {
            assert!(start.elapsed() < Duration::from_secs(5), "the pool fills: {}", source.waiting());
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(50));
        let start = Instant::now();
        let mut local = [0; 100];
        file.read_exact_at(&mut local, 4000).expect("local read");
        assert_eq!(local, [9; 100]);
        file.write_all_at(&[5; 10], 100).expect("part of a local block");
        file.write_all_at(&[6; 4096], 3 << 20).expect("a whole absent block");
        file.sync_data().expect("flush");
        assert_eq!(fs::metadata(&path).expect("stat").len(), 4 << 20);
        assert!(start.elapsed() < Duration::from_secs(2), "local work waited {:?}", start.elapsed());
        assert!(readers.iter().all(|r| !r.is_finished()), "the others do wait");
        source.release();
        readers.into_iter().for_each(|r| r.join().expect("reader"));
    });
    drop(file);
    door.stop().expect("stop");
}

/// Files open, a read that waits for a source that never comes: the stop ends all the same.
#[test]
fn a_stop_never_hangs() {
    let tmp = tempfile::tempdir().expect("tempdir");
    let source = HeldStorage::new(pattern(1 << 20, 9));
    let disk = Arc::new(Disk::read_only("vda", aquifer_tests::door::chain(source.clone())));
    let door = door(tmp.path(), &[disk]);
    let file = File::open(door.path("vda")).expect("open");
    assert!(door.is_busy());
    source.hold();
    let waiting = file.try_clone().expect("clone");
    let reader = std::thread::spawn(move || waiting.read_exact_at(&mut [0; 4096], 8192));
    while source.waiting() == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let start = Instant::now();
    let stopped = door.stop();
    assert!(start.elapsed() < Duration::from_secs(5), "took {:?}", start.elapsed());
    stopped.expect("stop");
    assert_eq!(fs::read_dir(tmp.path()).expect("list").count(), 0, "detached");
    if Path::new("/sys/fs/fuse/connections").read_dir().is_ok_and(|mut d| d.next().is_some()) {
        assert!(reader.join().expect("reader").is_err(), "cut off");
        assert!(file.read_at(&mut [0; 10], 0).is_err(), "cut off");
        source.release();
    } else {
        source.release();
        let _ = reader.join().expect("answered or cut");
    }
}

#[test]
fn one_door_at_a_mountpoint() {
    let tmp = tempfile::tempdir().expect("tempdir");
    let first = door(tmp.path(), &[read_only("vda", vec![1; 4096])]);
    let files = vec![FuseFile { disk: read_only("vda", vec![2; 4096]), raw: None }];
    let second = FuseDoor::open(tmp.path(), OPTIONS, files);
    assert!(matches!(second, Err(Error::Busy { .. })), "{second:?}");
    assert_eq!(fs::read(first.path("vda")).expect("read"), [1; 4096], "the first goes on");
    first.stop().expect("stop");
    for name in ["", ".", "..", "a/b", "a\0b", &"x".repeat(256)] {
        let files = vec![FuseFile { disk: read_only(name, vec![2; 4096]), raw: None }];
        let refused = FuseDoor::open(tmp.path(), OPTIONS, files);
        assert!(matches!(refused, Err(Error::Name { .. })), "{name:?}: {refused:?}");
    }
}

/// The other process of the next test; does nothing when run by itself.
#[test]
#[ignore = "run by a_killed_door_leaves_nothing_in_the_way"]
fn door_for_another_process() {
    let Ok(dir) = std::env::var("AQUIFER_TEST_DOOR") else { return };
    let _door = door(Path::new(&dir), &[read_only("vda", vec![3; 8192])]);
    println!("ready");
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_killed_door_leaves_nothing_in_the_way() {
    let tmp = tempfile::tempdir().expect("tempdir");
    let dir = tmp.path().join("m n");
    let mut child = Command::new(std::env::current_exe().expect("self"))
        .args(["--exact", "fuse::door_for_another_process", "--ignored", "--nocapture"])
        .env("AQUIFER_TEST_DOOR", &dir)
        .stdout(Stdio::piped())
        .spawn()
        .expect("spawn");
    let start = Instant::now();
    while fs::read(dir.join("vda")).map_or(0, |b| b.len()) != 8192 {
        assert!(start.elapsed() < Duration::from_secs(10), "the other process serves");
        std::thread::sleep(Duration::from_millis(10));
    }
    let open = File::open(dir.join("vda")).expect("open");
    child.kill().expect("kill");
    child.wait().expect("wait");
    assert_eq!(fs::metadata(dir.join("other")).expect_err("dead").raw_os_error(), Some(libc::ENOTCONN));
    let next = door(&dir, &[read_only("vda", vec![4; 4096])]);
    assert_eq!(fs::read(next.path("vda")).expect("read"), [4; 4096]);
    drop(open);
    next.stop().expect("stop");
    assert_eq!(fs::read_dir(&dir).expect("clean").count(), 0);
}

/// Once all is local a reader goes to `disk.raw` without us; a writer still comes to us, so that what
/// it changes stays known, and both see each other's bytes. A file opened before goes on as it was.
#[test]
fn readers_are_passed_through_once_all_is_local() {
    let (tmp, over) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
    let size = 256 << 10;
    let disk = writable("vda", Arc::new(MemoryStorage::new("m", pattern(size, 3))), over.path());
    let raw = File::open(over.path().join("disk.raw")).expect("raw");
    let files = vec![FuseFile { disk: disk.clone(), raw: Some(raw) }];
    let door = FuseDoor::open(tmp.path(), OPTIONS, files).expect("mount");
    let path = door.path("vda");
    let early = open_for(&path, true, 0).expect("open");
    assert!(!maps_shared(&early), "direct while blocks are absent");
    let mut model = pattern(size, 11);
    early.write_all_at(&model, 0).expect("all local");
    let reader = File::open(&path).expect("open");
    assert!(maps_shared(&reader), "passed through: only then can a direct file be mapped shared");
    let writer = open_for(&path, true, 0).expect("a writer beside a reader");
    for (index, file) in [&early, &writer].into_iter().enumerate() {
        let at = 100_000 + index * 5000;
        file.write_all_at(&[0xA0 | u8::try_from(index).expect("small"); 4321], at as u64).expect("write");
        model[at..at + 4321].fill(0xA0 | u8::try_from(index).expect("small"));
        for reading in [&early, &reader, &writer] {
            let mut got = vec![0; size];
            reading.read_exact_at(&mut got, 0).expect("read");
            assert!(got == model, "writer {index}");
        }
    }
    assert_eq!(disk.dirty().expect("dirty").bytes(), size as u64, "what writers change stays known");
    drop((early, reader, writer));
    assert_eq!(fs::read(&path).expect("read"), model);
    door.stop().expect("stop");
}

#[expect(unsafe_code, reason = "whether a file can be mapped shared is only told by mapping it")]
fn maps_shared(file: &File) -> bool {
    // SAFETY: a new mapping at an address of the kernel's choice, never read, unmapped at once.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0);
        at != libc::MAP_FAILED && libc::munmap(at, 4096) == 0
    }
}
