//! Everything that a run needs is looked at before any of it is used.
//!
//! | component | what is looked at |
//! |---|---|
//! | controller, worker | whoever is here holds the work's lease: without it nothing is begun |
//! | target host | the folder of its machines can be written to |
//! | metadata repository | the folder of the digests can be written to |
//! | source repositories | each opens, and is ours or said to be imported |
//! | production | its machine is found and opens: where its content is read (`job::replicate`) |
//!
//! Invariants
//! - All that cannot be used is named at once, each with its cause; nothing was moved or made then.
//!
//! Not here: how much room there is: what is written where is known only while it is.

use std::path::Path;

use aquifer_formats::repo::Repository;
use rustix::fs::Access;

use super::{
    desk::Desk,
    run::{ReplicaSpec, refuse_foreign},
};
use crate::fail::{Fail, Result};

/// Looks at the components of a run.
///
/// # Errors
/// The first that cannot be used; its message names all.
pub fn check(desk: &Desk<'_>, spec: &ReplicaSpec) -> Result<()> {
    let mut found = vec![
        (format!("the target host {}", spec.host), writable(&spec.folder)),
        ("the metadata repository".to_owned(), writable(&spec.metadata)),
    ];
    for dir in &spec.repositories {
        let opened = Repository::open(dir, desk.me.clone()).map_err(Fail::from);
        found.push(("a source repository".to_owned(), opened.and_then(|repo| refuse_foreign(&repo, spec))));
    }
    let failed: Vec<(String, Fail)> =
        found.into_iter().filter_map(|(what, done)| done.err().map(|fail| (what, fail))).collect();
    let all: Vec<String> = failed.iter().map(|(what, fail)| format!("{what} cannot be used: {}", fail.what)).collect();
    match failed.into_iter().next() {
        None => Ok(()),
        Some((_, first)) => Err(Fail { what: all.join("; "), ..first }),
    }
}

/// Whether a folder can be written to, or made where it is not there.
fn writable(folder: &Path) -> Result<()> {
    let there = folder.ancestors().find(|above| above.symlink_metadata().is_ok()).unwrap_or(folder);
    let fail = |error: rustix::io::Errno| Fail::io(there.display(), "write to", &error.into());
    rustix::fs::access(there.join("."), Access::WRITE_OK | Access::EXEC_OK).map_err(fail)
}
