//! A datastore of Proxmox Backup Server, as the server lays it out.

use std::{
    fs,
    path::{Path, PathBuf},
};

use aes_gcm::{
    AesGcm, KeyInit,
    aead::{AeadInOut, consts::U16},
    aes::Aes256,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use sha2::{Digest, Sha256};

const PLAIN: [u8; 8] = [0x42, 0xab, 0x38, 0x07, 0xbe, 0x83, 0x70, 0xa1];
const ZSTD: [u8; 8] = [0x31, 0xb9, 0x58, 0x42, 0x6f, 0xb6, 0xa3, 0x7f];
const SEALED: [u8; 8] = [0x7b, 0x67, 0x85, 0xbe, 0x22, 0x2d, 0x4c, 0xf0];
const SEALED_ZSTD: [u8; 8] = [0xe6, 0x59, 0x1b, 0xbf, 0x0b, 0xbf, 0xd8, 0x0b];
const INDEX: [u8; 8] = [0x2f, 0x7f, 0x41, 0xed, 0x91, 0xfd, 0x0f, 0xcd];

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// `bytes` as a blob, compressed where that is shorter.
pub fn blob(bytes: &[u8]) -> Vec<u8> {
    let packed = zstd::bulk::compress(bytes, 1).expect("zstd");
    let (magic, body) = if packed.len() < bytes.len() { (ZSTD, packed) } else { (PLAIN, bytes.to_vec()) };
    [&magic[..], &crc32fast::hash(&body).to_le_bytes(), &body].concat()
}

/// A blob sealed with `key`.
fn sealed(key: &[u8; 32], bytes: &[u8]) -> Vec<u8> {
    let packed = zstd::bulk::compress(bytes, 1).expect("zstd");
    let (magic, mut body) = if packed.len() < bytes.len() { (SEALED_ZSTD, packed) } else { (SEALED, bytes.to_vec()) };
    let nonce: [u8; 16] = Sha256::digest(bytes)[..16].try_into().expect("bytes");
    let cipher: AesGcm<Aes256, U16> = AesGcm::new(&(*key).into());
    let tag = cipher.encrypt_inout_detached(&nonce.into(), &[], body.as_mut_slice().into()).expect("sealed");
    [&magic[..], &crc32fast::hash(&body).to_le_bytes(), &nonce, &tag, &body].concat()
}

fn id_key(key: &[u8; 32]) -> [u8; 32] {
    let mut id_key = [0; 32];
    pbkdf2::pbkdf2_hmac::<Sha256>(key, b"_id_key", 10, &mut id_key);
    id_key
}

/// A key file without a passphrase.
pub fn key_file(key: &[u8; 32]) -> String {
    format!(r#"{{"kdf":null,"created":"2026-11-21T00:00:00Z","data":"{}"}}"#, STANDARD.encode(key))
}

/// Where the chunk with the content `bytes` lies in the datastore.
pub fn chunk_path(datastore: &Path, bytes: &[u8]) -> PathBuf {
    let name = hexadecimal(&Sha256::digest(bytes));
    datastore.join(".chunks").join(&name[..4]).join(name)
}

/// Stores a snapshot of machine 100 with these disks; answers its folder.
pub fn snapshot(datastore: &Path, time: &str, seconds: i64, chunk_bytes: usize, disks: &[(&str, &[u8])]) -> PathBuf {
    stored(datastore, time, seconds, chunk_bytes, disks, None)
}

/// As [`snapshot`], its chunks sealed with a key.
pub fn encrypted(
    datastore: &Path,
    time: &str,
    seconds: i64,
    chunk_bytes: usize,
    disks: &[(&str, &[u8])],
    key: &[u8; 32],
) -> PathBuf {
    stored(datastore, time, seconds, chunk_bytes, disks, Some(key))
}

fn stored(
    datastore: &Path,
    time: &str,
    seconds: i64,
    chunk_bytes: usize,
    disks: &[(&str, &[u8])],
    key: Option<&[u8; 32]>,
) -> PathBuf {
    let folder = datastore.join("vm/100").join(time);
    fs::create_dir_all(&folder).expect("a folder");
    let mut files = Vec::new();
    for (name, bytes) in disks {
        let mut table = Vec::new();
        for chunk in bytes.chunks(chunk_bytes) {
            let behind = key.map(id_key).map(|id| id.to_vec()).unwrap_or_default();
            let named = [chunk, &behind].concat();
            let path = chunk_path(datastore, &named);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, key.map_or_else(|| blob(chunk), |key| sealed(key, chunk))).expect("write");
            table.extend(Sha256::digest(&named));
        }
        let sum = Sha256::digest(&table);
        let mut index = vec![0; 4096];
        index[..8].copy_from_slice(&INDEX);
        index[24..32].copy_from_slice(&seconds.to_le_bytes());
        index[32..64].copy_from_slice(&sum);
        index[64..72].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        index[72..80].copy_from_slice(&(chunk_bytes as u64).to_le_bytes());
        index.extend(&table);
        let file = format!("{name}.img.fidx");
        fs::write(folder.join(&file), index).expect("write");
        let (csum, mode) = (hexadecimal(&sum), if key.is_some() { "encrypt" } else { "none" });
        files.push(format!(r#"{{"filename":"{file}","crypt-mode":"{mode}","size":{},"csum":"{csum}"}}"#, bytes.len()));
    }
    let manifest = format!(
        r#"{{"backup-type":"vm","backup-id":"100","backup-time":{seconds},"files":[{}],"unprotected":{{}}}}"#,
        files.join(",")
    );
    fs::write(folder.join("index.json.blob"), blob(manifest.as_bytes())).expect("write");
    folder
}
