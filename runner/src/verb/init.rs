//! `init`: makes a repository, or takes one over.

use std::{fs, fs::DirBuilder, os::unix::fs::DirBuilderExt, path::Path};

use aquifer_formats::repo::{
    Access, Repository,
    record::{CompressionName, Defaults},
};
use clap::ValueEnum;
use serde::Serialize;

use crate::{
    cli::DryRun,
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    repository,
    site::{Job, JobKind},
    units,
};

/// Options of `init`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Size of the blocks that are stored, a power of two from 16KiB to 4MiB [default: 64KiB]
    #[arg(long, value_name = "SIZE")]
    pub block: Option<String>,
    /// How blocks are compressed [default: zstd-1]
    #[arg(long, value_name = "HOW")]
    pub compression: Option<Compression>,
    /// Become the owner of an existing repository; its present owner can then only read
    #[arg(long, conflicts_with_all = ["block", "compression"])]
    pub take_over: bool,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

/// Compression, by its name on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Compression {
    /// zstd, fastest level
    #[value(name = "zstd-1")]
    Zstd1,
    /// zstd, a little smaller and slower
    #[value(name = "zstd-3")]
    Zstd3,
    /// LZ4
    Lz4,
    /// None
    Raw,
}

#[derive(Serialize)]
struct Record {
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    block_bytes: u32,
    compression: CompressionName,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let dir = context.repo_dir()?;
    if args.take_over {
        return take_over(context, args);
    }
    let defaults = defaults(args)?;
    let record = |id| Record {
        path: dir.display().to_string(),
        id,
        block_bytes: defaults.block_bytes,
        compression: defaults.compression,
    };
    if dir.join("aquifer.json").exists() {
        return Err(Fail::new(Code::Exists, format!("{} is a repository already", dir.display()))
            .at(dir.display())
            .help("aquifer points"));
    }
    match fs::read_dir(&dir).map(|mut entries| entries.next().is_some()) {
        Ok(true) => {
            let what = format!("{} is not empty; a repository gets a folder of its own", dir.display());
            return Err(Fail::new(Code::Refused, what).at(dir.display()));
        }
        Ok(false) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Fail::io(dir.display(), "look at", &error)),
    }
    if args.dry.dry_run {
        context.out.record("plan", &record(None));
        context.out.line(format_args!("would make a repository in {}", dir.display()));
        return Ok(());
    }
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.map_err(|e| Fail::io(dir.display(), "create", &e))?;
    let repo = Repository::init(&dir, repository::me_for_good(context)?, defaults)?;
    context.out.record("repository", &record(Some(repo.id().to_string())));
    context.out.line(format_args!("repository {} in {}", repo.id(), dir.display()));
    context.out.next(first_backup(context, &dir));
    Ok(())
}

/// What makes its first restore point: a job of the site file, where one leads here.
fn first_backup(context: &Context, dir: &Path) -> String {
    let job = context.site().ok().and_then(|site| {
        let leads_here = |job: &Job| match &job.kind {
            JobKind::Backup(job) => site.repositories.get(&job.to).is_some_and(|there| there.url == dir),
            _ => false,
        };
        site.jobs.iter().find(|(_, job)| leads_here(job)).map(|(name, _)| name)
    });
    match job {
        Some(name) => format!("aquifer run {}", quoted(name)),
        None => "aquifer backup MACHINE --disk vda=IMAGE".to_owned(),
    }
}

fn defaults(args: &Args) -> Result<Defaults> {
    let mut defaults = Defaults::default();
    if let Some(text) = &args.block {
        let bytes = units::parse_bytes(text)?;
        let fits = bytes.is_power_of_two() && (16 << 10..=4 << 20).contains(&bytes);
        let bytes = u32::try_from(bytes).ok().filter(|_| fits);
        let wrong = || Fail::new(Code::Usage, format!("`{text}` is not a power of two from 16KiB to 4MiB"));
        defaults.block_bytes = bytes.ok_or_else(wrong)?;
    }
    defaults.compression = match args.compression {
        None => defaults.compression,
        Some(Compression::Zstd1) => CompressionName::Zstd1,
        Some(Compression::Zstd3) => CompressionName::Zstd3,
        Some(Compression::Lz4) => CompressionName::Lz4,
        Some(Compression::Raw) => CompressionName::Raw,
    };
    Ok(defaults)
}

fn take_over(context: &Context, args: &Args) -> Result<()> {
    let repo = if args.dry.dry_run { repository::open(context)? } else { repository::open_to_change(context)? };
    let Access::ReadOnly { owner } = repo.access()? else {
        context.out.line("this installation owns the repository already");
        return Ok(());
    };
    context.out.record("owner", &serde_json::json!({ "from": owner.name, "to": repo.me().name }));
    if args.dry.dry_run {
        context.out.line(format_args!("would take the repository over from {}", owner.name));
        return Ok(());
    }
    repo.take_over()?;
    context.out.line(format_args!("taken over from {}", owner.name));
    Ok(())
}
