//! Disks of a restore point in the repository.

use std::{path::PathBuf, sync::Arc};

use aquifer_formats::repo::{Machine, Point, record::PointRecord};

use super::{PointRef, select::SelectedDisk, spec_of};
use crate::{
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    repository::{self, Hold, Named},
};

/// A point in the repository, held while it is used.
#[derive(Clone, Debug)]
pub struct SelectedPoint {
    /// Folder of the repository.
    pub repository: PathBuf,
    /// Its machine.
    pub machine: Machine,
    /// The point.
    pub point: Point,
    /// What it says of itself.
    pub record: PointRecord,
    /// Keeps retention away from its files.
    pub hold: Arc<Hold>,
}

/// The disks of a point of `machine`; only `disk` where that is named.
pub(super) fn disks(
    context: &Context,
    machine: &str,
    point: &PointRef,
    disk: Option<&str>,
) -> Result<(Vec<SelectedDisk>, SelectedPoint)> {
    // Whoever mistyped the name of a file has named a machine without knowing.
    let nowhere = |fail: Fail| match fail.code {
        Code::NoRepository if fail.at.is_none() => {
            let what =
                format!("there is no file `{machine}` here, and no repository was named to look for a machine in");
            Fail { what, do_: None, ..fail }.help("aquifer -r DIR points    # a file's path has a `/`")
        }
        _ => fail,
    };
    let repo = repository::open(context).map_err(nowhere)?;
    let named = repository::find(&repo, machine, point)?;
    named.warn(context);
    let Named { machine, point, .. } = named;
    let hold = Arc::new(Hold::read(&repo, &machine, &point, repository::holder(context.out.verb()))?);
    let Some(record) = point.record.clone() else {
        let word = format!("{}@{}", machine.name, point.id);
        let fail = match point.state.why() {
            Some(_) => repository::damage(&word, &point),
            None => Fail::new(Code::PointIncomplete, format!("the point {word} cannot be read")).at(repo.label()),
        };
        return Err(fail.help(format!("aquifer points {}", quoted(&machine.name))));
    };
    let mut disks = Vec::new();
    for stored in record.disks.iter().filter(|stored| disk.is_none_or(|name| stored.name.as_str() == name)) {
        // Opened once here, so that a missing file is known before anything is served.
        let reader = repo.open_disk(&point, &stored.name)?;
        disks.push(SelectedDisk { name: stored.name.as_str().to_owned(), spec: spec_of(&reader, stored)? });
    }
    if disks.is_empty() {
        let names: Vec<&str> = record.disks.iter().map(|stored| stored.name.as_str()).collect();
        let what = format!("{} has no disk `{}`; it has {}", machine.name, disk.unwrap_or_default(), names.join(", "));
        return Err(Fail::new(Code::NotFound, what).help(format!("aquifer points {}", machine.name)));
    }
    let repository = PathBuf::from(repo.label());
    Ok((disks, SelectedPoint { repository, machine, point, record, hold }))
}
