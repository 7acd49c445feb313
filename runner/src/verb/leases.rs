//! `leases`: who reads or appends what in the repository.

use std::time::Instant;

use aquifer_formats::repo::{
    Liveness, Machine,
    record::{LeaseKind, LeaseRecord},
};
use jiff::Timestamp;
use serde::Serialize;

use crate::{context::Context, fail::Result, repository};

/// Options of `leases`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Also show leases whose holder has gone
    #[arg(long)]
    pub all: bool,
}

#[derive(Serialize)]
struct Record<'a> {
    lease: String,
    kind: LeaseKind,
    machine: &'a str,
    point: Option<String>,
    holder: &'a str,
    host: &'a str,
    process: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<&'a str>,
    since: Timestamp,
    /// `alive`, `gone`, or `unknown` where the holder cannot be seen from here.
    state: &'static str,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let repo = repository::open(context)?;
    let machines = repo.machines()?;
    let tell = repository::tell(context)?;
    let (live, gone) =
        repository::observing(context, |observer| Ok(observer.observe(&repo, Instant::now(), &tell)?))?;
    let shown_gone: &[LeaseRecord] = if args.all { &gone } else { &[] };
    for lease in live.iter().chain(shown_gone) {
        let state = match tell(&lease.holder) {
            Liveness::Alive => "alive",
            Liveness::Dead => "gone",
            Liveness::Unknown => "unknown",
        };
        print(context, &machines, lease, state);
    }
    if live.is_empty() && shown_gone.is_empty() {
        context.out.say("nobody reads or writes the repository");
    }
    context.out.closing("live", live.len());
    context.out.closing("gone", gone.len());
    Ok(())
}

fn print(context: &Context, machines: &[Machine], lease: &LeaseRecord, state: &'static str) {
    let machine = machines.iter().find(|machine| machine.id == lease.machine);
    let machine = machine.map_or("unknown", |machine| machine.name.as_str());
    let record = Record {
        lease: lease.id.to_string(),
        kind: lease.kind,
        machine,
        point: lease.point.map(|id| id.to_string()),
        holder: &lease.holder.name,
        host: &lease.holder.host,
        process: lease.holder.process,
        session: lease.holder.session.as_deref(),
        since: lease.since,
        state,
    };
    let what = match lease.kind {
        LeaseKind::Read => "reads",
        LeaseKind::Append => "appends to",
    };
    let point = record.point.as_ref().map(|id| format!("@{id}")).unwrap_or_default();
    let since = lease.since.strftime("%Y-%m-%dT%H:%M:%SZ");
    context.out.line(format_args!("{} {what} {machine}{point} since {since} ({state})", lease.holder));
    context.out.record("lease", &record);
}
