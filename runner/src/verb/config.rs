//! `config`: checks or shows the site file, or says what may stand in one.
//!
//! Not here: whether guests answer and tools are there (that is `doctor`, and the jobs themselves).

mod clash;
mod there;

use clap::Subcommand;
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    schedule::{Due, When},
    site::{Job, Site, schema},
};

/// Options of `config`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do with it
    #[command(subcommand)]
    pub action: Action,
}

/// What to do with the site file.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Read it and say everything that is wrong
    Check,
    /// Show what applies, and where each value came from
    Show,
    /// Print the JSON Schema of a site file, for editors
    Schema,
}

/// Runs that are named for each job.
const RUNS: usize = 3;

#[derive(Serialize)]
struct JobRecord<'a> {
    job: &'a str,
    kind: &'static str,
    enabled: bool,
    machines: &'a [String],
    next: Vec<Timestamp>,
}

#[derive(Serialize)]
struct Setting {
    key: String,
    value: Option<String>,
    origin: &'static str,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    match args.action {
        Action::Check => check(context),
        Action::Show => show(context),
        Action::Schema => {
            let schema = schema::schema();
            context.out.record("schema", &serde_json::json!({ "json_schema": schema }));
            let text = serde_json::to_string_pretty(&schema).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
            context.out.lines(text);
            Ok(())
        }
    }
}

fn check(context: &Context) -> Result<()> {
    let missing = || Fail::new(Code::NotFound, "there is no site file").help("aquifer -c SITE.toml config check");
    let path = context.config_path().ok_or_else(missing)?;
    let site = Site::read(&path)?;
    let repositories = site.repositories.len();
    context.out.record(
        "site",
        &serde_json::json!({
            "path": path, "repositories": repositories, "hosts": site.hosts.len(), "machines": site.machines.len(),
            "jobs": site.jobs.len(), "plans": site.plans.len(),
        }),
    );
    context.out.line(format_args!("{}: valid, repositories: {repositories}", path.display()));
    let mut unmade = Vec::new();
    for (name, repository) in &site.repositories {
        if crate::repository::open_named(context, name).is_err_and(|fail| fail.code == Code::NoRepository) {
            context.out.say(format_args!("repository {name} has not been made yet"));
            unmade.push(format!("aquifer -r {} init", quoted(&repository.url.display().to_string())));
        }
    }
    if !unmade.is_empty() {
        context.out.next(unmade.join(" && "));
    }
    clash::check(context, &site);
    there::check(context, &site);
    let now = Timestamp::now();
    for (name, job) in &site.jobs {
        let next = next_runs(name, job, now);
        let when = match (&job.schedule.when, next.as_slice()) {
            _ if !job.enabled => "disabled".to_owned(),
            (When::After { job }, _) => format!("after {job}"),
            (When::OnNewPoint { .. }, _) => "on each new point".to_owned(),
            (When::Continuous { .. }, _) => "again and again".to_owned(),
            (_, []) => "when asked for".to_owned(),
            (_, next) => {
                let whole = next.iter().all(|at| at.as_second() % 60 == 0);
                let shape = if whole { "%F %H:%M %Z" } else { "%F %H:%M:%S %Z" };
                let local = |at: &Timestamp| at.to_zoned(site.zone()).strftime(shape).to_string();
                next.iter().map(local).collect::<Vec<_>>().join(", ")
            }
        };
        context.out.line(format_args!("job {name}: {}, {when}", job.kind.name()));
        let (kind, machines) = (job.kind.name(), job.kind.machines());
        context.out.record("job", &JobRecord { job: name, kind, enabled: job.enabled, machines, next });
    }
    for what in &site.not_carried_out {
        context.out.warn(Code::WarnSkipped, what.clone(), None);
    }
    Ok(())
}

/// The next few times a job's clock starts it.
fn next_runs(name: &str, job: &Job, now: Timestamp) -> Vec<Timestamp> {
    let mut runs = Vec::new();
    let mut from = now;
    while job.enabled && runs.len() < RUNS && job.schedule.next_after(from).is_some() {
        let Due::At(at) = job.schedule.due(name, from) else { break };
        from = job.schedule.next_after(from).unwrap_or(at);
        runs.push(at);
    }
    runs
}

fn show(context: &Context) -> Result<()> {
    for (key, value, origin) in context.settings()? {
        let shown = value.as_deref().unwrap_or("-").to_owned();
        context.out.line(format_args!("{key:<22} {shown:<40} {origin}"));
        context.out.record("setting", &Setting { key, value, origin });
    }
    Ok(())
}
