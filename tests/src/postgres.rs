//! A private PostgreSQL for tests: its own cluster in a temporary folder, on a socket in that folder, under a user
//! without privileges, gone with the process that started it.
//!
//! Invariants
//! - One cluster for a test process, one database for each test that asks.
//! - The server ends when the test process does, however that ends: it lives as long as a pipe is open.
//! - No port, no network: nothing collides with a PostgreSQL that runs on the machine.

use std::{
    fs,
    os::unix::{fs::chown, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aquifer_runner::catalogue::Url;

/// Longest wait for a server that starts on a loaded machine.
const START: Duration = Duration::from_secs(60);

struct Cluster {
    dir: PathBuf,
    programs: PathBuf,
    user: Option<(u32, u32)>,
    // Its standard input is the pipe that keeps the server.
    _keeper: Child,
}

/// The folder with `initdb` and `postgres`, if PostgreSQL is installed.
fn programs() -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .filter(|bin| bin.join("initdb").is_file())
        .collect();
    found.sort();
    found.pop()
}

/// PostgreSQL refuses to run as root: then it runs as `postgres`, else as we are.
fn unprivileged() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|l| l.starts_with("postgres:")).expect("the user postgres of Debian's package");
    let fields: Vec<&str> = line.split(':').collect();
    Some((fields[2].parse().unwrap(), fields[3].parse().unwrap()))
}

impl Cluster {
    fn start() -> Self {
        let programs = programs().expect("PostgreSQL is not installed: scripts/setup.sh installs it");
        let dir = tempfile::Builder::new().prefix("aquifer-pg-").tempdir_in("/tmp").unwrap().keep();
        let user = unprivileged();
        if let Some((uid, gid)) = user {
            chown(&dir, Some(uid), Some(gid)).unwrap();
        }
        let mut initdb = as_user(Command::new(programs.join("initdb")), user);
        initdb.arg("-D").arg(dir.join("data")).args([
            "-U",
            "aquifer",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
            "--locale=C",
        ]);
        let made = initdb.stdin(Stdio::null()).output().unwrap();
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        // Whoever ends us closes the pipe: the shell then stops the server and takes the folder away.
        let script = r#""$1/postgres" -D "$2/data" -k "$2" -c listen_addresses= -c max_connections=80 \
            -c fsync=off -c shared_buffers=16MB -c log_min_messages=warning 2>"$2/log" & server=$!
            cat >/dev/null; kill -QUIT $server 2>/dev/null; wait $server 2>/dev/null; rm -rf "$2""#;
        let mut keeper = as_user(Command::new("/bin/sh"), user);
        keeper.args(["-c", script, "keeper"]).arg(&programs).arg(&dir).process_group(0);
        let keeper = keeper.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let cluster = Self { dir, programs, user, _keeper: keeper };
        cluster.wait();
        cluster
    }

    fn psql(&self, database: &str, sql: &str) -> Result<String, String> {
        let mut psql = as_user(Command::new(self.programs.join("psql")), self.user);
        psql.arg("-h").arg(&self.dir).args(["-U", "aquifer", "-d", database, "-X", "-A", "-t", "-q", "-c", sql]);
        let told = psql.stdin(Stdio::null()).output().unwrap();
        if told.status.success() {
            return Ok(String::from_utf8_lossy(&told.stdout).trim().to_owned());
        }
        Err(String::from_utf8_lossy(&told.stderr).into_owned())
    }

    fn wait(&self) {
        let until = Instant::now() + START;
        while let Err(said) = self.psql("postgres", "SELECT 1") {
            let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            assert!(Instant::now() < until, "PostgreSQL does not start: {said}\n{log}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn as_user(mut command: Command, user: Option<(u32, u32)>) -> Command {
    if let Some((uid, gid)) = user {
        command.uid(uid).gid(gid);
    }
    command.current_dir("/").env("LC_ALL", "C");
    command
}

fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(Cluster::start)
}

/// Whether the tests that can have their catalogue in either are to have it in PostgreSQL: `AQUIFER_TEST_CATALOGUE` says
/// `postgres`.
///
/// # Panics
/// It says something else than that or `sqlite`.
#[must_use]
pub fn wanted() -> bool {
    match std::env::var("AQUIFER_TEST_CATALOGUE").as_deref() {
        Ok("postgres") => true,
        Ok("sqlite") | Err(_) => false,
        Ok(other) => panic!("AQUIFER_TEST_CATALOGUE is `{other}`, and neither sqlite nor postgres"),
    }
}

fn next_name() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    format!("site_{}", NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// A database of its own, empty.
#[derive(Clone, Debug)]
pub struct Database {
    name: String,
}

impl Database {
    /// Makes one; starts the server for the first.
    #[must_use]
    pub fn make() -> Self {
        let name = next_name();
        cluster().psql("postgres", &format!("CREATE DATABASE {name}")).unwrap();
        Self { name }
    }

    /// Another one with what this one holds. Nobody may be connected to this one.
    #[must_use]
    pub fn copy(&self) -> Self {
        let name = next_name();
        let order = format!("CREATE DATABASE {name} TEMPLATE {}", self.name);
        let until = Instant::now() + START;
        // Whoever has just ended may still be seen as connected.
        while let Err(said) = cluster().psql("postgres", &order) {
            assert!(Instant::now() < until, "{said}");
            thread::sleep(Duration::from_millis(50));
        }
        Self { name }
    }

    /// Where a catalogue finds it.
    #[must_use]
    pub fn url(&self) -> Url {
        format!("postgres://aquifer@localhost/{}?host={}", self.name, socket_dir().display()).parse().unwrap()
    }

    /// What one statement answers, columns by `|`.
    #[must_use]
    pub fn sql(&self, statement: &str) -> String {
        cluster().psql(&self.name, statement).unwrap()
    }
}

/// The folder of the server's socket.
fn socket_dir() -> &'static Path {
    &cluster().dir
}
