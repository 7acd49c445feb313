//! What a session remembers of its machine: the runner's part of `session.json`.
//!
//! Invariants
//! - The record alone is enough to start the machine again on the same disks.
//! - `wanted` says what ought to be, never what is: that is looked up.

use std::path::PathBuf;

use aquifer_mount::session::{Folder, Spec};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    fail::{Code, Fail, Result},
    host::{Attachment, Door, Places, Power, Running, Shape, firmware::Decision},
};

/// How long requests of a guest wait for a door that went away before the guest is stopped, seconds.
pub const RECONNECT_S: u32 = 300;

/// A recovered machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Name of the host.
    pub host: String,
    /// What it is.
    pub shape: Shape,
    /// Why it has the firmware it has.
    pub firmware: Decision,
    /// Whether it ought to run.
    pub wanted: Wanted,
    /// The process, once there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<Running>,
    /// When that was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// The restore point it stands on, where that is in a repository: held until the session ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<HeldPoint>,
}

/// A restore point in a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldPoint {
    /// Folder of the repository.
    pub repository: PathBuf,
    /// The machine there.
    pub machine: Uuid,
    /// The point.
    pub point: Uuid,
}

/// Whether a machine ought to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// It is started again after a crash of its host.
    On,
    /// It was turned off, from inside or by us.
    Off,
}

impl Machine {
    /// The machine of a session; `None` for a session without one.
    ///
    /// # Errors
    /// [`Code::Corrupt`] for a record that is not understood.
    pub fn of(spec: &Spec) -> Result<Option<Self>> {
        if spec.host.is_null() {
            return Ok(None);
        }
        serde_json::from_value(spec.host.clone()).map(Some).map_err(|e| {
            Fail::new(Code::Corrupt, "the session's record of its machine is not understood")
                .at(spec.dir.join("session.json").display())
                .cause(e)
        })
    }

    /// The record as the session keeps it.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// Changes the record in its session.
    ///
    /// # Errors
    /// Of the session's folder.
    pub fn edit(folder: &Folder, change: impl FnOnce(&mut Self)) -> Result<()> {
        let mut outcome = Ok(());
        folder.edit(|spec| match Self::of(spec) {
            Ok(Some(mut machine)) => {
                change(&mut machine);
                spec.host = machine.to_json();
            }
            Ok(None) => {}
            Err(fail) => outcome = Err(fail),
        })?;
        outcome
    }

    /// How it fares; [`Power::Off`] where it never started.
    ///
    /// # Errors
    /// The process lives but does not answer.
    pub fn power(&self) -> Result<Power> {
        match &self.running {
            Some(running) => Ok(super::host(&self.host)?.power(running)?),
            None => Ok(Power::Off),
        }
    }
}

/// The doors of a session's disks, as its machine uses them.
pub fn doors(spec: &Spec) -> Vec<Attachment> {
    let door = |name: &str| Door { socket: spec.nbd_socket(), export: name.to_owned(), reconnect_s: RECONNECT_S };
    spec.disks.iter().map(|disk| door(&disk.name).into()).collect()
}

/// Where a session's machine keeps its files.
pub fn places(spec: &Spec) -> Places {
    Places { dir: spec.dir.clone(), runtime_dir: spec.runtime_dir.clone() }
}
