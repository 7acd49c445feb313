//! Folders made by hand; chains of our own writer, and what the product's own library reads of them, are compared in
//! `tests/it/foreign/stores.rs`.

use std::{fs, io::Write as _};

use super::*;
use crate::{
    Content,
    made::{is_corrupt, is_unsupported},
    storage::{Access, FileStorage, MemoryStorage},
};

const BLOCK: usize = 4096;

struct Made {
    dir: tempfile::TempDir,
    footer: Vec<u8>,
    header: Vec<u8>,
}

fn seal(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}

impl Made {
    /// A disk of ten blocks of 4096 bytes, of which blocks 0 and 9 are there.
    fn new(kind: u8) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let (mut footer, mut header) = (vec![0; 512], vec![0; 1024]);
        footer[..8].copy_from_slice(b"conectix");
        footer[12..16].copy_from_slice(&0x1_0000u32.to_be_bytes());
        footer[28..32].copy_from_slice(b"CTXS");
        footer[48..56].copy_from_slice(&(10 * BLOCK as u64 - 512).to_be_bytes());
        footer[63] = kind;
        footer[68..84].fill(5);
        header[..8].copy_from_slice(b"cxsparse");
        header[24..28].copy_from_slice(&0x1_0000u32.to_be_bytes());
        header[28..32].copy_from_slice(&10u32.to_be_bytes());
        header[32..36].copy_from_slice(&4096u32.to_be_bytes());
        header[40..56].fill(6);
        header[64..74].copy_from_slice(b"\0p\0.\0v\0h\0d");
        let mut made = Self { dir, footer, header };
        fs::create_dir_all(made.path("data/x.vhd/blocks/0")).expect("folders");
        made.part("bat", &[0x80, 0x40, 0]);
        for block in [0u8, 9] {
            made.part(&format!("blocks/0/{block}"), &[vec![0xff; 512], vec![block + 1; BLOCK]].concat());
        }
        fs::write(made.path("d.alias.vhd"), "data/x.vhd\n").expect("write");
        made.seal();
        made
    }

    fn seal(&mut self) {
        seal(&mut self.footer, 64);
        seal(&mut self.header, 36);
        self.part("footer", &self.footer);
        self.part("header", &self.header);
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn part(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path("data/x.vhd").join(name), bytes).expect("write");
    }

    fn open(&self) -> Result<VhdFolder> {
        let alias = self.path("d.alias.vhd");
        let target = alias_target(&FileStorage::open(&alias, Access::ReadOnly)?)?;
        let place = self.path(&target.to_string_lossy());
        let footer = Arc::new(FileStorage::open(&place.join("footer"), Access::ReadOnly)?);
        VhdFolder::open(footer, &place, Some(&alias))
    }
}

fn read(layer: &VhdFolderLayer, at: u64) -> Result<Vec<u8>> {
    let Content::Packed { block, .. } = layer.lookup(at, 1)?.0 else { panic!("packed") };
    let mut out = b"what another left".to_vec();
    let done = layer.unpack(&block, 1, &mut out);
    assert_eq!(out.is_empty(), done.is_err());
    done.map(|()| out)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    to.write_all(bytes).expect("memory");
    to.finish().expect("memory")
}

#[test]
fn a_folder_reads_and_says_what_it_does_not_hold() {
    for (kind, clear) in [(3, Content::Zero), (4, Content::Absent)] {
        let made = Made::new(kind);
        let disk = made.open().expect("opens");
        let layer = disk.layer().expect("a layer");
        assert_eq!((layer.size(), layer.grain()), (10 * 4096 - 512, 4096));
        assert!(read(&layer, 5).expect("bytes") == [1; BLOCK] && read(&layer, 9 * 4096).expect("bytes") == [10; BLOCK]);
        assert_eq!(layer.lookup(4096, u64::MAX).expect("a run"), (clear, 8 * 4096));
        assert_eq!(disk.parent().map(|parent| parent.names().to_vec()), (kind == 4).then(|| vec!["p.vhd".into()]));
        assert!(is_folder_of_parts(&made.path("data/x.vhd")) && !is_folder_of_parts(&made.path("data")));
    }
}

#[test]
fn every_part_goes_through_the_filter() {
    let made = Made::new(3);
    for part in ["bat", "header", "footer", "blocks/0/0", "blocks/0/9"] {
        let bytes = fs::read(made.path("data/x.vhd").join(part)).expect("read");
        made.part(part, &gzip(&bytes));
    }
    assert!(is_corrupt(made.open()), "it does not say so");
    made.part("chunk-filters.json", br#"["gzip"]"#);
    assert_eq!(read(&made.open().expect("opens").layer().expect("a layer"), 0).expect("bytes"), [1; BLOCK]);
    let bomb = gzip(&vec![0; 64 << 20]);
    made.part("blocks/0/0", &bomb);
    let layer = made.open().expect("opens").layer().expect("a layer");
    assert!(matches!(read(&layer, 0), Err(Error::BadBlock { .. })), "a bomb");
    made.part("chunk-filters.json", br#"["brotli"]"#);
    assert!(made.open().is_err(), "gzip is no brotli");
    // Empty streams of Brotli, of a plain and of a large window.
    let mut out = vec![1];
    assert_eq!((crate::unzip::brotli(&[6], 10, &mut out), out.len()), (Ok(()), 0));
    assert!(crate::unzip::brotli(&[0x11, 0x1e, 3], 10, &mut out).is_err());
    for filters in [&br#"["aes-256-gcm"]"#[..], br#"["gzip","gzip"]"#] {
        made.part("chunk-filters.json", filters);
        assert!(is_unsupported(made.open()));
    }
    made.part("chunk-filters.json", b"{");
    assert!(is_corrupt(made.open()));
}

#[test]
fn a_block_in_part_is_not_guessed() {
    let block = |bits: u8, bytes: u8| [vec![bits; 512], vec![bytes; BLOCK]].concat();
    for (kind, bits, bytes, is_read) in
        [(3, 0, 0, true), (3, 0, 1, false), (4, 0, 0, false), (4, 0x7f, 1, false), (4, 0xff, 0, true)]
    {
        let made = Made::new(kind);
        made.part("blocks/0/0", &block(bits, bytes));
        let layer = made.open().expect("opens").layer().expect("a layer");
        assert_eq!(read(&layer, 0).is_ok(), is_read, "{kind} {bits} {bytes}");
        assert!(is_read || is_unsupported(read(&layer, 0)));
    }
    // What lies behind the disk's end does not count.
    let made = Made::new(4);
    made.part("blocks/0/9", &[&[0xfe][..], &[0; 511], &[7; BLOCK]].concat());
    assert!(read(&made.open().expect("opens").layer().expect("a layer"), 9 * 4096).is_ok());
}

#[test]
fn what_is_missing_or_damaged_is_an_error_and_never_zeros() {
    let made = Made::new(3);
    let layer = made.open().expect("opens").layer().expect("a layer");
    for bytes in [vec![0xff; 512 + BLOCK - 1], vec![0xff; 512 + BLOCK + 1], vec![], vec![0; 1 << 20]] {
        made.part("blocks/0/0", &bytes);
        assert!(matches!(read(&layer, 0), Err(Error::BadBlock { .. })), "{} bytes", bytes.len());
    }
    fs::remove_file(made.path("data/x.vhd/blocks/0/0")).expect("remove");
    assert!(matches!(read(&layer, 0), Err(Error::ChainBroken { .. })));
    std::os::unix::fs::symlink("/etc/passwd", made.path("data/x.vhd/blocks/0/0")).expect("a link");
    assert!(matches!(read(&layer, 0), Err(Error::Io { .. })), "links are not followed");
    for part in ["footer", "header", "bat"] {
        let made = Made::new(3);
        let bytes = fs::read(made.path("data/x.vhd").join(part)).expect("read");
        made.part(part, &bytes[..1]);
        assert!(is_corrupt(made.open()), "{part} cut");
        fs::remove_file(made.path("data/x.vhd").join(part)).expect("remove");
        assert!(made.open().is_err(), "{part} gone");
    }
    let mut made = Made::new(3);
    made.header[32..36].copy_from_slice(&(8u32 << 20).to_be_bytes());
    made.seal();
    assert!(is_unsupported(made.open()), "blocks that are too large");
    assert!(is_unsupported(Made::new(2).open()), "fixed");
}

#[test]
fn a_merge_is_noticed_before_and_while_it_is_read() {
    let made = Made::new(3);
    let layer = made.open().expect("opens").layer().expect("a layer");
    assert!(read(&layer, 0).is_ok());
    let state = made.path(".d.alias.vhd.merge.json");
    fs::write(&state, "{}").expect("write");
    assert!(matches!(made.open(), Err(Error::Refused { .. })) && matches!(read(&layer, 0), Err(Error::Refused { .. })));
    fs::remove_file(&state).expect("remove");
    assert!(read(&layer, 0).is_ok());
    fs::write(made.path("other"), "data/x.vhd").expect("write");
    fs::rename(made.path("other"), made.path("d.alias.vhd")).expect("rename");
    assert!(matches!(read(&layer, 0), Err(Error::ChainBroken { .. })), "another disk has its name");
}

#[test]
fn aliases_that_lead_nowhere_are_refused() {
    let target = |text: &[u8]| alias_target(&MemoryStorage::new("a", text.to_vec()));
    assert_eq!(target(b" data/x.vhd \n").expect("a name"), "data/x.vhd");
    for text in [&b""[..], b" \n", b"x.alias.vhd", b"\xff", &[b'a'; 2000]] {
        assert!(is_corrupt(target(text)), "{text:?}");
    }
}

fn point(text: &str) -> Result<Point> {
    Point::read(&(Arc::new(MemoryStorage::new("p", text.into())) as Arc<dyn Storage>))
}

#[test]
fn a_point_names_its_disks() {
    let text = r#"{"jobId":"j","mode":"delta","timestamp":1793491200000,"vm":{"uuid":"u","name_label":"db"},
        "vhds":{"r1":"vdis/j/a/t.alias.vhd","r2":"vdis/j/b/t.vhd","r3":"c","r4":"d"},
        "vdis":{"r1":{"uuid":"a","virtual_size":512},"r2":{"uuid":"b"},"r3":{"uuid":"c"}},
        "vbds":{"x":{"VDI":"r1","device":"xvda"},"y":{"VDI":"r2","device":""},"z":{"VDI":"r3","device":"xvda"}},
        "isVhdDifferencing":{"r1":false,"r2":true}}"#;
    let read = point(text).expect("reads");
    let names: Vec<_> = read.disks().expect("disks").into_iter().map(|disk| disk.name).collect();
    assert_eq!(names, ["a", "b", "c", "r4"], "two are called alike, one not at all, one is not described");
    assert_eq!((read.machine(), read.is_increment()), (("db", "u"), Some(true)));
    assert_eq!(read.created().expect("a time").to_string(), "2026-11-01T00:00:00Z");
    let full = point(r#"{"mode":"full","xva":"./t.xva"}"#).expect("reads");
    assert!(is_unsupported(full.disks()) && full.export() == Some("./t.xva"));
    assert!(is_corrupt(point("{}").expect("reads").disks()));
    // Files of the whole machine are none of the remote's.
    for name in ["/etc/passwd", "../t.xva", "a/../../t.xva", "a/t.xva", "..", ".", ""] {
        assert!(is_corrupt(point(&format!(r#"{{"mode":"full","xva":"{name}"}}"#))), "{name}");
    }
    for name in ["/etc/passwd", "../t.vhd", "vdis/../../t.vhd"] {
        assert!(is_corrupt(point(&format!(r#"{{"mode":"delta","vhds":{{"r":"{name}"}}}}"#))), "{name}");
    }
    for text in ["", "[", r#"{"vhds":[]}"#, &"[".repeat(100_000)] {
        assert!(is_corrupt(point(text)), "{text:.20}");
    }
}

#[test]
fn a_remote_lists_what_it_holds() {
    let dir = tempfile::tempdir().expect("a folder");
    let machine = dir.path().join("xo-vm-backups/u");
    fs::create_dir_all(machine.join("vdis")).expect("folders");
    let write = |name: &str, text: &str| fs::write(machine.join(name), text).expect("write");
    write("20261101T000000Z.json", r#"{"mode":"delta","vhds":{"r":"vdis/t.vhd"}}"#);
    write("20261102T000000Z.json", "?");
    write("20261103T000000Z.json", r#"{"mode":"full","xva":"./20261103T000000Z.xva"}"#);
    for name in [".20261101T000000Z.json", "cache.json.gz", "20261103T000000Z.xva", "x.lock"] {
        write(name, "");
    }
    let folders = machines_in(dir.path()).expect("a remote");
    assert_eq!(
        (folders.len(), machines_in(&machine), machines_in(&machine.join("vdis"))),
        (1, Some(folders.clone()), None)
    );
    let mut found = points(&folders).expect("lists");
    found.sort_by(|a, b| a.path.cmp(&b.path));
    let states: Vec<_> = found.iter().map(|stored| (stored.point.is_ok(), stored.refusal.is_some())).collect();
    assert_eq!(states, [(true, true), (false, false), (true, false)]);
    fs::write(machine.join("vdis/t.vhd"), "").expect("write");
    assert!(points(&folders).expect("lists").iter().all(|stored| stored.refusal.is_none()));
    fs::write(machine.join("vdis/.t.vhd.merge.json"), "").expect("write");
    assert!(points(&folders).expect("lists").iter().any(|stored| stored.refusal.is_some()));
    fs::write(dir.path().join("encryption.json"), r#"{"algorithm":"none"}"#).expect("write");
    assert!(points(&folders).is_ok());
    fs::write(dir.path().join("encryption.json"), r#"{"algorithm":"aes-256-gcm"}"#).expect("write");
    assert!(is_unsupported(points(&folders)));
}

#[test]
fn pipes_and_links_in_a_remote_are_damage_and_nobody_waits_for_them() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let pipe = |path: &Path| mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0).expect("a pipe");
    let dir = tempfile::tempdir().expect("a folder");
    let machine = dir.path().join("xo-vm-backups/u");
    fs::create_dir_all(machine.join("vdis")).expect("folders");
    let write = |name: &str, text: &str| fs::write(machine.join(name), text).expect("write");
    let link = |to: &Path, name: &str| std::os::unix::fs::symlink(to, machine.join(name)).expect("a link");
    pipe(&machine.join("1.json"));
    write("2.json", r#"{"mode":"full","xva":"2.xva"}"#);
    pipe(&machine.join("2.xva"));
    write("3.json", r#"{"mode":"full","xva":"3.xva"}"#);
    link("/etc/passwd".as_ref(), "3.xva");
    write("4.json", r#"{"mode":"delta","vhds":{"r":"vdis/t.vhd"}}"#);
    link("/etc/passwd".as_ref(), "vdis/t.vhd");
    link(&machine.join("2.json"), "5.json");
    link(dir.path(), "../v");
    let mut found = points(&machines_in(dir.path()).expect("a remote")).expect("lists");
    found.sort_by(|a, b| a.path.cmp(&b.path));
    let states: Vec<_> = found.iter().map(|stored| (stored.point.is_ok(), stored.refusal.is_some())).collect();
    assert_eq!(states, [(false, false), (true, true), (true, true), (true, true), (false, false)]);
    pipe(&dir.path().join("encryption.json"));
    assert!(points(&[machine]).is_err());
}
