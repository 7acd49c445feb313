//! Giving a replica up: it leaves the list, and its files stay or go.
//!
//! Invariants
//! - No restore point is listed any more before the first file goes.
//! - What says that the files are a machine goes first, our stamp last: a removal that was cut short is gone on with.
//! - A replica whose files stay is an ordinary machine from then on; its job leaves its machine out until somebody lets
//!   it in again. One whose files are gone is made anew by the next run.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};

use super::{
    desk::{Desk, Went, Work},
    layers,
    model::ReplicaRecord,
    state::{Op, State},
    trust,
};
use crate::{
    fail::{Code, Fail, Result},
    host::placed,
    step::{AfterCrash, Plan},
};

/// What becomes of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Files {
    /// They stay, as an ordinary machine.
    Stay,
    /// They go.
    Go,
}

/// A removal under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveWork {
    kind: String,
    name: String,
    files: Files,
}

/// Gives a replica up.
///
/// # Errors
/// [`Code::State`] unless it is ready; [`Code::ForeignOwner`]; I/O: called again, it goes on.
pub fn remove(desk: &Desk<'_>, name: &str, files: Files) -> Result<()> {
    let row = desk.ready_for(name, Op::Remove)?;
    if desk.running(&row.record.folder).is_some() {
        return Err(Fail::new(Code::State, format!("a machine runs in {}", row.record.folder.display())));
    }
    let work = RemoveWork { kind: RemoveWork::KIND.into(), name: name.to_owned(), files };
    desk.carry_out(name, work, None).map(drop)
}

/// Lets the job make a replica again whose files stayed when it was given up.
///
/// # Errors
/// [`Code::State`] unless it was given up.
pub fn readmit(desk: &Desk<'_>, name: &str) -> Result<()> {
    let mut row = desk.load(name)?;
    if row.record.state != State::Removed {
        let what = format!("{name} was not given up: it is {}", row.record.state);
        return Err(Fail::new(Code::State, what).help(format!("aquifer replicas {name}")));
    }
    row.record.excluded = false;
    desk.store(row).map(drop)
}

impl Work for RemoveWork {
    const OP: Op = Op::Remove;
    const KIND: &'static str = "remove";

    fn plan<'a>(desk: &'a Desk<'a>) -> Plan<'a, Self> {
        Plan::new(AfterCrash::On)
            .final_step("points", |work: &mut Self| desk.drop_points(&work.name))
            .final_step("files", |work: &mut Self| {
                let record = desk.load(&work.name)?.record;
                match work.files {
                    Files::Go => clear(&record.folder),
                    Files::Stay => {
                        if let Some(run) = &record.unfinished {
                            run.discard(&record)?;
                        }
                        trust::forget(&record.folder)
                    }
                }
            })
            .final_step("digests", |work: &mut Self| {
                let record = desk.load(&work.name)?.record;
                gone(fs::remove_dir_all(record.metadata.join(record.lineage.to_string())), &record.metadata)
            })
    }

    fn settle(&self, record: &mut ReplicaRecord, went: &Went) {
        // What could not be removed is told; listed it is not: its points are gone.
        if !matches!(went, Went::Undone(_)) {
            record.state = State::Removed;
            record.excluded = self.files == Files::Stay;
            record.unfinished = None;
        }
    }
}

/// Removes a replica's folder: the description first, the stamp last.
fn clear(folder: &Path) -> Result<()> {
    layers::remove(&folder.join(placed::DESCRIPTION))?;
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Fail::io(folder.display(), "list", &error)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| Fail::io(folder.display(), "list", &e))?;
        let path = entry.path();
        if entry.file_name() == super::desk::STAMP {
            continue;
        }
        let done = if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        gone(done, &path)?;
    }
    layers::remove(&folder.join(super::desk::STAMP))?;
    gone(fs::remove_dir(folder), folder)
}

fn gone(done: io::Result<()>, path: &Path) -> Result<()> {
    match done {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Fail::io(path.display(), "remove", &error)),
        _ => Ok(()),
    }
}
