//! How long a full backup of a source takes until it is durable, and how much it stores.
//!
//! The backup is made by this very program, into a throw-away repository in the folder for temporary
//! files (`TMPDIR`), so that nothing of a real run is left out.

use std::{io::BufRead, process::Command, time::Instant};

use serde_json::Value;

use super::{
    Args,
    copies::{self, Purpose, Scratch, Whole},
};
use crate::{
    context::Context,
    copy,
    fail::{Code, Fail, Result},
    source::{SourceOptions, select},
    units,
};

/// The side of a comparison that is us.
const OURS: &str = "aquifer";

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let stop = context.stop()?;
    copies::check_peers(args, Purpose::Backup)?;
    let selection = select(context, &args.target, &SourceOptions::default())?;
    if selection.point.is_some() {
        let what = "a restore point is backed up already; an image or an NBD URI can be measured";
        return Err(Fail::new(Code::Usage, what).at(&args.target).help("aquifer bench backup IMAGE"));
    }
    let selected = selection.single()?;
    let used = copy::used_bytes(&*selected.open(&context.cache()?)?)?;
    if args.dry.dry_run {
        context.out.line(format_args!("would back up {} into a throw-away repository", units::bytes(used)));
        return Ok(());
    }
    let scratch = Scratch::make()?;
    let ours = ours(context, args, &scratch)?;
    let stored = units::bytes(ours.bytes_stored.unwrap_or_default());
    context.out.record("measured", &ours);
    context.out.line(format_args!("{OURS}: durable after {:.2} s, {} in {stored}", ours.seconds, units::bytes(used)));
    let mut sides = vec![ours];
    for name in &args.peer {
        stop.check()?;
        sides.push(copies::measure(name, Purpose::Backup, selected, scratch.path())?);
    }
    copies::report(context, args, "backup", &sides)
}

fn ours(context: &Context, args: &Args, scratch: &Scratch) -> Result<Whole> {
    let program = context.own_command()?.0;
    let aquifer = || {
        let mut command = Command::new(&program);
        command.arg("-r").arg(scratch.path().join("repo")).arg("--home").arg(scratch.path().join("home"));
        if let Some(config) = &context.globals.config {
            command.arg("-c").arg(config);
        }
        command
    };
    copies::finish(aquifer().arg("init"), OURS)?;
    let start = Instant::now();
    let disk = format!("disk={}", args.target);
    let said = copies::finish(aquifer().args(["backup", "measured", "--disk", &disk, "--json"]), OURS)?;
    let seconds = start.elapsed().as_secs_f64();
    let records = said.lines().map_while(std::result::Result::ok);
    let point = records.filter_map(|line| serde_json::from_str::<Value>(&line).ok()).find(|r| r["type"] == "point");
    let bytes_stored = point.and_then(|point| point["bytes_stored"].as_u64());
    Ok(Whole { side: OURS.to_owned(), seconds, bytes_stored })
}
