//! `jobs`: the jobs of the site file, when they run next, what came of them last.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use crate::{
    catalogue::JobState,
    cli::DryRun,
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    schedule::{Due, When},
    site::Job,
    tasks::follow::at,
};

/// Options of `jobs`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this one
    #[arg(value_name = "JOB")]
    pub job: Option<String>,
    /// Hold its schedule
    #[arg(long, requires = "job", conflicts_with = "resume")]
    pub pause: bool,
    /// Let its schedule go on
    #[arg(long, requires = "job")]
    pub resume: bool,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

#[derive(Serialize)]
struct Record<'a> {
    kind: &'a str,
    enabled: bool,
    machines: &'a [String],
    #[serde(flatten)]
    state: &'a JobState,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let site = context.site()?;
    if let Some(name) = &args.job {
        super::run::find(context, site, name)?;
        if args.pause || args.resume {
            let word = if args.pause { "pause" } else { "resume" };
            if args.dry.dry_run {
                context.out.line(format_args!("would {word} the schedule of job {name}"));
                return Ok(());
            }
            context.catalogue()?.pause_job(name, args.pause, &context.user())?;
            if args.pause {
                context.out.next(format!("aquifer jobs {} --resume", quoted(name)));
            }
        }
    }
    let known: BTreeMap<String, JobState> = match context.catalogue_if_there()? {
        Some(catalogue) => catalogue.jobs()?.into_iter().map(|state| (state.name.clone(), state)).collect(),
        None => BTreeMap::new(),
    };
    let wanted = |name: &str| args.job.as_ref().is_none_or(|job| job == name);
    let mut shown = 0;
    for (name, job) in site.jobs.iter().filter(|(name, _)| wanted(name)) {
        let fresh = || JobState { name: name.clone(), ..JobState::default() };
        let state = known.get(name).cloned().unwrap_or_else(fresh);
        let record =
            Record { kind: job.kind.name(), enabled: job.enabled, machines: job.kind.machines(), state: &state };
        context.out.record("job", &record);
        context.out.line(line(&record, job));
        shown += 1;
    }
    if shown == 0 {
        let fail = Fail::new(Code::NotFound, "the site file has no jobs");
        return Err(fail.help("aquifer config check"));
    }
    context.out.closing("jobs", shown);
    Ok(())
}

/// What begins a job of which no time is recorded.
fn trigger(job: &Job, name: &str) -> String {
    match (&job.schedule.when, job.schedule.due(name, Timestamp::now())) {
        (_, Due::At(next)) => format!("next {}", at(next)),
        (When::After { job }, _) => format!("after job {job}"),
        (When::OnNewPoint { .. }, _) => "at each new point".to_owned(),
        (When::Continuous { .. }, _) => "again and again".to_owned(),
        _ => "by hand only".to_owned(),
    }
}

fn line(record: &Record<'_>, job: &Job) -> String {
    let state = record.state;
    let next = match (record.enabled, state.paused, state.next_run) {
        (false, ..) => "disabled".to_owned(),
        (_, true, _) => "paused".to_owned(),
        (_, _, Some(next)) => format!("next {}", at(next)),
        (_, _, None) => trigger(job, &state.name),
    };
    let open = state.open_session.map(|id| format!(", session {id} runs")).unwrap_or_default();
    let last = match (state.last_result, state.last_ended, state.last_session) {
        (Some(result), Some(ended), Some(id)) => format!(", last {result} at {} (session {id})", at(ended)),
        _ => ", never ran".to_owned(),
    };
    format!("{:<16} {:<12} {next}{open}{last}", state.name, record.kind)
}
