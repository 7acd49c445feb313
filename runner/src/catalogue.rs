//! The catalogue: what the controllers and workers of a site know together. Sessions, events, the queue of work
//! with its leases and slots, replicas, operations, jobs, runs of plans.
//!
//! Invariants
//! - One SQL text for SQLite and PostgreSQL. Every change is one transaction; nothing is held while work is done.
//! - A durable effect of a piece of work carries its [`Fence`]. The transaction that makes the effect checks it and
//!   locks the row of the work, so that a takeover comes wholly before or wholly after. A stale fence changes nothing.
//! - Leases run on the database's clock where several machines share it, so clocks that disagree take nothing over.
//! - Every transition writes its [`Event`] in the transaction that makes it. Event numbers are taken last and in the
//!   order of commits: whoever has seen number n has seen everything below it.
//! - SQLite: WAL with `synchronous = FULL`: what was answered survives the loss of power.
//! - A database that is damaged, not ours or newer than this build is refused with one error, and not changed.
//!
//! Not here: what work means (`work`, `job`), when it is due (`schedule`), the bytes of restore points.

mod error;
mod event;
mod held;
mod job;
mod migrate;
mod operation;
mod plan_run;
mod queue;
mod replica;
mod session;
mod slot;
mod transaction;
mod url;
mod work;

use std::{
    fmt, fs, io,
    sync::{Arc, Once},
    time::Duration,
};

use sqlx::{
    AnyConnection, AnyPool, Connection, Executor,
    any::{AnyConnectOptions, AnyPoolOptions, install_default_drivers},
};
use tokio::runtime::{Builder, Runtime};

pub use error::{Error, Result};
pub use event::{Event, EventFilter, EventRecord};
pub use job::{JobState, NewRun, Trigger};
pub use operation::{End, Operation, OperationId};
pub use plan_run::PlanRun;
pub use queue::{Asked, Fence, Left, Outcome, Progress};
pub use replica::{Change, PointRow, Stored};
pub use session::{NewSession, Session, SessionFilter, SessionId, SessionResult, SessionState, Wish};
pub use slot::Need;
use transaction::{Fault, Tx};
pub use url::Url;
pub use work::{NewWork, Retries, Work, WorkId, WorkState};

/// How long a worker may be silent before its work is given to another.
pub const LEASE: Duration = Duration::from_secs(30);

/// Header of an SQLite file, bytes.
const HEADER: u64 = 100;
/// A page of the SQLite files we make, bytes.
const PAGE: u64 = 4096;
/// A new SQLite file that somebody else is making is asked for so often.
const OPENINGS_MAX: u32 = 250;
/// A conflict between transactions of PostgreSQL is tried again so often.
const CONFLICTS_MAX: u32 = 8;

/// A handle to the catalogue: cheap to clone, thread-safe, every call blocks until it is durable.
#[derive(Clone)]
pub struct Catalogue {
    inner: Arc<Inner>,
}

struct Inner {
    runtime: Runtime,
    /// For looks.
    pool: AnyPool,
    /// For changes. SQLite has one writer at a time anyway: one connection lets ours queue up instead of running into
    /// each other, and the log's name in its folder is made durable once, not by each connection that writes.
    writer: AnyPool,
    url: Url,
    lease: Duration,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.runtime.block_on(async {
            self.pool.close().await;
            self.writer.close().await;
        });
    }
}

impl fmt::Debug for Catalogue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Catalogue").field("url", &self.inner.url).field("lease", &self.inner.lease).finish()
    }
}

impl Catalogue {
    /// Opens the catalogue and brings it to this build's form; makes it where there is none.
    ///
    /// # Errors
    /// [`Error::Foreign`], [`Error::TooNew`], [`Error::Damaged`], [`Error::Unreachable`], [`Error::Access`].
    pub fn open(url: &Url) -> Result<Self> {
        Self::open_with_lease(url, LEASE)
    }

    /// The same, with another length of the leases that this handle takes.
    ///
    /// # Errors
    /// Like [`Catalogue::open`].
    pub fn open_with_lease(url: &Url, lease: Duration) -> Result<Self> {
        static DRIVERS: Once = Once::new();
        DRIVERS.call_once(install_default_drivers);
        if let Url::Sqlite(path) = url {
            prepare_file(path)?;
        }
        let failed = |source| Error::Io { path: url.to_string(), action: "start threads for", source };
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("catalogue")
            .enable_all()
            .build()
            .map_err(failed)?;
        let (pool, writer) = runtime.block_on(connect(url)).map_err(|fault| fault.said(url, "open"))?;
        let catalogue = Self { inner: Arc::new(Inner { runtime, pool, writer, url: url.clone(), lease }) };
        catalogue.migrate()?;
        Ok(catalogue)
    }

    /// Where it lies; shown without its password.
    pub fn url(&self) -> &Url {
        &self.inner.url
    }

    /// How long the leases of this handle last without a sign of life.
    pub fn lease(&self) -> Duration {
        self.inner.lease
    }

    /// One transaction that changes something, tried again where the database asks for that.
    fn write<T>(&self, action: &'static str, body: impl AsyncFn(&mut Tx) -> Result<T, Fault>) -> Result<T> {
        let mut tries = 0;
        self.inner.runtime.block_on(async {
            loop {
                match self.attempt(&body).await {
                    Err(fault) if fault.is_conflict() && tries < CONFLICTS_MAX => {
                        tries += 1;
                        tokio::time::sleep(Duration::from_millis(5 << tries)).await;
                    }
                    outcome => return outcome.map_err(|fault| fault.said(&self.inner.url, action)),
                }
            }
        })
    }

    async fn attempt<T>(&self, body: impl AsyncFn(&mut Tx) -> Result<T, Fault>) -> Result<T, Fault> {
        let mut tx = Tx::begin(&self.inner.writer, &self.inner.url, self.inner.lease).await?;
        let answer = body(&mut tx).await?;
        tx.commit().await?;
        Ok(answer)
    }

    /// One look at the catalogue.
    fn read<T>(&self, action: &'static str, body: impl AsyncFn(&AnyPool) -> Result<T, Fault>) -> Result<T> {
        let outcome = self.inner.runtime.block_on(async { body(&self.inner.pool).await });
        outcome.map_err(|fault| fault.said(&self.inner.url, action))
    }
}

/// The folder of an SQLite file, and the file as ours alone: it tells what machines a site has.
fn prepare_file(path: &std::path::Path) -> Result<()> {
    use std::{io::Read, os::unix::fs::OpenOptionsExt};
    let named = path.display().to_string();
    let failed = |action| {
        let path = named.clone();
        move |source| Error::Io { path, action, source }
    };
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        fs::create_dir_all(dir).map_err(failed("make the folder of"))?;
    }
    match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed("make")(error)),
    }
    let mut head = Vec::new();
    let file = fs::File::open(path).map_err(failed("read"))?;
    let len = file.metadata().map_err(failed("read"))?.len();
    file.take(HEADER).read_to_end(&mut head).map_err(failed("read"))?;
    let foreign = |what: &str| Err(Error::Foreign { url: format!("sqlite:{named}"), what: what.to_owned() });
    if head.is_empty() {
        return Ok(());
    }
    if !head.starts_with(b"SQLite format 3\0") {
        return foreign("the file is no SQLite database");
    }
    // Opening changes a database's journal; one that is not ours must not be changed. Ours has its name in the first
    // page from its first checkpoint on; before that it is one page, or its name is in the log beside it.
    let ours = head.get(68..72) == Some(migrate::APPLICATION_ID.to_be_bytes().as_slice());
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    let logged = fs::metadata(&log).is_ok_and(|log| log.len() > 0);
    if ours && !logged {
        // SQLite takes what is missing of its last page for zeros.
        let pages = head.get(28..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_be_bytes(*b));
        let due = u64::from(pages) * PAGE;
        if len < due {
            let what = format!("the file ends at {len}, but its {pages} pages need {due} bytes");
            return Err(Error::Damaged { url: format!("sqlite:{named}"), what });
        }
    }
    if ours || logged || len <= PAGE {
        return Ok(());
    }
    foreign("it is a database of something else")
}

/// One connection, begun as all are.
async fn probe(options: &AnyConnectOptions, first: &[&'static str]) -> Result<AnyConnection, Fault> {
    let mut connection = AnyConnection::connect_with(options).await?;
    for statement in first {
        connection.execute(*statement).await?;
    }
    Ok(connection)
}

/// The connections for looks, and those for changes.
async fn connect(url: &Url) -> Result<(AnyPool, AnyPool), Fault> {
    let options: AnyConnectOptions = url.driver_text().parse()?;
    let postgres = matches!(url, Url::Postgres(_));
    let first = if postgres { migrate::POSTGRES } else { migrate::SQLITE };
    // A pool tries again and again, and hides why; one connection says what is wrong at once.
    let mut tries = 0;
    let probed = loop {
        match probe(&options, first).await {
            Ok(connection) => break connection,
            // The change of a new SQLite file to its log waits for nobody: whoever comes second asks again.
            Err(fault) if fault.is_conflict() && tries < OPENINGS_MAX => {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(fault) => return Err(fault),
        }
    };
    let pool_of = |connections| {
        AnyPoolOptions::new().max_connections(connections).acquire_timeout(Duration::from_secs(30)).after_connect(
            move |connection, _| {
                Box::pin(async move {
                    for statement in first {
                        connection.execute(*statement).await?;
                    }
                    Ok(())
                })
            },
        )
    };
    let pools = if postgres {
        let pool = pool_of(6).connect_with(options).await?;
        (pool.clone(), pool)
    } else {
        let writer = pool_of(1).connect_with(options.clone()).await?;
        (pool_of(3).connect_lazy_with(options), writer)
    };
    // Only now: SQLite tidies up behind the last connection that closes.
    probed.close().await?;
    Ok(pools)
}

#[cfg(test)]
mod tests;
