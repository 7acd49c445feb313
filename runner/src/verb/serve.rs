//! `serve`: carries out the site file. Begins the runs of jobs when they are due, and works on them.
//!
//! Invariants
//! - SIGTERM is an orderly stop: work in hand is given back where it stands; the next start goes on with it. It ends with
//!   0, whatever jobs have warned of meanwhile: those have their sessions.
//! - Several may serve one site on one PostgreSQL: each run begins once.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use jiff::Timestamp;

use super::worker::Lease;
use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    job,
    tasks::{Hands, Planner, Worker, follow::Follow, owner},
    units,
};

/// How often it is looked what is due.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Options of `serve`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Pieces of work at once [default: `max_tasks` of `[proxy]` in the site file]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub tasks: Option<u32>,
    /// Begin runs, and leave the work to `aquifer worker`
    #[arg(long, conflicts_with = "tasks")]
    pub no_work: bool,
    /// How leases are taken.
    #[command(flatten)]
    pub lease: Lease,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let stop = context.stop()?;
    let site = context.site()?;
    if site.jobs.is_empty() {
        return Err(Fail::new(Code::Config, "the site file has no job").help("aquifer config check"));
    }
    for what in &site.not_carried_out {
        context.out.warn(Code::WarnSkipped, what.clone(), None);
    }
    let catalogue = context.catalogue_with_lease(args.lease.lease)?;
    let owner = owner("serve");
    let jobs = site.jobs.values().filter(|job| job.enabled).count();
    context.out.record(
        "serving",
        &serde_json::json!({
            "owner": owner, "catalogue": catalogue.url().to_string(), "jobs": jobs, "process": std::process::id(),
        }),
    );
    context.out.say(format_args!("serving {} as {owner}; catalogue {}", units::count(jobs, "job"), catalogue.url()));
    context.out.next_now("aquifer jobs");
    let mut follow = Follow::from_now(&catalogue)?;
    let worker = Worker {
        context,
        catalogue: &catalogue,
        owner,
        tasks: args.tasks.unwrap_or(site.proxy.max_tasks),
        only: None,
        until_idle: false,
        body: job::run,
        hands: Hands::default(),
    };
    let over = AtomicBool::new(false);
    let outcome = thread::scope(|scope| {
        let working = scope.spawn(|| {
            let outcome = if args.no_work { Ok(0) } else { worker.run(stop) };
            if outcome.is_err() {
                over.store(true, Ordering::SeqCst);
            }
            outcome
        });
        let planner = Planner { context, catalogue: &catalogue, site };
        while !stop.is_signalled() && !over.load(Ordering::SeqCst) {
            let looked = planner.tick(Timestamp::now()).and_then(|()| follow.show(&catalogue, &context.out));
            if let Err(fail) = looked {
                tracing::warn!(target: "aquifer", error = %fail.what, "the catalogue does not answer; trying again");
            }
            stop.wait(LOOK_EVERY);
        }
        working.join().unwrap_or_else(|payload| Err(Fail::from_panic(payload.as_ref())))
    });
    let had = outcome?;
    follow.show(&catalogue, &context.out)?;
    context.out.closing("work", had);
    context.out.closing("exit", 0);
    context.out.say("stopped in order; the next start goes on");
    Ok(())
}
