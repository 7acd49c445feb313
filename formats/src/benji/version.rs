//! Versions as documents: every release that Benji itself still reads.
//!
//! Invariants
//! - A list of versions costs memory by their number, not by that of their blocks.
//!
//! Not here: the lists of blocks (`list`).

use std::{fmt, marker::PhantomData, path::Path};

use jiff::Timestamp;
use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess},
};

use super::{
    list::Kept,
    object::{Meta, description_of},
};
use crate::{Error, Result, Storage, document, objects::Folder};

/// Longest document, in bytes: a volume of some 8 TiB in blocks of 4 MiB.
const BYTES_MAX: u64 = 512 << 20;

/// Names of versions were numbers once.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Name {
    Number(u64),
    Text(String),
}

/// What an entry of a document is called.
#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    Uid,
    #[serde(alias = "name")]
    Volume,
    Date,
    Size,
    BlockSize,
    /// `valid`, `invalid`, `incomplete`; older releases say `valid` in a field of its own.
    Status,
    Valid,
    Blocks,
    #[serde(other)]
    Other,
}

/// One version in a document.
struct Raw<B> {
    version: Version,
    blocks: B,
}

/// Reads one entry by entry, for its size bounds the list of its blocks while that is read.
struct Fields<B>(PhantomData<B>);

impl<'de, B: Kept> Deserialize<'de> for Raw<B> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(Fields(PhantomData))
    }
}

impl<'de, B: Kept> de::Visitor<'de> for Fields<B> {
    type Value = Raw<B>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a version")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw<B>, A::Error> {
        let (mut uid, mut volume, mut size, mut block_bytes, mut blocks) = (None, None, None, None, None);
        let (mut date, mut status, mut valid) = (String::new(), None::<String>, None::<bool>);
        while let Some(field) = map.next_key::<Field>()? {
            match field {
                Field::Uid => uid = Some(map.next_value::<Name>()?),
                Field::Volume => volume = Some(map.next_value::<String>()?),
                Field::Date => date = map.next_value()?,
                Field::Size => size = Some(map.next_value::<u64>()?),
                Field::BlockSize => block_bytes = Some(map.next_value::<u64>()?),
                Field::Status => status = map.next_value()?,
                Field::Valid => valid = map.next_value()?,
                Field::Blocks if blocks.is_some() => return Err(de::Error::duplicate_field("blocks")),
                Field::Blocks => blocks = Some(B::next(&mut map, blocks_of(size, block_bytes))?),
                Field::Other => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        let missing = |field| move || de::Error::missing_field(field);
        let uid = match uid.ok_or_else(missing("uid"))? {
            Name::Number(number) => format!("V{number:010}"),
            Name::Text(text) => text,
        };
        let refusal = match (status.as_deref(), valid) {
            (Some("incomplete"), _) => Some("its backup never ended, or still runs"),
            (Some("invalid"), _) | (None, Some(false)) => Some("Benji found it damaged"),
            _ => None,
        };
        let version = Version {
            volume: volume.ok_or_else(missing("volume"))?,
            created: date.parse().or_else(|_| format!("{date}Z").parse()).ok(),
            refusal,
            size: size.ok_or_else(missing("size"))?,
            block_bytes: block_bytes.ok_or_else(missing("block_size"))?,
            uid,
        };
        Ok(Raw { version, blocks: blocks.ok_or_else(missing("blocks"))? })
    }
}

/// How many blocks a volume has, where its sizes are known.
fn blocks_of(size: Option<u64>, block_bytes: Option<u64>) -> Option<u64> {
    let block_bytes = block_bytes.filter(|bytes| *bytes > 0)?;
    Some(size?.div_ceil(block_bytes))
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "B: Kept"))]
struct Document<B> {
    metadata_version: String,
    versions: Vec<Raw<B>>,
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
}

/// The versions that the document in `storage`, which lies at `path`, holds, and what is kept of their blocks; undone
/// first where it is an object.
pub(super) fn read<B: Kept>(storage: &dyn Storage, path: &Path) -> Result<Vec<(Version, B)>> {
    let label = storage.label();
    let description = description_of(path);
    let folder = Folder::open(path.parent().unwrap_or(Path::new("/")))?;
    let steps = match folder.find(description.file_name().unwrap_or_default())? {
        Some(description) => Meta::read(&description)?.steps(),
        None => 0,
    };
    let document: Document<B> = match steps {
        0 => document::read(storage, BYTES_MAX)?,
        1 => document::read_zstd(storage, BYTES_MAX)?,
        _ => return Err(Error::unsupported(label, format!("a version transformed {steps} times"))),
    };
    let major = document.metadata_version.split('.').next().unwrap_or_default();
    if !matches!(major, "1" | "2" | "3") {
        return Err(Error::unsupported(label, format!("versions as of {:?}", document.metadata_version)));
    }
    Ok(document.versions.into_iter().map(|raw| (raw.version, raw.blocks)).collect())
}
