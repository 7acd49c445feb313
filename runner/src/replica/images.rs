//! Images of a host that are not layers of a replica: those of production.
//!
//! What is written into them goes through the hypervisor's own tool: it keeps the image's bitmaps and snapshots right,
//! so that the next backup knows what was changed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use aquifer_formats::{layer::Content, probe::Format, qcow2::CLUSTER_BYTES};
use aquifer_vdisk::{BlockCache, Delta};

use super::{layers, model::HomeDisk};
use crate::{
    fail::{Code, Fail, Result},
    host::{
        ImageFormat,
        in_use::{self, Against},
        placed::PlacedDisk,
    },
};

const TOOL: &str = "qemu-img";

/// The tool's disks are as long as whole sectors.
const SECTOR_BYTES: u64 = 512;

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
/// [`Code::Capacity`]; [`Code::Tool`] with the tool's words.
pub fn merge_down(top: &Path, base: &Path) -> Result<()> {
    let mut command = Command::new(TOOL);
    command.args(["commit", "-q", "-f", "qcow2", "-d", "-b"]).arg(base).arg(top);
    run(command, base)?;
    fs::File::open(base).and_then(|file| file.sync_all()).map_err(|e| Fail::io(base.display(), "sync", &e))
}

/// Cuts off what an image has behind `size` bytes, the end of the disk that was written into it. A shorter one is left
/// as it is. Nobody has it open.
///
/// # Errors
/// [`Code::Tool`] with the tool's words.
pub fn cut(image: &Path, format: Format, size: u64, cache: &Arc<BlockCache>) -> Result<()> {
    let size = size.next_multiple_of(SECTOR_BYTES);
    if layers::open(image, format, cache)?.size() <= size {
        return Ok(());
    }
    let mut command = Command::new(TOOL);
    command.args(["resize", "-q", "--shrink", "-f", format.name()]).arg(image).arg(size.to_string());
    run(command, image)
}

/// Bytes that writing the layer `top` down into `disk` takes of its file system, at most: clusters that the image has not
/// got yet.
///
/// # Errors
/// Tables that cannot be read.
pub fn growth(top: &Path, disk: &HomeDisk, cache: &Arc<BlockCache>) -> Result<u64> {
    let data = |path: &Path, format| -> Result<Delta> {
        let chain = layers::open(path, format, cache)?;
        let mut stored = Delta::new();
        if let Some(layer) = chain.layers().first() {
            layer.scan(0, layer.size(), &mut |offset, len, content| {
                if !matches!(content, Content::Zero) {
                    stored.insert(offset..offset.saturating_add(len));
                }
            })?;
        }
        Ok(stored.round_out(CLUSTER_BYTES))
    };
    Ok(data(top, Format::Qcow2)?.subtract(&data(&disk.path, disk.format)?).bytes())
}

/// [`in_use::free`] of a disk.
///
/// # Errors
/// Its.
pub fn free(disk: &HomeDisk, against: Against) -> Result<()> {
    in_use::free(&disk.disk, &disk.path, against)
}

fn run(mut command: Command, image: &Path) -> Result<()> {
    let done = command.stdin(Stdio::null()).output();
    let done =
        done.map_err(|e| Fail::new(Code::Tool, format!("{TOOL} cannot be started")).cause(e).help("aquifer doctor"))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let said = said.trim().lines().last().unwrap_or("it said nothing").to_owned();
    if said.contains("No space left") {
        let what = format!("no space is left for {}", image.display());
        return Err(Fail::new(Code::Capacity, what).at(image.display()).cause(said));
    }
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
