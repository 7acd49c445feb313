//! The life of a mixed chain, once for every format that is read: a full (and, where the format has them, increments) of the
//! other product, two points of our own on it that copied nothing, a copy of the newest to a local disk while a guest writes
//! to it, and a merge behind which nothing of the other product is needed any more. Each step is compared with the bytes
//! that the source was made of.

use std::{collections::BTreeSet, fs, path::Path, process::Command, sync::Arc, time::Duration};

use aquifer_formats::Layer as _;
use aquifer_tests::{
    chains::open,
    foreign::{
        benji,
        hyperv::{Sectors, VhdChild, VhdxChild, vhd_id, vhdx_content_id},
        longhorn, pbs,
        vbk::{Body, Encoding, File, Machine, changes},
        virtnbd::{DATE, Point},
        vma, xo, xva,
    },
    qemu,
    rig::read_all,
    rng::Rng,
    site::Site,
};
use aquifer_vdisk::{
    BlockCache, ChainSpec, Disk, HydrateState, Hydrator, Overlay, OverlayOf, OverlayOptions, Pace, Settling,
};

use super::mixed::{linked, merged, repository};

const MIB: usize = 1 << 20;

/// A disk at two points, and the folder that is to hold them in the other product's way.
struct Made<'a> {
    states: [&'a [u8]; 2],
    folder: &'a Path,
}

/// A format: its page in `docs/formats`, and who makes a source of it, which is the second state.
type Life = (&'static str, fn(&Made<'_>) -> String);

const IMAGES: [Life; 5] =
    [("qcow2", qcow2_chain), ("vmdk", vmdk_chain), ("vhdx", vhdx_chain), ("vhd", vhd_chain), ("vdi", vdi_image)];

const ARCHIVES: [Life; 3] = [("ova", ova_export), ("vma", vma_archive), ("xva", xva_export)];

const STORES: [Life; 6] = [
    ("vbk", veeam_increment),
    ("virtnbdbackup", stream_of_libvirt),
    ("pbs", datastore_snapshot),
    ("xo", remote_of_xen_orchestra),
    ("longhorn", longhorn_backup),
    ("benji", benji_version),
];

impl Made<'_> {
    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.folder.join(name);
        fs::write(&path, bytes).expect("write");
        word(&path)
    }

    /// A state as a raw image, which is no part of what is made.
    fn raw(&self, state: usize) -> String {
        let path = self.folder.with_extension(format!("{state}.raw"));
        fs::write(&path, self.states[state]).expect("write");
        word(&path)
    }

    /// What an image that stands on the first state has to hold.
    fn changed_sectors(&self) -> Sectors {
        let sectors = |state: usize| self.states[state].as_chunks::<512>().0.iter();
        let pairs = (0..).zip(sectors(0).zip(sectors(1)));
        pairs.filter(|(_, (old, new))| old != new).map(|(at, (_, new))| (at, *new)).collect()
    }
}

fn word(path: &Path) -> String {
    path.to_str().expect("text").to_owned()
}

/// A disk that ends within every format's unit, in each MiB something that packs, something that does not, and a hole; and the
/// same later.
fn states() -> [Vec<u8>; 2] {
    let mut rng = Rng::new(77);
    let mut first = vec![0; 5 * MIB + 512 * 9];
    for part in first.chunks_mut(MIB).filter(|part| part.len() == MIB) {
        part[..200_000].fill(1 + rng.below(255) as u8);
        part[400_000..700_000].chunks_mut(8).for_each(|to| to.copy_from_slice(&rng.next_u64().to_le_bytes()));
    }
    first[5 * MIB + 512..].fill(9);
    let mut second = first.clone();
    second[MIB + 4096..MIB + 90_112].fill(0x5a);
    second[3 * MIB..4 * MIB].fill(0);
    second[5 * MIB + 512 * 8..].fill(0x77);
    [first, second]
}

fn qcow2_chain(made: &Made<'_>) -> String {
    image_chain(made, "qcow2", "compat=1.1")
}

fn vmdk_chain(made: &Made<'_>) -> String {
    image_chain(made, "vmdk", "subformat=streamOptimized")
}

/// A base by `qemu-img` with a child by `qemu-io`.
fn image_chain(made: &Made<'_>, format: &str, options: &str) -> String {
    let [base, top] = ["base", "top"].map(|name| made.folder.join(format!("{name}.{format}")));
    qemu::from_raw(Path::new(&made.raw(0)), &base, format, options);
    qemu::img(&["create", "-q", "-f", format, "-F", format, "-b", qemu::text(&base), qemu::text(&top)]);
    qemu::io(&top, format, &runs(&made.changed_sectors()));
    word(&top)
}

/// Commands that write these sectors, each of which holds one byte all over.
fn runs(sectors: &Sectors) -> Vec<String> {
    let mut found: Vec<(u64, u64, u8)> = Vec::new();
    for (sector, bytes) in sectors {
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a pattern of one byte");
        match found.last_mut() {
            Some((start, count, byte)) if *start + *count == *sector && *byte == bytes[0] => *count += 1,
            _ => found.push((*sector, 1, bytes[0])),
        }
    }
    found.iter().map(|(start, count, byte)| format!("write -P {byte} {} {}", start * 512, count * 512)).collect()
}

fn vhdx_chain(made: &Made<'_>) -> String {
    let base = made.folder.join("base.vhdx");
    qemu::from_raw(Path::new(&made.raw(0)), &base, "vhdx", "block_size=1M");
    let parent = vhdx_content_id(&fs::read(&base).expect("read"));
    let (sectors, size) = (made.changed_sectors(), made.states[0].len() as u64);
    let paths = [("relative_path", ".\\base.vhdx")];
    let child =
        VhdxChild { id: [1; 16], parent, paths: &paths, size, block: 1 << 20, sectors: &sectors, zero_blocks: &[] };
    made.write("top.avhdx", child.bytes())
}

fn vhd_chain(made: &Made<'_>) -> String {
    let base = made.folder.join("base.vhd");
    qemu::from_raw(Path::new(&made.raw(0)), &base, "vpc", "subformat=dynamic,force_size=on");
    let parent = vhd_id(&fs::read(&base).expect("read"));
    let (sectors, size) = (made.changed_sectors(), made.states[0].len() as u64);
    made.write("top.vhd", VhdChild { id: [1; 16], parent, relative: ".\\base.vhd", size, sectors: &sectors }.bytes())
}

fn vdi_image(made: &Made<'_>) -> String {
    let image = made.folder.join("disk.vdi");
    qemu::from_raw(Path::new(&made.raw(1)), &image, "vdi", "static=off");
    word(&image)
}

fn ova_export(made: &Made<'_>) -> String {
    let disk = made.folder.join("disk.vmdk");
    qemu::from_raw(Path::new(&made.raw(1)), &disk, "vmdk", "subformat=streamOptimized");
    made.write("m.ovf", "<Envelope/>");
    let packed = Command::new("tar").current_dir(made.folder).args(["-cf", "m.ova", "m.ovf", "disk.vmdk"]).status();
    assert!(packed.expect("tar runs").success());
    fs::remove_file(disk).expect("remove");
    word(&made.folder.join("m.ova"))
}

fn vma_archive(made: &Made<'_>) -> String {
    made.write("m.vma", vma::archive(&[("drive-scsi0", made.states[1])], &mut Rng::new(5)))
}

fn xva_export(made: &Made<'_>) -> String {
    let path = made.folder.join("m.xva");
    xva::export(&made.folder.with_extension("members"), &path, &[("xvda", made.states[1])]);
    word(&path)
}

fn veeam_increment(made: &Made<'_>) -> String {
    let [first, second] = made.states;
    let bodies = [("a.vbk", 1, Body::Whole(first)), ("b.vib", 2, changes(first, second, MIB))];
    let written = bodies.map(|(name, id, body)| {
        let files = vec![("DEV__dev_sda", body)];
        let machines = vec![Machine { folder: "db01", name: "db01", id, below: id - 1, files }];
        made.write(
            name,
            File { version: 13, block: MIB, encodings: &[Encoding::Lz4, Encoding::Zstd], machines }.bytes(),
        )
    });
    written[1].clone()
}

fn stream_of_libvirt(made: &Made<'_>) -> String {
    let [first, second] = made.states;
    let [full, inc] = ["virtnbdbackup.0", "virtnbdbackup.1"];
    let point = Point { disk: "sda", checkpoint: full, below: None, bytes: first, date: DATE };
    made.write("sda.full.data", point.compressed());
    let point = Point { disk: "sda", checkpoint: inc, below: Some((full, first)), bytes: second, date: DATE };
    made.write("sda.inc.virtnbdbackup.1.data", point.file())
}

fn datastore_snapshot(made: &Made<'_>) -> String {
    let times = [("2026-11-01T00:00:00Z", 1_793_491_200, 0), ("2026-11-02T00:00:00Z", 1_793_577_600, 1)];
    let [_, second] = times.map(|(time, seconds, state)| {
        pbs::snapshot(made.folder, time, seconds, MIB, &[("drive-scsi0", made.states[state])])
    });
    word(&second)
}

fn remote_of_xen_orchestra(made: &Made<'_>) -> String {
    word(&xo::chain(made.folder, &made.states, xo::Filter::Gzip)[1])
}

fn longhorn_backup(made: &Made<'_>) -> String {
    longhorn::backup(made.folder, "b1", 1, "gzip", 2 << 20, made.states[0]);
    word(&longhorn::backup(made.folder, "b2", 2, "lz4", 2 << 20, made.states[1]))
}

fn benji_version(made: &Made<'_>) -> String {
    benji::version(made.folder, 1, made.states[0]);
    word(&benji::version(made.folder, 2, made.states[1]))
}

/// Copies the newest point to a disk of its own while a guest writes, until it needs nothing else.
fn hydrated(site: &Site, expected: &[u8]) {
    let (repo, machine) = repository(site);
    let point = repo.points(&machine).expect("points").pop().expect("the newest");
    let disk = point.record.as_ref().expect("a record").disks[0].clone();
    let reader = repo.open_disk(&point, &disk.name).expect("opens");
    let below = serde_json::from_str(&disk.linked.expect("linked").locator).expect("words");
    let spec = ChainSpec::Mixed { path: reader.label().into(), below: Box::new(below) };
    let chain = Arc::new(open(&spec, &Arc::new(BlockCache::new(8 << 20))).expect("opens"));
    let of = OverlayOf { size: chain.size(), chain: chain.fingerprint().expect("told") };
    let options = OverlayOptions { settling: Settling::Callers, journal_bytes: 4 << 20, ..OverlayOptions::default() };
    let folder = site.path("local");
    fs::create_dir(&folder).expect("a folder");
    let disk = Disk::writable("vda", chain, Overlay::create(&folder, of, options).expect("an overlay"));
    let (disk, mut expected) = (Arc::new(disk.expect("a disk")), expected.to_vec());
    assert!(read_all(&disk) == expected, "before anything is local");
    let hydrator = Hydrator::start(disk.clone(), Pace::default()).expect("starts");
    for at in [2 * MIB + 700, MIB + 5000] {
        disk.write(at as u64, &[0xcc; 3000]).expect("write");
        expected[at..at + 3000].fill(0xcc);
    }
    assert_eq!(hydrator.wait(Some(Duration::from_secs(60))), HydrateState::Done);
    assert!(read_all(&disk) == expected, "all of it is local");
    disk.drain().expect("drained");
    assert!(fs::read(folder.join("disk.raw")).expect("read") == expected, "the file is the disk");
}

fn walk(lives: &[Life]) {
    let states = states();
    for (format, make) in lives {
        let site = Site::new();
        let folder = site.path(&format!("source-{format}"));
        fs::create_dir(&folder).expect("a folder");
        let source = make(&Made { states: [&states[0], &states[1]], folder: &folder });
        let points = linked(&[&source], &states[1], &site);
        hydrated(&site, &points[1]);
        merged(&site, &points, || fs::remove_dir_all(&folder).expect("remove"));
    }
}

#[test]
fn points_on_images_are_made_local_and_merged() {
    walk(&IMAGES);
}

#[test]
fn points_on_archives_are_made_local_and_merged() {
    walk(&ARCHIVES);
}

#[test]
fn points_on_stores_are_made_local_and_merged() {
    walk(&STORES);
}

#[test]
fn every_format_has_such_a_life() {
    let lives: BTreeSet<&str> = IMAGES.iter().chain(&ARCHIVES).chain(&STORES).map(|(format, _)| *format).collect();
    let pages = super::page().0.with_file_name("");
    let pages = fs::read_dir(pages).expect("the pages").map(|entry| entry.expect("a page").path());
    let names: BTreeSet<String> = pages.filter_map(|page| Some(page.file_stem()?.to_str()?.to_owned())).collect();
    // Our own, and the page about the pages.
    let ours = ["aql", "repository", "trace", "README"];
    let names: BTreeSet<&str> = names.iter().map(String::as_str).filter(|name| !ours.contains(name)).collect();
    assert_eq!(lives, names);
}
