//! The recovery session: one process that owns a machine's disks, their doors and their hydration.
//!
//! - [`Spec`], [`State`], [`Folder`]: what a session is, where it stands, where that is kept.
//! - [`Registry`]: a user's sessions by name and id.
//! - [`Client`]: status and orders, from outside.
//!
//! Invariants
//! - A session folder is served by one process at a time, and by none without its lock.
//! - What is in the folder is enough to go on after any process, or the whole host, has died.
//! - A command that asks about a session never starts or stops one by asking.
//!
//! Not here: the machine itself. Hypervisors, firmware and pivots are the runner's; it joins the
//! process through hooks.

mod client;
pub mod control;
pub mod error;
pub mod folder;
mod registry;
pub mod spec;
mod state;
pub mod status;

pub use client::Client;
pub use error::{Error, Result};
pub use folder::{Event, Folder, OwnerLock};
pub use registry::{Pointer, Registry};
pub use spec::{Access, DiskSpec, Hydrate, Options, Preallocate, Spec, check_socket_path, is_name};
pub use state::State;
pub use status::Status;
