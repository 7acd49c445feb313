//! Escapes by spelling, by link, by protocol; cycles, depth, session folders.

use std::{fs, os::unix::fs::symlink};

use super::*;

struct Folders {
    root: tempfile::TempDir,
}

impl Folders {
    /// `vm/top`, `vm/base`, `vm/sub/mid`, `shared/base`, `secret`.
    fn new() -> Self {
        let root = tempfile::tempdir().expect("temporary folder");
        for folder in ["vm/sub", "shared"] {
            fs::create_dir_all(root.path().join(folder)).expect("mkdir");
        }
        for file in ["vm/top", "vm/base", "vm/sub/mid", "shared/base", "secret"] {
            fs::write(root.path().join(file), file).expect("write");
        }
        Self { root }
    }

    fn path(&self, rest: &str) -> PathBuf {
        self.root.path().canonicalize().expect("real path").join(rest)
    }

    /// Follows `name` from `vm/top`, and says which file that led to.
    fn follow(&self, gate: &Gate, name: &str) -> Result<String> {
        let top = gate.enter(&self.path("vm/top"))?;
        let next = gate.follow(&top, OsStr::new(name))?;
        let mut bytes = vec![0; usize::try_from(next.storage().len().expect("length")).expect("small")];
        next.storage().read_at(0, &mut bytes).expect("readable");
        Ok(String::from_utf8(bytes).expect("text"))
    }
}

fn is_refused(done: Result<String>) -> bool {
    matches!(done, Err(Error::Refused { .. }))
}

#[test]
fn own_folder_is_open_and_the_rest_is_not() {
    let f = Folders::new();
    let gate = Gate::default();
    for (name, leads_to) in [
        ("base", "vm/base"),
        ("./base", "vm/base"),
        ("sub/mid", "vm/sub/mid"),
        ("sub/../base", "vm/base"),
        ("../vm/base", "vm/base"),
    ] {
        assert_eq!(f.follow(&gate, name).expect(name), leads_to);
    }
    let inside = f.path("vm/base");
    assert_eq!(f.follow(&gate, inside.to_str().expect("utf8")).expect("absolute, inside"), "vm/base");
    let outside = f.path("secret");
    for name in ["../secret", "sub/../../secret", "/etc/passwd", "/proc/self/mem", outside.to_str().expect("utf8")] {
        assert!(is_refused(f.follow(&gate, name)), "{name}");
    }
}

#[test]
fn allowed_folders_open_what_lies_beneath_them_only() {
    let f = Folders::new();
    let gate = Gate::new(&[f.path("shared")]).expect("gate");
    assert_eq!(f.follow(&gate, "../shared/base").expect("allowed"), "shared/base");
    let absolute = f.path("shared/base");
    assert_eq!(f.follow(&gate, absolute.to_str().expect("utf8")).expect("allowed"), "shared/base");
    assert!(is_refused(f.follow(&gate, "../secret")));
    assert!(is_refused(f.follow(&gate, "../shared/../secret")));
    assert!(is_refused(f.follow(&gate, "../shared-not/base")), "a common beginning is not a folder");
    assert!(Gate::new(&[f.path("nowhere")]).is_err(), "a place that does not exist");
}

#[test]
fn one_exact_file_can_be_allowed() {
    let f = Folders::new();
    let gate = Gate::new(&[f.path("secret")]).expect("gate");
    assert_eq!(f.follow(&gate, "../secret").expect("allowed"), "secret");
    assert!(is_refused(f.follow(&gate, "../shared/base")));
}

#[test]
fn links_count_by_where_they_lead() {
    let f = Folders::new();
    symlink(f.path("secret"), f.path("vm/out")).expect("link");
    symlink(f.path("vm/base"), f.path("vm/in")).expect("link");
    symlink("../shared/base", f.path("vm/shared")).expect("link");
    symlink(f.path("vm"), f.path("alias")).expect("link");
    let gate = Gate::default();
    assert!(is_refused(f.follow(&gate, "out")));
    assert!(is_refused(f.follow(&gate, "shared")));
    assert_eq!(f.follow(&gate, "in").expect("inside"), "vm/base");
    let gate = Gate::new(&[f.path("shared")]).expect("gate");
    assert_eq!(f.follow(&gate, "shared").expect("allowed"), "shared/base");
    // The person's own spelling of the folder counts, as it stands in images made through it.
    let gate = Gate::default();
    let top = gate.enter(&f.path("alias/top")).expect("through a link");
    let named = f.path("alias/base");
    assert!(gate.follow(&top, named.as_os_str()).is_ok());
    // Magic links: the kernel follows them without a path; no name from an image may use one.
    symlink("/proc/self/exe", f.path("vm/magic")).expect("link");
    assert!(is_refused(f.follow(&gate, "magic")));
}

#[test]
fn protocols_and_odd_names_are_refused() {
    let f = Folders::new();
    let gate = Gate::new(&[PathBuf::from("/")]).expect("gate");
    let long = "x".repeat(NAME_BYTES_MAX + 1);
    for name in ["json:{\"driver\":\"file\",\"filename\":\"base\"}", "nbd://host/x", "file:base", "a:b", "", &long] {
        assert!(is_refused(f.follow(&gate, name)), "{name}");
    }
    let top = gate.enter(&f.path("vm/top")).expect("enter");
    assert!(matches!(gate.follow(&top, OsStr::from_bytes(b"ba\0se")), Err(Error::Refused { .. })));
    fs::write(f.path("vm/sub/odd:name"), "odd").expect("write");
    assert_eq!(f.follow(&gate, "sub/odd:name").expect("a colon behind a slash is a name"), "odd");
}

#[test]
fn only_regular_files() {
    let f = Folders::new();
    let fifo = f.path("vm/fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::RUSR).expect("mkfifo");
    let gate = Gate::default();
    assert!(is_refused(f.follow(&gate, "fifo")), "and does not hang");
    assert!(is_refused(f.follow(&gate, "sub")));
    assert!(matches!(gate.enter(&f.path("vm")), Err(Error::Refused { .. })));
    assert!(matches!(gate.enter(Path::new("/dev/zero")), Err(Error::Refused { .. })));
    let everywhere = Gate::new(&[PathBuf::from("/")]).expect("gate");
    assert!(is_refused(f.follow(&everywhere, "/dev/zero")));
}

#[test]
fn missing_files_break_the_chain() {
    let f = Folders::new();
    let done = f.follow(&Gate::default(), "gone");
    assert!(matches!(&done, Err(Error::ChainBroken { what, .. }) if what.contains("gone")), "{done:?}");
}

#[test]
fn cycles_are_found_whatever_they_are_called() {
    let f = Folders::new();
    fs::hard_link(f.path("vm/top"), f.path("vm/sub/again")).expect("link");
    let gate = Gate::default();
    let top = gate.enter(&f.path("vm/top")).expect("enter");
    let mid = gate.follow(&top, OsStr::new("sub/mid")).expect("follow");
    assert_eq!(mid.depth(), 2);
    for (from, name) in [(&mid, "../top"), (&mid, "again"), (&mid, "mid"), (&top, "top")] {
        let done = gate.follow(from, OsStr::new(name));
        assert!(matches!(&done, Err(Error::ChainBroken { what, .. }) if what.contains("cycle")), "{name}: {done:?}");
    }
    assert!(gate.follow(&mid, OsStr::new("../base")).is_ok());
}

#[test]
fn depth_is_bounded() {
    let f = Folders::new();
    let gate = Gate::default();
    let mut at = gate.enter(&f.path("vm/top")).expect("enter");
    for i in 1..CHAIN_LAYERS_MAX {
        fs::write(f.path(&format!("vm/{i}")), "x").expect("write");
        at = gate.follow(&at, OsStr::new(&i.to_string())).expect("follow");
        // Only names and inodes matter here; keep the number of open files small.
        at.storage = gate.enter(&f.path("vm/top")).expect("enter").storage;
    }
    assert_eq!(at.depth(), CHAIN_LAYERS_MAX);
    assert!(matches!(gate.follow(&at, OsStr::new("base")), Err(Error::ChainBroken { .. })));
}

#[test]
fn session_folders_are_no_source() {
    let f = Folders::new();
    fs::create_dir_all(f.path("vm/session/disk0")).expect("mkdir");
    fs::write(f.path("vm/session/session.json"), "{}").expect("write");
    for file in ["vm/session/disk.raw", "vm/session/disk0/disk.raw"] {
        fs::write(f.path(file), "guest").expect("write");
        assert!(matches!(Gate::default().enter(&f.path(file)), Err(Error::Refused { .. })), "{file}");
    }
    symlink(f.path("vm/session/disk.raw"), f.path("vm/base2")).expect("link");
    for name in ["session/disk.raw", "base2"] {
        assert!(is_refused(f.follow(&Gate::default(), name)), "{name}");
    }
    let everywhere = Gate::new(&[PathBuf::from("/")]).expect("gate");
    assert!(is_refused(f.follow(&everywhere, "session/disk0/disk.raw")));
}
