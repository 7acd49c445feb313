//! Datastores made by hand. Larger ones of our own writer are compared in `tests/it/foreign/archive.rs`.

use std::{fs, sync::Arc};

use sha2::{Digest, Sha256};

use super::*;
use crate::{
    Content, Error, Layer, Result,
    made::{Image, Order, is_corrupt, is_truncated, is_unsupported},
    storage::MemoryStorage,
};

const CHUNK: usize = 4096;

type Made = Image<PbsLayer>;

/// A disk of two chunks and a half: bytes, zeros, bytes.
impl Made {
    fn new() -> Self {
        let mut made = Self::blank(4096 + 3 * 32, Order::Little);
        made.put(0, &[0x2f, 0x7f, 0x41, 0xed, 0x91, 0xfd, 0x0f, 0xcd]);
        made.u64(64, 2 * CHUNK as u64 + 2048);
        made.u64(72, CHUNK as u64);
        for (number, content) in contents().iter().enumerate() {
            made.put(4096 + 32 * number, &Sha256::digest(content));
        }
        made.seal();
        made
    }

    fn seal(&mut self) {
        let sum = Sha256::digest(&self.bytes[4096..]);
        self.put(32, &sum);
    }

    fn open(&self, folder: &Path) -> Result<PbsLayer> {
        let storage = Arc::new(MemoryStorage::new("made.img.fidx", self.bytes.clone()));
        PbsLayer::open(storage, &folder.join("vm/1/t/made.img.fidx"))
    }
}

fn contents() -> [Vec<u8>; 3] {
    [vec![7; CHUNK], vec![0; CHUNK], (0..2048u16).map(|i| i.to_le_bytes()[0]).collect()]
}

fn plain_blob(bytes: &[u8]) -> Vec<u8> {
    let magic = [0x42, 0xab, 0x38, 0x07, 0xbe, 0x83, 0x70, 0xa1];
    [&magic[..], &crc32fast::hash(bytes).to_le_bytes(), bytes].concat()
}

fn place_of(folder: &Path, content: &[u8]) -> PathBuf {
    let name: String = Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect();
    folder.join(CHUNKS).join(&name[..4]).join(name)
}

/// A datastore with the chunks that are not zeros.
fn datastore() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for content in contents().iter().filter(|content| content.iter().any(|b| *b != 0)) {
        let place = place_of(folder.path(), content);
        fs::create_dir_all(place.parent().expect("a folder")).expect("a folder");
        fs::write(place, plain_blob(content)).expect("write");
    }
    folder
}

fn read(layer: &PbsLayer, offset: u64) -> Result<Vec<u8>> {
    let (content, _) = layer.lookup(offset, 1)?;
    let mut out = Vec::new();
    match content {
        Content::Packed { block, .. } => layer.unpack(&block, 1, &mut out)?,
        other => panic!("{other:?}"),
    }
    Ok(out)
}

#[test]
fn the_made_disk_reads() {
    let folder = datastore();
    let layer = Made::new().open(folder.path()).expect("opens");
    let chunk = CHUNK as u64;
    assert_eq!((layer.size(), layer.grain()), (2 * chunk + 2048, chunk));
    assert_eq!(read(&layer, 5).expect("bytes"), [7; CHUNK]);
    assert_eq!(layer.lookup(chunk, u64::MAX).expect("zeros"), (Content::Zero, chunk), "no file is looked for");
    let last = read(&layer, 2 * chunk).expect("bytes");
    assert_eq!((&last[..2048], last.len()), (&contents()[2][..], CHUNK), "what is behind the end reads as zeros");
}

#[test]
fn hostile_indexes_are_refused() {
    let folder = datastore();
    type Verdict = fn(Result<PbsLayer>) -> bool;
    let cases: [(&str, usize, u64, Verdict); 8] = [
        ("magic", 0, 0, is_corrupt),
        ("its digest", 32, 1, is_corrupt),
        ("no bytes", 64, 0, is_corrupt),
        ("one chunk more", 64, 3 * 4096 + 1, is_corrupt),
        ("exabytes", 64, u64::MAX, is_corrupt),
        ("chunks of 0", 72, 0, is_corrupt),
        ("chunks of 5000", 72, 5000, is_corrupt),
        ("chunks of 1 GiB", 72, 1 << 30, is_unsupported),
    ];
    for (what, at, value, verdict) in cases {
        let mut made = Made::new();
        made.u64(at, value);
        assert!(verdict(made.open(folder.path())), "{what}");
    }
    let mut made = Made::new();
    made.bytes.truncate(100);
    assert!(is_truncated(made.open(folder.path())));
    let elsewhere = tempfile::tempdir().expect("a folder");
    assert!(matches!(Made::new().open(elsewhere.path()), Err(Error::ChainBroken { .. })), "no datastore");
}

#[test]
fn a_chunk_that_is_gone_or_damaged_is_an_error_and_never_zeros() {
    let folder = datastore();
    let place = place_of(folder.path(), &contents()[0]);
    let whole = fs::read(&place).expect("read");
    let layer = Made::new().open(folder.path()).expect("opens");
    let at = |n: usize, byte: u8| {
        let mut bytes = whole.clone();
        bytes[n] ^= byte;
        bytes
    };
    // The wrong chunk under a right name: its CRC holds, its digest does not.
    let other = plain_blob(&[8; CHUNK]);
    for bytes in [at(0, 1), at(8, 1), at(100, 1), whole[..8].to_vec(), whole[..100].to_vec(), other, vec![1; 1 << 20]] {
        fs::write(&place, bytes).expect("write");
        assert!(matches!(read(&layer, 0), Err(Error::BadBlock { .. })));
    }
    fs::write(&place, b"").expect("write");
    assert!(matches!(read(&layer, 0), Err(Error::ChainBroken { .. })), "kept elsewhere");
    fs::remove_file(&place).expect("remove");
    assert!(matches!(read(&layer, 0), Err(Error::ChainBroken { .. })), "collected");
    std::os::unix::fs::symlink("/etc/passwd", &place).expect("a link");
    assert!(matches!(read(&layer, 0), Err(Error::Io { .. })), "links are not followed");
    let mut sealed = whole;
    sealed[..8].copy_from_slice(&[0x7b, 0x67, 0x85, 0xbe, 0x22, 0x2d, 0x4c, 0xf0]);
    fs::remove_file(&place).expect("remove");
    fs::write(&place, sealed).expect("write");
    assert!(matches!(read(&layer, 0), Err(Error::Key { .. })), "encrypted");
}

#[test]
fn a_manifest_names_the_disks_and_no_paths() {
    let folder = tempfile::tempdir().expect("a folder");
    assert!(Manifest::of(folder.path()).expect("looks").is_none(), "no snapshot");
    let text = br#"{"backup-type":"vm","backup-id":"100","backup-time":1700000000,"files":[
        {"filename":"qemu-server.conf.blob","crypt-mode":"none","size":3},
        {"filename":"drive-scsi0.img.fidx","crypt-mode":"none","size":10240},
        {"filename":"../../x.img.fidx","size":1},{"filename":".img.fidx","size":1}]}"#;
    fs::write(folder.path().join("index.json.blob"), plain_blob(text)).expect("write");
    let manifest = Manifest::of(folder.path()).expect("reads").expect("a snapshot");
    let disks: Vec<(&str, u64)> = manifest.disks().map(|(name, file)| (name, file.size)).collect();
    assert_eq!((disks, manifest.backup_time), (vec![("drive-scsi0", 10240)], 1_700_000_000));
    for bytes in [plain_blob(b"{}"), b"short".to_vec(), vec![0; 2 << 20]] {
        fs::write(folder.path().join("index.json.blob"), bytes).expect("write");
        assert!(is_corrupt(Manifest::of(folder.path())));
    }
}
