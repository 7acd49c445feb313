//! `map`: which ranges of a disk hold data, from metadata.

use aquifer_vdisk::{Extent, ExtentKind};
use serde::Serialize;

use crate::{
    context::Context,
    fail::Result,
    source::{SourceOptions, select},
};

/// Options of `map`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to look at
    #[arg(value_name = "SOURCE")]
    pub source: String,
    /// Which disk, and how it is read.
    #[command(flatten)]
    pub options: SourceOptions,
}

/// The map is asked for this much of the disk at a time, bytes.
const WINDOW_BYTES: u64 = 4 << 30;

#[derive(Serialize)]
struct Range<'a> {
    disk: &'a str,
    offset: u64,
    length: u64,
    kind: &'static str,
}

fn kind_name(kind: ExtentKind) -> &'static str {
    match kind {
        ExtentKind::Data => "data",
        ExtentKind::Zero => "zero",
        ExtentKind::Hole => "hole",
    }
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let selection = select(context, &args.source, &args.options)?;
    let stop = context.stop()?;
    let cache = context.cache()?;
    for selected in &selection.disks {
        let disk = selected.open(&cache)?;
        if selection.disks.len() > 1 {
            context.out.line(format_args!("{}:", selected.name));
        }
        let print = |extent: &Extent| {
            let kind = kind_name(extent.kind);
            context.out.line(format_args!("{:>16} {:>16}  {kind}", extent.offset, extent.len));
            let range = Range { disk: &selected.name, offset: extent.offset, length: extent.len, kind };
            context.out.record("range", &range);
        };
        // A run may go over the end of a window: the last extent is held until the next one shows.
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = 0;
        while at < disk.size() {
            stop.check()?;
            let len = WINDOW_BYTES.min(disk.size() - at);
            disk.extents(at, len, &mut extents)?;
            at += len;
            let held = extents.pop();
            extents.iter().for_each(print);
            extents.clear();
            extents.extend(held);
        }
        extents.iter().for_each(print);
    }
    Ok(())
}
