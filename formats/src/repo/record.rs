//! What the JSON objects of a repository say.
//!
//! Invariants
//! - Each names its schema and version; another version is refused, unknown fields of this one are ignored.
//! - Times are UTC and for people; bytes are integers; ids are UUIDs; hashes are hexadecimal.
//! - Plain types only: nothing read here chooses a type, a path or a command.

use std::{fmt, os::unix::fs::MetadataExt as _, path::Path};

use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::{DiskName, Error, Result, Store, UefiVariables};

/// A record with a schema name.
pub trait Record: Serialize + DeserializeOwned {
    /// `aquifer.<what>.v<version>`.
    const SCHEMA: &'static str;
}

macro_rules! record {
    ($type:ty, $schema:literal) => {
        impl Record for $type {
            const SCHEMA: &'static str = $schema;
        }
    };
}

record!(RepositoryRecord, "aquifer.repository.v1");
record!(OwnerRecord, "aquifer.owner.v1");
record!(MachineRecord, "aquifer.machine.v1");
record!(BeginRecord, "aquifer.begin.v1");
record!(PointRecord, "aquifer.point.v1");
record!(ManifestRecord, "aquifer.manifest.v1");
record!(LeaseRecord, "aquifer.lease.v1");

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    schema: String,
    #[serde(flatten)]
    body: T,
}

#[derive(Deserialize)]
struct SchemaOnly {
    schema: String,
}

/// The bytes of a record.
pub(super) fn encode<T: Record>(record: &T) -> Result<Vec<u8>> {
    let envelope = Envelope { schema: T::SCHEMA.to_owned(), body: record };
    let odd = |e: serde_json::Error| crate::Error::corrupt(T::SCHEMA, 0, format!("cannot be written: {e}"));
    let mut bytes = serde_json::to_vec_pretty(&envelope).map_err(odd)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// A record from its bytes; `path` is where they were read, for the message.
///
/// # Errors
/// Not JSON, another schema, a field that is missing or makes no sense.
pub fn decode<T: Record>(path: &str, bytes: &[u8]) -> Result<T> {
    let odd = |e: serde_json::Error| crate::Error::corrupt(path, 0, format!("not a valid {}: {e}", T::SCHEMA));
    let schema: SchemaOnly = serde_json::from_slice(bytes).map_err(odd)?;
    if schema.schema != T::SCHEMA {
        let seen: String = schema.schema.chars().take(80).collect();
        return Err(crate::Error::unsupported(path, format!("record {seen:?}, expected {:?}", T::SCHEMA)).into());
    }
    let envelope: Envelope<T> = serde_json::from_slice(bytes).map_err(odd)?;
    Ok(envelope.body)
}

/// A record of the store; `None` if there is none.
pub(super) fn read<T: Record>(store: &Store, name: &str) -> Result<Option<T>> {
    store.get(name)?.map(|bytes| decode(&store.path_of(name), &bytes)).transpose()
}

/// As [`read`], where the record must be there.
pub(super) fn need<T: Record>(store: &Store, name: &str) -> Result<T> {
    read(store, name)?.ok_or_else(|| Error::not_found(&store.path_of(name), "record"))
}

/// BLAKE3 of something, as 64 hexadecimal digits in JSON.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl TryFrom<String> for Hash {
    type Error = blake3::HexError;

    fn try_from(text: String) -> std::result::Result<Self, Self::Error> {
        blake3::Hash::from_hex(text).map(|hash| Self(*hash.as_bytes()))
    }
}

impl From<Hash> for String {
    fn from(hash: Hash) -> Self {
        blake3::Hash::from_bytes(hash.0).to_hex().to_string()
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from(*self))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `aquifer.json`: what a repository is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryRecord {
    /// The repository.
    pub id: Uuid,
    /// When it was made.
    pub created: Timestamp,
    /// The key of content ids, as 64 hexadecimal digits.
    pub content_key: String,
    /// Who made it; see `owners/` for later ones.
    pub owner: Owner,
    /// What new layers are like where nobody says otherwise.
    pub defaults: Defaults,
}

/// A controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Identity of the installation.
    pub id: Uuid,
    /// Name for people.
    pub name: String,
}

/// How new layers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defaults {
    /// Block size in bytes, a power of two from 16 KiB to 4 MiB.
    pub block_bytes: u32,
    /// Compression.
    pub compression: CompressionName,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { block_bytes: 64 << 10, compression: CompressionName::Zstd1 }
    }
}

/// Compression, by the name people type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CompressionName {
    /// zstd level 1: the default.
    #[serde(rename = "zstd-1")]
    Zstd1,
    /// zstd level 3: about 2 % smaller, a third slower.
    #[serde(rename = "zstd-3")]
    Zstd3,
    /// LZ4.
    #[serde(rename = "lz4")]
    Lz4,
    /// None.
    #[serde(rename = "raw")]
    Raw,
}

/// `owners/<n>.json`: who took the repository over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerRecord {
    /// 1 for the first takeover.
    pub number: u64,
    /// The new owner.
    pub owner: Owner,
    /// When.
    pub since: Timestamp,
}

/// `machine.json`: one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRecord {
    /// The machine in this repository.
    pub id: Uuid,
    /// Its first name; manifests know later ones.
    pub name: String,
    /// When it was first seen.
    pub created: Timestamp,
}

/// What starts a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// BIOS.
    Bios,
    /// UEFI.
    Uefi,
}

/// A virtual machine, as it was when a point was taken. Travels with the point.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDescription {
    /// Its name.
    pub name: String,
    /// Its own id, as its hypervisor and firmware tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
    /// What starts it, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<Firmware>,
    /// Machine type, by QEMU's names: `q35`, `pc`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_type: Option<String>,
    /// What its firmware remembers, if that was backed up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variables: Option<UefiVariables>,
    /// Processors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Memory in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Disks, in the order of the description.
    #[serde(default)]
    pub disks: Vec<DiskDescription>,
    /// Network cards.
    #[serde(default)]
    pub nics: Vec<NicDescription>,
}

/// A disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDescription {
    /// Its name.
    pub name: DiskName,
    /// Its size in bytes, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// How it is attached: `virtio`, `scsi`, `sata`, `ide`, `nvme`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    /// Place in the boot order, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_order: Option<u32>,
}

/// A network card of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicDescription {
    /// Its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// The network it is attached to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Its model: `virtio`, `e1000e`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// Full or increment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PointKind {
    /// Stands on no other point.
    Full,
    /// Stands on its parent.
    Increment,
}

/// How it was found out what to store of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum Found {
    /// Everything was read and stored.
    Everything,
    /// Everything was read; what differed from the parent was stored.
    Comparison,
    /// Nothing was read: it stays in files of another product.
    Linked,
    /// A dirty bitmap of the source.
    Bitmap {
        /// Its name.
        name: String,
    },
    /// A dirty-bitmap context of an NBD server.
    DirtyContext {
        /// Its name.
        name: String,
    },
}

/// What state the guest was in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    /// As if power had failed.
    Crash,
    /// File systems were frozen.
    FileSystem,
    /// Applications were told.
    Application,
    /// The machine was off.
    Off,
    /// Nobody said.
    Unknown,
}

/// One disk of a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointDisk {
    /// Its name; the file is `<name>.aql`.
    pub name: DiskName,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Its layer.
    pub layer: Uuid,
    /// Seal hash of the layer file.
    pub seal: Hash,
    /// Length of the layer file.
    pub file_bytes: u64,
    /// Bytes of blocks stored in it, headers included.
    pub stored_bytes: u64,
    /// Bytes of the disk that hold data, in whatever file.
    pub data_bytes: u64,
    /// How it was found out what to store.
    pub found: Found,
    /// Format of the source it was told: `raw`, `qcow2`, `nbd` ...
    pub source_format: String,
    /// Older files it draws from.
    pub needs: Vec<NeededFile>,
    /// Bitmap of the source that counts what has changed since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<String>,
    /// Bitmaps that counted changes of the image when it was read: no other one can tell what has changed since.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub counting: Vec<String>,
    /// The disk of another product that holds what is in none of our files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linked: Option<LinkedSource>,
}

/// A disk in files of another product, which a point refers to instead of having copied it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkedSource {
    /// The point that was linked to it first.
    pub point: Uuid,
    /// Its format, as a person names it.
    pub format: String,
    /// What opens it, in the words of whoever does.
    pub locator: String,
    /// Digest over what identifies its files; the layers hold it, too.
    pub identity: Hash,
    /// The files as they were then.
    pub files: Vec<LinkedFile>,
}

/// A file of another product.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkedFile {
    /// Where it lies.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// When it was changed last: nanoseconds since 1970, by its file system.
    pub modified: i64,
}

impl LinkedFile {
    /// The file as it is now.
    ///
    /// # Errors
    /// It is gone, is no regular file, or cannot be looked at.
    pub fn of(path: &Path) -> std::io::Result<Self> {
        let meta = std::fs::metadata(path)?;
        if !meta.is_file() {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let modified = meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec());
        Ok(Self { path: path.display().to_string(), bytes: meta.len(), modified })
    }

    /// What is different now, if anything is.
    pub fn changed(&self) -> Option<String> {
        match Self::of(Path::new(&self.path)) {
            Ok(now) if now == *self => None,
            Ok(now) if now.bytes != self.bytes => {
                Some(format!("{}: {} bytes, and {} when a point was linked to it", self.path, now.bytes, self.bytes))
            }
            Ok(_) => Some(format!("{}: written to since a point was linked to it", self.path)),
            Err(error) => Some(format!("{}: {error}", self.path)),
        }
    }
}

/// The point whose content a point has: it was copied, or written anew.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Origin {
    /// The repository it was taken into.
    pub repository: Uuid,
    /// Its id there.
    pub point: Uuid,
}

/// A layer file of an older point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeededFile {
    /// The point it belongs to.
    pub point: Uuid,
    /// The disk of that point.
    pub disk: DiskName,
    /// Its layer.
    pub layer: Uuid,
    /// Seal hash of the file.
    pub seal: Hash,
    /// Length of the file.
    pub file_bytes: u64,
}

/// `begin.json`: what a backup set out to do; enough to go on with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeginRecord {
    /// The point.
    pub id: Uuid,
    /// When it was begun.
    pub begun: Timestamp,
    /// The point it stands on.
    pub parent: Option<Uuid>,
    /// Who began it.
    pub holder: Holder,
}

/// `point.json`: a restore point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointRecord {
    /// The point.
    pub id: Uuid,
    /// Generation that received it: the order of points.
    pub receipt: u64,
    /// When the disks looked like this, by the clock of whoever took the backup.
    pub created: Timestamp,
    /// Full or increment.
    pub kind: PointKind,
    /// The point it stands on.
    pub parent: Option<Uuid>,
    /// What state the guest was in.
    pub consistency: Consistency,
    /// The machine.
    pub machine: MachineDescription,
    /// The disks.
    pub disks: Vec<PointDisk>,
    /// The point it has its content from, unless it is that itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// The piece of work it was made for, as [`Holder::work`] named it: there is one point for it, not one for each attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<String>,
}

/// A point in a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestPoint {
    /// The point.
    pub id: Uuid,
    /// Generation that received it.
    pub receipt: u64,
    /// BLAKE3 of its `point.json`.
    pub record: Hash,
    /// Kept, or given up: then only its files may still be needed.
    pub retained: bool,
    /// Why it must not be used, if a check found damage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
    /// Never given up by a rule.
    #[serde(default)]
    pub pinned: bool,
    /// The piece of work it was made for, as in its record: whether a piece of work has its point is looked up here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<String>,
}

/// `chain/<generation>.json`: which points a machine has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestRecord {
    /// The machine.
    pub machine: Uuid,
    /// Counts from 1, without gaps.
    pub generation: u64,
    /// BLAKE3 of the generation before; `None` for the first.
    pub previous: Option<Hash>,
    /// The controller that wrote it.
    pub writer: Owner,
    /// When, for people.
    pub written: Timestamp,
    /// The machine's present name.
    pub name: String,
    /// Other names it answers to.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// Points, in the order of their receipt.
    pub points: Vec<ManifestPoint>,
}

/// Who holds a lease.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Program or job.
    pub name: String,
    /// Computer.
    pub host: String,
    /// Process on it.
    pub process: u32,
    /// Session to stop, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// The piece of work it does, if it does one: the same for every attempt at it, and never that of another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<String>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)?;
        if let Some(session) = &self.session {
            write!(f, ", session {session}")?;
        }
        write!(f, ", process {} on {}", self.process, self.host)
    }
}

/// What a lease is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LeaseKind {
    /// Reads a point: its files stay.
    Read,
    /// Adds a point: nobody else does meanwhile.
    Append,
}

/// `leases/<lease>.json`: a claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// The lease.
    pub id: Uuid,
    /// What for.
    pub kind: LeaseKind,
    /// The machine.
    pub machine: Uuid,
    /// The point that is read, or stood on.
    pub point: Option<Uuid>,
    /// Generation of the manifest when it was taken.
    pub generation: u64,
    /// Who.
    pub holder: Holder,
    /// Since when, for people.
    pub since: Timestamp,
    /// Grows with each sign of life.
    pub beat: u64,
}
