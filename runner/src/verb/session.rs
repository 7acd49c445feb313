//! `session`: changes a running recovery.

use aquifer_mount::session::{Client, Folder, Registry, control::Setting};
use clap::Subcommand;
use jiff::Timestamp;

use crate::{
    cli::DryRun,
    context::Context,
    fail::{Code, Fail, Result},
    recover::{start, view::View},
    units,
};

/// Options of `session`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to change
    #[command(subcommand)]
    pub change: Change,
}

/// Changes to a running recovery.
#[derive(Debug, Subcommand)]
pub enum Change {
    /// Set the rate of the background copy or when it shall be done
    Set {
        /// The session
        session: String,
        /// Limit of the background copy, like 200MiB/s; none lifts it
        #[arg(long, value_name = "RATE")]
        rate: Option<String>,
        /// When the machine shall be independent, like 02:00 or an RFC 3339 time; none lifts it
        #[arg(long, value_name = "TIME", conflicts_with = "rate")]
        ready_by: Option<String>,
        /// Whether only to look.
        #[command(flatten)]
        dry: DryRun,
    },
    /// Hold the background copy; the guest goes on
    Pause {
        /// The session
        session: String,
        /// Whether only to look.
        #[command(flatten)]
        dry: DryRun,
    },
    /// Go on with the background copy; start door and machine again where they have died
    Resume {
        /// The session
        session: String,
        /// Whether only to look.
        #[command(flatten)]
        dry: DryRun,
    },
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let registry = Registry::new(&context.home()?);
    match &args.change {
        Change::Set { session, rate, ready_by, dry } => {
            let rate = rate.as_deref().map(units::parse_rate).transpose()?;
            let ready_by = ready_by.as_deref().map(when).transpose()?;
            if rate.is_none() && ready_by.is_none() {
                return Err(Fail::new(Code::Usage, "nothing to set").help("aquifer session set --help"));
            }
            let folder = registry.resolve(session)?;
            change(context, &folder, dry, "set", |client| {
                // One of the two rules; setting one lets go of the other.
                let (rate, ready_by) = match (rate, ready_by) {
                    (Some(rate), _) => (rate.map_or(Setting::Clear, Setting::To), Setting::Clear),
                    (None, Some(at)) => (Setting::Clear, at.map_or(Setting::Clear, Setting::To)),
                    (None, None) => (Setting::Keep, Setting::Keep),
                };
                Ok(client.set(rate, ready_by)?)
            })
        }
        Change::Pause { session, dry } => {
            change(context, &registry.resolve(session)?, dry, "pause", |client| Ok(client.pause()?))
        }
        Change::Resume { session, dry } => {
            let folder = registry.resolve(session)?;
            change(context, &folder, dry, "resume", |client| {
                let resumed = start::resume(context, &folder)?;
                context.out.closing("door_started", resumed.door_started);
                context.out.closing("machine_started", resumed.machine_started);
                if resumed.machine_started {
                    context.out.say("the machine was started again from its own disks");
                }
                Ok(client.resume()?)
            })
        }
    }
}

/// Makes one change and shows the session afterwards.
fn change(
    context: &Context,
    folder: &Folder,
    dry: &DryRun,
    operation: &'static str,
    make: impl FnOnce(&Client) -> Result<()>,
) -> Result<()> {
    let view = View::of(folder)?;
    if !view.allowed_operations.contains(&operation) {
        let what = format!("{} is {}: {operation} is not possible", view.status.name, view.status.state);
        let now = format!("possible now: {}", view.allowed_operations.join(", "));
        return Err(Fail::new(Code::State, what).at(folder.dir().display()).cause(now));
    }
    if dry.dry_run {
        context.out.record("plan", &serde_json::json!({ "session": view.status.id, "operation": operation }));
        context.out.line(format_args!("would {operation} {}", view.status.name));
        return Ok(());
    }
    make(&Client::of(folder.clone()))?;
    let view = View::of(folder)?;
    context.out.record("session", &view);
    context.out.lines(view.text());
    context.out.next(format!("aquifer status {}", view.status.name));
    Ok(())
}

fn when(text: &str) -> Result<Option<Timestamp>> {
    if text == "none" { Ok(None) } else { units::parse_when(text).map(Some) }
}
