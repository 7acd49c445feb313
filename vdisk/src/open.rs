//! From what somebody named to a [`Chain`]: which files, in which formats, in which order.
//!
//! Invariants
//! - The first file is named by a person; every other one passes the [`Gate`], and its format is the
//!   one its overlay records. Only the first file's format is ever probed, and never as `raw`.
//! - Formats that tell a parent by its content or id (VMDK, VHDX, VHD) accept no other one.
//! - Depth and cycles are bounded by the gate.
//! - A chain opens completely or not at all: a missing file is an error before anything is served.
//!
//! Not here: the client side of NBD. It lives further up, so whoever opens a chain brings it.

mod veeam;
mod vhd;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::{
    Error as FormatError, Layer, Storage as _, aql,
    benji::{self, Versions},
    gate::{Gate, Passage},
    longhorn::Backup,
    ova::Ova,
    pbs::{Key, PbsLayer},
    probe::{Format, head, probe, wrapping},
    qcow2::{Backing, Qcow2},
    raw::RawLayer,
    storage::{Access, FileStorage},
    vbk::Vbk,
    vdi::VdiLayer,
    vhdx::Vhdx,
    virtnbd::{Fit, VirtnbdLayer},
    vma::Vma,
    vmdk::Vmdk,
    xo,
    xva::Xva,
};
use serde::{Deserialize, Serialize};

use crate::{BlockCache, Chain, Result, open_below};

/// What a chain is opened from. Kept in a session's record, so that a restart opens the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum ChainSpec {
    /// A disk image and whatever it stands on.
    Image {
        /// The newest file.
        path: PathBuf,
        /// Its format; `None` probes, which never answers `raw`.
        format: Option<Format>,
        /// Folders or files, beside the image's own folder, that it may name as backing.
        #[serde(default)]
        allow_backing: Vec<PathBuf>,
        /// An internal snapshot of the newest file, by name or id, instead of its present state.
        #[serde(default)]
        snapshot: Option<String>,
    },
    /// A disk inside an archive: an OVA, a VMA, or a backup file and the ones it stands on.
    Member {
        /// The archive, whose format is probed.
        path: PathBuf,
        /// The disk's name in it.
        member: String,
    },
    /// A disk of a snapshot of Proxmox Backup Server.
    Snapshot {
        /// Its index.
        path: PathBuf,
        /// What opens its chunks, where they are encrypted.
        #[serde(default)]
        key: Option<KeyPlace>,
    },
    /// A native layer file; what it stands on is in its layer table.
    Native {
        /// The point's own file.
        path: PathBuf,
    },
    /// A native layer file that stands on a disk of another product.
    Mixed {
        /// The point's own file.
        path: PathBuf,
        /// That disk. A repository's record names it; the layer only proves that it is the right one.
        below: Box<ChainSpec>,
    },
    /// An export of an NBD server.
    Nbd {
        /// Its URI.
        uri: String,
    },
}

/// Where a key lies. Records hold this and never the key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyPlace {
    /// The key file.
    pub file: PathBuf,
    /// A file whose first line is the passphrase, where the key file is sealed.
    #[serde(default)]
    pub passphrase: Option<PathBuf>,
}

/// Makes a layer of an NBD URI.
pub type Connect<'a> = &'a dyn Fn(&str) -> aquifer_formats::Result<Arc<dyn Layer>>;

/// Opens what `spec` names. Decoded blocks go through `cache`; `connect` is asked for NBD sources.
///
/// # Errors
/// Files that are missing, refused, damaged or of a format this build does not read.
pub fn open_chain(spec: &ChainSpec, cache: Arc<BlockCache>, connect: Connect<'_>) -> Result<Chain> {
    match spec {
        ChainSpec::Nbd { uri } => Chain::new(vec![connect(uri)?], cache),
        ChainSpec::Native { path } => {
            let first = Gate::default().enter(path)?;
            Ok(point(&first, cache)?)
        }
        ChainSpec::Mixed { path, below } => {
            let first = Gate::default().enter(path)?;
            let reader = aql::Reader::open_path(first.path())?;
            reader.check_layers()?;
            let reader = reader.over(open_below(below, cache.clone())?)?;
            Ok(Chain::of_point(Arc::new(reader), cache))
        }
        ChainSpec::Snapshot { path, key } => {
            let file = Gate::default().enter(path)?;
            let key = key.as_ref().map(key_of).transpose()?.map(Arc::new);
            Ok(Chain::of_snapshot(Arc::new(PbsLayer::open(file.storage(), file.path(), key)?), cache))
        }
        ChainSpec::Member { path, member } => {
            let gate = Gate::default();
            let file = gate.enter(path)?;
            let layer: Arc<dyn Layer> = match probed(&file)? {
                Format::Vbk => return veeam::chain(&gate, &file, member, cache),
                Format::Ova => Arc::new(Ova::open(file.storage())?.disk(member)?),
                Format::Vma => Arc::new(Vma::open(file.storage())?.disk(member)?),
                Format::Xva => Arc::new(Xva::open(file.storage())?.disk(member)?),
                Format::Xo => return point_of_remote(&gate, &file, member, cache),
                Format::Benji => Arc::new(Versions::open(file.storage(), file.path())?.disk(member)?),
                Format::Longhorn => {
                    let backup = Backup::open(file.storage(), file.path())?;
                    only(&file, backup.volume(), member)?;
                    Arc::new(backup.disk()?)
                }
                other => return Err(unread(&file, &format!("members of {other}")).into()),
            };
            Chain::new(vec![layer], cache)
        }
        ChainSpec::Image { path, format, allow_backing, snapshot } => {
            let gate = Gate::new(allow_backing)?;
            let first = gate.enter(path)?;
            let format = match format {
                Some(format) => *format,
                None => probed(&first)?,
            };
            match (format, snapshot) {
                (Format::Aql, None) => Ok(point(&first, cache)?),
                (Format::Fidx, None) => {
                    Ok(Chain::of_snapshot(Arc::new(PbsLayer::open(first.storage(), first.path(), None)?), cache))
                }
                _ => Chain::new(image_layers(&gate, first, format, snapshot.as_deref())?, cache),
            }
        }
    }
}

/// Names of the disks of an archive, in its order; empty where `path` is none. They are opened by
/// [`ChainSpec::Member`].
///
/// # Errors
/// An archive that breaks its format, [`FormatError::Io`].
pub fn members(path: &Path) -> Result<Vec<String>> {
    let file = Gate::default().enter(path)?;
    Ok(match probed_object(&file)? {
        Some(Format::Xo) if !vhd::is_disk(&file) => {
            xo::Point::read(&file.storage())?.disks()?.into_iter().map(|disk| disk.name).collect()
        }
        Some(Format::Benji) => {
            Versions::open(file.storage(), file.path())?.disks().into_iter().map(str::to_owned).collect()
        }
        Some(Format::Ova) => Ova::open(file.storage())?.disks()?.into_iter().map(str::to_owned).collect(),
        Some(Format::Vma) => Vma::open(file.storage())?.disks().into_iter().map(str::to_owned).collect(),
        Some(Format::Xva) => Xva::open(file.storage())?.disks().into_iter().map(str::to_owned).collect(),
        Some(Format::Longhorn) => vec![Backup::open(file.storage(), file.path())?.volume().to_owned()],
        Some(Format::Vbk) => veeam::names(&Vbk::open(file.storage())?)?,
        _ => Vec::new(),
    })
}

/// The format of the file at `path`, if it is one that is known.
///
/// # Errors
/// A file that cannot be read, or that nobody may open.
pub fn format_of(path: &Path) -> Result<Option<Format>> {
    probed_object(&Gate::default().enter(path)?)
}

fn key_of(place: &KeyPlace) -> Result<Key> {
    let text = small_file(&place.file)?;
    let passphrase = place.passphrase.as_deref().map(small_file).transpose()?;
    let line = passphrase.as_deref().map(|text| text.split(|b| *b == b'\n').next().unwrap_or_default());
    let line = line.map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    Ok(Key::read(&place.file.display().to_string(), &text, line)?)
}

/// A file of a few lines that a person named.
fn small_file(path: &Path) -> Result<Vec<u8>> {
    const BYTES_MAX: u64 = 64 << 10;
    let file = FileStorage::open(path, Access::ReadOnly)?;
    let failed = |e| FormatError::io(file.label(), "read", 0, e);
    let len = file.len().map_err(failed)?;
    if len > BYTES_MAX {
        let what = format!("a file of {len} bytes where a key or a passphrase belongs");
        return Err(FormatError::Key { path: file.label().into(), what }.into());
    }
    let mut text = vec![0; usize::try_from(len).unwrap_or_default()];
    file.read_at(0, &mut text).map_err(failed)?;
    Ok(text)
}

/// Whether the only disk of `file` is the one that is wanted.
fn only(file: &Passage, disk: &str, wanted: &str) -> Result<()> {
    if disk == wanted {
        return Ok(());
    }
    Err(FormatError::ChainBroken { path: label(file), what: format!("has no disk {wanted:?}") }.into())
}

/// A disk of a point of a remote, and what it stands on.
fn point_of_remote(gate: &Gate, file: &Passage, member: &str, cache: Arc<BlockCache>) -> Result<Chain> {
    let disks = xo::Point::read(&file.storage())?.disks()?;
    let missing = || FormatError::ChainBroken { path: label(file), what: format!("has no disk {member:?}") };
    let disk = disks.into_iter().find(|disk| disk.name == member).ok_or_else(missing)?;
    let first = gate.follow(file, disk.path.as_ref())?;
    let (mut layers, mut files) = (Vec::new(), vec![file.path().to_path_buf()]);
    files.extend(vhd::layers(gate, first, &mut layers)?);
    Ok(Chain::new(layers, cache)?.of_files(files))
}

/// The format of `file`; that of objects which are compressed, too, where what lies beside them tells what they are.
fn probed_object(file: &Passage) -> Result<Option<Format>> {
    let storage = file.storage();
    if wrapping(&head(&*storage)?) == Some("zstd") && benji::is_object(file.path()) {
        return Ok(Some(Format::Benji));
    }
    Ok(probe(&*storage)?)
}

fn probed(first: &Passage) -> Result<Format> {
    let storage = first.storage();
    if let Some(Format::Benji) = probed_object(first)? {
        return Ok(Format::Benji);
    }
    if let Some(program) = wrapping(&head(&*storage)?) {
        let what = format!("a file compressed by {program}, which has no random access: decompress it first");
        return Err(unread_as(first, what).into());
    }
    let unknown = || FormatError::Refused {
        path: label(first),
        what: "its format is not known, and raw is only what somebody names".into(),
    };
    Ok(probe(&*first.storage())?.ok_or_else(unknown)?)
}

/// A native point. The older files it draws from are opened now, so that a missing one is known.
fn point(first: &Passage, cache: Arc<BlockCache>) -> aquifer_formats::Result<Chain> {
    let reader = aql::Reader::open_path(first.path())?;
    reader.check_layers()?;
    Ok(Chain::of_point(Arc::new(reader), cache))
}

/// The image `first` and what it stands on, newest first. The snapshot is the first image's.
fn image_layers(
    gate: &Gate,
    first: Passage,
    mut format: Format,
    mut snapshot: Option<&str>,
) -> Result<Vec<Arc<dyn Layer>>> {
    let mut layers: Vec<Arc<dyn Layer>> = Vec::new();
    let mut at = first;
    loop {
        match (format, snapshot.take()) {
            (Format::Raw, None) => {
                layers.push(Arc::new(RawLayer::open(at.storage())?));
                return Ok(layers);
            }
            (Format::Vmdk, None) => {
                vmdk_layers(gate, at, &mut layers)?;
                return Ok(layers);
            }
            (Format::Vhdx, None) => {
                vhdx_layers(gate, at, &mut layers)?;
                return Ok(layers);
            }
            (Format::Vhd, None) => {
                vhd::layers(gate, at, &mut layers)?;
                return Ok(layers);
            }
            (Format::Xo, None) if vhd::is_disk(&at) => {
                vhd::layers(gate, at, &mut layers)?;
                return Ok(layers);
            }
            (Format::Virtnbdbackup, None) => {
                virtnbd_layers(gate, at, &mut layers)?;
                return Ok(layers);
            }
            (Format::Vdi, None) => {
                layers.push(Arc::new(VdiLayer::open(at.storage())?));
                return Ok(layers);
            }
            (Format::Qcow2, name) => {
                let Some(below) = qcow2_layer(gate, &at, name, &mut layers)? else { return Ok(layers) };
                (at, format) = below;
            }
            (other, Some(name)) => return Err(unread(&at, &format!("an internal snapshot {name:?} of {other}")).into()),
            (
                Format::Ova | Format::Vma | Format::Vbk | Format::Xva | Format::Xo | Format::Longhorn | Format::Benji,
                None,
            ) => {
                return Err(unread_as(&at, "an archive as one disk; its disks have names".into()).into());
            }
            (other, None) => return Err(unread(&at, other.name()).into()),
        }
    }
}

/// One qcow2 image; the file below it and the format recorded for that.
fn qcow2_layer(
    gate: &Gate,
    at: &Passage,
    snapshot: Option<&str>,
    layers: &mut Vec<Arc<dyn Layer>>,
) -> Result<Option<(Passage, Format)>> {
    let image = Qcow2::open(at.storage())?;
    layers.push(Arc::new(match snapshot {
        Some(name) => image.snapshot(name)?,
        None => image.active_through(gate, at)?,
    }));
    let Some(backing) = image.backing() else { return Ok(None) };
    let next = gate.follow(at, &backing.name)?;
    Ok(Some((next, recorded(at, backing)?)))
}

/// A VMware disk and its parents, which are VMware disks too.
fn vmdk_layers(gate: &Gate, first: Passage, layers: &mut Vec<Arc<dyn Layer>>) -> Result<()> {
    let (mut at, mut image) = (first.clone(), Vmdk::open(first.storage())?);
    loop {
        layers.push(Arc::new(image.layer_through(gate, &at)?));
        let Some(parent) = image.parent() else { return Ok(()) };
        (at, image) = parent_of(gate, &at, &parent.names(), |file| {
            let parent = Vmdk::open(file.storage())?;
            image.check_parent(&parent).map(|()| parent)
        })?;
    }
}

/// A Hyper-V disk and its parents, which are of the same generation.
fn vhdx_layers(gate: &Gate, first: Passage, layers: &mut Vec<Arc<dyn Layer>>) -> Result<()> {
    let (mut at, mut image) = (first.clone(), Vhdx::open(first.storage())?);
    loop {
        layers.push(Arc::new(image.layer()?));
        let Some(parent) = image.parent() else { return Ok(()) };
        (at, image) = parent_of(gate, &at, parent.names(), |file| {
            let parent = Vhdx::open(file.storage())?;
            image.check_parent(&parent).map(|()| parent)
        })?;
    }
}

/// A stream of virtnbdbackup and those below it.
fn virtnbd_layers(gate: &Gate, first: Passage, layers: &mut Vec<Arc<dyn Layer>>) -> Result<()> {
    let mut at = first;
    loop {
        let layer = Arc::new(VirtnbdLayer::open(at.storage())?);
        layers.push(Arc::clone(&layer) as _);
        let Some(wanted) = layer.below()? else { return Ok(()) };
        at = virtnbd_below(gate, &at, &layer, wanted)?;
    }
}

/// The stream that `layer` in `at` stands on. It lies in the same folder under a name that tells nothing sure; where two may
/// be meant, neither is. The date is a local clock's: it never speaks against the only one.
fn virtnbd_below(gate: &Gate, at: &Passage, layer: &VirtnbdLayer, wanted: &str) -> Result<Passage> {
    // What is made against the last full, or by itself, makes no checkpoint, whatever it calls itself.
    let makes_one = |name: &OsString| {
        let name = name.to_string_lossy();
        ![".diff.", ".copy."].iter().any(|level| name.contains(level))
    };
    let mut found = Vec::new();
    for name in beside(at, &["data"])?.into_iter().filter(makes_one) {
        match gate.follow(at, &name).and_then(|other| Ok((layer.stands_on(other.storage())?, other))) {
            Ok((Fit::No, _)) => {}
            Ok((fit, other)) => found.push((fit, name, other)),
            // It may be the one that is meant.
            Err(error @ FormatError::Io { .. }) => return Err(error.into()),
            Err(_) => {}
        }
    }
    if found.len() > 1 && found.iter().any(|(fit, ..)| *fit == Fit::Yes) {
        found.retain(|(fit, ..)| *fit == Fit::Yes);
    }
    let disk = layer.disk();
    let names = found.iter().map(|(_, name, _)| name.to_string_lossy().into_owned()).collect::<Vec<_>>().join(", ");
    let what = match (found.pop(), found.is_empty()) {
        (Some((.., below)), true) => return Ok(below),
        (None, _) => format!("it stands on the checkpoint {wanted}, which no file beside it holds for disk {disk}"),
        (Some(_), false) => format!(
            "it stands on the checkpoint {wanted} of disk {disk}, which several files beside it hold ({names}): move \
             those of other chains away"
        ),
    };
    Err(FormatError::ChainBroken { path: label(at), what }.into())
}

/// Names of the other files in the folder of `file` that end in one of `ends`, in order.
fn beside(file: &Passage, ends: &[&str]) -> Result<Vec<OsString>> {
    let folder = file.path().parent().unwrap_or(file.path());
    let failed = |e| FormatError::io(folder.display().to_string(), "list", 0, e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let end = Path::new(&name).extension();
        let is_meant = end.is_some_and(|end| ends.iter().any(|wanted| end.eq_ignore_ascii_case(wanted)));
        if is_meant && file.path().file_name() != Some(&name) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// The first of `names` that leads to a file which `accept` takes. What was wrong with the first one is
/// the error, unless another one was refused: that is what the user can change.
fn parent_of<I>(
    gate: &Gate,
    child: &Passage,
    names: &[OsString],
    accept: impl Fn(&Passage) -> aquifer_formats::Result<I>,
) -> Result<(Passage, I)> {
    let mut failed: Option<FormatError> = None;
    for name in names {
        match gate.follow(child, name).and_then(|file| accept(&file).map(|image| (file, image))) {
            Ok(found) => return Ok(found),
            Err(refused @ FormatError::Refused { .. }) => failed = Some(refused),
            Err(error) => failed = Some(failed.unwrap_or(error)),
        }
    }
    let unnamed =
        || FormatError::ChainBroken { path: label(child), what: "it has a parent that it does not name".into() };
    Err(failed.unwrap_or_else(unnamed).into())
}

/// The format an image records for what it stands on.
fn recorded(image: &Passage, backing: &Backing) -> Result<Format> {
    let refused = |what: String| FormatError::Refused { path: label(image), what };
    let shown = backing.name.to_string_lossy();
    let Some(name) = &backing.format else {
        let what = format!("it names {shown:?} without its format, and a format is never guessed for it");
        return Err(refused(what).into());
    };
    match name.parse() {
        Ok(format) => Ok(format),
        Err(unknown) => Err(refused(format!("it names {shown:?}: {unknown}")).into()),
    }
}

fn label(file: &Passage) -> String {
    file.path().display().to_string()
}

fn unread(file: &Passage, what: &str) -> FormatError {
    unread_as(file, format!("this build does not read {what}"))
}

fn unread_as(file: &Passage, what: String) -> FormatError {
    FormatError::unsupported(label(file), what)
}
