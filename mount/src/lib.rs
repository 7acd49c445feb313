//! Doors to a disk, and the recovery session that owns disk, doors and hydrator.
//!
//! Invariants
//! - A door sees a [`aquifer_vdisk::Disk`], never a layer.
//! - Every request is validated once, at the door; `errno` is the only table of error numbers.
//! - Sockets are 0600 in 0700 folders; TCP off loopback needs TLS.
//!
//! Not here: what a backup is, which point to recover, hypervisors (`aquifer`).

pub mod confine;
pub mod dial;
pub mod errno;
pub mod fuse;
pub mod loopdev;
pub mod nbd;
pub mod session;
pub mod vhost;
