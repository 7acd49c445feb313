//! Compressed archives of Proxmox VE: decoded once into the folder for state, and read from there by every command.
//!
//! ```text
//! HOME/unwrapped/KEY.vma      complete; KEY is the source's path, inode, length and times
//!                KEY.part     being written, under a lock; what a crash left is written anew
//! ```
//!
//! What no command has used for a week goes when the next archive is unwrapped.
//!
//! Invariants
//! - The archive itself is only read.
//! - A file under its final name is complete and synced. A source that has changed has another key.
//! - What a recovery session names stays, however old it is: its door may open it again.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::BufReader,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use aquifer_formats::{probe, storage::FileStorage, vma::Wrapping};
use aquifer_mount::session::Registry;

use crate::{
    context::Context,
    fail::{Fail, Result},
    units,
};

/// The plain archive that stands for `path`, where that is a compressed one; `path` itself otherwise.
pub(super) fn plain(context: &Context, path: &Path) -> Result<PathBuf> {
    let Some(wrapping) = wrapping_of(path)? else { return Ok(path.into()) };
    let label = path.display().to_string();
    let folder = context.home()?.join("unwrapped");
    let failed = |action: &'static str| move |e| Fail::io(folder_label(path), action, &e);
    DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(failed("make room for"))?;
    let source = File::open(path).map_err(|e| Fail::io(&label, "open", &e))?;
    let key = key_of(path, &source)?;
    let (done, part) = (folder.join(format!("{key}.vma")), folder.join(format!("{key}.part")));
    if done.is_file() {
        used(&done);
        return Ok(done);
    }
    clear(context, &folder);
    let mut options = OpenOptions::new();
    let mut to = options.create(true).write(true).truncate(false).mode(0o600).open(&part).map_err(failed("unwrap"))?;
    to.lock().map_err(failed("unwrap"))?;
    if done.is_file() {
        // Another command did it while this one waited.
        return Ok(done);
    }
    let len = source.metadata().map_err(failed("look at"))?.len();
    to.set_len(0).map_err(failed("unwrap"))?;
    context.out.say(format!("{label}: {} compressed are unwrapped once, into {}", units::bytes(len), folder.display()));
    wrapping.take_off::<Fail>(&label, BufReader::with_capacity(1 << 20, source), &mut to, |_| Ok(()))?;
    to.sync_all().map_err(failed("unwrap"))?;
    fs::rename(&part, &done).map_err(failed("unwrap"))?;
    File::open(&folder).and_then(|folder| folder.sync_all()).map_err(failed("unwrap"))?;
    Ok(done)
}

/// How long an unwrapped archive stays after it was used last.
const UNUSED: Duration = Duration::from_secs(7 * 24 * 3600);

/// Notes that a file is used now. Where that fails it may be unwrapped once more, later.
fn used(file: &Path) {
    let _ = OpenOptions::new().append(true).open(file).and_then(|file| file.set_modified(SystemTime::now()));
}

/// Deletes what has not been used for long, and what a crash left. Whatever cannot be looked at stays.
fn clear(context: &Context, folder: &Path) {
    let Ok(home) = context.home() else { return };
    let Ok(sessions) = Registry::new(&home).list() else { return };
    let records = sessions.iter().map(|session| fs::read(session.dir.join("session.json")));
    let Ok(records) = records.collect::<std::io::Result<Vec<Vec<u8>>>>() else { return };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let age = entry.metadata().and_then(|meta| meta.modified()).ok().and_then(|then| then.elapsed().ok());
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        let is_named = records.iter().any(|record| record.windows(name.len()).any(|part| part == name));
        if age.is_none_or(|age| age < UNUSED) || is_named {
            continue;
        }
        // Somebody may be unwrapping into it.
        let Ok(file) = File::open(&path) else { continue };
        if file.try_lock().is_ok() && fs::remove_file(&path).is_ok() {
            context.out.say(format!("{}: not used for a week, deleted", path.display()));
        }
    }
}

fn folder_label(path: &Path) -> String {
    path.display().to_string()
}

/// How the archive at `path` is compressed, if its name says that it is one and its head that it is compressed.
fn wrapping_of(path: &Path) -> Result<Option<Wrapping>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    if !name.contains(".vma.") || !path.is_file() {
        return Ok(None);
    }
    let label = path.display().to_string();
    let file = File::open(path).map_err(|e| Fail::io(&label, "open", &e))?;
    let head = probe::head(&FileStorage::from_file(file, label))?;
    Ok(probe::wrapping(&head).and_then(Wrapping::of_program))
}

/// Another one for another file, and for the same one in another state.
fn key_of(path: &Path, source: &File) -> Result<String> {
    let label = path.display().to_string();
    let real = fs::canonicalize(path).map_err(|e| Fail::io(&label, "open", &e))?;
    let meta = source.metadata().map_err(|e| Fail::io(&label, "stat", &e))?;
    let mut hash = blake3::Hasher::new_derive_key("aquifer 2026 unwrapped archive");
    hash.update(real.as_os_str().as_encoded_bytes());
    for number in [meta.dev(), meta.ino(), meta.len()] {
        hash.update(&number.to_le_bytes());
    }
    for number in [meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()] {
        hash.update(&number.to_le_bytes());
    }
    Ok(hash.finalize().to_hex().chars().take(32).collect())
}
