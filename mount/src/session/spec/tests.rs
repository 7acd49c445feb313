//! Bounds of the session record.

use super::*;

fn disk(name: &str) -> DiskSpec {
    let chain = ChainSpec::Nbd { uri: "nbd://backup/vda".into() };
    DiskSpec { name: name.into(), chain, size: 4096, fingerprint: "0f".repeat(32) }
}

fn new(name: &str, dir: &str, disks: Vec<DiskSpec>) -> Result<Spec> {
    Spec::new(name, Path::new(dir), Path::new("/run/aquifer"), disks, Options::default(), Timestamp::UNIX_EPOCH)
}

#[test]
fn long_folders_get_short_sockets() {
    let near = new("db01", "/vm/db01", vec![disk("vda")]).expect("short");
    assert_eq!(near.control_socket(), Path::new("/vm/db01/run/control.sock"));
    let far = new("db01", &format!("/{}", "x".repeat(120)), vec![disk("vda")]).expect("long");
    assert!(far.runtime_dir.starts_with("/run/aquifer"), "{}", far.runtime_dir.display());
    assert!(far.control_socket().as_os_str().len() <= SOCKET_PATH_MAX);
    let nowhere = format!("/{}", "y".repeat(100));
    let spec = Spec::new(
        "db01",
        Path::new(&format!("/{}", "x".repeat(120))),
        Path::new(&nowhere),
        vec![disk("vda")],
        Options::default(),
        Timestamp::UNIX_EPOCH,
    );
    assert!(matches!(spec, Err(Error::SocketPath { .. })));
}

#[test]
fn names_that_could_leave_the_folder_are_refused() {
    for name in ["", ".", "..", "a/b", "a b", "-x", ".hidden", "a\0b", "ä", &"x".repeat(65)] {
        assert!(new(name, "/vm/a", vec![disk("vda")]).is_err(), "machine {name:?}");
        assert!(new("db01", "/vm/a", vec![disk(name)]).is_err(), "disk {name:?}");
    }
    assert!(new("db01", "vm/a", vec![disk("vda")]).is_err(), "relative");
    assert!(new("db01", "/vm/a", vec![]).is_err(), "no disk");
    assert!(new("db01", "/vm/a", vec![disk("vda"), disk("vda")]).is_err(), "twice");
    assert!(new("db01", "/vm/a", (0..65).map(|i| disk(&format!("d{i}"))).collect()).is_err(), "too many");
}

#[test]
fn sizes_and_fingerprints_are_bounded() {
    for size in [0, u64::MAX] {
        assert!(new("a", "/vm/a", vec![DiskSpec { size, ..disk("vda") }]).is_err());
    }
    for fingerprint in [String::new(), "zz".repeat(32), "0f".repeat(31)] {
        assert!(new("a", "/vm/a", vec![DiskSpec { fingerprint, ..disk("vda") }]).is_err());
    }
}

#[test]
fn the_uri_is_one_qemu_reads() {
    let spec = new("db01", "/vm/o d", vec![disk("vda")]).expect("spec");
    assert_eq!(spec.uri("vda"), "nbd+unix:///vda?socket=/vm/o%20d/run/nbd.sock");
}

#[test]
fn an_old_record_without_options_reads_with_defaults() {
    let mut spec = serde_json::to_value(new("a", "/vm/a", vec![disk("vda")]).expect("spec")).expect("json");
    spec["options"] = serde_json::json!({ "rate": 7 });
    let back: Spec = serde_json::from_value(spec).expect("back");
    assert_eq!(back.options, Options { rate: Some(7), ..Options::default() });
}
