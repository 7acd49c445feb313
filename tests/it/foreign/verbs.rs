//! Every verb that reads a source, on a disk of each product that boots: looked at, checked, copied, mounted, and run
//! by `recover` until it stands on its own disk.

use std::{fs, path::Path, process::Command};

use aquifer_tests::{
    boot_sector,
    foreign::{
        benji, longhorn, pbs,
        vbk::{Body, Encoding, File, Machine, changes},
        vma, xo, xva,
    },
    qemu,
    rng::Rng,
    site::{Guest, Site, eventually},
};

pub(super) const MIB: usize = 1 << 20;

/// A disk that boots, and what it is one point later.
pub(super) fn states() -> [Vec<u8>; 2] {
    let first = boot_sector::disk(24, 12);
    let mut second = first.clone();
    second[9 * MIB..9 * MIB + 300_000].fill(0x5a);
    second[10 * MIB..11 * MIB].fill(0);
    [first, second]
}

/// Runs every verb on `source`, whose bytes are `expected`.
pub(super) fn every_verb(site: &Site, source: &[&str], format: &str, expected: &[u8]) {
    let with = |verb: &[&str], more: &[&str]| site.json(&[verb, source, more].concat());
    let disk = with(&["info"], &[]).record("disk");
    assert_eq!((disk["kind"].as_str(), disk["size"].as_u64()), (Some(format), Some(expected.len() as u64)), "{disk}");
    assert!(with(&["map"], &[]).records("range").iter().any(|range| range["kind"] == "data"));
    assert_eq!(with(&["verify"], &[]).code, 0);
    let (truth, copy) = (site.word("truth.raw"), site.word("copy.raw"));
    fs::write(&truth, expected).expect("write");
    site.json(&[&["export", source[0], &copy], &source[1..]].concat());
    assert!(fs::read(&copy).expect("the copy") == expected, "export");
    let compare = format!("qemu-img compare -f raw -F raw \"$uri\" {truth}");
    let served = site.run(&[&["mount"], source, &["--run", &compare]].concat());
    assert!(served.code == 0 && served.out.contains("Images are identical"), "{served:#?}");

    let into = site.word("m");
    with(&["recover"], &["--into", &into, "--memory", "64MiB", "--network", "none"]);
    let guest = Guest::of(&site.session("m"));
    eventually("the guest speaks", || (guest.starts() == 1).then_some(()));
    assert_eq!(site.run(&["wait", "m", "--for", "local", "--timeout", "60s"]).code, 0);
    guest.whole_round();
    let disk = site.json(&["finalize", "m", "--keep"]).record("disk");
    guest.whole_round();
    guest.turn_off();
    let path = disk["path"].as_str().expect("a path");
    eventually("the machine is off", || {
        let done = fs::read(Path::new(path)).expect("disk") == boot_sector::after_a_round(expected);
        done.then_some(())
    });
}

/// A disk that boots as a chain of two files, base first, and its bytes.
pub(super) fn vmware_chain(site: &Site) -> ([String; 2], Vec<u8>) {
    let [first, _] = states();
    fs::write(site.path("content.raw"), first).expect("write");
    let [raw, base, top, flat] = ["content.raw", "base.vmdk", "top.vmdk", "flat.raw"].map(|name| site.word(name));
    qemu::from_raw(Path::new(&raw), Path::new(&base), "vmdk", "subformat=streamOptimized");
    qemu::img(&["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", &base, &top]);
    qemu::io(Path::new(&top), "vmdk", &["write -P 90 9M 300k".into()]);
    qemu::img(&["convert", "-f", "vmdk", "-O", "raw", &top, &flat]);
    ([base, top], fs::read(&flat).expect("read"))
}

#[test]
fn a_vmware_chain_boots_and_becomes_local() {
    let site = Site::new();
    let ([_, top], bytes) = vmware_chain(&site);
    every_verb(&site, &[&top], "vmdk", &bytes);
}

#[test]
fn a_vhdx_boots_and_becomes_local() {
    let (site, [_, second]) = (Site::new(), states());
    fs::write(site.path("content.raw"), &second).expect("write");
    let (raw, disk) = (site.word("content.raw"), site.word("disk.vhdx"));
    qemu::from_raw(Path::new(&raw), Path::new(&disk), "vhdx", "block_size=1M");
    every_verb(&site, &[&disk], "vhdx", &second);
}

#[test]
fn a_vma_boots_and_becomes_local() {
    let (site, [_, second]) = (Site::new(), states());
    let archive = vma::archive(&[("drive-scsi0", &second)], &mut Rng::new(5));
    fs::write(site.path("m.vma"), archive).expect("write");
    every_verb(&site, &[&site.word("m.vma")], "vma", &second);
}

#[test]
fn an_export_of_xenserver_boots_and_becomes_local() {
    let (site, [_, second]) = (Site::new(), states());
    xva::export(&site.path("members"), &site.path("m.xva"), &[("xvda", &second)]);
    every_verb(&site, &[&site.word("m.xva")], "xva", &second);
}

/// The points that a store lists: machine, point, kind, state; and what to name as SOURCE.
fn listed(site: &Site, store: &str) -> (Vec<[String; 4]>, Vec<String>) {
    let listed = site.run(&["--json", "points", store]);
    let points = listed.records("stored_point");
    let is_damaged = points.iter().any(|point| point["state"] == "missing" || point["state"] == "corrupted");
    assert_eq!(listed.code, i32::from(is_damaged), "a list beside a damaged point says so: {listed:#?}");
    let word = |point: &serde_json::Value, field: &str| point[field].as_str().expect("text").to_owned();
    let rows = points.iter().map(|point| ["machine", "point", "kind", "state"].map(|field| word(point, field)));
    (rows.collect(), points.iter().map(|point| word(point, "source")).collect())
}

#[test]
fn a_point_of_xen_orchestra_boots_and_becomes_local() {
    let (site, [first, second]) = (Site::new(), states());
    xo::chain(&site.path("remote"), &[&first, &second], xo::Filter::Gzip);
    let (rows, sources) = listed(&site, &format!("xo:{}", site.word("remote")));
    let machine = format!("db01 ({})", xo::MACHINE);
    let row = |point: &str, kind: &str| [&machine[..], point, kind, "complete"].map(str::to_owned);
    assert_eq!(rows, [row("20261101T000000Z", "full"), row("20261102T000000Z", "increment")]);
    every_verb(&site, &[&sources[1]], "xo", &second);
    let older = site.json(&["info", &sources[0]]).record("disk");
    assert_eq!((older["disk"].as_str(), older["kind"].as_str()), (Some("xvda"), Some("xo")));
    // A folder of parts, and an alias, by themselves.
    let folder = xo::machine(&site.path("remote")).join("vdis/job/xvda");
    for path in [folder.join("data/1.vhd"), folder.join(xo::alias(1))] {
        let said = site.json(&["info", path.to_str().expect("text")]).record("disk");
        assert_eq!((said["kind"].as_str(), said["size"].as_u64()), (Some("xo"), Some(first.len() as u64)), "{said}");
    }
    fs::remove_file(folder.join(xo::alias(1))).expect("remove");
    let (rows, _) = listed(&site, &site.word("remote"));
    assert_eq!([&rows[0][3], &rows[1][3]], ["missing", "complete"], "what stands on it says so when it is opened");
}

#[test]
fn a_backup_of_longhorn_boots_and_becomes_local() {
    let (site, [first, second]) = (Site::new(), states());
    let store = site.path("store");
    longhorn::backup(&store, "b1", 1, "gzip", 2 << 20, &first);
    longhorn::backup(&store, "b2", 2, "lz4", 2 << 20, &second);
    let (rows, sources) = listed(&site, &format!("longhorn:{}", site.word("store")));
    let row = |point: &str| ["pvc-1", point, "full", "complete"].map(str::to_owned);
    assert_eq!(rows, [row("b1"), row("b2")]);
    every_verb(&site, &[&sources[1]], "longhorn", &second);
}

#[test]
fn versions_of_benji_are_listed_and_read() {
    let (site, [first, second]) = (Site::new(), states());
    for (number, disk) in [(1, &first), (2, &second)] {
        benji::version(&site.path("data"), number, disk);
    }
    let (rows, sources) = listed(&site, &format!("benji:{}", site.word("data")));
    let row = |point: &str| ["vol", point, "full", "complete"].map(str::to_owned);
    assert_eq!(rows, [row("vol-1"), row("vol-2")]);
    for (source, disk) in sources.iter().zip([&first, &second]) {
        let said = site.json(&["info", source]).record("disk");
        assert_eq!((said["kind"].as_str(), said["disk"].as_str()), (Some("benji"), Some("vol")));
        let copy = site.word("copy.raw");
        site.json(&["export", source, &copy]);
        assert!(fs::read(&copy).expect("the copy") == *disk);
        fs::remove_file(copy).expect("remove");
        assert_eq!(site.json(&["verify", source]).code, 0);
    }
    every_verb(&site, &[&sources[1]], "benji", &second);
}

/// As `vzdump` leaves them. The first command takes the compression off, the others find that done.
#[test]
fn compressed_vmas_go_through_every_verb() {
    let (site, [first, second]) = (Site::new(), states());
    for (tool, name, disk) in [("zstd", "m.vma.zst", &first), ("gzip", "m.vma.gz", &second)] {
        fs::write(site.path("m.vma"), vma::archive(&[("drive-scsi0", disk)], &mut Rng::new(5))).expect("write");
        let packed = Command::new(tool).args(["-q", "-f"]).arg(site.path("m.vma")).status();
        assert!(packed.expect("it runs").success());
        let word = site.word(name);
        let said = site.json(&["info", &word]).record("disk");
        assert_eq!((said["kind"].as_str(), said["disk"].as_str()), (Some("vma"), Some("drive-scsi0")));
        let copy = site.word("copy.raw");
        site.json(&["export", &word, &copy]);
        assert!(fs::read(&copy).expect("the copy") == *disk, "{name}");
        fs::remove_file(copy).expect("remove");
    }
    every_verb(&site, &[&site.word("m.vma.zst")], "vma", &first);
    // What nobody has used for a week goes with the next archive, what was used stays.
    let unwrapped = || fs::read_dir(site.path("home/unwrapped")).expect("a folder").map(|e| e.expect("a file").path());
    assert_eq!(unwrapped().count(), 2);
    for file in unwrapped() {
        let file = fs::OpenOptions::new().append(true).open(file).expect("open");
        file.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(8 * 24 * 3600)).expect("aged");
    }
    site.json(&["info", &site.word("m.vma.zst")]);
    fs::copy(site.path("m.vma.zst"), site.path("n.vma.zst")).expect("copy");
    site.json(&["info", &site.word("n.vma.zst")]);
    assert_eq!(unwrapped().count(), 2, "the one of the archive that nobody looked at is gone");
    let cut = fs::read(site.path("m.vma.zst")).expect("read");
    fs::write(site.path("cut.vma.zst"), &cut[..cut.len() / 2]).expect("write");
    let torn = site.run(&["info", &site.word("cut.vma.zst")]);
    assert!(torn.code == 14 && torn.err.contains("ends early"), "{torn:#?}");
}

#[test]
fn a_snapshot_of_a_datastore_boots_and_becomes_local() {
    let (site, [first, second]) = (Site::new(), states());
    let store = site.path("store");
    pbs::snapshot(&store, "2026-11-01T00:00:00Z", 1_793_491_200, MIB, &[("drive-scsi0", &first)]);
    pbs::snapshot(&store, "2026-11-02T00:00:00Z", 1_793_577_600, MIB, &[("drive-scsi0", &second)]);
    let points = site.json(&["points", &format!("pbs:{}", site.word("store"))]).records("stored_point");
    let seen: Vec<_> = points.iter().map(|p| (p["machine"].as_str(), p["state"].as_str(), &p["created"])).collect();
    assert_eq!(seen[0], (Some("vm/100"), Some("complete"), &"2026-11-01T00:00:00Z".into()), "{points:?}");
    assert_eq!(points.len(), 2);
    let newest = points[1]["source"].as_str().expect("a path").to_owned();
    every_verb(&site, &[&newest], "fidx", &second);
    let older = points[0]["source"].as_str().expect("a path");
    let delta = site.json(&["diff", older, &newest]).records("range");
    let ranges: Vec<_> = delta.iter().map(|range| (range["offset"].as_u64(), range["length"].as_u64())).collect();
    assert_eq!(ranges, [(Some(9 << 20), Some(2 << 20))]);
}

#[test]
fn an_increment_of_veeams_boots_and_becomes_local() {
    let (site, [first, second]) = (Site::new(), states());
    let folder = site.path("backups");
    fs::create_dir(&folder).expect("a folder");
    for (name, id, body) in [("a.vbk", 1, Body::Whole(&first)), ("b.vib", 2, changes(&first, &second, MIB))] {
        let files = vec![("DEV__dev_sda", body)];
        let machines = vec![Machine { folder: "db01", name: "db01", id, below: id - 1, files }];
        let file = File { version: 13, block: MIB, encodings: &[Encoding::Lz4, Encoding::Zstd], machines };
        fs::write(folder.join(name), file.bytes()).expect("write");
    }
    let points = site.json(&["points", &site.word("backups")]).records("stored_point");
    let seen: Vec<_> =
        points.iter().map(|p| (p["machine"].as_str(), p["kind"].as_str(), p["state"].as_str())).collect();
    let complete = |kind| (Some("db01"), Some(kind), Some("complete"));
    assert_eq!(seen, [complete("full"), complete("increment")], "{points:?}");
    let newest = points[1]["source"].as_str().expect("a path").to_owned();
    every_verb(&site, &[&newest], "vbk", &second);
    // Without its full it is listed as what it is.
    fs::remove_file(folder.join("a.vbk")).expect("remove");
    let listed = site.run(&["--json", "points", &site.word("backups")]);
    let points = listed.records("stored_point");
    assert_eq!((listed.code, points.len(), points[0]["state"].as_str()), (1, 1, Some("missing")), "{listed:#?}");
    assert_ne!(site.run(&["info", &newest]).code, 0);
}

#[test]
fn an_encrypted_snapshot_boots_with_its_key() {
    let (site, [first, _]) = (Site::new(), states());
    let folder = pbs::encrypted(&site.path("store"), "2026-11-01T00:00:00Z", 9, MIB, &[("d", &first)], &[7; 32]);
    fs::write(site.path("key"), pbs::key_file(&[7; 32])).expect("write");
    let source = folder.to_str().expect("text");
    every_verb(&site, &[source, "--key-file", &site.word("key")], "fidx", &first);
    let refused = site.run(&["export", source, &site.word("no.raw")]);
    assert!(refused.code == 12 && refused.err.contains("--key-file"), "{refused:#?}");
}
