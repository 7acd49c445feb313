//! The repository as verbs use it: opened as this installation, points held while they are read.
//!
//! Invariants
//! - Whoever reads a point holds a lease on it until the end, beating from a thread of its own.
//! - A holder names its computer so exactly (boot, process space) that an equal name proves that its
//!   processes can be seen from here; only then is one ever called dead before its time.
//! - A recovery needs its restore point until it has ended, whether its processes run or not: the lease of a session
//!   that is listed here stands, over reboots as well.
//!
//! Not here: what is stored and deleted, and in which order (`aquifer_formats::repo`).

mod hand;
mod hold;

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aquifer_formats::repo::{
    LeaseObserver, Liveness, Machine, Point, PointQuery, Repository,
    record::{Holder, Owner},
};
use aquifer_mount::session::{Folder, Registry};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use hand::Hand;
pub use hold::Hold;

use crate::{
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    source::{PointRef, linked::opener},
};

/// This installation, as `installation.json` in the state folder keeps it.
#[derive(Debug, Serialize, Deserialize)]
struct Installation {
    id: Uuid,
    name: String,
}

/// Opens the repository that applies.
///
/// # Errors
/// [`Code::NoRepository`] where none is named or there is none.
pub fn open(context: &Context) -> Result<Repository> {
    let dir = context.repo_dir()?;
    let dir = fs::canonicalize(&dir).unwrap_or(dir);
    Ok(Repository::open(&dir, me(context)?)?.with_linked(opener(context.cache()?)))
}

/// This installation, made known the first time it is needed.
pub fn me(context: &Context) -> Result<Owner> {
    let home = context.home()?;
    let path = home.join("installation.json");
    match fs::read(&path) {
        Ok(bytes) => {
            let read: Installation = serde_json::from_slice(&bytes).map_err(|e| {
                Fail::new(Code::Corrupt, "the record of this installation is damaged").at(path.display()).cause(e)
            })?;
            Ok(Owner { id: read.id, name: read.name })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Owner { id: Uuid::nil(), name: host_name() }),
        Err(error) => Err(Fail::io(path.display(), "read", &error)),
    }
}

/// As [`me`], written down where that has not been done yet.
pub fn me_for_good(context: &Context) -> Result<Owner> {
    let known = me(context)?;
    if !known.id.is_nil() {
        return Ok(known);
    }
    let home = context.home()?;
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&home);
    made.map_err(|e| Fail::io(home.display(), "create", &e))?;
    let new = Installation { id: Uuid::new_v4(), name: known.name };
    let text = serde_json::to_vec_pretty(&new).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
    let path = home.join("installation.json");
    let written = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    match written.and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all())) {
        Ok(()) => Ok(Owner { id: new.id, name: new.name }),
        // Another command was first.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => me(context),
        Err(error) => Err(Fail::io(path.display(), "write", &error)),
    }
}

/// Opens the repository to change it.
pub fn open_to_change(context: &Context) -> Result<Repository> {
    let dir = context.repo_dir()?;
    let dir = fs::canonicalize(&dir).unwrap_or(dir);
    Ok(Repository::open(&dir, me_for_good(context)?)?.with_linked(opener(context.cache()?)))
}

/// Opens a repository of the site file.
pub fn open_named(context: &Context, name: &str) -> Result<Repository> {
    let dir = dir_of(context, name)?;
    Ok(Repository::open(&dir, me(context)?)?.with_linked(opener(context.cache()?)))
}

/// As [`open_named`], to change it.
pub fn open_named_to_change(context: &Context, name: &str) -> Result<Repository> {
    let dir = dir_of(context, name)?;
    Ok(Repository::open(&dir, me_for_good(context)?)?.with_linked(opener(context.cache()?)))
}

fn dir_of(context: &Context, name: &str) -> Result<PathBuf> {
    let entry = context.site()?.repositories.get(name);
    let missing = || Fail::new(Code::NoRepository, format!("the site file has no repository `{name}`"));
    let dir = &entry.ok_or_else(missing)?.url;
    Ok(fs::canonicalize(dir).unwrap_or_else(|_| dir.clone()))
}

/// The point that a SOURCE word names.
#[derive(Clone, Debug)]
pub struct Named {
    /// Its machine.
    pub machine: Machine,
    /// The point.
    pub point: Point,
    /// Newer ones that the word would have named, were they not damaged; the newest first.
    pub passed_over: Vec<Point>,
}

#[derive(Serialize)]
struct PassedOver<'a> {
    machine: &'a str,
    point: String,
    created: Option<Timestamp>,
    state: &'static str,
    why: &'a str,
    taken: String,
}

impl Named {
    /// Warns that older bytes are answered than were asked for, where that is so.
    pub fn warn(&self, context: &Context) {
        let Some(newest) = self.passed_over.first() else { return };
        let name = &self.machine.name;
        for point in &self.passed_over {
            let record = PassedOver {
                machine: name,
                point: point.id.to_string(),
                created: point.created(),
                state: point.state.name(),
                why: point.state.why().unwrap_or_default(),
                taken: self.point.id.to_string(),
            };
            context.out.record("passed_over", &record);
        }
        let taken = dated(&self.point);
        let damaged = self.passed_over.iter().map(|point| format!("{} is {}", dated(point), told(point)));
        let what = format!(
            "{name}: the older point {taken} is taken, and nothing that was written after it: {}",
            damaged.collect::<Vec<_>>().join("; ")
        );
        context.out.warn(Code::WarnOlderPoint, what, Some(&look_at(&format!("{name}@{}", newest.id))));
    }
}

/// Warns of a point that is listed and cannot be read, where that is so.
pub fn warn_of_damage(context: &Context, machine: &Machine, point: &Point) {
    if point.state.why().is_some() {
        let (name, look) = (&machine.name, look_at(&format!("{}@{}", machine.name, point.id)));
        let what = format!("{name}: the point {} is {}", dated(point), told(point));
        context.out.warn(Code::WarnDamagedPoint, what, Some(&look));
    }
}

fn look_at(word: &str) -> String {
    format!("aquifer verify {}    # or repair it from a copy", quoted(word))
}

fn dated(point: &Point) -> String {
    match point.created() {
        Some(at) => format!("{} of {}", point.id, at.strftime("%Y-%m-%dT%H:%M:%SZ")),
        None => point.id.to_string(),
    }
}

fn told(point: &Point) -> String {
    match point.state.why() {
        Some(why) => format!("{} ({why})", point.state.name()),
        None => point.state.name().to_owned(),
    }
}

/// The machine and point a SOURCE word names.
///
/// # Errors
/// There is none of that name; all that fit are damaged.
pub fn find(repo: &Repository, machine: &str, point: &PointRef) -> Result<Named> {
    let machine = repo.machine(machine)?;
    let query = match point {
        PointRef::Latest(back) => PointQuery::Latest(*back),
        PointRef::At(time) => PointQuery::At(*time),
        PointRef::Id(id) => PointQuery::Id(id.clone()),
    };
    let answer = repo.answer(&machine, &query)?;
    match (answer.point, answer.passed_over) {
        (Some(point), passed_over) => Ok(Named { machine, point, passed_over }),
        (None, passed_over) => match passed_over.first() {
            Some(newest) => Err(damage(&format!("{}@{}", machine.name, newest.id), newest)),
            None => Err(repo.no_point(&machine, &query).into()),
        },
    }
}

/// What keeps the point that `word` names from being read.
pub fn damage(word: &str, point: &Point) -> Fail {
    let why = point.state.why().unwrap_or_default().to_owned();
    aquifer_formats::repo::Error::PointState { path: word.to_owned(), state: point.state.name(), why }.into()
}

/// This process, as leases name it.
pub fn holder(verb: &str) -> Holder {
    Holder {
        name: format!("aquifer {verb}"),
        host: host_exactly(),
        process: std::process::id(),
        session: None,
        work: None,
    }
}

/// What can be seen of holders from here.
///
/// # Errors
/// The list of sessions cannot be read.
pub fn tell(context: &Context) -> Result<impl Fn(&Holder) -> Liveness + use<>> {
    let listed = Registry::new(&context.home()?).list()?;
    let there = listed.iter().filter(|session| Folder::open(&session.dir).is_ok());
    let sessions: Vec<String> = there.map(|session| session.id.to_string()).collect();
    Ok(move |holder: &Holder| match &holder.session {
        Some(session) if sessions.contains(session) => Liveness::Alive,
        _ => process_of(holder),
    })
}

fn process_of(holder: &Holder) -> Liveness {
    if holder.host != host_exactly() {
        return Liveness::Unknown;
    }
    let proc = PathBuf::from(format!("/proc/{}", holder.process));
    if !proc.exists() {
        return Liveness::Dead;
    }
    // The number may have been given to another program since.
    let ours = fs::read_link("/proc/self/exe").ok();
    match fs::read_link(proc.join("exe")) {
        Ok(theirs) if Some(&theirs) == ours.as_ref() => Liveness::Alive,
        _ => Liveness::Unknown,
    }
}

/// Judges leases by what this command and earlier ones have seen: a lease whose holder cannot be seen from
/// here, and whose beat has not changed since an earlier command looked, is known to be gone without waiting.
pub fn observing<T>(context: &Context, judge: impl FnOnce(&mut LeaseObserver) -> Result<T>) -> Result<T> {
    let path = context.home()?.join("leases-seen.json");
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let now = || (Instant::now(), since_boot());
    // Without a memory, or with one that cannot be read, judging only takes longer.
    let memory = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    let mut observer = LeaseObserver::recall(&memory, boot.trim(), now());
    let done = judge(&mut observer);
    if let Ok(text) = serde_json::to_vec(&observer.remember(boot.trim(), now())) {
        let _ = fs::write(&path, text);
    }
    done
}

/// Time since this computer started, asleep or not.
fn since_boot() -> Duration {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

pub(crate) fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "localhost".to_owned() } else { name.to_owned() }
}

/// The computer's name with its boot and the process space: equal only where processes are shared.
pub(crate) fn host_exactly() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let boot = boot.trim().split('-').next().unwrap_or_default().to_owned();
    let space = fs::metadata(Path::new("/proc/self/ns/pid")).map(|meta| meta.ino()).unwrap_or_default();
    format!("{} ({boot}/{space})", host_name())
}
