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
        PbsLayer::open(storage, &folder.join("vm/1/t/made.img.fidx"), None)
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
    sealed.splice(12..12, [0; 32]);
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

/// `echo -n` of nothing secret: a key of counted bytes, as a key file without a passphrase.
fn key_text() -> Vec<u8> {
    br#"{"kdf":null,"created":"2026-11-21T00:00:00Z","data":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}"#.to_vec()
}

#[test]
fn key_files_that_are_none_or_ask_for_too_much_are_refused() {
    let read = |text: &[u8], passphrase: Option<&[u8]>| Key::read("k", text, passphrase);
    assert!(read(&key_text(), None).is_ok());
    assert_eq!(format!("{:?}", read(&key_text(), None).expect("a key")), "Key", "it is not shown");
    let salt = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    let scrypt = |n: u64, r: u64, p: u64| {
        format!(r#"{{"kdf":{{"Scrypt":{{"n":{n},"r":{r},"p":{p},"salt":"{salt}"}}}},"data":"{salt}"}}"#)
    };
    let texts = [
        "{}".to_owned(),
        r#"{"kdf":null,"data":"AAEC"}"#.into(),
        r#"{"kdf":null,"data":"?"}"#.into(),
        scrypt(65_536, 8, 1),
        scrypt(1 << 40, 8, 1),
        scrypt(65_536, 8, u64::MAX),
        scrypt(3, 8, 1),
        scrypt(0, 0, 0),
        format!(r#"{{"kdf":{{"PBKDF2":{{"iter":4000000000,"salt":"{salt}"}}}},"data":"{salt}"}}"#),
        format!(r#"{{"kdf":{{"Argon2":{{}}}},"data":"{salt}"}}"#),
    ];
    for text in texts {
        assert!(matches!(read(text.as_bytes(), Some(b"x")), Err(Error::Key { .. })), "{text}");
    }
    assert!(matches!(read(scrypt(65_536, 8, 1).as_bytes(), None), Err(Error::Key { .. })), "no passphrase");
}

#[test]
fn two_snapshots_compare_by_their_indexes() {
    let folder = datastore();
    let old = Made::new().open(folder.path()).expect("opens");
    assert!(delta(&old, &old).expect("compares").is_empty());
    let mut made = Made::new();
    made.put(4096, &[9; 32]);
    made.put(4096 + 64, &[8; 32]);
    made.seal();
    let new = made.open(folder.path()).expect("opens");
    let chunk = CHUNK as u64;
    assert_eq!(delta(&old, &new).expect("compares"), [0..chunk, 2 * chunk..2 * chunk + 2048]);
    // Grown by a chunk of zeros and one of bytes: zeros behind the end are no difference.
    let mut grown = Made::new();
    grown.u64(64, 5 * chunk);
    grown.bytes.extend(Sha256::digest(vec![0; CHUNK]));
    grown.bytes.extend([7; 32]);
    grown.seal();
    let grown = grown.open(folder.path()).expect("opens");
    let last = std::iter::once(4 * chunk..5 * chunk);
    assert!(delta(&old, &grown).expect("compares").into_iter().eq(last));
    assert!(delta(&grown, &old).expect("compares").is_empty(), "cut");
}

fn bytes_of(digits: &str) -> Vec<u8> {
    digits
        .as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(str::from_utf8(pair).expect("digits"), 16).expect("digits"))
        .collect()
}

/// Answers of another's AES, PBKDF2 and scrypt (OpenSSL's and Python's), put together there as the format says.
#[test]
fn keys_open_what_others_sealed() {
    let sealed = bytes_of(
        "a0a1a2a3a4a5a6a7a8a9aaabacadaeafac2abe1b074c2542e2ad4b82357453764bcd03dd69b8a410a6ec3fd89e34e1f1fb20311c1a14\
         23c39e794ac2715452a77bf48a0fe6f3dbcf8f7e10c46a2dda",
    );
    let id_key = bytes_of("7c2c013efd07f3b25717a485263343cd4d292a4b65c200bb3b18ea227abe225c");
    let salt = "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=";
    let scrypt = format!(
        r#"{{"kdf":{{"Scrypt":{{"n":4096,"r":8,"p":1,"salt":"{salt}"}}}},
        "data":"oKGio6SlpqeoqaqrrK2ur0Er2lQXHfOY7Df2zQuQ3JDHaqZrUyfkz/M2z+MSjCiVLOq/iC2goMmlAPOrBKcg0g=="}}"#
    );
    let rounds = format!(
        r#"{{"kdf":{{"PBKDF2":{{"iter":1000,"salt":"{salt}"}}}},
        "data":"oKGio6SlpqeoqaqrrK2ur0CAiBXlBP7QyY8pTSSZU8LS174vTc84qomk51yR1L/ucpQjDGrSUqC1GHngn7nPHQ=="}}"#
    );
    for text in [&key_text()[..], scrypt.as_bytes(), rounds.as_bytes()] {
        let key = Key::read("k", text, Some(b"correct horse")).expect("a key");
        assert_eq!(key.id_key()[..], id_key);
        let mut out = b"before".to_vec();
        assert!(key.open(&sealed, &mut out));
        assert_eq!(out, b"an aquifer is layered rock that wells draw from");
        for at in [0, 20, 40] {
            let mut wrong = sealed.clone();
            wrong[at] ^= 1;
            assert!(!key.open(&wrong, &mut out) && out.is_empty(), "a byte at {at}");
        }
        assert!(!key.open(&sealed[..31], &mut out));
    }
    for text in [scrypt.as_bytes(), rounds.as_bytes()] {
        assert!(matches!(Key::read("k", text, Some(b"wrong horse")), Err(Error::Key { .. })));
    }
}
