//! Recoveries: from a source to a running machine, and from there to a machine that needs nobody.
//!
//! - [`Plan`]: everything that is known before anything is made, and every reason to refuse.
//! - [`start`]: the steps, and their undoing.
//! - [`queue`]: several machines at once, under a limit.
//! - [`finish`]: keep or discard; [`gone`]: where the folder was taken away by hand.
//! - [`traces`]: what earlier boots read first.
//!
//! Invariants
//! - The overlay stands before the machine starts; no error path deletes one the guest has written to.
//! - Until the machine runs, a failure leaves the host as it was found.
//! - A step is said to be done when its effect was seen.
//!
//! Not here: what a session's process does (`aquifer_mount::session`), hypervisors (`host`).

pub mod door;
pub mod finish;
pub mod follow;
pub mod gone;
pub mod plan;
pub mod queue;
pub mod record;
pub mod shape;
pub mod start;
pub mod traces;
pub mod view;

pub use plan::Plan;
pub use record::Machine;

use std::path::Path;

use aquifer_mount::session::Folder;

use crate::{
    fail::{Code, Fail, Result},
    host::{Host, Running, qemu::Qemu},
};

/// The hosts there are.
pub const HOSTS: [&str; 1] = ["qemu"];

/// The host of that name.
///
/// # Errors
/// [`Code::Usage`] with the names there are.
pub fn host(name: &str) -> Result<&'static dyn Host> {
    match name {
        "qemu" => Ok(&Qemu),
        _ => Err(Fail::new(Code::Usage, format!("no host is called `{name}`; there is {}", HOSTS.join(", ")))),
    }
}

/// The running machine of the recovery in that folder.
///
/// # Errors
/// [`Code::Guest`] where it does not run; others where the folder cannot be read.
pub fn running_in(dir: &Path) -> Result<(&'static dyn Host, Running)> {
    let spec = Folder::open(dir)?.load()?;
    let machine = Machine::of(&spec)?.and_then(|m| Some((host(&m.host).ok()?, m.running?)));
    machine.ok_or_else(|| Fail::new(Code::Guest, "the machine has no process").at(dir.display()))
}
