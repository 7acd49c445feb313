//! `verify`: reads everything a source stands on and checks every checksum.
//!
//! A restore point is checked by what it stores: seals, roots, map pages, and each block's checksum,
//! decoding and content id. Anything else is read from its first byte to its last.
//!
//! Invariants
//! - Damage is listed once for each stored place, with file, offset and the ranges of the disk it costs,
//!   and ends nothing; the exit code says that there was some.
//! - A listed point that is not whole any more is damage; one that was never completed is none.
//! - No older point is checked in place of a damaged one that `latest` or a time means.
//! - An interrupted check is gone on with by the same command, as far as its files have not changed.
//! - Nothing that is checked is written, and nothing repaired.
//!
//! Not here: getting a good copy from elsewhere.

mod memory;
mod native;
mod report;
mod scan;

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use aquifer_formats::{Layer as _, repo::PointState};
use aquifer_vdisk::Disk;
use parking_lot::Mutex;

use self::{memory::Memory, report::Tally};
use crate::{
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    repository::{self, Named},
    source::{
        SelectedDisk, SelectedPoint, Selection, Source, SourceOptions,
        files::{self, FileState},
        select,
    },
    stop::Stop,
};

/// Options of `verify`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to check; without one, every complete point of the repository
    #[arg(value_name = "SOURCE")]
    pub source: Option<String>,
    /// Which disks, and how they are read.
    #[command(flatten)]
    pub options: SourceOptions,
    /// Check everything, also what an interrupted check of the same has done
    #[arg(long)]
    pub afresh: bool,
}

/// Damage of one stored place.
#[derive(Clone, Debug)]
struct Lost {
    /// Why, with file and offset.
    fail: Fail,
    /// Ranges of the disk that cannot be read because of it, in order; none where a second copy serves.
    ranges: Vec<Range<u64>>,
}

/// What is known of a disk at the end of its check.
struct Checked {
    size: u64,
    /// Bytes that were read for it, by this run and the ones it goes on with.
    bytes: u64,
    damage: Vec<Lost>,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let stop = context.stop()?;
    let mut check = Check { context, stop, memory: Memory::open(context, &target(context, args)?, args.afresh)? };
    let mut tally = Tally::default();
    let outcome = match &args.source {
        Some(source) => check.source(source, args, &mut tally),
        None => check.repository(args, &mut tally),
    };
    if let Err(fail) = outcome {
        return Err(if stop.is_asked() { fail.help_again("    # it goes on from here") } else { fail });
    }
    check.memory.end();
    tally.verdict(context)
}

/// What this command checks, and how: equal for two runs only where one can go on with the other.
fn target(context: &Context, args: &Args) -> Result<String> {
    let options = &args.options;
    let place = match args.source.as_deref().map(Source::parse).transpose()? {
        // A relative path means another file in another folder.
        Some(Source::Path(path) | Source::Raw(path)) => std::path::absolute(path).unwrap_or_default(),
        Some(Source::Nbd(_)) => PathBuf::new(),
        Some(Source::Point { .. }) | None => context.repo_dir()?,
    };
    Ok(format!("{place:?} {:?} {:?} {:?} {:?}", args.source, options.disk, options.snapshot, options.allow_backing))
}

struct Check<'a> {
    context: &'a Context,
    stop: Stop,
    memory: Memory,
}

impl Check<'_> {
    /// What the word means: `latest` and times mean what was received, damaged or not.
    fn source(&mut self, word: &str, args: &Args, tally: &mut Tally) -> Result<()> {
        // Without a repository, what is wrong with the word is better said below.
        if let (Source::Point { machine, point, .. }, Ok(repo)) = (Source::parse(word)?, repository::open(self.context))
        {
            // One that is damaged altogether is refused with the state of its newest point.
            let Named { machine, point, passed_over } = repository::find(&repo, &machine, &point)?;
            for damaged in &passed_over {
                let word = format!("{}@{}", machine.name, damaged.id);
                tally.point(self.context, &word, repository::damage(&word, damaged));
            }
            if !passed_over.is_empty() {
                let older = quoted(&format!("{}@{}", machine.name, point.id));
                self.context.out.say(format_args!("not checked: the older point; aquifer verify {older}"));
                return Ok(());
            }
        }
        self.selection(&select(self.context, word, &args.options)?, tally)
    }

    /// Every point that was ever complete.
    fn repository(&mut self, args: &Args, tally: &mut Tally) -> Result<()> {
        let repo = repository::open(self.context)?;
        for machine in repo.machines()? {
            for point in repo.points(&machine)? {
                let word = format!("{}@{}", machine.name, point.id);
                match point.state {
                    PointState::Incomplete => {}
                    PointState::Missing { .. } | PointState::Corrupted { .. } => {
                        tally.point(self.context, &word, repository::damage(&word, &point));
                    }
                    PointState::Complete => self.selection(&select(self.context, &word, &args.options)?, tally)?,
                }
            }
        }
        Ok(())
    }

    fn selection(&mut self, selection: &Selection, tally: &mut Tally) -> Result<()> {
        for selected in &selection.disks {
            let checked = match &selection.point {
                Some(point) => self.stored(selection, point, selected)?,
                None => self.scanned(selection, selected)?,
            };
            tally.disk(self.context, &selection.word, &selected.name, checked);
        }
        Ok(())
    }

    /// A disk of a point, by what its files store.
    fn stored(&mut self, selection: &Selection, point: &SelectedPoint, selected: &SelectedDisk) -> Result<Checked> {
        let repo = repository::open(self.context)?;
        let missing = || Fail::new(Code::NotFound, format!("no disk {}", selected.name));
        let stored = point.record.disks.iter().find(|stored| stored.name.as_str() == selected.name);
        let stored = stored.ok_or_else(missing)?;
        let reader = repo.open_disk(&point.point, &stored.name)?;
        let files = files::of_point(Path::new(reader.label()), stored);
        let key = repo.content_key().clone();
        let mut keeper = self.keeper(selection, selected, files);
        native::check(&reader, key, &mut keeper)
    }

    /// Any other disk, by reading all that it holds.
    fn scanned(&mut self, selection: &Selection, selected: &SelectedDisk) -> Result<Checked> {
        let chain = selected.open_chain(&self.context.cache()?)?;
        let files = files::of_chain(&chain);
        let disk = Disk::read_only(&selected.name, chain);
        let mut keeper = self.keeper(selection, selected, files);
        scan::check(&disk, &mut keeper)
    }

    fn keeper<'k>(
        &'k mut self,
        selection: &'k Selection,
        selected: &'k SelectedDisk,
        files: Option<Vec<FileState>>,
    ) -> Keeper<'k> {
        let (source, disk) = (selection.word.as_str(), selected.name.as_str());
        let before = self.memory.of(source, disk, files.as_deref());
        if let Some(before) = &before {
            report::resumed(self.context, source, disk, self.memory.began(), before);
        }
        let memory = Mutex::new(&mut self.memory);
        Keeper {
            context: self.context,
            stop: self.stop,
            memory,
            source,
            disk,
            files,
            before: before.unwrap_or_default(),
        }
    }
}

/// What the check of one disk is given: where to report, what was done before, and where to note what is done.
struct Keeper<'k> {
    context: &'k Context,
    stop: Stop,
    memory: Mutex<&'k mut Memory>,
    source: &'k str,
    disk: &'k str,
    files: Option<Vec<FileState>>,
    before: memory::Done,
}

impl Keeper<'_> {
    /// Writes down what is done, and what was found in that part.
    fn keep(&self, done: &memory::Done, found: &[Lost]) {
        let found = memory::below(found, done.below);
        self.memory.lock().keep(self.source, self.disk, self.files.as_deref(), done, &found);
    }
}
