//! Opening a repository, and its machines.
//!
//! Invariants
//! - A repository of another owner is open for reading only, until it is taken over on purpose.
//! - Before the first change of a process the store has proved that its creates are exclusive, and at
//!   every change the owner is looked up again.

use std::{
    fmt,
    path::Path,
    sync::{Arc, OnceLock},
};

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    Error, Result, Store, keeper, manifest,
    name::{self, MACHINES, REPOSITORY},
    record::{Defaults, LinkedSource, MachineRecord, Owner, OwnerRecord, RepositoryRecord, decode, encode, need, read},
};
use crate::aql::{Below, Compression, ContentKey, WriterOptions};

/// What this process may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everything.
    ReadWrite,
    /// Reading: somebody else owns it.
    ReadOnly {
        /// Who.
        owner: Owner,
    },
}

/// An open repository.
#[derive(Debug)]
pub struct Repository {
    store: Store,
    record: RepositoryRecord,
    key: ContentKey,
    me: Owner,
    proved: OnceLock<()>,
    open_linked: Option<OpenLinked>,
}

/// Opens the disk of another product that points were linked to, and proves that it is still the one they mean.
pub type LinkedOpener = dyn Fn(&LinkedSource) -> crate::Result<Below> + Send + Sync;

#[derive(Clone)]
struct OpenLinked(Arc<LinkedOpener>);

impl fmt::Debug for OpenLinked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OpenLinked")
    }
}

/// A machine of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Its id here.
    pub id: Uuid,
    /// Its present name.
    pub name: String,
    /// Other names it answers to.
    pub aliases: Vec<String>,
}

impl Repository {
    /// Makes a repository in `path`, an existing folder, for `me`.
    ///
    /// # Errors
    /// [`Error::Exists`] if there is one; [`Error::Unsafe`] if the file system cannot hold one; I/O.
    pub fn init(path: &Path, me: Owner, defaults: Defaults) -> Result<Self> {
        let store = Store::directory(path)?;
        if store.len(REPOSITORY)?.is_some() {
            return Err(Error::Exists { path: store.path_of(REPOSITORY) });
        }
        let key = ContentKey::generate();
        let record = RepositoryRecord {
            id: Uuid::now_v7(),
            created: Timestamp::now(),
            content_key: key.to_hex(),
            owner: me,
            defaults,
        };
        writer_options(&store.path_of(REPOSITORY), defaults)?;
        keeper::self_test(&store)?;
        store.create(REPOSITORY, &encode(&record)?)?;
        let me = record.owner.clone();
        Ok(Self { store, record, key, me, proved: OnceLock::from(()), open_linked: None })
    }

    /// Opens the repository in `path` as `me`. Changes nothing.
    ///
    /// # Errors
    /// [`Error::NoRepository`]; a record that is damaged or of another version; I/O.
    pub fn open(path: &Path, me: Owner) -> Result<Self> {
        let missing = |what: &str| Error::NoRepository { path: path.display().to_string(), what: what.into() };
        if !path.is_dir() {
            return Err(missing("there is no such folder"));
        }
        Self::open_store(Store::directory(path)?, me)
    }

    /// Opens the repository in `store` as `me`. Changes nothing.
    ///
    /// # Errors
    /// As [`Repository::open`].
    pub fn open_store(store: Store, me: Owner) -> Result<Self> {
        let Some(bytes) = store.get(REPOSITORY)? else {
            return Err(Error::NoRepository { path: store.label().into(), what: format!("it has no {REPOSITORY}") });
        };
        let shown = store.path_of(REPOSITORY);
        let record: RepositoryRecord = decode(&shown, &bytes)?;
        let key = ContentKey::from_hex(&shown, &record.content_key)?;
        writer_options(&shown, record.defaults)?;
        Ok(Self { store, record, key, me, proved: OnceLock::new(), open_linked: None })
    }

    /// The same, reading points that stand on disks of other products: `open` opens those.
    pub fn with_linked(self, open: Arc<LinkedOpener>) -> Self {
        Self { open_linked: Some(OpenLinked(open)), ..self }
    }

    pub(super) fn open_linked(&self) -> Option<&LinkedOpener> {
        self.open_linked.as_ref().map(|open| &*open.0)
    }

    /// The folder, for messages.
    pub fn label(&self) -> &str {
        self.store.label()
    }

    /// The repository's own id.
    pub fn id(&self) -> Uuid {
        self.record.id
    }

    /// What it says of itself.
    pub fn record(&self) -> &RepositoryRecord {
        &self.record
    }

    /// The key of its content ids.
    pub fn content_key(&self) -> &ContentKey {
        &self.key
    }

    /// Its objects.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Who this process is.
    pub fn me(&self) -> &Owner {
        &self.me
    }

    /// How new layers are written here, unless somebody says otherwise.
    pub fn writer_options(&self) -> WriterOptions {
        writer_options(self.label(), self.record.defaults).unwrap_or_default()
    }

    /// Who owns it now.
    ///
    /// # Errors
    /// A damaged record; I/O.
    pub fn owner(&self) -> Result<Owner> {
        let numbers = self.store.list(name::OWNERS)?;
        match numbers.iter().filter_map(|file| name::parse_number(file)).max() {
            None => Ok(self.record.owner.clone()),
            Some(number) => Ok(need::<OwnerRecord>(&self.store, &name::owner(number))?.owner),
        }
    }

    /// What this process may do here.
    ///
    /// # Errors
    /// As [`Repository::owner`].
    pub fn access(&self) -> Result<Access> {
        let owner = self.owner()?;
        Ok(if owner.id == self.me.id { Access::ReadWrite } else { Access::ReadOnly { owner } })
    }

    /// Makes this process's owner the repository's. Whoever had it before reads only, from its next change on.
    ///
    /// # Errors
    /// [`Error::Exists`] if another takes it over at this moment; I/O.
    pub fn take_over(&self) -> Result<()> {
        let numbers = self.store.list(name::OWNERS)?;
        let number = numbers.iter().filter_map(|file| name::parse_number(file)).max().unwrap_or(0) + 1;
        let record = OwnerRecord { number, owner: self.me.clone(), since: Timestamp::now() };
        self.store.create(&name::owner(number), &encode(&record)?)
    }

    /// Lets something be taken away: the owner is this one.
    pub(super) fn owned(&self) -> Result<()> {
        match self.access()? {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly { owner } => Err(Error::ForeignOwner { path: self.label().into(), owner: owner.name }),
        }
    }

    /// Lets a change go on: the owner is this one, and the store keeps its promises.
    pub(super) fn writable(&self) -> Result<()> {
        self.owned()?;
        if self.proved.get().is_none() {
            keeper::self_test(&self.store)?;
            self.proved.get_or_init(|| ());
        }
        Ok(())
    }

    /// All machines, by name.
    ///
    /// # Errors
    /// A damaged record; I/O.
    pub fn machines(&self) -> Result<Vec<Machine>> {
        let mut machines = Vec::new();
        for folder in self.store.list(MACHINES)? {
            let Ok(id) = folder.parse::<Uuid>() else { continue };
            if let Some(record) = read::<MachineRecord>(&self.store, &name::machine(id))? {
                machines.push(self.named(id, record)?);
            }
        }
        machines.sort_by(|a, b| a.name.cmp(&b.name).then(a.id.cmp(&b.id)));
        Ok(machines)
    }

    fn named(&self, id: Uuid, record: MachineRecord) -> Result<Machine> {
        let latest = manifest::latest(&self.store, id)?;
        let (name, aliases) = latest.map_or((record.name, Vec::new()), |m| (m.record.name, m.record.aliases));
        Ok(Machine { id, name, aliases })
    }

    /// The machine with this name, alias, id or beginning of an id (4 characters at least). A name goes
    /// before an alias, an alias before an id.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Ambiguous`]; as [`Repository::machines`].
    pub fn machine(&self, wanted: &str) -> Result<Machine> {
        let machines = self.machines()?;
        let by_id = |machine: &&Machine| wanted.len() >= 4 && machine.id.to_string().starts_with(wanted);
        let mut found: Vec<&Machine> = machines.iter().filter(|m| m.name == wanted).collect();
        if found.is_empty() {
            found = machines.iter().filter(|m| m.aliases.iter().any(|alias| alias == wanted)).collect();
        }
        if found.is_empty() {
            found = machines.iter().filter(by_id).collect();
        }
        match found.as_slice() {
            [one] => Ok((*one).clone()),
            [] => Err(Error::not_found(self.label(), format!("machine {wanted}"))),
            many => Err(Error::Ambiguous {
                path: self.label().into(),
                what: format!("machine {wanted}"),
                candidates: many.iter().map(|m| m.id.to_string()).collect(),
            }),
        }
    }

    /// The machine with this name, made where there is none.
    ///
    /// # Errors
    /// [`Error::Ambiguous`], [`Error::ForeignOwner`]; I/O.
    pub fn machine_or_new(&self, wanted: &str) -> Result<Machine> {
        match self.machine(wanted) {
            Err(Error::NotFound { .. }) => {}
            done => return done,
        }
        self.writable()?;
        let record = self.claim(wanted)?;
        match self.store.create(&name::machine(record.id), &encode(&record)?) {
            // Another made it meanwhile.
            Ok(()) | Err(Error::Exists { .. }) => self.machine(&record.id.to_string()),
            Err(e) => Err(e),
        }
    }

    /// The machine that has this name from the start: of those who name one at the same moment all get the same.
    fn claim(&self, wanted: &str) -> Result<MachineRecord> {
        let record = MachineRecord { id: Uuid::now_v7(), name: wanted.to_owned(), created: Timestamp::now() };
        let file = name::claim(wanted);
        match self.store.create(&file, &encode(&record)?) {
            Ok(()) => Ok(record),
            Err(Error::Exists { .. }) => need(&self.store, &file),
            Err(e) => Err(e),
        }
    }

    /// Gives a machine another name; the old one stays as an alias.
    ///
    /// # Errors
    /// [`Error::ForeignOwner`]; I/O.
    pub fn rename(&self, machine: &Machine, to: &str) -> Result<Machine> {
        self.writable()?;
        manifest::change(self, machine, |record| {
            if record.name != to {
                let old = std::mem::replace(&mut record.name, to.to_owned());
                record.aliases.retain(|alias| *alias != to && *alias != old);
                record.aliases.push(old);
            }
            Ok(())
        })?;
        self.machine(&machine.id.to_string())
    }
}

fn writer_options(path: &str, defaults: Defaults) -> Result<WriterOptions> {
    use super::record::CompressionName as Name;
    let block_log2 = defaults.block_bytes.checked_ilog2().unwrap_or(0);
    let fits = defaults.block_bytes.is_power_of_two()
        && (u32::from(crate::aql::BLOCK_LOG2_MIN)..=u32::from(crate::aql::BLOCK_LOG2_MAX)).contains(&block_log2);
    if !fits {
        let what = format!("blocks of {} bytes", defaults.block_bytes);
        return Err(crate::Error::unsupported(path, what).into());
    }
    let compression = match defaults.compression {
        Name::Zstd1 => Compression::Zstd(1),
        Name::Zstd3 => Compression::Zstd(3),
        Name::Lz4 => Compression::Lz4,
        Name::Raw => Compression::Raw,
    };
    let block_log2 = u8::try_from(block_log2).unwrap_or(crate::aql::BLOCK_LOG2_DEFAULT);
    Ok(WriterOptions { block_log2, compression, ..WriterOptions::default() })
}
