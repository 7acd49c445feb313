//! How long a machine takes from the command until it runs, and until its console says something.
//!
//! Invariants
//! - The machine is recovered by this very program, into a throw-away folder with a state of its own.
//! - It is discarded afterwards, however the measurement ends; the source is as it was.
//!
//! Not here: a peer. QEMU cannot start a machine from most of these sources.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde::Serialize;
use serde_json::Value;

use super::{
    Args,
    copies::{self, Scratch},
};
use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    recover,
    source::{SourceOptions, select},
    stop::Stop,
    units,
};

/// How often the console is looked at.
const TICK: Duration = Duration::from_millis(20);

#[derive(Serialize)]
struct Boot {
    side: &'static str,
    /// From the command until QEMU runs the machine.
    running_seconds: f64,
    /// From the command until the text was on the console.
    #[serde(skip_serializing_if = "Option::is_none")]
    said_seconds: Option<f64>,
    /// Read from the source by then.
    bytes_fetched: u64,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let stop = context.stop()?;
    if let Some(peer) = args.peer.first() {
        let what = format!("the peer `{peer}` cannot boot a machine from a backup; boots have no peers");
        return Err(Fail::new(Code::Usage, what).help("aquifer bench --help"));
    }
    let limit = units::parse_duration(&args.limit)?;
    select(context, &args.target, &SourceOptions::default())?;
    if args.dry.dry_run {
        context.out.line(format_args!("would boot {} in a throw-away folder, and discard it", args.target));
        return Ok(());
    }
    let trial = Trial { context, scratch: Scratch::make()?, stop };
    let boot = trial.measure(args, limit)?;
    context.out.record("measured", &boot);
    let fetched = units::bytes(boot.bytes_fetched);
    context.out.line(format_args!("running after {:.2} s", boot.running_seconds));
    if let (Some(seconds), Some(text)) = (boot.said_seconds, &args.until) {
        context.out.line(format_args!("`{}` on the console after {seconds:.2} s", text.escape_debug()));
    }
    context.out.line(format_args!("{fetched} fetched from the source by then"));
    Ok(())
}

struct Trial<'a> {
    context: &'a Context,
    scratch: Scratch,
    stop: Stop,
}

impl Trial<'_> {
    fn measure(&self, args: &Args, limit: Duration) -> Result<Boot> {
        let began = Instant::now();
        let mut command = self.aquifer(&["recover", &args.target, "--network", "none"])?;
        command.arg("--into").arg(self.dir());
        if let Some(memory) = &args.memory {
            command.args(["--memory", memory]);
        }
        copies::finish(&mut command, "recover")?;
        let running_seconds = began.elapsed().as_secs_f64();
        let said_seconds = match &args.until {
            Some(text) => Some(self.said(text, began, limit)?),
            None => None,
        };
        let said = copies::finish(&mut self.aquifer(&["status", "--json"])?, "status")?;
        Ok(Boot {
            side: "aquifer",
            running_seconds,
            said_seconds,
            bytes_fetched: fetched(&String::from_utf8_lossy(&said)),
        })
    }

    /// Waits until the console has shown `text`.
    fn said(&self, text: &str, began: Instant, limit: Duration) -> Result<f64> {
        let (_, running) = recover::running_in(&self.dir())?;
        let log = &running.console_log;
        loop {
            let shown = fs::read(log).map_err(|e| Fail::io(log.display(), "read", &e))?;
            if String::from_utf8_lossy(&shown).contains(text) {
                return Ok(began.elapsed().as_secs_f64());
            }
            if began.elapsed() > limit {
                let what = format!("the console did not show `{}` within {} s", text.escape_debug(), limit.as_secs());
                return Err(Fail::new(Code::Timeout, what)
                    .at(log.display())
                    .help("aquifer bench boot SOURCE --limit TIME"));
            }
            self.stop.wait(TICK);
            self.stop.check()?;
        }
    }

    fn dir(&self) -> PathBuf {
        self.scratch.path().join("vm")
    }

    fn aquifer(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(self.context.own_command()?.0);
        command.args(args).arg("--home").arg(self.scratch.path().join("home"));
        if let Some(repo) = &self.context.globals.repo {
            command.arg("--repo").arg(repo);
        }
        if let Some(config) = &self.context.globals.config {
            command.arg("--config").arg(config);
        }
        Ok(command)
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        // The session first: a machine that is off would be started again.
        let running = recover::running_in(&self.dir());
        if let Ok(mut command) = self.aquifer(&["finalize", "vm", "--discard", "--yes", "--quiet"]) {
            let _ = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
        if let Ok((host, running)) = running {
            let _ = host.power_off(&running);
        }
    }
}

/// What `status --json` says all disks have fetched.
fn fetched(said: &str) -> u64 {
    let records = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let disks = records.flat_map(|record| record["disks"].as_array().cloned().unwrap_or_default());
    disks.filter_map(|disk| disk["fetched"].as_u64()).sum()
}
