//! From what somebody named to a [`Chain`]: which files, in which formats, in which order.
//!
//! Invariants
//! - The first file is named by a person; every other one passes the [`Gate`], and its format is the
//!   one its overlay records. Only the first file's format is ever probed, and never as `raw`.
//! - Depth and cycles are bounded by the gate.
//! - A chain opens completely or not at all: a missing file is an error before anything is served.
//!
//! Not here: the client side of NBD. It lives further up, so whoever opens a chain brings it.

use std::{path::PathBuf, sync::Arc};

use aquifer_formats::{
    Error as FormatError, Layer,
    gate::{Gate, Passage},
    probe::{Format, probe},
    raw::RawLayer,
};
use serde::{Deserialize, Serialize};

use crate::{BlockCache, Chain, Result};

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
    /// A native layer file; what it stands on is in its layer table.
    Native {
        /// The point's own file.
        path: PathBuf,
    },
    /// An export of an NBD server.
    Nbd {
        /// Its URI.
        uri: String,
    },
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
            Err(unread(&first, Format::Aql).into())
        }
        ChainSpec::Image { path, format, allow_backing, snapshot } => {
            let gate = Gate::new(allow_backing)?;
            let first = gate.enter(path)?;
            let format = match format {
                Some(format) => *format,
                None => probed(&first)?,
            };
            if let Some(name) = snapshot
                && format != Format::Qcow2
            {
                let what = format!("{format} has no internal snapshot {name:?}");
                return Err(FormatError::unsupported(first.path().display().to_string(), what).into());
            }
            Chain::new(image_layers(&first, format)?, cache)
        }
    }
}

fn probed(first: &Passage) -> Result<Format> {
    let unknown = || FormatError::Refused {
        path: first.path().display().to_string(),
        what: "its format is not known, and raw is only what somebody names".into(),
    };
    Ok(probe(&*first.storage())?.ok_or_else(unknown)?)
}

fn image_layers(first: &Passage, format: Format) -> Result<Vec<Arc<dyn Layer>>> {
    match format {
        Format::Raw => Ok(vec![Arc::new(RawLayer::open(first.storage())?)]),
        other => Err(unread(first, other).into()),
    }
}

fn unread(file: &Passage, format: Format) -> FormatError {
    FormatError::unsupported(file.path().display().to_string(), format!("this build does not read {format}"))
}
