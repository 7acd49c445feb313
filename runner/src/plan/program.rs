//! Programs of a plan: before the first machine, after the last, and as gates.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    fail::{Code, Fail, Result},
    stop::Stop,
};

/// How often a program is looked at.
const TICK: Duration = Duration::from_millis(50);

/// Runs a program to its end, with these variables added.
///
/// # Errors
/// [`Code::Tool`]: it cannot be started, does not end with 0, or not in time; the interruption. It is ended then.
pub(super) fn run(program: &Path, variables: &[(&str, String)], limit: Duration, stop: Stop) -> Result<()> {
    let mut command = Command::new(program);
    command.envs(variables.iter().map(|(name, value)| (*name, value)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let failed = |what: String| Fail::new(Code::Tool, what).at(program.display());
    let mut child = command.spawn().map_err(|e| failed("a program of the plan cannot be started".into()).cause(e))?;
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().map_err(|e| Fail::io(program.display(), "wait for", &e))? {
            return if status.success() {
                Ok(())
            } else {
                Err(failed(format!("a program of the plan ended with {status}")))
            };
        }
        let late = began.elapsed() >= limit;
        if late || stop.wait(TICK) {
            let _ = child.kill();
            let _ = child.wait();
            stop.check()?;
            return Err(failed(format!("a program of the plan did not end within {} s", limit.as_secs())));
        }
    }
}
