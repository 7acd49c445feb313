//! The command of `mount --run`.
//!
//! Invariants
//! - Its exit code is ours; a signal that ended it is `128 + n`, as shells say it.
//! - With `--json` its stdout goes to stderr: ours carries records only.

use std::{
    io,
    os::{fd::AsFd, unix::process::ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use super::doors::{Doors, address};
use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    output::Form,
    stop::Stop,
};

/// How often the command and our own signals are looked at.
const TICK: Duration = Duration::from_millis(50);

/// How long a command may take to end after it was asked to.
const GRACE: Duration = Duration::from_secs(5);

pub(super) fn run(context: &Context, command: &str, doors: &Doors, stop: Stop) -> Result<()> {
    let started = |e: &io::Error| Fail::io("/bin/sh", "start", e);
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(command);
    let uris: Vec<String> = doors.served().iter().map(address).collect();
    shell.env("uri", uris.first().cloned().unwrap_or_default()).env("uris", uris.join(" "));
    if context.out.form() == Form::Json {
        let stderr = io::stderr().as_fd().try_clone_to_owned().map_err(|e| started(&e))?;
        shell.stdout(Stdio::from(stderr));
    }
    let mut child = shell.spawn().map_err(|e| Fail { code: Code::Child, ..started(&e) })?;
    let status = wait(&mut child, stop).map_err(|e| started(&e))?;
    stop.check()?;
    match code_of(status) {
        0 => Ok(()),
        code => {
            let what = format!("the command ended with exit code {code}");
            Err(Fail { exit: Some(code), ..Fail::new(Code::Child, what).at(command) })
        }
    }
}

fn wait(child: &mut Child, stop: Stop) -> io::Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if stop.wait(TICK) {
            return end(child);
        }
    }
}

/// Asks, waits a little, insists.
fn end(child: &mut Child) -> io::Result<ExitStatus> {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
        // It may have ended by itself meanwhile.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    let mut left = GRACE;
    while !left.is_zero() {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        std::thread::sleep(TICK);
        left = left.saturating_sub(TICK);
    }
    child.kill()?;
    child.wait()
}

fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}
