//! A repository whose power is cut, whose calls fail and whose processes are killed, through the real calls of real
//! processes: what was announced is found, nothing is there by half, and the next job goes on.
//!
//! Invariants
//! - A point that was announced is complete, with every byte, until somebody began to forget it.
//! - A point that was not announced is not there, or incomplete, or complete with every byte.
//! - A forgotten point that was announced as such does not come back; a reader's memory of the newest generation holds.
//! - Whatever is found, the next process sweeps, goes on or discards, and adds a point.
//!
//! Not here: the model of folders that lose power (`folders`), and how calls are seen (`traced`).

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ffi::OsStr,
    path::Path,
    time::Instant,
};

use aquifer_formats::{
    Content, Layer,
    aql::{Depth, Reader, WriterOptions, verify},
    repo::{
        DiskName, DiskPlan, DiskWork, Error, Interrupted, LeaseObserver, Liveness, Machine, NewPoint, PointQuery,
        PointState, Repository, Result, Seen, Transaction,
        keeper::{self, LastPoint},
        record::{Consistency, Defaults, Found, Holder, MachineDescription, Owner},
    },
};

use crate::{
    filesystems::quick_folder,
    folders::{Event, PowerCut, Tree},
    rng::Rng,
    traced::{Call, Failure, Process, WORD, trace},
};

const BLOCK: usize = 16 << 10;
/// The point that the next process adds.
const NEXT: u64 = 50;
/// Environment of a process under test: its folder, what it is to do, which backup was under way.
pub const FOLDER: &str = "AQUIFER_BACKUPS_FOLDER";
const JOB: &str = "AQUIFER_BACKUPS_JOB";
const WRITING: &str = "AQUIFER_BACKUPS_WRITING";

fn me() -> Owner {
    Owner { id: uuid::Uuid::from_u128(7), name: "test".into() }
}

fn holder() -> Holder {
    Holder { name: "backup".into(), host: "here".into(), process: std::process::id(), session: None, work: None }
}

fn vda() -> DiskName {
    DiskName::new("vda").expect("a name")
}

/// The disk of point `k`: some blocks change at every point, others seldom. They compress well.
fn contents(k: u64) -> Vec<u8> {
    let mut bytes = vec![0; 6 * BLOCK + 100];
    for (block, part) in (0u64..).zip(bytes.chunks_mut(BLOCK)) {
        let mut dice = Rng::new((block << 32) | (k / (1 + block % 3)));
        let random = part.len().min(1500);
        part[..random].fill_with(|| dice.next_u64() as u8);
    }
    bytes
}

fn plan(repo: &Repository, full: bool) -> DiskPlan {
    let options = WriterOptions { threads: 0, waymark_bytes: 3000, ..repo.writer_options() };
    DiskPlan { size: contents(0).len() as u64, sector_bytes: 512, full, options }
}

/// Writes the disk of point `k`, from where it was left, up to `until` blocks; the rest is left for later.
fn write(tx: &mut Transaction<'_>, repo: &Repository, k: u64, until: u64) -> Result<()> {
    if let DiskWork::Write(mut writer) = tx.disk(&vda(), plan(repo, k.is_multiple_of(4)))? {
        let bytes = contents(k);
        let from = writer.resume_from();
        for (block, part) in (0u64..).zip(bytes.chunks(BLOCK)).take(until as usize).skip(from as usize) {
            writer.put(block, part)?;
        }
        if until < u64::MAX {
            return Ok(writer.mark()?);
        }
        writer.finish()?;
    }
    Ok(())
}

fn commit(mut tx: Transaction<'_>, k: u64) -> Result<uuid::Uuid> {
    tx.sealed(&vda(), Found::Comparison, "raw")?;
    let record = tx.commit(NewPoint {
        created: jiff::Timestamp::from_second(3600 * k as i64).expect("a time"),
        consistency: Consistency::Crash,
        machine: MachineDescription { name: "m".into(), ..MachineDescription::default() },
        origin: None,
    })?;
    Ok(record.id)
}

/// Tells what a process has achieved.
type Say<'a> = &'a mut dyn FnMut(String);

fn told_newest(repo: &Repository, machine: &Machine, say: Say<'_>) -> Result<()> {
    if let (Some(seen), _) = repo.freshness(machine, None)? {
        say(format!("seen {}", serde_json::to_string(&seen).expect("JSON")));
    }
    Ok(())
}

fn back_up(repo: &Repository, machine: &Machine, k: u64, say: Say<'_>) -> Result<()> {
    let parent = repo.resolve(machine, &PointQuery::Latest(0)).ok();
    say(format!("writing {k}"));
    let mut tx = repo.begin(machine, parent.as_ref(), holder())?;
    write(&mut tx, repo, k, u64::MAX)?;
    tx.beat()?;
    say(format!("committed {k} {}", commit(tx, k)?));
    told_newest(repo, machine, say)
}

fn sweep(repo: &Repository, machine: &Machine, others: Liveness) -> Result<()> {
    keeper::sweep(repo, machine, &mut LeaseObserver::new(), Instant::now(), &|_| others).map(|_| ())
}

fn forget(repo: &Repository, machine: &Machine, count: usize, say: Say<'_>) -> Result<()> {
    let ids: Vec<uuid::Uuid> = repo.points(machine)?.iter().take(count).map(|p| p.id).collect();
    let named = ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    say(format!("forgetting {named}"));
    keeper::forget(repo, machine, &ids, LastPoint::Stays)?;
    say(format!("forgot {named}"));
    told_newest(repo, machine, say)
}

/// What a site does in its first days, in one process.
fn first_days(dir: &Path, say: Say<'_>) -> Result<()> {
    let repo = Repository::init(dir, me(), Defaults { block_bytes: BLOCK as u32, ..Defaults::default() })?;
    say("repository".into());
    let machine = repo.machine_or_new("m")?;
    say("machine".into());
    back_up(&repo, &machine, 1, say)?;
    back_up(&repo, &machine, 2, say)?;
    let first = repo.resolve(&machine, &PointQuery::Latest(1))?;
    let mut reader = repo.lease_read(&machine, &first, holder())?;
    // One that is interrupted, and gone on with.
    say("writing 3".into());
    let newest = repo.resolve(&machine, &PointQuery::Latest(0))?;
    let mut tx = repo.begin(&machine, Some(&newest), holder())?;
    write(&mut tx, &repo, 3, 4)?;
    tx.interrupt()?;
    reader.beat()?;
    forget(&repo, &machine, 1, say)?;
    sweep(&repo, &machine, Liveness::Alive)?;
    let interrupted = repo.interrupted(&machine)?.remove(0);
    let mut tx = repo.resume(&machine, &interrupted, holder())?;
    write(&mut tx, &repo, 3, u64::MAX)?;
    say(format!("committed 3 {}", commit(tx, 3)?));
    reader.release()?;
    sweep(&repo, &machine, Liveness::Alive)?;
    // A full one, after which nothing needs the older files.
    back_up(&repo, &machine, 4, say)?;
    let machine = repo.rename(&machine, "other")?;
    forget(&repo, &machine, 2, say)?;
    sweep(&repo, &machine, Liveness::Alive)
}

/// Goes on with what was left, or discards it where it says that it cannot be gone on with.
fn take_up(repo: &Repository, machine: &Machine, what: &Interrupted, k: u64, say: Say<'_>) -> Result<()> {
    let done = repo.resume(machine, what, holder()).and_then(|mut tx| match write(&mut tx, repo, k, u64::MAX) {
        Ok(()) => commit(tx, k).map(Some),
        Err(e) => {
            tx.interrupt()?;
            Err(e)
        }
    });
    match done {
        Ok(Some(id)) => say(format!("committed {k} {id}")),
        Ok(None) => {}
        Err(Error::NotFound { .. }) => drop(keeper::discard(repo, machine, what, holder())?),
        Err(Error::Format(e)) if e.is_damage() => drop(keeper::discard(repo, machine, what, holder())?),
        Err(e) => return Err(e),
    }
    Ok(())
}

/// What the next process does, whatever it finds; all others are dead. `writing` is the backup that was under way.
fn next_day(dir: &Path, writing: u64, say: Say<'_>) -> Result<()> {
    let repo = match Repository::open(dir, me()) {
        Err(Error::NoRepository { .. }) => {
            Repository::init(dir, me(), Defaults { block_bytes: BLOCK as u32, ..Defaults::default() })?
        }
        done => done?,
    };
    say("repository".into());
    let machine = repo.machine_or_new("m")?;
    say("machine".into());
    // As a backup begins: even where nothing is listed yet there may be the lease of a dead one.
    let (dead, now) = (&|_: &Holder| Liveness::Dead, std::time::Duration::ZERO);
    keeper::reclaim(&repo, &machine, &mut LeaseObserver::new(), dead, now)?;
    sweep(&repo, &machine, Liveness::Dead)?;
    for what in repo.interrupted(&machine)? {
        say(format!("writing {writing}"));
        take_up(&repo, &machine, &what, writing, say)?;
    }
    back_up(&repo, &machine, NEXT, say)?;
    sweep(&repo, &machine, Liveness::Dead)
}

/// What a process of its own does: to be called by a test that [`Runs`] names.
pub fn child() {
    let Some(dir) = std::env::var_os(FOLDER) else { return };
    let mut say = |word: String| {
        use std::io::Write;
        std::io::stderr().write_all(format!("{WORD}{word}\n").as_bytes()).expect("say");
    };
    let dir = Path::new(&dir);
    let done = match std::env::var(JOB).as_deref() {
        Ok("first") => first_days(dir, &mut say),
        _ => next_day(dir, std::env::var(WRITING).ok().and_then(|k| k.parse().ok()).unwrap_or(0), &mut say),
    };
    if let Err(e) = done {
        say(format!("failed {e}"));
    }
}

/// What was announced.
#[derive(Clone, Debug, Default)]
struct Known {
    repository: bool,
    machine: bool,
    /// The last backup that was begun, and all of them: one that was not announced may be there whole.
    writing: u64,
    begun: BTreeSet<u64>,
    committed: BTreeMap<String, u64>,
    forgetting: BTreeSet<String>,
    forgotten: BTreeSet<String>,
    seen: Option<Seen>,
    failed: Option<String>,
}

impl Known {
    fn hear(&mut self, word: &str) {
        let (verb, rest) = word.split_once(' ').unwrap_or((word, ""));
        let ids = || rest.split(' ').map(str::to_owned);
        match verb {
            "repository" => self.repository = true,
            "machine" => self.machine = true,
            "writing" => {
                self.writing = rest.parse().unwrap();
                self.begun.insert(self.writing);
            }
            "committed" => {
                let (k, id) = rest.split_once(' ').unwrap();
                self.committed.insert(id.to_owned(), k.parse().unwrap());
            }
            "forgetting" => self.forgetting.extend(ids()),
            "forgot" => self.forgotten.extend(ids()),
            "seen" => self.seen = Some(serde_json::from_str(rest).unwrap()),
            "failed" => self.failed = Some(rest.to_owned()),
            _ => panic!("{word}"),
        }
    }

    /// Looks as a reader does, who changes nothing.
    fn judge(&self, dir: &Path) -> std::result::Result<(), String> {
        let wrong = |e: Error| e.to_string();
        let repo = match Repository::open(dir, me()) {
            Err(Error::NoRepository { .. }) if !self.repository => return Ok(()),
            done => done.map_err(wrong)?,
        };
        let machine = match repo.machine("m") {
            Err(Error::NotFound { .. }) if !self.machine => return Ok(()),
            done => done.map_err(wrong)?,
        };
        repo.freshness(&machine, self.seen).map_err(wrong)?;
        repo.leases().map_err(wrong)?;
        let points = repo.points(&machine).map_err(wrong)?;
        let mut complete = BTreeSet::new();
        for point in &points {
            let id = point.id.to_string();
            if self.forgotten.contains(&id) {
                return Err(format!("point {id} was forgotten and is listed"));
            }
            match &point.state {
                PointState::Incomplete => continue,
                // Listed, without a record and without the lease of whoever was at it: the next process goes on with it.
                PointState::Missing { why }
                    if !self.committed.contains_key(&id)
                        && why.ends_with("never written: its backup was cut short") =>
                {
                    continue;
                }
                PointState::Complete => {}
                state => return Err(format!("point {id}: {state:?}")),
            }
            let k = point.created().map_or(0, |at| at.as_second() as u64 / 3600);
            let announced = self.committed.get(&id);
            if announced.is_some_and(|known| *known != k) || announced.is_none() && !self.begun.contains(&k) {
                return Err(format!("point {id} calls itself {k}"));
            }
            let reader = repo.open_disk(point, &vda()).map_err(wrong)?;
            if read(&reader)? != contents(k) {
                return Err(format!("point {k} has other bytes"));
            }
            if let Some(damage) = verify(&reader, Depth::Metadata).flat_map(|file| file.damage).next() {
                return Err(format!("point {k}: {damage:?}"));
            }
            complete.insert(id);
        }
        let gone = |id: &&String| !complete.contains(*id) && !self.forgetting.contains(*id);
        match self.committed.keys().find(gone) {
            Some(id) => Err(format!("point {id} was announced and is gone")),
            None => Ok(()),
        }
    }

    /// Lets the next process go on in this one.
    fn go_on(&self, dir: &Path) -> std::result::Result<(), String> {
        let mut known = self.clone();
        next_day(dir, self.writing, &mut |word| known.hear(&word)).map_err(|e| format!("the next process: {e}"))?;
        known.judge(dir).map_err(|what| format!("after the next process: {what}"))
    }
}

fn read(reader: &Reader) -> std::result::Result<Vec<u8>, String> {
    let (mut out, mut block) = (Vec::new(), Vec::new());
    while (out.len() as u64) < reader.size() {
        let (content, n) = reader.lookup(out.len() as u64, reader.size()).map_err(|e| e.to_string())?;
        let n = n as usize;
        match content {
            Content::Packed { block: at, .. } => {
                reader.unpack(&at, n, &mut block).map_err(|e| e.to_string())?;
                out.extend_from_slice(&block[..n]);
            }
            _ => out.resize(out.len() + n, 0),
        }
    }
    Ok(out)
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Points at which the power was cut.
    pub points: u64,
    /// Different folders that were found, for what was known then.
    pub states: u64,
    /// Of those the next process went on with.
    pub continued: u64,
    /// Processes that were killed before the power was cut in the next.
    pub kills: u64,
    /// Calls that failed.
    pub failed: u64,
}

/// How much is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Cuts at a point where all of them would be more.
    pub sample: u64,
    /// In one of how many states the next process goes on.
    pub continue_one_in: u64,
}

/// Explores the repository's crashes, by processes of this program.
#[derive(Debug)]
pub struct Runs<'a> {
    /// Arguments that make this program call [`child`].
    args: &'a [&'a str],
    env: &'a [(&'a str, &'a OsStr)],
    effort: Effort,
    dice: Rng,
    looked: HashSet<(blake3::Hash, usize)>,
    words: usize,
    /// What was looked at so far.
    pub tally: Tally,
}

/// Everything that was told, and the point from which the power is cut.
#[derive(Clone, Debug, Default)]
struct History {
    tree: Tree,
    point: PowerCut,
    known: Known,
    files: usize,
}

impl History {
    fn pass(&mut self, event: &Event) {
        self.tree.apply(event);
        self.point.pass(event);
        match event {
            Event::Said(word) => self.known.hear(word),
            Event::Named(_, number) | Event::Wrote(number, ..) => self.files = self.files.max(*number),
            _ => {}
        }
    }
}

impl<'a> Runs<'a> {
    /// None yet. `args` make this program call [`child`].
    pub fn new(args: &'a [&'a str], env: &'a [(&'a str, &'a OsStr)], effort: Effort, seed: u64) -> Self {
        let (dice, tally) = (Rng::new(seed), Tally::default());
        Self { args, env, effort, dice, looked: HashSet::new(), words: 0, tally }
    }

    fn run(
        &self,
        job: &str,
        before: &History,
        dir: &Path,
        fail: Option<Failure<'_>>,
    ) -> std::result::Result<crate::traced::Traced, String> {
        let writing = before.known.writing.to_string();
        let mut env = self.env.to_vec();
        env.extend([(FOLDER, dir.as_os_str()), (JOB, OsStr::new(job)), (WRITING, OsStr::new(&writing))]);
        let process = Process { args: self.args, env: &env, root: dir };
        trace(process, before.tree.clone(), before.files, fail)
    }

    /// Cuts the power at one point.
    fn cut_here(&mut self, history: &History) -> std::result::Result<(), String> {
        let open = history.point.open();
        let all = if open < 64 { (1u64 << open) - 1 } else { u64::MAX };
        let mut cuts: Vec<(u64, u64)> = if all < self.effort.sample {
            (0..=all).map(|kept| (kept, 0)).collect()
        } else {
            let some = (0..self.effort.sample).map(|_| (self.dice.next_u64() & all, 0));
            [(0, 0), (all, 0)].into_iter().chain(some).collect()
        };
        cuts.extend((0..open.min(4)).map(|_| (self.dice.next_u64() & all, self.dice.next_u64() & all)));
        self.tally.points += 1;
        for (kept, torn) in cuts {
            let tree = history.point.cut(kept, torn, &mut self.dice);
            self.look(&tree, &history.known)
                .map_err(|what| format!("kept {kept:x}, torn {torn:x} of {open}: {what}"))?;
        }
        Ok(())
    }

    fn look(&mut self, tree: &Tree, known: &Known) -> std::result::Result<(), String> {
        if !self.looked.insert((tree.digest(), self.words)) {
            return Ok(());
        }
        let dir = quick_folder();
        tree.make(dir.path()).map_err(|e| e.to_string())?;
        self.tally.states += 1;
        known.judge(dir.path())?;
        if self.dice.once_in(self.effort.continue_one_in) {
            known.go_on(dir.path())?;
            self.tally.continued += 1;
        }
        Ok(())
    }

    /// Cuts the power at every point of what one process does after `history`.
    fn cut_everywhere(&mut self, history: &mut History, events: &[Event]) -> std::result::Result<(), String> {
        for (at, event) in events.iter().enumerate() {
            history.pass(event);
            self.words += usize::from(matches!(event, Event::Said(_)));
            self.cut_here(history).map_err(|what| {
                let event: String = format!("{event:?}").chars().take(150).collect();
                format!("at {at}, after {event}: {what}")
            })?;
        }
        Ok(())
    }

    /// The first days, with the power cut everywhere; then killed, and the power cut in the process that goes on: once
    /// after each folder and each generation was made, and `kills` times anywhere.
    ///
    /// # Errors
    /// What was lost, there by half, or cannot be gone on with.
    pub fn power(&mut self, kills: u64) -> std::result::Result<(), String> {
        let dir = quick_folder();
        let first = self.run("first", &History::default(), dir.path(), None)?;
        self.cut_everywhere(&mut History::default(), &first.events)?;
        let stands_on = |event: &Event| match event {
            Event::MadeFolder(_) => true,
            Event::Named(path, _) => path.contains("/chain/"),
            _ => false,
        };
        let made = (0..first.events.len()).filter(|at| stands_on(&first.events[*at])).map(|at| at + 1);
        let anywhere = (0..kills).map(|_| self.dice.below(first.events.len() as u64) as usize);
        for killed in made.chain(anywhere).collect::<Vec<_>>() {
            self.tally.kills += 1;
            let mut history = History::default();
            first.events[..killed].iter().for_each(|event| history.pass(event));
            let dir = quick_folder();
            history.tree.make(dir.path()).map_err(|e| e.to_string())?;
            let next = self.run("next", &history, dir.path(), None)?;
            self.words += 1;
            self.cut_everywhere(&mut history, &next.events)
                .map_err(|what| format!("killed at {killed}, then {what}"))?;
            if let Some(failed) = history.known.failed {
                return Err(format!("killed at {killed}, then the next process: {failed}"));
            }
        }
        Ok(())
    }

    /// The calls of the first days that change something.
    ///
    /// # Errors
    /// As [`trace`].
    pub fn calls(&self) -> std::result::Result<Vec<Call>, String> {
        Ok(self.run("first", &History::default(), quick_folder().path(), None)?.calls)
    }

    /// The first days with one call failing; afterwards the next process, with and without a loss of power.
    ///
    /// # Errors
    /// As [`Runs::power`].
    pub fn failing(&mut self, call: &Call, error: &'static str) -> std::result::Result<(), String> {
        let dir = quick_folder();
        let mut history = History::default();
        let wrong = |what: String| format!("{} {} fails with {error}: {what}", call.name, call.nth);
        let run = self.run("first", &history, dir.path(), Some(Failure { call, error })).map_err(wrong)?;
        run.events.iter().for_each(|event| history.pass(event));
        self.words += 1;
        self.tally.failed += 1;
        self.cut_here(&history).map_err(wrong)?;
        history.known.judge(dir.path()).map_err(wrong)?;
        history.known.go_on(dir.path()).map_err(wrong)
    }
}
