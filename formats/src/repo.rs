//! The repository: machines, their restore points, and who uses them.
//!
//! ```text
//! aquifer.json                                 what this repository is
//! owners/<n>.json                              who took it over, if anybody did
//! machines/<machine>/machine.json              one machine
//! machines/<machine>/points/<point>/begin.json what a backup set out to do
//! machines/<machine>/points/<point>/<disk>.aql the disks
//! machines/<machine>/points/<point>/point.json written last: the point exists
//! machines/<machine>/chain/<generation>.json   which points the machine has; each change is a new one
//! machines/<machine>/traces/<disk>.trace       what its disks are read for first: a hint
//! leases/<lease>.json                          who reads or appends what
//! ```
//!
//! Invariants
//! - Objects are created once and never edited (leases beat in place and traces are replaced; they hold no truth about data). A
//!   change of the list of points is a new generation that names the hash of the one before.
//! - A point is listed as complete only if its `point.json` is there, has the hash its generation names,
//!   and every file it needs is there with the length it was sealed with.
//! - Order, `latest` and retention follow the receipt sequence (the generation that received the point),
//!   never a clock and never the time inside a point's id.
//! - Only [`keeper`] deletes, in two functions.
//! - Names in paths are made here, from ids and checked disk names; no string read from a file becomes a path.
//!
//! Not here: jobs and schedules, what to back up, encryption, and the deletion policy.

mod error;
pub mod keeper;
mod lease;
mod manifest;
mod name;
mod open;
mod point;
mod query;
pub mod rebase;
pub mod record;
mod store;
mod trace;
mod transaction;
mod variables;

pub use error::{Error, Result};
pub use lease::{LEASE_TTL, Lease, LeaseMemory, LeaseObserver, Liveness};
pub use manifest::{Freshness, Seen};
pub use name::DiskName;
pub use open::{Access, LinkedOpener, Machine, Repository};
pub use point::{Point, PointState};
pub use query::{Answer, PointQuery};
pub use store::Store;
pub use transaction::{DiskPlan, DiskWork, Interrupted, NewPoint, Transaction};
pub use variables::{UefiVariables, VARIABLES_BYTES_MAX};

#[cfg(test)]
mod tests;
