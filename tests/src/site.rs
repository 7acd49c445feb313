//! A user's machine for a test: its own state folder and repository, the program, and an end to everything it started.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::program::aquifer;

/// How long anything may take before a test gives up on it.
pub const SOON: Duration = Duration::from_secs(60);

/// What a command said and how it ended.
#[derive(Debug)]
pub struct Said {
    /// Its exit code.
    pub code: i32,
    /// Its stdout.
    pub out: String,
    /// Its stderr.
    pub err: String,
}

impl Said {
    /// The records of `--json` of one type.
    pub fn records(&self, kind: &str) -> Vec<Value> {
        let all = self.out.lines().map(|line| serde_json::from_str::<Value>(line).expect("a JSON line"));
        all.filter(|record| record["type"] == kind).collect()
    }

    /// The only record of that type.
    pub fn record(&self, kind: &str) -> Value {
        let found = self.records(kind);
        assert_eq!(found.len(), 1, "{kind} in {self:#?}");
        found[0].clone()
    }
}

/// The machine.
#[derive(Debug)]
pub struct Site {
    dir: tempfile::TempDir,
}

impl Default for Site {
    fn default() -> Self {
        Self::new()
    }
}

impl Site {
    /// An empty one.
    pub fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("aq").tempdir().expect("folder") }
    }

    /// A path on it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path on it, as text.
    pub fn word(&self, name: &str) -> String {
        self.path(name).to_str().expect("text").to_owned()
    }

    /// The program, with this machine's environment and nothing else of ours.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(aquifer());
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("AQUIFER_HOME", self.path("home")).env("AQUIFER_REPO", self.path("repo"));
        command.env("XDG_RUNTIME_DIR", self.path("runtime"));
        command
    }

    /// Runs it to its end.
    pub fn run(&self, args: &[&str]) -> Said {
        let output = self.command(args).output().expect("aquifer starts");
        Said {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Runs it with `--json`, and it succeeds.
    pub fn json(&self, args: &[&str]) -> Said {
        let said = self.run(&[&["--json"], args].concat());
        assert_eq!(said.code, 0, "aquifer {args:?}: {said:#?}");
        said
    }

    /// How a session stands.
    pub fn session(&self, name: &str) -> Value {
        self.json(&["status", name]).record("session")
    }

    /// Every session that the machine knows.
    pub fn sessions(&self) -> Vec<Value> {
        self.json(&["status"]).records("session")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let records = fs::read_dir(self.path("home/sessions")).into_iter().flatten().flatten();
        for pointer in records.filter_map(|entry| fs::read_to_string(entry.path()).ok()) {
            let pointer: Value = serde_json::from_str(&pointer).unwrap_or_default();
            if let Some(dir) = pointer["dir"].as_str() {
                let _ = self.command(&["finalize", dir, "--discard", "--yes"]).output();
            }
        }
        // A machine that was kept, or whose discarding failed: only one whose command line names this very folder.
        let ours = self.dir.path().to_string_lossy().into_owned();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).into_owned();
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if let (true, Some(pid)) = (command.contains(&ours), pid.and_then(rustix::process::Pid::from_raw)) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

/// Looks again and again until there is something to see.
///
/// # Panics
/// Nothing came to be seen.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A boot-sector guest, seen through its console.
#[derive(Debug)]
pub struct Guest {
    log: PathBuf,
    console: PathBuf,
}

impl Guest {
    /// The guest of a session's record.
    pub fn of(session: &Value) -> Self {
        let dir = session["dir"].as_str().expect("a folder");
        let console = session["machine"]["console"].as_str().expect("a console");
        Self { log: Path::new(dir).join("console.log"), console: console.into() }
    }

    /// What it said about sectors since it first started.
    pub fn seen(&self) -> String {
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        said.split("READY").skip(1).collect()
    }

    /// How often it has started.
    pub fn starts(&self) -> usize {
        fs::read_to_string(&self.log).unwrap_or_default().matches("READY").count()
    }

    /// Waits until it has gone through `more` further sectors, all of them right.
    pub fn goes_on(&self, more: usize) {
        let before = self.seen().matches('.').count();
        eventually("the guest goes on", || (self.seen().matches('.').count() >= before + more).then_some(()));
        let seen = self.seen();
        assert!(!seen.contains(['X', 'E']), "the guest saw wrong bytes or an error: {seen}");
    }

    /// Waits until it has gone through all its sectors since now.
    pub fn whole_round(&self) {
        self.goes_on(crate::boot_sector::SECTORS as usize + 1);
    }

    /// Turns it off from inside.
    pub fn turn_off(&self) {
        use std::io::Write;
        let mut console = std::os::unix::net::UnixStream::connect(&self.console).expect("console");
        console.write_all(b"q").expect("type");
        // The connection stays until the guest has taken the letter.
        eventually("the guest takes leave", || self.seen().contains('Q').then_some(()));
    }
}
