//! Replicas and their points, as records that `replica` defines, with a few columns for looking them up.
//!
//! Invariants
//! - Every write is a comparison: it carries the revision that was read, and one that is not the stored one is refused.
//! - Every write carries a fence.

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use sqlx::{Row, any::AnyRow};

use super::{
    Catalogue, Error, Event, Fence, Result,
    transaction::{Fault, Tx, record, text},
};

/// A replica as it is stored.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stored<R> {
    /// Its name.
    pub name: String,
    /// 0 before it is stored for the first time, one more with each write.
    pub revision: i64,
    /// Its state, by name.
    pub state: String,
    /// The machine it is a replica of.
    pub source: String,
    /// The job that makes it.
    pub job: Option<String>,
    /// All about it.
    pub record: R,
}

/// A point of a replica as it is stored.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PointRow<R> {
    /// Its id: sorts like the points do.
    pub id: String,
    /// 0 before it is stored for the first time.
    pub revision: i64,
    /// The moment whose data it holds, milliseconds since 1970.
    pub taken_at: i64,
    /// Its state, by name.
    pub state: String,
    /// All about it.
    pub record: R,
}

/// A change that belongs to another one, and is made in its transaction.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A replica, as [`Catalogue::put_replica`] stores it.
    Replica(Stored<Value>),
    /// A point of the replica of that name; one that is known already stays as it is.
    Point(String, PointRow<Value>),
    /// A point of the replica of that name is forgotten, by its id.
    NoPoint(String, String),
    /// Something is told.
    Told(Event),
}

impl Catalogue {
    /// One replica.
    pub fn replica<R: DeserializeOwned>(&self, name: &str) -> Result<Option<Stored<R>>> {
        self.read("read a replica", async |pool| {
            let row =
                sqlx::query("SELECT * FROM replica WHERE name = $1").bind(name.to_owned()).fetch_optional(pool).await?;
            row.as_ref().map(read).transpose()
        })
    }

    /// Every replica, by name.
    pub fn replicas<R: DeserializeOwned>(&self) -> Result<Vec<Stored<R>>> {
        self.read("list replicas", async |pool| {
            let rows = sqlx::query("SELECT * FROM replica ORDER BY name").fetch_all(pool).await?;
            rows.iter().map(read).collect()
        })
    }

    /// Stores a replica; gives it back with its new revision. A change of its state is an event.
    ///
    /// # Errors
    /// [`Error::Stale`] where it was changed since it was read; [`Error::Fenced`].
    pub fn put_replica<R: Serialize + Clone>(&self, fence: &Fence, row: &Stored<R>) -> Result<Stored<R>> {
        self.write("store a replica", async |tx| {
            tx.prove(fence).await?;
            tx.put_replica(fence, row).await
        })
    }

    /// Forgets a replica and its points.
    ///
    /// # Errors
    /// [`Error::Stale`]; [`Error::Fenced`].
    pub fn drop_replica(&self, fence: &Fence, name: &str, revision: i64) -> Result<()> {
        self.write("forget a replica", async |tx| {
            tx.prove(fence).await?;
            let gone = sqlx::query("DELETE FROM replica WHERE name = $1 AND revision = $2")
                .bind(name.to_owned())
                .bind(revision)
                .execute(tx.on())
                .await?;
            if gone.rows_affected() != 1 {
                let now = tx.replica_revision(name).await?;
                return Err(Error::Stale { what: format!("replica {name}"), have: revision, now }.into());
            }
            sqlx::query("DELETE FROM replica_point WHERE replica = $1").bind(name.to_owned()).execute(tx.on()).await?;
            tx.events.push(Event {
                object: format!("replica/{name}"),
                to: Some("Removed".into()),
                op: "forget".into(),
                session: fence.session,
                user: fence.owner.clone(),
                ..Event::default()
            });
            Ok(())
        })
    }

    /// The points of a replica, oldest first.
    pub fn points_of<R: DeserializeOwned>(&self, replica: &str) -> Result<Vec<PointRow<R>>> {
        self.read("list points of a replica", async |pool| {
            let rows = sqlx::query("SELECT * FROM replica_point WHERE replica = $1 ORDER BY taken_at, id")
                .bind(replica.to_owned())
                .fetch_all(pool)
                .await?;
            rows.iter().map(read_point).collect()
        })
    }

    /// Stores a point of a replica; gives it back with its new revision.
    ///
    /// # Errors
    /// [`Error::Stale`]; [`Error::Fenced`].
    pub fn put_point<R: Serialize + Clone>(
        &self,
        fence: &Fence,
        replica: &str,
        row: &PointRow<R>,
    ) -> Result<PointRow<R>> {
        self.write("store a point of a replica", async |tx| {
            tx.prove(fence).await?;
            let before = sqlx::query("SELECT revision FROM replica_point WHERE replica = $1 AND id = $2")
                .bind(replica.to_owned())
                .bind(row.id.clone())
                .fetch_optional(tx.on())
                .await?;
            let stored = before.map_or(Ok(0), |before| before.try_get::<i64, _>("revision"))?;
            if stored != row.revision {
                let what = format!("point {} of replica {replica}", row.id);
                return Err(Error::Stale { what, have: row.revision, now: stored }.into());
            }
            let statement = if stored == 0 {
                "INSERT INTO replica_point (revision, taken_at, state, record, replica, id) VALUES (1, $1, $2, $3, $4, $5)"
            } else {
                "UPDATE replica_point SET revision = revision + 1, taken_at = $1, state = $2, record = $3 \
                 WHERE replica = $4 AND id = $5"
            };
            sqlx::query(statement)
                .bind(row.taken_at)
                .bind(row.state.clone())
                .bind(text(&row.record)?)
                .bind(replica.to_owned())
                .bind(row.id.clone())
                .execute(tx.on())
                .await?;
            Ok(PointRow { revision: stored + 1, ..row.clone() })
        })
    }

    /// Forgets a point of a replica. One that is not there is forgotten already.
    ///
    /// # Errors
    /// [`Error::Fenced`].
    pub fn drop_point(&self, fence: &Fence, replica: &str, id: &str) -> Result<()> {
        self.write("forget a point of a replica", async |tx| {
            tx.prove(fence).await?;
            tx.drop_point(replica, id).await
        })
    }
}

impl Tx {
    /// Makes the changes that belong to another one.
    pub(super) async fn change(&mut self, fence: &Fence, changes: &[Change]) -> Result<(), Fault> {
        for change in changes {
            match change {
                Change::Replica(row) => {
                    self.put_replica(fence, row).await?;
                }
                Change::Point(replica, row) => self.add_point(replica, row).await?,
                Change::NoPoint(replica, id) => self.drop_point(replica, id).await?,
                Change::Told(event) => self.events.push(event.clone()),
            }
        }
        Ok(())
    }

    async fn put_replica<R: Serialize + Clone>(&mut self, fence: &Fence, row: &Stored<R>) -> Result<Stored<R>, Fault> {
        let before = sqlx::query("SELECT revision, state FROM replica WHERE name = $1")
            .bind(row.name.clone())
            .fetch_optional(self.on())
            .await?;
        let (stored, state) = match &before {
            Some(before) => (before.try_get::<i64, _>("revision")?, Some(before.try_get::<String, _>("state")?)),
            None => (0, None),
        };
        let statement = if stored == 0 {
            "INSERT INTO replica (revision, state, source, job, record, name) VALUES (1, $1, $2, $3, $4, $5)"
        } else {
            "UPDATE replica SET revision = revision + 1, state = $1, source = $2, job = $3, record = $4 \
             WHERE name = $5 AND revision = $6"
        };
        let mut query = sqlx::query(statement)
            .bind(row.state.clone())
            .bind(row.source.clone())
            .bind(row.job.clone())
            .bind(text(&row.record)?)
            .bind(row.name.clone());
        if stored != 0 {
            query = query.bind(row.revision);
        }
        let matched = stored == row.revision;
        if !matched || query.execute(self.on()).await?.rows_affected() != 1 {
            let what = format!("replica {}", row.name);
            return Err(Error::Stale { what, have: row.revision, now: stored }.into());
        }
        if state.as_deref() != Some(row.state.as_str()) {
            self.events.push(Event {
                object: format!("replica/{}", row.name),
                from: state,
                to: Some(row.state.clone()),
                op: fence.kind.clone(),
                session: fence.session,
                user: fence.owner.clone(),
                ..Event::default()
            });
        }
        Ok(Stored { revision: stored + 1, ..row.clone() })
    }

    async fn add_point(&mut self, replica: &str, row: &PointRow<Value>) -> Result<(), Fault> {
        sqlx::query(
            "INSERT INTO replica_point (revision, taken_at, state, record, replica, id) VALUES (1, $1, $2, $3, $4, $5) \
             ON CONFLICT (replica, id) DO NOTHING",
        )
        .bind(row.taken_at)
        .bind(row.state.clone())
        .bind(text(&row.record)?)
        .bind(replica.to_owned())
        .bind(row.id.clone())
        .execute(self.on())
        .await?;
        Ok(())
    }

    async fn drop_point(&mut self, replica: &str, id: &str) -> Result<(), Fault> {
        sqlx::query("DELETE FROM replica_point WHERE replica = $1 AND id = $2")
            .bind(replica.to_owned())
            .bind(id.to_owned())
            .execute(self.on())
            .await?;
        Ok(())
    }

    async fn replica_revision(&mut self, name: &str) -> Result<i64, Fault> {
        let row = sqlx::query("SELECT revision FROM replica WHERE name = $1")
            .bind(name.to_owned())
            .fetch_optional(self.on())
            .await?;
        Ok(row.map_or(Ok(0), |row| row.try_get("revision"))?)
    }
}

fn read<R: DeserializeOwned>(row: &AnyRow) -> Result<Stored<R>, Fault> {
    Ok(Stored {
        name: row.try_get("name")?,
        revision: row.try_get("revision")?,
        state: row.try_get("state")?,
        source: row.try_get("source")?,
        job: row.try_get("job")?,
        record: record(row, "record")?,
    })
}

fn read_point<R: DeserializeOwned>(row: &AnyRow) -> Result<PointRow<R>, Fault> {
    Ok(PointRow {
        id: row.try_get("id")?,
        revision: row.try_get("revision")?,
        taken_at: row.try_get("taken_at")?,
        state: row.try_get("state")?,
        record: record(row, "record")?,
    })
}
