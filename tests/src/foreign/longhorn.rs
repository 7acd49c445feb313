//! Backup stores as Longhorn lays them out; blocks are packed by `gzip` and `lz4`.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use sha2::{Digest, Sha512};

/// What restores a backup without us.
const RESTORE: &str = include_str!("longhorn.py");

/// Restores the backup `name` of the volume of [`backup`] to the raw image `image`, with nothing of the reader under test.
///
/// # Panics
/// It cannot be restored.
pub fn restore(store: &Path, name: &str, image: &Path) {
    let mut python = Command::new("python3");
    let done = python.args(["-c", RESTORE]).arg(store).args(["pvc-1", name]).arg(image).output().expect("python3 runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Half a SHA-512, in digits.
fn sum(bytes: &[u8]) -> String {
    Sha512::digest(bytes)[..32].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The folder of the volume `name`.
pub fn volume_folder(store: &Path, name: &str) -> PathBuf {
    let place = sum(name.as_bytes());
    store.join("backupstore/volumes").join(&place[..2]).join(&place[2..4]).join(name)
}

/// What `program` makes of `bytes`.
fn packed(program: &str, bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(["-1", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("it runs");
    let mut to = child.stdin.take().expect("a pipe");
    let bytes = bytes.to_vec();
    let feed = std::thread::spawn(move || to.write_all(&bytes));
    let done = child.wait_with_output().expect("it ends");
    feed.join().expect("a thread").expect("fed");
    assert!(done.status.success());
    done.stdout
}

/// Writes a backup of `disk`, in blocks of `block` bytes, and the volume's description; answers the file of the backup.
/// Blocks that are there already are not written again, however they are stored.
///
/// # Panics
/// A file cannot be written, or a program does not run.
pub fn backup(store: &Path, name: &str, day: usize, method: &str, block: usize, disk: &[u8]) -> PathBuf {
    let folder = volume_folder(store, "pvc-1");
    fs::create_dir_all(folder.join("backups")).expect("a folder");
    let volume = format!(
        r#"{{"Name":"pvc-1","Size":"{}","Labels":null,"CreatedTime":"2026-11-01T00:00:00Z","BackingImageName":"","CompressionMethod":"{method}"}}"#,
        disk.len()
    );
    fs::write(folder.join("volume.cfg"), volume).expect("write");
    let mut list = Vec::new();
    for (number, part) in disk.chunks(block).enumerate() {
        if part.iter().all(|byte| *byte == 0) {
            continue;
        }
        let mut part = part.to_vec();
        part.resize(block, 0);
        let sum = sum(&part);
        let path = folder.join("blocks").join(&sum[..2]).join(&sum[2..4]).join(format!("{sum}.blk"));
        list.push(format!(r#"{{"Offset":{},"BlockChecksum":"{sum}"}}"#, number * block));
        if path.exists() {
            continue;
        }
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        let stored = match method {
            "none" => part,
            "lz4" => packed("lz4", &part),
            _ => packed("gzip", &part),
        };
        fs::write(path, stored).expect("write");
    }
    let text = format!(
        r#"{{"Name":"{name}","VolumeName":"pvc-1","SnapshotName":"s{day}","SnapshotCreatedAt":"","CreatedTime":"2026-11-0{day}T00:00:00Z","Size":"{}","Labels":{{}},"IsIncremental":{},"CompressionMethod":"{method}","Blocks":[{}],"SingleFile":{{"FilePath":""}}}}"#,
        list.len() * block,
        day > 1,
        list.join(",")
    );
    let path = folder.join(format!("backups/backup_{name}.cfg"));
    fs::write(&path, text).expect("write");
    path
}
