//! How the work of a site gets done: the order of the queue, the loop of `serve` and `worker`, when runs begin.
//!
//! Invariants
//! - What is done next is decided by [`order`] alone: pure, and the same for every worker.
//! - Whoever works keeps a lease alive and carries its fence; see `catalogue`.
//!
//! Not here: where work is kept (`catalogue`), what it means (`job`), when a schedule is due (`schedule`).

pub mod expand;
pub mod follow;
mod hands;
pub mod order;
mod owner;
pub mod planner;
pub mod rate;
pub mod stage;
mod task;
mod worker;

pub use hands::Hands;
pub use owner::{is_gone, owner};
pub use planner::Planner;
pub use rate::{Direction, Rate, Rates};
pub use stage::{Busy, Stage, Stages};
pub use task::{Counts, Done, Task};
pub use worker::{Body, Worker};
