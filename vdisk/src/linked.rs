//! Disks of other products that native points stand on without having copied them.
//!
//! Invariants
//! - What proves that such a disk is still the one that was linked is a digest over all its files, each with its length
//!   and the time it was changed last, and over what its layers call themselves. A file that grew, was written to, was
//!   merged into another one or is gone makes another digest, and the point is refused.
//! - Only disks in regular files are linked: a device, an export and a disk of a running machine prove nothing.
//!
//! Not here: where the files lie is what a repository's record says, which a person's command wrote.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::{CHAIN_LAYERS_MAX, Error as FormatError, aql::Below, probe::Format, repo::record::LinkedFile};

use crate::{BlockCache, Chain, ChainSpec, Error, Result, format_of, open_chain};

/// A layer has fewer files than this without a gap between their numbers.
const GAP_MAX: u16 = 256;

/// What identifies a disk of another product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linkable {
    /// Number of its format, as native layers hold it.
    pub format: u8,
    /// Digest over what identifies it.
    pub identity: [u8; 32],
    /// Its files, newest first.
    pub files: Vec<LinkedFile>,
}

impl Linkable {
    /// Looks at the disk that was opened from `spec`.
    ///
    /// # Errors
    /// [`FormatError::Refused`] for what cannot prove that it has not changed; I/O.
    pub fn of(spec: &ChainSpec, chain: &Chain) -> Result<Self> {
        let (top, paths) = match spec {
            ChainSpec::Image { path, .. } => (path, image_files(chain)),
            ChainSpec::Member { path, .. } => (path, chain.files().map_or_else(|| vec![path.clone()], <[_]>::to_vec)),
            ChainSpec::Snapshot { path, .. } => (path, vec![path.clone()]),
            ChainSpec::Native { path } | ChainSpec::Mixed { path, .. } => {
                let what = "it is a point of our own: a new one stands on it anyway".into();
                return Err(FormatError::Refused { path: path.display().to_string(), what }.into());
            }
            ChainSpec::Nbd { uri } => {
                let what = "an export proves nothing about itself, so a point cannot stand on it".into();
                return Err(FormatError::Refused { path: uri.clone(), what }.into());
            }
        };
        let mut files: Vec<LinkedFile> = Vec::new();
        for path in paths {
            let seen = LinkedFile::of(&path).map_err(|e| FormatError::io(path.display().to_string(), "link", 0, e))?;
            if !files.contains(&seen) {
                files.push(seen);
            }
        }
        let mut hash = blake3::Hasher::new_derive_key("aquifer 2026 linked disk");
        hash.update(&chain.size().to_le_bytes()).update(&chain.fingerprint()?);
        for file in &files {
            hash.update(&file.bytes.to_le_bytes()).update(&file.modified.to_le_bytes());
        }
        Ok(Self { format: format_number(spec, top)?, identity: *hash.finalize().as_bytes(), files })
    }
}

/// Opens the disk of `spec` for a layer to be put over it.
///
/// # Errors
/// As [`open_chain`] and [`Linkable::of`].
pub fn open_below(spec: &ChainSpec, cache: Arc<BlockCache>) -> Result<Below> {
    let refuse = |uri: &str| {
        let what = "a point does not stand on an export".into();
        Err(FormatError::Refused { path: uri.to_owned(), what })
    };
    let chain = Arc::new(open_chain(spec, cache, &refuse)?);
    let identity = Linkable::of(spec, &chain)?.identity;
    let (layers, label) = (chain.layers().to_vec(), spec_path(spec));
    let read = move |offset: u64, buf: &mut [u8]| {
        chain.read(offset, buf).map_err(|error| match error {
            Error::Format(error) => error,
            other => FormatError::Refused { path: label.clone(), what: other.to_string() },
        })
    };
    Ok(Below::new(identity, layers, Arc::new(read)))
}

fn spec_path(spec: &ChainSpec) -> String {
    match spec {
        ChainSpec::Image { path, .. }
        | ChainSpec::Member { path, .. }
        | ChainSpec::Snapshot { path, .. }
        | ChainSpec::Native { path }
        | ChainSpec::Mixed { path, .. } => path.display().to_string(),
        ChainSpec::Nbd { uri } => uri.clone(),
    }
}

/// The files of images: each layer's own, and the ones beside it.
fn image_files(chain: &Chain) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = Vec::new();
    let mut add = |label: &str| {
        let path = PathBuf::from(label);
        if !paths.contains(&path) {
            paths.push(path);
        }
    };
    for layer in chain.layers().iter().take(CHAIN_LAYERS_MAX) {
        add(layer.label());
        let (mut slot, mut missing) = (0, 0);
        while missing < GAP_MAX && slot < u16::MAX {
            match layer.file(slot) {
                Ok(file) => {
                    add(file.label());
                    missing = 0;
                }
                Err(_) => missing += 1,
            }
            slot += 1;
        }
    }
    paths
}

/// The number that native layers hold for a format.
fn format_number(spec: &ChainSpec, path: &Path) -> Result<u8> {
    let format = match spec {
        ChainSpec::Image { format: Some(format), .. } => Some(*format),
        _ => format_of(path)?,
    };
    Ok(match format {
        Some(Format::Qcow2) => 1,
        Some(Format::Raw) => 2,
        Some(Format::Vmdk) => 3,
        Some(Format::Vhdx) => 4,
        Some(Format::Vhd) => 5,
        Some(Format::Vbk) => 6,
        Some(Format::Fidx) => 7,
        Some(Format::Vdi) => 8,
        Some(Format::Ova) => 9,
        Some(Format::Vma) => 10,
        Some(Format::Virtnbdbackup) => 11,
        Some(Format::Xva) => 12,
        Some(Format::Xo) => 13,
        Some(Format::Longhorn) => 14,
        Some(Format::Benji) => 15,
        _ => 255,
    })
}
