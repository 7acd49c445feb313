//! A process that outlives a backup which is killed: it thaws the guest and takes down what the backup has added.
//!
//! Invariants
//! - It does nothing as long as whoever started it lives, and nothing at all once it was dismissed.
//!
//! Not here: what is taken down, and how ([`super::fleece`]).

use std::{
    io::{Read, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    thread,
};

use super::{
    agent,
    fleece::{self, Sockets},
};
use crate::fail::{Code, Fail, Result};

/// What dismisses it.
const DISMISSED: &[u8] = b"dismissed";

/// Options of the hidden verb that is the guard.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// QEMU's monitor
    #[arg(long, value_name = "SOCKET")]
    pub monitor: PathBuf,
    /// The guest's agent
    #[arg(long, value_name = "SOCKET")]
    pub agent: Option<PathBuf>,
    /// Folder of the export's socket
    #[arg(long, value_name = "DIR")]
    pub runtime: PathBuf,
    /// Folder of the scratch files
    #[arg(long, value_name = "DIR")]
    pub scratch: PathBuf,
}

/// A guard that was posted.
#[derive(Debug)]
pub(super) struct Guard {
    child: Child,
    line: Option<ChildStdin>,
}

impl Guard {
    /// Posts one; `program` is this program.
    pub(super) fn start(program: &Path, sockets: &Sockets) -> Result<Self> {
        let mut command = Command::new(program);
        command.arg("guard").arg("--monitor").arg(&sockets.monitor);
        if let Some(agent) = &sockets.agent {
            command.arg("--agent").arg(agent);
        }
        command.arg("--runtime").arg(&sockets.runtime).arg("--scratch").arg(&sockets.scratch);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        // What a terminal sends to our group must not end it.
        command.process_group(0);
        let mut child = command.spawn().map_err(|e| Fail::io(program.display(), "start", &e))?;
        let line = child.stdin.take();
        Ok(Self { child, line })
    }

    /// Sends it home.
    pub(super) fn dismiss(mut self) {
        if let Some(mut line) = self.line.take() {
            let _ = line.write_all(DISMISSED);
        }
        let _ = self.child.wait();
    }
}

/// The guard's own work: waits for the end of whoever posted it.
///
/// # Errors
/// What was left cannot be taken down.
pub fn stand(args: &Args) -> Result<()> {
    // A signal to everybody is not for the guard: it is needed then.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGINT, std::sync::Arc::default());
    let _ = signal_hook::flag::register(signal_hook::consts::SIGTERM, std::sync::Arc::default());
    let mut said = Vec::new();
    // A line that breaks is the same as one that ends.
    let _ = std::io::stdin().read_to_end(&mut said);
    if said == DISMISSED {
        return Ok(());
    }
    let sockets = Sockets {
        monitor: args.monitor.clone(),
        agent: args.agent.clone(),
        runtime: args.runtime.clone(),
        scratch: args.scratch.clone(),
    };
    thread::scope(|scope| {
        if let Some(agent) = &sockets.agent {
            // Without an answer there is nobody to be thawed. An answer may take long, and what is to be taken down
            // must not wait for it.
            scope.spawn(|| drop(agent::thaw(agent)));
        }
        // Where the next backup was faster, it has swept already.
        match fleece::claim(&sockets) {
            Ok(_) => Ok(()),
            Err(fail) if fail.code == Code::Busy => Ok(()),
            Err(fail) => Err(fail),
        }
    })
}
