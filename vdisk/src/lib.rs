//! One virtual disk from many layers.
//!
//! - [`Chain`]: restore points stacked into one read-only disk; a read costs the same at any depth.
//! - [`BlockCache`]: decoded blocks under one byte budget, one decode however many wait.
//! - [`Overlay`]: the durable writable top of a recovery.
//! - [`Disk`]: what every door and every job reads and writes: a chain, and perhaps an overlay.
//! - [`Hydrator`]: fills the overlay from the chain while the machine works.
//!
//! Invariants
//! - At every instant each block a guest sees is its newest write, else the hydrated copy, else the
//!   restore point's block read through the chain.
//! - An acknowledged flush survives anything short of losing the overlay's own disk.
//! - A read gives the right bytes or an error; never zeros for missing ones.
//!
//! Not here: sockets, mounts, processes (`aquifer-mount`); decoding of formats (`aquifer-formats`).

pub mod cache;
pub mod chain;
pub mod delta;
pub mod disk;
pub mod error;
pub mod extent;
pub mod hydrate;
pub mod inside;
pub mod linked;
mod map;
pub mod open;
pub mod overlay;
pub mod readahead;
mod sync;
pub mod trace;
pub mod unflushed;
pub mod unused;

pub use cache::{BlockCache, CacheStats};
pub use chain::Chain;
pub use delta::{Delta, delta_between};
pub use disk::{Disk, Parked, Zeroing};
pub use error::{Error, Result};
pub use extent::{Extent, ExtentKind};
pub use hydrate::{
    Blocks, Bucket, DemandStats, HydrateProgress, HydrateState, Hydrated, Hydrator, Pace, Replay, YIELDING,
};
pub use inside::ChainStorage;
pub use linked::{Linkable, open_below};
pub use open::{ChainSpec, Connect, KeyPlace, format_of, members, open_chain};
pub use overlay::{LocalProgress, Overlay, OverlayFiles, OverlayOf, OverlayOptions, Settling};
pub use readahead::Readahead;
#[cfg(feature = "schedule")]
pub use sync::plant;
pub use trace::Trace;
