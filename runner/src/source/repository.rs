//! Disks of a restore point in the repository.

use super::{PointRef, select::SelectedDisk};
use crate::{
    context::Context,
    fail::{Code, Fail, Result},
};

/// The disks of a point of `machine`; only `disk` where that is named.
pub(super) fn disks(
    context: &Context,
    machine: &str,
    _point: &PointRef,
    _disk: Option<&str>,
) -> Result<Vec<SelectedDisk>> {
    let dir = context.repo_dir()?;
    let what = format!("{machine} cannot be read: repositories are not part of this build");
    Err(Fail::new(Code::Unsupported, what).at(dir.display()))
}
