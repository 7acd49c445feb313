//! `backup`: stores a restore point of a machine.
//!
//! Not here: how it is stored ([`crate::backup`]).

use std::path::PathBuf;

use aquifer_formats::repo::{DiskName, record::Consistency};

use super::NamedSource;
use crate::{
    backup::{self, Hint, Order, Wanted, describe},
    cli::DryRun,
    context::Context,
    fail::{Code, Fail, Result},
    repository,
    site::OnImpossible,
    source::{KeyOptions, SourceOptions},
};

/// Options of `backup`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the machine
    #[arg(value_name = "MACHINE")]
    pub machine: String,
    /// A disk and where its content is read; may be given several times
    #[arg(long, value_name = "NAME=SOURCE", required = true)]
    pub disk: Vec<NamedSource>,
    /// The machine's description: TOML or libvirt domain XML
    #[arg(long = "machine", value_name = "FILE")]
    pub description: Option<PathBuf>,
    /// The file with its UEFI variables (libvirt's <nvram>), to travel with the point
    #[arg(long, value_name = "FILE")]
    pub nvram: Option<PathBuf>,
    /// Store everything, standing on no earlier point
    #[arg(long)]
    pub full: bool,
    /// Copy nothing: the point stands on the source's own files, which have to stay as they are; later points store only
    /// what differs from them
    #[arg(long, conflicts_with_all = ["full", "bitmap"])]
    pub link: bool,
    /// Read only what this bitmap of the source says has changed since the last point: one that counted already when that was made
    #[arg(long, value_name = "NAME", conflicts_with = "full")]
    pub bitmap: Option<String>,
    /// Also follow backing files that lie in this folder; may be given several times
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// What opens encrypted snapshots.
    #[command(flatten)]
    pub key: KeyOptions,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let stop = context.stop()?;
    let repo = if args.dry.dry_run { repository::open(context)? } else { repository::open_to_change(context)? };
    let wanted = open_sources(context, args)?;
    let about = describe::About {
        machine: &args.machine,
        description: args.description.as_deref(),
        nvram: args.nvram.as_deref(),
        left_out: &[],
    };
    let description = describe::describe(context, &about, &wanted)?;
    let known = match repo.machine(&args.machine) {
        Ok(machine) => Some(machine),
        Err(aquifer_formats::repo::Error::NotFound { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let before = known.as_ref().map_or(Ok(None), |machine| backup::newest(&repo, machine))?;
    let parent = before.as_ref().filter(|_| !args.full && !args.link);
    let order = Order {
        context,
        by: "backup",
        hand: None,
        full: args.full,
        fallback: OnImpossible::Full,
        consistency: Consistency::Unknown,
        created: None,
        origin: None,
        instead: None,
        stop,
        pace: &backup::at_will,
        ahead: None,
        stages: None,
        notes: None,
    };
    if let (true, Some(machine)) = (args.dry.dry_run, &known) {
        order.warn_of_gone_disks(machine, before.as_ref(), &|disk| wanted.iter().any(|known| known.name == *disk));
    }
    if args.dry.dry_run && args.link {
        return order.plan_link(&wanted);
    }
    if args.dry.dry_run {
        return order.plan(&repo, &wanted, parent).map(drop);
    }
    if args.link {
        // Before the machine is made known.
        order.check_link(&wanted)?;
    }
    let machine = match known {
        Some(machine) => machine,
        None => repo.machine_or_new(&args.machine)?,
    };
    let made = if args.link {
        order.link(&repo, &machine, &wanted, description)?
    } else {
        order.store(&repo, &machine, parent, &wanted, description)?
    };
    order.tell_of_gone_disks(&repo, &machine, &made.record, &[])
}

fn open_sources(context: &Context, args: &Args) -> Result<Vec<Wanted>> {
    let options =
        SourceOptions { allow_backing: args.allow_backing.clone(), key: args.key.clone(), ..SourceOptions::default() };
    let mut wanted: Vec<Wanted> = Vec::new();
    for named in &args.disk {
        let name =
            DiskName::new(named.name.as_str()).map_err(|error| Fail { code: Code::Usage, ..Fail::from(error) })?;
        if wanted.iter().any(|known| known.name == name) {
            return Err(Fail::new(Code::Usage, format!("the disk {name} is named twice")));
        }
        let hint = args.bitmap.clone().map_or(Hint::None, Hint::Named);
        wanted.push(backup::open_source(context, &name, &named.source, &options, hint)?);
    }
    Ok(wanted)
}
