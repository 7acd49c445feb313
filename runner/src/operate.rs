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

pub use ask::{
    Batches, Begun, RunOfJob, UnderWay, after_a_run, begin, begin_in, check, interrupted, is_open_operation, leave,
    left, refuse_backup, refused, reports, schedule, stop_runs, tell_left, under_way, way_home_is_left,
};
pub use place::{Production, production, target};
pub use report::{Report, Warned};

use crate::{
    catalogue::Event,
    fail::{Code, Fail, Result},
    failback::{self, Changed},
    failover::{self, planned},
    host::Network,
    readdress::readdress,
    replica::{
        desk::{Desk, object},
        member,
        model::{Home, Switch},
        recover::{Told, recover_as},
        rules::Through,
        run::ReplicaSpec,
        seat::{self, at_desk},
        state::{Op, State},
    },
    site::Fencing,
    source::PointRef,
    tasks::{Done, Task, follow::NOTE},
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
        /// Whether production is started, where a takeover is taken back and production is off.
        #[serde(default)]
        restart: bool,
        /// The last step is a way home that was cut short: as much of it as there is, and never the takeover.
        #[serde(default)]
        way_home: bool,
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

    /// Whether it is part of a way home, which is taken back without the takeover.
    pub fn is_way_home(&self) -> bool {
        matches!(self, Self::Failback { .. } | Self::Switchover { .. })
    }

    /// Adds that it is done also where something speaks against it.
    pub fn add_force(&mut self) {
        if let Self::Failover { force, .. } | Self::Commit { force } | Self::Undo { force, .. } = self {
            *force = true;
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
    let warned = |(code, what): &seat::Told| Warned { code: code.name().to_owned(), what: what.clone() };
    let report = Report { warnings: told.iter().map(warned).collect(), ..done? };
    let report = serde_json::to_value(report).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
    let why: Vec<String> = told.iter().map(|(code, what)| format!("{}: {what}", code.name())).collect();
    Ok(if why.is_empty() { Done::Success(report) } else { Done::Warning { why: why.join("; "), report } })
}

impl Ask {
    fn carry_out(&self, task: &Task<'_>, desk: &Desk<'_>) -> Result<Report> {
        member::settle(desk, task.context.site()?, &self.replica)?;
        recover_as(desk, &self.replica, self.act.op(), self.told())?;
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
            }
            Act::Start if !is_done(Op::Start) => {
                self.fence(task, desk, Fence::None)?;
                failover::start_again(desk, name)?;
            }
            Act::Planned { spec, start, restart } if !is_done(Op::Failover) => {
                let replica = member::place(desk, task.context.site()?, &spec.replica.host, &spec.replica)?;
                planned(desk, &replica, &spec.home, *restart, *start)?;
            }
            Act::Failback { home, switch, power_on, compare, verify } => {
                if !is_done(Op::Failback) {
                    refuse_backup(task.catalogue, &desk.load(name)?.record.machine)?;
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
            Act::Undo { force, restart, way_home } => {
                let record = desk.load(name)?.record;
                let planned =
                    record.failover.is_some_and(|failover| failover.reason.as_deref() == Some(failover::PLANNED));
                match (is_done(Op::Undo), record.failback.is_some()) {
                    (true, _) => {}
                    (false, true) => failback::give_back(desk, name, *force)?,
                    // What had begun of it was taken back where the operation was brought to its end.
                    (false, false) if *way_home => {}
                    (false, false) => failover::undo(desk, name, *force)?,
                }
                self.see_to_production(task, desk, *restart, planned)?;
            }
            Act::Permanent if !is_done(Op::Permanent) => failover::permanent(desk, name)?,
            _ => {}
        }
        // A guest that starts has the addresses it had.
        if matches!(self.act, Act::Failover { .. } | Act::Planned { .. } | Act::Start) {
            address(task, desk, name)?;
        }
        Report::of(desk, self.act.op(), name, before)
    }

    /// What an operation that was cut short is told before it is brought to its end.
    fn told(&self) -> Told {
        match self.act {
            Act::Undo { force, way_home, .. } => Told { force, back: way_home },
            _ => Told::default(),
        }
    }

    /// The state that it leads to from this one.
    pub fn leads_to(&self, state: State) -> State {
        match self.act {
            Act::Undo { way_home: true, .. } => State::Failover,
            _ => state.step(self.act.op()).map_or(state, |arrow| arrow.success),
        }
    }

    /// Taking back means the last step: one that somebody else has taken back meanwhile is not followed by the one before.
    fn still_meant(&self, desk: &Desk<'_>) -> Result<()> {
        let now = desk.load(&self.replica)?.record.state;
        match self.seen.filter(|_| matches!(self.act, Act::Undo { way_home: false, .. })) {
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
        if desk.running(&production.folder).is_none() {
            if let Some(holders) = production.written_by(task.context) {
                let what =
                    format!("{} may run still on {}: {holders} writes to its disks", production.name, production.host);
                (desk.warn)(Code::WarnHost, what);
            }
            return Ok(());
        }
        let grace = match fence {
            Fence::Graceful => self.grace,
            Fence::Force => Duration::ZERO,
            Fence::None => {
                let what = format!("{} runs still on {}, with the same addresses", production.name, production.host);
                (desk.warn)(Code::WarnHost, what);
                return Ok(());
            }
        };
        let ended = failover::power_off(desk, &self.replica, &production.folder, grace);
        task.check()?;
        let error = ended.err().map(|fail| fail.what);
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

    /// After a takeover was taken back: starts production where that is wanted, and tells where nobody serves.
    /// It was us who turned it off where the takeover was `planned`.
    fn see_to_production(&self, task: &Task<'_>, desk: &Desk<'_>, restart: bool, planned: bool) -> Result<()> {
        let record = desk.load(&self.replica)?.record;
        if record.state != State::Ready {
            return Ok(());
        }
        let there = production(task.context, &record.machine)?.filter(|there| failover::is_placed(&there.folder));
        let Some(production) = there else {
            if restart {
                let what =
                    format!("{} has no machine.toml on a host of the site: start it where it is", record.machine);
                (desk.warn)(Code::WarnHost, what);
            }
            return Ok(());
        };
        if desk.running(&production.folder).is_some() {
            return Ok(());
        }
        let Production { name, host, folder } = production;
        if !restart {
            let what = format!("{name} on {host} is off, and so is {}: start it there", self.replica);
            if planned {
                (desk.warn)(Code::WarnHost, what);
                return Ok(());
            }
            return desk.tell(&self.replica, NOTE, what);
        }
        match failover::start(desk, &folder, &name) {
            Ok(_) => task.event(&object(&self.replica), "start", Some(format!("{name} on {host}"))),
            Err(fail) => {
                (desk.warn)(Code::WarnHost, format!("{name} on {host} could not be started: {}", fail.what));
                Ok(())
            }
        }
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

/// Changes the addresses inside the guest by the rules that leave it to its agent, and tells of those that nobody has
/// changed: a plan's programs are given all of them. The machine serves, whatever becomes of that.
fn address(task: &Task<'_>, desk: &Desk<'_>, name: &str) -> Result<()> {
    let record = desk.load(name)?.record;
    let (ours, others): (Vec<_>, Vec<_>) =
        record.rules.addresses.into_iter().partition(|rule| rule.through == Through::Agent);
    if !others.is_empty() {
        let rules: Vec<String> = others.iter().map(|rule| format!("{} -> {}", rule.from, rule.to)).collect();
        let what = format!("addresses inside {name} are not changed: {}", rules.join(", "));
        (desk.warn)(Code::WarnHost, what);
    }
    let running = record.failover.and_then(|failover| failover.running).filter(|_| !ours.is_empty());
    let Some(running) = running else { return Ok(()) };
    match readdress(&running.orders.with_file_name("agent.sock"), &ours, &|| task.check()) {
        Ok(done) if done.is_empty() => Ok(()),
        Ok(done) => task.event(&object(name), "readdress", Some(done.join(", "))),
        Err(fail) => {
            task.check()?;
            let at = fail.at.map(|at| format!(" ({at})")).unwrap_or_default();
            (desk.warn)(Code::WarnHost, format!("addresses inside {name} are not changed: {}{at}", fail.what));
            Ok(())
        }
    }
}
