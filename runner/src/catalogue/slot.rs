//! Slots: how many tasks a proxy, a repository or a host takes at once.
//!
//! Invariants
//! - Only slots of work that is in somebody's hands count; those of a lost worker are free with its lease.
//! - Slots are taken under the `dispatch` row only, so two takers never see the same free slot.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sqlx::Row;

use super::{
    Catalogue, Fence, Result, Work, WorkId,
    transaction::{Fault, Tx},
};

/// A slot that work needs: one of `limit` that `resource` has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Need {
    /// `repository/nas`, `host/dr1`, `proxy/local`.
    pub resource: String,
    /// So many tasks at once, of all who use it.
    pub limit: u32,
}

impl Catalogue {
    /// Takes up to `want` slots more of a resource for work in hand: a task for each disk. Says how many it got.
    ///
    /// # Errors
    /// [`super::Error::Fenced`].
    pub fn more_slots(&self, fence: &Fence, need: &Need, want: u32) -> Result<u32> {
        self.write("take slots", async |tx| {
            tx.next("dispatch").await?;
            tx.prove(fence).await?;
            let used = tx.in_use().await?.get(&need.resource).copied().unwrap_or(0);
            let granted = need.limit.saturating_sub(used).min(want);
            if granted > 0 {
                tx.add_slots(&need.resource, fence.work, fence.epoch, granted).await?;
            }
            Ok(granted)
        })
    }

    /// Slots in use, by resource.
    pub fn slots(&self) -> Result<BTreeMap<String, u32>> {
        self.write("count slots", async |tx| tx.in_use().await)
    }
}

impl Catalogue {
    /// Slots in use, by resource: those of an owner, and all.
    pub fn slots_of(&self, owner: &str) -> Result<(BTreeMap<String, u32>, BTreeMap<String, u32>)> {
        self.read("count slots", async |pool| {
            let rows = sqlx::query(
                "SELECT s.resource AS resource, CAST(SUM(s.taken) AS BIGINT) AS taken, \
                 CAST(SUM(CASE WHEN w.owner = $1 THEN s.taken ELSE 0 END) AS BIGINT) AS ours FROM slot s \
                 JOIN work w ON w.id = s.work AND w.epoch = s.epoch WHERE w.state = 'running' GROUP BY s.resource",
            )
            .bind(owner.to_owned())
            .fetch_all(pool)
            .await?;
            let (mut ours, mut all) = (BTreeMap::new(), BTreeMap::new());
            for row in rows {
                let resource: String = row.try_get("resource")?;
                let count = |column| Ok::<_, Fault>(u32::try_from(row.try_get::<i64, _>(column)?).unwrap_or(u32::MAX));
                ours.insert(resource.clone(), count("ours")?);
                all.insert(resource, count("taken")?);
            }
            Ok((ours, all))
        })
    }
}

impl Tx {
    pub(super) async fn in_use(&mut self) -> Result<BTreeMap<String, u32>, Fault> {
        let now = self.now;
        let rows = sqlx::query(
            "SELECT s.resource AS resource, CAST(SUM(s.taken) AS BIGINT) AS taken FROM slot s \
             JOIN work w ON w.id = s.work AND w.epoch = s.epoch \
             WHERE w.state = 'running' AND w.lease_until >= $1 GROUP BY s.resource",
        )
        .bind(now)
        .fetch_all(self.on())
        .await?;
        let mut used = BTreeMap::new();
        for row in rows {
            let taken = u32::try_from(row.try_get::<i64, _>("taken")?).unwrap_or(u32::MAX);
            used.insert(row.try_get("resource")?, taken);
        }
        Ok(used)
    }

    pub(super) async fn take_slots(&mut self, work: &Work) -> Result<(), Fault> {
        self.drop_slots(work.id).await?;
        for need in &work.needs {
            self.add_slots(&need.resource, work.id, work.epoch, 1).await?;
        }
        Ok(())
    }

    async fn add_slots(&mut self, resource: &str, work: WorkId, epoch: i64, taken: u32) -> Result<(), Fault> {
        sqlx::query(
            "INSERT INTO slot (resource, work, epoch, taken) VALUES ($1, $2, $3, $4) \
             ON CONFLICT (resource, work) DO UPDATE SET taken = slot.taken + excluded.taken",
        )
        .bind(resource.to_owned())
        .bind(work.0)
        .bind(epoch)
        .bind(i64::from(taken))
        .execute(self.on())
        .await?;
        Ok(())
    }

    pub(super) async fn drop_slots(&mut self, work: WorkId) -> Result<(), Fault> {
        sqlx::query("DELETE FROM slot WHERE work = $1").bind(work.0).execute(self.on()).await?;
        Ok(())
    }
}
