//! From a SOURCE word to disks that can be opened.
//!
//! Invariants
//! - Nothing is opened that the word, or an option beside it, does not name; what images name is
//!   the gate's business.
//! - A selection names at least one disk, and every name once.
//!
//! Not here: overlays, doors, what a machine needs beside its disks.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::{
    pbs::{Manifest, ManifestFile},
    probe::Format,
    xo::is_folder_of_parts,
};
use aquifer_vdisk::{BlockCache, Chain, ChainSpec, Disk, KeyPlace, members, open_chain};

use super::{Source, repository::SelectedPoint};
use crate::{
    context::{Context, quoted},
    fail::{Code, Fail, Result},
};

/// Options of every verb that reads a SOURCE.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SourceOptions {
    /// Only this disk; may be given several times
    #[arg(long, value_name = "NAME")]
    pub disk: Vec<String>,
    /// Read this internal snapshot of the image instead of its present state
    #[arg(long, value_name = "NAME")]
    pub snapshot: Option<String>,
    /// Also follow backing files that lie in this folder; may be given several times
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// What opens encrypted snapshots.
    #[command(flatten)]
    pub key: KeyOptions,
}

/// The key of encrypted snapshots of Proxmox Backup Server.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct KeyOptions {
    /// Key file of an encrypted snapshot of Proxmox Backup Server
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// File whose first line is the passphrase of that key file
    #[arg(long, value_name = "FILE", requires = "key_file")]
    pub key_passphrase: Option<PathBuf>,
}

impl KeyOptions {
    /// Where the key lies, in full: a session opens it again from elsewhere.
    fn place(&self) -> Result<Option<KeyPlace>> {
        let full = |path: &PathBuf| std::path::absolute(path).map_err(|e| Fail::io(path.display(), "open", &e));
        let Some(file) = &self.key_file else { return Ok(None) };
        Ok(Some(KeyPlace { file: full(file)?, passphrase: self.key_passphrase.as_ref().map(full).transpose()? }))
    }
}

/// What a SOURCE word stands for.
#[derive(Clone, Debug)]
pub struct Selection {
    /// The word, as messages name it.
    pub word: String,
    /// Its disks, in the machine's order.
    pub disks: Vec<SelectedDisk>,
    /// The point, where the word names one in the repository.
    pub point: Option<SelectedPoint>,
}

/// One disk of a selection.
#[derive(Clone, Debug)]
pub struct SelectedDisk {
    /// Name of the disk, of its export and of its file.
    pub name: String,
    /// What it is opened from.
    pub spec: ChainSpec,
}

/// Longest name of a disk, bytes.
const NAME_MAX: usize = 64;

/// Finds what `word` stands for.
///
/// # Errors
/// [`Code::Source`] for a word that means nothing, [`Code::NotFound`] for one that leads nowhere.
pub fn select(context: &Context, word: &str, options: &SourceOptions) -> Result<Selection> {
    let (disks, point) = match Source::parse(word)? {
        Source::Path(path) => (images(&super::unwrap::plain(context, &path)?, options)?, None),
        Source::Raw(path) => (vec![image(&path, Some(Format::Raw), options)?], None),
        Source::Nbd(uri) => (vec![nbd(uri)?], None),
        Source::Point { machine, point, disk } => {
            let found = super::repository::disks(context, &machine, &point, disk.as_deref());
            let (disks, point) = found.map_err(|fail| match fail.code {
                Code::NoRepository => {
                    let what =
                        format!("`{word}` is no file here, and as a machine it needs a repository: {}", fail.what);
                    Fail { what, ..fail }
                }
                _ => fail,
            })?;
            (disks, Some(point))
        }
    };
    let disks = keep(disks, &options.disk, word)?;
    Ok(Selection { word: word.to_owned(), disks, point })
}

/// The disks of a snapshot of Proxmox Backup Server, if `path` is its folder.
fn snapshot(path: &Path, options: &SourceOptions) -> Result<Option<Vec<SelectedDisk>>> {
    if !path.is_dir() {
        return Ok(None);
    }
    let label = path.display().to_string();
    let folder = std::path::absolute(path).map_err(|e| Fail::io(&label, "open", &e))?;
    let Some(manifest) = Manifest::of(&folder)? else { return Ok(None) };
    let key = options.key.place()?;
    let disk = |(name, file): (&str, &ManifestFile)| SelectedDisk {
        name: name_from(name),
        spec: ChainSpec::Snapshot { path: folder.join(&file.filename), key: key.clone() },
    };
    let disks: Vec<SelectedDisk> = manifest.disks().map(disk).collect();
    if disks.is_empty() {
        return Err(Fail::new(Code::Source, format!("the snapshot {label} holds no disks")).at(label));
    }
    Ok(Some(disks))
}

/// The disks of an archive or a snapshot, or the one that a file is.
fn images(path: &Path, options: &SourceOptions) -> Result<Vec<SelectedDisk>> {
    if let Some(disks) = snapshot(path, options)? {
        return Ok(disks);
    }
    let single = image(path, None, options)?;
    let ChainSpec::Image { path, .. } = &single.spec else { return Ok(vec![single]) };
    let members = members(path)?;
    if members.is_empty() {
        return Ok(vec![single]);
    }
    if options.snapshot.is_some() {
        return Err(Fail::new(Code::Source, format!("{} is an archive and has no snapshots", path.display())));
    }
    let short = |member: &str| name_from(Path::new(member).file_stem().and_then(|s| s.to_str()).unwrap_or_default());
    let shorts: Vec<String> = members.iter().map(|member| short(member)).collect();
    let disk = |member: String| {
        let name = short(&member);
        // Machines in one file may call their disks alike.
        let several = shorts.iter().filter(|other| **other == name).count() > 1;
        let name = if several { name_from(&member) } else { name };
        SelectedDisk { name, spec: ChainSpec::Member { path: path.clone(), member } }
    };
    Ok(members.into_iter().map(disk).collect())
}

fn image(path: &Path, format: Option<Format>, options: &SourceOptions) -> Result<SelectedDisk> {
    let label = path.display().to_string();
    let metadata = std::fs::metadata(path).map_err(|e| Fail::io(&label, "open", &e))?;
    let mut path = std::path::absolute(path).map_err(|e| Fail::io(&label, "open", &e))?;
    let allow_backing = options.allow_backing.clone();
    let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
    let name = name_from(stem.strip_suffix(".alias").unwrap_or(stem));
    let mut format = format;
    if metadata.is_dir() {
        if !is_folder_of_parts(&path) {
            return Err(folder(&path));
        }
        // Opened by the part that every such folder has.
        (path, format) = (path.join("footer"), Some(Format::Xo));
    }
    let native = format.is_none() && path.extension().is_some_and(|e| e == "aql");
    let spec = match (native, options.key.place()?) {
        (true, _) => ChainSpec::Native { path },
        (false, Some(key)) => ChainSpec::Snapshot { path, key: Some(key) },
        (false, None) => ChainSpec::Image { path, format, allow_backing, snapshot: options.snapshot.clone() },
    };
    Ok(SelectedDisk { name, spec })
}

/// Why a folder is no source, with the command that is.
fn folder(path: &Path) -> Fail {
    let fail = Fail::new(Code::Source, format!("{} is a folder", path.display())).at(path.display());
    if path.join("aquifer.json").is_file() {
        return fail.help(format!("aquifer -r {} points", quoted(&path.display().to_string())));
    }
    if super::store::list(path).is_ok() {
        return fail.help(format!("aquifer points {}/", quoted(path.display().to_string().trim_end_matches('/'))));
    }
    fail.help(format!("aquifer info {}/FILE", quoted(path.display().to_string().trim_end_matches('/'))))
}

fn nbd(uri: String) -> Result<SelectedDisk> {
    let (_, rest) = uri.split_once("://").unwrap_or(("", &uri));
    let path = rest.split(['?', '#']).next().unwrap_or_default();
    let export = path.split_once('/').map(|(_, export)| export).unwrap_or_default();
    Ok(SelectedDisk { name: name_from(export), spec: ChainSpec::Nbd { uri } })
}

/// A disk name made of a file or export name: letters, digits, `.`, `_`, `-`.
fn name_from(text: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
    let name: String = text.chars().take(NAME_MAX).map(plain).collect();
    let name = name.trim_start_matches('.').to_owned();
    if name.is_empty() { "disk".into() } else { name }
}

/// Keeps the disks that were asked for, in the order they were asked for.
fn keep(disks: Vec<SelectedDisk>, wanted: &[String], word: &str) -> Result<Vec<SelectedDisk>> {
    if wanted.is_empty() {
        return Ok(disks);
    }
    let mut kept: Vec<SelectedDisk> = Vec::new();
    for name in wanted {
        if kept.iter().any(|disk| disk.name == *name) {
            continue;
        }
        let found = disks.iter().find(|disk| disk.name == *name).ok_or_else(|| no_disk(&disks, name, word))?;
        kept.push(found.clone());
    }
    Ok(kept)
}

fn no_disk(disks: &[SelectedDisk], name: &str, word: &str) -> Fail {
    let names: Vec<&str> = disks.iter().map(|disk| disk.name.as_str()).collect();
    Fail::new(Code::NotFound, format!("{word} has no disk `{name}`; it has {}", names.join(", ")))
        .help(format!("aquifer info {}", quoted(word)))
}

impl Selection {
    /// The only disk.
    ///
    /// # Errors
    /// [`Code::Ambiguous`] where there are several.
    pub fn single(&self) -> Result<&SelectedDisk> {
        match self.disks.as_slice() {
            [disk] => Ok(disk),
            several => {
                let names: Vec<&str> = several.iter().map(|disk| disk.name.as_str()).collect();
                let first = names.first().copied().unwrap_or("NAME");
                let what = format!("{} has several disks: {}", self.word, names.join(", "));
                Err(Fail::new(Code::Ambiguous, what).help_again(format!("--disk {}", quoted(first))))
            }
        }
    }
}

impl SelectedDisk {
    /// Opens the chain.
    ///
    /// # Errors
    /// Files that are missing, refused, damaged or of an unknown format.
    pub fn open_chain(&self, cache: &Arc<BlockCache>) -> Result<Arc<Chain>> {
        let connect = |uri: &str| super::connect::layer(uri);
        let chain = open_chain(&self.spec, cache.clone(), &connect).map_err(|error| self.advise(error.into()))?;
        Ok(Arc::new(chain))
    }

    /// Opens it as a read-only disk.
    pub fn open(&self, cache: &Arc<BlockCache>) -> Result<Arc<Disk>> {
        Ok(Arc::new(Disk::read_only(&self.name, self.open_chain(cache)?)))
    }

    /// Adds the command that gets around a refusal.
    fn advise(&self, fail: Fail) -> Fail {
        let ChainSpec::Image { path, format: None, .. } = &self.spec else { return fail };
        match fail.code {
            Code::Refused if fail.what.contains("raw is only") => fail
                .help(format!("aquifer info {}    # if it is a raw image", quoted(&format!("raw:{}", path.display())))),
            Code::Refused if fail.what.contains("lies outside") => {
                fail.help_again("--allow-backing DIR    # if you trust the image")
            }
            _ => fail,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_plain() {
        assert_eq!(name_from("db01"), "db01");
        assert_eq!(name_from("a b/c:ü"), "a_b_c__");
        assert_eq!(name_from(""), "disk");
        assert_eq!(name_from("..hidden"), "hidden");
        assert_eq!(name_from(&"x".repeat(200)).len(), NAME_MAX);
    }

    #[test]
    fn an_export_names_its_disk() {
        let name = |uri: &str| nbd(uri.to_owned()).expect("nbd").name;
        assert_eq!(name("nbd://host:10809/vda"), "vda");
        assert_eq!(name("nbd+unix:///vdb?socket=/run/x"), "vdb");
        assert_eq!(name("nbd+unix:///?socket=/run/x"), "disk");
        assert_eq!(name("nbd://host"), "disk");
    }
}
