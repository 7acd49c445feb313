//! Promise: every file system tool works on a restore point. A disk served as a file is also a block
//! device: partitions are found, file systems mount, check clean and take writes, and the device goes
//! with its last user.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    time::{Duration, Instant},
};

use aquifer_formats::storage::{Access, FileStorage};
use aquifer_mount::{
    fuse::{Audience, FuseDoor, FuseFile, FuseOptions, MountAccess},
    loopdev::{Detached, LoopAccess, LoopDevice, Partition, SectorSize},
};
use aquifer_tests::door::{chain, pattern, writable};
use aquifer_vdisk::Disk;

const MIB: u64 = 1 << 20;

fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {words}");
    output
}

fn text(path: &Path) -> &str {
    path.to_str().expect("utf-8")
}

/// A disk of 64 MiB with a GUID partition table: 8 MiB of nothing, then ext4 that holds `hello`.
fn image(dir: &Path) -> PathBuf {
    let (disk, part, tree) = (dir.join("disk.img"), dir.join("part.img"), dir.join("tree"));
    fs::create_dir(&tree).expect("folder");
    fs::write(tree.join("hello"), pattern(3 << 20, 4)).expect("file");
    File::create(&part).and_then(|f| f.set_len(48 * MIB)).expect("part");
    run("mkfs.ext4", &["-q", "-F", "-d", text(&tree), text(&part)]);
    File::create(&disk).and_then(|f| f.set_len(64 * MIB)).expect("disk");
    run("sgdisk", &["-n", "1:2048:+8M", "-n", "2:20480:+48M", "-c", "2:data", text(&disk)]);
    let out = File::options().write(true).open(&disk).expect("open");
    out.write_all_at(&fs::read(&part).expect("part"), 20_480 * 512).expect("copy");
    disk
}

fn door(dir: &Path, disk: Arc<Disk>) -> FuseDoor {
    let options = FuseOptions { audience: Audience::Owner, access: MountAccess::ReadWrite };
    FuseDoor::open(dir, options, vec![FuseFile { disk, raw: None }]).expect("mount")
}

/// The device's partitions. A kernel built without the parsers is told of them by util-linux.
fn partitions(device: &LoopDevice) -> Vec<Partition> {
    if device.partitions().expect("partitions").is_empty() {
        run("partx", &["-a", text(device.path())]);
    }
    device.partitions().expect("partitions")
}

/// Unmounts when it goes, so that a failing test leaves nothing in the way of the next.
struct Mounted(PathBuf);

impl Mounted {
    fn new(what: &Path, at: &Path, options: &str) -> Self {
        fs::create_dir_all(at).expect("folder");
        run("mount", &["-o", options, text(what), text(at)]);
        Self(at.to_path_buf())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_restore_point_is_a_disk_to_every_tool() {
    let (tmp, mnt) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
    let image = image(tmp.path());
    let before = fs::read(&image).expect("read");
    let storage = FileStorage::open(&image, Access::ReadOnly).expect("open");
    let door = door(&mnt.path().join("disks"), Arc::new(Disk::read_only("vda", chain(Arc::new(storage)))));
    // Where nobody makes nodes for partitions an offset does, and no device of ours is needed.
    let offset = format!("ro,loop,norecovery,offset={}", 10 * MIB);
    let by_offset = Mounted::new(&door.path("vda"), &mnt.path().join("by-offset"), &offset);
    assert!(fs::read(by_offset.0.join("hello")).expect("read") == pattern(3 << 20, 4));
    drop(by_offset);

    let device = LoopDevice::attach(&door.path("vda"), LoopAccess::ReadOnly, SectorSize::B512).expect("attach");
    let listing = run("fdisk", &["-l", text(device.path())]).stdout;
    let listing = String::from_utf8_lossy(&listing);
    assert!(listing.contains("64 MiB") && listing.contains("gpt"), "{listing}");
    assert!(listing.contains("48M"), "{listing}");
    let partitions = partitions(&device);
    let places: Vec<_> = partitions.iter().map(|p| (p.number, p.offset, p.len)).collect();
    assert_eq!(places, [(1, MIB, 8 * MIB), (2, 10 * MIB, 48 * MIB)]);

    run("e2fsck", &["-f", "-n", text(&partitions[1].path)]);
    let mounted = Mounted::new(&partitions[1].path, &mnt.path().join("by-node"), "ro");
    assert!(fs::read(mounted.0.join("hello")).expect("read") == pattern(3 << 20, 4));
    assert!(fs::write(mounted.0.join("new"), "x").is_err(), "read-only");
    assert!(File::options().write(true).open(device.path()).and_then(|mut f| f.write_all(&[0; 512])).is_err());
    let path = device.path().to_owned();
    assert_eq!(device.detach().expect("detach"), Detached::InUse, "mounted");
    assert!(fs::read(mounted.0.join("hello")).is_ok(), "its user goes on");
    drop(mounted);
    wait_free(&path);
    door.stop().expect("stop");
    assert!(fs::read(&image).expect("read") == before, "not a byte of the source has changed");
}

fn wait_free(device: &Path) {
    let backing = Path::new("/sys/block").join(device.file_name().expect("name")).join("loop/backing_file");
    let start = Instant::now();
    while backing.exists() {
        assert!(start.elapsed() < Duration::from_secs(10), "{} is freed", device.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_writable_disk_takes_a_file_systems_writes() {
    let (tmp, mnt) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
    let image = image(tmp.path());
    let before = fs::read(&image).expect("read");
    let over = tmp.path().join("over");
    fs::create_dir(&over).expect("folder");
    let storage = FileStorage::open(&image, Access::ReadOnly).expect("open");
    let disk = writable("vda", Arc::new(storage), &over);
    let door = door(&mnt.path().join("disks"), disk.clone());
    let device = LoopDevice::attach(&door.path("vda"), LoopAccess::ReadWrite, SectorSize::B512).expect("attach");
    let node = partitions(&device)[1].path.clone();
    let mounted = Mounted::new(&node, &mnt.path().join("fs"), "rw");
    for round in 0..6u64 {
        let bytes = pattern(1_500_000, 100 + round);
        fs::write(mounted.0.join(format!("file{}", round % 4)), bytes).expect("write");
        run("sync", &["-f", text(&mounted.0)]);
    }
    fs::remove_file(mounted.0.join("file1")).expect("remove");
    run("fstrim", &[text(&mounted.0)]);
    drop(mounted);
    run("e2fsck", &["-f", "-n", text(&node)]);
    let path = device.path().to_owned();
    assert_eq!(device.detach().expect("detach"), Detached::Gone);
    wait_free(&path);

    // The same file system, through the disk itself.
    let copy = tmp.path().join("copy.img");
    let mut bytes = vec![0; 48 << 20];
    disk.read(20_480 * 512, &mut bytes).expect("read");
    fs::write(&copy, &bytes).expect("copy");
    run("e2fsck", &["-f", "-n", text(&copy)]);
    for (name, seed) in [("hello", 4), ("file0", 104), ("file2", 102), ("file3", 103)] {
        let out = tmp.path().join("out");
        run("debugfs", &["-R", &format!("dump {name} {}", text(&out)), text(&copy)]);
        let want = if name == "hello" { pattern(3 << 20, seed) } else { pattern(1_500_000, seed) };
        let want = if name == "file0" { pattern(1_500_000, 104) } else { want };
        assert!(fs::read(&out).expect("dumped") == want, "{name}");
    }
    door.stop().expect("stop");
    assert!(fs::read(&image).expect("read") == before, "not a byte of the source has changed");
}

#[test]
fn devices_are_apart_and_of_the_asked_sector_size() {
    let mnt = tempfile::tempdir().expect("tempdir");
    let disks = [("a", 1), ("b", 2)].map(|(name, seed)| aquifer_tests::door::read_only(name, pattern(1 << 20, seed)));
    let options = FuseOptions { audience: Audience::Owner, access: MountAccess::ReadOnly };
    let files = disks.into_iter().map(|disk| FuseFile { disk, raw: None }).collect();
    let door = FuseDoor::open(&mnt.path().join("disks"), options, files).expect("mount");
    let sizes = [SectorSize::B512, SectorSize::B4096];
    let devices: Vec<_> = ["a", "b"]
        .into_iter()
        .zip(sizes)
        .map(|(name, sectors)| LoopDevice::attach(&door.path(name), LoopAccess::ReadOnly, sectors).expect("attach"))
        .collect();
    assert_ne!(devices[0].path(), devices[1].path());
    for (device, (seed, sectors)) in devices.iter().zip([(1, "512"), (2, "4096")]) {
        let mut got = vec![0; 1 << 20];
        File::open(device.path()).and_then(|mut f| f.read_exact(&mut got)).expect("read");
        assert!(got == pattern(1 << 20, seed), "{}", device.path().display());
        let name = device.path().file_name().expect("name").to_str().expect("utf-8").to_owned();
        let says = |what: &str| fs::read_to_string(format!("/sys/block/{name}/{what}")).expect("sysfs");
        assert_eq!(says("queue/logical_block_size").trim(), sectors);
        assert_eq!((says("ro").trim(), says("loop/dio").trim()), ("1", "1"), "read-only and direct");
        let mut end = File::open(device.path()).expect("open");
        assert_eq!(end.seek(SeekFrom::End(0)).expect("seek"), 1 << 20);
    }
    for device in devices {
        let path = device.path().to_owned();
        device.detach().expect("detach");
        wait_free(&path);
    }
    door.stop().expect("stop");
    let nothing = LoopDevice::attach(Path::new("/nonexistent"), LoopAccess::ReadOnly, SectorSize::B512);
    assert!(nothing.is_err_and(|e| e.to_string().starts_with("/nonexistent: open")));
}
