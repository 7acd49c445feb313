//! What the verbs on replicas have in common: look, say what is lost, ask, carry out, tell.
//!
//! Invariants
//! - What the state forbids is refused before anything is asked, said or done; with `-n` as well.
//! - An operation whose controller died is brought to its end first; the same command typed again answers with its end.
//!   With `-n` that is said, and nothing of what follows it: nobody can tell before.

mod begun;

use std::{path::Path, time::Duration};

pub(super) use begun::{Begun, Options};
use serde_json::json;

use crate::{
    catalogue::{Catalogue, SessionId, Wish, Work, WorkState},
    cli::{Confirm, DryRun},
    confirm::confirm,
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    failover::is_placed,
    host::{Host, Network, qemu::Qemu},
    operate::{self, Act, Ask, Batches, Report, RunOfJob, Warned, production},
    plan::{PlanSpec, find, object, ready_entries},
    replica::{
        desk,
        model::{Carried, PointRecord, ReplicaRecord},
        seat,
        state::{Op, State},
    },
    strict::nearest,
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
    #[arg(long, value_name = "TIME", default_value = begun::GRACE, value_parser = duration)]
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
    /// These, and where nothing is said what an earlier command was told.
    pub(super) fn or_told(&self, told: &PlanSpec) -> Self {
        let mut these = self.clone();
        if units::parse_duration(begun::GRACE).is_ok_and(|unsaid| unsaid == these.grace) {
            these.grace = told.grace;
        }
        if these.starts.network == Plug::default() && told.network == Network::None {
            these.starts.network = Plug::None;
        }
        these.starts.why.reason = these.starts.why.reason.or_else(|| told.reason.clone());
        these
    }

    pub(super) fn options(&self) -> Options {
        Options::default().grace(self.grace).network(self.starts.network.into())
    }

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
    /// What else whoever decides has to know, each in a sentence.
    pub(super) notes: Vec<String>,
}

impl Wanted {
    /// Something that loses nothing.
    pub(super) fn of(ask: Ask) -> Self {
        Self { ask, loss: None, notes: Vec::new() }
    }
}

/// How a verb is carried out.
pub(super) struct Manner<'a> {
    pub(super) dry: &'a DryRun,
    pub(super) confirm: Option<&'a Confirm>,
    /// What becomes of a run of a job on the replica.
    pub(super) run: RunOfJob,
    /// The operations that a resumed session may have ended with instead.
    pub(super) ops: &'a [Op],
    /// What was typed: an operation that was cut short goes on with that, or not by this command.
    pub(super) options: Options,
}

/// Production's machine, where its host is one of the site file's and it is not running there.
pub(super) fn production_off(context: &Context, record: &ReplicaRecord) -> Result<Option<String>> {
    Ok(production_of(context, record)?.filter(|(_, runs)| !runs).map(|(home, _)| home))
}

/// Production's machine with its host, and whether it runs.
pub(super) fn production_of(context: &Context, record: &ReplicaRecord) -> Result<Option<(String, bool)>> {
    let Some(home) = production(context, &record.machine)?.filter(|home| is_placed(&home.folder)) else {
        return Ok(None);
    };
    let runs = runs(context, &home.folder)?;
    Ok(Some((format!("{} on {}", home.name, home.host), runs)))
}

/// Whether the machine in a folder runs there.
pub(super) fn runs(context: &Context, folder: &Path) -> Result<bool> {
    Ok(Qemu.find(&seat::rooms(context)?.places(folder)).is_some())
}

/// The catalogue, for a look; there are no replicas without one.
pub(super) fn look(context: &Context, name: &str) -> Result<Catalogue> {
    let missing = || Fail::new(Code::NotFound, format!("there is no replica `{name}`")).help("aquifer replicas");
    context.catalogue_if_there()?.ok_or_else(missing)
}

/// There is no replica of that name: those of the machine of that name, or those that are named alike.
pub(super) fn nobody(catalogue: &Catalogue, name: &str) -> Result<Fail> {
    let fail = Fail::new(Code::NotFound, format!("there is no replica `{name}`")).help("aquifer replicas");
    let mut all = catalogue.replicas::<ReplicaRecord>()?;
    all.retain(|row| !row.record.state.is_final());
    let of_machine: Vec<&str> =
        all.iter().filter(|row| row.record.machine == name).map(|row| row.name.as_str()).collect();
    if !of_machine.is_empty() {
        let those = of_machine.join(", ");
        return Ok(fail.at(desk::object(name)).cause(format!("{name} is a machine; its replica is {those}")));
    }
    let names: Vec<&str> = all.iter().map(|row| row.name.as_str()).collect();
    Ok(match nearest(name, &names) {
        Some(near) => fail.at(desk::object(name)).cause(format!("did you mean `{near}`?")),
        None if names.is_empty() => fail,
        None => fail.at(desk::object(name)).cause(format!("there is {}", names.join(", "))),
    })
}

/// Refuses what the state of a replica forbids.
pub(super) fn allowed(record: &ReplicaRecord, op: Op) -> Result<()> {
    record.state.step(op).map(drop).map_err(|refusal| operate::refused(record, refusal))
}

/// The record of a replica.
pub(super) fn record(catalogue: &Catalogue, name: &str) -> Result<ReplicaRecord> {
    match catalogue.replica::<ReplicaRecord>(name)? {
        Some(row) => row.record.check(),
        None => Err(nobody(catalogue, name)?),
    }
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
    let mut unsettled = Vec::new();
    if manner.dry.dry_run {
        unsettled = foresee_first(context, &catalogue, names, manner)?;
    } else {
        catalogue = context.catalogue_with_lease(LEASE)?;
        if settle_first(context, &catalogue, names, manner)? {
            return Ok(());
        }
    }
    let mut asks = Vec::new();
    let mut losses = Vec::new();
    for name in names.iter().filter(|name| !unsettled.contains(name)) {
        let mut wanted = want(&catalogue, &record(&catalogue, name)?)?;
        let record = operate::check(&catalogue, &wanted.ask)?;
        wanted.ask.seen = Some(record.state);
        let to = wanted.ask.leads_to(record.state);
        let way_home = matches!(wanted.ask.act, Act::Undo { way_home: true, .. });
        let cut = if way_home { ", on a way home that was cut short" } else { "" };
        let line = format!("{name}: {}{cut} -> {to}", record.state);
        if manner.dry.dry_run {
            let points = catalogue.points_of::<PointRecord>(name)?.into_iter().map(|row| row.record);
            super::replicas::tell_of_changes(context, &record, &points.collect::<Vec<_>>());
            let fields = json!({ "replica": name, "operation": wanted.ask.act.op(), "from": record.state, "to": to,
                                 "loss": wanted.loss, "notes": wanted.notes, "asks": wanted.ask });
            context.out.record("plan", &fields);
            context.out.line(format_args!("would lead {line}"));
            wanted.notes.iter().for_each(|note| context.out.line(format_args!("  {note}")));
            if let Some(loss) = &wanted.loss {
                context.out.line(loss);
            }
        } else {
            context.out.say(line);
            wanted.notes.iter().for_each(|note| context.out.say(format_args!("  {note}")));
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
    leave_ways_home(context, &catalogue, &asks)?;
    let begun = operate::begin_in(context, &catalogue, &asks, batches)?;
    super::run::follow(context, &catalogue, begun.session, stop)?;
    if catalogue.session(begun.session)?.ended.is_none() {
        stop.check().map_err(|fail| fail.help_again(""))?;
    }
    tell(context, &catalogue, begun.session)
}

/// Brings what was cut short to its end, as it was begun. Answers whether that was what is wanted now, and is told.
fn settle_first(context: &Context, catalogue: &Catalogue, names: &[String], manner: &Manner<'_>) -> Result<bool> {
    let refs: Vec<&str> = names.iter().map(String::as_str).collect();
    for session in operate::interrupted(context, catalogue, &refs, manner.run)? {
        if is_taken_back(catalogue, session, names, manner)? {
            continue;
        }
        if catalogue.session(session)?.wish == Wish::Run {
            for (work, ask) in asked_the_same(catalogue, session, names, manner)? {
                operate::tell_left(context, catalogue, &work, &ask)?;
            }
            context.out.warn(Code::WarnInterrupted, format!("session {session} was cut short and goes on"), None);
        }
        super::run::follow(context, catalogue, session, context.stop()?)?;
        if told_already(context, catalogue, session, names, manner.ops)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Lets nobody go on with the ways home that are taken back.
fn leave_ways_home(context: &Context, catalogue: &Catalogue, asks: &[Ask]) -> Result<()> {
    for ask in asks.iter().filter(|ask| matches!(ask.act, Act::Undo { way_home: true, .. })) {
        if let Some((work, _)) = operate::left(catalogue, &ask.replica)? {
            operate::leave(context, catalogue, &work)?;
        }
    }
    Ok(())
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

/// Says what comes to its end before anything else is done to these replicas; those of them that it is about.
fn foresee_first<'n>(
    context: &Context,
    catalogue: &Catalogue,
    names: &'n [String],
    manner: &Manner<'_>,
) -> Result<Vec<&'n String>> {
    let refs: Vec<&str> = names.iter().map(String::as_str).collect();
    let under_way = operate::under_way(catalogue, &refs, manner.run)?;
    let mut unsettled = Vec::new();
    for session in under_way.cut_short {
        if is_taken_back(catalogue, session, names, manner)? {
            continue;
        }
        let mut begun = Vec::new();
        for work in catalogue.work_of(session)?.into_iter().filter(|work| work.kind == operate::KIND) {
            let Ok(ask) = serde_json::from_value::<Ask>(work.spec) else { continue };
            unsettled.extend(names.iter().filter(|name| **name == ask.replica));
            begun.push(Begun::operation(&ask));
        }
        if catalogue.session(session)?.wish == Wish::Run {
            asked_the_same(catalogue, session, names, manner)?;
        }
        would_go_on(context, session, &begun);
    }
    for (session, work) in under_way.to_stop {
        let of_it = catalogue.work_of(session)?.into_iter().find(|other| other.id == work).map(|work| work.object);
        unsettled.extend(names.iter().filter(|name| of_it.as_ref() == Some(&desk::object(name))));
        context.out.line(format_args!("would ask session {session} to stop first"));
        context.out.record("stops", &json!({ "session": session.0 }));
    }
    Ok(unsettled)
}

/// Says that a session which was cut short would be gone on with.
pub(super) fn would_go_on(context: &Context, session: SessionId, begun: &[Begun]) {
    let all: Vec<String> = begun.iter().map(Begun::to_string).collect();
    context.out.line(format_args!("would go on with session {session}, which was cut short: {}", all.join("; ")));
    context.out.record("goes_on", &json!({ "session": session.0, "with": all }));
}

/// Whether a session that was cut short is a way home which this command takes back: nobody goes on with that.
fn is_taken_back(catalogue: &Catalogue, session: SessionId, names: &[String], manner: &Manner<'_>) -> Result<bool> {
    if !manner.ops.contains(&Op::Undo) {
        return Ok(false);
    }
    for name in names {
        let left = operate::left(catalogue, name)?.filter(|(work, _)| work.session == Some(session));
        if left.is_some_and(|(_, ask)| ask.act.is_way_home()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Refuses to go on with operations of these replicas that this command would begin in another way. That something is
/// to be done in spite of what speaks against it may be said later: those it is said of now, with that.
fn asked_the_same(
    catalogue: &Catalogue,
    session: SessionId,
    names: &[String],
    manner: &Manner<'_>,
) -> Result<Vec<(Work, Ask)>> {
    let is_open = |work: &Work| matches!(work.state, WorkState::Ready | WorkState::Running);
    let mut forced = Vec::new();
    for work in catalogue.work_of(session)?.into_iter().filter(|work| work.kind == operate::KIND && is_open(work)) {
        let Ok(mut ask) = serde_json::from_value::<Ask>(work.spec.clone()) else { continue };
        if names.contains(&ask.replica) && manner.ops.contains(&ask.act.op()) {
            let begun = Begun::operation(&ask);
            begun.same(session, &manner.options)?;
            if begun.is_forced_by(&manner.options) {
                ask.act.add_force();
                forced.push((work, ask));
            }
        }
    }
    Ok(forced)
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
        reports.get(name).and_then(|done| done.as_ref().ok()).is_some_and(|report| ops.contains(&report.op))
    };
    if !names.iter().all(same) {
        return Ok(false);
    }
    tell(context, catalogue, session).map(|()| true)
}

/// Tells what came of a session.
fn tell(context: &Context, catalogue: &Catalogue, session: SessionId) -> Result<()> {
    let (mut failures, mut ended) = (Vec::new(), Vec::new());
    let reports = operate::reports(catalogue, session)?;
    let count = reports.len();
    for (name, outcome) in reports {
        match outcome {
            Ok(report) => {
                for Warned { code, what } in &report.warnings {
                    let code = Code::find(code).unwrap_or(Code::WarnHost);
                    context.out.warn(code, format!("{name}: {what}"), None);
                }
                context.out.record("replica", &report);
                context.out.line(line(&report));
                ended.push(report);
            }
            Err(fail) => failures.push(fail),
        }
    }
    if let Some(next) = next(&ended) {
        context.out.next(next);
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
        let word = if report.state.is_unsettled() { ", at" } else { ", newest" };
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

/// What can be done now: with all that ended in the state of the first.
fn next(ended: &[Report]) -> Option<String> {
    let state = ended.first()?.state;
    let names: Vec<_> = ended.iter().filter(|report| report.state == state).map(|r| quoted(&r.replica)).collect();
    let all = names.join(" ");
    Some(match state {
        State::Failover => format!("aquifer failback {all}    # or undo, or permanent"),
        State::ReadyToSwitch => format!("aquifer failback {all} --switch now    # or undo"),
        State::Failback => format!("aquifer commit {all}    # or undo"),
        _ => match names.as_slice() {
            [one] => format!("aquifer replicas {one}"),
            _ => "aquifer replicas".to_owned(),
        },
    })
}
