//! `finalize`: ends a recovery.

use std::time::Duration;

use aquifer_mount::session::{Client, Folder, Registry, State};
use serde_json::json;

use crate::{
    cli::{Confirm, DryRun},
    confirm::confirm,
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    recover::{finish, gone, start, view::View},
    stop::Stop,
    units,
};

/// Options of `finalize`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("end").required(true).args(["keep", "discard"])))]
pub struct Args {
    /// The session
    #[arg(value_name = "SESSION")]
    pub session: String,
    /// Keep the machine: its local disk becomes its only one
    #[arg(long, alias = "migrate")]
    pub keep: bool,
    /// Stop the machine and delete everything it wrote
    #[arg(long)]
    pub discard: bool,
    /// How long to wait until everything is local, like 2h; exit code 13 when it passes, and nothing is changed
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<String>,
    /// Whether to ask.
    #[command(flatten)]
    pub confirm: Confirm,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let registry = Registry::new(&context.home()?);
    if args.discard
        && let Some(pointer) = gone::find(&registry, &args.session)?
    {
        let loss = format!("what is left of {} is ended; its folder {} is gone", pointer.name, pointer.dir.display());
        if args.dry.dry_run {
            context.out.line(loss);
            return Ok(());
        }
        confirm(context, &args.confirm, &loss)?;
        gone::clear(&registry, &pointer)?;
        context.out.line(format_args!("{} is gone", pointer.name));
        return Ok(());
    }
    let folder = registry.resolve(&args.session)?;
    let view = View::of(&folder)?;
    let operation = if args.discard { "discard" } else { "keep" };
    let goes_on = view.status.state == State::Dismounting;
    let dead = !args.discard && view.allowed_operations.contains(&"resume");
    if !goes_on && !dead && !view.allowed_operations.contains(&operation) {
        let what = format!("{} is {}: {operation} is not possible", view.status.name, view.status.state);
        let now = format!("possible now: {}", view.allowed_operations.join(", "));
        return Err(Fail::new(Code::State, what).at(folder.dir().display()).cause(now));
    }
    if args.discard { discard(context, args, &folder, &view) } else { keep(context, args, &folder, &view) }
}

fn discard(context: &Context, args: &Args, folder: &Folder, view: &View) -> Result<()> {
    let loss = finish::loss(&view.status, &folder.load()?);
    if args.dry.dry_run {
        context.out.record("plan", &json!({ "session": view.status.id, "operation": "discard", "loss": loss }));
        context.out.lines(loss);
        return Ok(());
    }
    confirm(context, &args.confirm, &loss)?;
    finish::discard(context, folder)?;
    context.out.line(format_args!("{} is gone", view.status.name));
    context.out.next("aquifer status");
    Ok(())
}

fn keep(context: &Context, args: &Args, folder: &Folder, view: &View) -> Result<()> {
    let name = &view.status.name;
    if args.dry.dry_run {
        let missing = view.used_bytes.saturating_sub(view.local_bytes);
        context
            .out
            .record("plan", &json!({ "session": view.status.id, "operation": "keep", "bytes_missing": missing }));
        context
            .out
            .line(format_args!("would copy {} more, then make the local disks {name}'s own", units::bytes(missing)));
        return Ok(());
    }
    let stop = context.stop()?;
    let limit = args.timeout.as_deref().map(units::parse_duration).transpose()?;
    if view.status.state != State::Dismounting {
        wait_until_local(context, folder, view, limit, stop)?;
    }
    let kept = finish::keep(context, folder)?;
    let power = kept.power;
    for (disk, file, pivot) in &kept.disks {
        let pause_us = pivot.map(|p| p.pause_us);
        context.out.record("disk", &json!({ "disk": disk, "path": file, "format": "raw", "pause_us": pause_us }));
        match pause_us {
            Some(pause) => context.out.line(format_args!(
                "{disk} is {} now; the running machine was moved onto it in {}.{:03} ms",
                file.display(),
                pause / 1000,
                pause % 1000
            )),
            None => context.out.line(format_args!("{disk} is {} now", file.display())),
        }
    }
    context.out.closing("power", power.word());
    context.out.line(format_args!("{name} is on its own disk; its source and aquifer are no longer needed"));
    let first = kept.disks.first().map(|(_, file, _)| quoted(&file.to_string_lossy())).unwrap_or_default();
    context.out.next(format!("qemu-img info -U -f raw {first}"));
    Ok(())
}

/// Sees to it that everything becomes local, whatever was said about hydration before.
fn wait_until_local(
    context: &Context,
    folder: &Folder,
    view: &View,
    limit: Option<Duration>,
    stop: Stop,
) -> Result<()> {
    if view.status.is_local() {
        return Ok(());
    }
    start::resume(context, folder)?;
    let client = Client::of(folder.clone());
    client.resume()?;
    let progress = context.out.progress("hydrating", Some(view.used_bytes));
    finish::wait_local(&client, limit, stop, &mut |_| {
        if let Ok(view) = View::of(folder) {
            progress.set(view.local_bytes);
        }
    })
}
