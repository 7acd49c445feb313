//! What people ask of replicas: taking over, the way home, and back, each as work of the queue.
//!
//! Invariants
//! - What is asked is one piece of work on its replica: one at a time, under a lease, gone on from after a death.
//! - An operation that an earlier holder of the work brought to its end is not done twice: it is journalled under the
//!   work.
//! - What the state forbids is refused before anything is put into the queue, and once more when it begins.
//!
//! Not here: what the operations do (`failover`, `failback`); the order of several machines (`plan`).

mod ask;
mod marks;
pub mod place;
pub mod report;

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use ask::{Batches, Begun, begin, begin_in, check, interrupted, reports, schedule};
pub use place::{Production, production, target};
pub use report::Report;

use crate::{
    catalogue::{Event, Work, WorkState},
    fail::{Code, Fail, Result},
    failback::{self, Changed},
    failover::{self, planned},
    host::Network,
    replica::{
        desk::{Desk, object},
        member,
        model::{Home, Switch},
        recover::recover_for,
        run::ReplicaSpec,
        seat::at_desk,
        state::{Op, State},
    },
    site::Fencing,
    source::PointRef,
    tasks::{Done, Task},
};

/// The kind of this work in the queue.
pub const KIND: &str = "operation";

/// What is asked of a replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ask {
    /// The replica.
    pub replica: String,
    /// Why, for its record.
    #[serde(default)]
    pub reason: Option<String>,
    /// How long a guest has to turn itself off.
    pub grace: Duration,
    /// Where network cards of machines that are started are plugged in.
    #[serde(default)]
    pub network: Network,
    /// The state that whoever asked has seen, where what is asked means another thing in another state.
    #[serde(default)]
    pub seen: Option<State>,
    /// What.
    pub act: Act,
}

/// The operations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Act {
    /// Taking over.
    Failover {
        /// The restore point, as people write it.
        point: String,
        /// Whether the machine is started.
        start: bool,
        /// What happens to production's machine first.
        fence: Fence,
        /// Also at a point that was changed from outside.
        #[serde(default)]
        force: bool,
    },
    /// Starting its machine again.
    Start,
    /// Taking over without a loss.
    Planned {
        /// The replica, as its job says.
        spec: Box<PlannedSpec>,
        /// Whether the machine is started.
        start: bool,
        /// Whether production is started again when it fails.
        restart: bool,
    },
    /// The way home.
    Failback {
        /// Where to.
        home: Home,
        /// When the sides are changed.
        switch: Switch,
        /// Whether production is started.
        power_on: bool,
        /// Whether everything is compared, whatever production itself has noted of its changes.
        compare: bool,
        /// Whether what production has noted is proven by comparing everything as well.
        #[serde(default)]
        verify: bool,
    },
    /// The change of sides.
    Switchover {
        /// Whether production is started.
        power_on: bool,
    },
    /// Making the way home final.
    Commit {
        /// Also while production is off.
        force: bool,
    },
    /// The last step back.
    Undo {
        /// Also where the host does not answer.
        force: bool,
    },
    /// Making the takeover final.
    Permanent,
}

/// What happens to production's machine before a replica takes over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Fence {
    /// It is asked to shut down, and turned off after the grace.
    Graceful,
    /// It is turned off at once.
    Force,
    /// Nothing.
    #[default]
    None,
}

impl From<Fencing> for Fence {
    fn from(fencing: Fencing) -> Self {
        match fencing {
            Fencing::Graceful => Self::Graceful,
            Fencing::Force => Self::Force,
            Fencing::None => Self::None,
        }
    }
}

/// What a planned takeover needs to know of the job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedSpec {
    /// The replica, as its job says.
    pub replica: ReplicaSpec,
    /// Folder of production's machine.
    pub home: std::path::PathBuf,
}

impl Act {
    /// The operation whose state is looked at.
    pub fn op(&self) -> Op {
        match self {
            Self::Failover { .. } => Op::Failover,
            Self::Start => Op::Start,
            Self::Planned { .. } => Op::PlannedFailover,
            Self::Failback { .. } => Op::Failback,
            Self::Switchover { .. } => Op::Switchover,
            Self::Commit { .. } => Op::Commit,
            Self::Undo { .. } => Op::Undo,
            Self::Permanent => Op::Permanent,
        }
    }
}

/// Does what is asked.
///
/// # Errors
/// [`Code::State`]; what the operation fails with.
pub fn run(task: &Task<'_>) -> Result<Done> {
    let ask: Ask = task.spec()?;
    let (done, told) = at_desk(task, ask.network, ask.grace, |desk| ask.carry_out(task, desk));
    let report = serde_json::to_value(done?).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
    let why: Vec<String> = told.iter().map(|(code, what)| format!("{}: {what}", code.name())).collect();
    Ok(if why.is_empty() { Done::Success(report) } else { Done::Warning { why: why.join("; "), report } })
}

impl Ask {
    fn carry_out(&self, task: &Task<'_>, desk: &Desk<'_>) -> Result<Report> {
        member::settle(desk, task.context.site()?, &self.replica)?;
        recover_for(desk, &self.replica, self.act.op())?;
        let ended = task.catalogue.operations_of(task.work.id)?;
        let is_done = |op: Op| ended.iter().any(|known| known.op == op.name() && known.state == "done");
        let before = desk.load(&self.replica)?.record.failback;
        let name = self.replica.as_str();
        if !is_done(self.act.op()) {
            self.still_meant(desk)?;
        }
        match &self.act {
            Act::Failover { point, start, fence, force } if !is_done(Op::Failover) => {
                self.fence(task, desk, *fence)?;
                let wanted = PointRef::parse(point)?;
                let manner = failover::Manner { start: *start, force: *force };
                failover::failover_as(desk, name, &wanted, self.reason.clone(), manner)?;
                tell_of_addresses(desk, name)?;
            }
            Act::Start if !is_done(Op::Start) => {
                self.fence(task, desk, Fence::None)?;
                failover::start_again(desk, name)?;
            }
            Act::Planned { spec, start, restart } if !is_done(Op::Failover) => {
                let replica = member::place(desk, task.context.site()?, &spec.replica.host, &spec.replica)?;
                planned(desk, &replica, &spec.home, *restart, *start)?;
                tell_of_addresses(desk, name)?;
            }
            Act::Failback { home, switch, power_on, compare, verify } => {
                if !is_done(Op::Failback) {
                    refuse_backup(task, desk, name)?;
                    let known =
                        if *compare { Changed::default() } else { marks::marks(task.context, &desk.points(name)?)? };
                    let known = Changed { verify: *verify, ..known };
                    failback::failback(desk, name, home.clone(), *switch, known)?;
                }
                match switch {
                    Switch::Auto if !is_done(Op::Switchover) => {
                        self.foretell(task, desk)?;
                        failback::switchover(desk, name, *power_on, self.grace)?;
                    }
                    Switch::At(time) => self.switch_at(task, *time, *power_on)?,
                    Switch::Auto | Switch::Manual => {}
                }
            }
            Act::Switchover { power_on } if !is_done(Op::Switchover) => {
                self.foretell(task, desk)?;
                failback::switchover(desk, name, *power_on, self.grace)?;
            }
            Act::Commit { force } if !is_done(Op::Commit) => failback::commit(desk, name, *force)?,
            Act::Undo { force } if !is_done(Op::Undo) => {
                if desk.load(name)?.record.failback.is_some() {
                    failback::give_back(desk, name, *force)?;
                } else {
                    failover::undo(desk, name, *force)?;
                }
            }
            Act::Permanent if !is_done(Op::Permanent) => failover::permanent(desk, name)?,
            _ => {}
        }
        Report::of(desk, self.act.op(), name, before)
    }

    /// Taking back means the last step: one that somebody else has taken back meanwhile is not followed by the one before.
    fn still_meant(&self, desk: &Desk<'_>) -> Result<()> {
        let now = desk.load(&self.replica)?.record.state;
        match self.seen.filter(|_| matches!(self.act, Act::Undo { .. })) {
            Some(seen) if seen != now => {
                let what = format!("{} was {seen} when this was asked, and is {now} now", self.replica);
                Err(Fail::new(Code::State, what).at(object(&self.replica)))
            }
            _ => Ok(()),
        }
    }

    /// Sees to it that production's machine does not run beside its replica, where that is wanted; tells where it does.
    fn fence(&self, task: &Task<'_>, desk: &Desk<'_>, fence: Fence) -> Result<()> {
        let record = desk.load(&self.replica)?.record;
        let Some(production) = production(task.context, &record.machine)? else { return Ok(()) };
        let Some(running) = desk.running(&production.folder) else { return Ok(()) };
        let grace = match fence {
            Fence::Graceful => self.grace,
            Fence::Force => Duration::ZERO,
            Fence::None => {
                let what = format!("{} runs still on {}, with the same addresses", production.name, production.host);
                (desk.warn)(Code::WarnHost, what);
                return Ok(());
            }
        };
        let ended = desk.host.power_off(&running, grace);
        let error = ended.as_ref().err().map(ToString::to_string);
        let reason = Some(format!("{} on {} before its replica takes over", production.name, production.host));
        task.catalogue.event_of(
            desk.fence,
            &Event {
                object: object(&self.replica),
                op: "fence".into(),
                session: desk.fence.session,
                user: desk.fence.owner.clone(),
                reason,
                error: error.clone(),
                ..Event::default()
            },
        )?;
        if let Some(error) = error {
            let what = format!("{} could not be turned off and may still run: {error}", production.name);
            (desk.warn)(Code::WarnHost, what);
        }
        Ok(())
    }

    /// Tells how long the machine will be away, before it is turned off.
    fn foretell(&self, task: &Task<'_>, desk: &Desk<'_>) -> Result<()> {
        let record = desk.load(&self.replica)?.record;
        let estimate = failback::estimate(&record);
        task.event(&object(&self.replica), "estimate", Some(estimate.to_string()))
    }

    /// Puts the change of sides into the queue for its time. One that is there stays.
    fn switch_at(&self, task: &Task<'_>, time: Timestamp, power_on: bool) -> Result<()> {
        let waiting = task.catalogue.open_work()?.into_iter().any(|work| {
            work.id != task.work.id && work.object == task.work.object && work.run_at == time && work.kind == KIND
        });
        if waiting {
            return Ok(());
        }
        let ask = Self { act: Act::Switchover { power_on }, ..self.clone() };
        schedule(task.context, task.catalogue, &ask, time).map(drop)
    }
}

/// Refuses a way home while a backup reads the machine that is turned off for it.
fn refuse_backup(task: &Task<'_>, desk: &Desk<'_>, name: &str) -> Result<()> {
    let machine = desk.load(name)?.record.machine;
    let reads = |work: &Work| {
        let of_it = work.spec.get("machine").and_then(serde_json::Value::as_str) == Some(machine.as_str());
        of_it && work.kind == "backup" && work.state == WorkState::Running
    };
    match task.catalogue.open_work()?.into_iter().find(reads) {
        None => Ok(()),
        Some(work) => {
            let session = work.session.map(|session| format!("aquifer sessions {session}")).unwrap_or_default();
            Err(Fail::new(Code::Busy, format!("{machine} is being backed up")).at(work.object).help(session))
        }
    }
}

/// Tells that nobody has changed the addresses inside the guest: a plan's programs are given the rules.
fn tell_of_addresses(desk: &Desk<'_>, name: &str) -> Result<()> {
    let rules = desk.load(name)?.record.rules.addresses;
    if !rules.is_empty() {
        let rules: Vec<String> = rules.iter().map(|rule| format!("{} -> {}", rule.from, rule.to)).collect();
        let what = format!("addresses inside {name} are not changed: {}", rules.join(", "));
        (desk.warn)(Code::WarnHost, what);
    }
    Ok(())
}
