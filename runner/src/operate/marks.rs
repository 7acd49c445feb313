//! Which notes of its changes production may hold: the bitmaps that its backups began, for points its replica has.

use std::collections::BTreeMap;

use aquifer_formats::repo::Repository;

use crate::{
    context::Context,
    fail::Result,
    failback::{Changed, Mark},
    replica::model::PointRecord,
    repository,
};

/// Notes that are worth looking for, the newest first. A repository that cannot be read has none.
///
/// # Errors
/// The site file's.
pub(super) fn marks(context: &Context, points: &[PointRecord]) -> Result<Changed> {
    let site = context.site()?;
    let me = repository::me(context)?;
    let opened = site.repositories.values().filter_map(|entry| Repository::open(&entry.url, me.clone()).ok());
    let repositories: Vec<Repository> = opened.collect();
    let of = |point: &PointRecord| {
        let source = point.source?;
        let repository = repositories.iter().find(|repository| repository.id() == source.repository)?;
        let machine = repository.machines().ok()?.into_iter().find(|machine| machine.id == source.machine)?;
        let stored = repository.points(&machine).ok()?.into_iter().find(|stored| stored.id == source.point)?;
        let record = stored.record?;
        let named =
            |disk: &aquifer_formats::repo::record::PointDisk| Some((disk.name.as_str().to_owned(), disk.mark.clone()?));
        let bitmaps: BTreeMap<String, String> = record.disks.iter().filter_map(named).collect();
        (!bitmaps.is_empty()).then_some(Mark { since: point.id, bitmaps })
    };
    Ok(Changed { marks: points.iter().rev().filter_map(of).collect(), ..Changed::default() })
}
