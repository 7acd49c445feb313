//! Any bytes as one file of a store whose other files are honest: of Longhorn, Benji and Xen Orchestra.
//!
//! The first byte says which file it is. All lies in a folder of this process, whose one file is written anew each time.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use aquifer_formats::{Layer, Storage, benji, longhorn, storage::MemoryStorage, xo};

use super::walk_layer;

/// How many kinds of file there are.
const KINDS: u8 = 7;
/// Bytes of footer, header and table of a disk in parts, before its first block.
const PARTS: [usize; 3] = [512, 1024, 16];

/// The folder, and whose turn it is.
static FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);

/// What a part is passed through, by the second byte.
const FILTERS: [&str; 3] = ["[]", "[\"gzip\"]", "[\"brotli\"]"];

fn folder(held: &mut Option<PathBuf>) -> PathBuf {
    let made = || {
        let folder = std::env::temp_dir().join(format!("aquifer-fuzz-store-{}", std::process::id()));
        let volume = folder.join("volume");
        let part = |path: PathBuf, bytes: &[u8]| {
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, bytes).expect("write");
        };
        part(volume.join("volume.cfg"), br#"{"Name":"pvc-1","Size":"4194304"}"#);
        fs::create_dir_all(volume.join("backups")).expect("a folder");
        fs::create_dir_all(folder.join("benji/blocks")).expect("a folder");
        fs::create_dir_all(folder.join("parts/blocks/0")).expect("a folder");
        folder
    };
    held.get_or_insert_with(made).clone()
}

fn memory(bytes: &[u8]) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::new("fuzz", bytes.to_vec()))
}

/// Judges one file.
pub fn store(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    let mut held = FOLDER.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = folder(&mut held);
    match kind % KINDS {
        0 => longhorn(data, &folder),
        1 => longhorn_block(data, &folder),
        2 => benji(data, &folder.join("benji/version")),
        3 => benji_block(data, &folder.join("benji")),
        4 => point(data),
        5 => _ = xo::alias_target(&*memory(data)),
        _ => parts(data, &folder.join("parts")),
    }
}

fn longhorn(data: &[u8], folder: &Path) {
    let path = folder.join("volume/backups/backup_b.cfg");
    if let Ok(disk) = longhorn::Backup::open(memory(data), &path).and_then(|backup| backup.disk()) {
        walk_layer(&disk, 8);
    }
}

/// The block that an honest list names.
fn longhorn_block(data: &[u8], folder: &Path) {
    let name = "ab".repeat(32);
    let place = folder.join(format!("volume/blocks/ab/ab/{name}.blk"));
    fs::create_dir_all(place.parent().expect("a folder")).expect("a folder");
    fs::write(&place, data).expect("write");
    let list = format!(
        r#"{{"Name":"b","VolumeName":"pvc-1","CreatedTime":"x","Blocks":[{{"Offset":0,"BlockChecksum":"{name}"}}]}}"#
    );
    longhorn(list.as_bytes(), folder);
}

fn benji(data: &[u8], path: &Path) {
    let Ok(versions) = benji::Versions::open(memory(data), path) else { return };
    for name in versions.disks().iter().take(4) {
        if let Ok(disk) = versions.disk(name) {
            walk_layer(&disk, 8);
        }
    }
}

/// A description, behind a zero byte the object; the list that names them is honest.
fn benji_block(data: &[u8], folder: &Path) {
    // MD5 of the name.
    let place = folder.join("blocks/94/70/0000000000000001-0000000000000001");
    fs::create_dir_all(place.parent().expect("a folder")).expect("a folder");
    let (meta, object) = data.split_at(data.iter().position(|byte| *byte == 0).unwrap_or(data.len()));
    fs::write(place.with_extension("meta"), meta).expect("write");
    fs::write(&place, object.get(1..).unwrap_or_default()).expect("write");
    let sum = "0".repeat(64);
    let list = format!(
        r#"{{"metadata_version":"3.0.0","versions":[{{"uid":"v","volume":"v","size":8192,"block_size":4096,
        "blocks":[{{"idx":1,"uid":{{"left":1,"right":1}},"size":4096,"checksum":"{sum}"}}]}}]}}"#
    );
    benji(list.as_bytes(), &folder.join("version"));
}

fn point(data: &[u8]) {
    let Ok(point) = xo::Point::read(&memory(data)) else { return };
    let _ = (point.created(), point.is_increment(), point.machine());
    if let Ok(disks) = point.disks() {
        assert!(!disks.is_empty());
    }
}

/// A disk in parts: how they are stored, footer, header, table, and the first block.
fn parts(data: &[u8], folder: &Path) {
    let Some((filter, mut data)) = data.split_first() else { return };
    for (name, len) in ["footer", "header", "bat"].into_iter().zip(PARTS) {
        let (part, rest) = data.split_at(len.min(data.len()));
        let mut part = part.to_vec();
        match name {
            "footer" => seal(&mut part, 64),
            "header" => seal(&mut part, 36),
            _ => {}
        }
        fs::write(folder.join(name), part).expect("write");
        data = rest;
    }
    fs::write(folder.join("blocks/0/0"), data).expect("write");
    let filter = FILTERS[usize::from(*filter) % FILTERS.len()];
    // Footer, header and table that are packed would not get past a mutation: blocks are tried alone.
    for filters in ["[]", filter] {
        fs::write(folder.join("chunk-filters.json"), "[]").expect("write");
        let footer = memory(&fs::read(folder.join("footer")).expect("read"));
        let Ok(disk) = xo::VhdFolder::open(footer, folder, None) else { return };
        fs::write(folder.join("chunk-filters.json"), filters).expect("write");
        let Ok(layer) = disk.layer() else { return };
        assert!(disk.parent().is_none() || layer.size() > 0);
        walk_layer(&layer, 8);
    }
}

/// Makes a checksum of a VHD right.
fn seal(bytes: &mut [u8], at: usize) {
    if bytes.len() >= at + 4 {
        bytes[at..at + 4].fill(0);
        let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
        bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
    }
}

/// Seeds: a file of each kind.
pub(super) fn store_seeds() -> Vec<Vec<u8>> {
    let sum = "ab".repeat(32);
    let backup = format!(
        r#"{{"Name":"b","VolumeName":"pvc-1","SnapshotName":"s","CreatedTime":"2026-11-01T00:00:00Z","Size":"4194304","IsIncremental":true,
        "CompressionMethod":"lz4","Blocks":[{{"Offset":0,"BlockChecksum":"{sum}"}},{{"Offset":2097152,"BlockChecksum":"{sum}"}}]}}"#
    );
    let version = r#"{"metadata_version":"3.0.0","versions":[{"uid":"V1","date":"2026-11-01T00:00:00.0Z","volume":"v","size":8192,
        "block_size":4096,"status":"valid","blocks":[{"idx":0,"uid":{"left":1,"right":1},"size":4096,
        "checksum":"0000000000000000000000000000000000000000000000000000000000000000"}]}]}"#;
    let meta = r#"{"metadata_version":"2.0.0","object_size":20,"size":4096,"checksum":null,
        "transforms":[{"name":"z","module":"zstd","materials":{"original_size":4096}}]}"#;
    let point = r#"{"jobId":"j","mode":"delta","timestamp":1793491200000,"vm":{"uuid":"u","name_label":"n"},"vhds":{"r":"a.vhd"},
        "vdis":{"r":{"uuid":"i","virtual_size":512}},"vbds":{"b":{"VDI":"r","device":"xvda"}},"isVhdDifferencing":{"r":false}}"#;
    let dir = tempfile::tempdir().expect("a folder");
    let disk: Vec<u8> = (0..20_000u32).map(|i| (i / 512).to_le_bytes()[0]).collect();
    let mut seeds = vec![
        [&[0][..], backup.as_bytes()].concat(),
        [&[1][..], &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0]].concat(),
        [&[1][..], &[4, 0x22, 0x4d, 0x18, 0x60, 0x40, 0x82, 0, 0, 0, 0]].concat(),
        [&[2][..], version.as_bytes()].concat(),
        [&[3][..], meta.as_bytes(), &[0], &zstd::bulk::compress(&[7; 4096], 1).expect("memory")].concat(),
        [&[4][..], point.as_bytes()].concat(),
        [&[5][..], b"data/x.vhd\n"].concat(),
    ];
    for (number, parent) in [(1, None), (2, Some((&disk[..9000], "p.vhd")))] {
        let filter = crate::foreign::xo::Filter::Unsaid;
        let folder = dir.path().join(number.to_string());
        crate::foreign::xo::Parts { number, disk: &disk[..19_968], parent, filter, block: 4096 }.write(&folder);
        let read = |name: &str, len: usize| {
            let mut part = fs::read(folder.join(name)).expect("a part");
            part.resize(len, 0);
            part
        };
        for filter in 0..3u8 {
            let block = fs::read(folder.join("blocks/0/2")).expect("a block");
            let mut block = match filter {
                0 => block,
                1 => crate::foreign::xo::Filter::Gzip.pass(&block),
                _ => crate::foreign::xo::Filter::Brotli.pass(&block),
            };
            let mut seed = vec![6, filter];
            for (name, len) in ["footer", "header", "bat"].into_iter().zip(PARTS) {
                seed.extend(read(name, len));
            }
            // The block that is stored is the first one.
            seed[2 + 512 + 1024] |= 0x80;
            seed.append(&mut block);
            seeds.push(seed);
        }
    }
    seeds
}
