//! Runs the binary in a clean room: empty environment, no terminal, private folders.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::OnceLock,
};

use aquifer_runner::catalogue::{Catalogue, Url};
use serde_json::Value;
use tempfile::TempDir;

use crate::postgres::{Database, wanted};

/// The binary under test.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_aquifer");

/// A private folder, with a repository place and a home inside.
pub(crate) struct Room {
    pub(crate) dir: TempDir,
    /// Of the catalogue, where that lies in PostgreSQL.
    database: OnceLock<Database>,
}

/// How a command ended.
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Room {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("aqcli").tempdir().expect("a folder"), database: OnceLock::new() }
    }

    /// Writes the site file; its catalogue lies where the environment of the tests says.
    pub(crate) fn write_site(&self, text: &str) {
        let mut text = text.to_owned();
        if wanted() {
            let url = self.catalogue_url();
            text = text.replacen("version = 1\n", &format!("version = 1\ncatalogue = {{ url = \"{url}\" }}\n"), 1);
        }
        fs::write(self.path("site.toml"), text).expect("a site file");
    }

    /// Where the catalogue of the site lies.
    pub(crate) fn catalogue_url(&self) -> Url {
        if wanted() {
            return self.database.get_or_init(Database::make).url();
        }
        Url::Sqlite(self.path("home/catalogue.db"))
    }

    /// The catalogue of the site.
    pub(crate) fn catalogue(&self) -> Catalogue {
        Catalogue::open(&self.catalogue_url()).expect("the catalogue")
    }

    /// Whether nobody made a catalogue; of a database that was there before that is not asked.
    pub(crate) fn has_no_catalogue(&self) -> bool {
        wanted() || !self.path("home/catalogue.db").exists()
    }

    /// A site file of whoever has the state folder `home`, a copy of ours, with a copy of our catalogue. Kept as long as
    /// the database.
    pub(crate) fn site_of_copy(&self, home: &str) -> (String, Option<Database>) {
        let Some(ours) = self.database.get() else { return (self.text("site.toml"), None) };
        let theirs = ours.copy();
        let text = fs::read_to_string(self.path("site.toml")).expect("the site file");
        let text = text.replace(&ours.url().to_string(), &theirs.url().to_string());
        let file = self.text(&format!("{home}.toml"));
        fs::write(&file, text).expect("a site file");
        (file, Some(theirs))
    }

    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("utf-8").to_owned()
    }

    pub(crate) fn repo(&self) -> PathBuf {
        self.path("repo")
    }

    /// The command, ready to run: no environment but PATH, a private home, no stdin.
    pub(crate) fn command(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = Command::new(BINARY);
        command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin");
        command.env("AQUIFER_HOME", self.path("home")).env("XDG_RUNTIME_DIR", self.dir.path());
        command.env("AQUIFER_REPO", self.repo()).env("TMPDIR", self.dir.path());
        command.current_dir(self.dir.path()).stdin(Stdio::null()).args(args);
        command
    }

    pub(crate) fn run(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Outcome {
        Outcome::of(self.command(args).output().expect("the binary runs"))
    }

    /// The same with `--json` added.
    pub(crate) fn json(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Outcome {
        let outcome = Outcome::of(self.command(args).arg("--json").output().expect("the binary runs"));
        outcome.records();
        outcome
    }

    /// Runs and expects success.
    pub(crate) fn ok(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Outcome {
        let outcome = self.run(args);
        assert_eq!(outcome.code, 0, "stdout: {}\nstderr: {}", outcome.stdout, outcome.stderr);
        outcome
    }
}

impl Outcome {
    pub(crate) fn of(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).expect("utf-8"),
            stderr: String::from_utf8(output.stderr).expect("utf-8"),
        }
    }

    /// Every line of stdout as JSON, checked against the contract.
    pub(crate) fn records(&self) -> Vec<Value> {
        let parse = |line: &str| serde_json::from_str::<Value>(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let records: Vec<Value> = self.stdout.lines().map(parse).collect();
        let schema = records.first().and_then(|r| r["schema"].as_str()).unwrap_or_default().to_owned();
        assert!(schema.starts_with("aquifer.") && schema.ends_with("/1"), "schema {schema:?} in {}", self.stdout);
        for (index, record) in records.iter().enumerate() {
            assert_eq!(record["schema"], schema, "{}", self.stdout);
            let kind = record["type"].as_str().expect("a type");
            let ends = kind == "done" || kind == "error";
            assert_eq!(ends, index + 1 == records.len(), "{kind} in line {index} of {}", self.stdout);
        }
        let last = records.last().expect("a last line");
        assert_eq!(last["exit"], self.code, "{}", self.stdout);
        if last["type"] == "error" {
            let code = last["code"].as_str().expect("a code");
            assert!(code.starts_with("E_") && last["what"].is_string() && last["retryable"].is_boolean());
        }
        records
    }

    /// The records of one kind.
    pub(crate) fn kind(&self, kind: &str) -> Vec<Value> {
        self.records().into_iter().filter(|r| r["type"] == kind).collect()
    }

    /// The one record of a kind.
    pub(crate) fn one(&self, kind: &str) -> Value {
        let mut found = self.kind(kind);
        assert_eq!(found.len(), 1, "{kind} in {}", self.stdout);
        found.remove(0)
    }
}
