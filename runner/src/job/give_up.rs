//! Giving replicas up, and letting their job make them again: work of the queue, so that it takes turns with runs.

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    catalogue::{NewWork, Retries},
    fail::{Code, Fail, Result},
    host::Network,
    replica::{
        desk::object,
        model::ReplicaRecord,
        remove::{self, Files},
        seat,
        state::{Op, State},
    },
    tasks::{Done, Task},
};

/// The kind of this work in the queue.
pub const KIND: &str = "give_up";

/// Before backups and copies: somebody waits for it.
const PRIORITY: i32 = 800;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// It leaves the list, its files stay.
    Remove,
    /// It leaves the list and its files go.
    Delete,
    /// Its job makes it again.
    Readmit,
}

/// What such a piece of work is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Spec {
    replica: String,
    act: Act,
}

impl Act {
    /// Refuses what the replica's state forbids.
    ///
    /// # Errors
    /// [`Code::State`].
    pub fn check(self, record: &ReplicaRecord) -> Result<()> {
        let about = |fail: Fail| fail.at(object(&record.name)).help(format!("aquifer replicas {}", record.name));
        match self {
            Self::Remove | Self::Delete => record.state.step(Op::Remove).map(drop).map_err(|no| about(no.into())),
            Self::Readmit if record.state == State::Removed => Ok(()),
            Self::Readmit => {
                let what = format!("{} was not given up: it is {}", record.name, record.state);
                Err(about(Fail::new(Code::State, what)))
            }
        }
    }

    /// As sessions name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Remove => "remove",
            Self::Delete => "delete",
            Self::Readmit => "readmit",
        }
    }
}

/// The work.
pub fn work(replica: &str, act: Act) -> NewWork {
    NewWork {
        kind: KIND.to_owned(),
        object: object(replica),
        job: None,
        session: None,
        priority: PRIORITY,
        run_at: jiff::Timestamp::UNIX_EPOCH,
        needs: Vec::new(),
        retries: Retries::default(),
        spec: json!({ "replica": replica, "act": act }),
    }
}

/// Does it.
///
/// # Errors
/// [`Code::State`]; [`Code::ForeignOwner`]; I/O.
pub fn run(task: &Task<'_>) -> Result<Done> {
    let spec: Spec = task.spec()?;
    let (done, told) = seat::at_desk(task, Network::None, std::time::Duration::ZERO, |desk| match spec.act {
        // An earlier holder of this work may have brought it to its end.
        Act::Remove | Act::Delete if is_gone(desk, &spec.replica)? => Ok(()),
        Act::Remove => remove::remove(desk, &spec.replica, Files::Stay),
        Act::Delete => remove::remove(desk, &spec.replica, Files::Go),
        Act::Readmit => remove::readmit(desk, &spec.replica),
    });
    done?;
    let report = json!({ "replica": spec.replica, "act": spec.act });
    let why: Vec<String> = told.iter().map(|(code, what)| format!("{}: {what}", code.name())).collect();
    Ok(if why.is_empty() { Done::Success(report) } else { Done::Warning { why: why.join("; "), report } })
}

fn is_gone(desk: &crate::replica::desk::Desk<'_>, name: &str) -> Result<bool> {
    crate::replica::recover::recover(desk, name)?;
    Ok(desk.load(name)?.record.state == State::Removed)
}
