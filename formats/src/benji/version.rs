//! Versions as documents: every release that Benji itself still reads.

use std::{path::Path, sync::Arc};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, de};

use super::object::{Meta, description_of};
use crate::{
    Error, Result, Storage, document,
    objects::from_hexadecimal,
    storage::{Access, FileStorage},
};

/// Longest document, in bytes: a volume of some 8 TiB in blocks of 4 MiB.
const BYTES_MAX: u64 = 512 << 20;

/// Which of the digests that Benji can be told to use is not kept: its length leaves two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sum {
    /// 64 digits.
    Short([u8; 32]),
    /// 128 digits.
    Long([u8; 64]),
}

/// The two halves of a block's name.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Uid {
    left: Option<u64>,
    right: Option<u64>,
}

/// One block of the list.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Listed {
    #[serde(alias = "id")]
    idx: u64,
    uid: Option<Uid>,
    size: u32,
    #[serde(default, deserialize_with = "sum")]
    checksum: Option<Sum>,
}

fn sum<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Sum>, D::Error> {
    struct Digits;
    impl<'de> de::Visitor<'de> for Digits {
        type Value = Option<Sum>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("64 or 128 hexadecimal digits")
        }

        fn visit_none<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
            from.deserialize_str(self)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            let found = match text.len() {
                64 => from_hexadecimal(text).map(Sum::Short),
                _ => from_hexadecimal(text).map(Sum::Long),
            };
            found.map(Some).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
        }
    }
    from.deserialize_option(Digits)
}

/// Names of versions were numbers once.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Name {
    Number(u64),
    Text(String),
}

/// One version in a document.
#[derive(Debug, Deserialize)]
struct Raw {
    uid: Name,
    #[serde(alias = "name")]
    volume: String,
    #[serde(default)]
    date: String,
    size: u64,
    block_size: u64,
    /// `valid`, `invalid`, `incomplete`; older releases say `valid` in a field of its own.
    #[serde(default)]
    status: Option<String>,
    #[serde(default)]
    valid: Option<bool>,
    blocks: Vec<Listed>,
}

#[derive(Debug, Deserialize)]
struct Document {
    metadata_version: String,
    versions: Vec<Raw>,
}

/// A block that is stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub(super) index: u64,
    pub(super) uid: (u64, u64),
    pub(super) len: u32,
    pub(super) sum: Sum,
}

/// One version of a volume.
#[derive(Debug)]
pub struct Version {
    uid: String,
    volume: String,
    created: Option<Timestamp>,
    /// Why it cannot be served.
    refusal: Option<&'static str>,
    pub(super) size: u64,
    pub(super) block_bytes: u64,
    /// By index.
    pub(super) blocks: Vec<Block>,
}

impl Version {
    /// What Benji calls it: `V0000000001`.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// The volume it is a version of.
    pub fn volume(&self) -> &str {
        &self.volume
    }

    /// When its backup began.
    pub fn created(&self) -> Option<Timestamp> {
        self.created
    }

    /// Size of the volume in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Why it cannot be served, if so.
    pub fn refusal(&self) -> Option<&'static str> {
        self.refusal
    }

    fn of(raw: Raw, label: &str) -> Result<Self> {
        let uid = match raw.uid {
            Name::Number(number) => format!("V{number:010}"),
            Name::Text(text) => text,
        };
        let refusal = match (raw.status.as_deref(), raw.valid) {
            (Some("incomplete"), _) => Some("its backup never ended, or still runs"),
            (Some("invalid"), _) | (None, Some(false)) => Some("Benji found it damaged"),
            _ => None,
        };
        let bad = |what: String| Error::corrupt(label, 0, format!("version {uid}: {what}"));
        let mut blocks = Vec::new();
        for listed in raw.blocks {
            let Some((left, right)) = listed.uid.and_then(|uid| Some((uid.left?, uid.right?))) else { continue };
            let sum = listed.checksum.ok_or_else(|| bad(format!("block {} without its checksum", listed.idx)))?;
            blocks.push(Block { index: listed.idx, uid: (left, right), len: listed.size, sum });
        }
        blocks.sort_unstable_by_key(|block| block.index);
        let created = raw.date.parse().or_else(|_| format!("{}Z", raw.date).parse()).ok();
        let (size, block_bytes) = (raw.size, raw.block_size);
        Ok(Self { uid, volume: raw.volume, created, refusal, size, block_bytes, blocks })
    }
}

/// The versions that the document in `storage`, which lies at `path`, holds; undone first where it is an object.
pub(super) fn read(storage: &Arc<dyn Storage>, path: &Path) -> Result<Vec<Version>> {
    let label = storage.label();
    let description = description_of(path);
    let steps = match description.is_file() {
        true => Meta::read(&FileStorage::open(&description, Access::ReadOnly)?)?.steps(),
        false => 0,
    };
    let document: Document = match steps {
        0 => document::read(&**storage, BYTES_MAX)?,
        1 => document::read_zstd(&**storage, BYTES_MAX)?,
        _ => return Err(Error::unsupported(label, format!("a version transformed {steps} times"))),
    };
    let major = document.metadata_version.split('.').next().unwrap_or_default();
    if !matches!(major, "1" | "2" | "3") {
        return Err(Error::unsupported(label, format!("versions as of {:?}", document.metadata_version)));
    }
    document.versions.into_iter().map(|raw| Version::of(raw, label)).collect()
}
