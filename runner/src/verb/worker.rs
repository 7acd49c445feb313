//! `worker`: works on what is in the queue of a catalogue that others share.
//!
//! Invariants
//! - A worker that is killed loses nothing: whoever asks next goes on after the lease. One that is paused past its
//!   lease can change nothing when it wakes.

use std::{thread, time::Duration};

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::super::units;
use crate::{
    catalogue::LEASE,
    context::Context,
    fail::{Fail, Result},
    job,
    tasks::{Hands, Worker, follow::Follow, owner},
};

/// How often new events are shown.
const SHOW_EVERY: Duration = Duration::from_millis(300);

/// How leases are taken.
#[derive(Clone, Debug, clap::Args)]
pub struct Lease {
    /// How long a worker may be silent before its work is given to another
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = lease)]
    pub lease: Duration,
}

impl Default for Lease {
    fn default() -> Self {
        Self { lease: LEASE }
    }
}

fn lease(text: &str) -> Result<Duration, String> {
    let lease = units::parse_duration(text).map_err(|fail| fail.what)?;
    let range = Duration::from_secs(1)..=Duration::from_secs(3600);
    if range.contains(&lease) { Ok(lease) } else { Err("a lease lasts from 1s to 1h".to_owned()) }
}

/// Options of `worker`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Pieces of work at once [default: `max_tasks` of `[proxy]` in the site file]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub tasks: Option<u32>,
    /// End once nothing is left to do
    #[arg(long)]
    pub until_idle: bool,
    /// How leases are taken.
    #[command(flatten)]
    pub lease: Lease,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let stop = context.stop()?;
    let site = context.site()?;
    let catalogue = context.catalogue_with_lease(args.lease.lease)?;
    let owner = owner("worker");
    context.out.record(
        "working",
        &serde_json::json!({
            "owner": owner, "catalogue": catalogue.url().to_string(), "process": std::process::id(),
        }),
    );
    context.out.say(format_args!("working as {owner}; catalogue {}", catalogue.url()));
    let mut follow = Follow::from_now(&catalogue)?.of_owner(&owner);
    let worker = Worker {
        context,
        catalogue: &catalogue,
        owner,
        tasks: args.tasks.unwrap_or(site.proxy.max_tasks),
        only: None,
        until_idle: args.until_idle,
        body: job::run,
        hands: Hands::default(),
    };
    let outcome = thread::scope(|scope| {
        let (at_work, ended) = bounded::<()>(0);
        let working = scope.spawn(|| {
            let _until_the_end = at_work;
            worker.run(stop)
        });
        loop {
            if let Err(fail) = follow.show(&catalogue, &context.out) {
                tracing::warn!(target: "aquifer", error = %fail.what, "the catalogue does not answer; trying again");
            }
            if ended.recv_timeout(SHOW_EVERY) == Err(RecvTimeoutError::Disconnected) {
                break;
            }
        }
        working.join().unwrap_or_else(|payload| Err(Fail::from_panic(payload.as_ref())))
    });
    let had = outcome?;
    follow.show(&catalogue, &context.out)?;
    context.out.closing("work", had);
    if !args.until_idle {
        // Asked to end: what it warned of was told, and is in the sessions.
        context.out.closing("exit", 0);
    }
    Ok(())
}
