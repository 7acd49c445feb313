//! The states of a replica and what can be done in each: a pure table, looked at before anything is touched.
//!
//! ```text
//! Absent -replicate-> Ready <-> Processing / Verifying
//! Ready -failover-> Failover -undo-> Ready        Ready -failover fails-> FailedFailover -failover / undo->
//! Failover -permanent-> PermanentFailover       Failover, ReadyToSwitch -start-> the same
//! Failover -failback-> ReadyToSwitch -switchover-> Failback -commit-> Ready
//! ReadyToSwitch -undo-> Failover                  Failback -undo-> Failover
//! Ready -remove-> Removed
//! ```
//!
//! Invariants
//! - Every state but the two last ones has a way out.
//! - What is not in the table is refused, with the states it would need and the operations that are possible now.
//! - An operation that fails ends in a state of the table, too: where it began, or the one named in its arrow.
//!
//! Not here: what an operation does; who may do it; whether one is under way.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::fail::{Code, Fail};

/// The state of a replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// There is none yet, or none that was ever complete.
    #[default]
    Absent,
    /// A run of its job writes to it.
    Processing,
    /// It is being tested; what the test writes is thrown away.
    Verifying,
    /// It can take over.
    Ready,
    /// It has taken over: its machine runs, or may.
    Failover,
    /// It was to take over, and its machine did not come up.
    FailedFailover,
    /// Production has all but the latest writes; the replica still serves.
    ReadyToSwitch,
    /// Production serves again, on trial: nothing of the replica is given up yet.
    Failback,
    /// It has become an ordinary machine.
    PermanentFailover,
    /// It was given up.
    Removed,
}

/// Something done to a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// A run of its job.
    Replicate,
    /// A test.
    Verify,
    /// Taking over at a restore point.
    Failover,
    /// Taking over without a loss, production still being there.
    PlannedFailover,
    /// Starting its machine again, which has ended while it serves.
    Start,
    /// Taking the last step back.
    Undo,
    /// Making the takeover final.
    Permanent,
    /// The first pass home.
    Failback,
    /// The second pass home, with the change of sides.
    Switchover,
    /// Making the way home final.
    Commit,
    /// Giving it up.
    Remove,
}

/// Where an operation leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrow {
    /// The state while it is under way.
    pub during: State,
    /// The state after it.
    pub success: State,
    /// The state after it has failed past its point of no return. Before that point it is where it began.
    pub failure: State,
}

/// Why an operation is not possible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What was wanted.
    pub op: Op,
    /// The state there is.
    pub have: State,
    /// The states it is possible in.
    pub need: Vec<State>,
    /// What is possible instead.
    pub allowed: Vec<Op>,
}

const fn arrow(during: State, success: State, failure: State) -> Arrow {
    Arrow { during, success, failure }
}

/// Every legal step, and no other.
const TABLE: [(State, Op, Arrow); 18] = {
    use Op as O;
    use State as S;
    [
        (S::Absent, O::Replicate, arrow(S::Processing, S::Ready, S::Absent)),
        (S::Ready, O::Replicate, arrow(S::Processing, S::Ready, S::Ready)),
        (S::Ready, O::Verify, arrow(S::Verifying, S::Ready, S::Ready)),
        (S::Ready, O::Failover, arrow(S::Ready, S::Failover, S::FailedFailover)),
        (S::Ready, O::PlannedFailover, arrow(S::Ready, S::Failover, S::FailedFailover)),
        (S::Ready, O::Remove, arrow(S::Ready, S::Removed, S::Ready)),
        (S::FailedFailover, O::Failover, arrow(S::FailedFailover, S::Failover, S::FailedFailover)),
        (S::FailedFailover, O::Undo, arrow(S::FailedFailover, S::Ready, S::FailedFailover)),
        (S::Failover, O::Start, arrow(S::Failover, S::Failover, S::Failover)),
        (S::Failover, O::Undo, arrow(S::Failover, S::Ready, S::Failover)),
        (S::Failover, O::Permanent, arrow(S::Failover, S::PermanentFailover, S::Failover)),
        (S::Failover, O::Failback, arrow(S::Failover, S::ReadyToSwitch, S::Failover)),
        (S::ReadyToSwitch, O::Start, arrow(S::ReadyToSwitch, S::ReadyToSwitch, S::ReadyToSwitch)),
        (S::ReadyToSwitch, O::Switchover, arrow(S::ReadyToSwitch, S::Failback, S::ReadyToSwitch)),
        (S::ReadyToSwitch, O::Undo, arrow(S::ReadyToSwitch, S::Failover, S::ReadyToSwitch)),
        (S::Failback, O::Commit, arrow(S::Failback, S::Ready, S::Failback)),
        (S::Failback, O::Undo, arrow(S::Failback, S::Failover, S::Failback)),
        (S::Absent, O::Remove, arrow(S::Absent, S::Removed, S::Absent)),
    ]
};

impl State {
    /// Every state.
    pub const ALL: [State; 10] = [
        State::Absent,
        State::Processing,
        State::Verifying,
        State::Ready,
        State::Failover,
        State::FailedFailover,
        State::ReadyToSwitch,
        State::Failback,
        State::PermanentFailover,
        State::Removed,
    ];

    /// Where `op` leads from here.
    ///
    /// # Errors
    /// [`Refusal`] where it is not possible.
    pub fn step(self, op: Op) -> Result<Arrow, Refusal> {
        let found = TABLE.iter().find(|(from, by, _)| *from == self && *by == op);
        found.map(|(.., arrow)| *arrow).ok_or_else(|| Refusal {
            op,
            have: self,
            need: TABLE.iter().filter(|(_, by, _)| *by == op).map(|(from, ..)| *from).collect(),
            allowed: self.allowed(),
        })
    }

    /// What is possible here.
    pub fn allowed(self) -> Vec<Op> {
        TABLE.iter().filter(|(from, ..)| *from == self).map(|(_, op, _)| *op).collect()
    }

    /// Whether nothing is ever done to it again.
    pub fn is_final(self) -> bool {
        matches!(self, Self::PermanentFailover | Self::Removed)
    }

    /// Whether it holds the replication of its machine: no new point, no retention.
    pub fn holds_replication(self) -> bool {
        !matches!(self, Self::Absent | Self::Ready | Self::Processing)
    }

    /// Whether a takeover stands that is neither taken back nor final, nor has come home.
    pub fn is_unsettled(self) -> bool {
        matches!(self, Self::Failover | Self::FailedFailover | Self::ReadyToSwitch | Self::Failback)
    }

    /// As records and people name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Processing => "processing",
            Self::Verifying => "verifying",
            Self::Ready => "ready",
            Self::Failover => "failover",
            Self::FailedFailover => "failed_failover",
            Self::ReadyToSwitch => "ready_to_switch",
            Self::Failback => "failback",
            Self::PermanentFailover => "permanent_failover",
            Self::Removed => "removed",
        }
    }
}

impl Op {
    /// Every operation.
    pub const ALL: [Op; 11] = [
        Op::Replicate,
        Op::Verify,
        Op::Failover,
        Op::PlannedFailover,
        Op::Start,
        Op::Undo,
        Op::Permanent,
        Op::Failback,
        Op::Switchover,
        Op::Commit,
        Op::Remove,
    ];

    /// Whether it puts a stamp with a higher count of changes of sides.
    pub fn changes_sides(self) -> bool {
        matches!(self, Self::Failover | Self::Undo | Self::Switchover | Self::Commit)
    }

    /// What is typed for it, where there is something: runs of a job have names of their own.
    fn typed(self) -> Option<&'static str> {
        Some(match self {
            Self::Failover => "failover",
            Self::PlannedFailover => "failover --planned",
            Self::Start => "replicas --start",
            Self::Undo => "undo",
            Self::Permanent => "permanent",
            Self::Failback => "failback",
            Self::Switchover => "failback --switch now",
            Self::Commit => "commit",
            Self::Remove => "replicas --remove",
            Self::Replicate => "run (its job)",
            Self::Verify => return None,
        })
    }

    /// As records and people name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Replicate => "replicate",
            Self::Verify => "verify",
            Self::Failover => "failover",
            Self::PlannedFailover => "planned_failover",
            Self::Start => "start",
            Self::Undo => "undo",
            Self::Permanent => "permanent",
            Self::Failback => "failback",
            Self::Switchover => "switchover",
            Self::Commit => "commit",
            Self::Remove => "remove",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn list<T: fmt::Display>(all: &[T]) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl From<Refusal> for Fail {
    fn from(refusal: Refusal) -> Self {
        let Refusal { op, have, need, allowed } = refusal;
        let what = format!("{op} is not possible: the replica is {have}, and it needs {}", list(&need));
        let typed: Vec<&str> = allowed.into_iter().filter_map(Op::typed).collect();
        let now = if typed.is_empty() { "nothing".to_owned() } else { typed.join(", ") };
        Self::new(Code::State, what).at("replica").cause(format!("possible now: {now}"))
    }
}

#[cfg(test)]
mod tests;
