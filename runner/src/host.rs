//! What only a hypervisor can do: start a machine on disks we serve, tell how it fares, move a running one from
//! our door to its own local file, stop it.
//!
//! Invariants
//! - Nothing is reported as done that was not observed on the host afterwards.
//! - What a guest could write is opened with an explicit format, never probed.
//!
//! Not here: sessions, doors, what a recovery does in which order (`recover`).

pub mod firmware;
pub mod partition;
pub mod qmp;
