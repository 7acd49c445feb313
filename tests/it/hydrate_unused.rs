//! Promise: what hydration calls unused is unused. The judge is e2fsprogs: what `dumpe2fs` calls free, in runs long enough, is exactly what is found; for a file system that
//! was not unmounted it may be less, and never anything else. Where anybody else may own the bytes, or no file system lives any more, nothing is unused.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use aquifer_vdisk::{
    Delta, Result,
    unused::{FileSystem, Unused, Volume, find},
};

const MIB: u64 = 1 << 20;

/// Type of a GPT partition with a file system of Linux, 0FC63DAF-8483-4772-8E79-3D69D8477DE4, as it is stored.
const LINUX: [u8; 16] =
    [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4];

fn tool(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let ok = output.status.success() || program == "e2fsck" && output.status.code() < Some(4);
    assert!(ok, "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// A file system of `mib` MiB with some files, made by `mkfs.ext4` with these options.
fn make(dir: &Path, name: &str, mib: u64, options: &[&str]) -> PathBuf {
    let tree = dir.join("tree");
    if !tree.exists() {
        fs::create_dir_all(tree.join("a/b")).expect("tree");
        for file in 0..40usize {
            fs::write(tree.join(format!("a/b/{file}")), vec![7; file * 11_111]).expect("file");
        }
        fs::write(tree.join("large"), vec![9; 5 << 20]).expect("file");
    }
    let path = dir.join(name);
    let size = format!("{mib}M");
    let args = [&["-q", "-F", "-d", text(&tree)], options, &[text(&path), &size]].concat();
    File::create(&path).and_then(|f| f.set_len(mib * MIB)).expect("image");
    tool("mkfs.ext4", &args);
    path
}

/// A folder whose files are never written to a disk, where there is such a place: syncs cost nothing there.
fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("folder")
}

/// CRC-32 (IEEE).
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// Free bytes in whole blocks of the disk, without short runs.
fn runs(free: Delta) -> Delta {
    let inwards = free.iter().map(|r| r.start.next_multiple_of(4096)..r.end - r.end % 4096);
    inwards.filter(|r| r.start < r.end && r.end - r.start >= 64 << 10).collect()
}

/// Free blocks by `dumpe2fs`, as bytes.
fn free(path: &Path) -> Delta {
    let said = tool("dumpe2fs", &[text(path)]);
    let number = |name: &str| -> u64 {
        let line = said.lines().find(|line| line.starts_with(name)).expect(name);
        line.rsplit(' ').next().and_then(|n| n.parse().ok()).expect(name)
    };
    let block = number("Block size:");
    let mut ranges = Vec::new();
    for line in said.lines().filter_map(|line| line.strip_prefix("  Free blocks: ")) {
        for run in line.split(", ").filter(|run| !run.is_empty()) {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            let (first, last): (u64, u64) = (first.parse().expect("block"), last.parse().expect("block"));
            ranges.push(first * block..(last + 1) * block);
        }
    }
    ranges.into_iter().collect()
}

fn find_in(path: &Path) -> Unused {
    let file = File::open(path).expect("image");
    let size = file.metadata().expect("size").len();
    let read = |at: u64, buf: &mut [u8]| {
        file.read_exact_at(buf, at).map_err(|e| aquifer_formats::Error::io("image", "read", at, e).into())
    };
    find(size, &read).expect("it reads")
}

fn only(found: &Unused) -> &Volume {
    assert_eq!(found.volumes.len(), 1, "{found:?}");
    &found.volumes[0]
}

#[test]
fn what_is_found_is_what_the_tools_call_free() {
    let dir = in_memory();
    let cases: &[(&str, u64, &[&str])] = &[
        ("default", 300, &[]),
        ("small blocks", 70, &["-b", "1024"]),
        ("odd size", 171, &["-b", "2048"]),
        ("no flexible groups", 400, &["-O", "^flex_bg"]),
        ("meta groups", 400, &["-O", "meta_bg,^resize_inode"]),
        ("meta groups of small blocks", 300, &["-b", "1024", "-O", "meta_bg,^resize_inode"]),
        ("old checksums", 300, &["-O", "^metadata_csum,uninit_bg"]),
        ("old checksums, 32 bits", 300, &["-O", "^metadata_csum,uninit_bg,^64bit"]),
        ("32 bits", 300, &["-O", "^64bit"]),
        ("no checksums", 300, &["-O", "^metadata_csum,^uninit_bg"]),
        ("no journal", 300, &["-O", "^has_journal"]),
        ("ext3", 100, &["-t", "ext3"]),
        ("ext2", 100, &["-t", "ext2"]),
        ("few copies", 500, &["-O", "sparse_super2"]),
        ("seed of its own", 200, &["-O", "metadata_csum_seed"]),
        ("small groups", 64, &["-b", "1024", "-g", "1024"]),
        ("many features", 300, &["-O", "inline_data,encrypt,casefold,ea_inode,quota,project,verity,large_dir"]),
        ("many groups", 2_000, &["-b", "1024", "-O", "^has_journal"]),
        ("64 GiB", 1 << 16, &["-E", "lazy_itable_init=1,lazy_journal_init=1"]),
    ];
    for (number, (what, mib, options)) in cases.iter().enumerate() {
        let path = make(dir.path(), &format!("fs{number}"), *mib, options);
        let found = find_in(&path);
        let volume = only(&found);
        assert_eq!((volume.file_system, volume.doubt), (FileSystem::Ext4, None), "{what}");
        let truth = runs(free(&path));
        if what.starts_with("meta groups") {
            // A few blocks more count as used at the start of groups that were never used.
            let missed = truth.subtract(&found.ranges).bytes();
            assert!(found.ranges.subtract(&truth).is_empty() && missed * 50 < truth.bytes(), "{what}: {missed}");
        } else {
            assert_eq!(found.ranges, truth, "{what}");
        }
        assert!(found.ranges.bytes() > mib * MIB / 2 && volume.unused == found.ranges.bytes(), "{what}: {volume:?}");
        fs::remove_file(path).expect("remove");
    }
}

#[test]
fn what_is_not_known_counts_as_used() {
    let dir = in_memory();
    let path = make(dir.path(), "clusters", 200, &["-O", "bigalloc"]);
    assert_eq!(only(&find_in(&path)).doubt, Some("it counts in clusters"));
    assert!(find_in(&path).ranges.is_empty());

    let path = make(dir.path(), "errors", 100, &[]);
    tool("debugfs", &["-w", "-R", "set_super_value state 3", text(&path)]);
    assert_eq!(only(&find_in(&path)).doubt, Some("it has noted errors"));

    let path = make(dir.path(), "live", 100, &["-O", "^has_journal"]);
    tool("debugfs", &["-w", "-R", "set_super_value state 0", text(&path)]);
    assert_eq!(only(&find_in(&path)).doubt, Some("it was not unmounted"));

    let path = make(dir.path(), "cut", 100, &[]);
    File::options().write(true).open(&path).and_then(|f| f.set_len(60 * MIB)).expect("cut");
    assert_eq!(only(&find_in(&path)).doubt, Some("it is larger than its partition"));

    for (name, at, bytes) in [("xfs", 0, &b"XFSB"[..]), ("ntfs", 3, b"NTFS    "), ("other", 0, b"LUKS")] {
        let path = dir.path().join(name);
        let file = File::create(&path).expect("image");
        file.set_len(10 * MIB).and_then(|()| file.write_all_at(bytes, at)).expect("image");
        let found = find_in(&path);
        assert!(found.ranges.is_empty() && only(&found).doubt.is_none());
        assert_eq!(format!("{:?}", only(&found).file_system).to_lowercase(), name);
    }
}

/// Every byte that is counted with is covered by a checksum, or contradicts something when it changes.
#[test]
fn a_bitmap_that_was_damaged_is_not_believed() {
    let dir = in_memory();
    for (options, checked) in [(&[][..], true), (&["-O", "^metadata_csum,^uninit_bg"][..], false)] {
        let path = make(dir.path(), "fs", 300, options);
        let good = find_in(&path);
        let said = tool("dumpe2fs", &[text(&path)]);
        let line = said.lines().find(|line| line.contains("Block bitmap at")).expect("a bitmap");
        let bitmap: u64 = line.split_whitespace().nth(3).and_then(|n| n.parse().ok()).expect("its block");
        let bitmap = bitmap * if said.contains("Block size:               1024") { 1024 } else { 4096 };
        let file = File::options().read(true).write(true).open(&path).expect("image");
        let mut bits = [0; 64];
        file.read_exact_at(&mut bits, bitmap).expect("bits");
        for byte in [0, 31, 63] {
            let mut bad = bits;
            bad[byte] ^= 0x10;
            file.write_all_at(&bad, bitmap).expect("write");
            let found = find_in(&path);
            assert!(only(&found).doubt.is_some() && found.ranges.is_empty(), "byte {byte}, checksums: {checked}");
        }
        if checked {
            // A used block that says it is free, with the same number of free ones.
            let mut bad = bits;
            bad[0] ^= 1;
            bad[63] ^= 1;
            file.write_all_at(&bad, bitmap).expect("write");
            assert!(only(&find_in(&path)).doubt.is_some());
        }
        file.write_all_at(&bits, bitmap).expect("write");
        assert_eq!(find_in(&path), good);
    }
}

#[test]
fn partitions_of_every_table_are_found_and_doubts_skip_nothing() {
    let dir = in_memory();
    let fs_path = make(dir.path(), "fs", 60, &[]);
    let fs_bytes = fs::read(&fs_path).expect("fs");
    let put = |path: &Path, at: u64| {
        let file = File::options().write(true).open(path).expect("disk");
        file.write_all_at(&fs_bytes, at).expect("write");
    };
    let blank = |name: &str| {
        let path = dir.path().join(name);
        File::create(&path).and_then(|f| f.set_len(300 * MIB)).expect("disk");
        path
    };
    // Written here: partitioning tools sync the whole computer.
    let mbr = |path: &Path, at: u64, entries: &[(u8, u32, u32)]| {
        let file = File::options().write(true).open(path).expect("disk");
        for (slot, (kind, start, sectors)) in (0u64..).zip(entries) {
            let mut entry = [0; 16];
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&start.to_le_bytes());
            entry[12..].copy_from_slice(&sectors.to_le_bytes());
            file.write_all_at(&entry, at + 446 + slot * 16).expect("write");
        }
        file.write_all_at(&[0x55, 0xaa], at + 510).expect("write");
    };
    let gpt = |path: &Path, partitions: &[(u64, u64)]| {
        mbr(path, 0, &[(0xee, 1, u32::MAX)]);
        let mut table = vec![0u8; 128 * 128];
        for (entry, (start, sectors)) in table.chunks_exact_mut(128).zip(partitions) {
            entry[..16].copy_from_slice(&LINUX);
            entry[16..32].fill(7);
            entry[32..40].copy_from_slice(&start.to_le_bytes());
            entry[40..48].copy_from_slice(&(start + sectors - 1).to_le_bytes());
        }
        let mut header = [0u8; 92];
        header[..8].copy_from_slice(b"EFI PART");
        for (at, value) in [(8, 0x1_0000), (12, 92), (72, 2), (80, 128), (84, 128), (88, crc32(&table))] {
            header[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
        }
        let crc = crc32(&header);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        let file = File::options().write(true).open(path).expect("disk");
        file.write_all_at(&header, 512).and_then(|()| file.write_all_at(&table, 1024)).expect("write");
    };
    let expected = |at: u64| -> Delta {
        let fs = free(&fs_path);
        runs(fs.iter().map(|r| r.start + at..r.end + at).collect())
    };

    let path = blank("gpt");
    gpt(&path, &[(2048, 20_480), (206_848, 122_880)]);
    // The tools read it as it is meant.
    let listed = tool("sgdisk", &["-i", "2", text(&path)]);
    assert!(listed.contains("First sector: 206848"), "{listed}");
    put(&path, 101 * MIB);
    let found = find_in(&path);
    assert_eq!((found.volumes.len(), &found.ranges), (2, &expected(101 * MIB)));
    let damaged = File::options().write(true).open(&path).expect("disk");
    damaged.write_all_at(b"x", 1024 + 40).expect("write");
    assert_eq!(find_in(&path).doubt, Some("a GPT with another checksum"));

    let path = blank("mbr");
    mbr(&path, 0, &[(0x83, 2048, 20_480), (5, 40_960, 524_288)]);
    mbr(&path, 40_960 * 512, &[(0x82, 2048, 4096), (5, 163_840, 130_000)]);
    mbr(&path, (40_960 + 163_840) * 512, &[(0x83, 2048, 122_880)]);
    put(&path, 101 * MIB);
    let found = find_in(&path);
    assert_eq!((found.volumes.len(), &found.ranges), (3, &expected(101 * MIB)), "{found:?}");

    // 63 sectors, as disks once began: blocks of the file system lie across blocks of the disk.
    let path = blank("old");
    mbr(&path, 0, &[(0x83, 63, 122_880)]);
    put(&path, 63 * 512);
    let found = find_in(&path);
    assert_eq!(found.ranges, expected(63 * 512));
    assert!(found.ranges.iter().all(|r| r.start % 4096 == 0 && r.end % 4096 == 0));

    let path = blank("both");
    put(&path, 0);
    mbr(&path, 0, &[(0x83, 2048, 65_536)]);
    assert_eq!(find_in(&path).doubt, Some("a partition table and a file system in one place"));

    let path = blank("overlap");
    mbr(&path, 0, &[(0x83, 2048, 4096), (0x83, 6143, 4096)]);
    assert_eq!(find_in(&path).doubt, Some("partitions overlap"));
    let found = find_in(&blank("empty"));
    assert_eq!(only(&found).file_system, FileSystem::Other);
}

/// A source that is away is no doubt: it is asked again.
#[test]
fn a_read_that_may_succeed_later_is_told_apart_from_damage() {
    let away = |at: u64, _: &mut [u8]| -> Result<()> {
        let error = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        Err(aquifer_formats::Error::io("s", "read", at, error).into())
    };
    assert!(find(MIB, &away).is_err());
    let damaged = |at: u64, _: &mut [u8]| -> Result<()> { Err(aquifer_formats::Error::corrupt("s", at, "bad").into()) };
    assert_eq!(find(MIB, &damaged).expect("a doubt").doubt, Some("it is damaged in the source"));
    assert!(find(100, &damaged).expect("a doubt").doubt.is_some(), "smaller than any table");
}

/// Copies of a file system taken while it works: blocks that the journal will bring back are never called unused.
#[test]
fn a_journal_that_is_to_be_replayed_is_heeded() {
    let dir = in_memory();
    let (mut replayed, mut believed) = (0, 0);
    for (number, options) in [&[][..], &["-b", "1024"], &["-O", "^metadata_csum,uninit_bg,^64bit"]].iter().enumerate() {
        let path = make(dir.path(), &format!("live{number}"), 200, options);
        let mount = dir.path().join(format!("mnt{number}"));
        fs::create_dir(&mount).expect("folder");
        tool("mount", &["-o", "loop,commit=1", text(&path), text(&mount)]);
        for round in 0..4usize {
            for file in 0..60usize {
                let name = mount.join(format!("f{round}-{file}"));
                fs::write(&name, vec![round as u8 + 1; 1 + file * 7919]).expect("file");
                if file % 3 == 0 && round > 0 {
                    fs::remove_file(mount.join(format!("f{}-{file}", round - 1))).expect("remove");
                }
            }
            tool("sync", &["-f", text(&mount)]);
            let copy = dir.path().join("copy");
            tool("cp", &["--sparse=always", text(&path), text(&copy)]);
            let found = find_in(&copy);
            let volume = only(&found).clone();
            tool("e2fsck", &["-fy", text(&copy)]);
            let truth = free(&copy);
            let lost = found.ranges.subtract(&truth);
            assert!(lost.is_empty(), "case {number} round {round}: used after the replay: {lost:?}");
            replayed += 1;
            believed += usize::from(volume.doubt.is_none() && volume.unused > 50 * MIB);
        }
        tool("umount", &[text(&mount)]);
    }
    assert!(believed * 3 >= replayed * 2, "{believed} of {replayed} could be read");
}

/// Puts `bytes` at a place of an image, and hands back what was there.
fn swap(path: &Path, at: u64, bytes: &[u8]) -> Vec<u8> {
    let file = File::options().read(true).write(true).open(path).expect("image");
    let mut before = vec![0; bytes.len()];
    file.read_exact_at(&mut before, at).and_then(|()| file.write_all_at(bytes, at)).expect("swap");
    before
}

/// Marks that arrays, pools, containers and other file systems leave; places count from the start or, negative, the end.
const MARKS: &[(i64, &[u8], &str)] = &[
    (0, b"\xfc\x4e\x2b\xa9", "it is a member of a RAID"),
    (4096, b"\xfc\x4e\x2b\xa9", "it is a member of a RAID"),
    (-8192, b"\xfc\x4e\x2b\xa9", "it is a member of a RAID"),
    (-65_536, b"\xfc\x4e\x2b\xa9", "it is a member of a RAID"),
    (-65_536, b"\xa9\x2b\x4e\xfc", "it is a member of a RAID"),
    (-1024, b"Intel Raid ISM Cfg Sig. ", "it is a member of a RAID"),
    (-512, b"\xde\x11\xde\x11", "it is a member of a RAID"),
    (4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca", "it is a device of bcache"),
    (0, b"LABELONE", "it is a volume of LVM"),
    (512, b"LABELONE", "it is a volume of LVM"),
    (1024, b"LABELONE", "it is a volume of LVM"),
    (1536, b"LABELONE", "it is a volume of LVM"),
    (0, b"LUKS\xba\xbe\0\x02", "it is encrypted by LUKS"),
    (16 << 10, b"SKUL\xba\xbe\0\x02", "it is encrypted by LUKS"),
    (4 << 20, b"SKUL\xba\xbe\0\x02", "it is encrypted by LUKS"),
    (3, b"-FVE-FS-", "it is encrypted by BitLocker"),
    (3, b"NTFS    ", "it has a boot sector of NTFS"),
    (54, b"FAT16   ", "it has a boot sector of FAT"),
    (82, b"FAT32   ", "it has a boot sector of FAT"),
    (3, b"EXFAT   ", "it has a boot sector of FAT"),
    (0, b"XFSB", "it has a superblock of XFS"),
    ((64 << 10) + 64, b"_BHRfS_M", "it has a superblock of Btrfs"),
    ((64 << 20) + 64, b"_BHRfS_M", "it has a superblock of Btrfs"),
    ((64 << 10) + 1372, b"\x19\x01\x54\x19", "it has a superblock of UFS"),
    ((64 << 10) + 1372, b"\x19\x54\x01\x19", "it has a superblock of UFS"),
    (1024, b"\x10\x20\xf5\xf2", "it has a superblock of F2FS"),
    (0, b"SnAp\x01\0\0\0", "it is a part of a mapped device"),
    (0, b"HM\x01\0", "it is a volume of LVM"),
    (2048, b"OCFSV2", "it has a superblock of OCFS2"),
    (8192, b"OCFSV2", "it has a superblock of OCFS2"),
    (8192, b"\x49\xe8\x95\xf9", "it has a superblock of HPFS"),
    (8192, b"\x22\x11\x19\x68", "it has a superblock of QNX"),
    (64 << 10, b"ReIsEr4", "it has a superblock of Reiser4"),
    (32_769, b"BEA01\x01", "it has a file system of optical discs"),
    (32_769, b"CD001\x01", "it has a file system of optical discs"),
    (4086, b"SWAPSPACE2", "it is swap space"),
    (65_526, b"SWAPSPACE2", "it is swap space"),
    (4086, b"S1SUSPEND\0", "it is swap space"),
    (-4096 + 60, b"\x83\x74\x02\x6d", "it is a device of DRBD"),
    (128 << 10, b"\x0c\xb1\xba\0\0\0\0\0", "it is a device of ZFS"),
    ((512 << 10) - 1024, b"\0\0\0\0\0\xba\xb1\x0c", "it is a device of ZFS"),
    (-(384 << 10), b"\x0c\xb1\xba\0\0\0\0\0", "it is a device of ZFS"),
    (-8192, b"\x0c\xb1\xba\0\0\0\0\0", "it is a device of ZFS"),
];

#[test]
fn a_mark_of_another_owner_is_a_doubt() {
    let dir = in_memory();
    let path = make(dir.path(), "fs", 80, &["-b", "1024"]);
    let good = find_in(&path);
    assert!(only(&good).unused > 30 * MIB, "{good:?}");
    for (place, mark, whose) in MARKS {
        let at = if *place < 0 { 80 * MIB - place.unsigned_abs() } else { place.unsigned_abs() };
        let before = swap(&path, at, mark);
        let found = find_in(&path);
        assert!(found.ranges.is_empty(), "{whose} at {place}");
        assert!(only(&found).doubt == Some(whose), "{whose} at {place}: {found:?}");
        swap(&path, at, &before);
    }
    assert_eq!(find_in(&path), good, "without the marks");
}

/// An old superblock with intact bitmaps proves nothing where no file system lives any more.
#[test]
fn a_superblock_that_outlived_its_file_system_is_not_believed() {
    let dir = in_memory();
    for options in
        [&["-b", "1024"][..], &["-b", "1024", "-O", "^metadata_csum,^uninit_bg,^has_journal"], &["-b", "4096"]]
    {
        let path = make(dir.path(), "fs", 160, options);
        let good = find_in(&path);
        assert!(good.ranges.bytes() > 60 * MIB, "{good:?}");
        let said = tool("dumpe2fs", &[text(&path)]);
        let block: u64 = if options[1] == "1024" { 1024 } else { 4096 };
        // A copy that is another file system's, one that is gone.
        let backups = said.lines().filter_map(|line| line.trim().strip_prefix("Backup superblock at "));
        let backups: Vec<u64> =
            backups.filter_map(|rest| rest.split([',', ' ']).next()?.parse().ok()).map(|b: u64| b * block).collect();
        assert!(!backups.is_empty(), "{said}");
        for backup in backups {
            for (at, bytes) in [(backup + 0x68, &[0x77; 16][..]), (backup + 0x38, &[0; 2])] {
                let before = swap(&path, at, bytes);
                let found = find_in(&path);
                assert_eq!(only(&found).doubt, Some("a copy of its superblock is another's"), "{options:?}");
                assert!(found.ranges.is_empty());
                swap(&path, at, &before);
            }
        }
        // The root folder's block, then its inode.
        let stat = tool("debugfs", &["-R", "blocks <2>", text(&path)]);
        let root: u64 = stat.split_whitespace().next().and_then(|b| b.parse().ok()).expect("a block");
        let place = tool("debugfs", &["-R", "imap <2>", text(&path)]);
        let inode: u64 = place
            .split_once("located at block ")
            .expect("a place")
            .1
            .split([',', ' '])
            .next()
            .and_then(|b| b.parse().ok())
            .expect("a block");
        let offset = place.split_once("offset 0x").expect("an offset").1.trim();
        let inode = inode * block + u64::from_str_radix(offset, 16).expect("an offset");
        for (at, doubt) in [(root * block, "its root folder is damaged"), (inode, "it has no root folder")] {
            let before = swap(&path, at, &[0x5a; 64]);
            let found = find_in(&path);
            assert_eq!((only(&found).doubt, found.ranges.is_empty()), (Some(doubt), true), "{options:?}");
            swap(&path, at, &before);
        }
        assert_eq!(find_in(&path), good);
        // All that a member of an array writes, were its own mark not known: data from 1 MiB on.
        let file = File::options().write(true).open(&path).expect("image");
        for mib in 1..160 {
            file.write_all_at(&vec![0x5a; 1 << 20], mib * MIB).expect("write");
        }
        let found = find_in(&path);
        assert!(only(&found).doubt.is_some() && found.ranges.is_empty(), "{options:?}: {found:?}");
    }
}

/// An MBR with one partition of a kind at 1 MiB.
fn one_partition(path: &Path, kind: u8, sectors: u32) {
    let mut sector = [0; 512];
    sector[450] = kind;
    sector[454..458].copy_from_slice(&2048u32.to_le_bytes());
    sector[458..462].copy_from_slice(&sectors.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    swap(path, 0, &sector);
}

#[test]
fn only_partitions_of_linux_file_systems_are_believed() {
    let dir = in_memory();
    let fs_bytes = fs::read(make(dir.path(), "fs", 60, &[])).expect("fs");
    let path = dir.path().join("disk");
    let size = 64 * MIB;
    File::create(&path).and_then(|f| f.set_len(size)).expect("disk");
    swap(&path, MIB, &fs_bytes);
    // RAID, LVM, swap, NTFS, FreeBSD, Solaris, a firmware's.
    for kind in [0xfd, 0x8e, 0x82, 0x07, 0xa5, 0xbf, 0xef] {
        one_partition(&path, kind, 60 << 11);
        let found = find_in(&path);
        assert!(found.ranges.is_empty(), "{kind:#x}");
        assert_eq!(only(&found).doubt, Some("its partition is meant for something else"), "{kind:#x}");
    }
    one_partition(&path, 0x83, 60 << 11);
    let good = find_in(&path);
    assert!(only(&good).doubt.is_none() && good.ranges.bytes() > 30 * MIB, "{good:?}");
    // The disk as a whole is somebody's, with its table.
    for (at, mark, doubt) in [
        (size - 8192, &b"\xfc\x4e\x2b\xa9"[..], "it is a member of a RAID"),
        (size - 65_536, b"\xfc\x4e\x2b\xa9", "it is a member of a RAID"),
        (512, b"LABELONE", "it is a volume of LVM"),
        (size - (64 << 10), b"\x0c\xb1\xba\0\0\0\0\0", "it is a device of ZFS"),
    ] {
        let before = swap(&path, at, mark);
        let found = find_in(&path);
        assert_eq!((found.doubt, found.ranges.is_empty()), (Some(doubt), true));
        swap(&path, at, &before);
    }
    assert_eq!(find_in(&path), good);

    // Each call syncs the whole computer: a few are enough.
    let types = [("8300", true), ("8304", true), ("8306", true), ("8310", true), ("fd00", false), ("8200", false)];
    for (kind, believed) in types {
        // Both copies of the table before.
        for at in [0, size - 34 * 512] {
            swap(&path, at, &[0; 34 * 512]);
        }
        tool("sgdisk", &["-n", &format!("1:2048:{}", 2047 + (60 << 11)), "-t", &format!("1:{kind}"), text(&path)]);
        let found = find_in(&path);
        assert_eq!((only(&found).doubt.is_none(), found.ranges.is_empty()), (believed, !believed), "{kind}: {found:?}");
    }
}

/// A partition that became the disk of a nested machine: its table leaves the old superblock where it was.
#[test]
fn a_partition_that_is_a_disk_itself_is_not_believed() {
    let dir = in_memory();
    let fs = make(dir.path(), "fs", 80, &["-b", "4096"]);
    let path = dir.path().join("disk");
    let size = 82 * MIB;
    let disk = File::create(&path).and_then(|file| file.set_len(size).map(|()| file)).expect("disk");
    disk.write_all_at(&fs::read(&fs).expect("read"), MIB).expect("write");
    one_partition(&path, 0x83, 80 * 2048);
    let good = find_in(&path);
    assert!(only(&good).unused > 30 * MIB && only(&good).doubt.is_none(), "{good:?}");
    let table = |flag: u8, kind: u8, start: u32, sectors: u32| {
        let mut sector = vec![0; 512];
        sector[446] = flag;
        sector[450] = kind;
        sector[454..458].copy_from_slice(&start.to_le_bytes());
        sector[458..462].copy_from_slice(&sectors.to_le_bytes());
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        sector
    };
    let inside = [
        (0, table(0x80, 0x07, 2048, 70 * 2048)),
        (0, table(0, 0x83, 63, 1000)),
        (0, table(0, 0xee, 1, u32::MAX)),
        (0, table(0, 0x83, 2048, u32::MAX)),
        (512, b"EFI PART".to_vec()),
        (4096, b"EFI PART".to_vec()),
    ];
    for (at, bytes) in inside {
        let before = swap(&path, MIB + at, &bytes);
        let found = find_in(&path);
        assert_eq!(only(&found).doubt, Some("it has a partition table of its own"), "{at}: {found:?}");
        assert!(found.ranges.is_empty());
        swap(&path, MIB + at, &before);
    }
    // Boot code of a file system ends with the same two bytes, and is no table.
    for code in [table(0x90, 0x90, 0x9090_9090, 0x9090_9090), table(0, 0x83, u32::MAX, 8), table(0, 0, 0, 0)] {
        let before = swap(&path, MIB, &code);
        assert_eq!(find_in(&path), good);
        swap(&path, MIB, &before);
    }
}

/// The copies of a superblock follow when a file system grows or shrinks, and when it gets another identity.
#[test]
fn a_file_system_that_was_resized_is_believed() {
    let dir = in_memory();
    for options in [&["-b", "4096"][..], &["-b", "1024", "-O", "^metadata_csum,^uninit_bg"]] {
        let path = make(dir.path(), "fs", 200, options);
        for mib in [600, 300] {
            if mib == 600 {
                File::options().write(true).open(&path).and_then(|f| f.set_len(mib * MIB)).expect("grown");
            }
            tool("e2fsck", &["-fy", text(&path)]);
            tool("resize2fs", &[text(&path), &format!("{mib}M")]);
            let found = find_in(&path);
            assert_eq!((only(&found).doubt, &found.ranges), (None, &runs(free(&path))), "{mib} MiB, {options:?}");
        }
        tool("e2fsck", &["-fy", text(&path)]);
        tool("tune2fs", &["-U", "random", text(&path)]);
        assert_eq!(only(&find_in(&path)).doubt, None, "{options:?}");
    }
}
