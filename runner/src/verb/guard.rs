//! `guard`: outlives a backup of a running machine that is killed. Not meant for people.

use crate::{
    context::Context,
    fail::Result,
    job::backup::guard::{self, Args},
};

pub(super) fn run(_: &Context, args: &Args) -> Result<()> {
    guard::stand(args)
}
