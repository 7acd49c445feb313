//! Promise: a restore point is there whole or not at all, whatever is killed; retained points never change.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use aquifer_formats::{
    Content, Layer,
    aql::{Depth, Reader, WriterOptions, verify},
    repo::{
        DiskName, DiskPlan, DiskWork, LeaseObserver, Liveness, Machine, NewPoint, PointQuery, PointState, Repository,
        Result, keeper,
        record::{Consistency, Defaults, Found, Holder, MachineDescription, Owner},
    },
};
use aquifer_tests::{oracle::cases, rng::Rng};

/// Where the child finds its repository; set only for the child.
const FOLDER: &str = "AQUIFER_TEST_REPOSITORY";
const BLOCK: usize = 16 << 10;
/// Points that are kept.
const KEPT: usize = 4;

fn me() -> Owner {
    Owner { id: uuid::Uuid::from_u128(7), name: "test".into() }
}

fn holder() -> Holder {
    Holder { name: "backup".into(), host: "here".into(), process: std::process::id(), session: None, work: None }
}

fn tell(holder: &Holder) -> Liveness {
    let alive = holder.process == std::process::id() || Path::new(&format!("/proc/{}", holder.process)).exists();
    if alive { Liveness::Alive } else { Liveness::Dead }
}

fn vda() -> DiskName {
    DiskName::new("vda").expect("a name")
}

/// The disk of point `k`: some blocks change at every point, others seldom, the size now and then.
fn contents(k: u64) -> Vec<u8> {
    let blocks = 24 + usize::try_from(k / 5 % 3).expect("small") * 7;
    let mut bytes = vec![0; blocks * BLOCK + 100];
    for (block, part) in (0u64..).zip(bytes.chunks_mut(BLOCK)) {
        let version = k / (1 + block % 6);
        if !(block + version).is_multiple_of(7) {
            let mut rng = Rng::new(block << 32 | version);
            for word in part.chunks_mut(8) {
                // Half of the bits, so that it compresses somewhat.
                word.copy_from_slice(&(rng.next_u64() & 0x0F0F_0F0F_0F0F_0F0F).to_le_bytes()[..word.len()]);
            }
        }
    }
    bytes
}

/// One backup, going on with an interrupted one, then retention: what a job does every hour.
fn one_round(repo: &Repository, machine: &Machine) -> Result<()> {
    keeper::sweep(repo, machine, &mut LeaseObserver::new(), Instant::now(), &tell)?;
    let parent = repo.resolve(machine, &PointQuery::Latest(0)).ok();
    let hour = |at: jiff::Timestamp| u64::try_from(at.as_second()).expect("after 1970") / 3600;
    let k = parent.as_ref().and_then(|p| p.created()).map_or(1, |at| hour(at) + 1);
    let same_parent = |parent_id| parent.as_ref().map(|p| p.id) == parent_id;
    let interrupted = repo.interrupted(machine)?;
    let mut transaction = None;
    for what in interrupted {
        if transaction.is_none() && same_parent(what.record.parent) {
            transaction = Some(repo.resume(machine, &what, holder())?);
        }
    }
    let mut transaction = match transaction {
        Some(going_on) => going_on,
        None => repo.begin(machine, parent.as_ref(), holder())?,
    };
    let bytes = contents(k);
    let options = WriterOptions { threads: 2, waymark_bytes: 100_000, ..repo.writer_options() };
    let plan = DiskPlan { size: bytes.len() as u64, sector_bytes: 512, full: k.is_multiple_of(9), options };
    if let DiskWork::Write(mut writer) = transaction.disk(&vda(), plan)? {
        let from = usize::try_from(writer.resume_from()).expect("small");
        for (block, part) in (0u64..).zip(bytes.chunks(BLOCK)).skip(from) {
            writer.put(block, part)?;
        }
        writer.finish()?;
    }
    transaction.sealed(&vda(), Found::Comparison, "raw")?;
    transaction.commit(NewPoint {
        origin: None,
        created: jiff::Timestamp::from_second(i64::try_from(k * 3600).expect("small")).expect("a time"),
        consistency: Consistency::Crash,
        machine: MachineDescription { name: "m".into(), ..MachineDescription::default() },
    })?;
    let points = repo.points(machine)?;
    let old: Vec<_> = points.iter().rev().skip(KEPT).map(|p| p.id).collect();
    if !old.is_empty() {
        keeper::forget(repo, machine, &old, keeper::LastPoint::Stays)?;
    }
    Ok(())
}

fn read(reader: &Reader) -> Vec<u8> {
    let mut out = Vec::new();
    let mut block = Vec::new();
    while (out.len() as u64) < reader.size() {
        let (content, n) = reader.lookup(out.len() as u64, reader.size()).expect("lookup");
        let n = usize::try_from(n).expect("small");
        match content {
            Content::Packed { block: at, .. } => {
                reader.unpack(&at, n, &mut block).expect("unpack");
                out.extend_from_slice(&block[..n]);
            }
            _ => out.resize(out.len() + n, 0),
        }
    }
    out
}

/// Every listed point that calls itself complete has every byte; the list never gets shorter than it was.
fn check(folder: &Path, complete_before: u64) -> u64 {
    let repo = Repository::open(folder, me()).expect("open");
    let machine = repo.machine("m").expect("machine");
    let points = repo.points(&machine).expect("points");
    let mut newest = 0;
    for point in points.iter().filter(|p| p.state == PointState::Complete) {
        let k = u64::try_from(point.created().expect("complete").as_second()).expect("after 1970") / 3600;
        let reader = repo.open_disk(point, &vda()).expect("open");
        assert!(read(&reader) == contents(k), "point {k} has other bytes");
        assert_eq!(verify(&reader, Depth::Metadata).flat_map(|f| f.damage).count(), 0);
        newest = newest.max(k);
    }
    assert!(newest >= complete_before, "point {complete_before} was complete, now {newest} is the newest");
    let broken: Vec<_> =
        points.iter().filter(|p| !matches!(p.state, PointState::Complete | PointState::Incomplete)).collect();
    assert!(broken.is_empty(), "{broken:?}");
    newest
}

#[test]
fn backups_and_retention_survive_being_killed_at_any_moment() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let repo = Repository::init(folder.path(), me(), Defaults { block_bytes: 16 << 10, ..Defaults::default() });
    repo.and_then(|repo| repo.machine_or_new("m")).expect("init");
    let mut rng = Rng::new(11);
    let mut newest = 0;
    let kills = cases(40);
    for _ in 0..kills {
        let leases = || {
            let listed = fs::read_dir(folder.path().join("leases")).expect("leases").flatten();
            listed.map(|entry| entry.file_name()).collect::<BTreeSet<_>>()
        };
        let before = leases();
        let mut child = Command::new(env::current_exe().expect("this test binary"))
            .args(["--exact", "--ignored", "--test-threads=1", "repository::child"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("spawn");
        // On a busy computer it takes a while until the child is at work; now and then it is killed before.
        let begun = || leases().difference(&before).any(|name| !name.as_encoded_bytes().starts_with(b"."));
        let started = Instant::now();
        while !rng.once_in(400) && !begun() && started.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_micros(5_000 + rng.below(150_000)));
        assert!(child.try_wait().expect("wait").is_none(), "the child failed by itself");
        child.kill().expect("kill -9");
        child.wait().expect("wait");
        newest = check(folder.path(), newest);
    }
    assert!(newest > 5, "{newest} points came to be between {kills} kills");
}

#[test]
#[ignore = "run by its parent test, which kills it"]
fn child() {
    let folder = PathBuf::from(env::var_os(FOLDER).expect("started by its parent test"));
    let repo = Repository::open(&folder, me()).expect("open");
    let machine = repo.machine("m").expect("machine");
    loop {
        one_round(&repo, &machine).expect("a round");
    }
}
