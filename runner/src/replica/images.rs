//! Images of a host that are not layers of a replica: those of production.
//!
//! What is written into them goes through the hypervisor's own tool: it keeps the image's bitmaps and snapshots right,
//! so that the next backup knows what was changed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use aquifer_formats::probe::Format;

use super::model::HomeDisk;
use crate::{
    fail::{Code, Fail, Result},
    host::{ImageFormat, placed::PlacedDisk},
};

const TOOL: &str = "qemu-img";

/// The reader's word for a host's format.
pub fn format(format: ImageFormat) -> Format {
    match format {
        ImageFormat::Raw => Format::Raw,
        ImageFormat::Qcow2 => Format::Qcow2,
    }
}

/// A placed disk as a record keeps it.
pub fn home_disk(disk: &PlacedDisk) -> HomeDisk {
    HomeDisk { disk: disk.name.clone(), path: disk.path.clone(), format: format(disk.format) }
}

/// Writes a layer down into the image `base` that it stands on, over all layers between. Nobody has them open. Done
/// twice it is done once.
///
/// # Errors
/// [`Code::Tool`] with the tool's words.
pub fn merge_down(top: &Path, base: &Path) -> Result<()> {
    let mut command = Command::new(TOOL);
    command.args(["commit", "-q", "-f", "qcow2", "-d", "-b"]).arg(base).arg(top);
    run(command)?;
    fs::File::open(base).and_then(|file| file.sync_all()).map_err(|e| Fail::io(base.display(), "sync", &e))
}

fn run(mut command: Command) -> Result<()> {
    let done = command.stdin(Stdio::null()).output();
    let done =
        done.map_err(|e| Fail::new(Code::Tool, format!("{TOOL} cannot be started")).cause(e).help("aquifer doctor"))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let said = said.trim().lines().last().unwrap_or("it said nothing").to_owned();
    Err(Fail::new(Code::Tool, format!("{TOOL} ended with {}", done.status)).at(TOOL).cause(said))
}

/// The other images in the folder of `path`.
///
/// # Errors
/// I/O.
pub fn beside(path: &Path) -> Result<Vec<PathBuf>> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let all = fs::read_dir(folder).map_err(|e| Fail::io(folder.display(), "list", &e))?;
    let all = all.filter_map(|entry| Some(entry.ok()?.path()));
    Ok(all.filter(|other| other != path && other.extension().is_some_and(|e| e == "qcow2")).collect())
}
