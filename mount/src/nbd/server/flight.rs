//! How much of one connection is in the air: requests taken and not yet answered.
//!
//! Invariants
//! - At most [`REQUESTS_MAX`] requests and [`BYTES_MAX`] bytes; a single larger request goes alone.
//! - A [`Permit`] is held until the answer has left (or was dropped), so a client that does not read
//!   stops being read from.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

/// Requests of one connection in the air.
pub(super) const REQUESTS_MAX: u32 = 256;
/// Bytes of one connection in the air: payloads and promised answers.
pub(super) const BYTES_MAX: u64 = 64 << 20;

/// The count.
#[derive(Debug, Default)]
pub(super) struct Flight {
    air: Mutex<Air>,
    landed: Condvar,
}

#[derive(Debug, Default)]
struct Air {
    requests: u32,
    bytes: u64,
}

/// One request in the air.
#[derive(Debug)]
pub(super) struct Permit {
    flight: Arc<Flight>,
    bytes: u64,
}

impl Flight {
    /// Counts a request of `bytes`, after waiting for room; `None` once `over` says that waiting is in vain.
    pub(super) fn begin(self: &Arc<Self>, bytes: u64, over: impl Fn() -> bool) -> Option<Permit> {
        let mut air = self.air.lock();
        while air.requests > 0 && (air.requests >= REQUESTS_MAX || air.bytes.saturating_add(bytes) > BYTES_MAX) {
            if over() {
                return None;
            }
            self.landed.wait_for(&mut air, Duration::from_millis(100));
        }
        air.requests += 1;
        air.bytes += bytes;
        Some(Permit { flight: Arc::clone(self), bytes })
    }

    /// Whether there is room for another request of `bytes` at once.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        let air = self.air.lock();
        air.requests == 0 || (air.requests < REQUESTS_MAX && air.bytes.saturating_add(bytes) <= BYTES_MAX)
    }

    /// Whether nothing is in the air.
    pub(super) fn is_empty(&self) -> bool {
        self.air.lock().requests == 0
    }

    /// Whether no data is in the air, neither a payload nor a promised answer; flushes and the like may be.
    pub(super) fn has_no_data(&self) -> bool {
        self.air.lock().bytes == 0
    }

    /// Waits until all is answered; `false` once `over` says so or at the deadline.
    pub(super) fn wait_until_empty(&self, deadline: Option<Instant>, over: impl Fn() -> bool) -> bool {
        let mut air = self.air.lock();
        while air.requests > 0 {
            if over() || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return false;
            }
            self.landed.wait_for(&mut air, Duration::from_millis(50));
        }
        true
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut air = self.flight.air.lock();
        air.requests -= 1;
        air.bytes -= self.bytes;
        drop(air);
        self.flight.landed.notify_all();
    }
}
