//! Where things are: repository, site file, state folder, runtime folder.
//!
//! Invariants
//! - Flags > environment > site file > systemd's or XDG's directories > default.
//! - The only module that reads the environment. It works with an empty one.
//!
//! Not here: reading what lies there.

use std::{
    env,
    path::{Path, PathBuf},
};

use crate::{
    cli::Globals,
    fail::{Code, Fail, Result},
    output::{Form, Output},
    stop::Stop,
};

/// What a verb is given.
#[derive(Debug)]
pub struct Context {
    /// Options of every verb.
    pub globals: Globals,
    /// Where to print.
    pub out: Output,
}

impl Context {
    /// The context of one command line.
    pub fn new(globals: Globals, verb: &'static str) -> Self {
        let form = if globals.json { Form::Json } else { Form::Human };
        let out = Output::new(form, verb).quiet(globals.quiet);
        Self { globals, out }
    }

    /// Takes over the signals, for verbs that work for long.
    pub fn stop(&self) -> Result<Stop> {
        Stop::listen().map_err(|e| Fail::io("signals", "take over", &e))
    }

    /// The folder of the repository: `-r`, then AQUIFER_REPO.
    ///
    /// # Errors
    /// [`Code::NoRepository`] where none was named.
    pub fn repo_dir(&self) -> Result<PathBuf> {
        let named = self.globals.repo.clone().or_else(|| path_variable("AQUIFER_REPO"));
        named.ok_or_else(|| Fail::new(Code::NoRepository, "no repository was named").help("aquifer -r DIR init"))
    }

    /// The folder for state.
    ///
    /// # Errors
    /// [`Code::NotFound`] where neither a flag nor the environment names one.
    pub fn home(&self) -> Result<PathBuf> {
        let named = self.globals.home.clone().or_else(|| path_variable("AQUIFER_HOME"));
        let named = named.or_else(|| first_of(path_variable("STATE_DIRECTORY")));
        if let Some(home) = named {
            return Ok(home);
        }
        if rustix::process::geteuid().is_root() {
            return Ok("/var/lib/aquifer".into());
        }
        let state = path_variable("XDG_STATE_HOME").or_else(|| path_variable("HOME").map(|h| h.join(".local/state")));
        let missing =
            || Fail::new(Code::NotFound, "no folder for state: HOME is not set").help("export AQUIFER_HOME=DIR");
        Ok(state.ok_or_else(missing)?.join("aquifer"))
    }

    /// The folder for sockets: gone after a reboot, private to the user.
    pub fn runtime_dir(&self) -> Result<PathBuf> {
        if let Some(dir) = first_of(path_variable("RUNTIME_DIRECTORY")) {
            return Ok(dir);
        }
        if let Some(dir) = path_variable("XDG_RUNTIME_DIR") {
            return Ok(dir.join("aquifer"));
        }
        if rustix::process::geteuid().is_root() {
            return Ok("/run/aquifer".into());
        }
        Ok(self.home()?.join("run"))
    }

    /// The site file that applies, if there is one.
    pub fn config_path(&self) -> Option<PathBuf> {
        let named = self.globals.config.clone().or_else(|| path_variable("AQUIFER_CONFIG"));
        named.or_else(|| {
            let own = path_variable("XDG_CONFIG_HOME").or_else(|| path_variable("HOME").map(|h| h.join(".config")));
            let own = own.map(|dir| dir.join("aquifer/aquifer.toml"));
            let candidates = own.into_iter().chain([PathBuf::from("/etc/aquifer/aquifer.toml")]);
            candidates.into_iter().find(|path| path.is_file())
        })
    }

    /// A program in PATH, or in the usual places when there is no PATH.
    pub fn find_program(&self, name: &str) -> Option<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin".into());
        env::split_paths(&path).map(|dir| dir.join(name)).find(|candidate| is_executable(candidate))
    }
}

/// Whether colour is not refused by `NO_COLOR`.
pub(crate) fn no_color_is_unset() -> bool {
    env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

fn path_variable(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// systemd separates several directories by colons; ours is the first.
fn first_of(path: Option<PathBuf>) -> Option<PathBuf> {
    let path = path?;
    match path.to_str() {
        Some(text) => text.split(':').next().map(PathBuf::from),
        None => Some(path),
    }
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}
