//! Replicas: machines kept ready on another host, as chains of the hypervisor's own images.
//!
//! ```text
//! <images>/<replica>/
//!   machine.toml              what the host starts
//!   replica.json              whose chain this is, and since which change of sides
//!   layers.json               each layer as it was when it was settled, and a copy of what the catalogue knows
//!   <disk>/<number>.qcow2     a layer; the file it stands on is named by file name, with its format
//!   <disk>/<number>.qcow2.*   a layer that a run is still writing
//! ```
//!
//! Invariants
//! - A layer that another one, a restore point or a running machine stands on is never written to.
//! - A layer has its name only when it is whole and durable, and is known to the catalogue only after that.
//! - What is equal is not moved: by the tables of one chain, by digests between chains.
//!
//! Not here: taking over and coming home (`failover`, `failback`).

pub mod adopt;
pub mod build;
pub mod components;
pub mod desk;
pub mod digests;
pub mod foresee;
pub mod images;
pub mod keep;
pub mod layers;
pub mod member;
pub mod model;
pub mod production;
pub mod recall;
pub mod recover;
pub mod remove;
pub mod rules;
pub mod run;
pub mod seat;
pub mod state;
pub mod stray;
pub mod trust;
