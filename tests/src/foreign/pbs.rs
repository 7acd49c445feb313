//! A datastore of Proxmox Backup Server, as the server lays it out.

use std::{
    fs,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

const PLAIN: [u8; 8] = [0x42, 0xab, 0x38, 0x07, 0xbe, 0x83, 0x70, 0xa1];
const ZSTD: [u8; 8] = [0x31, 0xb9, 0x58, 0x42, 0x6f, 0xb6, 0xa3, 0x7f];
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

/// Where the chunk with the content `bytes` lies in the datastore.
pub fn chunk_path(datastore: &Path, bytes: &[u8]) -> PathBuf {
    let name = hexadecimal(&Sha256::digest(bytes));
    datastore.join(".chunks").join(&name[..4]).join(name)
}

/// Stores a snapshot of machine 100 with these disks; answers its folder.
pub fn snapshot(datastore: &Path, time: &str, seconds: i64, chunk_bytes: usize, disks: &[(&str, &[u8])]) -> PathBuf {
    let folder = datastore.join("vm/100").join(time);
    fs::create_dir_all(&folder).expect("a folder");
    let mut files = Vec::new();
    for (name, bytes) in disks {
        let mut table = Vec::new();
        for chunk in bytes.chunks(chunk_bytes) {
            let path = chunk_path(datastore, chunk);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, blob(chunk)).expect("write");
            table.extend(Sha256::digest(chunk));
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
        let csum = hexadecimal(&sum);
        files.push(format!(r#"{{"filename":"{file}","crypt-mode":"none","size":{},"csum":"{csum}"}}"#, bytes.len()));
    }
    let manifest = format!(
        r#"{{"backup-type":"vm","backup-id":"100","backup-time":{seconds},"files":[{}],"unprotected":{{}}}}"#,
        files.join(",")
    );
    fs::write(folder.join("index.json.blob"), blob(manifest.as_bytes())).expect("write");
    folder
}
