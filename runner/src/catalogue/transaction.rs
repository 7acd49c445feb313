//! One transaction of the catalogue, and what its faults mean.
//!
//! Invariants
//! - Transactions of SQLite begin as writers: none fails half way because it became one too late.
//! - Locks are taken in one order: dispatch, work, session, everything else, event counter last.

use std::time::Duration;

use jiff::Timestamp;
use sqlx::{Any, AnyPool, Row, any::AnyRow};

use super::{Error, Fence, Url, WorkState};

/// A transaction, with the time at which it began.
pub(super) struct Tx {
    inner: sqlx::Transaction<'static, Any>,
    /// Milliseconds since 1970 by the catalogue's clock: the database's, where several machines share it.
    pub(super) now: i64,
    /// End of a lease that is taken or renewed now.
    pub(super) lease_until: i64,
    /// Events of this transaction, written just before it is committed.
    pub(super) events: Vec<super::Event>,
    /// Nothing that was done in it has to last: it ends without a write.
    pub(super) is_idle: bool,
}

impl Tx {
    pub(super) async fn begin(pool: &AnyPool, url: &Url, lease: Duration) -> Result<Self, Fault> {
        let lease = i64::try_from(lease.as_millis()).unwrap_or(i64::MAX / 4);
        let (inner, now) = match url {
            Url::Sqlite(_) => (pool.begin_with("BEGIN IMMEDIATE").await?, Timestamp::now().as_millisecond()),
            Url::Postgres(_) => {
                let mut inner = pool.begin().await?;
                let clock = "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT) AS now";
                let row = sqlx::query(clock).fetch_one(&mut *inner).await?;
                let now = row.try_get("now")?;
                (inner, now)
            }
        };
        Ok(Self { inner, now, lease_until: now.saturating_add(lease), events: Vec::new(), is_idle: false })
    }

    /// Writes the events and makes everything durable.
    pub(super) async fn commit(mut self) -> Result<(), Fault> {
        if self.is_idle {
            return Ok(self.inner.rollback().await?);
        }
        self.write_events().await?;
        Ok(self.inner.commit().await?)
    }

    pub(super) fn on(&mut self) -> &mut sqlx::AnyConnection {
        &mut self.inner
    }

    /// The next number of a counter. Locks the counter until the end of the transaction.
    pub(super) async fn next(&mut self, counter: &'static str) -> Result<i64, Fault> {
        let row = sqlx::query("UPDATE counter SET value = value + 1 WHERE name = $1 RETURNING value")
            .bind(counter)
            .fetch_one(self.on())
            .await?;
        Ok(row.try_get("value")?)
    }

    /// Proves that the work is still ours, locks it, and renews the lease: an effect is a sign of life.
    pub(super) async fn prove(&mut self, fence: &Fence) -> Result<(), Fault> {
        let proven = sqlx::query(
            "UPDATE work SET lease_until = $1 WHERE id = $2 AND epoch = $3 AND owner = $4 AND state = 'running'",
        )
        .bind(self.lease_until)
        .bind(fence.work.0)
        .bind(fence.epoch)
        .bind(fence.owner.clone())
        .execute(self.on())
        .await?;
        if proven.rows_affected() == 1 {
            return Ok(());
        }
        Err(self.fenced(fence).await?.into())
    }

    /// How the work of a stale fence stands now.
    pub(super) async fn fenced(&mut self, fence: &Fence) -> Result<Error, Fault> {
        let row = sqlx::query("SELECT state, owner, epoch FROM work WHERE id = $1")
            .bind(fence.work.0)
            .fetch_optional(self.on())
            .await?;
        let now = match row {
            None => "it does not exist".to_owned(),
            Some(row) => {
                let state: WorkState = word(&row, "state")?;
                let epoch: i64 = row.try_get("epoch")?;
                match row.try_get::<Option<String>, _>("owner")? {
                    Some(owner) if state == WorkState::Running => format!("{owner} has it in epoch {epoch}"),
                    _ => format!("it is {state} in epoch {epoch}"),
                }
            }
        };
        Ok(Error::Fenced { work: fence.work.0, epoch: fence.epoch, now })
    }
}

/// What can go wrong inside of a transaction.
#[derive(Debug)]
pub(super) enum Fault {
    /// The database.
    Sql(sqlx::Error),
    /// We refuse it.
    Said(Error),
    /// What is stored cannot be read.
    Record(String),
}

impl From<sqlx::Error> for Fault {
    fn from(error: sqlx::Error) -> Self {
        Self::Sql(error)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Said(error)
    }
}

impl Fault {
    /// Whether the same transaction may succeed when it is tried again at once.
    pub(super) fn is_conflict(&self) -> bool {
        let Self::Sql(sqlx::Error::Database(error)) = self else { return false };
        match error.code().as_deref() {
            // Serialisation failure, deadlock.
            Some("40001" | "40P01") => true,
            Some(code) => matches!(sqlite_code(code), Some(SQLITE_BUSY | SQLITE_LOCKED)),
            None => false,
        }
    }

    pub(super) fn is_unique_violation(&self) -> bool {
        matches!(self, Self::Sql(sqlx::Error::Database(error)) if error.is_unique_violation())
    }

    /// As callers see it.
    pub(super) fn said(self, url: &Url, action: &'static str) -> Error {
        let postgres = matches!(url, Url::Postgres(_));
        let url = url.to_string();
        let error = match self {
            Self::Said(error) => return error,
            Self::Record(what) => return Error::Damaged { url, what },
            Self::Sql(error) => error,
        };
        let what = one_line(&error);
        match &error {
            sqlx::Error::Database(told) => match told.code().as_deref() {
                Some(code) if postgres => postgres_fault(code, url, action, what),
                Some(code) => sqlite_fault(sqlite_code(code), url, action, what),
                None => Error::Database { url, action, what },
            },
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::ColumnNotFound(_) => {
                Error::Damaged { url, what }
            }
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed => Error::Unreachable { url, what },
            _ => Error::Database { url, action, what },
        }
    }
}

const SQLITE_BUSY: i64 = 5;
const SQLITE_LOCKED: i64 = 6;

/// The primary code: the extended one says more than is needed here.
fn sqlite_code(code: &str) -> Option<i64> {
    code.parse::<i64>().ok().map(|code| code & 0xff)
}

fn sqlite_fault(code: Option<i64>, url: String, action: &'static str, what: String) -> Error {
    match code {
        // CORRUPT.
        Some(11) => Error::Damaged { url, what },
        // NOTADB.
        Some(26) => Error::Foreign { url, what },
        // FULL.
        Some(13) => Error::Full { url, what },
        // READONLY, PERM, AUTH.
        Some(8 | 3 | 23) => Error::Access { url, what },
        Some(SQLITE_BUSY | SQLITE_LOCKED) => {
            Error::Busy { what: url, holder: "another process that writes into it".to_owned() }
        }
        _ => Error::Database { url, action, what },
    }
}

fn postgres_fault(code: &str, url: String, action: &'static str, what: String) -> Error {
    match code.get(..2) {
        // Invalid authorisation; insufficient privilege.
        Some("28") => Error::Access { url, what },
        _ if code == "42501" => Error::Access { url, what },
        // No such database.
        _ if code == "3D000" => Error::Foreign { url, what },
        // Connection exception, operator intervention, too many connections.
        Some("08" | "57") => Error::Unreachable { url, what },
        _ if code == "53300" => Error::Unreachable { url, what },
        // Disk full.
        _ if code == "53100" => Error::Full { url, what },
        // Data or index corrupted.
        Some("XX") => Error::Damaged { url, what },
        _ => Error::Database { url, action, what },
    }
}

fn one_line(error: &sqlx::Error) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A column that holds one of a few words.
pub(super) fn word<T: std::str::FromStr>(row: &AnyRow, column: &str) -> Result<T, Fault> {
    let text: String = row.try_get(column)?;
    text.parse().map_err(|_| Fault::Record(format!("column {column} holds `{text}`")))
}

/// A column that holds a record.
pub(super) fn record<T: serde::de::DeserializeOwned>(row: &AnyRow, column: &str) -> Result<T, Fault> {
    let text: String = row.try_get(column)?;
    serde_json::from_str(&text).map_err(|error| Fault::Record(format!("column {column}: {error}")))
}

/// A record as it is stored.
pub(super) fn text(value: &impl serde::Serialize) -> Result<String, Fault> {
    serde_json::to_string(value).map_err(|error| Fault::Record(format!("a record cannot be written: {error}")))
}

/// A column that holds a time.
pub(super) fn time(row: &AnyRow, column: &str) -> Result<Timestamp, Fault> {
    instant(row.try_get(column)?, column)
}

/// A column that may hold a time.
pub(super) fn maybe_time(row: &AnyRow, column: &str) -> Result<Option<Timestamp>, Fault> {
    row.try_get::<Option<i64>, _>(column)?.map(|ms| instant(ms, column)).transpose()
}

fn instant(ms: i64, column: &str) -> Result<Timestamp, Fault> {
    Timestamp::from_millisecond(ms).map_err(|error| Fault::Record(format!("column {column}: {error}")))
}

/// An enum whose variants are stored and shown as words.
macro_rules! words {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident $word:literal)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name { $($(#[$doc])* #[serde(rename = $word)] $variant,)* }

        impl $name {
            /// The word that is stored and shown.
            pub fn word(self) -> &'static str { match self { $(Self::$variant => $word,)* } }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(self.word()) }
        }

        impl std::str::FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok(Self::$variant),)*
                    _ => Err(format!("`{text}` is none of {}", [$($word),*].join(", "))),
                }
            }
        }
    };
}
pub(super) use words;
