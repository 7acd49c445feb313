//! `status`: recoveries, and how far they are; mounts, and where they are.

mod metrics;

use std::{path::PathBuf, time::Duration};

use aquifer_mount::session::{Folder, Registry};

use crate::{
    context::Context,
    fail::{Code, Result},
    mounts::{self, Mount},
    output::{Form, plain},
    recover::{gone, view::View},
    units,
};

/// How often a watched screen is drawn again.
const EVERY: Duration = Duration::from_secs(1);

/// Options of `status`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this session: a name, an id or the end of one, or its folder
    #[arg(value_name = "SESSION")]
    pub session: Option<String>,
    /// Figures of the whole site, in the text form that Prometheus reads
    #[arg(long, conflicts_with_all = ["session", "watch"])]
    pub metrics: bool,
    /// Go on showing until interrupted; without a terminal, show once
    #[arg(long)]
    pub watch: bool,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    if args.metrics {
        return metrics::show(context);
    }
    let json = context.out.form() == Form::Json;
    if !args.watch || !(json || context.out.is_terminal()) {
        return once(context, args, &mut String::new());
    }
    let stop = context.stop()?;
    loop {
        let mut screen = String::new();
        once(context, args, &mut screen)?;
        if !json {
            context.out.screen(&format!("{screen}(Ctrl-C leaves this view; the machines go on)"));
        }
        if stop.wait(EVERY) {
            return Ok(());
        }
    }
}

/// Shows every session; into `screen` where it is watched.
fn once(context: &Context, args: &Args, screen: &mut String) -> Result<()> {
    let registry = Registry::new(&context.home()?);
    let watched = args.watch && context.out.is_terminal();
    let mut show = |view: &View| {
        context.out.record("session", view);
        if watched {
            screen.push_str(&view.text());
            screen.push('\n');
        } else {
            context.out.lines(view.text());
        }
    };
    if let Some(word) = &args.session {
        let view = View::of(&registry.resolve(word)?)?;
        show(&view);
        if let Some(next) = next(&view) {
            context.out.next(next);
        }
        return Ok(());
    }
    let pointers = registry.list()?;
    let mut last = None;
    for pointer in &pointers {
        match Folder::open(&pointer.dir).map_err(Into::into).and_then(|folder| View::of(&folder)) {
            Ok(view) => {
                show(&view);
                last = Some(view);
            }
            Err(_) if gone::is_gone(&pointer.dir) => {
                let what = format!("{}: its folder {} is gone", pointer.name, pointer.dir.display());
                let help = format!("aquifer finalize {} --discard", pointer.id);
                context.out.warn(Code::WarnSkipped, what, Some(&help));
            }
            // One session that cannot be looked at does not hide the others.
            Err(fail) => {
                let what = format!("{}: {}", pointer.name, fail.what);
                context.out.warn(Code::WarnSkipped, what, Some(&format!("ls {}", pointer.dir.display())));
            }
        }
    }
    let mounts = mounts::list(context)?;
    for mount in &mounts {
        context.out.record("mount", mount);
        if watched {
            screen.push_str(&mounted(mount));
        } else {
            context.out.lines(mounted(mount).trim_end());
        }
    }
    context.out.closing("sessions", pointers.len());
    context.out.closing("mounts", mounts.len());
    if pointers.is_empty() && mounts.is_empty() {
        context.out.say("no recoveries and no mounts");
        context.out.next("aquifer recover SOURCE --into DIR");
    } else if let Some(next) = last.as_ref().filter(|_| pointers.len() == 1).and_then(next) {
        context.out.next(next);
    }
    Ok(())
}

/// A mount, in lines for people.
fn mounted(mount: &Mount) -> String {
    let since = mount.since.strftime("%Y-%m-%dT%H:%M:%SZ");
    let mut out = format!("mount of {} since {since}\n", plain(&mount.source));
    for disk in &mount.disks {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let places = [disk.uri.clone(), path(&disk.path), path(&disk.vhost_user), path(&disk.device)];
        let places: Vec<String> = places.into_iter().flatten().map(|place| plain(&place).into_owned()).collect();
        let access = if disk.writable { "takes writes" } else { "read-only" };
        out += &format!("  disk     {} ({}, {access}) {}\n", disk.disk, units::bytes(disk.size), places.join(" "));
    }
    out + &format!("  end      kill {}\n", mount.pid)
}

fn next(view: &View) -> Option<String> {
    let name = &view.status.name;
    if view.allowed_operations.contains(&"keep") {
        return Some(format!("aquifer finalize {name} --keep"));
    }
    view.allowed_operations.contains(&"resume").then(|| format!("aquifer session resume {name}"))
}
