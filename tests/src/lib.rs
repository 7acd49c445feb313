//! What the tests by promise share: the oracle, faults, crash images, fixtures, peers.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking"
)]

pub mod backups;
pub mod boot_sector;
pub mod chains;
pub mod damage;
pub mod door;
pub mod explore;
pub mod failing;
pub mod faults;
pub mod filesystems;
pub mod folders;
pub mod foreign;
pub mod fuzz;
pub mod guest;
pub mod image;
pub mod kept;
pub mod ledger;
pub mod machine;
pub mod mend;
pub mod oracle;
pub mod postgres;
pub mod program;
pub mod qemu;
pub mod rig;
pub mod rng;
pub mod site;
pub mod stored;
pub mod synthetic;
pub mod traced;
pub mod writelog;
