//! The recovery session: one process that owns a machine's disks, their doors and their hydration.
//!
//! - [`Spec`], [`State`], [`Folder`]: what a session is, where it stands, where that is kept.
//! - [`Registry`]: a user's sessions by name and id.
//! - [`serve`]: the process that is the session; [`Hooks`] is how a runner joins it.
//! - [`supervise`]: the small process that starts it again when it dies.
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
mod disks;
pub mod error;
pub mod folder;
mod listen;
mod live;
mod registry;
mod serve;
mod source;
pub mod space;
pub mod spec;
mod state;
pub mod status;
mod supervise;
pub mod traces;
mod watch;

pub use client::Client;
pub use disks::{hexadecimal, this_boot};
pub use error::{Error, Result};
pub use folder::{Event, Folder, OwnerLock, make_private_dir, sync_dir};
pub use live::Live;
pub use registry::{Pointer, Registry};
pub use serve::{Confine, ConnectNbd, Happening, Hooks, NoHooks, Serving, serve};
pub use spec::{Access, Blocks, DiskSpec, Hydrate, Options, Preallocate, Spec, check_socket_path, is_name};
pub use state::State;
pub use status::Status;
pub use supervise::{Policy, inherited_listener, leave_terminal, spawn_detached, supervise};
