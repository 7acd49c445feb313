//! The record survives, states change only as drawn, one owner at a time.

use std::os::unix::fs::PermissionsExt;

use aquifer_vdisk::ChainSpec;

use super::*;
use crate::session::{DiskSpec, Options};

fn spec(dir: &Path) -> Spec {
    let disk = DiskSpec {
        name: "vda".into(),
        chain: ChainSpec::Nbd { uri: "nbd://backup/vda".into() },
        size: 1 << 20,
        fingerprint: "ab".repeat(32),
    };
    Spec::new("db01", dir, Path::new("/run/aquifer"), vec![disk], Options::default(), Timestamp::now()).expect("spec")
}

fn folder() -> (tempfile::TempDir, Folder) {
    let tmp = tempfile::tempdir().expect("tempdir");
    let dir = fs::canonicalize(tmp.path()).expect("path").join("s");
    let folder = Folder::create(&spec(&dir)).expect("create");
    (tmp, folder)
}

#[test]
fn a_session_is_made_once_and_private() {
    let (_tmp, folder) = folder();
    let before = folder.load().expect("load");
    let again = Folder::create(&spec(folder.dir())).expect_err("exists");
    assert!(matches!(again, Error::Io { ref source, .. } if source.kind() == io::ErrorKind::AlreadyExists), "{again}");
    assert_eq!(folder.load().expect("load").id, before.id, "the first record stands");
    let mode = |p: PathBuf| fs::metadata(p).expect("stat").permissions().mode() & 0o777;
    assert_eq!(mode(folder.dir().to_path_buf()), 0o700);
    assert_eq!(mode(folder.record()), 0o600);
    let names: Vec<_> = fs::read_dir(folder.dir()).expect("dir").map(|e| e.expect("entry").file_name()).collect();
    assert!(!names.iter().any(|n| n.to_string_lossy().starts_with(".session")), "no draft is left: {names:?}");
}

#[test]
fn transitions_are_recorded_or_refused_whole() {
    let (_tmp, folder) = folder();
    let spec = folder.transition(State::Preparing, "recover", None).expect("legal");
    assert_eq!(spec.state, State::Preparing);
    let text = fs::read(folder.record()).expect("read");
    let refused = folder.transition(State::Migrated, "finalize", None).expect_err("illegal");
    assert_eq!(refused.code(), "E_STATE");
    assert_eq!(fs::read(folder.record()).expect("read"), text, "nothing changed");
    folder.transition(State::Failed, "recover", Some("no space")).expect("legal");
    let events = folder.events().expect("events");
    assert_eq!(events.len(), 2);
    assert_eq!((events[1].from, events[1].to), (Some(State::Preparing), Some(State::Failed)));
    assert_eq!(events[1].reason.as_deref(), Some("no space"));
    assert_eq!(folder.load().expect("load").reason.as_deref(), Some("no space"));
}

#[test]
fn an_edit_cannot_change_identity_or_state() {
    let (_tmp, folder) = folder();
    let before = folder.load().expect("load");
    let after = folder.edit(|s| {
        s.id = Uuid::nil();
        s.state = State::Stopped;
        s.options.rate = Some(5);
    });
    let after = after.expect("edit");
    assert_eq!((after.id, after.state, after.options.rate), (before.id, State::Queued, Some(5)));
    assert!(folder.edit(|s| s.disks.clear()).is_err(), "out of bounds");
    assert_eq!(folder.load().expect("load").disks.len(), 1);
}

#[test]
fn a_cut_event_line_costs_only_itself() {
    let (_tmp, folder) = folder();
    folder.event(Uuid::nil(), "one", None).expect("event");
    let mut file = OpenOptions::new().append(true).open(folder.events_path()).expect("open");
    file.write_all(br#"{"time":"2026-"#).expect("cut");
    folder.event(Uuid::nil(), "two", None).expect("event");
    let ops: Vec<_> = folder.events().expect("events").into_iter().map(|e| e.op).collect();
    assert_eq!(ops, ["one", "two"]);
}

#[test]
fn one_owner_at_a_time() {
    let (_tmp, folder) = folder();
    assert_eq!(folder.owner().expect("ask"), None);
    let lock = folder.own().expect("first");
    let second = folder.own().expect_err("second");
    assert!(matches!(second, Error::Busy { ref holder, .. } if *holder == std::process::id().to_string()), "{second}");
    assert_eq!(folder.owner().expect("ask"), Some(std::process::id()));
    drop(lock);
    assert_eq!(folder.owner().expect("ask"), None);
    folder.own().expect("free again");
}

#[test]
fn hostile_records_are_refused() {
    let (tmp, folder) = folder();
    let good = fs::read_to_string(folder.record()).expect("read");
    let version = good.replace("\"version\": 1", "\"version\": 2");
    for text in ["", "{}", "[]", "null", version.as_str(), &good.replace("\"vda\"", "\"../x\""), &"[".repeat(100_000)] {
        fs::write(folder.record(), text).expect("write");
        assert!(matches!(folder.load(), Err(Error::BadFile { .. })), "{}", text.get(..40).unwrap_or(text));
    }
    fs::write(folder.record(), &good).expect("write");
    let moved = tmp.path().join("moved");
    fs::rename(folder.dir(), &moved).expect("rename");
    let moved = Folder::open(&moved).expect("open");
    assert!(matches!(moved.load(), Err(Error::BadFile { ref what, .. }) if what.contains("moved")));
    assert!(matches!(Folder::open(tmp.path()), Err(Error::NoSession { .. })));
}

#[test]
fn concurrent_changes_are_all_kept() {
    let (_tmp, folder) = folder();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..10 {
                    folder.edit(|s| s.options.cache_bytes += 1).expect("edit");
                }
            });
        }
    });
    assert_eq!(folder.load().expect("load").options.cache_bytes, Options::default().cache_bytes + 40);
}
