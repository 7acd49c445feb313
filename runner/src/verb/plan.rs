//! `plan`: failover plans of the site file: what they are, whether they could run, running, halting, going on.

use std::os::unix::fs::PermissionsExt;

use clap::ValueEnum;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;

use super::ops::{Begun, LEASE, Machines, Options, would_go_on};
use crate::{
    catalogue::{Catalogue, NewSession, NewWork, Session, SessionId, SessionResult, Wish},
    cli::DryRun,
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    host::{Host, qemu::Qemu},
    operate::Fence,
    plan::{self, EntryRecord, PlanSpec, Run, candidate, find, last_run, object, state},
    replica::state::State,
    site::{Gate, Plan},
    source::PointRef,
    tasks::follow::at,
};

/// The restore point that is meant where none is said.
const LATEST: &str = "latest";

/// Before backups and copies: a site waits for it.
const PRIORITY: i32 = 800;

/// Options of `plan`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do
    #[arg(value_enum, value_name = "ACTION")]
    pub action: Action,
    /// The plan; all with `list`
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// With `run`: `latest`, or the newest points not after this RFC 3339 time
    #[arg(long, value_name = "POINT", default_value = LATEST)]
    pub to: String,
    /// How machines are treated.
    #[command(flatten)]
    pub machines: Machines,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

/// What to do with a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Action {
    /// Name the plans of the site file
    List,
    /// Show a plan, its replicas and its last run
    Show,
    /// Look whether it could run now
    Check,
    /// Let its machines take over
    Run,
    /// Let what is under way finish, and begin no other machine
    Halt,
    /// Go on with what is left
    Resume,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let site = context.site()?;
    if args.action == Action::List {
        for (name, plan) in &site.plans {
            show_one(context, name, plan)?;
        }
        context.out.closing("plans", site.plans.len());
        return Ok(());
    }
    let name = args
        .name
        .as_deref()
        .ok_or_else(|| Fail::new(Code::Usage, "which plan is meant is not said").help("aquifer plan list"))?;
    let plan = find(site, name)?;
    match args.action {
        Action::List => Ok(()),
        Action::Show => show(context, name, plan),
        Action::Check => check(context, name, plan, &How::of(args)),
        Action::Run => begin(context, name, &How::of(args), &args.dry, None),
        Action::Halt => halt(context, name, &args.dry),
        Action::Resume => resume(context, name, args),
    }
}

#[derive(Serialize)]
struct Shown<'a> {
    name: &'a str,
    machines: Vec<&'a str>,
    state: String,
    run: Option<Run>,
}

fn show_one(context: &Context, name: &str, plan: &Plan) -> Result<Option<Run>> {
    let run = match context.catalogue_if_there()? {
        Some(catalogue) => last_run(&catalogue, name)?,
        None => None,
    };
    let state = run.as_ref().map_or_else(|| "ready".to_owned(), |run| run.state.clone());
    let machines: Vec<&str> = plan.entries.iter().map(|entry| entry.machine.as_str()).collect();
    let since = run.as_ref().map(|run| format!(", last run at {}", at(run.begun))).unwrap_or_default();
    context.out.line(format_args!("{name:<16} {state:<12} {}{since}", machines.join(", ")));
    context.out.record("plan", &Shown { name, machines, state, run: run.clone() });
    Ok(run)
}

fn show(context: &Context, name: &str, plan: &Plan) -> Result<()> {
    let run = show_one(context, name, plan)?;
    let catalogue = context.catalogue_if_there()?;
    for entry in &plan.entries {
        let replica = catalogue.as_ref().map(|c| candidate(c, &entry.machine, &PointRef::Latest(0)));
        let known = run.as_ref().and_then(|run| run.record.entries.iter().find(|e| e.machine == entry.machine));
        let (replica, newest) = match &replica {
            Some(Ok((record, point))) => (
                format!("{} is {}", record.name, record.state),
                point.as_ref().map_or_else(|| "no points".to_owned(), |p| format!("newest {}", at(p.taken))),
            ),
            Some(Err(fail)) => (fail.what.to_string(), String::new()),
            None => ("no replica".to_owned(), String::new()),
        };
        let comma = if newest.is_empty() { "" } else { ", " };
        context.out.line(format_args!("  {:<16} {replica}{comma}{newest}{}", entry.machine, of_run(known)));
        context
            .out
            .record("entry", &json!({ "machine": entry.machine, "replica": replica, "newest": newest, "run": known }));
    }
    Ok(())
}

fn of_run(known: Option<&EntryRecord>) -> String {
    let Some(known) = known else { return String::new() };
    let why = known.why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    let rto = known.rto_ms.map(|ms| format!(" after {}.{:01} s", ms / 1000, ms % 1000 / 100)).unwrap_or_default();
    format!("; in the last run {}{rto}{why}", format!("{:?}", known.step).to_lowercase())
}

/// Looks whether a plan could run: what is wrong is a warning each.
fn check(context: &Context, name: &str, plan: &Plan, how: &How) -> Result<()> {
    let wanted = &PointRef::parse(&how.to)?;
    let mut wrong: Vec<String> = Vec::new();
    let programs = plan.pre.iter().chain(&plan.post);
    let gates = plan.entries.iter().flat_map(|entry| &entry.gates).filter_map(|gate| match gate {
        Gate::Program(path) => Some(path),
        _ => None,
    });
    for path in programs.chain(gates) {
        let runs = std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
        if !runs {
            wrong.push(format!("{} is no program", path.display()));
        }
    }
    let catalogue = context.catalogue_if_there()?;
    for entry in &plan.entries {
        let found = catalogue.as_ref().map(|c| candidate(c, &entry.machine, wanted));
        match found {
            None => wrong.push(format!("there is no replica of {}", entry.machine)),
            Some(Err(fail)) => wrong.push(fail.what),
            Some(Ok((record, _))) if record.state == State::Processing && how.cancel_job => {
                context.out.line(format_args!("{}: the run that writes to {} is stopped", entry.machine, record.name));
            }
            Some(Ok((record, _))) if record.state != State::Ready => {
                wrong.push(format!("{} is {} and would be left out", record.name, record.state));
            }
            Some(Ok((record, None))) => wrong.push(format!("{} has no such restore point", record.name)),
            Some(Ok((record, Some(point)))) => {
                let shape = crate::host::placed::Placed::read(&record.folder).and_then(|placed| {
                    let shape = placed.shape(&record.name, &crate::recover::shape::Wishes::default(), &[])?;
                    Ok(Qemu.check(&shape)?)
                });
                if let Err(fail) = shape {
                    wrong.push(format!("{} could not be started: {}", record.name, fail.what));
                }
                let age = Timestamp::now().duration_since(point.taken).unsigned_abs();
                let rpo = context.site()?.machines.get(&entry.machine).and_then(|machine| machine.rpo);
                if rpo.is_some_and(|rpo| age > rpo) {
                    wrong.push(format!("the newest point of {} is of {}", record.name, at(point.taken)));
                }
                context.out.line(format_args!("{}: {} at {}", entry.machine, record.name, at(point.taken)));
            }
        }
    }
    for what in &wrong {
        context.out.warn(Code::WarnCheck, what.clone(), None);
    }
    context.out.closing("ready", wrong.is_empty());
    context.out.next(how.begins(name));
    Ok(())
}

/// How the machines of a plan take over.
#[derive(Clone, Debug)]
pub(super) struct How {
    /// At which point.
    pub(super) to: String,
    /// How they are treated.
    pub(super) machines: Machines,
    /// What happens to production's first, where it is not what the site file says.
    pub(super) fence: Option<Fence>,
    /// Whether they stay off.
    pub(super) no_start: bool,
    /// Whether runs of jobs that write to their replicas are stopped.
    pub(super) cancel_job: bool,
}

impl How {
    fn of(args: &Args) -> Self {
        let (to, machines) = (args.to.clone(), args.machines.clone());
        Self { to, machines, fence: None, no_start: false, cancel_job: false }
    }

    /// The command that begins it.
    fn begins(&self, name: &str) -> String {
        let said = Options::default().point(&self.to).fence(self.fence).flag("--no-start", self.no_start);
        let said = said.flag("--cancel-job", self.cancel_job);
        let is_plain = self.fence.is_none() && !self.no_start && !self.cancel_job;
        let verb = if is_plain { "plan run" } else { "failover --plan" };
        format!("aquifer {verb} {} {said}", quoted(name)).trim_end().to_owned()
    }

    fn options(&self) -> Options {
        self.machines.options().point(&self.to).fence(self.fence).flag("--no-start", self.no_start)
    }
}

/// Begins a run of a plan, or goes on with one, and follows it.
pub(super) fn begin(context: &Context, name: &str, how: &How, dry: &DryRun, resumes: Option<i64>) -> Result<()> {
    let stop = context.stop()?;
    let plan = find(context.site()?, name)?;
    PointRef::parse(&how.to)?;
    let (typed, machines) = (how.options(), &how.machines);
    if dry.dry_run {
        let catalogue = context.catalogue_if_there()?;
        return match catalogue.as_ref().map(|catalogue| open(catalogue, name)).transpose()?.flatten() {
            Some(open) => open.asked(&typed, Begun::same).and_then(|()| open.foresee(context, name, plan)),
            None => check(context, name, plan, how),
        };
    }
    let catalogue = context.catalogue_with_lease(LEASE)?;
    if let Some(open) = open(&catalogue, name)? {
        open.asked(&typed, Begun::same)?;
        if open.is_cut_short() {
            let what = format!("session {} was cut short and goes on", open.session.id);
            context.out.warn(Code::WarnInterrupted, what, None);
        }
        return follow(context, &catalogue, name, open.session.id, stop);
    }
    let spec = PlanSpec {
        plan: name.to_owned(),
        to: how.to.clone(),
        grace: machines.grace,
        network: machines.starts.network.into(),
        reason: machines.starts.why.reason.clone(),
        fence: how.fence,
        no_start: how.no_start,
        cancel_job: how.cancel_job,
        resumes,
    };
    let session = NewSession {
        kind: plan::KIND.to_owned(),
        job: None,
        initiator: context.user(),
        reason: machines.starts.why.reason.clone(),
        retry_of: None,
    };
    let spec = serde_json::to_value(&spec).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
    let work = NewWork::new(plan::KIND, object(name), PRIORITY, spec);
    let session = catalogue.begin_work(&session, &[work])?;
    follow(context, &catalogue, name, session, stop)
}

/// A run of a plan that has not ended.
struct Open {
    session: Session,
    /// Whether somebody alive has it, or it waits for somebody's word.
    is_in_hands: bool,
    begun: Begun,
}

/// The run of a plan that has not ended.
fn open(catalogue: &Catalogue, name: &str) -> Result<Option<Open>> {
    let Some(work) = catalogue.open_work()?.into_iter().find(|work| work.object == object(name)) else {
        return Ok(None);
    };
    let Some(session) = work.session else { return Ok(None) };
    let spec: PlanSpec = serde_json::from_value(work.spec).map_err(|e| {
        Fail::new(Code::Corrupt, "what a run of the plan was told cannot be read").at(object(name)).cause(e)
    })?;
    let is_in_hands = super::run::is_in_hands(catalogue, session)?;
    Ok(Some(Open { session: catalogue.session(session)?, is_in_hands, begun: Begun::plan(&spec) }))
}

impl Open {
    fn is_cut_short(&self) -> bool {
        !self.is_in_hands
    }

    /// Refuses what it was not begun with. One that somebody asked to stop ends as it was begun.
    fn asked(&self, typed: &Options, as_begun: impl Fn(&Begun, SessionId, &Options) -> Result<()>) -> Result<()> {
        if self.session.wish == Wish::Cancel { Ok(()) } else { as_begun(&self.begun, self.session.id, typed) }
    }

    /// Says that it would be gone on with, and how far it is.
    fn foresee(&self, context: &Context, name: &str, plan: &Plan) -> Result<()> {
        if self.is_cut_short() {
            would_go_on(context, self.session.id, std::slice::from_ref(&self.begun));
        } else {
            context.out.line(format_args!("would follow session {}, which is under way", self.session.id));
        }
        context.out.closing("session", self.session.id.0);
        show(context, name, plan)
    }
}

fn follow(
    context: &Context,
    catalogue: &Catalogue,
    name: &str,
    session: SessionId,
    stop: crate::stop::Stop,
) -> Result<()> {
    super::run::follow(context, catalogue, session, stop)?;
    let plan = find(context.site()?, name)?;
    let run = show_one(context, name, plan)?;
    for known in run.iter().flat_map(|run| &run.record.entries) {
        context.out.record("entry", known);
        context.out.line(format_args!(
            "  {:<16} {}{}",
            known.machine,
            known.replica.as_deref().unwrap_or("no replica"),
            of_run(Some(known))
        ));
    }
    let ended = catalogue.session(session)?;
    context.out.closing("session", session.0);
    let again = format!("aquifer plan resume {}", quoted(name));
    match ended.result {
        SessionResult::Success => {
            context.out.next(format!("aquifer undo plan/{name}    # or failback, or permanent"));
            Ok(())
        }
        SessionResult::Warning => {
            let is_over = run.is_some_and(|run| run.state == state::COMPLETED);
            let next = if is_over { format!("aquifer plan show {}", quoted(name)) } else { again };
            context.out.warn(Code::WarnSession, ended.reason.unwrap_or_default(), Some(&next));
            Ok(())
        }
        SessionResult::None => stop.check().map_err(|fail| fail.help(again)),
        SessionResult::Cancelled | SessionResult::Failed => {
            let why = ended.reason.unwrap_or_else(|| ended.result.to_string());
            Err(Fail::new(Code::Failed, format!("plan {name}: {why}")).help(again))
        }
    }
}

fn halt(context: &Context, name: &str, dry: &DryRun) -> Result<()> {
    let nothing =
        || Fail::new(Code::State, format!("plan {name} is not under way")).help(format!("aquifer plan show {name}"));
    let catalogue = context.catalogue_if_there()?.ok_or_else(nothing)?;
    let open = open(&catalogue, name)?.ok_or_else(nothing)?.session.id;
    if dry.dry_run {
        context.out.line(format_args!("would halt session {open}"));
        return Ok(());
    }
    catalogue.wish(open, Wish::Pause, &context.user(), Some("halted"))?;
    context.out.line(format_args!("plan {name} begins no other machine; what is under way finishes"));
    context.out.next(format!("aquifer plan resume {}", quoted(name)));
    Ok(())
}

fn resume(context: &Context, name: &str, args: &Args) -> Result<()> {
    let nothing = || {
        let fail = Fail::new(Code::State, format!("plan {name} has nothing left to go on with"));
        fail.help(format!("aquifer plan show {name}"))
    };
    let catalogue = context.catalogue_if_there()?.ok_or_else(nothing)?;
    if let Some(found) = open(&catalogue, name)? {
        found.asked(&args.machines.options().point(&args.to), Begun::goes_on)?;
        let open = found.session.id;
        if args.dry.dry_run {
            would_go_on(context, open, std::slice::from_ref(&found.begun));
            return Ok(());
        }
        catalogue.wish(open, Wish::Run, &context.user(), Some("resumed"))?;
        let stop = context.stop()?;
        return follow(context, &context.catalogue_with_lease(LEASE)?, name, open, stop);
    }
    let run = last_run(&catalogue, name)?.filter(|run| run.state != state::COMPLETED).ok_or_else(nothing)?;
    begin(context, name, &as_begun(&catalogue, &run, args)?, &args.dry, Some(run.id))
}

/// What is said, and for the rest what the run that has ended was told.
fn as_begun(catalogue: &Catalogue, run: &Run, args: &Args) -> Result<How> {
    let works = run.record.session.map(|session| catalogue.work_of(SessionId(session))).transpose()?;
    let mut told = works.into_iter().flatten().filter(|work| work.kind == plan::KIND);
    let Some(told) = told.find_map(|work| serde_json::from_value::<PlanSpec>(work.spec).ok()) else {
        return Ok(How::of(args));
    };
    let machines = args.machines.or_told(&told);
    let to = if args.to == LATEST { told.to } else { args.to.clone() };
    Ok(How { to, machines, fence: told.fence, no_start: told.no_start, cancel_job: told.cancel_job })
}
