//! What the verbs on replicas have in common: look, say what is lost, ask, carry out, tell.
//!
//! Invariants
//! - What the state forbids is refused before anything is asked, said or done; with `-n` as well.
//! - An operation whose controller died is brought to its end first; the same command typed again answers with its end.

use std::time::Duration;

use serde_json::json;

use crate::{
    catalogue::{Catalogue, SessionId},
    cli::{Confirm, DryRun},
    confirm::confirm,
    context::Context,
    fail::{Code, Fail, Result},
    host::Network,
    operate::{self, Act, Ask, Batches, Report},
    plan::{find, object, ready_entries},
    replica::{
        model::{Carried, ReplicaRecord},
        state::{Op, State},
    },
    units,
};

/// How long a controller of an operation may be silent before another one goes on with it.
pub(super) const LEASE: Duration = Duration::from_secs(10);

/// A plan is taken back so many machines at a time.
const UNDO_BATCHES: Batches = Batches { size: 5, gap: Duration::from_secs(10) };

/// Options of verbs that turn machines off in order.
#[derive(Clone, Debug, clap::Args)]
pub struct Machines {
    /// How long a guest may take to turn itself off before it is turned off
    #[arg(long, value_name = "TIME", default_value = "15m", value_parser = duration)]
    pub grace: Duration,
    /// How machines are started.
    #[command(flatten)]
    pub starts: Starts,
}

/// Options of verbs that start machines.
#[derive(Clone, Debug, clap::Args)]
pub struct Starts {
    /// Where network cards of a machine that is started are plugged in
    #[arg(long, value_name = "WHERE", value_enum, default_value_t = Plug::User)]
    pub network: Plug,
    /// Why.
    #[command(flatten)]
    pub why: Why,
}

/// Options of every verb on replicas.
#[derive(Clone, Debug, clap::Args)]
pub struct Why {
    /// Why, for the record
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// Where network cards are plugged in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Plug {
    /// Behind an address translation of its own
    #[default]
    User,
    /// Nowhere: the link is down
    None,
}

impl From<Plug> for Network {
    fn from(plug: Plug) -> Self {
        match plug {
            Plug::User => Self::User,
            Plug::None => Self::None,
        }
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    units::parse_duration(text).map_err(|fail| fail.what)
}

impl Machines {
    pub(super) fn ask(&self, replica: &str, act: Act) -> Ask {
        Ask { grace: self.grace, ..self.starts.ask(replica, act) }
    }
}

impl Starts {
    pub(super) fn ask(&self, replica: &str, act: Act) -> Ask {
        Ask { network: self.network.into(), ..self.why.ask(replica, act) }
    }
}

impl Why {
    pub(super) fn ask(&self, replica: &str, act: Act) -> Ask {
        Ask {
            replica: replica.to_owned(),
            reason: self.reason.clone(),
            grace: Duration::ZERO,
            network: Network::default(),
            seen: None,
            act,
        }
    }
}

/// A verb's part: what it asks of a replica, and what that loses.
pub(super) struct Wanted {
    pub(super) ask: Ask,
    /// What is lost, for whoever has to confirm it.
    pub(super) loss: Option<String>,
}

/// How a verb is carried out.
pub(super) struct Manner<'a> {
    pub(super) dry: &'a DryRun,
    pub(super) confirm: Option<&'a Confirm>,
    /// Whether a run of a job on the replica is stopped.
    pub(super) cancel_job: bool,
    /// The operations that a resumed session may have ended with instead.
    pub(super) ops: &'a [Op],
}

/// The catalogue, for a look; there are no replicas without one.
pub(super) fn look(context: &Context, name: &str) -> Result<Catalogue> {
    let missing = || Fail::new(Code::NotFound, format!("there is no replica `{name}`")).help("aquifer replicas");
    context.catalogue_if_there()?.ok_or_else(missing)
}

/// The record of a replica.
pub(super) fn record(catalogue: &Catalogue, name: &str) -> Result<ReplicaRecord> {
    let row = catalogue.replica::<ReplicaRecord>(name)?;
    let missing = || Fail::new(Code::NotFound, format!("there is no replica `{name}`")).help("aquifer replicas");
    row.ok_or_else(missing)?.record.check()
}

/// Carries out what a verb wants of these replicas.
pub(super) fn carry_out(
    context: &Context,
    names: &[String],
    manner: &Manner<'_>,
    want: impl Fn(&Catalogue, &ReplicaRecord) -> Result<Wanted>,
) -> Result<()> {
    let stop = context.stop()?;
    let mut catalogue = look(context, names.first().map(String::as_str).unwrap_or_default())?;
    let (names, batches) = expand(context, &catalogue, names, manner)?;
    let names = names.as_slice();
    names.iter().try_for_each(|name| record(&catalogue, name).map(drop))?;
    if !manner.dry.dry_run {
        catalogue = context.catalogue_with_lease(LEASE)?;
        let refs: Vec<&str> = names.iter().map(String::as_str).collect();
        let cut_short = operate::interrupted(context, &catalogue, &refs, manner.cancel_job)?;
        for session in &cut_short {
            context.out.warn(Code::WarnInterrupted, format!("session {session} was cut short and goes on"), None);
            super::run::follow(context, &catalogue, *session, stop)?;
            if told_already(context, &catalogue, *session, names, manner.ops)? {
                return Ok(());
            }
        }
    }
    let mut asks = Vec::new();
    let mut losses = Vec::new();
    for name in names {
        let mut wanted = want(&catalogue, &record(&catalogue, name)?)?;
        let record = operate::check(&catalogue, &wanted.ask)?;
        wanted.ask.seen = Some(record.state);
        let to = record.state.step(wanted.ask.act.op()).map(|arrow| arrow.success).unwrap_or(record.state);
        let line = format!("{name}: {} -> {to}", record.state);
        if manner.dry.dry_run {
            let fields = json!({ "replica": name, "operation": wanted.ask.act.op(), "from": record.state, "to": to,
                                 "loss": wanted.loss, "asks": wanted.ask });
            context.out.record("plan", &fields);
            context.out.line(format_args!("would lead {line}"));
            if let Some(loss) = &wanted.loss {
                context.out.line(loss);
            }
        } else {
            context.out.say(line);
        }
        losses.extend(wanted.loss);
        asks.push(wanted.ask);
    }
    if manner.dry.dry_run {
        return Ok(());
    }
    if let Some(asked) = manner.confirm.filter(|_| !losses.is_empty()) {
        confirm(context, asked, &losses.join("\n"))?;
    }
    let begun = operate::begin_in(context, &catalogue, &asks, batches)?;
    super::run::follow(context, &catalogue, begun.session, stop)?;
    if catalogue.session(begun.session)?.ended.is_none() {
        stop.check().map_err(|fail| fail.help_again(""))?;
    }
    tell(context, &catalogue, begun.session)
}

/// The replicas that are meant: those of a plan in whose state the operation is possible, and how many at a time.
fn expand(
    context: &Context,
    catalogue: &Catalogue,
    names: &[String],
    manner: &Manner<'_>,
) -> Result<(Vec<String>, Option<Batches>)> {
    let [name] = names else { return Ok((names.to_vec(), None)) };
    let Some(name) = name.strip_prefix("plan/") else { return Ok((names.to_vec(), None)) };
    let undo = manner.ops.contains(&Op::Undo);
    // Taking a plan back is taking its takeovers back, not the way home of machines that went it.
    let fits = |state: &State| match state {
        State::ReadyToSwitch | State::Failback if undo => false,
        state => manner.ops.iter().any(|op| state.step(*op).is_ok()),
    };
    let states: Vec<State> = State::ALL.into_iter().filter(fits).collect();
    let (mut those, others) = ready_entries(catalogue, find(context.site()?, name)?, &states)?;
    others.iter().for_each(|other| context.out.say(format_args!("left out: {other}")));
    if those.is_empty() {
        let what = format!("no machine of plan {name} is in a state for that");
        return Err(Fail::new(Code::State, what).at(object(name)).cause(others.join("; ")));
    }
    if undo {
        those.reverse();
    }
    Ok((those, undo.then_some(UNDO_BATCHES)))
}

/// Whether a session that was cut short has ended with what is wanted now; then that is told.
fn told_already(
    context: &Context,
    catalogue: &Catalogue,
    session: SessionId,
    names: &[String],
    ops: &[Op],
) -> Result<bool> {
    let reports = operate::reports(catalogue, session)?;
    let same = |name: &String| {
        reports.get(name).and_then(|done| done.as_ref().ok()).is_some_and(|(report, _)| ops.contains(&report.op))
    };
    if !names.iter().all(same) {
        return Ok(false);
    }
    tell(context, catalogue, session).map(|()| true)
}

/// Tells what came of a session.
fn tell(context: &Context, catalogue: &Catalogue, session: SessionId) -> Result<()> {
    let mut failures = Vec::new();
    let reports = operate::reports(catalogue, session)?;
    let count = reports.len();
    for (name, outcome) in reports {
        match outcome {
            Ok((report, why)) => {
                if let Some(why) = why {
                    context.out.warn(Code::WarnHost, format!("{name}: {why}"), None);
                }
                context.out.record("replica", &report);
                context.out.line(line(&report));
                context.out.next(next(&report));
            }
            Err(fail) => failures.push(fail),
        }
    }
    context.out.closing("session", session.0);
    match (failures.len(), failures.into_iter().next()) {
        (_, None) => Ok(()),
        (1, Some(fail)) if count == 1 => Err(fail),
        (many, Some(fail)) => {
            Err(Fail { what: format!("{many} of {count} replicas failed; the first: {}", fail.what), ..fail })
        }
    }
}

fn moved(pass: &str, carried: &Carried) -> String {
    format!("{pass}: {} sent, {} read", units::bytes(carried.bytes_written), units::bytes(carried.bytes_read))
}

fn line(report: &Report) -> String {
    let mut text = format!("{} is {}", report.replica, report.state);
    if let (Some(point), Some(taken)) = (report.point, report.taken) {
        let word = if report.state == State::Failover { ", at" } else { ", newest" };
        text.push_str(&format!("{word} the point {point} of {}", crate::tasks::follow::at(taken)));
    }
    if let Some(first) = &report.first {
        text.push_str(&format!("; {}", moved("first pass", first)));
    }
    if let Some(second) = &report.second {
        text.push_str(&format!("; {}", moved("second pass", second)));
    }
    if let Some(ms) = report.downtime_ms {
        text.push_str(&format!("; away for {}.{:03} s", ms / 1000, ms % 1000));
    }
    if let Some(console) = &report.console {
        text.push_str(&format!("; console {}", console.display()));
    }
    text
}

fn next(report: &Report) -> String {
    let name = crate::context::quoted(&report.replica);
    match report.state {
        State::Failover => format!("aquifer failback {name}    # or undo, or permanent"),
        State::ReadyToSwitch => format!("aquifer failback {name} --switch now    # or undo"),
        State::Failback => format!("aquifer commit {name}    # or undo"),
        _ => format!("aquifer replicas {name}"),
    }
}
