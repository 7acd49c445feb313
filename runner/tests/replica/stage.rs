//! A site in a folder: repositories with backups of a made-up machine, a host for its replica, production's images.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use aquifer_formats::{
    probe::Format,
    repo::{
        DiskName, NewPoint, Repository,
        record::{Consistency, Defaults, DiskDescription, Firmware, Holder, MachineDescription, Owner},
    },
};
use aquifer_runner::{
    catalogue::{Catalogue, Fence},
    fail::{Code, Fail, Result},
    host::{Network, Rooms},
    replica::{
        build::Moved,
        desk::Desk,
        layers,
        model::{Home, HomeDisk, HomeKind, PointRecord},
        rules::Rules,
        run::{Ran, ReplicaSpec, RunOptions, replicate},
    },
};
use aquifer_vdisk::BlockCache;
use jiff::Timestamp;
use parking_lot::Mutex;

use crate::fake::Fake;

pub(crate) const MACHINE: &str = "db01";
pub(crate) const REPLICA: &str = "db01_replica";

/// Runs `qemu-img`; what it says.
pub(crate) fn img(args: &[&str]) -> String {
    let done = Command::new("qemu-img").args(args).output().expect("qemu-img");
    assert!(done.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Numbers that look random and are the same each time.
#[derive(Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound.max(1)
    }
}

/// Disks of a machine, as bytes.
pub(crate) type Disks = Vec<(String, Vec<u8>)>;

/// Changes some grains of a disk; answers how many bytes really changed, in grains of 4 KiB.
pub(crate) fn scribble(bytes: &mut [u8], times: u64, dice: &mut Dice) -> u64 {
    let before = bytes.to_vec();
    for _ in 0..times {
        let grains = (bytes.len() / 4096) as u64;
        let at = dice.below(grains) as usize * 4096;
        let len = (dice.below(5) as usize + 1) * 4096;
        let end = bytes.len().min(at + len);
        let zero = dice.below(4) == 0;
        for byte in &mut bytes[at..end] {
            *byte = if zero { 0 } else { dice.roll() as u8 };
        }
    }
    differing(&before, bytes)
}

/// Bytes of the grains of 4 KiB in which two disks differ.
pub(crate) fn differing(a: &[u8], b: &[u8]) -> u64 {
    let grains = a.chunks(4096).zip(b.chunks(4096));
    grains.filter(|(a, b)| a != b).map(|(a, _)| a.len() as u64).sum()
}

pub(crate) struct Stage {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) catalogue: Catalogue,
    pub(crate) fence: Fence,
    pub(crate) host: Fake,
    pub(crate) me: Owner,
    pub(crate) cache: Arc<BlockCache>,
    pub(crate) warnings: Mutex<Vec<(Code, String)>>,
    pub(crate) options: RunOptions,
    /// Bytes looked at until the connection drops.
    pub(crate) drops_after: Mutex<Option<u64>>,
    /// Notes of the journal until the process dies.
    pub(crate) dies_after: Mutex<Option<u32>>,
}

impl Stage {
    pub(crate) fn new() -> Self {
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.expect("folder");
        let (catalogue, fence) = crate::catalogue_of(dir.path());
        let me = Owner { id: uuid::Uuid::new_v4(), name: "here".into() };
        for name in ["r1", "r2"] {
            fs::create_dir(dir.path().join(name)).expect("folder");
            let defaults =
                Defaults { compression: aquifer_formats::repo::record::CompressionName::Raw, ..Defaults::default() };
            Repository::init(&dir.path().join(name), me.clone(), defaults).expect("repository");
        }
        Self {
            dir,
            catalogue,
            fence,
            host: Fake::default(),
            me,
            cache: Arc::new(BlockCache::new(32 << 20)),
            warnings: Mutex::default(),
            options: RunOptions { keep: 100, mark_bytes: 1 << 20, ..RunOptions::default() },
            drops_after: Mutex::new(None),
            dies_after: Mutex::new(None),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Does something at the desk.
    pub(crate) fn at<T>(&self, act: impl FnOnce(&Desk<'_>) -> T) -> T {
        let pace = |moved: Moved| match &mut *self.drops_after.lock() {
            Some(left) if *left < moved.looked_at() => Err(Fail::new(Code::Net, "the connection dropped")),
            Some(left) => {
                *left -= moved.looked_at();
                Ok(())
            }
            None => Ok(()),
        };
        let warn = |code: Code, what: String| self.warnings.lock().push((code, what));
        let rooms = Rooms::only(self.path("run"));
        let alive = || match &mut *self.dies_after.lock() {
            Some(0) => Err(Fail::new(Code::Terminated, "killed")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        };
        act(&Desk {
            catalogue: &self.catalogue,
            fence: &self.fence,
            host: &self.host,
            rooms: &rooms,
            me: &self.me,
            cache: &self.cache,
            pace: &pace,
            warn: &warn,
            network: Network::None,
            grace: std::time::Duration::ZERO,
            alive: &alive,
        })
    }

    pub(crate) fn warned(&self) -> Vec<Code> {
        self.warnings.lock().drain(..).map(|(code, _)| code).collect()
    }

    pub(crate) fn repository(&self, name: &str) -> Repository {
        Repository::open(&self.path(name), self.me.clone()).expect("repository")
    }

    /// Makes a restore point of `disks`: an increment where there is a point before and `full` is not asked for.
    pub(crate) fn back_up(&self, name: &str, disks: &Disks, full: bool, created: Timestamp) -> uuid::Uuid {
        let repo = self.repository(name);
        let machine = repo.machine_or_new(MACHINE).expect("machine");
        let points = repo.points(&machine).expect("points");
        let parent = if full { None } else { points.last() };
        let holder =
            Holder { name: "test".into(), host: "here".into(), process: std::process::id(), session: None, work: None };
        let mut transaction = repo.begin(&machine, parent, holder).expect("begin");
        crate::write_point(&mut transaction, disks);
        let description = MachineDescription {
            name: MACHINE.into(),
            firmware: Some(Firmware::Bios),
            memory_bytes: Some(192 << 20),
            cpus: Some(3),
            disks: disks
                .iter()
                .map(|(name, bytes)| DiskDescription {
                    name: DiskName::new(name).expect("name"),
                    size: Some(bytes.len() as u64),
                    bus: None,
                    boot_order: None,
                })
                .collect(),
            ..MachineDescription::default()
        };
        let new = NewPoint { created, consistency: Consistency::Off, machine: description, origin: None };
        transaction.commit(new).expect("commit").id
    }

    pub(crate) fn spec(&self) -> ReplicaSpec {
        ReplicaSpec {
            name: REPLICA.into(),
            machine: MACHINE.into(),
            job: Some("dr".into()),
            host: "dr1".into(),
            folder: self.path("dr").join(REPLICA),
            metadata: self.path("meta"),
            repositories: vec![self.path("r1"), self.path("r2")],
            options: self.options,
            rules: Rules::default(),
        }
    }

    pub(crate) fn replicate(&self) -> Result<Ran> {
        self.at(|desk| replicate(desk, &self.spec()))
    }

    /// Replicates, and says what was made.
    pub(crate) fn made(&self) -> Vec<PointRecord> {
        match self.replicate().expect("a run") {
            Ran::Made(points) => points,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn points(&self) -> Vec<PointRecord> {
        self.at(|desk| desk.points(REPLICA)).expect("points")
    }

    pub(crate) fn file(&self, file: &str) -> PathBuf {
        self.path("dr").join(REPLICA).join(file)
    }

    /// Compares a disk with what it should hold, by our reader and by QEMU's.
    pub(crate) fn assert_file(&self, path: &Path, format: Format, bytes: &[u8], what: &str) {
        let cache = Arc::new(BlockCache::new(1 << 20));
        let chain = layers::open(path, format, &cache).unwrap_or_else(|fail| panic!("{what}: {fail}"));
        assert_eq!(chain.size(), bytes.len() as u64, "{what}: size");
        let mut got = vec![0; bytes.len()];
        chain.read(0, &mut got).expect("read");
        if let Some(at) = got.iter().zip(bytes).position(|(a, b)| a != b) {
            panic!("{what}: {} differs at {at}", path.display());
        }
        let raw = self.path("compare.raw");
        fs::write(&raw, bytes).expect("write");
        let (raw, image) = (raw.to_string_lossy(), path.to_string_lossy());
        img(&["compare", "-U", "-f", "raw", "-F", format.name(), &raw, &image]);
        if format == Format::Qcow2 {
            img(&["check", "-q", "-U", "-f", "qcow2", &image]);
        }
    }

    pub(crate) fn assert_point(&self, point: &PointRecord, disks: &Disks) {
        assert_eq!(point.disks.len(), disks.len());
        for (name, bytes) in disks {
            let top = point.disks.iter().find(|top| top.disk == *name).expect("disk");
            self.assert_file(&self.file(&top.file), Format::Qcow2, bytes, &format!("point {} {name}", point.number));
        }
    }

    /// Writes to the disks of a machine that is on, as its guest would; the oracle is what they hold after it.
    pub(crate) fn guest_writes(&self, folder: &Path, disks: &mut Disks, times: u64, dice: &mut Dice) -> u64 {
        let files = self.host.files(folder).expect("the machine is on");
        let mut changed = 0;
        for (file, (_, bytes)) in files.iter().zip(disks) {
            changed += write_into(file, bytes, times, dice);
        }
        changed
    }

    /// Production's images, in their folder.
    pub(crate) fn home(&self, kind: HomeKind) -> Home {
        let folder = self.path("prod").join(MACHINE);
        let disks = [("vda", "qcow2", Format::Qcow2), ("vdb", "raw", Format::Raw)].map(|(disk, ending, format)| {
            HomeDisk { disk: disk.into(), path: folder.join(format!("{disk}.{ending}")), format }
        });
        let disks = disks.map(|disk| match kind {
            HomeKind::New => HomeDisk { path: disk.path.with_extension("qcow2"), format: Format::Qcow2, ..disk },
            _ => disk,
        });
        Home {
            kind,
            machine: MACHINE.into(),
            host: "prod".into(),
            folder,
            disks: disks.into(),
            configured: None,
            made: Vec::new(),
            made_files: Default::default(),
        }
    }

    /// Makes production's images with these bytes.
    pub(crate) fn put_production(&self, disks: &Disks) {
        let home = self.home(HomeKind::Original);
        fs::create_dir_all(&home.folder).expect("folder");
        let mut text = String::from("version = 1\nname = \"db01\"\nfirmware = \"bios\"\n");
        for ((name, bytes), disk) in disks.iter().zip(&home.disks) {
            let raw = self.path("put.raw");
            fs::write(&raw, bytes).expect("write");
            let _ = fs::remove_file(&disk.path);
            img(&[
                "convert",
                "-f",
                "raw",
                "-O",
                disk.format.name(),
                &raw.to_string_lossy(),
                &disk.path.to_string_lossy(),
            ]);
            text.push_str(&format!("[[disk]]\nname = \"{name}\"\nsource = \"{}\"\n", disk.path.display()));
        }
        fs::write(home.folder.join("machine.toml"), text).expect("write");
    }

    pub(crate) fn assert_production(&self, disks: &Disks, what: &str) {
        self.assert_home(&self.home(HomeKind::Original), disks, what);
    }

    pub(crate) fn assert_home(&self, home: &Home, disks: &Disks, what: &str) {
        for ((_, bytes), disk) in disks.iter().zip(&home.disks) {
            self.assert_file(&disk.path, disk.format, bytes, what);
        }
    }
}

/// Changes an image as a guest would, through QEMU; answers how many bytes changed.
pub(crate) fn write_into(file: &Path, bytes: &mut [u8], times: u64, dice: &mut Dice) -> u64 {
    let before = bytes.to_vec();
    scribble(bytes, times, dice);
    write_over(file, &before, bytes);
    differing(&before, bytes)
}

/// Writes into an image that holds `before` what `bytes` has instead.
pub(crate) fn write_over(file: &Path, before: &[u8], bytes: &[u8]) {
    let format = if file.extension().is_some_and(|e| e == "raw") { "raw" } else { "qcow2" };
    let mut command = Command::new("qemu-io");
    command.args(["-f", format]);
    let content = file.with_extension("written");
    let patch = fs::File::create(&content).expect("patch");
    let mut any = false;
    for (at, (old, new)) in before.chunks(4096).zip(bytes.chunks(4096)).enumerate() {
        if old != new {
            any = true;
            patch.write_all_at(new, (at * 4096) as u64).expect("patch");
            let part = file.with_extension(format!("{at}.part"));
            fs::write(&part, new).expect("part");
            command.args(["-c", &format!("write -q -s {} {} {}", part.display(), at * 4096, new.len())]);
        }
    }
    if any {
        let done = command.arg(file).output().expect("qemu-io");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    for entry in fs::read_dir(file.parent().expect("folder")).expect("list").flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == "part" || e == "written") {
            fs::remove_file(path).expect("remove");
        }
    }
}
