//! Names and ids find their session, or say why not.

use aquifer_vdisk::ChainSpec;
use jiff::Timestamp;

use super::*;
use crate::session::{DiskSpec, Options, State};

fn session(root: &Path, registry: &Registry, name: &str, place: &str) -> Spec {
    let disk = DiskSpec {
        name: "vda".into(),
        chain: ChainSpec::Nbd { uri: "nbd://backup/vda".into() },
        size: 4096,
        fingerprint: "ab".repeat(32),
    };
    let dir = root.join(place);
    let spec = Spec::new(name, &dir, Path::new("/run/aquifer"), vec![disk], Options::default(), Timestamp::now());
    let spec = spec.expect("spec");
    Folder::create(&spec).expect("create");
    registry.add(&spec).expect("add");
    spec
}

#[test]
fn names_ids_and_folders_resolve() {
    let tmp = tempfile::tempdir().expect("tempdir");
    let root = fs::canonicalize(tmp.path()).expect("path");
    let registry = Registry::new(&root.join("home"));
    assert_eq!(registry.list().expect("empty"), []);
    assert!(matches!(registry.resolve("db01"), Err(Error::NoSession { .. })));
    let one = session(&root, &registry, "db01", "a");
    let two = session(&root, &registry, "web", "b");
    registry.add(&one).expect("again");
    assert_eq!(registry.list().expect("list").iter().map(|p| p.id).collect::<Vec<_>>(), [one.id, two.id]);
    let id = two.id.to_string();
    for word in ["web", &id, &id[24..], &id[30..], two.dir.to_str().expect("utf-8")] {
        assert_eq!(registry.resolve(word).expect(word).dir(), two.dir, "{word}");
    }
    for word in ["we", "", "0", &id[33..], "\u{1F600}"] {
        assert!(matches!(registry.resolve(word), Err(Error::NoSession { .. })), "{word}");
    }
    registry.remove(two.id).expect("remove");
    registry.remove(two.id).expect("no error");
    assert!(matches!(registry.resolve("web"), Err(Error::NoSession { .. })));
}

#[test]
fn of_one_name_the_live_session_is_meant() {
    let tmp = tempfile::tempdir().expect("tempdir");
    let root = fs::canonicalize(tmp.path()).expect("path");
    let registry = Registry::new(&root.join("home"));
    let old = session(&root, &registry, "db01", "a");
    let new = session(&root, &registry, "db01", "b");
    assert!(matches!(registry.resolve("db01"), Err(Error::Ambiguous { ref fits, .. }) if fits.len() == 2));
    let folder = Folder::open(&old.dir).expect("open");
    folder.transition(State::Dismounting, "stop", None).expect("legal");
    folder.transition(State::Stopped, "stop", None).expect("legal");
    assert_eq!(registry.resolve("db01").expect("live").dir(), new.dir);
}

#[test]
fn what_is_no_pointer_is_passed_over() {
    let tmp = tempfile::tempdir().expect("tempdir");
    let root = fs::canonicalize(tmp.path()).expect("path");
    let registry = Registry::new(&root.join("home"));
    let one = session(&root, &registry, "db01", "a");
    let dir = root.join("home/sessions");
    fs::write(dir.join("note.txt"), "hello").expect("write");
    fs::write(dir.join(format!("{}.json", Uuid::now_v7())), "{").expect("write");
    fs::copy(dir.join(format!("{}.json", one.id)), dir.join(format!("{}.json", Uuid::now_v7()))).expect("copy");
    assert_eq!(registry.list().expect("list").len(), 1);
}
