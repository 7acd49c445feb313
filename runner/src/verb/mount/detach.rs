//! `mount --detach`: the same command once more, without a terminal; we return when its door answers.
//!
//! Invariants
//! - The background process reports over a pipe, in its own `--json` lines; what it says first, we say.
//! - If it ends before it serves, its failure is ours.
//! - Its talk goes to a log file, named when it is started.

use std::{
    fs::{DirBuilder, OpenOptions},
    io::{BufRead, BufReader},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::{
    context::Context,
    fail::{At, Code, Fail, Remedy, Result},
};

/// Longest line that is taken from the background process.
const LINE_BYTES_MAX: u64 = 1 << 20;

pub(super) fn run(context: &Context) -> Result<()> {
    let (program, args) = context.own_command()?;
    let args = args.into_iter().filter(|arg| arg != "--detach" && arg != "--json");
    let folder = context.home()?.join("log");
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    made.map_err(|e| Fail::io(folder.display(), "create", &e))?;
    let log = folder.join(format!("mount-{}.log", uuid::Uuid::now_v7()));
    let opened = OpenOptions::new().create_new(true).append(true).mode(0o600).open(&log);
    let stderr = opened.map_err(|e| Fail::io(log.display(), "create", &e))?;
    let mut child = Command::new(&program)
        .args(args)
        .args(["--json", "--in-background"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .map_err(|e| Fail::io(program.display(), "start", &e))?;
    let pid = child.id();
    let Some(stdout) = child.stdout.take() else {
        return Err(Fail::new(Code::Bug, "the background process has no pipe"));
    };
    let mut lines = BufReader::new(std::io::Read::take(stdout, LINE_BYTES_MAX)).lines();
    while let Some(Ok(line)) = lines.next() {
        let record: Value = serde_json::from_str(&line).unwrap_or(Value::Null);
        match record.get("type").and_then(Value::as_str) {
            Some("serving") => serving(context, &record),
            Some("ready") => {
                context.out.closing("pid", pid);
                context.out.closing("log", log.display().to_string());
                context.out.say(format_args!("serving in process {pid}, log {}", log.display()));
                context.out.next(format!("kill {pid}    # to end it"));
                return Ok(());
            }
            Some("error") => return Err(failure(&record)),
            _ => {}
        }
    }
    let what = "the background process ended before it served";
    Err(Fail::new(Code::Failed, what).at(log.display()).help(format!("cat {}", log.display())))
}

fn serving(context: &Context, record: &Value) {
    if let Some(uri) = record.get("uri").and_then(Value::as_str) {
        context.out.line(uri);
    }
    let fields = record.as_object().into_iter().flatten().filter(|(key, _)| *key != "schema" && *key != "type");
    let fields: serde_json::Map<String, Value> = fields.map(|(key, value)| (key.clone(), value.clone())).collect();
    context.out.record("serving", &fields);
}

/// The background process's error line, as our own failure.
fn failure(record: &Value) -> Fail {
    let text = |key: &str| record.get(key).and_then(Value::as_str).map(str::to_owned);
    let code = text("code").and_then(|name| Code::find(&name)).unwrap_or(Code::Failed);
    let at = record.get("at").map(|at| At {
        path: at.get("path").and_then(Value::as_str).unwrap_or_default().to_owned(),
        offset: at.get("offset").and_then(Value::as_u64),
        cause: at.get("cause").and_then(Value::as_str).map(str::to_owned),
    });
    Fail {
        at,
        do_: text("do").map(|command| Remedy::Command(command.into())),
        ..Fail::new(code, text("what").unwrap_or_default())
    }
}

/// Makes the process its own session, so that the terminal's end is not its end.
pub(super) fn leave_terminal() -> Result<()> {
    rustix::process::setsid().map(drop).map_err(|e| Fail::io("the terminal", "leave", &e.into()))
}
