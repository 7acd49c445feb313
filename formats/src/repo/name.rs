//! Names of objects. The only place where paths inside a repository are made.
//!
//! Invariants
//! - Built from UUIDs, numbers and checked disk names: relative, without `..`, links or surprises.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Error, Result};

/// Longest disk name, in bytes.
const DISK_NAME_BYTES_MAX: usize = 64;

/// A disk's name: a letter or digit, then letters, digits, `.`, `_`, `-`. It is a file name, an export
/// name and a word of the command line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskName(String);

impl DiskName {
    /// Checks a name.
    ///
    /// # Errors
    /// [`Error::Refused`] with the rule.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let body = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        if first && name.len() <= DISK_NAME_BYTES_MAX && name.chars().all(body) {
            return Ok(Self(name));
        }
        let what = format!(
            "a disk name is 1 to {DISK_NAME_BYTES_MAX} letters, digits, `.`, `_`, `-`, and begins with a letter or digit"
        );
        Err(Error::Refused { path: name.chars().take(80).collect(), what })
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for DiskName {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        Self::new(name)
    }
}

impl From<DiskName> for String {
    fn from(name: DiskName) -> Self {
        name.0
    }
}

impl fmt::Display for DiskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

pub(super) const REPOSITORY: &str = "aquifer.json";
pub(super) const OWNERS: &str = "owners";
pub(super) const MACHINES: &str = "machines";
pub(super) const LEASES: &str = "leases";

pub(super) fn owner(number: u64) -> String {
    format!("{OWNERS}/{number:08}.json")
}

pub(super) fn machine_folder(machine: Uuid) -> String {
    format!("{MACHINES}/{machine}")
}

pub(super) fn machine(machine: Uuid) -> String {
    format!("{MACHINES}/{machine}/machine.json")
}

/// Where a machine's first name is claimed.
pub(super) fn claim(machine: &str) -> String {
    let mut hash = blake3::Hasher::new_derive_key("aquifer 2026 machine name");
    format!("names/{}.json", hash.update(machine.as_bytes()).finalize().to_hex())
}

pub(super) fn points(machine: Uuid) -> String {
    format!("{MACHINES}/{machine}/points")
}

pub(super) fn point_folder(machine: Uuid, point: Uuid) -> String {
    format!("{MACHINES}/{machine}/points/{point}")
}

pub(super) fn begin(machine: Uuid, point: Uuid) -> String {
    format!("{MACHINES}/{machine}/points/{point}/begin.json")
}

pub(super) fn point(machine: Uuid, point: Uuid) -> String {
    format!("{MACHINES}/{machine}/points/{point}/point.json")
}

pub(super) fn layer(machine: Uuid, point: Uuid, disk: &DiskName) -> String {
    format!("{MACHINES}/{machine}/points/{point}/{disk}.aql")
}

/// From one point's layer to another's.
pub(super) fn hint(point: Uuid, disk: &DiskName) -> String {
    format!("../{point}/{disk}.aql")
}

/// The point and disk a path from a layer's folder names, if it has the shape of [`hint`].
pub(super) fn parse_hint(hint: &str) -> Option<(Uuid, DiskName)> {
    let (point, file) = hint.strip_prefix("../")?.split_once('/')?;
    Some((point.parse().ok()?, DiskName::new(file.strip_suffix(".aql")?).ok()?))
}

pub(super) fn chain(machine: Uuid) -> String {
    format!("{MACHINES}/{machine}/chain")
}

pub(super) fn generation(machine: Uuid, number: u64) -> String {
    format!("{MACHINES}/{machine}/chain/{number:012}.json")
}

pub(super) fn trace(machine: Uuid, disk: &DiskName) -> String {
    format!("{MACHINES}/{machine}/traces/{disk}.trace")
}

pub(super) fn lease(lease: Uuid) -> String {
    format!("{LEASES}/{lease}.json")
}

/// The number in `<number>.json`.
pub(super) fn parse_number(file: &str) -> Option<u64> {
    file.strip_suffix(".json")?.parse().ok()
}

/// The id in `<uuid>.json`.
pub(super) fn parse_id(file: &str) -> Option<Uuid> {
    file.strip_suffix(".json")?.parse().ok()
}
