//! The network block device protocol, both roles: the server is a door to a [`aquifer_vdisk::Disk`],
//! the client makes any NBD export a source.
//!
//! - [`wire`], [`request`], [`reply`], [`negotiate`]: the codec, without I/O: bytes in, bytes out.
//! - [`Server`]: listeners, a thread per connection, pools for what may wait.
//! - [`Address`]: where an export lives, printed as an NBD URI.
//!
//! Invariants
//! - Nothing a peer sends is trusted: lengths are bounded before memory is taken, offsets are checked
//!   once, by [`request::Request::validate`].
//! - A connection's fault ends that connection only.
//! - With TLS required nothing but the negotiation of TLS happens in the clear.
//!
//! Not here: what a disk holds, and which disks are served (`Session`, the command line).

pub mod address;
pub mod client;
pub mod error;
pub mod export;
mod link;
pub mod negotiate;
pub mod reply;
pub mod request;
pub mod server;
pub mod tls;
pub mod wire;

pub use address::Address;
pub use client::{Client, ClientOptions, NbdLayer, Queue};
pub use error::{Error, Result};
pub use export::{DirtyContext, Export};
pub use server::{Limits, Server, ServerBuilder, Stats};
pub use tls::{ClientTls, ServerTls};
