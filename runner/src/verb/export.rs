//! `export`: copies a disk out to a raw or qcow2 file.
//!
//! Invariants
//! - The new name appears only when the file is whole and durable. What an interruption leaves has no
//!   name at all where the file system can do that, and is removed otherwise.
//! - Nothing that exists is overwritten.

mod target;

use std::path::{Path, PathBuf};

use serde::Serialize;

use self::target::{OutFormat, Target};
use crate::{
    cli::DryRun,
    context::{Context, quoted},
    copy,
    fail::{Code, Fail, Result},
    source::{SourceOptions, select},
    units,
};

/// Options of `export`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to copy
    #[arg(value_name = "SOURCE")]
    pub source: String,
    /// The new file; .raw or .qcow2 says its format
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// Which disk, and how it is read.
    #[command(flatten)]
    pub options: SourceOptions,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

#[derive(Serialize)]
struct Exported<'a> {
    disk: &'a str,
    path: &'a Path,
    format: &'static str,
    size: u64,
    bytes_used: u64,
    bytes_written: Option<u64>,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let format = OutFormat::of(&args.out)?;
    let selection = select(context, &args.source, &args.options)?;
    let selected = selection.single()?;
    let disk = selected.open(&context.cache()?)?;
    target::check_place(&args.out)?;
    let used = copy::used_bytes(&disk)?;
    target::check_space(&args.out, used)?;
    let mut exported = Exported {
        disk: &selected.name,
        path: &args.out,
        format: format.name(),
        size: disk.size(),
        bytes_used: used,
        bytes_written: None,
    };
    if args.dry.dry_run {
        context.out.record("plan", &exported);
        context.out.line(format_args!(
            "would copy {} of {} ({} on the disk) to {}",
            units::bytes(used),
            selection.word,
            units::bytes(disk.size()),
            args.out.display()
        ));
        return Ok(());
    }
    let stop = context.stop()?;
    let target = Target::create(&args.out, format, disk.size())?;
    let copied = {
        let progress = context.out.progress("export", Some(used));
        let copied = copy::copy(&disk, &|offset, bytes| target.write(offset, bytes), stop, &progress);
        copied.map_err(|fail| explain(fail, &args.source))?
    };
    target.finish()?;
    exported.bytes_written = Some(copied.moved);
    context.out.record("exported", &exported);
    context.out.line(format_args!(
        "{}: {} disk of {}, {} of data",
        args.out.display(),
        format.name(),
        units::bytes(disk.size()),
        units::bytes(copied.moved)
    ));
    Ok(())
}

fn explain(fail: Fail, source: &str) -> Fail {
    match fail.code {
        Code::BlockCorrupt | Code::Corrupt | Code::Truncated | Code::ChainBroken => {
            fail.help(format!("aquifer verify {}", quoted(source)))
        }
        _ => fail,
    }
}
