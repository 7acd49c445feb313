//! Small stores made by hand; larger ones of our own writer are compared in `tests/it/foreign/stores.rs`.

use std::{fs, io::Write as _};

use sha2::{Digest as _, Sha512};

use super::*;
use crate::{
    Content, Layer as _,
    made::{is_corrupt, is_unsupported},
    objects::hexadecimal,
    storage::{Access, FileStorage},
};

const BLOCK: usize = 2 << 20;

struct Made {
    dir: tempfile::TempDir,
}

fn block(seed: u8) -> Vec<u8> {
    (0..BLOCK).map(|i| (i / 5000).to_le_bytes()[0] ^ seed).collect()
}

fn name(bytes: &[u8]) -> String {
    hexadecimal(&Sha512::digest(bytes)[..32])
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    to.write_all(bytes).expect("memory");
    to.finish().expect("memory")
}

impl Made {
    /// A volume of three blocks.
    fn new() -> Self {
        let made = Self { dir: tempfile::tempdir().expect("a folder") };
        fs::create_dir_all(made.dir.path().join("backups")).expect("a folder");
        made.volume(r#"{"Name":"v","Size":"6291456","BackingImageName":""}"#);
        made
    }

    fn volume(&self, text: &str) {
        fs::write(self.dir.path().join("volume.cfg"), text).expect("write");
    }

    fn store(&self, bytes: &[u8], stored: &[u8]) -> PathBuf {
        let name = name(bytes);
        let folder = self.dir.path().join("blocks").join(&name[..2]).join(&name[2..4]);
        fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join(format!("{name}.blk"));
        fs::write(&path, stored).expect("write");
        path
    }

    fn open(&self, more: &str, blocks: &[(u64, &str)]) -> Result<LonghornLayer> {
        let list: Vec<String> =
            blocks.iter().map(|(at, name)| format!(r#"{{"Offset":{at},"BlockChecksum":"{name}"}}"#)).collect();
        let text = format!(
            r#"{{"Name":"b","VolumeName":"v","CreatedTime":"2026-11-01T00:00:00Z",{more}"Blocks":[{}]}}"#,
            list.join(",")
        );
        self.raw(&text)
    }

    fn raw(&self, text: &str) -> Result<LonghornLayer> {
        let path = self.dir.path().join("backups/backup_b.cfg");
        fs::write(&path, text).expect("write");
        let storage = Arc::new(FileStorage::open(&path, Access::ReadOnly)?);
        Backup::open(storage, &path)?.disk()
    }
}

fn read(layer: &LonghornLayer, at: u64) -> Result<Vec<u8>> {
    let Content::Packed { block, .. } = layer.lookup(at, 1)?.0 else { panic!("packed") };
    let mut out = b"what another left".to_vec();
    let done = layer.unpack(&block, 1, &mut out);
    assert_eq!(out.is_empty(), done.is_err());
    done.map(|()| out)
}

#[test]
fn blocks_read_however_they_are_stored() {
    let (made, [a, b]) = (Made::new(), [block(1), block(2)]);
    made.store(&a, &gzip(&a));
    made.store(&b, &b);
    for method in
        [r#""CompressionMethod":"gzip","#, r#""CompressionMethod":"lz4","#, r#""CompressionMethod":"none","#, ""]
    {
        // Out of order, and with a gap of zeros.
        let layer = made.open(method, &[(4 << 20, &name(&b)), (0, &name(&a))]).expect("opens");
        assert_eq!((layer.size(), layer.grain()), (6 << 20, BLOCK as u64));
        assert!(read(&layer, 5).expect("reads") == a && read(&layer, 6_000_000).expect("reads") == b, "{method}");
        assert_eq!(layer.lookup(2 << 20, u64::MAX).expect("zeros"), (Content::Zero, 2 << 20));
    }
    let empty = made.raw(r#"{"Name":"b","VolumeName":"v","CreatedTime":"2026-11-01T00:00:00Z","Blocks":null}"#);
    assert_eq!(empty.expect("opens").lookup(0, u64::MAX).expect("zeros"), (Content::Zero, 6 << 20));
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    let (made, a) = (Made::new(), block(1));
    made.store(&a, &a);
    let name = name(&a);
    assert!(is_unsupported(made.open(r#""CompressionMethod":"zstd","#, &[(0, &name)])));
    assert!(is_unsupported(made.open(r#""SingleFile":{"FilePath":"x"},"#, &[(0, &name)])));
    assert!(is_unsupported(made.raw(r#"{"Name":"b","VolumeName":"v","CreatedTime":""}"#)), "still being made");
    assert!(matches!(
        made.raw(r#"{"Name":"b","VolumeName":"w","CreatedTime":"2026-11-01T00:00:00Z"}"#),
        Err(Error::ChainBroken { .. })
    ));
    let short = vec![7; 4096];
    made.store(&short, &short);
    assert!(is_unsupported(made.open("", &[(0, &self::name(&short))])), "blocks of another size");
    for image in ["ubuntu", r#"\"ubuntu\""#] {
        made.volume(&format!(r#"{{"Name":"v","Size":"6291456","BackingImageName":"{image}"}}"#));
        assert!(is_unsupported(made.open("", &[(0, &name)])), "{image}");
    }
}

#[test]
fn lists_that_do_not_fit_together_are_damage() {
    let (made, a) = (Made::new(), block(1));
    made.store(&a, &a);
    let name = name(&a);
    for blocks in [
        &[(0, &name[..]), (0, &name[..])][..],
        &[(4096, &name)],
        &[(6 << 20, &name)],
        &[(u64::MAX, &name)],
        &[(0, "00")],
        &[(0, "../../../../../../../../../../../../../../../../../../etc/passwd")],
    ] {
        assert!(is_corrupt(made.open("", blocks)), "{blocks:?}");
    }
    assert!(is_corrupt(made.raw("{")) && is_corrupt(made.raw("[]")) && is_corrupt(made.raw("{} {}")));
    assert!(is_corrupt(made.raw(&"[".repeat(100_000))), "no depth that the stack has to hold");
    for size in [r#""9223372036854771712""#, r#""70368744178176""#] {
        made.volume(&format!(r#"{{"Name":"v","Size":{size}}}"#));
        assert!(is_unsupported(made.open("", &[(0, &name)])), "{size}, which is walked for ever");
    }
    for size in [r#""0""#, r#""-1""#, r#""1000""#, r#""18446744073709551104""#, "null", r#""""#] {
        made.volume(&format!(r#"{{"Name":"v","Size":{size}}}"#));
        assert!(is_corrupt(made.open("", &[(0, &name)])), "{size}");
    }
}

#[test]
fn a_block_that_is_gone_or_damaged_is_an_error_and_never_zeros() {
    let (made, [a, b]) = (Made::new(), [block(1), block(2)]);
    made.store(&a, &a);
    let path = made.store(&b, &gzip(&b));
    let layer = made.open("", &[(0, &name(&a)), (2 << 20, &name(&b))]).expect("opens");
    assert!(read(&layer, 2 << 20).is_ok());
    let whole = gzip(&b);
    let mut flipped = whole.clone();
    flipped[whole.len() - 6] ^= 4;
    let bomb = gzip(&vec![0; 64 << 20]);
    for bytes in [flipped, whole[..whole.len() / 2].to_vec(), gzip(&a), a.clone(), bomb, Vec::new(), vec![1; 20 << 20]]
    {
        fs::write(&path, &bytes).expect("write");
        assert!(matches!(read(&layer, 2 << 20), Err(Error::BadBlock { .. })), "{} bytes", bytes.len());
    }
    fs::remove_file(&path).expect("remove");
    assert!(matches!(read(&layer, 2 << 20), Err(Error::ChainBroken { .. })));
}

#[test]
fn a_store_lists_every_backup_and_says_what_is_wrong() {
    let made = Made::new();
    let volumes = made.dir.path().join("backupstore/volumes");
    let folder = volumes.join("6a/ff/v");
    fs::create_dir_all(folder.join("backups")).expect("folders");
    fs::write(folder.join("volume.cfg"), r#"{"Name":"v","Size":"4194304"}"#).expect("write");
    let write = |name: &str, text: &str| fs::write(folder.join("backups").join(name), text).expect("write");
    write("backup_b1.cfg", r#"{"Name":"b1","VolumeName":"v","CreatedTime":"2026-11-01T00:00:00Z","Blocks":[{}]}"#);
    write("backup_b2.cfg", r#"{"Name":"b2","VolumeName":"v","CreatedTime":""}"#);
    write("backup_b3.cfg", "?");
    write("other", "");
    assert_eq!(volumes_in(made.dir.path()).expect("is there"), volumes);
    let mut found = backups(&volumes).expect("lists");
    found.sort_by(|a, b| a.name.cmp(&b.name));
    let state = |stored: &Stored| (stored.name.clone(), stored.refusal.is_some(), stored.is_complete);
    let states: Vec<_> = found.iter().map(state).collect();
    let expected = [("b1", false, true), ("b2", true, false), ("b3", true, true)];
    assert_eq!(states, expected.map(|(name, refused, complete)| (name.to_owned(), refused, complete)));
    assert_eq!((found[0].size, found[0].volume.as_str(), found[0].created.is_some()), (4 << 20, "v", true));
}

#[test]
fn pipes_and_links_in_a_store_are_damage_and_nobody_waits_for_them() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let pipe = |path: &Path| mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0).expect("a pipe");
    let made = Made::new();
    let volumes = made.dir.path().join("volumes");
    let [folder, other] = ["6a/ff/v", "6a/ff/w"].map(|name| volumes.join(name));
    for folder in [&folder, &other] {
        fs::create_dir_all(folder.join("backups")).expect("folders");
    }
    let text = r#"{"Name":"b1","VolumeName":"v","CreatedTime":"2026-11-01T00:00:00Z"}"#;
    let backup = |name: &str| folder.join("backups").join(format!("backup_{name}.cfg"));
    fs::write(folder.join("volume.cfg"), r#"{"Name":"v","Size":"4194304"}"#).expect("write");
    fs::write(backup("b1"), text).expect("write");
    pipe(&backup("b2"));
    std::os::unix::fs::symlink(backup("b1"), backup("b3")).expect("a link");
    // A volume whose description is a pipe, and one that lies elsewhere.
    pipe(&other.join("volume.cfg"));
    fs::write(other.join("backups/backup_b4.cfg"), text).expect("write");
    std::os::unix::fs::symlink(&folder, volumes.join("6a/ff/x")).expect("a link");
    let mut found = backups(&volumes).expect("lists");
    found.sort_by(|a, b| a.path.cmp(&b.path));
    let states: Vec<_> =
        found.iter().map(|stored| (stored.volume.as_str(), stored.name.as_str(), stored.refusal.is_some())).collect();
    assert_eq!(states, [("v", "b1", false), ("v", "b2", true), ("v", "b3", true), ("w", "b1", true)]);
    fs::remove_file(made.dir.path().join("volume.cfg")).expect("remove");
    pipe(&made.dir.path().join("volume.cfg"));
    assert!(matches!(made.open("", &[]), Err(Error::Refused { .. })));
}
