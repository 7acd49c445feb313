//! The process that serves a session, started from here.

use aquifer_mount::session::{Error, Folder};

use crate::{
    context::Context,
    fail::{Code, Fail, Result},
};

/// Starts it.
pub fn launch(_context: &Context, folder: &Folder) -> Result<()> {
    let what = "the session's process is not part of this build yet";
    Err(Fail::new(Code::Unsupported, what).at(folder.dir().display()))
}

/// Waits for its end.
pub fn end(_folder: &Folder) {}

/// Why.
pub fn why(_folder: &Folder, error: Error) -> Fail {
    error.into()
}
