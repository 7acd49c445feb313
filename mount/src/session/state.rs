//! States of a recovery session, and the only place that knows which may follow which.
//!
//! ```text
//! Queued -> Preparing -> Mounting -> Mounted <-> Interrupted
//! Mounted -> Migrating -> Migrated                                 in place: no switchover
//!            Migrating -> ReadyToSwitch -> Switching -> Migrated   to other storage
//! Preparing | Mounting -> Failed -> Preparing                      restart
//! whatever stands -> Dismounting -> Stopped
//! ```
//!
//! Invariants
//! - A transition not drawn here is refused with what would have been legal, and changes nothing.
//! - Every state but [`State::Stopped`] has a legal exit.
//!
//! Not here: what a transition does, and who records it (`Folder::transition`).

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Error, Result};

/// Where a recovery session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum State {
    /// Waits for a slot.
    Queued,
    /// Reads the configuration, decides the firmware, makes the empty machine, reserves space.
    Preparing,
    /// Opens the restore point and the overlay, attaches the disks, starts the machine.
    Mounting,
    /// Serves; nothing is copied in the background.
    Mounted,
    /// The source is away or the door is down: what is local works, the rest waits.
    Interrupted,
    /// Serves, and fills the overlay in the background.
    Migrating,
    /// The copy on other storage is complete but for the last changes.
    ReadyToSwitch,
    /// The machine changes over to the copy.
    Switching,
    /// Everything is local; source and door are no longer needed.
    Migrated,
    /// Powers off and takes down; repeated until it is complete.
    Dismounting,
    /// Taken down. Final.
    Stopped,
    /// Preparing or mounting went wrong and was rolled back; can be restarted or taken down.
    Failed,
}

impl State {
    /// All states, in the order of a session's life.
    pub const ALL: [Self; 12] = [
        Self::Queued,
        Self::Preparing,
        Self::Mounting,
        Self::Mounted,
        Self::Interrupted,
        Self::Migrating,
        Self::ReadyToSwitch,
        Self::Switching,
        Self::Migrated,
        Self::Dismounting,
        Self::Stopped,
        Self::Failed,
    ];

    /// States that may follow this one.
    pub fn allowed(self) -> &'static [Self] {
        use State::{
            Dismounting, Failed, Interrupted, Migrated, Migrating, Mounted, Mounting, Preparing, Queued, ReadyToSwitch,
            Stopped, Switching,
        };
        match self {
            // A queued session that is no longer wanted has nothing to roll back.
            Queued => &[Preparing, Dismounting],
            Preparing => &[Mounting, Failed],
            Mounting => &[Mounted, Failed],
            Mounted => &[Interrupted, Migrating, Dismounting],
            Interrupted => &[Mounted, Dismounting],
            // A failed copy falls back to Mounted with its progress kept.
            Migrating => &[Mounted, Interrupted, ReadyToSwitch, Migrated, Dismounting],
            ReadyToSwitch => &[Switching, Dismounting],
            Switching => &[Migrated, Migrating],
            // Nothing is lost by taking the doors down once all is local.
            Migrated => &[Dismounting],
            Dismounting => &[Stopped],
            Stopped => &[],
            Failed => &[Preparing, Dismounting],
        }
    }

    /// `next`, if it may follow.
    ///
    /// # Errors
    /// [`Error::State`] with the states `next` can be reached from and those allowed now.
    pub fn to(self, next: Self) -> Result<Self> {
        if self.allowed().contains(&next) {
            return Ok(next);
        }
        let need = Self::ALL.into_iter().filter(|s| s.allowed().contains(&next)).collect();
        Err(Error::State { have: self, need, allowed: self.allowed().to_vec() })
    }

    /// Whether the door is to serve in this state: the disks may be in use.
    pub fn serves(self) -> bool {
        use State::{Interrupted, Migrated, Migrating, Mounted, Mounting, ReadyToSwitch, Switching};
        matches!(self, Mounting | Mounted | Interrupted | Migrating | ReadyToSwitch | Switching | Migrated)
    }

    /// Whether anything of the session still runs or stands on the host.
    pub fn is_live(self) -> bool {
        !matches!(self, Self::Stopped | Self::Failed)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests;
