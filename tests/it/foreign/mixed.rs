//! Points that stand on a backup of another product and have copied nothing of it: listed, read, merged and made local
//! like any other, equal to the oracle at each step, and refused once that backup is no longer what it was.

use std::{collections::BTreeSet, fs, path::Path, sync::Arc};

use aquifer_formats::repo::{
    Machine as Stored, PointState, Repository, rebase,
    record::{Holder, Owner},
};
use aquifer_tests::{
    boot_sector,
    foreign::{
        pbs,
        vbk::{Body, Encoding, File, Machine, changes},
        vma,
    },
    qemu,
    rng::Rng,
    site::Site,
};
use aquifer_vdisk::{BlockCache, open_below};

use super::verbs::{MIB, every_verb, states, vmware_chain};

/// `disk` with a few places changed, none of them where the boot sector looks.
fn later(disk: &[u8], round: u8) -> Vec<u8> {
    let mut next = disk.to_vec();
    let place = |part: usize| disk.len() / 24 * part;
    let at = place(14) + usize::from(round) * 300_000;
    next[at..at + 70_000].fill(round);
    let zeros = place(9) + usize::from(round) * 400_000;
    next[zeros..zeros + 150_000].fill(0);
    next[place(20)..place(20) + 5000].copy_from_slice(&vec![round ^ 0x33; 5000]);
    next
}

/// Compares a point with what it should be.
fn compare(site: &Site, point: &str, expected: &[u8]) {
    let copy = site.word("compared.raw");
    site.json(&["export", point, &copy]);
    assert!(fs::read(&copy).expect("the copy") == expected, "{point}");
    fs::remove_file(copy).expect("remove");
}

/// Backs up `bytes` onto the newest point; answers the blocks that were written.
fn increment(site: &Site, bytes: &[u8]) -> u64 {
    fs::write(site.path("live.raw"), bytes).expect("write");
    let said = site.json(&["backup", "m", "--disk", &format!("vda=raw:{}", site.word("live.raw"))]);
    said.record("disk")["counted"]["blocks_written"].as_u64().expect("counted")
}

/// The repository of a site, with disks of other products at hand.
pub(super) fn repository(site: &Site) -> (Repository, Stored) {
    let me: serde_json::Value =
        serde_json::from_slice(&fs::read(site.path("home/installation.json")).expect("known")).expect("JSON");
    let me = Owner { id: me["id"].as_str().expect("id").parse().expect("id"), name: "test".into() };
    let cache = Arc::new(BlockCache::new(8 << 20));
    let repo = Repository::open(&site.path("repo"), me).expect("a repository").with_linked(Arc::new(move |linked| {
        let below = serde_json::from_str(&linked.locator).expect("words");
        open_below(&below, cache.clone()).map_err(|error| match error {
            aquifer_vdisk::Error::Format(error) => error,
            other => panic!("{other}"),
        })
    }));
    let machine = repo.machine("m").expect("the machine");
    (repo, machine)
}

/// A point on a full of another product that copies nothing of it, and two that stand on that; each is compared. Answers
/// the bytes of the two.
pub(super) fn linked(source: &[&str], full: &[u8], site: &Site) -> [Vec<u8>; 2] {
    site.json(&["init"]);
    let disk = format!("vda={}", source[0]);
    let linked = site.json(&[&["backup", "m", "--disk", &disk, "--link"], &source[1..]].concat()).record("point");
    assert!(linked["bytes_stored"].as_u64().expect("bytes") < 128 << 10, "{linked}");
    compare(site, "m", full);
    let (second, third) = (later(full, 1), later(&later(full, 1), 2));
    let written = increment(site, &second);
    assert!((1..8).contains(&written), "{written} blocks for 175 kB");
    compare(site, "m", &second);
    let written = increment(site, &third);
    assert!((1..8).contains(&written), "{written} blocks");
    for (point, bytes) in [("m@latest~2", full), ("m@latest~1", &second), ("m@latest", &third)] {
        compare(site, point, bytes);
    }
    [second, third]
}

/// The linked point is given up, and merged into the two that stay, whose bytes are these; its source goes.
pub(super) fn merged(site: &Site, [second, third]: &[Vec<u8>; 2], remove_source: impl FnOnce()) {
    let (repo, machine) = repository(site);
    let points = repo.points(&machine).expect("points");
    site.json(&["forget", &format!("m@{}", points[0].id), "--yes"]);
    let burdens = rebase::burdens(&repo, &machine).expect("burdens");
    assert!(burdens.iter().any(|burden| burden.point == points[0].id && burden.cost() > 0), "{burdens:?}");
    let without = BTreeSet::from([points[0].id]);
    for point in &points[1..] {
        let holder = Holder { name: "test".into(), host: "here".into(), process: 1, session: None, work: None };
        let merged = rebase::rebase(&repo, &machine, point, &without, repo.writer_options(), holder).expect("merged");
        assert!(merged.disks.iter().all(|disk| disk.linked.is_none()), "{merged:?}");
    }
    remove_source();
    for (point, bytes) in [("m@latest~1", second), ("m@latest", third)] {
        compare(site, point, bytes);
    }
    assert_eq!(site.run(&["verify"]).code, 0);
}

/// Everything a mixed chain goes through: a full of another product, two increments, every verb, a merge.
fn whole_life(source: &[&str], full: &[u8], site: &Site, own_files: &[&Path]) {
    let points = linked(source, full, site);
    let ranges = site.json(&["diff", "m@latest~1", "m@latest"]).records("range");
    let differs: u64 = ranges.iter().map(|range| range["length"].as_u64().expect("bytes")).sum();
    assert!((1..2 * MIB as u64).contains(&differs), "{ranges:?}");
    every_verb(site, &["m"], "aql", &points[1]);
    merged(site, &points, || own_files.iter().for_each(|file| fs::remove_file(file).expect("remove")));
}

#[test]
fn two_points_on_a_vmware_chain() {
    let site = Site::new();
    let ([base, top], bytes) = vmware_chain(&site);
    whole_life(&[&top], &bytes, &site, &[Path::new(&base), Path::new(&top)]);
}

#[test]
fn two_points_on_an_archive_of_proxmox() {
    let (site, [_, second]) = (Site::new(), states());
    let archive = vma::archive(&[("drive-scsi0", &second)], &mut Rng::new(5));
    fs::write(site.path("m.vma"), archive).expect("write");
    whole_life(&[&site.word("m.vma")], &second, &site, &[&site.path("m.vma")]);
}

#[test]
fn two_points_on_an_encrypted_snapshot() {
    let (site, [first, _]) = (Site::new(), states());
    let folder = pbs::encrypted(&site.path("store"), "2026-11-01T00:00:00Z", 9, MIB, &[("d", &first)], &[7; 32]);
    fs::write(site.path("key"), pbs::key_file(&[7; 32])).expect("write");
    let key = site.word("key");
    let index = folder.join("d.img.fidx");
    whole_life(&[folder.to_str().expect("text"), "--key-file", &key], &first, &site, &[&index]);
}

#[test]
fn two_points_on_an_increment_of_veeams() {
    let (site, [first, second]) = (Site::new(), states());
    for (name, id, body) in [("a.vbk", 1, Body::Whole(&first)), ("b.vib", 2, changes(&first, &second, MIB))] {
        let files = vec![("DEV__dev_sda", body)];
        let machines = vec![Machine { folder: "db01", name: "db01", id, below: id - 1, files }];
        let file = File { version: 13, block: MIB, encodings: &[Encoding::Lz4, Encoding::Zstd], machines };
        fs::write(site.path(name), file.bytes()).expect("write");
    }
    whole_life(&[&site.word("b.vib")], &second, &site, &[&site.path("a.vbk"), &site.path("b.vib")]);
}

#[test]
fn a_backup_that_was_changed_pruned_or_goes_on_growing_is_noticed() {
    let site = Site::new();
    site.json(&["init"]);
    let full = boot_sector::disk(24, 12);
    fs::write(site.path("content.raw"), &full).expect("write");
    let [raw, base, top] = ["content.raw", "base.vmdk", "top.vmdk"].map(|name| site.word(name));
    qemu::from_raw(Path::new(&raw), Path::new(&base), "vmdk", "subformat=monolithicSparse");
    qemu::img(&["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", &base, &top]);
    site.json(&["backup", "m", "--disk", &format!("vda={top}"), "--link"]);
    assert!(increment(&site, &later(&full, 1)) > 0);
    let states = || -> Vec<PointState> {
        let (repo, machine) = repository(&site);
        repo.points(&machine).expect("points").into_iter().map(|point| point.state).collect()
    };
    assert_eq!(states(), [PointState::Complete, PointState::Complete]);

    fs::rename(&base, site.path("away")).expect("rename");
    assert!(
        states().iter().all(|state| matches!(state, PointState::Missing { why } if *why == format!("{base} is gone"))),
        "{:?}",
        states()
    );
    assert_ne!(site.run(&["export", "m", &site.word("no.raw")]).code, 0);
    fs::rename(site.path("away"), &base).expect("rename");
    compare(&site, "m", &later(&full, 1));

    // A grain that is there already is written again: the tables stay as they are, the bytes do not.
    qemu::io(Path::new(&base), "vmdk", &["write -P 1 0 4k".into()]);
    assert!(states().iter().all(|state| matches!(state, PointState::Corrupted { .. })), "{:?}", states());
    let (repo, machine) = repository(&site);
    let newest = repo.points(&machine).expect("points").pop().expect("a point").id;
    let refused = site.run(&["export", &format!("m@{newest}"), &site.word("no.raw")]);
    assert!(refused.code == 14 && refused.err.contains("base.vmdk"), "{refused:#?}");
    let on_it = site.run(&["backup", "m", "--disk", &format!("vda=raw:{raw}")]);
    assert!(on_it.code == 0, "a new full stands on nothing: {on_it:#?}");
    compare(&site, "m", &full);
}

#[test]
fn what_proves_nothing_about_itself_is_not_linked_to() {
    let site = Site::new();
    site.json(&["init"]);
    let bytes = boot_sector::disk(8, 2);
    assert_eq!(fs::write(site.path("d.raw"), &bytes).ok(), Some(()));
    site.json(&["backup", "m", "--disk", &format!("vda=raw:{}", site.word("d.raw"))]);
    let ours = site.run(&["backup", "m2", "--disk", "vda=m", "--link"]);
    assert!(ours.code == 3 && ours.err.contains("of our own"), "{ours:#?}");
    fs::write(site.path("m.vma"), vma::archive(&[("a", &bytes)], &mut Rng::new(5))).expect("write");
    let packed = std::process::Command::new("zstd").args(["-q", "-f"]).arg(site.path("m.vma")).status();
    assert!(packed.expect("it runs").success());
    let wrapped = site.run(&["backup", "m2", "--disk", &format!("vda={}", site.word("m.vma.zst")), "--link"]);
    assert!(wrapped.code == 3 && wrapped.err.contains("decompress"), "{wrapped:#?}");
    assert!(!site.run(&["points"]).out.contains("m2"), "nothing is left of it");
}
