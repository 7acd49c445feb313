//! Where things are: repository, site file, state folder, runtime folder.
//!
//! Invariants
//! - Flags > environment > site file > systemd's or XDG's directories > default.
//! - The only module that reads the environment. It works with an empty one.
//!
//! Not here: reading what lies there.

mod catalogue;

use std::{
    env,
    ffi::OsString,
    fs,
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, OnceLock},
};

use aquifer_vdisk::BlockCache;

use crate::{
    cli::Globals,
    fail::{Code, Fail, Result},
    output::{Form, Output, Typed, is_obeyed},
    site::{Secret, Site},
    stop::Stop,
    units,
};

/// What a verb is given.
#[derive(Debug)]
pub struct Context {
    /// Options of every verb.
    pub globals: Globals,
    /// Where to print.
    pub out: Output,
    site: OnceLock<Site>,
    cache: OnceLock<Arc<BlockCache>>,
}

/// A private folder of this process.
#[derive(Debug)]
pub struct Scratch {
    /// Where it is.
    pub path: PathBuf,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed now is removed with the other temporary files.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Decoded blocks kept in memory where nothing else is said, bytes.
const CACHE_BYTES: u64 = 256 << 20;

impl Context {
    /// The context of one command line.
    pub fn new(globals: Globals, verb: &'static str) -> Self {
        let form = if globals.json { Form::Json } else { Form::Human };
        let out = Output::new(form, verb).quiet(globals.quiet).answering(typed(&globals));
        Self { globals, out, site: OnceLock::new(), cache: OnceLock::new() }
    }

    /// Takes over the signals, for verbs that work for long.
    pub fn stop(&self) -> Result<Stop> {
        Stop::listen().map_err(|e| Fail::io("signals", "take over", &e))
    }

    /// The site file that applies, read once; an empty one where there is none.
    ///
    /// # Errors
    /// [`Code::Config`]; [`Code::NotFound`] for a named file that is not there.
    pub fn site(&self) -> Result<&Site> {
        if let Some(site) = self.site.get() {
            return Ok(site);
        }
        let site = self.config_path().map_or(Ok(Site::default()), |path| Site::read(&path))?;
        Ok(self.site.get_or_init(|| site))
    }

    /// The folder of the repository: `-r` (a folder, or a name of the site file), then AQUIFER_REPO,
    /// then the site file's own.
    ///
    /// # Errors
    /// [`Code::NoRepository`] where none was named.
    pub fn repo_dir(&self) -> Result<PathBuf> {
        let (dir, _) = self.repo_dir_and_origin()?;
        dir.ok_or_else(|| Fail::new(Code::NoRepository, "no repository was named").help("aquifer -r DIR init"))
    }

    fn repo_dir_and_origin(&self) -> Result<(Option<PathBuf>, &'static str)> {
        let flag = self.globals.repo.clone().map(|repo| (repo, "flag"));
        let named = flag.or_else(|| path_variable("AQUIFER_REPO").map(|repo| (repo, "environment")));
        let site = self.site()?;
        Ok(match named {
            Some((repo, origin)) => {
                let entry = repo.to_str().and_then(|name| site.repositories.get(name));
                (Some(entry.map_or(repo, |e| e.url.clone())), origin)
            }
            None => (site.default_repository().map(|r| r.url.clone()), "site file"),
        })
    }

    /// The cache of decoded blocks, one for the process.
    pub fn cache(&self) -> Result<Arc<BlockCache>> {
        let bytes = self.cache_bytes()?;
        Ok(self.cache.get_or_init(|| Arc::new(BlockCache::new(bytes))).clone())
    }

    /// Budget of decoded blocks in memory, bytes.
    pub fn cache_bytes(&self) -> Result<u64> {
        Ok(self.site()?.cache.unwrap_or(CACHE_BYTES))
    }

    /// The folder for state.
    ///
    /// # Errors
    /// [`Code::NotFound`] where neither a flag nor the environment names one.
    pub fn home(&self) -> Result<PathBuf> {
        let (home, _) = self.home_and_origin()?;
        let missing =
            || Fail::new(Code::NotFound, "no folder for state: HOME is not set").help("export AQUIFER_HOME=DIR");
        home.ok_or_else(missing)
    }

    fn home_and_origin(&self) -> Result<(Option<PathBuf>, &'static str)> {
        let flag = self.globals.home.clone().map(|home| (home, "flag"));
        let named = flag.or_else(|| path_variable("AQUIFER_HOME").map(|home| (home, "environment")));
        let named = match named {
            Some(found) => Some(found),
            None => self.site()?.home.clone().map(|home| (home, "site file")),
        };
        let named = named.or_else(|| first_of(path_variable("STATE_DIRECTORY")).map(|home| (home, "systemd")));
        if let Some((home, origin)) = named {
            return Ok((Some(home), origin));
        }
        if rustix::process::geteuid().is_root() {
            return Ok((Some("/var/lib/aquifer".into()), "default"));
        }
        let state = path_variable("XDG_STATE_HOME").or_else(|| path_variable("HOME").map(|h| h.join(".local/state")));
        Ok((state.map(|dir| dir.join("aquifer")), "XDG"))
    }

    /// Every setting that applies: key, value, where it came from.
    pub fn settings(&self) -> Result<Vec<(String, Option<String>, &'static str)>> {
        let text = |path: PathBuf| path.display().to_string();
        let (repo, repo_origin) = self.repo_dir_and_origin()?;
        let (home, home_origin) = self.home_and_origin()?;
        let cache = self.site()?.cache;
        let cache_origin = if cache.is_some() { "site file" } else { "default" };
        let config_origin = match (&self.globals.config, path_variable("AQUIFER_CONFIG")) {
            (Some(_), _) => "flag",
            (None, Some(_)) => "environment",
            (None, None) => "default",
        };
        let mut settings = vec![
            ("config".to_owned(), self.config_path().map(text), config_origin),
            ("repository".to_owned(), repo.map(text), repo_origin),
            ("home".to_owned(), home.map(text), home_origin),
            ("runtime".to_owned(), Some(text(self.runtime_dir()?)), "default"),
            ("cache".to_owned(), Some(units::bytes(cache.unwrap_or(CACHE_BYTES))), cache_origin),
        ];
        for (name, entry) in &self.site()?.repositories {
            settings.push((format!("repository.{name}"), Some(text(entry.url.clone())), "site file"));
        }
        Ok(settings)
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

    /// A private folder that is gone when it is dropped.
    ///
    /// # Errors
    /// I/O.
    pub fn scratch_dir(&self) -> Result<Scratch> {
        let path = env::temp_dir().join(format!("aquifer-{}", uuid::Uuid::new_v4().simple()));
        let made = std::os::unix::fs::DirBuilderExt::mode(&mut fs::DirBuilder::new(), 0o700).create(&path);
        made.map_err(|e| Fail::io(path.display(), "create", &e))?;
        Ok(Scratch { path })
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

    /// The catalogue's URL, its password not in it; SQLite in the folder for state where the site file names none.
    pub fn catalogue_url(&self) -> Result<String> {
        if let Some(entry) = &self.site()?.catalogue {
            return Ok(entry.url.clone());
        }
        Ok(format!("sqlite:{}", self.home()?.join("catalogue.db").display()))
    }

    /// What a secret of the site file is. One newline at its end is not part of it; nothing else is interpreted.
    ///
    /// # Errors
    /// [`Code::Key`] where it is not there.
    pub fn reveal(&self, secret: &Secret) -> Result<Vec<u8>> {
        let missing = |what: String| Fail::new(Code::Key, what);
        let mut bytes = match secret {
            Secret::Credential(name) => {
                let dir = path_variable("CREDENTIALS_DIRECTORY");
                let dir =
                    dir.ok_or_else(|| missing(format!("there is no systemd credential `{name}`: none were passed")))?;
                let path = dir.join(name);
                fs::read(&path).map_err(|e| missing(format!("the credential `{name}` cannot be read")).cause(e))?
            }
            Secret::File(path) => private(path)?,
            Secret::Command(command) => {
                let output = Command::new("/bin/sh").arg("-c").arg(command).stdin(Stdio::null()).output();
                let output =
                    output.map_err(|e| missing("the command of a secret cannot be started".to_owned()).cause(e))?;
                if !output.status.success() {
                    return Err(missing(format!("the command of a secret failed ({})", output.status)));
                }
                output.stdout
            }
            Secret::Env(name) => {
                let value = env::var_os(name);
                let value = value.ok_or_else(|| missing(format!("the variable {name} of a secret is not set")))?;
                value.into_encoded_bytes()
            }
        };
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        Ok(bytes)
    }

    /// Whether a secret could be revealed from here. Its command is not run, and nothing of it is kept.
    ///
    /// # Errors
    /// As [`Context::reveal`].
    pub fn check_secret(&self, secret: &Secret) -> Result<()> {
        match secret {
            Secret::Command(_) => Ok(()),
            Secret::Credential(_) | Secret::File(_) | Secret::Env(_) => self.reveal(secret).map(drop),
        }
    }

    /// Our own program and arguments, to start the same command once more.
    pub fn own_command(&self) -> Result<(PathBuf, Vec<OsString>)> {
        let program = env::current_exe().map_err(|e| Fail::io("/proc/self/exe", "find", &e))?;
        Ok((program, env::args_os().skip(1).collect()))
    }

    /// A program in PATH, or in the usual places when there is no PATH.
    pub fn find_program(&self, name: &str) -> Option<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin".into());
        env::split_paths(&path).map(|dir| dir.join(name)).find(|candidate| is_executable(candidate))
    }
}

/// The command line of this process, for commands that are advised.
fn typed(globals: &Globals) -> Typed {
    let mut program = String::from("aquifer");
    let named = [("-r", &globals.repo), ("-c", &globals.config), ("--home", &globals.home)];
    for (option, value) in named.iter().filter_map(|(option, value)| value.as_ref().map(|value| (option, value))) {
        program.push_str(&format!(" {option} {}", quoted(&value.to_string_lossy())));
    }
    // Whoever was asked to serve in the background did not type that.
    let words = env::args_os().skip(1).filter(|word| word != "--in-background");
    let line = words.fold(String::from("aquifer"), |line, word| line + " " + &quoted(&word.to_string_lossy()));
    Typed { program, line }
}

/// Permissions of the group and of others.
const NOT_THE_OWNER: u32 = 0o077;

/// A secret's file, read only where nobody else can read it.
fn private(path: &Path) -> Result<Vec<u8>> {
    let unread = |e: io::Error| {
        Fail::new(Code::Key, "the file of a secret cannot be read".to_owned()).at(path.display()).cause(e)
    };
    let mut file = fs::File::open(path).map_err(unread)?;
    let mode = file.metadata().map_err(unread)?.permissions().mode() & 0o7777;
    if mode & NOT_THE_OWNER != 0 {
        let what = format!(
            "{} holds a secret and is open to others than its owner (mode {mode:04o}); it was not read",
            path.display()
        );
        let close = format!("chmod 600 {}", quoted(&path.display().to_string()));
        return Err(Fail::new(Code::Key, what).at(path.display()).help(close));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(unread)?;
    Ok(bytes)
}

/// A word as a shell takes it.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,~".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    if !word.contains(is_obeyed) {
        return format!("'{}'", word.replace('\'', "'\\''"));
    }
    let mut out = String::from("$'");
    for c in word.chars() {
        match c {
            '\'' | '\\' => out.extend(['\\', c]),
            _ if is_obeyed(c) => {
                let mut bytes = [0; 4];
                c.encode_utf8(&mut bytes).bytes().for_each(|byte| out.push_str(&format!("\\x{byte:02x}")));
            }
            _ => out.push(c),
        }
    }
    out + "'"
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
