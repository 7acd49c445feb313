//! The household of the one binary `aquifer`: command line, verbs, hosts, recoveries.
//!
//! Invariants
//! - stdout carries data only, stderr carries talk; with `--json` every line of stdout is one JSON
//!   object with a versioned `schema`, and the last one is `done` or `error`, even for usage errors.
//! - The exit code is the same with and without `--json`; it is decided in one place, [`fail`].
//! - Only [`context`] reads the environment; only [`output`] prints.
//!
//! Not here: bytes of formats, the reading of chains, sockets and mounts (the crates to the left).

pub mod backup;
pub mod catalogue;
pub mod cli;
pub mod confirm;
pub mod context;
pub mod copy;
pub mod fail;
pub mod failback;
pub mod failover;
pub mod host;
pub mod job;
pub mod machine;
pub mod mounts;
pub mod operate;
pub mod output;
pub mod plan;
pub mod read_ahead;
pub mod readdress;
pub mod recover;
pub mod replica;
pub mod repository;
pub mod retain;
pub mod schedule;
pub mod site;
pub mod source;
pub mod step;
pub mod stop;
pub mod strict;
pub mod tasks;
pub mod units;
pub mod verb;

use std::{ffi::OsString, panic, process::ExitCode};

use clap::{FromArgMatches, error::ErrorKind};

use crate::{
    cli::Cli,
    context::Context,
    fail::{Code, Fail},
    output::{Form, Output},
};

/// Runs one command line and says how it ended. The process exits with that code.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.collect();
    ExitCode::from(run(&args))
}

fn run(args: &[OsString]) -> u8 {
    // Known before parsing: a usage error, too, answers in the form that was asked for.
    let form = if asks_for_json(args) { Form::Json } else { Form::Human };
    let parsed = cli::command().try_get_matches_from(args).and_then(|m| Cli::from_arg_matches(&m));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => return not_a_command(&error, args, form),
    };
    output::begin_log();
    let context = Context::new(cli.globals, cli.verb.name());
    let verb = cli.verb;
    let outcome = panic::catch_unwind(panic::AssertUnwindSafe(|| verb.run(&context)));
    let outcome = outcome.unwrap_or_else(|payload| Err(Fail::from_panic(payload.as_ref())));
    context.out.finish(outcome, context.globals.strict)
}

/// Whether `--json` stands among the arguments before a `--`.
fn asks_for_json(args: &[OsString]) -> bool {
    args.iter().skip(1).take_while(|a| *a != "--").any(|a| a == "--json")
}

/// Help, version and usage errors: what clap answers instead of a command.
fn not_a_command(error: &clap::Error, args: &[OsString], form: Form) -> u8 {
    let verb = cli::verb_among(args);
    let out = Output::new(form, verb);
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            out.text("help", &error.render().to_string());
            out.finish(Ok(()), false)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let what = format!("`aquifer {verb}` needs to be told what to do");
            out.finish(Err(Fail::new(Code::Usage, what).help(format!("aquifer {verb} --help"))), false)
        }
        ErrorKind::MissingSubcommand => {
            let fail = Fail::new(Code::Usage, "no verb was given").help("aquifer --help");
            out.finish(Err(fail), false)
        }
        _ => {
            let text = error.render().to_string();
            let (what, rest) = cli::split_usage_error(&text);
            if form == Form::Human && !rest.is_empty() {
                out.say_lines(rest.trim_end());
            }
            let help = if verb == "cli" { "aquifer --help".into() } else { format!("aquifer {verb} --help") };
            out.finish(Err(Fail::new(Code::Usage, what).help(help)), false)
        }
    }
}

#[cfg(test)]
mod tests;
