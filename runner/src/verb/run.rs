//! `run`: one run of a job, worked on here, followed to its end.
//!
//! Invariants
//! - A job that runs already is not begun a second time. One whose run was interrupted goes on with that run.
//! - `-n` says each step and what it is expected to read, and changes nothing: not even a catalogue is made. Where a run
//!   was interrupted, that one and what is left of it is said; where one is under way, it refuses what a run is refused.

use std::{thread, time::Duration};

use crossbeam_channel::{RecvTimeoutError, bounded};

use crate::{
    catalogue::{Catalogue, Error, NewRun, NewSession, Session, SessionId, SessionResult, Trigger, Wish, WorkState},
    cli::DryRun,
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    job,
    site::{Job, Site},
    stop::Stop,
    tasks::{
        Hands, Worker, expand,
        follow::{self, Follow},
        is_gone, owner,
    },
    units,
};

/// How often new events are shown.
const SHOW_EVERY: Duration = Duration::from_millis(200);

/// Options of `run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A job of the site file
    #[arg(value_name = "JOB")]
    pub job: String,
    /// Begin it and leave the work to `aquifer serve` or `aquifer worker`
    #[arg(long)]
    pub no_wait: bool,
    /// Why, for the session's record
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let stop = context.stop()?;
    let site = context.site()?;
    let job = find(context, site, &args.job)?;
    if args.dry.dry_run {
        return foresee(context, site, &args.job, job);
    }
    let catalogue = context.catalogue()?;
    let id = begin(context, &catalogue, site, args, job)?;
    if args.no_wait {
        context.out.record("session", &catalogue.session(id)?);
        context.out.line(format_args!("session {id}: waiting"));
        context.out.next(format!("aquifer sessions {id}"));
        return Ok(());
    }
    follow(context, &catalogue, id, stop)?;
    conclude(context, &catalogue, args, id, stop)
}

/// The job of that name, or the names there are.
pub(super) fn find<'s>(context: &Context, site: &'s Site, name: &str) -> Result<&'s Job> {
    site.jobs.get(name).ok_or_else(|| {
        let fail = Fail::new(Code::NotFound, format!("the site file has no job `{name}`"));
        let names: Vec<&str> = site.jobs.keys().map(String::as_str).collect();
        let path = context.config_path().map_or("no site file".to_owned(), |path| path.display().to_string());
        let there = if names.is_empty() { "it has no jobs".to_owned() } else { format!("it has {}", names.join(", ")) };
        fail.at(path).cause(there).help("aquifer jobs")
    })
}

/// Says what a run would do.
fn foresee(context: &Context, site: &Site, name: &str, job: &Job) -> Result<()> {
    let mut total = Some(0u64);
    let mut works = expand::works(site, name, job, false);
    if let Some(catalogue) = context.catalogue_if_there()?
        && let Some(open) = catalogue.job(name)?.open_session
    {
        if is_in_hands(&catalogue, open)? {
            let what = format!("job {name} is being worked on: session {open}");
            return Err(Fail::new(Code::Busy, what).help(format!("aquifer sessions {open}")));
        }
        let mut left = catalogue.work_of(open)?;
        left.retain(|work| matches!(work.state, WorkState::Ready | WorkState::Running));
        works.retain(|work| left.iter().any(|left| left.object == work.object));
        context.out.record("goes_on", &serde_json::json!({ "session": open.0 }));
        context.out.line(format_args!("would go on with session {open}, which was interrupted"));
    }
    for work in works {
        for step in job::foresee(context, site, job, &work)? {
            context.out.record("step", &step);
            let bytes = step.bytes.map(|bytes| format!(" (about {})", units::bytes(bytes))).unwrap_or_default();
            context.out.line(format_args!("would {}{bytes}", step.what));
            total = total.zip(step.bytes).map(|(total, bytes)| total.saturating_add(bytes));
        }
    }
    if let Some(total) = total {
        context.out.closing("bytes", total);
        context.out.line(format_args!("about {} in all", units::bytes(total)));
    }
    context.out.next(format!("aquifer run {}", quoted(name)));
    Ok(())
}

fn begin(context: &Context, catalogue: &Catalogue, site: &Site, args: &Args, job: &Job) -> Result<SessionId> {
    let session = NewSession {
        kind: job.kind.name().to_owned(),
        job: Some(args.job.clone()),
        initiator: context.user(),
        reason: args.reason.clone(),
        retry_of: None,
    };
    let work = expand::works(site, &args.job, job, false);
    match catalogue.begin_run(&args.job, &NewRun { trigger: Trigger::Hand, session, work }) {
        Err(error @ Error::Busy { .. }) => {
            let Some(open) = catalogue.job(&args.job)?.open_session else { return Err(error.into()) };
            if is_in_hands(catalogue, open)? {
                return Err(Fail::from(error).help(format!("aquifer sessions {open}")));
            }
            let what = format!("an earlier run was interrupted; session {open} goes on");
            context.out.warn(Code::WarnInterrupted, what, None);
            let ready = catalogue.work_of(open)?.into_iter().filter(|work| work.state == WorkState::Ready);
            if let Some(at) = ready.map(|work| work.run_at).min().filter(|at| *at > jiff::Timestamp::now()) {
                let anew = context.out.ready(&format!("aquifer sessions {open} --cancel"));
                context.out.say(format_args!("it failed and is tried again at {}; {anew} ends it", follow::at(at)));
            }
            Ok(open)
        }
        begun => Ok(begun?),
    }
}

/// Whether somebody works on a session, or has been asked to wait with it.
pub(super) fn is_in_hands(catalogue: &Catalogue, id: SessionId) -> Result<bool> {
    let now = jiff::Timestamp::now();
    let held = catalogue.session(id)?.wish != Wish::Run;
    let live = |work: &crate::catalogue::Work| {
        let held = work.lease_until.is_some_and(|until| until > now) && !work.owner.as_deref().is_some_and(is_gone);
        work.state == WorkState::Running && held
    };
    Ok(held || catalogue.work_of(id)?.iter().any(live))
}

/// Works on a session and shows what happens, until it has ended or somebody asks to stop.
pub(super) fn follow(context: &Context, catalogue: &Catalogue, id: SessionId, stop: Stop) -> Result<()> {
    // A thread for each piece of work there is: one that has none looks again and again, and whoever works waits for it.
    let works = u32::try_from(catalogue.work_of(id)?.len()).unwrap_or(u32::MAX);
    let tasks = context.site()?.proxy.max_tasks.min(works);
    let worker = Worker {
        context,
        catalogue,
        owner: owner("run"),
        tasks,
        only: Some(id),
        until_idle: true,
        body: job::run,
        hands: Hands::default(),
    };
    let mut follow = Follow::from_now(catalogue)?.of_session(id).only_trouble();
    let progress = context.out.progress("running", None);
    let outcome = thread::scope(|scope| {
        let (at_work, ended) = bounded::<()>(0);
        let working = scope.spawn(|| {
            let _until_the_end = at_work;
            worker.run(stop)
        });
        loop {
            // What cannot be shown now is shown later; the worker tells when the catalogue is gone for good.
            let _ = follow.show(catalogue, &context.out);
            let (done, total) = worker.hands.progress();
            progress.reach(done, total);
            if ended.recv_timeout(SHOW_EVERY) == Err(RecvTimeoutError::Disconnected) {
                break;
            }
        }
        working.join().unwrap_or_else(|payload| Err(Fail::from_panic(payload.as_ref())))
    });
    drop(progress);
    outcome?;
    follow.show(catalogue, &context.out)
}

fn conclude(context: &Context, catalogue: &Catalogue, args: &Args, id: SessionId, stop: Stop) -> Result<()> {
    let session = catalogue.session(id)?;
    context.out.record("session", &session);
    let again = format!("aquifer run {}", quoted(&args.job));
    if session.ended.is_none() {
        stop.check().map_err(|fail| fail.help(format!("{again}    # session {id} goes on from what is stored")))?;
    }
    context.out.line(super::sessions::line(&session));
    let reason = session.reason.clone().unwrap_or_default();
    match session.result {
        SessionResult::Failed | SessionResult::None => Err(failure(catalogue, &session, &reason)?),
        SessionResult::Cancelled => Err(Fail::new(Code::Failed, format!("session {id} was cancelled")).help(again)),
        SessionResult::Warning => {
            context.out.warn(Code::WarnSession, format!("session {id}: {reason}"), None);
            context.out.next(format!("aquifer sessions {id}"));
            Ok(())
        }
        SessionResult::Success => {
            context.out.next(format!("aquifer sessions {id}"));
            Ok(())
        }
    }
}

/// The failure of a session: with the code that all of its failed work has, else a code of its own.
fn failure(catalogue: &Catalogue, session: &Session, reason: &str) -> Result<Fail> {
    let works = catalogue.work_of(session.id)?;
    let failed: Vec<_> = works.iter().filter(|work| work.state == WorkState::Failed).collect();
    let said = |key: &str| {
        let mut each = failed.iter().map(|work| work.outcome.as_ref()?.get(key)?.as_str());
        let first = each.next().flatten();
        first.filter(|first| each.all(|other| other == Some(*first)))
    };
    let code = said("code").and_then(Code::find);
    let what = format!("session {}: {} of {} failed: {reason}", session.id, failed.len(), works.len());
    let help = said("do")
        .filter(|help| !help.starts_with("--"))
        .map_or_else(|| format!("aquifer sessions {}", session.id), str::to_owned);
    Ok(Fail::new(code.unwrap_or(Code::Failed), what).help(help))
}
