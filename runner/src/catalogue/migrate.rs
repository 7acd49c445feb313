//! The forms a catalogue had, and the way from each to the next.
//!
//! Invariants
//! - A form, once released, is never edited: its checksum is stored with it and compared.
//! - All missing steps are one transaction: a catalogue has a form, or it has the next.
//! - Two controllers that start at once make the catalogue once.
//! - Tables of others are never touched: SQLite files carry our application id, PostgreSQL tables lie in the schema
//!   `aquifer`.

use sqlx::Row;

use super::{Catalogue, Error, Result, Url, transaction::Fault, transaction::Tx};

/// `AQUI`, as SQLite stores who a file belongs to.
pub(super) const APPLICATION_ID: u32 = 0x4151_5549;

/// What each connection to SQLite begins with.
pub(super) const SQLITE: &[&str] = &[
    "PRAGMA busy_timeout = 10000",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA foreign_keys = ON",
];

/// What each connection to PostgreSQL begins with.
pub(super) const POSTGRES: &[&str] = &[
    "SET search_path TO aquifer",
    "SET synchronous_commit TO on",
    "SET client_min_messages TO warning",
    "SET idle_in_transaction_session_timeout TO '15s'",
];

struct Form {
    number: i64,
    name: &'static str,
    sql: &'static str,
}

const FORMS: &[Form] = &[Form { number: 1, name: "base", sql: include_str!("migrations/0001_base.sql") }];

/// The form this build writes.
const KNOWN: i64 = FORMS.len() as i64;

impl Catalogue {
    /// Brings the catalogue to this build's form.
    pub(super) fn migrate(&self) -> Result<()> {
        self.write("bring the catalogue to its present form", async |tx| {
            match self.url() {
                Url::Sqlite(_) => own_sqlite(tx, self.url()).await?,
                Url::Postgres(_) => own_postgres(tx, self.url()).await?,
            }
            let have = forms_of(tx, self.url()).await?;
            for form in FORMS.iter().filter(|form| form.number > have) {
                sqlx::raw_sql(form.sql).execute(tx.on()).await?;
                sqlx::query("INSERT INTO form (number, name, checksum, made_at) VALUES ($1, $2, $3, $4)")
                    .bind(form.number)
                    .bind(form.name)
                    .bind(checksum(form))
                    .bind(tx.now)
                    .execute(tx.on())
                    .await?;
            }
            Ok(())
        })
    }
}

fn checksum(form: &Form) -> String {
    blake3::hash(form.sql.as_bytes()).to_hex().to_string()
}

const TABLE_OF_FORMS: &str = "CREATE TABLE IF NOT EXISTS form (number BIGINT NOT NULL PRIMARY KEY, name TEXT NOT NULL, \
                              checksum TEXT NOT NULL, made_at BIGINT NOT NULL)";

async fn own_sqlite(tx: &mut Tx, url: &Url) -> Result<(), Fault> {
    let id: i64 = sqlx::query("SELECT application_id AS id FROM pragma_application_id")
        .fetch_one(tx.on())
        .await?
        .try_get("id")?;
    let tables: i64 = sqlx::query("SELECT count(*) AS n FROM sqlite_master").fetch_one(tx.on()).await?.try_get("n")?;
    if id == 0 && tables == 0 {
        sqlx::raw_sql("PRAGMA application_id = 1095849289").execute(tx.on()).await?;
    } else if id != i64::from(APPLICATION_ID) {
        let what = format!("it is a database of something else (application id {id}, {tables} tables and indexes)");
        return Err(Error::Foreign { url: url.to_string(), what }.into());
    }
    sqlx::raw_sql(TABLE_OF_FORMS).execute(tx.on()).await?;
    Ok(())
}

async fn own_postgres(tx: &mut Tx, url: &Url) -> Result<(), Fault> {
    // Whoever comes second waits here until the first has made everything.
    sqlx::query("SELECT 1 AS one FROM (SELECT pg_advisory_xact_lock(1095849289)) AS waited").fetch_one(tx.on()).await?;
    let ours = "SELECT count(*) AS n FROM information_schema.tables WHERE table_schema = 'aquifer'";
    let tables: i64 = sqlx::query(ours).fetch_one(tx.on()).await?.try_get("n")?;
    let form =
        "SELECT count(*) AS n FROM information_schema.tables WHERE table_schema = 'aquifer' AND table_name = 'form'";
    let forms: i64 = sqlx::query(form).fetch_one(tx.on()).await?.try_get("n")?;
    if tables > 0 && forms == 0 {
        let what = format!("its schema `aquifer` holds {tables} tables of something else");
        return Err(Error::Foreign { url: url.to_string(), what }.into());
    }
    if tables == 0 {
        sqlx::raw_sql("CREATE SCHEMA IF NOT EXISTS aquifer").execute(tx.on()).await?;
    }
    sqlx::raw_sql(TABLE_OF_FORMS).execute(tx.on()).await?;
    Ok(())
}

/// The form the catalogue has; 0 for one that was just made.
async fn forms_of(tx: &mut Tx, url: &Url) -> Result<i64, Fault> {
    let rows = sqlx::query("SELECT number, checksum FROM form ORDER BY number").fetch_all(tx.on()).await?;
    let mut have = 0;
    for row in rows {
        let number: i64 = row.try_get("number")?;
        let stored: String = row.try_get("checksum")?;
        let known = FORMS.iter().find(|form| form.number == number);
        match known {
            None => have = have.max(number),
            Some(form) if checksum(form) == stored && number == have + 1 => have = number,
            Some(form) => {
                let what = format!("its form {number} ({}) is not the one that was released", form.name);
                return Err(Error::Damaged { url: url.to_string(), what }.into());
            }
        }
    }
    if have > KNOWN {
        return Err(Error::TooNew { url: url.to_string(), found: have, known: KNOWN }.into());
    }
    Ok(have)
}
