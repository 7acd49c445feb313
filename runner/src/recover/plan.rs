//! Everything that is known about a recovery before anything is made.
//!
//! Invariants
//! - Making a plan opens sources read-only and changes nothing; what a dry run refuses, the real run refuses.
//! - The format of every file, the fingerprint of every chain and the firmware are decided here, once.

use std::{
    fs,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use aquifer_mount::session::{DiskSpec, Folder, Hydrate, Options, Preallocate, Registry, is_name, space};
use aquifer_vdisk::{Disk, overlay::OverlayOptions};

use super::{
    record::{HeldPoint, Machine, Wanted},
    shape::{Shaped, Wishes, disk_names, named_firmware, shape, stored},
};
use crate::{
    context::{Context, quoted},
    copy,
    fail::{Code, Fail, Result},
    host::{
        self, Host,
        firmware::{self, Firmware},
    },
    machine::Described,
    repository::Hold,
    source::{SelectedDisk, SelectedPoint, SourceOptions, select},
    units,
    verb::NamedSource,
};

/// What one machine is to be recovered from and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// A SOURCE with all its disks, or one for each disk.
    pub from: From,
    /// How sources are read.
    pub source_options: SourceOptions,
    /// Its name; from the description, the repository or `into` where nobody said one.
    pub name: Option<String>,
    /// Its description.
    pub described: Option<Described>,
    /// What the command line says about it.
    pub wishes: Wishes,
    /// Its UEFI variables.
    pub nvram: Option<PathBuf>,
    /// Folder of the session.
    pub into: PathBuf,
    /// How the session behaves.
    pub options: Options,
}

/// Where disks come from.
#[derive(Clone, Debug)]
pub enum From {
    /// All disks of one source.
    Source(String),
    /// Each from its own.
    Disks(Vec<NamedSource>),
}

/// A recovery, decided.
#[derive(Debug)]
pub struct Plan {
    /// Name of the machine and of the session.
    pub name: String,
    /// Folder of the session; its parent is real.
    pub dir: PathBuf,
    /// Its disks.
    pub disks: Vec<DiskSpec>,
    /// How the session behaves.
    pub options: Options,
    /// The machine.
    pub machine: Machine,
    /// Where it runs.
    pub host: &'static dyn Host,
    /// Its UEFI variables, where it brings some along.
    pub variables: Option<Vec<u8>>,
    /// What a person ought to know.
    pub warnings: Vec<String>,
    /// Keeps retention away from the point until the session's own hold does.
    pub hold: Option<Arc<Hold>>,
}

impl Plan {
    /// Decides everything about one machine.
    ///
    /// # Errors
    /// Every reason not to begin.
    pub fn new(context: &Context, host: &'static dyn Host, request: &Request) -> Result<Self> {
        let found = find_disks(context, request)?;
        let (dir, space_at) = place(&request.into)?;
        let mut names: Vec<String> = found.disks.iter().map(|disk| disk.name.clone()).collect();
        let carried = found.point.as_ref().map(|point| stored(&point.record.machine));
        let described = request.described.clone().or(carried).unwrap_or_default();
        if matches!(request.from, From::Source(_)) {
            names = disk_names(&names, &described)?;
        }
        let name = machine_name(request, &described, &dir)?;
        check_name(context, &name)?;
        let mut disks = Vec::new();
        let mut opened = Vec::new();
        let cache = context.cache()?;
        for (name, selected) in names.iter().zip(&found.disks) {
            let chain = selected.open_chain(&cache)?;
            let fingerprint = blake3::Hash::from_bytes(chain.fingerprint()?).to_hex().to_string();
            disks.push(DiskSpec { name: name.clone(), chain: selected.spec.clone(), size: chain.size(), fingerprint });
            opened.push(Disk::read_only(name, chain));
        }
        let Shaped { mut shape, mut warnings } = shape(&name, &names, &described, &request.wishes);
        let decision = firmware::decide(named_firmware(&described, &request.wishes), &opened)?;
        shape.firmware = decision.firmware;
        warnings.extend(decision.hints.iter().cloned());
        let variables = variables(request, found.point.as_ref())?.filter(|_| shape.firmware == Firmware::Uefi);
        shape.variables = variables.as_ref().and_then(|content| u64::try_from(content.len()).ok());
        let mut variables = variables;
        warnings.extend(match host.check(&shape) {
            // A machine without its memory of boot entries starts by its fallback; one that is refused does not start.
            Err(host::Error::Variables { bytes }) => {
                (variables, shape.variables) = (None, None);
                let what = format!("no UEFI firmware here keeps variables in {bytes} bytes; it starts with empty ones");
                [vec![what], host.check(&shape)?].concat()
            }
            checked => checked?,
        });
        let room = check_space(&space_at, &disks, &request.options)?;
        warnings.extend(too_small(&space_at, room, &opened, &request.options)?);
        let machine = Machine {
            host: host.name().to_owned(),
            shape,
            firmware: decision,
            wanted: Wanted::On,
            running: None,
            since: None,
            point: found.point.as_ref().map(|point| HeldPoint {
                repository: point.repository.clone(),
                machine: point.machine.id,
                point: point.point.id,
            }),
        };
        let hold = found.point.map(|point| point.hold);
        let options = request.options.clone();
        Ok(Self { name, dir, disks, options, machine, host, variables, warnings, hold })
    }
}

struct Found {
    disks: Vec<SelectedDisk>,
    /// The restore point, where they are from one in the repository.
    point: Option<SelectedPoint>,
}

fn find_disks(context: &Context, request: &Request) -> Result<Found> {
    let named = match &request.from {
        From::Source(word) => {
            let selection = select(context, word, &request.source_options)?;
            return Ok(Found { disks: selection.disks, point: selection.point });
        }
        From::Disks(named) => named,
    };
    let mut found = Found { disks: Vec::new(), point: None };
    for NamedSource { name, source } in named {
        if found.disks.iter().any(|disk| disk.name == *name) {
            return Err(Fail::new(Code::Usage, format!("two disks are called `{name}`")));
        }
        let selection = select(context, source, &request.source_options)?;
        let mut disk = selection.single()?.clone();
        disk.name.clone_from(name);
        found.disks.push(disk);
        if let Some(other) = selection.point {
            // A session holds one point; disks of two would leave the second to retention.
            if found.point.as_ref().is_some_and(|point| point.point.id != other.point.id) {
                return Err(Fail::new(Code::Usage, "the disks are from different restore points"));
            }
            found.point = Some(other);
        }
    }
    Ok(found)
}

/// What its firmware remembers: from the file somebody named, else with the point.
fn variables(request: &Request, point: Option<&SelectedPoint>) -> Result<Option<Vec<u8>>> {
    if let Some(path) = &request.nvram {
        let label = path.display().to_string();
        return Ok(Some(crate::backup::describe::variables(path)?.content(&label)?));
    }
    let Some(point) = point else { return Ok(None) };
    let stored = point.record.machine.variables.as_ref();
    Ok(stored.map(|stored| stored.content(&format!("point {}", point.point.id))).transpose()?)
}

fn machine_name(request: &Request, described: &Described, dir: &Path) -> Result<String> {
    let folder = dir.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let name = request.name.as_deref().or(described.name.as_deref()).unwrap_or(folder);
    if is_name(name) {
        return Ok(name.to_owned());
    }
    let what = format!("`{name}` cannot be a machine's name: letters, digits, `.`, `_` and `-`, at most 64");
    Err(Fail::new(Code::Usage, what).help_again("--name NAME"))
}

/// The folder as an absolute path whose existing part has no links, and that existing part.
fn place(into: &Path) -> Result<(PathBuf, PathBuf)> {
    let path = std::path::absolute(into).map_err(|e| Fail::io(into.display(), "find", &e))?;
    let named = || Fail::new(Code::Usage, format!("--into {} is not the name of a folder", into.display()));
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(named());
    }
    match fs::read_dir(&path).map(|mut entries| entries.next().is_none()) {
        Ok(true) => {
            let real = fs::canonicalize(&path).map_err(|e| Fail::io(path.display(), "find", &e))?;
            return Ok((real.clone(), real));
        }
        Ok(false) if path.join("session.json").exists() => return Err(holds_one_already(&path)),
        Ok(false) => {
            let what = format!("{} is not empty: a recovery gets a folder of its own", path.display());
            return Err(Fail::new(Code::Exists, what).at(path.display()));
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => return Err(named()),
        Err(e) => return Err(Fail::io(path.display(), "look into", &e)),
    }
    let existing = path.ancestors().find(|p| p.is_dir()).ok_or_else(named)?;
    let real = fs::canonicalize(existing).map_err(|e| Fail::io(existing.display(), "find", &e))?;
    let rest = path.strip_prefix(existing).map_err(|_| named())?;
    Ok((real.join(rest), real))
}

/// The refusal of a folder with a session in it.
pub(super) fn holds_one_already(dir: &Path) -> Fail {
    let what = format!("{} holds a recovery already", dir.display());
    Fail::new(Code::Exists, what).at(dir.display()).help(format!("aquifer status {}", quoted(&dir.to_string_lossy())))
}

/// Refuses the name of a recovery that has not ended: commands that name it would not know which is meant.
fn check_name(context: &Context, name: &str) -> Result<()> {
    for pointer in Registry::new(&context.home()?).list()?.iter().filter(|pointer| pointer.name == name) {
        let spec = Folder::open(&pointer.dir).and_then(|folder| folder.load());
        if spec.is_ok_and(|spec| spec.id == pointer.id && spec.state.is_live()) {
            let what = format!("a recovery called {name} is in {} and has not ended", pointer.dir.display());
            let fail = Fail::new(Code::Exists, what).at(pointer.dir.display());
            let help = format!("aquifer finalize {} --keep    # or give this one another: --name NAME", quoted(name));
            return Err(fail.help(help));
        }
    }
    Ok(())
}

/// What is free beyond what the session reserves at its start and what is kept for the machine.
fn check_space(at: &Path, disks: &[DiskSpec], options: &Options) -> Result<u64> {
    let journal = options.journal_bytes.unwrap_or(OverlayOptions::default().journal_bytes);
    let each = |disk: &DiskSpec| {
        let whole = if options.preallocate == Preallocate::Full { disk.size } else { 0 };
        // The map: two bits for each 4 KiB.
        journal.saturating_add(disk.size / (4096 * 4)).saturating_add(whole)
    };
    // Room to boot and to be told that it fills up.
    let need = disks.iter().map(each).fold(space::KEPT_BYTES, u64::saturating_add);
    let free = space::free(at)?;
    if free >= need {
        return Ok(free - need);
    }
    let what =
        format!("the recovery needs {} and {} has {} free", units::bytes(need), at.display(), units::bytes(free));
    let fail = Fail::new(Code::Capacity, what).at(at.display());
    Err(match options.preallocate {
        Preallocate::Full => fail.cause("--preallocate takes the room of all disks at once"),
        _ => fail,
    })
}

/// A word of warning where the machine's data will not fit: its copy will have to wait.
fn too_small(at: &Path, room: u64, disks: &[Disk], options: &Options) -> Result<Option<String>> {
    let whole = disks.iter().map(Disk::size).fold(0, u64::saturating_add);
    if options.preallocate == Preallocate::Full || options.hydrate != Hydrate::On || whole <= room {
        return Ok(None);
    }
    // Counted only where it may matter: it walks the whole map.
    let used = disks.iter().try_fold(0u64, |sum, disk| Ok::<_, Fail>(sum.saturating_add(copy::used_bytes(disk)?)))?;
    let what = || {
        let (used, room, at) = (units::bytes(used), units::bytes(room), at.display());
        format!("{at} has room for {room} of the {used} that are stored: the copy will wait for space")
    };
    Ok((used > room).then(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_must_be_new_or_empty() {
        let root = tempfile::tempdir().expect("folder");
        let real = root.path().canonicalize().expect("real");
        assert_eq!(place(&root.path().join("a/b")).expect("new"), (real.join("a/b"), real.clone()));
        assert_eq!(place(root.path()).expect("empty"), (real.clone(), real.clone()));
        std::os::unix::fs::symlink(&real, root.path().join("link")).expect("link");
        assert_eq!(place(&root.path().join("link/x")).expect("through a link").0, real.join("x"));
        assert_eq!(place(root.path()).expect_err("not empty").code, Code::Exists);
        assert_eq!(place(&root.path().join("nowhere/../x")).expect_err("a way up").code, Code::Usage);
        fs::write(root.path().join("file"), "x").expect("file");
        assert!(place(&root.path().join("file/x")).is_err(), "below a file");
    }

    #[test]
    fn space_is_asked_for_before_anything_is_made() {
        let root = tempfile::tempdir().expect("folder");
        let disk = |size| DiskSpec {
            name: "vda".into(),
            chain: aquifer_vdisk::ChainSpec::Nbd { uri: "nbd://x".into() },
            size,
            fingerprint: "0".repeat(64),
        };
        let options = Options::default();
        assert!(check_space(root.path(), &[disk(1 << 40)], &options).is_ok(), "an overlay grows");
        let whole = Options { preallocate: Preallocate::Full, ..options };
        let fail = check_space(root.path(), &[disk(1 << 60)], &whole).expect_err("an exbibyte");
        assert_eq!(fail.code, Code::Capacity);
    }
}
