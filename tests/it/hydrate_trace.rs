//! Promise R-IR-13: what a machine reads first is recorded on a recovery and fetched ahead on the next one, also from
//! a later restore point; no source that is not ours to write is ever written to.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use aquifer_tests::{
    boot_sector,
    site::{Guest, Site, eventually},
};
use aquifer_vdisk::Trace;
use serde_json::Value;

const SMALL: [&str; 4] = ["--memory", "64MiB", "--network", "none"];

fn recover(site: &Site, source: &str, name: &str) -> Guest {
    let into = site.word(name);
    site.json(&[&["recover", source, "--into", &into, "--name", "db01"], &SMALL[..]].concat());
    let guest = Guest::of(&site.session("db01"));
    eventually("the guest speaks", || (guest.starts() == 1).then_some(()));
    guest.goes_on(5);
    guest
}

/// Every trace below a folder.
fn traces(dir: &Path) -> Vec<(PathBuf, Trace)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(traces(&path));
        } else if path.extension().is_some_and(|e| e == "trace") {
            let trace = Trace::decode("t", &fs::read(&path).expect("trace")).expect("a whole trace");
            found.push((path, trace));
        }
    }
    found
}

fn events(site: &Site, dir: &str) -> Vec<(String, String)> {
    let text = fs::read_to_string(site.path(dir).join("events")).expect("events");
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("an event"));
    lines.map(|e| (e["op"].to_string(), e["reason"].to_string())).collect()
}

fn replayed(site: &Site, dir: &str) -> bool {
    events(site, dir).iter().any(|(op, _)| op.contains("trace_replayed"))
}

#[test]
fn the_trace_lies_beside_the_points_and_outlives_an_increment() {
    let site = Site::new();
    let mut disk = boot_sector::disk(24, 16);
    fs::write(site.path("disk.raw"), &disk).expect("disk");
    site.json(&["init"]);
    let source = format!("vda=raw:{}", site.word("disk.raw"));
    site.json(&["backup", "db01", "--disk", &source]);

    recover(&site, "db01", "first");
    assert!(!replayed(&site, "first"), "nothing is known yet");
    site.json(&["finalize", "db01", "--discard", "--yes"]);
    let kept = traces(&site.path("repo/machines"));
    assert_eq!(kept.len(), 1, "{kept:?}");
    let (name, trace) = &kept[0];
    assert!(name.ends_with("traces/vda.trace"), "{}", name.display());
    assert_eq!(trace.steps[0].range.start, 0, "a machine reads its boot sector first");
    assert!(traces(&site.path("home")).is_empty(), "not in two places");

    disk[10 << 20..11 << 20].fill(0x77);
    fs::write(site.path("disk.raw"), &disk).expect("disk");
    site.json(&["backup", "db01", "--disk", &source]);
    recover(&site, "db01", "second");
    assert!(replayed(&site, "second"), "{:?}", events(&site, "second"));
    let session = site.session("db01");
    let replay = &session["disks"][0]["hydration"]["replay"];
    assert!(replay[1].as_u64() > Some(0), "{session}");
    assert!(session["disks"][0]["demand"]["misses"].is_u64(), "{session}");
    site.json(&["finalize", "db01", "--keep", "--timeout", "60s"]);
    assert!(!site.path("second/traces").exists(), "nothing is left of it beside the disk");
}

#[test]
fn a_source_that_is_not_ours_is_not_written_to() {
    let site = Site::new();
    fs::write(site.path("disk.raw"), boot_sector::disk(24, 16)).expect("disk");
    site.json(&["init"]);
    site.json(&["backup", "db01", "--disk", &format!("vda=raw:{}", site.word("disk.raw"))]);
    // From here on this is another installation.
    fs::remove_file(site.path("home/installation.json")).expect("gone");
    recover(&site, "db01", "first");
    site.json(&["finalize", "db01", "--discard", "--yes"]);
    assert!(traces(&site.path("repo")).is_empty());
    assert_eq!(traces(&site.path("home/traces")).len(), 1);
    recover(&site, "db01", "second");
    assert!(replayed(&site, "second"));
    site.json(&["finalize", "db01", "--discard", "--yes"]);

    // An image has no repository at all.
    fs::create_dir(site.path("images")).expect("folder");
    let (raw, image) = (site.word("disk.raw"), site.word("images/one.qcow2"));
    let made = Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2", &raw, &image]).status();
    assert!(made.expect("qemu-img").success());
    recover(&site, &image, "third");
    site.json(&["finalize", "db01", "--discard", "--yes"]);
    assert_eq!(fs::read_dir(site.path("images")).expect("list").count(), 1, "nothing is put beside an image");
    let own = site.path("home/traces/db01");
    let kept = traces(&own);
    assert_eq!(kept.len(), 1, "{kept:?}");
    // A damaged one costs nothing but itself.
    fs::write(&kept[0].0, b"AQTRC\r\n\x1A and then nothing").expect("write");
    recover(&site, &image, "fourth");
    assert!(!replayed(&site, "fourth"));
    site.json(&["finalize", "db01", "--discard", "--yes"]);
    assert_eq!(traces(&own).len(), 1, "and is replaced");
}
