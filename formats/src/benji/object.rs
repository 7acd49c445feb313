//! One object of a storage with its description: what undoes its transforms.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    Error, Result, codec, document,
    objects::{self, damaged},
    storage::FileStorage,
};

/// Longest description, in bytes.
const META_BYTES_MAX: u64 = 64 << 10;
/// Most transforms of an object.
const TRANSFORMS_MAX: usize = 4;

/// The description of the object at `path`.
pub(super) fn description_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".meta");
    name.into()
}

/// One step that was done to an object, in words of its writer.
#[derive(Debug, Deserialize)]
struct Transform {
    #[serde(default)]
    module: String,
    #[serde(default)]
    materials: Value,
}

/// What a description says.
#[derive(Debug, Deserialize)]
pub(super) struct Meta {
    metadata_version: String,
    /// Bytes that are stored.
    object_size: u64,
    /// Bytes that come out.
    pub(super) size: u64,
    #[serde(default)]
    pub(super) checksum: Option<String>,
    #[serde(default)]
    transforms: Vec<Transform>,
}

impl Meta {
    /// Reads a description.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other versions, and for transforms that are not undone here: encryption.
    pub(super) fn read(file: &FileStorage) -> Result<Self> {
        use crate::Storage as _;
        let meta: Self = document::read(file, META_BYTES_MAX)?;
        let major = meta.metadata_version.split('.').next().unwrap_or_default();
        if !matches!(major, "1" | "2") {
            let what = format!("descriptions of version {:?}", meta.metadata_version);
            return Err(Error::unsupported(file.label(), what));
        }
        if let Some(other) = meta.transforms.iter().find(|transform| transform.module != "zstd") {
            let what = match other.module.starts_with("aes_") {
                true => format!("an object encrypted by {}", other.module),
                false => format!("an object transformed by {:?}", other.module),
            };
            return Err(Error::unsupported(file.label(), what));
        }
        if meta.transforms.len() > TRANSFORMS_MAX {
            return Err(Error::unsupported(file.label(), format!("{} transforms", meta.transforms.len())));
        }
        Ok(meta)
    }

    /// How often it was transformed.
    pub(super) fn steps(&self) -> usize {
        self.transforms.len()
    }

    /// Undoes the transforms of `object`; exactly the bytes that the description promises come out, at most `bytes_max`.
    pub(super) fn undo(&self, object: &FileStorage, bytes_max: usize, out: &mut Vec<u8>) -> Result<()> {
        out.clear();
        let stored_max = (bytes_max + bytes_max / 128 + 4096) as u64;
        objects::whole(object, stored_max, |stored| {
            let bad = |what: String| damaged(object, stored.len() as u64, what);
            if stored.len() as u64 != self.object_size {
                return Err(bad(format!("its description says {} bytes", self.object_size)));
            }
            out.extend_from_slice(stored);
            for transform in self.transforms.iter().rev() {
                let before = std::mem::take(out);
                if needs_dictionary(&before) {
                    return Err(Error::unsupported(crate::Storage::label(object), "zstd with a dictionary"));
                }
                let told = transform.materials.get("original_size").and_then(Value::as_u64);
                let len = told.and_then(|len| usize::try_from(len).ok()).filter(|len| *len <= bytes_max);
                let len = len.ok_or_else(|| bad(format!("a step of {told:?} bytes")))?;
                codec::zstd_up_to(&before, len, out).map_err(|e| bad(e.to_string()))?;
            }
            if out.len() as u64 != self.size {
                let what = format!("{} bytes come out, where its description says {}", out.len(), self.size);
                out.clear();
                return Err(bad(what));
            }
            Ok(())
        })
    }
}

/// Whether a frame of zstd says that it needs a dictionary.
fn needs_dictionary(frame: &[u8]) -> bool {
    frame.starts_with(b"\x28\xb5\x2f\xfd") && frame.get(4).is_some_and(|flags| flags & 3 != 0)
}
